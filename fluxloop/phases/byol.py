"""BYOL: a student predicts what its moving average says of the other view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.losses.distillation import mean_cosine
from fluxloop.phases.joint_embedding import TeacherPhase

if TYPE_CHECKING:
    from fluxloop.state import StepState


class BYOLPhase(TeacherPhase):
    """BYOL (Grill et al., 2020): bootstrap a representation from one's own moving average.

    1. Draw two views of each row. 2. The student (the paper's online network) embeds both, and the
    ``predictor`` turns each embedding into ``p1``, ``p2``. 3. The teacher (the target network)
    embeds both, without gradients. 4. The squared distance of each normalised prediction to the
    teacher's normalised embedding of the other view, summed over both directions. 5. After the
    update, `EMA` moves the teacher.

    Args:
        views: What makes two views of a batch; left out, batches hold them.

    Models: ``student``, ``teacher`` and ``predictor``; see `TeacherPhase`. Batches and events are
    those of `JointEmbeddingPhase`. Entries: ``views``, ``features`` (N, F) of the student for the
    first view, ``p1`` and ``p2``, ``t1`` and ``t2`` (N, D), ``loss``.

    Example:
        >>> import copy
        >>> student = torch.nn.Linear(4, 8)
        >>> teacher = copy.deepcopy(student).requires_grad_(False)
        >>> models = {"student": student, "teacher": teacher, "predictor": torch.nn.Linear(8, 8)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> learner.set_callbacks([EMA("student", 0.99, into="teacher")])
        >>> history = learner.fit(1, phases=[BYOLPhase(TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows)))])
        >>> learner.step.p1.shape, learner.step.t2.shape
        (torch.Size([32, 8]), torch.Size([32, 8]))
    """

    parts = ("student", "teacher", "predictor")

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed both views twice."""
        student, teacher, predictor = learner.model.student, learner.model.teacher, learner.model.predictor
        view1, view2 = self.seen(state)
        state.features, z1 = self.embed(student, view1)
        _, z2 = self.embed(student, view2)
        state.p1, state.p2 = predictor(z1), predictor(z2)
        with torch.no_grad():
            _, state.t1 = self.embed(teacher, view1)
            _, state.t2 = self.embed(teacher, view2)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare each prediction with the teacher's embedding of the other view."""
        # 4 + -2 x: "4 - 2 x" is the same number, by way of a Python function of torch's
        return 4 + -2 * (mean_cosine(state.p1, state.t2) + mean_cosine(state.p2, state.t1))
