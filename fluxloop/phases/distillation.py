"""Distillation: learn from the labels and from the outputs of a frozen teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from fluxloop.compute.modes import watching
from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.distillation import distillation_loss
from fluxloop.phases.objective import ObjectivePhase
from fluxloop.phases.supervised import unpack

if TYPE_CHECKING:
    from fluxloop.state import StepState


class DistillationPhase(ObjectivePhase):
    """Distillation (Hinton et al., 2015) of a frozen ``teacher`` into a ``student``.

    1. Both compute their logits; the teacher in eval mode, without gradients. 2. `weight` times
    `distillation_loss` plus ``1 - weight`` times the loss of the labels.

    Args:
        temperature: Divides the logits.
        weight: Of the teacher, 0 to 1.

    Models: ``student`` and ``teacher``; freeze it with ``teacher.requires_grad_(False)``. The loss of
    the labels is the learner's ``loss_fn``, cross entropy where it has none. Batches: ``(xs, ys)``.
    Entries: ``xs``, ``ys`` (N,), ``preds`` and ``teacher_preds`` (N, C), ``loss``. The events are those
    of `ObjectivePhase`.

    Raises:
        PhaseError: A model is missing, the teacher's parameters require gradients, or a number is out of range.
        BatchError: A batch is no pair.

    Example:
        >>> models = {"student": torch.nn.Linear(4, 3), "teacher": torch.nn.Linear(4, 3).requires_grad_(False)}
        >>> data = ((torch.randn(64, 4), torch.arange(64) % 3),)
        >>> learner = Learner(models, data=data, default_callbacks=False)
        >>> history = learner.fit(1, phases=[DistillationPhase(temperature=2.0)])
        >>> learner.step.preds.shape, learner.step.teacher_preds.requires_grad
        (torch.Size([32, 3]), False)
    """

    parts = ("student", "teacher")

    def __init__(self, temperature: float = 4.0, weight: float = 0.9) -> None:
        check_number("DistillationPhase", "temperature", temperature, above=0, error=PhaseError)
        check_number("DistillationPhase", "weight", weight, least=0, most=1, error=PhaseError)
        self.temperature = temperature
        self.soft_weight = weight

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return ``xs`` and ``ys`` of a pair."""
        xs, ys = unpack(self, batch)
        return {"xs": xs, "ys": ys}

    def forward(self, learner: Any, state: StepState) -> None:
        """Run both models."""
        state.preds = learner.model.student(state.xs)
        with watching(learner.model.teacher):
            state.teacher_preds = learner.model.teacher(state.xs)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Weigh the teacher against the labels."""
        soft = distillation_loss(state.preds, state.teacher_preds, self.temperature)
        of_labels = cross_entropy if learner.loss_fn is None else learner.loss_fn
        hard: Tensor = of_labels(state.preds, state.ys)
        return self.soft_weight * soft + (1 - self.soft_weight) * hard

    def require(self, learner: Any) -> None:
        """Raise for missing models, and for a teacher that is trained."""
        super().require(learner)
        if any(parameter.requires_grad for parameter in learner.model.teacher.parameters()):
            raise PhaseError(
                "DistillationPhase learns from a frozen teacher, and parameters of learner.model.teacher require "
                "gradients; write teacher.requires_grad_(False) before the learner is made"
            )
