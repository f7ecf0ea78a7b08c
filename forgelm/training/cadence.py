"""When a step is followed by a log line, an evaluation or a save."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from forgelm.config.schema import Interval, SaveInterval, TrainingConfig

# `auto` saves no more often than this: a checkpoint every second would wear out a shared disk.
AUTO_LEAST_S = 30.0
_DEFAULT_STEPS = 500


@dataclass(frozen=True)
class Due:
    """What follows a step."""

    log: bool
    evaluate: bool
    save: bool


class Cadence:
    """What is due after a step of a training of `target` steps, `per_epoch` each epoch.

    `per_epoch` is None for data without an end.
    """

    def __init__(self, training: TrainingConfig, target: int, per_epoch: int | None) -> None:
        self.training = training
        self.target = target
        self.per_epoch = per_epoch
        self.strategy = save_strategy(training)
        self._saved_at = time.monotonic()

    def after(self, step: int) -> Due:
        """What is due by the number of the step. The last one is always saved."""
        training, last = self.training, step >= self.target
        return Due(
            log=step % training.logging_steps == 0 or (step == 1 and training.logging_first_step),
            evaluate=self._evaluates(step, last),
            save=last or self._saves(step),
        )

    def _evaluates(self, step: int, last: bool) -> bool:
        strategy = self.training.eval_strategy
        if strategy is Interval.no:
            return False
        if strategy is Interval.steps:
            return last or step % int(self.training.eval_steps or 1) == 0
        return last or self._epoch_ends(step)

    def _saves(self, step: int) -> bool:
        if self.strategy is SaveInterval.steps:
            return step % (self.training.save_steps or _DEFAULT_STEPS) == 0
        return self.strategy is SaveInterval.epoch and self._epoch_ends(step)

    def _epoch_ends(self, step: int) -> bool:
        return self.per_epoch is not None and step % self.per_epoch == 0

    def overdue(self, price: float) -> bool:
        """Whether a save is due by the clock; `price` is what the last one cost, in seconds."""
        return time.monotonic() - self._saved_at >= self._seconds(price)

    def _seconds(self, price: float) -> float:
        if self.strategy is SaveInterval.minutes:
            return 60 * float(self.training.save_minutes or math.inf)
        if self.strategy is SaveInterval.auto:
            return max(AUTO_LEAST_S, price / self.training.save_overhead)
        return math.inf

    def saved(self) -> None:
        self._saved_at = time.monotonic()


def save_strategy(training: TrainingConfig) -> SaveInterval:
    """The strategy that was asked for, or that the given interval means."""
    if training.save_strategy is not None:
        return training.save_strategy
    if training.save_steps is not None:
        return SaveInterval.steps
    return SaveInterval.auto if training.save_minutes is None else SaveInterval.minutes
