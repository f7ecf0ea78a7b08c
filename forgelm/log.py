"""What is said: to the person watching, and to the run's own log file."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from forgelm.redact import redact

log = logging.getLogger("forgelm")

_LIBRARIES = ("transformers", "datasets", "huggingface_hub")
# What forgelm says itself, by row or once; the run's own log keeps these.
_SAID_BETTER = (
    "All reward functions returned None",
    "Failed to read file '",
    "Failed to read schema from '",
    "Token indices sequence length is longer",
)
_CLEAR_LINE = "\r\x1b[K"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class _Console(logging.StreamHandler[IO[str]]):
    """Plain lines for forgelm's own words, warnings alone from libraries.

    On a terminal a record with `live` overwrites the one before it.
    """

    def __init__(self, stream: IO[str], debug: bool) -> None:
        super().__init__(stream)
        self.debug = debug
        self.live = stream.isatty()
        self.pending = False

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name.startswith(log.name)
        if ours or self.debug:
            return True
        if record.levelno < logging.WARNING:
            return False
        text = record.getMessage()
        return not any(known in text for known in _SAID_BETTER)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            before = _CLEAR_LINE if self.pending else ""
            self.pending = self.live and getattr(record, "live", False)
            self.stream.write(before + text + ("" if self.pending else "\n"))
            self.flush()
        except BrokenPipeError:
            pass


class _Plain(logging.Formatter):
    """Without the colours that libraries put into their messages, and without tokens."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(_COLOUR.sub("", super().format(record)))


def say(text: str, *, live: bool = False) -> None:
    """Say a text, line by line; `live` lines replace each other on a terminal."""
    for line in text.splitlines() or [""]:
        log.info(line, extra={"live": live})


def set_up(debug: bool = False, stream: IO[str] | None = None) -> None:
    """Send everything through one logger tree; nothing is said twice, whoever calls this again."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Console)]:
        root.removeHandler(handler)
    root.addHandler(_Console(stream or sys.stdout, debug))
    root.setLevel(logging.INFO)
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.captureWarnings(True)


def quiet_libraries() -> None:
    """Route the libraries' own handlers and bars through ours; imports them."""
    import datasets
    import transformers

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.enable_propagation()
    datasets.disable_progress_bars()
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            library.removeHandler(handler)
        library.propagate = True


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Append everything said, warnings and library messages included, to `path`."""
    handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    handler.setFormatter(_Plain("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
