"""lm-eval's tasks by name: its own, and those of a folder. Loads it only when asked for some."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forgelm.config import lm_index
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
    yield from unknown(asked.tasks, asked.include_path)


def lm_eval_rows(student: dict[str, Any]) -> list[tuple[str, str, float | None]]:
    """Task, metric and value of what lm-eval measured; standard errors are left to `eval.json`."""
    return [
        (task, metric, value)
        for task, values in student.get(LM_EVAL, {}).items()
        for metric, value in values.items()
        if not metric.partition(",")[0].endswith("_stderr")
    ]


def manager(asked: LmEvalConfig) -> Any:
    """lm-eval's TaskManager of the tasks asked for and what belongs to them.

    Its own index of all tasks comes of some 14,000 files, and takes 10 to 30 seconds.
    """
    return _manager(tuple(asked.tasks), _folder(asked))


def _folder(asked: LmEvalConfig) -> str | None:
    return asked.include_path and str(Path(asked.include_path).expanduser().resolve())


@cache
def _manager(names: tuple[str, ...], folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = lm_index.find(names, folder)
    made = TaskManager(include_defaults=False)
    for files in found.files:
        index: dict[str, Entry] = {}
        for file in files:
            with suppress(Exception):
                TaskIndex.process_cfg(load_yaml(file, resolve_func=False), file, index)
        made.task_index.update({name: index[name] for name in found.entries if name in index})
    return made


def unknown(
    names: Sequence[str], include_path: str | None, key: str = "eval.lm_eval.tasks"
) -> Iterator[str]:
    """A problem for each name that is no task, with the nearest ones; `key` is where they stand.

    Of an own folder that lacks a name, also the files that lm-eval leaves out without a word.
    """
    found = lm_index.find(names, include_path).entries
    wrong = [name for name in names if name not in found]
    if not wrong:
        return
    theirs, own = lm_index.names_of_lm_eval(), list[str]()
    where = "lm-eval has no such task"
    if include_path is not None:
        folder = Path(include_path).expanduser()
        own = sorted(lm_index.index(lm_index.files_below(folder)))
        yield from _unreadable(folder)
        more = ", ..." if len(own) > _SHOWN else ""
        where = (
            f"neither lm-eval nor {include_path} has such a task; the folder has "
            f"{', '.join(own[:_SHOWN]) or 'none'}{more}"
        )
    for name in wrong:
        near = difflib.get_close_matches(name, [*own, *theirs], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        yield f"{key}: {name}: {where}{hint}"


def _unreadable(folder: Path) -> Iterator[str]:
    """Files that lm-eval leaves out without a word."""
    for file in lm_index.files_below(folder):
        try:
            lm_index.load(file)
        except Exception as error:
            yield f"{file}: not a task of lm-eval: {' '.join(str(error).split())[:200]}"
