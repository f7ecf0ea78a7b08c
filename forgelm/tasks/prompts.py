"""What mode rl makes of text: prompts to train on, and answers measured by rewards too."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from forgelm import stop
from forgelm.config.metrics import REWARD
from forgelm.config.rewards import round_of, weights
from forgelm.config.schema import RunConfig, TaskConfig
from forgelm.errors import ConfigError
from forgelm.tasks import causal_lm, chat
from forgelm.tasks.data import Rows, TaskData
from forgelm.tasks.encode import cached, check_length, tokenizer_fingerprint
from forgelm.tasks.language import MESSAGES, PAIR, TEXT
from forgelm.tasks.rewards import Checked, build, useless
from forgelm.tasks.sources import refuse
from forgelm.tasks.texts import ASKED, REFERENCES, Record, Texts, greedy

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 5
PROMPTS = "prompts"


def prepare(
    config: RunConfig, rows: Rows, reader: PreTrainedTokenizerBase, multiple_of: int | None
) -> TaskData:
    """Prompts to train on, and rows to evaluate on; see `causal_lm.prepare`.

    Training rows have `prompt` (JSON, of a text or of chat messages), `reference` (the row's own
    completion, or None) and `input_ids`, the prompt's tokens. So have evaluation rows without a
    completion; the others are those of `causal_lm.encode`, with `prompt`.

    Raises:
        ConfigError: the rows have no prompts, too few, or not the answers that a reward or metric
            needs.
    """
    task, mode = config.task, config.mode
    check_length(reader, task.max_length, "the model")
    if TEXT in rows.train.column_names:
        raise ConfigError(
            "mode=rl: plain text has no prompts; give task.prompt_column or task.messages_column"
        )
    rewards = build(mode, task.answer_pattern)
    splits = {task.train_split: rows.train, **rows.eval}
    references = {name: _references(name, split) for name, split in splits.items()}
    _check_answers(config, rewards, references)
    train = _prompts(task, task.train_split, rows.train, references[task.train_split], reader)
    _check_count(config, train)
    held_out = {
        name: _prompts(task, name, split, None, reader)
        if references[name] is None
        else _with_labels(task, name, split, reader)
        for name, split in rows.eval.items()
    }
    scorer = Rewarded(
        replace(task, metrics=[name for name in task.metrics if name != REWARD]),
        reader,
        Collator(reader, multiple_of, asks=True),
        tuple(rewards),
        tuple(weights(mode)),
    )
    return TaskData(
        rows,
        train=train,
        eval=held_out,
        train_collator=scorer.collator,
        reader=reader,
        scorer=scorer,
        teacher_eval={},
        teacher_scorer=scorer,
    )


def shown(prompt: str) -> Any:
    """A row's `prompt` as rewards see it: text, or a list of chat messages."""
    return json.loads(prompt)


def _references(split: str, rows: Dataset) -> list[str] | None:
    """Each row's own completion; None where there are only prompts."""
    if MESSAGES not in rows.column_names:
        return list(rows[PAIR[1]][:]) if PAIR[1] in rows.column_names else None
    chats = [json.loads(text) for text in rows[MESSAGES][:]]
    ends = [chat.answered(turns) for turns in chats]
    if not any(ends):
        return None
    if not all(ends):
        raise ConfigError(
            f"split {split}, row {ends.index(False) + 1}: ends with the turn of "
            f"{chats[ends.index(False)][-1]['role']}, and other rows with an answer; give all "
            "rows an answer, or none"
        )
    return [turns[-1]["content"] for turns in chats]


def _check_answers(
    config: RunConfig, rewards: list[Checked], references: dict[str, list[str] | None]
) -> None:
    task, problems = config.task, []
    comparing = [reward.name for reward in rewards if reward.needs_references]
    metrics = [name for name in task.metrics if name != REWARD]
    for split, known in references.items():
        if known is not None:
            problems += _without_answer(task, comparing, split, known)
            continue
        lacking = f"split {split} has only prompts, so there is nothing to compare with"
        named = "name the answers with task.completion_column"
        if comparing:
            problems.append(
                f"mode.rewards: {', '.join(comparing)}: {lacking}; {named}, or use rewards that "
                "need none, such as format and length"
            )
        if metrics and split != task.train_split:
            problems.append(
                f"task.metrics: {', '.join(metrics)}: {lacking}; {named}, or use "
                f"task.metrics=[{REWARD}]"
            )
    if problems:
        raise ConfigError(problems)


def _without_answer(
    task: TaskConfig, names: list[str], split: str, references: list[str]
) -> list[str]:
    wrong = []
    for number, reference in enumerate(references, 1):
        for name in names:
            reason = useless(name, reference, task.answer_pattern)
            if reason is not None:
                wrong.append(f"split {split}, row {number}: {reason}; the reward {name} needs one")
    more = len(wrong) - _SHOWN
    return [*wrong[:_SHOWN], *([f"... and {more:,} more of this kind"] if more > 0 else [])]


def _check_count(config: RunConfig, train: Dataset) -> None:
    round_ = round_of(config)
    if config.training.dataloader_drop_last and len(train) < round_.prompts:
        raise ConfigError(
            f"training.dataloader_drop_last=true: {len(train)} prompts don't fill one generation "
            f"of {round_.prompts}; leave it out, or lower training.per_device_train_batch_size"
        )


def _prompts(
    task: TaskConfig,
    split: str,
    rows: Dataset,
    references: list[str] | None,
    reader: PreTrainedTokenizerBase,
) -> Dataset:
    """Columns `prompt` (JSON), `reference`, `input_ids`, `prompt_length`, `row`; from the cache if
    there. Prompts longer than `task.max_length` are left out, which is said.
    """
    template = None
    if MESSAGES in rows.column_names:
        chat.check_template(reader, "the model")
        template = reader.chat_template
    settings = ["prompts", task.max_length, tokenizer_fingerprint(reader), template]
    made = cached(rows, settings, lambda: _read(task, split, rows, references, reader))
    causal_lm.say_counts(split, len(rows), made, task.max_length)
    return made


def _read(
    task: TaskConfig,
    split: str,
    rows: Dataset,
    references: list[str] | None,
    reader: PreTrainedTokenizerBase,
) -> Dataset:
    from datasets import Dataset, Features, List, Value

    features = Features(
        prompt=Value("string"),
        reference=Value("string"),
        input_ids=List(Value("int32")),
        prompt_length=Value("int32"),
        row=Value("int64"),
        cut=Value("bool"),
    )
    made: dict[str, list[Any]] = {name: [] for name in features}
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        stop.check()
        ids: list[int] = []
        with chat.noted(problems, f"split {split}, row {number}"):
            ids = causal_lm.asked_ids(row, reader)
        if len(ids) > task.max_length:
            continue
        reference = None if references is None else references[number - 1]
        values = _prompt(row), reference, ids, len(ids), number, False
        for column, value in zip(made.values(), values, strict=True):
            column.append(value)
    refuse(problems)
    return Dataset.from_dict(made, features=features)


def _with_labels(
    task: TaskConfig, split: str, rows: Dataset, reader: PreTrainedTokenizerBase
) -> Dataset:
    encoded = causal_lm.encode(task, split, rows, reader)
    prompts = [_prompt(row) for row in rows]
    return encoded.add_column("prompt", [prompts[row - 1] for row in encoded["row"][:]])


def _prompt(row: dict[str, str]) -> str:
    prompt = chat.opening(json.loads(row[MESSAGES])) if MESSAGES in row else row[PAIR[0]]
    return json.dumps(prompt, ensure_ascii=False)


class Collator(causal_lm.Collator):
    """Adds the list `prompts`, as rewards see them."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().__call__(rows), PROMPTS: [shown(row["prompt"]) for row in rows]}


@dataclass(frozen=True)
class Valued(Record):
    """What an answer is worth to each reward; None where one doesn't apply."""

    rewards: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Rewarded(Texts):
    """Measures answers by the rewards too: `reward`, their weighted sum, and `reward_NAME`.

    Answers that no reward applies to don't count; without any that do, `reward` has no value.
    """

    rewards: tuple[Checked, ...]
    weights: tuple[float, ...]

    def score(self, model: PreTrainedModel, batch: dict[str, Any]) -> list[Record]:
        prompts = batch.pop(PROMPTS)
        asked = {
            key.removeprefix(ASKED): batch.pop(key) for key in list(batch) if key.startswith(ASKED)
        }
        references = list(batch[REFERENCES])
        known = super().score(model, batch) if "labels" in batch else [Record()] * len(prompts)
        said = self._tokens(model, asked)
        texts: list[str] = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        given = {
            "prompts": prompts,
            "completions": texts,
            "references": references,
            "completion_ids": said,
        }
        worth = zip(*(reward(**given) for reward in self.rewards), strict=True)
        return [
            Valued(row.loss, row.tokens, row.correct, text, reference, values)
            for row, text, reference, values in zip(known, texts, references, worth, strict=True)
        ]

    def _tokens(self, model: PreTrainedModel, asked: dict[str, Any]) -> list[list[int]]:
        """What the model answers, each up to its first mark of an end."""
        decoding = greedy(model, self.tokenizer, self.task.max_new_tokens)
        made = model.generate(**asked, generation_config=decoding)
        ends = set(decoding.eos_token_id or ())
        return [_ended(ids, ends) for ids in made[:, asked["input_ids"].shape[1] :].tolist()]

    def summary(self, records: Sequence[Any]) -> dict[str, float]:
        values = super().summary(records) if records[0].tokens else {}
        sums = [
            sum(w * v for w, v in zip(self.weights, record.rewards, strict=True) if v is not None)
            for record in records
            if any(value is not None for value in record.rewards)
        ]
        values[REWARD] = sum(sums) / len(sums) if sums else math.nan
        for place, reward in enumerate(self.rewards):
            given = [r.rewards[place] for r in records if r.rewards[place] is not None]
            if given:
                values[f"{REWARD}_{reward.name}"] = sum(given) / len(given)
        return values


def _ended(ids: list[int], ends: set[int]) -> list[int]:
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]
