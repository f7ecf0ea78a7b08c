"""Caches that can't be read: another user filled them, or a link leads nowhere."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from forgelm.errors import ConfigError


@dataclass(frozen=True)
class Barred:
    """A folder that can't be read, and what to do about it."""

    problem: str
    remedy: str


def barred(cache: Path) -> Barred | None:
    """The first folder on the way to a cache, or right in it, that this user can't read."""
    for folder in (*reversed(cache.parents), cache):
        needed = os.X_OK | (os.R_OK if folder == cache else 0)
        if not os.access(folder, os.F_OK):
            if not folder.is_symlink():
                return None
            return Barred(f"{folder}: a link that leads nowhere", "name the cache with HF_HOME")
        if folder.is_dir() and not os.access(folder, needed):
            return _of(folder)
    inside = sorted(cache.iterdir()) if cache.is_dir() else []
    shut = [one for one in inside if one.is_dir() and not os.access(one, os.R_OK | os.X_OK)]
    return next((_of(one) for one in shut if not one.name.startswith(".")), None)


def require_readable(caches: Iterable[Path]) -> None:
    """Refuse caches that can't be read.

    Raises:
        ConfigError: which, whose they are, and what to do.
    """
    found = [one for cache in caches if (one := barred(cache)) is not None]
    if found:
        lines = dict.fromkeys(f"{one.problem}; {one.remedy}" for one in found)
        raise ConfigError(list(lines))


def _of(folder: Path) -> Barred:
    owner = _name(folder.stat().st_uid)
    return Barred(
        f"{folder}: belongs to {owner}, and {_name(os.geteuid())} can't read it",
        f"{owner} lets others read by chmod -R a+rX {shlex.quote(str(folder))}, and by umask 022 "
        "before filling it; or name another cache with HF_HOME",
    )


def _name(user: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
