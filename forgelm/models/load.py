"""Load the student, the teacher, or a finished run's model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.config.schema import (
    ModelConfig,
    TeacherConfig,
    TeacherDtype,
    TinyConfig,
    TrainingConfig,
)
from forgelm.errors import ConfigError, ForgeError, RunError
from forgelm.hub import explained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY_TOKENIZER = Path(__file__).parent / "tiny" / "tokenizer.json"
_TINY_POSITIONS = 512


@dataclass(frozen=True)
class Loaded:
    """A model and the tokenizer that feeds it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_tokenizer(config: ModelConfig, revision: str | None) -> PreTrainedTokenizerBase:
    """The student's tokenizer; for `path: null` the one of the tiny models."""
    from transformers import AutoTokenizer, BertTokenizer

    if config.path is None:
        return BertTokenizer(tokenizer_file=str(TINY_TOKENIZER), model_max_length=_TINY_POSITIONS)
    with _explained(f"model {config.path}"):
        return AutoTokenizer.from_pretrained(
            config.path, revision=revision, trust_remote_code=config.trust_remote_code
        )


def load_teacher_tokenizer(config: TeacherConfig, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    path = str(config.path or config.run)
    with _explained(f"teacher {path}"):
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=config.trust_remote_code
        )


def load_student(
    config: ModelConfig,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str] | None,
) -> PreTrainedModel:
    """The student with a head for `labels` (None: one regression output), weights in float32.

    Weights that the checkpoint lacks come from torch's generator: seed it first.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

    head = _head(labels)
    if config.path is None:
        return BertForSequenceClassification(_tiny(config.tiny, len(tokenizer), head))
    with _explained(f"model {config.path}"):
        return AutoModelForSequenceClassification.from_pretrained(
            config.path,
            revision=revision,
            trust_remote_code=config.trust_remote_code,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            **head,
        )


def load_teacher(
    config: TeacherConfig, revision: str | None, labels: Sequence[str] | None, dtype: torch.dtype
) -> PreTrainedModel:
    """The teacher in eval mode, without gradients, its outputs in the order of the task's labels.

    Raises:
        ConfigError: the labels can't be matched.
    """
    from transformers import AutoModelForSequenceClassification

    path = str(config.path or config.run)
    with _explained(f"teacher {path}"):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=dtype,
            revision=revision,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    if loading["missing_keys"]:
        lacking = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ConfigError(
            f"teacher {path}: its checkpoint lacks {lacking}, "
            "so it was never trained to classify; choose a teacher of this task"
        )
    order = match_labels(path, model.config, labels)
    if order is not None:
        model.register_forward_hook(_reordered(order))
    model.eval()
    model.requires_grad_(False)
    return model


def load_final(folder: Path) -> Loaded:
    """The model and tokenizer that a run left in its directory."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with _explained(f"run {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return Loaded(model, tokenizer)


def teacher_dtype(config: TeacherConfig) -> torch.dtype:
    """The precision that the teacher runs in."""
    import torch

    if config.dtype is TeacherDtype.auto:
        return torch.bfloat16 if bf16_native() else torch.float32
    dtype: torch.dtype = getattr(torch, config.dtype.name)
    return dtype


def device_for(training: TrainingConfig) -> torch.device:
    """Where a model runs outside the trainer: the accelerator, if it may be used."""
    import torch

    accelerator = None if training.use_cpu else torch.accelerator.current_accelerator(True)
    return accelerator or torch.device("cpu")


def bf16_native() -> bool:
    """Whether the device computes in bfloat16 itself; a CPU isn't counted."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def match_labels(name: str, config: Any, labels: Sequence[str] | None) -> list[int] | None:
    """Where each of the task's labels stands among the teacher's outputs.

    None where both have the same order, or where the teacher's labels have no names (LABEL_0, ...)
    and there are as many: then the order is taken as the task's.

    Raises:
        ConfigError: another number of labels, or names that don't match.
    """
    count = 1 if labels is None else len(labels)
    if config.num_labels != count:
        raise ConfigError(
            f"teacher {name}: has {config.num_labels} output(s), and the task needs {count}; "
            "choose a teacher of this task"
        )
    if labels is None:
        return None
    theirs = [str(config.id2label[i]) for i in range(count)]
    if all(label == f"LABEL_{i}" for i, label in enumerate(theirs)):
        return None
    places = {_plain(label): i for i, label in enumerate(theirs)}
    if set(places) != {_plain(label) for label in labels}:
        raise ConfigError(
            f"teacher {name}: its labels ({', '.join(theirs)}) are not the task's "
            f"({', '.join(labels)}); choose a teacher of this task, or name the task's labels "
            "as the teacher does with task.labels=[...]"
        )
    order = [places[_plain(label)] for label in labels]
    return None if order == list(range(count)) else order


def _reordered(order: list[int]) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        output["logits"] = output["logits"][:, order]
        return output

    return hook


def _plain(label: str) -> str:
    return "".join(char for char in label.lower() if char.isalnum())


def _head(labels: Sequence[str] | None) -> dict[str, Any]:
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def _tiny(tiny: TinyConfig, vocabulary: int, head: dict[str, Any]) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=tiny.hidden_size,
        num_hidden_layers=tiny.num_hidden_layers,
        num_attention_heads=tiny.num_attention_heads,
        intermediate_size=tiny.intermediate_size,
        hidden_dropout_prob=tiny.dropout,
        attention_probs_dropout_prob=tiny.dropout,
        initializer_range=tiny.initializer_range,
        max_position_embeddings=_TINY_POSITIONS,
        **head,
    )


@contextmanager
def _explained(thing: str) -> Iterator[None]:
    """One line about `thing` for what transformers raises when it can't use it."""
    from safetensors import SafetensorError

    try:
        with explained(thing):
            yield
    except SafetensorError as error:
        raise RunError(f"{thing}: its weights can't be read: {error}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ForgeError) or getattr(error, "errno", None) is not None:
            raise
        cause = error.__cause__ or error.__context__
        if isinstance(cause, Exception) and not isinstance(cause, OSError | ValueError):
            with explained(thing):
                raise cause from error
        raise RunError(f"{thing}: {' '.join(str(error).split())[:300]}") from error
