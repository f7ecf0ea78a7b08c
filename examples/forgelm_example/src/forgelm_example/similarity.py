"""How alike two texts are: as a metric for evaluation, and as a reward for mode=rl."""

from collections.abc import Sequence
from difflib import SequenceMatcher


def similarity(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean likeness of what was answered and what was wanted, from 0 to 1."""
    pairs = zip(predictions, references, strict=True)
    return sum(_likeness(*pair) for pair in pairs) / len(references)


def similar(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """The likeness of each completion to the data's own, from 0 to 1."""
    pairs = zip(completions, references, strict=True)
    return [_likeness(completion.strip(), reference) for completion, reference in pairs]


def _likeness(ours: str, theirs: str) -> float:
    return SequenceMatcher(None, ours, theirs, autojunk=False).ratio()
