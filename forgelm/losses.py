"""Losses of fine-tuning and distillation, summed over examples so that the caller divides by the
number of examples of the whole optimizer step: exact under gradient accumulation and for a last,
smaller batch.

All take logits [batch, outputs] in any precision and compute in float32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for int64 labels [batch]; squared error for float labels, outputs = 1.

    Returns the sum over the batch, a scalar.
    """
    logits = logits.float()
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum")


def distillation_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`, summed over the batch.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network": T^2 keeps the
    gradient's size when T changes.
    """
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)


def distillation_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the logits, mean over outputs, summed over the batch.

    Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?".
    """
    return F.mse_loss(student.float(), teacher.float(), reduction="none").mean(dim=-1).sum()
