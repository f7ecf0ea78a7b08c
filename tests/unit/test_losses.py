"""Losses against closed forms and float64 references."""

from __future__ import annotations

import math

import pytest
import torch

from forgelm.losses import (
    distillation_jsd,
    distillation_kl,
    distillation_mse,
    distillation_reverse_kl,
    task_loss,
)

LOSSES = {
    "task": lambda s, t, y: task_loss(s, y),
    "kl": lambda s, t, y: distillation_kl(s, t, 2.0),
    "reverse_kl": lambda s, t, y: distillation_reverse_kl(s, t, 2.0),
    "jsd": lambda s, t, y: distillation_jsd(s, t, 2.0, 0.3),
    "mse": lambda s, t, y: distillation_mse(s, t),
}


def test_kl_of_two_classes_has_a_closed_form() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0) * 2, 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation_kl(student, teacher, 2.0).item() == pytest.approx(4 * expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_kl_equals_a_float64_reference(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 5, generator=generator)
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum()
    assert distillation_kl(student, teacher, temperature).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_reverse_kl_of_two_classes_has_a_closed_form() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0) * 2, 0.0]])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    loss = distillation_reverse_kl(student, teacher, 2.0)
    assert loss.item() == pytest.approx(4 * expected, rel=1e-6)


def test_jsd_of_opposite_certainties_is_the_entropy_of_the_mixture() -> None:
    student, teacher = torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]])
    for beta in (0.1, 0.5, 0.7):
        expected = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        loss = distillation_jsd(student, teacher, 1.0, beta)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_jsd_and_reverse_kl_equal_a_float64_reference(temperature: float, beta: float) -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 7, 50, generator=generator) * 3
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    m = beta * p + (1 - beta) * q
    jsd = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    assert distillation_jsd(student, teacher, temperature, beta).item() == pytest.approx(
        temperature**2 * jsd.item(), rel=1e-4
    )
    assert distillation_reverse_kl(student, teacher, temperature).item() == pytest.approx(
        temperature**2 * (q * (q / p).log()).sum().item(), rel=1e-4
    )


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
def test_a_small_weight_of_either_side_gives_its_kl(name: str) -> None:
    """As beta goes to 0 the divergence, over beta, becomes forward KL; at 1 the reverse one."""
    generator = torch.Generator().manual_seed(6)
    student, teacher = torch.randn(2, 4, 6, generator=generator).double()
    expected, beta = {
        "kl": (distillation_kl(student, teacher, 1.0), 1e-3),
        "reverse_kl": (distillation_reverse_kl(student, teacher, 1.0), 1 - 1e-3),
        "jsd": (2 * distillation_jsd(teacher, student, 1.0, 0.5), 0.5),
    }[name]
    found = distillation_jsd(student, teacher, 1.0, beta) / min(beta, 1 - beta)
    assert found.item() == pytest.approx(expected.item(), rel=2e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_without_examples_the_loss_and_its_gradient_are_nothing(name: str) -> None:
    student = torch.zeros(0, 9, requires_grad=True)
    loss = LOSSES[name](student, torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.shape == (0, 9)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
def test_divergences_have_their_minimum_at_the_teacher(name: str) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    student = logits.clone().requires_grad_()
    loss = LOSSES[name](student, logits, None)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max().item() < 1e-6


def test_gradient_keeps_its_size_when_the_temperature_rises() -> None:
    """The point of the factor T^2: for small logits the gradient doesn't shrink with T."""
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.02, -0.01, 0.0]])
    sizes = []
    for temperature in (1.0, 10.0):
        moving = student.clone().requires_grad_()
        distillation_kl(moving, teacher, temperature).backward()
        assert moving.grad is not None
        sizes.append(moving.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_float32(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    loss = distillation_kl(student, teacher, 2.0)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(
        distillation_kl(student.double(), teacher.double(), 2.0).item(), rel=1e-5
    )


def test_mse_is_a_mean_over_outputs_and_a_sum_over_the_batch() -> None:
    student, teacher = (
        torch.tensor([[1.0, 3.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [2.0, 4.0]]),
    )
    assert distillation_mse(student, teacher).item() == pytest.approx((1 + 9) / 2 + (4 + 16) / 2)


def test_task_loss_takes_classes_or_scores() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    expected = math.log(1 + math.exp(-2)) + math.log(2)
    assert task_loss(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-6)
    scores = torch.tensor([[1.0], [4.0]])
    assert task_loss(scores, torch.tensor([3.0, 4.5])).item() == pytest.approx(4.25)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """What gradient accumulation and a last, smaller batch rest on."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 10, 4, generator=generator)
    labels = torch.arange(10) % 4
    for loss in LOSSES.values():
        whole = loss(student, teacher, labels)
        parts = sum(
            loss(student[i:j], teacher[i:j], labels[i:j]) for i, j in ((0, 4), (4, 8), (8, 10))
        )
        assert whole.item() == pytest.approx(float(parts), rel=1e-5)
