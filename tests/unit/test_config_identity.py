"""The config hash: what decides a result is in it, what doesn't is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from forgelm.config.compose import Request
from forgelm.config.identity import HASH_LENGTH, config_hash, differences
from forgelm.config.request import check_request
from forgelm.config.schema import RunConfig

SFT = ("task=nli_mini", "model=tiny", "mode=sft")
KD = ("task=mnli", "model=distilbert", "mode=kd")
STSB = ("task=stsb", "model=bert_tiny", "mode=kd")


def composed(*overrides: str) -> RunConfig:
    (point,) = check_request(Request(overrides=overrides))
    return point.config


def hash_of(*overrides: str) -> str:
    return config_hash(composed(*overrides))


def test_the_hash_is_short_and_names_a_folder() -> None:
    assert re.fullmatch(rf"[0-9a-f]{{{HASH_LENGTH}}}", hash_of())
    assert 8 <= HASH_LENGTH <= 16


@pytest.mark.parametrize("base", [SFT, KD, STSB], ids=" ".join)
@pytest.mark.parametrize(
    "change",
    [
        "output_root=elsewhere",
        "run_name=mine",
        "debug=true",
        "resume=outputs/some/run",
        "wandb.mode=disabled",
        "wandb.project=mine",
        "wandb.entity=me",
        "wandb.group=group",
        "wandb.tags=[a,b]",
        "training.logging_steps=1",
        "training.logging_first_step=true",
        "training.save_steps=7",
        "training.save_strategy=epoch",
        "training.save_total_limit=null",
        "training.dataloader_num_workers=2",
        "training.dataloader_num_workers=2 training.dataloader_persistent_workers=true",
        "eval.before_training=false",
    ],
)
def test_what_does_not_decide_the_result_is_not_in_the_hash(
    base: tuple[str, ...], change: str
) -> None:
    before, after = composed(*base), composed(*base, *change.split())
    assert before != after
    assert config_hash(before) == config_hash(after)
    assert differences(after, before) == []


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (
            SFT,
            [
                "task=rte",
                "task.name=other",
                "task.max_length=32",
                "task.max_train_samples=100",
                "task.max_eval_samples=100",
                "task.validation_splits=[validation_matched]",
                "task.metrics=[f1_macro]",
                "task.labels=[a,b,c]",
                "model=tiny_teacher",
                "model.name=other",
                "model.tiny.hidden_size=32",
                "model.tiny.dropout=0.2",
                "mode=kd",
                "seed=7",
                "epochs=4",
                "max_steps=10",
                "training.learning_rate=1e-4",
                "training.lr_scheduler_type=cosine",
                "training.warmup_steps=0.2",
                "training.optim=adafactor",
                "training.per_device_train_batch_size=16",
                "training.gradient_accumulation_steps=2",
                "training.max_grad_norm=0",
                "training.bf16=true",
                "training.bf16=false",
                "training.full_determinism=true",
                "training.train_sampling_strategy=sequential",
                "training.dataloader_drop_last=true",
                "training.load_best_model_at_end=true",
            ],
        ),
        (
            KD,
            [
                "mode.alpha=0.4",
                "mode.temperature=4",
                "mode.loss=mse",
                "model.path=org/other",
                "model.revision=v1",
                "model.trust_remote_code=true",
                "task.revision=v1",
                "task.teacher=org/other",
                "task.teacher_revision=v1",
                "teacher=path teacher.path=org/other",
                "teacher.dtype=float32",
            ],
        ),
    ],
    ids=["sft", "kd"],
)
def test_what_decides_the_result_is_in_the_hash(base: tuple[str, ...], changes: list[str]) -> None:
    hashes = {change: hash_of(*base, *change.split()) for change in changes}
    hashes["unchanged"] = hash_of(*base)
    assert len(set(hashes.values())) == len(hashes), hashes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("", "seed=42 epochs=1.5 training.learning_rate=1.5e-3"),
        ("epochs=4", "epochs=4.0"),
        ("seed=1 epochs=2", "epochs=2 seed=1"),
        ("seed=2 seed=1", "seed=1"),
        (
            "experiment=mnli/distilbert/00_sft",
            "task=mnli model=distilbert training.learning_rate=0.00003 training.warmup_steps=0.06 "
            "training.weight_decay=0.01",
        ),
    ],
)
def test_the_same_config_written_otherwise_has_the_same_hash(one: str, other: str) -> None:
    assert hash_of(*one.split()) == hash_of(*other.split())


def test_differences_name_the_key_and_both_values() -> None:
    theirs = composed(*KD)
    ours = composed(*KD, "seed=7", "mode.alpha=0.4", "training.optim=sgd", "run_name=mine")
    assert differences(ours, theirs) == [
        "mode.alpha: 0.9 -> 0.4",
        "seed: 42 -> 7",
        "training.optim: adamw_torch -> sgd",
    ]


def test_the_hash_is_the_same_in_every_process() -> None:
    program = """
from forgelm.config.compose import Request
from forgelm.config.identity import config_hash
from forgelm.config.request import check_request

(point,) = check_request(Request(overrides=("task=mnli", "model=distilbert", "mode=kd")))
print(config_hash(point.config))
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            timeout=60,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1", "2")
    }
    assert found == {hash_of(*KD)}
