"""Which run a user means by RUN: a directory, a run id, or a name that only one run has."""

from __future__ import annotations

import difflib
from pathlib import Path

from forgelm.errors import ConfigError, RunError
from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths

_DEPTH = "*/*/*/*/run_metadata.json"


def find_run(text: str, output_root: Path) -> RunPaths:
    """The run's directory.

    Raises:
        ConfigError: none is meant, or several are.
    """
    folder = Path(text).expanduser()
    if RunPaths(folder).config.is_file():
        return RunPaths(folder.resolve())
    if RunPaths(folder).metadata.is_file():
        raise ConfigError(f"{text}: its config.yaml is missing; restore it")
    runs = sorted(path.parent for path in output_root.glob(_DEPTH))
    found = [run for run in runs if text in (run.name, _run_id(run))]
    if len(found) == 1:
        return RunPaths(found[0].resolve())
    if found:
        raise ConfigError(
            f"{text}: {len(found)} runs have this name ({', '.join(map(str, found[:4]))}); "
            "give the directory"
        )
    near = difflib.get_close_matches(text, [run.name for run in runs], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"{text}: no such run, neither a directory nor a name or id below {output_root}{hint}"
    )


def _run_id(run: Path) -> str | None:
    try:
        return str(read_json(RunPaths(run).metadata)["run_id"])
    except (OSError, RunError, KeyError):
        return None
