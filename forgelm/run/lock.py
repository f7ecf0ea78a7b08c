"""One process in a run directory, and a lock that outlives nobody.

The kernel frees `flock` when its holder dies, on one machine and, with a delay, on NFS. Where it
doesn't (a dead node whose lock the file server keeps, a file system whose locks are local to each
node), the holder's record decides: who it is, and a heartbeat, the lock file's modification time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from forgelm import slurm, stop
from forgelm.errors import RunError, RunInUse
from forgelm.log import log
from forgelm.run.paths import RunPaths

HEARTBEAT_S = 10.0
# A holder elsewhere that can't be asked is given this long to show its heartbeat.
PATIENCE_S = 3.5 * HEARTBEAT_S
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_SLURM_GONE = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "REQUEUED")


@dataclass(frozen=True)
class Holder:
    """Who is in a run directory. `started` is the process's start in clock ticks since boot."""

    host: str
    boot: str
    pid: int
    started: str
    slurm_job: str | None
    token: str

    def __str__(self) -> str:
        job = f" (Slurm job {self.slurm_job})" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"


class Ownership:
    """A held lock: beats its heart, and knows when somebody took the directory over."""

    def __init__(self, path: Path, handle: int, holder: Holder) -> None:
        self.path = path
        self.holder = holder
        self._handle = handle
        self._done = threading.Event()
        self.lost = False
        self._thread = threading.Thread(target=self._beat, name="forgelm-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RunError when the directory isn't ours any more: nothing may be written then."""
        if self.lost:
            raise RunError(
                f"{self.path.parent}: another process took this run over while this one was out of "
                "reach; it goes on there"
            )

    def release(self) -> None:
        self._done.set()
        self._thread.join()
        if not self.lost:
            os.ftruncate(self._handle, 0)
        # Unlocked by name: children that inherited the handle would keep the lock otherwise.
        with suppress(OSError):
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            with suppress(OSError):
                found = _read(self.path)
                self.lost = found is not None and found.token != self.holder.token
                if not self.lost:
                    os.utime(self._handle)


@contextmanager
def owned(paths: RunPaths) -> Iterator[Ownership]:
    """Hold the run directory; raises RunInUse, naming the holder, when another process does."""
    paths.root.mkdir(parents=True, exist_ok=True)
    ownership = _acquire(paths.lock)
    try:
        yield ownership
    finally:
        ownership.release()


def _acquire(path: Path) -> Ownership:
    me = _myself()
    while True:
        handle = _open(path)
        try:
            locked = _flock(handle)
            if not _is_current(path, handle):
                os.close(handle)
                continue
            other = _parse(os.pread(handle, 4096, 0))
            if other is None and locked is False:
                raise RunInUse(f"{path.parent}: another process is just entering this run")
            if other is not None:
                handle = _take_over(path, handle, other, locked)
            _write(handle, me)
            if not _is_current(path, handle):
                os.close(handle)
                continue
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        return Ownership(path, handle, me)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise RunError(
            f"{path.parent}: can't be written ({error.strerror}): give yourself the right to, or "
            "give another output_root"
        ) from error


def _flock(handle: int) -> bool | None:
    """True: locked. False: somebody else has it. None: this file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_current(path: Path, handle: int) -> bool:
    """Whether the open file is still the one that the path names."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _take_over(path: Path, handle: int, other: Holder, locked: bool | None) -> int:
    """The handle to hold the lock by, once it is sure that the holder it names is gone.

    Raises:
        RunInUse: it isn't gone, or somebody else is taking over.
    """
    with _alone(path):
        found = _read(path)
        if found is None or found.token != other.token:
            raise RunInUse(f"{path.parent}: {found or 'another process'} is in this run")
        alive = _alive(other, locked)
        if alive is None:
            alive = _heard(other, path, handle)
        if alive:
            raise RunInUse(
                f"{path.parent}: {other} is in this run; wait for it, stop it, or give another "
                "run_name"
            )
        log.warning("%s left this run without a word; taking it over", other)
        if locked is not False or _flock(handle):
            return handle
        mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        fresh = _open(mine)
        _flock(fresh)
        os.replace(mine, path)
        os.close(handle)
        return fresh


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time decides about a dead holder: the decision may take long.

    By a lock and not by a file's being there: who is killed here must not bar the next.
    """
    gate = path.with_name(path.name + ".takeover")
    while True:
        handle = _open(gate)
        try:
            if _flock(handle) is False:
                raise RunInUse(f"{path.parent}: another process is just taking this run over")
            if not _is_current(gate, handle):
                continue
            try:
                yield
            finally:
                gate.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _alive(other: Holder, locked: bool | None) -> bool | None:
    """Whether the process that left this record is still at work; None: it can't be asked."""
    if other.host == socket.gethostname():
        if other.boot != _boot() or locked:
            return False
        if started(other.pid) == other.started:
            return True
        # Its children may hold the lock for some seconds; or it lives in another container.
        return None if locked is False else False
    if other.slurm_job is None:
        return None
    # The same job on another node: Slurm requeued it, and never runs one twice at a time.
    return False if other.slurm_job == _slurm_job() else _slurm_runs(other.slurm_job)


def _heard(other: Holder, path: Path, handle: int) -> bool:
    """Watch for a heartbeat. What counts is that it moves: clocks of nodes differ."""
    log.warning("%s was in this run; watching %.0f s for a heartbeat", other, PATIENCE_S)
    before = path.stat().st_mtime_ns
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        stop.check()
        time.sleep(PATIENCE_S / 50)
        if path.stat().st_mtime_ns != before:
            return True
        if other.host == socket.gethostname() and _flock(handle):
            return False
    return False


def _slurm_runs(job: str) -> bool | None:
    """Whether Slurm still runs the job; None where it can't be asked."""
    known = slurm.states([job])
    if known is None:
        return None
    state = known.get(job, "gone")
    return state not in ("gone", "PENDING") and not state.startswith(_SLURM_GONE)


def _slurm_job() -> str | None:
    job = slurm.current()
    return job.name if job else None


def _myself() -> Holder:
    pid = os.getpid()
    return Holder(
        socket.gethostname(), _boot(), pid, started(pid) or "", _slurm_job(), uuid.uuid4().hex
    )


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """When a process of this machine began; None when there is none, or only its remains."""
    try:
        # The name, in brackets, may hold spaces and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _write(handle: int, holder: Holder) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(asdict(holder)).encode(), 0)
    os.fsync(handle)


def _read(path: Path) -> Holder | None:
    with suppress(FileNotFoundError):
        return _parse(path.read_bytes())
    return None


def _parse(text: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None
