"""Checkpoints that are whole or not there: sealed by a manifest, checked before they are used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forgelm import __version__
from forgelm.log import log
from forgelm.run.files import HALF_WRITTEN, flush, flush_folder, readable, write_text
from forgelm.run.paths import RunPaths, checkpoint_step

FORMAT = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"

_YOUNG_S = 60


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows beside the trainer's own state.

    `metrics_lines` counts the lines of `metrics.jsonl` at the time, `metrics_sha256` is their hash.
    `line` holds the values of this step that aren't in that file yet, because its evaluation is
    still `pending`. `finished` means that training ended here, whatever the target.
    `samples_lines` counts those of `samples.jsonl`.
    """

    config_hash: str
    step: int
    target: int
    ranks: int
    metrics_lines: int
    metrics_sha256: str
    line: dict[str, Any] = field(default_factory=dict)
    pending: bool = False
    finished: bool = False
    evaluations_without_gain: int = 0
    best_step: int | None = None
    samples_lines: int = 0
    format: int = FORMAT
    forgelm: str = __version__


Listing = dict[str, dict[str, Any]]
"""What a manifest says of each file: its `size` in bytes and its `sha256`."""


def write_checkpoint(
    paths: RunPaths, progress: Progress, write_files: Callable[[Path], Listing | None]
) -> Path:
    """Write a checkpoint aside, flush it, seal it and rename it into place; returns the folder.

    Only then does `latest_checkpoint` name it. A folder of that name is replaced: it is one that
    didn't verify. After an error nothing of the new one is left.

    `write_files` finds the files of the last checkpoint that was rotated out and should write over
    them: memory for as many new pages costs the machine more than the copying. It returns what is
    known already of files that others wrote there and flushed.
    """
    final, beside = paths.checkpoint(progress.step), half_written(paths, progress.step)
    shutil.rmtree(beside, ignore_errors=True)
    if paths.spare.is_dir():
        os.rename(paths.spare, beside)
        (beside / MANIFEST).unlink(missing_ok=True)
    else:
        beside.mkdir()
    try:
        for path in (paths.metrics, paths.samples):
            if path.is_file():
                flush(path)
        known = write_files(beside) or {}
        (beside / PROGRESS).write_text(json.dumps(asdict(progress), indent=2), encoding="utf-8")
        _seal(beside, known)
        if final.exists():
            shutil.rmtree(final)
        os.rename(beside, final)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        reason = _disk_trouble(error)
        if reason is None:
            raise
        raise reason from error
    flush_folder(paths.root)
    write_text(paths.latest_checkpoint, final.name + "\n")
    return final


def half_written(paths: RunPaths, step: int) -> Path:
    """Where a step's checkpoint is written before it is sealed."""
    return paths.root / f".{paths.checkpoint(step).name}{HALF_WRITTEN}"


def _disk_trouble(error: BaseException | None) -> OSError | None:
    """What the system said, below what the libraries made of it."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is not None:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return None


def _seal(folder: Path, known: Listing) -> None:
    manifest: dict[str, Any] = {"format": FORMAT, "files": flushed(folder, folder, known)}
    manifest["seal"] = _own_hash(manifest)
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    flush_folder(folder)


def flushed(below: Path, folder: Path, known: Listing) -> Listing:
    """Flush all files below a part of a checkpoint's `folder`; returns their listing.

    Files that are `known` are neither read nor flushed again.
    """
    listed = dict(known)
    files = sorted(path for path in below.rglob("*") if path.is_file())
    for path in files:
        name = path.relative_to(folder).as_posix()
        if name not in known:
            readable(path)
            flush(path)
            listed[name] = {"size": path.stat().st_size, "sha256": file_hash(path)}
    # The folder itself is flushed with its last name, the manifest's.
    for inner in {path.parent for path in files} - {folder}:
        flush_folder(inner)
    return listed


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    if not path.stat().st_size:
        return hashlib.sha256().hexdigest()
    # In one piece: Python's lock isn't taken in between, which a background save would compete for.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


def _own_hash(manifest: dict[str, Any]) -> str:
    kept = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None: all are there and as they were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} is of format {manifest['format']}, and this forgelm reads {FORMAT}"
        if manifest["seal"] != _own_hash(manifest):
            return f"{MANIFEST} was altered"
        listed = manifest["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} can't be read"
    for name, wanted in listed.items():
        try:
            found = (folder / name).stat().st_size
            if found != wanted["size"]:
                return f"{name} has {found} bytes instead of {wanted['size']}"
            if file_hash(folder / name) != wanted["sha256"]:
                return f"{name} was altered"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return None


def read_progress(folder: Path) -> Progress:
    """The progress of a checkpoint that verified."""
    return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


def newest_whole(paths: RunPaths, config_hash: str, keeps_best: bool) -> Path | None:
    """The newest checkpoint that verifies and belongs to this run; the others are named in the log.

    With `keeps_best` one that refers to a best checkpoint which isn't whole is passed over too:
    training from an earlier one makes the best again.
    """
    for folder in paths.checkpoints():
        found = damage(folder) or _unfit(folder, paths, config_hash, keeps_best)
        if found is None:
            return folder
        log.warning("%s can't be used: %s; trying the one before", folder.name, found)
    return None


def _unfit(folder: Path, paths: RunPaths, config_hash: str, keeps_best: bool) -> str | None:
    """Why a checkpoint that verified isn't one for this run."""
    try:
        progress = read_progress(folder)
    except (TypeError, ValueError):
        return f"{PROGRESS} was written by another version of forgelm"
    if progress.config_hash != config_hash:
        return f"it belongs to a run with another config ({progress.config_hash})"
    best = progress.best_step
    if keeps_best and best is not None and best != progress.step:
        wrong = damage(paths.checkpoint(best))
        if wrong is not None:
            return f"the best checkpoint, {paths.checkpoint(best).name}, is damaged ({wrong})"
    return None


def rotate(paths: RunPaths, limit: int | None, keep: set[int]) -> None:
    """Delete the oldest checkpoints beyond `limit`; those at the steps of `keep` always stay."""
    if limit is None:
        return
    there = paths.checkpoints()
    spare = [folder for folder in reversed(there) if checkpoint_step(folder) not in keep]
    for folder in spare[: max(0, len(there) - limit)]:
        # Renamed and not deleted: a kill half-way through must not leave a folder that looks like
        # one, and the next checkpoint is written over it.
        shutil.rmtree(paths.spare, ignore_errors=True)
        os.rename(folder, paths.spare)


def sweep_leftovers(paths: RunPaths) -> None:
    """Remove what killed processes left half-written in a run directory that this process owns."""
    for path in paths.leftovers():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            continue
        # A young file may be another process's, which seals this run as its teacher.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _YOUNG_S:
                path.unlink()
