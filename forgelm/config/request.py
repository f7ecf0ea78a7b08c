"""From a command line to checked configs: every point composed, all errors at once, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from forgelm import slurm
from forgelm.config.compose import Composer, Request, to_typed
from forgelm.config.diagnose import Findings, allowed, explain, said
from forgelm.config.schema import RunConfig, TeacherKind
from forgelm.config.validate import check, uses_teacher
from forgelm.errors import ConfigError

HERE = ("basic", "local")
"""Launchers that run everything on this machine."""


@dataclass(frozen=True)
class Point:
    """One run of a request: its config as Hydra composed it, and typed."""

    composed: DictConfig
    config: RunConfig
    overrides: list[str]
    """Less Hydra's own."""


def check_request(request: Request) -> list[Point]:
    """Every run asked for, its config checked.

    Raises:
        ConfigError: with all problems of all points.
    """
    findings = Findings()
    for flag, folder in (("path", request.config_path), ("dir", request.config_dir)):
        if folder is not None and not folder.is_dir():
            findings.add(f"--config-{flag} {folder}: no such folder")
    if findings.problems:
        raise ConfigError(findings.problems)
    parsed = _parse(request, findings)
    kept = [item for item in parsed if allowed(item, request, findings)]
    composer = Composer(request)
    points = [
        point
        for overrides in _points(kept, request, findings)
        if (point := _check_point(overrides, composer, findings)) is not None
    ]
    if findings.problems:
        raise ConfigError(findings.problems)
    return points


def teacher_run(config: RunConfig, compose: Callable[[list[str]], DictConfig]) -> RunConfig | None:
    """The config of the run that `teacher=auto` stands for, where the task has no published model.

    Raises:
        ConfigError: the task's teacher_experiment isn't right.
    """
    name = config.task.teacher_experiment
    if not uses_teacher(config) or config.teacher.kind is not TeacherKind.auto or not name:
        return None
    if config.task.teacher:
        return None
    try:
        made = to_typed(compose([f"experiment={name}"]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"task.teacher_experiment={name}: {said(error)}") from error
    problems = check(made)
    if problems:
        raise ConfigError([f"task.teacher_experiment={name}: {line}" for line in problems])
    return replace(
        made, output_root=config.output_root, wandb=config.wandb, debug=config.debug, run_name=None
    )


def _parse(request: Request, findings: Findings) -> list[Override]:
    parser = OverridesParser.create(config_loader=request.loader())
    parsed = []
    for text in request.overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            findings.add(
                f"{text!r}: not an override; write key=value, as in training.learning_rate=1e-4 "
                "(quote values with spaces or special characters: \"key='a value'\")"
            )
    return parsed


def _points(kept: list[Override], request: Request, findings: Findings) -> list[list[str]]:
    """The overrides of every run: one list, or a sweep's product."""
    lines = [str(item.input_line) for item in kept]
    if not request.multirun:
        return [lines]
    own_sweeper = [line for line in lines if line.startswith("hydra/sweeper=")]
    if own_sweeper:
        return [
            [line for item, line in zip(kept, lines, strict=True) if not item.is_sweep_override()]
        ]
    hydra = [line for line in lines if line.startswith("hydra")]
    task = [item for item, line in zip(kept, lines, strict=True) if line not in hydra]
    try:
        batches = BasicSweeper.split_arguments(task, max_batch_size=None)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        findings.add(f"sweep: {error}")
        return []
    return [hydra + list(point) for batch in batches for point in batch]


def _nodes(config: RunConfig, composed: DictConfig) -> list[str]:
    """Several machines need somebody who starts a process on each."""
    if config.launch.nodes <= 1 or slurm.started_ranks():
        return []
    if composed.hydra.runtime.choices.get("hydra/launcher") not in HERE:
        return []
    return [
        f"launch.nodes={config.launch.nodes}: this starts no processes on other machines; give "
        "hydra/launcher=slurm, or srun"
    ]


def _check_point(overrides: list[str], composer: Composer, findings: Findings) -> Point | None:
    request = composer.request
    try:
        composed = composer.compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        composed_anyway = explain(overrides, request, error, findings)
        if composed_anyway is None:
            return None
        composed = composed_anyway
    if OmegaConf.get_type(composed) is not RunConfig:
        findings.add(
            f"{request.config_name}.yaml doesn't build on forgelm's config: begin it with "
            "`defaults: [config, _self_]`"
        )
        return None
    try:
        config = to_typed(composed)
    except OmegaConfBaseException as error:
        findings.add(said(error))
        return None
    problems = [*check(config), *_nodes(config, composed)]
    if not problems:
        try:
            teacher_run(config, composer.compose)
        except ConfigError as error:
            problems = error.problems
    for problem in problems:
        findings.add(problem)
    own = [line for line in overrides if not line.lstrip("+~").startswith("hydra")]
    return None if problems else Point(composed, config, own)
