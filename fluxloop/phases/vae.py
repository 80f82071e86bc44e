"""The variational autoencoder: reconstruct the input from a sample of its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.errors import PhaseError, describe
from fluxloop.guard.given import check_called, check_number
from fluxloop.losses.reconstruction import kl_standard_normal, squared_error
from fluxloop.phases.objective import ObjectivePhase

if TYPE_CHECKING:
    from fluxloop.state import StepState


class VAEPhase(ObjectivePhase):
    """VAE (Kingma and Welling, 2014), beta-VAE (Higgins et al., 2017) with a `beta` other than 1.

    1. The encoder returns the mean and the logarithm of the variance of the code. 2. A code is drawn,
    ``latents = mean + exp(logvar / 2) * noise``. 3. The decoder reconstructs the input. 4. The loss is the
    error of the reconstruction plus `beta` times the divergence of the code from a standard normal distribution.

    Args:
        beta: Weight of the divergence.
        compare: ``(preds, xs) -> scalar``, the error of the reconstruction. To weigh against the divergence it has
            to be summed over each row and averaged over rows; left out, `squared_error`.

    Raises:
        PhaseError: `beta` is less than 0, a model is missing, or the encoder returns something else.

    Models: ``encoder``, which returns ``(mean, logvar)``, each (N, D), or one tensor (N, 2 D) of both;
    and ``decoder``. Batches: ``xs``, or ``(xs, ys)``. Entries: ``xs``, ``ys`` where there are labels,
    ``mean`` (also as ``features``), ``logvar``, ``latents`` (N, D), ``preds``, of the shape of ``xs``,
    ``reconstruction``, ``divergence`` and ``loss``, scalars. The events are those of `ObjectivePhase`.

    Example:
        >>> models = {"encoder": torch.nn.Linear(4, 6), "decoder": torch.nn.Linear(3, 4)}  # 3 means, 3 variances
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> history = learner.fit(1, phases=[VAEPhase(beta=0.5)])
        >>> learner.step.mean.shape, learner.step.latents.shape, learner.step.divergence.ndim
        (torch.Size([32, 3]), torch.Size([32, 3]), 0)
    """

    parts = ("encoder", "decoder")

    def __init__(self, beta: float = 1.0, compare: Callable[[Tensor, Tensor], Tensor] = squared_error) -> None:
        check_number("VAEPhase", "beta", beta, least=0, error=PhaseError)
        check_called("VAEPhase", "compare", compare, "a function (preds, xs) -> scalar", PhaseError)
        self.beta = beta
        self.compare = compare

    def forward(self, learner: Any, state: StepState) -> None:
        """Encode, draw a code, decode."""
        code: Any = learner.model.encoder(state.xs)
        mean, logvar = self._halves(code)
        state.mean = state.features = mean
        state.logvar = logvar
        state.latents = mean + (logvar / 2).exp() * torch.randn_like(mean)
        state.preds = learner.model.decoder(state.latents)

    def _halves(self, code: Any) -> tuple[Tensor, Tensor]:
        """Split the encoder's output into the mean and the logarithm of the variance.

        Raises:
            PhaseError: It is neither two tensors of one shape, nor one with an even number of columns.
        """
        halves = code
        if isinstance(code, Tensor) and code.ndim > 1 and code.shape[1] % 2 == 0:
            halves = code.chunk(2, dim=1)
        if not isinstance(halves, (tuple, list)) or len(halves) != 2 or halves[0].shape != halves[1].shape:
            raise PhaseError(
                f"VAEPhase got {describe(code)} from the encoder; expected (mean, logvar), each (N, D), or one "
                "tensor of both, (N, 2 D)"
            )
        return halves[0], halves[1]

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Weigh the reconstruction against the divergence."""
        state.reconstruction = self.compare(state.preds, state.xs)
        state.divergence = kl_standard_normal(state.mean, state.logvar)
        loss: Tensor = state.reconstruction + self.beta * state.divergence
        return loss
