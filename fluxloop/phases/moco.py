"""MoCo: find the key of each query among those of past batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.contrastive import info_nce
from fluxloop.phases.joint_embedding import TeacherPhase, Views
from fluxloop.phases.queue import QueuePhase

if TYPE_CHECKING:
    from fluxloop.state import StepState


class MoCoPhase(QueuePhase, TeacherPhase):
    """MoCo (He et al., 2020): contrast queries with a queue of keys from a moving average.

    1. Draw two views of each row. 2. ``q = student(view1)``, normalised. 3. ``k = teacher(view2)``,
    normalised, without gradients. 4. `info_nce` of each query with its key against the queue.
    5. After the update, the keys enter the queue in place of the oldest; `EMA` moves the teacher.

    The queue is filled with random unit vectors before the first step, as in the paper's code; they
    come from the run's seed, ``stream_seed(seed, "MoCoPhase/queue")``. Where several processes train,
    the keys of all enter the queue, which is the same in all of them. (The paper shuffles rows among processes for
    batch norm; here there is `synchronise_batch_norm`.)

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        queue_size: Number of keys in the queue.
        temperature: Divides the similarities.

    Models are those of `TeacherPhase`: the paper's query and key encoders. Batches and events are
    those of `JointEmbeddingPhase`. Entries: ``views``, ``features`` (N, F), ``queries`` and ``keys``
    (N, D), ``loss``.

    Raises:
        PhaseError: `queue_size` is less than 1.

    Attributes:
        queue: The keys, shape (queue_size, D); None before the first step.

    Example:
        >>> import copy
        >>> student = torch.nn.Linear(4, 8)
        >>> models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> learner.set_callbacks([EMA("student", 0.99, into="teacher")])
        >>> moco = MoCoPhase(TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows)), queue_size=128)
        >>> history = learner.fit(1, phases=[moco])
        >>> moco.queue.shape
        torch.Size([128, 8])
    """

    def __init__(self, views: Views | None = None, *, queue_size: int = 4096, temperature: float = 0.07) -> None:
        super().__init__(views, queue_size=queue_size)
        check_number("MoCoPhase", "temperature", temperature, above=0, error=PhaseError)
        self.temperature = temperature

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed one view by each network."""
        view1, view2 = self.seen(state)
        state.features, z1 = self.embed(learner.model.student, view1)
        state.queries = normalize(z1, dim=1)
        with torch.no_grad():
            state.keys = normalize(self.embed(learner.model.teacher, view2)[1], dim=1)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Have each query find its key."""
        return info_nce(state.queries, state.keys, self.past(learner, state.keys), self.temperature)

    def entering(self, state: StepState) -> Tensor:
        """Return the keys."""
        keys: Tensor = state.keys
        return keys
