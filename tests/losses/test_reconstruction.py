from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fluxloop.losses import kl_standard_normal, masked_mse, normalize_patches, squared_error
from toys import assert_same_with_gradients, doubles

shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4)
seeds = st.integers(0, 999)
FEW = settings(max_examples=25, deadline=None)


# Divergence of a code


@FEW
@given(shape=shapes, seed=seeds)
def test_the_divergence_is_that_of_torchs_normal_distributions(shape: list[int], seed: int) -> None:
    def expected(mean: Tensor, logvar: Tensor) -> Tensor:
        divergence = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0))
        return divergence.sum(tuple(range(1, len(shape)))).mean()

    assert_same_with_gradients(kl_standard_normal, expected, doubles(seed, *shape), doubles(seed + 1, *shape))


def test_the_divergence_of_the_standard_normal_is_zero_with_a_gradient_of_zero() -> None:
    mean, logvar = torch.zeros(3, 2, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    loss = kl_standard_normal(mean, logvar)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(mean.grad, torch.zeros(3, 2))
    assert torch.equal(logvar.grad, torch.zeros(3, 2))


def test_the_divergence_is_finite_for_small_and_large_variances() -> None:
    logvar = torch.tensor([[-80.0, 80.0]], requires_grad=True)
    loss = kl_standard_normal(torch.zeros(1, 2), logvar)
    loss.backward()
    assert loss.item() == pytest.approx((math.exp(-80) + math.exp(80) - 2) / 2, rel=1e-5)
    assert logvar.grad.isfinite().all()


# Squared error


@FEW
@given(shape=shapes, seed=seeds)
def test_the_squared_error_is_summed_over_a_row_and_averaged_over_rows(shape: list[int], seed: int) -> None:
    def expected(preds: Tensor, xs: Tensor) -> Tensor:
        terms = [(a - b) ** 2 for a, b in zip(preds.reshape(-1), xs.reshape(-1), strict=True)]
        return sum(terms) / 2 / shape[0]

    assert_same_with_gradients(squared_error, expected, doubles(seed, *shape), doubles(seed + 1, *shape))


def test_the_squared_error_is_minus_a_normal_log_likelihood_up_to_a_constant() -> None:
    preds, xs = doubles(0, 5, 3), doubles(1, 5, 3)
    likelihood = Normal(preds, 1.0).log_prob(xs).sum(1).mean()
    torch.testing.assert_close(squared_error(preds, xs) + 3 * math.log(2 * math.pi) / 2, -likelihood)


# Patches


@FEW
@given(n=st.integers(1, 3), length=st.integers(1, 3), p=st.integers(2, 5), seed=seeds)
def test_each_patch_gets_zero_mean_and_unit_variance(n: int, length: int, p: int, seed: int) -> None:
    patches = 5 * doubles(seed, n, length, p) + 3
    found = normalize_patches(patches)
    assert found.shape == (n, length, p)
    for patch, normal in zip(patches.view(-1, p).tolist(), found.view(-1, p).tolist(), strict=True):
        middle, spread = statistics.mean(patch), math.sqrt(statistics.variance(patch) + 1e-6)
        assert normal == pytest.approx([(value - middle) / spread for value in patch])


def test_a_patch_of_one_colour_becomes_zeros() -> None:
    assert torch.equal(normalize_patches(torch.full((2, 3, 4), 0.5)), torch.zeros(2, 3, 4))


@FEW
@given(n=st.integers(1, 3), length=st.integers(1, 4), p=st.integers(1, 3), seed=seeds)
def test_the_masked_error_is_the_mean_over_hidden_patches(n: int, length: int, p: int, seed: int) -> None:
    mask = doubles(seed + 2, n, length) > 0
    mask[0, 0] = True

    def expected(preds: Tensor, targets: Tensor) -> Tensor:
        hidden = [(i, j) for i in range(n) for j in range(length) if mask[i, j]]
        terms = [(preds[i, j, k] - targets[i, j, k]) ** 2 for i, j in hidden for k in range(p)]
        return sum(terms) / len(terms)

    assert_same_with_gradients(
        lambda preds, targets: masked_mse(preds, targets, mask),
        expected,
        doubles(seed, n, length, p),
        doubles(seed + 1, n, length, p),
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.int64])
def test_the_mask_may_be_of_any_kind_and_keeps_the_precision(dtype: torch.dtype) -> None:
    preds, targets, mask = doubles(0, 2, 3, 4), doubles(1, 2, 3, 4), torch.tensor([[1, 0, 1], [0, 0, 1]])
    found = masked_mse(preds, targets, mask.to(dtype))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, (preds - targets)[mask == 1].pow(2).mean())


def test_patches_that_are_seen_get_no_gradient() -> None:
    preds = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    masked_mse(preds, torch.randn(2, 3, 4), mask).backward()
    assert torch.equal(preds.grad[~mask], torch.zeros(3, 4))
    assert (preds.grad[mask] != 0).all()


@pytest.mark.parametrize("loss", [kl_standard_normal, squared_error])
def test_single_and_double_precision_agree(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = doubles(0, 16, 8), doubles(1, 16, 8)
    single = loss(a.float(), b.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(loss(a, b).item(), rel=1e-5)


def test_reconstruction_losses_draw_nothing() -> None:
    a, b = doubles(0, 2, 3, 4), doubles(1, 2, 3, 4)
    before = torch.get_rng_state(), a.clone(), b.clone()
    kl_standard_normal(a, b), squared_error(a, b), normalize_patches(a), masked_mse(a, b, torch.ones(2, 3))
    assert all(map(torch.equal, (torch.get_rng_state(), a, b), before))


def test_a_reconstruction_of_another_shape_is_refused_rather_than_broadcast() -> None:
    images, without_channel = torch.rand(4, 1, 8, 8), torch.rand(4, 8, 8)
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\) was compared with \(4, 1, 8, 8\)"):
        squared_error(without_channel, images)
    with pytest.raises(ValueError, match=r"shape \(4, 1, 6\) was compared with \(4, 5, 6\)"):
        masked_mse(torch.rand(4, 1, 6), torch.rand(4, 5, 6), torch.ones(4, 5))
