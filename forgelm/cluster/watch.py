"""Waiting for submitted runs, with a view of where each stands."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from forgelm import slurm, stop
from forgelm.cluster.jobs import note_cancelled
from forgelm.cluster.submit import Submission
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
    stop.silently()
    said: dict[RunPaths, str] = {}
    missing: Counter[RunPaths] = Counter()
    with stop.listening():
        while True:
            queue = _queue(made)
            states = []
            for name, paths in zip(made.names, made.runs, strict=True):
                state = load_state(paths) or TrainingState()
                gone = queue is not None and name not in queue
                if gone and note_cancelled(paths):
                    state = replace(state, status=Status.cancelled)
                states.append(state)
                missing[paths] = missing[paths] + 1 if gone else 0
                line = _line(name, paths, state, queue)
                if said.get(paths) != line:
                    said[paths] = line
                    say(line)
                if state.status in _OVER:
                    missing[paths] = _PATIENCE
            if all(missing[paths] >= _PATIENCE for paths in made.runs):
                if any(state.status is Status.submitted for state in states):
                    say(f"a job ended before its run began; what it said is in {made.folder}")
                return worst(_CODES.get(state.status, EXIT_TRAINING_ERROR) for state in states)
            if sys.stdout.isatty():
                say(_summary(states), live=True)
            if _stopped_within(_POLL_S):
                say("waiting no more; the runs go on")
                return EXIT_STOPPED


def _stopped_within(seconds: float) -> bool:
    end = time.monotonic() + seconds
    while stop.requested() is None and time.monotonic() < end:
        time.sleep(0.1)
    return stop.requested() is not None


def _queue(made: Submission) -> dict[str, str] | None:
    if made.job.isdecimal():
        return slurm.states(made.names)
    here = started(int(made.job.split()[-1]))
    return dict.fromkeys(made.names, "RUNNING") if here else {}


def _line(name: str, paths: RunPaths, state: TrainingState, queue: dict[str, str] | None) -> str:
    place = "" if queue is None else f" ({queue.get(name, 'not in the queue').lower()})"
    restarts = f", restart {state.restarts}" if state.restarts else ""
    return f"{name} {paths.root.name}: {state.status}{place}{restarts}"


def _summary(states: Sequence[TrainingState]) -> str:
    counts = Counter(state.status for state in states)
    steps = [f"{s.step}/{s.target}" for s in states if s.status is Status.running and s.target]
    parts = [f"{count} {status}" for status, count in sorted(counts.items())]
    return f"{', '.join(parts)}{'; steps ' + ' '.join(steps[:8]) if steps else ''}"
