"""lm-eval's tasks by name: its own, and those of a folder. Loads it only when asked for some."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forgelm.config.schema import Kind, LmEvalConfig, TaskConfig

LM_EVAL = "lm_eval"
"""Where the results stand among those of the splits."""

KINDS = (Kind.causal_lm, Kind.seq2seq)
_SHOWN = 12


def problems(asked: LmEvalConfig, task: TaskConfig) -> Iterator[str]:
    """What is wrong with `eval.lm_eval`, names of tasks included; nothing if none are asked for."""
    if not asked.tasks:
        given = {"include_path": asked.include_path, "limit": asked.limit}
        for key, value in {**given, "num_fewshot": asked.num_fewshot}.items():
            if value is not None:
                yield f"eval.lm_eval.{key}={value} is only read with eval.lm_eval.tasks"
        return
    shown = f"[{','.join(asked.tasks)}]"
    if task.kind not in KINDS:
        yield (
            f"eval.lm_eval.tasks={shown} with task.kind={task.kind}: lm-eval measures models that "
            f"write text; choose a task of task.kind={' or '.join(KINDS)}"
        )
        return
    if len(set(asked.tasks)) < len(asked.tasks):
        yield f"eval.lm_eval.tasks={shown}: names a task twice"
    if asked.limit is not None and asked.limit > 1 and asked.limit != int(asked.limit):
        yield (
            f"eval.lm_eval.limit={asked.limit:g}: must be a whole number of examples, or a share "
            "below 1"
        )
    if find_spec("lm_eval") is None:
        yield (
            f"eval.lm_eval.tasks={shown} needs lm-eval, which isn't installed: "
            "pip install 'forgelm[eval]'"
        )
        return
    if asked.include_path is not None and not Path(asked.include_path).expanduser().is_dir():
        yield f"eval.lm_eval.include_path={asked.include_path}: no such folder"
        return
    yield from _unknown(asked)


def lm_eval_rows(student: dict[str, Any]) -> list[tuple[str, str, float | None]]:
    """Task, metric and value of what lm-eval measured; standard errors are left to `eval.json`."""
    return [
        (task, metric, value)
        for task, values in student.get(LM_EVAL, {}).items()
        for metric, value in values.items()
        if not metric.partition(",")[0].endswith("_stderr")
    ]


def manager(asked: LmEvalConfig) -> Any:
    """lm-eval's TaskManager for the tasks asked for.

    Its own tasks are looked through only where the folder's aren't enough: they are some 14,000
    files, and take seconds.
    """
    folder = _folder(asked)
    if folder:
        own = _manager(folder, False)
        if all(_complete(name, own.task_index) for name in asked.tasks):
            return own
    return _manager(folder, True)


def _folder(asked: LmEvalConfig) -> str | None:
    return asked.include_path and str(Path(asked.include_path).expanduser().resolve())


@cache
def _manager(folder: str | None, with_own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=folder, include_defaults=with_own)


def _complete(name: str, index: Mapping[str, Any]) -> bool:
    """Whether the index has the task, or the group and all that belongs to it."""
    entry = index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    names = (m if isinstance(m, str) else m.get("task") or m.get("group") for m in members)
    return all(_complete(str(member), index) for member in names)


def _unknown(asked: LmEvalConfig) -> Iterator[str]:
    folder = _folder(asked)
    own = _manager(folder, False).all_tasks if folder else []
    wrong = [name for name in asked.tasks if name not in own]
    theirs = _manager(None, True).all_tasks if wrong else []
    wrong = [name for name in wrong if name not in theirs]
    if not wrong:
        return
    where = "lm-eval has no such task"
    if asked.include_path is not None:
        yield from _unreadable(Path(asked.include_path).expanduser())
        more = ", ..." if len(own) > _SHOWN else ""
        where = (
            f"neither lm-eval nor {asked.include_path} has such a task; the folder has "
            f"{', '.join(own[:_SHOWN]) or 'none'}{more}"
        )
    for name in wrong:
        near = difflib.get_close_matches(name, [*own, *theirs], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        yield f"eval.lm_eval.tasks: {name}: {where}{hint}"


def _unreadable(folder: Path) -> Iterator[str]:
    """Files that lm-eval leaves out without a word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            yield f"{file}: not a task of lm-eval: {' '.join(str(error).split())[:200]}"
