"""`forgelm resume`: which runs it takes, what it lets change, how it ends."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import TINY, Command

from forgelm import interrupt
from forgelm.drill import metric_lines, order_differences, record_differences, weight_differences
from forgelm.run import lock
from forgelm.run.files import read_json, write_json
from forgelm.run.paths import OutputRoot, RunPaths

SMALL = (
    "model.tiny.num_hidden_layers=1",
    "task.max_train_samples=128",
    "max_steps=8",
    "training.logging_steps=4",
    "training.eval_strategy=no",
    "training.save_steps=2",
    "training.record_batches=true",
)
SFT = "nli_mini/tiny/sft"


def in_folder(root: Path, *words: str, case: str | None = None) -> int:
    """A small run in this process, for fixtures that outlive a test."""
    from forgelm.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["forgelm"])
        patch.chdir(root)
        if case is not None:
            patch.setattr(interrupt, "_seen", Counter())
            patch.setenv(interrupt.VARIABLE, case)
        return main(["train", *TINY, *SMALL, *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    root = tmp_path_factory.mktemp("whole")
    assert in_folder(root, "run_name=whole") == 0
    return RunPaths(root / "outputs" / SFT / "whole")


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stopped")
    assert in_folder(root, "run_name=mine", case="training:3:SIGTERM") == 75
    return root


@pytest.fixture
def mine(stopped_once: Path, tmp_path: Path) -> RunPaths:
    """A run stopped at step 3, named `mine`."""
    shutil.copytree(stopped_once / "outputs", tmp_path / "outputs")
    run = RunPaths(tmp_path / "outputs" / SFT / "mine")
    moved_here(run, tmp_path / "outputs")
    return run


def moved_here(run: RunPaths, root: Path) -> None:
    """Seal a copied run's config for where it lies now."""
    lines = run.config.read_text().splitlines()
    there = [f"output_root: {root}" if x.startswith("output_root:") else x for x in lines]
    run.config.write_text("\n".join(there) + "\n")


@pytest.fixture
def others(mine: RunPaths) -> Callable[[str], RunPaths]:
    """More runs like `mine`, registered as it is."""

    def make(name: str) -> RunPaths:
        other = RunPaths(mine.root.parent / name)
        shutil.copytree(mine.root, other.root)
        text = other.config.read_text().replace("run_name: mine", f"run_name: {name}")
        other.config.write_text(text)
        write_json(other.metadata, read_json(other.metadata) | {"run_id": f"fg-{name}"})
        register = mine.root.parents[3] / ".forgelm/incomplete"
        entry = {"run_id": f"fg-{name}", "directory": f"{SFT}/{name}"}
        write_json(register / f"fg-{name}.json", entry)
        return other

    return make


def status(run: RunPaths) -> str:
    return str(read_json(run.state)["status"])


def differences(ours: RunPaths, theirs: RunPaths) -> list[str]:
    return [
        *weight_differences(ours, theirs),
        *record_differences(ours, theirs),
        *order_differences(ours, theirs),
    ]


@pytest.mark.parametrize("how", ["absolute", "relative", "id", "name", "local"])
def test_a_run_is_named_in_each_way(
    forgelm: Command, mine: RunPaths, whole: RunPaths, tmp_path: Path, how: str
) -> None:
    words = {
        "absolute": [str(mine.root)],
        "relative": [f"outputs/{SFT}/mine/"],
        "id": [read_json(mine.metadata)["run_id"]],
        "name": ["mine"],
        "local": ["mine", "--local"],
    }[how]
    done = forgelm("resume", *words)
    assert done.code == 0, done.err
    assert "going on from checkpoint-3 of 8 steps" in done.out
    assert status(mine) == "complete"
    assert differences(mine, whole) == []
    assert list((tmp_path / "outputs/.forgelm/incomplete").iterdir()) == []


@pytest.mark.parametrize("name", ["a=b", "it's", "a b", "a,b", "[x]", "${x}", "a\\b"])
def test_a_directory_may_have_any_name(forgelm: Command, mine: RunPaths, name: str) -> None:
    folder = mine.root.parent / name
    mine.root.rename(folder)
    done = forgelm("resume", str(folder))
    assert done.code == 0, done.err
    assert status(RunPaths(folder)) == "complete"


def test_several_runs_go_on_one_after_the_other(
    forgelm: Command, mine: RunPaths, others: Callable[[str], RunPaths], whole: RunPaths
) -> None:
    second = others("second")
    done = forgelm("resume", "mine", str(second.root))
    assert done.code == 0, done.err
    assert done.out.index("-- mine") < done.out.index(f"-- {second.root}")
    assert differences(mine, whole) == differences(second, whole) == []


def test_a_complete_run_is_left_as_it_is(forgelm: Command, mine: RunPaths) -> None:
    assert forgelm("resume", "mine").code == 0
    before = {p: p.stat().st_mtime_ns for p in mine.root.rglob("*") if p.is_file()}
    again = forgelm("resume", "mine")
    assert again.code == 0
    assert f"{mine.root} is complete" in again.out
    assert before == {p: p.stat().st_mtime_ns for p in mine.root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["mien"], ["mien: no such run", "below outputs", "did you mean mine?"]),
        (["nothing"], ["nothing: no such run"]),
        ([], ["resume needs a RUN, or --incomplete"]),
        (["max_steps=9"], ["resume needs a RUN, or --incomplete"]),
        (["mine", "--locally"], ["--locally: no such option; one of --incomplete, --local"]),
        (["mine", "--incomplete"], ["--incomplete with mine: name runs, or take all"]),
        (
            ["mine", "seed=3"],
            ["seed: mine goes on", "only max_steps and epochs may"],
        ),
        (
            ["mine", "training.learning_rate=1", "max_steps=9"],
            ["training.learning_rate: mine goes on with the config"],
        ),
        (["mine", "mode=kd"], ["mode: mine goes on with the config"]),
        (["mine", "max_step=9"], ["max_step", "max_steps"]),
        (["mine", "max_steps=2"], ["max_steps=2: the run has 8; give more"]),
        (["mine", "max_steps=7"], ["max_steps=7: the run has 8; give more"]),
        (["mine", "epochs=1"], ["epochs=1: the run has 1.5; give more"]),
        (["mine", "output_root=empty"], ["mine: no such run", "below empty"]),
    ],
)
def test_a_wrong_request_is_refused_and_changes_nothing(
    forgelm: Command, mine: RunPaths, words: list[str], parts: list[str]
) -> None:
    before = {p: p.read_bytes() for p in mine.root.rglob("*") if p.is_file()}
    refused = forgelm("resume", *words)
    assert refused.code == 1
    for part in parts:
        assert part in refused.err
    assert "Traceback" not in refused.err
    assert before == {p: p.read_bytes() for p in mine.root.rglob("*") if p.is_file()}


def test_a_name_of_several_runs_needs_the_directory(forgelm: Command, mine: RunPaths) -> None:
    other = mine.root.parents[1] / "kd" / "mine"
    shutil.copytree(mine.root, other)
    refused = forgelm("resume", "mine")
    assert refused.code == 1
    assert "mine: 2 runs have this name" in refused.err
    assert "give the directory" in refused.err
    assert forgelm("resume", str(mine.root)).code == 0


def test_a_run_is_extended_and_keeps_its_past(
    forgelm: Command, mine: RunPaths, tmp_path: Path
) -> None:
    assert forgelm("resume", "mine").code == 0
    past, said = metric_lines(mine), mine.log.read_text()
    further = forgelm("resume", "mine", "max_steps=12")
    assert further.code == 0, further.err
    assert "going on from checkpoint-8 of 12 steps" in further.out
    assert mine.log.read_text().startswith(said)
    assert metric_lines(mine)[: len(past)] == past
    assert [line["step"] for line in metric_lines(mine)] == [4, 8, 12]
    (made,) = read_json(mine.metadata)["extended"]
    assert made["max_steps"] == [8, 12]
    assert "max_steps: 12" in mine.config.read_text()
    assert (status(mine), read_json(mine.state)["target"]) == ("complete", 12)
    assert list((tmp_path / "outputs/.forgelm/incomplete").iterdir()) == []


def test_an_extension_that_was_stopped_goes_on_by_itself(
    forgelm: Command,
    mine: RunPaths,
    others: Callable[[str], RunPaths],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = others("second")
    assert forgelm("resume", "mine", "second").code == 0
    assert forgelm("resume", "second", "max_steps=12").code == 0
    monkeypatch.setattr(interrupt, "_seen", Counter())
    monkeypatch.setenv(interrupt.VARIABLE, "training:2:SIGTERM")
    assert forgelm("resume", "mine", "max_steps=12").code == 75
    monkeypatch.delenv(interrupt.VARIABLE)
    assert (status(mine), read_json(mine.state)["pipeline_complete"]) == ("preempted", False)
    assert forgelm("resume", "mine").code == 0
    assert differences(mine, second) == []
    assert len(read_json(mine.metadata)["extended"]) == 1


def test_configs_that_changed_since_do_not_matter(
    forgelm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tmp_path / "own/experiment/mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\ntraining:\n  learning_rate: 2e-3\n")
    words = [x for x in (*TINY, *SMALL) if not x.startswith("training.learning_rate")]
    words = ["--config-dir", "own", *words, "experiment=mine"]
    assert forgelm("train", *words, "run_name=whole").code == 0
    monkeypatch.setattr(interrupt, "_seen", Counter())
    monkeypatch.setenv(interrupt.VARIABLE, "training:3:SIGTERM")
    assert forgelm("train", *words, "run_name=mine").code == 75
    monkeypatch.delenv(interrupt.VARIABLE)
    runs = tmp_path / "outputs" / SFT
    experiment.write_text("# @package _global_\ntraining:\n  learning_rate: 7e-2\n")
    done = forgelm("resume", "mine")
    assert done.code == 0, done.err
    assert differences(RunPaths(runs / "mine"), RunPaths(runs / "whole")) == []
    refused = forgelm("train", *words, "run_name=mine")
    assert refused.code == 1
    assert "training.learning_rate: 0.002 -> 0.07" in refused.err


def cancel(run: RunPaths) -> None:
    write_json(run.state, read_json(run.state) | {"status": "cancelled"})


def test_incomplete_takes_all_but_the_cancelled_and_the_busy(
    forgelm: Command, mine: RunPaths, others: Callable[[str], RunPaths], whole: RunPaths
) -> None:
    second, cancelled, busy = others("second"), others("cancelled"), others("busy")
    others("deleted")
    shutil.rmtree(mine.root.parent / "deleted")
    cancel(cancelled)
    with busy.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump(asdict(lock._myself()), file)
        file.flush()
        done = forgelm("resume", "--incomplete")
    assert done.code == 0, done.err
    assert "left alone:" in done.out
    assert f"{busy.root}: process" in done.out
    assert [status(run) for run in (mine, second, cancelled, busy)] == [
        "complete",
        "complete",
        "cancelled",
        "preempted",
    ]
    assert differences(second, whole) == []
    register = mine.root.parents[3] / ".forgelm/incomplete"
    left = {read_json(path)["directory"] for path in register.iterdir()}
    assert {f"{SFT}/cancelled", f"{SFT}/busy"} <= left
    assert f"{SFT}/mine" not in left


def test_a_busy_run_that_was_named_is_refused(forgelm: Command, mine: RunPaths) -> None:
    with mine.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump(asdict(lock._myself()), file)
        file.flush()
        refused = forgelm("resume", "mine")
    assert refused.code == 1
    assert "is in this run; wait for it, stop it, or give another run_name" in refused.err


def test_a_run_that_was_named_goes_on_though_cancelled(forgelm: Command, mine: RunPaths) -> None:
    cancel(mine)
    assert "no incomplete runs below outputs" in forgelm("resume", "--incomplete").out
    assert forgelm("resume", "mine").code == 0
    assert status(mine) == "complete"


@pytest.mark.parametrize("words", [("--incomplete",), ("mine",)])
def test_runs_are_looked_for_below_the_output_root(
    forgelm: Command, mine: RunPaths, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Where they lie now: a tree that was moved since is as good."""
    (tmp_path / "outputs").rename(tmp_path / "elsewhere")
    moved = RunPaths(tmp_path / "elsewhere" / SFT / "mine")
    if words == ("--incomplete",):
        nothing = forgelm("resume", "--incomplete")
        assert (nothing.code, "no incomplete runs" in nothing.out) == (0, True)
    done = forgelm("resume", *words, "output_root=elsewhere")
    assert done.code == 0, done.err
    assert status(moved) == "complete"
    assert list((tmp_path / "elsewhere/.forgelm/incomplete").iterdir()) == []
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("runs", "code"),
    [
        (["mine", "nowhere"], 1),
        (["nowhere", "mine"], 1),
        (["damaged", "nowhere", "mine"], 2),
    ],
)
def test_it_ends_with_the_worst_and_tries_all(
    forgelm: Command,
    mine: RunPaths,
    others: Callable[[str], RunPaths],
    runs: list[str],
    code: int,
) -> None:
    damaged = others("damaged")
    damaged.state.write_text("{")
    done = forgelm("resume", *runs)
    assert done.code == code, done.err
    assert "nowhere: no such run" in done.err
    assert ("damaged, not JSON any more" in done.err) == (code == 2)
    assert status(mine) == "complete"


def test_a_stop_ends_the_batch(
    forgelm: Command,
    mine: RunPaths,
    others: Callable[[str], RunPaths],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = others("second")
    monkeypatch.setattr(interrupt, "_seen", Counter())
    monkeypatch.setenv(interrupt.VARIABLE, "training:2:SIGTERM")
    done = forgelm("resume", "mine", "second")
    assert done.code == 75
    states = [read_json(run.state) for run in (mine, second)]
    assert [(state["step"], state["restarts"]) for state in states] == [(5, 1), (3, 0)]


def test_help_is_there_at_once() -> None:
    code = (
        "import sys; from forgelm.cli.main import main; code = main(['resume', '--help']); "
        "sys.exit(code or any(x in sys.modules for x in ('torch', 'transformers', 'hydra')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: forgelm resume RUN... [OVERRIDES]")
    assert "--incomplete" in shown.stdout
    assert shown.stderr == ""


def test_entries_of_runs_that_are_gone_are_dropped(forgelm: Command, mine: RunPaths) -> None:
    register = OutputRoot(mine.root.parents[3]).register
    for run_id, name in (("fg-gone", "gone"), ("fg-other", "mine")):
        entry = {"run_id": run_id, "directory": f"nli_mini/tiny/sft/{name}"}
        write_json(register / f"{run_id}.json", entry)
    done = forgelm("resume", "--incomplete")
    assert done.code == 0, done.err
    assert status(mine) == "complete"
    assert list(register.iterdir()) == []
