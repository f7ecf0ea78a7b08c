"""What rewards give, and what they say when they can't."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
import torch

from forgelm.config.rewards import BUILT_IN
from forgelm.config.schema import RlConfig
from forgelm.errors import ConfigError, RunError
from forgelm.tasks.rewards import Checked, build, last_number


def reward(name: str, **keys: Any) -> Checked:
    pattern = keys.pop("pattern", None)
    (made,) = build(RlConfig(rewards=[name], **keys), pattern)
    return made


def worth(made: Checked, completion: str, reference: str = "", tokens: int = 0) -> float | None:
    (value,) = made(
        prompts=["p"],
        completions=[completion],
        references=[reference],
        completion_ids=[list(range(tokens))],
    )
    return value


@pytest.mark.parametrize(
    ("name", "completion", "reference", "value"),
    [
        ("exact_match", " 12\n", "12", 1),
        ("exact_match", "12.", "12", 0),
        ("exact_match", "", "12", 0),
        ("contains", "It is Paris, of course.", "Paris", 1),
        ("contains", "paris", "Paris", 0),
        ("numeric", "So 3 + 4 makes 7.", "7", 1),
        ("numeric", "$1,234.50", "1234.5", 1),
        ("numeric", "1,234", "The answer is 1234.00", 1),
        ("numeric", "7, or 8", "7", 0),
        ("numeric", "none", "7", 0),
        ("numeric", "7", "none", 0),
    ],
)
def test_what_an_answer_is_worth(name: str, completion: str, reference: str, value: float) -> None:
    assert worth(reward(name), completion, reference) == value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("x = -3", "-3"),
        ("x = \u22123", "-3"),
        ("5-3", "3"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("12,345,678.9 km", "12345678.9"),
        (".5", "0.5"),
        ("about 20%.", "20"),
        ("nothing", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_a_format_must_match_from_start_to_end() -> None:
    made = reward("format", format_pattern="<think>.*</think>.+")
    assert worth(made, "<think>a\nb</think>7") == 1
    assert worth(made, "Well, <think>a</think>7") == 0
    assert worth(made, "<think>a</think>") == 0


@pytest.mark.parametrize(("tokens", "value"), [(0, 0), (8, 0), (10, -0.25), (16, -1), (99, -1)])
def test_length_costs_nothing_up_to_its_target(tokens: int, value: float) -> None:
    assert worth(reward("length", length_target=8), "", tokens=tokens) == value


def called(function: Any, *completions: str) -> Any:
    return Checked("judge", function)(
        prompts=[f"prompt {number}" for number, _ in enumerate(completions, 1)],
        completions=list(completions),
        references=["r"] * len(completions),
        completion_ids=[[1]] * len(completions),
    )


def test_a_reward_is_given_what_it_names() -> None:
    def none(**given: Any) -> list[None]:
        assert sorted(given) == ["completion_ids", "completions", "prompts", "references"]
        return [None]

    async def later(prompts: list[Any], scale: float = 2.0) -> list[float]:
        return [scale] * len(prompts)

    assert called(none, "a") == [None]
    assert called(later, "a", "b") == [2, 2]
    assert called(lambda references: [len(r) for r in references], "a") == [1]


def test_answers_are_looked_for_in_both() -> None:
    pattern = r"#### (.*)"
    assert worth(reward("exact_match", pattern=pattern), "so #### 7", "3 + 4 #### 7") == 1
    assert worth(reward("exact_match", pattern=pattern), "7", "3 + 4 #### 7") == 0
    assert worth(reward("numeric", pattern=pattern), "#### 7.0 apples", "3 + 4 #### 7") == 1
    assert worth(reward("contains", pattern=pattern), "it is 7", "3 + 4 #### 7") == 1


def test_whether_references_are_needed() -> None:
    needed = [name for name in BUILT_IN if reward(name, format_pattern=".*").needs_references]
    assert needed == ["exact_match", "contains", "numeric"]
    assert not Checked("judge", lambda **given: [1.0]).needs_references
    assert not Checked("judge", lambda completions, references=None: [1.0]).needs_references


def wrong(value: Any) -> Any:
    return lambda completions: [value if "bad" in text else 1.0 for text in completions]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("high", "'high'"),
        ("1", "'1'"),
        (10**400, f"1{'0' * 56}..."),
        (10**5000, "an integer of 16,610 bits"),
        (torch.ones(2), "tensor([1., 1.])"),
    ],
    ids=["nan", "inf", "text", "digits", "huge", "too huge", "table"],
)
def test_a_value_that_is_no_number_is_named(value: Any, said: str) -> None:
    with pytest.raises(RunError) as error:
        called(wrong(value), "good", "bad")
    assert str(error.value) == (
        f"the reward judge returned {said} for the prompt 'prompt 2' and the completion 'bad': "
        "it must be a finite number, or None where the reward doesn't apply"
    )


def test_a_reward_that_raises_is_named_with_its_row() -> None:
    def fails(completions: list[str]) -> list[float]:
        return [1 / (len(text) - 3) for text in completions]

    with pytest.raises(RunError) as error:
        called(fails, "good", "bad")
    assert str(error.value) == (
        "the reward judge failed for the prompt 'prompt 2' and the completion 'bad': "
        "ZeroDivisionError: division by zero"
    )


def test_a_reward_gives_one_value_for_each_completion() -> None:
    with pytest.raises(RunError, match="returned 1 values for 2 completions: it must return one"):
        called(lambda completions: [1.0], "a", "b")


def test_what_nobody_gives_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        Checked("judge", lambda completions, solution: [1.0])
    assert str(error.value) == (
        "the reward judge takes solution, which nobody gives it: "
        "a reward is given prompts, completions, references, completion_ids"
    )
