#!/usr/bin/env python
"""The entry of the first design: its flags, translated to overrides of `forgelm train`.

python scripts/forge.py --config EXPERIMENT_OR_YAML | --resume RUN
                        [--max_steps N] [--epochs N] [--run_name S] [--debug]

A YAML file with a top-level section `rl` is a run of mode rl, and the section holds its keys.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from hydra.core.config_store import ConfigStore

from forgelm.cli.arguments import Parser
from forgelm.cli.main import complain
from forgelm.cli.main import main as forgelm
from forgelm.config.compose import CONFIG_NAME, conf_dir
from forgelm.errors import ConfigError, ForgeError

_MODE_RL = {"override /mode": "rl"}
_READ_OTHERWISE = ("true", "false", "null", "nan", "inf")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="forge.py", description="Start or resume a run.", allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="an experiment's name, or the path of a YAML file")
    which.add_argument("--resume", metavar="RUN", help="a run directory, a run id, or its name")
    parser.add_argument("--max_steps", help="optimizer steps; overrides epochs")
    parser.add_argument("--epochs", help="passes over the training rows")
    parser.add_argument("--run_name", help="last folder of the run directory")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(list(argv))


def translated(given: argparse.Namespace) -> list[str]:
    """The same request as `forgelm train` takes it."""
    words = ["train"]
    if given.resume is not None:
        words.append(f"resume={quoted(given.resume)}")
    elif given.config.endswith((".yaml", ".yml")):
        words += from_file(Path(given.config).resolve())
    else:
        words.append(f"experiment={given.config}")
    for key in ("max_steps", "epochs"):
        if getattr(given, key) is not None:
            words.append(f"{key}={getattr(given, key)}")
    if given.run_name is not None:
        words.append(f"run_name={quoted(given.run_name)}")
    return [*words, "debug=true"] if given.debug else words


def from_file(path: Path) -> list[str]:
    """The flags that compose a YAML file: a shipped experiment, a whole config of its own
    (`config` stands in its defaults list), or values laid over the default config.

    Raises:
        ConfigError: there is no such file, or it isn't YAML.
    """
    if not path.is_file():
        raise ConfigError(
            f"--config {path}: no such file; give an experiment's name or a YAML file"
        )
    shipped = conf_dir() / "experiment"
    if path.is_relative_to(shipped):
        return [f"experiment={path.relative_to(shipped).with_suffix('')}"]
    if path.parent == conf_dir() and path.stem == CONFIG_NAME:
        return []
    if path.suffix != ".yaml" or path.stem == CONFIG_NAME:
        raise ConfigError(
            f"--config {path}: Hydra reads NAME.yaml, and config.yaml is taken; rename it"
        )
    name, on_config, in_rl = path.stem, builds_on_config(path), chooses_rl(path)
    if in_rl:
        name = stored_with_mode(path, last=on_config)
    if not on_config:
        over: list[Any] = [CONFIG_NAME, f"{name}@_global_"]
        name = stored("_file", {"defaults": [*over, *([_MODE_RL] if in_rl else [])]})
    return ["--config-dir", str(path.parent), "--config-name", name]


def builds_on_config(path: Path) -> bool:
    """Whether `config` stands in the defaults list of the file or of one it inherits from."""
    names, beside = inherited(path, content(path))
    return CONFIG_NAME in names or any(map(builds_on_config, beside.values()))


def chooses_rl(path: Path) -> bool:
    """Whether the file, or one it inherits from, has a top-level section `rl`."""
    return "rl" in content(path) or any(map(chooses_rl, inherited(path, content(path))[1].values()))


def stored_with_mode(path: Path, last: bool) -> str:
    """Give Hydra a file with its section `rl`, and those it inherits, as the keys of mode rl.

    Returns the name it is stored under. `last`: nothing else chooses the mode.
    """
    values = content(path)
    beside = inherited(path, values)[1]
    defaults = [
        stored_with_mode(beside[name], last=False)
        if isinstance(name, str) and name in beside
        else name
        for name in values.pop("defaults", [])
    ]
    if defaults and "_self_" not in defaults:
        defaults.append("_self_")
    if "rl" in values:
        values["mode"] = {**(values.get("mode") or {}), **(values.pop("rl") or {})}
    if last:
        defaults.append(_MODE_RL)
    return stored(f"_{path.stem}", {"defaults": defaults, **values} if defaults else values)


def stored(name: str, node: dict[str, Any]) -> str:
    ConfigStore.instance().store(name, node)
    return name


def content(path: Path) -> dict[str, Any]:
    """What a YAML file says.

    Raises:
        ConfigError: it isn't a YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(values, dict) or not isinstance(values.get("defaults", []), list):
            raise ValueError("it must hold keys and values, and defaults a list")
    except (yaml.YAMLError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"--config {path}: not a YAML mapping: {text}") from error
    return values


def inherited(path: Path, values: dict[str, Any]) -> tuple[list[str], dict[str, Path]]:
    """The names in the defaults list, and those of them that are files beside this one."""
    names = [name for name in values.get("defaults", []) if isinstance(name, str)]
    files = {name: path.parent / f"{name.removeprefix('/')}.yaml" for name in names}
    beside = {k: file for k, file in files.items() if file.is_file() and file != path}
    return [name.removeprefix("/") for name in names], beside


def quoted(text: str) -> str:
    """A value as Hydra reads it unchanged."""
    if re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in _READ_OTHERWISE:
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


if __name__ == "__main__":
    try:
        request = translated(arguments(sys.argv[1:]))
    except ForgeError as error:
        sys.exit(complain(error))
    sys.argv = [sys.argv[0], *request[1:]]
    sys.exit(forgelm(request))
