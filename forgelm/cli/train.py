"""`forgelm train`: check what was asked for, then let Hydra compose and run it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from forgelm.cli.main import complain, crash
from forgelm.cluster.launchers import chosen
from forgelm.config.compose import (
    CONFIG_NAME,
    VERSION_BASE,
    Composer,
    Request,
    conf_dir,
    register_schema,
    to_typed,
)
from forgelm.config.request import Point, check_request, teacher_run
from forgelm.config.schema import RunConfig
from forgelm.errors import EXIT_OK, ConfigError, ForgeError, worst
from forgelm.hubcache import offline

_codes: list[int] = []


@hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base=VERSION_BASE)
def job(composed: DictConfig) -> int:
    """One run, as Hydra starts it, alone or as a point of a sweep; returns its exit code."""
    from forgelm.start import start

    settings = HydraConfig.get()
    config = to_typed(composed)
    try:
        code = start(
            config,
            overrides=list(settings.overrides.task),
            in_sweep=settings.mode is RunMode.MULTIRUN,
            teacher_run=teacher_run(config, lambda lines: hydra.compose(CONFIG_NAME, lines)),
            flags=request_from(sys.argv[1:]).flags(),
        )
    except ForgeError as error:
        code = complain(error)
    except Exception as error:
        code = crash(error, config.debug)
    _codes.append(code)
    return code


def main(argv: Sequence[str]) -> int:
    """Read Hydra's arguments, refuse a wrong request, run the rest through Hydra."""
    arguments = _parse(argv)
    # Hydra's own parser wants its flags before the overrides, or after, but not in between.
    flags = [word for word in argv if word not in arguments.overrides]
    sys.argv = [sys.argv[0], *flags, *arguments.overrides]
    if arguments.shell_completion:
        return _complete(arguments.overrides)
    register_schema()
    shown_only = arguments.help or arguments.hydra_help or arguments.info is not None
    if arguments.overrides or not shown_only:
        points = check_request(_request(arguments))
        if arguments.cfg == "job" and points[0].config.resume:
            print(_sealed(points[0].config), end="")
            return EXIT_OK
        if arguments.cfg:
            return _show(arguments, points[0].composed)
        if not shown_only:
            launcher, run = chosen(points[0].composed), points[0].config.resume
            if run is not None and not arguments.multirun:
                from forgelm.cli.resume import go_on

                return go_on(run, [w for w in arguments.overrides if not w.startswith("resume=")])
            if launcher is not None:
                # Not looked at here: a job's set-up lines may name other caches.
                return _submit(points, launcher, arguments)
            if arguments.multirun and offline():
                _check_caches(points, arguments, argv)
    _codes.clear()
    try:
        job()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_OK
    return worst(_codes)


def _submit(points: list[Point], launcher: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Plan every run and hand them to the scheduler; returns at once, or after `launch.wait`."""
    from forgelm.cli.submit import submit_all
    from forgelm.resolve import resolve, settle

    own = [line for line in arguments.overrides if line.startswith("hydra/sweeper=")]
    if own:
        raise ConfigError(f"{own[0]}: a sweeper that waits for results can't submit its runs")
    compose, plans = Composer(_request(arguments)).compose, []
    for point in points:
        _check_same(launcher, chosen(point.composed))
        teacher = teacher_run(point.config, compose)
        plan = resolve(point.config, point.overrides, arguments.multirun, teacher)
        plans.append(settle(plan))
    return submit_all(plans, launcher, points[0].config.launch.wait)


def _check_caches(points: list[Point], arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Without a network, all that the points of a sweep need must be here, before the first."""
    from forgelm.airgap.missing import Asked, check_sweep

    if any(word.startswith("hydra/sweeper=") for word in arguments.overrides):
        # What it will ask for isn't known yet.
        return
    compose = Composer(_request(arguments)).compose
    asked = [Asked(one.config, one.overrides, teacher_run(one.config, compose)) for one in points]
    words = [word for word in argv if not word.startswith(("hydra/", "hydra."))]
    check_sweep(asked, words)


def _check_same(launcher: dict[str, Any], other: dict[str, Any] | None) -> None:
    """What follows launch.nodes is left to those who know that key."""
    other = other or {}
    for key in sorted({*launcher, *other} - {"nodes", "tasks_per_node", "submitit_folder"}):
        if launcher.get(key) != other.get(key):
            raise ConfigError(
                f"hydra.launcher.{key} can't differ within one submission "
                f"({launcher.get(key)}, {other.get(key)}): submit one value of it at a time"
            )


def _sealed(config: RunConfig) -> str:
    """The config that a resumed run goes on with."""
    from forgelm.run.find import find_run

    paths = find_run(str(config.resume), Path(config.output_root))
    return paths.config.read_text(encoding="utf-8")


class _Composed(ConfigLoaderImpl):
    """Gives Hydra the config that the check composed, so that it isn't composed twice."""

    def __init__(self, composed: DictConfig) -> None:
        self.composed = composed

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        return self.composed


def _show(arguments: argparse.Namespace, composed: DictConfig) -> int:
    """What --cfg prints."""
    try:
        Hydra("forgelm", _Composed(composed)).show_cfg(
            arguments.config_name,
            arguments.overrides,
            arguments.cfg,
            arguments.package,
            arguments.resolve,
        )
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_OK
    return EXIT_OK


def _request(arguments: argparse.Namespace) -> Request:
    return Request(
        overrides=tuple(arguments.overrides),
        config_name=arguments.config_name or CONFIG_NAME,
        config_path=Path(arguments.config_path) if arguments.config_path else None,
        config_dir=Path(arguments.config_dir) if arguments.config_dir else None,
        multirun=arguments.multirun,
    )


def request_from(argv: Sequence[str]) -> Request:
    """What overrides and Hydra's flags ask for, for commands that compose as train does."""
    return _request(_parse(argv))


def _complete(overrides: list[str]) -> int:
    from forgelm.cli.complete import complete

    register_schema()
    if any(override.startswith("query=") for override in overrides):
        print(complete(job))
        return EXIT_OK
    try:
        job()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_OK
    return EXIT_OK


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; `forgelm --help` shows how a command is written")

    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args(list(argv))
    commands = (arguments.run, arguments.multirun, arguments.cfg, arguments.info)
    if sum(bool(item) for item in commands) > 1:
        raise ConfigError("--run, --multirun, --cfg and --info exclude each other: give one")
    if arguments.resolve and not (arguments.cfg or arguments.help):
        raise ConfigError("--resolve goes with --cfg or --help")
    return arguments
