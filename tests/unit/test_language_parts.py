"""What of a row is learnt, how rows are packed, and where logits stand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from forgelm.config.schema import Kind, TaskConfig, TinyConfig
from forgelm.errors import ConfigError
from forgelm.models import tiny
from forgelm.models.tokens import IGNORED, head_of, refuse_leak, supervised
from forgelm.tasks import causal_lm, chat
from forgelm.tasks.packing import pack
from forgelm.tasks.texts import answer_in

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Three."},
]

# Writes only the last answer's reasoning, as templates of reasoning models do.
REWRITING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('#')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.reader(Kind.causal_lm)


def model(kind: Kind, vocabulary: Any, **sizes: Any) -> Any:
    torch.manual_seed(0)
    made = TinyConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, **sizes)
    return tiny.model(kind, made, vocabulary, {}).eval()


def encoded(tokenizer: Any, rows: dict[str, list[str]], max_length: int = 64) -> list[dict]:
    from datasets import Dataset

    task = TaskConfig(name="own", kind=Kind.causal_lm, max_length=max_length)
    return causal_lm._encode(task, "train", Dataset.from_dict(rows), tokenizer).to_list()


def learnt(tokenizer: Any, row: dict[str, Any]) -> str:
    return str(tokenizer.decode([token for token in row["labels"] if token != IGNORED]))


def test_of_a_prompt_and_its_completion_the_completion_is_learnt(tokenizer: Any) -> None:
    (row,) = encoded(tokenizer, {"prompt": ["1+1="], "completion": ["2"]})
    assert tokenizer.decode(row["input_ids"]) == "1+1=2</s>"
    assert learnt(tokenizer, row) == "2</s>"
    assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]) == "1+1="


def test_of_a_text_all_is_learnt_but_the_first_token(tokenizer: Any) -> None:
    (row,) = encoded(tokenizer, {"text": ["abc"]})
    assert tokenizer.decode(row["input_ids"]) == "abc</s>"
    assert learnt(tokenizer, row) == "bc</s>"


def test_of_a_chat_all_the_assistant_says_is_learnt(tokenizer: Any) -> None:
    (row,) = encoded(tokenizer, {"messages": [json.dumps(TURNS)]}, 128)
    assert learnt(tokenizer, row) == "Two.</s>Three.</s>"
    asked = tokenizer.decode(row["input_ids"][: row["prompt_length"]])
    assert asked.endswith("<|user|>And one?</s><|assistant|>")
    assert asked == chat.asked(TURNS, tokenizer)
    assert row["reference"] == "Three."


def test_where_a_template_rewrites_answers_only_the_last_is_learnt(tokenizer: Any) -> None:
    tokenizer = tiny.reader(Kind.causal_lm)
    tokenizer.chat_template = REWRITING
    turns = [dict(turn) for turn in TURNS]
    turns[2]["content"] = "hm#Two."
    written = chat.write(turns, tokenizer)
    assert [written.text[start:end] for start, end in written.spans] == ["Three.</s>"]
    assert not written.all_turns


def test_a_chat_that_the_template_refuses(tokenizer: Any) -> None:
    turns = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(ConfigError, match="chat template refuses a chat of the roles tool, assi"):
        chat.write(turns, tokenizer)


@pytest.mark.parametrize(
    ("max_length", "kept", "cut"), [(64, [1, 2, 3], []), (6, [1, 2], [2]), (4, [1], [1])]
)
def test_rows_are_cut_or_left_out_at_the_limit(
    tokenizer: Any, max_length: int, kept: list[int], cut: list[int]
) -> None:
    rows = encoded(
        tokenizer,
        {"prompt": ["1+=", "2222=", "333333="], "completion": ["11", "22", "33"]},
        max_length,
    )
    assert [row["row"] for row in rows] == kept
    assert [row["row"] for row in rows if row["cut"]] == cut
    assert all(len(row["input_ids"]) <= max_length for row in rows)


def test_packs_hold_each_row_once_and_are_nearly_full() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 65, (500,), generator=generator).tolist()
    packs = pack(lengths, 64)
    assert sorted(row for rows in packs for row in rows) == list(range(500))
    sizes = [sum(lengths[row] for row in rows) for rows in packs]
    assert max(sizes) <= 64
    assert sum(sizes) > 0.97 * 64 * (len(packs) - 1)


@pytest.mark.parametrize("rows", [[], [[3]], [[4, 4], [4]]])
def test_small_packs(rows: list[list[int]]) -> None:
    lengths = [size for sizes in rows for size in sizes]
    packs = pack(lengths, 8)
    assert [[lengths[row] for row in part] for part in packs] == rows


def test_packed_rows_give_the_logits_that_they_give_alone(tokenizer: Any) -> None:
    from datasets import Dataset

    student = model(Kind.causal_lm, tokenizer, num_hidden_layers=3)
    rows = encoded(tokenizer, {"prompt": ["1+1=", "20-3=", "7="], "completion": ["2", "17", "7"]})
    together = causal_lm.packed(Dataset.from_list(rows), 32)
    assert len(together) == 1
    packed_batch = causal_lm.Collator(tokenizer)(together.to_list())
    alone = causal_lm.Collator(tokenizer)(rows)
    found = []
    for batch in (packed_batch, alone):
        labels = batch.pop("labels")
        found.append(supervised(student, head_of(student), batch, labels))
    assert found[0][1].tolist() == found[1][1].tolist()
    torch.testing.assert_close(found[0][0], found[1][0])
    refuse_leak(student)


def test_a_model_that_leaks_is_refused(tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    leaky = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    leaky.forward = lambda input_ids, **kwargs: GPT2LMHeadModel.forward(leaky, input_ids)
    with pytest.raises(ConfigError, match="packed into one sequence see each other"):
        refuse_leak(leaky)


@pytest.mark.parametrize("kind", [Kind.causal_lm, Kind.seq2seq])
def test_supervised_logits_are_those_of_the_whole_forward_pass(tokenizer: Any, kind: Kind) -> None:
    made = model(kind, tokenizer)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    labels = torch.tensor([[IGNORED, IGNORED, 7, 8], [IGNORED, 10, IGNORED, IGNORED]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits, targets = supervised(made, head_of(made), inputs, labels)
    whole = made(**inputs, labels=labels)
    assert targets.tolist() == [7, 8, 10]
    loss = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, whole.loss)


@pytest.mark.parametrize("kind", [Kind.causal_lm, Kind.seq2seq])
def test_where_nothing_is_supervised_the_loss_is_nothing(tokenizer: Any, kind: Kind) -> None:
    from forgelm.losses import task_loss

    made = model(kind, tokenizer)
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits, targets = supervised(made, head_of(made), inputs, torch.full_like(ids, IGNORED))
    loss = task_loss(logits, targets)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in made.parameters())


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 42 \n", None, "42"),
        ("so #### 42", r"#### (\d+)", "42"),
        ("1 then 2", r"\d", "2"),
        ("none", r"\d", ""),
    ],
)
def test_the_answer_within_a_text(text: str, pattern: str | None, answer: str) -> None:
    assert answer_in(text, pattern) == answer
