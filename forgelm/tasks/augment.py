"""Random distortion of images of text, for training."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_DEGREES = 4.0
_SHIFT = 0.08
_SCALE = 0.15
_TONE = 0.4
_NOISE = 24.0
_WHITE = (255, 255, 255)


def augmented(image: Image.Image, strength: float) -> Image.Image:
    """A distorted copy of an RGB image, of the same size; with `strength` 0 the image itself.

    Turned, scaled and shifted about its centre, white coming in at the borders; brightness and
    contrast changed; Gaussian noise added. All amounts grow in proportion to `strength` (0 to 1)
    and are drawn from the generators of `random` and `numpy.random`.
    """
    if not strength:
        return image
    return _noisy(_toned(_moved(image, strength), strength), strength)


def _moved(image: Image.Image, strength: float) -> Image.Image:
    """Turned, scaled and shifted in one resampling."""
    import math

    from PIL import Image

    width, height = image.size
    angle = math.radians(_around(_DEGREES * strength))
    scale = 1 + _around(_SCALE * strength)
    across, down = (_around(_SHIFT * strength) * height for _ in range(2))
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = width / 2, height / 2
    # PIL wants the place in the old image of each point of the new one.
    matrix = (
        *(cos, sin, x - cos * (x + across) - sin * (y + down)),
        *(-sin, cos, y + sin * (x + across) - cos * (y + down)),
    )
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_WHITE
    )


def _toned(image: Image.Image, strength: float) -> Image.Image:
    from PIL import ImageEnhance

    brighter = ImageEnhance.Brightness(image).enhance(1 + _around(_TONE * strength) / 2)
    return ImageEnhance.Contrast(brighter).enhance(1 + _around(_TONE * strength))


def _noisy(image: Image.Image, strength: float) -> Image.Image:
    import numpy
    from PIL import Image

    pixels = numpy.asarray(image).astype(numpy.float32)
    deviation = random.uniform(0, _NOISE * strength)
    pixels += numpy.random.normal(0, deviation, (*pixels.shape[:2], 1))
    return Image.fromarray(pixels.round().clip(0, 255).astype(numpy.uint8))


def _around(limit: float) -> float:
    return random.uniform(-limit, limit)
