"""Modes: each module builds the trainer of one. Heavy: imported when needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from forgelm import plugins

_BUILDERS = {
    "sft": "forgelm.modes.sft:build",
    "kd": "forgelm.modes.kd:build",
    "rl": "forgelm.modes.rl:build",
}


def builder(mode: Any) -> Callable[..., Any]:
    """What builds a mode's trainer: `build(config, task, teacher, parts) -> Exact`.

    `parts` are the trainer's arguments that don't depend on the mode. Another package's mode names
    its builder as `module:function` in its class variable `trainer`.

    Raises:
        ConfigError: another package's builder can't be loaded.
    """
    if mode.name in _BUILDERS:
        return _function(_BUILDERS[mode.name])
    with plugins.blamed(plugins.MODES, mode.name, mode.trainer):
        return _function(mode.trainer)


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found
