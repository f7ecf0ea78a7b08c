"""What the benchmarks share: a run opened as the pipeline opens it, and a clock on its steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from forgelm.config.compose import Request, to_typed
from forgelm.config.schema import RunConfig
from forgelm.log import quiet_libraries
from forgelm.resolve import resolve
from forgelm.run.lifecycle import Run, opened, start_session
from forgelm.stages.models import Models, load_models
from forgelm.stages.preparation import prepare_task
from forgelm.stages.trainer import build_trainer
from forgelm.tasks.data import TaskData


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each step ended, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds from each step's end to the next one's."""
        return [after - before for before, after in itertools.pairwise(self.ends)]


@dataclass
class Opened:
    """An open run and what its training is made of."""

    run: Run
    task: TaskData
    models: Models
    trainer: Any


def compose(folder: Path, *words: str) -> RunConfig:
    """The config of a run below `folder`, without W&B."""
    return to_typed(Request().compose([f"output_root={folder}", "wandb.mode=disabled", *words]))


@contextmanager
def training(config: RunConfig) -> Iterator[Opened]:
    """A run as it is when its training is about to begin."""
    quiet_libraries()
    plan = resolve(config, [], False, None)
    with opened(plan.paths, plan.config, plan.digest, []) as run:
        start_session(run)
        task = prepare_task(run)
        models = load_models(run, task)
        yield Opened(run, task, models, build_trainer(run, task, models))
