"""Students whose checkpoint and config disagree are refused, not trained from noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Command

from forgelm.config.schema import Kind
from forgelm.models import tiny as models
from forgelm.run.files import read_json, write_json

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def pretrained(folder: Path, kind: Kind) -> Path:
    """A model without a head, or one that writes, with its tokenizer."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    reader = models.reader(kind)
    sizes: dict[str, Any] = {**SIZES, "vocab_size": len(reader), "num_hidden_layers": 2}
    if kind is Kind.causal_lm:
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    else:
        BertModel(BertConfig(**sizes)).save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [Kind.text_classification, Kind.causal_lm])
@pytest.mark.parametrize(("key", "value"), [("intermediate_size", 48), ("num_hidden_layers", 3)])
def test_a_config_of_another_model_is_refused(
    forgelm: Command, tmp_path: Path, kind: Kind, key: str, value: int
) -> None:
    folder = pretrained(tmp_path / "student", kind)
    write_json(folder / "config.json", read_json(folder / "config.json") | {key: value})
    task = {Kind.causal_lm: "arithmetic", Kind.text_classification: "nli_mini"}[kind]
    small = [word for word in TINY if not word.startswith("model.tiny")]
    refused = forgelm(f"task={task}", "model=custom", f"model.path={folder}", *small)
    assert refused.code == 1
    (line,) = refused.err.splitlines()
    assert line.startswith(f"forgelm: {folder}: its checkpoint lacks ")
    assert line.endswith("fetch it again, or choose another")


def test_a_model_of_another_kind_is_refused(forgelm: Command, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    reader, folder = models.reader(Kind.causal_lm), tmp_path / "t5"
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1}
    T5ForConditionalGeneration(T5Config(vocab_size=len(reader), **sizes)).save_pretrained(folder)
    reader.save_pretrained(folder)
    small = [word for word in TINY if not word.startswith("model.tiny")]
    refused = forgelm("task=arithmetic", "model=custom", f"model.path={folder}", *small)
    assert refused.code == 1
    assert refused.err.strip() == (
        f"forgelm: {folder}: is a model of type t5, which task.kind=causal_lm can't use; it is for "
        "task.kind=text_classification or task.kind=seq2seq"
    )
