"""The jobs that runs were submitted as: the files of a submission, and what Slurm says of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from forgelm import slurm
from forgelm.cluster.launchers import TO_SLURM, TO_THIS_MACHINE
from forgelm.errors import ConfigError, RunError
from forgelm.resolve import Plan
from forgelm.run.files import read_json
from forgelm.run.lifecycle import is_complete
from forgelm.run.paths import OutputRoot, RunPaths
from forgelm.run.state import Status, load_state

SUBMISSION = "submission.json"
RUNS = "runs.txt"
GOALS = "goals.txt"
# Slurm's KillWait, and some.
_ENDING_S = 60.0
_MAY_BE_CANCELLED = (Status.submitted, Status.running, Status.preempted)


def job_of(paths: RunPaths) -> str | None:
    """The Slurm job that a run was last submitted as."""
    return _name_of(paths, TO_SLURM)


def process_of(paths: RunPaths) -> str | None:
    """The process on this machine that has yet to end a run which was submitted to it."""
    name, state = _name_of(paths, TO_THIS_MACHINE), load_state(paths)
    if name is None or state is None or state.status not in (Status.submitted, Status.running):
        return None
    folder = OutputRoot(paths.root.parents[3]).submissions.resolve()
    try:
        # Its number may be another's by now.
        words = Path(f"/proc/{name}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return None
    return name if any(Path(word).parent == folder for word in words) else None


def _name_of(paths: RunPaths, target: str) -> str | None:
    """What a launcher named a run's job, if it was the run's last."""
    submitted = read_json(paths.metadata).get("submitted") if paths.metadata.is_file() else None
    if submitted is None or submitted["launcher"]["_target_"] != target:
        return None
    file = OutputRoot(paths.root.parents[3]).submissions / submitted["folder"] / SUBMISSION
    if submitted["index"] is None or not file.is_file():
        return None
    return str(read_json(file)["names"][submitted["index"]])


def already(plans: Sequence[Plan]) -> tuple[dict[RunPaths, str], dict[RunPaths, str]]:
    """Runs that needn't be submitted, with what to say: complete ones, and those in the queue or at
    work in the background; the last two with their jobs.

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
    here = {
        p.paths: f"process {pid}" for p in plans if not p.extends and (pid := process_of(p.paths))
    }
    said |= {
        paths: f"{paths.root} is one of {process} already, which runs in the background"
        for paths, process in here.items()
    }
    return complete | said, queued | here


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
