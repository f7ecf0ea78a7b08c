"""The hub's cache on disk: where it lies, what a repository in it holds, what was verified.

The layout is huggingface_hub's own, so that every other tool finds what is in it:

    <hub cache>/models--org--name/blobs/HASH          a file's content, named by its hash
                                  snapshots/COMMIT/PATH -> ../../blobs/HASH
                                  refs/REVISION       the commit that a name stands for
                                  trees/COMMIT.json   all files of a commit, sizes and hashes
                                  .forgelm.json       what forgelm verified: `Record`

HASH is the SHA-256 of a large (LFS) file, else git's SHA-1 of it. Needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from forgelm.run.files import HALF_WRITTEN, write_json

KINDS = ("model", "dataset", "space")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
"""What keeps Hugging Face's libraries off the network."""

_YES = ("1", "ON", "YES", "TRUE")
_RECORD = ".forgelm.json"
_CHUNK = 1 << 20
_SHA256 = 64


def hf_home(environment: Mapping[str, str] = os.environ) -> Path:
    """Where Hugging Face's libraries keep things."""
    default = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return _path(environment.get("HF_HOME") or f"{default}/huggingface")


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The cache of repositories: HF_HUB_CACHE, else HF_HOME/hub."""
    given = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    return _path(given) if given else hf_home(environment) / "hub"


def datasets_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The cache of prepared data sets: HF_DATASETS_CACHE, else HF_HOME/datasets."""
    given = environment.get("HF_DATASETS_CACHE")
    return _path(given) if given else hf_home(environment) / "datasets"


def is_on(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a switch is on, as huggingface_hub reads it."""
    return environment.get(name, "").upper() in _YES


def offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the hub's clients are told to stay offline; the first that is set counts."""
    name = "HF_HUB_OFFLINE" if environment.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    return is_on(name, environment)


def stay_offline() -> None:
    """Where the hub's clients are told to stay offline, tell all libraries, before any is imported.

    They read it then, and not all of them read the same switch.
    """
    if offline() or is_on("HF_DATASETS_OFFLINE"):
        os.environ.update(dict.fromkeys(OFFLINE, "1"))


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser().absolute()


@dataclass(frozen=True)
class Entry:
    """A file of a commit, as the hub lists it: its size in bytes, and its blob's name (a hash)."""

    size: int
    blob: str


@dataclass
class Record:
    """What forgelm knows of a repository in the cache.

    Attributes:
        revisions: the commit that each revision stood for when all its files were verified.
        wanted: for each such commit the files asked for; None for all of them.
        verified: size and time of change (ns) of each blob whose bytes were seen to be right.
        licence: as the repository's card names it.
        begun: of commits that aren't all here yet, the files asked for.
    """

    revisions: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, list[str] | None] = field(default_factory=dict)
    verified: dict[str, tuple[int, int]] = field(default_factory=dict)
    licence: str | None = None
    begun: dict[str, list[str]] = field(default_factory=dict)

    def begin(self, commit: str, files: Collection[str]) -> bool:
        """Note that files of a commit are about to come; False where all of them are known."""
        known = self.wanted.get(commit, self.begun.get(commit, []))
        if known is None or set(files) <= set(known):
            return False
        self.begun[commit] = sorted({*self.begun.get(commit, ()), *files})
        return True

    def settle(self, commit: str, files: Collection[str]) -> None:
        """Note that they are here."""
        left = sorted(set(self.begun.pop(commit, ())) - set(files))
        if left:
            self.begun[commit] = left


@dataclass(frozen=True)
class CachedRepo:
    """A repository's folder in a hub cache, there or not."""

    hub: Path
    kind: str
    repo_id: str

    @property
    def folder(self) -> Path:
        return self.hub / f"{self.kind}s--{self.repo_id.replace('/', '--')}"

    @property
    def locks(self) -> Path:
        """Where huggingface_hub locks blobs while it writes them."""
        return self.hub / ".locks" / self.folder.name

    @property
    def record_file(self) -> Path:
        return self.folder / _RECORD

    def blob(self, name: str) -> Path:
        return self.folder / "blobs" / name

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def ref(self, revision: str) -> Path:
        return self.folder / "refs" / revision

    def tree_file(self, commit: str) -> Path:
        return self.folder / "trees" / f"{commit}.json"

    def refs(self) -> dict[str, str]:
        """The commit that each branch or tag stood for."""
        root = self.folder / "refs"
        files = sorted(
            path for path in root.rglob("*") if path.is_file() and path.suffix != HALF_WRITTEN
        )
        return {path.relative_to(root).as_posix(): path.read_text().strip() for path in files}

    def commits(self) -> list[str]:
        """The commits that have a snapshot, whole or not."""
        root = self.folder / "snapshots"
        return (
            sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        )

    def tree(self, commit: str) -> dict[str, Entry] | None:
        """All files of a commit by path, as the hub listed them; None where that isn't known."""
        try:
            files = json.loads(self.tree_file(commit).read_text(encoding="utf-8"))["files"]
            return {
                path: Entry(file["size"], file.get("lfs_sha256") or file["blob_id"])
                for path, file in files.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def record(self) -> Record:
        """What was verified; empty where nothing was, or where the record can't be read."""
        try:
            found = json.loads(self.record_file.read_text(encoding="utf-8"))
            return Record(
                found["revisions"],
                found["wanted"],
                {name: (size, changed) for name, (size, changed) in found["verified"].items()},
                found["licence"],
                found.get("begun", {}),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return Record()

    def write_record(self, record: Record) -> None:
        write_json(self.record_file, asdict(record))

    def wanted(self, commit: str) -> list[str] | None:
        """The files that a commit must have here; None where that isn't known."""
        record = self.record()
        files, begun = record.wanted.get(commit), record.begun.get(commit, [])
        if files is not None or (begun and commit not in record.wanted):
            return sorted({*(files or ()), *begun})
        tree = self.tree(commit)
        return None if tree is None else list(tree)

    def missing(self, commit: str) -> list[str] | None:
        """The files asked for of a commit that aren't here; None where that isn't known."""
        wanted, root = self.wanted(commit), self.snapshot(commit)
        return None if wanted is None else [path for path in wanted if not (root / path).is_file()]


def cached_repos(hub: Path) -> Iterator[CachedRepo]:
    """The repositories in a hub cache; whatever else lies there isn't one."""
    if not hub.is_dir():
        return
    for folder in sorted(hub.iterdir()):
        kind, _, name = folder.name.partition("--")
        if kind.removesuffix("s") in KINDS and kind.endswith("s") and name and folder.is_dir():
            yield CachedRepo(hub, kind.removesuffix("s"), name.replace("--", "/"))


def stamp(path: Path) -> tuple[int, int]:
    """Size (bytes) and time of change (ns) of a file: what tells that it is still the same."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def hasher(blob: str, size: int) -> hashlib._Hash:
    """What computes a blob's name of its `size` bytes: SHA-256, or git's SHA-1."""
    if len(blob) == _SHA256:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def hash_of(path: Path, blob: str) -> str:
    """The name that a file's content has as a blob, computed as for the name given."""
    total = hasher(blob, path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        for chunk in chunks(file):
            total.update(chunk)
    return total.hexdigest()


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, a megabyte at a time."""
    while chunk := file.read(_CHUNK):
        yield chunk
