"""What a completion is worth: rewards by name, our own and those of other packages.

A reward is a function of lists, one entry for each completion, that returns as many numbers; None
stands for a completion that it doesn't apply to. It is given, by keyword, those of these that it
names, or all of them if it takes any keyword:

- `completions`: the texts that were generated,
- `prompts`: what they go on from: texts, or lists of chat messages,
- `references`: the data's own completions, or the answers in them (`task.answer_pattern`),
- `completion_ids`: the tokens of the completions.
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

Reward = Callable[..., Sequence[float | None]]

GIVEN = ("prompts", "completions", "references", "completion_ids")
_SHOWN = 60
_NUMBER = re.compile(r"(?:(?<!\w)[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def exact_match(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the completion is the reference, blanks around them aside, else 0."""
    pairs = zip(completions, references, strict=True)
    return [float(ours.strip() == theirs.strip()) for ours, theirs in pairs]


def contains(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the reference stands anywhere in the completion, else 0."""
    pairs = zip(completions, references, strict=True)
    return [float(theirs.strip() in ours) for ours, theirs in pairs]


def numeric(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the last numbers of both are equal, however they are written, else 0."""
    pairs = zip(completions, references, strict=True)
    return [float(_equal(last_number(ours), last_number(theirs))) for ours, theirs in pairs]


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
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def _equal(ours: Decimal | None, theirs: Decimal | None) -> bool:
    return ours is not None and ours == theirs


_BUILT_IN: dict[str, Callable[[RlConfig], Reward]] = {
    "exact_match": lambda mode: exact_match,
    "contains": lambda mode: contains,
    "numeric": lambda mode: numeric,
    "format": lambda mode: partial(format, pattern=str(mode.format_pattern)),
    "length": lambda mode: partial(length, target=mode.length_target),
}


def names() -> list[str]:
    """Every reward that can be named here."""
    return [*_BUILT_IN, *plugins.names(plugins.REWARDS)]


def build(mode: RlConfig) -> list[Checked]:
    """The config's rewards.

    Raises:
        ConfigError: one that another package adds can't be loaded, or needs what nobody gives.
    """
    return [Checked(name, _function(name, mode)) for name in mode.rewards]


def _function(name: str, mode: RlConfig) -> Reward:
    if name in _BUILT_IN:
        return _BUILT_IN[name](mode)
    found: Reward = plugins.load(plugins.REWARDS, name)
    return found


class Checked:
    """A reward whose failures and values say what they are about, called as trl calls rewards."""

    def __init__(self, name: str, function: Reward) -> None:
        self.name = self.__name__ = name
        self.function = function
        self.taken = _taken(name, function)

    @property
    def needs_references(self) -> bool:
        return "references" in self.taken

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **given: Any
    ) -> list[float | None]:
        """One number for each completion, None where the reward doesn't apply.

        Raises:
            RunError: the reward raised, or returned something else.
        """
        texts = [text_of(completion) for completion in completions]
        known = {"prompts": prompts, "completions": texts, **given}
        taken = {key: known[key] for key in self.taken if key in known}
        try:
            values = self._called(taken)
        except Exception as error:
            place = self._culprit(taken, len(texts))
            where = "" if place is None else f" for {_shown(prompts[place], texts[place])}"
            said = " ".join(str(error).split())[:200]
            raise RunError(
                f"the reward {self.name} failed{where}: {type(error).__name__}: {said}"
            ) from error
        if len(values) != len(texts):
            raise RunError(
                f"the reward {self.name} returned {len(values)} values for {len(texts)} "
                "completions: it must return one for each"
            )
        for value, prompt, text in zip(values, prompts, texts, strict=True):
            if value is not None and not _finite(value):
                raise RunError(
                    f"the reward {self.name} returned {value!r} for {_shown(prompt, text)}: it "
                    "must be a finite number, or None where the reward doesn't apply"
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
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            raise ConfigError(
                f"the reward {name} takes {key}, which nobody gives it: "
                f"a reward is given {', '.join(GIVEN)}"
            )
    return taken


def text_of(completion: Any) -> str:
    """A completion as text: trl hands out those of chats as lists of messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _shown(prompt: Any, completion: str) -> str:
    said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return f"the prompt {_cut(said)} and the completion {_cut(completion)}"


def _cut(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")
