"""KoLeo, alignment and uniformity; recorded values are those of lightly 1.6.0 in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxloop.losses import alignment, koleo_loss, uniformity
from toys import assert_recorded, assert_same_with_gradients, doubles, waves


@pytest.mark.parametrize(
    ("z", "value", "norm"),
    [(waves(0.3, 8, 6), -0.0250040153429, 0.265176533447), (waves(0.3, 16, 4), 0.607520845071, 0.667652653162)],
)
def test_koleo_is_what_lightly_recorded(z: Tensor, value: float, norm: float) -> None:
    assert_recorded(koleo_loss, value, [norm], z)  # KoLeoLoss()(z)


def koleo_by_rows(z: Tensor) -> Tensor:
    unit = [row / row.norm() for row in z]
    nearest = [torch.stack([(a - b).norm() for j, b in enumerate(unit) if j != i]).min() for i, a in enumerate(unit)]
    return -torch.stack(nearest).log().mean()


def test_koleo_is_minus_the_mean_logarithm_of_the_distance_to_the_nearest_row() -> None:
    assert_same_with_gradients(koleo_loss, koleo_by_rows, doubles(0, 7, 3))


def test_koleo_of_equal_rows_has_a_finite_gradient_and_is_large() -> None:
    z = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(z)
    loss.backward()
    assert loss.item() > 15
    assert z.grad.isfinite().all()


def test_alignment_and_uniformity_are_the_papers_means_over_rows_and_pairs() -> None:
    z1, z2 = doubles(0, 5, 3), doubles(1, 5, 3)
    u1, u2 = ([row / row.norm() for row in z] for z in (z1, z2))
    distances = [(a - b).norm().item() for a, b in zip(u1, u2, strict=True)]
    assert alignment(z1, z2).item() == pytest.approx(sum(d**2 for d in distances) / 5)
    assert alignment(z1, z2, 1).item() == pytest.approx(sum(distances) / 5)
    pairs = [math.exp(-3 * (u1[i] - u1[j]).pow(2).sum().item()) for i in range(5) for j in range(5) if i != j]
    assert uniformity(z1, 3).item() == pytest.approx(math.log(sum(pairs) / 20))


def test_collapsed_rows_are_aligned_and_not_uniform() -> None:
    z = torch.ones(4, 3)
    assert alignment(z, 2 * z).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(z).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.cat([z, -z])).item() < uniformity(z).item()


@pytest.mark.parametrize("loss", [koleo_loss, uniformity])
def test_one_row_alone_is_refused_with_what_to_type(loss: object) -> None:
    with pytest.raises(ValueError, match=r"was given one row.*drop_last=True"):
        loss(torch.ones(1, 3))  # type: ignore[operator]  # they are functions


@pytest.mark.parametrize("loss", [koleo_loss, uniformity])
def test_distances_are_those_of_full_precision_under_autocast(loss: Any) -> None:
    z = torch.nn.functional.normalize(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)))
    expected = loss(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(z)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
