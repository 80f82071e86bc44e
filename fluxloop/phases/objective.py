"""One objective for all that is trained: what most methods of one loss have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fluxloop.errors import BatchError, PhaseError, describe
from fluxloop.events import BackwardBegin, BackwardEnd, LossBegin
from fluxloop.loop import runstep
from fluxloop.phase import AbstractTrainingPhase, Phase
from fluxloop.phases.twin import TwinPhase

if TYPE_CHECKING:
    from fluxloop.learner import Learner
    from fluxloop.state import StepState


class ObjectivePhase(AbstractTrainingPhase):
    """Train by one loss: say the step's `entries`, its `forward` and its `loss`.

    Whatever the learner holds, its models are trained by the one loss: several optimizers step
    one after the other on the gradients of the same backward. Many of fluxloop's phases are
    subclasses that say these three things; a user's can be five lines:

        >>> class Denoising(ObjectivePhase):
        ...     def forward(self, learner, state):
        ...         state.preds = learner.model(state.xs + 0.1 * torch.randn_like(state.xs))
        ...
        ...     def loss(self, learner, state):
        ...         return torch.nn.functional.mse_loss(state.preds, state.xs)

    The events in order, and what the step stores by then: `StepBegin` (the entries), `LossBegin`
    (what `forward` stores), `BackwardBegin` (``loss``, a scalar), `BackwardEnd` (``grads``),
    `UpdateBegin` and `UpdateEnd` of each optimizer, `StepEnd` (what `finish` stores).
    """

    def entries(self, batch: Any) -> dict[str, Any]:
        """Give the entries that a step starts with: ``xs``, and ``ys`` where the batch is a pair."""
        return inputs_and_labels(batch)

    def forward(self, learner: Learner, state: StepState) -> None:
        """Run the models on the entries, and store what they give."""

    def loss(self, learner: Learner, state: StepState) -> Tensor:
        """Give the scalar loss of what `forward` stored."""
        raise PhaseError(
            f"{type(self).__name__} says no loss; write one:\n"
            "    def loss(self, learner, state):\n"
            "        return learner.loss_fn(state.preds, state.ys)"
        )

    parts: tuple[str, ...] = ()
    """The models that `forward` calls by name."""

    def require(self, learner: Learner) -> None:
        """Raise for a learner without these models; asked before anything runs."""
        require_parts(self, learner.model, *self.parts)

    def check(self, learner: Learner) -> None:
        """Raise what is wrong with the learner for this phase."""
        self.require(learner)

    def finish(self, learner: Learner, state: StepState) -> None:
        """Do what follows the update, such as keeping keys for the next step; not called in validation."""

    def step(self, learner: Learner, batch: Any) -> StepState:
        """Train on one batch."""
        with runstep(learner, self, **self.entries(batch)) as (handle, state):
            self.forward(learner, state)
            handle(LossBegin())
            state.loss = self.loss(learner, state)
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            learner.update()
            self.finish(learner, state)
        return state


class ObjectiveValidationPhase(TwinPhase):
    """The validation twin of an `ObjectivePhase`: the same entries, forward and loss, without gradients.

    Args:
        training: The phase whose ``entries``, ``forward`` and ``loss`` it runs.

    Events: `StepBegin`, `LossBegin`, `StepEnd`, with the entries of the training phase.

    Raises:
        PhaseError: `training` is no `ObjectivePhase`.

    Example::

        simclr = SimCLRPhase(views)
        learner.fit(100, phases=[simclr, ObjectiveValidationPhase(simclr)])
    """

    of = ObjectivePhase

    def step(self, learner: Learner, batch: Any) -> StepState:
        """Compute the loss on one batch."""
        with runstep(learner, self, **self.training.entries(batch)) as (handle, state):
            self.training.forward(learner, state)
            handle(LossBegin())
            state.loss = self.training.loss(learner, state)
        return state

    def check(self, learner: Learner) -> None:
        """Raise for a learner without the models that the training phase calls."""
        self.training.require(learner)


def inputs_and_labels(batch: Any) -> dict[str, Any]:
    """Give ``xs``, and ``ys`` of a batch that is a pair; a tuple or list of one item is that item.

    Raises:
        BatchError: It has more items.
    """
    if not isinstance(batch, (tuple, list)):
        return {"xs": batch}
    if len(batch) not in (1, 2):
        raise BatchError(
            f"a batch of {len(batch)} items was given ({describe(batch)}); expected xs, (xs,) or (xs, ys). For others "
            "say in the phase's entries(batch) what they are"
        )
    return dict(zip(("xs", "ys"), batch, strict=False))


def can_run(model: Any) -> bool:
    """Tell whether a learner's model is one module that can be called, rather than a container of parts."""
    return isinstance(model, nn.Module) and type(model).forward is not nn.Module.forward


def require_parts(phase: Phase, model: Any, *parts: str) -> None:
    """Raise for a learner whose models lack a part that a phase calls by name.

    A part is a model of the learner, or an attribute of its single model.

    Raises:
        PhaseError: Names the missing parts and what there is.
    """
    missing = [part for part in parts if not hasattr(model, part)]
    if missing:
        have = list(getattr(model, "_fields", None) or [name for name, _ in _children(model)]) or "none"
        names = ", ".join(f"{part!r}: ..." for part in parts)
        raise PhaseError(
            f"{type(phase).__name__} calls learner.model.{missing[0]}, and the models are {have}; expected "
            f"{', '.join(parts)}: Learner({{{names}}}), or one module with these attributes"
        )


def _children(model: Any) -> Any:
    return model.named_children() if hasattr(model, "named_children") else ()
