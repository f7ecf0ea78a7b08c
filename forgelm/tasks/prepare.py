"""Task preparation: tokenizers, rows, encodings, ready for a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forgelm.config.schema import TaskConfig
from forgelm.errors import ConfigError
from forgelm.tasks.encode import (
    Collator,
    check_length,
    encode,
    encode_stream,
    tokenizer_fingerprint,
    with_teacher,
)
from forgelm.tasks.rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskData:
    """Encoded rows of a task. `train` has the teacher's columns too where its encoding differs; a
    streamed one has no length."""

    rows: Rows
    train: Dataset | IterableDataset
    eval: dict[str, Dataset]
    train_collator: Collator
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
    differs = teacher_tokenizer is not None and not _same(tokenizer, teacher_tokenizer)
    theirs = teacher_tokenizer if differs else None
    if theirs is not None:
        check_length(theirs, task.max_length, "the teacher")
    if task.token_dropout and tokenizer.mask_token_id is None:
        raise ConfigError(
            f"task.token_dropout={task.token_dropout:g}: the model's tokenizer has no mask token "
            "to put in a token's place; leave it 0"
        )
    train = _encode_train(task, rows, tokenizer, theirs)
    held_out = _encode_all(rows.eval, tokenizer, task.max_length)
    plain = Collator(tokenizer, multiple_of=multiple_of)
    return TaskData(
        rows,
        train=train,
        eval=held_out,
        train_collator=Collator(tokenizer, theirs, multiple_of, task.token_dropout),
        collator=plain,
        teacher_eval=held_out
        if theirs is None
        else _encode_all(rows.eval, theirs, task.max_length),
        teacher_collator=plain if theirs is None else Collator(theirs, multiple_of=multiple_of),
    )


def _encode_train(
    task: TaskConfig,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
) -> Any:
    if task.streaming:
        return encode_stream(rows.train, tokenizer, teacher, task.max_length)
    train = encode(rows.train, tokenizer, task.max_length)
    if teacher is None:
        return train
    return with_teacher(train, encode(rows.train, teacher, task.max_length))


def _same(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> bool:
    return tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs)


def _encode_all(
    splits: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Dataset]:
    return {name: encode(rows, tokenizer, max_length) for name, rows in splits.items()}
