"""What is wrong with a cache, without the network and without loading anything.

A repository of the hub cache is compared with the hub's own list of its files (`trees/`), with the
hashes that its blobs are named by, and with what forgelm noted when it verified it; a prepared data
set with its own `dataset_info.json`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from forgelm.hubcache import CachedRepo, Entry, Record, hash_of, stamp

SMALL = 16 << 20
"""Bytes up to which a blob that was never verified is hashed without `deep`."""

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.pt", "*.pth", "*.onnx")
_SETTINGS = ("config.json", "adapter_config.json", "model_index.json")
_ADAPTER = "adapter_config.json"
_INDEX = "*.index.json"
_INCOMPLETE = ".incomplete"
_HASHING_THREADS = 4
_FEW = 3


class Severity(StrEnum):
    error = "error"
    warning = "warning"


@dataclass(frozen=True)
class Finding:
    """What is wrong with a repository or a data set, and what to do; an error hinders its use."""

    thing: str
    severity: Severity
    problem: str
    remedy: str


@dataclass(frozen=True)
class Prepared:
    """A data set in the datasets cache, its rows by split, and what is wrong with it."""

    thing: str
    folder: Path
    rows: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def thing(repo: CachedRepo) -> str:
    return f"{repo.kind.replace('dataset', 'data set')} {repo.repo_id}"


def problems(repo: CachedRepo, deep: bool = False) -> list[Finding]:
    """What is wrong with a repository of the hub cache.

    `deep` hashes all blobs. Else those are that changed since they were verified, and those up to
    `SMALL` that never were.
    """
    return [*_Look(repo, deep).findings()]


@dataclass
class _Snapshot:
    """A commit's folder: its files, dangling links included, and what the hub says of them."""

    commit: str
    files: dict[str, Path]
    tree: dict[str, Entry] | None

    @property
    def short(self) -> str:
        return self.commit[:12]


class _Look:
    """One look at a repository."""

    def __init__(self, repo: CachedRepo, deep: bool) -> None:
        self.repo, self.deep = repo, deep
        self.record: Record = repo.record()
        self.refs = repo.refs()
        self.contents: dict[str, tuple[Path, str]] = {}
        """By the hash that it must have: a file, and a commit that has it."""

    def findings(self) -> Iterator[Finding]:
        commits = self.repo.commits()
        for revision, commit in self.refs.items():
            if commit not in commits:
                yield self._without_snapshot(revision, commit)
        used: set[str] = set()
        for commit in commits:
            snapshot = _Snapshot(commit, _files(self.repo.snapshot(commit)), self.repo.tree(commit))
            used |= {path.readlink().name for path in snapshot.files.values() if path.is_symlink()}
            yield from self._of_files(snapshot)
            yield from self._of_model(snapshot)
            yield from self._of_names(snapshot)
        yield from self._of_bytes()
        yield from self._left_over(used)

    def _found(
        self, severity: Severity, problem: str, commit: str | None = None, first: str = ""
    ) -> Finding:
        return Finding(thing(self.repo), severity, problem, first + self._again(commit))

    def _again(self, commit: str | None) -> str:
        """The command that brings a commit into the cache, whole: a name may stand for another by
        now."""
        if self.repo.kind != "model":
            return "forgelm cache OVERRIDES, with those of the run that uses it"
        return f"forgelm cache-models --model {self.repo.repo_id}@{commit or 'main'}"

    def _without_snapshot(self, revision: str, commit: str) -> Finding:
        # A data set may be used from the datasets cache alone.
        severity = Severity.warning if self.repo.kind == "dataset" else Severity.error
        text = f"{revision} stands for commit {commit[:12]}, of which nothing is here"
        return self._found(severity, text, commit)

    def _of_files(self, snapshot: _Snapshot) -> Iterator[Finding]:
        """Links that lead nowhere, files that aren't there, or aren't as long as they must be."""
        commit, tree = snapshot.commit, snapshot.tree
        dangling = [name for name, path in snapshot.files.items() if not path.exists()]
        if dangling:
            yield self._found(
                Severity.error,
                f"commit {snapshot.short}: {_few(dangling)} {_are(dangling)} no content: the links "
                f"lead nowhere{self._why(snapshot, dangling)}",
                commit,
            )
        lacking = [name for name in self.repo.missing(commit) or [] if name not in dangling]
        if lacking:
            verified = commit in self.record.wanted
            yield self._found(
                Severity.error if verified else Severity.warning,
                f"commit {snapshot.short}: {_few(lacking)} {_are(lacking)} missing"
                + ("" if verified else "; perhaps only some files were asked for"),
                commit,
            )
        if not snapshot.files and not lacking and tree is None:
            yield self._found(
                Severity.error, f"commit {snapshot.short}: its folder is empty", commit
            )
        wrong: dict[Path, str] = {}
        for name, path in snapshot.files.items():
            if name in dangling:
                continue
            entry = None if tree is None else tree.get(name)
            blob = path.readlink().name if path.is_symlink() else None
            if entry is not None and path.stat().st_size != entry.size:
                wrong[path] = f"{name} ({path.stat().st_size} bytes and not {entry.size})"
                continue
            expected = blob if entry is None else entry.blob
            if expected is not None and _HASH.fullmatch(expected):
                self.contents.setdefault(expected, (path, commit))
        if wrong:
            text = f"commit {snapshot.short}: {_few([*wrong.values()])}: of the wrong size"
            first = _remove([path.resolve() for path in wrong])
            yield self._found(Severity.error, text, commit, first)

    def _why(self, snapshot: _Snapshot, dangling: list[str]) -> str:
        blobs = [self.repo.blob(snapshot.files[name].readlink().name) for name in dangling]
        if any(blob.is_symlink() for blob in blobs):
            return f"; {self.repo.hub / 'blobs'}, where several repositories' bytes lie, is missing"
        return ""

    def _of_model(self, snapshot: _Snapshot) -> Iterator[Finding]:
        """Weights and config, where a model has them: tokenizers and data sets don't."""
        if self.repo.kind != "model":
            return
        commit, here = snapshot.commit, set(snapshot.files)
        weights, settings = _matching(here, _WEIGHTS), _matching(here, _SETTINGS)
        for name in _matching(sorted(here), (_INDEX,)):
            parts = _parts(name, snapshot.files[name])
            # An index beside weights of another format is one that nobody reads.
            if (lost := parts - here) and (parts & here or not weights):
                text = f"commit {snapshot.short}: lacks {_few(sorted(lost))}, which {name} names"
                yield self._found(Severity.error, text, commit)
        # What was asked for is compared as such.
        if commit not in self.record.wanted:
            for what, found, patterns, other in (
                ("weights", weights, _WEIGHTS, settings),
                ("config", settings, _SETTINGS, weights),
            ):
                if found:
                    continue
                if snapshot.tree is not None and _matching(snapshot.tree, patterns):
                    text = f"commit {snapshot.short}: its {what} isn't here"
                    text = text.replace("weights isn't", "weights aren't")
                    yield self._found(Severity.error, text, commit)
                elif snapshot.tree is None and other:
                    text = f"commit {snapshot.short}: has no {what}; fine if that wasn't wanted"
                    yield self._found(Severity.warning, text, commit)
        yield from self._of_adapter(snapshot)

    def _of_adapter(self, snapshot: _Snapshot) -> Iterator[Finding]:
        settings = _json(snapshot.files.get(_ADAPTER))
        base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        if not isinstance(base, str) or base.startswith((".", "/", "~")) or base.count("/") != 1:
            return
        if not CachedRepo(self.repo.hub, "model", base).commits():
            revision = settings.get("revision") or "main"
            yield Finding(
                thing(self.repo),
                Severity.warning,
                f"is an adapter, and its base {base} isn't in this cache",
                f"forgelm cache-models --model {base}@{revision}",
            )

    def _of_names(self, snapshot: _Snapshot) -> Iterator[Finding]:
        """By what name a snapshot is found, and whether it was ever verified."""
        commit = snapshot.commit
        if commit not in (*self.refs.values(), *self.record.revisions.values()):
            yield Finding(
                thing(self.repo),
                Severity.warning,
                f"commit {snapshot.short}: no name stands for it, so only its commit finds it",
                f"{self._again(commit)}, or remove it: rm -r "
                f"{shlex.quote(str(self.repo.snapshot(commit)))}",
            )
        elif commit not in self.record.wanted and not self.deep:
            text = (
                f"commit {snapshot.short}: wasn't cached by forgelm: not all of its bytes were "
                "compared with the hub's hashes"
            )
            first = "forgelm doctor --offline --deep; or with a network: "
            yield self._found(Severity.warning, text, commit, first)

    def _of_bytes(self) -> Iterator[Finding]:
        chosen = [(name, path) for name, (path, _) in self.contents.items() if self._doubt(name)]
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            right = [*pool.map(lambda item: _is_right(*item), chosen)]
        for (name, path), as_promised in zip(chosen, right, strict=True):
            if as_promised is not True:
                reason = as_promised or "other bytes than the hub's hash promises"
                _, commit = self.contents[name]
                file = path.relative_to(self.repo.snapshot(commit))
                text = f"commit {commit[:12]}: {file}: {reason}"
                yield self._found(Severity.error, text, commit, _remove([path.resolve()]))

    def _doubt(self, blob: str) -> bool:
        """Whether a blob must be hashed."""
        path, known = self.contents[blob][0], self.record.verified.get(blob)
        if self.deep:
            return True
        return path.stat().st_size <= SMALL if known is None else known != stamp(path)

    def _left_over(self, used: set[str]) -> Iterator[Finding]:
        folder = self.repo.folder / "blobs"
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        partial = [path for path in files if path.name.endswith(_INCOMPLETE)]
        if partial:
            text = f"{_count(partial, 'download')} ({_mib(partial)}) cut off, or going on just now"
            yield Finding(
                thing(self.repo),
                Severity.warning,
                text,
                f"{self._again(None)}, which goes on with them; or {_rm(partial)}",
            )
        unused = [path for path in files if path not in partial and path.name not in used]
        if unused:
            text = f"{_count(unused, 'blob')} ({_mib(unused)}) that no snapshot has"
            yield Finding(thing(self.repo), Severity.warning, text, _rm(unused))


def _files(root: Path) -> dict[str, Path]:
    found = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    return {path.relative_to(root).as_posix(): path for path in sorted(found)}


def _is_right(name: str, path: Path) -> bool | str:
    """Whether a file's hash is its name; what went wrong where it can't be read."""
    try:
        return hash_of(path, name) == name
    except OSError as error:
        return f"can't be read ({error.strerror})"


def _parts(name: str, index: Path) -> set[str]:
    """The files of the snapshot that its index of weights names."""
    found = _json(index)
    parts = found.get("weight_map") if isinstance(found, dict) else None
    folder = PurePosixPath(name).parent
    return (
        {str(folder / str(part)) for part in parts.values()} if isinstance(parts, dict) else set()
    )


def _json(path: Path | None) -> Any:
    """A file's content; None where it isn't there, or isn't JSON."""
    try:
        return None if path is None else json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _count(items: list[Path], word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def _mib(paths: list[Path]) -> str:
    return f"{sum(path.lstat().st_size for path in paths) / 2**20:.1f} MiB"


def _rm(paths: list[Path]) -> str:
    return f"rm {shlex.join(map(str, paths))}"


def _remove(paths: list[Path]) -> str:
    return f"{_rm(paths)} && "


# Prepared data sets


def prepared(cache: Path) -> Iterator[Prepared]:
    """The data sets of a datasets cache, each with what is wrong with it."""
    for root, folders, files in os.walk(cache):
        folder = Path(root)
        folders.sort()
        if folder == cache and "downloads" in folders:
            folders.remove("downloads")
        for name in [name for name in folders if name.endswith(_INCOMPLETE)]:
            folders.remove(name)
            yield _cut_off(cache, folder / name)
        own = [name for name in files if name.endswith(".arrow") and not name.startswith("cache-")]
        if own or "dataset_info.json" in files:
            folders.clear()
            yield _prepared(_title(cache, folder), folder, own)


def _title(cache: Path, folder: Path) -> str:
    name, *rest = folder.relative_to(cache).parts
    if name == "forgelm":
        return f"encoded rows {rest[-1] if rest else name}"
    return f"data set {name.replace('___', '/')}{f' ({rest[0]})' if rest else ''}"


def _cut_off(cache: Path, folder: Path) -> Prepared:
    name = _title(cache, folder).replace(_INCOMPLETE, "")
    text = f"its preparation was cut off, or goes on just now: {folder.name}"
    remedy = f"rm -r {shlex.quote(str(folder))}"
    return Prepared(name, folder, findings=[Finding(name, Severity.warning, text, remedy)])


def _prepared(name: str, folder: Path, arrows: list[str]) -> Prepared:
    made = Prepared(name, folder)
    made.findings.extend(
        Finding(name, Severity.error, problem, _anew(name, folder))
        for problem in _wrong(folder, arrows, made.rows)
    )
    return made


def _anew(name: str, folder: Path) -> str:
    away = f"rm -r {shlex.quote(str(folder))}"
    if name.startswith("encoded"):
        return f"{away}; the next run makes it again"
    return f"{away} && forgelm cache OVERRIDES, with those of the run that uses it"


def _wrong(folder: Path, arrows: list[str], rows: dict[str, int]) -> Iterator[str]:
    """What is wrong with a data set; fills in the rows of its splits."""
    info = _json(folder / "dataset_info.json")
    if not isinstance(info, dict):
        there = (folder / "dataset_info.json").exists()
        yield f"dataset_info.json {'is damaged' if there else 'is missing'}"
        return
    state = _json(folder / "state.json")
    if isinstance(state, dict):
        yield from _of_state(folder, state, rows)
        return
    splits = info.get("splits")
    splits = splits if isinstance(splits, dict) else {}
    if not all(isinstance(said, dict) for said in splits.values()):
        yield "dataset_info.json is damaged"
        return
    for split, said in splits.items():
        files = _of_split(arrows, split)
        shards = len(said.get("shard_lengths") or [None])
        if len(files) != shards:
            yield f"split {split}: {len(files)} of its {shards} files are here"
            continue
        counts = [_rows(folder / file) for file in files]
        for file, count in zip(files, counts, strict=True):
            if isinstance(count, str):
                yield f"split {split}: {file}: {count}"
        numbers = [count for count in counts if isinstance(count, int)]
        rows[split] = sum(numbers)
        if len(numbers) == len(counts) and rows[split] != said.get("num_examples", rows[split]):
            yield f"split {split}: {rows[split]} rows, and it must have {said['num_examples']}"


def _of_state(folder: Path, state: Mapping[str, Any], rows: dict[str, int]) -> Iterator[str]:
    """A data set as `save_to_disk` writes it."""
    names = [str(file["filename"]) for file in state.get("_data_files", [])]
    for name in names:
        count = _rows(folder / name) if (folder / name).is_file() else "is missing"
        if isinstance(count, str):
            yield f"{name}: {count}"
        else:
            rows["all"] = rows.get("all", 0) + count


def _of_split(arrows: list[str], split: str) -> list[str]:
    pattern = re.compile(rf".*-{re.escape(split)}(-\d+-of-\d+)?\.arrow")
    return sorted(name for name in arrows if pattern.fullmatch(name))


def _rows(path: Path) -> int | str:
    """The number of rows of a stream of Arrow batches, or why it can't be read."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            total: int = sum(batch.num_rows for batch in stream)
            return total
    except (pa.ArrowInvalid, OSError) as error:
        return f"can't be read ({' '.join(str(error).split())[:100]})"
