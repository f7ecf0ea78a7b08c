"""What is measured, by scikit-learn, scipy and jiwer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from forgelm import plugins
from forgelm.config.metrics import BUILT_IN
from forgelm.errors import RunError


def measure(metrics: Sequence[str], predictions: Any, references: Any) -> dict[str, float]:
    """Each metric's value. Both are arrays [rows] of label numbers or scores, or lists of texts.

    A correlation of constant scores has no value and is nan.

    Raises:
        RunError: another package's metric failed.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: _value(name, predictions, references) for name in metrics}


def load(metrics: Sequence[str]) -> None:
    """Load other packages' metrics now: one that can't be is found before training.

    Raises:
        ConfigError: one can't be loaded.
    """
    for name in metrics:
        if name not in BUILT_IN:
            plugins.load(plugins.METRICS, name)


def _value(name: str, predictions: Any, references: Any) -> float:
    if name in _FUNCTIONS:
        return float(_FUNCTIONS[name](predictions, references))
    function = plugins.load(plugins.METRICS, name)
    try:
        return float(function(predictions, references))
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise RunError(f"the metric {name} failed: {type(error).__name__}: {said}") from error


def _accuracy(predictions: Any, labels: Any) -> float:
    return float((predictions == labels).mean())


def _f1(average: str) -> Callable[[Any, Any], float]:
    def f1(predictions: Any, labels: Any) -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(labels, predictions, average=average, zero_division=0))

    return f1


def _matthews(predictions: Any, labels: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: Any, labels: Any) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(predictions, labels)[0])


def _spearman(predictions: Any, labels: Any) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(predictions, labels)[0])


def _mse(predictions: Any, labels: Any) -> float:
    return float(((predictions - labels) ** 2).mean())


def _exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    pairs = zip(predictions, references, strict=True)
    return sum(ours == theirs for ours, theirs in pairs) / len(references)


def _cer(predictions: Sequence[str], references: Sequence[str]) -> float:
    import jiwer

    return float(jiwer.cer(list(references), list(predictions)))


def _wer(predictions: Sequence[str], references: Sequence[str]) -> float:
    import jiwer

    return float(jiwer.wer(list(references), list(predictions)))


_FUNCTIONS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _accuracy,
    "f1": _f1("binary"),
    "f1_macro": _f1("macro"),
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "mse": _mse,
    "exact_match": _exact_match,
    "cer": _cer,
    "wer": _wer,
}
