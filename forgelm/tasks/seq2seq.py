"""Kind seq2seq: an answer to a text, for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm import stop
from forgelm.config.metrics import answers
from forgelm.config.schema import RunConfig, TaskConfig
from forgelm.errors import ConfigError
from forgelm.models.tokens import IGNORED
from forgelm.tasks import language
from forgelm.tasks.causal_lm import check_readers, say_counts
from forgelm.tasks.data import Asked, Rows, TaskData
from forgelm.tasks.encode import CHUNK, cached, tokenizer_fingerprint
from forgelm.tasks.language import PAIR
from forgelm.tasks.texts import ASKED, REFERENCES, Texts, task_data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_rows(task: TaskConfig, revision: str | None) -> Rows:
    """Load and check the rows: `prompt` and `completion`.

    Raises:
        ConfigError: as for causal_lm, and where the rows hold something else.
    """
    rows = language.load_rows(task, revision)
    if rows.train.column_names != list(PAIR):
        raise ConfigError(
            f"task {task.name}: seq2seq needs a prompt and a completion, and the rows hold "
            f"{' and '.join(rows.train.column_names)}; name the columns with task.prompt_column "
            "and task.completion_column"
        )
    return rows


def prepare(
    config: RunConfig,
    rows: Rows,
    reader: PreTrainedTokenizerBase,
    teacher_reader: PreTrainedTokenizerBase | None,
    multiple_of: int | None,
) -> TaskData:
    """Encode a task's rows; a teacher reads the same tokens.

    Raises:
        ConfigError: `task.max_length` is more than a model takes, or the teacher's vocabulary is
            another.
    """
    task = config.task
    check_readers(task, reader, teacher_reader)
    held_out = {name: encode(task, name, split, reader) for name, split in rows.eval.items()}
    train = encode(task, task.train_split, rows.train, reader)
    asking = Collator(reader, multiple_of, asks=answers(task))
    return task_data(rows, train, held_out, reader, Collator(reader, multiple_of), asking, task)


def scorer(config: RunConfig, labels: Any, reader: PreTrainedTokenizerBase) -> Texts:
    """Scores rows as `prepare` encodes them, or answers `asked` ones."""
    return Texts(config.task, reader, Collator(reader, asks=True))


def asked(config: RunConfig, data: Path, reader: PreTrainedTokenizerBase) -> Asked:
    """Read and encode own rows to be answered; too long ones are cut.

    Raises:
        ConfigError: the file can't be read, or a row isn't what the task reads.
    """
    from datasets import Dataset

    given, rows = language.own_rows(config.task, data)
    made = reader(rows[PAIR[0]][:], truncation=True, max_length=config.task.max_length)
    references = [None] * len(given)
    return Asked(
        given, Dataset.from_dict({"input_ids": made["input_ids"], "reference": references})
    )


def encode(
    task: TaskConfig, split: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Tokens of `rows`, from the cache if there; says what was cut.

    Columns: `input_ids` and `labels`, each at most `task.max_length`, `reference`, `row` (its
    number from 1), `cut`.
    """
    settings = ["seq2seq", task.max_length, tokenizer_fingerprint(tokenizer)]
    made = cached(rows, settings, lambda: _encode(task, rows, tokenizer))
    say_counts(split, len(rows), made, task.max_length)
    return made


def _encode(task: TaskConfig, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    from datasets import Dataset

    limit = task.max_length
    made: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "reference", "row", "cut")
    }
    for start in range(0, len(rows), CHUNK):
        stop.check()
        texts = rows[start : start + CHUNK]
        sources = tokenizer(texts[PAIR[0]])["input_ids"]
        targets = [_closed(ids, tokenizer) for ids in tokenizer(texts[PAIR[1]])["input_ids"]]
        short = tokenizer(texts[PAIR[0]], truncation=True, max_length=limit)["input_ids"]
        made["input_ids"] += short
        made["labels"] += [target[:limit] for target in targets]
        made["reference"] += texts[PAIR[1]]
        made["row"] += range(start + 1, start + 1 + len(sources))
        made["cut"] += [
            len(source) > limit or len(target) > limit
            for source, target in zip(sources, targets, strict=True)
        ]
    return Dataset.from_dict(made)


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With the mark of the end, which some tokenizers add by themselves."""
    end = tokenizer.eos_token_id
    return ids if ids[-1:] == [end] or end is None else [*ids, end]


class Collator:
    """Pads rows to the longest of the batch.

    Returns `input_ids`, `attention_mask`, int64 [batch, length], and `labels`, int64 [batch, other
    length]; with `asks` the inputs once more under `asked_*`, and the list `references`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        multiple_of: int | None = None,
        asks: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.multiple_of = multiple_of
        self.asks = asks

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = self._padded([row["input_ids"] for row in rows])
        batch: dict[str, Any] = {}
        if "labels" in rows[0]:
            padded = self._padded([row["labels"] for row in rows])
            labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, IGNORED)
            batch = {**inputs, "labels": labels}
        if self.asks:
            batch |= {ASKED + name: tensor for name, tensor in inputs.items()}
            batch[REFERENCES] = [row["reference"] for row in rows]
        return batch

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, Any]:
        made = self.tokenizer.pad(
            {"input_ids": list(rows)}, return_tensors="pt", pad_to_multiple_of=self.multiple_of
        )
        return {name: made[name] for name in ("input_ids", "attention_mask")}
