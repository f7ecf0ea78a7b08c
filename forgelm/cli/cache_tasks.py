"""`forgelm cache-tasks`: lm-eval's tasks with their data, proved to load without a network."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forgelm.airgap.verify import a_path
from forgelm.cli.arguments import Failed, answer, cache_parser, listen

if TYPE_CHECKING:
    from forgelm.airgap.tasks import Row


def main(argv: Sequence[str]) -> int:
    made = cache_parser(
        "cache-tasks",
        "Bring the data of lm-eval's tasks from the hub into the caches, every byte checked, so "
        "that they load offline.",
    )
    made.add_argument(
        "--tasks",
        metavar="CSV",
        required=True,
        help="names of tasks, groups and tags, separated by commas",
    )
    made.add_argument(
        "--include-path", metavar="DIR", help="a folder of own definitions, which go before"
    )
    made.add_argument(
        "--output",
        metavar="DIR",
        type=a_path,
        help="the cache of data sets, with all that is needed besides below it (default: "
        "HF_DATASETS_CACHE, HF_HOME/datasets, ~/.cache/huggingface/datasets)",
    )
    made.add_argument(
        "--audit-dir",
        metavar="DIR",
        type=a_path,
        help="where the audit log is (default: the cache)",
    )
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any] | Failed:
    names = _names(arguments.tasks)

    from forgelm.airgap import tasks
    from forgelm.airgap.audit import AuditLog
    from forgelm.airgap.caches import Caches
    from forgelm.cli.places import as_typed, chosen_cache, require_hub, warn_of
    from forgelm.cli.progress import Bytes
    from forgelm.hubcache import datasets_cache
    from forgelm.log import log

    listen(arguments)
    require_hub("cache-tasks")
    output, usual = chosen_cache(arguments.output, datasets_cache()), Caches.usual()
    caches = usual if arguments.output is None else Caches.below(output)
    warn_of(output, caches.places(), usual.places())
    audit = AuditLog.open(arguments.audit_dir or output)
    request = {"tasks": names, "cache_dir": str(output)}
    audit.write("cache.populate_tasks_requested", **request)
    done: list[str] = []

    def failed(error: BaseException) -> None:
        told = {"error_class": type(error).__name__, "error_message": str(error)}
        audit.write("cache.populate_tasks_failed", **request, tasks_completed=done, **told)

    try:
        rows = tasks.cache(names, arguments.include_path, caches, Bytes(), done.append)
    except BaseException as error:
        failed(error)
        raise
    problems = sorted(
        (row.error for row in rows if row.error is not None), key=lambda error: -error.exit_code
    )
    result = {"tasks": [_shown(row) for row in rows], "cache_dir": str(output)}
    if arguments.output is not None:
        named = caches.variables()
        # One that the warning before couldn't name yet.
        level = logging.WARNING if set(named) - set(caches.places()) else logging.INFO
        said = f"where they are used, with the folder's new place for {output}: export "
        log.log(level, said + as_typed(named))
    if problems:
        failed(problems[0])
        return Failed(result, problems)
    audit.write("cache.populate_tasks_completed", **request, count=len(rows))
    return result


def _names(text: str) -> list[str]:
    """The names of a list, each once; needs nothing installed.

    Raises:
        ConfigError: there are none, or some can't be names.
    """
    from forgelm.errors import ConfigError

    names = list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if not names:
        raise ConfigError(f"--tasks {text!r}: names no task; give some, as hellaswag,arc_easy")
    wrong = [name for name in names if any(sign.isspace() or sign in "/\\" for sign in name)]
    if wrong:
        raise ConfigError(
            [
                f"--tasks: {name!r} can't be a task's name, which has no spaces and no slashes; "
                "separate names by commas"
                for name in wrong
            ]
        )
    return names


def _shown(row: Row) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": row.name, "cached": row.error is None}
    if row.error is None:
        return {**shown, "error": None}
    return {**shown, "error": str(row.error), "error_class": type(row.error).__name__}


def _text(result: dict[str, Any]) -> str:
    rows = result["tasks"]
    cached = sum(row["cached"] for row in rows)
    lines = [f"Cached {cached} of {len(rows)} task(s) under {result['cache_dir']}."]
    return "\n".join(
        [*lines, *(f"  - {row['name']}: {'ok' if row['cached'] else 'failed'}" for row in rows)]
    )
