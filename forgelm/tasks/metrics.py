"""What is measured, by scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from forgelm.config.schema import Metric


def measure(metrics: Sequence[Metric], predictions: Any, labels: Any) -> dict[str, float]:
    """Each metric's value. `predictions` and `labels` are [rows]: label numbers, or scores.

    A correlation of constant scores has no value and is nan.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {metric.name: float(_FUNCTIONS[metric](predictions, labels)) for metric in metrics}


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


_FUNCTIONS: dict[Metric, Callable[[Any, Any], float]] = {
    Metric.accuracy: _accuracy,
    Metric.f1: _f1("binary"),
    Metric.f1_macro: _f1("macro"),
    Metric.matthews_correlation: _matthews,
    Metric.pearson: _pearson,
    Metric.spearmanr: _spearman,
    Metric.mse: _mse,
}
