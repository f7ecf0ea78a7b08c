"""A bundle brought into caches that others may be using: checked first, then moved into place.

All is unpacked into folders beside its targets while it is checked; nothing is moved before the
last byte was seen to be right. Each file is renamed into place, blobs before the links to them,
what names commits last, so that nobody finds a part of a repository.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from forgelm.airgap import verify
from forgelm.airgap.contents import PREPARED
from forgelm.airgap.staging import check_space, disk_errors, staging
from forgelm.airgap.verify import Entry
from forgelm.errors import ConfigError, RunError
from forgelm.hub import RECORD, lock
from forgelm.hubcache import CachedRepo, Record, stamp
from forgelm.log import log
from forgelm.run.files import write_text

Moved = Callable[[int], None]

_SLACK = 1 << 12


@dataclass(frozen=True)
class Landed:
    """A commit of a repository that is in the cache: all its files, and how many are new."""

    kind: str
    repo_id: str
    commit: str
    files: int
    new_files: int
    size_bytes: int


@dataclass(frozen=True)
class Unpacked:
    """What an import brought; `trees` counts the files of each other cache."""

    landed: list[Landed]
    trees: dict[str, int]


def unpack(
    file: Path,
    places: Mapping[str, Path],
    moved: Moved = lambda count: None,
    begin: Moved = lambda count: None,
) -> Unpacked:
    """Merge the bundle `file` into the caches in `places` (see verify.default_places).

    `begin` is told how many bytes will be read, `moved` how many more were.

    Raises:
        ConfigError: there is no such bundle.
        RunError: it isn't as its manifest says, or unsafe; the caches lack what an earlier bundle
            carries; there is no room. Nothing was imported then.
    """
    with disk_errors(file):
        data = _scan(file)
    try:
        manifest, entries = verify.parse(data)
    except ValueError as error:
        raise _refused(file, [f"{verify.MANIFEST}: {error}"]) from error
    ours = {path: entry for path, entry in entries.items() if path.partition("/")[0] in places}
    tops = sorted({path.partition("/")[0] for path in ours})
    _check_ways(file, ours, places)
    needed = _needed(ours, places, manifest)
    _check_left_out(file, [entry for entry in needed.values() if entry.left_out], places)
    begin(sum(entry.size for entry in entries.values() if entry.link is None))
    with disk_errors(places[tops[0]] if tops else file), _made([places[top] for top in tops]):
        _check_room(needed, places)
        with ExitStack() as stack:
            aside = {top: stack.enter_context(staging(places[top])) for top in tops}
            _bring(file, data, needed, aside, moved)
            # What is moved into place must outlive a power cut.
            os.sync()
            landed = [_land_repository(repo, needed, places, aside) for repo in _repos(manifest)]
            for top in tops:
                if top != verify.HUB:
                    _land_tree(top, ours, needed, places, aside)
            _touch(manifest, needed, places)
    trees = {top: sum(path.startswith(f"{top}/") for path in ours) for top in verify.TREES}
    return Unpacked([row for rows in landed for row in rows], trees)


def _repos(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return list(manifest["repositories"])


def _refused(file: Path, problems: Sequence[str], remedy: str | None = None) -> RunError:
    said = [*verify.few(problems), *([remedy] if remedy else [])]
    lines = [f"{file.name}: {line.removeprefix(f'{file.name}: ')}" for line in said]
    return RunError("\n".join([*lines, f"{file}: refused, and nothing of it was imported"]))


def _scan(file: Path) -> bytes:
    """The manifest, once the names of all members are seen to be harmless."""
    if (file / verify.MANIFEST).is_file():
        raise ConfigError(
            f"{file}: a folder that a bundle was unpacked in; it needs no import: "
            f"export HF_HOME={shlex.quote(str(file.absolute()))}"
        )
    try:
        _, paths, found = verify.find_parts(file, "the archive, or its first part")
    except verify.NotThere as error:
        raise ConfigError(str(error)) from error
    if found:
        raise _refused(file, [str(problem) for problem in found])
    data, damage = b"", []
    names: set[str] = set()
    members = verify.Members(file.name)
    with verify.Archive(paths) as archive:
        try:
            for member in archive.members():
                if members.allowed(member, names) and member.name == verify.MANIFEST:
                    data = b"".join(archive.content())
                names.add(member.name)
        except verify.Damaged as error:
            damage = [] if members.repacked else [str(error)]
    problems = [*map(str, members.problems()), *damage]
    if not data and not problems:
        problems.append(f"{verify.MANIFEST}: missing: this is no bundle")
    if problems:
        raise _refused(file, problems)
    return data


def _check_ways(file: Path, entries: Mapping[str, Entry], places: Mapping[str, Path]) -> None:
    """Refuse targets whose folders are links that leave the cache, or that are no folders."""
    problems: dict[Path, str] = {}
    checked: set[Path] = set()
    for entry in entries.values():
        root, final = places[entry.path.partition("/")[0]], verify.target(entry.path, places)
        if final.is_dir():
            problems[final] = f"{entry.path}: {final} is a folder"
        for folder in final.parents:
            if folder in checked:
                break
            checked.add(folder)
            if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
                problems[folder] = f"{entry.path}: {folder} can't be written to by you"
            if folder == root:
                break
            if folder.is_symlink() and not folder.resolve().is_relative_to(root.resolve()):
                problems[folder] = f"unsafe: {folder} is a link that leaves {root}"
            elif folder.exists() and not folder.is_dir():
                problems[folder] = f"{entry.path}: {folder} is no folder"
    if problems:
        raise _refused(file, list(problems.values()))


def _needed(
    entries: Mapping[str, Entry], places: Mapping[str, Path], manifest: dict[str, Any]
) -> dict[str, Entry]:
    """What isn't there, or is there with other bytes."""
    verified = {}
    for repo in _repos(manifest):
        here = CachedRepo(places[verify.HUB], repo["kind"], repo["id"])
        for blob, seen in here.record().verified.items():
            verified[here.blob(blob)] = seen
    return {
        path: entry
        for path, entry in entries.items()
        if not _is_right(entry, verify.target(path, places), verified)
    }


def _is_right(entry: Entry, file: Path, verified: Mapping[Path, tuple[int, int]]) -> bool:
    # The name says the hash, and the record that the bytes were seen to have it.
    if verify.blob_of(entry.path) == entry.sha256 and file.is_file():
        seen = stamp(file)
        if seen[0] == entry.size and verified.get(file) == seen:
            return True
    return verify.wrong_on_disk(entry, file) is None


def _check_left_out(file: Path, lacking: Sequence[Entry], places: Mapping[str, Path]) -> None:
    if not lacking:
        return
    lines = [
        str(entry.says(f"left out of this bundle, and not in {verify.target(entry.path, places)}"))
        for entry in lacking
    ]
    raise _refused(file, lines, "import the bundle that it was made against first")


@contextmanager
def _made(roots: Sequence[Path]) -> Iterator[None]:
    """The caches' folders, made where they aren't there, and unmade if nothing came of it."""
    ways = {folder for root in roots for folder in (root, *root.parents)}
    new = sorted((folder for folder in ways if not folder.exists()), reverse=True)
    for root in roots:
        root.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def _check_room(needed: Mapping[str, Entry], places: Mapping[str, Path]) -> None:
    sizes: dict[Path, int] = {}
    for entry in needed.values():
        root = places[entry.path.partition("/")[0]]
        size = _SLACK if entry.link is not None else entry.size + _SLACK
        sizes[root] = sizes.get(root, 0) + size
    check_space(sizes)


def _bring(
    file: Path,
    manifest: bytes,
    needed: Mapping[str, Entry],
    aside: Mapping[str, Path],
    moved: Moved,
) -> None:
    """Unpack what is needed into the folders aside, and check the whole archive meanwhile."""

    def keep(name: str) -> BinaryIO | None:
        if name not in needed and not name.endswith(f"/{verify.RECORD}"):
            return None
        staged = verify.target(name, aside)
        staged.parent.mkdir(parents=True, exist_ok=True)
        return staged.open("wb")

    report = verify.check_archive(file, keep, moved)
    problems = [str(problem) for problem in report.problems]
    if not problems and report.manifest_sha256 != hashlib.sha256(manifest).hexdigest():
        problems = ["changed while it was read"]
    if problems:
        raise _refused(file, problems)


def _put(path: str, places: Mapping[str, Path], aside: Mapping[str, Path]) -> None:
    final = verify.target(path, places)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(verify.target(path, aside), final)


def _land_repository(
    listed: dict[str, Any],
    needed: Mapping[str, Entry],
    places: Mapping[str, Path],
    aside: Mapping[str, Path],
) -> list[Landed]:
    root = verify.folder_of(listed["kind"], listed["id"])
    repo = CachedRepo(places[verify.HUB], listed["kind"], listed["id"])
    files = {f"{root}/{file['path']}": file for file in listed["files"]}
    staged = {path: file for path, file in files.items() if path in needed}
    for path in staged:
        if verify.blob_of(path):
            _put(path, places, aside)
    for path, file in staged.items():
        if "link" in file:
            beside = verify.target(path, aside)
            beside.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file["link"], beside)
            _put(path, places, aside)
    with lock(repo, RECORD):
        _land_names(listed, repo, CachedRepo(aside[verify.HUB], repo.kind, repo.repo_id), staged)
    return _rows(repo, files, staged)


def _land_names(
    listed: dict[str, Any], repo: CachedRepo, staged: CachedRepo, new: Mapping[str, object]
) -> None:
    """Lists of files, forgelm's record, and last what names commits."""
    for path in new:
        commit = path.rpartition("/")[2].removesuffix(".json")
        # A list that says the same in other bytes is right.
        if "/trees/" in path and staged.tree(commit) not in (None, repo.tree(commit)):
            repo.tree_file(commit).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged.tree_file(commit), repo.tree_file(commit))
    paths = [file["path"].partition("/") for file in listed["files"]]
    blobs = [name for top, _, name in paths if top == "blobs"]
    before, theirs = repo.record(), _given(staged)
    merged = Record(
        {**before.revisions, **theirs.revisions},
        {**before.wanted, **{c: _both(before, c, w) for c, w in theirs.wanted.items()}},
        {**before.verified, **{name: stamp(repo.blob(name)) for name in blobs}},
        theirs.licence or listed["licence"] or before.licence,
        {c: files for c, files in before.begun.items() if c not in theirs.wanted},
    )
    if merged != before:
        repo.write_record(merged)
    for name, commit in listed["commits"].items():
        if name != commit:
            _name(repo, name, commit)


def _both(before: Record, commit: str, wanted: list[str] | None) -> list[str] | None:
    """All files asked for of a commit, here or where the bundle was made; None: all there are."""
    if commit not in before.wanted:
        return wanted
    here = before.wanted[commit]
    return None if here is None or wanted is None else sorted({*here, *wanted})


def _given(staged: CachedRepo) -> Record:
    """The record that the bundle carries; empty where it has none, or none that can be read."""
    found = staged.record()
    try:
        sound = all(
            isinstance(one, str) for pair in found.revisions.items() for one in pair
        ) and all(
            names is None or all(isinstance(name, str) for name in names)
            for names in found.wanted.values()
        )
    except (AttributeError, TypeError):
        sound = False
    return found if sound and isinstance(found.licence, str | None) else Record()


def _name(repo: CachedRepo, name: str, commit: str) -> None:
    ref = repo.ref(name)
    before = ref.read_text().strip() if ref.is_file() else commit
    if before != commit:
        log.warning(f"{repo.kind} {repo.repo_id}: {name} was {before}, is now {commit}")
    if before != commit or not ref.is_file():
        write_text(ref, commit)


def _rows(
    repo: CachedRepo, files: Mapping[str, dict[str, Any]], staged: Mapping[str, object]
) -> list[Landed]:
    rows = []
    root = verify.folder_of(repo.kind, repo.repo_id)
    snapshots: dict[str, dict[str, dict[str, Any]]] = {}
    for path, file in files.items():
        if "link" in file:
            commit = file["path"].split("/")[1]
            snapshots.setdefault(commit, {})[path] = file
    for commit, links in sorted(snapshots.items()):
        new = 0
        blobs: dict[str, int] = {}
        for path, file in links.items():
            blob = f"{root}/blobs/{file['link'].rpartition('/')[2]}"
            blobs[blob] = file["size"]
            new += path in staged or blob in staged
        rows.append(Landed(repo.kind, repo.repo_id, commit, len(links), new, sum(blobs.values())))
    return rows


def _land_tree(
    top: str,
    entries: Mapping[str, Entry],
    needed: Mapping[str, Entry],
    places: Mapping[str, Path],
    aside: Mapping[str, Path],
) -> None:
    """A prepared data set that isn't there comes as a whole; of others what is wrong, file by file.

    In a folder that is there, the file that says what it holds comes last.
    """
    whole = []
    for path in sorted(entries):
        folder, _, name = path.rpartition("/")
        if top == verify.DATASETS and name == PREPARED and path in needed:
            final = verify.target(folder, places)
            final.parent.mkdir(parents=True, exist_ok=True)
            # Not over a folder that was prepared here in the meantime.
            with suppress(OSError):
                os.rename(verify.target(folder, aside), final)
                whole.append(f"{folder}/")
    rest = [path for path in needed if path.startswith(f"{top}/")]
    for path in sorted(rest, key=lambda path: (path.endswith(f"/{PREPARED}"), path)):
        if not path.startswith(tuple(whole)):
            _put(path, places, aside)


def _touch(
    manifest: dict[str, Any], needed: Mapping[str, Entry], places: Mapping[str, Path]
) -> None:
    """Of several preparations of a data set offline loading takes the one changed last."""
    for path in manifest["latest"]:
        config = path.rsplit("/", 2)[0]
        if any(one.startswith(f"{config}/") for one in needed):
            with suppress(FileNotFoundError):
                os.utime(verify.target(path, places))


def exports(
    places: Mapping[str, Path], home: Path | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables to set so that Hugging Face's libraries look in `places`.

    `home`: the folder for HF_HOME that these are in, where they are in one.
    """
    found: dict[str, str] = {}

    def elsewhere(top: str) -> bool:
        return verify.default_places({**environment, **found})[top] != places[top]

    if home is not None and any(map(elsewhere, places)):
        found["HF_HOME"] = str(home)
    for name, top in (
        ("HF_HUB_CACHE", verify.HUB),
        ("HF_DATASETS_CACHE", verify.DATASETS),
        ("HF_EVALUATE_CACHE", verify.EVALUATE),
        ("HF_MODULES_CACHE", verify.MODULES),
    ):
        if elsewhere(top):
            found[name] = str(places[top])
    return found
