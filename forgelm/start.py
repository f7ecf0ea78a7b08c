"""From a request to a run that somebody works on: found complete, gone on with, or begun."""

from __future__ import annotations

import contextlib
import errno
import logging
import shlex
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from forgelm import slurm, stop
from forgelm.airgap.missing import check_caches
from forgelm.config.schema import LaunchConfig, RunConfig, TeacherKind
from forgelm.errors import (
    EXIT_OK,
    EXIT_STOPPED,
    ConfigError,
    ForgeError,
    RankFailed,
    RunError,
    RunInUse,
    Stopped,
)
from forgelm.hubcache import offline
from forgelm.launch import LOST, together
from forgelm.log import log, say, set_up, to_file
from forgelm.pipeline import pipeline
from forgelm.resolve import Plan, resolve, sealed_plan, settle
from forgelm.run.files import read_json
from forgelm.run.find import find_run
from forgelm.run.lifecycle import Run, end_session, enrol, follower, is_complete, opened
from forgelm.run.paths import OutputRoot, RunPaths
from forgelm.run.registry import incomplete, unregister
from forgelm.run.state import Stage, Status, load_state
from forgelm.world import ALONE, World, join

_WAIT_S = 2.0


class Ranks:
    """This process among those that train together; the others wait to be told at what."""

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self._told = False

    def tell(self, plan: Plan | None) -> None:
        """Send the others to work, once; None: there is nothing to do."""
        if not self._told:
            self._told = True
            self.world.share(plan)


def start(
    config: RunConfig,
    overrides: list[str],
    in_sweep: bool,
    teacher_run: RunConfig | None,
    flags: Sequence[str] = (),
) -> int:
    """Run what was asked for, its teacher first where that is a run of its own.

    `flags` are those of Hydra that say where the configs came from. Returns EXIT_OK; everything
    else is raised as a ForgeError.
    """
    set_up(config.debug)
    job = slurm.current()
    with stop.listening():
        try:
            if stop.requested() is not None:
                raise Stopped(
                    f"not begun ({stop.requested()}): the same command begins or goes on with it"
                )
            if job is None or job.ranks == 1:
                _begin(_planned(config, overrides, in_sweep, teacher_run, job), Ranks(), flags)
                return EXIT_OK
            slurm.set_rendezvous(job)
            world = join()
            if not world.first:
                return follow(world)
            config = replace(config, launch=_as_started(config.launch, job))
            ranks = Ranks(world)
            try:
                _begin(_planned(config, overrides, in_sweep, teacher_run, job), ranks, flags)
            finally:
                ranks.tell(None)
        except (Stopped, RankFailed) as ended:
            if ended.exit_code == EXIT_STOPPED:
                _left_to_slurm(config)
            raise
    return EXIT_OK


def _planned(
    config: RunConfig,
    overrides: list[str],
    in_sweep: bool,
    teacher_run: RunConfig | None,
    job: slurm.Job | None,
) -> Plan:
    """The run asked for. A requeued job goes on with what it began, whatever was edited since."""
    if job is not None and job.restarts and config.resume is None:
        for root in incomplete(OutputRoot(Path(config.output_root).expanduser())):
            metadata = read_json(RunPaths(root).metadata)
            theirs = [(session.get("slurm") or {}).get("job") for session in metadata["sessions"]]
            if metadata["overrides"] == overrides and job.name in theirs[-1:]:
                return sealed_plan(root.resolve())
    return settle(resolve(config, overrides, in_sweep, teacher_run))


def _left_to_slurm(config: RunConfig) -> None:
    """The job handed back, where the run itself hasn't, as before it is entered."""
    handed = slurm.hand_back()
    if handed.cancelled and config.resume is not None:
        paths = find_run(config.resume, Path(config.output_root).expanduser())
        state = load_state(paths)
        if state is not None and not state.pipeline_complete:
            replace(state, status=Status.cancelled).save(paths)
    if handed.lingers:
        slurm.linger()


def _as_started(launch: LaunchConfig, job: slurm.Job) -> LaunchConfig:
    """The number of ranks as `srun` started them, where the config leaves it open."""
    if launch.ranks not in (1, job.ranks):
        raise ConfigError(
            f"launch.nodes={launch.nodes} launch.ranks_per_node={launch.ranks_per_node}: srun "
            f"started {job.ranks} processes; give srun --ntasks={launch.ranks}, or leave both out"
        )
    return replace(launch, nodes=job.nodes, ranks_per_node=job.ranks // job.nodes)


def _begin(plan: Plan, ranks: Ranks, flags: Sequence[str]) -> None:
    slurm.note_start()
    if is_complete(plan.paths) and not plan.extends:
        say(f"{plan.paths.root} is complete; its results are in eval.json")
        return
    if offline():
        check_caches(plan, flags)
    if plan.config.teacher.kind is TeacherKind.run:
        alone = ranks.world.size == 1
        _make_sure_of_teacher(plan, RunPaths(Path(str(plan.config.teacher.run))), alone)
    _run(plan, ranks)


def _make_sure_of_teacher(student: Plan, paths: RunPaths, alone: bool) -> None:
    """Train the teacher's run if nobody has; wait if somebody is at it.

    `alone`: in this process. One that has met other ranks can't train without them.
    """
    if not is_complete(paths):
        enrol(student.paths, student.config, student.digest, student.overrides)
    waiting = False
    while not is_complete(paths):
        try:
            stop.check()
            plan = sealed_plan(paths.root)
            if not waiting:
                say(f"the teacher isn't trained yet: training {paths.root} once, for all runs")
            if alone:
                _run(plan, Ranks())
            else:
                together(plan, plan.config.launch.ranks, plan.paths.log)
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


def _run(plan: Plan, ranks: Ranks) -> None:
    if ranks.world.size == 1 and plan.config.launch.ranks > 1:
        together(plan, plan.config.launch.ranks, plan.paths.log)
    else:
        own(plan, ranks)


def own(plan: Plan, ranks: Ranks) -> None:
    """Own the run's directory and work in it; leave the reason of every stop behind."""
    if plan.config.launch.ranks != ranks.world.size:
        raise ConfigError(
            f"{plan.paths.root} has {plan.config.launch.ranks} rank(s), and {ranks.world.size} "
            f"process(es) were started: give srun --ntasks={plan.config.launch.ranks}"
        )
    with (
        opened(plan.paths, plan.config, plan.digest, plan.overrides) as run,
        to_file(plan.paths.log),
    ):
        run.world = ranks.world
        ranks.tell(plan)
        try:
            pipeline(run)
        except KeyboardInterrupt:
            end_session(run, Status.preempted, "Ctrl-C")
            say(_how_to_go_on(run))
            raise
        except Stopped as stopped:
            handed = slurm.hand_back()
            status = Status.cancelled if handed.cancelled else Status.preempted
            end_session(run, status, str(stopped), requeued=handed.requeued)
            say(f"stopped {stop.since():.1f} s after {stopped}; {_how_to_go_on(run)}")
            if handed.said:
                say(handed.said)
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


def follow(world: World) -> int:
    """Work as one of the ranks after the first; returns EXIT_OK, after a stop too.

    Schedulers end all processes of a job once one of them fails, and the first has still to save.
    """
    logging.getLogger().setLevel(logging.ERROR)
    plan: Plan | None = world.share(None)
    if plan is not None:
        with contextlib.suppress(Stopped):
            pipeline(follower(plan.config, plan.paths, world))
    return EXIT_OK


def _how_to_go_on(run: Run) -> str:
    kept = run.state.latest_checkpoint or "its start, no checkpoint being written yet"
    again = f"forgelm resume {shlex.quote(str(run.paths.root))}"
    return f"the same command, or {again}, goes on from {kept}"


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
