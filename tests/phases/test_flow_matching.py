from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fluxloop import FlowMatchingPhase
from fluxloop.state import StepState


def waves(k: float, *shape: int) -> Tensor:
    """Return numbers that other libraries were run on, in float64."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(k * i * i).reshape(shape)


@pytest.mark.parametrize(
    ("sigma_min", "noised", "velocity"),
    [
        (0.1, 9.673886216, 21.76676649),  # TargetConditionalFlowMatcher(sigma=0.1) of torchcfm 1.0.7, epsilon = x0
        (0.0, 9.348414676, 22.54928987),  # ConditionalFlowMatcher(sigma=0.0)
    ],
)
def test_rows_and_velocities_are_those_of_torchcfm(sigma_min: float, noised: float, velocity: float) -> None:
    t = torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64)
    state = StepState({"xs": waves(0.3, 4, 6), "noise": waves(0.7, 4, 6), "times": t})
    row, told, target = FlowMatchingPhase(sigma_min=sigma_min).mix(state)
    assert row.abs().sum().item() == pytest.approx(noised, rel=1e-9)
    assert target.abs().sum().item() == pytest.approx(velocity, rel=1e-9)
    assert told is t


def test_times_are_uniform_or_more_often_in_the_middle() -> None:
    torch.manual_seed(0)
    rows = torch.empty(4000, 2)
    for times, inner in [("uniform", 0.5), ("logit-normal", 0.728)]:  # P(|normal| < log 3) = 0.728
        drawn = FlowMatchingPhase(times=times).draw_times(rows)
        assert drawn.min() >= 0
        assert drawn.max() <= 1
        assert ((drawn > 0.25) & (drawn < 0.75)).float().mean().item() == pytest.approx(inner, abs=0.03)


def perfect(xs: Tensor, times: Tensor) -> Tensor:
    """Return the velocity where the data are normal with mean 2 and deviation 0.5."""
    t = times.reshape(-1, 1)
    variance = (0.5 * t) ** 2 + (1 - t) ** 2
    ahead = xs - 2 * t
    return 2 + (0.25 * t - (1 - t)) / variance * ahead


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_a_perfect_velocity_carries_noise_to_the_data_with_the_order_of_the_solver(solver: str, order: int) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = [
        (FlowMatchingPhase().sample(perfect, noise, steps=steps, solver=solver) - (2 + 0.5 * noise)).abs().max().item()
        for steps in (40, 80)
    ]
    assert errors[1] < 0.05**order
    assert errors[0] / errors[1] > 0.9 * 2**order
