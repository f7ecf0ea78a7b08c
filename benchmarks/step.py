"""Time of a training step: forgelm's trainer with all its callbacks, against the stock Trainer.

Both train copies of one model on the same rows in one process, in turn, a hundred steps at a time.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT = 1.02
STEPS = 100


def main(pairs: int) -> int:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from forgelm.callbacks import CheckpointMarker, Progress, StepMetrics, TeacherPeak
    from forgelm.config.compose import Request, to_typed
    from forgelm.evaluate import metrics_function
    from forgelm.log import quiet_libraries
    from forgelm.models.load import load_student, load_tokenizer
    from forgelm.modes.arguments import training_arguments
    from forgelm.modes.sft import FinetuningTrainer
    from forgelm.resolve import resolve
    from forgelm.run.lifecycle import opened
    from forgelm.run.tracking import Tracker
    from forgelm.tasks.prepare import prepare
    from forgelm.tasks.rows import load_rows

    quiet_libraries()

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Seconds of each step but the first."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

        def seconds(self) -> float:
            return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    with tempfile.TemporaryDirectory() as folder:
        words = [f"max_steps={STEPS}", f"output_root={folder}", "training.save_strategy=no"]
        config = to_typed(Request().compose([*words, "training.eval_strategy=no"]))
        rows = load_rows(config.task, None)
        tokenizer = load_tokenizer(config.model, None)
        task = prepare(config.task, rows, tokenizer, None, None)
        student = load_student(config.model, None, tokenizer, rows.labels)
        plan = resolve(config, words, False, None)

        def run(kind: type, ours: bool) -> float:
            with opened(plan.paths, plan.config, plan.digest, words) as open_run:
                trainer = kind(
                    model=copy.deepcopy(student),
                    args=training_arguments(
                        config, Path(folder), "eval_validation_matched_accuracy"
                    ),
                    train_dataset=task.train,
                    eval_dataset=task.eval,
                    data_collator=task.collator,
                    compute_metrics=metrics_function(config.task.metrics, False),
                )
                trainer.remove_callback(PrinterCallback)
                if ours:
                    trainer.add_callback(StepMetrics(plan.paths.metrics, Tracker(None), 0))
                    trainer.add_callback(CheckpointMarker(open_run))
                    trainer.add_callback(TeacherPeak(config.task, {}, None))
                    trainer.add_callback(Progress())
                clock = Clock()
                trainer.add_callback(clock)
                trainer.train()
                return clock.seconds()

        def ours() -> float:
            return run(FinetuningTrainer, True)

        def stock() -> float:
            return run(Trainer, False)

        ours(), stock()
        # The order alternates, so that a drift of the machine's speed falls on both alike.
        measured = []
        for pair in range(2 * pairs):
            first, second = (ours, stock) if pair % 2 else (stock, ours)
            a, b = first(), second()
            measured.append(a / b if pair % 2 else b / a)
    middle = statistics.median(measured)
    print(
        f"{'training step / stock Trainer':<52} {middle:5.2f}  (at most {LIMIT:g}; "
        f"{len(measured)} pairs, {min(measured):.2f} to {max(measured):.2f})",
        flush=True,
    )
    return 0 if middle <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
