"""Folders that a process works in, and that go with it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forgelm.errors import RunError

_PREFIX = ".forgelm-staging-"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`; it is locked, and those whose owners died are removed first."""
    for left in parent.glob(f"{_PREFIX}*"):
        handle = _lock(left)
        if handle is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        handle = _lock(folder)
        # Another process may have taken it for a dead one's before it was locked.
        if folder.is_dir():
            break
        if handle is not None:
            os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """Hold a folder; None where another process does, or where it can't be known."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError) or error.errno in _NO_LOCKS:
            return None
        raise
    return handle


def check_space(needed: dict[Path, int]) -> None:
    """Refuse what doesn't fit; folders (which exist) on one disk count together.

    Raises:
        RunError: there is less room than the bytes needed.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needed:
        disks.setdefault(folder.stat().st_dev, []).append(folder)
    for folders in disks.values():
        total, free = sum(needed[one] for one in folders), shutil.disk_usage(folders[0]).free
        if total > free:
            raise RunError(
                f"no space left for {folders[0]}: {total / 2**20:.1f} MiB are to be written, "
                f"{free / 2**20:.1f} MiB are free; make room, or choose another disk"
            )


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """A disk that fails is said in one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full:
            raise RunError(f"no space left for {where}; make room, and run it again") from error
        named = Path(os.fsdecode(error.filename2 or error.filename or where))
        if any(part.startswith(_PREFIX) for part in named.parts):
            named = where
        raise RunError(f"{named}: {error.strerror or error}; look at the rights there") from error
