from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxloop.losses import dcl_loss, info_nce, nt_xent, supervised_contrastive
from toys import assert_recorded, doubles, waves

sizes = st.integers(1, 5)
temperatures = st.sampled_from([0.05, 0.5, 1.0, 3.0])
seeds = st.integers(0, 999)
FEW = settings(max_examples=25, deadline=None)


def unit(tensor: Tensor) -> Tensor:
    return tensor / tensor.pow(2).sum(1, keepdim=True).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def assert_same_with_gradients(found: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare two functions of tensors: what they give, and the gradient with respect to each input."""
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    a, b = found(*inputs), expected(*inputs)
    assert a.shape == ()
    torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(value, inputs, materialize_grads=True) for value in (a, b)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# NT-Xent


def nt_xent_by_pairs(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Write equation 1 of SimCLR: for each of the 2N rows, its twin against the 2N - 1 others."""
    z, n = [*z1, *z2], len(z1)
    total = torch.zeros((), dtype=z1.dtype)
    for i in range(2 * n):
        twin = i + n if i < n else i - n
        others = sum((cosine(z[i], z[k]) / temperature).exp() for k in range(2 * n) if k != i)
        total = total - ((cosine(z[i], z[twin]) / temperature).exp() / others).log()
    return total / (2 * n)


@pytest.mark.slow
@FEW
@given(n=sizes, d=sizes, temperature=temperatures, seed=seeds)
def test_nt_xent_equals_the_sum_over_all_pairs(n: int, d: int, temperature: float, seed: int) -> None:
    assert_same_with_gradients(
        lambda a, b: nt_xent(a, b, temperature),
        lambda a, b: nt_xent_by_pairs(a, b, temperature),
        doubles(seed, n, d + 1),
        doubles(seed + 1, n, d + 1),
    )


@FEW
@given(n=sizes, seed=seeds)
def test_nt_xent_is_the_same_for_swapped_views_scaled_rows_and_another_order(n: int, seed: int) -> None:
    z1, z2 = doubles(seed, n, 4), doubles(seed + 1, n, 4)
    order = torch.randperm(n)
    scales = doubles(seed + 2, n, 1).abs() + 0.1
    for other in (nt_xent(z2, z1), nt_xent(z1[order], z2[order]), nt_xent(scales * z1, z2)):
        torch.testing.assert_close(other, nt_xent(z1, z2))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_nt_xent_of_rows_that_are_all_the_same_is_that_of_guessing(n: int) -> None:
    z = torch.ones(n, 3, requires_grad=True)
    loss = nt_xent(z, z)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2 * n - 1), abs=1e-6)
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nt_xent_of_equal_views_of_orthogonal_rows_is_known(temperature: float) -> None:
    z = torch.eye(4)
    expected = math.log(1 + 6 * math.exp(-1 / temperature))
    assert nt_xent(z, z, temperature).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1e6])
def test_nt_xent_is_finite_at_extreme_temperatures_and_alike_in_both_precisions(temperature: float) -> None:
    z1, z2 = (doubles(seed, 6, 4).requires_grad_() for seed in (0, 1))
    single1, single2 = (z.detach().float().requires_grad_() for z in (z1, z2))
    loss, single = nt_xent(z1, z2, temperature), nt_xent(single1, single2, temperature)
    single.backward()
    assert single.item() == pytest.approx(loss.item(), rel=1e-4)
    assert single1.grad.isfinite().all()
    assert single2.grad.isfinite().all()


def test_nt_xent_at_a_high_temperature_is_that_of_guessing() -> None:
    assert nt_xent(doubles(0, 5, 3), doubles(1, 5, 3), 1e8).item() == pytest.approx(math.log(9), abs=1e-6)


# InfoNCE


def info_nce_by_rows(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Write equation 1 of MoCo for each query, and average."""
    terms = []
    for query, key in zip(queries, keys, strict=True):
        positive = (torch.dot(query, key) / temperature).exp()
        others = sum(((torch.dot(query, negative) / temperature).exp() for negative in negatives), positive * 0)
        terms.append(-(positive / (positive + others)).log())
    return torch.stack(terms).mean()


@FEW
@given(n=sizes, k=st.integers(0, 5), d=sizes, temperature=st.sampled_from([0.07, 1.0]), seed=seeds)
def test_info_nce_equals_the_sum_over_queries_and_negatives(
    n: int, k: int, d: int, temperature: float, seed: int
) -> None:
    assert_same_with_gradients(
        lambda *given: info_nce(*given, temperature),
        lambda *given: info_nce_by_rows(*given, temperature),
        unit(doubles(seed, n, d)),
        unit(doubles(seed + 1, n, d)),
        unit(doubles(seed + 2, k, d)),
    )


def test_info_nce_without_negatives_is_zero() -> None:
    q = unit(doubles(0, 3, 4))
    assert info_nce(q, q, torch.empty(0, 4, dtype=torch.float64)).item() == 0


def test_info_nce_of_keys_like_the_negatives_is_that_of_guessing() -> None:
    q = unit(torch.ones(3, 4))
    assert info_nce(q, q, unit(torch.ones(9, 4))).item() == pytest.approx(math.log(10), abs=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 1e6])
def test_info_nce_is_finite_at_extreme_temperatures_and_alike_in_both_precisions(temperature: float) -> None:
    q, k, negatives = (unit(doubles(seed, 5, 4)) for seed in (0, 1, 2))
    single = q.float().requires_grad_()
    loss = info_nce(single, k.float(), negatives.float(), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(info_nce(q, k, negatives, temperature).item(), rel=1e-4)
    assert single.grad.isfinite().all()


# Supervised contrastive


def supervised_contrastive_by_pairs(z: Tensor, labels: list[int], temperature: float) -> Tensor:
    """Write equation 2 of Khosla et al.: the mean over the rows that have another one of their class."""
    terms = []
    for i, row in enumerate(z):
        others = [k for k in range(len(z)) if k != i]
        same = [k for k in others if labels[k] == labels[i]]
        if same:
            total = sum((cosine(row, z[k]) / temperature).exp() for k in others)
            logs = [((cosine(row, z[k]) / temperature).exp() / total).log() for k in same]
            terms.append(-sum(logs) / len(logs))
    return torch.stack(terms).mean() if terms else 0 * z.sum()


@pytest.mark.slow
@FEW
@given(labels=st.lists(st.integers(-1, 2), min_size=1, max_size=7), temperature=temperatures, seed=seeds)
def test_supervised_contrastive_equals_the_sum_over_all_pairs_of_a_class(
    labels: list[int], temperature: float, seed: int
) -> None:
    assert_same_with_gradients(
        lambda z: supervised_contrastive(z, torch.tensor(labels), temperature),
        lambda z: supervised_contrastive_by_pairs(z, labels, temperature),
        doubles(seed, len(labels), 3),
    )


@FEW
@given(n=sizes, temperature=temperatures, seed=seeds)
def test_supervised_contrastive_over_two_views_of_one_class_each_is_nt_xent(
    n: int, temperature: float, seed: int
) -> None:
    z1, z2 = doubles(seed, n, 4), doubles(seed + 1, n, 4)
    found = supervised_contrastive(torch.cat([z1, z2]), torch.arange(n).repeat(2), temperature)
    torch.testing.assert_close(found, nt_xent(z1, z2, temperature))


def test_a_row_alone_in_its_class_is_left_out_of_the_mean_but_pushes_the_others() -> None:
    z = doubles(0, 4, 3).requires_grad_()
    loss = supervised_contrastive(z, torch.tensor([0, 0, 0, 1]), 1.0)
    torch.testing.assert_close(loss, supervised_contrastive_by_pairs(z, [0, 0, 0, 1], 1.0))
    assert loss > supervised_contrastive(z[:3], torch.tensor([0, 0, 0]), 1.0)
    loss.backward()
    assert (z.grad[3] != 0).all()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_where_every_row_is_alone_the_loss_is_zero_with_a_gradient_of_zero(n: int) -> None:
    z = torch.randn(n, 3, requires_grad=True)
    loss = supervised_contrastive(z, torch.arange(n))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros(n, 3))


def test_supervised_contrastive_of_rows_that_are_all_the_same_is_that_of_guessing() -> None:
    z = torch.ones(6, 3, requires_grad=True)
    loss = supervised_contrastive(z, torch.tensor([0, 0, 0, 1, 1, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), abs=1e-5)
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-4, 1e6])
def test_supervised_contrastive_is_finite_at_extreme_temperatures_and_alike_in_both_precisions(
    temperature: float,
) -> None:
    z, labels = doubles(0, 6, 3), torch.tensor([0, 1, 0, 1, 0, 2])
    single = z.float().requires_grad_()
    loss = supervised_contrastive(single, labels, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(supervised_contrastive(z, labels, temperature).item(), rel=1e-4)
    assert single.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_labels_may_be_any_whole_numbers(dtype: torch.dtype) -> None:
    z, labels = doubles(0, 6, 3), torch.tensor([7, 1, 7, 1, 7, 2])
    torch.testing.assert_close(supervised_contrastive(z, labels.to(dtype)), supervised_contrastive(z, labels))


def test_the_contrastive_losses_change_no_input_and_draw_nothing() -> None:
    z1, z2, z3, labels = doubles(0, 4, 3), doubles(1, 4, 3), doubles(2, 4, 3), torch.tensor([0, 0, 1, 1])
    before = torch.get_rng_state(), z1.clone(), z2.clone(), z3.clone()
    nt_xent(z1, z2), info_nce(z1, z2, z3), supervised_contrastive(z1, labels)
    assert all(map(torch.equal, (torch.get_rng_state(), z1, z2, z3), before))


# Decoupled


@pytest.mark.parametrize(
    ("options", "value", "norms"),
    [  # lightly 1.6.0 in float64: DCLLoss(), DCLLoss(temperature=.5), DCLWLoss()
        ({}, 7.98155173813, [2.18174965865, 2.23302959114]),
        ({"temperature": 0.5}, 3.1491415044, [0.40151160618, 0.404802410899]),
        ({"sigma": 0.5}, 10.6460793256, [2.27046004872, 2.40916237194]),
    ],
)
def test_the_decoupled_loss_is_what_lightly_recorded(
    options: dict[str, float], value: float, norms: list[float]
) -> None:
    assert_recorded(lambda a, b: dcl_loss(a, b, **options), value, norms, waves(0.3, 8, 6), waves(0.7, 8, 6))


def dcl_by_pairs(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Write equation 6 of the paper: the negatives are the views of other rows alone."""
    total = torch.zeros((), dtype=z1.dtype)
    for a, b in ((z1, z2), (z2, z1)):
        for i in range(len(a)):
            others = [cosine(a[i], each[k]) for each in (a, b) for k in range(len(a)) if k != i]
            total = total - cosine(a[i], b[i]) / temperature + torch.stack(others).div(temperature).logsumexp(0)
    return total / (2 * len(z1))


def test_the_decoupled_loss_leaves_the_other_view_of_a_row_out_of_the_negatives() -> None:
    assert_same_with_gradients(
        lambda a, b: dcl_loss(a, b, 0.2), lambda a, b: dcl_by_pairs(a, b, 0.2), doubles(0, 5, 3), doubles(1, 5, 3)
    )


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_the_decoupled_losses_of_parts_of_the_rows_make_up_that_of_all(sigma: float | None) -> None:
    z1, z2 = doubles(0, 6, 3), doubles(1, 6, 3)
    parts = [dcl_loss(z1, z2, 0.2, sigma, own=own) for own in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(2 / 6 * parts[0] + 4 / 6 * parts[1], dcl_loss(z1, z2, 0.2, sigma))


def test_one_row_alone_has_nothing_to_be_decoupled_from() -> None:
    with pytest.raises(ValueError, match="dcl_loss was given one row"):
        dcl_loss(torch.ones(1, 3), torch.ones(1, 3))
