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
    """The directories of the registered runs that are there and weren't cancelled, by name."""
    found = []
    for entry in output.register.glob("*.json"):
        folder = output.root / read_json(entry)["directory"]
        state = load_state(RunPaths(folder))
        if state is not None and state.status is not Status.cancelled:
            found.append(folder)
    return sorted(found)
