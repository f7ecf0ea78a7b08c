"""Load the student, the teacher, or a finished run's model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.config.metrics import answers
from forgelm.config.schema import (
    Kind,
    ModelConfig,
    TaskConfig,
    TeacherConfig,
    TeacherDtype,
    TrainingConfig,
)
from forgelm.errors import ConfigError, ForgeError, RunError, in_brief
from forgelm.hub import explained
from forgelm.log import say
from forgelm.models import adapters, tiny
from forgelm.models.adapters import Adapter

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

_AUTO = {
    Kind.text_classification: "AutoModelForSequenceClassification",
    Kind.causal_lm: "AutoModelForCausalLM",
    Kind.seq2seq: "AutoModelForSeq2SeqLM",
    Kind.image_to_text: "AutoModelForImageTextToText",
}


@dataclass(frozen=True)
class Loaded:
    """A model and the tokenizer or processor that feeds it."""

    model: PreTrainedModel
    reader: Any


def load_reader(
    config: ModelConfig, kind: Kind, revision: str | None, base_revision: str | None = None
) -> Any:
    """The student's tokenizer, or processor for images; for `path: null` the tiny models'.

    `base_revision` is the commit of the base, for an adapter.
    """
    if config.path is None:
        return tiny.reader(kind)
    with explained_model(f"model {config.path}"):
        adapter = adapters.find(config.path, revision, config.base)
        path, revision = _with_reader(config.path, revision, adapter, base_revision)
        return _reader(kind, path, revision, config.trust_remote_code)


def load_teacher_reader(
    config: TeacherConfig, kind: Kind, revision: str | None, base_revision: str | None = None
) -> Any:
    """The teacher's tokenizer or processor."""
    path = str(config.path or config.run)
    with explained_model(f"teacher {path}"):
        adapter = adapters.find(path, revision)
        path, revision = _with_reader(path, revision, adapter, base_revision)
        return _reader(kind, path, revision, config.trust_remote_code)


def _with_reader(
    path: str, revision: str | None, adapter: Adapter | None, base_revision: str | None
) -> tuple[str, str | None]:
    """Where the tokenizer or processor lies: some adapters leave it to their base."""
    if adapter is None or adapters.has_reader(path, revision):
        return path, revision
    return adapter.base, base_revision


def _reader(kind: Kind, path: str | Path, revision: str | None, remote_code: bool) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    auto = AutoProcessor if kind is Kind.image_to_text else AutoTokenizer
    try:
        made = auto.from_pretrained(path, revision=revision, trust_remote_code=remote_code)
    except ImportError as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: it needs a package that isn't installed: {said}") from error
    if kind is Kind.image_to_text and not hasattr(made, "image_processor"):
        made = _with_images(made, path, revision)
    tokenizer = getattr(made, "tokenizer", made)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # What transformers makes where there are no files of one.
        raise RunError(f"{path}: it has no tokenizer's files: fetch it again, or choose another")
    if kind is not Kind.text_classification and tokenizer.pad_token_id is None:
        # Many models that write were trained without padding; what it is filled with isn't learnt.
        tokenizer.pad_token = tokenizer.eos_token
    return made


def _with_images(tokenizer: Any, path: str | Path, revision: str | None) -> Any:
    """A tokenizer and what prepares images beside it as one processor: older repositories of
    encoder-decoder models don't name the class that they make together."""
    from transformers import AutoImageProcessor, TrOCRProcessor

    try:
        images = AutoImageProcessor.from_pretrained(path, revision=revision)
    except OSError:
        return tokenizer
    return TrOCRProcessor(images, tokenizer)


def load_student(
    config: ModelConfig,
    kind: Kind,
    revision: str | None,
    reader: Any,
    labels: Sequence[str] | None,
    base_revision: str | None = None,
) -> PreTrainedModel | PeftModel:
    """The student, its weights in `model.dtype`; with `model.lora.enabled` frozen under adapters.

    For classification it has a head for `labels` (None: one regression output). Weights that the
    checkpoint lacks, and new adapters, come from torch's generator: seed it first. Where
    `model.path` is an adapter, it is trained further, or merged into its base, whose commit
    `base_revision` is.

    Raises:
        ConfigError: the checkpoint lacks weights of a model that writes; an adapter doesn't fit.
    """
    import torch

    head = _head(labels) if kind is Kind.text_classification else {}
    if config.path is None:
        return tiny.model(kind, config.tiny, reader, head)
    how = {
        "dtype": getattr(torch, config.dtype.name),
        "trust_remote_code": config.trust_remote_code,
        **(adapters.in_4bit() if config.load_in_4bit else {}),
    }
    with explained_model(f"model {config.path}"):
        adapter = adapters.find(config.path, revision, config.base)
        if adapter is not None:
            return _adapted_student(config, adapter, kind, base_revision, head, how)
        model, fresh = _pretrained(kind, config.path, revision, head, how)
        if kind is not Kind.text_classification and fresh:
            raise ConfigError(
                f"model {config.path}: its checkpoint lacks {_few(fresh)}, so it "
                f"can't write; choose a model for task.kind={kind}"
            )
        if not config.lora.enabled:
            return model
        if config.load_in_4bit:
            model = adapters.prepared_4bit(model)
        return adapters.new(model, config.lora, kind, fresh)


def _adapted_student(
    config: ModelConfig,
    adapter: Adapter,
    kind: Kind,
    base_revision: str | None,
    head: dict[str, Any],
    how: dict[str, Any],
) -> PreTrainedModel | PeftModel:
    further = config.lora.enabled
    if further:
        adapters.check_trainable(adapter, config.lora, kind)
    what = "goes on being trained" if further else "is merged into it, and all is trained"
    at = "" if base_revision is None else f" at {base_revision[:12]}"
    say(f"model {adapter.path} is an adapter of {adapter.base}{at}; it {what}")
    if further:
        return _adapted(adapter, kind, base_revision, head, how, trainable=True)
    # A head that neither has is trained with the rest.
    return adapters.merged(_adapted(adapter, kind, base_revision, head, how, whole=False))


def _adapted(
    adapter: Adapter,
    kind: Kind,
    base_revision: str | None,
    head: dict[str, Any],
    how: dict[str, Any],
    trainable: bool = False,
    whole: bool = True,
) -> PeftModel:
    """An adapter on its base; `whole`: the two must hold all weights of the model.

    Raises:
        ConfigError: the base is another than the one it was trained on, or can't be used.
    """
    base, fresh = _pretrained(kind, adapter.base, base_revision, head, how)
    adapters.check_base(adapter, base_revision)
    untrained = adapters.beside(base, adapter, fresh)
    if untrained and whole:
        raise ConfigError(
            f"adapter {adapter.path}: neither it nor its base {adapter.base} holds "
            f"{_few(untrained)}; choose an adapter for task.kind={kind}"
        )
    if how.get("quantization_config"):
        base = adapters.prepared_4bit(base)
    return adapters.put_on(base, adapter, trainable)


def _pretrained(
    kind: Kind, path: str, revision: str | None, head: dict[str, Any], how: dict[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """A model, and the names of its weights that the checkpoint lacks or has in other shapes.

    Raises:
        ConfigError: these are more than a head, or the model is for another kind of task.
    """
    try:
        model, loading = _auto(kind).from_pretrained(
            path,
            revision=revision,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **head,
            **how,
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise _of_another_kind(kind, path, revision, how["trust_remote_code"]) from error
    if kind is Kind.image_to_text:
        _settle_marks(model, f"model {path}")
    fresh = {*_missing(loading), *(name for name, *_ in loading["mismatched_keys"])}
    # A head, and what pools for it, may be new; the model under it may not.
    inner = [name for name in fresh if name.startswith(f"{model.base_model_prefix}.")]
    if lost := {name for name in inner if "pooler" not in name}:
        raise ConfigError(
            f"{path}: its checkpoint lacks {_few(lost)}, or has other shapes than its "
            "config.json says: fetch it again, or choose another"
        )
    return model, fresh


def _of_another_kind(kind: Kind, path: str, revision: str | None, remote_code: bool) -> ConfigError:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=remote_code)
    suits = [f"task.kind={other}" for other in Kind if type(config) in _auto(other)._model_mapping]
    return ConfigError(
        f"{path}: is a model of type {config.model_type}, which task.kind={kind} can't use; "
        + (f"it is for {' or '.join(suits)}" if suits else "no kind of task can; choose another")
    )


def load_teacher(
    config: TeacherConfig,
    kind: Kind,
    revision: str | None,
    labels: Sequence[str] | None,
    dtype: torch.dtype,
    base_revision: str | None = None,
) -> PreTrainedModel:
    """The teacher in eval mode, without gradients, its outputs in the order of the task's labels.

    An adapter is merged into its base, whose commit `base_revision` is.

    Raises:
        ConfigError: weights are missing, or the labels can't be matched.
    """
    path = str(config.path or config.run)
    how = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    with explained_model(f"teacher {path}"):
        adapter = adapters.find(path, revision)
        if adapter is not None:
            head = _head_of(adapter, kind, labels)
            model = adapters.merged(_adapted(adapter, kind, base_revision, head, how))
            missing: set[str] = set()
        else:
            model, missing = _pretrained(kind, path, revision, {}, how)
    if missing:
        aim = "to classify" if kind is Kind.text_classification else "to write"
        raise ConfigError(
            f"teacher {path}: its checkpoint lacks {_few(missing)}, "
            f"so it was never trained {aim}; choose a teacher of this task"
        )
    if kind is Kind.text_classification:
        order = match_labels(path, model.config, labels)
        if order is not None:
            model.register_forward_hook(_reordered(order))
    model.eval()
    model.requires_grad_(False)
    return model


def _head_of(adapter: Adapter, kind: Kind, labels: Sequence[str] | None) -> dict[str, Any]:
    """The head of an adapter's base: as forgelm noted it, else the task's."""
    if kind is not Kind.text_classification:
        return {}
    return _head(labels if adapter.record is None else adapter.record.labels)


def check_positions(model: PreTrainedModel, task: TaskConfig, name: str) -> None:
    """Refuse lengths (tokens) that the model has no positions for.

    Raises:
        ConfigError: `task.max_length`, with what is generated after it, is more.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed, words = task.max_length, f"task.max_length={task.max_length}"
    if task.kind is Kind.causal_lm and answers(task):
        needed += task.max_new_tokens
        words += f" and task.max_new_tokens={task.max_new_tokens}"
    if task.kind is Kind.image_to_text and answers(task) and task.max_new_tokens > needed:
        needed, words = task.max_new_tokens, f"task.max_new_tokens={task.max_new_tokens}"
    if limit is not None and needed > limit:
        raise ConfigError(
            f"{words}: {name} has positions for {limit} tokens, and these need {needed}; "
            f"lower {words.split('=')[0]}"
        )


def load_final(
    folder: Path,
    kind: Kind,
    config: ModelConfig,
    labels: Sequence[str] | None,
    base_revision: str | None,
) -> Loaded:
    """The model, and what feeds it, that a run of this config left in its directory.

    An adapter isn't merged: it is measured as it was trained, its base in `model.dtype`.

    Raises:
        ConfigError: an adapter's base is gone, or isn't as it was.
    """
    import torch

    with explained_model(f"run {folder}"):
        reader = _reader(kind, folder, None, False)
        adapter = adapters.find(str(folder), None, config.base)
        if adapter is None:
            model = _auto(kind).from_pretrained(folder, dtype=torch.float32)
        else:
            how = {
                "dtype": getattr(torch, config.dtype.name),
                "trust_remote_code": config.trust_remote_code,
                **(adapters.in_4bit() if config.load_in_4bit else {}),
            }
            head = _head_of(adapter, kind, labels)
            model = _adapted(adapter, kind, base_revision, head, how)
    return Loaded(model, reader)


def _auto(kind: Kind) -> Any:
    import transformers

    return getattr(transformers, _AUTO[kind])


def _missing(loading: dict[str, Any]) -> list[str]:
    """Weights that the checkpoint lacks and the model uses: a decoder never asks for the pooled
    output of the encoder before it, and TrOCR's checkpoints have no weights for that."""
    return [name for name in loading["missing_keys"] if not name.startswith("encoder.pooler.")]


def _settle_marks(model: Any, name: str) -> None:
    """Let a vision encoder-decoder know which tokens begin, end and fill a text: published ones
    often say it of their decoder alone.

    Raises:
        ConfigError: the checkpoint says it nowhere.
    """
    decoder = getattr(model.config, "decoder", None)
    if decoder is None:
        return
    for mark in ("decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
        places = (model.config, model.generation_config, decoder)
        known = [getattr(place, mark, None) for place in places]
        value = next((found for found in known if found is not None), None)
        for place, found in zip(places[:2], known, strict=False):
            if found is None:
                setattr(place, mark, value)
    for mark in ("decoder_start_token_id", "pad_token_id"):
        if getattr(model.config, mark) is None:
            raise ConfigError(
                f"{name}: its config has no {mark}, so it can't be trained to write; "
                "choose another model"
            )


def _few(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])


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


@contextmanager
def explained_model(thing: str) -> Iterator[None]:
    """One line about `thing` for what transformers raises when it can't use it."""
    from safetensors import SafetensorError

    try:
        with explained(thing, in_run=True):
            yield
    except SafetensorError as error:
        raise RunError(f"{thing}: its weights can't be read: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ForgeError) or getattr(error, "errno", None) is not None:
            raise
        cause = error.__cause__ or error.__context__
        if isinstance(cause, Exception) and not isinstance(cause, OSError | ValueError | KeyError):
            with explained(thing, in_run=True):
                raise cause from error
        raise RunError(f"{thing}: {_in_our_words(error)}") from error


_SAYINGS = (
    (r"config\.json' is not a valid JSON", "its config.json isn't JSON any more: fetch it again"),
    (r"Can't load the configuration|file named config\.json", "it has no config.json"),
    (
        r"(?i)no file named .*(\.safetensors|\.bin)|not appear to have .*(\.safetensors|\.bin)",
        "it has no weights that can be read (model.safetensors): fetch it again, or choose another",
    ),
    (
        r"Can't load tokenizer|backend tokenizer|build an AutoTokenizer",
        "it has no tokenizer that can be read: fetch it again, or choose a whole model",
    ),
    (
        r"Can't load (image |video )?processor|Can't load feature ex|Unrecognized processing class",
        "it has no processor that can be read: fetch it again, or choose a model for images",
    ),
    (
        r"custom code",
        "it needs code of its own repository: look at that, and set trust_remote_code=true beside "
        "its path if you trust it",
    ),
    (r"for this kind of AutoModel: (\w+)", "no {0} can be made of it: choose a model of that kind"),
    (
        r"Unrecognized model in|model type `|^'[\w-]+'$",
        "its config.json or its tokenizer is of no kind that transformers {version} knows, or is "
        "damaged: fetch it again, or install a newer transformers",
    ),
)


def _in_our_words(error: Exception) -> str:
    """What transformers says of a model that it can't use, in a line; else its own first words."""
    import transformers

    said = " ".join(str(error).split())
    for pattern, ours in _SAYINGS:
        if found := re.search(pattern, said):
            return ours.format(*found.groups(""), version=transformers.__version__)
    return in_brief(said or type(error).__name__)
