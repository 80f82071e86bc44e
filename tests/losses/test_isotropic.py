"""SIGReg and the loss of LeJEPA; recorded values are those of lightly 1.6.0 with its constants in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxloop.losses import draw_directions, lejepa_loss, sigreg
from toys import assert_recorded, assert_same_with_gradients, doubles, waves

A, B = waves(0.3, 8, 6), waves(0.7, 8, 6)
DIRECTIONS = torch.nn.functional.normalize(waves(0.9, 6, 32), dim=0)


@pytest.mark.parametrize(
    ("options", "value", "norm"),
    [  # SIGReg(num_vectors=32)(a), SIGReg(num_vectors=32, knots=9, t_max=5.0)(a)
        ({}, 1.29968510402, 0.806697746844),
        ({"knots": 9, "largest": 5.0}, 1.30519610911, 0.807541254367),
    ],
)
def test_sigreg_is_what_lightly_recorded(options: dict[str, Any], value: float, norm: float) -> None:
    assert_recorded(lambda z: sigreg(z, DIRECTIONS, **options), value, [norm], A)


def test_sigreg_looks_at_each_view_by_itself() -> None:
    views = waves(0.3, 3, 8, 6)
    assert_recorded(lambda z: sigreg(z, DIRECTIONS), 1.13394760976, [0.432991913451], views)
    alone = torch.stack([sigreg(view, DIRECTIONS) for view in views]).mean()
    torch.testing.assert_close(sigreg(views, DIRECTIONS), alone)


@pytest.mark.parametrize(
    ("weight", "value", "norms"),
    [  # LeJEPALoss(lambda_param=weight)(global_proj=, local_proj=)
        (0.05, 0.563836106789, [0.0848982404072, 0.0764986458366]),
        (0.5, 0.809893005183, [0.108882349879, 0.092263377852]),
        (0.0, 0.536496451412, [0.0913823133998, 0.0853799843767]),
    ],
)
def test_the_loss_of_lejepa_is_what_lightly_recorded(weight: float, value: float, norms: list[float]) -> None:
    globally, locally = waves(0.3, 2, 8, 6), waves(0.7, 3, 8, 6)
    assert_recorded(lambda g, w: lejepa_loss([*g, *w], DIRECTIONS, 2, weight), value, norms, globally, locally)


def sigreg_by_entries(z: Tensor, directions: Tensor, knots: int, largest: float) -> Tensor:
    """Write the statistic of Epps and Pulley in loops, over all knots from the negative largest one on."""
    n, step = len(z), largest / (knots - 1)
    total = torch.zeros((), dtype=z.dtype)
    for direction in directions.T:
        for i in range(-knots + 1, knots):
            t = i * step
            weight = step * math.exp(-t * t / 2) / (2 if abs(i) == knots - 1 else 1)
            real = sum((t * (row * direction).sum()).cos() for row in z) / n
            imaginary = sum((t * (row * direction).sum()).sin() for row in z) / n
            total = total + n * weight * ((real - math.exp(-t * t / 2)) ** 2 + imaginary**2)
    return total / directions.shape[1]


def test_sigreg_equals_the_integral_over_the_whole_line_written_in_loops() -> None:
    directions = draw_directions(3, 4, A)
    assert_same_with_gradients(
        lambda z: sigreg(z, directions, knots=5, largest=2.5),
        lambda z: sigreg_by_entries(z, directions, 5, 2.5),
        doubles(0, 6, 3),
    )


def test_sigreg_of_normal_rows_does_not_grow_with_their_number_and_of_others_in_proportion() -> None:
    directions = draw_directions(6, 64, A)
    normal = [sigreg(doubles(1, n, 6), directions).item() for n in (200, 2000)]
    collapsed = [sigreg(torch.zeros(n, 6, dtype=torch.float64), directions).item() for n in (200, 2000)]
    assert normal[1] == pytest.approx(normal[0], rel=0.5)
    assert collapsed[1] == pytest.approx(10 * collapsed[0])
    assert collapsed[0] > 20 * normal[0]


def test_directions_have_length_one_and_are_others_at_each_draw() -> None:
    first, second = draw_directions(6, 5, A), draw_directions(6, 5, A.float())
    assert first.shape == (6, 5)
    assert (first.dtype, second.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(5, dtype=torch.float64))
    assert not torch.equal(first.float(), second)


def test_every_view_gets_a_gradient_also_through_the_mean_of_the_global_ones() -> None:
    views = [A.clone().requires_grad_(), B.clone().requires_grad_()]
    lejepa_loss(views, DIRECTIONS, 1, 0.0).backward()
    torch.testing.assert_close(views[0].grad, (A - B) / A.numel())
    torch.testing.assert_close(views[1].grad, (B - A) / A.numel())
