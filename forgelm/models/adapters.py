"""Adapters: low-rank ones put on a frozen base, and found ones brought back to theirs.

An adapter's folder holds `adapter_config.json` and its weights as peft writes them, and, from
forgelm, `base.json`: which base it is for, so that no other is taken for it.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.config.extras import lacking
from forgelm.config.schema import Kind, LoraSection, ModelConfig
from forgelm.errors import ConfigError, RunError, in_brief
from forgelm.hub import explained
from forgelm.run.checkpoints import file_hash
from forgelm.run.files import read_json, write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SETTINGS = "adapter_config.json"
RECORD = "base.json"
OWN_BASE = "base"

_TASKS = {
    Kind.text_classification: "SEQ_CLS",
    Kind.causal_lm: "CAUSAL_LM",
    Kind.seq2seq: "SEQ_2_SEQ_LM",
    Kind.image_to_text: None,
}
_NAME = "default"
_WEIGHTS = "adapter_model.safetensors"
_OLD_WEIGHTS = "adapter_model.bin"
_MAGNITUDE = "lora_magnitude_vector"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MISMATCH = re.compile("size mismatch for .*")
_SHOWN = 8


@dataclass(frozen=True)
class Base:
    """The frozen model under an adapter.

    `revision` is its commit on the hub, `weights` the SHA-256 of its weight files, None where there
    are none. `labels` names a classifier's outputs in their order; None: one output, or no head.
    """

    path: str
    revision: str | None
    weights: str | None
    labels: list[str] | None


@dataclass(frozen=True)
class Adapter:
    """An adapter that lies somewhere, and where its base does.

    `base_revision` is what the adapter asks for, `record` what forgelm noted of the base.
    """

    path: str
    revision: str | None
    settings: dict[str, Any]
    base: str
    base_revision: str
    record: Base | None

    @property
    def here(self) -> bool:
        """Whether the base is a folder of this machine."""
        return Path(self.base).is_dir()


def find(path: str, revision: str | None, base: str | None = None) -> Adapter | None:
    """The adapter in a folder or hub repository; None where a whole model lies there.

    `base`: where its base is, if not where the adapter says.

    Raises:
        ConfigError: it isn't a LoRA adapter, its base can't be told, peft isn't installed, or a
            folder lacks the weights.
    """
    settings = _json_in(path, revision, SETTINGS)
    if settings is None:
        return None
    problem = lacking("lora", "peft", f"{path} is an adapter, which")
    if problem:
        raise ConfigError(problem)
    if settings.get("peft_type") != "LORA":
        raise ConfigError(
            f"adapter {path}: is of type {settings.get('peft_type')}; forgelm reads LORA ones"
        )
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in (_WEIGHTS, _OLD_WEIGHTS)):
        raise ConfigError(
            f"adapter {path}: the folder has {SETTINGS} but has no {_WEIGHTS}; copy the whole "
            "folder, or name another"
        )
    record = _json_in(path, revision, RECORD)
    own = folder / OWN_BASE
    named = base or (str(own) if _is_model(own) else settings.get("base_model_name_or_path"))
    if not named:
        raise ConfigError(f"adapter {path}: doesn't say what its base is; name it with model.base")
    local = Path(named).expanduser()
    if local.is_dir():
        if (local / SETTINGS).is_file():
            raise ConfigError(f"adapter {path}: its base {named} is an adapter itself; merge it")
        named = str(local)
    elif named.startswith((".", "/", "~")) or named.count("/") > 1:
        raise ConfigError(
            f"adapter {path}: its base {named} isn't there; put it back, or name its place with "
            "model.base"
        )
    asked = None if base else settings.get("revision")
    known = None if record is None else Base(**record)
    return Adapter(path, revision, settings, named, asked or "main", known)


def _json_in(path: str, revision: str | None, name: str) -> dict[str, Any] | None:
    """A JSON file of a folder or a hub repository, if it is there."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        file: Path | None = folder / name
    else:
        from transformers.utils.hub import cached_file

        with explained(f"model {path}", in_run=True):
            found = cached_file(
                path,
                name,
                revision=revision,
                # Whoever loads what isn't there says why.
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        file = None if found is None else Path(found)
    if file is None or not file.is_file():
        return None
    try:
        content: dict[str, Any] = read_json(file)
    except RunError as error:
        raise _wrong(path, f"its {name} isn't JSON any more") from error
    return content


def _wrong(path: str, told: str) -> ConfigError | RunError:
    """What is here was asked for wrongly; what comes from the hub failed."""
    if Path(path).expanduser().is_dir():
        return ConfigError(f"{path}: {told}; copy the folder again, or name another")
    return RunError(f"{path}: {told}; fetch it again")


def has_reader(path: str, revision: str | None) -> bool:
    """Whether a tokenizer or processor lies beside an adapter."""
    names = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    return any(_json_in(path, revision, name) is not None for name in names)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def base_of(config: ModelConfig, revisions: dict[str, str | None], labels: Any) -> Base:
    """The base of a student that is trained with an adapter; its files are here already."""
    path, revision = str(config.path), revisions.get("model")
    adapter = find(path, revision, config.base)
    if adapter is not None:
        path, revision = adapter.base, revisions.get("base")
    return Base(path, revision, fingerprint(path, revision), labels)


def fingerprint(path: str, revision: str | None) -> str | None:
    """SHA-256 over the names and hashes of a model's weight files; None where there are none.

    Of a hub repository: those in the cache.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        folder = Path(str(cached_file(path, "config.json", revision=revision))).parent
    files = _weight_files(folder)
    if not files:
        return None
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name} {_hash_of(file)}\n".encode())
    return total.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return sorted({folder / name for name in read_json(index)["weight_map"].values()})
    return []


def _hash_of(file: Path) -> str:
    # The hub's cache names large files after their hash.
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    return file_hash(file)


def check_base(adapter: Adapter, revision: str | None) -> None:
    """Refuse a base that isn't the one which the adapter was trained on, where that is known.

    `revision` is the base's commit. Only for a base whose files are here.

    Raises:
        ConfigError: its weights are others.
    """
    known = adapter.record.weights if adapter.record else None
    if known is None:
        return
    found = fingerprint(adapter.base, revision)
    if found != known:
        raise ConfigError(
            f"adapter {adapter.path}: {adapter.base} isn't the base that it was trained on "
            f"(weights {known[:12]}, found {str(found)[:12]}); put that back, or name its place "
            "with model.base"
        )


def new(
    model: PreTrainedModel, section: LoraSection, kind: Kind, fresh: Iterable[str]
) -> PeftModel:
    """Fresh adapters on a model, which is frozen; their weights come from torch's generator.

    `fresh` names weights of the model that no checkpoint holds, such as a new head's: they are
    trained and saved with the adapter.

    Raises:
        ConfigError: the model has no such modules.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    modules = [name for name, _ in model.named_modules() if name]
    saved = [*_whole_modules(model, set(fresh)), *(section.modules_to_save or [])]
    targets: Any = section.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    for key, wanted in (("target_modules", targets), ("modules_to_save", section.modules_to_save)):
        _refuse_unknown(key, wanted, modules, model)
    task = _TASKS[kind]
    settings = LoraConfig(
        task_type=None if task is None else TaskType[task],
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=targets if targets is not None else _usual_targets(model),
        modules_to_save=saved or None,
        bias=section.bias.name,
        use_dora=section.use_dora,
        use_rslora=section.use_rslora,
        ensure_weight_tying=_tied(model, [*saved, *(section.target_modules or [])]),
    )
    with _silent():
        made: PeftModel = get_peft_model(model, settings)
    return made


@contextmanager
def _silent() -> Iterator[None]:
    """Without what peft is warned of by transformers: names that will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _usual_targets(model: PreTrainedModel) -> Any:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    return USUAL.get(model.config.model_type, "all-linear")


def _whole_modules(model: PreTrainedModel, fresh: set[str]) -> list[str]:
    """The largest modules that have none but fresh parameters, and those around the rest."""
    left = fresh & {name for name, _ in model.named_parameters()}
    found = []
    for name, module in model.named_modules():
        own = {f"{name}.{part}" for part, _ in module.named_parameters()}
        if name and own and own <= left:
            found.append(name)
            left -= own
    return [*found, *sorted({name.rpartition(".")[0] for name in left})]


def _refuse_unknown(key: str, wanted: Any, modules: list[str], model: PreTrainedModel) -> None:
    if not isinstance(wanted, list):
        return
    for name in wanted:
        if any(module == name or module.endswith(f".{name}") for module in modules):
            continue
        import torch

        linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        known = sorted({module.rpartition(".")[2] for module in linear})
        raise ConfigError(
            f"model.lora.{key}: {name}: the model has no such module; its linear ones are "
            f"{', '.join(known[:_SHOWN])}{', ...' if len(known) > _SHOWN else ''}"
        )


def _tied(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether an embedding among `names` is the output's matrix too: the two must stay one."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    return bool(model.all_tied_weights_keys) and any(
        name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names
    )


def beside(base: PreTrainedModel, adapter: Adapter, fresh: set[str]) -> list[str]:
    """Modules of a base that no checkpoint holds, nor the adapter."""
    held = tuple(adapter.settings.get("modules_to_save") or ())
    return [name for name in _whole_modules(base, fresh) if not name.endswith(held)]


def put_on(base: PreTrainedModel, adapter: Adapter, trainable: bool) -> PeftModel:
    """An adapter on its base: frozen, for use, or to be trained further.

    Raises:
        ConfigError: it doesn't fit, so that the base is another.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
    from safetensors import SafetensorError

    try:
        settings: Any = PeftConfig.from_pretrained(adapter.path, revision=adapter.revision)
    except (TypeError, ValueError, KeyError) as error:
        raise _wrong(
            adapter.path, f"its {SETTINGS} can't be used ({in_brief(str(error))})"
        ) from error
    settings.inference_mode = not trainable
    # Only training needs what peft adds for a kind of task, and not every model can have it.
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(settings.task_type) if trainable else None
    try:
        with _silent():
            made: PeftModel = (wrapper or PeftModel)(base, settings)
    except ValueError as error:
        raise _doesnt_fit(adapter, str(error)) from error
    try:
        result = made.load_adapter(
            adapter.path,
            _NAME,
            is_trainable=trainable,
            torch_device="cpu",
            revision=adapter.revision,
        )
    except SafetensorError as error:
        raise _wrong(adapter.path, f"its {_WEIGHTS} can't be read ({error})") from error
    except KeyError as error:
        raise _doesnt_fit(adapter, f"the adapter lacks {error}") from error
    except RuntimeError as error:
        told = _MISMATCH.search(str(error))
        if told is None:
            raise
        raise _doesnt_fit(adapter, told.group()) from error
    # With biases peft writes some under a second name.
    unknown = [name for name in result.unexpected_keys if "lora_" in name]
    for wrong, names in (("lacks", result.missing_keys), ("has", unknown)):
        if names:
            raise _doesnt_fit(adapter, f"the adapter {wrong} {', '.join(sorted(names)[:3])}")
    return made


def _doesnt_fit(adapter: Adapter, told: str) -> ConfigError:
    told = " ".join(told.split())[:300]
    return ConfigError(
        f"adapter {adapter.path}: doesn't fit its base {adapter.base} ({told}); name the right "
        "one with model.base"
    )


def check_trainable(adapter: Adapter, section: LoraSection, kind: Kind) -> None:
    """Refuse to train an adapter further where the request wants what it isn't.

    A value of the section that isn't the default was asked for.

    Raises:
        ConfigError: it is for another kind of task, or a setting is another.
    """
    settings = adapter.settings
    if settings.get("task_type") != _TASKS[kind]:
        raise ConfigError(
            f"adapter {adapter.path}: was made for {settings.get('task_type')}, and task.kind="
            f"{kind} takes {_TASKS[kind]}; model.lora.enabled=false merges and trains all of it"
        )
    usual = LoraSection()
    for item in fields(section):
        asked = _plain(getattr(section, item.name))
        if item.name in ("enabled", "merge") or asked == _plain(getattr(usual, item.name)):
            continue
        theirs = _plain(settings.get(item.name))
        if asked != theirs:
            raise ConfigError(
                f"model.lora.{item.name}={asked}: {adapter.path} goes on being trained with its "
                f"own settings, and has {theirs}; leave it out, or merge the adapter first"
            )


def in_4bit() -> dict[str, Any]:
    """How `from_pretrained` is told to hold a model in 4 bits, on this process's GPU.

    Raises:
        ConfigError: there is no CUDA.
    """
    import torch
    from transformers import BitsAndBytesConfig

    check_cuda()
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        "device_map": {"": torch.cuda.current_device()},
    }


def prepared_4bit(model: PreTrainedModel) -> PreTrainedModel:
    """A model in 4 bits with the rest of its weights in float32, as training needs them."""
    from peft import prepare_model_for_kbit_training

    made: PreTrainedModel = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return made


def check_cuda() -> None:
    """Refuse 4 bits on a machine without CUDA; imports torch."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "model.load_in_4bit=true needs a CUDA GPU, and this machine has none; leave it out"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(value)
    return value.name if isinstance(value, Enum) else value


def merged(model: PeftModel) -> PreTrainedModel:
    """The base with the adapter's change in its weights; what is given is used up."""
    whole: PreTrainedModel = model.merge_and_unload()
    whole.requires_grad_(True)
    return whole


def save(model: PeftModel, folder: Path, base: Base, weights: dict[str, Any] | None = None) -> None:
    """The adapter's files, with a reference to its base; `weights` are a sharded model's."""
    settings = model.peft_config[_NAME]
    settings.base_model_name_or_path, settings.revision = base.path, base.revision
    # Loading an adapter adds to the list each time; a set has no order.
    if settings.modules_to_save:
        settings.modules_to_save = list(dict.fromkeys(settings.modules_to_save))
    # Nothing of the base: its embeddings are never resized here.
    model.save_pretrained(
        str(folder), selected_adapters=[_NAME], save_embedding_layers=False, state_dict=weights
    )
    (folder / "README.md").unlink()
    if settings.use_dora:
        _rename_magnitudes(folder / _WEIGHTS)
    written = read_json(folder / SETTINGS)
    if isinstance(written["target_modules"], list):
        written["target_modules"].sort()
    write_json(folder / SETTINGS, written)
    write_json(folder / RECORD, asdict(base))


def _rename_magnitudes(file: Path) -> None:
    """Give DoRA's magnitudes the name that peft and transformers read alike.

    Under the one that peft writes, transformers' from_pretrained drops them with a warning.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    named = {
        f"{name}.weight" if name.endswith(_MAGNITUDE) else name: tensor
        for name, tensor in weights.items()
    }
    save_file(named, file, metadata={"format": "pt"})
