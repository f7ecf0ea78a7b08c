"""mode=sft: cross-entropy, or squared error for a regression."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from forgelm.losses import task_loss


class FinetuningTrainer(Trainer):
    """Hugging Face's Trainer with the loss divided by the examples of the whole optimizer step."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, keep_best: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Makes the trainer count the examples of an optimizer step, whatever the model's signature.
        self.model_accepts_loss_kwargs = True
        self.keep_best = keep_best

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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A new best is saved at once, so that the saving cadence doesn't decide which is best."""
        best: bool = super()._determine_best_metric(metrics, trial)
        if best and self.keep_best:
            self.control.should_save = True
        return best


def student_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the student's forward pass takes of a batch."""
    return {k: v for k, v in inputs.items() if k != "labels" and not k.startswith("teacher_")}
