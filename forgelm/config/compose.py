"""Hydra's part: where the shipped configs lie, which schema types them, composing one run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from forgelm.config.schema import MODES, RunConfig

CONFIG_NAME = "config"
VERSION_BASE = "1.3"


def conf_dir() -> Path:
    """The shipped configs: a checkout's `conf/`, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"


def register_schema() -> None:
    """Make the dataclasses known to Hydra, under names that no group offers as a choice."""
    store = ConfigStore.instance()
    store.store("_run", RunConfig)
    for name, node in MODES.items():
        store.store(f"_mode_{name}", node)


def compose_run(
    overrides: Sequence[str],
    config_name: str = CONFIG_NAME,
    main_dir: Path | None = None,
    extra_dir: Path | None = None,
) -> DictConfig:
    """Compose one run's config, as `forgelm train` does; raises what Hydra raises.

    `extra_dir` is searched after `main_dir` (default: the shipped configs), as `--config-dir` is.
    """
    register_schema()
    added = [] if extra_dir is None else [f"hydra.searchpath=['file://{extra_dir.resolve()}']"]
    main = str((main_dir or conf_dir()).resolve())
    with initialize_config_dir(main, version_base=VERSION_BASE):
        return compose(config_name, overrides=[*overrides, *added])


def to_typed(config: DictConfig) -> RunConfig:
    """The composed config as dataclasses; raises omegaconf's errors on a wrong value.

    A value still missing is the string `???`. A mode that a user's own file made without the
    shipped schema is typed by its name.
    """
    config = copy.deepcopy(config)
    with open_dict(config):
        config.pop("hydra", None)
        mode = config.mode
        if OmegaConf.get_type(mode) is dict and mode.get("name") in MODES:
            config.mode = OmegaConf.merge(MODES[mode.name], mode)
    return cast(RunConfig, OmegaConf.to_object(config))
