"""Memory that runs out: one line that says which of the values in force to lower."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, Command, only_run

from forgelm.config.schema import (
    EvalConfig,
    KdConfig,
    Kind,
    LmEvalConfig,
    LoraSection,
    ModelConfig,
    RlConfig,
    RunConfig,
    SftConfig,
    TaskConfig,
    TeacherConfig,
    TeacherDtype,
    TeacherKind,
    TrainingConfig,
)
from forgelm.errors import RunError
from forgelm.memory import Doing, explained
from forgelm.run.files import read_json

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.20 GiB is free."
)
# One activation of 2,000 rows is some 20 GB, that of 8 rows, and all else, below 2.
WIDE = ("model.tiny.num_hidden_layers=1", "model.tiny.intermediate_size=65536", "max_steps=1")
ADDRESSES = 9 << 30


def test_the_model_is_too_large(tiny: Command, tmp_path: Path) -> None:
    done = tiny("model.tiny.intermediate_size=1000000000000")
    assert done.code == 2
    assert done.err.strip() == (
        "forgelm: out of memory while the model was built (59604.64 GiB more were asked for): "
        "lower model.tiny.hidden_size=16 or model.tiny.intermediate_size=1000000000000 or "
        "model.tiny.num_hidden_layers=2"
    )
    run = only_run(tmp_path / "outputs")
    assert read_json(run / "training_state.json")["status"] == "failed"
    assert "DefaultCPUAllocator: can't allocate memory" in (run / "output.log").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["training.per_device_train_batch_size=2000", "task.max_eval_samples=16"],
            "out of memory in training ({} GiB more were asked for): lower "
            "training.per_device_train_batch_size=2000 (to 1000, with "
            "training.gradient_accumulation_steps=2 for as large a step) or task.max_length=80; or "
            "set training.activation_checkpointing=true or model.lora.enabled=true",
        ),
        (
            ["training.per_device_eval_batch_size=2000", "task.max_eval_samples=2000"],
            "out of memory in an evaluation ({} GiB more were asked for): lower "
            "training.per_device_eval_batch_size=2000 or task.max_length=80",
        ),
    ],
    ids=["training", "evaluation"],
)
def test_the_batch_is_too_large(words: list[str], said: str, tmp_path: Path) -> None:
    rows = "task.max_train_samples=2000"
    done = subprocess.run(
        [sys.executable, "-m", "forgelm", "train", *TINY, *WIDE, rows, *words],
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    before, _, after = f"forgelm: {said}".partition("{}")
    assert line.startswith(before)
    assert line.endswith(after)


def test_the_accelerator_is_too_small(tiny: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises for a GPU, from where a step's memory is largest."""
    import torch

    import forgelm.modes.sft

    def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(forgelm.modes.sft, "task_loss", task_loss)
    done = tiny("task=arithmetic", "training.gradient_accumulation_steps=3", "max_steps=2")
    assert done.code == 2
    assert done.err.strip() == (
        "forgelm: out of memory in training (2.50 GiB more were asked for): lower "
        "training.per_device_train_batch_size=16 (to 8, with "
        "training.gradient_accumulation_steps=6 for as large a step) or task.max_length=16; or set "
        "training.activation_checkpointing=true or model.lora.enabled=true"
    )


def config(
    mode: object, training: TrainingConfig | None = None, lora: bool = False, **task: object
) -> RunConfig:
    return RunConfig(
        mode=mode,
        task=TaskConfig(name="mine", **task),  # type: ignore[arg-type]
        model=ModelConfig(name="large", path="large", lora=LoraSection(enabled=lora)),
        teacher=TeacherConfig(kind=TeacherKind.path, path="t", dtype=TeacherDtype.float32),
        training=training or TrainingConfig(),
        eval=EvalConfig(lm_eval=LmEvalConfig(batch_size=4)),
    )


@pytest.mark.parametrize(
    ("asked", "doing", "said"),
    [
        (
            config(RlConfig(use_vllm=True), TrainingConfig(activation_checkpointing=True), True),
            Doing.training,
            "lower training.per_device_train_batch_size=32 (to 16, with "
            "training.gradient_accumulation_steps=2 for as large a step) or task.max_length=128 or "
            "mode.max_completion_length=64 or mode.num_generations=8 or "
            "mode.vllm_gpu_memory_utilization=0.3",
        ),
        (
            config(KdConfig(), TrainingConfig(per_device_train_batch_size=1), True),
            Doing.training,
            "lower task.max_length=128; or set training.activation_checkpointing=true or "
            "teacher.dtype=bfloat16",
        ),
        (
            config(SftConfig(), TrainingConfig(per_device_train_batch_size=3), True),
            Doing.training,
            "lower training.per_device_train_batch_size=3 (to 1, with "
            "training.gradient_accumulation_steps=3 for as large a step) or task.max_length=128; "
            "or set training.activation_checkpointing=true",
        ),
        (
            config(SftConfig(), kind=Kind.causal_lm, metrics=["exact_match"]),
            Doing.evaluation,
            "lower training.per_device_eval_batch_size=64 or task.max_length=128 or "
            "task.max_new_tokens=64",
        ),
        (config(SftConfig()), Doing.lm_eval, "lower eval.lm_eval.batch_size=4"),
        (
            config(KdConfig()),
            Doing.loading,
            "lower the size of model=large; or set model.dtype=bfloat16 with "
            "model.lora.enabled=true or teacher.dtype=bfloat16",
        ),
    ],
    ids=["rl", "kd", "an odd batch", "answers", "lm-eval", "loading"],
)
def test_what_to_lower(asked: RunConfig, doing: Doing, said: str) -> None:
    with pytest.raises(RunError) as caught, explained(asked, doing):
        raise MemoryError
    assert str(caught.value) == f"out of memory {doing.value}: {said}"


def test_other_failures_are_left_alone() -> None:
    with (
        pytest.raises(RuntimeError, match="a shape"),
        explained(config(SftConfig()), Doing.training),
    ):
        raise RuntimeError("a shape is wrong")
