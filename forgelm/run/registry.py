"""The register of incomplete runs: one small file a run, below the output root."""

from __future__ import annotations

import os
from pathlib import Path

from forgelm.run.files import read_json, write_json
from forgelm.run.paths import OutputRoot, RunPaths
from forgelm.run.state import Status, load_state


def register(output: OutputRoot, run_id: str, paths: RunPaths) -> None:
    """Note that the run isn't complete."""
    write_json(
        output.register / f"{run_id}.json",
        {"run_id": run_id, "directory": os.path.relpath(paths.root, output.root)},
    )


def unregister(output: OutputRoot, run_id: str) -> None:
    """The run is complete."""
    (output.register / f"{run_id}.json").unlink(missing_ok=True)


def incomplete(output: OutputRoot) -> list[Path]:
    """The directories of the registered runs that weren't cancelled, by name.

    Entries of runs that are gone, or complete, are dropped.
    """
    found = []
    for entry in output.register.glob("*.json"):
        known = read_json(entry)
        paths = RunPaths(output.root / known["directory"])
        state = load_state(paths)
        if state is None or state.pipeline_complete or _run_id(paths) != known["run_id"]:
            entry.unlink(missing_ok=True)
        elif state.status is not Status.cancelled:
            found.append(paths.root)
    return sorted(found)


def _run_id(paths: RunPaths) -> str | None:
    return read_json(paths.metadata)["run_id"] if paths.metadata.is_file() else None
