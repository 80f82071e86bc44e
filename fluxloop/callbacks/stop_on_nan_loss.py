"""End a fit whose loss, or whose gradients, are no longer finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import define, field

from fluxloop.callback import Callback, on
from fluxloop.events import BackwardBegin, StepBegin, StepEnd, UpdateBegin
from fluxloop.given import yes_or_no
from fluxloop.phase import AbstractTrainingPhase, Phase


@define
class StopOnNaNLoss(Callback):
    """End the fit when a training loss or a gradient is NaN or infinite, before it reaches the weights.

    The loss is looked at before its gradients are computed, and the gradients of an optimizer
    before it steps: after they were clipped or changed by other handlers of `UpdateBegin`, and by
    their norm, where `GradientClip` has computed it, also before they were clipped. Weights, the
    optimizer's state, and the models' buffers (batch norm's running statistics) stay those of the
    last good step; of several optimizers in a step those that had stepped before have stepped. A
    warning and ``history.stop_reason`` say what became what, of which optimizer and parameters, in
    which epoch and step. To have it be an error::

        warnings.filterwarnings("error", message="the fit stops")

    On a GPU looking at a number would stop the queue at every step: there it is delivered a step or
    two later, and the fit ends then. A fused `Adam` or `AdamW`, which fluxloop chooses there where
    it can, leaves out its updates from the bad step on, without being waited for; other optimizers
    have taken the bad gradients by then. With ``wait=True`` the numbers are waited for. A compiled
    step leaves everything as it was, and the fit ends when it has run.

    Optimizers that a phase steps by hand are not seen, but their loss is, when the step ends.

    Args:
        wait: Whether to wait for the device rather than stop a step or two later.

    Reads: step.loss, step.losses, step.grads, step.grad_norm, step.grad_norms
    """

    wait: bool = field(default=False, validator=yes_or_no())
    _looked: bool = field(default=False, init=False, repr=False)

    reads = ("step.loss", "step.losses", "step.grads", "step.grad_norm", "step.grad_norms")
    draws = False
    in_compiled_step = "inside"
    transient = ("_looked",)

    @on(StepBegin, AbstractTrainingPhase)
    def start(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Begin a step: its loss has not been looked at, and the buffers are those of a good step."""
        self._looked = False
        learner.finite.begin_step()

    @on(BackwardBegin)
    def look_before(self, event: BackwardBegin, phase: Phase, learner: Any) -> None:
        """Look at the losses before gradients are computed."""
        self._looked = not torch.compiler.is_compiling()  # then this runs once, and not at every step
        self._look_at_losses(learner)

    @on(UpdateBegin)
    def look_at_gradients(self, event: UpdateBegin, phase: Phase, learner: Any) -> None:
        """Look at the gradients before they are used."""
        step, name = learner.step, event.name
        if name is None:
            norm = step.grad_norm if "grad_norm" in step else None
        else:
            norms = step.grad_norms if "grad_norms" in step else None
            norm = norms.get(name) if isinstance(norms, Mapping) else None
        learner.finite.require_gradients(name, norm, self.wait)

    @on(StepEnd, AbstractTrainingPhase)
    def look_after(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Look at the loss of a phase that says nothing before its backward."""
        if not self._looked:
            self._look_at_losses(learner)

    def _look_at_losses(self, learner: Any) -> None:
        step = learner.step
        if "losses" in step and isinstance(step.losses, Mapping):
            for name, loss in step.losses.items():
                learner.finite.require(f"the loss of {name!r}", loss, self.wait)
        if "loss" in step:
            learner.finite.require("the loss", step.loss, self.wait)
