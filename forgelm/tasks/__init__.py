"""Data: a module for each kind of task, with the same functions, and what they share.

`load_rows(task, revision) -> Rows`, `prepare(config, rows, reader, teacher_reader, multiple_of) ->
TaskData`, `scorer(config, labels, reader) -> Scorer`, `asked(config, data, reader) -> Asked`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from forgelm.config.schema import Kind


def of_kind(kind: Kind) -> Any:
    """The module of a kind of task."""
    return import_module(f"forgelm.tasks.{kind.name}")
