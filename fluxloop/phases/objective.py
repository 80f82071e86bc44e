"""One objective for all that is trained: what most methods of one loss have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fluxloop.errors import PhaseError, arguments_misfit
from fluxloop.events import BackwardBegin, BackwardEnd, LossBegin
from fluxloop.nested import as_written
from fluxloop.phase import AbstractTrainingPhase, Phase
from fluxloop.phases.twin import TwinPhase

if TYPE_CHECKING:
    from fluxloop.loop import Handle
    from fluxloop.state import StepState


class ObjectivePhase(AbstractTrainingPhase):
    """Train by one loss: write the step's `entries`, its `forward` and its `loss`, and perhaps its `finish`.

    Whatever the learner holds, its models are trained by the one loss: several optimizers step
    one after the other on the gradients of the same backward. Many of fluxloop's phases are
    subclasses that write these three; a user's can be five lines:

        >>> class Denoising(ObjectivePhase):
        ...     def forward(self, learner, state):
        ...         state.preds = learner.model(state.xs + 0.1 * torch.randn_like(state.xs))
        ...
        ...     def loss(self, learner, state):
        ...         return torch.nn.functional.mse_loss(state.preds, state.xs)

    The events in order, and what the step stores by then: `StepBegin` (the entries), `LossBegin`
    (what `forward` stores), `BackwardBegin` (``loss``, a scalar), `BackwardEnd` (``grads``),
    `UpdateBegin` and `UpdateEnd` of each optimizer, `StepEnd` (what `finish` stores).

    Raises:
        PhaseError: There is no `loss`, or the learner lacks a model of `parts`.
        LossError: The loss is no scalar, or has no gradient.
    """

    stores_loss = True

    def forward(self, learner: Any, state: StepState) -> None:
        """Run the models on the entries, and store their outputs in `state`."""

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Return the loss of what `forward` stored, a scalar."""
        raise PhaseError(
            f"{type(self).__name__} says no loss; write one:\n"
            "    def loss(self, learner, state):\n"
            "        return learner.loss_fn(state.preds, state.ys)"
        )

    parts: tuple[str, ...] = ()
    """The models that `forward` calls by name."""

    def require(self, learner: Any) -> None:
        """Raise `PhaseError` for a learner without the models of `parts`, before anything runs."""
        require_parts(self, learner.model, *self.parts)

    def check(self, learner: Any) -> None:
        """Raise for a learner that this phase cannot run."""
        self.require(learner)

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Train on one batch."""
        self.forward(learner, state)
        handle(LossBegin())
        state.loss = self.loss(learner, state)
        handle(BackwardBegin())
        learner.backward(state.loss)
        handle(BackwardEnd())
        learner.update()


class ObjectiveValidationPhase(TwinPhase):
    """The validation twin of an `ObjectivePhase`: the same entries, forward and loss, without gradients.

    Args:
        training: The phase whose ``entries``, ``forward`` and ``loss`` it runs.

    Events: `StepBegin`, `LossBegin`, `StepEnd`, with the entries of the training phase.

    Raises:
        PhaseError: `training` is no `ObjectivePhase`.

    The arguments `name` and `every` are those of `TwinPhase`.

    Example:
        >>> autoencoder = AutoencoderPhase()
        >>> models = {"encoder": torch.nn.Linear(4, 2), "decoder": torch.nn.Linear(2, 4)}
        >>> learner = Learner(models, data=(torch.randn(64, 4), torch.randn(32, 4)), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), Metrics()])
        >>> history = learner.fit(2, phases=[autoencoder, ObjectiveValidationPhase(autoencoder)])
        >>> len(history["validation/loss"])
        2
    """

    stores_loss = True

    of = ObjectivePhase

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Compute the loss on one batch."""
        self.training.forward(learner, state)
        handle(LossBegin())
        state.loss = self.training.loss(learner, state)

    def check(self, learner: Any) -> None:
        """Raise for a learner without the models that the training phase calls."""
        self.training.require(learner)


def can_run(model: Any) -> bool:
    """Return whether a learner's model is one module that can be called, rather than a container of parts."""
    return isinstance(model, nn.Module) and type(as_written(model)).forward is not nn.Module.forward


def may_have(model: Any, name: str) -> bool:
    """Return whether a model may have an attribute: False where a module surely has none.

    A module that is asked for what it has not takes 1 µs to word an error, in each step and for each view.
    """
    kind: Any = type(model)
    if (
        not isinstance(model, nn.Module)
        or kind.__getattr__ is not nn.Module.__getattr__
        or kind.__getattribute__ is not object.__getattribute__
    ):
        return True
    return (
        name in model._modules
        or name in vars(model)
        or hasattr(kind, name)
        or name in model._parameters
        or name in model._buffers
    )


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


def require_call(phase: Phase, model: Any, called: str, *arguments: str) -> None:
    """Raise for a module that cannot be called with so many arguments, before anything runs.

    Args:
        phase: The phase that calls it.
        model: A module; what is none, and what does not say what it takes, is taken to fit.
        called: What it is called by, for the message: ``"learner.model"``.
        arguments: The names of what it is given.

    Raises:
        PhaseError: Says what it takes, and what it is given.
    """
    misfit = arguments_misfit(as_written(model).forward, len(arguments)) if can_run(model) else None
    if misfit is not None:
        given = ", ".join(arguments)
        raise PhaseError(
            f"{type(phase).__name__} calls {called}({given}), and the forward of "
            f"{type(as_written(model)).__name__} has the arguments {misfit[0]} ({misfit[1]}); "
            f"expected a module with\n    def forward(self, {given}):"
        )


def _children(model: Any) -> Any:
    return model.named_children() if hasattr(model, "named_children") else ()
