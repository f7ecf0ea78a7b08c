"""What a model's processor makes of images, and how it has their text written.

Two families: encoder-decoder models, whose encoder sees the image and whose decoder writes the
text; and models that chat, which find the image's tokens and an instruction in the user's turn and
write the text as the assistant's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forgelm.errors import ConfigError
from forgelm.models.tokens import IGNORED
from forgelm.tasks.chat import render

Seen = dict[str, Any]


class Reader(Protocol):
    """How one model reads. `see` gives the processor's tensors for images; `learnt` and `asked`
    make of these what the model is trained on and what it goes on from."""

    @property
    def tokenizer(self) -> Any:
        """Of the text."""

    @property
    def known_by(self) -> str:
        """What the tokens of `answers` depend on beside the tokenizer."""

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens that the model is to write, the end's included."""

    def see(self, pictures: Sequence[Any]) -> Seen:
        """Tensors for a batch of images."""

    def learnt(self, seen: Seen, answers: Sequence[list[int]], multiple_of: int | None) -> Seen:
        """The model's inputs, and `labels`, int64 [batch, length]."""

    def asked(self, seen: Seen) -> Seen:
        """The model's inputs for generation."""

    def same_as(self, other: Any) -> bool:
        """Whether another reader makes the same tensors of every image."""


def reader_of(processor: Any, instruction: str, name: str) -> Reader:
    """How a processor's model reads.

    Raises:
        ConfigError: it doesn't read images and write text.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ConfigError(
            f"{name}: has a {type(processor).__name__} for a processor, and not one of images and "
            "text; choose a model that reads text in images, such as model=trocr_small"
        )
    if not hasattr(processor, "image_token"):
        return EncoderDecoder(processor)
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"{name}: its processor has no chat template, so it can't be given an instruction; "
            "choose a model that was trained to chat"
        )
    return Chatting(processor, instruction)


@dataclass(frozen=True)
class EncoderDecoder:
    """TrOCR and like: tensors of the images alone, and the text's tokens as labels."""

    processor: Any
    known_by: str = "encoder-decoder"

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        made = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [[*ids, self.tokenizer.eos_token_id] for ids in made]

    def see(self, pictures: Sequence[Any]) -> Seen:
        return dict(self.processor.image_processor(list(pictures), return_tensors="pt"))

    def learnt(self, seen: Seen, answers: Sequence[list[int]], multiple_of: int | None) -> Seen:
        return {**seen, "labels": padded(answers, IGNORED, multiple_of)}

    def asked(self, seen: Seen) -> Seen:
        return seen

    def same_as(self, other: Any) -> bool:
        return isinstance(other, EncoderDecoder) and _same_images(self, other)


@dataclass(frozen=True)
class Chatting:
    """SmolVLM and like: the image and an instruction asked for in one turn, the text in the next.

    Only the answer is learnt: what the assistant's turn adds to the prompt, up to the mark of its
    end. Prompt and answer are made tokens apart, as they are when the model generates.
    """

    processor: Any
    instruction: str

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def known_by(self) -> str:
        return f"{self.instruction} {self.processor.chat_template}"

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        prompt = self._prompt()
        rest = []
        for text in texts:
            whole = self._written(text)
            if not whole.startswith(prompt):
                raise ConfigError(
                    "the model's chat template writes an answer otherwise than it asks for one, so "
                    "what is to be learnt can't be told; choose another model"
                )
            rest.append(whole[len(prompt) :])
        made = self.tokenizer(rest, add_special_tokens=False)["input_ids"]
        return [self._ended(ids) for ids in made]

    def see(self, pictures: Sequence[Any]) -> Seen:
        prompt = self._prompt()
        bos = self.tokenizer.bos_token
        return dict(
            self.processor(
                text=[prompt] * len(pictures),
                images=[[picture] for picture in pictures],
                padding=True,
                return_tensors="pt",
                # As in apply_chat_template: a template that writes the first token itself.
                add_special_tokens=not (bos and prompt.startswith(bos)),
            )
        )

    def learnt(self, seen: Seen, answers: Sequence[list[int]], multiple_of: int | None) -> Seen:
        rows = _unpadded(seen)
        ids = rows.pop("input_ids")
        made = {"input_ids": [row + more for row, more in zip(ids, answers, strict=True)]}
        made["attention_mask"] = [[1] * len(row) for row in made["input_ids"]]
        for name, values in rows.items():
            made[name] = [row + [0] * len(more) for row, more in zip(values, answers, strict=True)]
        wanted = [[IGNORED] * len(row) + more for row, more in zip(ids, answers, strict=True)]
        return {
            **{name: padded(made[name], self._filling(name), multiple_of) for name in made},
            **_of_images(seen),
            "labels": padded(wanted, IGNORED, multiple_of),
        }

    def asked(self, seen: Seen) -> Seen:
        rows = _unpadded(seen)
        rows["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
        return {
            **{name: padded(rows[name], self._filling(name), left=True) for name in rows},
            **_of_images(seen),
        }

    def same_as(self, other: Any) -> bool:
        same = isinstance(other, Chatting) and _same_images(self, other)
        return same and other._prompt() == self._prompt()

    def _prompt(self) -> str:
        return render([self._turn()], self.processor, True)

    def _written(self, text: str) -> str:
        said = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return render([self._turn(), said], self.processor, False)

    def _turn(self) -> dict[str, Any]:
        content = [{"type": "image"}, {"type": "text", "text": self.instruction}]
        return {"role": "user", "content": content}

    def _ended(self, ids: list[int]) -> list[int]:
        """Up to the last special token, the mark of the turn's end; what follows is layout."""
        special = set(self.tokenizer.all_special_ids)
        ends = [place for place, token in enumerate(ids) if token in special]
        return ids[: ends[-1] + 1] if ends else [*ids, self.tokenizer.eos_token_id]

    def _filling(self, name: str) -> int:
        return int(self.tokenizer.pad_token_id) if name == "input_ids" else 0


def padded(
    rows: Sequence[list[int]], value: int, multiple_of: int | None = None, left: bool = False
) -> Any:
    """Rows of tokens as one int64 tensor [batch, length]."""
    import torch

    size = max(map(len, rows))
    if multiple_of is not None:
        size = -(-size // multiple_of) * multiple_of
    filled = [[value] * (size - len(row)) for row in rows]
    return torch.tensor(
        [more + row if left else row + more for row, more in zip(rows, filled, strict=True)]
    )


def _unpadded(seen: Seen) -> dict[str, list[list[int]]]:
    """`input_ids` first, and whatever else there is a value a token of, without the padding."""
    kept = seen["attention_mask"].bool()
    names = [name for name in seen if name != "attention_mask" and _by_token(seen, name)]
    return {
        name: [row[mask].tolist() for row, mask in zip(seen[name], kept, strict=True)]
        for name in sorted(names, key=lambda name: name != "input_ids")
    }


def _of_images(seen: Seen) -> Seen:
    return {name: tensor for name, tensor in seen.items() if not _by_token(seen, name)}


def _by_token(seen: Seen, name: str) -> bool:
    return bool(seen[name].shape == seen["input_ids"].shape)


def _same_images(one: Any, other: Any) -> bool:
    ours, theirs = one.processor.image_processor, other.processor.image_processor
    return bool(ours.to_dict() == theirs.to_dict())
