"""Runs sealed and handed to a scheduler: nothing that is edited later changes what they compute."""

from __future__ import annotations

import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from forgelm import slurm
from forgelm.cluster.code import seal_code
from forgelm.config.compose import Request
from forgelm.config.extras import lacking
from forgelm.config.keys import no_launcher_key
from forgelm.config.request import check_request
from forgelm.config.schema import RunConfig, TeacherKind
from forgelm.errors import ConfigError, RunError, RunInUse
from forgelm.resolve import Plan
from forgelm.run.files import read_json, write_json, write_text
from forgelm.run.lifecycle import EXTENDING, enrol, is_complete, load_sealed
from forgelm.run.lock import owned
from forgelm.run.metadata import git, now, versions
from forgelm.run.paths import OutputRoot, RunPaths
from forgelm.run.registry import unregister
from forgelm.run.state import Status, load_state

TO_SLURM = "forgelm.cluster.submit.to_slurm"
TO_THIS_MACHINE = "forgelm.cluster.submit.to_this_machine"
SUBMISSION = "submission.json"
RUNS = "runs.txt"
GOALS = "goals.txt"
# Runs that are named after a submission; the others are in its file.
_SHOWN = 10
_WRITERS = 8
# Slurm looks at time limits twice a minute, and rounds early.
_EARLY_S = 60
# Slurm's KillWait, and some.
_ENDING_S = 60.0
_AT_LEAST_ONE = ("array_parallelism", "signal_delay_s", "timeout_min")
_FOLLOW = {"nodes": "launch.nodes", "tasks_per_node": "launch.ranks_per_node"}
# Of no use to us, or decided elsewhere.
_NOT_SBATCH = ("_target_", "submitit_folder", "max_num_timeout", "setup", "signal_delay_s")


_MAY_BE_CANCELLED = (Status.submitted, Status.running, Status.preempted)


@dataclass(frozen=True)
class Submission:
    """Runs submitted together. `names` are their jobs', in the runs' order."""

    folder: Path
    job: str
    names: list[str]
    runs: list[RunPaths]


def submit(plans: Sequence[Plan], launcher: dict[str, Any]) -> Submission:
    """Seal runs and submit them together; all of them, or none.

    Raises:
        ConfigError: the scheduler refuses them, or isn't there; nothing is left behind.
        RunInUse: a process is in one of the directories.
    """
    output = OutputRoot(Path(plans[0].config.output_root).resolve())
    try:
        code, folder = seal_code(output), _folder(output)
    except OSError as error:
        raise RunError(
            f"{error.filename}: can't be written ({error.strerror}): mend that, or give another "
            "output_root"
        ) from error
    sealed = {
        "at": now(),
        "launcher": launcher,
        "code": code.name,
        "folder": folder.name,
        "python": sys.executable,
        "versions": versions(),
        "git": git(Path.cwd()),
    }
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        # Most of the time goes into waiting for the disk.
        with ThreadPoolExecutor(_WRITERS) as pool:
            submitted = [{**sealed, "index": index} for index in range(len(plans))]
            deque(pool.map(_enrol, plans, submitted, itertools.repeat(undo)), maxlen=0)
        write_text(folder / RUNS, "".join(f"{plan.paths.root}\n" for plan in plans))
        write_text(folder / GOALS, "".join(f"{_goal(plan)}\n" for plan in plans))
        send = to_slurm if launcher["_target_"] == TO_SLURM else to_this_machine
        job, names = send(folder, code, launcher, plans)
        undo.pop_all()
    for plan in {plan.config.teacher.run: plan for plan in plans}.values():
        _note_teacher(plan, sealed)
    runs = [plan.paths for plan in plans]
    places = [str(paths.root) for paths in runs]
    write_json(folder / SUBMISSION, {"job": job, "names": names, "runs": places})
    return Submission(folder, job, names, runs)


def check(launcher: dict[str, Any], plans: Sequence[Plan]) -> None:
    """Refuse what can't be submitted, before anything is written."""
    shapes = {(p.config.launch.nodes, p.config.launch.ranks_per_node) for p in plans}
    if len(shapes) > 1:
        raise ConfigError(
            "launch.nodes and launch.ranks_per_node can't differ within one submission: submit "
            "one value of them at a time"
        )
    problems = [
        f"hydra.launcher.{key}={launcher[key]}: must be at least 1"
        for key in _AT_LEAST_ONE
        if launcher[key] < 1
    ]
    roots = sorted({plan.config.output_root for plan in plans})
    if len(roots) > 1:
        problems.append(f"output_root can't differ within one submission ({', '.join(roots)})")
    if launcher["_target_"] == TO_SLURM:
        problems += _slurm_problems(launcher, roots[0])
    if problems:
        raise ConfigError(problems)


def _slurm_problems(launcher: dict[str, Any], root: str) -> Iterator[str]:
    lead, limit = launcher["signal_delay_s"], 60 * launcher["timeout_min"]
    if limit < lead + _EARLY_S:
        yield (
            f"hydra.launcher.timeout_min={launcher['timeout_min']}: Slurm's signal comes "
            f"hydra.launcher.signal_delay_s={lead} s before the limit, or a minute earlier, so the "
            "run would be told to stop as it starts: give a longer limit"
        )
    if any(sign in root for sign in "%\\"):
        yield f"output_root={root}: Slurm reads % and \\ in a path otherwise: give another one"
    if "array" in launcher["additional_parameters"]:
        yield (
            "hydra.launcher.additional_parameters.array: arrays are made of a sweep's runs: give -m"
        )
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            yield (
                f"hydra/launcher=slurm: there is no {program} here: submit from a machine of the "
                "cluster, or take hydra/launcher=local, which runs on this one"
            )
            return


def job_of(paths: RunPaths) -> str | None:
    """The Slurm job that a run was last submitted as."""
    submitted = read_json(paths.metadata).get("submitted") if paths.metadata.is_file() else None
    if submitted is None or submitted["launcher"]["_target_"] != TO_SLURM:
        return None
    file = OutputRoot(paths.root.parents[3]).submissions / submitted["folder"] / SUBMISSION
    if submitted["index"] is None or not file.is_file():
        return None
    return str(read_json(file)["names"][submitted["index"]])


def chosen(composed: DictConfig) -> dict[str, Any] | None:
    """The launcher that a config asks for, resolved; None: Hydra's own, which runs in place.

    Raises:
        ConfigError: it is one that forgelm's runs can't be entrusted to.
    """
    launcher: Any = OmegaConf.to_container(composed.hydra.launcher, resolve=True)
    target = launcher["_target_"]
    if target in (TO_SLURM, TO_THIS_MACHINE):
        known = list(vars(OmegaConf.get_type(composed.hydra.launcher))["__dataclass_fields__"])
        problems = [
            f"hydra.launcher.{key}={launcher[key]}: {no_launcher_key(key, known)}"
            for key in launcher
            if key not in known
        ]
        problems += [
            f"hydra.launcher.{key}={launcher[key]}: give {ours} instead"
            for key, ours in _FOLLOW.items()
            if launcher[key] != OmegaConf.select(composed, ours)
        ]
        if target == TO_SLURM:
            problems += filter(None, [lacking("slurm", "submitit", "hydra/launcher=slurm")])
        if problems:
            raise ConfigError(problems)
        return dict(launcher)
    if "submitit" in target:
        raise ConfigError(
            f"hydra/launcher={composed.hydra.runtime.choices['hydra/launcher']}: loses what a "
            "preempted run has done; take hydra/launcher=slurm, which has the same keys"
        )
    return None


def launcher_of(paths: RunPaths) -> dict[str, Any] | None:
    """What a run was last submitted with; None: it was started where it was typed."""
    submitted = read_json(paths.metadata).get("submitted") if paths.metadata.is_file() else None
    return None if submitted is None else dict(submitted["launcher"])


def changed(launcher: dict[str, Any] | None, overrides: Sequence[str]) -> dict[str, Any] | None:
    """A recorded launcher with some of its keys set anew, by `hydra.launcher.KEY=VALUE`.

    Raises:
        ConfigError: there is no such key, its value isn't right, or there is no launcher.
    """
    if launcher is None or not overrides:
        if overrides:
            raise ConfigError(
                f"{overrides[0]}: the run was never submitted; add hydra/launcher=slurm"
            )
        return launcher
    own = "slurm" if launcher["_target_"] == TO_SLURM else "local"
    # Where one that is recorded may be there or not.
    free = "hydra.launcher.additional_parameters."
    words = [f"++{w.lstrip('+')}" if w.lstrip("+").startswith(free) else w for w in overrides]
    (point,) = check_request(Request((f"hydra/launcher={own}", *words)))
    chosen(point.composed)
    made = OmegaConf.create({"hydra": {"launcher": launcher}})
    parsed = OverridesParser.create().parse_overrides(words)
    ConfigLoaderImpl._apply_overrides_to_config(parsed, made)
    return dict(OmegaConf.to_container(made.hydra.launcher))  # type: ignore[arg-type]


def for_run(launcher: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """A launcher chosen anew for a run that is sealed: with the run's own number of processes."""
    launch = config.launch
    return {**launcher, "nodes": launch.nodes, "tasks_per_node": launch.ranks_per_node}


def note_cancelled(paths: RunPaths) -> bool:
    """Whether the run was cancelled in Slurm; noted in its state where no process could do it."""
    state, name = load_state(paths), job_of(paths)
    if state is None or name is None or state.status not in _MAY_BE_CANCELLED:
        return False
    metadata = read_json(paths.metadata)
    last = metadata["sessions"][-1] if metadata["sessions"] else None
    since = last is not None and last["started"] > metadata["submitted"]["at"]
    theirs = (last.get("slurm") or {}) if last is not None and since else None
    if theirs is not None and theirs.get("job") != name:
        return False
    ended = slurm.last_state(name)
    if ended is None and slurm.states([name]) == {}:
        # Slurm has forgotten it. One that left the queue without a start was cancelled there.
        known = 0 if theirs is None else theirs["restart"] + 1
        waited = theirs is None or bool(last is not None and last.get("requeued"))
        ended = "CANCELLED" if waited and _starts(paths, name) <= known else None
    if not (ended or "").startswith("CANCELLED"):
        return False
    replace(state, status=Status.cancelled).save(paths)
    return True


def _starts(paths: RunPaths, name: str) -> int:
    """How often the batch script of a run's job began."""
    submitted = read_json(paths.metadata)["submitted"]
    output = OutputRoot(paths.root.parents[3])
    file = output.submissions / str(submitted["folder"]) / f"{name}.starts"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


def trained_by_others(paths: RunPaths) -> bool:
    """Whether the run is a teacher that submitted students train when they need it."""
    submitted = read_json(paths.metadata).get("submitted")
    return submitted is not None and submitted["index"] is None


def _note_teacher(plan: Plan, submitted: dict[str, Any]) -> None:
    """A teacher that these runs train belongs to their launcher too."""
    if plan.config.teacher.kind is not TeacherKind.run:
        return
    paths = RunPaths(Path(str(plan.config.teacher.run)))
    if is_complete(paths):
        return
    # Whoever trains it already keeps its own notes.
    with suppress(RunInUse), owned(paths):
        metadata = read_json(paths.metadata)
        if "submitted" not in metadata:
            write_json(paths.metadata, {**metadata, "submitted": {**submitted, "index": None}})


def _goal(plan: Plan) -> str:
    """What an extended run is to be told beside its directory."""
    if not plan.extends:
        return ""
    sealed = load_sealed(plan.paths.root)
    pairs = [(key, getattr(plan.config, key)) for key in EXTENDING]
    return " ".join(f"{key}={value}" for key, value in pairs if getattr(sealed, key) != value)


def _folder(output: OutputRoot) -> Path:
    stamp = re.sub(r"[-:]|\+.*", "", now())
    for number in range(1000):
        folder = output.submissions / (f"{stamp}-{number}" if number else stamp)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder.resolve()
    raise ConfigError(f"{output.submissions}: no name is left for a submission; try again")


def _enrol(plan: Plan, submitted: dict[str, Any], undo: ExitStack) -> None:
    """Write down a run that will be begun later; `undo` takes it back."""
    paths, state = plan.paths, load_state(plan.paths)
    with owned(paths):
        if state is None:
            undo.callback(_remove, paths)
        else:
            undo.callback(state.save, paths)
            undo.callback(write_json, paths.metadata, read_json(paths.metadata))
        enrol(paths, plan.config, plan.digest, plan.overrides, submitted)


def _remove(paths: RunPaths) -> None:
    if paths.metadata.is_file():
        unregister(OutputRoot(paths.root.parents[3]), read_json(paths.metadata)["run_id"])
    shutil.rmtree(paths.root, ignore_errors=True)
    with suppress(OSError):
        for folder in paths.root.parents[:3]:
            folder.rmdir()


def forget_teachers(plans: Sequence[Plan]) -> None:
    """Take back what was sealed for runs that are refused."""
    for folder in {plan.new_teacher for plan in plans if plan.new_teacher is not None}:
        _remove(RunPaths(folder))


# To Slurm


def to_slurm(
    folder: Path, code: Path, launcher: dict[str, Any], plans: Sequence[Plan]
) -> tuple[str, list[str]]:
    """One sbatch for all; returns the job's number and the name of each run's job."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    class Executor(SlurmExecutor):  # type: ignore[misc]
        """Runs our command where submitit would run its own."""

        @property
        def _submitit_command_str(self) -> str:
            return f'{shlex.quote(sys.executable)} -m forgelm resume --local "$run" $goal'

    launch = plans[0].config.launch
    given = {k: v for k, v in launcher.items() if k not in _NOT_SBATCH and v is not None}
    more = {"requeue": True, **given.pop("additional_parameters", {})}
    executor = Executor(folder)
    lead = int(launcher["signal_delay_s"])
    try:
        executor.update_parameters(
            **executor._convert_parameters(given),
            wckey=None,
            signal_delay_s=lead,
            additional_parameters=more,
            setup=_before(folder, code, lead, launcher.get("setup") or ()),
            teardown=_after(launch.max_restarts),
            # Ranks that wait for a dead one would wait until the time limit.
            srun_args=["--kill-on-bad-exit=1"],
        )
        # submitit repeats on stderr what it raises.
        with _outside_of_jobs(), redirect_stderr(io.StringIO()):
            jobs = executor.map_array(_in_the_job, range(len(plans)))
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"Slurm refuses this: {_said(str(error))}") from error
    names = [str(job.job_id) for job in jobs]
    return names[0].partition("_")[0], names


def _in_the_job(index: int) -> None:
    """What submitit keeps of a job. The job's own command is another: see Executor."""


def _before(folder: Path, code: Path, lead: int, own: Sequence[str]) -> list[str]:
    """Lines of the batch script before srun."""
    place = shlex.quote(str(folder))
    return [
        *own,
        "# The code as it was when this was submitted, and nothing from the current folder.",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        f"export {slurm.LEAD}={lead}",
        '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
        f'run=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {place}/{RUNS})',
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        f'goal=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {place}/{GOALS})',
        f'echo "$(date) ${{SLURM_JOB_NODELIST}}" >> {place}/$job.starts',
        "# Where processes can't reach scontrol, but this script can, they ask it by this file.",
        f'handover={place}/$job.requeue; rm -f "$handover"',
        'if scontrol show job "$SLURM_JOB_ID" > /dev/null 2>&1; then',
        f"  export {slurm.HANDOVER}=$handover",
        "fi",
        "# Slurm's signals are for the processes; this script has to outlive them.",
        "trap : TERM USR1 USR2",
    ]


def _after(max_restarts: int) -> list[str]:
    """Lines of the batch script after srun: a process that was killed can't requeue its job."""
    return [
        "code=$?",
        'if [ -e "$handover" ] || { [ "$code" -ge 128 ] && [ "$code" -ne 130 ]; }; then',
        '  state=$(scontrol -o show job "$job" | sed "s/.*JobState=\\([A-Z_]*\\).*/\\1/")',
        "  restarts=${SLURM_RESTART_COUNT:-0}",
        f'  if [ "$state" = RUNNING ] && [ "$restarts" -lt {max_restarts} ]; then',
        '    echo "the batch script requeues job $job: its processes ended with $code"',
        '    (trap "" TERM CONT; exec scontrol requeue "$job")',
        "  fi",
        "fi",
        'exit "$code"',
    ]


def _said(text: str) -> str:
    """Slurm's words out of submitit's."""
    lines = re.findall(r"sbatch: (?:error: |fatal: )?(.+)", text)
    return "; ".join(dict.fromkeys(lines)) or " ".join(text.split())[:300]


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """What Slurm says of a job that this command runs in isn't true of the one it submits."""
    theirs = {k: v for k, v in os.environ.items() if k.startswith("SLURM_") and k != "SLURM_CONF"}
    for name in theirs:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(theirs)


# To this machine


def to_this_machine(
    folder: Path, code: Path, launcher: dict[str, Any], plans: Sequence[Plan]
) -> tuple[str, list[str]]:
    """A process in the background that works through the runs."""
    from forgelm.cluster import local

    lines = [*(launcher.get("setup") or ()), 'exec "$@"']
    write_text(folder / local.SCRIPT, "\n".join(lines) + "\n")
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    parallel = int(launcher["array_parallelism"])
    with (folder / "local.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", local.__name__, str(folder), str(parallel)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )
    return f"process {process.pid}", [str(process.pid)] * len(plans)


def already(plans: Sequence[Plan]) -> tuple[dict[RunPaths, str], dict[RunPaths, str]]:
    """Runs that needn't be submitted: complete ones, with what to say, and those in the queue, with
    their jobs.

    Raises:
        ConfigError: a run that is to be extended is in the queue.
        RunError: Slurm doesn't say what is in its queue.
    """
    complete = {
        plan.paths: f"{plan.paths.root} is complete; its results are in eval.json"
        for plan in plans
        if is_complete(plan.paths) and not plan.extends
    }
    names = {p.paths: name for p in plans if p.paths not in complete and (name := job_of(p.paths))}
    queue = _settled([*names.values()])
    queued = {paths: name for paths, name in names.items() if name in queue}
    for plan in plans:
        if plan.extends and plan.paths in queued:
            name = queued[plan.paths]
            raise ConfigError(
                f"{plan.paths.root} is Slurm job {name} ({queue[name].lower()}): scancel {name} "
                "first, or wait for it; then extend the run"
            )
    said = {
        paths: f"{paths.root} is Slurm job {name} ({queue[name].lower()}) already"
        for paths, name in queued.items()
    }
    return complete | said, queued


def _settled(names: Sequence[str]) -> dict[str, str]:
    """The queue, once no job of `names` is just ending: it may come back to it, or be gone."""
    deadline = time.monotonic() + _ENDING_S
    while True:
        queue = slurm.states(names)
        if queue is None and shutil.which("squeue") is not None:
            raise RunError("squeue doesn't say whether these runs are in the queue: try again")
        ending = [name for name, state in (queue or {}).items() if state == "COMPLETING"]
        if not ending or time.monotonic() > deadline:
            return queue or {}
        time.sleep(1)


def how_to_follow(made: Submission) -> str:
    """What a person wants to know at once."""
    many = len(made.runs)
    lines = [f"submitted {many} run{'s' if many > 1 else ''} as {_job(made)}"]
    shown = list(zip(made.names, made.runs, strict=True))
    lines += [f"  {name}  {paths.root}" for name, paths in shown[:_SHOWN]]
    if many > _SHOWN:
        lines.append(f"  and {many - _SHOWN} more, all in {made.folder / SUBMISSION}")
    log = made.runs[0].log if many == 1 else Path("DIRECTORY/output.log")
    lines.append(f"to follow: tail -F {log}")
    if made.job.isdecimal():
        lines.append(f"the queue: squeue -j {made.job}; to cancel: scancel {made.job}")
    lines.append(f"what its processes say: {made.folder}")
    return "\n".join(lines)


def _job(made: Submission) -> str:
    return f"Slurm job {made.job}" if made.job.isdecimal() else made.job
