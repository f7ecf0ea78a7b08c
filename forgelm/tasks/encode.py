"""From text to token ids, kept on disk and used again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm import stop
from forgelm.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2
CHUNK = 10_000
TEACHER_PREFIX = "teacher_"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer makes of any text: its rules, vocabulary and inputs."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), str(tokenizer.init_kwargs)]
    else:
        rules = json.loads(backend.to_str())
        # Use leaves its mark in these two; they are set anew at every call.
        rules |= {"truncation": None, "padding": None}
    known = [rules, tokenizer.model_input_names, tokenizer.truncation_side]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def check_length(tokenizer: PreTrainedTokenizerBase, max_length: int, name: str) -> None:
    """Refuse a `max_length` (tokens) that the model behind the tokenizer can't take."""
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"task.max_length={max_length}: {name} takes at most "
            f"{tokenizer.model_max_length} tokens; set task.max_length={tokenizer.model_max_length}"
        )


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids of `rows` (columns text, text_pair, label) and `labels`, from the cache if there.

    Sequences are at most `max_length` tokens and not padded.
    """

    def make() -> Dataset:
        made = encode_texts(rows, tokenizer, max_length)
        return made.add_column("labels", rows["label"][:])

    return cached(rows, [max_length, tokenizer_fingerprint(tokenizer)], make)


def cached(rows: Dataset, settings: list[Any], make: Callable[[], Dataset]) -> Dataset:
    """What `make` gives for rows and settings (plain data): kept on disk, and used again."""
    from datasets import config, load_from_disk

    total = hashlib.sha256(json.dumps([_FORMAT, *settings]).encode())
    for name in rows.column_names:
        total.update(json.dumps([name, rows[name][:]]).encode())
    key = total.hexdigest()[:32]
    place = Path(config.HF_DATASETS_CACHE) / "forgelm" / f"encoded-{key}"
    if not place.is_dir():
        _store(make(), place)
    return load_from_disk(str(place))


def encode_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids of `rows` (columns text, text_pair if any), at most `max_length`, not padded.

    Raises:
        Stopped: in between, when a stop was asked for.
    """
    from datasets import Dataset

    made: dict[str, list[Any]] = {}
    for start in range(0, len(rows), CHUNK):
        stop.check()
        part = rows[start : start + CHUNK]
        for name, values in _tokens(tokenizer, part, max_length).items():
            made.setdefault(name, []).extend(values)
    return Dataset.from_dict(made)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, rows: dict[str, Any], max_length: int
) -> dict[str, Any]:
    """Of one row, or of a list of rows."""
    pairs = rows.get("text_pair")
    made = tokenizer(rows["text"], pairs, truncation=True, max_length=max_length)
    return {name: made[name] for name in tokenizer.model_input_names if name in made}


def encode_stream(
    rows: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    max_length: int,
) -> IterableDataset:
    """A stream of rows as `encode` makes them, with a teacher's columns if it reads differently."""

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        made = {**_tokens(tokenizer, row, max_length), "labels": row["label"]}
        if teacher is not None:
            theirs = _tokens(teacher, row, max_length)
            made |= {TEACHER_PREFIX + name: value for name, value in theirs.items()}
        return made

    gone = ["text", "text_pair", "label"] if rows.column_names is None else rows.column_names
    return rows.map(encoded, remove_columns=gone)


def _store(made: Dataset, place: Path) -> None:
    """Move the whole folder into place at once; another process may have been faster."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = tempfile.mkdtemp(dir=place.parent, prefix=".encoding-")
    try:
        made.save_to_disk(beside)
        try:
            os.rename(beside, place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def with_teacher(student: Dataset, teacher: Dataset) -> Dataset:
    """The student's columns and, under other names, the teacher's for the same rows."""
    from datasets import concatenate_datasets

    inputs = teacher.remove_columns("labels")
    renamed = inputs.rename_columns({name: TEACHER_PREFIX + name for name in inputs.column_names})
    return concatenate_datasets([student, renamed], axis=1)


class Collator:
    """Pads rows to the longest of the batch: the student's columns, and the teacher's if given.

    Returns `input_ids` and like, int64 [batch, length]; `teacher_*`, int64 [batch, other length];
    `labels`, int64 [batch], or float32 [batch] for a regression. The mask token replaces a share
    `token_dropout` of the student's tokens, special ones aside, drawn from torch's generator.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        multiple_of: int | None = None,
        token_dropout: float = 0.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.teacher_tokenizer = teacher_tokenizer
        self.multiple_of = multiple_of
        self.token_dropout = token_dropout

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch = self._pad(self.tokenizer, [_inputs(row, "") for row in rows])
        if self.token_dropout:
            self._drop(batch["input_ids"])
        teacher_too = any(name.startswith(TEACHER_PREFIX) for name in rows[0])
        if self.teacher_tokenizer is not None and teacher_too:
            padded = self._pad(
                self.teacher_tokenizer, [_inputs(row, TEACHER_PREFIX) for row in rows]
            )
            batch |= {TEACHER_PREFIX + name: tensor for name, tensor in padded.items()}
        if "labels" in rows[0]:
            labels = torch.tensor([row["labels"] for row in rows])
            batch["labels"] = labels.float() if labels.is_floating_point() else labels
        return batch

    def _drop(self, ids: torch.Tensor) -> None:
        import torch

        special = torch.tensor(self.tokenizer.all_special_ids)
        dropped = (torch.rand(ids.shape) < self.token_dropout) & ~torch.isin(ids, special)
        ids[dropped] = self.tokenizer.mask_token_id

    def _pad(
        self, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        padded = tokenizer.pad(rows, return_tensors="pt", pad_to_multiple_of=self.multiple_of)
        return dict(padded)


def _inputs(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The row's own columns (no prefix) or those under a prefix, the prefix taken off."""
    if prefix:
        return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
    return {k: v for k, v in row.items() if not k.startswith(TEACHER_PREFIX) and k != "labels"}
