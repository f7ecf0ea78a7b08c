"""Runs sealed and handed to a scheduler: nothing that is edited later changes what they compute."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgelm.cluster.code import seal_code
from forgelm.cluster.jobs import GOALS, RUNS, SUBMISSION
from forgelm.cluster.launchers import TO_SLURM
from forgelm.cluster.local import to_this_machine
from forgelm.cluster.sbatch import to_slurm
from forgelm.config.schema import TeacherKind
from forgelm.errors import ConfigError, RunError, RunInUse
from forgelm.resolve import Plan
from forgelm.run.files import read_json, write_json, write_text
from forgelm.run.lifecycle import EXTENDING, enrol, is_complete, load_sealed
from forgelm.run.lock import owned
from forgelm.run.metadata import git, now, versions
from forgelm.run.paths import OutputRoot, RunPaths
from forgelm.run.registry import unregister
from forgelm.run.state import load_state

# Runs that are named after a submission; the others are in its file.
_SHOWN = 10
_WRITERS = 8


@dataclass(frozen=True)
class Submission:
    """Runs submitted together. `names` are their jobs', in the runs' order."""

    folder: Path
    job: str
    names: list[str]
    runs: list[RunPaths]


def submit(plans: Sequence[Plan], launcher: dict[str, Any]) -> Submission:
    """Seal runs and submit them together; all of them, or none.

    Raises:
        ConfigError: the scheduler refuses them, or isn't there; nothing is left behind.
        RunInUse: a process is in one of the directories.
    """
    output = OutputRoot(Path(plans[0].config.output_root).resolve())
    try:
        code, folder = seal_code(output), _folder(output)
    except OSError as error:
        raise RunError(
            f"{error.filename}: can't be written ({error.strerror}): mend that, or give another "
            "output_root"
        ) from error
    sealed = {
        "at": now(),
        "launcher": launcher,
        "code": code.name,
        "folder": folder.name,
        "python": sys.executable,
        "versions": versions(),
        "git": git(Path.cwd()),
    }
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        # Most of the time goes into waiting for the disk.
        with ThreadPoolExecutor(_WRITERS) as pool:
            submitted = [{**sealed, "index": index} for index in range(len(plans))]
            deque(pool.map(_enrol, plans, submitted, itertools.repeat(undo)), maxlen=0)
        write_text(folder / RUNS, "".join(f"{plan.paths.root}\n" for plan in plans))
        write_text(folder / GOALS, "".join(f"{_goal(plan)}\n" for plan in plans))
        send = to_slurm if launcher["_target_"] == TO_SLURM else to_this_machine
        job, names = send(folder, code, launcher, plans)
        undo.pop_all()
    for plan in {plan.config.teacher.run: plan for plan in plans}.values():
        _note_teacher(plan, sealed)
    runs = [plan.paths for plan in plans]
    places = [str(paths.root) for paths in runs]
    write_json(folder / SUBMISSION, {"job": job, "names": names, "runs": places})
    return Submission(folder, job, names, runs)


def _note_teacher(plan: Plan, submitted: dict[str, Any]) -> None:
    """A teacher that these runs train belongs to their launcher too."""
    if plan.config.teacher.kind is not TeacherKind.run:
        return
    paths = RunPaths(Path(str(plan.config.teacher.run)))
    if is_complete(paths):
        return
    # Whoever trains it already keeps its own notes.
    with suppress(RunInUse), owned(paths):
        metadata = read_json(paths.metadata)
        if "submitted" not in metadata:
            write_json(paths.metadata, {**metadata, "submitted": {**submitted, "index": None}})


def _goal(plan: Plan) -> str:
    """What an extended run is to be told beside its directory."""
    if not plan.extends:
        return ""
    sealed = load_sealed(plan.paths.root)
    pairs = [(key, getattr(plan.config, key)) for key in EXTENDING]
    return " ".join(f"{key}={value}" for key, value in pairs if getattr(sealed, key) != value)


def _folder(output: OutputRoot) -> Path:
    stamp = re.sub(r"[-:]|\+.*", "", now())
    for number in range(1000):
        folder = output.submissions / (f"{stamp}-{number}" if number else stamp)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder.resolve()
    raise ConfigError(f"{output.submissions}: no name is left for a submission; try again")


def _enrol(plan: Plan, submitted: dict[str, Any], undo: ExitStack) -> None:
    """Write down a run that will be begun later; `undo` takes it back."""
    paths, state = plan.paths, load_state(plan.paths)
    with owned(paths):
        if state is None:
            undo.callback(_remove, paths)
        else:
            undo.callback(state.save, paths)
            undo.callback(write_json, paths.metadata, read_json(paths.metadata))
        enrol(paths, plan.config, plan.digest, plan.overrides, submitted)


def _remove(paths: RunPaths) -> None:
    if paths.metadata.is_file():
        unregister(OutputRoot(paths.root.parents[3]), read_json(paths.metadata)["run_id"])
    shutil.rmtree(paths.root, ignore_errors=True)
    with suppress(OSError):
        for folder in paths.root.parents[:3]:
            folder.rmdir()


def forget_teachers(plans: Sequence[Plan]) -> None:
    """Take back what was sealed for runs that are refused."""
    for folder in {plan.new_teacher for plan in plans if plan.new_teacher is not None}:
        _remove(RunPaths(folder))


def how_to_follow(made: Submission) -> str:
    """What a person wants to know at once."""
    many = len(made.runs)
    lines = [f"submitted {many} run{'s' if many > 1 else ''} as {_job(made)}"]
    shown = list(zip(made.names, made.runs, strict=True))
    lines += [f"  {name}  {paths.root}" for name, paths in shown[:_SHOWN]]
    if many > _SHOWN:
        lines.append(f"  and {many - _SHOWN} more, all in {made.folder / SUBMISSION}")
    log = made.runs[0].log if many == 1 else Path("DIRECTORY/output.log")
    lines.append(f"to follow: tail -F {log}")
    if made.job.isdecimal():
        lines.append(f"the queue: squeue -j {made.job}; to cancel: scancel {made.job}")
    else:
        lines.append(f"to stop them all: kill {made.names[0]}")
    lines.append(f"what its processes say: {made.folder}")
    return "\n".join(lines)


def _job(made: Submission) -> str:
    return f"Slurm job {made.job}" if made.job.isdecimal() else made.job
