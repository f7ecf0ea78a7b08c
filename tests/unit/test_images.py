"""Reading and distorting images."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from forgelm.tasks.augment import augmented
from forgelm.tasks.images import Unreadable, read
from forgelm.tasks.ocr_digits import rows

LINE: Image.Image = rows("validation")[0]["image"].convert("RGB")


def distorted(seed: int, strength: float) -> Image.Image:
    random.seed(seed)
    numpy.random.seed(seed)
    return augmented(LINE, strength)


def distance(image: Image.Image) -> float:
    """Mean difference to the undistorted line."""
    ours, theirs = (numpy.asarray(each).astype(float) for each in (image, LINE))
    return float(abs(ours - theirs).mean())


def test_distortion_repeats_under_the_same_seeds() -> None:
    import torch

    state = torch.get_rng_state()
    assert distorted(1, 0.5) == distorted(1, 0.5)
    assert distorted(1, 0.5) != distorted(2, 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_distortion_grows_with_its_strength() -> None:
    means = [
        numpy.mean([distance(distorted(seed, strength)) for seed in range(50)])
        for strength in (0.0, 0.25, 0.5, 1.0)
    ]
    assert means[0] == 0
    assert means == sorted(means)
    image = distorted(0, 1.0)
    assert (image.size, image.mode) == ((64, 16), "RGB")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return {"bytes": content.getvalue(), "path": None}


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    clear.putpixel((0, 0), (9, 9, 9, 255))
    found = read(encoded(clear))
    assert (found.getpixel((0, 0)), found.getpixel((1, 1))) == ((9, 9, 9), (255, 255, 255))


def test_an_image_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).size == (2, 4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_every_mode_of_8_bits_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert read(encoded(Image.new(mode, (2, 2)), kind)).mode == "RGB"


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    whole = encoded(LINE)["bytes"]
    cases: dict[str, dict[str, Any]] = {
        "there is no image": {"bytes": None, "path": None},
        "no such file": {"bytes": None, "path": str(tmp_path / "none.png")},
        "not an image that Pillow can read": {"bytes": b"hello", "path": None},
        "truncated": {"bytes": whole[: len(whole) // 2], "path": None},
        "mode I;16 has more than 8 bits a channel": encoded(Image.new("I;16", (2, 2))),
    }
    for said, image in cases.items():
        with pytest.raises(Unreadable, match=said):
            read(image)
