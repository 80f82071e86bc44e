from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fluxloop import DiffusionPhase, PhaseError
from fluxloop.phases.diffusion import noise_schedule
from fluxloop.state import StepState


def waves(k: float, *shape: int) -> Tensor:
    """Return numbers that other libraries were run on, in float64."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(k * i * i).reshape(shape)


# Recorded from diffusers 0.42.1, whose tables are float32: DDIMScheduler(beta_schedule="linear" or
# "squaredcos_cap_v2").alphas_cumprod at 0, 1, 100, 500, 900, 998, 999
SHARES = {
    "linear": [0.9998999834, 0.9997800589, 0.8951413631, 0.07779665291, 0.0002702444908, 4.118194e-05, 4.03583e-05],
    "cosine": [0.999958694, 0.99991256, 0.9715756178, 0.492285043, 0.02361610718, 2.428766265e-06, 2.428734991e-09],
}  # fmt: skip
# add_noise and get_velocity of waves(.3, 4, 6), waves(.7, 4, 6) at times 0, 100, 500, 999: sums of absolute values
MIXED = {"linear": (15.51848879, 14.43534412), "cosine": (14.86363679, 14.69453363)}
# Ten steps from waves(.3, 4, 6) with timestep_spacing="trailing", set_alpha_to_one=True, use_clipped_model_output=True
# and the model 0.5 * tanh(x) + 0.0001 * t: the sum of absolute values and the first number
SAMPLED = {
    ("noise", "linear", None): (1332.216351, 3.808081685),
    ("noise", "linear", 1.0): (22.47036747, 0.8388387442),
    ("noise", "cosine", None): (193538.2841, 1053.367937),
    ("noise", "cosine", 1.0): (22.27410206, 0.7788272626),
    ("velocity", "linear", None): (6.499162264, 0.07649637059),
    ("velocity", "cosine", None): (6.975375133, 0.06576987952),
}


@pytest.mark.parametrize("name", SHARES)
def test_schedules_are_those_of_the_papers(name: str) -> None:
    left = noise_schedule(name)
    assert left.dtype == torch.float64
    assert left[[0, 1, 100, 500, 900, 998, 999]].tolist() == pytest.approx(SHARES[name], rel=2e-5)
    short = noise_schedule(name, 50)
    assert short.shape == (50,)
    assert short[24].item() == pytest.approx(left[499].item(), rel=0.15)
    assert short[-1] < 1e-3


@pytest.mark.parametrize("name", MIXED)
def test_noised_rows_and_velocities_are_those_of_diffusers(name: str) -> None:
    entries = {"xs": waves(0.3, 4, 6), "noise": waves(0.7, 4, 6), "times": torch.tensor([0, 100, 500, 999])}
    row, told, target = DiffusionPhase("velocity", schedule=name).mix(StepState(dict(entries)))
    assert (row.abs().sum().item(), target.abs().sum().item()) == pytest.approx(MIXED[name], rel=1e-6)
    same, _, noise = DiffusionPhase("noise", schedule=name).mix(StepState(dict(entries)))
    assert torch.equal(same, row)
    assert torch.equal(noise, entries["noise"])
    assert torch.equal(told, entries["times"])


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_samples_are_those_of_diffusers(case: tuple[str, str, float | None]) -> None:
    predict, schedule, clip = case
    model = lambda xs, times: 0.5 * torch.tanh(xs) + 0.0001 * times[:, None]  # noqa: E731
    made = DiffusionPhase(predict, schedule=schedule).sample(model, waves(0.3, 4, 6), steps=10, clip=clip)
    assert (made.abs().sum().item(), made[0, 0].item()) == pytest.approx(SAMPLED[case], rel=1e-5)


def test_the_scalings_of_edm_are_those_of_its_table() -> None:
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64)
    xs, noise, output = waves(0.3, 4, 6), waves(0.7, 4, 6), waves(0.9, 4, 6)
    phase = DiffusionPhase("edm", sigma_data=0.6)
    given, told, target = phase.mix(StepState({"xs": xs, "noise": noise, "times": sigma}))
    for row, s in enumerate(sigma.tolist()):  # Karras et al. (2022), table 1, last column, and equation 8
        skip, out = 0.36 / (s * s + 0.36), s * 0.6 / math.sqrt(s * s + 0.36)
        noised = xs[row] + s * noise[row]
        torch.testing.assert_close(given[row], noised / math.sqrt(s * s + 0.36))
        assert told[row].item() == pytest.approx(math.log(s) / 4)
        weight = (s * s + 0.36) / (s * 0.6) ** 2
        paper = weight * (skip * noised + out * output[row] - xs[row]).square().mean()
        torch.testing.assert_close((output[row] - target[row]).square().mean(), paper)


def test_the_strengths_of_edm_are_log_normal_and_its_sampler_goes_through_the_papers() -> None:
    torch.manual_seed(0)
    drawn = DiffusionPhase("edm").draw_times(torch.empty(4000, 1)).log()
    assert (drawn.mean().item(), drawn.std().item()) == pytest.approx((-1.2, 1.2), abs=0.06)
    # EDMEulerScheduler(sigma_min=.002, sigma_max=80, sigma_data=.5, rho=7).sigmas of diffusers 0.42.1, six steps
    recorded = [80.0, 24.408342361, 5.838947773, 0.965416908, 0.085087202, 0.002]
    assert DiffusionPhase("edm").grid(6, torch.empty(1, dtype=torch.float64)).tolist() == pytest.approx(recorded)


def guess(row: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """Return the best guess of rows whose data are normal with mean 2 and deviation 0.5."""
    return 2 + 0.25 * signal / (0.25 * signal**2 + sigma**2) * (row - 2 * signal)


def perfect(phase: DiffusionPhase) -> object:
    """Return a model whose outputs mean the best guess."""

    def model(given: Tensor, told: Tensor) -> Tensor:
        times = (4 * told).exp() if phase.predicts == "edm" else told
        signal, sigma, into, skip, out = (each[:, None] for each in phase.scalings(times))
        row = given / into
        return (guess(row, signal, sigma) - skip * row) / out

    return model


@pytest.mark.parametrize(("predict", "order"), [("noise", 1), ("velocity", 1), ("edm", 2)])
def test_a_perfect_model_makes_the_data_with_the_order_of_the_sampler(predict: str, order: int) -> None:
    phase = DiffusionPhase(predict)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    # EDM begins with 80 times the noise, which is not quite what the data and noise of that strength are
    data = 2 + 0.5 * (noise if predict != "edm" else (80 * noise - 2) / math.sqrt(80**2 + 0.25))
    errors = [(phase.sample(perfect(phase), noise, steps=steps) - data).abs().max().item() for steps in (20, 40)]
    assert errors[1] < 0.1**order
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.35)


def test_with_new_noise_in_each_step_the_samples_have_the_distribution_of_the_data() -> None:
    phase = DiffusionPhase("velocity")
    torch.manual_seed(0)
    noise = torch.randn(4000, 1, dtype=torch.float64)
    made = phase.sample(perfect(phase), noise, steps=100, eta=1.0)
    assert (made.mean().item(), made.std().item()) == pytest.approx((2, 0.5), abs=0.03)
    assert abs(torch.corrcoef(torch.cat([made, noise], 1).T)[0, 1].item()) < 0.06  # DDPM forgets where it began
    again = phase.sample(perfect(phase), noise, steps=100)
    assert torch.corrcoef(torch.cat([again, noise], 1).T)[0, 1].item() > 0.99


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_sampler_begins_at_the_strongest_noise(steps: int) -> None:
    for predict, strongest in [("noise", 999), ("edm", 80.0)]:
        grid = DiffusionPhase(predict).grid(steps, torch.empty(1, dtype=torch.float64))
        assert grid.shape == (steps,)
        assert grid[0].item() == pytest.approx(strongest)
        assert (grid.diff() < 0).all()


def test_shares_of_ones_own_are_a_schedule() -> None:
    phase = DiffusionPhase(schedule=torch.tensor([0.9, 0.5, 0.1]))
    times = {phase.draw_times(torch.empty(64, 1)).max().item() for _ in range(3)}
    assert times == {2}
    assert phase.scalings(torch.tensor([1])).signal.item() == pytest.approx(math.sqrt(0.5))
    for wrong in (torch.tensor([0.5, 0.9]), torch.tensor([0.5]), torch.tensor([0.5, 0.0]), "sigmoid", 3):
        with pytest.raises(PhaseError, match=r"expected one of \('cosine', 'linear'\), or shares of variance"):
            DiffusionPhase(schedule=wrong)


def test_names_of_other_libraries_are_told() -> None:
    with pytest.raises(PhaseError, match="that is 'noise' here"):
        DiffusionPhase("epsilon")
    with pytest.raises(ValueError, match="expected one of"):
        noise_schedule("sigmoid")


def test_more_steps_than_strengths_are_an_error() -> None:
    with pytest.raises(PhaseError, match=r"sample\(steps=60\) was given for 50 strengths"):
        DiffusionPhase(steps=50).sample(lambda xs, times: xs, torch.zeros(1, 1), steps=60)
