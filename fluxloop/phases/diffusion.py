"""Diffusion: learn to remove noise of every strength, and sample by removing it little by little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from fluxloop.errors import PhaseError, describe
from fluxloop.guard.given import as_pair, check_number
from fluxloop.phases.noised import NoisedPhase, per_row

if TYPE_CHECKING:
    from fluxloop.state import StepState

PREDICTED = ("noise", "velocity", "edm")
SCHEDULES = ("cosine", "linear")


def noise_schedule(name: str, steps: int = 1000) -> Tensor:
    """Return how much of the signal's variance is left after each step of noise: the cumulative products of 1 - beta.

    Args:
        name: ``"linear"``, betas from 1e-4 to 0.02 for 1000 steps (Ho et al., 2020), larger in proportion for fewer;
            or ``"cosine"`` (Nichol and Dhariwal, 2021), whose betas are at most 0.999.
        steps: Number of steps, T.

    Returns:
        Shape (T,), float64, falling from almost 1 to almost 0.

    Raises:
        ValueError: There is no such schedule.
    """
    if name == "linear":
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64).clamp(max=0.999)
    elif name == "cosine":
        share = torch.arange(steps + 1, dtype=torch.float64) / steps
        left = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"noise_schedule({describe(name)}) was given; expected one of {SCHEDULES}")
    return (1 - betas).cumprod(0)


class Scalings(NamedTuple):
    """What a noised row is made of, and what the model's output for it says; numbers of one shape.

    The row is ``signal * xs + sigma * noise``, the model is given ``into * row``, and
    ``skip * row + out * output`` is its guess of the row without noise.
    """

    signal: Tensor
    sigma: Tensor
    into: Tensor
    skip: Tensor
    out: Tensor


class DiffusionPhase(NoisedPhase):
    """Diffusion (DDPM of Ho et al., 2020; EDM of Karras et al., 2022).

    Draw noise and its strength for each row; the model sees both mixed, and what it is to say of them is:

    ==============  ====================================================================================
    ``"noise"``     the noise (epsilon)
    ``"velocity"``  ``signal * noise - sigma * xs`` (v; Salimans and Ho, 2022)
    ``"edm"``       what makes ``skip * row + out * output`` the row without noise; input, output and error are
                    scaled to unit variance at each strength (preconditioning; Karras et al., 2022, table 1)
    ==============  ====================================================================================

    Args:
        predict: One of these.
        schedule: ``"cosine"``, ``"linear"``, or the shares of variance themselves, as `noise_schedule` gives them.
            EDM has none: the logarithm of its strength is normal.
        steps: Number of strengths of a schedule that is named, T.
        sigma_data: Standard deviation of the data (EDM's scalings).
        log_sigma: Mean and standard deviation of EDM's logarithm of the strength in training.
        sigma_range: Weakest and strongest noise in EDM's sampling.
        conditional: Whether the model takes a condition, ``model(noised, times, ys)``.
        condition_dropout: Share of the rows that are trained without their condition.
        null: What stands in its place.

    Models: one, ``model(noised, times) -> preds``. Times are whole numbers from 0 (weakest) to T - 1, and of EDM
    ``log(sigma) / 4``. Batches: ``xs``, or ``(xs, ys)``. Entries and events are those of `NoisedPhase`; of EDM
    ``times`` are the strengths themselves.

    Raises:
        PhaseError: There is no such prediction or schedule, or a number is out of range.

    Example:
        >>> class Denoiser(torch.nn.Linear):
        ...     def forward(self, noised, times):
        ...         return super().forward(torch.cat([noised, times[:, None]], dim=1))
        >>> learner = Learner(Denoiser(5, 4), data=(torch.randn(64, 4),), default_callbacks=False)
        >>> phase = DiffusionPhase()
        >>> history = learner.fit(1, phases=[phase])
        >>> phase.sample(learner.model, torch.randn(3, 4), steps=4).shape
        torch.Size([3, 4])
    """

    transient = ("_left",)
    kept_as: ClassVar[Mapping[str, str]] = {"predict": "predicts"}

    def __init__(
        self,
        predict: str = "noise",
        *,
        schedule: str | Tensor = "cosine",
        steps: int = 1000,
        sigma_data: float = 0.5,
        log_sigma: tuple[float, float] = (-1.2, 1.2),
        sigma_range: tuple[float, float] = (0.002, 80.0),
        conditional: bool = False,
        condition_dropout: float = 0.0,
        null: float | None = None,
    ) -> None:
        super().__init__(conditional=conditional, condition_dropout=condition_dropout, null=null)
        if predict not in PREDICTED:
            also = {"epsilon": "noise", "eps": "noise", "v": "velocity"}.get(str(predict))
            raise PhaseError(
                f"DiffusionPhase({describe(predict)}) was given; expected one of {PREDICTED}"
                f"{'' if also is None else f': that is {also!r} here'}"
            )
        check_number("DiffusionPhase", "steps", steps, least=2, whole=True, error=PhaseError)
        check_number("DiffusionPhase", "sigma_data", sigma_data, above=0, error=PhaseError)
        self.predicts = predict
        self.sigma_data = sigma_data
        self.log_sigma = _pair("log_sigma", log_sigma, "a mean and a standard deviation: (-1.2, 1.2)")
        self.sigma_range = _pair("sigma_range", sigma_range, "the weakest and the strongest noise: (0.002, 80.0)")
        self._left = _shares(schedule, steps)
        """How much of the signal's variance is left at each time, (T,)."""

    def require(self, learner: Any) -> None:
        """Raise for several models; bring the schedule to the device, so that no step has to wait for it."""
        super().require(learner)
        self._left = self._left.to(learner.accelerator.device)

    def draw_times(self, xs: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw a whole number for each row; the strength itself for EDM."""
        if self.predicts != "edm":
            return torch.randint(len(self._left), (len(xs),), device=xs.device, generator=generator)
        mean, deviation = self.log_sigma
        return (mean + deviation * torch.randn(len(xs), dtype=xs.dtype, device=xs.device, generator=generator)).exp()

    def scalings(self, times: Tensor) -> Scalings:
        """Return what rows at these times are made of."""
        if self.predicts == "edm":
            total = (times**2 + self.sigma_data**2).sqrt()
            one = torch.ones_like(times)
            return Scalings(one, times, 1 / total, (self.sigma_data / total) ** 2, times * self.sigma_data / total)
        left = self._left.to(times.device)[times]
        signal, sigma = left.sqrt(), (1 - left).sqrt()
        if self.predicts == "noise":
            return Scalings(signal, sigma, torch.ones_like(signal), 1 / signal, -sigma / signal)
        return Scalings(signal, sigma, torch.ones_like(signal), signal, -sigma)

    def told(self, times: Tensor) -> Tensor:
        """Return what the model is told of times."""
        return times.log() / 4 if self.predicts == "edm" else times

    def mix(self, state: StepState) -> tuple[Tensor, Tensor, Tensor]:
        """Return the noised rows as the model sees them, their times, and the target."""
        xs, noise = state.xs, state.noise
        signal, sigma, into, skip, out = (per_row(each, xs) for each in self.scalings(state.times))
        row = signal * xs + sigma * noise
        if self.predicts == "noise":
            return row, state.times, noise
        if self.predicts == "velocity":
            return row, state.times, signal * noise - sigma * xs
        return into * row, self.told(state.times), (xs - skip * row) / out

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        model: Any,
        noise: Tensor,
        ys: Any = None,
        *,
        steps: int = 50,
        guidance: float = 1.0,
        eta: float = 0.0,
        clip: float | None = None,
    ) -> Tensor:
        """Make rows of noise: DDIM (Song et al., 2021), and for EDM the sampler of Karras et al. with Heun's steps.

        The model's mode is left as it is. Nothing is drawn, unless `eta` is more than 0.

        Args:
            model: Such as ``learner.weights["model@ema"]``, in eval mode.
            noise: Standard normal, of the shape of rows, on the model's device.
            ys: Their conditions, where the phase is conditional.
            steps: Number of steps. EDM's run the model twice, but the last.
            guidance: How much is made of the condition.
            eta: How much of the noise that a step removes is drawn anew: 0 is DDIM, 1 is DDPM.
            clip: The model's guess of a row is kept within ``-clip`` and ``clip``. Where the model predicts noise, and
                rows are images from -1 to 1, say 1: at strong noise its guess is an error, divided by almost 0.

        Returns:
            Rows of the shape of `noise`.

        Raises:
            PhaseError: An argument does not fit, or there are more steps than strengths.
        """
        self.check_sampling(ys, steps, guidance)
        check_number("DiffusionPhase.sample", "eta", eta, least=0, most=1, error=PhaseError)
        if clip is not None:
            check_number("DiffusionPhase.sample", "clip", clip, above=0, error=PhaseError)

        def guess(row: Tensor, scalings: Scalings, time: Tensor) -> Tensor:
            preds = self.guided(model, scalings.into * row, self.told(time).expand(len(row)), ys, guidance)
            xs = scalings.skip * row + scalings.out * preds
            return xs if clip is None else xs.clamp(-clip, clip)

        times = self.grid(steps, noise)
        grid = [Scalings(*(each.to(noise.dtype) for each in self.scalings(time))) for time in times]
        row = noise * grid[0].sigma if self.predicts == "edm" else noise
        for number, here in enumerate(grid):
            xs = guess(row, here, times[number])
            if number + 1 == len(grid):
                return xs
            there = grid[number + 1]
            found = (row - here.signal * xs) / here.sigma
            row_there = _step(xs, found, here, there, eta)
            if self.predicts == "edm" and not eta:  # Heun: the mean of the slopes at both ends
                xs_there = guess(row_there, there, times[number + 1])
                slope = (found + (row_there - there.signal * xs_there) / there.sigma) / 2
                row_there = row + (there.sigma - here.sigma) * slope
            row = row_there
        return row

    def grid(self, steps: int, like: Tensor) -> Tensor:
        """Return the times of a sampler's steps, from the strongest noise on, shape (steps,)."""
        if self.predicts == "edm":
            low, high = (sigma ** (1 / 7) for sigma in self.sigma_range)
            return torch.linspace(high, low, steps, dtype=like.dtype, device=like.device) ** 7
        most = len(self._left)
        if steps > most:
            raise PhaseError(
                f"DiffusionPhase.sample(steps={steps}) was given for {most} strengths; expected at most these"
            )
        # evenly from the strongest on, as the model was trained at pure noise (Lin et al., 2024, section 3.3)
        return (torch.arange(steps, 0, -1, dtype=torch.float64) * (most / steps)).round().long().to(like.device) - 1


def _step(xs: Tensor, noise: Tensor, here: Scalings, there: Scalings, eta: float) -> Tensor:
    """Mix a guess of rows and of their noise at a weaker strength, with a share of new noise."""
    if not eta:
        return there.signal * xs + there.sigma * noise
    ratio = there.sigma * here.signal / (there.signal * here.sigma)
    new = eta * there.sigma * (1 - ratio**2).sqrt()
    return there.signal * xs + (there.sigma**2 - new**2).sqrt() * noise + new * torch.randn_like(noise)


def _shares(schedule: Any, steps: int) -> Tensor:
    """Return a schedule's shares of variance.

    Raises:
        PhaseError: There is no such schedule, or its shares do not fall from 1 to 0.
    """
    if isinstance(schedule, str) and schedule in SCHEDULES:
        return noise_schedule(schedule, steps)
    left = schedule.detach().to("cpu", torch.float64) if isinstance(schedule, Tensor) else None
    if left is None or left.ndim != 1 or len(left) < 2 or not (left.diff() < 0).all() or left[0] > 1 or left[-1] <= 0:
        raise PhaseError(
            f"DiffusionPhase(schedule={describe(schedule)}) was given; expected one of {SCHEDULES}, or shares of "
            "variance that fall from at most 1 and stay above 0, of shape (T,): noise_schedule('cosine', 1000)"
        )
    return left


def _pair(name: str, given: Any, expected: str) -> tuple[float, float]:
    given = as_pair(given)
    if not isinstance(given, tuple) or len(given) != 2:
        raise PhaseError(f"DiffusionPhase({name}={describe(given)}) was given; expected {expected}")
    check_number("DiffusionPhase", name, given[0], error=PhaseError)
    check_number("DiffusionPhase", name, given[1], above=0, error=PhaseError)
    return given[0], given[1]
