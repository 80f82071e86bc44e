"""End a fit whose loss, or whose gradients, are no longer finite."""

from __future__ import annotations

import sys
from typing import Any

from attrs import define, field

from fluxloop.callback import Callback, Handler, on
from fluxloop.events import BackwardBegin, StepBegin, StepEnd, UpdateBegin
from fluxloop.guard.given import yes_or_no
from fluxloop.phase import AbstractTrainingPhase, Phase


@define
class StopOnNaNLoss(Callback):
    """End the fit when a training loss or a gradient is NaN or infinite, before it reaches the weights.

    The loss is looked at before its gradients are computed, and the gradients of an optimizer
    before it steps: after they were clipped or changed by other handlers of `UpdateBegin`, and by
    their norm, where `GradientClip` has computed it, also before they were clipped. Weights, the
    optimizer's state, and the models' buffers (batch norm's running statistics) stay those of the
    last good step; of several optimizers in a step those that had stepped before have stepped. A
    warning and ``history.stop_reason`` say what became NaN or infinite, of which optimizer and parameters, in
    which epoch and step. To have it be an error::

        warnings.filterwarnings("error", message="the fit stops")

    On a GPU, looking at a number at every step would stop the queue: there it is delivered a step or
    two later, and the fit ends then. A fused `Adam` or `AdamW`, which fluxloop chooses there where
    it can, leaves out its updates from the bad step on, without waiting; other optimizers
    have stepped with the bad gradients by then. With ``wait=True`` each step waits for the numbers. A compiled
    step leaves everything as it was, and the fit ends when it has run. With
    ``Accelerator(optimizer_in_backward=True)`` each gradient is looked at before its parameter is stepped; those
    stepped before it have been by then, and the warning says how many.

    The gradients of an optimizer that a phase steps by hand are not looked at, but the loss is, when the step ends.

    Args:
        wait: Whether to wait for the device rather than stop a step or two later.

    Raises:
        ValueError: `wait` is not True or False.

    Reads: step.loss, step.losses, step.grads, step.grad_norm, step.grad_norms

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore")
        >>> learner = testing.toy_learner(StopOnNaNLoss(), coefficient=float("nan"))
        >>> history = learner.fit(10)
        >>> "nan" in history.stop_reason, learner.model.value.item()  # its weight is what it was
        (True, 0.0)
    """

    wait: bool = field(default=False, validator=yes_or_no())

    reads = ("step.loss", "step.losses", "step.grads", "step.grad_norm", "step.grad_norms")
    draws = False
    in_compiled_step = "inside"
    _looks_before_use = True  # where gradients are used in the backward pass, ``learner.finite`` looks before that

    # learner.finite reads the entries, not this class: going through the learner view for each of them
    # took a third of the check's time.

    @on(StepBegin, AbstractTrainingPhase)
    def start(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Begin a step: its loss has not been looked at, and the buffers are those of a good step."""
        learner.finite.begin_step(self.wait)

    @on(BackwardBegin)
    def look_before(self, event: BackwardBegin, phase: Phase, learner: Any) -> None:
        """Look at the losses before gradients are computed."""
        learner.finite.require_losses(self.wait)

    @on(UpdateBegin)
    def look_at_gradients(self, event: UpdateBegin, phase: Phase, learner: Any) -> None:
        """Look at the gradients before they are used."""
        learner.finite.require_gradients(event.name, self.wait)

    def _look_at_norm(self, event: Any, phase: Phase, learner: Any) -> None:
        """Look at gradients that `GradientClip` has just clipped."""
        learner.finite.require_clipped(event.name, self.wait)

    def _choose_after(self, call: Handler, before: Callback | None) -> Handler:
        """Return what handles an event right after another callback; nobody comes in between.

        Args:
            call: The handler.
            before: That callback.
        """
        if "fluxloop.callbacks.gradient_clip" not in sys.modules:  # many learners have none, and need not load it
            return call
        from fluxloop.callbacks.gradient_clip import GradientClip

        clipped = type(before) is GradientClip and before.optimizer is None
        is_own = getattr(call, "__func__", None) is StopOnNaNLoss.look_at_gradients  # a subclass may have another
        return self._look_at_norm if clipped and is_own else call

    @on(StepEnd, AbstractTrainingPhase)
    def look_after(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Look at the loss of a phase that says nothing before its backward."""
        if not learner.finite.looked:
            learner.finite.require_losses(self.wait)
