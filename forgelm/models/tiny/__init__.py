"""Small models with fresh weights, one a kind of task, and their tokenizers, which lie here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgelm.config.schema import Kind, TinyConfig

_FOLDER = Path(__file__).parent
_POSITIONS = 512
# Of models that write text: their positions are no weights.
_WRITER_POSITIONS = 2048
# Height and width. A patch is as high as the line, so the encoder reads it from left to right.
_IMAGE = (16, 64)
_PATCH = (16, 4)
# White becomes 0, so that empty patches differ by their place alone.
_WHITE, _SPREAD = 1.0, 0.5


def reader(kind: Kind) -> Any:
    """What feeds the tiny model: word pieces to classify, characters to write, images of a line."""
    from transformers import BertTokenizer, PreTrainedTokenizerFast

    if kind is Kind.text_classification:
        file = _FOLDER / "tokenizer.json"
        return BertTokenizer(tokenizer_file=str(file), model_max_length=_POSITIONS)
    made = PreTrainedTokenizerFast.from_pretrained(_FOLDER / "characters")
    made.model_max_length = _POSITIONS if kind is Kind.image_to_text else _WRITER_POSITIONS
    return _line_reader(made) if kind is Kind.image_to_text else made


def _line_reader(tokenizer: Any) -> Any:
    from transformers import TrOCRProcessor, ViTImageProcessorPil

    tokenizer.chat_template = None
    height, width = _IMAGE
    images = ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=[_WHITE] * 3, image_std=[_SPREAD] * 3
    )
    return TrOCRProcessor(images, tokenizer)


def model(kind: Kind, sizes: TinyConfig, reader: Any, head: dict[str, Any]) -> Any:
    """A model of these sizes for what `reader` makes; `head` is a classifier's part of its config.

    Its weights come from torch's generator: seed it first.
    """
    if kind is Kind.text_classification:
        return _bert(sizes, len(reader), head)
    if kind is Kind.image_to_text:
        return _trocr(sizes, reader.tokenizer)
    return _t5(sizes, reader) if kind is Kind.seq2seq else _llama(sizes, reader)


def _bert(sizes: TinyConfig, vocabulary: int, head: dict[str, Any]) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
            intermediate_size=sizes.intermediate_size,
            hidden_dropout_prob=sizes.dropout,
            attention_probs_dropout_prob=sizes.dropout,
            initializer_range=sizes.initializer_range,
            max_position_embeddings=_POSITIONS,
            **head,
        )
    )


def _llama(sizes: TinyConfig, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_attention_heads,
            intermediate_size=sizes.intermediate_size,
            attention_dropout=sizes.dropout,
            initializer_range=sizes.initializer_range,
            max_position_embeddings=_WRITER_POSITIONS,
            tie_word_embeddings=True,
            **_marks(tokenizer),
        )
    )


def _t5(sizes: TinyConfig, tokenizer: Any) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=sizes.hidden_size,
            d_kv=sizes.hidden_size // sizes.num_attention_heads,
            d_ff=sizes.intermediate_size,
            num_layers=sizes.num_hidden_layers,
            num_heads=sizes.num_attention_heads,
            dropout_rate=sizes.dropout,
            decoder_start_token_id=tokenizer.pad_token_id,
            **_marks(tokenizer),
        )
    )


def _trocr(sizes: TinyConfig, tokenizer: Any) -> Any:
    """An encoder of `num_hidden_layers`, and a decoder of half as many."""
    from transformers import (
        TrOCRConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
    )

    encoder = ViTConfig(
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
        initializer_range=sizes.initializer_range,
        image_size=_IMAGE,
        patch_size=_PATCH,
    )
    start = tokenizer.bos_token_id
    decoder = TrOCRConfig(
        vocab_size=len(tokenizer),
        d_model=sizes.hidden_size,
        decoder_layers=(sizes.num_hidden_layers + 1) // 2,
        decoder_attention_heads=sizes.num_attention_heads,
        decoder_ffn_dim=sizes.intermediate_size,
        dropout=sizes.dropout,
        init_std=sizes.initializer_range,
        max_position_embeddings=_POSITIONS,
        is_decoder=True,
        cross_attention_hidden_size=sizes.hidden_size,
        decoder_start_token_id=start,
        **_marks(tokenizer),
    )
    return VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            encoder, decoder, decoder_start_token_id=start, **_marks(tokenizer)
        )
    )


def _marks(tokenizer: Any) -> dict[str, int]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
