#!/usr/bin/env python
"""The entry of the first design: its flags, translated to overrides of `forgelm train`.

python scripts/forge.py --config EXPERIMENT_OR_YAML | --resume RUN
                        [--max_steps N] [--epochs N] [--run_name S] [--debug]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from hydra.core.config_store import ConfigStore

from forgelm.cli.arguments import Parser
from forgelm.cli.main import complain
from forgelm.cli.main import main as forgelm
from forgelm.config.compose import conf_dir
from forgelm.errors import ConfigError, ForgeError


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
    for key in ("max_steps", "epochs", "run_name"):
        if getattr(given, key) is not None:
            words.append(f"{key}={quoted(getattr(given, key))}")
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
    try:
        defaults = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not a YAML mapping: {str(error)[:200]}") from error
    name = path.stem
    if "config" not in defaults:
        over = {"defaults": ["config", f"{name}@_global_"]}
        ConfigStore.instance().store("_file", over)
        name = "_file"
    return ["--config-dir", str(path.parent), "--config-name", name]


def quoted(text: str) -> str:
    """A value as Hydra reads it unchanged."""
    plain = text.replace("_", "").replace("-", "").replace(".", "").replace("/", "").isalnum()
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return text if plain else f"'{escaped}'"


if __name__ == "__main__":
    try:
        request = translated(arguments(sys.argv[1:]))
    except ForgeError as error:
        sys.exit(complain(error))
    sys.argv = [sys.argv[0], *request[1:]]
    sys.exit(forgelm(request))
