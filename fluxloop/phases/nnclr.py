"""NNCLR: the positive of a row is its nearest neighbour among past ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.phases.joint_embedding import ComparingPhase, Views
from fluxloop.phases.queue import QueuePhase

if TYPE_CHECKING:
    from fluxloop.state import StepState


class NNCLRPhase(QueuePhase, ComparingPhase):
    """NNCLR (Dwibedi et al., 2021): contrast predictions with nearest neighbours from a queue.

    1. Draw two views of each row, and embed both: ``z1``, ``z2``. 2. The ``predictor`` turns each into ``p1``, ``p2``.
    3. For each embedding, find the nearest one of past batches in the queue. 4. `batch_nce`: the neighbour of ``z1`` is
    to find ``p2`` among the predictions of the batch, and that of ``z2`` ``p1``; the mean of both. 5. After the update
    the first view's embeddings, not the predictions, enter the queue in place of the oldest.

    The queue begins with random directions, as `QueuePhase` says.

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        queue_size: Number of embeddings in the queue.
        temperature: Divides the similarities.
        gather: Whether the rows of other processes count, where several train; see `ComparingPhase`.

    Models: ``encoder``, ``projector`` and ``predictor``. Batches and events are those of `JointEmbeddingPhase`.
    Entries: ``views``, ``features`` (N, F), ``z1`` and ``z2``, ``p1`` and ``p2``, ``neighbors1`` and
    ``neighbors2`` (N, D), ``loss``.

    Raises:
        PhaseError: `queue_size` is less than 1, or `temperature` not above 0.

    Attributes:
        queue: The embeddings, normalised, shape (queue_size, D); None before the first step.

    Example:
        >>> models = {name: torch.nn.Linear(4, 4) for name in ("encoder", "projector", "predictor")}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> nnclr = NNCLRPhase(TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows)), queue_size=128)
        >>> history = learner.fit(1, phases=[nnclr])
        >>> learner.step.neighbors1.shape, nnclr.queue.shape
        (torch.Size([32, 4]), torch.Size([128, 4]))
    """

    parts = ("encoder", "projector", "predictor")

    def __init__(
        self,
        views: Views | None = None,
        *,
        queue_size: int = 4096,
        temperature: float = 0.1,
        gather: bool = True,
    ) -> None:
        super().__init__(views, queue_size=queue_size, gather=gather)
        check_number("NNCLRPhase", "temperature", temperature, above=0, error=PhaseError)
        self.temperature = temperature

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed both views, predict from both, and look both up."""
        super().forward(learner, state)
        state.p1, state.p2 = learner.model.predictor(state.z1), learner.model.predictor(state.z2)
        with torch.no_grad():
            queue = self.past(learner, state.z1)
            state.neighbors1, state.neighbors2 = (
                queue[(normalize(z, dim=1) @ queue.T).argmax(1)] for z in (state.z1, state.z2)
            )

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Have each neighbour find the prediction of the other view."""
        neighbors, predictions = (state.neighbors1, state.neighbors2), (state.p2, state.p1)
        return self.find_keys(learner, neighbors, predictions, self.temperature) / 2

    def entering(self, state: StepState) -> Tensor:
        """Return the embeddings of the first view."""
        return normalize(state.z1, dim=1)
