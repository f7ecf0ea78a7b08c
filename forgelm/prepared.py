"""What `datasets` prepared of a commit of a data set: finding it, and loading it and no other.

Offline, `load_dataset` takes the configuration's folder that was changed last, whatever `revision`
says. A folder of what came from the hub is named by its commit, so it can be told.

    <datasets cache>/OWNER___NAME/CONFIG/VERSION/COMMIT/NAME-SPLIT.arrow, dataset_info.json
                                                        .forgelm.json   what forgelm made: sizes
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from forgelm.errors import ForgeError
from forgelm.hubcache import datasets_cache
from forgelm.run.files import read_json, write_json

if TYPE_CHECKING:
    from datasets import DatasetDict

_SEAL = ".forgelm.json"
_INFO = "dataset_info.json"
_FEW = 20
_NAMED = re.compile(r"(?:Available|available configs): (\[.*\])")


def prepared(
    dataset: str, config: str | None, commit: str, cache: Path | None = None
) -> Path | None:
    """The folder of what `datasets` prepared of a commit; None where there is none.

    Without `config` it is that of the only configuration, or of the one called `default`.
    """
    found = _configurations(dataset, commit, cache)
    if config is not None:
        return found.get(config)
    return next(iter(found.values())) if len(found) == 1 else found.get("default")


def no_configuration(
    dataset: str, config: str | None, there: Sequence[str], key: str = "task.dataset_config"
) -> str:
    """That a data set has no such configuration, but others; or has several, and none is named."""
    few = ", ".join(there[:_FEW]) + (f" and {len(there) - _FEW} more" if there[_FEW:] else "")
    if config is None:
        return f"{key} isn't set: data set {dataset} has several configurations; give one of {few}"
    near = difflib.get_close_matches(config, there, n=1)
    hint = f"; did you mean {key}={near[0]}?" if near else ""
    return f"{key}={config}: data set {dataset} has no such configuration, but {few}{hint}"


def configurations_in(error: Exception) -> list[str]:
    """The configurations that `datasets` names where it can't do with the one asked for."""
    named = _NAMED.search(str(error))
    return re.findall(r"'([^']*)'", named[1]) if named else []


def others_prepared(dataset: str, commit: str) -> str:
    """What is to be said of other configurations that were prepared of a commit, if there are."""
    there = sorted(_configurations(dataset, commit, None))
    return f" (of its configurations here: {', '.join(there)})" if there else ""


def _configurations(dataset: str, commit: str, cache: Path | None) -> dict[str, Path]:
    """The folders of a commit's configurations."""
    root = cache or datasets_cache()
    owner, _, name = dataset.rpartition("/")
    found: dict[str, Path] = {}
    for folder in root.glob(f"*/*/*/{commit}"):
        place, configuration = folder.relative_to(root).parts[:2]
        theirs, _, its = place.rpartition("___")
        # The library writes a repository's name in another case.
        same = theirs == owner and its.replace("_", "").lower() == name.replace("_", "").lower()
        if same and (folder / _INFO).is_file():
            found[configuration] = folder
    return found


def has_prepared(dataset: str, config: str | None) -> bool:
    """Whether anything was prepared of a data set's configuration, of whatever commit."""
    commits = {folder.name for folder in datasets_cache().glob("*/*/*/*") if folder.is_dir()}
    return any(prepared(dataset, config, commit) is not None for commit in commits)


def load_prepared(folder: Path) -> DatasetDict:
    """The splits in a folder of `prepared`, with no network.

    Raises:
        ValueError, OSError, pyarrow.ArrowException: it isn't whole.
    """
    from datasets.packaged_modules.cache.cache import Cache

    place, config, version, commit = folder.parts[-4:]
    owner, _, name = place.rpartition("___")
    made = Cache(
        cache_dir=str(folder.parents[3]),
        repo_id=f"{owner}/{name}" if owner else None,
        dataset_name=name,
        config_name=config,
        version=version,
        hash=commit,
    )
    made.download_and_prepare()
    return made.as_dataset()


def is_intact(folder: Path) -> bool:
    """Whether a prepared folder is as it was when it was made of verified files."""
    try:
        sealed = read_json(folder / _SEAL)["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sealed.items())
    except (ForgeError, OSError, KeyError, TypeError, AttributeError):
        return False


def seal(folder: Path) -> None:
    """Note that a folder was made of verified files."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != _SEAL]
    write_json(folder / _SEAL, {"sizes": {path.name: path.stat().st_size for path in files}})
