"""A real Slurm cluster on this machine, brought up once for all tests that ask for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/slurm_cluster.py"
UNAVAILABLE = 69


@dataclass(frozen=True)
class Cluster:
    """The cluster as a test uses it. Jobs are named as Slurm does: `7`, or `7_0` of an array."""

    folder: Path
    env: dict[str, str]

    def call(self, *words: str | Path) -> str:
        """Run one of Slurm's commands (or any other) here; what it prints. It must succeed."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: exit {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def configure(self, *options: str) -> None:
        """Change `--grace`, `--kill-wait` or `--user-signal` until the test ends."""
        self.call(sys.executable, SCRIPT, "--dir", self.folder, "up", *options)

    def submit(self, *words: str | Path) -> str:
        """Words of sbatch; the job's id."""
        return self.call("sbatch", "--parsable", *words).strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        fields = re.findall(r"(\w+)=(\S*)", self.call("scontrol", "-o", "show", "job", job))
        return dict(reversed(fields))  # the first of a name counts

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                log = (self.folder / "log/slurmctld.log").read_text()
                jobs = self.call("squeue", "--states=all", "--long")
                pytest.fail(f"{what}: not within {seconds} s\n{jobs}\n{log[-3000:]}")
            time.sleep(0.2)

    def wait_for_state(self, job: str, state: str, seconds: float = 30) -> None:
        self.wait_for(lambda: self.state(job) == state, seconds, f"job {job} is {state}")

    def wait_for_restart(self, job: str, count: int = 1, seconds: float = 30) -> None:
        """Until the job runs again, after as many requeues."""

        def back() -> bool:
            shown = self.show(job)
            return (shown["Restarts"], shown["JobState"]) == (str(count), "RUNNING")

        self.wait_for(back, seconds, f"job {job} runs again, restart {count}")

    def cancel(self, *jobs: str) -> None:
        self.call("scancel", *jobs)

    def preempt(self, job: str) -> str:
        """Submit a short job that needs the nodes on which the job runs; its id."""
        nodes = self.show(job)["NodeList"]
        words = ("--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
        return self.submit(*words, f"--nodelist={nodes}")

    def kill_node(self, name: str) -> None:
        """As if its cable were pulled; it comes back by `revive`, or when the test ends."""
        self.call(sys.executable, SCRIPT, "--dir", self.folder, "kill-node", name)

    def revive(self, name: str) -> None:
        self.call(sys.executable, SCRIPT, "--dir", self.folder, "revive", name)

    def clear(self) -> None:
        """End all jobs; the options are as in the beginning, and all nodes there."""

        def empty() -> bool:
            # Not by TERM: a job may answer with a requeue, and so outlive its cancellation.
            self.call("scancel", "--user=root", "--signal=KILL", "--full", "--quiet")
            self.call("scancel", "--user=root", "--state=PENDING", "--quiet")
            return not self.call("squeue", "--noheader")

        self.wait_for(empty, 60, "no job is left")
        self.configure("--grace=20", "--kill-wait=10", "--no-user-signal")


@pytest.fixture(scope="session")
def one_cluster() -> Iterator[Cluster]:
    """For fixtures that several tests share; a test asks for `cluster`."""
    with tempfile.TemporaryDirectory(prefix="forgelm-slurm-") as folder:
        command = [sys.executable, str(SCRIPT), "--dir", folder]
        try:
            done = subprocess.run([*command, "up"], capture_output=True, text=True, timeout=120)
            if done.returncode == UNAVAILABLE and "FORGELM_TESTS_NEED_SLURM" not in os.environ:
                pytest.skip(done.stderr.strip())
            assert done.returncode == 0, done.stderr
            conf = Path(folder).resolve() / "slurm.conf"
            yield Cluster(conf.parent, {**os.environ, "SLURM_CONF": str(conf)})
        finally:
            subprocess.run([*command, "down"], check=True, timeout=120)


@pytest.fixture
def cluster(one_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, empty and complete."""
    yield one_cluster
    one_cluster.clear()
