"""mode=sft: cross-entropy, or squared error for a regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from forgelm.config.schema import RunConfig
from forgelm.losses import task_loss
from forgelm.models.tokens import Head, head_of, supervised
from forgelm.tasks.data import TaskData
from forgelm.tasks.encode import TEACHER_PREFIX
from forgelm.training.trainer import Exact


def build(
    config: RunConfig, task: TaskData, teacher: PreTrainedModel | None, parts: dict[str, Any]
) -> FinetuningTrainer:
    """The mode's trainer; see `forgelm.modes.builder`."""
    return FinetuningTrainer(**parts)


class FinetuningTrainer(Exact):
    """The loss is divided by the examples of the whole optimizer step."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Makes the trainer count the examples of an optimizer step, whatever the model's signature.
        self.model_accepts_loss_kwargs = True
        self.head = head_of(self.model)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, its share of the optimizer step's mean."""
        own = {k: v for k, v in inputs.items() if not k.startswith(TEACHER_PREFIX)}
        logits, targets = logits_and_targets(model, self.head, own)
        total = self.combine(inputs, logits, targets, task_loss(logits, targets))
        loss = total / (num_items_in_batch if num_items_in_batch is not None else len(targets))
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            # DDP takes the mean over ranks of what is already a share of the global sum.
            loss = loss * self.args.world_size
        return (loss, {"logits": logits}) if return_outputs else loss

    def combine(
        self, inputs: dict[str, Any], logits: Tensor, targets: Tensor, loss: Tensor
    ) -> Tensor:
        """Where a mode adds its own to the task's loss (a sum over the examples)."""
        return loss


def logits_and_targets(
    model: torch.nn.Module, head: Head, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Logits [examples, outputs] and what they should be [examples]: a row or a token each."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    if labels.dim() == 1:
        return model(**inputs).logits, labels
    return supervised(model, head, inputs, labels)
