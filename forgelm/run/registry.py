"""The register of incomplete runs: one small file a run, below the output root."""

from __future__ import annotations

import os

from forgelm.run.files import write_json
from forgelm.run.paths import OutputRoot, RunPaths


def register(output: OutputRoot, run_id: str, paths: RunPaths) -> None:
    """Note that the run isn't complete."""
    write_json(
        output.register / f"{run_id}.json",
        {"run_id": run_id, "directory": os.path.relpath(paths.root, output.root)},
    )


def unregister(output: OutputRoot, run_id: str) -> None:
    """The run is complete."""
    (output.register / f"{run_id}.json").unlink(missing_ok=True)
