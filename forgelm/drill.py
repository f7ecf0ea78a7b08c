"""The proof that a config can be interrupted: run it small, interrupt it, compare bytes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forgelm.config.rewards import round_of
from forgelm.config.schema import (
    Interval,
    LmEvalConfig,
    RlConfig,
    RunConfig,
    SaveInterval,
    WandbMode,
)
from forgelm.errors import (
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_TRAINING_ERROR,
    ForgeError,
    RunError,
)
from forgelm.interrupt import VARIABLE
from forgelm.run.checkpoints import file_hash
from forgelm.run.files import read_json
from forgelm.run.paths import RunPaths

STEPS = 12
_EPOCH = 8
_SAVE_STEPS = 5
_EVAL_ROWS = 48
_TOKENS = 32
_TEACHER_STEPS = 10
_LM_EXAMPLES = 8


@dataclass(frozen=True)
class Case:
    """An interruption: the signal sent at the `count`-th time that a point is come to, to one
    `rank` alone if it is given."""

    title: str
    point: str
    count: int
    signal: str
    rank: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        alone = "" if self.rank is None else f":{self.rank}"
        return {VARIABLE: f"{self.point}:{self.count}:{self.signal}{alone}"}

    def expected(self, ranks: int) -> int:
        """The exit code of the interrupted process, as `waitpid` tells it."""
        if self.signal != "SIGKILL":
            return EXIT_STOPPED
        # Of several processes the first is killed, and the one that watches them says so.
        return -signal.SIGKILL if ranks == 1 else EXIT_TRAINING_ERROR


def cases(config: RunConfig) -> list[Case]:
    """Every kind of interruption that the (small) config can meet."""
    steps = config.max_steps or STEPS
    evaluates = config.training.eval_strategy is not Interval.no
    measures = bool(config.eval.lm_eval.tasks)
    shards = config.training.fsdp
    # A save passes its point three times; in the second save there is a checkpoint to go back to.
    inside = 5 if steps > _SAVE_STEPS else 3
    return [
        Case("data preparation", "preparation", 1, "SIGTERM"),
        Case("evaluation before", "evaluation_before", 1, "SIGTERM"),
        Case("first step", "training", 1, "SIGINT"),
        Case("training", "training", min(4, steps), "SIGTERM"),
        Case("training", "training", min(7, steps), "SIGKILL"),
        *_in_generation(config, steps),
        *([Case("lm-eval before", "lm_eval_before", 1, "SIGTERM")] if measures else []),
        *([Case("evaluation in training", "evaluation", 1, "SIGUSR1")] if evaluates else []),
        Case("second epoch", "training", min(_EPOCH + 1, steps), "SIGUSR2"),
        Case("a save", "save", 2, "SIGTERM"),
        Case("a save", "save", inside, "SIGKILL"),
        # Each rank but the first comes to the point once a save.
        *([Case("rank 1's save", "save", inside // 2, "SIGKILL", 1)] if shards else []),
        *([Case("lm-eval after", "lm_eval", 1, "SIGKILL")] if measures else []),
        Case("finalize", "finalize", 2, "SIGTERM"),
        Case("finalize", "finalize", 1, "SIGKILL"),
    ]


def _in_generation(config: RunConfig, steps: int) -> list[Case]:
    if not isinstance(config.mode, RlConfig):
        return []
    batches = steps * config.training.gradient_accumulation_steps
    rounds = math.ceil(batches / round_of(config).batches)
    return [Case("generation", "generation", min(2, rounds), "SIGTERM")]


@dataclass
class Outcome:
    """What one interruption did. `lost` counts steps done again, `durable` seconds to the exit."""

    case: Case
    lost: int = 0
    durable: float | None = None
    weights: bool = False
    metrics: bool = False
    data: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return self.weights and self.metrics and self.data and not self.problems


Start = Callable[[RunConfig], int]


def small(config: RunConfig, root: Path) -> RunConfig:
    """The config cut to STEPS steps over one and a half epochs, with everything that can happen.

    It logs, saves and evaluates often enough for each to be interrupted, and tracks nothing.
    """
    training = config.training
    batch = (
        training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * config.launch.ranks
    )
    mode, rows = config.mode, _EPOCH * batch
    if isinstance(mode, RlConfig):
        round_ = round_of(config)
        batches = _EPOCH * training.gradient_accumulation_steps
        rows = round_.prompts * max(1, batches // round_.batches)
        mode = replace(mode, max_completion_length=min(mode.max_completion_length, _TOKENS))
    rows = min(config.task.max_train_samples or sys.maxsize, rows)
    held_out = min(config.task.max_eval_samples or sys.maxsize, _EVAL_ROWS)
    evaluates = training.eval_strategy is not Interval.no
    return replace(
        config,
        output_root=str(root),
        run_name="drill",
        max_steps=min(config.max_steps or STEPS, STEPS),
        task=replace(
            config.task,
            max_train_samples=rows,
            max_eval_samples=held_out,
            max_new_tokens=min(config.task.max_new_tokens, _TOKENS),
        ),
        mode=mode,
        eval=replace(config.eval, before_training=True, lm_eval=_few(config.eval.lm_eval)),
        wandb=replace(config.wandb, mode=WandbMode.disabled),
        training=replace(
            training,
            per_device_eval_batch_size=min(training.per_device_eval_batch_size, 16),
            logging_steps=3,
            save_strategy=SaveInterval.steps,
            save_steps=_SAVE_STEPS,
            save_minutes=None,
            save_total_limit=2,
            eval_strategy=Interval.steps if evaluates else Interval.no,
            eval_steps=_SAVE_STEPS + 1 if evaluates else None,
            record_batches=True,
        ),
    )


def _few(asked: LmEvalConfig) -> LmEvalConfig:
    return replace(
        asked, limit=min(asked.limit or _LM_EXAMPLES, _LM_EXAMPLES) if asked.tasks else None
    )


def small_teacher(teacher: RunConfig | None, root: Path) -> RunConfig | None:
    """A teacher for the drill: any will do, so it is trained for a few steps only."""
    if teacher is None:
        return None
    return replace(teacher, output_root=str(root), max_steps=_TEACHER_STEPS)


def drill(start: Start, config: RunConfig, chosen: Sequence[Case]) -> Iterator[Outcome]:
    """Interrupt and resume the (small) config once for each case; `start` runs a config.

    Raises:
        RunError: the uninterrupted run fails itself.
    """
    warm_up()
    if isinstance(config.mode, RlConfig):
        import forgelm.modes.rl  # noqa: F401
    root = Path(config.output_root)
    reference = replace(config, run_name="uninterrupted")
    code = forked(start, reference, root / "uninterrupted.log", {})
    if code != EXIT_OK:
        said = (root / "uninterrupted.log").read_text().strip().splitlines() or ["nothing"]
        raise RunError(
            f"the config fails without being interrupted (exit code {code}): "
            f"{said[-1].removeprefix('forgelm: ')}"
        )
    for number, case in enumerate(chosen):
        yield _interrupted(start, config, case, f"case-{number}", directory(reference))


def directory(config: RunConfig) -> RunPaths:
    """Where a drilled run lies."""
    parts = (config.task.name, config.model.name, config.mode.name, str(config.run_name))
    return RunPaths(Path(config.output_root).joinpath(*parts))


def _interrupted(
    start: Start, config: RunConfig, case: Case, name: str, reference: RunPaths
) -> Outcome:
    config = replace(config, run_name=name)
    paths, outcome = directory(config), Outcome(case)
    log = Path(config.output_root) / f"{name}.log"
    code = forked(start, config, log, case.environment)
    if code == EXIT_OK:
        outcome.problems.append("it ended before it could be interrupted")
        return outcome
    expected = case.expected(config.launch.ranks)
    if code != expected:
        outcome.problems.append(f"exit code {code} instead of {expected}; see {log}")
    begun = _lines(paths.batches(0))
    if case.signal != "SIGKILL":
        outcome.durable = read_json(paths.metadata)["sessions"][-1].get("seconds_to_stop")
    code = forked(start, config, log, {})
    if code != EXIT_OK:
        outcome.problems.append(f"going on ended with exit code {code}; see {log}")
        return outcome
    outcome.lost = max(0, begun - _gone_on_from(paths))
    outcome.weights = not weight_differences(reference, paths)
    outcome.metrics = not record_differences(reference, paths)
    outcome.data = not order_differences(reference, paths)
    return outcome


def _gone_on_from(paths: RunPaths) -> int:
    """The step that the last start went on from."""
    for line in reversed(paths.log.read_text().splitlines()):
        if "going on from checkpoint-" in line:
            return int(line.partition("checkpoint-")[2].split()[0])
    return 0


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def weight_differences(ours: RunPaths, theirs: RunPaths) -> list[str]:
    """Final model files, and tensors of the last checkpoint's optimizer, that differ."""
    from forgelm.training.tensors import load_tree

    found = []
    names = {path.name for run in (ours, theirs) for path in run.root.glob("*.safetensors")}
    for name in sorted(names):
        sides = [run.root / name for run in (ours, theirs)]
        if not all(path.is_file() for path in sides) or len({file_hash(p) for p in sides}) > 1:
            found.append(name)
    last = [run.checkpoints()[0].name for run in (ours, theirs)]
    if last[0] != last[1]:
        return [*found, f"the last checkpoint is {last[1]} instead of {last[0]}"]
    trees = {p.relative_to(ours.root) for p in (ours.root / last[0]).rglob("*.pt")}
    for tree in sorted(trees):
        if not _equal(*(load_tree(run.root / tree) for run in (ours, theirs))):
            found.append(str(tree))
    return found


def _equal(ours: Any, theirs: Any) -> bool:
    import torch

    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return bool(ours == theirs)


def record_differences(ours: RunPaths, theirs: RunPaths) -> list[str]:
    """`metrics.jsonl` (wall time aside) and `eval.json`, where they differ."""
    found = []
    if metric_lines(ours) != metric_lines(theirs):
        found.append(ours.metrics.name)
    if _text(ours.samples) != _text(theirs.samples):
        found.append(ours.samples.name)
    if read_json(ours.eval) != read_json(theirs.eval):
        found.append(ours.eval.name)
    return found


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def metric_lines(paths: RunPaths) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without their wall time."""
    lines = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def order_differences(ours: RunPaths, theirs: RunPaths) -> list[str]:
    """Ranks whose batches differ."""
    files = sorted(path.name for path in ours.root.glob("batches-*.jsonl"))
    return [
        name for name in files if (ours.root / name).read_text() != (theirs.root / name).read_text()
    ]


def warm_up() -> None:
    """Import what every run needs, so that forked ones needn't; touches no device."""
    # Asking for a GPU must not open it: a forked process couldn't use it then.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import forgelm.callbacks
    import forgelm.modes.kd
    import forgelm.tasks.text_classification  # noqa: F401


def forked(start: Start, config: RunConfig, log: Path, environment: dict[str, str]) -> int:
    """Run a config in a process of its own; returns its exit code, or minus the signal's number.

    What it says is appended to `log`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = EXIT_TRAINING_ERROR
        try:
            code = _child(start, config, log, environment)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _child(start: Start, config: RunConfig, log: Path, environment: dict[str, str]) -> int:
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for name in [VARIABLE, *(name for name in os.environ if name.startswith("SLURM_"))]:
        # Interrupted by itself and not by Slurm, whose job isn't to be requeued.
        os.environ.pop(name, None)
    os.environ.update(environment)
    try:
        return start(config)
    except ForgeError as error:
        print(f"forgelm: {error}", flush=True)
        return error.exit_code
    except BaseException:
        import traceback

        traceback.print_exc()
        return EXIT_TRAINING_ERROR
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@contextmanager
def workplace(output_root: Path) -> Iterator[Path]:
    """A folder for drilled runs; kept for looking into when something doesn't hold."""
    place = output_root / ".forgelm"
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=place, prefix=f"drill-{time.strftime('%Y%m%d-%H%M%S')}-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
