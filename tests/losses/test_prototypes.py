"""Losses of codes; recorded values are those of lightly 1.6.0 in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxloop.losses import dino_loss, ibot_loss, masked_code_loss, msn_loss, sinkhorn, swav_loss
from toys import assert_recorded, assert_same_with_gradients, doubles, waves

A, B, SMALL = waves(0.3, 8, 6), waves(0.7, 8, 6), (waves(0.11, 8, 6), waves(0.13, 8, 6))

# Sinkhorn and Knopp


def sinkhorn_by_sums(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Write the algorithm as in the appendix of SwAV, with the rows as columns."""
    q = torch.exp(scores / epsilon).T
    q = q / q.sum()
    k, n = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / n
    return (q * n).T


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.5, 1), (1.0, 10)])
def test_sinkhorn_is_the_papers_algorithm(epsilon: float, iterations: int) -> None:
    scores = doubles(0, 9, 5)
    torch.testing.assert_close(sinkhorn(scores, epsilon, iterations), sinkhorn_by_sums(scores, epsilon, iterations))


def test_rows_of_codes_sum_to_one_and_all_prototypes_are_used_alike() -> None:
    codes = sinkhorn(doubles(0, 12, 4) + torch.arange(4), 0.5, 100)
    torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64))


def test_codes_of_large_scores_are_finite_and_have_no_gradient() -> None:
    scores = (1e4 * torch.randn(6, 3)).requires_grad_()
    codes = sinkhorn(scores, 0.01)
    assert codes.isfinite().all()
    assert not codes.requires_grad
    torch.testing.assert_close(sinkhorn(scores, 0.5, 0), (scores / 0.5).softmax(1).detach())


# SwAV


@pytest.mark.parametrize(
    ("crops", "options", "value", "norms"),
    [  # SwaVLoss()([a, b], crops), then with sinkhorn_iterations=10, sinkhorn_epsilon=.1
        ((), {}, 8.94094892725, [2.06812214416, 2.1029160141]),
        (SMALL, {}, 8.05284751728, [0.689374048053, 0.7009720047, 1.05730963247, 1.10375345212]),
        (
            SMALL,
            {"iterations": 10, "epsilon": 0.1},
            8.34730117226,
            [0.644717311085, 0.634234615481, 1.02837801963, 1.08860643459],
        ),
    ],
)
def test_swav_is_what_lightly_recorded(
    crops: tuple[Tensor, ...], options: dict[str, Any], value: float, norms: list[float]
) -> None:
    codes = [sinkhorn(A, **options), sinkhorn(B, **options)]
    assert_recorded(lambda *scores: swav_loss(list(scores), codes), value, norms, A, B, *crops)


def test_swav_with_a_queue_is_what_lightly_recorded() -> None:
    queues = waves(0.17, 16, 6), waves(0.19, 16, 6)  # SwaVLoss()(..., queue_outputs=queues)
    codes = [sinkhorn(torch.cat([each, queue]))[:8] for each, queue in zip((A, B), queues, strict=True)]
    norms = [0.662124204313, 0.684796605301, 1.13259906444, 1.1970869833]
    assert_recorded(lambda *scores: swav_loss(list(scores), codes), 7.55489925517, norms, A, B, *SMALL)


def test_swav_is_dinos_loss_with_other_codes() -> None:
    student, teacher = list(doubles(0, 3, 4, 5)), list(doubles(1, 2, 4, 5))
    codes = [(scores / 0.04).softmax(1) for scores in teacher]
    torch.testing.assert_close(swav_loss(student, codes), dino_loss(student, teacher))


def test_swav_with_one_crop_alone_says_so() -> None:
    with pytest.raises(ValueError, match="1 crops and 1 codes, which make no pair; expected two or more"):
        swav_loss([A], [A])


# iBOT


def hidden() -> Tensor:
    """Hide 6, 5 and 1 of 16 patches."""
    mask = torch.arange(48).reshape(3, 16) % 3 == 0
    mask[2] = torch.arange(16) == 0
    return mask


@pytest.mark.parametrize(
    ("center", "temperature", "value", "norm"),
    [  # IBOTPatchLoss(output_dim=6)(teacher, student, mask), then with a centre, then teacher_temp=.07
        (0.0, 0.04, 6.94531275679, 4.61122917241),
        (waves(0.23, 6), 0.04, 10.673651105, 4.6687215048),
        (waves(0.23, 6), 0.07, 10.6837096667, 4.6570793578),
    ],
)
def test_ibot_is_what_lightly_recorded(center: Any, temperature: float, value: float, norm: float) -> None:
    teacher, student = waves(0.17, 12, 6), waves(0.3, 12, 6)
    assert_recorded(
        lambda scores: ibot_loss(scores, teacher, hidden(), center, 0.1, temperature), value, [norm], student
    )


def ibot_by_patches(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    images = []
    for said, guess, hides in zip(teacher, student, mask, strict=True):
        terms = [
            -((t / 0.04).softmax(0) * (s / 0.1).log_softmax(0)).sum()
            for t, s in zip(said[hides], guess[hides], strict=True)
        ]
        images.append(torch.stack(terms).mean() if terms else guess.sum() * 0)
    return torch.stack(images).mean()


def test_ibot_is_a_mean_over_each_images_hidden_patches_and_one_without_counts_as_nothing() -> None:
    student, teacher, mask = doubles(0, 4, 7, 5), doubles(1, 4, 7, 5), doubles(2, 4, 7) > 0.3
    mask[1] = False
    assert_same_with_gradients(
        lambda scores: ibot_loss(scores, teacher, mask), lambda scores: ibot_by_patches(scores, teacher, mask), student
    )
    flat = ibot_loss(student[mask], teacher[mask], mask.double())
    torch.testing.assert_close(flat, ibot_loss(student, teacher, mask))


def test_scores_codes_and_mask_that_do_not_fit_are_named() -> None:
    mask = hidden()
    with pytest.raises(ValueError, match=r"scores of shape \(11, 6\), codes of \(11, 6\).*with 12 hidden patches"):
        masked_code_loss(torch.zeros(11, 6), torch.zeros(11, 6), mask)
    with pytest.raises(ValueError, match="expected scores and codes of one shape"):
        masked_code_loss(torch.zeros(3, 16, 6), torch.zeros(3, 16, 5), mask)


# MSN


@pytest.mark.parametrize(
    ("options", "value", "norms"),
    [  # MSNLoss()(anchors, targets, prototypes); sinkhorn_iterations=0; regularization_weight=0; sharpening .5
        ({}, 4.1994355448, [1.45942788181, 1.55530461451]),
        ({"iterations": 0}, 4.19281419198, [1.49791416153, 1.51166136616]),
        ({"weight": 0}, 4.16932219047, [1.46936692933, 1.54857383348]),
        ({"sharpening": 0.5}, 4.45221702197, [1.43621766645, 1.54654253004]),
    ],
)
def test_msn_is_what_lightly_recorded(options: dict[str, Any], value: float, norms: list[float]) -> None:
    assert_recorded(
        lambda anchors, prototypes: msn_loss(anchors, B, prototypes, **options),
        value,
        norms,
        waves(0.3, 16, 6),
        waves(0.41, 5, 6),
    )


def test_the_entropy_of_msn_is_nothing_where_all_prototypes_are_used_alike_and_log_k_where_one_is() -> None:
    prototypes = torch.eye(3, dtype=torch.float64)
    codes = {"temperature": 1e-3, "iterations": 0}
    assert msn_loss(prototypes, prototypes, prototypes, **codes).item() == pytest.approx(0, abs=1e-9)
    one = prototypes[:1].expand(3, 3)
    assert msn_loss(one, one, prototypes, **codes).item() == pytest.approx(math.log(3))


def test_no_gradient_goes_to_the_targets_of_msn() -> None:
    targets, prototypes = B.clone().requires_grad_(), waves(0.41, 5, 6).requires_grad_()
    msn_loss(A, targets, prototypes).backward()
    assert targets.grad is None
    assert prototypes.grad is not None


def test_anchors_that_are_no_views_of_the_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="9 anchors and 8 targets; expected as many anchors for each target"):
        msn_loss(torch.zeros(9, 6), torch.zeros(8, 6), torch.zeros(5, 6))
