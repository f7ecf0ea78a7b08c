"""A model on a task's splits.

A loop of our own and not the trainer's: the trainer would wrap the model's forward pass in its
mixed precision for good, a teacher's too. Here a model computes in the precision of its weights,
so what is measured is what `from_pretrained` gives.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from forgelm import stop
from forgelm.errors import Stopped
from forgelm.interrupt import point
from forgelm.models.sharded import is_sharded
from forgelm.tasks.data import Scorer
from forgelm.world import ALONE, World

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


def records_of(
    model: PreTrainedModel,
    rows: Dataset,
    scorer: Scorer,
    batch_size: int,
    device: torch.device,
    world: World = ALONE,
    name: str = "evaluation",
) -> list[Any]:
    """The scorer's record of each encoded row, in the rows' order, on every rank.

    The ranks take turns with the batches, which are the same however many there are. `name` is the
    point of interruption that each batch is.

    Raises:
        Stopped: on every rank, when one of them was asked to stop.
    """
    together = is_sharded(model)
    (model if together else model.to(device)).eval()
    batches = [
        list(range(start, min(start + batch_size, len(rows))))
        for start in range(0, len(rows), batch_size)
    ]
    mine = batches[world.rank :: world.size]
    rounds = math.ceil(len(batches) / world.size)
    if together:
        # Who has no batch left must compute all the same; what comes of it isn't looked at.
        mine += batches[:1] * (rounds - len(mine))
    loader: DataLoader[Any] = DataLoader(rows, batch_sampler=mine, collate_fn=scorer.collator)
    own, parts = iter(loader), []
    # The tensors that shards are put together in are training's too, which may not be inference's.
    with torch.no_grad() if together else torch.inference_mode():
        for _ in range(rounds):
            point(name)
            stop_together(world)
            batch = next(own, None)
            if batch is not None:
                parts.append(scorer.score(model, moved(batch, device)))
    gathered = world.gather(parts)
    turns = [gathered[n % world.size][n // world.size] for n in range(len(batches))]
    return [record for records in turns for record in records]


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def stop_together(world: World) -> None:
    """Raise Stopped on every rank when one of them was asked to stop."""
    (stopping,) = world.agree(stop.requested() is not None)
    if stopping:
        raise Stopped(stop.requested() or "another rank was asked to stop")


def evaluate(
    model: PreTrainedModel,
    rows: Dataset,
    scorer: Scorer,
    batch_size: int,
    device: torch.device,
    world: World = ALONE,
    name: str = "evaluation",
) -> dict[str, float | None]:
    """Loss and metrics of one split; what has no value (nan) is None."""
    records = records_of(model, rows, scorer, batch_size, device, world, name)
    values = scorer.summary(records)
    return {k: v if math.isfinite(v) else None for k, v in values.items()}
