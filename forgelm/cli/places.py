"""Which cache a command fills."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from forgelm.errors import ConfigError
from forgelm.hubcache import OFFLINE, is_on
from forgelm.log import log


def chosen_cache(output: str | None, usual: Path, variable: str) -> Path:
    """The cache asked for by --output, else the environment's; says so where the two differ."""
    if output is None:
        return usual
    chosen = Path(output).expanduser().absolute()
    if chosen.resolve() != usual.resolve():
        log.warning(
            f"--output {chosen} isn't the cache that training and forgelm doctor --offline read, "
            f"{usual}: export {variable}={shlex.quote(str(chosen))} where they run, or leave "
            "--output out"
        )
    return chosen


def carried(
    cache_dir: Path | None, datasets_cache: Path | None, home: Path | None = None
) -> dict[str, Path]:
    """Where what a bundle carries lies here: what is given, else below `home`, else as usual."""
    from forgelm.airgap.verify import DATASETS, HUB, default_places, places_in

    given = {HUB: cache_dir, DATASETS: datasets_cache}
    usual = default_places() if home is None else places_in(home)
    chosen = {name: path.expanduser().absolute() for name, path in given.items() if path}
    return {**usual, **chosen}


def refuse_offline(command: str) -> None:
    """What fetches from the hub can't work where the hub's clients are told to stay offline."""
    for name in OFFLINE:
        if is_on(name):
            raise ConfigError(
                f"{name}={os.environ[name]}: {command} fetches from the hub; unset it here"
            )
