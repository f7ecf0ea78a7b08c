"""Shards: no rank has the whole, all write a checkpoint together, and the result is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from forgelm.config.schema import Kind
from forgelm.drill import order_differences, record_differences, weight_differences
from forgelm.interrupt import VARIABLE
from forgelm.run.checkpoints import damage
from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from matrix import writing_teacher

SHARDED = "training.fsdp=true"
# The evaluation splits have three batches, and there are two ranks.
SMALL = (
    *TINY,
    "launch.ranks_per_node=2",
    "training.use_cpu=true",
    "training.per_device_train_batch_size=4",
    "training.per_device_eval_batch_size=8",
    "task.max_train_samples=47",
    "task.max_eval_samples=24",
    "training.eval_strategy=steps",
    "training.eval_steps=3",
    "max_steps=8",
)
WRITER = (
    "task=arithmetic",
    "task.max_length=16",
    "task.max_new_tokens=8",
    "mode=kd",
    "teacher=path",
    "teacher.path=causal_lm",
    "model.tiny.dropout=0.1",
    "training.gradient_accumulation_steps=2",
    "training.save_steps=2",
    "training.record_batches=true",
    SHARDED,
)


def train(folder: Path, *words: str, interrupt: str = "") -> subprocess.CompletedProcess[str]:
    """Two ranks of a run in `folder`, interrupted at a `POINT:COUNT:SIGNAL:RANK` if one is given.

    In a process of its own: what the first rank says goes past pytest.
    """
    return subprocess.run(
        [sys.executable, "-m", "forgelm", "train", *SMALL, *words],
        cwd=folder,
        env=os.environ | ({VARIABLE: interrupt} if interrupt else {}),
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_shards_come_to_what_whole_copies_do(tmp_path: Path) -> None:
    runs = {}
    for name, words in {"shards": (SHARDED,), "copies": ()}.items():
        done = train(tmp_path, f"run_name={name}", "training.load_best_model_at_end=true", *words)
        assert done.returncode == 0, done.stderr
        assert ("sharded over 2 ranks" in done.stdout) == (name == "shards")
        assert done.stderr == ""
        runs[name] = RunPaths(tmp_path / "outputs/nli_mini/tiny/sft" / name)
    shards, copies = runs["shards"], runs["copies"]

    whole, other = (load_file(run.root / "model.safetensors") for run in (shards, copies))
    assert whole.keys() == other.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, other[name], msg=name)
    for lines in zip(
        *(run.metrics.read_text().splitlines() for run in (shards, copies)), strict=True
    ):
        ours, theirs = map(json.loads, lines)
        assert {**ours, "time": 0} == pytest.approx({**theirs, "time": 0}, rel=1e-4)
    ours, theirs = (read_json(run.eval) for run in (shards, copies))
    assert ours["before"]["student"].keys() == theirs["before"]["student"].keys()
    for when in ("before", "after"):
        for split, scores in ours[when]["student"].items():
            assert scores == pytest.approx(theirs[when]["student"][split], rel=1e-4)

    (last, *_) = shards.checkpoints()
    parts = [load_file(last / f"rank-{rank}" / "model.safetensors") for rank in (0, 1)]
    assert not (last / "model.safetensors").exists()
    for name, tensor in load_file(copies.checkpoints()[0] / "model.safetensors").items():
        assert sum(len(part[name]) for part in parts) == len(tensor)
        assert len(tensor) == 1 or all(len(part[name]) < len(tensor) for part in parts)

    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(shards.root)
    assert type(loaded).__name__ == "BertForSequenceClassification"
    assert torch.equal(loaded.classifier.weight, whole["classifier.weight"])


def test_a_rank_killed_while_it_writes_its_part(tmp_path: Path) -> None:
    """Its checkpoint isn't one, and without a part of the one before that isn't either."""
    writing_teacher(tmp_path, Kind.causal_lm)
    reference, run = (
        RunPaths(tmp_path / "outputs/arithmetic/tiny/kd" / name) for name in ("whole", "mine")
    )
    done = train(tmp_path, *WRITER, "run_name=whole")
    assert done.returncode == 0, done.stderr

    # The save of step 6: what it waits for first is that of step 4.
    killed = train(tmp_path, *WRITER, "run_name=mine", interrupt="save:3:SIGKILL:1")
    assert killed.returncode == 2, killed.stderr
    assert "rank 1: killed by SIGKILL" in killed.stderr
    assert "another rank of this run ended" in killed.stderr
    assert "Traceback" not in killed.stderr
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-4", "checkpoint-2"]
    assert [damage(folder) for folder in run.checkpoints()] == [None, None]

    part = run.checkpoint(4) / "rank-1" / "optimizer.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    gone_on = train(tmp_path, *WRITER, "run_name=mine")
    assert gone_on.returncode == 0, gone_on.stderr
    assert "checkpoint-4 can't be used: rank-1/optimizer.safetensors was altered" in gone_on.stdout
    assert "going on from checkpoint-2 of 8 steps" in gone_on.stdout
    assert weight_differences(reference, run) == []
    assert record_differences(reference, run) == []
    assert order_differences(reference, run) == []
    assert len(list(reference.root.glob("checkpoint-8/rank-*/optimizer.pt"))) == 2
    assert not run.leftovers()
