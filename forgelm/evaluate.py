"""A model on a task's splits, by the trainer's own evaluation loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from forgelm.config.schema import Metric
from forgelm.modes.sft import FinetuningTrainer
from forgelm.tasks.metrics import measure

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

    from forgelm.tasks.encode import Collator


def predictions(logits: Any, regression: bool) -> Any:
    """From logits [rows, outputs] to label numbers [rows], or scores [rows] for a regression."""
    return logits.squeeze(-1) if regression else logits.argmax(axis=-1)


def metrics_function(
    metrics: Sequence[Metric], regression: bool
) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for a trainer."""

    def compute(output: EvalPrediction) -> dict[str, float]:
        return measure(metrics, predictions(output.predictions, regression), output.label_ids)

    return compute


def logits_of(
    model: PreTrainedModel, rows: Dataset, collator: Collator, arguments: TrainingArguments
) -> Any:
    """The model's logits for encoded rows, a numpy array [rows, outputs]."""
    return _evaluator(model, collator, arguments).predict(rows).predictions


def evaluate(
    model: PreTrainedModel,
    splits: dict[str, Dataset],
    collator: Collator,
    arguments: TrainingArguments,
    metrics: Sequence[Metric],
    regression: bool,
) -> dict[str, dict[str, float | None]]:
    """Loss and metrics of each split; what has no value (nan) is None."""
    trainer = _evaluator(model, collator, arguments)
    trainer.compute_metrics = metrics_function(metrics, regression)
    results: dict[str, dict[str, float | None]] = {}
    for name, rows in splits.items():
        measured = trainer.predict(rows, metric_key_prefix=name).metrics
        wanted = ["loss", *(metric.name for metric in metrics)]
        values = {key: float(measured[f"{name}_{key}"]) for key in wanted}
        results[name] = {k: v if math.isfinite(v) else None for k, v in values.items()}
    return results


def _evaluator(
    model: PreTrainedModel, collator: Collator, arguments: TrainingArguments
) -> FinetuningTrainer:
    trainer = FinetuningTrainer(
        model=model, args=arguments, data_collator=collator, eval_dataset={}
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
