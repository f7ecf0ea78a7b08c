"""`forgelm cache OVERRIDES`: all that a run or sweep will need, brought into the caches."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.airgap.verify import a_path
from forgelm.cli.arguments import Failed, WithOverrides, answer, cache_parser, listen

if TYPE_CHECKING:
    from forgelm.airgap.needs import Commits
    from forgelm.config.schema import RunConfig


def main(argv: Sequence[str]) -> int:
    made = cache_parser(
        "cache",
        "Bring all that these runs will need (models, data sets, lm-eval's tasks) from the hub "
        "into the caches, every byte checked, so that they train offline.",
        WithOverrides,
    )
    made.usage = "forgelm cache [OPTIONS] [OVERRIDES]"
    made.add_argument(
        "--audit-dir",
        metavar="DIR",
        type=a_path,
        help="where the audit log is (default: the hub's cache)",
    )
    return answer(argv, made, _work, _text)


def _work(arguments: argparse.Namespace) -> dict[str, Any] | Failed:
    from forgelm.airgap.audit import AuditLog
    from forgelm.airgap.caches import Caches
    from forgelm.airgap.needs import needs
    from forgelm.airgap.provide import Provided, provide
    from forgelm.cli.places import require_hub
    from forgelm.cli.progress import Bytes
    from forgelm.cli.train import request_from
    from forgelm.config.compose import Composer, register_schema
    from forgelm.config.request import check_request, teacher_run
    from forgelm.errors import ConfigError

    listen(arguments)
    request = request_from(arguments.words)
    register_schema()
    if any(word in ("--cfg", "-c") or word.startswith("--cfg=") for word in arguments.words):
        raise ConfigError("--cfg shows a config and caches nothing: forgelm train --cfg job ...")
    points = [run for point in check_request(request) for run in _sealed(point.config)]
    require_hub("cache")
    compose = Composer(request).compose
    made = [teacher_run(config, compose) for config, _ in points]
    configs, begun = zip(*points, *((config, {}) for config in made if config), strict=True)
    wanted = needs(configs, begun)
    caches = Caches.usual()
    audit = AuditLog.open(arguments.audit_dir or caches.hub)
    asked = {
        "overrides": shlex.join(arguments.words),
        "cache_dir": str(caches.hub),
        "datasets_cache": str(caches.datasets),
    }
    audit.write("cache.populate_run_requested", **asked)
    done: list[Provided] = []

    def failed(error: BaseException) -> None:
        told = {"error_class": type(error).__name__, "error_message": str(error)}
        landed = [f"{one.kind} {one.name}" for one in done if one.error is None]
        audit.write("cache.populate_run_failed", **asked, completed=landed, **told)

    try:
        for one in provide(wanted, caches, Bytes()):
            done.append(one)
    except BaseException as error:
        failed(error)
        raise
    problems = sorted(
        (one.error for one in done if one.error is not None), key=lambda error: -error.exit_code
    )
    result = {
        "needs": [_shown(one) for one in done],
        "cache_dir": str(caches.hub),
        "datasets_cache": str(caches.datasets),
    }
    if problems:
        failed(problems[0])
        return Failed(result, problems)
    audit.write("cache.populate_run_completed", **asked, count=len(done))
    return result


def _sealed(config: RunConfig) -> list[tuple[RunConfig, Commits]]:
    """A run, or that which `resume=` names, with the sealed ones that are to be trained before.

    Each with the commits that it was begun with.

    Raises:
        ConfigError: there is no such run, nor that of `teacher.run`.
    """
    from forgelm.airgap.missing import revisions, untrained_teachers
    from forgelm.resolve import sealed_plan
    from forgelm.run.find import find_run

    root = Path(config.output_root).expanduser()
    begun: Commits = {}
    if config.resume is not None:
        plan = sealed_plan(find_run(config.resume, root).root)
        config, begun = plan.config, revisions(plan)
    elif config.teacher.run is not None:
        teacher = str(find_run(config.teacher.run, root).root)
        config = replace(config, teacher=replace(config.teacher, run=teacher))
    teachers = [(plan.config, revisions(plan)) for plan in untrained_teachers(config)]
    return [(config, begun), *teachers]


def _shown(one: Any) -> dict[str, Any]:
    shown: dict[str, Any] = {"kind": one.kind, "role": one.role, "name": one.name}
    if one.error is not None:
        return {**shown, "error": str(one.error), "error_class": type(one.error).__name__}
    return {**shown, "commit": one.commit, "cached_path": one.path and str(one.path)}


def _text(result: dict[str, Any]) -> str:
    rows = result["needs"]
    if not rows:
        return "These runs need nothing from the hub."
    landed = sum("error" not in row for row in rows)
    lines = [
        f"Cached {landed} of {len(rows)} thing(s) under {result['cache_dir']} and "
        f"{result['datasets_cache']}."
    ]
    for row in rows:
        at = f" at {row['commit'][:12]}" if row.get("commit") else ""
        what = "failed" if "error" in row else f"ok{at}"
        lines.append(f"  - {row['role']} {row['name']}: {what}")
    return "\n".join(lines)
