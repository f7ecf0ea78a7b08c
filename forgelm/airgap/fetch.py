"""Repositories from the hub into its cache, pinned to a commit, every byte checked.

The hub's own client takes a stale snapshot for an answer when the hub fails, and checks no bytes;
so what is wanted is resolved online first, and each file compared with the hub's hash of it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.airgap.transfer import INCOMPLETE, Line, patience_s, transfer
from forgelm.errors import ConfigError, ForgeError, RunError
from forgelm.hub import RECORD, explained, is_commit, lock
from forgelm.hubcache import CachedRepo, Entry, hash_of, stamp
from forgelm.run.files import HALF_WRITTEN, write_json, write_text

if TYPE_CHECKING:
    import httpx2

_OTHER_FORMATS = (
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "*.tflite",
    "*.mlmodel",
    "*.mlpackage/*",
    "onnx/*",
    "openvino/*",
    "coreml/*",
    "original/*",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SAFE = "*.safetensors"
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TREE_FORMAT = 1
_WORKERS = 8


@dataclass(frozen=True)
class Wanted:
    """A repository at a revision, or a part of it.

    Attributes:
        files: patterns (as of fnmatch) of the files that are wanted; None for all.
        for_torch: leaves out weights that transformers doesn't read where there are others.
    """

    kind: str
    repo_id: str
    revision: str = "main"
    files: tuple[str, ...] | None = None
    for_torch: bool = False

    @property
    def name(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.kind.replace('dataset', 'data set')} {self.repo_id}{at}"


@dataclass(frozen=True)
class Landed:
    """A repository that is in the cache, verified; `path` is its snapshot."""

    wanted: Wanted
    commit: str
    path: Path
    size_bytes: int
    duration_s: float


@dataclass(frozen=True)
class Missed:
    """A repository that isn't, or not whole."""

    wanted: Wanted
    error: ForgeError


class Progress:
    """Whom it is shown to, here nobody; called from several threads."""

    def begin(self, repositories: int, total: int) -> None:
        """So many repositories, with so many bytes that aren't known to be here."""

    def move(self, count: int) -> None:
        """So many more bytes are here (fewer, where negative)."""

    def say(self, text: str) -> None:
        """Something worth knowing happened."""

    def landed(self, wanted: Wanted) -> None:
        """A repository is in the cache, verified."""

    def end(self) -> None:
        """No more bytes will come."""


@dataclass
class _Plan:
    """What one repository needs."""

    wanted: Wanted
    repo: CachedRepo
    commit: str
    entries: dict[str, Entry]
    """The files wanted, by path."""
    tree: dict[str, dict[str, Any]] | None
    """All files as the hub lists them; None if the cache has the list already."""
    licence: str | None
    left: dict[str, list[Path]]
    verified: dict[str, tuple[int, int]] = field(default_factory=dict)
    error: ForgeError | None = None
    open: int = 0
    """Files that are to be settled yet."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    begun_noted: bool = False
    begun: float = 0.0
    ended: float = 0.0

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.blobs().values())

    def blobs(self) -> dict[str, Entry]:
        """The distinct contents."""
        return {entry.blob: entry for entry in self.entries.values()}

    def unsure(self) -> dict[str, Entry]:
        """The contents that must be fetched or checked: they aren't known to be right."""
        return {name: entry for name, entry in self.blobs().items() if not self.is_right(name)}

    def is_right(self, blob: str) -> bool:
        """Whether a blob is here, and unchanged since its bytes were seen to be right."""
        try:
            return self.verified.get(blob) == stamp(self.repo.blob(blob))
        except OSError:
            return False


def fetch(
    wanted: Sequence[Wanted], hub: Path, progress: Progress | None = None
) -> list[Landed | Missed]:
    """Bring repositories into the cache `hub`; returns what became of each, in the order asked.

    Everything is resolved, and gates, sizes and free space are looked at, before the first byte.
    What fails doesn't stop the others. What came of an interrupted try is gone on with.

    Where `hub` can't be written to, what is there whole and verified has landed, and all else is
    missed.

    Raises:
        ConfigError: `hub` can't be a cache, or FORGELM_HUB_PATIENCE isn't a number.
    """
    shown = progress or Progress()
    patience_s()
    line = Line(shown.say, shown.move)
    writable = _check_folder(hub)
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="fetch") as pool:
        try:
            found = list(pool.map(lambda one: _resolve(one, hub, line), wanted))
            plans = [one for one in found if isinstance(one, _Plan)]
            if not writable:
                return [one if isinstance(one, Missed) else _as_it_is(one, hub) for one in found]
            _check_space(plans, hub)
            work = [plan for plan in plans if plan.error is None]
            total = sum(entry.size for plan in work for entry in plan.unsure().values())
            if total:
                for missed in [one for one in found if isinstance(one, Missed)]:
                    shown.say(str(missed.error))
            shown.begin(len({plan.repo.folder for plan in work}), total)
            for plan in work:
                plan.open = len(plan.entries)
                if not plan.entries:
                    _seal(plan)
            running = [pool.submit(_bring, plan, path, line, shown) for plan, path in _order(work)]
            for future in running:
                future.result()
        except BaseException:
            line.stopping.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            shown.end()
    return [one if isinstance(one, Missed) else _outcome(one) for one in found]


def _outcome(plan: _Plan) -> Landed | Missed:
    if plan.error is not None:
        return Missed(plan.wanted, plan.error)
    took = max(0.0, plan.ended - plan.begun)
    path = plan.repo.snapshot(plan.commit)
    return Landed(plan.wanted, plan.commit, path, plan.size, took)


def _check_folder(hub: Path) -> bool:
    """Whether the cache can be written to; one that isn't there is made."""
    try:
        hub.mkdir(parents=True, exist_ok=True)
        next(hub.iterdir(), None)
    except OSError as error:
        raise ConfigError(
            f"cache {hub}: {error.strerror}; give a folder that can be written to"
        ) from error
    return os.access(hub, os.W_OK | os.X_OK)


def _as_it_is(plan: _Plan, hub: Path) -> Landed | Missed:
    """A repository in a cache that can't be written to: there, or refused."""
    record, revision = plan.repo.record(), plan.wanted.revision
    wanted, snapshot = record.wanted.get(plan.commit, []), plan.repo.snapshot(plan.commit)
    whole = wanted is None or set(plan.entries) <= {*wanted}
    named = record.revisions.get(revision) == plan.commit
    linked = all((snapshot / path).is_file() for path in plan.entries)
    if whole and named and linked and not plan.unsure():
        return _outcome(plan)
    error = ConfigError(
        f"{plan.wanted.name}: cache {hub} can't be written to, and doesn't hold all of commit "
        f"{plan.commit[:12]}, verified; give a folder that can be written to"
    )
    return Missed(plan.wanted, error)


def _resolve(wanted: Wanted, hub: Path, line: Line) -> _Plan | Missed:
    """What the hub says of a repository: its commit, its files, whether it is open to us."""
    from huggingface_hub import HfApi, constants

    api = HfApi(library_name="forgelm")
    repo = CachedRepo(hub, wanted.kind, wanted.repo_id)
    record = repo.record()

    def ask(call: Callable[[], Any]) -> Any:
        return line.patiently(wanted.name, call)

    try:
        with explained(wanted.name):
            info = ask(
                lambda: api.repo_info(
                    wanted.repo_id,
                    revision=wanted.revision,
                    repo_type=wanted.kind,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
            )
            commit = str(info.sha)
            if getattr(info, "gated", False):
                ask(partial(_answer, f"{_api(wanted)}/auth-check"))
            known = repo.tree(commit) if commit in record.wanted else None
            listed = None
            if known is None:
                listed = _listed(wanted, commit, ask)
                known = {
                    path: Entry(file["size"], file.get("lfs_sha256") or file["blob_id"])
                    for path, file in listed.items()
                }
        return _Plan(
            wanted,
            repo,
            commit,
            _selected(wanted, commit, known),
            listed,
            _licence(info),
            _left_over(repo),
            record.verified,
        )
    except ForgeError as error:
        return Missed(wanted, error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Missed(
            wanted,
            RunError(
                f"{wanted.name}: the hub answers what isn't JSON of its kind; look at HF_ENDPOINT, "
                "and for a login page of this network"
            ),
        )


def _listed(
    wanted: Wanted, commit: str, ask: Callable[[Callable[[], Any]], Any]
) -> dict[str, dict[str, Any]]:
    """All files of a commit, as huggingface_hub keeps such a list."""
    url: str | None = f"{_api(wanted)}/tree/{commit}?recursive=true"
    files: dict[str, dict[str, Any]] = {}
    while url:
        page, url = ask(partial(_page, url))
        for file in page:
            if file["type"] != "file":
                continue
            files[file["path"]] = {"size": file["size"], "blob_id": file["oid"]}
            if lfs := file.get("lfs"):
                files[file["path"]] |= {"lfs_sha256": lfs["oid"], "lfs_size": lfs["size"]}
            if xet := file.get("xetHash"):
                files[file["path"]] |= {"xet_hash": xet}
    return files


def _page(url: str) -> tuple[list[dict[str, Any]], str | None]:
    """A page of a list, and where the next one is."""
    response = _answer(url)
    return response.json(), response.links.get("next", {}).get("url")


def _api(wanted: Wanted) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/api/{wanted.kind}s/{wanted.repo_id}"


def _answer(url: str) -> httpx2.Response:
    """The hub's answer; what is none is raised."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    headers = build_hf_headers(library_name="forgelm")
    response = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    return response


def _selected(wanted: Wanted, commit: str, known: dict[str, Entry]) -> dict[str, Entry]:
    """The files that are wanted; names become paths here, so they are looked at first."""
    for path, entry in known.items():
        if path.startswith("/") or {"", ".", ".."} & set(path.split("/")):
            raise RunError(f"{wanted.name}: the hub lists a file outside of it, {path!r}; refused")
        if not _HASH.fullmatch(entry.blob):
            raise RunError(f"{wanted.name}: the hub gives no hash of {path}; refused")
    if not is_commit(commit):
        raise RunError(f"{wanted.name}: the hub names no commit, but {commit!r}; refused")
    if wanted.for_torch:
        safe = any(fnmatch(path, _SAFE) and "/" not in path for path in known)
        left_out = _OTHER_FORMATS + (_PICKLES if safe else ())
        return {path: entry for path, entry in known.items() if not _matches(path, left_out)}
    if wanted.files is None:
        return known
    return {path: entry for path, entry in known.items() if _matches(path, wanted.files)}


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _licence(info: Any) -> str | None:
    card = getattr(info, "card_data", None)
    named = getattr(card, "license", None)
    return ", ".join(named) if isinstance(named, list) else named


def _check_space(plans: Iterable[_Plan], hub: Path) -> None:
    """Nothing is fetched unless all of it fits."""
    needing = [plan for plan in plans if _to_come(plan)]
    needed = sum(map(_to_come, needing))
    free = shutil.disk_usage(hub).free
    if needed <= free:
        return
    for plan in needing:
        plan.error = RunError(
            f"{plan.wanted.name}: {_to_come(plan) / 2**20:.1f} MiB are to come, all together "
            f"{needed / 2**20:.1f} MiB, and {hub} has {free / 2**20:.1f} MiB free; make room, or "
            "give another folder"
        )


def _to_come(plan: _Plan) -> int:
    """Bytes that must be fetched, as far as can be said without reading what is there."""
    total = 0
    for name, entry in plan.unsure().items():
        blob = plan.repo.blob(name)
        here = blob if blob.exists() else blob.with_name(name + INCOMPLETE)
        total += max(0, entry.size - (here.stat().st_size if here.exists() else 0))
    return total


def _order(plans: Sequence[_Plan]) -> list[tuple[_Plan, str]]:
    """The repositories side by side: the first file of each, the second of each, ..."""
    files = [[(plan, path) for path in plan.entries] for plan in plans]
    longest = max(map(len, files), default=0)
    return [of[place] for place in range(longest) for of in files if place < len(of)]


@contextmanager
def _blamed(plan: _Plan) -> Iterator[None]:
    """What goes wrong is its repository's error; the first one counts."""
    try:
        yield
    except ForgeError as error:
        plan.error = plan.error or error
    except OSError as error:
        said = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; make room and run it again: what came is kept" if full else ""
        plan.error = plan.error or RunError(f"{plan.wanted.name}: {plan.repo.folder}: {said}{hint}")


def _bring(plan: _Plan, path: str, line: Line, shown: Progress) -> None:
    """One file of a repository, in a worker; with the last one the repository is whole."""
    line.check()
    if plan.error is not None:
        return
    plan.begun = plan.begun or time.monotonic()
    entry = plan.entries[path]
    with _blamed(plan):
        if not plan.is_right(entry.blob):
            with explained(f"{plan.wanted.name}, {path}"), lock(plan.repo, entry.blob):
                _settle(plan, path, line)
        _begin(plan)
        _link(plan.repo, entry.blob, plan.repo.snapshot(plan.commit) / path)
        with plan.lock:
            plan.open -= 1
            last = not plan.open
        if last:
            _seal(plan)
            plan.ended = time.monotonic()
            shown.landed(plan.wanted)


def _begin(plan: _Plan) -> None:
    """Before a snapshot has its first file, what it will have is noted: else, cut off in between,
    it would look whole."""
    with plan.lock:
        if plan.begun_noted:
            return
        with lock(plan.repo, RECORD):
            record = plan.repo.record()
            if record.begin(plan.commit, plan.entries):
                plan.repo.write_record(record)
        plan.begun_noted = True


def _settle(plan: _Plan, path: str, line: Line) -> None:
    """A blob that is there is checked, one that isn't is fetched. Under its lock."""
    from huggingface_hub import constants, hf_hub_url

    entry, repo = plan.entries[path], plan.repo
    if plan.is_right(entry.blob):
        # Another file of these bytes came first.
        return
    blob, name = repo.blob(entry.blob), repo.snapshot(plan.commit) / path
    thing = f"{plan.wanted.name}, {path}"
    if not blob.exists() and name.is_file() and not name.is_symlink():
        # A cache copied without its links.
        blob.parent.mkdir(parents=True, exist_ok=True)
        os.replace(name, blob)
    if blob.exists():
        if blob.stat().st_size == entry.size and hash_of(blob, entry.blob) == entry.blob:
            line.moved(entry.size)
            plan.verified[entry.blob] = stamp(blob)
            return
        line.said(f"{thing}: the cache holds other bytes than the hub's hash promises; fetched")
    # Also a link into nowhere, or to bytes that another repository shares.
    blob.unlink(missing_ok=True)
    if entry.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        raise RunError(
            f"{thing}: is larger than what the hub gives by HTTP; bring it with hf download "
            f"{plan.wanted.repo_id} {path}, and run this again: it is checked then"
        )
    _adopt(blob, plan.left.get(entry.blob, []))
    url = hf_hub_url(plan.wanted.repo_id, path, repo_type=plan.wanted.kind, revision=plan.commit)
    transfer(line, thing, url, blob, entry)
    plan.verified[entry.blob] = stamp(blob)


def _adopt(blob: Path, left: Sequence[Path]) -> None:
    """What the hub's own client left of this blob when it was killed is as good as ours."""
    ours = blob.with_name(blob.name + INCOMPLETE)
    others = [path for path in left if path != ours and path.exists()]
    if others and not ours.exists():
        os.replace(max(others, key=lambda path: path.stat().st_size), ours)


def _left_over(repo: CachedRepo) -> dict[str, list[Path]]:
    """What interrupted transfers left, by the blob that it is a part of."""
    found: dict[str, list[Path]] = {}
    for path in repo.blob("").glob(f"*{INCOMPLETE}"):
        found.setdefault(path.name.partition(".")[0], []).append(path)
    return found


def _link(repo: CachedRepo, blob: str, name: Path) -> None:
    """Make `name` a link to a blob, in one step."""
    target = os.path.relpath(repo.blob(blob), name.parent)
    if name.is_symlink() and os.readlink(name) == target:
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    repo.locks.mkdir(parents=True, exist_ok=True)
    # Not where it would be taken for content if this process were killed now.
    beside = repo.locks / f"{os.getpid()}-{threading.get_ident()}.link"
    beside.unlink(missing_ok=True)
    os.symlink(target, beside)
    os.replace(beside, name)


def _seal(plan: _Plan) -> None:
    """All files are there and right: write what names them, and remember it."""
    repo, revision = plan.repo, plan.wanted.revision
    with lock(repo, RECORD):
        record = repo.record()
        if plan.commit not in record.wanted or plan.tree is not None:
            os.sync()
        if plan.tree is not None:
            write_json(
                repo.tree_file(plan.commit), {"format_version": _TREE_FORMAT, "files": plan.tree}
            )
        repo.snapshot(plan.commit).mkdir(parents=True, exist_ok=True)
        whole = plan.wanted.files is None and not plan.wanted.for_torch
        names = None if whole else sorted(plan.entries)
        if plan.commit in record.wanted:
            before = record.wanted[plan.commit]
            names = None if None in (before, names) else sorted({*(before or ()), *(names or ())})
        record.wanted[plan.commit] = names
        record.settle(plan.commit, plan.entries)
        record.revisions[revision] = plan.commit
        record.licence = plan.licence or record.licence
        here = {name for name in record.verified if repo.blob(name).exists()}
        record.verified = {name: record.verified[name] for name in here}
        record.verified |= {name: plan.verified[name] for name in plan.blobs()}
        if not is_commit(revision) and (
            not repo.ref(revision).is_file() or repo.ref(revision).read_text() != plan.commit
        ):
            write_text(repo.ref(revision), plan.commit)
        if record != repo.record():
            repo.write_record(record)
    _sweep(repo)


def _sweep(repo: CachedRepo) -> None:
    """Remove what interrupted transfers left of blobs that are whole by now."""
    for name, left in _left_over(repo).items():
        if repo.blob(name).exists():
            for path in left:
                path.unlink(missing_ok=True)
    for folder in (repo.ref(""), repo.tree_file("").parent):
        for path in folder.rglob(f".*{HALF_WRITTEN}"):
            path.unlink(missing_ok=True)
