"""The training loop, begun or gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgelm.errors import ConfigError, RunError, Stopped
from forgelm.log import log, say
from forgelm.run.checkpoints import newest_whole, read_progress
from forgelm.run.files import write_text
from forgelm.run.lifecycle import Run
from forgelm.run.state import Stage

if TYPE_CHECKING:
    from forgelm.run.tracking import Tracker
    from forgelm.tasks.data import TaskData
    from forgelm.training.trainer import Exact


def train(
    run: Run,
    task: TaskData,
    trainer: Exact,
    tracker: Tracker,
    before: dict[str, Any] | None,
) -> None:
    """The training loop, from the newest checkpoint that verifies if there is one."""
    from transformers import set_seed

    from forgelm.callbacks import Progress, StepMetrics, TeacherPeak, peaks

    config, target = run.config, trainer.safety.target
    checkpoint = run.world.share(choose_checkpoint(run) if run.world.first else None)
    step = 0
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        step = progress.step
        if progress.ranks != run.world.size:
            raise ConfigError(
                f"{run.paths.root} was trained by {progress.ranks} rank(s) so far, and this start "
                f"has {run.world.size}: give launch.ranks_per_node={progress.ranks}"
            )
    if run.world.first:
        teacher = (before or {}).get("teacher")
        kept = 0 if checkpoint is None else progress.metrics_lines
        metrics = StepMetrics(run.paths.metrics, tracker, kept)
        if checkpoint is not None and metrics.written != (kept, progress.metrics_sha256):
            raise RunError(
                f"{run.paths.metrics}: isn't as {checkpoint.name} knows it ({kept} lines): restore "
                "it, or delete the checkpoints to train anew"
            )
        trainer.metrics_written = lambda: metrics.written
        peak = TeacherPeak(config.task, peaks(run.paths.metrics, config.task), teacher)
        for callback in (metrics, peak, Progress()):
            trainer.add_callback(callback)
        if checkpoint is not None:
            say(f"going on from {checkpoint.name} of {target} steps")
    run.update(stage=Stage.training, step=step, target=target)
    # What was evaluated before must not decide what is drawn in training.
    set_seed(config.seed + run.world.rank)
    trainer.go_on(checkpoint)
    if trainer.stopped is not None:
        raise Stopped(trainer.stopped)
    if not trainer.finished and trainer.state.global_step < target:
        raise RunError(
            f"training ended at step {trainer.state.global_step} of {target}: there were no more "
            "batches; check the training rows and training.per_device_train_batch_size"
        )
    run.update(stage=Stage.finalize, step=trainer.state.global_step)


def choose_checkpoint(run: Run) -> Path | None:
    """The newest checkpoint that verifies; `latest_checkpoint` and the state are made to agree."""
    keeps_best = run.config.training.load_best_model_at_end
    found = newest_whole(run.paths, run.metadata["config_hash"], keeps_best)
    if found is None:
        if run.state.latest_checkpoint is not None:
            log.warning("no checkpoint of this run can be used: training starts over")
        run.paths.latest_checkpoint.unlink(missing_ok=True)
    elif run.paths.marked() != found.name:
        write_text(run.paths.latest_checkpoint, found.name + "\n")
    run.update(latest_checkpoint=None if found is None else found.name)
    return found
