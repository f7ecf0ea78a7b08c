"""What the person watching is shown: one screen before training, one table after."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgelm.config.lm_tasks import LM_EVAL, lm_eval_rows
from forgelm.config.metrics import REWARD
from forgelm.config.schema import (
    MODES,
    DistillationLoss,
    KdConfig,
    Kind,
    Problem,
    RlConfig,
    RunConfig,
    TeacherKind,
)
from forgelm.config.validate import uses_teacher
from forgelm.drill import Outcome
from forgelm.tasks.data import TaskData

_RULE = "-" * 72
_DIVERGENCES = {
    DistillationLoss.kl: "KL(teacher || student)",
    DistillationLoss.reverse_kl: "KL(student || teacher)",
    DistillationLoss.jsd: "JSD(teacher, student)",
}


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trained(model: Any) -> str:
    """How many parameters a student has, and how many of them are trained if not all."""
    every = parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained == every:
        return f"{every:,} parameters"
    return f"{trained:,} of {every:,} parameters trained ({100 * trained / every:.2g} %)"


def opening(
    config: RunConfig,
    root: Path,
    task: TaskData,
    student: Any,
    teacher: Any | None,
    steps: int,
    precision: str,
    device: str,
) -> str:
    """The screen before training: what will run, how long, where it writes."""
    held_out = ", ".join(f"{name} {len(rows):,}" for name, rows in task.eval.items())
    train = "a stream" if config.task.streaming else f"{len(task.train):,}"
    training = config.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    batch *= config.launch.ranks
    lines = {
        "task": f"{config.task.name}: train {train}, {held_out}; {_wanted(config, task)}",
        "student": f"{_source(config.model.path, 'tiny')}, {_trained(student)}",
        "teacher": "none"
        if teacher is None
        else f"{_teacher_source(config)}, {parameters(teacher):,} parameters",
        "loss": _loss(config),
        "steps": f"{steps:,} of {batch} {_unit(config)}; {training.optim}, learning rate "
        f"{training.learning_rate:g}, {training.lr_scheduler_type}",
        "device": f"{device}, {precision}{_sharding(config)}",
        "seed": str(config.seed),
        "bytes": _promise(config, device),
        "writes": str(root),
    }
    return "\n".join([_RULE, *(f"{name:<9}{text}" for name, text in lines.items()), _RULE])


def _sharding(config: RunConfig) -> str:
    return f", sharded over {config.launch.ranks} ranks" if config.training.fsdp else ""


def _unit(config: RunConfig) -> str:
    """What a step is made of."""
    if not isinstance(config.mode, RlConfig):
        return "rows"
    return f"completions, {config.mode.num_generations} a prompt"


def _promise(config: RunConfig, device: str) -> str:
    """What may differ between this run interrupted and not."""
    if isinstance(config.mode, RlConfig) and config.mode.use_vllm:
        return "differ once it is interrupted: vLLM draws by generators of its own"
    if device == "cpu" or config.training.full_determinism:
        return "the same however often it is interrupted"
    return (
        "may differ in the last bits: kernels of this device can add in any order; "
        "training.full_determinism=true prevents it"
    )


def closing(config: RunConfig, root: Path, results: dict[str, Any], seconds: str) -> str:
    """The table after training: before, after, teacher, share of the gap closed; what's next."""
    metric = config.task.metrics[0]
    rows: list[tuple[str, ...]] = [("", "before", "after", "teacher", "gap closed")]
    after = results["after"]["student"]
    before, teacher = (
        (results["before"] or {}).get("student"),
        (results["before"] or {}).get("teacher"),
    )
    for split in after:
        if split == LM_EVAL:
            continue
        # What rewards are for is shown too, whichever metric the task names first.
        rewarded = [REWARD] if isinstance(config.mode, RlConfig) and metric != REWARD else []
        for name in [metric, *rewarded]:
            values = [_value(scores, split, name) for scores in (before, after, teacher)]
            rows.append((f"{split} {name}", *map(_number, values), _gap(*values)))
    for task, name, _ in lm_eval_rows(after):
        measured = [_value((scores or {}).get(LM_EVAL), task, name) for scores in (before, after)]
        rows.append((f"{task} {name}", *map(_number, measured), "-", "-"))
    place = shlex.quote(_near(root))
    lines = [
        _RULE,
        *_aligned(rows),
        "",
        f"done in {seconds}: {place}",
        f"next: forgelm predict {place} --data FILE",
        _RULE,
    ]
    return "\n".join(lines)


def table(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns; the first row is the header."""
    return "\n".join(_aligned(rows))


def drill_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """The table of a drill, header first."""
    header = ("interrupted in", "by", "steps lost", "s to durable", "weights", "metrics", "data")
    return [header, *map(_drill_cells, outcomes)]


def drill_row(outcome: Outcome) -> str:
    """One outcome in a line."""
    verdict = "same bytes" if outcome.holds else f"DIFFERS {'; '.join(outcome.problems)}".rstrip()
    return f"{outcome.case.title}, {outcome.case.signal}: {verdict}"


def _drill_cells(outcome: Outcome) -> tuple[str, ...]:
    case, durable = outcome.case, outcome.durable
    same = [
        "same" if held else "OTHER" for held in (outcome.weights, outcome.metrics, outcome.data)
    ]
    seconds = "-" if durable is None else f"{durable:.1f}"
    return (case.title, case.signal, str(outcome.lost), seconds, *same)


def _near(root: Path) -> str:
    try:
        return str(root.relative_to(Path.cwd()))
    except ValueError:
        return str(root)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _value(scores: dict[str, Any] | None, split: str, metric: str) -> float | None:
    return None if scores is None else scores.get(split, {}).get(metric)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _gap(before: float | None, after: float | None, teacher: float | None) -> str:
    if before is None or after is None or teacher is None or teacher == before:
        return "-"
    return f"{100 * (after - before) / (teacher - before):.0f} %"


def _loss(config: RunConfig) -> str:
    mode = config.mode
    if isinstance(mode, RlConfig):
        return f"GRPO ({mode.loss_type}) on {', '.join(mode.rewards)}"
    if mode.name not in MODES:
        return f"that of mode={mode.name}"
    task = "cross-entropy" if config.task.problem is Problem.classification else "squared error"
    if not isinstance(mode, KdConfig) or not uses_teacher(config):
        return task
    loss = mode.loss
    if loss is DistillationLoss.auto:
        loss = DistillationLoss.kl if task == "cross-entropy" else DistillationLoss.mse
    if loss is DistillationLoss.mse:
        part = "squared error of logits"
    else:
        part = f"T^2 {_DIVERGENCES[loss]}, T = {mode.temperature:g}"
    return f"{1 - mode.alpha:g} {task} + {mode.alpha:g} {part}"


def _wanted(config: RunConfig, task: TaskData) -> str:
    """What the model is to give for a row."""
    if config.task.kind is not Kind.text_classification:
        return "text"
    return "scores" if task.rows.labels is None else f"{len(task.rows.labels)} labels"


def _source(path: str | None, otherwise: str) -> str:
    return path or otherwise


def _teacher_source(config: RunConfig) -> str:
    teacher = config.teacher
    return str(teacher.run if teacher.kind is TeacherKind.run else teacher.path)
