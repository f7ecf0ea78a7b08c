"""The metrics by name: what each needs, and which way is better. Nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from forgelm import plugins
from forgelm.config.schema import Kind, Problem, TaskConfig

_TEXT = frozenset({Kind.causal_lm, Kind.seq2seq, Kind.image_to_text})


@dataclass(frozen=True)
class About:
    """What a metric is for. `answers`: the model has to generate."""

    kinds: frozenset[Kind]
    problem: Problem = Problem.classification
    rises: bool = True
    answers: bool = False


_LABELS = About(frozenset({Kind.text_classification}))
_SCORES = About(frozenset({Kind.text_classification}), Problem.regression)
_ANSWERS = About(_TEXT, answers=True)

BUILT_IN: dict[str, About] = {
    "accuracy": _LABELS,
    "f1": _LABELS,
    "f1_macro": _LABELS,
    "matthews_correlation": _LABELS,
    "pearson": _SCORES,
    "spearmanr": _SCORES,
    "mse": About(frozenset({Kind.text_classification}), Problem.regression, rises=False),
    "perplexity": About(_TEXT, rises=False),
    "token_accuracy": About(_TEXT),
    "exact_match": _ANSWERS,
    "cer": About(_TEXT, rises=False, answers=True),
    "wer": About(_TEXT, rises=False, answers=True),
}


def fitting(task: TaskConfig) -> list[str]:
    """The metrics that a task of this kind can have, other packages' included."""
    ours = [name for name, about in BUILT_IN.items() if _fits(about, task)]
    return [*ours, *plugins.names(plugins.METRICS)]


def answers(task: TaskConfig) -> bool:
    """Whether a metric of a text task needs the model's answers."""
    if task.kind is Kind.text_classification:
        return False
    return any(name not in BUILT_IN or BUILT_IN[name].answers for name in task.metrics)


def _fits(about: About, task: TaskConfig) -> bool:
    same = task.kind is not Kind.text_classification or about.problem is task.problem
    return task.kind in about.kinds and same
