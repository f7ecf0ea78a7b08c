"""The trainer of the mode, around the student."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from forgelm.config.rewards import round_of
from forgelm.config.schema import RlConfig, RunConfig
from forgelm.deadline import Deadline
from forgelm.run.lifecycle import Run
from forgelm.stages.evaluation import measured, refuse_nan
from forgelm.stages.models import Models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from forgelm.tasks.data import TaskData
    from forgelm.training.trainer import Exact


def build_trainer(run: Run, task: TaskData, models: Models, limit: Deadline | None) -> Exact:
    """The mode's trainer. Callbacks join it when training begins."""
    from forgelm.modes import builder
    from forgelm.modes.arguments import training_arguments
    from forgelm.training.trainer import Safety

    config = run.config
    best = f"eval_{config.task.validation_splits[0]}_{config.task.metrics[0]}"
    arguments = training_arguments(config, run.paths.root, best)

    def measure(model: PreTrainedModel) -> dict[str, float]:
        scores = {}
        for split, rows in task.eval.items():
            scores[split] = measured(run, model, rows, task.scorer, arguments.device)
            refuse_nan(scores[split], split, made.state.global_step)
        return {
            f"eval_{split}_{name}": math.nan if value is None else value
            for split, values in scores.items()
            for name, value in values.items()
        }

    def sealed(step: int) -> None:
        run.update(step=step, latest_checkpoint=run.paths.checkpoint(step).name)
        if limit is not None and made.pace.save > run.metadata.get("pace", {}).get("save", 0):
            run.note(pace=asdict(made.pace))
            limit.compare(made.pace)

    parts: dict[str, Any] = {
        "model": models.student,
        "args": arguments,
        "train_dataset": task.train,
        "data_collator": task.train_collator,
        "safety": Safety(
            paths=run.paths,
            config_hash=run.metadata["config_hash"],
            target=total_steps(config, task),
            training=config.training,
            world=run.world,
            seed=config.seed,
            measure=measure,
            check_ownership=run.check_ownership,
            sealed=sealed,
        ),
    }
    made: Exact = builder(config.mode)(config, task, models.teacher, parts)
    return made


def total_steps(config: RunConfig, task: TaskData) -> int:
    """Optimizer steps of the whole run, as the trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    training, rows = config.training, len(task.train)
    size, uses = training.per_device_train_batch_size * config.launch.ranks, 1
    if isinstance(config.mode, RlConfig):
        round_ = round_of(config)
        size, uses = round_.prompts, round_.batches
    batches = uses * (rows // size if training.dataloader_drop_last else math.ceil(rows / size))
    each = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    return math.ceil(config.epochs * each)
