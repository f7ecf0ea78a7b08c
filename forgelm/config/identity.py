"""Which values make a run the run it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from forgelm.config.schema import RunConfig

HASH_LENGTH = 10


def deciding(node: Any) -> dict[str, Any]:
    """The values below a dataclass that decide the result, as plain data."""
    return {
        item.name: _plain(getattr(node, item.name))
        for item in fields(node)
        if item.metadata.get("decides", True)
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return deciding(value)
    return value.name if isinstance(value, Enum) else _plain_list(value)


def _plain_list(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list) else value


def config_hash(config: RunConfig) -> str:
    """Short hash of what decides the result: the same command names the same run."""
    canonical = json.dumps(deciding(config), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:HASH_LENGTH]


def differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """`key: theirs -> ours` for each deciding value that differs."""
    left, right = _flat(deciding(theirs)), _flat(deciding(ours))
    return [
        f"{key}: {left.get(key)} -> {right.get(key)}"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
