"""A small text-recognition task: lines of handwritten digits and what they say.

The digits are those that scikit-learn ships (`load_digits`: 8 by 8 pixels, many hands). They are
parted into the splits first, so no digit seen in training is in the validation split. A line has
two to six of them, dark on white; where it begins, the gaps and the heights are drawn at random.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features

SPLITS: tuple[str, ...] = ("train", "validation")

_WIDTH, _HEIGHT = 64, 16
_ROWS = {"train": 4000, "validation": 400}
_HELD_OUT = 397
_LENGTHS = range(2, 7)
_GAPS = range(3)
_LIFT = 2
_INDENT = 4
_DARKEST = 16


def features() -> Features:
    """The columns of `rows`."""
    from datasets import Features, Image, Value

    return Features(image=Image(), text=Value("string"))


def rows(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split, `image` (8-bit grey, 64 by 16 pixels) and `text`, the same in
    every process.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    from sklearn.datasets import load_digits

    numbers, digits = sources(split), load_digits()
    rng = random.Random(f"ocr_digits {split}")
    lines = [
        [rng.choice(numbers) for _ in range(rng.choice(_LENGTHS))] for _ in range(_ROWS[split])
    ]
    return [
        {
            "image": _written([digits.images[number] for number in line], rng),
            "text": "".join(str(digits.target[number]) for number in line),
        }
        for line in lines
    ]


def sources(split: str) -> list[int]:
    """Which of scikit-learn's digits a split is written with.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; valid splits: {', '.join(SPLITS)}")
    order = list(range(len(load_digits().target)))
    random.Random("ocr_digits").shuffle(order)
    return order[:_HELD_OUT] if split == "validation" else order[_HELD_OUT:]


def _written(digits: list[Any], rng: random.Random) -> Any:
    import numpy
    from PIL import Image

    ink = numpy.zeros((_HEIGHT, _WIDTH))
    left = rng.randint(0, _INDENT)
    for digit in digits:
        height, width = digit.shape
        top = (_HEIGHT - height) // 2 + rng.randint(-_LIFT, _LIFT)
        ink[top : top + height, left : left + width] = digit
        left += width + rng.choice(_GAPS)
    return Image.fromarray(numpy.round(255 * (1 - ink / _DARKEST)).astype(numpy.uint8))
