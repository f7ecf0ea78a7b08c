"""One process in a run directory. The kernel frees the lock of a process that dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from forgelm.errors import RunInUse
from forgelm.run.paths import RunPaths


@contextmanager
def owned(paths: RunPaths) -> Iterator[None]:
    """Hold the run directory; raises RunInUse, naming the holder, when another process does."""
    paths.root.mkdir(parents=True, exist_ok=True)
    handle = os.open(paths.lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 4096, 0).decode(errors="replace")
            raise RunInUse(
                f"{paths.root}: {_say(holder)} is in this run; "
                "wait for it, or give another run_name"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(
            handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0
        )
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _say(holder: str) -> str:
    try:
        who = json.loads(holder)
        return f"process {who['pid']} on {who['host']}"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "another process"
