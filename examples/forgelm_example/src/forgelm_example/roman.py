"""Numbers to be written in Roman numerals, such as ``47=`` and ``XLVII``."""

import random

SPLITS = ("train", "validation")

_LARGEST = 1999
_VALIDATION = 200
_NUMERALS = {
    **{1000: "M", 900: "CM", 500: "D", 400: "CD", 100: "C", 90: "XC", 50: "L", 40: "XL"},
    **{10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I"},
}


def rows(split: str) -> list[dict[str, str]]:
    """The rows of one of SPLITS, the same in every process and for every seed."""
    numbers = list(range(1, _LARGEST + 1))
    random.Random("roman").shuffle(numbers)
    chosen = numbers[:_VALIDATION] if split == "validation" else numbers[_VALIDATION:]
    return [{"prompt": f"{number}=", "completion": numeral(number)} for number in chosen]


def numeral(number: int) -> str:
    """A number in Roman numerals."""
    letters = ""
    for value, sign in _NUMERALS.items():
        count, number = divmod(number, value)
        letters += sign * count
    return letters
