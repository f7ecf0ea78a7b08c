"""A model on a task's splits.

A loop of our own and not the trainer's: the trainer would wrap the model's forward pass in its
mixed precision for good, a teacher's too. Here a model computes in the precision of its weights,
so what is measured is what `from_pretrained` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch.utils.data import DataLoader

from forgelm.config.schema import Metric
from forgelm.losses import task_loss
from forgelm.tasks.encode import Collator
from forgelm.tasks.metrics import measure

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel


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
    model: PreTrainedModel, rows: Dataset, collator: Collator, batch_size: int, device: torch.device
) -> Any:
    """The model's logits for encoded rows, a float32 numpy array [rows, outputs]."""
    model.to(device).eval()
    loader: DataLoader[Any] = DataLoader(rows, batch_size=batch_size, collate_fn=collator)
    parts = []
    with torch.inference_mode():
        for batch in loader:
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            parts.append(model(**inputs).logits.float().cpu().numpy())
    return numpy.concatenate(parts)


def evaluate(
    model: PreTrainedModel,
    splits: dict[str, Dataset],
    collator: Collator,
    batch_size: int,
    device: torch.device,
    metrics: Sequence[Metric],
    regression: bool,
) -> dict[str, dict[str, float | None]]:
    """Loss and metrics of each split; what has no value (nan) is None."""
    results: dict[str, dict[str, float | None]] = {}
    for name, rows in splits.items():
        logits = logits_of(model, rows, collator, batch_size, device)
        labels = torch.tensor(rows["labels"][:])
        loss = task_loss(torch.from_numpy(logits), labels).item() / len(labels)
        scores = measure(metrics, predictions(logits, regression), labels.numpy())
        values = {"loss": loss, **scores}
        results[name] = {k: v if math.isfinite(v) else None for k, v in values.items()}
    return results
