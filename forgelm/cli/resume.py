"""`forgelm resume RUN...`: go on with runs from the configs that they were sealed with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    from forgelm.cluster.jobs import note_cancelled, trained_by_others
    from forgelm.run.paths import OutputRoot, RunPaths
    from forgelm.run.registry import incomplete

    root = Path(_asked_for(overrides).config.output_root).expanduser()
    runs = []
    for run in incomplete(OutputRoot(root)):
        if note_cancelled(RunPaths(run)):
            again = f"forgelm resume {shlex.quote(str(run))} goes on with it"
            print(f"left alone: {run} was cancelled; {again}")
        elif not local and trained_by_others(RunPaths(run)):
            print(f"left alone: {run} is a teacher, which its students train when they need it")
        else:
            runs.append(str(run))
    if not runs:
        print(f"no incomplete runs below {root}")
        return EXIT_OK
    return _each(runs, overrides, local, skip_busy=True)


def go_on(run: str, overrides: Sequence[str]) -> int:
    """`forgelm train resume=RUN`, which is the same."""
    return _each([run], overrides, local=False)


def _each(
    runs: Sequence[str], overrides: Sequence[str], local: bool, skip_busy: bool = False
) -> int:
    asked = _asked_for(overrides)
    codes = []
    submitted: list[tuple[Plan, dict[str, Any]]] = []
    for run in runs:
        if len(runs) > 1:
            print(f"-- {run}", flush=True)
        codes.append(_one(run, asked, overrides, local, skip_busy, submitted))
    return worst([*codes, *_together(submitted)])


def _one(
    run: str,
    asked: _Asked,
    overrides: Sequence[str],
    local: bool,
    skip_busy: bool,
    submitted: list[tuple[Plan, dict[str, Any]]],
) -> int:
    """Go on with a run here, or add it to those to be `submitted`; returns the exit code."""
    from forgelm.resolve import check_resumed, resolve
    from forgelm.start import start

    try:
        # Not through Hydra: a folder's name may be anything.
        config = replace(asked.config, resume=run)
        own = [word for word in overrides if not word.lstrip("+").startswith("hydra")]
        check_resumed(run, own)
        launcher = None if local else asked.launcher_for(run)
        if launcher is None:
            return start(config, own, in_sweep=False, teacher_run=None)
        from forgelm.cluster.launchers import for_run
        from forgelm.run.lock import owned

        plan = resolve(config, own, in_sweep=False, teacher_run=None)
        with owned(plan.paths):
            pass
        submitted.append((plan, for_run(launcher, plan.config)))
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


@dataclass(frozen=True)
class _Asked:
    """What overrides ask of all the runs."""

    config: RunConfig
    given: bool
    """Whether they choose the launcher."""
    launcher: dict[str, Any] | None
    changes: list[str]
    """To the launcher that a run has recorded."""

    def launcher_for(self, run: str) -> dict[str, Any] | None:
        from forgelm import slurm
        from forgelm.cluster.launchers import changed, launcher_of
        from forgelm.run.find import find_run

        if self.given:
            return self.launcher
        if slurm.in_step():
            return None
        recorded = launcher_of(find_run(run, Path(self.config.output_root).expanduser()))
        return changed(recorded, self.changes)


def _asked_for(overrides: Sequence[str]) -> _Asked:
    from forgelm.cluster.launchers import chosen
    from forgelm.config.compose import Request
    from forgelm.config.request import check_request

    given = any(word.startswith("hydra/launcher=") for word in overrides)
    theirs = [word for word in overrides if word.lstrip("+").startswith("hydra.launcher.")]
    asked = overrides if given else [word for word in overrides if word not in theirs]
    (point,) = check_request(Request(tuple(asked)))
    return _Asked(point.config, given, chosen(point.composed) if given else None, theirs)


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
