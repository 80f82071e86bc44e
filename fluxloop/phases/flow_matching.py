"""Flow matching: learn the velocity that carries noise to data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from fluxloop.errors import PhaseError, describe
from fluxloop.guard.given import check_number
from fluxloop.phases.noised import NoisedPhase, per_row

if TYPE_CHECKING:
    from fluxloop.state import StepState

TIMES = ("uniform", "logit-normal")
SOLVERS = ("euler", "midpoint")


class FlowMatchingPhase(NoisedPhase):
    """Flow matching with straight paths (Lipman et al., 2023; rectified flow of Liu et al., 2023).

    A row at time t, from 0 (noise) to 1 (data), is ``t * xs + (1 - (1 - sigma_min) * t) * noise``; the model learns
    the velocity along that line, ``xs - (1 - sigma_min) * noise``. (Some libraries count time the other way round.)

    Args:
        times: How they are drawn: ``"uniform"``, or ``"logit-normal"``, more often in the middle (Esser et al., 2024).
        sigma_min: How much noise is left at time 1; 0 makes it a rectified flow.
        conditional: Whether the model takes a condition, ``model(noised, times, ys)``.
        condition_dropout: Share of the rows that are trained without their condition.
        null: What stands in its place.

    Models: one, ``model(noised, times) -> velocity``, with times (N,), floats from 0 to 1. Batches: ``xs``, or
    ``(xs, ys)``. Entries and events are those of `NoisedPhase`.

    Raises:
        PhaseError: There are no such times, or a number is out of range.

    Example:
        >>> class Velocity(torch.nn.Linear):
        ...     def forward(self, noised, times):
        ...         return super().forward(torch.cat([noised, times[:, None]], dim=1))
        >>> learner = Learner(Velocity(5, 4), data=(torch.randn(64, 4),), default_callbacks=False)
        >>> phase = FlowMatchingPhase()
        >>> history = learner.fit(1, phases=[phase])
        >>> phase.sample(learner.model, torch.randn(3, 4), steps=4).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        *,
        times: str = "uniform",
        sigma_min: float = 0.0,
        conditional: bool = False,
        condition_dropout: float = 0.0,
        null: float | None = None,
    ) -> None:
        super().__init__(conditional=conditional, condition_dropout=condition_dropout, null=null)
        if times not in TIMES:
            raise PhaseError(f"FlowMatchingPhase(times={describe(times)}) was given; expected one of {TIMES}")
        check_number("FlowMatchingPhase", "sigma_min", sigma_min, least=0, most=1, error=PhaseError)
        self.times = times
        self.sigma_min = sigma_min

    def draw_times(self, xs: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw times from 0 to 1, shape (N,)."""
        draw = torch.rand if self.times == "uniform" else torch.randn
        drawn = draw(len(xs), dtype=xs.dtype, device=xs.device, generator=generator)
        return drawn if self.times == "uniform" else drawn.sigmoid()

    def mix(self, state: StepState) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows between noise and data, their times, and the velocity."""
        t, shrink = per_row(state.times, state.xs), 1 - self.sigma_min
        noised = t * state.xs + (1 - shrink * t) * state.noise
        return noised, state.times, state.xs - shrink * state.noise

    @torch.no_grad()
    def sample(
        self,
        model: Any,
        noise: Tensor,
        ys: Any = None,
        *,
        steps: int = 50,
        guidance: float = 1.0,
        solver: str = "midpoint",
    ) -> Tensor:
        """Carry noise to data, in steps of equal length; nothing is drawn, and the model's mode is left as it is.

        Args:
            model: Such as ``learner.weights["model@ema"]``, in eval mode.
            noise: Standard normal, of the shape of rows, on the model's device.
            ys: Their conditions, where the phase is conditional.
            steps: Number of steps.
            guidance: How much is made of the condition.
            solver: ``"euler"``, or ``"midpoint"``, which runs the model twice in each step.

        Returns:
            Rows of the shape of `noise`.

        Raises:
            PhaseError: An argument does not fit.
        """
        self.check_sampling(ys, steps, guidance)
        if solver not in SOLVERS:
            raise PhaseError(
                f"FlowMatchingPhase.sample(solver={describe(solver)}) was given; expected one of {SOLVERS}"
            )

        def velocity(xs: Tensor, t: float) -> Tensor:
            return self.guided(model, xs, torch.full((len(xs),), t, dtype=xs.dtype, device=xs.device), ys, guidance)

        xs = noise
        for step in range(steps):
            t, length = step / steps, 1 / steps
            if solver == "euler":
                xs = xs + length * velocity(xs, t)
            else:
                xs = xs + length * velocity(xs + length / 2 * velocity(xs, t), t + length / 2)
        return xs
