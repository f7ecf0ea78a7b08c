"""Measuring models that write: loss and accuracy by token, answers by greedy decoding."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forgelm.config.schema import TaskConfig
from forgelm.tasks.data import Collate, Rows, TaskData

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

ASKED = "asked_"
REFERENCES = "references"


@dataclass(frozen=True)
class Record:
    """A row: summed cross-entropy of its supervised tokens, how many there are and how many were
    the likeliest; what the model answered and what it should have."""

    loss: float = 0.0
    tokens: int = 0
    correct: int = 0
    prediction: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Texts:
    """Scores written text. A batch has the model's inputs with `labels` (or none), and, if answers
    are wanted, what is asked under `asked_*` and the list `references`."""

    task: TaskConfig
    tokenizer: PreTrainedTokenizerBase
    collator: Collate

    def score(self, model: PreTrainedModel, batch: dict[str, Any]) -> list[Record]:
        asked = {
            key.removeprefix(ASKED): batch.pop(key) for key in list(batch) if key.startswith(ASKED)
        }
        references = batch.pop(REFERENCES, None)
        count = len(next(iter((asked or batch).values())))
        labels = batch.pop("labels", None)
        sums = [(0.0, 0, 0)] * count if labels is None else _token_sums(model, batch, labels)
        said: list[Any] = self._said(model, asked) if asked else [None] * count
        wanted = references or [None] * count
        return [
            Record(*row, prediction, reference)
            for row, prediction, reference in zip(sums, said, wanted, strict=True)
        ]

    def _said(self, model: PreTrainedModel, asked: dict[str, Any]) -> list[str]:
        from forgelm.models.sharded import is_sharded

        made = model.generate(
            **asked,
            generation_config=greedy(model, self.tokenizer, self.task.max_new_tokens),
            # All ranks compute until the last one's answers end.
            synced_gpus=is_sharded(model),
        )
        if not model.config.is_encoder_decoder:
            made = made[:, asked["input_ids"].shape[1] :]
        said: list[str] = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return said

    def summary(self, records: Sequence[Record]) -> dict[str, float]:
        from forgelm.tasks.metrics import measure

        tokens = sum(record.tokens for record in records)
        loss = sum(record.loss for record in records) / tokens if tokens else math.nan
        known = {
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": sum(r.correct for r in records) / tokens if tokens else math.nan,
        }
        pattern = self.task.answer_pattern
        asked = [r for r in records if r.prediction is not None and r.reference is not None]
        said = [answer_in(str(record.prediction), pattern) for record in asked]
        wanted = [answer_in(str(record.reference), pattern) for record in asked]
        others = [name for name in self.task.metrics if name not in known]
        values = known | (measure(others, said, wanted) if asked else {})
        return {"loss": loss, **{name: values[name] for name in self.task.metrics}}

    def answers(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        return [{"prediction": record.prediction} for record in records]


def task_data(
    rows: Rows,
    train: Dataset,
    held_out: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    collator: Collate,
    asking: Collate,
    task: TaskConfig,
) -> TaskData:
    """A task whose teacher reads the student's tokens; `asking` collates for evaluation."""
    scorer = Texts(task, tokenizer, asking)
    return TaskData(
        rows,
        train=train,
        eval=held_out,
        train_collator=collator,
        reader=tokenizer,
        scorer=scorer,
        teacher_eval=held_out,
        teacher_scorer=scorer,
    )


def _token_sums(
    model: PreTrainedModel, inputs: dict[str, Any], labels: torch.Tensor
) -> list[tuple[float, int, int]]:
    """For each row: summed cross-entropy, supervised tokens, tokens that were the likeliest."""
    import torch

    from forgelm.models.tokens import head_of, per_row, supervised

    head = head_of(model)
    logits, targets = supervised(model, head, inputs, labels)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu()
    right = (logits.argmax(dim=-1) == targets).cpu()
    counts = per_row(labels, shifted=head.start is None).tolist()
    parts = zip(torch.split(losses, counts), torch.split(right, counts), strict=True)
    return [(loss.double().sum().item(), len(loss), int(hits.sum().item())) for loss, hits in parts]


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Greedy decoding, whatever the model's own defaults for sampling."""
    from transformers import GenerationConfig

    own = model.generation_config
    known = own.eos_token_id if own is not None else None
    ends = known if isinstance(known, list) else [known]
    ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=getattr(own, "bos_token_id", None),
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
    )


def answer_in(text: str, pattern: str | None) -> str:
    """The answer within a text: the last match of the pattern, else all of it; trimmed."""
    if pattern is None:
        return text.strip()
    found = list(re.finditer(pattern, text))
    if not found:
        return ""
    last = found[-1]
    return (last.group(1) if last.re.groups else last.group()).strip()
