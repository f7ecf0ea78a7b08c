"""Runs on a real cluster, interrupted in every way that Slurm has: they end with the same bytes.

All are submitted at once. Each stops itself (SIGSTOP) within a certain step of its first start, so
that what happens to it happens there; Slurm's signals wake it up.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from slurm_fixture import Cluster

import forgelm
from forgelm.drill import order_differences, record_differences, weight_differences
from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths

SMALL = (
    *TINY,
    "max_steps=12",
    "training.save_steps=4",
    "training.eval_strategy=steps",
    "training.eval_steps=6",
    "training.record_batches=true",
)
SEEDS = range(1, 9)
# Its process gets Slurm's signals too.
WANDB = "wandb.mode=offline"
STOPS = {"/": "training:6:SIGSTOP"}
ROOT = Path(forgelm.__file__).parents[1]


@dataclass
class Lab:
    """A folder from which runs are submitted to the cluster."""

    cluster: Cluster
    folder: Path
    jobs: dict[str, str] = field(default_factory=dict)
    by_term: threading.Event = field(default_factory=threading.Event)

    def forgelm(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**self.cluster.env, **environment}
        command = [sys.executable, "-m", "forgelm", *words]
        return subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=300
        )

    def run(self, name: str) -> RunPaths:
        (found,) = self.folder.glob(f"outputs/*/*/*/{name}")
        return RunPaths(found)

    def submit(
        self,
        name: str,
        *words: str,
        points: dict[str, str] = STOPS,
        node: str = "node2",
        **environment: str,
    ) -> str:
        """Submit a run that interrupts itself at `points`, by `restart/task of an array`."""
        script = self.folder / f"{name}.sh"
        cases = "".join(f"'{n}') export FORGELM_INTERRUPT={p};;\n" for n, p in points.items())
        script.write_text(f'case "$SLURM_RESTART_COUNT/$SLURM_ARRAY_TASK_ID" in\n{cases}esac\n')
        done = self.forgelm(
            *SMALL,
            "hydra/launcher=slurm",
            f"hydra.launcher.setup=['. {script}']",
            f"+hydra.launcher.additional_parameters.nodelist='{node}'",
            "hydra.launcher.timeout_min=30",
            f"run_name={name}",
            *words,
            **environment,
        )
        assert done.returncode == 0, done.stderr
        job = done.stdout.split("Slurm job ")[1].split()[0]
        self.jobs[name] = job
        return job

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 480) -> None:
        """With longer pauses than the cluster's own: many wait side by side, on few processors."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                jobs = self.cluster.call("squeue", "--states=all", "--long")
                logs = [f"{log}:\n{log.read_text()[-1500:]}" for log in self.folder.rglob("*.log")]
                pytest.fail("\n".join([f"{what}: not within {seconds} s", jobs, *logs]))
            time.sleep(1)

    def asleep(self, *jobs: str, restart: int = 0) -> None:
        """Wait until all processes of some jobs have stopped themselves."""

        def all_are() -> bool:
            found = [
                (job, state)
                for job, count, state in processes(self.cluster.env["SLURM_CONF"])
                if count == restart
            ]
            there = {job for job, _ in found}
            return there >= {*jobs} and all(state == "T" for job, state in found if job in jobs)

        self.wait_for(all_are, f"{jobs} stop themselves in start {restart + 1}")

    def stopped(self, name: str, restart: int = 0) -> str:
        """The job of a run, once it has stopped itself."""
        self.asleep(self.jobs[name], restart=restart)
        return self.jobs[name]

    def signal(self, name: str, sent: str) -> None:
        """As Slurm sends it before a time limit: what sleeps is woken up."""
        job = self.stopped(name)
        for each in (sent, "CONT"):
            self.cluster.call("scancel", f"--signal={each}", job)

    def ended(self, name: str, status: str = "complete") -> RunPaths:
        """Wait until a run has a status and its job has left the queue."""
        paths = self.run(name)
        self.wait_for(lambda: state_of(paths)["status"] == status, f"{name} is {status}")
        job = self.jobs.get(name)
        if job is not None:
            queued = ("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job)
            over = {"COMPLETED", "CANCELLED", "FAILED"}
            self.wait_for(lambda: self.cluster.call(*queued).strip() in over, f"{job} is over", 60)
        return paths


def state_of(paths: RunPaths) -> dict[str, Any]:
    return dict(read_json(paths.state))


def processes(conf: str) -> Iterator[tuple[str, int, str]]:
    """Job, restart and state of each process that trains in the cluster of a slurm.conf."""
    for entry in Path("/proc").iterdir():
        try:
            program = (entry / "cmdline").read_bytes().partition(b"\0")[0]
            # Not W&B's, which lies among the packages and never stops itself.
            if b"python" not in program.rpartition(b"/")[2]:
                continue
            text = (entry / "environ").read_bytes().decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        values = dict(item.partition("=")[::2] for item in text.split("\0"))
        if "SLURM_STEP_ID" in values and values.get("SLURM_CONF") == conf:
            array = values.get("SLURM_ARRAY_JOB_ID")
            task = f"{array}_{values.get('SLURM_ARRAY_TASK_ID')}"
            job = task if array else values["SLURM_JOB_ID"]
            yield job, int(values.get("SLURM_RESTART_COUNT", 0)), state


# What happens to each run. All happen at once.


def limit(lab: Lab) -> RunPaths:
    """Slurm's signal before the time limit."""
    lab.submit("limit", "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=60", WANDB)
    return lab.ended("limit")


def requeued(lab: Lab) -> RunPaths:
    """Somebody requeues the job."""
    lab.submit("requeued", WANDB)
    lab.cluster.call("scontrol", "requeue", lab.stopped("requeued"))
    return lab.ended("requeued")


def killed(lab: Lab) -> RunPaths:
    """The step's processes are killed."""
    lab.submit("killed")
    lab.cluster.call("scancel", "--signal=KILL", f"{lab.stopped('killed')}.0")
    return lab.ended("killed")


def cancelled(lab: Lab) -> RunPaths:
    lab.submit("cancelled", WANDB)
    lab.cluster.cancel(lab.stopped("cancelled"))
    return lab.ended("cancelled", "cancelled")


def ranks(lab: Lab) -> RunPaths:
    """Two processes on one node; a signal to both, as before a time limit."""
    lab.submit("ranks", "launch.ranks_per_node=2")
    lab.signal("ranks", "USR2")
    return lab.ended("ranks")


def nodes(lab: Lab) -> RunPaths:
    """A process on each of two nodes: a signal first, then one of the nodes is lost."""
    again = {**STOPS, "1/": "training:3:SIGSTOP"}
    lab.submit("nodes", "launch.nodes=2", points=again, node="node2,node3")
    lab.signal("nodes", "USR2")
    lab.stopped("nodes", restart=1)
    lab.cluster.kill_node("node3")
    lab.cluster.revive("node3")
    return lab.ended("nodes")


def without_scontrol(lab: Lab, name: str, where: str) -> dict[str, str]:
    """The environment of a job whose scontrol doesn't answer."""
    folder, real = lab.folder / f"bin-{name}", shutil.which("scontrol")
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\n{where} && exit 1\nexec {real} "$@"\n')
    (folder / "scontrol").chmod(0o755)
    return {"PATH": f"{folder}:{lab.cluster.env['PATH']}"}


def handed_over(lab: Lab) -> RunPaths:
    """Processes can't reach scontrol, the batch script can."""
    place = without_scontrol(lab, "handed_over", 'test -n "$SLURM_STEP_ID"')
    lab.submit("handed_over", **place)
    lab.signal("handed_over", "USR2")
    return lab.ended("handed_over")


def plain(lab: Lab) -> RunPaths:
    """By sbatch and the template; the config is edited before the restart."""
    experiment = lab.folder / "plain/experiment/mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\ntraining: {weight_decay: 0.01}\n")
    path = f"{Path(sys.executable).parent}:{lab.cluster.env['PATH']}"
    done = subprocess.run(
        [
            *("sbatch", "--parsable", "--nodelist=node2", ROOT / "scripts/forgelm.sbatch"),
            *(*SMALL, "run_name=plain", "--config-dir", "plain", "experiment=mine"),
        ],
        cwd=lab.folder,
        env={**lab.cluster.env, "PATH": path, "FORGELM_INTERRUPT": "training:8:SIGSTOP"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lab.jobs["plain"] = done.stdout.strip()
    lab.signal("plain", "USR2")
    experiment.write_text("# @package _global_\ntraining: {weight_decay: 0.5}\n")
    return lab.ended("plain")


def array(lab: Lab) -> list[RunPaths]:
    """An array, of which those that run are preempted; and a run that can't requeue itself."""
    low = "hydra.launcher.partition=low"
    points = {"/0": "training:3:SIGSTOP", "/3": "training:2:SIGSTOP"}
    seeds = f"seed={','.join(map(str, SEEDS))}"
    job = lab.submit("array", "-m", seeds, low, "max_steps=6", points=points, node="node1")
    tasks = [f"{job}_{index}" for index in range(len(SEEDS))]
    place = without_scontrol(lab, "lingering", "true")
    lab.submit("lingering", low, node="node1", **place)
    lab.asleep(tasks[0], tasks[3], lab.jobs["lingering"])
    lab.cluster.preempt(tasks[0])
    lab.cluster.wait_for_restart(tasks[3], seconds=300)
    lab.by_term.set()
    return [lab.ended(folder.name) for folder in lab.folder.glob("outputs/*/*/*/array-*")]


def lingering(lab: Lab) -> RunPaths:
    """Nobody can reach scontrol: see `array`, which submits and preempts it."""
    lab.wait_for(lambda: "lingering" in lab.jobs, "lingering is submitted")
    return lab.ended("lingering")


def signalled(lab: Lab) -> RunPaths:
    """Preempted by the job's own signal: see the cluster's configuration."""
    # It is for all jobs, and those of the array are to get SIGTERM.
    assert lab.by_term.wait(480)
    lab.submit("signalled", "hydra.launcher.partition=low", node="node1")
    job = lab.stopped("signalled")
    lab.cluster.configure("--user-signal")
    lab.cluster.preempt(job)
    return lab.ended("signalled")


def crashing(lab: Lab) -> RunPaths:
    """Every start ends in the same step."""
    crash = {f"{start or ''}/": "training:2:SIGKILL" for start in range(9)}
    lab.submit("crashing", "launch.max_idle_restarts=2", points=crash)
    return lab.ended("crashing", "failed")


def edited(lab: Lab) -> RunPaths:
    """Submitted, then everything is edited that it was made of; then it starts."""
    configs, code = lab.folder / "configs", lab.folder / "code"
    (configs / "experiment").mkdir(parents=True)
    experiment = configs / "experiment/mine.yaml"
    experiment.write_text("# @package _global_\ntraining: {weight_decay: '${oc.env:DECAY}'}\n")
    for folder in ("forgelm", "conf"):
        shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
    place = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1", "DECAY": "0.01"}
    words = ["--config-dir", str(configs), "experiment=mine"]
    lab.submit(
        "edited", *words, "+hydra.launcher.additional_parameters.hold=true", points={}, **place
    )
    experiment.write_text("# @package _global_\ntraining: {weight_decay: 0.5}\n")
    (code / "conf/task/nli_mini.yaml").write_text("not: [a, task\n")
    (code / "forgelm/losses.py").write_text("raise ImportError('edited')\n")
    lab.cluster.call("scontrol", "release", lab.jobs["edited"])
    return lab.ended("edited")


CASES: tuple[Callable[[Lab], Any], ...] = (
    limit, requeued, killed, cancelled, ranks, nodes, array, signalled, lingering, handed_over,
    plain, crashing, edited,
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(one_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield Lab(one_cluster, tmp_path_factory.mktemp("lab"))
    one_cluster.clear()


@pytest.fixture(scope="module")
def outcomes(lab: Lab) -> Iterator[dict[str, Future[Any]]]:
    with ThreadPoolExecutor(len(CASES)) as pool:
        yield {case.__name__: pool.submit(case, lab) for case in CASES}


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> Callable[..., list[RunPaths]]:
    """The same runs, neither submitted nor interrupted, by what was typed for them."""
    known: dict[tuple[str, ...], str] = {}

    def made(*words: str) -> list[RunPaths]:
        if words not in known:
            known[words] = f"undisturbed{len(known)}"
            done = lab.forgelm("train", *SMALL, *words, f"run_name={known[words]}")
            assert done.returncode == 0, done.stderr
        return [RunPaths(path) for path in lab.folder.glob(f"outputs/*/*/*/{known[words]}*")]

    return made


def differences(ours: RunPaths, theirs: RunPaths) -> list[str]:
    compared = (weight_differences, record_differences, order_differences)
    return [line for compare in compared for line in compare(ours, theirs)]


@pytest.mark.parametrize(
    ("name", "ranks", "starts", "said"),
    [
        ("limit", 1, 2, ["after SIGUSR2", "requeued job {job} by scontrol"]),
        ("requeued", 1, 2, ["after SIGTERM", "Slurm requeues job {job} already"]),
        ("killed", 1, 2, ["the start before ended without a word"]),
        ("ranks", 2, 2, ["after SIGUSR2", "requeued job {job} by scontrol"]),
        ("nodes", 2, 3, ["after SIGUSR2", "another rank of this run ended"]),
        ("signalled", 1, 2, ["after SIGUSR2", "requeued job {job} by scontrol"]),
        ("handed_over", 1, 2, ["scontrol can't be reached from here: the batch script requeues"]),
        ("lingering", 1, 2, ["waiting for Slurm to end or requeue job {job}"]),
        ("plain", 1, 2, ["after SIGUSR2", "requeued job {job} by scontrol"]),
        ("edited", 1, 1, []),
    ],
)
def test_a_run_ends_with_the_same_bytes(
    outcomes: dict[str, Future[Any]],
    undisturbed: Callable[..., list[RunPaths]],
    lab: Lab,
    name: str,
    ranks: int,
    starts: int,
    said: list[str],
) -> None:
    run: RunPaths = outcomes[name].result()
    log = run.log.read_text()
    assert len(read_json(run.metadata)["sessions"]) >= starts, log
    for line in said:
        assert line.format(job=lab.jobs[name]) in log
    (alone,) = undisturbed(f"launch.ranks_per_node={ranks}")
    assert differences(alone, run) == []


def test_each_run_of_an_array_ends_with_the_same_bytes(
    outcomes: dict[str, Future[Any]], undisturbed: Callable[..., list[RunPaths]]
) -> None:
    def by_seed(runs: list[RunPaths]) -> dict[int, RunPaths]:
        return {read_json(run.metadata)["seed"]: run for run in runs}

    ours = by_seed(outcomes["array"].result())
    seeds = f"seed={','.join(map(str, SEEDS))}"
    theirs = by_seed(undisturbed("-m", seeds, "max_steps=6"))
    assert sorted(ours) == sorted(theirs) == [*SEEDS]
    for seed, run in ours.items():
        sessions = read_json(run.metadata)["sessions"]
        assert {session["slurm"]["job"].partition("_")[2] for session in sessions} == {
            str(seed - 1)
        }
        assert differences(theirs[seed], run) == []
    for seed in (1, 4):
        assert state_of(ours[seed])["restarts"] >= 1
        assert "after SIGTERM" in ours[seed].log.read_text()


def test_a_cancelled_run_stays_so(outcomes: dict[str, Future[Any]], lab: Lab) -> None:
    run = outcomes["cancelled"].result()
    assert f"job {lab.jobs['cancelled']} was cancelled" in run.log.read_text()
    assert lab.cluster.state(lab.jobs["cancelled"]) == "CANCELLED"
    assert state_of(run)["latest_checkpoint"] == "checkpoint-6"
    resumed = lab.forgelm("resume", "--incomplete")
    assert "cancelled" not in resumed.stdout


def test_a_run_that_gains_nothing_ends(outcomes: dict[str, Future[Any]]) -> None:
    run = outcomes["crashing"].result()
    sessions = read_json(run.metadata)["sessions"]
    assert len(sessions) == 4
    assert "2 starts in a row of Slurm job" in sessions[-1]["reason"]
    assert "launch.max_idle_restarts=2" in sessions[-1]["reason"]
