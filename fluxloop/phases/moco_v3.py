"""MoCo v3: find the key of each query in the batch, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.phases.joint_embedding import ComparingPhase, TeacherPhase, Views

if TYPE_CHECKING:
    from fluxloop.state import StepState


class MoCoV3Phase(TeacherPhase, ComparingPhase):
    """MoCo v3 (Chen et al., 2021): contrast predictions with a moving average's keys of the same batch; no queue.

    1. Draw two views of each row. 2. Queries: the student embeds both, and the ``predictor`` turns each embedding into
    ``q1``, ``q2``. 3. Keys: the teacher embeds both, ``k1``, ``k2``, without gradients. 4. `batch_nce` of ``q1`` with
    ``k2`` and of ``q2`` with ``k1``, the sum times twice the temperature. 5. After the update, `EMA` moves the teacher.

    For vision transformers the paper keeps the projection of patches at its random beginning:
    ``student.encoder.patch_embed.requires_grad_(False)``.

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        temperature: Divides the cosine similarities; the paper's is 0.2 for transformers, 1 for ResNets.
        gather: Whether the keys of other processes count, where several train; see `ComparingPhase`.

    Models: ``student``, ``teacher`` and ``predictor``; see `TeacherPhase`. Batches and events are those of
    `JointEmbeddingPhase`. Entries: ``views``, ``features`` (N, F) of the student for the first view, ``q1`` and ``q2``,
    ``k1`` and ``k2`` (N, D), ``loss``.

    Raises:
        PhaseError: `temperature` is not above 0.

    Example:
        >>> import copy
        >>> student = torch.nn.Linear(4, 8)
        >>> teacher = copy.deepcopy(student).requires_grad_(False)
        >>> models = {"student": student, "teacher": teacher, "predictor": torch.nn.Linear(8, 8)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> learner.set_callbacks([EMA("student", 0.99, into="teacher")])
        >>> history = learner.fit(1, phases=[MoCoV3Phase(TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows)))])
        >>> learner.step.q1.shape, learner.step.k2.requires_grad
        (torch.Size([32, 8]), False)
    """

    parts = ("student", "teacher", "predictor")

    def __init__(self, views: Views | None = None, *, temperature: float = 0.2, gather: bool = True) -> None:
        super().__init__(views, gather=gather)
        check_number("MoCoV3Phase", "temperature", temperature, above=0, error=PhaseError)
        self.temperature = temperature

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed both views by both networks."""
        student, teacher, predictor = learner.model.student, learner.model.teacher, learner.model.predictor
        view1, view2 = self.seen(state)
        state.features, z1 = self.embed(student, view1)
        _, z2 = self.embed(student, view2)
        state.q1, state.q2 = predictor(z1), predictor(z2)
        with torch.no_grad():
            _, state.k1 = self.embed(teacher, view1)
            _, state.k2 = self.embed(teacher, view2)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Have each query find the key of the other view."""
        queries, keys = (state.q1, state.q2), (state.k2, state.k1)
        return 2 * self.temperature * self.find_keys(learner, queries, keys, self.temperature)
