"""Sums and differences to be worked out, such as ``470+85=`` and ``555``.

Both numbers have one to three digits, each length being drawn as often as the others; a difference
is never negative. A problem is in one split only, and ``85+470=`` counts as the same problem as
``470+85=``.
"""

import random
from functools import cache

SPLITS: tuple[str, ...] = ("train", "validation")

_ROWS = {"train": 12_000, "validation": 1000}
_DIGITS = 3


def rows(split: str) -> list[dict[str, str]]:
    """Return the rows of a split, `prompt` and `completion`, the same in every process.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; valid splits: {', '.join(SPLITS)}")
    problems = _problems()
    train = _ROWS["train"]
    chosen = problems[:train] if split == "train" else problems[train:]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in chosen]


@cache
def _problems() -> tuple[tuple[str, str], ...]:
    """Return different problems for all splits, in a random order."""
    rng = random.Random("arithmetic")
    problems: dict[tuple[int, str, int], tuple[str, str]] = {}
    while len(problems) < sum(_ROWS.values()):
        numbers = _number(rng), _number(rng)
        larger, sign, smaller = problem = max(numbers), rng.choice("+-"), min(numbers)
        if sign == "+":
            problems.setdefault(problem, (f"{numbers[0]}+{numbers[1]}=", str(larger + smaller)))
        else:
            problems.setdefault(problem, (f"{larger}-{smaller}=", str(larger - smaller)))
    made = list(problems.values())
    # Short problems are soon all drawn: without this they would be the first ones.
    rng.shuffle(made)
    return tuple(made)


def _number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.randint(1, _DIGITS))
