"""One run, from its config to its directory, read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from forgelm import slurm
from forgelm.deadline import Deadline, Pace, deadline
from forgelm.errors import Stopped
from forgelm.log import quiet_libraries, say
from forgelm.memory import Doing, explained
from forgelm.run.lifecycle import Run, extend, start_session
from forgelm.stages.evaluation import evaluate_before
from forgelm.stages.finalize import finalize
from forgelm.stages.models import Models, load_models
from forgelm.stages.preparation import prepare_harness, prepare_task
from forgelm.stages.trainer import build_trainer, total_steps
from forgelm.stages.training import train

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from forgelm.run.tracking import Tracker
    from forgelm.tasks.data import TaskData


def pipeline(run: Run) -> None:
    """Everything between an open run directory and a complete one."""
    began = time.monotonic()
    stop_here(run)
    quiet_libraries()
    if run.world.first:
        if run.state.restarts:
            say(_how_it_ended(run))
        start_session(run)
    run.share()
    limit = deadline() if run.world.first else None
    over = heed(run, limit)
    if run.config.model.load_in_4bit:
        from forgelm.models.adapters import check_cuda

        check_cuda()
    from forgelm.callbacks import duration
    from forgelm.report import closing

    tracker = track(run)
    code = 1
    try:
        stop_here(run)
        task = prepare_task(run)
        harness = prepare_harness(run)
        extend(run)
        stop_here(run)
        with explained(run.config, Doing.loading):
            models = load_models(run, task)
            trainer = build_trainer(run, task, models, limit)
        if run.world.first:
            say(opening_screen(run, task, models, trainer.args))
        before = evaluate_before(run, task, models, trainer.args.device, harness)
        with explained(run.config, Doing.training):
            train(run, task, trainer, tracker, before)
        results = finalize(run, task, trainer, tracker, before, models.base, harness)
        if run.world.first:
            say(closing(run.config, run.paths.root, results, duration(time.monotonic() - began)))
        code = 0
    except Stopped:
        if run.world.first:
            # Before anything that may take long: Slurm's patience is short.
            slurm.hand_back()
        tracker.preempting()
        raise
    finally:
        over()
        tracker.finish(code)


def heed(run: Run, limit: Deadline | None) -> Callable[[], None]:
    """Say what time there is, and guard it; returns what ends the guard."""
    if limit is None:
        return lambda: None
    say(str(limit))
    if "pace" in run.metadata:
        limit.compare(Pace(**run.metadata["pace"]))
    return limit.guard()


def _how_it_ended(run: Run) -> str:
    """A line for each restart: what is known of the start before."""
    last = run.metadata["sessions"][-1]
    if last["stopped"] is None:
        ended = "ended without a word"
    else:
        ended = f"ended at {last['stopped']} in step {last['to_step']} ({last['reason']})"
    return f"restart {run.state.restarts} of run {run.run_id}; the start before {ended}"


def track(run: Run) -> Tracker:
    """W&B for the first rank, nothing for the others."""
    from forgelm.run.tracking import Tracker, start_tracking

    if not run.world.first:
        return Tracker(None)
    return start_tracking(run.config.wandb, run.paths, run.run_id, read_config(run))


def read_config(run: Run) -> dict[str, Any]:
    """The sealed config as plain data."""
    import yaml

    config: dict[str, Any] = yaml.safe_load(run.paths.config.read_text(encoding="utf-8"))
    return config


def stop_here(run: Run) -> None:
    """Between two parts, where nothing is half-done: stop if that was asked for, all ranks."""
    from forgelm.evaluate import stop_together

    stop_together(run.world)


def opening_screen(run: Run, task: TaskData, models: Models, arguments: TrainingArguments) -> str:
    """What will run, before it does."""
    from forgelm.report import opening

    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "float32"
    return opening(
        run.config,
        run.paths.root,
        task,
        models.student,
        models.teacher,
        total_steps(run.config, task),
        precision,
        "cpu" if arguments.device.type == "cpu" else str(arguments.device),
    )
