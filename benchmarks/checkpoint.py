"""What saving costs, against Hugging Face's Trainer on the same model, in one process.

stall            steps' worth of time that one save takes from training (stock: in place)
overhead         share of the time that saving takes at the default interval
signal           from SIGTERM to a durable checkpoint, against one step and one save
late resume      until the first step, from a late checkpoint against an early one
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# 19 million parameters: 76 MB of weights, three times as much with the optimizer.
MODEL = (
    "model.tiny.hidden_size=512",
    "model.tiny.num_hidden_layers=6",
    "model.tiny.num_attention_heads=8",
    "model.tiny.intermediate_size=2048",
    "training.per_device_train_batch_size=8",
    "training.eval_strategy=no",
    "training.logging_steps=1000",
)
EVERY = 20
SAVES = 11
# The first ones: until old checkpoints are rotated out, each takes new memory for its files.
BEGINNING = 3
LATE = 3000


def stalls(ends: list[float], first: int, every: int) -> list[float]:
    """Time that each save took from training, in steps; step `first` is the first that saves.

    What the first half of the steps after a save took beyond as many of the second half, when
    nothing is being written any more.
    """
    steps = [after - before for before, after in itertools.pairwise(ends)]
    found, half = [], every // 2
    for save in range(first, len(steps) - every + 1, every):
        window = steps[save - 1 : save - 1 + every]
        plain = statistics.mean(window[half : 2 * half])
        found.append((sum(window[:half]) - half * plain) / plain)
    return found


def stall(folder: Path) -> bool:
    from common import Clock, compose, training
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    steps = EVERY * (SAVES + 1)
    config = compose(folder, *MODEL, f"max_steps={steps}", f"training.save_steps={EVERY}")
    with training(config) as opened:
        student = copy.deepcopy(opened.models.student)
        clock = Clock()
        opened.trainer.add_callback(clock)
        opened.trainer.go_on(None)
        ours = stalls(clock.ends, EVERY, EVERY)[BEGINNING:]
        arguments = TrainingArguments(
            output_dir=str(folder / "stock"),
            max_steps=steps,
            save_steps=EVERY,
            save_total_limit=2,
            per_device_train_batch_size=config.training.per_device_train_batch_size,
            remove_unused_columns=False,
            logging_steps=1000,
            disable_tqdm=True,
            report_to="none",
            use_cpu=opened.trainer.args.use_cpu,
        )
        trainer = Trainer(
            model=student,
            args=arguments,
            train_dataset=opened.task.train,
            data_collator=opened.task.collator,
        )
        trainer.remove_callback(PrinterCallback)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        stock = stalls(clock.ends, EVERY, EVERY)[BEGINNING:]
    show("one save, stock Trainer, steps", stock, None)
    return show("one save, forgelm, steps", ours, 0.7)


def overhead(folder: Path) -> bool:
    """At the default interval, over the time that two saves take to fall due."""
    from common import Clock, compose, training

    config = compose(folder, *MODEL, "max_steps=100000", "run_name=overhead")
    with training(config) as opened:
        clock, saved = Clock(), []
        trainer = opened.trainer
        trainer.add_callback(clock)
        noted = trainer._save_checkpoint

        def noting(*args: Any) -> None:
            saved.append(len(clock.ends))
            noted(*args)
            if len(saved) == 3:
                trainer.control.should_training_stop = True

        trainer._save_checkpoint = noting
        trainer.go_on(None)
    every = saved[1] - saved[0]
    shares = [lost / every for lost in stalls(clock.ends, saved[0], every)]
    print(f"{'':4}the default interval was {every} steps here")
    return show("share of time spent on saving, default interval", shares, 0.02)


def signalled(folder: Path) -> bool:
    """SIGTERM in the middle of a step, several times."""
    from common import Clock, compose, training

    from forgelm import stop

    ratios = []
    for turn in range(4):
        config = compose(folder, *MODEL, "max_steps=1000", f"run_name=signal-{turn}")
        with training(config) as opened, stop.listening():
            clock, trainer = Clock(), opened.trainer
            trainer.add_callback(clock)
            compute, sent = trainer.compute_loss, []

            def computing(
                *args: Any,
                compute: Any = compute,
                sent: Any = sent,
                clock: Any = clock,
                **kwargs: Any,
            ) -> Any:
                if len(clock.ends) == 6 and not sent:
                    sent.append(time.perf_counter())
                    os.kill(os.getpid(), signal.SIGTERM)
                return compute(*args, **kwargs)

            trainer.compute_loss = computing
            trainer.go_on(None)
            took = time.perf_counter() - sent[0]
            step = statistics.median(clock.steps())
            ratios.append(took / (step + trainer._writer.cost.total))
        shutil.rmtree(folder / "nli_mini")
    return show("SIGTERM to durable / (a step + a save)", ratios, 1.0)


def late_resume(folder: Path) -> bool:
    """Until the end of the first step, from checkpoints of one run."""
    from common import Clock, compose, training

    small = ["training.eval_strategy=no", "training.per_device_train_batch_size=1"]
    small += ["training.logging_steps=1", "model.tiny.hidden_size=16", f"max_steps={LATE + 10}"]
    config = compose(
        folder, *small, f"training.save_steps={LATE // 100}", "training.save_total_limit=null"
    )
    with training(config) as opened:
        opened.trainer.go_on(None)
        paths = opened.run.paths

    class OneStep(Clock):
        """Ends the training after its first step."""

        def __init__(self, trainer: Any) -> None:
            super().__init__()
            self.trainer = trainer

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end()
            self.trainer.control.should_training_stop = True

    def until_first_step(step: int) -> float:
        with training(config) as opened:
            clock = OneStep(opened.trainer)
            opened.trainer.add_callback(clock)
            began = time.perf_counter()
            opened.trainer.go_on(paths.checkpoint(step))
            return clock.ends[0] - began

    early, late = LATE // 100, LATE
    until_first_step(early)
    ratios = []
    for turn in range(10):
        order = (early, late) if turn % 2 else (late, early)
        taken = {step: until_first_step(step) for step in order}
        ratios.append(taken[late] / taken[early])
    return show(f"until the first step, from step {late} / {early}", ratios, 1.05)


def show(name: str, values: list[float], limit: float | None) -> bool:
    """Print the median; whether it keeps within the limit."""
    middle = statistics.median(values)
    wanted = "" if limit is None else f"at most {limit:g}; "
    print(
        f"{name:<52} {middle:5.3f}  ({wanted}{len(values)} measured, "
        f"{min(values):.3f} to {max(values):.3f})",
        flush=True,
    )
    return limit is None or middle <= limit


PARTS = {"stall": stall, "overhead": overhead, "signal": signalled, "late-resume": late_resume}


def main(parts: list[str]) -> int:
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        print(f"{unknown[0]}: no such part; one of {', '.join(PARTS)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ["HF_HOME"] = str(Path(folder) / "hf")
        kept = [PARTS[part](Path(folder)) for part in parts or PARTS]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
