"""A run from the command to its directory, on the embedded task."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Command, only_run

from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths

STEPS = "max_steps=6"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_everything_it_promises(tiny: Command, tmp_path: Path) -> None:
    done = tiny(
        STEPS, "wandb.mode=offline", "training.eval_strategy=steps", "training.eval_steps=3"
    )
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    assert run.parent.relative_to(tmp_path / "outputs") == Path("nli_mini/tiny/sft")
    state = read_json(run / "training_state.json")
    assert state["status"] == "complete"
    assert state["pipeline_complete"] is True
    assert (state["step"], state["target"]) == (6, 6)
    assert (run / "latest_checkpoint").read_text().strip() == state["latest_checkpoint"]
    assert (run / state["latest_checkpoint"] / "trainer_state.json").is_file()
    metadata = read_json(run / "run_metadata.json")
    assert metadata["config_hash"] == run.name
    assert metadata["sessions"][0]["reason"] == "complete"
    assert {"python", "torch", "transformers"} <= set(metadata["sessions"][0]["versions"])
    logged = lines(run / "metrics.jsonl")
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logged if "eval_validation_matched_accuracy" in line] == [3, 6]
    log = (run / "output.log").read_text()
    assert "train 192" in log
    assert "step 6/6 (100 %)" in log
    assert "validation_mismatched accuracy" in done.out
    assert f"forgelm predict {run.relative_to(tmp_path)}" in done.out
    assert list((run / "wandb").glob(f"offline-run-*-{metadata['wandb_id']}"))
    assert "nli_mini" in (run / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    assert list((tmp_path / "outputs" / ".forgelm" / "incomplete").iterdir()) == []


def test_the_final_model_predicts_what_eval_json_says(tiny: Command, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from forgelm.tasks.nli_mini import LABELS, generate
    from forgelm.tasks.sources import _PART_SEED

    assert tiny("max_steps=12", "training.eval_strategy=no").code == 0
    run = only_run(tmp_path / "outputs")
    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tuple(model.config.id2label[i] for i in range(3)) == LABELS
    import numpy

    for split in ("validation_matched", "validation_mismatched"):
        pairs = generate(split)
        chosen = numpy.random.RandomState(_PART_SEED).permutation(len(pairs))[:48]
        rows = [pairs[i] for i in chosen]
        batch = tokenizer(
            [row.premise for row in rows],
            [row.hypothesis for row in rows],
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            best = model(**batch).logits.argmax(-1).tolist()
        right = sum(a == row.label for a, row in zip(best, rows, strict=True)) / len(rows)
        after = read_json(run / "eval.json")["after"]["student"]
        assert after[split]["accuracy"] == pytest.approx(right, abs=1e-9)


def test_the_same_command_finds_its_complete_run(tiny: Command, tmp_path: Path) -> None:
    assert tiny(STEPS).code == 0
    run = only_run(tmp_path / "outputs")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = tiny(STEPS, "training.save_steps=3", "debug=true")
    assert again.code == 0
    assert "is complete" in again.out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_a_name_that_holds_another_config_is_refused(tiny: Command) -> None:
    assert tiny(STEPS, "run_name=mine").code == 0
    other = tiny(STEPS, "run_name=mine", "seed=7")
    assert other.code == 1
    assert "seed: 42 -> 7" in other.err
    assert "another run_name" in other.err


def test_a_run_goes_further(tiny: Command, forgelm: Command, tmp_path: Path) -> None:
    assert tiny("max_steps=4", "run_name=mine").code == 0
    further = forgelm("train", "resume=mine", "max_steps=8")
    assert further.code == 0, further.err
    assert "going on from checkpoint-4" in further.out
    run = only_run(tmp_path / "outputs")
    assert [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line] == [
        *range(1, 9)
    ]
    (made,) = read_json(run / "run_metadata.json")["extended"]
    assert made["max_steps"] == [4, 8]
    assert "complete" in tiny("max_steps=4", "run_name=mine").out


def test_a_run_goes_on_with_its_own_config_alone(tiny: Command, forgelm: Command) -> None:
    assert tiny("max_steps=4", "run_name=mine").code == 0
    changed = forgelm("train", "resume=mine", "seed=3", "training.learning_rate=1")
    assert changed.code == 1
    assert "seed, training.learning_rate" in changed.err


def test_a_sweep_names_its_points_and_ends_with_the_worst(tiny: Command, tmp_path: Path) -> None:
    swept = tiny("-m", STEPS, "run_name=mine", "seed=1,2")
    assert swept.code == 0, swept.err
    runs = sorted(path.name for path in (tmp_path / "outputs/nli_mini/tiny/sft").iterdir())
    assert len(runs) == 2
    assert all(name.startswith("mine-") for name in runs)
    mixed = tiny("-m", "max_steps=3", "training.learning_rate=1e-3,1e30")
    assert mixed.code == 2
    done = [read_json(p)["status"] for p in tmp_path.glob("outputs/*/*/*/*/training_state.json")]
    assert sorted(done) == ["complete", "complete", "complete", "failed"]


def test_a_loss_that_is_no_number_ends_the_run(tiny: Command, tmp_path: Path) -> None:
    broken = tiny("max_steps=20", "training.learning_rate=1e30", "training.max_grad_norm=0")
    assert broken.code == 2
    assert "the loss is nan" in broken.err
    assert "lower training.learning_rate" in broken.err
    assert "Traceback" not in broken.err
    run = only_run(tmp_path / "outputs")
    assert "Traceback" in (run / "output.log").read_text()
    assert read_json(run / "training_state.json")["status"] == "failed"
    (entry,) = (tmp_path / "outputs" / ".forgelm" / "incomplete").iterdir()
    assert read_json(entry)["directory"] == str(run.relative_to(tmp_path / "outputs"))


@pytest.mark.parametrize(
    "words", [(), ("training.save_steps=2",), ("training.eval_strategy=epoch",)]
)
def test_weights_that_are_no_numbers_are_never_kept(
    tiny: Command, tmp_path: Path, words: tuple[str, ...]
) -> None:
    rate = ("training.learning_rate=1e30", "training.max_grad_norm=0")
    broken = tiny("max_steps=4", "training.logging_steps=100", *rate, *words)
    assert broken.code == 2
    assert re.search(r"forgelm: the (loss is|weights are) .* at step [24]: lower", broken.err)
    run = only_run(tmp_path / "outputs")
    assert read_json(run / "training_state.json")["status"] == "failed"
    assert not list(run.glob("checkpoint-*"))


@pytest.mark.parametrize("length", ["max_steps=3", "epochs=1"])
def test_rows_that_fill_no_batch_are_refused(tiny: Command, length: str) -> None:
    size = "training.per_device_train_batch_size=1000"
    done = tiny(length, size, "training.dataloader_drop_last=true")
    assert done.code == 1
    assert done.err.strip() == (
        "forgelm: training.dataloader_drop_last=true: 192 training rows don't fill one batch of "
        f"{size}, so nothing would be learnt; leave it out, or lower the batch size"
    )


def test_encodings_are_used_again(tiny: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import forgelm.tasks.encode as encode

    assert tiny("max_steps=1").code == 0

    def refuse(*args: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(encode, "encode_texts", refuse)
    assert tiny("max_steps=1", "seed=9").code == 0
    longer = tiny("max_steps=1", "task.max_length=32")
    assert "encoded again" in longer.err


def test_the_best_weights_win_when_asked(tiny: Command, tmp_path: Path) -> None:
    done = tiny(
        "max_steps=6",
        "training.eval_strategy=steps",
        "training.eval_steps=1",
        "training.load_best_model_at_end=true",
        "training.save_steps=100",
        "training.learning_rate=5e-2",
    )
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    results = read_json(run / "eval.json")
    peak = results["peak"]["validation_matched"]
    assert results["after"]["student"]["validation_matched"]["accuracy"] == pytest.approx(
        peak["accuracy"]
    )
    assert f"the best weights are those of step {peak['step']}" in (run / "output.log").read_text()
    assert (run / f"checkpoint-{peak['step']}").is_dir()


def begun(folder: Path, steps: int) -> subprocess.Popen[str]:
    """A real `forgelm` in a process of its own, to be stopped in training."""
    words = [*TINY, f"max_steps={steps}", "training.save_steps=5", "run_name=stopped"]
    words += ["training.per_device_train_batch_size=4", "training.eval_strategy=no"]
    return subprocess.Popen(
        [sys.executable, "-m", "forgelm", "train", *words],
        cwd=folder,
        env={**os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_run_goes_on_and_ends_the_same(forgelm: Command, tmp_path: Path) -> None:
    child = begun(tmp_path, 400)
    run = tmp_path / "outputs/nli_mini/tiny/sft/stopped"
    wait_for(run / "latest_checkpoint", child)
    time.sleep(0.5)
    child.kill()
    child.communicate()
    paths = RunPaths(run)
    assert read_json(paths.state)["status"] == "running"
    shutil.rmtree(paths.checkpoints()[0], ignore_errors=False)
    words = [*TINY, "training.per_device_train_batch_size=4", "training.eval_strategy=no"]
    gone_on = forgelm("train", *words, "max_steps=400", "run_name=stopped")
    assert gone_on.code == 0, gone_on.err
    assert read_json(paths.state)["restarts"] == 1
    assert [line["step"] for line in lines(paths.metrics)] == [*range(1, 401)]
    whole = forgelm("train", *words, "max_steps=400", "run_name=whole")
    assert whole.code == 0
    other = run.parent / "whole"
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert read_json(run / "eval.json") == read_json(other / "eval.json")


def test_ctrl_c_stops_safely_and_leaves_the_run_registered(tmp_path: Path) -> None:
    child = begun(tmp_path, 100_000)
    run = tmp_path / "outputs/nli_mini/tiny/sft/stopped"
    wait_for(run / "latest_checkpoint", child)
    child.send_signal(signal.SIGINT)
    _out, err = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "Traceback" not in err
    assert read_json(run / "training_state.json")["status"] == "preempted"
    assert read_json(run / "run_metadata.json")["sessions"][0]["reason"] == "Ctrl-C"
    assert len(list((tmp_path / "outputs/.forgelm/incomplete").iterdir())) == 1
