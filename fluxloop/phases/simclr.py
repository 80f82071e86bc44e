"""SimCLR: find the other view of each row among all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.contrastive import nt_xent
from fluxloop.phases.joint_embedding import JointEmbeddingPhase, Views

if TYPE_CHECKING:
    from fluxloop.state import StepState


class SimCLRPhase(JointEmbeddingPhase):
    """SimCLR (Chen et al., 2020): two views, one network, the NT-Xent loss over the batch.

    1. Draw two views of each row. 2. ``h = encoder(view)``, ``z = projector(h)`` for both.
    3. `nt_xent`: each of the 2N embeddings is to find its row's other view among the others.

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        temperature: Divides the cosine similarities.

    Models, batches, entries and events are those of `JointEmbeddingPhase`.
    """

    def __init__(self, views: Views | None = None, *, temperature: float = 0.5) -> None:
        super().__init__(views)
        check_number("SimCLRPhase", "temperature", temperature, above=0, error=PhaseError)
        self.temperature = temperature

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the two views of each row with all others."""
        return nt_xent(state.z1, state.z2, self.temperature)
