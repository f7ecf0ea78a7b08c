"""Adapters: trained, kept with their base, used as students, as teachers and by other libraries."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from forgelm.run.files import read_json, write_json

QUICK = ("training.eval_strategy=no", "max_steps=4")
LORA = (
    "model.lora.enabled=true",
    "model.lora.r=4",
    "model.lora.lora_dropout=0.1",
    "model.lora.use_dora=true",
)
SMALL = (*QUICK, *LORA)
TINIER = ("model.tiny.hidden_size=8", "model.tiny.intermediate_size=16")


def run_at(root: Path, name: str, task: str = "nli_mini", mode: str = "sft") -> Path:
    return root / "outputs" / task / "tiny" / mode / name


def losses(run: Path, part: str = "after", who: str = "student") -> dict[str, float]:
    splits = read_json(run / "eval.json")[part][who]
    return {name: scores["loss"] for name, scores in splits.items()}


def evaluated_by(forgelm: Command, run: Path) -> Any:
    """The splits as `forgelm evaluate` measures them."""
    done = forgelm("evaluate", str(run), "--output-format", "json")
    assert done.code == 0, done.err
    return json.loads(done.out)["splits"]


@pytest.fixture
def adapter(tiny: Command, tmp_path: Path) -> Path:
    """A complete run that ends with an adapter on fresh weights."""
    done = tiny(*SMALL, "run_name=adapter")
    assert done.code == 0, done.err
    return run_at(tmp_path, "adapter")


@pytest.fixture
def on_a_run(tiny: Command, tmp_path: Path) -> tuple[Path, Path]:
    """A complete run, and one whose adapter has that for its base."""
    for words in ((), (*LORA, "model.path=outputs/nli_mini/tiny/sft/base")):
        name = "adapted" if words else "base"
        done = tiny(*QUICK, *words, f"run_name={name}")
        assert done.code == 0, done.err
    return run_at(tmp_path, "base"), run_at(tmp_path, "adapted")


def test_only_the_adapter_is_trained_and_kept(tiny: Command, tmp_path: Path) -> None:
    from safetensors import safe_open

    done = tiny(*SMALL, "run_name=adapter")
    assert done.code == 0, done.err
    assert "student  tiny, 627 of 17,510 parameters trained (3.6 %)" in done.out
    run = run_at(tmp_path, "adapter")
    with safe_open(run / "checkpoint-4/model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert names
    assert all("lora_" in name or ".modules_to_save." in name for name in names)
    settings, record = read_json(run / "adapter_config.json"), read_json(run / "base.json")
    assert settings["base_model_name_or_path"] == record["path"] == str(run / "base")
    assert settings["modules_to_save"] == ["classifier", "score"]
    assert record["labels"] == ["entailment", "neutral", "contradiction"]
    assert record["weights"] == read_json(run / "run_metadata.json")["base_weights"]
    card = (run / "README.md").read_text()
    assert "library_name: peft" in card
    assert "- adapter: LoRA on the weights in `base/`" in card
    assert not (run / "model.safetensors").exists()
    assert not list(run.glob(".*.part"))


@pytest.mark.parametrize("kind", ["text_classification", "causal_lm", "seq2seq"])
def test_every_library_reads_the_same_model(
    forgelm: Command, tiny: Command, tmp_path: Path, kind: str
) -> None:
    import torch
    import transformers
    from peft import PeftModel

    from forgelm.config.schema import Kind
    from forgelm.models.load import _AUTO

    done = tiny(*SMALL, *task_of(kind, tmp_path), "model.lora.merge=true", "run_name=it")
    assert done.code == 0, done.err
    (run,) = tmp_path.glob("outputs/*/tiny/sft/it")
    evaluated = evaluated_by(forgelm, run)
    assert evaluated == read_json(run / "eval.json")["after"]["student"]

    auto = getattr(transformers, _AUTO[Kind[kind]])
    ids = torch.arange(4, 14)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "seq2seq" else {})
    with torch.inference_mode():
        ours = PeftModel.from_pretrained(auto.from_pretrained(run / "base"), run)
        plain = auto.from_pretrained(run / "base").eval()(**inputs).logits
        wanted = ours.eval()(**inputs).logits
        assert not torch.equal(plain, wanted)
        assert torch.equal(auto.from_pretrained(run).eval()(**inputs).logits, wanted)
        whole = auto.from_pretrained(run / "merged").eval()(**inputs).logits
        torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
    assert "library_name: transformers" in (run / "merged/README.md").read_text()
    assert (run / "merged/tokenizer.json").is_file()


def task_of(kind: str, folder: Path) -> tuple[str, ...]:
    if kind == "text_classification":
        return ()
    if kind == "causal_lm":
        return ("task=arithmetic", "task.max_length=32")
    rows = folder / "rows.jsonl"
    pairs = [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(32)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return ("task=seq2seq", f"task.train_file={rows}", f"task.validation_file={rows}")


def test_a_stopped_run_goes_on_to_the_same_adapter(
    tiny: Command, interrupted: Command, tmp_path: Path
) -> None:
    assert tiny(*SMALL, "run_name=whole").code == 0
    for case in ("evaluation_before:1:SIGTERM", "training:3:SIGTERM", "finalize:1:SIGTERM"):
        assert interrupted(case, "run_name=again").code == 75
    assert tiny(*SMALL, "run_name=again").code == 0
    whole, again = (run_at(tmp_path, name) for name in ("whole", "again"))
    for name in ("adapter_model.safetensors", "base/model.safetensors", "eval.json"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert read_json(again / "training_state.json")["restarts"] == 3


def test_activation_checkpointing_changes_nothing(
    tiny: Command, adapter: Path, tmp_path: Path
) -> None:
    words = ("training.activation_checkpointing=true", "run_name=saved")
    done = tiny(*SMALL, *words)
    assert done.code == 0, done.err
    file = "adapter_model.safetensors"
    assert (run_at(tmp_path, "saved") / file).read_bytes() == (adapter / file).read_bytes()


def test_an_adapter_goes_on_being_trained(tiny: Command, adapter: Path, tmp_path: Path) -> None:
    done = tiny(*QUICK, "model.lora.enabled=true", f"model.path={adapter}", "run_name=further")
    assert done.code == 0, done.err
    told = f"model {adapter} is an adapter of {adapter}/base; it goes on being trained"
    assert told in done.out
    further = run_at(tmp_path, "further")
    assert losses(further, "before") == losses(adapter)
    assert losses(further) != losses(adapter)
    settings = read_json(further / "adapter_config.json")
    assert (settings["r"], settings["use_dora"], settings["lora_dropout"]) == (4, True, 0.1)
    assert settings["base_model_name_or_path"] == str(adapter / "base")
    assert settings["modules_to_save"] == ["classifier", "score"]


def test_an_adapter_is_merged_and_trained_whole(
    tiny: Command, adapter: Path, tmp_path: Path
) -> None:
    done = tiny(*QUICK, "model.path=outputs/nli_mini/tiny/sft/adapter", "run_name=whole")
    assert done.code == 0, done.err
    assert "base; it is merged into it, and all is trained" in done.out
    whole = run_at(tmp_path, "whole")
    assert losses(whole, "before") == pytest.approx(losses(adapter), rel=1e-5)
    assert (whole / "model.safetensors").is_file()
    assert not (whole / "adapter_config.json").exists()


def test_an_adapter_teaches(tiny: Command, adapter: Path, tmp_path: Path) -> None:
    words = ("mode=kd", "teacher=run", "teacher.run=adapter", *SMALL, "run_name=student")
    done = tiny(*words)
    assert done.code == 0, done.err
    student = run_at(tmp_path, "student", mode="kd")
    assert losses(student, "before", "teacher") == pytest.approx(losses(adapter), rel=1e-5)
    assert (student / "adapter_model.safetensors").is_file()


def test_what_an_adapter_isnt_trained_further_as(
    tiny: Command, adapter: Path, tmp_path: Path
) -> None:
    words = (*QUICK, "model.lora.enabled=true", f"model.path={adapter}")
    refused = tiny(*words, "model.lora.r=8", "run_name=r")
    assert refused.code == 1
    assert (
        f"model.lora.r=8: {adapter} goes on being trained with its own settings, and has 4; leave "
        "it out, or merge the adapter first"
    ) in refused.err
    refused = tiny(*words, "task=arithmetic", "run_name=kind")
    assert refused.code == 1
    assert "was made for SEQ_CLS, and task.kind=causal_lm takes CAUSAL_LM" in refused.err


def test_a_base_that_is_a_run(
    forgelm: Command, tiny: Command, on_a_run: tuple[Path, Path], tmp_path: Path
) -> None:
    base, run = on_a_run
    assert read_json(run / "base.json")["path"] == str(base)
    assert losses(run, "before") == losses(base)
    evaluated = evaluated_by(forgelm, run)
    assert evaluated == read_json(run / "eval.json")["after"]["student"]
    again = tiny(*QUICK, *LORA, f"model.path={run}", "run_name=again")
    assert again.code == 0, again.err
    assert read_json(run_at(tmp_path, "again") / "base.json")["path"] == str(base)


def test_another_base_is_refused(
    forgelm: Command, tiny: Command, on_a_run: tuple[Path, Path], tmp_path: Path
) -> None:
    """By its weights where forgelm noted them, else by its shapes."""
    base, run = on_a_run
    assert tiny(*QUICK, *TINIER, "run_name=smaller").code == 0
    further = (*QUICK, "model.lora.enabled=true", f"model.path={run}")
    kept = tmp_path / "kept"
    shutil.copytree(base, kept)
    shutil.rmtree(base)
    shutil.copytree(run_at(tmp_path, "smaller"), base)

    refused = tiny(*further, "run_name=a")
    assert refused.code == 1
    assert f"adapter {run}: {base} isn't the base that it was trained on (weights " in refused.err
    unmeasured = forgelm("evaluate", str(run))
    assert unmeasured.code == 1
    assert "isn't the base that it was trained on" in unmeasured.err

    (run / "base.json").rename(tmp_path / "base.json")
    refused = tiny(*further, "run_name=b")
    assert refused.code == 1
    assert f"adapter {run}: doesn't fit its base {base} (size mismatch for " in refused.err
    assert len(refused.err.strip().splitlines()) == 1

    (tmp_path / "base.json").rename(run / "base.json")
    shutil.rmtree(base)
    refused = tiny(*further, "run_name=c")
    assert refused.code == 1
    assert f"its base {base} isn't there; put it back, or name its place with" in refused.err
    done = tiny(*further, f"model.base={kept}", "run_name=d")
    assert done.code == 0, done.err
    assert f"is an adapter of {kept}; it goes on" in done.out


def test_a_base_of_more_or_fewer_layers_is_refused(
    tiny: Command, adapter: Path, tmp_path: Path
) -> None:
    (adapter / "base.json").unlink()
    for layers, wrong in ((1, "has"), (3, "lacks")):
        name = f"of-{layers}"
        words = (f"model.tiny.num_hidden_layers={layers}", f"run_name={name}")
        assert tiny(*QUICK, *words).code == 0
        refused = tiny(
            *QUICK,
            "model.lora.enabled=true",
            f"model.path={adapter}",
            f"model.base={run_at(tmp_path, name)}",
        )
        assert refused.code == 1
        assert f"(the adapter {wrong} base_model.model.bert.encoder.layer." in refused.err


def test_a_run_whose_base_changed_goes_no_further(
    tiny: Command, interrupted: Command, on_a_run: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = on_a_run
    words = (f"model.path={base}", "run_name=half")
    assert interrupted("training:2:SIGTERM", *words).code == 75
    other = tiny(*QUICK, "seed=7", "run_name=other")
    assert other.code == 0
    file = "model.safetensors"
    shutil.copy(run_at(tmp_path, "other") / file, base / file)
    refused = tiny(*SMALL, *words)
    assert refused.code == 1
    assert f"the base {base} changed since the run began (weights " in refused.err


def test_a_moved_run_finds_its_own_base(
    forgelm: Command, tiny: Command, adapter: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(adapter, moved)
    evaluated = evaluated_by(forgelm, moved)
    assert evaluated == read_json(moved / "eval.json")["after"]["student"]


def test_the_best_adapter_is_kept(tiny: Command, tmp_path: Path) -> None:
    done = tiny(
        *LORA,
        "max_steps=6",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
        "training.load_best_model_at_end=true",
        "training.learning_rate=0.3",
        "run_name=best",
    )
    assert done.code == 0, done.err
    run = run_at(tmp_path, "best")
    best = read_json(run / "eval.json")["peak"]["validation_matched"]["accuracy"]
    after = read_json(run / "eval.json")["after"]["student"]
    assert after["validation_matched"]["accuracy"] == best


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("target_modules", "its linear ones are classifier, dense, key, query, value"),
        ("modules_to_save", "its linear ones are classifier, dense, key, query, value"),
    ],
)
def test_unknown_modules(tiny: Command, key: str, told: str) -> None:
    refused = tiny(*SMALL, f"model.lora.{key}=[q_proj]")
    assert refused.code == 1
    assert f"model.lora.{key}: q_proj: the model has no such module; {told}" in refused.err


def test_all_linear_layers(tiny: Command, tmp_path: Path) -> None:
    done = tiny(*SMALL, "model.lora.target_modules=[all-linear]", "run_name=all")
    assert done.code == 0, done.err
    targets = read_json(run_at(tmp_path, "all") / "adapter_config.json")["target_modules"]
    assert {"query", "key", "value"} <= {name.rpartition(".")[2] for name in targets}
    assert targets == sorted(targets)


def test_another_kind_of_adapter_is_refused(tiny: Command, adapter: Path) -> None:
    settings = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"peft_type": "IA3"})
    refused = tiny(*QUICK, f"model.path={adapter}")
    assert refused.code == 1
    assert f"adapter {adapter}: is of type IA3; forgelm reads LORA ones" in refused.err


def test_a_damaged_adapter_is_refused(tiny: Command, adapter: Path) -> None:
    weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole = weights.read_bytes()
    request = (*QUICK, f"model.path={adapter}")

    def told() -> str:
        refused = tiny(*request)
        assert refused.code == 1, refused.err
        (line,) = refused.err.splitlines()
        return line

    weights.write_bytes(whole[: len(whole) // 2])
    assert told().startswith(f"forgelm: {adapter}: its {weights.name} can't be read (")
    weights.unlink()
    assert told() == (
        f"forgelm: adapter {adapter}: the folder has {settings.name} but has no {weights.name}; "
        "copy the whole folder, or name another"
    )
    settings.write_text(settings.read_text()[:50])
    assert told() == (
        f"forgelm: {adapter}: its {settings.name} isn't JSON any more; copy the folder again, or "
        "name another"
    )


def test_a_new_head_is_saved_with_the_adapter(
    forgelm: Command, tiny: Command, tmp_path: Path
) -> None:
    """Weights that the base lacks would be others at each loading."""
    from transformers import BertConfig, BertModel

    from forgelm.config.schema import Kind
    from forgelm.models import tiny as models

    reader = models.reader(Kind.text_classification)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(reader), num_hidden_layers=1, **sizes)
    bare = BertModel(config, add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "bare")
    reader.save_pretrained(tmp_path / "bare")
    done = tiny(*SMALL, f"model.path={tmp_path / 'bare'}", "run_name=head")
    assert done.code == 0, done.err
    run = run_at(tmp_path, "head")
    assert read_json(run / "adapter_config.json")["modules_to_save"][:1] == ["bert.pooler"]
    evaluated = evaluated_by(forgelm, run)
    assert evaluated == read_json(run / "eval.json")["after"]["student"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("model.load_in_4bit=true",), "needs model.lora.enabled=true: weights in 4 bits can't be"),
        (("model.load_in_4bit=true",), "needs model.path: fresh weights aren't held in 4 bits"),
        (("model.load_in_4bit=true", "training.use_cpu=true"), "needs a CUDA GPU: drop it, or"),
        (("model.load_in_4bit=true", "model.lora.merge=true"), "merge afterwards with forgelm"),
        (("model.base=org/base",), "model.base=org/base is only read where model.path is an"),
        (("model=custom", "model.path=org/x", "model.base=./none"), "model.base=./none: no such"),
    ],
)
def test_wrong_requests(tiny: Command, words: tuple[str, ...], told: str) -> None:
    refused = tiny(*words)
    assert refused.code == 1
    assert told in refused.err


def test_a_base_for_what_is_no_adapter(tiny: Command, adapter: Path) -> None:
    base = adapter / "base"
    refused = tiny(*QUICK, f"model.path={base}", f"model.base={base}")
    assert refused.code == 1
    assert "is only read where model.path is an adapter, and" in refused.err


@pytest.mark.parametrize(
    ("module", "words", "told"),
    [
        (
            "peft",
            ("model.lora.enabled=true",),
            "model.lora.enabled=true needs peft, which isn't installed: "
            "pip install 'forgelm[lora]'",
        ),
        (
            "bitsandbytes",
            ("model.load_in_4bit=true", "model.lora.enabled=true", "model.path=org/x"),
            "model.load_in_4bit=true needs bitsandbytes, which isn't installed: "
            "pip install 'forgelm[quant]'",
        ),
    ],
)
def test_missing_extras(
    tiny: Command,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    words: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    refused = tiny(*words)
    assert refused.code == 1
    assert told in refused.err


def test_an_adapters_folder_needs_peft(
    tiny: Command, monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refused = tiny(*QUICK, f"model.path={adapter}")
    assert refused.code == 1
    told = f"model.path={adapter} is an adapter, which needs peft, which isn't installed: pip"
    assert told in refused.err


def test_four_bits_need_cuda() -> None:
    import torch

    from forgelm.errors import ConfigError
    from forgelm.models.adapters import check_cuda

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match="needs a CUDA GPU, and this machine has none"):
        check_cuda()
