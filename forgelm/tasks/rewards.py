"""What a completion is worth: rewards by name, our own and those of other packages.

A reward is a function of lists, one entry for each completion, that returns as many numbers; None
stands for a completion that it doesn't apply to. It is given, by keyword, those of these that it
names, or all of them if it takes any keyword:

- `completions`: the texts that were generated,
- `prompts`: what they go on from: texts, or lists of chat messages,
- `references`: the data's own completions; None each where it has none,
- `completion_ids`: the tokens of the completions, the end's included.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from forgelm import plugins
from forgelm.config.schema import RlConfig
from forgelm.errors import ConfigError, RunError
from forgelm.tasks.texts import answer_in

Reward = Callable[..., Sequence[float | None]]

GIVEN = ("prompts", "completions", "references", "completion_ids")
_SHOWN = 60
_MINUS = "\u2212"
_NUMBER = re.compile(r"(?:(?<!\w)[-\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def exact_match(
    completions: Sequence[str], references: Sequence[str], pattern: str | None
) -> list[float]:
    """1 where the answers in both are the same text, else 0."""
    return [
        float(answer_in(ours, pattern) == answer_in(theirs, pattern))
        for ours, theirs in zip(completions, references, strict=True)
    ]


def contains(
    completions: Sequence[str], references: Sequence[str], pattern: str | None
) -> list[float]:
    """1 where the reference's answer stands anywhere in the completion, else 0."""
    pairs = zip(completions, references, strict=True)
    return [float(answer_in(theirs, pattern) in ours) for ours, theirs in pairs]


def numeric(
    completions: Sequence[str], references: Sequence[str], pattern: str | None
) -> list[float]:
    """1 where the last numbers of both answers are equal, however they are written, else 0."""
    numbers = [
        [last_number(answer_in(text, pattern)) for text in side]
        for side in (completions, references)
    ]
    return [
        float(ours is not None and ours == theirs) for ours, theirs in zip(*numbers, strict=True)
    ]


def format(completions: Sequence[str], pattern: str) -> list[float]:
    """1 where the pattern matches all of the completion, line breaks included, else 0."""
    found = re.compile(pattern, re.DOTALL)
    return [float(found.fullmatch(completion) is not None) for completion in completions]


def length(completion_ids: Sequence[Sequence[int]], target: int) -> list[float]:
    """0 up to `target` tokens, from there down to -1 at twice as many.

    The form is that of DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476).
    """
    return [max(-1.0, min(0.0, (target - len(ids)) / target)) for ids in completion_ids]


def last_number(text: str) -> Decimal | None:
    """The last number in a text; commas may part its thousands."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace(_MINUS, "-")) if found else None


_BUILT_IN: dict[str, Callable[[RlConfig, str | None], Reward]] = {
    "exact_match": lambda mode, pattern: partial(exact_match, pattern=pattern),
    "contains": lambda mode, pattern: partial(contains, pattern=pattern),
    "numeric": lambda mode, pattern: partial(numeric, pattern=pattern),
    "format": lambda mode, pattern: partial(format, pattern=str(mode.format_pattern)),
    "length": lambda mode, pattern: partial(length, target=mode.length_target),
}


def build(mode: RlConfig, answer_pattern: str | None) -> list[Checked]:
    """The config's rewards; `answer_pattern` is what finds the answer in a text.

    Raises:
        ConfigError: one that another package adds can't be loaded, or needs what nobody gives.
    """
    return [Checked(name, _function(name, mode, answer_pattern)) for name in mode.rewards]


def useless(name: str, reference: str, pattern: str | None) -> str | None:
    """Why a reward of ours can't compare anything with a reference; None: it can."""
    answer = answer_in(reference, pattern)
    if name in ("exact_match", "contains", "numeric") and not answer:
        return (
            "the answer is empty"
            if pattern is None
            else f"task.answer_pattern finds no answer in {_cut(reference)}"
        )
    if name == "numeric" and last_number(answer) is None:
        return f"there is no number in {_cut(answer)}"
    return None


def _function(name: str, mode: RlConfig, pattern: str | None) -> Reward:
    if name in _BUILT_IN:
        return _BUILT_IN[name](mode, pattern)
    found: Reward = plugins.load(plugins.REWARDS, name)
    return found


class Checked:
    """A reward whose failures and values say what they are about, called as trl calls rewards."""

    def __init__(self, name: str, function: Reward) -> None:
        self.name = self.__name__ = name
        self.function = function
        self.taken = _taken(name, function)
        named = inspect.signature(function).parameters.get("references")
        self.needs_references = named is not None and named.default is named.empty

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **given: Any
    ) -> list[float | None]:
        """One number for each completion, None where the reward doesn't apply.

        Raises:
            RunError: the reward raised, or returned something else.
        """
        known = {"prompts": prompts, "completions": completions, **given}
        taken = {key: known[key] for key in self.taken}
        try:
            values = self._called(taken)
        except Exception as error:
            place = self._culprit(taken, len(completions))
            where = "" if place is None else f" for {_shown(prompts[place], completions[place])}"
            said = " ".join(str(error).split())[:200]
            raise RunError(
                f"the reward {self.name} failed{where}: {type(error).__name__}: {said}"
            ) from error
        if len(values) != len(completions):
            raise RunError(
                f"the reward {self.name} returned {len(values)} values for {len(completions)} "
                "completions: it must return one for each"
            )
        for value, prompt, text in zip(values, prompts, completions, strict=True):
            if value is not None and not _finite(value):
                raise RunError(
                    f"the reward {self.name} returned {_said(value)} for "
                    f"{_shown(prompt, text)}: it must be a finite number, or None where the reward "
                    "doesn't apply"
                )
        return [None if value is None else float(value) for value in values]

    def _called(self, taken: dict[str, Any]) -> list[float | None]:
        made: Any = self.function(**taken)
        return list(asyncio.run(made) if inspect.iscoroutine(made) else made)

    def _culprit(self, taken: dict[str, Any], count: int) -> int | None:
        """The first completion that the reward also fails for alone."""
        for place in range(count):
            try:
                self._called({key: value[place : place + 1] for key, value in taken.items()})
            except Exception:
                return place
        return None


def _taken(name: str, function: Reward) -> list[str]:
    """Which of GIVEN a reward is called with."""
    taken = []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return list(GIVEN)
        if key in GIVEN:
            taken.append(key)
        elif (
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        ):
            raise ConfigError(
                f"the reward {name} takes {key}, which nobody gives it: "
                f"a reward is given {', '.join(GIVEN)}"
            )
    return taken


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value)) and not isinstance(value, str | bytes)
    # What stands for a number is converted by its own code, an array's for instance.
    except Exception:
        return False


def _said(value: Any) -> str:
    try:
        return _shortened(" ".join(repr(value).split()))
    # Python writes out no integer of more than some thousand digits.
    except ValueError:
        return f"an integer of {value.bit_length():,} bits"


def _shown(prompt: Any, completion: str) -> str:
    said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return f"the prompt {_cut(said)} and the completion {_cut(completion)}"


def _cut(text: str) -> str:
    return repr(_shortened(text))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
