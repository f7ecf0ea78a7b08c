"""Kind image_to_text: the text in images, for encoder-decoder models and for models that chat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm import stop
from forgelm.config.metrics import answers
from forgelm.config.schema import RunConfig, TaskConfig
from forgelm.errors import ConfigError, RunError
from forgelm.tasks import images
from forgelm.tasks.augment import augmented
from forgelm.tasks.causal_lm import check_same_vocabulary, say_counts
from forgelm.tasks.data import Asked, Rows, TaskData
from forgelm.tasks.encode import (
    CHUNK,
    TEACHER_PREFIX,
    cached,
    check_length,
    tokenizer_fingerprint,
)
from forgelm.tasks.images import IMAGE, TEXT
from forgelm.tasks.processors import Reader, reader_of
from forgelm.tasks.texts import ASKED, REFERENCES, Texts

if TYPE_CHECKING:
    from datasets import Dataset

load_rows = images.load_rows


def prepare(
    config: RunConfig,
    rows: Rows,
    reader: Any,
    teacher_reader: Any | None,
    multiple_of: int | None,
) -> TaskData:
    """Encode a task's texts; images are processed batch by batch, a teacher's by its own processor.

    Raises:
        ConfigError: a model doesn't read images, `task.max_length` is more than it takes, or the
            teacher writes the texts with other tokens.
    """
    task = config.task
    ours = reader_of(reader, task.instruction, "the model")
    check_length(ours.tokenizer, task.max_length, "the model")
    theirs = None
    if teacher_reader is not None:
        theirs = reader_of(teacher_reader, task.instruction, "the teacher")
        check_same_vocabulary(ours.tokenizer, theirs.tokenizer)
    train = encode(task, task.train_split, rows.train, ours)
    held_out = {name: encode(task, name, split, ours) for name, split in rows.eval.items()}
    if theirs is not None:
        _check_same_answers(rows.train, ours, theirs)
        if theirs.same_as(ours):
            theirs = None
    asks = answers(task)
    scored = Texts(task, ours.tokenizer, Collator(ours, multiple_of, asks=asks))
    teacher_scored = scored
    if theirs is not None:
        teacher_scored = Texts(task, theirs.tokenizer, Collator(theirs, multiple_of, asks=asks))
    return TaskData(
        rows,
        train=train,
        eval=held_out,
        train_collator=Collator(ours, multiple_of, theirs, task.augmentation),
        reader=reader,
        scorer=scored,
        teacher_eval=held_out,
        teacher_scorer=teacher_scored,
    )


def scorer(config: RunConfig, labels: Any, reader: Any) -> Texts:
    """Scores rows as `prepare` encodes them, or answers `asked` ones."""
    ours = reader_of(reader, config.task.instruction, "the model")
    return Texts(config.task, ours.tokenizer, Collator(ours, asks=True))


def asked(config: RunConfig, data: Path, reader: Any) -> Asked:
    """Own images to be read: a folder of them, or a file that names them.

    Raises:
        ConfigError: there are none, or some can't be read.
    """
    given, rows = images.own_rows(config.task, data)
    return Asked(given, rows.add_column("reference", [None] * len(given)))


def encode(task: TaskConfig, split: str, rows: Dataset, reader: Reader) -> Dataset:
    """`rows` (image, text) with the tokens of their texts, from the cache if there.

    Columns: `image`, `labels` (at most `task.max_length`), `reference`, `row` (its number from 1),
    `cut`.
    """
    from datasets import concatenate_datasets

    texts = rows.select_columns(TEXT)
    settings = ["image_to_text", task.max_length, tokenizer_fingerprint(reader.tokenizer)]
    made = cached(texts, [*settings, reader.known_by], lambda: _encode(task, texts, reader))
    say_counts(split, len(rows), made, task.max_length)
    return concatenate_datasets([rows.select_columns(IMAGE), made], axis=1)


def _encode(task: TaskConfig, rows: Dataset, reader: Reader) -> Dataset:
    from datasets import Dataset

    made: dict[str, list[Any]] = {name: [] for name in ("labels", "reference", "row", "cut")}
    for start in range(0, len(rows), CHUNK):
        stop.check()
        texts = rows[start : start + CHUNK][TEXT]
        tokens = reader.answers(texts)
        made["labels"] += [ids[: task.max_length] for ids in tokens]
        made["cut"] += [len(ids) > task.max_length for ids in tokens]
        made["reference"] += texts
    made["row"] = list(range(1, len(rows) + 1))
    return Dataset.from_dict(made)


def _check_same_answers(rows: Dataset, ours: Reader, theirs: Reader) -> None:
    """Refuse a teacher that has texts written otherwise, by the first thousands of rows."""
    texts = rows[:CHUNK][TEXT]
    for text, our, their in zip(texts, ours.answers(texts), theirs.answers(texts), strict=True):
        if our != their:
            raise ConfigError(
                f"the teacher writes {text[:40]!r} as the tokens {their[:8]} and the student as "
                f"{our[:8]}; distillation compares token by token, so choose a teacher of the "
                "student's family"
            )


class Collator:
    """Reads and processes the images of a batch, for the student and for a teacher that processes
    them otherwise.

    Returns the processor's tensors with `labels`, int64 [batch, length]; the teacher's under
    `teacher_*`; with `asks` what the model is asked under `asked_*`, and the list `references`.
    Images are distorted with strength `augmentation`, drawn from the generators of `random` and
    `numpy.random`: the teacher sees what the student sees.
    """

    def __init__(
        self,
        reader: Reader,
        multiple_of: int | None = None,
        teacher: Reader | None = None,
        augmentation: float = 0.0,
        asks: bool = False,
    ) -> None:
        self.reader = reader
        self.multiple_of = multiple_of
        self.teacher = teacher
        self.augmentation = augmentation
        self.asks = asks

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        pictures = [augmented(_picture(row[IMAGE]), self.augmentation) for row in rows]
        seen = self.reader.see(pictures)
        batch: dict[str, Any] = {}
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            batch = self.reader.learnt(seen, labels, self.multiple_of)
            if self.teacher is not None:
                theirs = self.teacher.learnt(self.teacher.see(pictures), labels, self.multiple_of)
                batch |= {TEACHER_PREFIX + name: tensor for name, tensor in theirs.items()}
        if self.asks:
            asked = self.reader.asked(seen)
            batch |= {ASKED + name: tensor for name, tensor in asked.items()}
            batch[REFERENCES] = [row["reference"] for row in rows]
        return batch


def _picture(image: dict[str, Any]) -> Any:
    try:
        return images.read(image)
    except images.Unreadable as error:
        raise RunError(f"{image['path']}: {error}, though it could be read before") from error
