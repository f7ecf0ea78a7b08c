"""The rows of a task as they are before any tokenizer: loaded, checked, labels numbered."""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.config.schema import Metric, Problem, TaskConfig
from forgelm.errors import ConfigError, RunError
from forgelm.hub import explained

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_PART_SEED = 0
_STREAMS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
HIDDEN = -1


@dataclass(frozen=True)
class Rows:
    """A task's rows. Each data set has the columns `text`, `text_pair` (if any) and `label`.

    `labels` are the names in the order of their numbers, None for a regression. `fingerprint`
    changes with any row, `revision` is the hub's commit. A streamed `train` has no length.
    """

    train: Dataset | IterableDataset
    eval: dict[str, Dataset]
    labels: list[str] | None
    fingerprint: str
    revision: str | None


def load_rows(task: TaskConfig, revision: str | None) -> Rows:
    """Load, check and number the rows; `revision` is the commit to take, where there is one.

    Raises:
        ConfigError: a missing file, split or column, an empty file, a bad or unknown label.
        RunError: the hub failed.
    """
    if task.streaming:
        return _streamed(task, revision)
    splits, fingerprint = _load(task, revision)
    for name, split in splits.items():
        _check_columns(task, name, split)
    labels = None if task.problem is Problem.regression else _label_names(task, splits)
    if labels is not None and Metric.f1 in task.metrics and len(labels) != 2:
        raise ConfigError(
            f"task.metrics: f1 is for two labels, and there are {len(labels)} "
            f"({', '.join(labels[:5])}); use f1_macro"
        )
    made = {name: _normalised(task, name, split, labels) for name, split in splits.items()}
    train = _part(made.pop(task.train_split), task.max_train_samples)
    held_out = {name: _part(split, task.max_eval_samples) for name, split in made.items()}
    return Rows(train, held_out, labels, fingerprint, revision)


def _streamed(task: TaskConfig, revision: str | None) -> Rows:
    """Training rows that are read, checked and numbered when their turn comes."""
    stream, held_out, fingerprint = _open_stream(task, revision)
    for name, split in held_out.items():
        _check_columns(task, name, split)
    columns = list(stream.features or next(iter(stream)))
    wanted = {**_text_columns(task), "task.label_column": task.label_column}
    _check_present(wanted, f"split {task.train_split}", columns)
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
    parts = {name: _part(split, task.max_eval_samples) for name, split in made.items()}
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


def _open_stream(
    task: TaskConfig, revision: str | None
) -> tuple[IterableDataset, dict[str, Dataset], str]:
    """The training rows as they are, the evaluation splits, and what the data is known by."""
    from datasets import Dataset, load_dataset

    if task.embedded is not None:
        splits, fingerprint = _embedded(task)
        return splits.pop(task.train_split).to_iterable_dataset(), splits, fingerprint
    if task.train_file is not None:
        path, other = Path(task.train_file), Path(str(task.validation_file))
        kind = _STREAMS[path.suffix.lower()]
        options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        stream = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
        known = _digest(_ends(path), other.read_bytes())
        return stream, {task.validation_splits[0]: read_file(other)}, known
    name = str(task.dataset)
    with explained(f"data set {name}"):
        streams = load_dataset(name, task.dataset_config, revision=revision, streaming=True)
        held_out = {
            split: Dataset.from_list(list(streams[split]), features=streams[split].features)
            for split in task.validation_splits
        }
    known = _digest(str(revision).encode(), str(task.dataset_config).encode())
    return streams[task.train_split], held_out, known


def _ends(path: Path) -> bytes:
    """Size, first and last megabyte: a stream is meant for files too long to be read for a hash."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        return f"{size}".encode() + first + file.read()


def _load(task: TaskConfig, revision: str | None) -> tuple[dict[str, Dataset], str]:
    if task.embedded is not None:
        return _embedded(task)
    if task.train_file is not None:
        files = {task.train_split: task.train_file, task.validation_splits[0]: task.validation_file}
        found = {name: Path(str(path)) for name, path in files.items()}
        splits = {name: read_file(path) for name, path in found.items()}
        return splits, _digest(*(path.read_bytes() for path in found.values()))
    return _from_hub(task, revision)


def _embedded(task: TaskConfig) -> tuple[dict[str, Dataset], str]:
    from datasets import ClassLabel, Dataset, Features, Value

    from forgelm.tasks import nli_mini

    text = Value("string")
    features = Features(
        premise=text, hypothesis=text, label=ClassLabel(names=list(nli_mini.LABELS))
    )
    splits, parts = {}, []
    for name in [task.train_split, *task.validation_splits]:
        if name not in nli_mini.SPLITS:
            raise ConfigError(
                f"split {name}: {task.embedded} has {', '.join(nli_mini.SPLITS)}; "
                "see task.train_split and task.validation_splits"
            )
        pairs = nli_mini.generate(name)
        parts.append(json.dumps(pairs).encode())
        columns = zip(*pairs, strict=True)
        rows = dict(zip(("premise", "hypothesis", "label"), map(list, columns), strict=True))
        splits[name] = Dataset.from_dict(rows, features=features)
    return splits, _digest(*parts)


def _from_hub(task: TaskConfig, revision: str | None) -> tuple[dict[str, Dataset], str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name = str(task.dataset)
    try:
        with explained(f"data set {name}"):
            found = load_dataset(name, task.dataset_config, revision=revision)
    except (DatasetNotFoundError, ConnectionError) as error:
        gated = "; ask for access on its page, then set HF_TOKEN" if "gated" in str(error) else ""
        raise RunError(f"data set {name}: {str(error).splitlines()[0]}{gated}") from error
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(
            f"task.dataset={name}, task.dataset_config={task.dataset_config}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    splits = {}
    for split in [task.train_split, *task.validation_splits]:
        if split not in found:
            raise ConfigError(
                f"split {split}: {name} has {', '.join(found)}; "
                "see task.train_split and task.validation_splits"
            )
        splits[split] = found[split]
    prints = [str(part._fingerprint).encode() for part in splits.values()]
    known = str(revision).encode() if revision else b"".join(prints)
    return splits, _digest(known, str(task.dataset_config).encode())


def read_file(path: Path) -> Dataset:
    """Read a .csv, .tsv, .json, .jsonl or .parquet file; the rows of text files stay text.

    Raises:
        ConfigError: the file is empty, can't be read as what its name says, or has a crooked row.
    """
    import pyarrow
    from datasets import Dataset

    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            rows = Dataset.from_parquet(str(path), keep_in_memory=True)
        else:
            table = _delimited(path) if suffix in (".csv", ".tsv") else _json_rows(path)
            rows = Dataset.from_dict(_columns(path, table))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not a readable {suffix} file: {first}") from error
    if not len(rows):
        raise ConfigError(f"{path}: the file has no rows")
    return rows


def _delimited(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or TSV file, every field as text, all as long as the header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file, strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ","
        )
        try:
            header = next(reader, None)
            if header is None:
                raise ConfigError(f"{path}: the file is empty")
            rows = []
            for number, fields in enumerate(filter(None, reader), 1):
                if len(fields) != len(header):
                    raise ConfigError(
                        f"{path}, row {number}: {len(fields)} fields, and the header has "
                        f"{len(header)}; quote fields that hold the separator"
                    )
                rows.append(dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise ConfigError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def _json_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text or "[]")
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON: {error}; one object a line is .jsonl") from error
        if not isinstance(rows, list):
            raise ConfigError(f"{path}: must hold a list of objects; one object a line is .jsonl")
    else:
        rows = []
        # Not splitlines: it takes characters for line ends that may stand inside JSON's strings.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not JSON: {error}") from error
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, row {number}: must be an object, and is {row!r:.60}")
    return rows


def _columns(path: Path, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns, in the order of first appearance; a value that a row lacks is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name, values in columns.items():
        given = [(row, value) for row, value in enumerate(values, 1) if value is not None]
        for row, value in given:
            if _kind(value) != _kind(given[0][1]):
                raise ConfigError(
                    f"{path}, row {row}: {name}={value!r:.60} is {_kind(value)}, and above it is "
                    f"{_kind(given[0][1])}; make the column one type"
                )
    return columns


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list or an object"


def text_rows(task: TaskConfig, path: Path, rows: Dataset) -> Dataset:
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
    _check_present(wanted, f"split {split}", rows.column_names)


def _check_present(wanted: dict[str, str | None], where: str, columns: list[str]) -> None:
    problems = []
    for key, column in wanted.items():
        if column is None or column in columns:
            continue
        near = difflib.get_close_matches(column, columns, n=1)
        hint = f"; did you mean {key}={near[0]}?" if near else ""
        problems.append(
            f"{key}={column}: {where} has no such column, but {', '.join(columns)}{hint}"
        )
    if problems:
        raise ConfigError(problems)


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
    for row, value in enumerate(values, 1):
        try:
            numbers.append(number(value))
        except (KeyError, TypeError, ValueError):
            where = f"split {split}, row {row}"
            raise ConfigError(_bad_label(task, where, value, labels)) from None
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
    columns = {"text": _texts(task.text_column, where, rows)}
    if task.text_pair_column is not None:
        columns["text_pair"] = _texts(task.text_pair_column, where, rows)
    return columns


def _texts(column: str, where: str, rows: Dataset) -> list[str]:
    texts: list[str] = rows[column][:]
    for row, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ConfigError(f"{where}, row {row}: {column}={text!r} is not text")
    return texts


def _part(rows: Dataset, limit: int | None) -> Dataset:
    """A fixed part: the same rows for every seed of a run."""
    import numpy

    if limit is None or limit >= len(rows):
        return rows
    order = numpy.random.RandomState(_PART_SEED).permutation(len(rows))
    return rows.select(order[:limit])


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
