"""Callbacks that need gradients which are used in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    BackwardEnd,
    Callback,
    CallbackError,
    ConditionalCallback,
    CustomCallback,
    GradientClip,
    Learner,
    LogHistograms,
    Memory,
    StepEnd,
    StopOnNaNLoss,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    on,
)


def learner_of(*callbacks: Callback, in_backward: bool = True) -> Learner:
    return Learner(
        nn.Linear(2, 1),
        nn.functional.mse_loss,
        data=([(torch.ones(2, 2), torch.ones(2, 1))] * 2,),
        callbacks=callbacks,
        accelerator=Accelerator("cpu", optimizer_in_backward=in_backward),
        seed=0,
    )


class Reads(Callback):
    """Reads gradients when a step has ended."""

    reads = ("step.grads",)

    @on(StepEnd, AbstractTrainingPhase)
    def read(self, event: Any, phase: Any, learner: Any) -> None:
        learner.step.grads["weight"]


class Vetoes(Callback):
    """May cancel an update."""

    reads = ("step.loss",)

    @on(UpdateBegin, AbstractTrainingPhase)
    def veto(self, event: Any, phase: Any, learner: Any) -> None:
        """Look at the loss."""


class Notes(Vetoes):
    """Says that it only takes note."""

    in_compiled_step = "after"


def every(event: Any, phase: Any) -> bool:
    return True


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (GradientClip(1.0), r"GradientClip handles UpdateBegin of TrainingPhase \("),
        (ConditionalCallback(GradientClip(value=0.1), every), "handles UpdateBegin of TrainingPhase"),
        (CustomCallback(print, BackwardEnd), r"handles BackwardEnd of TrainingPhase \(reads '\*'\)"),
        (Vetoes(), r"Vetoes handles UpdateBegin of TrainingPhase \(reads 'step.loss'\)"),
        (Reads(), "Reads reads 'step.grads' at StepEnd of TrainingPhase"),
        (LogHistograms(Memory()), "LogHistograms.* is to log gradients"),
    ],
)
def test_a_callback_that_would_come_too_late_is_refused_by_name_event_and_path(callback: Callback, said: str) -> None:
    with pytest.raises(CallbackError, match=said):
        learner_of(callback)
    learner = learner_of()
    with pytest.raises(CallbackError, match=said):
        learner.add_callback(callback)
    learner.fit(1)
    assert learner_of(callback, in_backward=False).callbacks.order


def test_those_that_come_after_the_update_or_look_at_each_gradient_are_let_through() -> None:
    seen: list[float] = []
    learner = learner_of(
        *(Notes(), EMA("model", 0.9), LogHistograms(Memory(), of=("weights", "activations"), every=1)),
        *(StopOnNaNLoss(), CustomCallback(lambda learner: seen.append(learner.step.loss.item()), UpdateEnd)),
    )
    learner.fit(1)
    assert len(seen) == 2
    assert learner.history[TrainingPhase].updates == {None: 2}


class Mine(TrainingPhase):
    """A phase of the user's own."""


class OfMine(Callback):
    """Reads gradients of one phase alone."""

    reads = ("step.grads",)

    @on(BackwardEnd, Mine)
    def read(self, event: Any, phase: Any, learner: Any) -> None:
        """Read nothing."""


def test_a_callback_of_another_phase_is_refused_where_that_phase_is_to_run() -> None:
    learner = learner_of(OfMine())
    before = learner.model.weight.detach().clone()
    learner.fit(0)
    with pytest.raises(CallbackError, match="OfMine handles BackwardEnd of Mine"):
        learner.fit(1, phases=[Mine()])
    assert torch.equal(learner.model.weight, before)
    learner.fit(1)
