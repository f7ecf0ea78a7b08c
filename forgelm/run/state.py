"""`training_state.json`: where a run stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from forgelm.run.files import read_json, write_json
from forgelm.run.paths import RunPaths


class Status(StrEnum):
    created = "created"
    submitted = "submitted"
    running = "running"
    preempted = "preempted"
    failed = "failed"
    cancelled = "cancelled"
    complete = "complete"


class Stage(StrEnum):
    """The parts of a run, in their order; a finished part is not done again."""

    setup = "setup"
    evaluation_before = "evaluation_before"
    training = "training"
    finalize = "finalize"
    done = "done"


@dataclass
class TrainingState:
    """`step` and `target` count optimizer steps; `restarts` how often the run was gone on with."""

    status: Status = Status.created
    pipeline_complete: bool = False
    stage: Stage = Stage.setup
    step: int = 0
    target: int | None = None
    latest_checkpoint: str | None = None
    restarts: int = 0

    def save(self, paths: RunPaths) -> None:
        write_json(paths.state, asdict(self))


def load_state(paths: RunPaths) -> TrainingState | None:
    """The state of a run, or None where there is none yet."""
    if not paths.state.is_file():
        return None
    data = read_json(paths.state)
    return TrainingState(
        **{**data, "status": Status(data["status"]), "stage": Stage(data["stage"])}
    )
