"""Hydra's part: where the shipped configs lie, which schema types them, composing one run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime, setup_globals
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from forgelm import plugins
from forgelm.config.modes import modes
from forgelm.config.schema import RunConfig

CONFIG_NAME = "config"
VERSION_BASE = "1.3"


def conf_dir() -> Path:
    """The shipped configs: a checkout's `conf/`, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"


@cache
def register_schema() -> None:
    """Make the dataclasses known to Hydra, under names that no group offers as a choice, and the
    folders of configs that other packages add."""
    Plugins.instance().register(_Folders)
    store = ConfigStore.instance()
    store.store("_run", RunConfig)
    for name, node in modes().items():
        store.store(f"_mode_{name}", node)


class _Folders(SearchPathPlugin):
    """Adds the folders after forgelm's own, in every way in which Hydra composes."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package, folder in plugins.folders().items():
            search_path.append(package, f"file://{folder}")


@dataclass(frozen=True)
class Request:
    """What was typed: overrides as Hydra reads them, and where configs are looked for.

    `config_dir` is searched after `config_path` (None: the shipped configs) and other packages'.
    """

    overrides: tuple[str, ...] = ()
    config_name: str = CONFIG_NAME
    config_path: Path | None = None
    config_dir: Path | None = None
    multirun: bool = False

    def flags(self) -> list[str]:
        """Hydra's flags that say which configs these are."""
        said = {
            "--config-path": self.config_path,
            "--config-dir": self.config_dir,
            "--config-name": None if self.config_name == CONFIG_NAME else self.config_name,
        }
        return [word for flag, to in said.items() if to is not None for word in (flag, str(to))]

    def folders(self) -> list[Path]:
        """Where groups are looked up, in Hydra's order."""
        others = plugins.folders().values()
        found = [self.config_path or conf_dir(), *others, self.config_dir]
        return [folder for folder in found if folder is not None]

    def loader(self) -> ConfigLoaderImpl:
        """Hydra's loader over these folders: its public compose knows no --config-dir."""
        register_schema()
        version.setbase(VERSION_BASE)
        setup_globals()
        JobRuntime.instance().set("name", "forgelm")
        search_path = create_config_search_path(str(self.folders()[0].resolve()))
        if self.config_dir is not None:
            schema = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{self.config_dir.resolve()}", schema)
        return ConfigLoaderImpl(config_search_path=search_path)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose one run's config, as `forgelm train` does; raises what Hydra raises.

        A file that isn't YAML is one of Hydra's errors too.
        """
        try:
            return self.loader().load_configuration(self.config_name, list(overrides), RunMode.RUN)
        except yaml.YAMLError as error:
            raise ConfigCompositionException(f"not YAML: {' '.join(str(error).split())}") from error


class Composer:
    """Composes the points of one request: Hydra reads its files once for each choice of groups.

    Points of a sweep mostly differ in values, which Hydra applies last, to what it composed.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._parser = OverridesParser.create()
        self._repository = request.loader().repository
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """As `Request.compose`, its errors included."""
        try:
            parsed = self._parser.parse_overrides(list(overrides))
            values = [item for item in parsed if self._is_plain(item)]
            key = tuple(str(item.input_line) for item in parsed if item not in values)
            if key not in self._bases:
                self._bases[key] = self.request.compose(key)
            config = copy.deepcopy(self._bases[key])
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
            _note_overrides(config, [item for item in parsed if not item.is_hydra_override()])
        except (HydraException, OmegaConfBaseException):
            # Hydra's words for it are those of the whole.
            return self.request.compose(overrides)
        return config

    def _is_plain(self, item: Override) -> bool:
        """Whether it sets a value, and nothing is composed differently for it."""
        set_only = not (item.is_add() or item.is_force_add() or item.is_delete())
        own = not item.is_hydra_override() and item.package is None
        return (
            set_only
            and own
            and not item.is_sweep_override()
            and not self._repository.group_exists(item.key_or_group)
        )


def _note_overrides(config: DictConfig, own: list[Override]) -> None:
    """What Hydra notes of the overrides that aren't its own."""
    job = config.hydra.job
    config.hydra.overrides.task = [item.input_line for item in own]
    job.override_dirname = get_overrides_dirname(
        overrides=own,
        kv_sep=job.config.override_dirname.kv_sep,
        item_sep=job.config.override_dirname.item_sep,
        exclude_keys=job.config.override_dirname.exclude_keys,
    )


def to_typed(config: DictConfig) -> RunConfig:
    """The composed config as dataclasses; raises omegaconf's errors on a wrong value.

    A value still missing is the string `???`. A mode that a user's own file made without the
    shipped schema is typed by its name.
    """
    config = copy.deepcopy(config)
    with open_dict(config):
        config.pop("hydra", None)
        mode = config.mode
        if OmegaConf.get_type(mode) is dict and mode.get("name") in modes():
            config.mode = OmegaConf.merge(modes()[mode.name], mode)
    return cast(RunConfig, OmegaConf.to_object(config))
