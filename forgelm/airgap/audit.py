"""The audit log: who cached what, and when, in lines of which none can be changed unseen.

Each line of `audit_log.jsonl` names the SHA-256 of the line before it. `audit_log.head.json` pins
how many lines there are and the hash of the last, so that a cut tail is found too. A line is
written in three steps, each made durable before the next: the head announces it in full, it is
appended, the head counts it. After a crash the next writer appends what an announced line lacks.

What is promised: an edited, moved, inserted or deleted line, a cut tail and a missing head are
found, and never taken for a crash: all that a crash can leave is the last line missing, or a part
of it, while the head still holds it whole. With FORGELM_AUDIT_SECRET lines and head carry an HMAC,
so that whoever may write the folder can't make a new chain. What isn't: that nobody put back older
copies of both files; keep the head that `forgelm verify-audit` prints elsewhere for that.

A log found broken is gone on with, after a line `audit.chain_broken` that says what was found and
keeps the old head; so nothing more is lost, and the log never counts as whole again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from forgelm.log import log
from forgelm.redact import redact
from forgelm.run.files import flush_folder, write_json

LOG = "audit_log.jsonl"
HEAD = "audit_log.head.json"
BROKEN = "audit.chain_broken"

_GENESIS = "genesis"
_ENVELOPE = ("timestamp", "run_id", "operator", "event", "prev_hash")
_PATIENCE_S = 10.0
_FEW = 10


@dataclass(frozen=True)
class Problem:
    """`line` counts from 1; None where no single line is wrong."""

    line: int | None
    problem: str

    def __str__(self) -> str:
        return self.problem if self.line is None else f"line {self.line}: {self.problem}"


@dataclass(frozen=True)
class Chain:
    """What a log holds.

    Attributes:
        lines: how many there are, one that a crash cut off included, as the head has all of it.
        head: SHA-256 of the last one.
        problems: what shows that it was changed.
        unchecked: whether a line has an HMAC, and there is no secret to check it by.
        ends: the bytes that complete it after a crash.
    """

    lines: int
    head: str
    problems: list[Problem]
    unchecked: bool = False
    ends: bytes = b""


@dataclass
class AuditLog:
    """Writes events; never raises, and warns once where it can't."""

    folder: Path
    operator: str | None
    run_id: str = field(default_factory=lambda: f"fg-{uuid4().hex[:12]}")
    _warned: bool = False

    @classmethod
    def open(cls, folder: Path) -> AuditLog:
        """The log in `folder`, which is made by the first event; none without FORGELM_OPERATOR."""
        operator = os.environ.get("FORGELM_OPERATOR") or None
        if operator is None:
            log.debug("FORGELM_OPERATOR isn't set: no audit log is written")
        return cls(folder, operator)

    def write(self, event: str, /, **payload: Any) -> None:
        """Append an event; tokens in the payload are blotted out."""
        if self.operator is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _opened(self.folder / LOG, "ab+") as file, _locked(file):
                self._append(file, event, payload)
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            self._warn(f"can't be written ({reason}): this command isn't recorded in it")

    def _append(self, file: IO[bytes], event: str, payload: dict[str, Any]) -> None:
        head = _read_head(self.folder)
        chain = _check(_content(file), head)
        if chain.problems:
            self._warn(
                f"its chain is broken ({chain.problems[0]}); see forgelm verify-audit. "
                "It is gone on with; to begin anew, move both of its files elsewhere"
            )
        if chain.ends:
            _write(file, chain.ends)
        lines, last = chain.lines, chain.head
        if found := _unmarked(chain):
            made = self._line(BROKEN, last, {"problems": found, "head": head})
            lines, last = self._put(file, lines, last, made)
        self._put(file, lines, last, self._line(event, last, payload))

    def _put(self, file: IO[bytes], lines: int, last: str, line: str) -> tuple[int, str]:
        """Announce, append, count; returns the new number of lines and head."""
        _pin(self.folder, lines, last, line)
        _write(file, line.encode() + b"\n")
        last = _hash(line.encode())
        _pin(self.folder, lines + 1, last, None)
        return lines + 1, last

    def _line(self, event: str, last: str, payload: dict[str, Any]) -> str:
        envelope = {
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run_id": self.run_id,
            "operator": self.operator,
            "event": event,
            "prev_hash": last,
        }
        # The envelope stands first, and no payload replaces it.
        return json.dumps(_signed(_clean({**envelope, **payload, **envelope})))

    def _warn(self, text: str) -> None:
        if not self._warned:
            log.warning(f"audit log {self.folder / LOG}: {redact(text)}")
        self._warned = True


def check(folder: Path) -> Chain | None:
    """What the log in a folder holds, and what is wrong with it; None where there is none.

    Raises:
        OSError: it can't be read.
    """
    path = folder / LOG
    if not path.exists():
        if _read_head(folder) is None:
            return None
        return Chain(0, _GENESIS, [Problem(None, f"{HEAD} is there, and {LOG} is gone")])
    with _opened(path, "rb") as file, _locked(file, fcntl.LOCK_SH):
        data, head = _content(file), _read_head(folder)
    return None if not data and head is None else _check(data, head)


def _check(data: bytes, head: dict[str, Any] | None) -> Chain:
    *lines, tail = data.split(b"\n")
    problems: list[Problem] = []
    before, unchecked = _GENESIS, False
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is None:
            problems.append(Problem(number, "isn't a line of an audit log"))
        else:
            unchecked = unchecked or ("_hmac" in entry and not _secret())
            problems += [Problem(number, text) for text in _wrong(entry, number, before)]
        before = _hash(line)
    if head is None and not data:
        return Chain(0, _GENESIS, [])
    ends, found = _against_head(lines, tail, before, head)
    if ends is None:
        # What follows a torn line begins a new one.
        ends = b"\n" if tail else b""
    if tail + ends:
        lines, before = [*lines, tail + ends[:-1]], _hash(tail + ends[:-1])
    return Chain(len(lines), before, [*problems, *found], unchecked, ends)


def _unmarked(chain: Chain) -> list[dict[str, Any]]:
    """The first problems that no line of the log says yet."""
    marks = [item.line or 0 for item in chain.problems if item.problem.startswith(BROKEN)]
    said = max(marks, default=0)
    new = [item for item in chain.problems if item.line is None or item.line > said]
    return [vars(item) for item in new[:_FEW]]


def _wrong(entry: dict[str, Any], number: int, before: str) -> Iterator[str]:
    if entry["prev_hash"] != before and number == 1:
        yield f"its prev_hash isn't {_GENESIS!r}: lines before it were deleted"
    elif entry["prev_hash"] != before:
        yield (
            f"its prev_hash isn't the hash of line {number - 1}: that one was changed, or lines "
            "were moved, put in or deleted between them"
        )
    if (reason := _unsigned(entry)) is not None:
        yield reason
    if entry["event"] == BROKEN:
        yield f"{BROKEN}: the log was found broken at {entry['timestamp']}, and gone on with"


def _against_head(
    lines: list[bytes], tail: bytes, last: str, head: dict[str, Any] | None
) -> tuple[bytes | None, list[Problem]]:
    """What completes the log after a crash (None: nothing can), and what its head shows."""
    if head is None:
        return None, [Problem(None, f"{HEAD} is missing: whether lines were cut off isn't known")]
    try:
        pinned, known, coming = int(head["lines"]), head["head"], head["next"]
        announced = None if coming is None else coming.encode() + b"\n"
    except (KeyError, TypeError, ValueError, AttributeError):
        return None, [Problem(None, f"{HEAD} is damaged")]
    if (reason := _unsigned(head)) is not None:
        return None, [Problem(None, f"{HEAD}: {reason}")]
    here = len(lines)
    if announced is not None and (here, last) == (pinned, known) and announced.startswith(tail):
        return announced[len(tail) :], []
    if announced is not None and here == pinned + 1 and lines[-1] + b"\n" == announced:
        pinned, known = here, last
    if here < pinned:
        return None, [
            Problem(
                here + 1, f"the head counts {pinned} lines: {pinned - here} at the end are gone"
            )
        ]
    if here > pinned:
        more = here - pinned
        return None, [
            Problem(pinned + 1, f"the head counts {pinned} lines: {more} at the end were added")
        ]
    if last != known:
        return None, [Problem(here, "isn't the last line that the head names: it was changed")]
    if tail:
        return None, [Problem(here + 1, "is cut off, and the head doesn't know it")]
    return b"", []


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    right = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in _ENVELOPE)
    return entry if right else None


def _opened(path: Path, mode: str) -> IO[bytes]:
    """A regular file, opened; raises OSError for any other."""

    def without_waiting(name: str, flags: int) -> int:
        # Else a FIFO that nobody else has open is waited for.
        return os.open(name, flags | os.O_NONBLOCK, 0o666)

    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    file: IO[bytes] = open(path, mode, opener=without_waiting)  # noqa: SIM115
    return file


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _pin(folder: Path, lines: int, head: str, coming: str | None) -> None:
    write_json(folder / HEAD, _signed({"lines": lines, "head": head, "next": coming}))
    if coming is not None:
        # Before the log changes: else a power cut may leave the new line beside the old head.
        flush_folder(folder)


def _read_head(folder: Path) -> dict[str, Any] | None:
    """The head file; empty where it is damaged, None where it isn't there."""
    try:
        with _opened(folder / HEAD, "rb") as file:
            found = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _secret() -> bytes:
    return os.environ.get("FORGELM_AUDIT_SECRET", "").encode()


def _hmac(entry: dict[str, Any]) -> str:
    plain = json.dumps({key: value for key, value in entry.items() if key != "_hmac"})
    return hmac.new(_secret(), plain.encode(), hashlib.sha256).hexdigest()


def _signed(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "_hmac": _hmac(entry)} if _secret() else entry


def _unsigned(entry: dict[str, Any]) -> str | None:
    """What is wrong with an HMAC, where there is a secret to check it by."""
    if not _secret():
        return None
    if "_hmac" not in entry:
        return "has no _hmac, and FORGELM_AUDIT_SECRET is set: it wasn't written with the secret"
    if not hmac.compare_digest(str(entry["_hmac"]), _hmac(entry)):
        return "its _hmac is wrong: it was changed, or written with another secret"
    return None


def _clean(value: Any) -> Any:
    """As JSON has it, without tokens."""
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_clean(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value))


@contextmanager
def _locked(file: IO[bytes], how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a log; raises OSError when another process keeps it for long."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "another process holds it") from None
            time.sleep(0.02)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
