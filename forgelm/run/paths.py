"""Every path of a run and of an output root, named once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import forgelm
from forgelm.run.files import HALF_WRITTEN

CHECKPOINT_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class RunPaths:
    """The files of one run directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metadata(self) -> Path:
        return self.root / "run_metadata.json"

    @property
    def state(self) -> Path:
        return self.root / "training_state.json"

    @property
    def latest_checkpoint(self) -> Path:
        return self.root / "latest_checkpoint"

    @property
    def log(self) -> Path:
        return self.root / "output.log"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    def batches(self, rank: int) -> Path:
        return self.root / f"batches-{rank}.jsonl"

    @property
    def eval(self) -> Path:
        return self.root / "eval.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    def checkpoint(self, step: int) -> Path:
        return self.root / f"{CHECKPOINT_PREFIX}{step}"

    def marked(self) -> str | None:
        """The checkpoint that `latest_checkpoint` names."""
        if not self.latest_checkpoint.is_file():
            return None
        return self.latest_checkpoint.read_text(encoding="utf-8").strip()

    @property
    def spare(self) -> Path:
        """A checkpoint that was rotated out, kept while training goes on: see write_checkpoint."""
        return self.root / f".spare{HALF_WRITTEN}"

    def leftovers(self) -> list[Path]:
        """What a killed process may have left half-written or half-deleted."""
        patterns = (f".*{HALF_WRITTEN}", ".final-*")
        return [path for pattern in patterns for path in self.root.glob(pattern)]

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, the newest step first."""
        found = [
            path
            for path in self.root.glob(f"{CHECKPOINT_PREFIX}*")
            if path.name.removeprefix(CHECKPOINT_PREFIX).isdecimal()
        ]
        return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """The optimizer step that a checkpoint folder is named after."""
    return int(path.name.removeprefix(CHECKPOINT_PREFIX))


@dataclass(frozen=True)
class OutputRoot:
    """What lies beside the runs of one output root."""

    root: Path
    CODE: ClassVar[tuple[str, str]] = (".forgelm", "code")

    def run(self, task: str, model: str, mode: str, run_name: str) -> RunPaths:
        return RunPaths(self.root / task / model / mode / run_name)

    @property
    def register(self) -> Path:
        return self.root / ".forgelm" / "incomplete"

    @property
    def code(self) -> Path:
        """The code of submitted runs, a folder for each content."""
        return self.root.joinpath(*self.CODE)

    @property
    def submissions(self) -> Path:
        """A folder for each submission: its script, its runs, what its processes said."""
        return self.root / ".forgelm" / "submissions"


def sealed_name() -> str | None:
    """The name of the sealed code that this process runs; None: it runs what is installed."""
    parts = Path(forgelm.__file__).parts
    return parts[-3] if parts[-5:-3] == OutputRoot.CODE else None
