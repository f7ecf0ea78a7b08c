"""When memory runs out: which of the values in force to lower."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum

from forgelm.config.metrics import answers
from forgelm.config.schema import RlConfig, RunConfig, TeacherDtype
from forgelm.config.validate import sharding, uses_teacher
from forgelm.errors import RunError

_SIGNS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ASKED = re.compile(r"allocate ([\d.]+) (bytes|[KMGT]iB)")
_GIB = 1 << 30


class Doing(Enum):
    loading = "while the model was built"
    training = "in training"
    evaluation = "in an evaluation"
    lm_eval = "in an evaluation by lm-eval"


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the machine's."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def explained(config: RunConfig, doing: Doing) -> Iterator[None]:
    """One line with what to lower for what is raised inside when memory runs out."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        lower, turn_on = _ways(config, doing)
        ways = [f"lower {' or '.join(lower)}"] if lower else []
        ways += [f"set {' or '.join(turn_on)}"] if turn_on else []
        advice = "; or ".join(ways) or "this needs a device with more of it"
        raise RunError(f"out of memory {doing.value}{_asked(error)}: {advice}") from error


def _asked(error: Exception) -> str:
    found = _ASKED.search(str(error))
    if found is None:
        return ""
    amount, unit = found.groups()
    size = f"{float(amount) / _GIB:.2f} GiB" if unit == "bytes" else f"{amount} {unit}"
    return f" ({size} more were asked for)"


def _ways(config: RunConfig, doing: Doing) -> tuple[list[str], list[str]]:
    """What may be lowered, and what turned on, each with the value in force."""
    match doing:
        case Doing.loading:
            return _to_load(config)
        case Doing.training:
            return _to_train(config)
        case Doing.evaluation:
            return _to_evaluate(config), []
        case Doing.lm_eval:
            size = config.eval.lm_eval.batch_size
            return [f"eval.lm_eval.batch_size={size}"] if size > 1 else [], []


def _to_load(config: RunConfig) -> tuple[list[str], list[str]]:
    model, tiny = config.model, config.model.tiny
    if model.path is None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers")
        return [f"model.tiny.{name}={getattr(tiny, name)}" for name in sizes], []
    turn_on = (
        ["model.dtype=bfloat16 with model.lora.enabled=true"] if not model.lora.enabled else []
    )
    return [f"the size of model={model.name}"], [*turn_on, *_teacher(config)]


def _to_train(config: RunConfig) -> tuple[list[str], list[str]]:
    training, mode = config.training, config.mode
    size, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    lower = []
    if size > 1:
        parts = 2 if size % 2 == 0 else size
        lower.append(
            f"training.per_device_train_batch_size={size} (to {size // parts}, with "
            f"training.gradient_accumulation_steps={steps * parts} for as large a step)"
        )
    lower.append(f"task.max_length={config.task.max_length}")
    if isinstance(mode, RlConfig):
        lower.append(f"mode.max_completion_length={mode.max_completion_length}")
        lower.append(f"mode.num_generations={mode.num_generations}")
        if mode.use_vllm:
            lower.append(f"mode.vllm_gpu_memory_utilization={mode.vllm_gpu_memory_utilization:g}")
    turn_on = []
    if not training.activation_checkpointing:
        turn_on.append("training.activation_checkpointing=true")
    if not config.model.lora.enabled:
        turn_on.append("model.lora.enabled=true")
    if not training.fsdp and not any(sharding(_sharded(config))):
        turn_on.append("training.fsdp=true")
    return lower, [*turn_on, *_teacher(config)]


def _sharded(config: RunConfig) -> RunConfig:
    return replace(config, training=replace(config.training, fsdp=True))


def _to_evaluate(config: RunConfig) -> list[str]:
    task, size = config.task, config.training.per_device_eval_batch_size
    lower = [f"training.per_device_eval_batch_size={size}"] if size > 1 else []
    lower += [f"task.max_length={task.max_length}"]
    lower += [f"task.max_new_tokens={task.max_new_tokens}"] if answers(task) else []
    return lower


def _teacher(config: RunConfig) -> list[str]:
    wide = uses_teacher(config) and config.teacher.dtype is TeacherDtype.float32
    return ["teacher.dtype=bfloat16"] if wide else []
