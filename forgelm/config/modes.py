"""The modes there are: forgelm's own, and those of other packages."""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from forgelm import plugins
from forgelm.config.schema import MODES
from forgelm.errors import ConfigError


@cache
def modes() -> dict[str, type]:
    """Each mode's dataclass by its name.

    Raises:
        ConfigError: another package's mode can't be loaded, or isn't one.
    """
    others = {name: plugins.load(plugins.MODES, name) for name in plugins.names(plugins.MODES)}
    for name, node in others.items():
        wrong = _wrong(name, node)
        if wrong is not None:
            owner = plugins.package(plugins.MODES, name)
            raise ConfigError(f"mode {name}, which {owner} adds, {wrong}; mend or remove it")
    return {**others, **MODES}


def _wrong(name: str, node: Any) -> str | None:
    if name in MODES:
        return "has the name of one of forgelm's own"
    if not (isinstance(node, type) and is_dataclass(node)):
        return "must be a dataclass"
    try:
        keys = OmegaConf.structured(node())
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return f"must have defaults and types that a config can hold: {said}"
    if keys.get("name") != name:
        return f'must begin with the key name: str = "{name}"'
    if ":" not in str(getattr(node, "trainer", "")) or "trainer" in keys:
        return 'must name what builds it: trainer: ClassVar[str] = "module:function"'
    return None
