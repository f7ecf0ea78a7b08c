"""A small text-recognition task: strings of handwritten digits and what they say.

The digits are those that scikit-learn ships (`load_digits`: 8 by 8 pixels, many writers). They are
parted into the splits first, so no handwriting seen in training is in the validation split. A
string of two to six digits is written on a line of fixed size, with gaps, start and height drawn at
random, dark on white. The same split is made every time, pixel by pixel.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

SPLITS: tuple[str, ...] = ("train", "validation")
SIZE = (64, 16)
"""Width and height of every image, in pixels."""

_ROWS = {"train": 4000, "validation": 400}
_HELD_OUT = 397
_LENGTHS = range(2, 7)
_GAPS = range(3)
_LIFT = 2
_INDENT = 4
_GREYS = 16
_SEED = 0


class Line(NamedTuple):
    """An image of one line, 8-bit greyscale of `SIZE`, and the digits on it."""

    image: Image.Image
    text: str


def generate(split: str) -> list[Line]:
    """All lines of a split, always the same ones."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    sources = source_numbers(split)
    rng = random.Random(f"{_SEED} {split}")
    return [
        _line([rng.choice(sources) for _ in range(rng.choice(_LENGTHS))], digits, rng)
        for _ in range(_ROWS[split])
    ]


def source_numbers(split: str) -> list[int]:
    """Which of scikit-learn's digits a split is written with."""
    from sklearn.datasets import load_digits

    order = list(range(len(load_digits().target)))
    random.Random(_SEED).shuffle(order)
    return order[:_HELD_OUT] if split == "validation" else order[_HELD_OUT:]


def _line(numbers: list[int], digits: Any, rng: random.Random) -> Line:
    import numpy
    from PIL import Image

    width, height = SIZE
    side = digits.images.shape[1]
    gaps = [rng.choice(_GAPS) for _ in numbers[1:]]
    left = rng.randint(0, _INDENT)
    top = (height - side) // 2
    ink = numpy.zeros((height, width))
    for number, gap in zip(numbers, [*gaps, 0], strict=True):
        row = top + rng.randint(-_LIFT, _LIFT)
        ink[row : row + side, left : left + side] = digits.images[number]
        left += side + gap
    grey = numpy.round(255 * (1 - ink / _GREYS)).astype(numpy.uint8)
    return Line(Image.fromarray(grey), "".join(str(digits.target[n]) for n in numbers))
