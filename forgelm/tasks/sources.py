"""Where rows come from: embedded tasks, own files, the hub; as they stand there, unchecked."""

from __future__ import annotations

import csv
import difflib
import errno
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm import plugins
from forgelm.config.schema import TaskConfig
from forgelm.config.validate import EMBEDDED
from forgelm.errors import ConfigError, ForgeError, RunError
from forgelm.hub import explained
from forgelm.hubcache import datasets_cache, offline
from forgelm.prepared import (
    configurations_in,
    load_prepared,
    no_configuration,
    others_prepared,
    prepared,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

_PART_SEED = 0
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_SHOWN = 5
_HALF = "half of a character (a lone surrogate)"
_STREAMS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


def load_splits(task: TaskConfig, revision: str | None) -> tuple[dict[str, Dataset], str]:
    if task.embedded is not None:
        return _embedded(task)
    if task.train_file is not None:
        files = {task.train_split: task.train_file, task.validation_splits[0]: task.validation_file}
        found = {name: Path(str(path)) for name, path in files.items()}
        splits = {name: read_file(path) for name, path in found.items()}
        return splits, digest(*(path.read_bytes() for path in found.values()))
    return _from_hub(task, revision)


def open_stream(
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
        if kind == "csv":
            with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
                _check_header(path, next(csv.reader(file, delimiter=options.get("sep", ",")), []))
        stream = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
        known = digest(_ends(path), other.read_bytes())
        return stream, {task.validation_splits[0]: read_file(other)}, known
    name = str(task.dataset)
    with _loaded(task):
        here = _at_commit(task, revision)
        if here is not None:
            streams = {split: rows.to_iterable_dataset() for split, rows in here.items()}
        else:
            streams = load_dataset(name, task.dataset_config, revision=revision, streaming=True)
        held_out = {
            split: Dataset.from_list(list(streams[split]), features=streams[split].features)
            for split in task.validation_splits
        }
    known = digest(str(revision).encode(), str(task.dataset_config).encode())
    return streams[task.train_split], held_out, known


def _ends(path: Path) -> bytes:
    """Size, first and last megabyte: a stream is meant for files too long to be read for a hash."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        return f"{size}".encode() + first + file.read()


def _embedded(task: TaskConfig) -> tuple[dict[str, Dataset], str]:
    from datasets import Dataset

    data, name = _maker(str(task.embedded)), str(task.embedded)
    splits, parts = {}, []
    with _blamed(name):
        features = data.features() if hasattr(data, "features") else None
        for split in [task.train_split, *task.validation_splits]:
            if split not in data.SPLITS:
                raise ConfigError(
                    f"split {split}: {name} has {', '.join(data.SPLITS)}; "
                    "see task.train_split and task.validation_splits"
                )
            rows = data.rows(split)
            parts.append(json.dumps(rows, default=_shortened).encode())
            splits[split] = Dataset.from_list(rows, features=features)
    return splits, digest(*parts)


def _maker(name: str) -> Any:
    """An embedded task: a module of our own, or what another package adds."""
    if name in EMBEDDED:
        return import_module(f"forgelm.tasks.{name}")
    return plugins.load(plugins.TASKS, name)


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """One line that names the package for what another package's task fails with."""
    try:
        yield
    except Exception as error:
        if name in EMBEDDED or isinstance(error, ForgeError):
            raise
        said = " ".join(str(error).split())[:200]
        owner = plugins.package(plugins.TASKS, name)
        raise RunError(
            f"task.embedded={name}, which {owner} adds, failed: {type(error).__name__}: {said}"
        ) from error


def _shortened(value: Any) -> str:
    """Stands for bytes (an image, say) in what a fingerprint is made of."""
    content = value if isinstance(value, bytes) else value.tobytes()
    return hashlib.sha256(content).hexdigest()


def _from_hub(task: TaskConfig, revision: str | None) -> tuple[dict[str, Dataset], str]:
    from datasets import load_dataset

    name = str(task.dataset)
    with _loaded(task):
        found = _at_commit(task, revision)
        if found is None:
            found = load_dataset(name, task.dataset_config, revision=revision)
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
    return splits, digest(known, str(task.dataset_config).encode())


@contextmanager
def _loaded(task: TaskConfig) -> Iterator[None]:
    """One line for what `datasets` raises while it loads a task's data set."""
    from datasets.exceptions import DatasetNotFoundError

    name, config = str(task.dataset), task.dataset_config
    try:
        with explained(f"data set {name}", in_run=True):
            yield
    except (DatasetNotFoundError, ConnectionError) as error:
        gated = "; ask for access on its page, then set HF_TOKEN" if "gated" in str(error) else ""
        raise RunError(f"data set {name}: {str(error).splitlines()[0]}{gated}") from error
    except (ValueError, FileNotFoundError) as error:
        if there := configurations_in(error):
            raise ConfigError(no_configuration(name, config, there)) from error
        first = str(error).splitlines()[0]
        raise ConfigError(f"task.dataset={name}, task.dataset_config={config}: {first}") from error
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        raise ConfigError(
            f"data set {name}: {datasets_cache()} can't be written to, and `datasets` locks what "
            "it reads: copy it to a place of yours, and set HF_DATASETS_CACHE to that"
        ) from error


def _at_commit(task: TaskConfig, revision: str | None) -> DatasetDict | None:
    """What was prepared of a data set's commit, where no network is to be used.

    `datasets` would take what it prepared last, whatever the commit.

    Raises:
        RunError: the cache hasn't got this commit.
    """
    if revision is None or not offline():
        return None
    folder = prepared(str(task.dataset), task.dataset_config, revision)
    if folder is None:
        part = f", {task.dataset_config}" if task.dataset_config else ""
        raise RunError(
            f"data set {task.dataset}{part} at {revision[:12]}: not prepared in "
            f"{datasets_cache()}{others_prepared(str(task.dataset), revision)}; fetch it with "
            "forgelm cache where there is a network"
        )
    return load_prepared(folder)


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
            columns = _columns(path, table)
            try:
                rows = Dataset.from_dict(columns)
            except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
                _refuse_unfit(path, columns)
                raise
    except (pyarrow.ArrowException, UnicodeError, OverflowError) as error:
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
            _check_header(path, header)
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


def _check_header(path: Path, header: list[str]) -> None:
    twice = [name for name in dict.fromkeys(header) if name and header.count(name) > 1]
    if twice:
        raise ConfigError(
            f"{path}: the header names {', '.join(twice)} more than once; rename or remove columns "
            "until each name stands for one"
        )


@dataclass(frozen=True)
class _Doubled:
    """Stands for a JSON object that has a key more than once."""

    key: str

    def __str__(self) -> str:
        return f"the key {self.key!r} stands more than once in an object; keep one of them"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Doubled:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    keys = [key for key, _ in pairs]
    return _Doubled(next(key for key in made if keys.count(key) > 1))


def _parts(value: Any) -> Iterator[Any]:
    """A value of JSON and all that is inside it."""
    yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    doubled: list[_Doubled] = []

    def made(pairs: list[tuple[str, Any]]) -> Any:
        found = _object(pairs)
        if isinstance(found, _Doubled):
            doubled.append(found)
        return found

    decode = json.JSONDecoder(object_pairs_hook=made).decode
    if path.suffix.lower() == ".json":
        try:
            rows = decode(text or "[]")
        except (ValueError, RecursionError) as error:
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
                rows.append(decode(line))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number}: not JSON: {error}") from error
            if doubled:
                raise ConfigError(f"{path}, line {number}: {doubled[0]}")
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty")
    for number, row in enumerate(rows, 1):
        if doubled and any(isinstance(part, _Doubled) for part in _parts(row)):
            raise ConfigError(f"{path}, row {number}: {doubled[0]}")
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


def _refuse_unfit(path: Path, columns: dict[str, list[Any]]) -> None:
    """Name the first value that a table can't hold."""
    for name, values in columns.items():
        if not _encodes(name):
            raise ConfigError(f"{path}: column {name!r}: its name has {_HALF}; rename it")
        for row, value in enumerate(values, 1):
            for part in _parts(value):
                if isinstance(part, int) and not -(2**63) <= part < 2**63:
                    said = f"{str(part)[:40]} needs more than 64 bits; write it as text"
                elif isinstance(part, str) and not _encodes(part):
                    said = f"{part!r:.60} has {_HALF}; remove it"
                else:
                    continue
                raise ConfigError(f"{path}, row {row}, column {name}: {said}")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list or an object"


def check_present(wanted: dict[str, str | None], where: str, columns: list[str]) -> None:
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


def texts(column: str, where: str, rows: Dataset) -> list[str]:
    """A column of texts, which may be empty.

    Raises:
        ConfigError: rows whose value is none, all of them.
    """
    values: list[str] = rows[column][:]
    refuse(no_texts(column, where, values, may_be_empty=True))
    return values


def no_texts(column: str, where: str, values: list[Any], may_be_empty: bool) -> list[str]:
    """What is wrong with a column of texts, a line for each row."""
    problems = []
    for row, value in enumerate(values, 1):
        if value is None:
            problems.append(f"{where}, row {row}: {column} is null, and must be text")
        elif not isinstance(value, str):
            problems.append(f"{where}, row {row}: {column}={value!r:.60} is not text")
        elif not may_be_empty and not value.strip():
            problems.append(f"{where}, row {row}: {column} is empty")
    return problems


def refuse(problems: list[str]) -> None:
    """Raise ConfigError with the first of the rows that are wrong, and how many more there are."""
    if problems:
        more = len(problems) - _SHOWN
        rest = [f"... and {more:,} more rows of this kind"] if more > 0 else []
        raise ConfigError([*problems[:_SHOWN], *rest])


def part(rows: Dataset, limit: int | None) -> Dataset:
    """A fixed part: the same rows for every seed of a run."""
    import numpy

    if limit is None or limit >= len(rows):
        return rows
    order = numpy.random.RandomState(_PART_SEED).permutation(len(rows))
    return rows.select(order[:limit])


def digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
