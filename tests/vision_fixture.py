"""Models that read images, with fresh weights, as their makers save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIDE, PATCH, SCALE = 16, 4, 2


def tokenizer(**changes: Any) -> Any:
    """The tiny models' characters, with the tokens that stand for images."""
    from forgelm.config.schema import Kind
    from forgelm.models import tiny

    made = tiny.reader(Kind.causal_lm)
    made.chat_template = None
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    made.add_tokens([*marks, *places], special_tokens=True)
    made.eos_token = "<end_of_utterance>"
    return made


def save_smolvlm(folder: Path, *, splits: bool = True, template: str | None = TEMPLATE) -> Path:
    """A model of SmolVLM's architecture (Idefics3) and its processor; `splits`: large images are
    cut into several."""
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    words = tokenizer()
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=splits,
    )
    length = (SIDE // PATCH) ** 2 // SCALE**2
    processor = Idefics3Processor(images, words, image_seq_len=length, chat_template=template)
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            image_token_id=words.convert_tokens_to_ids("<image>"),
            scale_factor=SCALE,
            pad_token_id=words.pad_token_id,
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": PATCH,
            },
            text_config={
                "model_type": "llama",
                "vocab_size": len(words),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "pad_token_id": words.pad_token_id,
                "bos_token_id": words.bos_token_id,
                "eos_token_id": words.eos_token_id,
            },
        )
    )
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
