"""Kind text_classification: labels or scores for texts or pairs of texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.config.schema import Problem, RunConfig, TaskConfig
from forgelm.errors import ConfigError, RunError
from forgelm.tasks.data import Asked, Rows, TaskData
from forgelm.tasks.encode import (
    Collator,
    check_length,
    encode,
    encode_stream,
    encode_texts,
    tokenizer_fingerprint,
    with_teacher,
)
from forgelm.tasks.sources import (
    check_present,
    load_splits,
    open_stream,
    part,
    read_file,
    refuse,
    texts,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HIDDEN = -1


def load_rows(task: TaskConfig, revision: str | None) -> Rows:
    """Load, check and number the rows; `revision` is the commit to take, where there is one.

    Raises:
        ConfigError: a missing file, split or column, an empty file, a bad or unknown label.
        RunError: the hub failed.
    """
    if task.streaming:
        return _streamed(task, revision)
    splits, fingerprint = load_splits(task, revision)
    for name, split in splits.items():
        _check_columns(task, name, split)
    labels = None if task.problem is Problem.regression else _label_names(task, splits)
    if labels is not None and "f1" in task.metrics and len(labels) != 2:
        raise ConfigError(
            f"task.metrics: f1 is for two labels, and there are {len(labels)} "
            f"({', '.join(labels[:5])}); use f1_macro"
        )
    made = {name: _normalised(task, name, split, labels) for name, split in splits.items()}
    train = part(made.pop(task.train_split), task.max_train_samples)
    held_out = {name: part(split, task.max_eval_samples) for name, split in made.items()}
    return Rows(train, held_out, labels, fingerprint, revision)


def _streamed(task: TaskConfig, revision: str | None) -> Rows:
    """Training rows that are read, checked and numbered when their turn comes."""
    stream, held_out, fingerprint = open_stream(task, revision)
    for name, split in held_out.items():
        _check_columns(task, name, split)
    columns = list(stream.features or next(iter(stream)))
    wanted = {**_text_columns(task), "task.label_column": task.label_column}
    check_present(wanted, f"split {task.train_split}", columns)
    labels = None
    if task.problem is not Problem.regression:
        declared = getattr((stream.features or {}).get(task.label_column), "names", None)
        labels = task.labels if declared is None or task.labels is not None else list(declared)
        if labels is None:
            raise ConfigError(
                f"task.labels is null, and the stream of {task.name} declares none: "
                "give them, as in task.labels=[no,yes]"
            )
    made = {name: _normalised(task, name, split, labels) for name, split in held_out.items()}
    parts = {name: part(split, task.max_eval_samples) for name, split in made.items()}
    if task.max_train_samples is not None:
        stream = stream.take(task.max_train_samples)
    number = _score if labels is None else _numbering(stream.features, task, labels)
    train = stream.map(
        functools.partial(_streamed_row, task, number, labels), remove_columns=columns
    )
    return Rows(train, parts, labels, fingerprint, revision)


def _streamed_row(
    task: TaskConfig, number: Callable[[Any], float], labels: list[str] | None, row: dict[str, Any]
) -> dict[str, Any]:
    made: dict[str, Any] = {"text": row[task.text_column]}
    if task.text_pair_column is not None:
        made["text_pair"] = row[task.text_pair_column]
    where = f"split {task.train_split}, a row of the stream ({str(made['text'])[:40]!r})"
    for text in made.values():
        if not isinstance(text, str):
            raise RunError(f"{where}: {text!r} is not text")
    value = row[task.label_column]
    try:
        return {**made, "label": number(value)}
    except (KeyError, TypeError, ValueError):
        raise RunError(_bad_label(task, where, value, labels)) from None


def _text_rows(task: TaskConfig, path: Path, rows: Dataset) -> Dataset:
    """The task's text columns of own rows, as `text` and `text_pair`, for prediction."""
    from datasets import Dataset

    wanted = [name for name in _text_columns(task).values() if name is not None]
    missing = [name for name in wanted if name not in rows.column_names]
    if missing:
        raise ConfigError(
            f"{path}: has no column {' and no column '.join(missing)}, which the run reads, but "
            f"{', '.join(rows.column_names)}; rename the column in the file"
        )
    return Dataset.from_dict(_text_values(task, str(path), rows))


def _text_columns(task: TaskConfig) -> dict[str, str | None]:
    return {
        "task.text_column": task.text_column,
        "task.text_pair_column": task.text_pair_column,
    }


def _check_columns(task: TaskConfig, split: str, rows: Dataset) -> None:
    if not len(rows):
        raise ConfigError(f"split {split} of task {task.name} has no rows")
    wanted = {**_text_columns(task), "task.label_column": task.label_column}
    check_present(wanted, f"split {split}", rows.column_names)


def _label_names(task: TaskConfig, splits: dict[str, Dataset]) -> list[str]:
    if task.labels is not None:
        return list(task.labels)
    train = splits[task.train_split]
    declared = getattr(train.features[task.label_column], "names", None)
    if declared is not None:
        return list(declared)
    values = train.unique(task.label_column)
    fractions = [value for value in values if _is_fraction(value)]
    if fractions:
        raise ConfigError(
            f"task.label_column={task.label_column}: holds numbers such as {fractions[0]}, not "
            "labels; set task.problem=regression task.metrics=[pearson]"
        )
    names = {_name(value) for value in values if value is not None and value != ""}
    if len(names) < 2:
        raise ConfigError(
            f"task.label_column={task.label_column}: the training rows have "
            f"{len(names)} different label(s); a classifier needs two or more"
        )
    if all(name.lstrip("-").isdigit() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def _is_fraction(value: Any) -> bool:
    try:
        return value is not None and not float(value).is_integer()
    except (TypeError, ValueError, OverflowError):
        return False


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _normalised(task: TaskConfig, split: str, rows: Dataset, labels: list[str] | None) -> Dataset:
    from datasets import Dataset

    columns = _text_values(task, f"split {split}", rows)
    values = rows[task.label_column][:]
    number = _score if labels is None else _numbering(rows.features, task, labels)
    numbers: list[float] = []
    problems: list[str] = []
    for row, value in enumerate(values, 1):
        try:
            numbers.append(number(value))
        except (KeyError, TypeError, ValueError):
            where = f"split {split}, row {row}"
            problems.append(_bad_label(task, where, value, labels))
            if value == HIDDEN:
                break
    refuse(problems)
    return Dataset.from_dict({**columns, "label": numbers})


def _score(value: Any) -> float:
    score = float(value)
    if score != score or score in (float("inf"), float("-inf")):
        raise ValueError(value)
    return score


def _numbering(features: Any, task: TaskConfig, labels: list[str]) -> Callable[[Any], float]:
    """From a label as it stands in the data to its number; KeyError for an unknown one."""
    declared = getattr((features or {}).get(task.label_column), "names", None)
    numbers = {name: index for index, name in enumerate(labels)}
    if declared is not None and list(declared) != labels:
        return lambda value: numbers[str(declared[value]) if value >= 0 else ""]
    if declared is not None:
        return dict(enumerate(range(len(labels)))).__getitem__
    return lambda value: numbers[_name(value)]


def _bad_label(task: TaskConfig, where: str, value: Any, labels: list[str] | None) -> str:
    where = f"{where}: {task.label_column}={value!r}"
    if labels is None:
        return f"{where} is not a finite number, which a regression needs"
    if value == HIDDEN:
        return f"{where}: the labels of this split are hidden; evaluate on another split"
    if value is None or value == "":
        return f"{where}: the label is missing"
    return f"{where}: unknown label; the labels are {', '.join(labels[:20])}"


def _text_values(task: TaskConfig, where: str, rows: Dataset) -> dict[str, Any]:
    columns = {"text": texts(task.text_column, where, rows)}
    if task.text_pair_column is not None:
        columns["text_pair"] = texts(task.text_pair_column, where, rows)
    return columns


def prepare(
    config: RunConfig,
    rows: Rows,
    reader: PreTrainedTokenizerBase,
    teacher_reader: PreTrainedTokenizerBase | None,
    multiple_of: int | None,
) -> TaskData:
    """Encode a task's rows for the student and, where it reads differently, for the teacher.

    Raises:
        ConfigError: `task.max_length` is more than a model takes.
    """
    task = config.task
    check_length(reader, task.max_length, "the model")
    differs = teacher_reader is not None and not _same(reader, teacher_reader)
    theirs = teacher_reader if differs else None
    if theirs is not None:
        check_length(theirs, task.max_length, "the teacher")
    if task.token_dropout and reader.mask_token_id is None:
        raise ConfigError(
            f"task.token_dropout={task.token_dropout:g}: the model's tokenizer has no mask token "
            "to put in a token's place; leave it 0"
        )
    train = _encode_train(task, rows, reader, theirs)
    held_out = _encode_all(rows.eval, reader, task.max_length)
    scorer = Labels(task, rows.labels, Collator(reader, multiple_of=multiple_of))
    return TaskData(
        rows,
        train=train,
        eval=held_out,
        train_collator=Collator(reader, theirs, multiple_of, task.token_dropout),
        reader=reader,
        scorer=scorer,
        teacher_eval=held_out
        if theirs is None
        else _encode_all(rows.eval, theirs, task.max_length),
        teacher_scorer=scorer
        if theirs is None
        else Labels(task, rows.labels, Collator(theirs, multiple_of=multiple_of)),
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


@dataclass(frozen=True)
class Labels:
    """Scores labels: a record is a row's logits, float32 [outputs], and its label if it has one."""

    task: TaskConfig
    labels: Sequence[str] | None
    collator: Collator

    def score(self, model: PreTrainedModel, batch: dict[str, Any]) -> list[Any]:
        labels = batch.pop("labels", None)
        logits = model(**batch).logits.float().cpu().numpy()
        truths = [None] * len(logits) if labels is None else labels.tolist()
        return list(zip(logits, truths, strict=True))

    def summary(self, records: Sequence[Any]) -> dict[str, float]:
        import torch

        from forgelm.losses import task_loss
        from forgelm.tasks.metrics import measure

        logits, truths = _stacked(records)
        labels = torch.tensor(truths)
        loss = task_loss(torch.from_numpy(logits), labels).item() / len(labels)
        chosen = self._chosen(logits)
        return {"loss": loss, **measure(self.task.metrics, chosen, labels.numpy())}

    def answers(self, records: Sequence[Any]) -> list[dict[str, Any]]:
        from scipy.special import softmax

        logits, _ = _stacked(records)
        chosen = self._chosen(logits).tolist()
        if self.labels is None:
            return [{"prediction": score} for score in chosen]
        scores = softmax(logits.astype("float64"), axis=-1).tolist()
        return [
            {"prediction": self.labels[best], "score": dict(zip(self.labels, row, strict=True))}
            for best, row in zip(chosen, scores, strict=True)
        ]

    def _chosen(self, logits: Any) -> Any:
        """Label numbers [rows], or scores [rows] for a regression."""
        return logits.squeeze(-1) if self.labels is None else logits.argmax(axis=-1)


def _stacked(records: Sequence[Any]) -> tuple[Any, list[Any]]:
    import numpy

    return numpy.stack([logits for logits, _ in records]), [truth for _, truth in records]


def scorer(
    config: RunConfig, labels: Sequence[str] | None, reader: PreTrainedTokenizerBase
) -> Labels:
    """Scores rows without any padding beyond the batch's longest."""
    return Labels(config.task, labels, Collator(reader))


def asked(config: RunConfig, data: Path, reader: PreTrainedTokenizerBase) -> Asked:
    """Read and encode own rows for prediction.

    Raises:
        ConfigError: the file can't be read, or a row or column isn't what the task reads.
    """
    rows, task = read_file(data), config.task
    return Asked(
        rows.to_list(), encode_texts(_text_rows(task, data, rows), reader, task.max_length)
    )
