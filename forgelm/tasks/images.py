"""Rows of an image and its text: from folders, files, the hub; and reading the images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm import stop
from forgelm.config.schema import TaskConfig
from forgelm.errors import ConfigError
from forgelm.hub import is_local
from forgelm.tasks.data import Rows
from forgelm.tasks.encode import cached
from forgelm.tasks.sources import (
    check_present,
    digest,
    load_splits,
    no_texts,
    part,
    read_file,
    refuse,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

IMAGE, TEXT = "image", "text"
FILE_NAME = "file_name"
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SHOWN = 10
# What Pillow would cut to 8 bits, turning most of the image white.
_DEEP_MODES = ("I", "F")


class Unreadable(Exception):
    """An image that can't be used, and why."""


def load_rows(task: TaskConfig, revision: str | None) -> Rows:
    """Load and check the rows: `image` (not decoded: {bytes, path}) and `text`.

    Raises:
        ConfigError: a missing file, split or column, a text that is missing, images that can't be
            read (all of them, by file).
        RunError: the hub failed.
    """
    splits, fingerprint = _load(task, revision)
    if fingerprint is None:
        fingerprint = digest(*(_content(rows) for rows in splits.values()))
    train = part(splits.pop(task.train_split), task.max_train_samples)
    held_out = {name: part(rows, task.max_eval_samples) for name, rows in splits.items()}
    _check_images({task.train_split: train, **held_out}, fingerprint)
    return Rows(train, held_out, None, fingerprint, revision)


def own_rows(task: TaskConfig, data: Path) -> tuple[list[dict[str, Any]], Dataset]:
    """Images to be read: their rows as they stand in the file, and their `image` column.

    `data` is a folder of images, or a file whose column `file_name` names images beside it.

    Raises:
        ConfigError: there are none, or some can't be read (all of them, by file).
    """
    if data.is_dir():
        names = [str(path.relative_to(data)) for path in _image_files(data)]
        if not names:
            raise ConfigError(f"--data {data}: there are no images in the folder")
        given: list[dict[str, Any]] = [{FILE_NAME: name} for name in names]
        images = [_at(data / name) for name in names]
    else:
        rows = _from_file(task, data)
        images = rows[IMAGE][:]
        given = rows.remove_columns(IMAGE).to_list()
    made = _dataset(images, [""] * len(images))
    _refuse_broken(_broken(made, ""))
    return given, made.select_columns(IMAGE)


def read(image: dict[str, Any]) -> Image.Image:
    """Decode {bytes, path}: in RGB, upright, on white where it is transparent.

    Raises:
        Unreadable: it can't be.
    """
    from datasets import Image as Feature
    from PIL import Image, UnidentifiedImageError

    if image["bytes"] is None and image["path"] is None:
        raise Unreadable("there is no image")
    try:
        # Read here, because a file that turns out to be broken would be left open there.
        found = Feature().decode_example({**image, "bytes": _bytes(image)})
    except FileNotFoundError:
        raise Unreadable("no such file") from None
    except IsADirectoryError:
        raise Unreadable("a folder, and not an image") from None
    except UnidentifiedImageError:
        raise Unreadable("not an image that Pillow can read") from None
    # The readers of Pillow's many formats raise what they like.
    except Exception as error:
        raise Unreadable(" ".join(str(error).split())[:100] or type(error).__name__) from error
    if found.mode.startswith(_DEEP_MODES):
        raise Unreadable(f"mode {found.mode} has more than 8 bits a channel; convert it to 8")
    if found.has_transparency_data:
        found = found.convert("RGBA")
        found = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found)
    made: Image.Image = found.convert("RGB")
    return made


def _load(task: TaskConfig, revision: str | None) -> tuple[dict[str, Dataset], str | None]:
    """The splits, and what they are known by where that needn't be made of their content."""
    known, folder = None, _image_folder(task)
    if task.train_file is not None:
        files = {task.train_split: task.train_file, task.validation_splits[0]: task.validation_file}
        found = {name: _from_file(task, Path(str(path))) for name, path in files.items()}
    elif folder is not None:
        found = _from_folder(task, folder)
    else:
        splits, known = load_splits(task, revision)
        found = {
            name: _undecoded(rows, f"split {name}", task.image_column)
            for name, rows in splits.items()
        }
    return {name: _normalised(task, f"split {name}", rows) for name, rows in found.items()}, known


def _image_folder(task: TaskConfig) -> dict[str, list[str]] | None:
    """The files of each split of a folder of images, as `datasets` finds them; None for others."""
    from datasets import load_dataset_builder

    if task.dataset is None or not is_local(task.dataset):
        return None
    try:
        builder = load_dataset_builder(str(Path(task.dataset).expanduser()))
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"task.dataset={task.dataset}: {str(error).splitlines()[0]}") from error
    if builder.name != "imagefolder":
        return None
    return {str(split): list(files) for split, files in builder.config.data_files.items()}


def _from_folder(task: TaskConfig, files: dict[str, list[str]]) -> dict[str, Dataset]:
    """The splits of a folder of images.

    The metadata files are read here, and not by `datasets`, which makes numbers of texts such as
    0042 and nothing of a text such as NA.
    """
    from datasets import concatenate_datasets

    metadata = {
        split: [Path(file) for file in found if Path(file).name in _METADATA]
        for split, found in files.items()
    }
    splits = {}
    for split in [task.train_split, *task.validation_splits]:
        if split not in metadata:
            raise ConfigError(
                f"split {split}: {task.dataset} has {', '.join(metadata)}; see task.train_split "
                "and task.validation_splits"
            )
        if not metadata[split]:
            raise ConfigError(
                f"split {split}: {task.dataset} has images but no {' or '.join(_METADATA)} beside "
                f"them; write one with the columns {FILE_NAME} and {task.text_column}"
            )
        splits[split] = concatenate_datasets([_from_file(task, file) for file in metadata[split]])
    return splits


def _from_file(task: TaskConfig, path: Path) -> Dataset:
    """The rows of a file, with the column `image`: those it names, or its own."""
    from datasets import Image

    rows = read_file(path)
    if FILE_NAME not in rows.column_names:
        if task.image_column not in rows.column_names:
            raise ConfigError(
                f"{path}: has neither {FILE_NAME}, the column that names images beside it, nor "
                f"task.image_column={task.image_column}, which holds images, but "
                f"{', '.join(rows.column_names)}; rename the column in the file"
            )
        return _undecoded(rows, str(path), task.image_column)
    names = rows[FILE_NAME][:]
    refuse(no_texts(FILE_NAME, str(path), names, may_be_empty=False))
    images = [_at(path.parent / name) for name in names]
    others = [name for name in rows.column_names if name != IMAGE]
    return rows.select_columns(others).add_column(IMAGE, images, feature=Image(decode=False))


def _undecoded(rows: Dataset, where: str, column: str) -> Dataset:
    """The images under the name `image` as {bytes, path}, whatever they are kept as."""
    from datasets import Image

    check_present({"task.image_column": column}, where, rows.column_names)
    feature = rows.features[column]
    kept = isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)
    if not kept and getattr(feature, "dtype", None) not in ("binary", "large_binary"):
        raise ConfigError(
            f"task.image_column={column}: in {where} it holds {feature}, and not images"
        )
    return _renamed(rows.cast_column(column, Image(decode=False)), column, IMAGE)


def _renamed(rows: Dataset, column: str, name: str) -> Dataset:
    """Under another name, in the place of a column that has it."""
    if column == name:
        return rows
    others = [other for other in rows.column_names if other != name]
    return rows.select_columns(others).rename_column(column, name)


def _normalised(task: TaskConfig, where: str, rows: Dataset) -> Dataset:
    if not len(rows):
        raise ConfigError(f"{where} of task {task.name} has no rows")
    check_present({"task.text_column": task.text_column}, where, rows.column_names)
    rows = _renamed(rows.select_columns([IMAGE, task.text_column]), task.text_column, TEXT)
    _check_texts(task, where, rows)
    return rows


def _check_texts(task: TaskConfig, where: str, rows: Dataset) -> None:
    problems = []
    for number, text in enumerate(rows[TEXT][:]):
        if isinstance(text, str) and text.strip():
            continue
        wrong = (
            "is empty" if text in (None, "") or isinstance(text, str) else f"{text!r} isn't text"
        )
        name = _named(rows[number][IMAGE], where, number + 1)
        problems.append(f"{name}: {task.text_column} {wrong}")
    if problems:
        raise ConfigError(_shown(problems, "rows without a text"))


def _check_images(splits: dict[str, Dataset], fingerprint: str) -> None:
    """Decode every image; what was once found whole needn't be again."""
    from datasets import Dataset

    def whole() -> Dataset:
        broken = [line for name, rows in splits.items() for line in _broken(rows, f"split {name}")]
        _refuse_broken(broken)
        return Dataset.from_dict({"images": [len(rows) for rows in splits.values()]})

    counts = [[name, len(rows)] for name, rows in splits.items()]
    cached(Dataset.from_dict({}), ["images", fingerprint, counts], whole)


def _broken(rows: Dataset, where: str) -> list[str]:
    lines = []
    for number, row in enumerate(rows, 1):
        stop.check()
        try:
            read(row[IMAGE])
        except Unreadable as error:
            lines.append(f"{_named(row[IMAGE], where, number)}: {error}")
    return lines


def _refuse_broken(lines: list[str]) -> None:
    if lines:
        raise ConfigError(_shown(lines, "images that can't be read"))


def _shown(lines: list[str], what: str) -> list[str]:
    more = len(lines) - _SHOWN
    rest = [f"... and {more:,} more: {len(lines):,} {what}"] if more > 0 else []
    return [*lines[:_SHOWN], *rest]


def _named(image: dict[str, Any], where: str, number: int) -> str:
    path = image["path"]
    return str(path) if path else f"{where}, row {number}"


def _content(rows: Dataset) -> bytes:
    """What changes with any text and any image's bytes."""
    total = hashlib.sha256(json.dumps(rows[TEXT][:]).encode())
    for row in rows:
        stop.check()
        total.update(hashlib.sha256(_bytes(row[IMAGE]) or b"").digest())
    return total.digest()


def _bytes(image: dict[str, Any]) -> bytes | None:
    """The image's file, unless it is in an archive or isn't there."""
    content: bytes | None = image["bytes"]
    if content is None and Path(image["path"] or "").is_file():
        content = Path(image["path"]).read_bytes()
    return content


def _image_files(folder: Path) -> list[Path]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    suffixes = set(ImageFolder.EXTENSIONS)
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def _at(path: Path) -> dict[str, Any]:
    return {"bytes": None, "path": str(path)}


def _dataset(images: list[dict[str, Any]], texts: list[str]) -> Dataset:
    from datasets import Dataset, Features, Image, Value

    features = Features({IMAGE: Image(decode=False), TEXT: Value("string")})
    return Dataset.from_dict({IMAGE: images, TEXT: texts}, features=features)
