"""What each kind of task gives to training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Batch = dict[str, Any]
Collate = Callable[[list[dict[str, Any]]], Batch]


@dataclass(frozen=True)
class Rows:
    """A task's rows before any tokenizer, checked.

    `labels` are the names in the order of their numbers, None where there are none. `fingerprint`
    changes with any row, `revision` is the hub's commit. A streamed `train` has no length.
    """

    train: Dataset | IterableDataset
    eval: dict[str, Dataset]
    labels: list[str] | None
    fingerprint: str
    revision: str | None


class Scorer(Protocol):
    """How a model is measured on encoded rows, and what it answers to them."""

    @property
    def collator(self) -> Collate:
        """Makes a batch of rows, on the CPU."""

    def score(self, model: Any, batch: Batch) -> list[Any]:
        """A small record for each row of a batch that lies on the model's device."""

    def summary(self, records: Sequence[Any]) -> dict[str, float]:
        """`loss` and the task's metrics over the records of a split, in the rows' order."""

    def answers(self, records: Sequence[Any]) -> list[dict[str, Any]]:
        """What is written for each row by `forgelm predict`: `prediction`, and `score` if any."""


@dataclass(frozen=True)
class TaskData:
    """Encoded rows of a task. `train` has the teacher's columns too where it reads differently; a
    streamed one has no length. `reader` is the tokenizer or processor, saved beside the model."""

    rows: Rows
    train: Dataset | IterableDataset
    eval: dict[str, Dataset]
    train_collator: Collate
    reader: Any
    scorer: Scorer
    teacher_eval: dict[str, Dataset]
    teacher_scorer: Scorer


@dataclass(frozen=True)
class Asked:
    """Own rows to be answered: as they stand in the file, and encoded."""

    rows: list[dict[str, Any]]
    encoded: Dataset
