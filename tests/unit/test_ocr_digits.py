"""The embedded lines of digits: the same every time, no digit in both splits."""

from __future__ import annotations

import numpy
import pytest

from forgelm.tasks import ocr_digits


def test_no_digit_is_in_both_splits() -> None:
    train, validation = map(ocr_digits.sources, ocr_digits.SPLITS)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == list(range(1797))


def test_no_image_of_a_digit_is_there_twice() -> None:
    from sklearn.datasets import load_digits

    images = load_digits().images
    assert len(numpy.unique(images.reshape(len(images), -1), axis=0)) == len(images)


@pytest.mark.parametrize("split", ocr_digits.SPLITS)
def test_rows_are_the_same_every_time(split: str) -> None:
    first, second = ocr_digits.rows(split), ocr_digits.rows(split)
    assert [row["text"] for row in first] == [row["text"] for row in second]
    assert all(a["image"] == b["image"] for a, b in zip(first, second, strict=True))
    assert {len(row["text"]) for row in first} == {2, 3, 4, 5, 6}
    assert {row["image"].size for row in first} == {(64, 16)}


def test_a_line_shows_its_digits() -> None:
    """As much ink as those of its digits have, in images of the same split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for row in ocr_digits.rows("validation")[:20]:
        ink = 16 * (1 - numpy.asarray(row["image"]) / 255)
        numbers = [int(digit) for digit in row["text"]]
        own = [
            [
                digits.images[n].sum()
                for n in ocr_digits.sources("validation")
                if d == digits.target[n]
            ]
            for d in numbers
        ]
        assert sum(map(min, own)) - 1 <= ink.sum() <= sum(map(max, own)) + 1


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; valid splits: train, validation"):
        ocr_digits.rows("test")
