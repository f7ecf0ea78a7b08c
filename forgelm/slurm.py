"""This process's Slurm job: who it is, what Slurm says of it, and handing it back to the queue.

A stop that Slurm asked for (preemption, the time limit) ends with the job requeued under its own
id; one that a person asked for (scancel, Ctrl-C) doesn't.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from forgelm import stop
from forgelm.errors import RunError, in_brief
from forgelm.log import log

HANDOVER = "FORGELM_HANDOVER"
"""Names the file by which a process asks the batch script around it to requeue the job."""
BEGAN = "FORGELM_BEGAN"
"""Names the file that tells the batch script that forgelm itself began."""
LEAD = "FORGELM_SIGNAL_LEAD_S"
"""How long before the time limit the job's signal comes, where the batch script says so."""

_ASK_TIMEOUT_S = 15.0
_ATTEMPTS = 3
_PAUSE_S = 2.0
_LINGER_S = 3600.0
_UNSURE_S = 90.0
_THEIRS = ("SQUEUE_", "SACCT_", "SCONTROL_", "SLURM_TIME_FORMAT")
# Outside the range from which systems give ports to connections.
_FIRST_PORT, _PORTS = 15000, 16000


@dataclass(frozen=True)
class Job:
    """A Slurm job as its processes see it. `restarts` is how often it was requeued."""

    id: str
    name: str
    restarts: int
    in_step: bool

    @property
    def ranks(self) -> int:
        """Processes that `srun` started side by side; 1 outside of it."""
        return int(os.environ.get("SLURM_NTASKS", "1")) if self.in_step else 1

    @property
    def nodes(self) -> int:
        return int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) if self.in_step else 1

    @property
    def rank(self) -> int:
        return int(os.environ.get("SLURM_PROCID", "0")) if self.in_step else 0


def current() -> Job | None:
    """The job that this process is part of, if any."""
    number = os.environ.get("SLURM_JOB_ID")
    if number is None:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return Job(
        id=number,
        # Requeueing an array task by its own number would requeue the whole array.
        name=f"{array}_{task}" if array and task else number,
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        in_step="SLURM_STEP_ID" in os.environ,
    )


def in_step() -> bool:
    """Whether `srun` started this process."""
    job = current()
    return job is not None and job.in_step


def started_ranks() -> bool:
    """Whether `srun` started this process as one of several."""
    job = current()
    return job is not None and job.ranks > 1


def set_rendezvous(job: Job) -> None:
    """Tell torch where this rank stands and where ranks meet, unless the environment says so."""
    number = int(job.id) + int(os.environ.get("SLURM_STEP_ID", "0"))
    alone = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    # Where Slurm shows each process one GPU of its own, that is the first one for all.
    own_gpu = re.fullmatch(r"\d+", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    found = {
        "RANK": str(job.rank),
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_RANK": "0" if own_gpu else os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(job.ranks // job.nodes),
        "MASTER_PORT": str(_FIRST_PORT + number % _PORTS),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **(alone if job.nodes == 1 else {"MASTER_ADDR": first_host(os.environ["SLURM_NODELIST"])}),
    }
    for name, value in found.items():
        os.environ.setdefault(name, value)


def first_host(hosts: str) -> str:
    """The first name of a list in Slurm's notation: `gpu-[003-007,9]-ib,login1` → `gpu-003-ib`."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", hosts)
    assert found is not None, hosts
    return "".join(part or "" for part in found.groups())


# What Slurm says


@dataclass(frozen=True)
class Facts:
    """A job as `scontrol show job` has it."""

    state: str
    preempted: bool
    restarts: int
    batch: bool
    partition: str
    end: datetime | None
    overtime: bool


def ask(job: Job) -> Facts | None:
    """What Slurm says of the job; None where it can't be asked."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S)
        # The last task of an array has the array's number: by that Slurm shows all of them.
        code, out = _call("scontrol", "-o", "show", "job", job.name)
        if code == 0 and "JobState=" in out:
            return _facts(out)
        if code is None:
            return None
    return None


def _facts(text: str) -> Facts:
    values = dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0]))
    return Facts(
        state=values["JobState"],
        preempted=values.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"),
        restarts=int(values.get("Restarts", "0")),
        batch=values.get("BatchFlag") != "0",
        partition=values.get("Partition", ""),
        end=_time(values.get("EndTime")),
        overtime=values.get("Reason") == "TimeLimit",
    )


def _time(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text or "")
    except ValueError:
        return None


def grace(partition: str) -> float | None:
    """Seconds from a preemption's signal to the end; None: the partition isn't preempted."""
    code, out = _call("scontrol", "-o", "show", "partition", partition)
    values = dict(re.findall(r"(\w+)=(\S*)", out))
    if code != 0 or values.get("PreemptMode", "OFF") == "OFF" or "GraceTime" not in values:
        return None
    return float(values["GraceTime"])


def states(names: Sequence[str]) -> dict[str, str] | None:
    """The state of each job that Slurm still queues or runs; None where it can't be asked."""
    if not names:
        return {}
    parents = sorted({name.partition("_")[0] for name in names})
    code, out = _call(
        "squeue", "--noheader", "--array", "--format=%i %T", "--jobs", ",".join(parents)
    )
    if code is None or (code != 0 and "Invalid job id" not in out):
        return None
    lines = [line.split() for line in out.splitlines()] if code == 0 else []
    return {words[0]: words[1] for words in lines if len(words) == 2 and words[0] in names}


def job_of_script(folder: Path) -> str | None:
    """The number of the job whose batch script lies in `folder`; None: there is none.

    Raises:
        RunError: Slurm doesn't answer.
    """
    deadline = time.monotonic() + _UNSURE_S
    while True:
        code, out = _call("squeue", "--noheader", "--states=all", "--format=%F %o")
        if code == 0:
            lines = [line.split(maxsplit=1) for line in out.splitlines()]
            return next((w[0] for w in lines if w[1:] and w[1].startswith(f"{folder}/")), None)
        if time.monotonic() > deadline:
            raise RunError(
                "Slurm doesn't answer, so it isn't known whether it took this, and it is taken "
                "back here: cancel what squeue may show of it later, then submit again"
            )
        time.sleep(_PAUSE_S)


def largest_array() -> int | None:
    """How many jobs an array may have here; None where Slurm doesn't say."""
    _, out = _call("scontrol", "show", "config")
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", out)
    return int(found[1]) if found else None


def note_start() -> None:
    """Tell the batch script around this process that forgelm began."""
    if path := os.environ.get(BEGAN):
        Path(path).touch()


def last_state(name: str) -> str | None:
    """How a job that left the queue ended, where Slurm remembers it."""
    code, out = _call("scontrol", "-o", "show", "job", name)
    found = re.search(r"JobState=(\w+)", out) if code == 0 else None
    if found:
        return found.group(1)
    words = ("--noheader", "--parsable2", "--allocations", "--format=State", "--jobs", name)
    code, out = _call("sacct", *words)
    return out.split()[0] if code == 0 and out.split() else None


def silent() -> str | None:
    """Why the controller can't be asked for anything; None where it answers."""
    code, out = _call("scontrol", "ping")
    if code == 0 and re.search(r"\bUP\b", out):
        return None
    # Less the rules of stars and the shouting between them.
    lines = [line.strip(" .") for line in out.splitlines() if re.search("[a-z]", line)]
    return in_brief("; ".join(lines)) or "no scontrol"


def accounts() -> bool:
    """Whether Slurm remembers jobs that left the queue long ago."""
    _, out = _call("scontrol", "show", "config")
    found = re.search(r"AccountingStorageType\s*=\s*(\S+)", out)
    return found is not None and "none" not in found.group(1)


# Handing a job back


@dataclass(frozen=True)
class Handed:
    """What became of the job after a stop. `cancelled`: it was ended by a person, for good.

    `lingers`: only the scheduler can requeue it, if the process waits for that.
    """

    said: str = ""
    cancelled: bool = False
    lingers: bool = False
    requeued: bool = False


@cache
def hand_back() -> Handed:
    """Requeue this process's job if its stop is Slurm's own doing. Done once a process."""
    job, reason = current(), stop.requested() or "another rank was asked to stop"
    if job is None or reason == "Ctrl-C":
        return Handed()
    facts = ask(job)
    if facts is None:
        return _unasked(job)
    if facts.restarts > job.restarts:
        return Handed(f"Slurm requeues job {job.name} already", requeued=True)
    if facts.state != "RUNNING":
        if facts.overtime:
            return Handed(f"job {job.name} is over its time limit and ends; forgelm resume goes on")
        return Handed(f"job {job.name} was cancelled", cancelled=True)
    if not facts.batch:
        return Handed(f"job {job.name} is no batch job and can't be requeued")
    if reason == "SIGTERM" and not facts.preempted:
        return Handed(f"job {job.name} isn't being preempted: not requeued")
    problem = requeue(job)
    if problem is None:
        return Handed(f"requeued job {job.name} by scontrol", requeued=True)
    if facts.preempted:
        said = f"job {job.name} couldn't be requeued ({problem}): waiting for Slurm to do so"
        return Handed(said, lingers=True)
    return Handed(f"job {job.name} couldn't be requeued ({problem}); forgelm resume goes on")


def _unasked(job: Job) -> Handed:
    """Where no scontrol is at hand: the batch script is, or the scheduler is waited for."""
    path = os.environ.get(HANDOVER)
    if path is not None:
        Path(path).touch()
        return Handed(
            f"scontrol can't be reached from here: the batch script requeues job {job.name}"
        )
    return Handed(
        f"scontrol can't be reached from here: waiting for Slurm to end or requeue job {job.name}",
        lingers=True,
    )


def requeue(job: Job) -> str | None:
    """Have Slurm end the job and queue it again; what went wrong, or None."""
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S)
        code, out = _call("scontrol", "requeue", job.name)
        if code == 0:
            return None
        problem = in_brief(out) or "no scontrol"
        if code is None or "disabled" in out or "Invalid" in out:
            break
    return problem


def linger() -> None:
    """Wait for the scheduler, which requeues only what it ended itself."""
    deadline = time.monotonic() + _LINGER_S
    while time.monotonic() < deadline:
        time.sleep(1)
    log.warning("Slurm did nothing with this job for %.0f minutes: leaving", _LINGER_S / 60)


def _call(*words: str) -> tuple[int | None, str]:
    """Exit code and output of one of Slurm's commands; no code where it can't be run."""
    program = shutil.which(words[0])
    if program is None:
        return None, ""
    # Slurm's own signals for a requeue must not end the scontrol that asks for it: what is blocked
    # here is so in the child from its first moment on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop.SIGNALS)
    try:
        process = subprocess.Popen(
            [program, *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A person's own filters and formats aren't meant for us.
            env={k: v for k, v in os.environ.items() if not k.startswith(_THEIRS)},
        )
    except OSError as error:
        return 1, str(error)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        return process.wait(_ASK_TIMEOUT_S), process.communicate()[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return 1, f"no answer within {_ASK_TIMEOUT_S:.0f} s"
