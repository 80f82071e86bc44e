"""VICReg: views alike, dimensions varied and uncorrelated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.errors import BatchError, PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.redundancy import vicreg_loss
from fluxloop.phases.joint_embedding import ComparingPhase, Views
from fluxloop.processes.gather import join_rows

if TYPE_CHECKING:
    from fluxloop.state import StepState


class VICRegPhase(ComparingPhase):
    """VICReg (Bardes et al., 2022): variance, invariance and covariance of two views' embeddings.

    1. Draw two views of each row. 2. Embed both. 3. `vicreg_loss`, the sum of three terms.

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        invariance: Weight of the distance between the views.
        variance: Weight of the hinge on each dimension's standard deviation.
        covariance: Weight of the covariances between dimensions.
        gather: Whether the rows of other processes count, where several train; see `ComparingPhase`.

    Raises:
        BatchError: A batch has one row alone, which has no variance.

    Models, batches, entries and events are those of `JointEmbeddingPhase`.

    Example:
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 6)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> views = TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows))
        >>> history = learner.fit(1, phases=[VICRegPhase(views, covariance=2.0)])
        >>> learner.step.z1.shape, learner.step.loss.ndim
        (torch.Size([32, 6]), 0)
    """

    def __init__(
        self,
        views: Views | None = None,
        *,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        gather: bool = True,
    ) -> None:
        super().__init__(views, gather=gather)
        for name, given in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
            check_number("VICRegPhase", name, given, least=0, error=PhaseError)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Weigh the three terms.

        Raises:
            BatchError: The batch has one row alone, which has no variance.
        """
        z1, z2, group = state.z1, state.z2, self.group(learner)
        if group is not None:
            (z1, z2), _ = join_rows(group, z1, z2)
        if len(z1) < 2:
            raise BatchError("VICRegPhase was given a batch of one row, which has no variance; use drop_last=True")
        return vicreg_loss(z1, z2, self.invariance, self.variance, self.covariance)
