"""Check a bundle of caches. Needs Python 3.9 and nothing else: `python verify.py FILE.tar`.

A bundle is a plain tar archive that unpacks to a folder for HF_HOME:

    hub/KINDs--ORG--NAME/...    repositories, as the hub's client lays them out
    datasets/, evaluate/, modules/
    verify.py                   this file
    manifest.json               size and SHA-256 of every file above, links, commits, licences
    manifest.sha256             the manifest's own

Every byte is accounted for: headers are compared with those that `forgelm bundle` writes, padding
with zeros, contents with the manifest, blobs with the hashes that they are named by. So nothing but
regular files and links from a snapshot to a blob of its own repository passes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

FORMAT = 1
MANIFEST, SEAL, VERIFIER = "manifest.json", "manifest.sha256", "verify.py"
HUB, DATASETS, EVALUATE, MODULES = "hub", "datasets", "evaluate", "modules"
TREES = (DATASETS, EVALUATE, MODULES)
RECORD = ".forgelm.json"
EXIT_OK, EXIT_USAGE, EXIT_WRONG = 0, 1, 2

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_CHUNK = 1 << 20
_LARGEST_MANIFEST, _LARGEST_NAMES = 1 << 30, 1 << 20
_LARGEST_OCTAL = 8**11
_FIELDS = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x")
_PART = re.compile(r"(.+)\.part-(\d{3})")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_FEW = 10
_HEADER = "a header other than forgelm bundle writes"
_ODD = {
    b"1": "a hard link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
}
# What any other program that packs the same files puts into an archive.
_FOREIGN = (_HEADER, "a folder", "of type b'g'", "of type b'K'", "of type b'L'")
_BESIDE = (".sha256", f".{VERIFIER}")
_AUDIT_LOG = "audit_log.jsonl"
_ARCHIVE_OR_MANIFEST = f"the archive, its first part, or FILE.{MANIFEST}"
_PACKERS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, in words."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclass(frozen=True)
class Entry:
    """A file as the manifest has it.

    Attributes:
        size: in bytes; of what a link points to.
        link: where a link points, else None.
        left_out: it isn't in the archive: an earlier bundle carries it.
        what: how to call a blob, which is named by its hash.
    """

    path: str
    size: int
    sha256: str
    link: str | None = None
    left_out: bool = False
    what: str = ""

    def says(self, text: str) -> Problem:
        return Problem(f"{self.path} ({self.what})" if self.what else self.path, text)


@dataclass
class Report:
    """What checking found: how many files and bytes, and what is wrong."""

    files: int = 0
    size_bytes: int = 0
    manifest_sha256: str | None = None
    problems: list[Problem] = field(default_factory=list)


class Damaged(Exception):
    """The archive can't be read any further."""


class NotThere(Exception):
    """What was asked for can't be read at all."""


# The archive


@dataclass(frozen=True)
class Member:
    """A file in an archive; `odd` says why it is none that a bundle has."""

    name: str
    size: int
    link: str | None
    odd: str | None


def header(name: str, size: int, link: str | None = None) -> bytes:
    """The header of a regular file of `size` bytes, or of a link: POSIX tar, no times or owners."""
    records = {"path": name} if not _fits(name) else {}
    if link is not None and not _fits(link):
        records["linkpath"] = link
    if size >= _LARGEST_OCTAL:
        records["size"] = str(size)
    extended = b""
    if records:
        data = b"".join(_record(key, value) for key, value in records.items())
        extended = _block("pax_header", len(data), b"x", "") + data + padding(len(data))
    short = size if size < _LARGEST_OCTAL else 0
    return extended + _block(name, short, b"0" if link is None else b"2", link or "")


def padding(size: int) -> bytes:
    """The zeros that follow `size` bytes of content."""
    return bytes(-size % _BLOCK)


def end() -> bytes:
    """What an archive ends with."""
    return _END


def _fits(text: str) -> bool:
    return len(text) <= 100 and text.isascii()


def _record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def _block(name: str, size: int, kind: bytes, link: str) -> bytes:
    def pack(checksum: bytes) -> bytes:
        return _FIELDS.pack(
            name.encode("ascii", "replace")[:100],
            b"0000777" if kind == b"2" else b"0000644",
            b"0000000",
            b"0000000",
            b"%011o" % size,
            b"%011o" % 0,
            checksum,
            kind,
            link.encode("ascii", "replace")[:100],
            b"ustar\x0000",
            b"",
            b"",
            b"",
            b"",
            b"",
        )

    return pack(b"%06o\0 " % sum(pack(b" " * 8)))


class Archive:
    """The files of an archive, whole or in parts, read in one pass."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._ends = [path.stat().st_size for path in paths]
        self.size = sum(self._ends)
        self._place = 0
        self._part = -1
        self._file: BinaryIO | None = None
        self._left = 0

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def members(self) -> Iterator[Member]:
        """The files, in order; what `content` didn't give of one is skipped.

        Raises:
            Damaged: it is cut off, or something stands where a header should.
        """
        while True:
            start = self._place
            block = self._exactly(_BLOCK)
            if not any(block):
                if any(self._exactly(_BLOCK)) or self._read(1):
                    raise Damaged(f"something follows its end, at byte {start + _BLOCK}")
                return
            member, self._left = self._member(block, start)
            size = self._left
            yield member
            self._skip()
            if any(self._exactly(-size % _BLOCK)):
                raise Damaged(f"not zeros after {member.name}, before byte {self._place}")

    def content(self) -> Iterator[bytes]:
        """What is left of the present file, by the megabyte."""
        while self._left:
            chunk = self._read(min(self._left, _CHUNK))
            if not chunk:
                raise Damaged(self._cut())
            self._left -= len(chunk)
            yield chunk

    def _member(self, block: bytes, start: int) -> tuple[Member, int]:
        """What a header says, and how many bytes of content follow it."""
        raw, records = block, {}
        name, size, kind, link = _fields(block, start)
        if kind == b"x":
            if size > _LARGEST_NAMES:
                raise Damaged(f"a header of {size} bytes at byte {start}")
            data = self._exactly(size + -size % _BLOCK)
            records = _records(data[:size], start)
            block = self._exactly(_BLOCK)
            raw += data + block
            name, size, kind, link = _fields(block, start)
        name, link = records.get("path", name), records.get("linkpath", link)
        size = int(records.get("size", size))
        if size < 0:
            raise Damaged(f"a damaged header at byte {start}")
        if kind not in b"02":
            follows = 0 if kind in b"123456" else size
            return Member(name, 0, None, _ODD.get(kind, f"of type {kind!r}")), follows
        known = Member(name, 0, link, None) if kind == b"2" else Member(name, size, None, None)
        if header(known.name, known.size, known.link) != raw:
            known = Member(known.name, known.size, known.link, _HEADER)
        return known, known.size

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._read(count - len(data))
            if not more:
                raise Damaged(self._cut())
            data += more
        return data

    def _cut(self) -> str:
        return f"ends early, after {self._place} bytes: it was cut off, or parts are missing"

    def _skip(self) -> None:
        """Leave out what wasn't read of the present file."""
        self._place += self._left
        if self._place > self.size:
            self._place = self.size
            raise Damaged(self._cut())
        if self._left:
            self._part = -1
        self._left = 0

    def _read(self, count: int) -> bytes:
        while True:
            if self._part < 0 or self._file is None:
                self._open_at(self._place)
                if self._file is None:
                    return b""
            data = self._file.read(count)
            if data:
                self._place += len(data)
                return data
            if self._place >= self.size:
                return b""
            self._part = -1

    def _open_at(self, place: int) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        for part, size in enumerate(self._ends):
            if place < size:
                self._file = self._paths[part].open("rb", buffering=0)
                self._file.seek(place)
                self._part = part
                return
            place -= size


def _fields(block: bytes, start: int) -> tuple[str, int, bytes, str]:
    fields = _FIELDS.unpack(block)
    try:
        if int(fields[6].strip(b" \0"), 8) != sum(block) - sum(fields[6]) + 8 * 32:
            raise ValueError
        size = int(fields[4].strip(b" \0") or b"0", 8)
        name = fields[0].rstrip(b"\0").decode()
        if prefix := fields[14].rstrip(b"\0").decode():
            name = f"{prefix}/{name}"
        return name, size, fields[7], fields[8].rstrip(b"\0").decode()
    except ValueError:
        packer = next((by for first, by in _PACKERS.items() if block.startswith(first)), None)
        if packer is not None and start == 0:
            raise Damaged(f"was packed by {packer}; unpack it by that first") from None
        raise Damaged(f"a damaged header at byte {start}, or no archive") from None


def _records(data: bytes, start: int) -> dict[str, str]:
    found = {}
    try:
        while data:
            length = int(data.split(b" ", 1)[0])
            if not 0 < length <= len(data):
                raise ValueError
            record, data = data[:length], data[length:]
            key, value = record.split(b" ", 1)[1].rstrip(b"\n").decode().split("=", 1)
            found[key] = value
        if not found.get("size", "0").isdecimal():
            raise ValueError
    except (ValueError, IndexError):
        raise Damaged(f"a damaged header at byte {start}") from None
    return found


# The manifest


def parse(data: bytes) -> tuple[dict[str, Any], dict[str, Entry]]:
    """A manifest, and its files by their path in the archive.

    Raises:
        ValueError: it isn't one, or names what no bundle has; in words.
    """
    try:
        manifest = json.loads(data)
        version = manifest["format"]
        if version != FORMAT:
            raise _Odd(f"is of format {version}, this is for format {FORMAT}: use a newer one")
        entries = list(_entries(manifest))
        for repo in manifest["repositories"]:
            _check_names(repo)
        _check_latest(manifest["latest"])
    except _Odd as error:
        raise ValueError(str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"isn't a manifest ({type(error).__name__}: {error})") from None
    known = {entry.path: entry for entry in entries}
    if len(known) != len(entries):
        raise ValueError("names a file twice")
    for entry in entries:
        if problem := _unsafe_entry(entry, known):
            raise ValueError(f"{entry.path}: {problem}")
    _check_refs(manifest)
    return manifest, known


class _Odd(Exception):
    """A manifest that is one, but not as it should be."""


def folder_of(kind: str, repo_id: str) -> str:
    """A repository's folder in the archive."""
    return f"{HUB}/{kind}s--{repo_id.replace('/', '--')}"


def _entries(manifest: dict[str, Any]) -> Iterator[Entry]:
    for file in manifest["files"]:
        yield _entry("", file, "")
    for repo in manifest["repositories"]:
        root = folder_of(repo["kind"], repo["id"])
        names = {}
        for file in repo["files"]:
            if "link" in file:
                name = file["path"].split("/", 2)[-1]
                names[file["link"].rpartition("/")[2]] = f"{name} of {repo['kind']} {repo['id']}"
        for file in repo["files"]:
            is_blob = file["path"].startswith("blobs/")
            what = names.get(file["path"].partition("/")[2], "") if is_blob else ""
            yield _entry(f"{root}/", file, what)
    for tree in TREES:
        for file in manifest["trees"].get(tree, []):
            yield _entry(f"{tree}/", file, "")


def _entry(root: str, file: dict[str, Any], what: str) -> Entry:
    path, size, sha256, link = file["path"], file["size"], file["sha256"], file.get("link")
    for value, kind in ((path, str), (size, int), (sha256, str), (link or "", str)):
        if not isinstance(value, kind):
            raise _Odd(f"{path!r}: {value!r} isn't {kind.__name__}")
    if size < 0 or not _SHA256.fullmatch(sha256):
        raise _Odd(f"{path}: size {size}, SHA-256 {sha256!r}")
    return Entry(root + path, size, sha256, link, file.get("left_out") is True, what)


def _check_names(repo: dict[str, Any]) -> None:
    if repo["kind"] not in ("model", "dataset", "space") or not _ID.fullmatch(repo["id"]):
        raise _Odd(f"{repo['kind']!r} {repo['id']!r} is no repository")
    for name, commit in repo["commits"].items():
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise _Odd(f"{repo['kind']} {repo['id']}: {name} stands for {commit!r}, no commit")


def _check_latest(latest: list[str]) -> None:
    for path in latest:
        if unsafe(path) or not path.startswith(f"{DATASETS}/"):
            raise _Odd(f"{path!r} is no prepared data set")


def _check_refs(manifest: dict[str, Any]) -> None:
    """A ref is read as a folder's name: it may hold the commit that the manifest says alone."""
    for repo in manifest["repositories"]:
        for file in repo["files"]:
            top, _, name = file["path"].partition("/")
            commit = repo["commits"].get(name, "")
            if top == "refs" and hashlib.sha256(commit.encode()).hexdigest() != file["sha256"]:
                raise ValueError(f"{repo['id']}: refs/{name} holds no commit of the manifest's")


def unsafe(path: str) -> str | None:
    """Why a path can't be that of a file in a bundle; None: it can."""
    parts = path.split("/")
    if path.startswith("/"):
        return "unsafe: an absolute path"
    if ".." in parts:
        return "unsafe: leaves the target"
    if "" in parts or "." in parts or "\\" in path or any(ord(sign) < 32 for sign in path):
        return "unsafe: not a plain path"
    if path not in (MANIFEST, SEAL, VERIFIER) and (
        parts[0] not in (HUB, *TREES) or len(parts) < (3 if parts[0] == HUB else 2)
    ):
        return f"unsafe: neither in {HUB}/ nor in {', '.join(f'{tree}/' for tree in TREES)}"
    return None


def _unsafe_entry(entry: Entry, known: Mapping[str, Entry]) -> str | None:
    if reason := unsafe(entry.path):
        return reason
    parts = entry.path.split("/")
    for depth in range(1, len(parts)):
        if "/".join(parts[:depth]) in known:
            return "unsafe: lies below a file or a link"
    if parts[0] == HUB and not _belongs(parts):
        return "unsafe: no part of a repository in the hub's cache"
    if parts[0] == HUB and parts[2] == "snapshots" and entry.link is None:
        return "unsafe: a snapshot's file is a link to a blob"
    if entry.link is None:
        return _misnamed(entry)
    blob = known.get("/".join((*parts[:2], "blobs", entry.link.rpartition("/")[2])))
    if unsafe_link(entry.path, entry.link) or blob is None or blob.link is not None:
        return f"unsafe: a link to {entry.link}, not to a blob of its repository"
    if (blob.size, blob.sha256) != (entry.size, entry.sha256):
        return "a link to a blob of another size or SHA-256"
    return None


def _belongs(parts: Sequence[str]) -> bool:
    inside, depth = parts[2], len(parts)
    if inside == "snapshots":
        return depth > 4 and bool(_COMMIT.fullmatch(parts[3]))
    fixed = {"blobs": 4, "trees": 4, RECORD: 3}
    return depth == fixed[inside] if inside in fixed else inside == "refs" and depth > 3


def unsafe_link(path: str, link: str) -> bool:
    """Whether a link is any other than one from a snapshot to a blob of its own repository."""
    parts = path.split("/")
    up = "../" * (len(parts) - 3)
    inside = len(parts) > 4 and parts[0] == HUB and parts[2] == "snapshots"
    name = link.rpartition("/")[2]
    return not inside or name in ("", ".", "..") or link != f"{up}blobs/{name}"


def _misnamed(entry: Entry) -> str | None:
    name = blob_of(entry.path)
    if name and _SHA256.fullmatch(name) and name != entry.sha256:
        return f"its SHA-256 is {entry.sha256}, not what it is named by"
    return None


def blob_of(path: str) -> str | None:
    """A blob's name, None for any other file."""
    parts = path.split("/")
    return parts[3] if parts[0] == HUB and len(parts) == 4 and parts[2] == "blobs" else None


# Checking


@dataclass(frozen=True)
class _Seen:
    size: int
    sha256: str
    named: str | None
    link: str | None


Keep = Callable[[str], "BinaryIO | None"]
Moved = Callable[[int], None]


def find_parts(
    path: Path, give: str = _ARCHIVE_OR_MANIFEST
) -> tuple[Path, list[Path], list[Problem]]:
    """An archive's name without its part, its files in order, and what is wrong with these.

    `give`: what may be given instead of what isn't there.

    Raises:
        NotThere: there is no such archive; in words that say what to give instead.
    """
    if path.is_file() and (instead := _beside(path)):
        raise NotThere(f"{path}: {instead}")
    split = _PART.fullmatch(path.name)
    whole = path.with_name(split[1]) if split else path
    if not split and path.is_file():
        return whole, [path], []
    found = {
        int(match[2]): one
        for one in (whole.parent.iterdir() if whole.parent.is_dir() else ())
        if (match := _PART.fullmatch(one.name)) and match[1] == whole.name
    }
    if not found:
        raise NotThere(f"{path}: {_no_archive(path, give)}")
    listed = [_PART.fullmatch(name) for name in sums_beside(whole)]
    numbers = {int(match[2]) for match in listed if match} or set(range(max(found) + 1))
    problems = [
        Problem(f"{whole.name}.part-{number:03d}", "missing: this part isn't here")
        for number in sorted(numbers - set(found))
    ]
    problems += [
        Problem(found[number].name, "extra: not a part of this archive")
        for number in sorted(set(found) - numbers)
    ]
    return whole, [found[number] for number in sorted(found)], problems


def _beside(path: Path) -> str | None:
    """What a file is that can be taken for an archive; None: it may be one."""
    if path.name == _AUDIT_LOG:
        return f"an audit log; forgelm verify-audit {path} checks it"
    for suffix in (*_BESIDE, f".{MANIFEST}"):
        if path.name.endswith(suffix) and path.name != suffix:
            return f"lies beside an archive; give that: {path.with_name(path.name[: -len(suffix)])}"
    return None


def _no_archive(path: Path, give: str) -> str:
    """What stands where an archive should, and what to give instead."""
    if not path.is_dir():
        return f"no such file; give {give}"
    if (path / MANIFEST).is_file():
        return (
            f"a folder that a bundle was unpacked in; give {path / MANIFEST} with "
            f"--cache-dir {path}"
        )
    beside = sorted(one.name for one in path.iterdir() if one.name.endswith(f".{MANIFEST}"))
    if beside:
        return f"a folder; give the archive in it: {path / beside[0][: -len(MANIFEST) - 1]}"
    if next(path.iterdir(), None) is None:
        return f"an empty folder; give {give}"
    return f"a folder; give {give} (a cache is checked by forgelm doctor --offline)"


def sums_beside(archive: Path) -> dict[str, str]:
    """What the file FILE.sha256 beside an archive says: names and hashes; empty without one."""
    try:
        lines = archive.with_name(f"{archive.name}.sha256").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    return {line[66:]: line[:64] for line in lines if _SHA256.fullmatch(line[:64])}


class Members:
    """An archive's members as they are met; which of them no bundle has, and why."""

    def __init__(self, archive: str) -> None:
        self._archive = archive
        self._count = 0
        self._foreign: list[Problem] = []
        self._others: list[Problem] = []

    def allowed(self, member: Member, seen: Container[str]) -> bool:
        """Whether a bundle may have it; `seen`: the names before it."""
        self._count += 1
        problem = odd_member(member, seen)
        if problem is None:
            return True
        # Also by a name such as ./hub/..., which any other is refused for.
        harmless = problem == f"unsafe: {member.odd}" or member.name.startswith("./")
        foreign = harmless and member.odd in _FOREIGN
        (self._foreign if foreign else self._others).append(Problem(member.name, problem))
        return False

    @property
    def repacked(self) -> bool:
        """Whether it looks as if another program had packed it."""
        return 2 * len(self._foreign) > self._count

    def problems(self) -> list[Problem]:
        if not self.repacked:
            return [*self._others, *self._foreign]
        text = (
            f"looks repacked: {len(self._foreign)} of {self._count} headers aren't those that "
            "forgelm bundle writes (owners, times, folders); carry the archive that it wrote, as "
            "it is, or unpack this one and check the folder by the manifest"
        )
        return [Problem(self._archive, text), *self._others]


def few(lines: Sequence[str]) -> list[str]:
    """The first lines of a list, and how many more there are."""
    more = len(lines) - _FEW
    return [*lines] if more <= 1 else [*lines[:_FEW], f"and {more} more"]


def check_archive(
    path: Path, keep: Keep = lambda name: None, moved: Moved = lambda count: None
) -> Report:
    """Read an archive once, and compare all of it with its manifest.

    `keep` is asked for each regular file where its content goes, and may return None; the file is
    written before it is known whether it is right. `moved` is told how many more bytes were read.

    Raises:
        NotThere: there is no such archive.
        OSError: it can't be read.
    """
    whole, paths, problems = find_parts(path)
    report = Report(problems=problems)
    if problems:
        return report
    seen: dict[str, _Seen] = {}
    own: dict[str, bytes] = {}
    members = Members(whole.name)
    with Archive(paths) as archive:
        try:
            for member in archive.members():
                if members.allowed(member, seen):
                    seen[member.name] = _read(archive, member, keep, own, moved)
        except Damaged as error:
            report.problems += members.problems()
            # What other programs pack ends in another way too.
            if not members.repacked:
                report.problems.append(Problem(whole.name, str(error)))
            return report
    report.problems += members.problems()
    if members.repacked:
        return report
    report.files = len(seen)
    report.size_bytes = sum(file.size for file in seen.values())
    _check_seen(seen, own, sums_beside(whole).get(f"{whole.name}.{MANIFEST}"), report)
    return report


def odd_member(member: Member, seen: Container[str]) -> str | None:
    """Why a file is none that a bundle has; None: it may be one."""
    if member.odd in _ODD.values():
        return f"unsafe: {member.odd}"
    if reason := unsafe(member.name):
        return reason
    if member.link is not None and unsafe_link(member.name, member.link):
        return f"unsafe: a link to {member.link}, not to a blob of its repository"
    if member.name in seen:
        return "unsafe: twice in the archive"
    if member.name == MANIFEST and member.size > _LARGEST_MANIFEST:
        return f"unsafe: {member.size} bytes are no manifest"
    return f"unsafe: {member.odd}" if member.odd else None


def _read(
    archive: Archive, member: Member, keep: Keep, own: dict[str, bytes], moved: Moved
) -> _Seen:
    if member.link is not None:
        return _Seen(0, "", None, member.link)
    total, name = hashlib.sha256(), blob_of(member.name)
    git = None
    if name and _COMMIT.fullmatch(name):
        git = hashlib.sha1(b"blob %d\0" % member.size, usedforsecurity=False)
    sink = keep(member.name)
    kept = []
    try:
        for chunk in archive.content():
            total.update(chunk)
            moved(len(chunk))
            if git is not None:
                git.update(chunk)
            if sink is not None:
                sink.write(chunk)
            if member.name in (MANIFEST, SEAL):
                kept.append(chunk)
    finally:
        if sink is not None:
            sink.close()
    if member.name in (MANIFEST, SEAL):
        own[member.name] = b"".join(kept)
    return _Seen(member.size, total.hexdigest(), git.hexdigest() if git else None, None)


def _check_seen(
    seen: Mapping[str, _Seen], own: Mapping[str, bytes], sidecar: str | None, report: Report
) -> None:
    if MANIFEST not in own:
        report.problems.append(Problem(MANIFEST, "missing: this is no bundle"))
        return
    report.manifest_sha256 = seen[MANIFEST].sha256
    if own.get(SEAL) != seal(report.manifest_sha256):
        report.problems.append(
            Problem(MANIFEST, f"differs: {SEAL} doesn't name it, or is missing or differs itself")
        )
    if sidecar not in (None, report.manifest_sha256):
        report.problems.append(
            Problem(MANIFEST, f"differs: the file beside the archive says SHA-256 {sidecar}")
        )
    try:
        _, entries = parse(own[MANIFEST])
    except ValueError as error:
        report.problems.append(Problem(MANIFEST, str(error)))
        return
    for path, entry in entries.items():
        if (problem := _differs(entry, seen.get(path))) is not None:
            report.problems.append(entry.says(problem))
    for path in sorted(set(seen) - set(entries) - {MANIFEST, SEAL}):
        report.problems.append(Problem(path, "extra: not in the manifest"))


def seal(manifest_sha256: str) -> bytes:
    """The content of `manifest.sha256`, as sha256sum reads it."""
    return f"{manifest_sha256}  {MANIFEST}\n".encode()


def _differs(entry: Entry, seen: _Seen | None) -> str | None:
    if seen is None:
        return None if entry.left_out else "missing: in the manifest, not in the archive"
    if entry.left_out:
        return "extra: the manifest says that it was left out"
    if (entry.link, seen.link) != (None, None):
        return None if entry.link == seen.link else f"differs: a link to {seen.link}"
    if (entry.size, entry.sha256) != (seen.size, seen.sha256):
        return _says(entry, seen.size, seen.sha256)
    if seen.named is not None and seen.named != blob_of(entry.path):
        return f"differs: git's hash of it is {seen.named}, not what it is named by"
    return None


def _says(entry: Entry, size: int, sha256: str) -> str:
    if size != entry.size:
        return f"differs: {size} bytes, the manifest says {entry.size}"
    return f"differs: its SHA-256 is {sha256}, the manifest says {entry.sha256}"


def default_places(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Where Hugging Face's libraries look for what lies in each folder of a bundle."""
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{cache}/huggingface"
    hub = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    given = {
        HUB: hub or f"{home}/{HUB}",
        DATASETS: environment.get("HF_DATASETS_CACHE") or f"{home}/{DATASETS}",
        EVALUATE: environment.get("HF_EVALUATE_CACHE") or f"{home}/{EVALUATE}",
        MODULES: environment.get("HF_MODULES_CACHE") or f"{home}/{MODULES}",
    }
    return {
        name: Path(os.path.expandvars(path)).expanduser().absolute() for name, path in given.items()
    }


def places_in(folder: Path) -> dict[str, Path]:
    """The same below a folder that a bundle was unpacked in, or that is to be HF_HOME."""
    return {name: folder.absolute() / name for name in (HUB, *TREES)}


def is_unpacked(folder: Path) -> bool:
    """Whether a bundle was unpacked there, as opposed to a cache of the hub's client."""
    return any((folder / name).is_dir() for name in (HUB, *TREES))


def check_folder(path: Path, places: Mapping[str, Path], whole: bool) -> Report:
    """Compare what lies in `places` with the manifest `path`.

    `whole`: a bundle was unpacked there and nothing else is. Else it is a cache in use, which may
    hold more; forgelm's record and the hub's lists of files go their own way in it.

    Raises:
        NotThere: there is no such manifest.
        OSError: it can't be read.
    """
    if not path.is_file():
        raise NotThere(f"{path}: {_no_archive(path, _ARCHIVE_OR_MANIFEST)}")
    data = path.read_bytes()
    report = Report(manifest_sha256=hashlib.sha256(data).hexdigest())
    try:
        _, entries = parse(data)
    except ValueError as error:
        report.problems.append(Problem(path.name, str(error)))
        return report
    for entry in entries.values():
        parts = entry.path.split("/")
        if not whole and (parts[0] not in places or parts[2:3] in ([RECORD], ["trees"])):
            continue
        file = target(entry.path, places)
        report.files += 1
        if entry.link is None:
            report.size_bytes += entry.size
        if (problem := wrong_on_disk(entry, file)) is not None:
            report.problems.append(entry.says(problem))
    if whole:
        report.problems += _extra(entries, places)
    return report


def target(path: str, places: Mapping[str, Path]) -> Path:
    """Where a file of a bundle lies, once it is unpacked."""
    top, _, inside = path.partition("/")
    return places[top] / inside if top in places else places[HUB].parent / path


def wrong_on_disk(entry: Entry, file: Path) -> str | None:
    """Why a file isn't as the manifest has it; None: it is."""
    if not file.exists():
        return f"missing: not at {file}"
    if not file.is_file():
        return f"differs: {file} is no file"
    if entry.link is not None and file.is_symlink() and os.readlink(file) == entry.link:
        # Its blob is compared by itself.
        return None
    size = file.stat().st_size
    sha256 = sha256_of(file) if size == entry.size else ""
    return None if sha256 == entry.sha256 else _says(entry, size, sha256)


def sha256_of(file: Path) -> str:
    total = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        while chunk := opened.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def _extra(entries: Mapping[str, Entry], places: Mapping[str, Path]) -> Iterator[Problem]:
    for top in sorted(places):
        for folder, folders, files in os.walk(places[top]):
            folders.sort()
            links = [name for name in folders if Path(folder, name).is_symlink()]
            for name in sorted([*files, *links]):
                path = f"{top}/{Path(folder, name).relative_to(places[top]).as_posix()}"
                if path not in entries:
                    yield Problem(path, "extra: not in the manifest")


# The script


def is_manifest(path: Path) -> bool:
    return path.suffix == ".json"


def check(path: Path, cache_dir: Path | None, datasets_cache: Path | None) -> Report:
    """Check an archive (or its first part), or by a manifest what was unpacked or imported.

    Raises:
        NotThere: there is nothing to check.
        OSError: it can't be read.
    """
    folders = {"--cache-dir": cache_dir, "--datasets-cache": datasets_cache}
    for flag, folder in folders.items():
        if folder is not None and not is_manifest(path) and path.exists():
            raise NotThere(
                f"{flag} {folder}: goes with a manifest; give {path.name}.{MANIFEST}, or no {flag}"
            )
        if folder is not None and not folder.is_dir():
            raise NotThere(f"{flag} {folder}: no such folder")
    if cache_dir is not None and next(cache_dir.iterdir(), None) is None:
        raise NotThere(f"--cache-dir {cache_dir}: an empty folder; give the one with the files")
    if not is_manifest(path):
        return check_archive(path)
    whole = cache_dir is not None and datasets_cache is None and is_unpacked(cache_dir)
    if cache_dir is not None and whole:
        return check_folder(path, places_in(cache_dir), True)
    given = {HUB: cache_dir, DATASETS: datasets_cache}
    chosen = {name: folder.absolute() for name, folder in given.items() if folder is not None}
    return check_folder(path, {**default_places(), **chosen}, False)


def a_path(text: str) -> Path:
    """A path that an option names; an empty one (of an unset variable) isn't the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no path; is a variable not set?")
    return Path(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the script and `forgelm verify` both take."""
    parser.add_argument(
        "file", metavar="FILE", type=a_path, help="the archive, its first part, or its manifest"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=a_path,
        help="with a manifest: the folder that the bundle was unpacked in, or the hub's cache "
        "that it was imported into (default: HF_HUB_CACHE, else HF_HOME/hub)",
    )
    parser.add_argument(
        "--datasets-cache",
        metavar="DIR",
        type=a_path,
        help="with a manifest: the cache of data sets that it was imported into "
        "(default: HF_DATASETS_CACHE, else HF_HOME/datasets)",
    )


def result_of(report: Report) -> dict[str, Any]:
    """What is printed as JSON."""
    return {
        "files": report.files,
        "size_bytes": report.size_bytes,
        "manifest_sha256": report.manifest_sha256,
        "problems": [{"path": one.path, "problem": one.problem} for one in report.problems],
    }


def text_of(result: Mapping[str, Any]) -> str:
    """What is printed as text when all is right."""
    return (
        f"{result['files']} files, {result['size_bytes'] / 2**20:.2f} MiB: all as the manifest "
        f"says\nSHA-256 of the manifest: {result['manifest_sha256']}"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"verify.py: {message}; see --help", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def main(argv: Sequence[str]) -> int:
    parser = _Parser(prog="verify.py", description="Check a bundle of caches.")
    add_options(parser)
    parser.add_argument("--output-format", choices=("text", "json"), default="text")
    arguments = parser.parse_args(list(argv))
    as_json = arguments.output_format == "json"
    try:
        report = check(arguments.file, arguments.cache_dir, arguments.datasets_cache)
    except (NotThere, OSError) as error:
        if as_json:
            kind = type(error).__name__
            print(json.dumps({"success": False, "error": str(error), "error_class": kind}))
        print(f"verify.py: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, NotThere) else EXIT_WRONG
    result = result_of(report)
    if as_json:
        print(json.dumps({"success": not report.problems, **result}, indent=2))
    elif not report.problems:
        print(text_of(result))
    for line in few([str(problem) for problem in report.problems]):
        print(f"verify.py: {line}", file=sys.stderr)
    return EXIT_WRONG if report.problems else EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
