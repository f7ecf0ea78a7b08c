"""Data sets from the hub, pinned to a commit, verified, prepared, and proved to load offline."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgelm.airgap.caches import Caches
from forgelm.airgap.child import Child, ChildDied
from forgelm.airgap.fetch import Landed, Missed, Progress, Wanted, fetch
from forgelm.errors import ConfigError, ForgeError, RunError
from forgelm.hub import RECORD, lock
from forgelm.hubcache import CachedRepo, hash_of, stamp
from forgelm.log import log
from forgelm.prepared import prepared as prepared
from forgelm.prepared import seal

CARD = ("README.md", ".huggingface.yaml", "dataset_infos.json")
"""What says of which files a configuration is made."""

_HASHES = (40, 64)


@dataclass(frozen=True)
class DataSet:
    """What `load_dataset` is asked for.

    Attributes:
        options: its further arguments as JSON.
        key: the key of a run's config that says `name`; None: a task of lm-eval does.
    """

    path: str
    name: str | None = None
    revision: str = "main"
    options: str = "{}"
    key: str | None = None

    @classmethod
    def of(
        cls,
        path: str,
        name: str | None = None,
        revision: str = "main",
        options: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> DataSet:
        return cls(path, name, revision, json.dumps(options or {}, sort_keys=True), key)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name, "options": json.loads(self.options)}

    def __str__(self) -> str:
        return f"data set {self.path}{f', {self.name}' if self.name else ''}"


@dataclass(frozen=True)
class Ready:
    """A data set whose files were verified; `folder` holds what was prepared from them."""

    wanted: DataSet
    commit: str
    folder: Path


@dataclass(frozen=True)
class Lacking:
    """A data set that isn't there, or doesn't load."""

    wanted: DataSet
    error: ForgeError


def cache(
    wanted: Sequence[DataSet], caches: Caches, progress: Progress | None = None
) -> list[Ready | Lacking]:
    """Cache data sets and prove that they load offline; what became of each, in the order asked.

    Raises:
        ConfigError: a cache can't be written to.
    """
    check_writable(caches)
    with Child(caches, online=True) as online:
        found = bring(wanted, caches, online, progress)
    with Child(caches, online=False) as offline:
        return [prove(found[one], offline) for one in wanted]


def bring(
    wanted: Sequence[DataSet], caches: Caches, online: Child, progress: Progress | None = None
) -> dict[DataSet, Ready | Lacking]:
    """Fetch data sets, every byte checked, and prepare them in the process `online`.

    Raises:
        ConfigError: a cache can't be written to.
    """
    asked = list(dict.fromkeys(wanted))
    found: dict[DataSet, Ready | Lacking] = {}
    pinned = _pinned(asked, caches.hub, found)
    files: dict[DataSet, Wanted] = {}
    for one, commit in pinned.items():
        try:
            paths = twice(online, "plan", commit=commit, key=one.key, **one.arguments)
            patterns = (*CARD, *(glob.escape(path) for path in paths))
            files[one] = Wanted("dataset", one.path, commit, patterns)
        except ForgeError as error:
            found[one] = Lacking(one, error)
    landed = fetch(list(files.values()), caches.hub, progress) if files else []
    for (one, of_it), outcome in zip(files.items(), landed, strict=True):
        try:
            if isinstance(outcome, Missed):
                raise outcome.error
            found[one] = _make(one, of_it, caches, online)
            log.info(f"{one}: verified and prepared")
        except ForgeError as error:
            found[one] = Lacking(one, error)
    return found


def prove(found: Ready | Lacking, offline: Child) -> Ready | Lacking:
    """Whether a data set's commit loads without a network, in the process `offline`."""
    if isinstance(found, Lacking):
        return found
    try:
        twice(offline, "load", folder=str(found.folder), thing=str(found.wanted))
    except ForgeError as error:
        said = f"{found.wanted}: cached, and doesn't load offline: {error}"
        return Lacking(found.wanted, RunError(said))
    return found


class _Warnings(Progress):
    def say(self, text: str) -> None:
        log.warning(text)


def _pinned(
    asked: Sequence[DataSet], hub: Path, found: dict[DataSet, Ready | Lacking]
) -> dict[DataSet, str]:
    """The commit of each, with the files that say what its configurations are."""
    cards = {one: Wanted("dataset", one.path, one.revision, CARD) for one in asked}
    wanted = list(dict.fromkeys(cards.values()))
    outcomes = dict(zip(wanted, fetch(wanted, hub, _Warnings()), strict=True)) if wanted else {}
    commits = {}
    for one, card in cards.items():
        outcome = outcomes[card]
        if isinstance(outcome, Landed):
            commits[one] = outcome.commit
        else:
            found[one] = Lacking(one, outcome.error)
    return commits


def _make(one: DataSet, files: Wanted, caches: Caches, online: Child) -> Ready:
    """Prepare a data set; with blobs in its repository that are wrong, once more without them."""
    for last in (False, True):
        made = twice(online, "prepare", commit=files.revision, **one.arguments)
        folders = [Path(folder) for folder in made]
        wrong = discard_wrong(CachedRepo(caches.hub, "dataset", one.path))
        if not wrong:
            for folder in folders:
                seal(folder)
                # Offline, `datasets` takes the folder that was changed last.
                os.utime(folder)
            return Ready(one, files.revision, folders[0])
        log.warning(f"{one}: {wrong[0]} in the cache isn't what its name says; made again")
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if not last and isinstance(missed := fetch([files], caches.hub)[0], Missed):
            raise missed.error
    raise RunError(f"{one}: what is downloaded isn't what the hub's hashes promise; try again")


def discard_wrong(repo: CachedRepo) -> list[str]:
    """Remove the blobs of a repository whose bytes aren't what their names say; returns them.

    Those that are right are noted, and not read again.
    """
    record, wrong = repo.record(), []
    seen = dict(record.verified)
    for path in sorted(repo.blob("").glob("*")):
        name = path.name
        if len(name) not in _HASHES or seen.get(name) == stamp(path):
            continue
        if hash_of(path, name) == name:
            seen[name] = stamp(path)
        else:
            path.unlink()
            wrong.append(name)
    if seen != record.verified:
        with lock(repo, RECORD):
            record = repo.record()
            record.verified |= seen
            repo.write_record(record)
    return wrong


def twice(child: Child, work: str, **arguments: Any) -> Any:
    """What a child returns; one that dies gets a second try, in a new process.

    Raises:
        ConfigError, RunError: as `Child.call`.
    """
    try:
        return child.call(work, **arguments)
    except ChildDied as error:
        log.warning(f"{error}; tried again")
        return child.call(work, **arguments)


def check_writable(caches: Caches) -> None:
    """Make the folders.

    Raises:
        ConfigError: one can't be made or written to.
    """
    folders = (caches.datasets, caches.hub, caches.modules, caches.evaluate, caches.nltk)
    for folder in filter(None, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            raise ConfigError(
                f"cache {folder}: {error.strerror}; give a folder that can be written to"
            ) from error
