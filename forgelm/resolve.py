"""From what was typed to what will run: the teacher chosen, the run named, paths made absolute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forgelm.config.identity import config_hash, differences
from forgelm.config.schema import RunConfig, TeacherConfig, TeacherKind
from forgelm.config.validate import check, uses_teacher
from forgelm.errors import ConfigError
from forgelm.log import say
from forgelm.run.files import read_json
from forgelm.run.find import find_run
from forgelm.run.lifecycle import EXTENDING, is_complete, load_sealed, locate, seal
from forgelm.run.paths import RunPaths
from forgelm.run.state import Stage, Status, TrainingState, load_state

_WITH_RESUME = {"resume", "debug", "output_root", *EXTENDING}


@dataclass(frozen=True)
class Plan:
    """A run that can be started: its resolved config, its place, the hash of what decides it."""

    config: RunConfig
    paths: RunPaths
    digest: str
    overrides: list[str]
    extends: bool = False
    new_teacher: Path | None = None
    """The teacher's run, where it was sealed just now for this one."""


def resolve(
    config: RunConfig,
    overrides: list[str],
    in_sweep: bool,
    teacher_run: RunConfig | None,
    sealing: bool = True,
) -> Plan:
    """Plan a run; `teacher_run` is the config of the run that `teacher=auto` stands for, if any.

    That one is sealed, unless `sealing` is off: then nothing is written.

    Raises:
        ConfigError: a run that was named can't be used so.
    """
    config = replace(config, output_root=str(Path(config.output_root).expanduser()))
    if config.resume is not None:
        return _gone_on_with(config, overrides)
    teacher, fresh = _teacher(config, teacher_run, sealing)
    config = replace(config, teacher=teacher)
    paths, digest = locate(config, in_sweep), config_hash(config)
    place = RunPaths(paths.root.resolve())
    return Plan(_absolute(config), place, digest, overrides, new_teacher=fresh)


def sealed_plan(folder: Path) -> Plan:
    """The plan of a run that has its directory already."""
    paths = RunPaths(folder)
    config, metadata = load_sealed(folder), read_json(paths.metadata)
    return Plan(config, paths, metadata["config_hash"], metadata["overrides"])


def check_resumed(run: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for what can't be said of a run that is sealed."""
    barred = [key for key in map(_key, overrides) if key not in _WITH_RESUME]
    if barred:
        raise ConfigError(
            f"{', '.join(barred)}: {run} goes on with the config it was sealed with; "
            f"only {' and '.join(EXTENDING)} may be given, to extend it"
        )


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _gone_on_with(config: RunConfig, overrides: Sequence[str]) -> Plan:
    check_resumed(str(config.resume), overrides)
    typed = [*map(_key, overrides)]
    plan = sealed_plan(find_run(str(config.resume), Path(config.output_root)).root)
    changes = {key: getattr(config, key) for key in EXTENDING if key in typed}
    extended = replace(plan.config, **changes, debug=config.debug)
    # Where it lies is settled: whether it can be written is found when it is entered.
    rules = [line for line in check(extended) if not line.startswith("output_root=")]
    problems = [*rules, *_shortened(plan, changes)]
    if problems:
        raise ConfigError(problems)
    longer = any(getattr(plan.config, key) != value for key, value in changes.items())
    return replace(plan, config=extended, extends=longer)


def _shortened(plan: Plan, changes: dict[str, Any]) -> list[str]:
    """A run's past can't be undone: its goal may be set further, not nearer."""
    state = load_state(plan.paths) or TrainingState()
    steps, epochs = changes.get("max_steps"), changes.get("epochs")
    problems = []
    goal = max(plan.config.max_steps or 0, state.target or 0)
    if steps is not None and steps < goal:
        problems.append(f"max_steps={steps}: the run has {goal}; give more")
    if epochs is not None and epochs < plan.config.epochs:
        problems.append(f"epochs={epochs:g}: the run has {plan.config.epochs:g}; give more")
    return problems


def settle(plan: Plan) -> Plan:
    """The plan, or that of the run which the directory holds already.

    Raises:
        ConfigError: the directory holds a run of another config.
    """
    if plan.extends or not plan.paths.config.is_file():
        return plan
    sealed = sealed_plan(plan.paths.root)
    found = differences(plan.config, sealed.config)
    if not found:
        _check_ranks(plan, sealed)
        return plan
    longer = all(line.partition(":")[0] in EXTENDING for line in found)
    if longer and read_json(plan.paths.metadata).get("extended"):
        say(f"{plan.paths.root} was extended since ({'; '.join(found)})")
        return sealed
    if _never_began(plan.paths):
        plan.paths.config.unlink()
        plan.paths.metadata.unlink(missing_ok=True)
        return plan
    raise ConfigError(
        f"{plan.paths.root} holds a run with another config ({'; '.join(found[:5])}"
        f"{'; ...' if len(found) > 5 else ''}): give another run_name"
    )


def _check_ranks(plan: Plan, sealed: Plan) -> None:
    """The number of processes isn't part of a run's name, but decides how its rows are shared."""
    state = load_state(plan.paths)
    began = state is not None and state.latest_checkpoint is not None
    before, now = sealed.config.launch, plan.config.launch
    if began and before.ranks != now.ranks:
        raise ConfigError(
            f"{plan.paths.root} was trained by {before.ranks} rank(s) so far, and this start has "
            f"{now.ranks}: give launch.ranks_per_node={before.ranks_per_node}, or another run_name"
        )


def _never_began(paths: RunPaths) -> bool:
    """Whether the request in this directory was refused before anything was computed."""
    state = load_state(paths)
    return state is not None and (state.status, state.stage) == (Status.failed, Stage.setup)


def planned_teacher(config: RunConfig, teacher_run: RunConfig) -> Plan:
    """The plan of the run that `teacher=auto` stands for."""
    return resolve(teacher_run, [f"experiment={config.task.teacher_experiment}"], False, None)


def _teacher(
    config: RunConfig, teacher_run: RunConfig | None, sealing: bool
) -> tuple[TeacherConfig, Path | None]:
    """The teacher, and its run's directory where that was sealed just now."""
    teacher, task = config.teacher, config.task
    if not uses_teacher(config):
        return TeacherConfig(kind=TeacherKind.none), None
    if teacher.kind is TeacherKind.run:
        paths = find_run(str(teacher.run), Path(config.output_root))
        if not is_complete(paths):
            raise ConfigError(
                f"teacher.run={teacher.run}: the run isn't complete; go on with it first: "
                f"forgelm train resume={paths.root}"
            )
        theirs = load_sealed(paths.root).task
        if theirs.kind is not task.kind:
            raise ConfigError(
                f"teacher.run={teacher.run}: is a run of task {theirs.name}, of task.kind="
                f"{theirs.kind}, and task {task.name} is of task.kind={task.kind}; choose a "
                "teacher of this kind"
            )
        digest = read_json(paths.metadata)["config_hash"]
        return replace(teacher, run=str(paths.root), run_hash=digest), None
    if teacher.kind is TeacherKind.auto and task.teacher:
        path, revision = task.teacher, task.teacher_revision
        return replace(teacher, kind=TeacherKind.path, path=path, revision=revision), None
    if teacher_run is not None:
        plan = planned_teacher(config, teacher_run)
        fresh = None if plan.paths.root.is_dir() else plan.paths.root
        if sealing:
            seal(plan.paths, plan.config, plan.digest, plan.overrides)
        run = str(plan.paths.root)
        return replace(teacher, kind=TeacherKind.run, run=run, run_hash=plan.digest), fresh
    return teacher, None


def _absolute(config: RunConfig) -> RunConfig:
    """Local paths made absolute, so that the run goes on from any folder."""
    task = replace(
        config.task,
        train_file=_if_there(config.task.train_file),
        validation_file=_if_there(config.task.validation_file),
        dataset=_if_there(config.task.dataset),
    )
    lm_eval = replace(config.eval.lm_eval, include_path=_if_there(config.eval.lm_eval.include_path))
    return replace(
        config,
        task=task,
        eval=replace(config.eval, lm_eval=lm_eval),
        model=replace(
            config.model, path=_if_there(config.model.path), base=_if_there(config.model.base)
        ),
        teacher=replace(config.teacher, path=_if_there(config.teacher.path)),
        output_root=str(Path(config.output_root).resolve()),
    )


def _if_there(path: str | None) -> str | None:
    if path is None or not Path(path).expanduser().exists():
        return path
    return str(Path(path).expanduser().resolve())
