"""Batches as a function of seed, epoch and position alone: any of them can be made again.

Nothing here draws from the generators that training draws from (dropout), whatever is fetched ahead
and by however many workers; so a resumed run skips what was read without reading it.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from forgelm import stop
from forgelm.config.schema import Sampling
from forgelm.errors import RunError
from forgelm.world import World

Batch = tuple[int, list[int]]
"""An epoch and the numbers of the rows."""


@dataclass(frozen=True)
class Drawn:
    """A batch of a stream: its number, and the rows themselves."""

    number: int
    rows: list[Any]


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


class Rounds(Order):
    """The batches of one rank for training on what it generates itself.

    A batch is this rank's part of a round of generation: the round's prompts, each `generations`
    times in a row, cut evenly between the ranks. It comes `uses` times, once for each micro-step
    that draws on the round, as trl's RepeatSampler does it. Every round is full: what an epoch
    lacks for its last one comes from the epoch's beginning, or with `drop_last` the rest is left
    out.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        sampling: Sampling,
        seed: int,
        world: World,
        generations: int,
        uses: int,
        drop_last: bool = False,
    ) -> None:
        super().__init__(rows, batch_size, sampling, seed, world, drop_last=drop_last)
        self.generations = generations
        self.uses = uses

    @property
    def prompts(self) -> int:
        """Prompts in a round, of all ranks together."""
        return self.batch_size * self.world.size // self.generations

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.prompts)
        return (whole + bool(rest and not self.drop_last)) * self.uses

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        order, first = self._order(), self.world.rank * self.batch_size
        for number in range(len(self) // self.uses):
            places = range(number * self.prompts, (number + 1) * self.prompts)
            round_ = [order[place % self.rows] for place in places for _ in range(self.generations)]
            for _ in range(self.uses):
                yield self.epoch, round_[first : first + self.batch_size]


class Stream(BatchSampler):
    """The batches of one rank from data that has no row numbers, but a state: read once, in order.

    `rows` has the protocol of `datasets.IterableDataset`: `set_epoch`, `state_dict` and
    `load_state_dict`. At its end it begins anew, so there is always a next batch. It is read in
    this process, whatever the number of workers; they collate.
    """

    def __init__(self, rows: Any, batch_size: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.drop_last = False
        self._start = 0
        self._states: dict[int, dict[str, Any]] = {}

    def resume(self, position: int, state: dict[str, Any]) -> None:
        """Go on after `position` batches, with the state that the data had then."""
        self._start = position
        self._states = {position: state}

    def state_after(self, position: int) -> dict[str, Any]:
        """The data's state after that many batches, though more may have been read ahead."""
        for known in [number for number in self._states if number < position]:
            del self._states[known]
        return self._states[position]

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def __iter__(self) -> Iterator[Drawn | None]:  # type: ignore[override]
        for _ in range(self._start):
            # The loader skips these; they stand for batches that needn't be read again.
            yield None
        number, batch = self._start, []
        for row, state in self._endless():
            batch.append(row)
            if len(batch) == self.batch_size:
                number += 1
                self._states[number] = state()
                yield Drawn(number, batch)
                batch = []

    def _endless(self) -> Iterator[tuple[Any, Callable[[], dict[str, Any]]]]:
        known = self._states.get(self._start)
        epoch = 0 if known is None else int(known["epoch"])
        if known is not None:
            self.rows.load_state_dict(known["rows"])
        while True:
            self.rows.set_epoch(epoch)
            empty = True
            for row in self.rows:
                empty = False
                yield row, functools.partial(self._state, epoch)
            if empty and known is None:
                raise RunError("the stream of training rows is empty")
            epoch, known = epoch + 1, None

    def _state(self, epoch: int) -> dict[str, Any]:
        return {"epoch": epoch, "rows": self.rows.state_dict()}


class Seeded(Dataset[Any]):
    """Rows and their collation under seeds of their own: augmentation repeats by epoch and row."""

    def __init__(self, rows: Any, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.rows = rows
        self.collate = collate
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows) if hasattr(self.rows, "__len__") else sys.maxsize

    def __getitems__(self, batch: Batch | Drawn) -> Any:
        with unchanged_randomness():
            if isinstance(batch, Drawn):
                _seed_all(seed_from(self.seed, batch.number))
                return self.collate(batch.rows)
            epoch, numbers = batch
            _seed_all(seed_from(self.seed, epoch, *numbers))
            if hasattr(self.rows, "__getitems__"):
                return self.collate(self.rows.__getitems__(numbers))
            rows = []
            for number in numbers:
                _seed_all(seed_from(self.seed, epoch, number))
                rows.append(self.rows[number])
            return self.collate(rows)


class Loader(DataLoader[Any]):
    """A DataLoader over Seeded rows in an Order, told of the epoch as the trainer expects."""

    def close(self) -> None:
        """End persistent workers. They ignore signals, so nothing else would end them in time."""
        self._iterator = None

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, Order):
            self.batch_sampler.set_epoch(epoch)


def loader(
    rows: Any,
    collate: Callable[[list[Any]], Any],
    order: Order | Stream,
    seed: int,
    workers: int,
    persistent: bool,
    pin_memory: bool,
) -> Loader:
    """The training batches of this rank."""
    return Loader(
        Seeded(rows, collate, seed),
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
