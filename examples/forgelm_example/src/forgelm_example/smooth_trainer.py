"""The trainer of mode=smooth: forgelm's own for cross-entropy, with another loss."""

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from forgelm.config.schema import Problem, RunConfig
from forgelm.errors import ConfigError
from forgelm.modes.sft import FinetuningTrainer
from forgelm.tasks.data import TaskData


def build(
    config: RunConfig, task: TaskData, teacher: PreTrainedModel | None, parts: dict[str, Any]
) -> "SmoothTrainer":
    """The trainer of a run; `parts` are the arguments that don't depend on the mode."""
    if config.task.problem is Problem.regression:
        raise ConfigError(
            "mode=smooth with task.problem=regression: there are no labels to smooth; use mode=sft"
        )
    return SmoothTrainer(**parts, smoothing=config.mode.smoothing)


class SmoothTrainer(FinetuningTrainer):
    """Smooths the targets in training; evaluation is the task's loss alone."""

    def __init__(self, *args: Any, smoothing: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.smoothing = smoothing

    def combine(
        self, inputs: dict[str, Any], logits: Tensor, targets: Tensor, loss: Tensor
    ) -> Tensor:
        """The sum over the examples: `logits` is [examples, outputs], `targets` [examples]."""
        return cross_entropy(
            logits.float(), targets, reduction="sum", label_smoothing=self.smoothing
        )
