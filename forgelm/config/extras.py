"""What only some requests need, installed as extras of the package: found without importing it."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec


def lacking(extra: str, module: str, wanted: str) -> str | None:
    """What to say where `wanted` (a key and its value) needs a module that isn't installed."""
    with suppress(ModuleNotFoundError):  # a package above it isn't there either
        if find_spec(module) is not None:
            return None
    return f"{wanted} needs {module}, which isn't installed: pip install 'forgelm[{extra}]'"
