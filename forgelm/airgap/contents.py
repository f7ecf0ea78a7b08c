"""What of the caches is content, and under which names a bundle carries it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgelm.airgap import verify
from forgelm.errors import ConfigError
from forgelm.hub import is_commit
from forgelm.hubcache import CachedRepo, Record, cached_repos, hash_of

PREPARED = "dataset_info.json"
"""The file that a prepared data set has, and that was written last."""

# Locks, marks, logs, compiled code, and what was being written when it was looked at.
_NEVER = re.compile(
    r"\.locks|CACHEDIR\.TAG|__pycache__|\.?audit_log\..*|\.forgelm-.*|tmp[a-z0-9_]{8}"
    r"|.*\.(lock|incomplete|pyc)|\..*\.(part|link)"
)
# What evaluate notes of a metric's origin: folders of the machine that nobody reads.
_ORIGIN = {"original file path", "local file path"}
_SMALL = 1 << 16
_SHA256 = "0" * 64
_SHOWN = 5


@dataclass(frozen=True)
class Chosen:
    """A repository asked for; without a revision `main`."""

    kind: str
    repo_id: str
    revision: str | None = None

    @property
    def name(self) -> str:
        return f"--{self.kind} {self.repo_id}{f'@{self.revision}' if self.revision else ''}"


@dataclass(frozen=True)
class File:
    """A regular file of a bundle: its path there, and where its bytes are.

    `blob` is the name that the bytes must have, `what` how to call it, `mend` what to do if they
    don't.
    """

    path: str
    source: Path | bytes
    size: int
    blob: str | None = None
    what: str = ""
    mend: str = ""


@dataclass
class Repository:
    """What is packed of a repository: its files, and the links to its blobs by their paths."""

    repo: CachedRepo
    commits: dict[str, str]
    snapshots: list[str]
    licence: str | None = None
    files: list[File] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return verify.folder_of(self.repo.kind, self.repo.repo_id)

    def sizes(self) -> list[tuple[str, int, int]]:
        """Of each commit: how many files it has, and their bytes; the same content counts once."""
        known = {file.path.rpartition("/")[2]: file.size for file in self.files}
        found = []
        for commit in self.snapshots:
            start = f"{self.root}/snapshots/{commit}/"
            links = [link for path, link in self.links.items() if path.startswith(start)]
            blobs = {link.rpartition("/")[2] for link in links}
            found.append((commit, len(links), sum(known[blob] for blob in blobs)))
        return found


@dataclass
class Contents:
    """All that is packed. `latest`: of several preparations of a data set the newest."""

    repositories: list[Repository] = field(default_factory=list)
    trees: dict[str, list[File]] = field(default_factory=dict)
    latest: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def files(self) -> Iterator[File]:
        for repo in self.repositories:
            yield from repo.files
        for files in self.trees.values():
            yield from files

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files())


def look(places: dict[str, Path], chosen: Sequence[Chosen] = ()) -> Contents:
    """What the caches hold: everything, or what is chosen.

    What can't be packed is in `problems`, by name.

    Raises:
        ConfigError: something chosen isn't in the caches, or nothing is.
    """
    found = Contents()
    if chosen:
        _look_for(chosen, places, found)
    else:
        for repo in cached_repos(places[verify.HUB]):
            commits = _commits(repo)
            if commits:
                found.repositories.append(_repository(repo, commits, found.problems))
        for top in verify.TREES:
            # cache-tasks --output puts the other caches below that of the data sets.
            others = {place.resolve() for name, place in places.items() if name != top}
            files = _files(top, places[top], places[top], found.problems, others)
            found.trees[top] = list(files)
    found.latest = _latest(found.trees.get(verify.DATASETS, []))
    if not found.repositories and not any(found.trees.values()):
        raise ConfigError(
            f"nothing to pack in {places[verify.HUB]} and {places[verify.DATASETS]}: "
            "fill them by forgelm cache-models or cache-tasks, or give --cache-dir"
        )
    return found


def _look_for(chosen: Sequence[Chosen], places: dict[str, Path], found: Contents) -> None:
    repos = {(repo.kind, repo.repo_id): repo for repo in cached_repos(places[verify.HUB])}
    picked: dict[tuple[str, str], list[str]] = {}
    folders: dict[Path, None] = {}
    problems = []
    for one in chosen:
        prepared = _prepared(one, places[verify.DATASETS]) if one.kind == "dataset" else []
        folders |= dict.fromkeys(prepared)
        repo = repos.get((one.kind, one.repo_id))
        commit = None if repo is None else _commit(repo, one.revision or "main")
        if commit is not None:
            picked.setdefault((one.kind, one.repo_id), []).append(commit)
        elif not prepared:
            problems.append(_not_here(one, repo, list(repos), places))
    if problems:
        raise ConfigError(problems)
    for key in sorted(picked, key=lambda key: verify.folder_of(*key)):
        commits = sorted(set(picked[key]))
        found.repositories.append(_repository(repos[key], commits, found.problems))
    root = places[verify.DATASETS]
    files = [file for one in folders for file in _files(verify.DATASETS, root, one, found.problems)]
    found.trees[verify.DATASETS] = sorted({file.path: file for file in files}.values(), key=_path)


def _path(file: File) -> str:
    return file.path


def _commit(repo: CachedRepo, revision: str) -> str | None:
    """The commit that a revision stands for, if its snapshot is here."""
    commit = {**repo.record().revisions, **repo.refs()}.get(revision, revision)
    return commit if commit in _commits(repo) else None


def _commits(repo: CachedRepo) -> list[str]:
    """The commits that have files here."""
    return [commit for commit in repo.commits() if any(repo.snapshot(commit).iterdir())]


def _not_here(
    one: Chosen, repo: CachedRepo | None, known: list[tuple[str, str]], places: dict[str, Path]
) -> str:
    if repo is not None:
        names = {commit: name for name, commit in repo.refs().items()}
        here = ", ".join(f"{one.repo_id}@{names.get(c, c)}" for c in _commits(repo))
        return f"{one.name}: not in {places[verify.HUB]}, which has {here or 'no commit of it'}"
    import difflib

    ids = [repo_id for kind, repo_id in known if kind == one.kind]
    near = difflib.get_close_matches(one.repo_id, ids, n=1)
    where = str(places[verify.HUB])
    if one.kind == "dataset":
        where += f" or {places[verify.DATASETS]}"
    hint = f"did you mean {near[0]}?" if near else "cache it first, or leave it out"
    return f"{one.name}: not in {where}; {hint}"


def _prepared(one: Chosen, root: Path) -> list[Path]:
    """The folders in the data sets' cache that a data set was prepared in."""
    from datasets.naming import camelcase_to_snakecase

    *owner, name = one.repo_id.split("/")
    folder = root / "___".join([*owner, camelcase_to_snakecase(name)])
    if not folder.is_dir():
        return []
    if one.revision is None:
        return [folder]
    return sorted(folder.glob(f"*/*/{one.revision}")) if is_commit(one.revision) else [folder]


def _repository(repo: CachedRepo, commits: Sequence[str], problems: list[str]) -> Repository:
    refs = {name: commit for name, commit in repo.refs().items() if commit in commits}
    unnamed = {commit: commit for commit in commits if commit not in refs.values()}
    made = Repository(repo, {**refs, **unnamed}, list(commits))
    blobs: dict[str, File] = {}
    for commit in commits:
        _add_snapshot(made, commit, blobs, problems)
    made.files += blobs.values()
    for name, commit in refs.items():
        made.files.append(_given(f"{made.root}/refs/{name}", commit.encode()))
    for commit in commits:
        if repo.tree(commit) is not None:
            file = repo.tree_file(commit)
            made.files.append(File(f"{made.root}/trees/{file.name}", file, file.stat().st_size))
    record = repo.record()
    made.licence = record.licence = record.licence or _card_licence(repo, commits)
    made.files.append(_given(f"{made.root}/{verify.RECORD}", _carried(record, commits)))
    return made


def _given(path: str, data: bytes) -> File:
    return File(path, data, len(data))


def _carried(record: Record, commits: Sequence[str]) -> bytes:
    """The record of these commits, without what holds for this machine alone."""
    data = {
        "revisions": {n: c for n, c in sorted(record.revisions.items()) if c in commits},
        "wanted": {commit: record.wanted[commit] for commit in commits if commit in record.wanted},
        "verified": {},
        "licence": record.licence,
    }
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _add_snapshot(
    made: Repository, commit: str, blobs: dict[str, File], problems: list[str]
) -> None:
    repo = made.repo
    name = f"{repo.kind} {repo.repo_id}"
    mend = _mend(repo, commit)
    missing = repo.missing(commit)
    if missing:
        shown = ", ".join(missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        problems.append(f"{name}, commit {commit}: {shown}{more} missing; {mend}")
        return
    tree = repo.tree(commit) or {}
    root = repo.snapshot(commit)
    for file in _walk(root, root, name, problems, mend):
        path = file.relative_to(root).as_posix()
        real, blob = _blob(repo, file)
        listed = tree.get(path)
        if blob is None:
            blob = listed.blob if listed else hash_of(file, _SHA256)
        if listed and blob != listed.blob:
            problems.append(
                f"{name}: {path} is a link to blob {blob}, the hub lists {listed.blob}; "
                f"delete {file}, then {mend}"
            )
            continue
        known = len(blob) in (40, 64)
        blobs.setdefault(
            blob,
            File(
                f"{made.root}/blobs/{blob}",
                real,
                real.stat().st_size,
                blob if known else None,
                f"{name}: {path}",
                f"delete {real}, then {mend}",
            ),
        )
        up = "../" * (path.count("/") + 2)
        made.links[f"{made.root}/snapshots/{commit}/{path}"] = f"{up}blobs/{blob}"


def _mend(repo: CachedRepo, commit: str) -> str:
    if repo.kind != "model":
        return "fetch it again by forgelm cache or cache-tasks, or leave it out"
    return f"forgelm cache-models --model {repo.repo_id}@{commit} mends it"


def _blob(repo: CachedRepo, file: Path) -> tuple[Path, str | None]:
    """Where a snapshot's file has its bytes, and its blob's name if it is a link to a blob.

    The blob may be a link in its turn, into the store that repositories share.
    """
    if file.is_symlink():
        target = file.parent / os.readlink(file)
        folder = Path(os.path.normpath(target.parent))
        if folder == repo.folder / "blobs" or folder.resolve() == (repo.folder / "blobs").resolve():
            return repo.blob(target.name), target.name
    return file, None


def _card_licence(repo: CachedRepo, commits: Sequence[str]) -> str | None:
    """What the repository's card says in its front matter."""
    import yaml

    newest = repo.refs().get("main")
    for commit in sorted(commits, key=lambda commit: commit != newest):
        try:
            text = (repo.snapshot(commit) / "README.md").read_text(encoding="utf-8")
            start, card, _ = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
            found = yaml.safe_load(card)["license"] if not start.strip() else None
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
        if isinstance(found, str | list):
            return found if isinstance(found, str) else ", ".join(map(str, found))
    return None


def _files(
    top: str, root: Path, folder: Path, problems: list[str], others: Collection[Path] = ()
) -> Iterator[File]:
    """The content of a cache that is no repository's, below one of its folders.

    `others` are folders that are left out.
    """
    for file in _walk(folder, folder, str(folder), problems, "delete it", others):
        if top != verify.MODULES or not _is_origin(file):
            yield File(f"{top}/{file.relative_to(root).as_posix()}", file, file.stat().st_size)


def _is_origin(file: Path) -> bool:
    if file.suffix != ".json" or file.stat().st_size > _SMALL:
        return False
    try:
        found: Any = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == _ORIGIN


def _walk(
    folder: Path,
    root: Path,
    name: str,
    problems: list[str],
    mend: str,
    others: Collection[Path] = (),
) -> Iterator[Path]:
    """All files below a folder that are content, in order; links to folders are followed."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        shown = path.relative_to(root).as_posix()
        if _NEVER.fullmatch(path.name):
            continue
        try:
            shown.encode()
        except UnicodeEncodeError:
            problems.append(f"{name}: {shown!r} isn't named in UTF-8; rename it")
            continue
        if path.is_dir():
            if path.resolve() in others:
                continue
            if path.is_symlink() and path.resolve() in (
                folder.resolve(),
                *folder.resolve().parents,
            ):
                problems.append(f"{name}: {shown} is a link to a folder that it lies in; {mend}")
                continue
            yield from _walk(path, root, name, problems, mend, others)
        elif path.is_file():
            yield path
        elif path.is_symlink():
            problems.append(f"{name}: {shown} is a link to {os.readlink(path)}, not there; {mend}")
        else:
            problems.append(f"{name}: {shown} is neither a file nor a folder; {mend}")


def _latest(files: Sequence[File]) -> list[str]:
    """Where a config was prepared several times: the folder that offline loading takes.

    That is the one changed last, so a copy must be told.
    """
    configs: dict[str, dict[str, int]] = {}
    for file in files:
        path, _, name = file.path.rpartition("/")
        if name == PREPARED and path.count("/") >= 3 and isinstance(file.source, Path):
            config = path.rsplit("/", 2)[0]
            changed = file.source.parent.stat().st_mtime_ns
            configs.setdefault(config, {})[path] = changed
    return [
        max(sorted(folders), key=lambda path, known=folders: known[path])  # type: ignore[misc]
        for _, folders in sorted(configs.items())
        if len(folders) > 1
    ]
