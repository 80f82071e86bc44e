from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import paired_cosine_distances
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from fluxloop.losses import dino_loss, distillation_loss, negative_cosine
from toys import doubles

sizes = st.integers(1, 5)
seeds = st.integers(0, 999)
FEW = settings(max_examples=25, deadline=None)


def assert_same_with_gradient(
    found: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], student: Tensor
) -> None:
    """Compare two functions of what a student gives: their values, and their gradients."""
    student = student.clone().requires_grad_()
    a, b = found(student), expected(student)
    assert a.shape == ()
    torch.testing.assert_close(a, b)
    (one,), (other,) = torch.autograd.grad(a, student), torch.autograd.grad(b, student)
    torch.testing.assert_close(one, other)


# Negative cosine


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


@FEW
@given(n=sizes, d=sizes, seed=seeds)
def test_negative_cosine_equals_minus_the_mean_cosine_of_each_pair(n: int, d: int, seed: int) -> None:
    targets = doubles(seed + 1, n, d)
    assert_same_with_gradient(
        lambda p: negative_cosine(p, targets),
        lambda p: -sum(cosine(a, b) for a, b in zip(p, targets, strict=True)) / n,
        doubles(seed, n, d),
    )


def test_negative_cosine_agrees_with_scikit_learn() -> None:
    p, z = doubles(0, 9, 4), doubles(1, 9, 4)
    expected = (paired_cosine_distances(p.numpy(), z.numpy()) - 1).mean()
    assert negative_cosine(p, z).item() == pytest.approx(expected)


def test_twice_the_negative_cosine_plus_two_is_byols_squared_distance() -> None:
    p, z = doubles(0, 9, 4), doubles(1, 9, 4)
    unit_p, unit_z = (t / t.norm(dim=1, keepdim=True) for t in (p, z))
    torch.testing.assert_close(2 + 2 * negative_cosine(p, z), (unit_p - unit_z).pow(2).sum(1).mean())


def test_no_gradient_goes_to_the_targets_of_a_cosine() -> None:
    p, z = doubles(0, 3, 4).requires_grad_(), doubles(1, 3, 4).requires_grad_()
    negative_cosine(p, z).backward()
    assert p.grad is not None
    assert z.grad is None


def test_the_negative_cosine_runs_from_minus_one_to_one() -> None:
    z = doubles(0, 3, 4)
    assert negative_cosine(2 * z, z).item() == pytest.approx(-1)
    assert negative_cosine(-z, 5 * z).item() == pytest.approx(1)


def test_a_row_of_zeros_has_a_cosine_of_zero_and_a_finite_gradient() -> None:
    p = torch.zeros(3, 4, requires_grad=True)
    loss = negative_cosine(p, torch.randn(3, 4))
    loss.backward()
    assert loss.item() == 0
    assert p.grad.isfinite().all()


# DINO


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(value - top) for value in logits]
    return [value / sum(exps) for value in exps]


def dino_by_pairs(
    student: Tensor, teacher: Tensor, center: list[float], student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Write equation 3 of DINO: over pairs of a global crop and another crop, over rows, over classes."""
    terms = []
    for i in range(len(teacher)):
        for j in range(len(student)):
            if i == j:
                continue
            for said, guess in zip(teacher[i].tolist(), student[j], strict=True):
                target = softmax([(t - c) / teacher_temperature for t, c in zip(said, center, strict=True)])
                logits = guess / student_temperature
                chance = logits.exp() / logits.exp().sum()
                terms.append(-sum(p * q.log() for p, q in zip(target, chance, strict=True)))
    return torch.stack(terms).mean()


@pytest.mark.slow
@FEW
@given(crops=st.integers(2, 4), views=st.integers(1, 3), n=sizes, k=sizes, seed=seeds, sharp=st.booleans())
def test_dino_equals_the_sum_over_pairs_of_crops_rows_and_classes(
    crops: int, views: int, n: int, k: int, seed: int, sharp: bool
) -> None:
    views = min(views, crops)
    teacher, center = doubles(seed + 1, views, n, k), doubles(seed + 2, k)
    temperatures = (0.1, 0.04) if sharp else (1.0, 0.5)
    assert_same_with_gradient(
        lambda student: dino_loss(list(student), list(teacher), center, *temperatures),
        lambda student: dino_by_pairs(student, teacher, center.tolist(), *temperatures),
        doubles(seed, crops, n, k),
    )


def test_dino_pairs_each_global_crop_with_every_other_crop_alone() -> None:
    student, teacher = doubles(0, 3, 2, 4), doubles(1, 2, 2, 4)
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    alone = [dino_by_pairs(student[[j, j]], teacher[[i]], [0.0] * 4, 0.1, 0.04) for i, j in pairs]
    torch.testing.assert_close(dino_loss(list(student), list(teacher)), torch.stack(alone).mean())


def test_the_center_may_be_a_row_or_one_by_k_and_is_zero_by_default() -> None:
    student, teacher, center = list(doubles(0, 2, 3, 4)), list(doubles(1, 2, 3, 4)), doubles(2, 4)
    assert torch.equal(dino_loss(student, teacher, center), dino_loss(student, teacher, center[None]))
    assert torch.equal(dino_loss(student, teacher), dino_loss(student, teacher, torch.zeros(4)))
    assert not torch.equal(dino_loss(student, teacher), dino_loss(student, teacher, center))


def test_no_gradient_goes_to_dinos_teacher() -> None:
    student, teacher = doubles(0, 2, 3, 4).requires_grad_(), doubles(1, 2, 3, 4).requires_grad_()
    dino_loss(list(student), list(teacher)).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(("crops", "views"), [(1, 1), (2, 0)])
def test_dino_without_a_pair_of_crops_says_so(crops: int, views: int) -> None:
    with pytest.raises(ValueError, match=f"{crops} and {views} crops, which make no pair; expected two or more"):
        dino_loss([torch.zeros(2, 3)] * crops, [torch.zeros(2, 3)] * views)


def test_a_uniform_student_has_the_entropy_of_guessing() -> None:
    student = [torch.zeros(3, 5), torch.zeros(3, 5)]
    assert dino_loss(student, list(torch.randn(2, 3, 5))).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_dino_is_finite_at_extreme_temperatures_and_alike_in_both_precisions(temperature: float) -> None:
    student, teacher = doubles(0, 2, 3, 4), doubles(1, 2, 3, 4)
    single = student.float().requires_grad_()
    loss = dino_loss(list(single), list(teacher.float()), 0.0, temperature, temperature)
    loss.backward()
    expected = dino_loss(list(student), list(teacher), 0.0, temperature, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert single.grad.isfinite().all()


# Distillation


def distillation_by_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Write Hinton's divergence of softened classes in loops."""
    terms = []
    for guess, said in zip(student, teacher.tolist(), strict=True):
        target = softmax([value / temperature for value in said])
        logits = guess / temperature
        chance = logits.exp() / logits.exp().sum()
        terms.append(sum(p * (math.log(p) - q.log()) for p, q in zip(target, chance, strict=True)))
    return torch.stack(terms).mean() * temperature**2


@FEW
@given(n=sizes, c=sizes, temperature=st.sampled_from([0.5, 1.0, 4.0, 20.0]), seed=seeds)
def test_distillation_equals_the_sum_over_rows_and_classes(n: int, c: int, temperature: float, seed: int) -> None:
    teacher = doubles(seed + 1, n, c)
    assert_same_with_gradient(
        lambda student: distillation_loss(student, teacher, temperature),
        lambda student: distillation_by_rows(student, teacher, temperature),
        doubles(seed, n, c),
    )


def test_distillation_at_temperature_one_is_torchs_divergence_from_teacher_to_student() -> None:
    student, teacher = 3 * doubles(0, 6, 4), 3 * doubles(1, 6, 4)
    expected = kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 1.0), expected)


def test_the_gradient_of_distillation_keeps_its_size_at_high_temperatures() -> None:
    student, teacher = doubles(0, 6, 4).requires_grad_(), doubles(1, 6, 4)
    (found,) = torch.autograd.grad(distillation_loss(student, teacher, 1e6), student)
    difference = student.detach() - teacher
    expected = (difference - difference.mean(1, keepdim=True)) / (6 * 4)  # Hinton et al., equation 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    student = doubles(0, 6, 4).requires_grad_()
    loss = distillation_loss(student, student)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros(6, 4, dtype=torch.float64))


def test_no_gradient_goes_to_the_teacher_of_a_distillation() -> None:
    student, teacher = doubles(0, 3, 4).requires_grad_(), doubles(1, 3, 4).requires_grad_()
    distillation_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_certain_classes_give_a_finite_divergence_and_gradient() -> None:
    student = (1e3 * torch.eye(3)).requires_grad_()
    loss = distillation_loss(student, 1e3 * torch.eye(3).roll(1, 0), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1e3)
    assert student.grad.isfinite().all()
