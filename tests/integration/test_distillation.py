"""mode=kd on real parts: its teachers, its equality with sft at alpha 0, its loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, Command

from forgelm.run.files import read_json

QUICK = ("training.eval_strategy=no",)
TEACHER = """\
# @package _global_
defaults:
  - override /task: nli_mini
  - override /model: tiny
training: {learning_rate: 1e-3, eval_strategy: 'no', per_device_train_batch_size: 16}
task: {max_train_samples: 64, max_eval_samples: 48}
model: {name: quick, tiny: {hidden_size: 16, intermediate_size: 32}}
max_steps: 4
"""


@pytest.fixture
def trained(tiny: Command, tmp_path: Path) -> Path:
    """A complete run to learn from."""
    assert tiny("max_steps=8", "run_name=teacher", "model.name=big", *QUICK).code == 0
    return tmp_path / "outputs/nli_mini/big/sft/teacher"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """Own configs with a teacher that is trained in no time."""
    folder = tmp_path / "own"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "quick.yaml").write_text(TEACHER)
    return folder


def kd(root: Path, name: str) -> Path:
    return root / "outputs/nli_mini/tiny/kd" / name


def test_a_student_learns_from_an_earlier_run(tiny: Command, trained: Path, tmp_path: Path) -> None:
    done = tiny(
        "mode=kd", "teacher=run", "teacher.run=teacher", "max_steps=4", "run_name=s", *QUICK
    )
    assert done.code == 0, done.err
    results = read_json(kd(tmp_path, "s") / "eval.json")
    theirs = read_json(trained / "eval.json")["after"]["student"]
    for split, scores in theirs.items():
        assert results["before"]["teacher"][split] == pytest.approx(scores, rel=1e-5)
    assert "0.1 cross-entropy + 0.9 T^2 KL(teacher || student), T = 1" in done.out
    assert "gap closed" in done.out


def test_alpha_zero_is_sft_bit_for_bit(tiny: Command, tmp_path: Path) -> None:
    assert tiny("max_steps=6", "run_name=sft", *QUICK).code == 0
    none = tiny("mode=kd", "mode.alpha=0", "max_steps=6", "run_name=zero", *QUICK)
    assert none.code == 0, none.err
    assert "teacher  none" in none.out
    ours = (kd(tmp_path, "zero") / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "outputs/nli_mini/tiny/sft/sft/model.safetensors").read_bytes()
    assert tiny("mode=kd", "teacher=none", "mode.alpha=0", "max_steps=1", *QUICK).code == 0


def test_the_teacher_changes_the_student(tiny: Command, trained: Path, tmp_path: Path) -> None:
    common = ("mode=kd", "teacher=run", f"teacher.run={trained}", "max_steps=4", *QUICK)
    for name, words in {"a": (), "b": ("mode.temperature=4",), "c": ("mode.loss=mse",)}.items():
        assert tiny(*common, f"run_name={name}", *words).code == 0
    weights = {(kd(tmp_path, name) / "model.safetensors").read_bytes() for name in "abc"}
    assert len(weights) == 3


def test_the_tasks_own_teacher_is_trained_once(
    tiny: Command, configs: Path, tmp_path: Path
) -> None:
    common = ("--config-dir", str(configs), "mode=kd", "task.teacher_experiment=quick", *QUICK)
    first = tiny(*common, "max_steps=2", "seed=1")
    assert first.code == 0, first.err
    assert "the teacher isn't trained yet" in first.out
    (teacher,) = (tmp_path / "outputs/nli_mini/quick/sft").iterdir()
    made = (teacher / "model.safetensors").stat().st_mtime_ns
    second = tiny(*common, "max_steps=2", "seed=2")
    assert second.code == 0, second.err
    assert "the teacher isn't trained yet" not in second.out
    assert (teacher / "model.safetensors").stat().st_mtime_ns == made
    (run, _) = sorted((tmp_path / "outputs/nli_mini/tiny/kd").iterdir())
    assert f"run: {teacher}" in (run / "config.yaml").read_text()


def test_two_students_at_once_share_one_teacher(configs: Path, tmp_path: Path) -> None:
    words = [*TINY, *QUICK, "mode=kd", "task.teacher_experiment=quick", "max_steps=2"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "forgelm", "--config-dir", str(configs), *words, f"seed={seed}"],
            cwd=tmp_path,
            env={**os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    ends = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    (teacher,) = (tmp_path / "outputs/nli_mini/quick/sft").iterdir()
    assert len(read_json(teacher / "run_metadata.json")["sessions"]) == 1


def test_an_incomplete_teacher_run_is_refused(tiny: Command, tmp_path: Path) -> None:
    broken = tiny("training.learning_rate=1e30", "max_steps=9", "run_name=half", *QUICK)
    assert broken.code == 2
    refused = tiny("mode=kd", "teacher=run", "teacher.run=half", "max_steps=1", *QUICK)
    assert refused.code == 1
    assert "isn't complete; go on with it first" in refused.err


@pytest.mark.parametrize("batch", [(4, 4), (8, 2), (5, 4)])
def test_gradient_accumulation_changes_nothing_but_rounding(
    batch: tuple[int, int], tiny: Command, trained: Path, tmp_path: Path
) -> None:
    """One optimizer step over the same 16 rows (20 for 5 x 4, the last micro-batch cut short)."""
    from safetensors.torch import load_file

    size, parts = batch
    rows = 16 if size != 5 else 18
    common = (
        "mode=kd",
        "teacher=run",
        "teacher.run=teacher",
        "epochs=1",
        "model.tiny.dropout=0",
        f"task.max_train_samples={rows}",
        "training.optim=sgd",
        "training.max_grad_norm=0",
        "training.lr_scheduler_type=constant",
        "training.learning_rate=0.1",
        *QUICK,
    )
    split = tiny(
        *common,
        f"training.per_device_train_batch_size={size}",
        f"training.gradient_accumulation_steps={parts}",
        "run_name=split",
    )
    assert split.code == 0, split.err
    whole = tiny(*common, f"training.per_device_train_batch_size={rows}", "run_name=whole")
    assert whole.code == 0, whole.err
    ours = load_file(kd(tmp_path, "split") / "model.safetensors")
    theirs = load_file(kd(tmp_path, "whole") / "model.safetensors")
    start = tiny(*common, "training.learning_rate=1e-30", "run_name=start")
    assert start.code == 0
    before = load_file(kd(tmp_path, "start") / "model.safetensors")
    moved = max((theirs[name] - before[name]).abs().max().item() for name in ours)
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert moved > 1e-4
    assert apart < 1e-3 * moved


def test_a_teacher_in_bfloat16_runs_in_bfloat16(
    tiny: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgelm.modes import kd as module

    seen: list[tuple[torch.dtype, bool, bool]] = []
    original = module.DistillationTrainer._teacher_logits

    def look(self, teacher, inputs, targets):  # type: ignore[no-untyped-def]
        logits = original(self, teacher, inputs, targets)
        seen.append((logits.dtype, teacher.training, logits.requires_grad))
        return logits

    monkeypatch.setattr(module.DistillationTrainer, "_teacher_logits", look)
    words = ("mode=kd", "teacher=run", "teacher.run=teacher", "max_steps=2", *QUICK)
    assert tiny(*words, "teacher.dtype=bfloat16", "training.bf16=true").code == 0
    assert set(seen) == {(torch.bfloat16, False, False)}
    seen.clear()
    assert tiny(*words, "teacher.dtype=float32", "training.bf16=true").code == 0
    assert set(seen) == {(torch.float32, False, False)}
