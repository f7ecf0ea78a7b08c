"""`python -m forgelm.cluster.local FOLDER N`: works through a submission, N runs at a time.

What a scheduler does, less its queue: each run is a process of its own, and a stop is passed on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from forgelm import stop
from forgelm.cluster.submit import GOALS, RUNS
from forgelm.errors import worst

SCRIPT = "setup.sh"
_POLL_S = 0.2


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
