"""Which cache a command fills."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from forgelm import network
from forgelm.errors import ConfigError
from forgelm.hubcache import OFFLINE, is_on
from forgelm.log import log


def chosen_cache(output: Path | None, usual: Path) -> Path:
    """The cache asked for by --output, else the environment's."""
    return usual if output is None else output.expanduser().absolute()


def warn_of(output: Path, named: Mapping[str, str], usual: Mapping[str, str]) -> None:
    """Say so where the caches that --output stands for aren't those that the environment names.

    Both by their variables; all of them are to be set then.
    """
    for name, path in named.items():
        if Path(path).resolve() != Path(usual[name]).resolve():
            log.warning(
                f"--output {output} isn't the cache that training and forgelm doctor --offline "
                f"read, {usual[name]}: export {as_typed(named)} where they run, or leave --output "
                "out"
            )
            return


def as_typed(variables: Mapping[str, str]) -> str:
    """Variables as a shell sets them."""
    return " ".join(f"{name}={shlex.quote(path)}" for name, path in variables.items())


def carried(
    cache_dir: Path | None, datasets_cache: Path | None, home: Path | None = None
) -> dict[str, Path]:
    """Where what a bundle carries lies here: what is given, else below `home`, else as usual."""
    from forgelm.airgap.verify import DATASETS, HUB, default_places, places_in

    given = {HUB: cache_dir, DATASETS: datasets_cache}
    usual = default_places() if home is None else places_in(home)
    chosen = {name: path.expanduser().absolute() for name, path in given.items() if path}
    return {**usual, **chosen}


def require_hub(command: str) -> None:
    """Refuse to fetch where the hub's clients are told to stay offline, or can't work at all."""
    for name in OFFLINE:
        if is_on(name):
            raise ConfigError(
                f"{name}={os.environ[name]}: {command} fetches from the hub; unset it here"
            )
    if (mistake := network.mistake()) is not None:
        raise ConfigError(mistake)
