"""Weights & Biases: one id over all restarts, files inside the run directory."""

from __future__ import annotations

import os
from typing import Any

from forgelm.config.schema import WandbConfig, WandbMode
from forgelm.errors import RunError
from forgelm.run.paths import RunPaths


class Tracker:
    """Where logged values go besides `metrics.jsonl`. Does nothing when W&B is disabled."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, step: int, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log(values, step=step)

    def summarize(self, values: dict[str, Any]) -> None:
        """Values of the whole run: the evaluations, the metadata."""
        if self._run is not None:
            self._run.summary.update(values)

    def preempting(self) -> None:
        """Say that this run was stopped and will be gone on with."""
        if self._run is not None:
            self._run.mark_preempting()

    def finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None


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
