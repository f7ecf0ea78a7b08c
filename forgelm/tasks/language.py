"""Rows of text to be written: prompt and completion, chat messages, or plain text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forgelm.config.schema import TaskConfig
from forgelm.errors import ConfigError
from forgelm.tasks.data import Rows
from forgelm.tasks.sources import (
    check_present,
    load_splits,
    no_texts,
    part,
    read_file,
    refuse,
)

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

PAIR = ("prompt", "completion")
MESSAGES = "messages"
TEXT = "text"


@dataclass(frozen=True)
class Layout:
    """Which columns hold what: exactly one of the three."""

    pair: tuple[str, str] | None = None
    messages: str | None = None
    text: str | None = None

    @property
    def columns(self) -> list[str]:
        return [*(self.pair or ()), *filter(None, (self.messages, self.text))]


def load_rows(task: TaskConfig, revision: str | None, answers: bool = True) -> Rows:
    """Load and check the rows. Each data set has the columns `prompt` and `completion`, or
    `messages` (JSON text of a list of {role, content}), or `text`.

    Without `answers` the completions, and an assistant's turns, need not be there.

    Raises:
        ConfigError: a missing file, split or column, an empty file, bad rows (all of a split).
        RunError: the hub failed.
    """
    splits, fingerprint = load_splits(task, revision)
    made = {
        name: _normalised(task, f"split {name}", split, answers) for name, split in splits.items()
    }
    train = part(made.pop(task.train_split), task.max_train_samples)
    held_out = {name: part(split, task.max_eval_samples) for name, split in made.items()}
    return Rows(train, held_out, None, fingerprint, revision)


def own_rows(task: TaskConfig, data: Path) -> tuple[list[dict[str, Any]], Dataset]:
    """Rows to be answered: as they stand in the file, and with the columns of `load_rows`.

    A completion isn't asked for, nor a chat's last answer.
    """
    rows = read_file(data)
    layout = layout_of(task, str(data), rows.column_names, answers=False)
    return rows.to_list(), _checked(task, layout, str(data), rows, answers=False)


def layout_of(task: TaskConfig, where: str, columns: list[str], answers: bool = True) -> Layout:
    """How rows are laid out: as the config says, else by the columns' conventional names.

    Raises:
        ConfigError: a named column isn't there, or none of the conventional ones is.
    """
    if task.messages_column is not None:
        found = Layout(messages=task.messages_column)
    elif task.prompt_column is not None or task.completion_column is not None:
        found = Layout(pair=(task.prompt_column or PAIR[0], task.completion_column or PAIR[1]))
    elif MESSAGES in columns:
        found = Layout(messages=MESSAGES)
    elif PAIR[0] in columns:
        found = Layout(pair=PAIR)
    elif task.text_column in columns:
        found = Layout(text=task.text_column)
    else:
        raise ConfigError(
            f"{where}: has neither {MESSAGES}, nor {' and '.join(PAIR)}, nor {task.text_column}, "
            f"but {', '.join(columns)}; "
            + (
                "name them with task.messages_column, task.prompt_column and "
                "task.completion_column, or task.text_column"
                if answers
                else f"rename the column in the file, to {PAIR[0]}, say"
            )
        )
    keys = {
        "task.messages_column": found.messages,
        "task.prompt_column": found.pair and found.pair[0],
        "task.completion_column": found.pair and found.pair[1] if answers else None,
        "task.text_column": found.text,
    }
    check_present(keys, where, columns)
    return found


def _normalised(task: TaskConfig, where: str, rows: Dataset, answers: bool) -> Dataset:
    if not len(rows):
        raise ConfigError(f"{where} of task {task.name} has no rows")
    columns = rows.column_names
    layout = layout_of(task, where, columns, answers or task.completion_column is not None)
    given = layout.pair is not None and layout.pair[1] in columns
    return _checked(task, layout, where, rows, answers or given)


def _checked(task: TaskConfig, layout: Layout, where: str, rows: Dataset, answers: bool) -> Dataset:
    from datasets import Dataset

    problems: list[str] = []
    if layout.messages is not None:
        column = layout.messages
        chats = [_chat(task, chat) for chat in rows[column][:]]
        for number, chat in enumerate(chats, 1):
            wrong = _wrong_chat(chat, answers)
            if wrong:
                problems.append(f"{where}, row {number}: {column} {wrong}")
        made = {MESSAGES: [json.dumps(chat, ensure_ascii=False) for chat in chats]}
    elif layout.pair is not None:
        made = {}
        for name, column in zip(PAIR, layout.pair, strict=True):
            if name == PAIR[1] and not answers:
                continue
            made[name] = rows[column][:]
            problems += no_texts(column, where, made[name], may_be_empty=False)
        if task.as_chat and not problems:
            made = {MESSAGES: [_as_chat(task, *pair) for pair in zip(*made.values(), strict=True)]}
    else:
        made = {TEXT: rows[layout.text][:]}
        problems += no_texts(str(layout.text), where, made[TEXT], may_be_empty=False)
    refuse(problems)
    return Dataset.from_dict(made)


def _chat(task: TaskConfig, chat: Any) -> Any:
    """The messages with the task's system prompt, where they have none of their own."""
    if isinstance(chat, str):
        try:
            chat = json.loads(chat)
        except json.JSONDecodeError:
            return chat
    if not isinstance(chat, list) or task.system_prompt is None:
        return chat
    has_one = any(isinstance(turn, dict) and turn.get("role") == "system" for turn in chat)
    return chat if has_one else [_turn("system", task.system_prompt), *chat]


def _as_chat(task: TaskConfig, prompt: str, completion: str | None = None) -> str:
    chat = [_turn("user", prompt)]
    if completion is not None:
        chat.append(_turn("assistant", completion))
    return json.dumps(_chat(task, chat), ensure_ascii=False)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _wrong_chat(chat: Any, answers: bool) -> str | None:
    """What is wrong with a row's messages."""
    if not isinstance(chat, list) or not chat:
        return f"must be a list of messages, and is {chat!r:.60}"
    for number, turn in enumerate(chat, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return f"message {number} has no role"
        if not isinstance(turn.get("content"), str):
            return f"message {number} has no content that is text"
    said = [turn["content"] for turn in chat if turn["role"] == "assistant"]
    if said and len(chat) == 1:
        return "has the assistant's turn alone, and nothing that it answers"
    if not answers:
        return None
    if not said:
        return "has no assistant turn, so there is nothing to learn"
    if len(said) == 1 and chat[0]["role"] == "assistant":
        return "has no assistant turn but the first, which answers nothing to be learnt"
    if not all(text.strip() for text in said):
        return "has an empty assistant turn"
    return None
