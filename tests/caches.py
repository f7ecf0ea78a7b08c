"""Caches as the hub's client and `datasets` leave them, written without either."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

OLD, NEW, DATA = "a" * 40, "c" * 40, "d" * 40
CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
WEIGHTS = bytes(range(256)) * 40
MODEL = {"README.md": CARD, "config.json": b"{}", "model.safetensors": WEIGHTS, "sub/a.txt": b"a"}
PREPARED = "org___rows/default/0.0.0"
JUNK = (
    "hub/CACHEDIR.TAG",
    "hub/audit_log.jsonl",
    "hub/audit_log.head.json",
    "hub/.locks/models--org--tiny/x.lock",
    "hub/.forgelm-left/models--org--tiny/blobs/x",
    "hub/models--org--tiny/blobs/0a.incomplete",
    "hub/models--org--tiny/blobs/unused",
    "hub/models--org--tiny/.no_exist/x/y.json",
    f"hub/models--org--tiny/snapshots/{NEW}/.config.json.1234.link",
    f"hub/models--org--tiny/snapshots/{NEW}/.README.md.ab12.part",
    "datasets/_cache_org___rows.lock",
    "datasets/audit_log.jsonl",
    f"datasets/{PREPARED}/{DATA}_builder.lock",
    f"datasets/{PREPARED}/{DATA}.incomplete/data.arrow",
    f"datasets/{PREPARED}/{DATA}/tmpab12cd34",
    "modules/evaluate_modules/__pycache__/x.pyc",
)


@dataclass(frozen=True)
class Cache:
    """A folder for HF_HOME."""

    home: Path

    @property
    def hub(self) -> Path:
        return self.home / "hub"

    def repo(self, kind: str, repo_id: str) -> Path:
        return self.hub / f"{kind}s--{repo_id.replace('/', '--')}"

    def add(
        self,
        kind: str,
        repo_id: str,
        files: dict[str, bytes],
        commit: str,
        *,
        ref: str | None = "main",
        tree: bool = True,
        form: str = "links",
    ) -> Path:
        """A snapshot whose files are `links`, links to an absolute path (`absolute`), links by
        way of the blobs that repositories share (`shared`), or no links at all (`copies`)."""
        folder = self.repo(kind, repo_id)
        listed = {}
        for path, data in files.items():
            large = path.endswith((".safetensors", ".parquet"))
            git = git_hash(data)
            name = hashlib.sha256(data).hexdigest() if large else git
            listed[path] = {"size": len(data), "blob_id": git}
            if large:
                listed[path]["lfs_sha256"] = name
            file, blob = folder / "snapshots" / commit / path, folder / "blobs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if form == "copies":
                file.write_bytes(data)
                continue
            blob.parent.mkdir(parents=True, exist_ok=True)
            if form == "shared" and large:
                shared = self.hub / "blobs" / name[:2] / name
                shared.parent.mkdir(parents=True, exist_ok=True)
                shared.write_bytes(data)
                blob.unlink(missing_ok=True)
                blob.symlink_to(f"../../blobs/{name[:2]}/{name}")
            else:
                blob.write_bytes(data)
            up = "../" * (path.count("/") + 2)
            file.symlink_to(blob if form == "absolute" else f"{up}blobs/{name}")
        if ref is not None:
            put(folder / "refs" / ref, commit.encode())
        if tree:
            text = json.dumps({"format_version": 1, "files": listed})
            put(folder / "trees" / f"{commit}.json", text.encode())
        return folder

    def fill(self, form: str = "links") -> Cache:
        """A model with two commits, a data set raw and prepared, a metric's module."""
        self.add("model", "org/tiny", {**MODEL, "config.json": b"old"}, OLD, ref=None, form=form)
        self.add("model", "org/tiny", MODEL, NEW, form=form)
        self.add("dataset", "org/rows", {"train.parquet": b"rows" * 99}, DATA, form=form)
        self.prepare(DATA)
        put(self.home / "modules/evaluate_modules/metrics/f1.py", b"f1 = 1\n")
        return self

    def prepare(self, name: str, rows: bytes = b"arrow" * 99) -> Path:
        folder = self.home / "datasets" / PREPARED / name
        put(folder / "rows-train.arrow", rows)
        put(folder / "dataset_info.json", b"{}")
        return folder

    def add_junk(self) -> Cache:
        """What is never content."""
        for path in JUNK:
            put(self.home / path, b"junk")
        origin = {"original file path": str(self.home), "local file path": str(self.home)}
        path = self.home / "modules/evaluate_modules/metrics/f1.json"
        put(path, json.dumps(origin).encode())
        return self


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def contents(root: Path) -> dict[str, bytes | str]:
    """All files below a folder by path; of links where they point."""
    return {
        path.relative_to(root).as_posix(): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
