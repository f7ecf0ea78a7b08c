"""Data order, snapshots and cadence: the parts that an exact restart rests on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset

from forgelm.config.schema import Sampling, SaveInterval, TrainingConfig
from forgelm.training import cadence as cadence_module
from forgelm.training.cadence import AUTO_LEAST_S, Cadence
from forgelm.training.loader import Order, Rounds, Stream, loader, unchanged_randomness
from forgelm.training.snapshot import Buffers, Writer, randomness, restore_randomness
from forgelm.world import World


def order(rows: int, batch: int = 4, rank: int = 0, ranks: int = 1, **options: Any) -> Order:
    sampling = options.pop("sampling", Sampling.random)
    return Order(rows, batch, sampling, options.pop("seed", 1), World(rank, ranks), **options)


def rows_of(made: Order, epoch: int = 0) -> list[list[int]]:
    made.set_epoch(epoch)
    return [rows for _epoch, rows in made]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rows", [24, 25, 26, 37])
def test_ranks_share_each_epoch_whole_and_evenly(rows: int, ranks: int) -> None:
    parts = [rows_of(order(rows, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    seen = [row for part in parts for batch in part for row in batch]
    assert set(seen) == set(range(rows))
    # Rows come twice only to give every rank one of a batch with fewer rows than ranks.
    assert len(seen) - rows < ranks
    for batches in zip(*parts, strict=True):
        sizes = [len(batch) for batch in batches]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert rows_of(order(32)) == rows_of(order(32))
    assert rows_of(order(32), 1) == rows_of(order(32), 1)
    assert rows_of(order(32)) != rows_of(order(32), 1)
    assert rows_of(order(32)) != rows_of(order(32, seed=2))
    assert rows_of(order(10, sampling=Sampling.sequential)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(rows_of(order(10, drop_last=True))) == len(order(10, drop_last=True)) == 2


def test_grouping_by_length_repeats_and_groups() -> None:
    lengths = numpy.random.RandomState(0).randint(5, 90, 400).tolist()
    grouped = order(400, lengths=lengths, sampling=Sampling.group_by_length)
    assert rows_of(grouped, 3) == rows_of(grouped, 3)
    assert rows_of(grouped, 3) != rows_of(grouped, 4)

    def spread(batches: list[list[int]]) -> float:
        return float(numpy.mean([numpy.ptp([lengths[row] for row in b]) for b in batches]))

    assert spread(rows_of(grouped, 3)) < spread(rows_of(order(400), 3)) / 2


def rounds(rows: int, rank: int = 0, ranks: int = 1, **options: Any) -> Rounds:
    given = {"sampling": Sampling.random, "seed": 1, "generations": 2, "uses": 3} | options
    return Rounds(rows, 4, world=World(rank, ranks), **given)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 12, 13])
def test_a_round_holds_its_prompts_in_groups_and_comes_as_often_as_used(
    rows: int, ranks: int
) -> None:
    parts = [rows_of(rounds(rows, rank, ranks)) for rank in range(ranks)]
    seen = []
    for batches in zip(*parts, strict=True):
        whole = [row for batch in batches for row in batch]
        assert whole[::2] == whole[1::2]
        assert len(whole) == 4 * ranks
        seen.append(whole)
    assert seen[::3] == seen[1::3] == seen[2::3]
    assert len(seen) == len(rounds(rows, 0, ranks))
    assert {row for whole in seen for row in whole} == set(range(rows))


def test_rounds_are_a_function_of_seed_and_epoch() -> None:
    assert rows_of(rounds(12), 1) == rows_of(rounds(12), 1)
    assert rows_of(rounds(12), 1) != rows_of(rounds(12), 2)
    assert rows_of(rounds(5, sampling=Sampling.sequential, uses=1)) == [
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [4, 4, 0, 0],
    ]
    assert len(rounds(5, drop_last=True)) == 6


class Noisy:
    """Rows with an augmentation of their own, from all three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> tuple[int, float, float, float]:
        return row, random.random(), float(numpy.random.rand()), torch.rand(()).item()


def batches(workers: int, size: int, epoch: int, skipped: int = 0) -> list[list[Any]]:
    made = loader(Noisy(), list, order(12, size), 7, workers, False, False)
    made.set_epoch(epoch)
    return list(skip_first_batches(made, skipped) if skipped else made)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_a_function_of_epoch_and_row(workers: int) -> None:
    reference = batches(0, 4, epoch=1)
    assert batches(workers, 4, epoch=1) == reference
    assert batches(workers, 4, epoch=1, skipped=2) == reference[2:]
    flat = {row[0]: row for batch in batches(workers, 3, epoch=1) for row in batch}
    assert flat == {row[0]: row for batch in reference for row in batch}
    other = {row[0]: row for batch in batches(workers, 4, epoch=2) for row in batch}
    assert all(other[row] != flat[row] for row in flat)


@pytest.mark.parametrize("workers", [0, 2])
def test_fetching_draws_nothing_from_the_process(workers: int) -> None:
    torch.manual_seed(3)
    before = randomness()
    batches(workers, 4, epoch=0)
    assert torch.equal(torch.get_rng_state(), before["torch"])
    assert random.getstate() == before["python"]


def test_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), float(numpy.random.rand()), torch.rand(()).item()]

    state = randomness()
    expected = draw()
    with unchanged_randomness():
        draw()
    following = draw()
    restore_randomness(state)
    assert draw() == expected
    assert draw() == following


def stream() -> Any:
    return Dataset.from_dict({"x": list(range(10))}).to_iterable_dataset()


def drawn(source: Stream, workers: int) -> Iterator[list[int]]:
    def numbers(rows: list[dict[str, int]]) -> list[int]:
        return [row["x"] for row in rows]

    return iter(loader(source.rows, numbers, source, 0, workers, False, False))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("read", [1, 3, 5, 7])
def test_a_stream_goes_on_after_what_was_used(read: int, workers: int) -> None:
    whole = drawn(Stream(stream(), 4), 0)
    expected = [next(whole) for _ in range(9)]
    # The third batch takes what is left of the first pass and begins the second.
    assert expected[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    first = Stream(stream(), 4)
    used = drawn(first, workers)
    assert [next(used) for _ in range(read)] == expected[:read]
    again = Stream(stream(), 4)
    again.resume(read, first.state_after(read))
    rest = loader(again.rows, lambda rows: [r["x"] for r in rows], again, 0, 0, False, False)
    going = iter(skip_first_batches(rest, read))
    assert [next(going) for _ in range(9 - read)] == expected[read:]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("config", "price", "seconds"),
    [
        (TrainingConfig(save_minutes=2.0), 5.0, 120.0),
        (TrainingConfig(), 0.1, AUTO_LEAST_S),
        (TrainingConfig(), 4.0, 200.0),
        (TrainingConfig(save_strategy=SaveInterval.auto, save_overhead=0.1), 4.0, 40.0),
    ],
)
def test_saves_by_the_clock(
    config: TrainingConfig, price: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(cadence_module, "time", clock)
    made = Cadence(config, target=10**6, per_epoch=10)
    clock.now += seconds - 1
    assert not made.overdue(price)
    clock.now += 1
    assert made.overdue(price)
    made.saved()
    assert not made.overdue(price)


def test_copies_are_apart_and_shared_tensors_stay_shared() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    tree = {"a": weight, "tied": weight, "list": [torch.tensor(1), None], "n": {"lr": 0.1}}
    buffers = Buffers()
    copied = buffers.copy(tree, "t")
    weight += 1
    assert copied["a"][0, 0] == 0
    assert copied["a"].data_ptr() == copied["tied"].data_ptr()
    assert copied["list"][1] is None
    assert copied["n"] == {"lr": 0.1}
    again = buffers.copy(tree, "t")
    assert again["a"].data_ptr() == copied["a"].data_ptr()
    assert again["a"][0, 0] == 1


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_is_told(background: bool) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    def saved(writer: Writer) -> None:
        writer.start(full, 0.0, background)
        writer.wait()

    writer = Writer()
    with pytest.raises(OSError, match="No space left"):
        saved(writer)
    writer.check()
