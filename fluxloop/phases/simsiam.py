"""SimSiam: predict the other view's embedding, through which no gradient goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.losses.distillation import negative_cosine
from fluxloop.phases.joint_embedding import JointEmbeddingPhase

if TYPE_CHECKING:
    from fluxloop.state import StepState


class SimSiamPhase(JointEmbeddingPhase):
    """SimSiam (Chen and He, 2021): two views, one network, a predictor, no negatives, no teacher.

    1. Draw two views of each row. 2. ``z = projector(encoder(view))`` and ``p = predictor(z)`` for
    both. 3. Minus the cosine similarity of each ``p`` with the other view's ``z``, detached,
    averaged over both directions.

    Args:
        views: What makes two views of a batch; left out, batches hold them.

    Models, batches and events are those of `JointEmbeddingPhase`, and a ``predictor``. Entries
    besides: ``p1`` and ``p2`` (N, D).

    Example:
        >>> models = {name: torch.nn.Linear(4, 4) for name in ("encoder", "projector", "predictor")}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> views = TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows))
        >>> history = learner.fit(1, phases=[SimSiamPhase(views)])
        >>> learner.step.p1.shape, -1 <= learner.step.loss.item() <= 1
        (torch.Size([32, 4]), True)
    """

    parts = ("encoder", "predictor")

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed both views and predict each from the other."""
        super().forward(learner, state)
        state.p1, state.p2 = learner.model.predictor(state.z1), learner.model.predictor(state.z2)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare each prediction with the other view's embedding."""
        return (negative_cosine(state.p1, state.z2) + negative_cosine(state.p2, state.z1)) / 2
