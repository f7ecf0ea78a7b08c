"""Runs on a real Slurm cluster, preempted at random moments: all must end with the same bytes.

python benchmarks/preempt.py [--preemptions N] [--seed S] [--minutes M]

Brings up a cluster of its own (scripts/slurm_cluster.py, which says what it needs) with two nodes.
Runs are submitted to partition `low`, an array of each config in turn. Each start of a run is given
a random moment within the time that the whole run would take, imports included; then a job in
`high` takes its node. Only what Slurm then requeued counts. When there were enough, the runs are
left alone until they are complete, and compared with an uninterrupted run of their config.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from crash import BASE, differences

from forgelm.errors import EXIT_OK
from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths
from forgelm.run.state import Status, load_state

ROOT = Path(__file__).resolve().parents[1]
NODES = 2
UP = ("up", f"--nodes={NODES}", "--cpus=1", "--gpus=0", "--grace=6", "--kill-wait=2")
CONFIGS = {
    "sft": (),
    # Its teacher is the uninterrupted run of the config above.
    "kd": ("mode=kd", "teacher=path", "teacher.path={root}/sft/nli_mini/tiny/sft/sft"),
    "best": ("training.load_best_model_at_end=true", "training.save_total_limit=1"),
    "accumulation": ("training.gradient_accumulation_steps=2", "task.max_train_samples=307"),
}
ARRAY = 4
_POLL_S = 0.5
_SAY_EVERY_S = 60.0


@dataclass
class Lab:
    """A folder for everything, and the cluster."""

    folder: Path
    env: dict[str, str]
    references: dict[str, RunPaths] = field(default_factory=dict)
    horizon: float = math.inf
    """Seconds that the fastest uninterrupted run took, from its command to its end."""
    arrays: list[str] = field(default_factory=list)

    def call(self, *words: str) -> str:
        """Run one of Slurm's commands; what it prints."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def forgelm(self, name: str, root: Path, *words: str) -> str:
        """Train a config; what is said."""
        given = [word.format(root=self.folder) for word in (*BASE, *CONFIGS[name], *words)]
        done = subprocess.run(
            [sys.executable, "-m", "forgelm", "train", *given, f"output_root={root}"],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
        )
        if done.returncode != EXIT_OK:
            raise SystemExit(f"{name}: exit {done.returncode}: {done.stderr}")
        return done.stdout

    def uninterrupted(self, name: str) -> None:
        """Train a config here, for its bytes and its time."""
        began = time.monotonic()
        self.forgelm(name, self.folder / name, f"run_name={name}")
        self.horizon = min(self.horizon, time.monotonic() - began)
        (found,) = (self.folder / name).glob(f"*/*/*/{name}/config.yaml")
        self.references[name] = RunPaths(found.parent)

    def submit(self, name: str) -> None:
        names = ",".join(f"{name}-{len(self.arrays)}-{number}" for number in range(ARRAY))
        said = self.forgelm(
            name,
            self.folder / "runs",
            "-m",
            f"run_name={names}",
            "hydra/launcher=slurm",
            "hydra.launcher.partition=low",
            "hydra.launcher.timeout_min=60",
            # Whoever is preempted again and again while Python starts gains nothing.
            "launch.max_idle_restarts=1000",
        )
        self.arrays.append(said.split("Slurm job ")[1].split()[0])

    def jobs(self) -> dict[str, tuple[str, str, int]]:
        """State, node and restarts of each job that trains, by its name."""
        fields = "--Format=JobArrayID:32,StateCompact:8,RestartCnt:8,NodeList:32"
        words = ("squeue", "--noheader", "--array", "--states=all", fields)
        lines = [line.split() for line in self.call(*words).splitlines()]
        return {
            line[0]: (line[1], line[3] if len(line) > 3 else "", int(line[2]))
            for line in lines
            if line[0].partition("_")[0] in self.arrays
        }

    def runs(self) -> list[RunPaths]:
        return [RunPaths(file.parent) for file in self.folder.glob("runs/*/*/*/*/config.yaml")]

    def preempt(self, node: str) -> None:
        words = ("--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
        self.call("sbatch", *words, f"--nodelist={node}")


@contextmanager
def laboratory() -> Iterator[Lab]:
    """A cluster in a folder of its own, both gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="forgelm-preempt-") as name:
        folder = Path(name).resolve()
        script = [
            sys.executable,
            str(ROOT / "scripts/slurm_cluster.py"),
            "--dir",
            f"{folder}/slurm",
        ]
        try:
            if code := subprocess.run([*script, *UP], stdout=sys.stderr).returncode:
                raise SystemExit(code)
            (folder / "work").mkdir()
            env = {
                **os.environ,
                "SLURM_CONF": f"{folder}/slurm/slurm.conf",
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": f"{folder}/hf",
            }
            yield Lab(folder / "work", env)
        finally:
            subprocess.run([*script, "down"], check=True)


def disturb(lab: Lab, wanted: int, chance: random.Random, deadline: float) -> int:
    """Submit runs and preempt them until so many were; returns how many."""
    due: dict[tuple[str, int], float] = {}
    names = itertools.cycle(CONFIGS)
    said = time.monotonic()
    while time.monotonic() < deadline:
        jobs = lab.jobs()
        count = sum(restarts for _, _, restarts in jobs.values())
        if count >= wanted:
            return count
        if sum(state in ("R", "PD", "CG") for state, _, _ in jobs.values()) <= NODES:
            lab.submit(next(names))
        now = time.monotonic()
        for job, (state, node, restarts) in jobs.items():
            start = (job, restarts)
            if state == "R" and start not in due:
                due[start] = now + chance.uniform(0, lab.horizon)
            if state == "R" and now > due[start]:
                due[start] = now + 60
                lab.preempt(node)
        if now > said + _SAY_EVERY_S:
            said = now
            states = Counter(state for state, _, _ in jobs.values())
            print(f"  {count} preemptions, {dict(states)}", flush=True)
        time.sleep(_POLL_S)
    return sum(restarts for _, _, restarts in lab.jobs().values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preemptions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=40, help="what isn't complete by then is lost (40)"
    )
    asked = parser.parse_args()
    began = time.monotonic()
    with laboratory() as lab:
        for name in CONFIGS:
            lab.uninterrupted(name)
        print(f"uninterrupted: {', '.join(CONFIGS)}; at least {lab.horizon:.0f} s each", flush=True)
        deadline = began + 60 * asked.minutes
        preemptions = disturb(lab, asked.preemptions, random.Random(asked.seed), deadline)
        while time.monotonic() < deadline:
            if all(state not in ("R", "PD", "CG") for state, _, _ in lab.jobs().values()):
                break
            time.sleep(2)
        return report(lab, asked.preemptions, preemptions, (time.monotonic() - began) / 60)


def report(lab: Lab, wanted: int, preemptions: int, minutes: float) -> int:
    """Print what became of all; returns the exit code."""
    lost = failed = different = starts = stopped = 0
    for run in lab.runs():
        state, sessions = load_state(run), read_json(run.metadata)["sessions"]
        assert state is not None
        starts += len(sessions)
        stopped += sum("SIGTERM" in (session["reason"] or "") for session in sessions)
        if state.status is Status.failed:
            failed += 1
            print(f"{run.root.name} failed: {sessions[-1]['reason']}")
        elif state.status is not Status.complete:
            lost += 1
            print(f"{run.root.name} is {state.status}")
        elif unequal := differences(lab.references[run.root.name.partition("-")[0]], run):
            different += 1
            print(f"{run.root.name} differs: {', '.join(unequal)}")
    states = Counter(state for state, _, _ in lab.jobs().values())
    false = max(failed, sum(number for state, number in states.items() if state != "CD"))
    print(
        f"{preemptions} preemptions of {len(lab.runs())} runs in {minutes:.0f} minutes: {lost} "
        f"lost, {false} false failures, {different} different\n"
        f"{starts} starts got as far as the run's directory; {stopped} stopped by themselves when "
        "told, the others were killed at the end of the grace time, or before they had begun"
    )
    enough = preemptions >= wanted
    return 0 if enough and not (lost or false or different) else 1


if __name__ == "__main__":
    sys.exit(main())
