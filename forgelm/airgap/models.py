"""Models asked for by name: hub ids with or without a revision, and folders here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forgelm.airgap.fetch import Landed, Missed, Progress, Wanted, fetch
from forgelm.airgap.needs import Model, base_of
from forgelm.errors import ConfigError, ForgeError, RunError
from forgelm.hub import is_local

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.pt", "*.pth")
_INDEX = "*.index.json"
_SETTINGS = ("config.json", "adapter_config.json")
_HEADER = 8


@dataclass(frozen=True)
class Asked:
    """A model as it was asked for; `wanted` is None for a folder here."""

    name: str
    wanted: Wanted | None


@dataclass(frozen=True)
class Row:
    """What became of a model; `error` where it isn't there whole."""

    name: str
    path: Path | None = None
    size_bytes: int = 0
    duration_s: float = 0.0
    error: ForgeError | None = None


def asked_for(names: Sequence[str], safety: str | None = None) -> list[Asked]:
    """The models that names stand for, a safety classifier's last; each once.

    Raises:
        ConfigError: names that are neither hub ids nor folders; all of them.
    """
    problems: list[str] = []
    found: dict[Wanted | str, Asked] = {}
    given = [("--model", name) for name in names]
    if safety is not None:
        given.append(("--safety", safety))
    for flag, name in given:
        try:
            asked = _asked(flag, name)
        except ConfigError as error:
            problems += error.problems
        else:
            found.setdefault(asked.wanted or str(Path(name).expanduser().resolve()), asked)
    if problems:
        raise ConfigError(problems)
    return list(found.values())


def _asked(flag: str, name: str) -> Asked:
    if name and is_local(name):
        return Asked(name, None)
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"{flag} {name}: no such folder")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repo_id, at, revision = name.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ConfigError(
            f"{flag} {name}: neither a folder here nor a hub id, which looks like "
            "organisation/name or organisation/name@revision"
        ) from None
    if at and not revision:
        raise ConfigError(f"{flag} {name}: name a revision after the @, or leave it out")
    return Asked(name, Wanted("model", repo_id, revision or "main"))


def cache(models: Sequence[Asked], hub: Path, progress: Progress | None = None) -> list[Row]:
    """Bring hub models into the cache `hub` and look at folders; a row each, in the order asked.

    Raises:
        ConfigError: `hub` can't be a cache.
    """
    wanted = [asked.wanted for asked in models if asked.wanted is not None]
    fetched = iter(fetch(wanted, hub, progress))
    rows = [_local(a) if a.wanted is None else _row(a.name, next(fetched)) for a in models]
    here = {one.repo_id for one in wanted}
    for row in rows:
        base = None if row.path is None else base_of(Model("model", row.name), row.path)
        if base is not None and base.path not in here and not is_local(base.path):
            shown = progress or Progress()
            shown.say(f"{row.name} is an adapter of {base.path}: add --model {base.path}")
    return rows


def _row(name: str, found: Landed | Missed) -> Row:
    if isinstance(found, Missed):
        return Row(name, error=found.error)
    return Row(name, found.path, found.size_bytes, found.duration_s)


def _local(asked: Asked) -> Row:
    folder = Path(asked.name).expanduser().resolve()
    try:
        check_folder(folder)
    except RunError as error:
        return Row(asked.name, error=error)
    return Row(asked.name, folder, sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))


def check_folder(folder: Path) -> None:
    """Look whether a folder holds a model: its config, and weights that are all there.

    Raises:
        RunError: something is missing, or cut.
    """
    if not any((folder / name).is_file() for name in _SETTINGS):
        raise RunError(f"{folder}: no model, as it has no {' and no '.join(_SETTINGS)}")
    parts = {part for index in folder.glob(_INDEX) for part in _parts(index)}
    missing = sorted(part for part in parts if not (folder / part).is_file())
    if missing:
        raise RunError(f"{folder}: lacks {', '.join(missing)}, which its index names")
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise RunError(f"{folder}: has no weights ({', '.join(_WEIGHTS)})")
    for file in sorted(folder.glob("*.safetensors")):
        _check_safetensors(file)


def _parts(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{index}: not an index of weights any more") from error


def _check_safetensors(file: Path) -> None:
    """The file's own header says how long it is (the format's specification)."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_HEADER), "little")
        try:
            header = json.loads(opened.read(length))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
            raise RunError(f"{file}: not a readable safetensors file") from None
    needed, size = _HEADER + length + max(ends, default=0), file.stat().st_size
    if size != needed:
        raise RunError(f"{file}: is {size} bytes long and must be {needed}; copy it again")
