"""End a fit whose loss is no longer finite."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import isfinite
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from fluxloop.callback import Callback, on
from fluxloop.errors import CancelFittingException
from fluxloop.events import BackwardBegin, StepBegin, StepEnd
from fluxloop.phase import AbstractTrainingPhase


@define
class StopOnNaNLoss(Callback):
    """End the fit when a training loss is NaN or infinite, before it reaches the weights.

    On the CPU, and with ``wait=True``, the loss is looked at before its gradients are computed,
    so the weights stay those of the last good step. On a GPU that would stop the queue at every
    step: there the number is delivered a step or two later, and the fit ends then. A compiled step
    leaves the weights as they are where its loss is not finite, and the fit ends when it has run.

    A phase that fires no `BackwardBegin` is looked at when its step ends.

    Args:
        wait: Whether to wait for the device rather than stop a step or two later.

    Reads: step.loss, step.losses
    """

    wait: bool = False
    _looked: bool = field(default=False, init=False, repr=False)

    reads = ("step.loss", "step.losses")
    draws = False
    in_compiled_step = "inside"
    transient = ("_looked",)

    @on(StepBegin, AbstractTrainingPhase)
    def start(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Begin a step: its loss has not been looked at."""
        self._looked = False

    @on(BackwardBegin, AbstractTrainingPhase)
    def look_before(self, event: BackwardBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Look at the losses before gradients are computed."""
        self._looked = not torch.compiler.is_compiling()  # then the number is looked at when the step ends
        self._look_at_all(learner)

    @on(StepEnd, AbstractTrainingPhase)
    def look_after(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Look at the loss of a phase that says nothing before its backward."""
        if not self._looked:
            self._look_at_all(learner)

    def _look_at_all(self, learner: Any) -> None:
        step = learner.step
        if "losses" in step and isinstance(step.losses, Mapping):
            for name, loss in step.losses.items():
                self._look(learner, loss, f"the loss of {name!r}")
        if "loss" in step:
            self._look(learner, step.loss, "the loss")

    def _look(self, learner: Any, loss: Any, name: str) -> None:
        if not isinstance(loss, Tensor):
            stop_unless_finite(name, float(loss))
        elif torch.compiler.is_compiling():
            learner.skip_update(~loss.detach().isfinite().all())
        elif loss.numel() == 1:
            if loss.is_cpu or self.wait:
                stop_unless_finite(name, loss.item())
            else:
                learner.host(loss, partial(stop_unless_finite, name))


def stop_unless_finite(name: str, number: float) -> None:
    """End the fit for a number that is NaN or infinite.

    Raises:
        CancelFittingException: Says what became what.
    """
    if not isfinite(number):
        raise CancelFittingException(f"{name} became {number}")
