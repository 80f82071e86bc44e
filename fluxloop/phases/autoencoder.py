"""The autoencoder: reconstruct the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import mse_loss

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_called
from fluxloop.losses.reconstruction import require_same_shape
from fluxloop.phases.objective import ObjectivePhase

if TYPE_CHECKING:
    from fluxloop.state import StepState


class AutoencoderPhase(ObjectivePhase):
    """Reconstruct the input (Hinton and Salakhutdinov, 2006).

    1. ``latents = encoder(xs)``. 2. ``preds = decoder(latents)``. 3. Compare ``preds`` with ``xs``.

    Args:
        compare: ``(preds, xs) -> scalar``.

    Models: ``encoder`` and ``decoder``. Batches: ``xs``, or ``(xs, ys)``. Entries: ``xs``, ``ys`` where
    there are labels, ``latents`` (also as ``features``) (N, D), ``preds``, of the shape of ``xs``,
    ``loss``. The events are those of `ObjectivePhase`.

    Example:
        >>> models = {"encoder": torch.nn.Linear(4, 2), "decoder": torch.nn.Linear(2, 4)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> history = learner.fit(1, phases=[AutoencoderPhase()])
        >>> learner.step.latents.shape, learner.step.preds.shape
        (torch.Size([32, 2]), torch.Size([32, 4]))
    """

    parts = ("encoder", "decoder")

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor] = mse_loss) -> None:
        check_called("AutoencoderPhase", "compare", compare, "a function (preds, xs) -> scalar", PhaseError)
        self.compare = compare

    def forward(self, learner: Any, state: StepState) -> None:
        """Encode and decode."""
        state.latents = state.features = learner.model.encoder(state.xs)
        state.preds = learner.model.decoder(state.latents)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the reconstruction with the input."""
        if self.compare is mse_loss:
            require_same_shape(state.preds, state.xs)
        return self.compare(state.preds, state.xs)
