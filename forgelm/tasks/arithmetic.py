"""Sums and differences to be worked out, such as ``47+85=`` and ``132``.

Both numbers are below 100, a difference is never negative. A problem is in one split only, and
``85+47=`` counts as the same problem as ``47+85=``.
"""

import random
from functools import cache

SPLITS: tuple[str, ...] = ("train", "validation")

_LIMIT = 100
_VALIDATION = 500


def rows(split: str) -> list[dict[str, str]]:
    """Return the rows of a split, `prompt` and `completion`, the same in every process.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; valid splits: {', '.join(SPLITS)}")
    problems = _problems()
    chosen = problems[:_VALIDATION] if split == "validation" else problems[_VALIDATION:]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in chosen]


@cache
def _problems() -> tuple[tuple[str, str], ...]:
    """Return each problem once, in a random order."""
    rng = random.Random("arithmetic")
    problems = []
    for larger in range(_LIMIT):
        for smaller in range(larger + 1):
            first, second = rng.sample((larger, smaller), 2)
            problems.append((f"{first}+{second}=", str(first + second)))
            problems.append((f"{larger}-{smaller}=", str(larger - smaller)))
    rng.shuffle(problems)
    return tuple(problems)
