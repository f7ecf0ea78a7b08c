"""What happens at the trainer's events: values logged, checkpoints marked, progress said."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgelm.config.schema import TaskConfig
from forgelm.errors import RunError
from forgelm.log import say
from forgelm.run.files import keep_lines
from forgelm.run.tracking import Tracker


class StepMetrics(TrainerCallback):
    """Every logged step to `metrics.jsonl`, a line each, and to the tracker.

    Only the first `kept` lines of the file stay: those of steps that will be done again go.
    `written` is how many lines there are, and their SHA-256.
    """

    def __init__(self, path: Path, tracker: Tracker, kept: int) -> None:
        self.path = path
        self.tracker = tracker
        self.lines = keep_lines(path, kept)
        self._hash = hashlib.sha256(path.read_bytes())

    @property
    def written(self) -> tuple[int, str]:
        return self.lines, self._hash.hexdigest()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        values = logs or {}
        loss = values.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {state.global_step}: lower training.learning_rate, "
                "or check the data; the last checkpoint stands"
            )
        line = {"step": state.global_step, "time": round(time.time(), 3), **_json_ready(values)}
        text = json.dumps(line) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.lines += 1
        self._hash.update(text.encode())
        self.tracker.log(state.global_step, {_group(k): v for k, v in values.items()})


def _json_ready(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


def _group(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def peaks(path: Path, task: TaskConfig) -> dict[str, dict[str, Any]]:
    """The best value of the task's metric on each split, and its step, from `metrics.jsonl`."""
    best: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for split in task.validation_splits:
            _raise_peak(best, task, split, values, values["step"])
    return best


def _raise_peak(
    best: dict[str, dict[str, Any]], task: TaskConfig, split: str, values: dict[str, Any], step: int
) -> float | None:
    """Note a new best; returns the split's value among `values`, if it has one."""
    metric = task.metrics[0]
    value = values.get(f"eval_{split}_{metric}")
    if value is None or math.isnan(value):
        return None
    known = best.get(split)
    sign = 1 if task.greater_is_better else -1
    if known is None or sign * (value - known[metric]) > 0:
        best[split] = {metric: value, "step": step}
    return float(value)


class TeacherPeak(TrainerCallback):
    """At each evaluation: the task's metric, its best so far, and where the teacher stands."""

    def __init__(
        self, task: TaskConfig, best: dict[str, dict[str, Any]], teacher: dict[str, Any] | None
    ) -> None:
        self.task = task
        self.best = best
        self.teacher = teacher

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        metric = self.task.metrics[0]
        for split in self.task.validation_splits:
            step = state.global_step
            if f"eval_{split}_{metric}" not in (metrics or {}):
                continue
            value = _raise_peak(self.best, self.task, split, metrics or {}, step)
            if value is None:
                continue
            theirs = self.teacher[split][metric] if self.teacher else None
            said = "" if theirs is None else f", teacher {theirs:.4f}"
            peak = self.best[split]
            say(
                f"step {step}: {split} {metric} {value:.4f} "
                f"(best {peak[metric]:.4f} at step {peak['step']}{said})"
            )


class Progress(TrainerCallback):
    """A line at each logged step: how far, the loss, the pace, the time left."""

    def __init__(self) -> None:
        self.began = 0.0
        self.first = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.began:
            self.began, self.first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        done, spent = state.global_step - self.first, time.monotonic() - self.began
        left = spent / max(done, 1) * (state.max_steps - state.global_step)
        share = 100 * state.global_step // max(state.max_steps, 1)
        say(
            f"step {state.global_step}/{state.max_steps} ({share} %)  loss {logs['loss']:.4f}  "
            f"{done / max(spent, 1e-9):.1f} steps/s  {duration(left)} left",
            live=True,
        )


def duration(seconds: float) -> str:
    """As 0:07, 12:30 or 3:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
