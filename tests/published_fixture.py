"""Tiny models under the hub ids that forgelm ships.

Architecture, kind of tokenizer and the files' names are those of the published ones; the weights
are random. An id of another family needs its maker in `_FAMILIES`.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from glue_fixture import model_repo
from vision_fixture import save_smolvlm

CONF = Path(__file__).parents[1] / "conf"
SIZE, WIDE, LAYERS, HEADS, POSITIONS = 16, 32, 1, 2, 66
SIDE, PATCH = 16, 8
GATED = ("meta-llama/*", "google/gemma-3*")
LABELS = {"mnli": ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]}
_TEXT = "the quick brown fox jumps over the lazy dog 0 1 2 3 4 5 6 7 8 9 + - = ?"
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DECODER = {
    "hidden_size": SIZE,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": SIZE // HEADS,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
}


def shipped() -> dict[str, dict[str, Any]]:
    """The model configs with a hub id, by the name that `model=` takes."""
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("model/*.yaml")}
    return {name: config for name, config in sorted(found.items()) if config.get("path")}


def teachers() -> dict[str, str]:
    """The teacher that each task names, by task."""
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("task/*.yaml")}
    return {name: config["teacher"] for name, config in found.items() if "teacher" in config}


def data_sets() -> set[str]:
    """The data sets that tasks name."""
    found = [yaml.safe_load(path.read_text()) for path in CONF.glob("task/*.yaml")]
    return {config["dataset"] for config in found if "dataset" in config}


def is_gated(repo_id: str) -> bool:
    return any(fnmatch(repo_id, pattern) for pattern in GATED)


def published(repo_id: str) -> dict[str, bytes]:
    """The files of a tiny model as that of the hub id."""
    return _files_of(_maker(repo_id))


def one_of_each(names: Sequence[str]) -> list[str]:
    """One of the shipped models of each family among these."""
    return [*{_maker(shipped()[name]["path"]): name for name in names}.values()]


def _maker(repo_id: str) -> Callable[[Path], None]:
    for patterns, make in _FAMILIES:
        if any(fnmatch(repo_id, pattern) for pattern in patterns):
            return make
    raise AssertionError(f"{repo_id}: tests/published_fixture.py can't make its family yet")


def published_teacher(task: str) -> dict[str, bytes]:
    """The files of a tiny model as the task's teacher: a classifier that was trained."""
    if task == "mnli":
        return _files_of(_roberta_mnli)
    return model_repo(1 if task == "stsb" else 2)


@cache
def _files_of(make: Callable[[Path], None]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _save(folder: Path, name: str, config: Any, *, pickled: bool = False) -> None:
    """A model of that class; `pickled`: in PyTorch's old format, as before safetensors."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _bert(folder: Path, name: str = "BertForMaskedLM", *, old: bool = False) -> None:
    """`old`: with nothing but what there was at first, a list of words and a pickle."""
    from transformers import BertConfig

    files = model_repo(head=False)
    words = json.loads(files["tokenizer.json"])["model"]["vocab"]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    for file in () if old else ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes(files[file])
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=SIZE,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
    )
    _save(folder, name, config, pickled=old)


def _bert_old(folder: Path) -> None:
    _bert(folder, "BertForPreTraining", old=True)


def _minilm(folder: Path) -> None:
    _bert(folder, "BertModel", old=True)


def _distilbert(folder: Path) -> None:
    from transformers import DistilBertConfig

    files = model_repo(head=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes(files[file])
    config = DistilBertConfig(
        vocab_size=len(json.loads(files["tokenizer.json"])["model"]["vocab"]),
        dim=SIZE,
        hidden_dim=WIDE,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=POSITIONS,
    )
    _save(folder, "DistilBertForMaskedLM", config)


def _roberta(folder: Path, name: str = "RobertaForMaskedLM", **head: Any) -> None:
    from transformers import RobertaConfig

    made = _pairs("RobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    made.save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(made),
        hidden_size=SIZE,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        type_vocab_size=1,
        **_marks(made),
        **head,
    )
    _save(folder, name, config)


def _roberta_mnli(folder: Path) -> None:
    names = dict(enumerate(LABELS["mnli"]))
    _roberta(folder, "RobertaForSequenceClassification", id2label=names)


def _bart(folder: Path) -> None:
    from transformers import BartConfig

    made = _pairs("BartTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    made.save_pretrained(folder)
    config = BartConfig(
        vocab_size=len(made),
        d_model=SIZE,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=WIDE,
        decoder_ffn_dim=WIDE,
        max_position_embeddings=POSITIONS,
        decoder_start_token_id=made.eos_token_id,
        forced_eos_token_id=made.eos_token_id,
        **_marks(made),
    )
    _save(folder, "BartModel", config)


def _t5(folder: Path, **more: Any) -> None:
    from transformers import T5Config, T5Tokenizer

    (folder / "spiece.model").write_bytes(_sentencepiece(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    made = T5Tokenizer.from_pretrained(folder, extra_ids=4)
    made.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(made),
        d_model=SIZE,
        d_kv=SIZE // HEADS,
        d_ff=WIDE,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        **more,
    )
    _save(folder, "T5ForConditionalGeneration", config)


def _flan_t5(folder: Path) -> None:
    _t5(folder, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def _decoder(folder: Path, name: str, tokenizer: str, special: list[str], end: str) -> None:
    import transformers

    made = _pairs(tokenizer, special, eos_token=end, pad_token=special[0])
    if "<|im_start|>" in special:
        made.chat_template = _CHAT
    made.save_pretrained(folder)
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))
    _save(folder, name, config(vocab_size=len(made), **_DECODER, **_marks(made)))


def _qwen2(folder: Path) -> None:
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _decoder(folder, "Qwen2ForCausalLM", "Qwen2Tokenizer", words, "<|endoftext|>")


def _qwen3(folder: Path) -> None:
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _decoder(folder, "Qwen3ForCausalLM", "Qwen2Tokenizer", words, "<|im_end|>")


def _smollm2(folder: Path) -> None:
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _decoder(folder, "LlamaForCausalLM", "GPT2Tokenizer", words, "<|im_end|>")


def _llama3(folder: Path) -> None:
    """Its tokenizer has no token for padding."""
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=_trained(words), bos_token=words[0], eos_token=words[1]
    )
    made.save_pretrained(folder)
    ends = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    _save(folder, "LlamaForCausalLM", LlamaConfig(vocab_size=len(made), **_DECODER, **ends))


def _gemma3(folder: Path) -> None:
    from transformers import Gemma3TextConfig

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    made = _pairs("GemmaTokenizer", words)
    made.save_pretrained(folder)
    config = Gemma3TextConfig(vocab_size=len(made), **_DECODER, **_marks(made))
    _save(folder, "Gemma3ForCausalLM", config)


def _smolvlm(folder: Path) -> None:
    """With a file each for the processor, its images and its template, as they were first saved."""
    save_smolvlm(folder)
    both = json.loads((folder / "processor_config.json").read_text())
    images = both.pop("image_processor") | {"image_processor_type": "Idefics3ImageProcessor"}
    template = {"chat_template": (folder / "chat_template.jinja").read_text()}
    (folder / "chat_template.jinja").unlink()
    parts = {"processor_config": both, "preprocessor_config": images, "chat_template": template}
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part))


def _trocr_base(folder: Path) -> None:
    made = _pairs("RobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    made.save_pretrained(folder)
    _trocr(folder, "ViT", made, processor_class="TrOCRProcessor")


def _trocr_small(folder: Path) -> None:
    """Its tokenizer is one of sentencepiece, and nothing names the class of its processor."""
    from transformers import XLMRobertaTokenizer

    (folder / "sentencepiece.bpe.model").write_bytes(_sentencepiece())
    settings = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    words = XLMRobertaTokenizer.from_pretrained(folder)
    _trocr(folder, "DeiT", words, do_center_crop=False)


def _trocr(folder: Path, encoder: str, words: Any, **more: Any) -> None:
    """`more` is of the file of what prepares images."""
    import transformers
    from transformers import TrOCRConfig, VisionEncoderDecoderConfig

    seen = getattr(transformers, f"{encoder}Config")(
        hidden_size=SIZE,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    written = TrOCRConfig(
        vocab_size=len(words),
        d_model=SIZE,
        decoder_layers=LAYERS,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=WIDE,
        max_position_embeddings=POSITIONS,
        cross_attention_hidden_size=SIZE,
        decoder_start_token_id=words.eos_token_id,
        is_decoder=True,
        **_marks(words),
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(seen, written)
    _save(folder, "VisionEncoderDecoderModel", config, pickled=True)
    images = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": f"{encoder}FeatureExtractor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
        "size": {"height": SIDE, "width": SIDE},
    } | more
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def _marks(tokenizer: Any) -> dict[str, int | None]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def _pairs(name: str, special: list[str], **marks: Any) -> Any:
    """A tokenizer of byte pairs of a published class."""
    import transformers

    made = json.loads(_trained(special).to_str())["model"]
    merges = [tuple(pair) for pair in made["merges"]]
    return getattr(transformers, name)(vocab=made["vocab"], merges=merges, **marks)


def _trained(special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([_TEXT], trainer)
    return made


@cache
def _sentencepiece(**ids: int) -> bytes:
    import sentencepiece

    def sentences() -> Iterator[str]:
        yield from [_TEXT] * 20

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=out,
        vocab_size=64,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    return out.getvalue()


_FAMILIES: tuple[tuple[tuple[str, ...], Callable[[Path], None]], ...] = (
    (("google-bert/*",), _bert),
    (("google/bert_uncased_*",), _bert_old),
    (("microsoft/MiniLM-*",), _minilm),
    (("distilbert/distilbert-*",), _distilbert),
    (("FacebookAI/roberta-*", "distilbert/distilroberta-*"), _roberta),
    (("facebook/bart-*",), _bart),
    (("google-t5/t5-*",), _t5),
    (("google/flan-t5-*",), _flan_t5),
    (("Qwen/Qwen2.5-*",), _qwen2),
    (("Qwen/Qwen3-*",), _qwen3),
    (("HuggingFaceTB/SmolLM2-*",), _smollm2),
    (("HuggingFaceTB/SmolVLM-*",), _smolvlm),
    (("meta-llama/Llama-3.2-*",), _llama3),
    (("google/gemma-3-*",), _gemma3),
    (("microsoft/trocr-base-*", "microsoft/trocr-large-*"), _trocr_base),
    (("microsoft/trocr-small-*",), _trocr_small),
)
