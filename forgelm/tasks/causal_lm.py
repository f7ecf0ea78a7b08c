"""Kind causal_lm: text that goes on, for decoder-only models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm import stop
from forgelm.config.metrics import answers
from forgelm.config.schema import RlConfig, RunConfig, TaskConfig
from forgelm.errors import ConfigError
from forgelm.log import say
from forgelm.models.tokens import IGNORED
from forgelm.tasks import chat, language
from forgelm.tasks.data import Asked, Rows, TaskData
from forgelm.tasks.encode import CHUNK, cached, check_length, tokenizer_fingerprint
from forgelm.tasks.language import MESSAGES, PAIR, TEXT
from forgelm.tasks.packing import pack
from forgelm.tasks.sources import refuse
from forgelm.tasks.texts import ASKED, REFERENCES, Texts, task_data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SHOWN = 10

load_rows = language.load_rows


def prepare(
    config: RunConfig,
    rows: Rows,
    reader: PreTrainedTokenizerBase,
    teacher_reader: PreTrainedTokenizerBase | None,
    multiple_of: int | None,
) -> TaskData:
    """Encode a task's rows; a teacher reads the same tokens.

    Raises:
        ConfigError: `task.max_length` is more than a model takes, the teacher's vocabulary is
            another, no row is left, or a metric needs answers that the rows don't have.
    """
    task = config.task
    if isinstance(config.mode, RlConfig):
        from forgelm.tasks import prompts

        return prompts.prepare(config, rows, reader, multiple_of)
    check_readers(task, reader, teacher_reader)
    if answers(task) and TEXT in rows.train.column_names:
        raise ConfigError(
            f"task.metrics=[{','.join(task.metrics)}]: plain text has no answers to compare; use "
            "perplexity and token_accuracy, or give prompt and completion columns"
        )
    train = encode(task, task.train_split, rows.train, reader)
    if task.packing:
        train = packed(train, task.max_length)
    held_out = {name: encode(task, name, split, reader) for name, split in rows.eval.items()}
    asking = Collator(reader, multiple_of, asks=answers(task))
    return task_data(rows, train, held_out, reader, Collator(reader, multiple_of), asking, task)


def scorer(config: RunConfig, labels: Any, reader: PreTrainedTokenizerBase) -> Texts:
    """Scores rows one by one as `prepare` encodes them, or answers `asked` ones."""
    return Texts(config.task, reader, Collator(reader, asks=True))


def asked(config: RunConfig, data: Path, reader: PreTrainedTokenizerBase) -> Asked:
    """Read and encode own rows to be answered.

    Raises:
        ConfigError: the file can't be read, a row isn't what the task reads, or is too long.
    """
    from datasets import Dataset

    given, rows = language.own_rows(config.task, data)
    made = []
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        ids: list[int] = []
        with chat.noted(problems, f"{data}, row {number}"):
            ids = asked_ids(row, reader)
        if len(ids) > config.task.max_length:
            raise ConfigError(
                f"{data}, row {number}: {len(ids)} tokens, and the run's task.max_length is "
                f"{config.task.max_length}; shorten it"
            )
        made.append({"input_ids": ids, "prompt_length": len(ids), "reference": None})
    refuse(problems)
    return Asked(given, Dataset.from_list(made))


def asked_ids(row: dict[str, str], reader: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which the model answers a row of `load_rows`."""
    if MESSAGES in row:
        text = chat.asked(json.loads(row[MESSAGES]), reader)
        ids: list[int] = reader(text, add_special_tokens=False)["input_ids"]
        return ids
    return _open_ended(reader(row.get(PAIR[0], row.get(TEXT)))["input_ids"], reader)


def check_readers(
    task: TaskConfig,
    reader: PreTrainedTokenizerBase,
    teacher_reader: PreTrainedTokenizerBase | None,
) -> None:
    """Refuse what the student, or a teacher that reads the same tokens, can't take."""
    check_length(reader, task.max_length, "the model")
    if teacher_reader is not None:
        check_same_vocabulary(reader, teacher_reader)
        check_length(teacher_reader, task.max_length, "the teacher")


def check_same_vocabulary(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher in whose vocabulary the student's tokens stand for something else."""
    known = theirs.get_vocab()
    wrong = {
        token: number for token, number in ours.get_vocab().items() if known.get(token) != number
    }
    if wrong:
        token = min(wrong, key=lambda name: wrong[name])
        place = known.get(token)
        raise ConfigError(
            f"the teacher's tokenizer isn't the student's: {len(wrong):,} of {len(ours):,} tokens "
            f"differ (token {token!r} is {wrong[token]} for the student and "
            f"{'unknown' if place is None else place} for the teacher); distillation compares "
            "token by token, so choose a teacher of the student's family"
        )


def encode(
    task: TaskConfig, split: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Tokens of `rows`, from the cache if there; says what was cut or left out.

    Columns: `input_ids` and `labels` (at most `task.max_length`), `prompt_length` (tokens before
    the answer), `reference` (the answer), `row` (its number from 1), `cut`.

    Raises:
        ConfigError: the model has no chat template, or no row is left.
    """
    template = None
    if MESSAGES in rows.column_names:
        chat.check_template(tokenizer, "the model")
        template = tokenizer.chat_template
    settings = ["causal_lm", task.max_length, tokenizer_fingerprint(tokenizer), template]

    def make() -> Dataset:
        made = _encode(task, split, rows, tokenizer)
        if not len(made):
            raise ConfigError(
                f"split {split}: in none of the {len(rows):,} rows is anything to learn within "
                f"task.max_length={task.max_length} tokens; raise it"
            )
        return made

    made = cached(rows, [*settings, tokenizer.eos_token_id], make)
    if MESSAGES in rows.column_names:
        _say_turns(split, rows)
    say_counts(split, len(rows), made, task.max_length)
    return made


def _say_turns(split: str, rows: Dataset) -> None:
    """A line each for chats of which a turn isn't learnt for where it stands."""
    chats = [json.loads(text) for text in rows[MESSAGES][:]]
    first = [row for row, turns in enumerate(chats, 1) if turns[0]["role"] == "assistant"]
    last = [row for row, turns in enumerate(chats, 1) if not chat.answered(turns)]
    if first:
        say(
            f"split {split}: {len(first):,} of {len(chats):,} chats begin with the assistant; that "
            f"turn answers nothing and isn't learnt ({_listed(first)})"
        )
    if last:
        say(
            f"split {split}: {len(last):,} of {len(chats):,} chats go on after the assistant's "
            f"last turn; what follows it is left out ({_listed(last)})"
        )


def say_counts(split: str, before: int, made: Dataset, max_length: int) -> None:
    """A line each for rows that were cut and for rows that were left out."""
    limit = f"task.max_length={max_length}"
    kept = made["row"][:]
    cut = [row for row, was_cut in zip(kept, made["cut"][:], strict=True) if was_cut]
    if cut:
        say(f"split {split}: {len(cut):,} of {before:,} rows cut at {limit} ({_listed(cut)})")
    gone = sorted(set(range(1, before + 1)) - set(kept))
    if gone:
        say(
            f"split {split}: {len(gone):,} of {before:,} rows left out, their prompt alone fills "
            f"{limit} ({_listed(gone)})"
        )


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(f"{row}" for row in rows[:_SHOWN])
    return f"row {shown}{', ...' if len(rows) > _SHOWN else ''}"


@dataclass(frozen=True)
class _Tokens:
    """A row's tokens before it is cut: which are to be learnt, where the answer begins."""

    ids: list[int]
    learnt: list[bool]
    prompt_length: int
    reference: str | None


def _encode(
    task: TaskConfig, split: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    from datasets import Dataset, Features, List, Value

    made: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "prompt_length", "reference", "row", "cut")
    }
    number, rewritten = 0, 0
    problems: list[str] = []
    for start in range(0, len(rows), CHUNK):
        stop.check()
        places = [f"split {split}, row {row}" for row in range(start + 1, start + CHUNK + 1)]
        for tokens, whole in _tokens(rows[start : start + CHUNK], tokenizer, places, problems):
            number += 1
            rewritten += not whole
            ids, learnt = tokens.ids[: task.max_length], tokens.learnt[: task.max_length]
            # Nothing foretells the first token.
            labels = [
                token if place and wanted else IGNORED
                for place, (token, wanted) in enumerate(zip(ids, learnt, strict=True))
            ]
            if all(label == IGNORED for label in labels):
                continue
            values = (
                ids,
                labels,
                tokens.prompt_length,
                tokens.reference,
                number,
                len(tokens.ids) > task.max_length,
            )
            for column, value in zip(made.values(), values, strict=True):
                column.append(value)
    refuse(problems)
    if rewritten:
        say(
            f"{rewritten:,} chats: the model's template rewrites earlier answers, so these are not "
            "learnt, the last one is"
        )
    integers = List(Value("int32"))
    features = Features(
        input_ids=integers,
        labels=integers,
        prompt_length=Value("int32"),
        reference=Value("string"),
        row=Value("int64"),
        cut=Value("bool"),
    )
    return Dataset.from_dict(made, features=features)


def _tokens(
    rows: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    places: list[str],
    problems: list[str],
) -> Iterator[tuple[_Tokens, bool]]:
    """Each row's tokens, and whether all of it that could be learnt is.

    None of a chat that the template refuses: that goes to the problems, by its row's place.
    """
    if MESSAGES in rows:
        yield from _chats(rows[MESSAGES], tokenizer, places, problems)
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if TEXT in rows:
        for ids in tokenizer(rows[TEXT])["input_ids"]:
            ids = _open_ended(ids, tokenizer) + end
            yield _Tokens(ids, [True] * len(ids), 0, None), True
        return
    prompts = tokenizer(rows[PAIR[0]])["input_ids"]
    completions = tokenizer(rows[PAIR[1]], add_special_tokens=False)["input_ids"]
    for prompt, completion, text in zip(prompts, completions, rows[PAIR[1]], strict=True):
        asked, said = _open_ended(prompt, tokenizer), completion + end
        learnt = [False] * len(asked) + [True] * len(said)
        yield _Tokens(asked + said, learnt, len(asked), text), True


def _open_ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without the mark of an end that some tokenizers add to every text."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _chats(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, places: list[str], problems: list[str]
) -> Iterator[tuple[_Tokens, bool]]:
    chats = [json.loads(text) for text in texts]
    written = []
    for turns, place in zip(chats, places, strict=False):
        with chat.noted(problems, place):
            written.append(chat.write(turns, tokenizer))
    if problems:
        return
    encoded = tokenizer(
        [each.text for each in written], add_special_tokens=False, return_offsets_mapping=True
    )
    for turns, each, ids, offsets in zip(
        chats, written, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        learnt = [any(start <= at < end for start, end in each.spans) for at, _ in offsets]
        before = sum(at < each.answer_from for at, _ in offsets)
        answer = [turn["content"] for turn in turns if turn["role"] == "assistant"][-1]
        yield _Tokens(ids, learnt, before, answer), each.all_turns


def packed(rows: Dataset, max_length: int) -> Dataset:
    """Rows put together to sequences of at most `max_length` tokens, positions begun anew."""
    from datasets import Dataset

    ids, labels = rows["input_ids"][:], rows["labels"][:]
    packs = pack([len(row) for row in ids], max_length)
    say(f"packing: {len(ids):,} rows in {len(packs):,} sequences of up to {max_length} tokens")
    return Dataset.from_dict(
        {
            "input_ids": [[token for row in rows_ for token in ids[row]] for rows_ in packs],
            "labels": [[label for row in rows_ for label in labels[row]] for rows_ in packs],
            "position_ids": [
                [place for row in rows_ for place in range(len(ids[row]))] for rows_ in packs
            ],
        }
    )


class Collator:
    """Pads rows to the longest of the batch, on the right.

    Returns `input_ids`, `labels` (if the rows have them) and `attention_mask`, or for packed rows
    `position_ids` in its place, int64 [batch, length]; with `asks` also `asked_input_ids` and
    `asked_attention_mask`, the prompts, padded on the left, and the list `references`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        multiple_of: int | None = None,
        asks: bool = False,
    ) -> None:
        self.pad = tokenizer.pad_token_id
        self.multiple_of = multiple_of
        self.asks = asks

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch: dict[str, Any] = {}
        if "labels" in rows[0]:
            ids = [row["input_ids"] for row in rows]
            batch["input_ids"] = self._padded(ids, self.pad)
            batch["labels"] = self._padded([row["labels"] for row in rows], IGNORED)
            if "position_ids" in rows[0]:
                # Without a mask the positions tell which tokens belong together.
                batch["position_ids"] = self._padded([row["position_ids"] for row in rows], 0)
            else:
                batch["attention_mask"] = self._padded([[1] * len(row) for row in ids], 0)
        if self.asks:
            prompts = [row["input_ids"][: row["prompt_length"]][::-1] for row in rows]
            batch[f"{ASKED}input_ids"] = torch.flip(self._padded(prompts, self.pad), (1,))
            mask = self._padded([[1] * len(prompt) for prompt in prompts], 0)
            batch[f"{ASKED}attention_mask"] = torch.flip(mask, (1,))
            batch[REFERENCES] = [row["reference"] for row in rows]
        return batch

    def _padded(self, rows: list[list[int]], value: int) -> Any:
        import torch

        size = max(map(len, rows))
        if self.multiple_of is not None:
            size = -(-size // self.multiple_of) * self.multiple_of
        return torch.tensor([row + [value] * (size - len(row)) for row in rows])
