"""Losses of fine-tuning and distillation, summed over examples (rows, or supervised tokens) so that
the caller divides by the number of examples of the whole optimizer step: exact under gradient
accumulation, for a last, smaller batch, and for one in which nothing is supervised.

All take logits [examples, outputs] in any precision and compute in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for int64 labels [examples]; squared error for float labels, outputs = 1.

    Returns the sum over the examples, a scalar.
    """
    logits = logits.float()
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum")


def distillation_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`, summed over the examples.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network": T^2 keeps the
    gradient's size when T changes.
    """
    ours, theirs = _log_softmax(student, teacher, temperature)
    return temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)


def distillation_reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(softmax(student / T) || softmax(teacher / T))`, summed over the examples.

    Gu et al. 2024, "MiniLLM": the student keeps to what the teacher finds likely.
    """
    ours, theirs = _log_softmax(student, teacher, temperature)
    return temperature**2 * F.kl_div(theirs, ours, reduction="sum", log_target=True)


def distillation_jsd(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    """`T^2 * (beta * KL(p || m) + (1 - beta) * KL(q || m))`, `m = beta * p + (1 - beta) * q`,
    p the teacher's and q the student's distribution at temperature T, summed over the examples.

    The generalised Jensen-Shannon divergence of Agarwal et al. 2024, "On-Policy Distillation of
    Language Models", eq. 1.
    """
    ours, theirs = _log_softmax(student, teacher, temperature)
    parts = torch.stack([theirs + math.log(beta), ours + math.log(1 - beta)])
    mixture = torch.logsumexp(parts, dim=0)
    from_teacher = F.kl_div(mixture, theirs, reduction="sum", log_target=True)
    from_student = F.kl_div(mixture, ours, reduction="sum", log_target=True)
    return temperature**2 * (beta * from_teacher + (1 - beta) * from_student)


def distillation_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the logits, mean over outputs, summed over the examples.

    Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?".
    """
    return F.mse_loss(student.float(), teacher.float(), reduction="none").mean(dim=-1).sum()


def _log_softmax(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=-1)
    return ours, theirs
