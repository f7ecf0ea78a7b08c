"""From a request to a run that somebody works on: found complete, gone on with, or begun."""

from __future__ import annotations

import contextlib
import errno
import logging
import shlex
import time
import traceback
from pathlib import Path

from forgelm import stop
from forgelm.config.schema import RunConfig, TeacherKind
from forgelm.errors import EXIT_OK, ConfigError, ForgeError, RunError, RunInUse, Stopped
from forgelm.launch import LOST, together
from forgelm.log import log, say, set_up, to_file
from forgelm.pipeline import pipeline
from forgelm.resolve import Plan, resolve, sealed_plan, settle
from forgelm.run.lifecycle import Run, end_session, enrol, follower, is_complete, opened
from forgelm.run.paths import RunPaths
from forgelm.run.registry import unregister
from forgelm.run.state import Stage, Status

_WAIT_S = 2.0


def start(
    config: RunConfig, overrides: list[str], in_sweep: bool, teacher_run: RunConfig | None
) -> int:
    """Run what was asked for, its teacher first where that is a run of its own.

    Returns EXIT_OK; everything else is raised as a ForgeError.
    """
    set_up(config.debug)
    if stop.requested() is not None:
        raise Stopped(f"not begun ({stop.requested()}): the same command begins or goes on with it")
    plan = settle(resolve(config, overrides, in_sweep, teacher_run))
    if is_complete(plan.paths) and not plan.extends:
        say(f"{plan.paths.root} is complete; its results are in eval.json")
        return EXIT_OK
    with stop.listening():
        if plan.config.teacher.kind is TeacherKind.run:
            _make_sure_of_teacher(plan, RunPaths(Path(str(plan.config.teacher.run))))
        _run(plan)
    return EXIT_OK


def _make_sure_of_teacher(student: Plan, paths: RunPaths) -> None:
    """Train the teacher's run if nobody has; wait if somebody is at it."""
    if not is_complete(paths):
        enrol(student.paths, student.config, student.digest, student.overrides)
    waiting = False
    while not is_complete(paths):
        try:
            stop.check()
            plan = sealed_plan(paths.root)
            say(f"the teacher isn't trained yet: training {paths.root} once, for all runs")
            _run(plan)
        except RunInUse as busy:
            if not waiting:
                say(f"waiting for the teacher: {busy}")
            waiting = True
            stop.check()
            time.sleep(_WAIT_S)
        except Stopped as stopped:
            raise Stopped(
                f"stopped while training the teacher ({stop.requested()}); to go on with both: "
                f"forgelm resume {shlex.quote(str(student.paths.root))}"
            ) from stopped


def _run(plan: Plan) -> None:
    if plan.config.launch.ranks > 1:
        together(plan, plan.config.launch.ranks, plan.paths.log)
    else:
        own(plan)


def own(plan: Plan, distributed: bool = False) -> None:
    """Own the run's directory and work in it; leave the reason of every stop behind."""
    with (
        opened(plan.paths, plan.config, plan.digest, plan.overrides) as run,
        to_file(plan.paths.log),
    ):
        try:
            pipeline(run, distributed)
        except KeyboardInterrupt:
            end_session(run, Status.preempted, "Ctrl-C")
            say(_how_to_go_on(run))
            raise
        except Stopped as stopped:
            end_session(run, Status.preempted, str(stopped))
            say(f"stopped {stop.since():.1f} s after {stopped}; {_how_to_go_on(run)}")
            raise Stopped(
                f"stopped safely ({stopped}) at step {run.state.step}; to go on: forgelm resume "
                f"{shlex.quote(str(plan.paths.root))}"
            ) from stopped
        except ForgeError as error:
            # A complete run that can't be gone further with is as complete as before.
            status = Status.complete if run.state.pipeline_complete else Status.failed
            end_session(run, status, str(error))
            if isinstance(error, ConfigError) and run.state.stage is Stage.setup:
                unregister(run.output, run.run_id)
            _to_log_alone(run)
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                reason = (
                    f"no space left for {plan.paths.root}; {_how_to_go_on(run)}, once there is some"
                )
            if run.world.size > 1 and any(word in reason for word in LOST):
                reason = f"another rank of this run ended; {_how_to_go_on(run)}"
            # On a full disk even this may fail, and must not hide the reason.
            with contextlib.suppress(OSError):
                end_session(run, Status.failed, reason)
                _to_log_alone(run)
            raise RunError(f"{reason} (the traceback is in {plan.paths.log})") from error
        end_session(run, Status.complete, "complete")


def follow(plan: Plan) -> None:
    """Work as one of the ranks after the first."""
    pipeline(follower(plan.config, plan.paths), distributed=True)


def _how_to_go_on(run: Run) -> str:
    kept = run.state.latest_checkpoint or "its start, no checkpoint being written yet"
    return f"the same command, or forgelm resume {run.paths.root}, goes on from {kept}"


def _to_log_alone(run: Run) -> None:
    """The traceback into output.log, and on the screen with debug=true."""
    if not run.owned:
        return
    if run.config.debug:
        log.error(traceback.format_exc())
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            record = log.makeRecord(
                log.name, logging.ERROR, "", 0, traceback.format_exc(), (), None
            )
            handler.handle(record)
