"""Waiting for submitted runs, with a view of where each stands."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from forgelm import slurm, stop
from forgelm.cluster.submit import Submission, note_cancelled
from forgelm.errors import EXIT_OK, EXIT_STOPPED, EXIT_TRAINING_ERROR, worst
from forgelm.log import say
from forgelm.run.lock import started
from forgelm.run.paths import RunPaths
from forgelm.run.state import Status, TrainingState, load_state

_POLL_S = 2.0
# A run's last words may reach a shared file system after its job has left the queue.
_PATIENCE = 5
_CODES = {
    Status.complete: EXIT_OK,
    Status.preempted: EXIT_STOPPED,
    Status.cancelled: EXIT_STOPPED,
}
_OVER = (Status.complete, Status.failed, Status.cancelled)


def wait(made: Submission) -> int:
    """Say what changes until all runs are over; returns the worst of their exit codes.

    A stop that is asked for ends the waiting alone: the runs go on.
    """
    said: dict[RunPaths, str] = {}
    missing: Counter[RunPaths] = Counter()
    with stop.listening():
        while True:
            queue = _queue(made)
            for name, paths in zip(made.names, made.runs, strict=True):
                state = load_state(paths)
                assert state is not None
                gone = queue is not None and name not in queue
                if gone and note_cancelled(paths):
                    state = replace(state, status=Status.cancelled)
                line = _line(name, paths, state, queue)
                missing[paths] = missing[paths] + 1 if gone else 0
                if said.get(paths) != line:
                    said[paths] = line
                    say(line)
                if state.status in _OVER:
                    missing[paths] = _PATIENCE
            if all(missing[paths] >= _PATIENCE for paths in made.runs):
                break
            for _ in range(int(_POLL_S / 0.1)):
                if stop.requested() is not None:
                    say("waiting no more; the runs go on")
                    return EXIT_STOPPED
                time.sleep(0.1)
    return worst(_code(paths) for paths in made.runs)


def _queue(made: Submission) -> dict[str, str] | None:
    if made.job.isdecimal():
        return slurm.states(made.names)
    pid = made.names[0]
    return {pid: "RUNNING"} if started(int(pid)) else {}


def _line(name: str, paths: RunPaths, state: TrainingState, queue: dict[str, str] | None) -> str:
    goal = "" if state.target is None else f", step {state.step} of {state.target}"
    restarts = f", {state.restarts} restarts" if state.restarts else ""
    place = "" if queue is None else f" ({queue.get(name, 'not in the queue').lower()})"
    return f"{name} {paths.root.name}: {state.status}{place}{goal}{restarts}"


def _code(paths: RunPaths) -> int:
    state = load_state(paths)
    return EXIT_TRAINING_ERROR if state is None else _CODES.get(state.status, EXIT_TRAINING_ERROR)
