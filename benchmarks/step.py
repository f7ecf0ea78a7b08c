"""Time of a training step: forgelm's trainer with all its callbacks, against the stock Trainer.

Both train copies of one model on the same rows in one process, in turn, a hundred steps at a time.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

LIMIT = 1.02
STEPS = 100


def main(pairs: int) -> int:
    from common import Clock, compose, training
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from forgelm.callbacks import Progress, StepMetrics, TeacherPeak
    from forgelm.run.tracking import Tracker

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = compose(
            folder, f"max_steps={STEPS}", "training.save_strategy=no", "training.eval_strategy=no"
        )

        def ours() -> float:
            shutil.rmtree(folder / "nli_mini", ignore_errors=True)
            with training(config) as opened:
                trainer, clock = opened.trainer, Clock()
                trainer.add_callback(StepMetrics(opened.run.paths.metrics, Tracker(None), 0))
                trainer.add_callback(TeacherPeak(config.task, {}, None))
                trainer.add_callback(Progress())
                trainer.add_callback(clock)
                trainer.go_on(None)
            return statistics.mean(clock.steps())

        def stock() -> float:
            shutil.rmtree(folder / "nli_mini", ignore_errors=True)
            with training(config) as opened:
                kept = opened.trainer.args
                trainer = Trainer(
                    model=opened.models.student,
                    args=TrainingArguments(
                        output_dir=str(folder / "stock"),
                        max_steps=STEPS,
                        per_device_train_batch_size=kept.per_device_train_batch_size,
                        learning_rate=kept.learning_rate,
                        weight_decay=kept.weight_decay,
                        warmup_steps=kept.warmup_steps,
                        logging_steps=kept.logging_steps,
                        use_cpu=kept.use_cpu,
                        save_strategy="no",
                        remove_unused_columns=False,
                        disable_tqdm=True,
                        report_to="none",
                    ),
                    train_dataset=opened.task.train,
                    data_collator=opened.task.collator,
                )
                trainer.remove_callback(PrinterCallback)
                clock = Clock()
                trainer.add_callback(clock)
                trainer.train()
            return statistics.mean(clock.steps())

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
