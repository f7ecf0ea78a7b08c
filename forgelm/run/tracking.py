"""Weights & Biases: one id over all restarts, files inside the run directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from forgelm.config.schema import WandbConfig, WandbMode
from forgelm.errors import RunError
from forgelm.log import log
from forgelm.run.paths import RunPaths


class Tracker:
    """Where logged values go besides `metrics.jsonl`. Does nothing when W&B is disabled.

    W&B works in a process of its own, which schedulers signal too. That it is gone mustn't decide
    how a run ends: it is said once, and the run goes on without.
    """

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._try(lambda run: run.log(values, step=step))

    def summarize(self, values: dict[str, Any]) -> None:
        """Values of the whole run: the evaluations, the metadata."""
        self._try(lambda run: run.summary.update(values))

    def preempting(self) -> None:
        """Say that this run was stopped and will be gone on with."""
        self._try(lambda run: run.mark_preempting())

    def finish(self, exit_code: int) -> None:
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self._run = None
            _forget()
            log.debug("W&B's process is gone", exc_info=error)
            log.warning(
                f"W&B's process is gone ({type(error).__name__}): what follows until the next "
                "start is in metrics.jsonl alone"
            )


def _forget() -> None:
    """Take W&B's hooks back: at exit they would talk to its process."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def start_tracking(
    config: WandbConfig, paths: RunPaths, run_id: str, resolved: dict[str, Any]
) -> Tracker:
    """Open the W&B run `run_id`; offline needs neither an account nor a network.

    Raises:
        RunError: W&B refuses or can't be reached (mode online).
    """
    if config.mode is WandbMode.disabled:
        return Tracker(None)
    if config.mode is not WandbMode.online:
        # Read when it is imported: else it reports to its makers, whatever the run's mode is.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ.setdefault("WANDB_MODE", config.mode.name)
    import wandb

    try:
        run = wandb.init(
            id=run_id,
            resume="allow",
            mode=config.mode.name,  # type: ignore[arg-type]
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags or None,
            name=paths.root.name,
            dir=str(paths.root),
            config=resolved,
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True
            ),
        )
    except (wandb.Error, OSError) as error:
        raise RunError(
            f"wandb.mode={config.mode}: {' '.join(str(error).split())[:200]}; "
            "log in with `wandb login`, or use wandb.mode=offline"
        ) from error
    return Tracker(run)
