"""Barlow Twins: make the cross-correlation of two views the identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.redundancy import barlow_twins_loss
from fluxloop.phases.joint_embedding import ComparingPhase, Views
from fluxloop.processes.gather import join_rows

if TYPE_CHECKING:
    from fluxloop.state import StepState


class BarlowTwinsPhase(ComparingPhase):
    """Barlow Twins (Zbontar et al., 2021): two views, one network, no negatives.

    1. Draw two views of each row. 2. Embed both. 3. `barlow_twins_loss`: each dimension agrees
    between the views and is uncorrelated with the others.

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        weight: Of the correlations beside the diagonal.
        gather: Whether the rows of other processes count, where several train; see `ComparingPhase`.

    Models, batches, entries and events are those of `JointEmbeddingPhase`.

    Example:
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 6)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> views = TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows))
        >>> history = learner.fit(1, phases=[BarlowTwinsPhase(views)])
        >>> learner.step.features.shape, learner.step.z1.shape
        (torch.Size([32, 8]), torch.Size([32, 6]))
    """

    def __init__(self, views: Views | None = None, *, weight: float = 5e-3, gather: bool = True) -> None:
        super().__init__(views, gather=gather)
        check_number("BarlowTwinsPhase", "weight", weight, least=0, error=PhaseError)
        self.redundancy_weight = weight

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the cross-correlation with the identity."""
        z1, z2, group = state.z1, state.z2, self.group(learner)
        if group is not None:
            (z1, z2), _ = join_rows(group, z1, z2)
        return barlow_twins_loss(z1, z2, self.redundancy_weight)
