"""A request to stop: signals set a flag, and whoever works looks at it where stopping is safe."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from forgelm.errors import Stopped

_PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@dataclass
class _Flag:
    owner: int | None = None
    reason: str | None = None
    at: float = 0.0
    last: bool = False
    silent: bool = False


_flag = _Flag()


@contextmanager
def listening() -> Iterator[None]:
    """Signals of SIGNALS ask for a stop while this is open; before and after they end the process.

    A second Ctrl-C raises KeyboardInterrupt at once; any other signal after the first is ignored.
    """
    if _flag.owner == os.getpid():
        yield
        return
    before = {name: signal.signal(name, _on_signal) for name in SIGNALS}
    _flag.owner, _flag.reason = os.getpid(), None
    try:
        yield
    finally:
        asked = _flag.reason is not None
        _flag.owner = None
        if not _flag.last:
            _flag.reason = None
        for name, handler in before.items():
            # A person may still be tired of waiting.
            ignored = _flag.last and (asked or name is not signal.SIGINT)
            signal.signal(name, signal.SIG_IGN if ignored else handler)


def ends_with_this(silent: bool = False) -> None:
    """This process ends when its command does, and from then on lets no signal hurry it.

    One that came after the work would turn the exit code into its own: schedulers send several.
    `silent`: somebody else tells the person at the terminal that the stop has begun.
    """
    _flag.last, _flag.silent = True, silent


def silently() -> None:
    """A first Ctrl-C says nothing: who is asked to stop has no step to end."""
    _flag.silent = True


def request(reason: str) -> None:
    """Ask for a stop, as a signal does."""
    if _flag.reason is None:
        _flag.reason, _flag.at = reason, time.monotonic()


def requested() -> str | None:
    """Why a stop was asked for; None: go on."""
    return _flag.reason


def since() -> float:
    """Seconds since the stop was asked for."""
    return time.monotonic() - _flag.at


def check() -> None:
    """Raise Stopped if a stop was asked for."""
    if _flag.reason is not None:
        raise Stopped(_flag.reason)


def ignore_in_worker(_worker: int = 0) -> None:
    """For processes that feed this one: whoever stops them early breaks the step in flight.

    When this one is killed they go at once: they hold its lock, which they inherited.
    """
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _on_signal(number: int, frame: FrameType | None) -> None:
    # A forked child inherits this handler and must not act for its parent.
    if os.getpid() != _flag.owner:
        return
    if number == signal.SIGINT:
        if _flag.reason is not None:
            raise KeyboardInterrupt
        request("Ctrl-C")
        if _flag.silent:
            return
        # Nothing but a raw write is safe in a handler: the log may be half-way through a line.
        os.write(2, b"\nforgelm: stopping after this step; Ctrl-C again stops at once\n")
        return
    request(signal.Signals(number).name)
