"""One file from the hub into the cache: resumed where it was cut, checked while it streams."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from forgelm.errors import RunError
from forgelm.hubcache import Entry, chunks, hasher
from forgelm.run.files import flush, readable

if TYPE_CHECKING:
    import httpx2

INCOMPLETE = ".incomplete"
PATIENCE = "FORGELM_HUB_PATIENCE"
"""Environment variable: for how many seconds a request is tried again before it has failed."""

_PATIENCE_S = 60.0
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_S = 1.0, 15.0, 900.0
_ROUNDS_ASKED = 5
_ATTEMPTS = 3
_REDIRECTS = 5
_AGAIN = (408, 429, 500, 502, 503, 504)
_BLOCK = 1 << 20
_IN_FLIGHT = 8
_BESIDE = 4 << 20
_QUIET_S = 5.0


class Stop(Exception):
    """Somebody pressed Ctrl-C: workers leave, what they have stays for the next time."""


class _Again(Exception):
    """The server or the way to it failed; another try may do. `wait` (seconds) is what it asks."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass
class Line:
    """What all transfers of a command share.

    Attributes:
        said: takes a line for the person who waits.
        moved: takes how many bytes came, or were taken back (negative).
    """

    said: Callable[[str], None]
    moved: Callable[[int], None]
    stopping: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _last: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        if self.stopping.is_set():
            raise Stop

    def wait(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise Stop

    def say(self, thing: str, reason: str, wait: float) -> None:
        """Say that something is tried again; when many files fail of one cause, once."""
        with self._lock:
            now = time.monotonic()
            if now - self._last.get(reason, -_QUIET_S) < _QUIET_S:
                return
            self._last[reason] = now
        self.said(f"{thing}: {reason}; trying again in {wait:.0f} s")

    def patiently(self, thing: str, call: Callable[[], Any]) -> Any:
        """Call until it doesn't fail by the network or the server, for as long as patience lasts.

        Raises:
            What the call raised last.
        """
        patience = _Patience(self, thing)
        while True:
            self.check()
            try:
                with _told_apart():
                    return call()
            except _Again as error:
                patience.spend(error)


class _Patience:
    """Waits grow from try to try; a byte that came renews it."""

    def __init__(self, line: Line, thing: str) -> None:
        self.line, self.thing = line, thing
        self.limit = float(os.environ.get(PATIENCE) or _PATIENCE_S)
        self.renew()

    def renew(self) -> None:
        self.waited, self.next, self.asked = 0.0, min(_FIRST_WAIT_S, self.limit / 8), 0

    def spend(self, error: _Again) -> None:
        """Wait before the next try; raises the error's cause when patience is at its end."""
        cause = error.__cause__ or error
        if error.wait is not None:
            self.asked += 1
            if self.asked > _ROUNDS_ASKED or error.wait > _LONGEST_ASKED_S:
                raise cause
            seconds = error.wait
        else:
            seconds = min(self.next, self.limit - self.waited)
            if seconds <= 0:
                raise cause
            self.waited += seconds
            self.next = min(2 * self.next, _LONGEST_WAIT_S)
        self.line.say(self.thing, str(error), seconds)
        self.line.wait(seconds)


@contextmanager
def _told_apart() -> Iterator[None]:
    """Raise `_Again` for what may go better the next time."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
        if "CERTIFICATE" in str(error):
            raise
        raise _Again(_reason(error)) from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code not in _AGAIN:
            raise
        raise _Again(f"the hub answers {code}", _asked_wait(error.response)) from error


def _reason(error: Exception) -> str:
    import httpx2

    if isinstance(error, httpx2.TimeoutException):
        return "the connection stalled"
    if isinstance(error, httpx2.ConnectError):
        return "the hub can't be reached"
    return "the connection was cut"


def _asked_wait(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait: its rate limit's, or Retry-After."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


def transfer(line: Line, thing: str, url: str, target: Path, entry: Entry) -> None:
    """Fetch `url` to `target`, whose bytes are those that the hub's hash promises.

    What an earlier try left in TARGET.incomplete is gone on with. The caller holds the blob's lock.

    Raises:
        RunError: other bytes came, again and again.
        HfHubHTTPError: the hub refuses it, or lacks it.
        httpx2.TransportError: the network failed for longer than patience lasts.
        OSError: it can't be written.
    """
    partial = target.with_name(target.name + INCOMPLETE)
    for _ in range(_ATTEMPTS):
        with _sink(partial, entry, line) as sink:
            _fill(line, thing, url, sink)
            right = sink.digest() == entry.blob
        if right:
            break
        line.moved(-sink.size)
        partial.unlink()
        line.said(f"{thing}: its bytes are not those that the hub's hash promises; fetched again")
    else:
        raise RunError(
            f"{thing}: {_ATTEMPTS} times other bytes came than the hub's hash promises; something "
            "on the way changes them, a proxy perhaps: try from another network"
        )
    if entry.size >= _BESIDE:
        flush(partial)
    readable(partial)
    os.replace(partial, target)


def _fill(line: Line, thing: str, url: str, sink: _Sink) -> None:
    patience = _Patience(line, thing)
    while sink.size < sink.entry.size:
        line.check()
        before = sink.size
        try:
            with _told_apart():
                _stream(line, thing, url, sink)
            if sink.size < sink.entry.size:
                raise _Again("the answer was cut short")
        except _Again as error:
            if sink.size > before:
                patience.renew()
            patience.spend(error)


def _stream(line: Line, thing: str, url: str, sink: _Sink) -> None:
    """One request: the rest of the file, or all of it from a server that knows no ranges."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    with _opened(url, sink.size) as response:
        if response.is_redirect:
            raise RunError(f"{thing}: the hub redirects more than {_REDIRECTS} times")
        if response.status_code == 416:
            sink.restart()
            raise _Again("the hub refuses to go on where it was")
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if sink.size and (response.status_code != 206 or start != str(sink.size)):
            sink.restart()
        for chunk in response.iter_bytes():
            line.check()
            sink.write(chunk)
            if sink.size > sink.entry.size:
                break


@contextmanager
def _opened(url: str, start: int) -> Iterator[httpx2.Response]:
    """The answer to a GET from byte `start`; a token goes to the hub alone, not where it sends."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    headers = build_hf_headers(library_name="forgelm")
    # Compressed answers have no ranges, and other sizes.
    headers["Accept-Encoding"] = "identity"
    if start:
        headers["Range"] = f"bytes={start}-"
    client = get_session()
    for _ in range(_REDIRECTS):
        request = client.build_request(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        response = client.send(request, stream=True, follow_redirects=False)
        if not response.is_redirect:
            break
        response.close()
        there = urljoin(url, response.headers["Location"])
        if urlsplit(there).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)
        url = there
    try:
        yield response
    finally:
        response.close()


class _Sink:
    """The file that grows, and the hash of what it holds.

    A large file is written and hashed by a thread of its own, beside the network.
    """

    def __init__(self, path: Path, entry: Entry, line: Line) -> None:
        self.path, self.entry, self.line = path, entry, line
        self.file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self.size, self.hash = 0, hasher(entry.blob, entry.size)
        self.error: Exception | None = None
        self.held: list[bytes] = []
        self.held_size = 0
        self.blocks: queue.Queue[bytes | None] | None = None
        if os.fstat(self.file.fileno()).st_size <= entry.size:
            for chunk in chunks(self.file):
                line.check()
                self.hash.update(chunk)
                self.size += len(chunk)
            line.moved(self.size)
        else:
            self.file.truncate(0)

    def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.held.append(chunk)
        self.held_size += len(chunk)
        self.line.moved(len(chunk))
        if self.held_size >= _BLOCK:
            self._pass_on()

    def _pass_on(self) -> None:
        if not self.held:
            return
        block = self.held[0] if len(self.held) == 1 else b"".join(self.held)
        self.held, self.held_size = [], 0
        if self.entry.size < _BESIDE:
            self._take(block)
            return
        if self.blocks is None:
            self.blocks = queue.Queue(_IN_FLIGHT)
            self.thread = threading.Thread(target=self._work, args=(self.blocks,), daemon=True)
            self.thread.start()
        if self.error is not None:
            raise self.error
        self.blocks.put(block)

    def _work(self, blocks: queue.Queue[bytes | None]) -> None:
        while (block := blocks.get()) is not None:
            if self.error is None:
                try:
                    self._take(block)
                except Exception as error:
                    self.error = error

    def _take(self, block: bytes) -> None:
        self.hash.update(block)
        view = memoryview(block)
        while view:
            view = view[self.file.write(view) :]

    def settle(self) -> None:
        """All that was written is in the file and in the hash."""
        self._pass_on()
        self._join()
        if self.error is not None:
            raise self.error

    def _join(self) -> None:
        if self.blocks is not None:
            self.blocks.put(None)
            self.thread.join()
            self.blocks = None

    def close(self) -> None:
        self._join()
        self.file.close()

    def restart(self) -> None:
        """Begin anew from the first byte."""
        self.settle()
        self.line.moved(-self.size)
        self.file.seek(0)
        self.file.truncate()
        self.size, self.hash = 0, hasher(self.entry.blob, self.entry.size)

    def digest(self) -> str:
        self.settle()
        return self.hash.hexdigest()


@contextmanager
def _sink(path: Path, entry: Entry, line: Line) -> Iterator[_Sink]:
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = _Sink(path, entry, line)
    try:
        yield sink
    finally:
        sink.close()
