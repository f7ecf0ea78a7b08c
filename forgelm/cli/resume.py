"""`forgelm resume RUN...`: go on with runs from the configs that they were sealed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.cli.main import complain, crash
from forgelm.errors import EXIT_OK, ConfigError, ForgeError, RunInUse, worst

if TYPE_CHECKING:
    from forgelm.config.schema import RunConfig
    from forgelm.resolve import Plan

_HELP = """\
usage: forgelm resume RUN... [OVERRIDES]
       forgelm resume --incomplete [OVERRIDES]

RUN is a run directory, a run id, or a name that only one run has. Runs go on from the configs that
they were sealed with, where they ran: those that were submitted are submitted again. max_steps=N
and epochs=N extend them, nothing else of them can be changed.

  --incomplete   all runs that are registered as incomplete, cancelled ones excepted
  --local        here, whatever launched them first

  forgelm resume outputs/mnli/distilbert/kd/2f1c9a7be0
  forgelm resume 2f1c9a7be0 max_steps=20000
  forgelm resume 2f1c9a7be0 hydra/launcher=slurm hydra.launcher.timeout_min=600
  forgelm resume --incomplete output_root=/scratch/me/outputs
"""
_FLAGS = ("--incomplete", "--local")


def main(argv: Sequence[str]) -> int:
    """Go on with each run in turn; returns the worst of their exit codes."""
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP, end="")
        return EXIT_OK
    overrides = [word for word in argv if "=" in word and not Path(word).is_dir()]
    flags = [word for word in argv if word.startswith("-")]
    runs = [word for word in argv if word not in overrides and word not in flags]
    unknown = [flag for flag in flags if flag not in _FLAGS]
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such option; one of {', '.join(_FLAGS)}")
    local = "--local" in flags
    if "--incomplete" in flags:
        if runs:
            raise ConfigError(
                f"--incomplete with {runs[0]}: name runs, or take all incomplete ones"
            )
        return _all_incomplete(overrides, local)
    if not runs:
        raise ConfigError("resume needs a RUN, or --incomplete; see forgelm resume --help")
    return _each(runs, overrides, local)


def _all_incomplete(overrides: Sequence[str], local: bool) -> int:
    from forgelm.cluster.submit import note_cancelled
    from forgelm.run.paths import OutputRoot, RunPaths
    from forgelm.run.registry import incomplete

    given = [word.partition("=")[2] for word in overrides if word.startswith("output_root=")]
    root = Path(given[-1] if given else "outputs").expanduser()
    runs = [str(run) for run in incomplete(OutputRoot(root)) if not note_cancelled(RunPaths(run))]
    if not runs:
        print(f"no incomplete runs below {root}")
        return EXIT_OK
    return _each(runs, overrides, local, skip_busy=True)


def _each(
    runs: Sequence[str], overrides: Sequence[str], local: bool, skip_busy: bool = False
) -> int:
    codes = []
    submitted: list[tuple[Plan, dict[str, Any]]] = []
    for run in runs:
        if len(runs) > 1:
            print(f"-- {run}", flush=True)
        codes.append(_one(run, overrides, local, skip_busy, submitted))
    return worst([*codes, *_together(submitted)])


def _one(
    run: str,
    overrides: Sequence[str],
    local: bool,
    skip_busy: bool,
    submitted: list[tuple[Plan, dict[str, Any]]],
) -> int:
    """Go on with a run here, or add it to those to be `submitted`; returns the exit code."""
    from forgelm.start import start

    try:
        config, launcher = _asked_for(run, overrides)
        own = [word for word in overrides if not word.startswith("hydra")]
        if launcher is None or local:
            return start(config, own, in_sweep=False, teacher_run=None)
        from forgelm.resolve import resolve

        submitted.append((resolve(config, own, in_sweep=False, teacher_run=None), launcher))
        return EXIT_OK
    except RunInUse as busy:
        if not skip_busy:
            return complain(busy)
        print(f"left alone: {busy}", flush=True)
        return EXIT_OK
    except ForgeError as error:
        return complain(error)
    except Exception as error:
        return crash(error, debug="debug=true" in overrides)


def _asked_for(run: str, overrides: Sequence[str]) -> tuple[RunConfig, dict[str, Any] | None]:
    """The config that goes on with a run, and the launcher: that given, else that recorded."""
    from forgelm.cluster.submit import changed, chosen, launcher_of
    from forgelm.config.compose import Request
    from forgelm.config.request import check_request
    from forgelm.run.find import find_run

    given = any(word.startswith("hydra/launcher=") for word in overrides)
    theirs = [word for word in overrides if word.startswith("hydra.launcher.")]
    asked = overrides if given else [word for word in overrides if word not in theirs]
    (point,) = check_request(Request(tuple(asked)))
    # Not through Hydra: a folder's name may be anything.
    config = replace(point.config, resume=run)
    if given:
        return config, chosen(point.composed)
    recorded = launcher_of(find_run(run, Path(config.output_root).expanduser()))
    return config, changed(recorded, theirs)


def _together(submitted: Sequence[tuple[Plan, dict[str, Any]]]) -> list[int]:
    """Submit runs that have the same launcher together; returns the exit codes."""
    from forgelm.cli.submit import submit_all

    codes = []
    launchers: list[dict[str, Any]] = []
    for _, launcher in submitted:
        if launcher not in launchers:
            launchers.append(launcher)
    for launcher in launchers:
        plans = [plan for plan, theirs in submitted if theirs == launcher]
        try:
            codes.append(submit_all(plans, launcher, any(p.config.launch.wait for p in plans)))
        except ForgeError as error:
            codes.append(complain(error))
    return codes
