"""SimCLR: find the other view of each row among all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.contrastive import nt_xent
from fluxloop.phases.joint_embedding import ComparingPhase, Views
from fluxloop.processes.gather import join_rows

if TYPE_CHECKING:
    from fluxloop.state import StepState


class SimCLRPhase(ComparingPhase):
    """SimCLR (Chen et al., 2020): two views, one network, the NT-Xent loss over the batch.

    1. Draw two views of each row. 2. ``h = encoder(view)``, ``z = projector(h)`` for both.
    3. `nt_xent`: each of the 2N embeddings is to find its row's other view among the others.

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        temperature: Divides the cosine similarities.
        gather: Whether the rows of other processes count, where several train; see `ComparingPhase`.

    Models, batches, entries and events are those of `JointEmbeddingPhase`.

    Example:
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 6)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> views = TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows))
        >>> history = learner.fit(1, phases=[SimCLRPhase(views, temperature=0.2)])
        >>> learner.step.features.shape, learner.step.z1.shape
        (torch.Size([32, 8]), torch.Size([32, 6]))
    """

    def __init__(self, views: Views | None = None, *, temperature: float = 0.5, gather: bool = True) -> None:
        super().__init__(views, gather=gather)
        check_number("SimCLRPhase", "temperature", temperature, above=0, error=PhaseError)
        self.temperature = temperature

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the two views of each row with all others."""
        group = self.group(learner)
        if group is None:
            return nt_xent(state.z1, state.z2, self.temperature)
        (z1, z2), rows = join_rows(group, state.z1, state.z2)
        # Each process compares its own rows with all: a share of the work of comparing all. One whose rows do not
        # count compares all: what it finds weighs nothing, and its gradients are 0.
        return nt_xent(z1, z2, self.temperature, own=rows.own if rows.counts[rows.rank] else None)
