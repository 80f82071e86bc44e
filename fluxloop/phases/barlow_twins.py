"""Barlow Twins: make the cross-correlation of two views the identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.redundancy import barlow_twins_loss
from fluxloop.phases.joint_embedding import JointEmbeddingPhase, Views

if TYPE_CHECKING:
    from fluxloop.state import StepState


class BarlowTwinsPhase(JointEmbeddingPhase):
    """Barlow Twins (Zbontar et al., 2021): two views, one network, no negatives.

    1. Draw two views of each row. 2. Embed both. 3. `barlow_twins_loss`: each dimension agrees
    between the views and is uncorrelated with the others.

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        weight: Of the correlations beside the diagonal.

    Models, batches, entries and events are those of `JointEmbeddingPhase`.
    """

    def __init__(self, views: Views | None = None, *, weight: float = 5e-3) -> None:
        super().__init__(views)
        check_number("BarlowTwinsPhase", "weight", weight, least=0, error=PhaseError)
        self.redundancy_weight = weight

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the cross-correlation with the identity."""
        return barlow_twins_loss(state.z1, state.z2, self.redundancy_weight)
