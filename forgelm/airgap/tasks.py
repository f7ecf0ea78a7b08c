"""lm-eval's tasks by name: their data and metric modules cached, and proved to load offline."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forgelm.airgap.caches import Caches
from forgelm.airgap.child import Child
from forgelm.airgap.data import (
    DataSet,
    Ready,
    bring,
    check_writable,
    discard_wrong,
    twice,
)
from forgelm.airgap.fetch import Progress
from forgelm.config import lm_index
from forgelm.config.lm_tasks import unknown
from forgelm.errors import ConfigError, ForgeError, RunError
from forgelm.hubcache import cached_repos, hash_of
from forgelm.log import log
from forgelm.prepared import is_intact
from forgelm.run.files import read_json

_HASHES = (40, 64)
_SPACE = re.compile(r"/spaces/([^/]+)/([^/]+)/resolve/")


@dataclass(frozen=True)
class Row:
    """What became of a name asked for; `error` where it isn't cached whole."""

    name: str
    error: ForgeError | None = None


@dataclass
class _Leaf:
    """A task to cache: where it stands among those of a name, and what is known of it."""

    leaf: str
    name: str
    place: int
    data: DataSet | None = None
    commit: str | None = None
    metrics: list[str] = field(default_factory=list)
    error: ForgeError | None = None


def check(asked: Sequence[str], include_path: str | None = None) -> None:
    """See that names are tasks, without a network.

    Raises:
        ConfigError: lm-eval isn't installed, the folder isn't there, or names are unknown; all.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            f"--tasks {','.join(asked)} needs lm-eval, which isn't installed: "
            "pip install 'forgelm[eval]'"
        )
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise ConfigError(f"--include-path {include_path}: no such folder")
    if problems := list(unknown(asked, include_path, "--tasks")):
        raise ConfigError(problems)


def cache(
    asked: Sequence[str],
    include_path: str | None,
    caches: Caches,
    progress: Progress | None = None,
    landed: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Cache tasks, groups and tags; a row each, in the order asked, names asked twice once.

    A task counts as cached once it was built in a process without a network, from data whose bytes
    are those of the hub's hashes. `landed` is told each name that is whole.

    Raises:
        ConfigError: as `check`, or a cache can't be written to.
    """
    names = list(dict.fromkeys(asked))
    check(names, include_path)
    check_writable(caches)
    found = lm_index.find(names, include_path)
    files = [[str(file) for file in part] for part in found.files]
    leaves: dict[str, _Leaf] = {}
    parts: dict[str, list[_Leaf]] = {}
    for name in names:
        of_it = enumerate(found.leaves(name))
        parts[name] = [
            leaves.setdefault(leaf.key, _Leaf(leaf.name, name, place)) for place, leaf in of_it
        ]
    with Child(caches, online=True) as online:
        _fetch(list(leaves.values()), files, caches, online, progress)
    rows, proved = [], set[int]()
    with Child(caches, online=False) as offline:
        for name in names:
            for leaf in parts[name]:
                if id(leaf) not in proved:
                    _prove(leaf, files, offline)
                    proved.add(id(leaf))
            rows.append(_row(name, parts[name]))
            if rows[-1].error is None:
                landed(name)
    if caches.nltk is not None:
        with suppress(OSError):
            caches.nltk.rmdir()
    return rows


def _fetch(
    leaves: Sequence[_Leaf],
    files: list[list[str]],
    caches: Caches,
    online: Child,
    progress: Progress | None,
) -> None:
    """All that can be had from the network, for all leaves; what fails is noted in them."""
    for leaf in leaves:
        try:
            data = twice(online, "needs", files=files, **_named(leaf))
            leaf.data = DataSet.of(**data) if data else None
        except ForgeError as error:
            leaf.error = error
    open_ones = [leaf for leaf in leaves if leaf.error is None]
    wanted = [leaf.data for leaf in open_ones if leaf.data is not None]
    brought = bring(wanted, caches, online, progress)
    for number, leaf in enumerate(open_ones, 1):
        outcome = brought[leaf.data] if leaf.data else None
        if isinstance(outcome, Ready):
            leaf.commit = outcome.commit
        elif outcome is not None:
            leaf.error = outcome.error
            continue
        try:
            _build(leaf, files, caches, online)
            log.info(f"{leaf.leaf}: fetched ({number} of {len(open_ones)})")
        except ForgeError as error:
            leaf.error = error


def _build(leaf: _Leaf, files: list[list[str]], caches: Caches, online: Child) -> None:
    """Build a task online, for what it needs besides its data; again if wrong bytes came."""
    for last in (False, True):
        begun, failed = time.time(), None
        try:
            made = twice(
                online, "build", files=files, commit=leaf.commit, metrics=None, **_named(leaf)
            )
        except ForgeError as error:
            failed = error
        wrong = _discard_wrong(caches, begun)
        if wrong and last:
            raise RunError(f"task {leaf.leaf}: wrong bytes came for {wrong[0]}; try again")
        if wrong:
            log.warning(f"task {leaf.leaf}: wrong bytes came for {wrong[0]}; fetched again")
            # It may have imported them.
            online.end()
            continue
        if failed is not None:
            raise failed
        leaf.metrics = made["metrics"]
        for note in made["notes"]:
            log.warning(note)
        return


def _prove(leaf: _Leaf, files: list[list[str]], offline: Child) -> None:
    if leaf.error is not None:
        return
    try:
        twice(
            offline,
            "build",
            files=files,
            commit=leaf.commit,
            metrics=leaf.metrics,
            **_named(leaf),
        )
        log.info(f"{leaf.leaf}: loads offline")
    except ForgeError as error:
        leaf.error = RunError(f"{leaf.leaf}: cached, and doesn't load offline: {error}")


def _named(leaf: _Leaf) -> dict[str, Any]:
    return {"name": leaf.name, "place": leaf.place, "leaf": leaf.leaf}


def _row(name: str, leaves: Sequence[_Leaf]) -> Row:
    failed = [leaf for leaf in leaves if leaf.error is not None]
    if not leaves:
        return Row(name, ConfigError(f"{name}: the group has no tasks"))
    if not failed:
        return Row(name)
    # What failed while running counts before what was wrong to ask for.
    first = max(failed, key=lambda leaf: leaf.error.exit_code if leaf.error else 0)
    said = str(first.error)
    if first.leaf not in said:
        said = f"{first.leaf}: {said}"
    if len(failed) > 1:
        said += f"; {len(failed) - 1} more of its {len(leaves)} tasks failed"
    return Row(name, type(first.error)(said) if first.error else None)


def _discard_wrong(caches: Caches, begun: float) -> list[str]:
    """Remove what was downloaded since a time (s) and isn't what its hash says; names it."""
    wrong = []
    for repo in cached_repos(caches.hub):
        blobs = repo.blob("")
        if not blobs.is_dir() or blobs.stat().st_mtime < begun:
            continue
        if discard_wrong(repo):
            wrong.append(f"{repo.kind} {repo.repo_id}")
            for commit in repo.commits():
                for folder in caches.datasets.glob(f"*/*/*/{commit}"):
                    if not is_intact(folder):
                        shutil.rmtree(folder, ignore_errors=True)
    for note in caches.evaluate.glob("downloads/*.json"):
        # Named so by `evaluate`: the file, and beside it where it came from and its hash.
        file, known = note.with_suffix(""), read_json(note)
        if file.is_file() and not _is_right(file, str(known.get("etag"))):
            wrong.append(str(known.get("url")))
            file.unlink()
            note.unlink()
            if space := _SPACE.search(wrong[-1]):
                for folder in caches.modules.glob(f"evaluate_modules/*/{space[1]}--{space[2]}"):
                    shutil.rmtree(folder, ignore_errors=True)
    return wrong


def _is_right(file: Path, etag: str) -> bool:
    name = etag.removeprefix("W/").strip('"')
    return len(name) not in _HASHES or hash_of(file, name) == name
