"""What other packages add, by entry points: tasks, modes, rewards, metrics, config folders.

`forgelm.tasks`: an object with `SPLITS`, `rows(split)` and, if needed, `features()`; its name goes
into `task.embedded`. `forgelm.metrics`: `function(predictions, references) -> float`.
`forgelm.rewards`: `function(completions, references) -> list[float]`. `forgelm.modes`: a dataclass
of the mode's keys whose `trainer` names what builds it. `forgelm.conf`: a package whose folder is
searched for config groups.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from forgelm.errors import ConfigError

TASKS = "forgelm.tasks"
MODES = "forgelm.modes"
REWARDS = "forgelm.rewards"
METRICS = "forgelm.metrics"
CONF = "forgelm.conf"


def names(group: str) -> list[str]:
    """The names that installed packages add to a group; nothing is imported."""
    return sorted(_points(group))


def load(group: str, name: str) -> Any:
    """What stands behind a name.

    Raises:
        ConfigError: its package can't be imported.
    """
    point = _points(group)[name]
    try:
        return point.load()
    except Exception as error:
        package = point.dist.name if point.dist else point.value
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{name}, which {package} adds to {group} ({point.value}), can't be loaded: "
            f"{type(error).__name__}: {said}; mend or remove that package"
        ) from error


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
