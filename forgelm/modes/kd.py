"""mode=kd: `(1 - alpha) * CE + alpha * T^2 * KL(teacher || student)`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from forgelm.config.schema import DistillationLoss, KdConfig
from forgelm.losses import distillation_kl, distillation_mse
from forgelm.modes.sft import FinetuningTrainer, student_inputs
from forgelm.tasks.encode import TEACHER_PREFIX


class DistillationTrainer(FinetuningTrainer):
    """Adds the teacher's part to the loss in training; evaluation is the task's loss alone.

    Without a teacher (alpha 0) it is FinetuningTrainer, bit for bit.
    """

    def __init__(
        self, *args: Any, mode: KdConfig, teacher: PreTrainedModel | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mode = mode
        self.teacher = teacher
        if teacher is not None:
            teacher.to(self.args.device)

    def combine(
        self, model: torch.nn.Module, inputs: dict[str, Any], outputs: Any, loss: torch.Tensor
    ) -> torch.Tensor:
        """`(1 - alpha) * loss + alpha * distillation`, both sums over the batch."""
        if self.teacher is None or not model.training:
            return loss
        wanted = self._teacher_logits(self.teacher, inputs)
        alpha = self.mode.alpha
        return (1 - alpha) * loss + alpha * self._distance(outputs.logits, wanted, inputs)

    def _teacher_logits(self, teacher: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """The teacher's logits [batch, outputs] in the order of the task's labels.

        A batch without columns of the teacher's own means that it reads what the student reads.
        """
        own = {
            key.removeprefix(TEACHER_PREFIX): value
            for key, value in inputs.items()
            if key.startswith(TEACHER_PREFIX)
        } or student_inputs(inputs)
        device = self.args.device.type
        # The trainer's autocast would overrule the precision that the config gives the teacher.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            logits: torch.Tensor = teacher(**own).logits
        return logits

    def _distance(
        self, student: torch.Tensor, teacher: torch.Tensor, inputs: dict[str, Any]
    ) -> torch.Tensor:
        regression = inputs["labels"].is_floating_point()
        if self.mode.loss is DistillationLoss.mse or regression:
            return distillation_mse(student, teacher)
        return distillation_kl(student, teacher, self.mode.temperature)
