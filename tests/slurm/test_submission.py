"""What a user types to submit runs, and what comes back at once; the cluster is a real one.

Jobs are held, so that none of them trains; tests/slurm/test_launcher.py lets them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Command, Result
from slurm_fixture import Cluster

import forgelm as package
from forgelm.drill import order_differences, record_differences, weight_differences
from forgelm.run.files import read_json
from forgelm.run.lock import owned, started
from forgelm.run.paths import OutputRoot, RunPaths
from forgelm.run.registry import incomplete

SMALL = (*TINY, "max_steps=3", "training.record_batches=true")
HELD = "+hydra.launcher.additional_parameters.hold=true"
ROOT = Path(package.__file__).parents[1]


@dataclass
class Desk:
    """Where somebody types, on a machine of the cluster."""

    forgelm: Command
    cluster: Cluster
    folder: Path

    def submit(self, *words: str, held: bool = True) -> Result:
        return self.forgelm(*SMALL, "hydra/launcher=slurm", *([HELD] if held else []), *words)

    def queue(self) -> list[str]:
        """Jobs that wait or run, an array's tasks one by one."""
        words = ("squeue", "--noheader", "--array", "--format=%i")
        return sorted(self.cluster.call(*words).split())

    def runs(self) -> list[RunPaths]:
        """By their order in the sweep."""
        found = [RunPaths(file.parent) for file in self.folder.glob("outputs/*/*/*/*/config.yaml")]
        return sorted(found, key=lambda run: read_json(run.metadata)["submitted"]["index"])

    def submissions(self) -> list[Path]:
        return sorted(OutputRoot(self.folder / "outputs").submissions.glob("*"))

    def registered(self) -> list[Path]:
        return incomplete(OutputRoot(self.folder / "outputs"))

    def assert_nothing_there(self) -> None:
        assert self.queue() == []
        kept = OutputRoot(self.folder / "outputs").code
        found = [path for path in self.folder.rglob("*") if path.is_file()]
        assert [path for path in found if kept not in path.parents] == []
        assert list(self.folder.glob("outputs/[!.]*/*/*/*")) == []
        assert self.submissions() == []


@pytest.fixture
def desk(
    forgelm: Command, one_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    monkeypatch.setenv("SLURM_CONF", one_cluster.env["SLURM_CONF"])
    yield Desk(forgelm, one_cluster, tmp_path)
    one_cluster.call("scancel", "--user=root")
    one_cluster.wait_for(lambda: not one_cluster.call("squeue", "--noheader"), 60, "no job is left")


def status_of(run: RunPaths) -> str:
    return str(read_json(run.state)["status"])


def job_in(said: Result) -> str:
    """The job that a submission names."""
    assert said.code == 0, said.err
    return said.out.split("Slurm job ")[1].split()[0]


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.2)


# Submitting


@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_a_run_is_in_the_queue_at_once(desk: Desk, multirun: list[str]) -> None:
    said = desk.submit(*multirun, "hydra.launcher.partition=low", "hydra.launcher.timeout_min=7")
    job = job_in(said)
    (run,), (folder,) = desk.runs(), desk.submissions()
    assert said.out.splitlines() == [
        f"submitted 1 run as Slurm job {job}",
        f"  {job}  {run.root}",
        f"to follow: tail -F {run.log}",
        f"the queue: squeue -j {job}; to cancel: scancel {job}",
        f"what its processes say: {folder}",
    ]
    assert desk.queue() == [job]
    shown = desk.cluster.show(job)
    assert (shown["Partition"], shown["TimeLimit"]) == ("low", "00:07:00")
    assert (shown["Requeue"], shown["JobName"], shown["NumNodes"]) == ("1", "forgelm", "1-1")
    assert status_of(run) == "submitted"
    assert desk.registered() == [run.root]
    metadata = read_json(run.metadata)
    # Nothing has been trained, here or there.
    assert metadata["sessions"] == []
    assert not run.log.exists()
    submitted = metadata["submitted"]
    assert submitted["launcher"]["partition"] == "low"
    assert (OutputRoot(desk.folder / "outputs").code / submitted["code"] / "forgelm").is_dir()
    assert (folder / "runs.txt").read_text() == f"{run.root}\n"
    assert read_json(folder / "submission.json") == {
        "job": job,
        "names": [job],
        "runs": [str(run.root)],
    }
    assert (folder / f"{job}_submission.sh").is_file()


def test_a_sweep_is_one_array(desk: Desk) -> None:
    job = job_in(
        desk.submit("-m", "seed=1,2", "mode.alpha=0.1,0.2", "mode=kd", "teacher=path",
                    "teacher.path=org/model", "hydra.launcher.array_parallelism=3")
    )  # fmt: skip
    names = [f"{job}_{index}" for index in range(4)]
    assert desk.queue() == names
    shown = desk.cluster.show(job)
    assert (shown["ArrayTaskId"], shown["ArrayTaskThrottle"]) == ("0-3%3", "3")
    runs, (folder,) = desk.runs(), desk.submissions()
    assert [read_json(run.metadata)["seed"] for run in runs] == [1, 1, 2, 2]
    assert {status_of(run) for run in runs} == {"submitted"}
    assert sorted(desk.registered()) == sorted(run.root for run in runs)
    places = [str(run.root) for run in runs]
    assert (folder / "runs.txt").read_text().splitlines() == places
    assert read_json(folder / "submission.json")["names"] == names


def test_a_run_named_twice_is_submitted_once(desk: Desk) -> None:
    job = job_in(desk.submit("-m", "seed=1,1"))
    assert desk.queue() == [job]


def test_what_is_in_the_queue_is_not_submitted_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(desk.submit("-m", "seed=1,2"))
    # A person's own filter.
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    again = desk.submit("-m", "seed=1,2,3")
    assert [f"is Slurm job {job}_{i} (pending) already" in again.out for i in (0, 1)] == [True] * 2
    other = job_in(Result(again.code, again.out.partition("submitted")[2], again.err))
    assert desk.queue() == sorted([f"{job}_0", f"{job}_1", other])


@pytest.fixture
def instead(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a script before one of Slurm's programs, whose real one it may call as "$real"."""
    folder = desk.folder / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def put(name: str, lines: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\nreal={shutil.which(name)}\n{lines}\n")
        (folder / name).chmod(0o755)

    return put


LOST = "echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1"


@pytest.mark.parametrize("words", [(), ("-m", "seed=1,2")])
def test_a_job_that_was_taken_without_an_answer(
    desk: Desk, instead: Callable[[str, str], None], words: tuple[str, ...]
) -> None:
    instead("sbatch", f'"$real" "$@" > /dev/null; {LOST}')
    job = job_in(desk.submit(*words))
    names = [f"{job}_0", f"{job}_1"] if words else [job]
    assert desk.queue() == names
    assert read_json(desk.submissions()[0] / "submission.json")["names"] == names


def test_no_answer_and_no_job(desk: Desk, instead: Callable[[str, str], None]) -> None:
    instead("sbatch", LOST)
    said = desk.submit()
    assert said.code == 1
    assert "Slurm refuses this: Batch job submission failed: Socket timed out" in said.err
    assert desk.runs() == []


def test_more_runs_than_an_array_may_have(desk: Desk, instead: Callable[[str, str], None]) -> None:
    instead(
        "scontrol", 'case "$*" in "show config") echo "MaxArraySize = 2";; *) "$real" "$@";; esac'
    )
    said = desk.submit("-m", "seed=1,2,3")
    assert said.code == 1
    assert said.err.strip() == (
        "forgelm: 3 runs: an array has at most 2 jobs on this cluster (MaxArraySize); submit the "
        "sweep in parts"
    )
    assert desk.queue() == []


def test_a_job_inside_of_a_job_starts_afresh(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = {
        "SLURM_JOB_ID": "1",
        "SLURM_ARRAY_JOB_ID": "1",
        "SLURM_ARRAY_TASK_ID": "5",
        "SLURM_NTASKS": "3",
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_RESTART_COUNT": "4",
        "SLURM_EXPORT_ENV": "NONE",
    }
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    said = desk.folder / "environment"
    setup = f"hydra.launcher.setup=['env > {said}.part','mv {said}.part {said}','exit 0']"
    job = job_in(desk.submit(setup, held=False))
    assert os.environ["SLURM_JOB_ID"] == "1"
    desk.cluster.wait_for(said.exists, 60, "the job begins")
    inner = dict(line.partition("=")[::2] for line in said.read_text().splitlines())
    assert inner["SLURM_JOB_ID"] == job
    assert inner["SLURM_NTASKS"] == "1"
    left = {"SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"}
    assert not left & inner.keys()


@pytest.mark.parametrize("cap", ["launch.max_restarts=1", "launch.max_idle_restarts=1"])
def test_whatever_task_of_an_array_is_killed_comes_back(desk: Desk, cap: str) -> None:
    """As when the kernel kills the processes; only so often as the config says."""
    killed = "hydra.launcher.setup=['srun() { return 137; }']"
    job = job_in(desk.submit("-m", "seed=1,2", killed, cap, held=False))
    for index in range(2):
        desk.cluster.wait_for_state(f"{job}_{index}", "FAILED", 90)
        assert desk.cluster.show(f"{job}_{index}")["Restarts"] == "1"


def test_tokens_are_written_nowhere(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf" + "_" + "Ab1" * 10
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, token)
    refused = desk.submit(f"hydra.launcher.comment={token}")
    assert (refused.code, token in refused.err + refused.out) == (1, False)
    desk.assert_nothing_there()
    job_in(desk.submit("-m", "seed=1,2"))
    files = [path for path in desk.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if token.encode() in path.read_bytes()] == []


# Refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "hydra.launcher.partition=nope",
            "Slurm refuses this: invalid partition specified: nope; Batch job submission failed: "
            "Invalid partition name specified",
        ),
        (
            "-m seed=1,2,3 hydra.launcher.partition=nope",
            "Slurm refuses this: invalid partition specified: nope; Batch job submission failed: "
            "Invalid partition name specified",
        ),
        (
            "hydra.launcher.constraint=gold",
            "Slurm refuses this: Batch job submission failed: Invalid feature specification",
        ),
        (
            "hydra.launcher.gpus_per_node=9",
            "Slurm refuses this: Batch job submission failed: Requested node configuration is not "
            "available",
        ),
        (
            "hydra.launcher.mem_gb=900",
            "Slurm refuses this: Memory specification can not be satisfied; Batch job submission "
            "failed: Requested node configuration is not available",
        ),
        (
            "+hydra.launcher.additional_parameters.nodelist=nowhere",
            "Slurm refuses this: Batch job submission failed: Invalid node name specified",
        ),
        (
            "hydra.launcher.gres=tpu:1",
            "Slurm refuses this: Invalid generic resource (gres) specification",
        ),
        (
            "+hydra.launcher.additional_parameters.nonsense=3",
            "Slurm refuses this: unrecognized option '--nonsense=3'",
        ),
        (
            "hydra.launcher.partitoin=low",
            "hydra.launcher.partitoin=low: no such key; did you mean hydra.launcher.partition?; "
            "other options of sbatch are given as "
            "+hydra.launcher.additional_parameters.partitoin=VALUE",
        ),
        (
            "+hydra.launcher.timeout=3",
            "hydra.launcher.timeout=3: no such key; did you mean hydra.launcher.timeout_min?; "
            "other options of sbatch are given as "
            "+hydra.launcher.additional_parameters.timeout=VALUE",
        ),
        (
            "hydra.launcher.additional_parameters.reservation=x",
            "hydra.launcher.additional_parameters.reservation=x: sbatch's own options are added: "
            "write +hydra.launcher.additional_parameters.reservation=x",
        ),
        (
            "hydra.launcher.timeout_min=soon",
            "hydra.launcher.timeout_min=soon: must be a whole number",
        ),
        (
            "hydra.launcher.gpus_per_node=x",
            "hydra.launcher.gpus_per_node=x: must be a whole number or null",
        ),
        (
            "hydra.launcher.array_parallelism=0",
            "hydra.launcher.array_parallelism=0: must be at least 1",
        ),
        ("hydra.launcher.timeout_min=-1", "hydra.launcher.timeout_min=-1: must be at least 1"),
        ("hydra.launcher.nodes=2", "hydra.launcher.nodes=2: give launch.nodes instead"),
        (
            "hydra.launcher.tasks_per_node=2",
            "hydra.launcher.tasks_per_node=2: give launch.ranks_per_node instead",
        ),
        (
            "-m launch.nodes=1,2",
            "launch.nodes and launch.ranks_per_node can't differ within one submission: submit one "
            "value of them at a time",
        ),
        (
            "-m seed=1,2 hydra.launcher.comment=${seed}",
            "hydra.launcher.comment can't differ within one submission (1, 2): submit one value of "
            "it at a time",
        ),
        (
            "-m hydra.launcher.partition=low,high",
            "hydra.launcher.partition=low,high: Hydra's own keys have one value for all runs of a "
            "sweep; give one (a comma in it is quoted: \"key='a,b'\")",
        ),
        (
            "hydra/launcher=submitit_slurm",
            "hydra/launcher=submitit_slurm: loses what a preempted run has done; take "
            "hydra/launcher=slurm, which has the same keys",
        ),
        (
            "-m seed=1,2 hydra/launcher=submitit_local",
            "hydra/launcher=submitit_local: loses what a preempted run has done; take "
            "hydra/launcher=slurm, which has the same keys",
        ),
        (
            "hydra/launcher=slrum",
            "hydra/launcher=slrum: no such hydra/launcher; one of basic, local, slurm, "
            "submitit_local, submitit_slurm; did you mean hydra/launcher=slurm?",
        ),
        (
            "hydra/launcher=basic hydra.launcher.partition=low",
            "hydra.launcher.partition=low: runs are started here; to submit them add "
            "hydra/launcher=slurm",
        ),
        ("max_steps=many", "max_steps=many: must be a whole number or null"),
    ],
)
def test_what_is_wrong_leaves_nothing_behind(desk: Desk, words: str, said: str) -> None:
    given = words.split()
    launcher = [] if "hydra/launcher" in words else ["hydra/launcher=slurm"]
    refused = desk.forgelm(*SMALL, *launcher, *given)
    assert refused.err.splitlines()[0] == f"forgelm: {said}"
    assert (refused.code, refused.out) == (1, "")
    assert not said.startswith("Slurm") or len(refused.err.splitlines()) == 1
    desk.assert_nothing_there()


def test_a_refused_submission_changes_no_older_run(desk: Desk) -> None:
    job = job_in(desk.submit("seed=1"))
    desk.cluster.cancel(job)
    (run,) = desk.runs()
    before = run.state.read_bytes(), run.metadata.read_bytes()
    refused = desk.submit("-m", "seed=1,2", "hydra.launcher.partition=nope")
    assert refused.code == 1
    assert (run.state.read_bytes(), run.metadata.read_bytes()) == before
    assert desk.runs() == [run]
    assert len(desk.submissions()) == 1
    assert desk.registered() == [run.root]


def test_where_there_is_no_sbatch(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(desk.folder / "no-programs"))
    refused = desk.submit()
    assert refused.err == (
        "forgelm: hydra/launcher=slurm: there is no sbatch here: submit from a machine of the "
        "cluster, or take hydra/launcher=local, which runs on this one\n"
    )
    assert (refused.code, refused.out) == (1, "")
    monkeypatch.undo()
    assert not (desk.folder / "outputs").exists()


CHILD = """
import contextlib, io, json, sys

from forgelm.cli.main import main

for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(words)
    print(json.dumps([code, said.getvalue()]))
"""


def test_where_the_extra_is_not_installed(tmp_path: Path) -> None:
    """All that is installed is there but what the extra brings, and what lies beside this repo."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if not entry.name.startswith(("hydra_plugins", "hydra_submitit", "submitit")):
            (site / entry.name).symlink_to(entry)
    needs = "needs hydra_plugins.hydra_submitit_launcher, which isn't installed"
    asked = [
        ["hydra/launcher=slurm"],
        ["-m", "hydra/launcher=slurm", "seed=1,2", "hydra.launcher.partition=low"],
        ["hydra/launcher=local"],
    ]
    done = subprocess.run(
        [sys.executable, "-S", "-c", CHILD],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"},
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert outcomes == [
        [
            1,
            f"forgelm: submitting runs, to Slurm or in the background, {needs}: "
            "pip install 'forgelm[slurm]'\n",
        ]
    ] * len(asked)
    assert not (tmp_path / "outputs").exists()


def test_a_run_that_a_process_is_in(desk: Desk) -> None:
    job = job_in(desk.submit("seed=1"))
    desk.cluster.cancel(job)
    (run,) = desk.runs()
    with owned(run):
        refused = desk.submit("-m", "seed=2,1")
        resumed = desk.forgelm("resume", str(run.root))
    for said in (refused, resumed):
        assert said.code == 1
        assert f"process {os.getpid()}" in said.err
        assert "is in this run" in said.err
    assert desk.queue() == []
    assert desk.runs() == [run]
    assert desk.registered() == [run.root]


# Cancelled, and gone on with


@pytest.mark.parametrize("seeds", ["1", "1,2,3"])
def test_a_cancelled_run_stays_so_until_it_is_asked_for(desk: Desk, seeds: str) -> None:
    job = job_in(desk.submit("-m", f"seed={seeds}"))
    runs = desk.runs()
    desk.cluster.cancel(f"{job}_1" if len(runs) > 1 else job)
    cancelled = runs[1] if len(runs) > 1 else runs[0]
    resumed = desk.forgelm("resume", "--incomplete")
    assert f"left alone: {cancelled.root.relative_to(desk.folder)} was cancelled" in resumed.out
    assert (resumed.code, "submitted" in resumed.out) == (0, False)
    assert status_of(cancelled) == "cancelled"
    assert "cancelled" not in {status_of(run) for run in runs if run != cancelled}
    assert cancelled.root not in desk.registered()
    before = desk.queue()
    again = job_in(desk.submit(f"seed={read_json(cancelled.metadata)['seed']}"))
    assert status_of(cancelled) == "submitted"
    assert desk.queue() == sorted([*before, again])


def test_resume_submits_again_with_the_recorded_launcher(desk: Desk) -> None:
    job = job_in(desk.submit("hydra.launcher.partition=low", "hydra.launcher.timeout_min=7"))
    (run,) = desk.runs()
    queued = desk.forgelm("resume", str(run.root))
    assert f"is Slurm job {job} (pending) already" in queued.out
    desk.cluster.cancel(job)
    same = job_in(desk.forgelm("resume", str(run.root)))
    shown = desk.cluster.show(same)
    assert (shown["Partition"], shown["TimeLimit"]) == ("low", "00:07:00")
    assert shown["Reason"] == "JobHeldUser"
    desk.cluster.cancel(same)
    longer = "hydra.launcher.timeout_min=9"
    comment = "+hydra.launcher.additional_parameters.nice=5"
    changed = job_in(desk.forgelm("resume", str(run.root), longer, comment))
    shown = desk.cluster.show(changed)
    assert (shown["Partition"], shown["TimeLimit"], shown["Nice"]) == ("low", "00:09:00", "5")
    assert shown["Reason"] == "JobHeldUser"
    assert read_json(run.metadata)["submitted"]["launcher"]["timeout_min"] == 9


def test_a_launcher_chosen_anew_keeps_the_number_of_processes(desk: Desk) -> None:
    shape = ("launch.nodes=2", "launch.ranks_per_node=3")
    desk.cluster.cancel(job_in(desk.submit(*shape)))
    (run,) = desk.runs()
    job = job_in(desk.forgelm("resume", str(run.root), "hydra/launcher=slurm", HELD))
    shown = desk.cluster.show(job)
    assert (shown["NumNodes"], shown["NumTasks"]) == ("2-2", "6")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "hydra.launcher.timeout=9",
            "hydra.launcher.timeout=9: no such key; did you mean hydra.launcher.timeout_min?",
        ),
        (
            "hydra.launcher.timeout_min=soon",
            "hydra.launcher.timeout_min=soon: must be a whole number",
        ),
        ("hydra.launcher.partition=nope", "Slurm refuses this: invalid partition"),
        ("hydra/launcher=submitit_slurm", "hydra/launcher=submitit_slurm: loses"),
    ],
)
def test_resume_refuses_a_wrong_launcher(desk: Desk, word: str, said: str) -> None:
    desk.cluster.cancel(job_in(desk.submit()))
    (run,) = desk.runs()
    before = run.state.read_bytes(), run.metadata.read_bytes()
    refused = desk.forgelm("resume", str(run.root), word)
    assert refused.code == 1
    assert refused.err.startswith(f"forgelm: {said}")
    assert (run.state.read_bytes(), run.metadata.read_bytes()) == before
    assert desk.queue() == []


def test_runs_with_the_same_launcher_are_resumed_as_one_array(desk: Desk) -> None:
    low = "hydra.launcher.partition=low"
    jobs = [job_in(desk.submit(f"seed={seed}", low)) for seed in (1, 2)]
    jobs.append(job_in(desk.submit("seed=3")))
    desk.cluster.cancel(*jobs)
    runs = {read_json(run.metadata)["seed"]: run for run in desk.runs()}
    said = desk.forgelm("resume", *[str(runs[seed].root) for seed in (1, 2, 3)])
    assert said.code == 0, said.err
    assert "submitted 2 runs as Slurm job" in said.out
    assert "submitted 1 run as Slurm job" in said.out
    array = job_in(said)
    assert {f"{array}_0", f"{array}_1"} < {*desk.queue()}
    assert len(desk.queue()) == 3


# Waiting


@contextmanager
def once_queued(desk: Desk, act: Callable[[], Any]) -> Iterator[None]:
    """Does something while the main thread waits for its runs."""

    def wait() -> None:
        wait_until(lambda: bool(desk.queue()), 60)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def test_waiting_ends_with_what_became_of_the_runs(desk: Desk) -> None:
    with once_queued(desk, lambda: desk.cluster.call("scancel", "--user=root")):
        said = desk.submit("-m", "seed=1,2", "launch.wait=true")
    job, runs = said.out.split("Slurm job ")[1].split()[0], desk.runs()
    assert said.code == 75, said.out
    for index, run in enumerate(runs):
        assert f"{job}_{index} {run.root.name}: cancelled (not in the queue)" in said.out
        assert status_of(run) == "cancelled"


def test_ctrl_c_ends_the_waiting_alone(desk: Desk) -> None:
    with once_queued(desk, lambda: os.kill(os.getpid(), signal.SIGINT)):
        said = desk.submit("launch.wait=true")
    assert said.code == 75
    (run,), job = desk.runs(), said.out.split("Slurm job ")[1].split()[0]
    assert said.out.splitlines()[-2:] == [
        f"{job} {run.root.name}: submitted (pending)",
        "waiting no more; the runs go on",
    ]
    assert desk.queue() == [job]


# On this machine


def test_runs_in_the_background(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One after the other, with what a run started here ends with; one of them fails."""
    own = "training.max_grad_norm=0"
    rates = "training.learning_rate=1e30,1e-3"
    programs, bash = tmp_path / "programs", shutil.which("bash")
    assert bash is not None
    programs.mkdir()
    (programs / "bash").symlink_to(bash)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(programs))
        said = desk.forgelm(*SMALL, own, "-m", rates, "hydra/launcher=local", "launch.wait=true")
    failing, fine = desk.runs()
    assert (status_of(failing), status_of(fine)) == ("failed", "complete"), said.out
    assert said.code == 2
    for run in (failing, fine):
        assert f"{run.root.name}: {status_of(run)}" in said.out
    (first,), (second,) = (read_json(run.metadata)["sessions"] for run in (failing, fine))
    assert first["stopped"] <= second["started"]
    assert second["code"] == read_json(fine.metadata)["submitted"]["code"]
    # The same run, submitted and never begun, then trained here.
    desk.cluster.cancel(job_in(desk.submit("output_root=here", own)))
    (here,) = [RunPaths(file.parent) for file in desk.folder.glob("here/*/*/*/*/config.yaml")]
    resumed = desk.forgelm("resume", str(here.root), "--local")
    assert resumed.code == 0, resumed.err
    compared = (weight_differences, record_differences, order_differences)
    assert [line for compare in compared for line in compare(here, fine)] == []


def test_what_runs_in_the_background_is_ended_as_a_whole(desk: Desk) -> None:
    said = desk.forgelm(*SMALL, "-m", "seed=1,2", "hydra/launcher=local", "max_steps=100000")
    assert said.code == 0, said.err
    process, runs = int(said.out.split("as process ")[1].split()[0]), desk.runs()
    assert started(process)
    assert [status_of(run) for run in runs] == ["submitted"] * 2
    again = desk.forgelm(*SMALL, "-m", "seed=1,2", "hydra/launcher=local", "max_steps=100000")
    assert again.code == 0, again.err
    assert again.out.splitlines() == [
        f"{run.root} is one of process {process} already, which runs in the background"
        for run in runs
    ]
    wait_until(lambda: status_of(runs[0]) == "running")
    os.kill(process, signal.SIGTERM)
    wait_until(lambda: not started(process))
    assert [status_of(run) for run in runs] == ["preempted", "submitted"]


# What is resumed where, and when


def test_a_teacher_that_is_to_be_made_stays_with_its_students(desk: Desk) -> None:
    (job,) = [job_in(desk.submit("mode=kd"))]
    teacher, student = sorted(desk.folder.glob("outputs/nli_mini/*/*/*"), reverse=True)
    assert "tiny_teacher" in str(teacher)
    desk.cluster.cancel(job)
    wait_until(lambda: desk.queue() == [])
    # As when a job has begun to train it: it is registered then.
    entry = OutputRoot(desk.folder / "outputs").register / "mine.json"
    run_id = read_json(RunPaths(teacher).metadata)["run_id"]
    place = str(teacher.relative_to(desk.folder / "outputs"))
    entry.write_text(json.dumps({"run_id": run_id, "directory": place}))
    said = desk.forgelm("resume", "--incomplete")
    assert f"left alone: {teacher.relative_to(desk.folder)} is a teacher" in said.out
    again = desk.forgelm("resume", str(teacher), HELD)
    assert desk.queue() == [job_in(again)]
    assert not RunPaths(teacher).log.exists()
    assert not RunPaths(student).log.exists()


def test_a_refused_run_leaves_no_teacher(desk: Desk) -> None:
    said = desk.submit("mode=kd", "hydra.launcher.partition=wrong")
    assert said.code == 1, said.err
    desk.assert_nothing_there()
    assert list(desk.folder.glob("outputs/nli_mini*")) == []


@pytest.mark.parametrize("words", [["train", "resume=mine"], ["resume", "mine"]])
def test_every_way_of_resuming_takes_the_recorded_launcher(desk: Desk, words: list[str]) -> None:
    first = job_in(desk.submit("run_name=mine"))
    assert f"is Slurm job {first} (pending) already" in desk.forgelm(*words).out
    desk.cluster.cancel(first)
    wait_until(lambda: desk.queue() == [])
    second = job_in(desk.forgelm(*words))
    assert first != second
    (run,) = desk.runs()
    assert status_of(run) in ("submitted", "running")


def test_a_run_in_the_queue_is_not_extended(desk: Desk) -> None:
    job = job_in(desk.submit("run_name=mine"))
    said = desk.forgelm("resume", "mine", "max_steps=9")
    assert said.code == 1
    assert f"is Slurm job {job} (pending): scancel {job} first" in said.err
    assert desk.queue() == [job]


def test_an_extended_run_is_told_its_goal(desk: Desk) -> None:
    done = desk.forgelm(*SMALL, "run_name=mine")
    assert done.code == 0, done.err
    job = job_in(desk.forgelm("resume", "mine", "max_steps=5", "hydra/launcher=slurm", HELD))
    (folder,) = desk.submissions()
    assert (folder / "goals.txt").read_text() == "max_steps=5\n"
    assert desk.queue() == [job]
    desk.cluster.cancel(job)
    said = desk.forgelm("resume", "mine", "max_steps=5", "hydra/launcher=local")
    assert said.code == 0, said.err
    (run,) = desk.runs()
    wait_until(lambda: status_of(run) == "complete" and read_json(run.state)["step"] == 5)


def test_busy_runs_keep_no_other_from_going_on(desk: Desk) -> None:
    job = job_in(desk.submit("-m", "seed=1,2"))
    desk.cluster.cancel(job)
    wait_until(lambda: desk.queue() == [])
    for run in desk.runs():
        run.state.write_text(run.state.read_text().replace("submitted", "failed"))
    busy, free = desk.runs()
    with owned(busy):
        said = desk.forgelm("resume", "--incomplete", HELD)
    assert said.code == 0, said.err
    assert f"left alone: {busy.root}: process" in said.out
    assert str(free.root) in said.out.partition("submitted 1 run")[2]


def test_where_the_queue_cannot_be_asked_nothing_is_submitted_twice(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(desk.submit())
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text("#!/bin/sh\necho 'Socket timed out on send/recv' >&2\nexit 1\n")
    (folder / "squeue").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        said = desk.submit()
    assert (said.code, said.out) == (2, "")
    assert "squeue doesn't say whether these runs are in the queue: try again" in said.err
    assert desk.queue() == [job]


def test_a_job_that_slurm_has_forgotten(desk: Desk) -> None:
    """Cancelled in the queue or ended by itself: what tells is whether it began."""
    desk.submit("-m", "seed=1,2")
    waiting, began = desk.runs()
    (folder,) = desk.submissions()
    facts = read_json(folder / "submission.json")
    # Numbers that this Slurm never gave.
    facts["names"] = ["990001", "990002"]
    (folder / "submission.json").write_text(json.dumps(facts))
    (folder / "990002.starts").write_text("a start\n")
    said = desk.forgelm("resume", "--incomplete", HELD)
    assert f"left alone: {waiting.root.relative_to(desk.folder)} was cancelled" in said.out
    assert str(began.root) in said.out.partition("submitted 1 run")[2]
    assert status_of(waiting) == "cancelled"


def test_an_output_root_with_spaces(desk: Desk) -> None:
    desk.submit("output_root='a place'", "run_name=mine")
    said = desk.forgelm("resume", "--incomplete", "output_root='a place'")
    assert "is Slurm job" in said.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "hydra.launcher.timeout_min=2",
            "hydra.launcher.timeout_min=2: Slurm's signal comes hydra.launcher.signal_delay_s=120",
        ),
        (
            "+hydra.launcher.additional_parameters.array=0-3",
            "hydra.launcher.additional_parameters.array: arrays are made of a sweep's runs",
        ),
        ("output_root=a%j", "Slurm reads % and \\ in a path"),
        ("-m output_root=oa,ob", "output_root can't differ within one submission"),
    ],
)
def test_what_could_not_work_is_refused(desk: Desk, words: str, said: str) -> None:
    refused = desk.forgelm(*SMALL, "hydra/launcher=slurm", *words.split())
    assert (refused.code, refused.out) == (1, "")
    assert said in refused.err
    desk.assert_nothing_there()
