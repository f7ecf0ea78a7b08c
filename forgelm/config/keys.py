"""The names of all config keys, what each takes, and the nearest to a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, EnumNode, OmegaConf

from forgelm.config.modes import modes
from forgelm.config.schema import RunConfig

_KNOWN_AS = {
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "steps": "max_steps",
    "output_dir": "output_root",
    "max_seq_length": "task.max_length",
    "gradient_checkpointing": "training.activation_checkpointing",
    "warmup_ratio": "training.warmup_steps",
    "optimizer": "training.optim",
    "gamma": "mode.alpha",
}


def expected(config: DictConfig, key: str) -> str:
    """What a key takes, in words: `one of a, b`, `a number`, `true or false`."""
    if key not in all_keys(config):
        return ""
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, parent_key) if parent_key else config
    node = parent._get_node(name) if isinstance(parent, DictConfig) else None
    if node is None:
        return ""
    words = ""
    if isinstance(node, EnumNode):
        words = "one of " + ", ".join(node.enum_type.__members__)
    elif OmegaConf.is_list(node) or "List" in str(node._metadata.ref_type):
        words = f"a list, as in {key}=[a,b]"
        element = getattr(node._metadata, "element_type", None)
        if isinstance(element, type) and hasattr(element, "__members__"):
            words += f", of {', '.join(element.__members__)}"
    else:
        kind = node._metadata.ref_type
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
            kind, ""
        )
    return f"{words} or null" if words and node._metadata.optional else words


def schema_tree() -> DictConfig:
    """All keys there are, whatever the mode."""
    tree = OmegaConf.structured(RunConfig)
    tree.mode = OmegaConf.merge(*(dict(vars(node())) for node in modes().values()))
    assert isinstance(tree, DictConfig)
    return tree


def all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a config, sections included, Hydra's own left out."""
    keys: list[str] = []
    for name in config:
        if not prefix and name == "hydra":
            continue
        key = f"{prefix}{name!s}"
        keys.append(key)
        node: Any = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys += all_keys(node, f"{key}.")
    return keys


def nearest(key: str, keys: Sequence[str]) -> str:
    """`; did you mean X?`, by the usual other names, the last part, then by spelling."""
    last = key.rpartition(".")[2]
    if "." in key:
        sections = {name.rpartition(".")[0] for name in keys}
        keys = [name for name in keys if name not in sections]
    same_last = [name for name in keys if name.rpartition(".")[2] == last]
    known = _KNOWN_AS.get(last)
    near = same_last[0] if same_last and (known is None or "." in key) else known
    if near not in keys:
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
        if not close:
            lasts = {name.rpartition(".")[2]: name for name in reversed(keys)}
            close = [
                lasts[n] for n in difflib.get_close_matches(last, list(lasts), n=1, cutoff=0.7)
            ]
        if not close:
            return ""
        near = close[0]
    return f"; did you mean {near}?"


def no_launcher_key(name: str, keys: Sequence[str]) -> str:
    """What to say of a wrong key of hydra.launcher."""
    near = difflib.get_close_matches(name, keys, n=1)
    hint = f"; did you mean hydra.launcher.{near[0]}?" if near else ""
    return (
        f"no such key{hint}; other options of sbatch are given as "
        f"+hydra.launcher.additional_parameters.{name}=VALUE"
    )
