"""A run that is asked to stop: where and however that happens, it goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import TINY, Command, Result, only_run

from forgelm import interrupt
from forgelm.drill import metric_lines, order_differences, record_differences, weight_differences
from forgelm.run.files import read_json, write_json
from forgelm.run.paths import RunPaths

# 8 steps an epoch; a log line each 4, a save each 5, an evaluation each 6 steps.
SMALL = (
    "model.tiny.num_hidden_layers=1",
    "task.max_train_samples=128",
    "max_steps=12",
    "training.logging_steps=4",
    "training.save_steps=5",
    "training.eval_strategy=steps",
    "training.eval_steps=6",
    "training.record_batches=true",
)
UNEVALUATED = ("training.eval_strategy=no", "training.eval_steps=null")
TEACHER = """\
# @package _global_
defaults:
  - override /task: nli_mini
  - override /model: tiny
training: {learning_rate: 1e-3, eval_strategy: 'no', per_device_train_batch_size: 16}
task: {max_train_samples: 64, max_eval_samples: 48}
model: {name: quick, tiny: {hidden_size: 16, intermediate_size: 32}}
max_steps: 6
"""
REASONS = {"SIGINT": "Ctrl-C"}
FIRST, SECOND = "validation_matched", "validation_mismatched"

Interrupted = Callable[..., Result]
Whole = Callable[..., RunPaths]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The same run, uninterrupted; made once for the same overrides."""
    from forgelm.cli.main import main

    made: dict[tuple[str, ...], RunPaths] = {}

    def run(*words: str) -> RunPaths:
        if words not in made:
            root = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["forgelm"])
                assert main(["train", *TINY, *SMALL, *words, f"output_root={root}"]) == 0
            made[words] = RunPaths(only_run(root))
        return made[words]

    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run to learn from; its directory is a saved model too."""
    from forgelm.cli.main import main

    root = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["forgelm"])
        assert main(["train", *TINY, "max_steps=4", "seed=5", f"output_root={root}"]) == 0
    return only_run(root)


def differences(ours: RunPaths, theirs: RunPaths) -> list[str]:
    return [
        *weight_differences(ours, theirs),
        *record_differences(ours, theirs),
        *order_differences(ours, theirs),
    ]


def registered(root: Path) -> list[str]:
    """The directories in the register of incomplete runs, from the output root."""
    return [read_json(p)["directory"] for p in (root / ".forgelm/incomplete").glob("*.json")]


def assert_stopped(done: Result, run: RunPaths, signal_name: str) -> None:
    """The run stopped safely, says how to go on, and left that behind."""
    assert done.code == 75, done.err
    reason = REASONS.get(signal_name, signal_name)
    assert f"stopped safely ({reason})" in done.err
    assert f"forgelm resume {run.root}" in done.err
    state = read_json(run.state)
    assert (state["status"], state["pipeline_complete"]) == ("preempted", False)
    session = read_json(run.metadata)["sessions"][-1]
    assert session["reason"] == reason
    assert session["stopped"] is not None
    root = run.root.parents[3]
    assert registered(root) == [str(run.root.relative_to(root))]


def assert_ended_as(run: RunPaths, uninterrupted: RunPaths, stops: int = 1) -> None:
    """The run is complete, and nothing tells it from one that was never interrupted."""
    assert differences(run, uninterrupted) == []
    steps = [line["step"] for line in metric_lines(run)]
    assert len(steps) == len(set(steps))
    state = read_json(run.state)
    assert (state["status"], state["step"], state["restarts"]) == ("complete", 12, stops)
    assert registered(run.root.parents[3]) == []


def only(tmp_path: Path) -> RunPaths:
    return RunPaths(only_run(tmp_path / "outputs"))


# Each point by SIGTERM, each signal somewhere, and the places where one step isn't like another:
# the first, one between log lines, those after a save and after an epoch, and the last.
PLACES = [
    "preparation:1:SIGTERM",
    "preparation:1:SIGINT",
    "evaluation_before:1:SIGUSR1",
    "evaluation_before:2:SIGTERM",
    "training:1:SIGINT",
    "training:1:SIGTERM",
    "training:6:SIGTERM",
    "training:7:SIGUSR1",
    "training:9:SIGUSR2",
    "training:12:SIGTERM",
    "evaluation:1:SIGUSR2",
    "evaluation:2:SIGTERM",
    "evaluation:4:SIGINT",
    "save:1:SIGTERM",
    "save:5:SIGUSR1",
    "finalize:1:SIGTERM",
    "finalize:6:SIGINT",
]


@pytest.mark.parametrize("case", PLACES)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path, case: str
) -> None:
    stopped = interrupted(case)
    run = only(tmp_path)
    assert_stopped(stopped, run, case.rpartition(":")[2])
    said = run.log.read_text()
    kept = run.checkpoints()
    gone_on = tiny(*SMALL)
    assert gone_on.code == 0, gone_on.err
    assert_ended_as(run, whole())
    both = run.log.read_text()
    assert both.startswith(said)
    assert both[len(said) :].count("going on from") == bool(kept)
    if kept:
        assert f"going on from {kept[0].name} of 12 steps" in both[len(said) :]
    assert [s["reason"] for s in read_json(run.metadata)["sessions"]][1:] == ["complete"]


def test_a_run_stopped_again_and_again_goes_on_to_the_same_bytes(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path
) -> None:
    cases = ("training:3:SIGTERM", "evaluation:2:SIGUSR1", "training:2:SIGINT", "save:2:SIGUSR2")
    for case in cases:
        assert_stopped(interrupted(case), only(tmp_path), case.rpartition(":")[2])
    assert tiny(*SMALL).code == 0
    assert_ended_as(only(tmp_path), whole(), stops=4)
    reasons = [session["reason"] for session in read_json(only(tmp_path).metadata)["sessions"]]
    assert reasons == ["SIGTERM", "SIGUSR1", "Ctrl-C", "SIGUSR2", "complete"]


def test_a_stop_before_the_first_log_line_loses_no_loss(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path
) -> None:
    """The mean loss of a log line that spans the stop holds the steps from before it."""
    words = ("training.logging_steps=12", *UNEVALUATED)
    assert interrupted("training:7:SIGTERM", *words).code == 75
    assert only(tmp_path).metrics.read_text() == ""
    assert tiny(*SMALL, *words).code == 0
    assert_ended_as(only(tmp_path), whole(*words))
    assert [line["step"] for line in metric_lines(only(tmp_path))] == [12]


def measured_otherwise(run: RunPaths, when: str, who: str, split: str) -> None:
    """Change a finished evaluation, so that measuring it again would show."""
    results = read_json(run.eval)
    results[when][who][split]["accuracy"] = 0.123
    write_json(run.eval, results)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_finished_evaluation_is_not_repeated(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path, when: str
) -> None:
    # In finalize each of the four files of the final model is a point, then each split.
    case = {"before": "evaluation_before:2:SIGTERM", "after": "finalize:6:SIGTERM"}[when]
    assert interrupted(case).code == 75
    run = only(tmp_path)
    known = read_json(run.eval)[when]["student"]
    assert known == {FIRST: read_json(whole().eval)[when]["student"][FIRST]}
    measured_otherwise(run, when, "student", FIRST)
    assert tiny(*SMALL).code == 0
    results, wanted = read_json(run.eval)[when]["student"], read_json(whole().eval)[when]["student"]
    assert results[FIRST]["accuracy"] == 0.123
    assert results[SECOND] == wanted[SECOND]


@pytest.mark.parametrize("kind", ["path", "run"])
@pytest.mark.parametrize(
    "case", ["evaluation_before:4:SIGTERM", "training:6:SIGUSR1", "evaluation:2:SIGTERM"]
)
def test_a_student_that_was_stopped_goes_on_to_the_same_bytes(
    interrupted: Interrupted,
    tiny: Command,
    whole: Whole,
    teacher: Path,
    tmp_path: Path,
    case: str,
    kind: str,
) -> None:
    words = ("mode=kd", f"teacher={kind}", f"teacher.{kind}={teacher}")
    assert_stopped(interrupted(case, *words), only(tmp_path), case.rpartition(":")[2])
    before = read_json(only(tmp_path).eval)["before"]
    if case.startswith("evaluation_before"):
        assert set(before["student"]) == {FIRST, SECOND}
        assert set(before["teacher"]) == {FIRST}
    assert tiny(*SMALL, *words).code == 0
    assert_ended_as(only(tmp_path), whole(*words))


def test_a_stop_while_the_teacher_is_trained(
    interrupted: Interrupted, tiny: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "quick.yaml").write_text(TEACHER)
    words = ("--config-dir", str(folder), "mode=kd", "task.teacher_experiment=quick")
    stopped = interrupted("training:3:SIGTERM", *words)
    (theirs,) = (tmp_path / "outputs/nli_mini/quick/sft").iterdir()
    (ours,) = (tmp_path / "outputs/nli_mini/tiny/kd").iterdir()
    assert stopped.code == 75
    assert f"to go on with both: forgelm resume {ours}" in stopped.err
    assert len(registered(tmp_path / "outputs")) == 2
    assert read_json(theirs / "training_state.json")["status"] == "preempted"
    gone_on = tiny(*SMALL, *words)
    assert gone_on.code == 0, gone_on.err
    assert "going on from checkpoint-3 of 6 steps" in (theirs / "output.log").read_text()
    assert len(read_json(theirs / "run_metadata.json")["sessions"]) == 2
    assert registered(tmp_path / "outputs") == []


def test_a_run_with_workers_goes_on_without_them_to_the_same_bytes(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path
) -> None:
    workers = "training.dataloader_num_workers=2"
    assert interrupted("training:6:SIGTERM", workers).code == 75
    assert interrupted("training:4:SIGTERM").code == 75
    assert tiny(*SMALL, workers).code == 0
    assert_ended_as(only(tmp_path), whole(), stops=2)


def test_a_stopped_sweep_goes_on_with_the_same_command(
    interrupted: Interrupted, tiny: Command, whole: Whole, tmp_path: Path
) -> None:
    stopped = interrupted("training:3:SIGTERM", "-m", "seed=1,2")
    assert stopped.code == 75
    assert read_json(only(tmp_path).state)["step"] == 3
    assert tiny(*SMALL, "-m", "seed=1,2").code == 0
    runs = [RunPaths(p.parent) for p in tmp_path.glob("outputs/*/*/*/*/config.yaml")]
    by_seed = {read_json(run.metadata)["seed"]: run for run in runs}
    assert sorted(by_seed) == [1, 2]
    for seed, run in by_seed.items():
        assert differences(run, whole(f"seed={seed}")) == []


# Real processes, for signals that come from outside and at any time.


@contextmanager
def child(tmp_path: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "forgelm", "train", *TINY, *SMALL, *words],
        cwd=tmp_path,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # Its workers too, should they have outlived it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_training(run: Path, process: subprocess.Popen[str]) -> None:
    """Until the first steps are logged."""
    end = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


LONG = ("max_steps=200", "training.per_device_train_batch_size=4", "training.eval_steps=150")


@pytest.mark.parametrize(
    "words",
    [
        ("training.dataloader_num_workers=2", "training.dataloader_persistent_workers=false"),
        ("training.dataloader_num_workers=2", "training.dataloader_persistent_workers=true"),
        ("wandb.mode=offline",),
    ],
    ids=["workers", "persistent workers", "W&B"],
)
def test_a_signal_to_all_its_processes_stops_safely(
    tiny: Command, whole: Whole, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """As Slurm and terminals send them: the workers get it too, and W&B's process."""
    run = tmp_path / "outputs/nli_mini/tiny/sft/mine"
    with child(tmp_path, *LONG, *words, "run_name=mine") as process:
        wait_for_training(run, process)
        for other in psutil.Process(process.pid).children(recursive=True):
            other.terminate()
        process.terminate()
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 75, err
    assert "Traceback" not in err
    state = read_json(run / "training_state.json")
    assert state["status"] == "preempted"
    assert 0 < state["step"] < 200
    assert tiny(*SMALL, *LONG, "run_name=mine").code == 0
    assert differences(RunPaths(run), whole(*LONG)) == []


def test_more_sigterms_change_nothing(tmp_path: Path) -> None:
    run = tmp_path / "outputs/nli_mini/tiny/sft/mine"
    with child(tmp_path, *LONG, "run_name=mine") as process:
        wait_for_training(run, process)
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        err = process.communicate(timeout=60)[1]
    assert read_json(run / "training_state.json")["status"] == "preempted"
    assert process.returncode == 75, err


def test_a_second_ctrl_c_stops_at_once(tiny: Command, whole: Whole, tmp_path: Path) -> None:
    # Steps of many micro-batches, so that the second one comes while the first's step is going on.
    words = (
        "max_steps=3",
        "training.gradient_accumulation_steps=150",
        "task.max_train_samples=2400",
        "training.save_steps=1",
        "training.save_in_background=false",
        *UNEVALUATED,
    )
    run = RunPaths(tmp_path / "outputs/nli_mini/tiny/sft/mine")
    environment = {interrupt.VARIABLE: "training:2:SIGINT"}
    with child(tmp_path, *words, "run_name=mine", **environment) as process:
        assert process.stderr is not None
        heard = next(line for line in process.stderr if "Ctrl-C again stops at once" in line)
        assert "stopping after this step" in heard
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-1"]
    assert read_json(run.state)["status"] == "preempted"
    assert read_json(run.metadata)["sessions"][-1]["reason"] == "Ctrl-C"
    assert len(registered(tmp_path / "outputs")) == 1
    gone_on = tiny(*SMALL, *words, "run_name=mine")
    assert gone_on.code == 0, gone_on.err
    assert "going on from checkpoint-1 of 3 steps" in gone_on.out
    assert differences(run, whole(*words)) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_after_the_work_changes_nothing(name: str) -> None:
    child = (
        "import os, signal, sys\n"
        "from forgelm import stop\n"
        "stop.ends_with_this()\n"
        "with stop.listening(): pass\n"
        f"os.kill(os.getpid(), signal.{name})\n"
        "sys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", child]).returncode == 3
