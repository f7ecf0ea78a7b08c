"""Caches packed into one archive: the same content gives the same bytes, wherever it lay."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from forgelm.airgap import verify
from forgelm.airgap.contents import Contents, File, Repository
from forgelm.airgap.staging import check_space, disk_errors, staging
from forgelm.errors import ConfigError, RunError
from forgelm.hubcache import chunks, hasher
from forgelm.run.files import flush, flush_folder, readable

MOST_PARTS = 1000
_HEADER = 2048
_BUFFER = 1 << 20

Moved = Callable[[int], None]


@dataclass(frozen=True)
class Packed:
    """A bundle that was written.

    Attributes:
        files: the archive, or its parts in order.
        size_bytes: of these together.
        manifest: as it is in the archive.
        left_out: how many files an earlier bundle carries.
    """

    files: list[Path]
    size_bytes: int
    manifest: dict[str, Any]
    manifest_sha256: str
    left_out: int


def bundle(
    contents: Contents,
    output: Path,
    part_size: int | None = None,
    earlier: dict[str, str] | None = None,
    moved: Moved = lambda count: None,
) -> Packed:
    """Write contents into the archive `output`, with its manifest, hashes and verifier beside it.

    Args:
        part_size: split it into files of so many bytes.
        earlier: SHA-256 by path of what an earlier bundle carries: it is left out.
        moved: told how many more bytes were read.

    Raises:
        ConfigError: there would be too many parts.
        RunError: something can't be packed, by name; or the disk is full. Nothing is left then.
    """
    if contents.problems:
        raise RunError("\n".join(contents.problems))
    earlier = earlier or {}
    total = _total(contents, earlier)
    if part_size is not None and total > MOST_PARTS * part_size:
        raise ConfigError(
            f"--part-size of {part_size} bytes would make more than {MOST_PARTS} parts of "
            f"{total} bytes; give a larger one"
        )
    check_space({output.parent: total})
    with disk_errors(output), staging(output.parent) as aside:
        with _Output(aside / output.name, part_size) as out:
            packer = _Packer(out, earlier, moved)
            packer.pack(contents)
            if packer.problems:
                raise RunError("\n".join(packer.problems))
            manifest = _manifest(contents, packer)
            data = _json(manifest)
            digest = hashlib.sha256(data).hexdigest()
            out.add(verify.MANIFEST, data)
            out.add(verify.SEAL, verify.seal(digest))
            out.write(verify.end())
        sums = {path.name: sha256 for path, sha256 in out.files}
        files = _place(output, aside, sums, data, digest)
    size = sum(path.stat().st_size for path in files)
    return Packed(files, size, manifest, digest, packer.left_out)


def _total(contents: Contents, earlier: dict[str, str]) -> int:
    """At most how large the archive becomes, with what lies beside it."""
    files = [file for file in contents.files() if file.path not in earlier]
    links = sum(len(repo.links) for repo in contents.repositories)
    fixed = 2 * len(_verifier()) + _HEADER
    return fixed + sum(file.size + _HEADER for file in files) + links * _HEADER


def _place(
    output: Path, aside: Path, sums: dict[str, str], manifest: bytes, digest: str
) -> list[Path]:
    """Move what was written into place; an earlier bundle of this name goes as a whole."""
    beside = {
        f"{output.name}.{verify.MANIFEST}": manifest,
        f"{output.name}.{verify.VERIFIER}": _verifier(),
    }
    names = {**sums, f"{output.name}.{verify.MANIFEST}": digest}
    names[f"{output.name}.{verify.VERIFIER}"] = hashlib.sha256(_verifier()).hexdigest()
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in names.items())
    beside[f"{output.name}.sha256"] = lines.encode()
    for name, data in beside.items():
        (aside / name).write_bytes(data)
    for name in (*sums, *beside):
        readable(aside / name)
        flush(aside / name)
    # First what says how many parts there are, last what says so anew.
    output.with_name(f"{output.name}.sha256").unlink(missing_ok=True)
    for stale in (output, *output.parent.glob(f"{_literal(output.name)}.part-[0-9][0-9][0-9]")):
        if stale.name not in sums:
            stale.unlink(missing_ok=True)
    for name in (*sums, *beside):
        os.replace(aside / name, output.with_name(name))
    flush_folder(output.parent)
    return [output.with_name(name) for name in sums]


def _literal(name: str) -> str:
    import glob

    return glob.escape(name)


def _verifier() -> bytes:
    return Path(verify.__file__).read_bytes()


def _json(manifest: dict[str, Any]) -> bytes:
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
    return text.encode() + b"\n"


def read_earlier(path: Path) -> dict[str, str]:
    """SHA-256 by path of the files that an earlier bundle carries, or that it was made against.

    Raises:
        ConfigError: `path` isn't a bundle's manifest.
    """
    try:
        _, entries = verify.parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--against {path}: {error.strerror}; give a manifest") from error
    except ValueError as error:
        raise ConfigError(f"--against {path}: {error}; give FILE.manifest.json") from error
    return {
        entry.path: entry.sha256
        for entry in entries.values()
        if verify.blob_of(entry.path) or entry.path.partition("/")[0] in verify.TREES
    }


class _Output:
    """An archive that is written, in one file or in parts, each hashed by a thread meanwhile."""

    def __init__(self, path: Path, part_size: int | None) -> None:
        self.files: list[tuple[Path, str]] = []
        self._path, self._part_size = path, part_size
        self._buffer = bytearray()
        self._file: BinaryIO | None = None
        self._room = 0
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bundle")
        self._hashing: Future[None] | None = None

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                self._close()
        finally:
            if self._file is not None:
                self._file.close()
            self._pool.shutdown()

    def add(self, path: str, data: bytes) -> None:
        """A whole file."""
        self.write(verify.header(path, len(data)))
        self.write(data)
        self.write(verify.padding(len(data)))

    def write(self, data: bytes) -> None:
        if not self._buffer and len(data) >= _BUFFER:
            self._out(data)
            return
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        self._out(data)

    def _out(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._file is None:
                self._open()
            assert self._file is not None
            count = len(view) if self._part_size is None else min(len(view), self._room)
            if self._hashing is not None:
                self._hashing.result()
            self._hashing = self._pool.submit(self._sha256.update, view[:count])
            self._file.write(view[:count])
            self._room -= count
            view = view[count:]
            if self._part_size is not None and not self._room:
                self._close()

    def _open(self) -> None:
        path = self._path
        if self._part_size is not None:
            path = path.with_name(f"{path.name}.part-{len(self.files):03d}")
            self._room = self._part_size
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()

    def _close(self) -> None:
        if self._file is None:
            return
        if self._hashing is not None:
            self._hashing.result()
        self._file.close()
        self.files.append((Path(self._file.name), self._sha256.hexdigest()))
        self._file = None


class _Packer:
    """Writes files and links, and remembers what it saw of each."""

    def __init__(self, out: _Output, earlier: dict[str, str], moved: Moved) -> None:
        self.sha256: dict[str, str] = {}
        self.skipped: set[str] = set()
        self.problems: list[str] = []
        self._out, self._earlier, self._moved = out, earlier, moved

    @property
    def left_out(self) -> int:
        return len(self.skipped)

    def pack(self, contents: Contents) -> None:
        links = {path: link for repo in contents.repositories for path, link in repo.links.items()}
        files = {file.path: file for file in contents.files()}
        for path in sorted([*files, *links]):
            if path in links:
                self._out.write(verify.header(path, 0, links[path]))
            else:
                self._add(files[path])
        self._add(File(verify.VERIFIER, _verifier(), len(_verifier())))

    def _add(self, file: File) -> None:
        if isinstance(file.source, bytes):
            self._out.add(file.path, file.source)
            self.sha256[file.path] = hashlib.sha256(file.source).hexdigest()
            return
        try:
            with file.source.open("rb", buffering=0) as opened:
                if file.path in self._earlier and self._same(file, opened):
                    self.skipped.add(file.path)
                    return
                self._out.write(verify.header(file.path, file.size))
                self._take(file, opened, self._out.write)
                self._out.write(verify.padding(file.size))
        except FileNotFoundError:
            self.problems.append(f"{file.source}: gone while it was packed; run bundle again")

    def _same(self, file: File, opened: BinaryIO) -> bool:
        """Whether an earlier bundle carries these bytes; the file is read for that."""
        before = len(self.problems)
        self._take(file, opened, lambda data: None)
        opened.seek(0)
        if len(self.problems) == before and self.sha256[file.path] == self._earlier[file.path]:
            return True
        del self.problems[before:]
        return False

    def _take(self, file: File, opened: BinaryIO, write: Callable[[bytes], object]) -> None:
        """Hand a file's bytes on, as many as its header says, and see whether they are right."""
        total = hashlib.sha256()
        git = hasher(file.blob, file.size) if file.blob and len(file.blob) != 64 else None
        left = file.size
        for chunk in chunks(opened):
            data = chunk[:left]
            left -= len(data)
            total.update(data)
            if git is not None:
                git.update(data)
            write(data)
            self._moved(len(data))
            if len(data) < len(chunk):
                left = -1
                break
        if left:
            self.problems.append(f"{opened.name}: changed while it was packed; run bundle again")
        self.sha256[file.path] = total.hexdigest()
        found = (git or total).hexdigest()
        if file.blob and found != file.blob:
            self.problems.append(
                f"{file.what}: its bytes (hash {found}) aren't those that its blob's name, "
                f"{file.blob}, promises; {file.mend}"
            )


def _manifest(contents: Contents, packer: _Packer) -> dict[str, Any]:
    def listed(files: Sequence[File], root: str) -> list[dict[str, Any]]:
        return [
            {
                "path": file.path.removeprefix(f"{root}/"),
                "size": file.size,
                "sha256": packer.sha256[file.path],
                **({"left_out": True} if file.path in packer.skipped else {}),
            }
            for file in files
        ]

    def repository(repo: Repository) -> dict[str, Any]:
        files = listed(repo.files, repo.root)
        known = {file["path"]: file for file in files}
        for path, link in repo.links.items():
            blob = known["blobs/" + link.rpartition("/")[2]]
            name = path.removeprefix(f"{repo.root}/")
            same = {"size": blob["size"], "sha256": blob["sha256"]}
            files.append({"path": name, "link": link, **same})
        return {
            "kind": repo.repo.kind,
            "id": repo.repo.repo_id,
            "commits": repo.commits,
            "licence": repo.licence,
            "files": sorted(files, key=lambda file: str(file["path"])),
        }

    return {
        "format": verify.FORMAT,
        "files": listed([File(verify.VERIFIER, b"", len(_verifier()))], ""),
        "repositories": [repository(repo) for repo in contents.repositories],
        "trees": {
            top: sorted(listed(files, top), key=lambda file: str(file["path"]))
            for top, files in contents.trees.items()
        },
        "latest": contents.latest,
    }
