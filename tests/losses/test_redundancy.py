from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import batch_norm

from fluxloop.losses import barlow_twins_loss, mmcr_loss, tico_covariance, tico_loss, vicreg_loss, wmse_loss
from toys import assert_recorded, assert_same_with_gradients, doubles, waves

seeds = st.integers(0, 999)
FEW = settings(max_examples=25, deadline=None)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


# Barlow Twins


def barlow_by_entries(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    """Write the loss entry by entry of the cross-correlation."""
    n, d = z1.shape
    total = torch.zeros((), dtype=z1.dtype)
    for i in range(d):
        for j in range(d):
            a, b = list(z1[:, i]), list(z2[:, j])
            middle_a, middle_b = mean(a), mean(b)
            spread_a = (mean([(x - middle_a) ** 2 for x in a]) + 1e-5).sqrt()
            spread_b = (mean([(x - middle_b) ** 2 for x in b]) + 1e-5).sqrt()
            c = mean([(a[r] - middle_a) / spread_a * (b[r] - middle_b) / spread_b for r in range(n)])
            total = total + ((1 - c) ** 2 if i == j else weight * c**2)
    return total


@pytest.mark.slow
@FEW
@given(n=st.integers(1, 5), d=st.integers(1, 4), weight=st.sampled_from([0.0, 5e-3, 1.0]), seed=seeds)
def test_barlow_twins_equals_the_sum_over_the_entries_of_the_correlation(
    n: int, d: int, weight: float, seed: int
) -> None:
    assert_same_with_gradients(
        lambda a, b: barlow_twins_loss(a, b, weight),
        lambda a, b: barlow_by_entries(a, b, weight),
        doubles(seed, n, d),
        doubles(seed + 1, n, d),
    )


def test_barlow_twins_standardises_as_batch_norm_without_weights_does() -> None:
    z1, z2 = doubles(0, 7, 5), 3 * doubles(1, 7, 5) + 2
    a, b = (batch_norm(z, None, None, training=True) for z in (z1, z2))
    c = a.T @ b / 7
    expected = (c.diagonal() - 1).pow(2).sum() + 0.01 * (c.pow(2).sum() - c.diagonal().pow(2).sum())
    torch.testing.assert_close(barlow_twins_loss(z1, z2, 0.01), expected)


def test_barlow_twins_of_equal_uncorrelated_dimensions_is_nearly_zero() -> None:
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert barlow_twins_loss(z, z, 1.0).item() == pytest.approx(0, abs=1e-8)
    assert barlow_twins_loss(z, -z, 1.0).item() == pytest.approx(2 * 2**2, rel=1e-4)
    assert barlow_twins_loss(z, z.flip(1), 1.0).item() == pytest.approx(2 + 2, rel=1e-4)


def test_barlow_twins_weighs_the_correlations_beside_the_diagonal_as_the_paper_by_default() -> None:
    z1, z2 = doubles(0, 6, 3), doubles(1, 6, 3)
    assert barlow_twins_loss(z1, z2).item() == barlow_twins_loss(z1, z2, 0.005).item()


def test_barlow_twins_of_rows_that_are_all_the_same_has_a_finite_gradient() -> None:
    z = torch.ones(5, 3, requires_grad=True)
    loss = barlow_twins_loss(z, z)
    loss.backward()
    assert loss.item() == 3  # no dimension correlates with itself
    assert z.grad.isfinite().all()


# VICReg


def vicreg_by_entries(z1: Tensor, z2: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """Write equations 1 to 6 of VICReg in loops, with the factors of the paper's code."""
    n, d = z1.shape
    distance = sum((z1[r, i] - z2[r, i]) ** 2 for r in range(n) for i in range(d)) / (n * d)
    hinge = together = torch.zeros((), dtype=z1.dtype)
    for z in (z1, z2):
        middles = [mean(list(z[:, i])) for i in range(d)]
        for i in range(d):
            for j in range(d):
                c = sum((z[r, i] - middles[i]) * (z[r, j] - middles[j]) for r in range(n)) / (n - 1)
                if i == j:
                    hinge = hinge + (1 - (c + 1e-4).sqrt()).clamp(min=0) / d / 2
                else:
                    together = together + c**2 / d
    return invariance * distance + variance * hinge + covariance * together


@pytest.mark.slow
@FEW
@given(
    n=st.integers(2, 5),
    d=st.integers(1, 4),
    weights=st.sampled_from([(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]),
    seed=seeds,
)
def test_vicreg_equals_the_sums_over_rows_and_dimensions(
    n: int, d: int, weights: tuple[float, float, float], seed: int
) -> None:
    assert_same_with_gradients(
        lambda a, b: vicreg_loss(a, b, *weights),
        lambda a, b: vicreg_by_entries(a, b, *weights),
        doubles(seed, n, d),
        doubles(seed + 1, n, d),
    )


def test_vicregs_covariances_are_those_of_torch() -> None:
    z1, z2 = doubles(0, 9, 4), doubles(1, 9, 4)
    expected = torch.zeros((), dtype=torch.float64)
    for z in (z1, z2):
        c = torch.cov(z.T)
        expected = expected + (c - c.diag().diag()).pow(2).sum() / 4
    torch.testing.assert_close(vicreg_loss(z1, z2, 0, 0, 1), expected)


def test_vicregs_weights_are_those_of_the_paper_by_default() -> None:
    z1, z2 = doubles(0, 6, 3), doubles(1, 6, 3)
    assert vicreg_loss(z1, z2).item() == vicreg_loss(z1, z2, 25, 25, 1).item()


def test_vicreg_of_varied_uncorrelated_equal_views_is_zero() -> None:
    z = 2 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert vicreg_loss(z, z).item() == 0


def test_vicreg_of_rows_that_are_all_the_same_pushes_by_its_variance_alone_with_a_finite_gradient() -> None:
    z = torch.ones(5, 3, requires_grad=True)
    loss = vicreg_loss(z, z)
    loss.backward()
    assert loss.item() == pytest.approx(25 * (1 - math.sqrt(1e-4)))
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("loss", [barlow_twins_loss, vicreg_loss])
def test_single_and_double_precision_agree(loss: Callable[..., Tensor]) -> None:
    z1, z2 = doubles(0, 16, 8), doubles(1, 16, 8)
    single = loss(z1.float(), z2.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(loss(z1, z2).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [barlow_twins_loss, vicreg_loss])
def test_the_views_may_be_swapped_and_are_not_changed(loss: Callable[..., Tensor]) -> None:
    z1, z2 = doubles(0, 6, 4), doubles(1, 6, 4)
    before = torch.get_rng_state(), z1.clone(), z2.clone()
    torch.testing.assert_close(loss(z1, z2), loss(z2, z1))
    assert all(map(torch.equal, (torch.get_rng_state(), z1, z2), before))


# TiCo, W-MSE, MMCR: recorded values are those of lightly 1.6.0 in float64

A, B = waves(0.3, 8, 6), waves(0.7, 8, 6)


def test_tico_is_what_lightly_recorded_in_its_first_and_second_step() -> None:
    assert_recorded(tico_loss, 1.31524643168, [0.184534077017, 0.198925209626], A, B)
    past = tico_covariance(waves(0.11, 8, 6))
    norms = [0.197238224521, 0.198925209626]
    assert_recorded(lambda a, b: tico_loss(a, b, past), 1.43712281195, norms, A, B)


def test_the_covariance_of_tico_is_a_moving_average_without_gradient() -> None:
    z1, z2 = doubles(0, 5, 3).requires_grad_(), doubles(1, 5, 3)
    u = [row / row.norm() for row in z1.detach()]
    first = sum(torch.outer(row, row) for row in u) / 5 * 0.2
    past = tico_covariance(z1, None, 0.8)
    torch.testing.assert_close(past, first)
    assert not past.requires_grad
    torch.testing.assert_close(tico_covariance(z1, past, 0.8), 1.8 * first)
    expected = 1 - sum((a @ b) / b.norm() for a, b in zip(u, z2, strict=True)) / 5
    expected = expected + 3 * sum(a @ (1.8 * first) @ a for a in u) / 5
    torch.testing.assert_close(tico_loss(z1, z2, past, weight=3, momentum=0.8), expected)


@pytest.mark.parametrize(
    ("eps", "value", "norm"), [(0.0, 2.20445688554, 0.626376032496), (0.1, 2.20756259105, 0.618431193564)]
)
def test_w_mse_is_what_lightly_recorded(eps: float, value: float, norm: float) -> None:
    both = torch.cat([waves(0.3, 16, 3), waves(0.7, 16, 3)])  # WMSELoss(embedding_dim=3, w_size=16, eps=eps)(both)
    assert_recorded(lambda z: wmse_loss(z[:16], z[16:], eps), value, [norm], both)


def test_w_mse_compares_rows_whose_covariance_is_the_identity() -> None:
    z1, z2 = doubles(0, 9, 3), doubles(1, 9, 3)
    rows = []
    for z in (z1, z2):
        white = (z - z.mean(0)) @ torch.linalg.cholesky(torch.cov(z.T)).inverse().T
        torch.testing.assert_close(torch.cov(white.T), torch.eye(3, dtype=torch.float64))
        rows.append(white / white.norm(dim=1, keepdim=True))
    torch.testing.assert_close(wmse_loss(z1, z2), (rows[0] - rows[1]).square().sum(1).mean())


def test_w_mse_of_too_few_rows_says_how_many_it_needs() -> None:
    with pytest.raises(ValueError, match="4 rows of 4 dimensions, whose covariance has no inverse; expected more rows"):
        wmse_loss(torch.zeros(4, 4), torch.zeros(4, 4))
    assert wmse_loss(doubles(0, 4, 4), doubles(1, 4, 4), eps=0.1).isfinite()


def test_mmcr_is_what_lightly_recorded_of_normalised_views() -> None:
    assert_recorded(  # MMCRLoss()(normalize(online, dim=2), normalize(momentum, dim=2))
        lambda a, b: mmcr_loss(torch.cat([a, b], dim=1)),
        -2.63346036532,
        [0.4585107518, 0.495299239002],
        waves(0.3, 8, 2, 6),
        waves(0.7, 8, 2, 6),
    )


def test_mmcr_sums_the_singular_values_of_centroids_and_views() -> None:
    z = doubles(0, 5, 3, 4)
    unit = torch.stack([torch.stack([v / v.norm() for v in row]) for row in z])
    nuclear = [torch.linalg.eigvalsh(row @ row.T).clamp(min=0).sqrt().sum() for row in unit]
    centroids = torch.stack([row.mean(0) for row in unit])
    expected = 0.3 * sum(nuclear) / 5 - torch.linalg.eigvalsh(centroids.T @ centroids).clamp(min=0).sqrt().sum()
    torch.testing.assert_close(mmcr_loss(z, 0.3), expected)
