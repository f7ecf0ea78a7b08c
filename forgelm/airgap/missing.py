"""What runs that are to stay offline need and the caches lack, and the commands that fetch it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgelm.airgap.needs import Commits, Lack, lacking, needs
from forgelm.airgap.readable import require_readable
from forgelm.config.schema import RunConfig, TeacherKind
from forgelm.config.validate import uses_teacher
from forgelm.errors import ConfigError, RunError
from forgelm.hubcache import datasets_cache, hub_cache
from forgelm.resolve import Plan, planned_teacher, resolve, sealed_plan
from forgelm.run.files import read_json
from forgelm.run.lifecycle import is_complete
from forgelm.run.metadata import config_flags
from forgelm.run.paths import RunPaths


@dataclass(frozen=True)
class Asked:
    """A run as it was asked for, and that of `teacher=auto`, if it is a run."""

    config: RunConfig
    overrides: list[str]
    teacher_run: RunConfig | None


def check_caches(plan: Plan, flags: Sequence[str]) -> None:
    """Refuse a run that needs, as its teacher's run does, what isn't in the caches.

    `flags` are Hydra's, as typed, for a run that wasn't sealed with its own.

    Raises:
        RunError: with all that is missing, and the command that fetches it.
    """
    _refuse([plan, *untrained_teachers(plan.config)], flags, None)


def check_sweep(asked: Sequence[Asked], words: Sequence[str]) -> None:
    """The same for all runs of a sweep together, of which `words` were typed. Writes nothing.

    Raises:
        RunError: as `check_caches`, each thing once.
    """
    plans: list[Plan] = []
    for one in asked:
        try:
            plan = resolve(one.config, one.overrides, True, one.teacher_run, sealing=False)
        except ConfigError:
            # Said when that run is begun, and no other is kept by it.
            continue
        if is_complete(plan.paths) and not plan.extends:
            continue
        plans.append(plan)
        if plan.config.teacher.kind is TeacherKind.run and one.teacher_run is not None:
            teacher = planned_teacher(one.config, one.teacher_run)
            plans += [] if is_complete(teacher.paths) else [teacher]
        else:
            plans += untrained_teachers(plan.config)
    _refuse(plans, (), words)


def untrained_teachers(config: RunConfig) -> Iterator[Plan]:
    """The sealed runs that have to be trained before this one."""
    if not uses_teacher(config) or config.teacher.kind is not TeacherKind.run:
        return
    paths = RunPaths(Path(str(config.teacher.run)))
    if paths.config.is_file() and not is_complete(paths):
        plan = sealed_plan(paths.root)
        yield plan
        yield from untrained_teachers(plan.config)


def revisions(plan: Plan) -> Commits:
    """The commits that a run was begun with."""
    return _noted(plan).get("revisions") or {}


def _noted(plan: Plan) -> dict[str, Any]:
    return read_json(plan.paths.metadata) if plan.paths.metadata.is_file() else {}


def _refuse(plans: Sequence[Plan], flags: Sequence[str], words: Sequence[str] | None) -> None:
    """`words`: what was typed for all plans; None: the first plan's own words are."""
    lines: dict[str, None] = {}
    commands: dict[str, None] = {}
    seen: dict[str, list[Lack]] = {}
    for plan in plans:
        begun = revisions(plan)
        # Points of a sweep mostly need the same.
        key = repr((needs([plan.config]), begun))
        found = seen[key] = seen[key] if key in seen else _lacking(plan.config, begun)
        if not found:
            continue
        lines |= dict.fromkeys(lack.line for lack in found)
        if words is not None and not begun:
            command = [*words]
        else:
            # A teacher that wasn't begun comes with its student.
            of = plan if begun else plans[0]
            sealed = config_flags(_noted(of).get("command", ""))
            command = [*(flags or sealed), *_pinned(of.overrides, revisions(of))]
        commands[f"forgelm cache {shlex.join(command)}".rstrip()] = None
        bases = dict.fromkeys(lack.base for lack in found if lack.base)
        commands |= {f"forgelm cache-models --model {base}": None for base in bases}
    if lines:
        fetch = " && ".join(commands)
        said = f"HF_HUB_OFFLINE is set here; where there is a network: {fetch}"
        raise RunError("\n".join([*lines, said]))


def _lacking(config: RunConfig, begun: Commits) -> list[Lack]:
    try:
        return lacking(config, begun)
    except PermissionError:
        require_readable([hub_cache(), datasets_cache()])
        raise


def _pinned(overrides: Sequence[str], revisions: Commits) -> list[str]:
    """Overrides that ask for the commits that a run was begun with, wherever the hub is by now."""
    own = any(word.startswith("teacher.path=") for word in overrides)
    keys = {
        "model": "model.revision",
        "dataset": "task.revision",
        "teacher": "teacher.revision" if own else "task.teacher_revision",
    }
    commits = {key: revisions[name] for name, key in keys.items() if revisions.get(name)}
    kept = [word for word in overrides if word.lstrip("+").partition("=")[0] not in commits]
    return kept + [f"{key}={commit}" for key, commit in commits.items()]
