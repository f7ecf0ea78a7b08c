"""From the command to the prompt: a sweep handed to Slurm, against the plain Submitit launcher.

python benchmarks/submit.py [--runs N] [--pairs P]

Brings up a cluster of its own (scripts/slurm_cluster.py, which says what it needs). Both sides
submit as many held jobs, in turn: forgelm real runs, the other the least that is a Hydra app. That
one's command ends with its jobs; what counts is when sbatch has taken the last of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HELD = "+hydra.launcher.additional_parameters.hold=true"
APP = """\
import hydra
from hydra.core.config_store import ConfigStore

ConfigStore.instance().store("config", {"seed": 0})


@hydra.main(config_path=None, config_name="config", version_base="1.3")
def main(config):
    pass


if __name__ == "__main__":
    main()
"""
# Notes when each of its calls was over.
SBATCH = """\
#!/bin/sh
{program} "$@"
code=$?
date +%s.%N >> {calls}
exit $code
"""


@dataclass(frozen=True)
class Desk:
    """Where both commands are typed: the cluster's environment, and who counts sbatch's calls."""

    folder: Path
    env: dict[str, str]
    calls: Path

    def begin(self, *command: str) -> tuple[subprocess.Popen[bytes], float]:
        """Start a command in an empty folder; when that was."""
        place = self.folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self.calls.write_text("")
        began = time.time()
        with (self.folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=place, env=self.env, stdout=said, stderr=said
            )
        return process, began

    def taken(self) -> list[float]:
        """When each call of sbatch ended."""
        return [float(line) for line in self.calls.read_text().splitlines()]

    def jobs(self) -> int:
        words = ("squeue", "--noheader", "--array", "--format=%i")
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=True)
        return len(done.stdout.split())

    def clear(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.env, check=True)
        while self.jobs():
            time.sleep(0.1)


@contextmanager
def desk() -> Iterator[Desk]:
    with tempfile.TemporaryDirectory(prefix="forgelm-submit-") as name:
        folder = Path(name).resolve()
        cluster = [sys.executable, str(ROOT / "scripts/slurm_cluster.py"), "--dir", f"{folder}/lab"]
        try:
            if code := subprocess.run([*cluster, "up"], stdout=sys.stderr).returncode:
                raise SystemExit(code)
            (folder / "app.py").write_text(APP)
            program, calls = folder / "bin/sbatch", folder / "calls"
            program.parent.mkdir()
            program.write_text(SBATCH.format(program=shutil.which("sbatch"), calls=calls))
            program.chmod(0o755)
            env = {
                **os.environ,
                "PATH": f"{program.parent}:{os.environ['PATH']}",
                "SLURM_CONF": f"{folder}/lab/slurm.conf",
                "PYTHONPATH": str(ROOT),
            }
            yield Desk(folder, env, calls)
        finally:
            subprocess.run([*cluster, "down"], check=True)


def ours(at: Desk, sweep: str, runs: int) -> tuple[float, int]:
    """Seconds until the command has ended, and calls of sbatch."""
    process, began = at.begin("-m", "forgelm", "-m", "hydra/launcher=slurm", HELD, sweep)
    code = process.wait()
    seconds = time.time() - began
    assert (code, at.jobs()) == (0, runs), (at.folder / "said").read_text()
    calls = len(at.taken())
    at.clear()
    return seconds, calls


def theirs(at: Desk, sweep: str, runs: int) -> tuple[float, int]:
    """Seconds until Slurm has all jobs, and calls of sbatch."""
    app = str(at.folder / "app.py")
    process, began = at.begin(app, "-m", "hydra/launcher=submitit_slurm", HELD, sweep)
    while at.jobs() < runs or not at.taken():
        assert process.poll() is None, (at.folder / "said").read_text()
        time.sleep(0.2)
    process.kill()
    process.wait()
    taken = at.taken()
    at.clear()
    return taken[-1] - began, len(taken)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    sweep = f"seed={','.join(str(seed) for seed in range(1, asked.runs + 1))}"
    pairs = []
    with desk() as at:
        for _ in range(asked.pairs):
            pair = (ours(at, sweep, asked.runs), theirs(at, sweep, asked.runs))
            print("forgelm {:.1f} s, {} sbatch; ".format(*pair[0]), end="")
            print("Submitit launcher {:.1f} s, {} sbatch".format(*pair[1]), flush=True)
            pairs.append(pair)
    ratio = statistics.median(mine[0] / other[0] for mine, other in pairs)
    print(f"{asked.runs} runs: forgelm / Submitit launcher, median of {len(pairs)}: {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
