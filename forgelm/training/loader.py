"""Batches as a function of seed, epoch and position alone: any of them can be made again.

Nothing here draws from the generators that training draws from (dropout), whatever is fetched ahead
and by however many workers; so a resumed run skips what was read without reading it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from forgelm import stop
from forgelm.config.schema import Sampling
from forgelm.world import World

Batch = tuple[int, list[int]]


def seed_from(*parts: int) -> int:
    """A 63-bit seed that any change of any part changes."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Order(BatchSampler):
    """The batches of one rank: (epoch, row numbers) each.

    Every rank cuts the same global batches. A last one that isn't full is shared evenly; where it
    has fewer rows than there are ranks, rows from the epoch's beginning fill it up.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        sampling: Sampling,
        seed: int,
        world: World,
        lengths: Sequence[int] | None = None,
        group: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.sampling = sampling
        self.seed = seed
        self.world = world
        self.lengths = lengths
        self.group = group
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.batch_size * self.world.size
        return self.rows // size if self.drop_last else -(-self.rows // size)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        order = self._order()
        size, ranks, rank = self.batch_size * self.world.size, self.world.size, self.world.rank
        for number in range(len(self)):
            whole = order[number * size : (number + 1) * size]
            if len(whole) < ranks:
                whole = whole + (order * ranks)[: ranks - len(whole)]
            start, end = rank * len(whole) // ranks, (rank + 1) * len(whole) // ranks
            yield self.epoch, whole[start:end]

    def _order(self) -> list[int]:
        if self.sampling is Sampling.sequential:
            return list(range(self.rows))
        generator = torch.Generator().manual_seed(seed_from(self.seed, self.epoch))
        if self.lengths is not None:
            size = self.batch_size * self.world.size * self.group
            return list(get_length_grouped_indices(self.lengths, size, generator=generator))
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return order


class Seeded(Dataset[Any]):
    """Rows and their collation under seeds of their own: augmentation repeats by epoch and row."""

    def __init__(self, rows: Any, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.rows = rows
        self.collate = collate
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, batch: Batch) -> Any:
        epoch, numbers = batch
        with unchanged_randomness():
            rows = []
            for number in numbers:
                _seed_all(seed_from(self.seed, epoch, number))
                rows.append(self.rows[number])
            _seed_all(seed_from(self.seed, epoch, -1, *numbers))
            return self.collate(rows)


class Loader(DataLoader[Any]):
    """A DataLoader over Seeded rows in an Order, told of the epoch as the trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def loader(
    rows: Any,
    collate: Callable[[list[Any]], Any],
    order: Order,
    workers: int,
    persistent: bool,
    pin_memory: bool,
) -> Loader:
    """The training batches of this rank."""
    return Loader(
        Seeded(rows, collate, order.seed),
        batch_sampler=order,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=persistent,
        pin_memory=pin_memory,
        worker_init_fn=stop.ignore_in_worker,
        # Workers' seeds are drawn from here and not from the generator that dropout draws from.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Whatever is drawn inside, the process's generators go on as if nothing had been."""
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    # Not torch.manual_seed: that seeds the accelerators too, and their state isn't kept here.
    torch.default_generator.manual_seed(seed)
