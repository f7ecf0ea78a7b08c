"""Several processes on this machine that train one run together, and the one that watches them."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from forgelm import stop
from forgelm.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_TRAINING_ERROR,
    RankFailed,
)

_POLL_S = 0.05
# How long the others get to end by themselves once one has.
_GRACE_S = 15.0
LOST = ("gloo/", "NCCL")
"""Words by which a rank's error says no more than that another one ended."""


def together(plan: Any, ranks: int, log: Path) -> None:
    """Run a plan in `ranks` processes; returns when it is complete.

    A stop that is asked of this process is passed on to the first rank. When a rank dies, the
    others are ended, and what it said last is appended to `log`.

    Raises:
        RankFailed: with the exit code of the first rank, or of a failure.
    """
    port = _free_port()
    with contextlib.ExitStack() as files:
        said = [files.enter_context(tempfile.TemporaryFile()) for _ in range(ranks)]
        processes = [_start(plan, rank, ranks, port, said[rank]) for rank in range(ranks)]
        code = _supervise(processes, said, log)
    if code != EXIT_OK:
        raise RankFailed(code)


def _supervise(
    processes: list[subprocess.Popen[bytes]], said: Sequence[IO[bytes]], log: Path
) -> int:
    try:
        return _watch(processes)
    except KeyboardInterrupt:
        processes[0].send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(_GRACE_S)
        raise
    finally:
        ended = [process.poll() for process in processes]
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        _report(ended, said, log)


def _start(plan: Any, rank: int, ranks: int, port: int, said: IO[bytes]) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // ranks)
    process = subprocess.Popen(
        [sys.executable, "-m", "forgelm.cli.rank"],
        stdin=subprocess.PIPE,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else said,
        # The terminal's Ctrl-C reaches this process alone, and is passed on.
        start_new_session=True,
        env={
            "OMP_NUM_THREADS": str(threads),
            "GLOO_SOCKET_IFNAME": "lo",
            # Each rank would say that looking for unused parameters costs time.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        },
    )
    assert process.stdin is not None
    pickle.dump((plan, sys.argv), process.stdin)
    process.stdin.close()
    return process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _watch(processes: list[subprocess.Popen[bytes]]) -> int:
    """Pass a stop on, and wait; returns the run's exit code."""
    first, passed_on, deadline = processes[0], False, None
    while first.poll() is None:
        reason = stop.requested()
        if reason is not None and not passed_on:
            passed_on = True
            first.send_signal(signal.SIGINT if reason == "Ctrl-C" else signal.Signals[reason])
        if deadline is None and any(process.poll() not in (None, 0) for process in processes[1:]):
            deadline = time.monotonic() + _GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return EXIT_TRAINING_ERROR
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(_POLL_S)
    code = first.returncode
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return code if code >= 0 else EXIT_TRAINING_ERROR


def _report(ended: Sequence[int | None], said: Sequence[IO[bytes]], log: Path) -> None:
    """What ranks that failed by themselves said last, to the screen and to the log.

    Nobody else writes the log now. The first rank has said its own already.
    """
    for rank, (code, file) in enumerate(zip(ended, said, strict=True)):
        if rank == 0 or code in (None, EXIT_OK, EXIT_STOPPED, EXIT_INTERRUPTED):
            continue
        file.seek(0)
        lines = file.read().decode(errors="replace").strip().splitlines()
        if code is not None and code < 0:
            lines.append(f"killed by {signal.Signals(-code).name}")
        if not lines:
            continue
        if not any(word in lines[-1] for word in LOST):
            sys.stderr.write(f"forgelm: rank {rank}: {lines[-1]}\n")
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as output:
            output.writelines(f"rank {rank}: {line}\n" for line in lines)
