"""Data: a module for each kind of task, with the same functions, and what they share.

`load_rows(task, revision) -> Rows`, `prepare(config, rows, reader, teacher_reader, multiple_of) ->
TaskData`, `scorer(config, labels, reader) -> Scorer`, `asked(config, data, reader) -> Asked`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from forgelm.config.schema import Kind, RlConfig, RunConfig

if TYPE_CHECKING:
    from forgelm.tasks.data import Rows


def of_kind(kind: Kind) -> Any:
    """The module of a kind of task."""
    return import_module(f"forgelm.tasks.{kind.name}")


def rows_of(config: RunConfig, revision: str | None) -> Rows:
    """The rows of a config's task; mode rl can do with prompts alone."""
    options = {"answers": False} if isinstance(config.mode, RlConfig) else {}
    rows: Rows = of_kind(config.task.kind).load_rows(config.task, revision, **options)
    return rows
