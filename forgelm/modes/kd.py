"""mode=kd: `(1 - alpha) * CE + alpha * T^2 * divergence(teacher, student)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from forgelm.config.schema import DistillationLoss, KdConfig, RunConfig
from forgelm.errors import RunError
from forgelm.losses import (
    distillation_jsd,
    distillation_kl,
    distillation_mse,
    distillation_reverse_kl,
)
from forgelm.models.tokens import head_of
from forgelm.modes.sft import FinetuningTrainer, logits_and_targets
from forgelm.tasks.data import TaskData
from forgelm.tasks.encode import TEACHER_PREFIX


def build(
    config: RunConfig, task: TaskData, teacher: PreTrainedModel | None, parts: dict[str, Any]
) -> DistillationTrainer:
    """The mode's trainer; see `forgelm.modes.builder`."""
    return DistillationTrainer(**parts, mode=config.mode, teacher=teacher)


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
            self.teacher_head = head_of(teacher)

    def combine(
        self, inputs: dict[str, Any], logits: Tensor, targets: Tensor, loss: Tensor
    ) -> Tensor:
        """`(1 - alpha) * loss + alpha * distillation`, both sums over the examples."""
        if self.teacher is None:
            return loss
        wanted = self._teacher_logits(self.teacher, inputs, targets)
        alpha = self.mode.alpha
        return (1 - alpha) * loss + alpha * self._distance(logits, wanted, targets)

    def _teacher_logits(
        self, teacher: PreTrainedModel, inputs: dict[str, Any], targets: Tensor
    ) -> Tensor:
        """The teacher's logits [examples, outputs], for the same examples in the same order.

        A batch without columns of the teacher's own means that it reads what the student reads.
        """
        own = {
            key.removeprefix(TEACHER_PREFIX): value
            for key, value in inputs.items()
            if key.startswith(TEACHER_PREFIX)
        } or inputs
        device = self.args.device.type
        # The trainer's autocast would overrule the precision that the config gives the teacher.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            logits, theirs = logits_and_targets(
                teacher, self.teacher_head, {"labels": inputs["labels"], **own}
            )
        if not torch.equal(theirs, targets):
            raise RunError(
                "the teacher's supervised tokens aren't the student's in this batch: their "
                "tokenizers or templates differ; choose a teacher of the same family"
            )
        return logits

    def _distance(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        mode = self.mode
        # Families pad their vocabularies to different lengths; no token stands in the padding.
        shared = min(student.shape[-1], teacher.shape[-1])
        student, teacher = student[..., :shared], teacher[..., :shared]
        if mode.loss is DistillationLoss.mse or targets.is_floating_point():
            return distillation_mse(student, teacher)
        if mode.loss is DistillationLoss.reverse_kl:
            return distillation_reverse_kl(student, teacher, mode.temperature)
        if mode.loss is DistillationLoss.jsd:
            return distillation_jsd(student, teacher, mode.temperature, mode.beta)
        return distillation_kl(student, teacher, mode.temperature)
