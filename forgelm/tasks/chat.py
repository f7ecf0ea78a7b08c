"""Chats as the model's own template writes them, and which of their text the model is to learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forgelm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]
"""Turns {role, content}: the content is text, or for a processor a list of parts."""


@dataclass(frozen=True)
class Written:
    """A chat as text. `spans` are the (start, end) of what the assistant says, its end mark
    included; `answer_from` is where its last turn begins, which an evaluation asks for.

    `all_turns`: whether every assistant turn that follows another is among the spans.
    """

    text: str
    spans: list[tuple[int, int]]
    answer_from: int
    all_turns: bool


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse chats for a tokenizer that has no template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{name}: its tokenizer has no chat template, which messages need; choose a model "
            "that was trained to chat, or give prompt and completion columns"
        )


def write(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Written:
    """Write a chat that has an assistant turn after another turn.

    A first turn isn't to be learnt: it answers nothing. A template may rewrite earlier turns (leave
    out their reasoning, say); then only the last assistant turn, which stands as it will be
    generated, is to be learnt.

    Raises:
        ConfigError: the template refuses the chat.
    """
    places = [place for place, turn in enumerate(chat) if turn["role"] == "assistant" and place]
    last = places[-1]
    whole = render(chat[: last + 1], tokenizer, False)
    spans = []
    for place in places:
        before = render(chat[:place], tokenizer, True)
        after = whole if place == last else render(chat[: place + 1], tokenizer, False)
        if whole.startswith(before) and whole.startswith(after):
            spans.append((len(before), len(after)))
    asked = render(chat[:last], tokenizer, True)
    if not whole.startswith(asked):
        raise ConfigError(
            "the model's chat template writes an answer otherwise than it asks for one, so what "
            "is to be learnt can't be told; give prompt and completion columns"
        )
    return Written(whole, spans, len(asked), len(spans) == len(places))


def asked(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text after which the model answers; what stands from the last answer on is left out."""
    return render(opening(chat), tokenizer, True)


def opening(chat: Chat) -> Chat:
    """The turns before the answer that a chat ends with; all of them if it ends otherwise."""
    return chat[:-1] if answered(chat) else chat


def answered(chat: Chat) -> bool:
    """Whether a chat ends with an answer."""
    return str(chat[-1]["role"]) == "assistant"


@contextmanager
def noted(problems: list[str], where: str) -> Iterator[None]:
    """Add a refusal, and which row it is about, to the problems that were found before."""
    try:
        yield
    except ConfigError as error:
        problems += [f"{where}: {problem}" for problem in error.problems]


def render(chat: Chat, tokenizer: Any, generate: bool) -> str:
    """A chat as a tokenizer's or processor's template writes it, open for an answer if `generate`.

    Raises:
        ConfigError: the template refuses the chat.
    """
    try:
        text: Any = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=generate
        )
    except Exception as error:
        roles = ", ".join(turn["role"] for turn in chat)
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the model's chat template refuses a chat of the roles {roles}: {said}"
        ) from error
    return str(text)
