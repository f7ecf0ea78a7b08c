"""What other packages add, by entry points: tasks, modes, rewards, metrics, config folders.

`forgelm.tasks`: an object with `SPLITS`, `rows(split)` and, if needed, `features()`; its name goes
into `task.embedded`. `forgelm.metrics`: `function(predictions, references) -> float`.
`forgelm.rewards`: `function(completions, references) -> list[float]`. `forgelm.modes`: a dataclass
of the mode's keys whose `trainer` names what builds it. `forgelm.conf`: a package whose folder is
searched for config groups, after forgelm's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from forgelm.errors import ConfigError

TASKS = "forgelm.tasks"
MODES = "forgelm.modes"
REWARDS = "forgelm.rewards"
METRICS = "forgelm.metrics"
CONF = "forgelm.conf"
GROUPS = (TASKS, MODES, REWARDS, METRICS, CONF)


def names(group: str) -> list[str]:
    """The names that installed packages add to a group; nothing is imported."""
    return sorted(_points(group))


def load(group: str, name: str) -> Any:
    """What stands behind a name.

    Raises:
        ConfigError: its package can't be imported.
    """
    point = _points(group)[name]
    with blamed(group, name, point.value):
        return point.load()


@contextmanager
def blamed(group: str, name: str, place: str) -> Iterator[None]:
    """One line that names the package for what is raised while `place` in it is loaded."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{name}, which {package(group, name)} adds to {group} ({place}), can't be loaded: "
            f"{type(error).__name__}: {said}; mend or remove that package"
        ) from error


def package(group: str, name: str) -> str:
    """The package that adds a name to a group."""
    point = _points(group)[name]
    return point.dist.name if point.dist else point.value


def points() -> list[EntryPoint]:
    """Everything that installed packages add."""
    return [point for group in GROUPS for point in _points(group).values()]


@cache
def folders() -> dict[str, Path]:
    """The folders of configs that installed packages add, by the package.

    Raises:
        ConfigError: a package can't be imported, or what it names isn't a folder.
    """
    found = {}
    for name in names(CONF):
        places = getattr(load(CONF, name), "__path__", None)
        if not places:
            raise ConfigError(
                f"{name}, which {package(CONF, name)} adds to {CONF}, isn't a folder: name a "
                "package, which may hold nothing but configs"
            )
        found[f"{package(CONF, name)} ({name})"] = Path(next(iter(places)))
    return found


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = points.setdefault(point.name, point)
        if other is not point:
            owners = " and ".join(p.dist.name if p.dist else p.value for p in (other, point))
            raise ConfigError(f"{owners} both add {point.name} to {group}: remove one of them")
    return points
