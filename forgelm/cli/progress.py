"""How far a download is: one line on a terminal, now and then one elsewhere."""

from __future__ import annotations

import sys
import threading
import time

from forgelm.airgap.fetch import Progress, Wanted
from forgelm.log import log, say

_LIVE_S, _PLAIN_S = 0.5, 20.0
_MIB = 2**20


class Bytes(Progress):
    """Counts the bytes of all transfers together; says how many came, how fast, how long yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._every = _LIVE_S if sys.stderr.isatty() else _PLAIN_S
        self._live = sys.stderr.isatty()
        self._what = ""
        self.landed_ones: list[Wanted] = []
        self.total = self.done = 0
        self._begun = self._said = time.monotonic()

    def begin(self, repositories: int, total: int) -> None:
        self._what = f"{repositories} repositor{'y' if repositories == 1 else 'ies'}"
        self.total = total
        self._begun = self._said = time.monotonic()
        if total:
            say(f"fetching {self._what}, {total / _MIB:.1f} MiB")

    def move(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self._said < self._every:
                return
            self._said = now
            say(self._state(now), live=True)

    def say(self, text: str) -> None:
        log.warning(text)

    def landed(self, wanted: Wanted) -> None:
        self.landed_ones.append(wanted)

    def end(self) -> None:
        if self._live and self.done:
            say(self._state(time.monotonic()))

    def _state(self, now: float) -> str:
        speed = self.done / max(now - self._begun, 1e-3)
        left = max(0, self.total - self.done)
        rest = f", {_time(left / speed)} left" if speed > 0 and left else ""
        return (
            f"{self._what}: {self.done / _MIB:.1f} of {self.total / _MIB:.1f} MiB, "
            f"{speed / _MIB:.1f} MiB/s{rest}"
        )


class Carried(Bytes):
    """The same of what is packed or unpacked; `what` says which."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._doing = what

    def begin(self, repositories: int, total: int) -> None:
        self._what, self.total = self._doing, total
        self._begun = self._said = time.monotonic()


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
