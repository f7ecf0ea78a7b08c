"""From the config to Hugging Face's TrainingArguments."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from forgelm.config.schema import RunConfig, TrainingConfig
from forgelm.models.load import bf16_native

# Decided by our own trainer, or known to the stock one by other names.
_NOT_PASSED = {
    "bf16",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "early_stopping_patience",
    "early_stopping_threshold",
    "eval_steps",
    "eval_strategy",
    "fsdp",
    "fsdp_config",
    "load_best_model_at_end",
    "record_batches",
    "save_in_background",
    "save_minutes",
    "save_overhead",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "use_cpu",
}


def training_arguments(
    config: RunConfig,
    root: Path,
    best_metric: str,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> TrainingArguments:
    """TrainingArguments that write below `root`; `best_metric` is the key that picks the best.

    `kind` is a subclass of them, `more` what it takes beside.
    """
    training = config.training
    arguments = kind(
        output_dir=str(root),
        **_passed(training) | _sharding(config),
        bf16=use_bf16(training),
        # The trainer takes bf16 on a processor only when told that there is nothing else.
        use_cpu=training.use_cpu or not torch.accelerator.is_available(),
        max_steps=config.max_steps or -1,
        num_train_epochs=config.epochs,
        seed=config.seed,
        metric_for_best_model=best_metric,
        # The stock trainer never saves by this; it notes the step of the best only with it.
        save_strategy="steps",
        # Without it the buckets are rebuilt after a start's first step, and sums come out in
        # another order than without the restart.
        ddp_find_unused_parameters=True,
        greater_is_better=config.task.greater_is_better,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        **more,
    )
    # Only now: with fsdp it would be advised against, for a way that draws another dropout when it
    # computes a second time.
    arguments.activation_checkpointing = training.activation_checkpointing
    if arguments.n_gpu > 1:
        # Several GPUs without ranks: the trainer would wrap the model in DataParallel unasked.
        arguments._n_gpu = 1
    return arguments


def _sharding(config: RunConfig) -> dict[str, Any]:
    if not config.training.fsdp:
        return {}
    return {
        "activation_checkpointing": False,
        "fsdp": True,
        "fsdp_config": plain(config.training.fsdp_config),
    }


def use_bf16(training: TrainingConfig) -> bool:
    """Mixed precision in bfloat16: as the config says, else where the device has it natively."""
    if training.bf16 is not None:
        return training.bf16
    return not training.fp16 and not training.use_cpu and bf16_native()


def _passed(training: TrainingConfig) -> dict[str, Any]:
    return {key: value for key, value in plain(training).items() if key not in _NOT_PASSED}


def plain(section: Any) -> dict[str, Any]:
    """A section of the config as its libraries take it: enums by name."""
    values = {item.name: getattr(section, item.name) for item in fields(section)}
    return {key: value.name if isinstance(value, Enum) else value for key, value in values.items()}
