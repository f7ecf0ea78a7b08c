"""One file from the hub into the cache: resumed where it was cut, checked while it streams."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from forgelm.errors import ConfigError, RunError
from forgelm.hubcache import Entry, chunks, hasher
from forgelm.run.files import flush, readable

if TYPE_CHECKING:
    import httpx2

INCOMPLETE = ".incomplete"
LARGE = 4 << 20
"""From so many bytes on a file has a connection of its own, and is made durable by itself."""

PATIENCE = "FORGELM_HUB_PATIENCE"
"""Environment variable: for how many seconds a request is tried again before it has failed."""

_PATIENCE_S = 60.0
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_S = 1.0, 15.0, 900.0
_ROUNDS_ASKED = 5
_ATTEMPTS = 3
_REDIRECTS = 5
_AGAIN = (408, 429, 500, 502, 503, 504)
_BLOCK, _BLOCKS = 1 << 17, 16
_SEND = 64 << 20
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
        seconds = f"{wait:.0f}" if wait >= 1 else f"{wait:.1f}"
        self.said(f"{thing}: {reason}; trying again in {seconds} s")

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


def patience_s() -> float:
    """Seconds from the environment.

    Raises:
        ConfigError: it isn't a number of them.
    """
    given = os.environ.get(PATIENCE) or str(_PATIENCE_S)
    try:
        seconds = float(given)
        if not 0 <= seconds < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{PATIENCE}={given}: must be a number of seconds, 0 or more; unset it for "
            f"{_PATIENCE_S:g}"
        ) from None
    return seconds


class _Patience:
    """Waits grow from try to try; a byte that came renews it."""

    def __init__(self, line: Line, thing: str) -> None:
        self.line, self.thing = line, thing
        self.limit = patience_s()
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
    except (ConnectionError, TimeoutError, URLError, HTTPException) as error:
        if "CERTIFICATE" in str(error):
            raise httpx2.ConnectError(str(error)) from error
        known = httpx2.ReadTimeout if _timed_out(error) else httpx2.ReadError
        cause = known(str(error))
        raise _Again(_reason(cause)) from cause
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code not in _AGAIN:
            raise
        raise _Again(f"the hub answers {code}", _asked_wait(error.response)) from error


def _timed_out(error: Exception) -> bool:
    return isinstance(getattr(error, "reason", error), TimeoutError)


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
            right = sink.hash.hexdigest() == entry.blob
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
    if entry.size >= LARGE:
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

    with _opened(url, sink) as answer:
        response = answer.response
        if response.is_redirect:
            raise RunError(f"{thing}: the hub redirects more than {_REDIRECTS} times")
        if response.status_code == 416:
            sink.restart()
            raise _Again("the hub refuses to go on where it was")
        hf_raise_for_status(response)
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if sink.size and (response.status_code != 206 or start != str(sink.size)):
            sink.restart()
        if answer.raw is None:
            for chunk in response.iter_bytes():
                sink.write(chunk)
        else:
            sink.pour(answer.raw)


@dataclass(frozen=True)
class _Answer:
    """Status and headers; the body is in `raw` for a large file, else in the response."""

    response: httpx2.Response
    raw: Any
    close: Callable[[], None]


@contextmanager
def _opened(url: str, sink: _Sink) -> Iterator[_Answer]:
    """The answer to a GET from where the file ends; a token goes to the hub alone."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(library_name="forgelm")
    # Compressed answers have no ranges, and other sizes.
    headers["Accept-Encoding"] = "identity"
    if sink.size:
        headers["Range"] = f"bytes={sink.size}-"
    get = _get_large if sink.entry.size >= LARGE else _get_small
    for _ in range(_REDIRECTS):
        answer = get(url, headers)
        if not answer.response.is_redirect:
            break
        answer.close()
        there = urljoin(url, answer.response.headers["Location"])
        if urlsplit(there).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)
        url = there
    try:
        yield answer
    finally:
        answer.close()


def _get_small(url: str, headers: dict[str, str]) -> _Answer:
    """By the hub's own client, which keeps connections open."""
    from huggingface_hub import constants, get_session

    client = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    request = client.build_request("GET", url, headers=headers, timeout=timeout)
    response = client.send(request, stream=True, follow_redirects=False)
    if response.status_code >= 400:
        response.read()
    return _Answer(response, None, response.close)


def _get_large(url: str, headers: dict[str, str]) -> _Answer:
    """By the standard library, which reads a body several times as fast as the hub's client."""
    import httpx2
    from huggingface_hub import constants

    opener = build_opener(_NoRedirect, HTTPSHandler(context=httpx2.create_ssl_context()))
    try:
        raw = opener.open(Request(url, headers=headers), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    except HTTPError as error:
        raw = error
    body = raw.read() if raw.status >= 400 else b""
    told = list(raw.headers.items())
    request = httpx2.Request("GET", url)
    response = httpx2.Response(raw.status, headers=told, content=body, request=request)
    return _Answer(response, raw, raw.close)


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Sink:
    """The file that grows, and the hash of what it holds."""

    def __init__(self, path: Path, entry: Entry, line: Line) -> None:
        self.entry, self.line = entry, line
        self.file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self.size, self.hash = 0, hasher(entry.blob, entry.size)
        if os.fstat(self.file.fileno()).st_size > entry.size:
            self.file.truncate(0)
        for chunk in chunks(self.file):
            line.check()
            self.hash.update(chunk)
            self.size += len(chunk)
        line.moved(self.size)

    def write(self, block: bytes | memoryview) -> None:
        self.hash.update(block)
        self._to_file(block)

    def _to_file(self, block: bytes | memoryview) -> None:
        self.line.check()
        view = memoryview(block)
        while view:
            view = view[self.file.write(view) :]
        self.size += len(block)
        self.line.moved(len(block))

    def pour(self, raw: Any) -> None:
        """Write all that `raw` gives; a thread hashes beside, another sends it on to the disk."""
        free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        full: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        for _ in range(_BLOCKS):
            free.put(bytearray(_BLOCK))

        def hash_all() -> None:
            while (block := full.get()) is not None:
                self.hash.update(block)
                free.put(block.obj)  # type: ignore[arg-type]

        with ThreadPoolExecutor(2) as beside:
            hashed, sent, due = beside.submit(hash_all), None, self.size + _SEND
            try:
                while count := raw.readinto(buffer := free.get()):
                    block = memoryview(buffer)[:count]
                    self._to_file(block)
                    full.put(block)
                    if self.size > self.entry.size:
                        break
                    # Else the disk would idle now, and all would wait for it at the end.
                    if self.size >= due and (sent is None or sent.done()):
                        if sent is not None:
                            sent.result()
                        sent = beside.submit(os.fdatasync, self.file.fileno())
                        due = self.size + _SEND
                # The disk tells of an error once; the last flush wouldn't hear of it.
                if sent is not None:
                    sent.result()
            finally:
                full.put(None)
                hashed.result()

    def restart(self) -> None:
        """Begin anew from the first byte."""
        self.line.moved(-self.size)
        self.file.seek(0)
        self.file.truncate()
        self.size, self.hash = 0, hasher(self.entry.blob, self.entry.size)


@contextmanager
def _sink(path: Path, entry: Entry, line: Line) -> Iterator[_Sink]:
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = _Sink(path, entry, line)
    try:
        yield sink
    finally:
        sink.file.close()
