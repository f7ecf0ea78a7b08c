"""The time that Slurm gives a job: said, compared with what training needs, and not overrun."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from forgelm import slurm
from forgelm.log import log, say

# A job that would be ended at its limit is requeued this long before: Slurm wouldn't do it.
_RESERVE_S = 20.0
_AGAIN_S = 60.0
_LEAST_LEAD_S = 60.0


@dataclass(frozen=True)
class Pace:
    """Seconds that training was seen to need: a step at its slowest, a save until it is durable."""

    step: float
    save: float

    @property
    def to_stop(self) -> float:
        return self.step + self.save


class Deadline:
    """What a job's time limit and its partition's preemption leave for a step and a save.

    `lead` and `grace` are seconds from the signal to the end, None where there is none or where
    nobody says.
    """

    def __init__(self, job: slurm.Job, facts: slurm.Facts) -> None:
        self.job = job
        self.end = facts.end
        self.lead = float(os.environ[slurm.LEAD]) if slurm.LEAD in os.environ else None
        self.grace = slurm.grace(facts.partition)
        self._warned: float = 0.0

    def __str__(self) -> str:
        parts = [f"Slurm job {self.job.name}, start {self.job.restarts + 1}"]
        if self.end is not None:
            parts.append(f"time limit {self.end:%Y-%m-%d %H:%M:%S}")
            if self.lead is not None:
                parts.append(f"signal {self.lead:.0f} s before")
        if self.grace is not None:
            parts.append(f"{self.grace:.0f} s of grace when preempted")
        return ", ".join(parts)

    def compare(self, pace: Pace) -> None:
        """Warn where a step and a save don't fit; again only when it got much worse."""
        if pace.to_stop <= 1.2 * self._warned:
            return
        needs = f"a step of {pace.step:.1f} s and a save of {pace.save:.1f} s"
        if self.end is not None and self.lead is not None and pace.to_stop > self.lead:
            self._warned = pace.to_stop
            log.warning(
                "%s don't fit into the %.0f s between Slurm's signal and the time limit: submit "
                "with hydra.launcher.signal_delay_s=%.0f",
                needs,
                self.lead,
                max(_LEAST_LEAD_S, 2 * pace.to_stop),
            )
        if self.grace is not None and pace.to_stop > self.grace:
            self._warned = pace.to_stop
            log.warning(
                "%s don't fit into the %.0f s that Slurm gives a preempted job, which then repeats "
                "what it did since the last save: save more often (training.save_minutes=N), or "
                "make steps shorter",
                needs,
                self.grace,
            )

    def guard(self) -> Callable[[], None]:
        """Requeue the job shortly before its limit, should it still run then; returns the way off.

        Slurm ends a job at its limit for good. What was done since the last checkpoint is lost.
        """
        over = threading.Event()

        def wait() -> None:
            end = self.end
            while end is not None:
                left = (end - datetime.now()).total_seconds() - _RESERVE_S
                if left <= 0:
                    break
                if over.wait(min(left, _AGAIN_S)):
                    return
                facts = slurm.ask(self.job) if left <= _AGAIN_S else None
                # Somebody may have given the job more time.
                end = facts.end if facts is not None else end
            if end is not None and not over.is_set():
                problem = slurm.requeue(self.job)
                how = "requeued it" if problem is None else f"couldn't requeue it ({problem})"
                say(f"job {self.job.name} reaches its time limit before a safe stop: {how}")

        threading.Thread(target=wait, name="forgelm-deadline", daemon=True).start()
        return over.set


def deadline() -> Deadline | None:
    """That of this process's job; None outside of batch jobs, or where Slurm can't be asked."""
    job = slurm.current()
    facts = None if job is None else slurm.ask(job)
    if job is None or facts is None or not facts.batch:
        return None
    return Deadline(job, facts)
