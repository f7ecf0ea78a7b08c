"""Files that are whole at every moment: written beside, flushed, then renamed into place."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forgelm.errors import RunError

HALF_WRITTEN = ".part"


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=HALF_WRITTEN)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        readable(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write into: it takes the place of `folder` when all is there, else it goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=HALF_WRITTEN)
    beside, before = Path(made), Path(made + HALF_WRITTEN)
    try:
        yield beside
        for path in [beside, *beside.rglob("*")]:
            if path.is_dir():
                path.chmod(0o777 & ~_UMASK)
            else:
                readable(path)
                flush(path)
        if folder.exists():
            os.rename(folder, before)
        os.rename(beside, folder)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def flush(path: Path) -> None:
    """Make a file's content durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some network file systems have no fsync for folders; their renames are durable as such.
        pass
    finally:
        os.close(handle)


def keep_lines(path: Path, count: int) -> int:
    """Cut a file to its first `count` lines, made if it isn't there; returns how many it has."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = lines[:count]
    if kept != lines or not path.is_file():
        write_text(path, "".join(kept))
    return len(kept)


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by `data` as indented JSON. NaN is refused: it isn't JSON."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises RunError, naming the file, when it isn't one, or isn't."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: missing; restore it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: damaged, not JSON any more: {error}; restore it") from error


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Read once, while there is one thread: asking for the umask means changing it.
_UMASK = _read_umask()


def readable(path: Path) -> None:
    """Give a file the rights that the user's umask allows; some libraries write for the owner."""
    path.chmod(0o666 & ~_UMASK)
