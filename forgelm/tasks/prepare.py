"""Task preparation: tokenizers, rows, encodings, ready for a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forgelm.config.schema import TaskConfig
from forgelm.tasks.encode import (
    Collator,
    check_length,
    encode,
    tokenizer_fingerprint,
    with_teacher,
)
from forgelm.tasks.rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskData:
    """Encoded rows of a task. `train` has the teacher's columns too where its encoding differs."""

    rows: Rows
    train: Dataset
    eval: dict[str, Dataset]
    collator: Collator
    teacher_eval: dict[str, Dataset]
    teacher_collator: Collator

    @property
    def regression(self) -> bool:
        return self.rows.labels is None


def prepare(
    task: TaskConfig,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    multiple_of: int | None,
) -> TaskData:
    """Encode a task's rows for the student and, where it reads differently, for the teacher.

    Raises:
        ConfigError: `task.max_length` is more than a model takes.
    """
    check_length(tokenizer, task.max_length, "the model")
    train = encode(rows.train, tokenizer, task.max_length)
    held_out = _encode_all(rows.eval, tokenizer, task.max_length)
    plain = Collator(tokenizer, multiple_of=multiple_of)
    if teacher_tokenizer is None or _same(tokenizer, teacher_tokenizer):
        return TaskData(rows, train, held_out, plain, held_out, plain)
    check_length(teacher_tokenizer, task.max_length, "the teacher")
    return TaskData(
        rows,
        train=with_teacher(train, encode(rows.train, teacher_tokenizer, task.max_length)),
        eval=held_out,
        collator=Collator(tokenizer, teacher_tokenizer, multiple_of),
        teacher_eval=_encode_all(rows.eval, teacher_tokenizer, task.max_length),
        teacher_collator=Collator(teacher_tokenizer, multiple_of=multiple_of),
    )


def _same(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> bool:
    return tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs)


def _encode_all(
    splits: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Dataset]:
    return {name: encode(rows, tokenizer, max_length) for name, rows in splits.items()}
