"""mode=sft: cross-entropy, or squared error for a regression."""

from __future__ import annotations

from typing import Any

import torch

from forgelm.losses import task_loss
from forgelm.training.trainer import Exact


class FinetuningTrainer(Exact):
    """The loss is divided by the examples of the whole optimizer step."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Makes the trainer count the examples of an optimizer step, whatever the model's signature.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, its share of the optimizer step's mean."""
        labels = inputs["labels"]
        outputs = model(**student_inputs(inputs))
        total = self.combine(model, inputs, outputs, task_loss(outputs.logits, labels))
        loss = total / (num_items_in_batch if num_items_in_batch is not None else len(labels))
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            # DDP takes the mean over ranks of what is already a share of the global sum.
            loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def combine(
        self, model: torch.nn.Module, inputs: dict[str, Any], outputs: Any, loss: torch.Tensor
    ) -> torch.Tensor:
        """Where a mode adds its own to the task's loss (a sum over the batch)."""
        return loss


def student_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the student's forward pass takes of a batch."""
    return {k: v for k, v in inputs.items() if k != "labels" and not k.startswith("teacher_")}
