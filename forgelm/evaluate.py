"""A model on a task's splits.

A loop of our own and not the trainer's: the trainer would wrap the model's forward pass in its
mixed precision for good, a teacher's too. Here a model computes in the precision of its weights,
so what is measured is what `from_pretrained` gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch.utils.data import DataLoader

from forgelm import stop
from forgelm.config.schema import Metric
from forgelm.errors import Stopped
from forgelm.interrupt import point
from forgelm.losses import task_loss
from forgelm.tasks.encode import Collator
from forgelm.tasks.metrics import measure
from forgelm.world import ALONE, World

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


def predictions(logits: Any, regression: bool) -> Any:
    """From logits [rows, outputs] to label numbers [rows], or scores [rows] for a regression."""
    return logits.squeeze(-1) if regression else logits.argmax(axis=-1)


def logits_of(
    model: PreTrainedModel,
    rows: Dataset,
    collator: Collator,
    batch_size: int,
    device: torch.device,
    world: World = ALONE,
    name: str = "evaluation",
) -> Any:
    """The model's logits for encoded rows, a float32 numpy array [rows, outputs], on every rank.

    The ranks take turns with the batches, which are the same however many there are. `name` is the
    point of interruption that each batch is.

    Raises:
        Stopped: on every rank, when one of them was asked to stop.
    """
    model.to(device).eval()
    batches = [
        list(range(start, min(start + batch_size, len(rows))))
        for start in range(0, len(rows), batch_size)
    ]
    mine = batches[world.rank :: world.size]
    loader: DataLoader[Any] = DataLoader(rows, batch_sampler=mine, collate_fn=collator)
    own, parts = iter(loader), []
    with torch.inference_mode():
        for _turn in range(math.ceil(len(batches) / world.size)):
            point(name)
            stop_together(world)
            batch = next(own, None)
            if batch is not None:
                inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
                parts.append(model(**inputs).logits.float().cpu().numpy())
    gathered = world.gather(parts)
    return numpy.concatenate(
        [gathered[n % world.size][n // world.size] for n in range(len(batches))]
    )


def stop_together(world: World) -> None:
    """Raise Stopped on every rank when one of them was asked to stop."""
    (stopping,) = world.agree(stop.requested() is not None)
    if stopping:
        raise Stopped(stop.requested() or "another rank was asked to stop")


def evaluate(
    model: PreTrainedModel,
    rows: Dataset,
    collator: Collator,
    batch_size: int,
    device: torch.device,
    metrics: Sequence[Metric],
    regression: bool,
    world: World = ALONE,
    name: str = "evaluation",
) -> dict[str, float | None]:
    """Loss and metrics of one split; what has no value (nan) is None."""
    logits = logits_of(model, rows, collator, batch_size, device, world, name)
    labels = torch.tensor(rows["labels"][:])
    loss = task_loss(torch.from_numpy(logits), labels).item() / len(labels)
    scores = measure(metrics, predictions(logits, regression), labels.numpy())
    values = {"loss": loss, **scores}
    return {k: v if math.isfinite(v) else None for k, v in values.items()}
