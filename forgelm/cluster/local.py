"""`python -m forgelm.cluster.local FOLDER N`: works through a submission, N runs at a time.

What a scheduler does, less its queue: each run is a process of its own, and a stop is passed on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgelm import stop
from forgelm.cluster.jobs import GOALS, RUNS
from forgelm.errors import worst
from forgelm.resolve import Plan
from forgelm.run.files import write_text

SCRIPT = "setup.sh"
_POLL_S = 0.2


def to_this_machine(
    folder: Path, code: Path, launcher: dict[str, Any], plans: Sequence[Plan]
) -> tuple[str, list[str]]:
    """A process in the background that works through the runs."""
    lines = [*(launcher.get("setup") or ()), 'exec "$@"']
    write_text(folder / SCRIPT, "\n".join(lines) + "\n")
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    parallel = int(launcher["array_parallelism"])
    with (folder / "local.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(parallel)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )
    return f"process {process.pid}", [str(process.pid)] * len(plans)


def main(folder: Path, parallel: int) -> int:
    """Go on with every run; returns the worst of their exit codes."""
    files = [(folder / name).read_text(encoding="utf-8").splitlines() for name in (RUNS, GOALS)]
    left = [(index, *line) for index, line in enumerate(zip(*files, strict=True))]
    at_work: list[subprocess.Popen[bytes]] = []
    codes: list[int] = []
    with stop.listening():
        while left or at_work:
            if stop.requested() is not None:
                left.clear()
                for process in at_work:
                    process.terminate()
            while left and len(at_work) < parallel:
                at_work.append(_start(folder, *left.pop(0)))
            time.sleep(_POLL_S)
            codes += [p.returncode for p in at_work if p.poll() is not None]
            at_work = [p for p in at_work if p.poll() is None]
    return worst(codes)


def _start(folder: Path, index: int, run: str, goal: str) -> subprocess.Popen[bytes]:
    command = (sys.executable, "-m", "forgelm")
    with (folder / f"{index}.log").open("ab") as output:
        return subprocess.Popen(
            ["/bin/bash", folder / SCRIPT, *command, "resume", "--local", run, *goal.split()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
