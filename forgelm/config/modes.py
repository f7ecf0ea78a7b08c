"""The modes there are: forgelm's own, and those of other packages."""

from __future__ import annotations

from functools import cache

from forgelm import plugins
from forgelm.config.schema import MODES


@cache
def modes() -> dict[str, type]:
    """Each mode's dataclass by its name.

    Raises:
        ConfigError: another package's mode can't be loaded.
    """
    others = {name: plugins.load(plugins.MODES, name) for name in plugins.names(plugins.MODES)}
    return {**others, **MODES}
