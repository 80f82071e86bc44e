from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Adam

import fluxloop
from fluxloop import (
    BackwardBegin,
    BackwardEnd,
    Callback,
    CancelEpochException,
    CancelFittingException,
    CancelSignal,
    CancelStepException,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LossBegin,
    Phase,
    Recorder,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UpdateEnd,
    ValidationPhase,
    on,
    runepoch,
    runstep,
)
from fluxloop.events import STANDARD_EVENTS
from fluxloop.testing import EventRecorder, toy_learner
from toys import BrokenError

Trace = list[tuple[str, str]]


def read(text: str) -> Trace:
    """Read a trace written as lines of a phase and its events."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return [(event, phase) for phase, *events in lines for event in events]


TWO_EPOCHS = """
FittingPhase    FitBegin
FittingPhase    CycleBegin
TrainingPhase   EpochBegin
TrainingPhase   StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
TrainingPhase   StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
TrainingPhase   EpochEnd
ValidationPhase EpochBegin
ValidationPhase StepBegin LossBegin StepEnd
ValidationPhase StepBegin LossBegin StepEnd
ValidationPhase EpochEnd
FittingPhase    CycleEnd
FittingPhase    CycleBegin
TrainingPhase   EpochBegin
TrainingPhase   StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
TrainingPhase   StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
TrainingPhase   EpochEnd
ValidationPhase EpochBegin
ValidationPhase StepBegin LossBegin StepEnd
ValidationPhase StepBegin LossBegin StepEnd
ValidationPhase EpochEnd
FittingPhase    CycleEnd
FittingPhase    FitEnd
"""

ONE_EPOCH = """
FittingPhase    FitBegin
FittingPhase    CycleBegin
TrainingPhase   EpochBegin
TrainingPhase   StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
TrainingPhase   StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
TrainingPhase   EpochEnd
ValidationPhase EpochBegin
ValidationPhase StepBegin LossBegin StepEnd
ValidationPhase StepBegin LossBegin StepEnd
ValidationPhase EpochEnd
FittingPhase    CycleEnd
FittingPhase    FitEnd
"""

VALIDATION = """
ValidationPhase EpochBegin
ValidationPhase StepBegin LossBegin StepEnd
ValidationPhase StepBegin LossBegin StepEnd
ValidationPhase EpochEnd
FittingPhase    CycleEnd
FittingPhase    FitEnd
"""


class RaiseAt(Callback):
    """Raise an error once, at the first event of a type, or at the n-th event of any."""

    draws = False

    def __init__(self, error: BaseException, event: type[Event] = Event, phase: type[Phase] = Phase, nth: int = 0):
        super().__init__()
        self.error, self.event, self.phase, self.left = error, event, phase, nth

    @on(Event)
    def look(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event) and isinstance(phase, self.phase):
            self.left -= 1
            if self.left == -1:
                raise self.error


class EarlyRaiseAt(RaiseAt):
    """The same, before the recorder: the order of names decides."""


class Witness(EventRecorder):
    """A recorder that runs after those that raise."""


class KeepFitEnd(Callback):
    draws = False

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[FitEnd] = []

    @on(FitEnd)
    def keep(self, event: FitEnd, phase: Phase, learner: Any) -> None:
        self.ends.append(event)


class RaiseInStep(TrainingPhase):
    """Raise in the body of the first step, between `LossBegin` and the loss."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            state.preds = learner.model(state.xs)
            handle(LossBegin())
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            state.loss = learner.loss_fn(state.preds, state.ys)
        return state


class RaiseInEpoch(TrainingPhase):
    """Raise in the body of the epoch, after the first step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for batch in data:
                self.step(learner, batch)
                raise self.error


def recorded(*callbacks: Callback, **options: Any) -> tuple[Learner, EventRecorder]:
    recorder = EventRecorder()
    return toy_learner(recorder, Recorder(), *callbacks, num_batches=2, **options), recorder


def error_of(learner: Learner, phases: list[Phase] | None = None) -> BaseException | None:
    """Fit, and give the exception that leaves."""
    try:
        learner.fit(1, phases=phases)
    except Exception as error:
        return error
    return None


def fit_phase(phase: Phase) -> tuple[Trace, BaseException | None, Learner]:
    learner, recorder = recorded()
    error = error_of(learner, [phase, ValidationPhase()])
    return recorder.trace, error, learner


# A normal fit


def test_a_fit_of_two_epochs_fires_exactly_these_events():
    learner, recorder = recorded()
    learner.fit(2)
    assert recorder.trace == read(TWO_EPOCHS)
    assert learner.history.stop_reason is None


def test_a_training_step_fires_exactly_these_events():
    learner, recorder = recorded()
    TrainingPhase().step(learner, next(iter(learner.data.training)))
    assert recorder.events == [
        "StepBegin",
        "LossBegin",
        "BackwardBegin",
        "BackwardEnd",
        "UpdateBegin",
        "UpdateEnd",
        "StepEnd",
    ]


def test_a_validation_step_fires_loss_begin_too():
    learner, recorder = recorded()
    ValidationPhase().step(learner, next(iter(learner.data.validation)))
    assert recorder.events == ["StepBegin", "LossBegin", "StepEnd"]


def test_an_epoch_outside_a_fit_fires_its_own_events_alone():
    learner, recorder = recorded()
    learner.epoch(ValidationPhase())
    assert recorder.trace == read(VALIDATION)[:-2]


def test_the_steps_entries_are_there_when_the_events_say_so():
    seen: dict[str, list[str]] = {}

    class Look(fluxloop.UnsafeCallback):
        @on(Event, TrainingPhase)
        def look(self, event: Event, phase: Phase, learner: Learner) -> None:
            if not isinstance(event, (EpochBegin, EpochEnd)):
                seen[type(event).__name__] = list(learner.step)

    recorded(Look())[0].fit(1)
    assert seen == {
        "StepBegin": ["xs", "ys"],
        "LossBegin": ["xs", "ys", "preds"],
        "BackwardBegin": ["xs", "ys", "preds", "loss"],
        "BackwardEnd": ["xs", "ys", "preds", "loss", "grads"],
        "UpdateBegin": ["xs", "ys", "preds", "loss", "grads"],
        "UpdateEnd": ["xs", "ys", "preds", "loss", "grads"],
        "StepEnd": ["xs", "ys", "preds", "loss", "grads"],
    }


# Raised in a body


def test_a_step_cancelled_in_its_body_fires_no_step_end_and_is_not_counted():
    trace, error, learner = fit_phase(RaiseInStep(CancelStepException()))
    assert trace == read(
        """
        FittingPhase FitBegin CycleBegin
        RaiseInStep  EpochBegin
        RaiseInStep  StepBegin LossBegin
        RaiseInStep  StepBegin LossBegin StepEnd
        RaiseInStep  EpochEnd
        """
        + VALIDATION
    )
    assert error is None
    assert learner.history.stop_reason is None
    assert (learner.history[RaiseInStep].steps, learner.history[RaiseInStep].epochs) == (1, 1)


def test_an_epoch_cancelled_in_a_step_fires_epoch_end_once():
    trace, error, learner = fit_phase(RaiseInStep(CancelEpochException()))
    assert trace == read(
        """
        FittingPhase FitBegin CycleBegin
        RaiseInStep  EpochBegin
        RaiseInStep  StepBegin LossBegin
        RaiseInStep  EpochEnd
        """
        + VALIDATION
    )
    assert error is None
    assert learner.history.stop_reason is None
    assert (learner.history[RaiseInStep].steps, learner.history[RaiseInStep].epochs) == (0, 1)


def test_a_fit_cancelled_in_a_step_returns_normally_and_says_why():
    trace, error, learner = fit_phase(RaiseInStep(CancelFittingException("low loss reached")))
    assert trace == read(
        """
        FittingPhase FitBegin CycleBegin
        RaiseInStep  EpochBegin
        RaiseInStep  StepBegin LossBegin
        FittingPhase FitEnd
        """
    )
    assert error is None
    assert learner.history.stop_reason == "low loss reached"
    assert (learner.history[RaiseInStep].epochs, learner.history.cycles) == (0, 0)


def test_an_error_in_a_step_leaves_the_fit_after_fit_end():
    broken = BrokenError()
    trace, error, learner = fit_phase(RaiseInStep(broken))
    assert trace == read(
        """
        FittingPhase FitBegin CycleBegin
        RaiseInStep  EpochBegin
        RaiseInStep  StepBegin LossBegin
        FittingPhase FitEnd
        """
    )
    assert error is broken
    assert learner.history.stop_reason is None


def test_an_epoch_cancelled_in_its_body_fires_epoch_end_once_and_the_next_phase_runs():
    trace, error, learner = fit_phase(RaiseInEpoch(CancelEpochException()))
    assert trace == read(
        """
        FittingPhase FitBegin CycleBegin
        RaiseInEpoch EpochBegin
        RaiseInEpoch StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
        RaiseInEpoch EpochEnd
        """
        + VALIDATION
    )
    assert error is None
    assert (learner.history[RaiseInEpoch].steps, learner.history[RaiseInEpoch].epochs) == (1, 1)


IN_EPOCH_BODY = """
FittingPhase FitBegin CycleBegin
RaiseInEpoch EpochBegin
RaiseInEpoch StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
FittingPhase FitEnd
"""


def test_a_fit_cancelled_in_an_epochs_body_returns_without_epoch_end():
    trace, error, learner = fit_phase(RaiseInEpoch(CancelFittingException("enough")))
    assert trace == read(IN_EPOCH_BODY)
    assert error is None
    assert learner.history.stop_reason == "enough"


@pytest.mark.parametrize("raised", [BrokenError(), CancelStepException("no step is running")])
def test_an_error_or_a_cancel_of_no_running_step_in_an_epochs_body_leaves_after_fit_end(raised):
    trace, error, learner = fit_phase(RaiseInEpoch(raised))
    assert trace == read(IN_EPOCH_BODY)
    assert error is raised
    assert learner.history.stop_reason is None


# Raised by a handler: the main cases, written out


def handled(error: BaseException, event: type[Event]) -> tuple[Trace, BaseException | None, Learner]:
    learner, recorder = recorded(RaiseAt(error, event))
    escaped = error_of(learner)
    return recorder.trace, escaped, learner


def test_a_step_cancelled_at_its_begin_is_skipped_and_the_next_follows():
    trace, error, learner = handled(CancelStepException(), StepBegin)
    assert trace == read(
        """
        FittingPhase  FitBegin CycleBegin
        TrainingPhase EpochBegin
        TrainingPhase StepBegin
        TrainingPhase StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
        TrainingPhase EpochEnd
        """
        + VALIDATION
    )
    assert error is None
    assert (learner.history[TrainingPhase].steps, learner.history[TrainingPhase].epochs) == (1, 1)


def test_an_epoch_cancelled_at_its_begin_runs_no_step_and_still_ends():
    trace, error, learner = handled(CancelEpochException(), EpochBegin)
    assert trace == read(
        """
        FittingPhase  FitBegin CycleBegin
        TrainingPhase EpochBegin
        TrainingPhase EpochEnd
        """
        + VALIDATION
    )
    assert error is None
    assert (learner.history[TrainingPhase].steps, learner.history[TrainingPhase].epochs) == (0, 1)


def test_an_epoch_cancelled_at_the_begin_of_a_step_still_ends():
    trace, error, _ = handled(CancelEpochException(), StepBegin)
    assert trace == read(
        """
        FittingPhase  FitBegin CycleBegin
        TrainingPhase EpochBegin
        TrainingPhase StepBegin
        TrainingPhase EpochEnd
        """
        + VALIDATION
    )
    assert error is None


def test_a_fit_cancelled_at_its_begin_fires_nothing_but_its_end():
    trace, error, learner = handled(CancelFittingException("not today"), FitBegin)
    assert trace == read("FittingPhase FitBegin FitEnd")
    assert error is None
    assert learner.history.stop_reason == "not today"


def test_a_fit_cancelled_at_epoch_begin_fires_no_epoch_end():
    trace, error, learner = handled(CancelFittingException("not today"), EpochBegin)
    assert trace == read(
        """
        FittingPhase  FitBegin CycleBegin
        TrainingPhase EpochBegin
        FittingPhase  FitEnd
        """
    )
    assert error is None
    assert learner.history.stop_reason == "not today"


def test_an_epoch_cancelled_at_its_end_ends_once():
    trace, error, learner = handled(CancelEpochException(), EpochEnd)
    assert trace == read(ONE_EPOCH)
    assert error is None
    assert learner.history[TrainingPhase].epochs == 1


def test_a_step_cancelled_at_its_end_ends_once_and_is_counted():
    trace, error, learner = handled(CancelStepException(), StepEnd)
    assert trace == read(ONE_EPOCH)
    assert error is None
    assert learner.history[TrainingPhase].steps == 2


def test_fit_end_follows_an_error_at_fit_begin():
    broken = BrokenError()
    trace, error, _ = handled(broken, FitBegin)
    assert trace == read("FittingPhase FitBegin FitEnd")
    assert error is broken


# Raised by a handler: every event and every outcome


def runs_in(error: CancelSignal, place: tuple[str, str]) -> bool:
    """Whether the scope that a cancel is for is running at an event."""
    event, phase = place
    if isinstance(error, CancelFittingException):
        return True
    if isinstance(error, CancelEpochException):
        return phase != "FittingPhase"
    return phase != "FittingPhase" and event not in ("EpochBegin", "EpochEnd")


def trace_after(error: BaseException, normal: Trace, index: int) -> Trace:
    """The trace of a fit in which a handler of the event at `index` raises `error`."""
    event, phase = normal[index]
    seen = normal[: index + 1]
    if isinstance(error, CancelSignal) and not isinstance(error, CancelFittingException):
        end = "StepEnd" if isinstance(error, CancelStepException) else "EpochEnd"
        if runs_in(error, (event, phase)):
            if event == end:
                return normal
            position = normal.index((end, phase), index)
            return [*seen, *normal[position + (end == "StepEnd") :]]
    return normal if event == "FitEnd" else [*seen, ("FitEnd", "FittingPhase")]


def check_outcome(learner: Learner, recorder: EventRecorder, error: BaseException, normal: Trace, index: int) -> None:
    """Fit, and compare trace, outcome, counts and what is left behind with what must come of `error`."""
    keep = learner.get_callback(KeepFitEnd)
    assert keep is not None
    returns = isinstance(error, CancelSignal) and runs_in(error, normal[index])
    if returns:
        assert learner.fit(1) is learner.history
    else:
        with pytest.raises(type(error)) as caught:
            learner.fit(1)
        assert caught.value is error
    assert recorder.trace == trace_after(error, normal, index)
    reason = error.reason if returns and isinstance(error, CancelFittingException) else None
    assert learner.history.stop_reason == reason
    if normal[index][0] != "FitEnd":
        assert [(end.reason, end.error) for end in keep.ends] == [(reason, None if returns else error)]
    for phase in (TrainingPhase, ValidationPhase):
        if not isinstance(error, BrokenError):  # an error at an End keeps it from later handlers
            ended = [event for event, name in recorder.trace if name == phase.__name__]
            counts = learner.history[phase]
            assert counts.steps == ended.count("StepEnd")
            assert counts.epochs == ended.count("EpochEnd")
    assert learner.history.cycles == recorder.events.count("CycleEnd")
    assert learner.scope is None
    assert learner.num_batches is None
    assert not learner._running.fitting


OUTCOMES = [
    CancelStepException,
    CancelEpochException,
    CancelFittingException,
    BrokenError,
]


@pytest.mark.slow(quick=20)
@pytest.mark.parametrize("kind", OUTCOMES)
@pytest.mark.parametrize("event", STANDARD_EVENTS, ids=lambda event: event.__name__)
def test_what_a_handler_raises_at_an_event_has_this_outcome(event, kind):
    error = kind("because")
    normal = read(ONE_EPOCH)
    index = [name for name, _ in normal].index(event.__name__)
    learner, recorder = recorded(RaiseAt(error, event), KeepFitEnd())
    check_outcome(learner, recorder, error, normal, index)


@pytest.mark.slow(quick=11)
@pytest.mark.parametrize("kind", OUTCOMES)
@pytest.mark.parametrize("event", [EpochBegin, StepBegin, LossBegin, StepEnd, EpochEnd], ids=lambda e: e.__name__)
def test_what_a_handler_raises_in_validation_has_this_outcome(event, kind):
    error = kind("because")
    normal = read(ONE_EPOCH)
    index = normal.index((event.__name__, "ValidationPhase"))
    learner, recorder = recorded(RaiseAt(error, event, ValidationPhase), KeepFitEnd())
    check_outcome(learner, recorder, error, normal, index)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(index=st.integers(0, len(read(ONE_EPOCH)) - 1), kind=st.sampled_from(OUTCOMES))
def test_after_any_outcome_the_next_fit_is_a_normal_one(index, kind):
    error = kind("because")
    learner, recorder = recorded(RaiseAt(error, nth=index), KeepFitEnd())
    check_outcome(learner, recorder, error, read(ONE_EPOCH), index)
    recorder.trace.clear()
    learner.fit(2)
    assert recorder.trace == read(TWO_EPOCHS)
    assert learner.history.stop_reason is None


# An End and its other handlers


@pytest.mark.parametrize("kind", [CancelStepException, CancelEpochException, CancelFittingException])
@pytest.mark.parametrize("event", [StepEnd, EpochEnd, fluxloop.CycleEnd, FitEnd], ids=lambda event: event.__name__)
def test_a_cancel_at_an_end_is_held_until_the_other_handlers_have_run(event, kind):
    error = kind("because")
    witness = Witness()
    learner, recorder = recorded(EarlyRaiseAt(error, event), witness)
    assert error_of(learner) in (error, None)
    assert event.__name__ in recorder.events
    assert witness.trace == recorder.trace
    assert learner.history[TrainingPhase].steps == recorder.trace.count(("StepEnd", "TrainingPhase"))


@pytest.mark.parametrize("event", [StepBegin, LossBegin, BackwardBegin])
def test_a_cancel_elsewhere_keeps_the_event_from_later_handlers(event):
    witness = Witness()
    learner, _ = recorded(EarlyRaiseAt(CancelFittingException(), event), witness)
    learner.fit(1)
    assert event.__name__ not in witness.events
    assert witness.events[-1] == "FitEnd"


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_of_several_cancels_at_one_end_the_one_that_ends_most_takes_effect(turn):
    kinds = (CancelStepException, CancelFittingException, CancelEpochException)
    first, second, third = (*kinds[turn:], *kinds[:turn])

    class A(RaiseAt): ...

    class B(RaiseAt): ...

    class C(RaiseAt): ...

    learner, recorder = recorded(A(first("why"), StepEnd), B(second("why"), StepEnd), C(third("why"), StepEnd))
    learner.fit(1)
    assert recorder.events[-2:] == ["StepEnd", "FitEnd"]
    assert recorder.events.count("StepEnd") == 1
    assert learner.history.stop_reason == "why"


def test_an_update_that_was_made_is_counted_although_a_handler_of_its_end_cancels_the_step():
    learner, recorder = recorded(EarlyRaiseAt(CancelStepException(), UpdateEnd))
    learner.fit(1)
    assert recorder.events.count("StepEnd") == 3, "one step of training and two of validation"
    assert learner.history[TrainingPhase].updates == {None: 2}


def test_every_handler_of_fit_end_runs_whatever_the_others_raise():
    witness = Witness()
    first, second = BrokenError("first"), BrokenError("second")

    class A(RaiseAt): ...

    class B(RaiseAt): ...

    learner, _ = recorded(A(first, FitEnd), B(second, FitEnd), witness)
    with pytest.raises(BrokenError, match="first") as caught:
        learner.fit(1)
    assert witness.trace == read(ONE_EPOCH)
    assert any("B failed at FitEnd as well" in note and "second" in note for note in caught.value.__notes__)


def test_an_error_at_fit_end_does_not_hide_the_error_that_ended_the_fit():
    first, second = BrokenError("first"), BrokenError("second")
    learner, recorder = recorded(RaiseAt(first, LossBegin), EarlyRaiseAt(second, FitEnd))
    with pytest.raises(BrokenError, match="first") as caught:
        learner.fit(1)
    assert recorder.events[-2:] == ["LossBegin", "FitEnd"]
    assert any("FitEnd failed as well" in note and "second" in note for note in caught.value.__notes__)


def test_an_error_at_fit_end_is_not_hidden_by_a_cancel_there():
    for cancel_first in (True, False):
        cancel, broken = CancelFittingException("enough"), BrokenError()
        first, second = (cancel, broken) if cancel_first else (broken, cancel)
        learner, _ = recorded(EarlyRaiseAt(first, FitEnd), RaiseAt(second, FitEnd))
        with pytest.raises(BrokenError):
            learner.fit(1)


def test_fit_end_tells_why_the_fit_stopped_and_what_failed():
    for error in (None, CancelFittingException("low loss"), BrokenError("ouch")):
        keep = KeepFitEnd()
        learner, _ = recorded(keep, *([RaiseAt(error, BackwardBegin)] if error else []))
        reason = "low loss" if isinstance(error, CancelFittingException) else None
        failure = error if isinstance(error, BrokenError) else None
        assert error_of(learner) is failure
        assert keep.ends == [FitEnd(reason, failure)]


def test_a_fit_cancelled_without_a_reason_says_that_it_was_cancelled():
    learner, _ = recorded(RaiseAt(CancelFittingException(), StepEnd))
    assert learner.fit(1).stop_reason == "cancelled"


# Outside of a fit


def test_a_cancelled_fit_escapes_from_an_epoch_that_no_fit_runs():
    cancel = CancelFittingException("low loss")
    learner, recorder = recorded(RaiseAt(cancel, BackwardEnd))
    with pytest.raises(CancelFittingException, match="low loss") as caught:
        learner.epoch(TrainingPhase())
    assert caught.value is cancel
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd"]
    assert learner.history.stop_reason is None


@pytest.mark.parametrize("event", [EpochBegin, StepBegin, LossBegin, StepEnd, EpochEnd])
def test_a_cancelled_epoch_that_no_fit_runs_ends_and_returns(event):
    learner, recorder = recorded(RaiseAt(CancelEpochException(), event))
    learner.epoch(TrainingPhase())
    assert recorder.events.count("EpochEnd") == 1
    assert recorder.events[-1] == "EpochEnd"
    assert learner.history[TrainingPhase].epochs == 1


def test_a_step_that_no_epoch_runs_takes_its_own_cancel():
    batch = next(iter(toy_learner().data.training))
    for event in (StepBegin, LossBegin, UpdateEnd, StepEnd):
        learner, recorder = recorded(RaiseAt(CancelStepException(), event))
        TrainingPhase().step(learner, batch)
        assert recorder.events[-1] == event.__name__


@pytest.mark.parametrize("kind", [CancelEpochException, CancelFittingException])
def test_a_wider_cancel_escapes_from_a_step_that_no_epoch_runs(kind):
    learner, recorder = recorded(RaiseAt(kind(), LossBegin))
    with pytest.raises(kind):
        TrainingPhase().step(learner, next(iter(learner.data.training)))
    assert recorder.events == ["StepBegin", "LossBegin"]


def test_a_with_statement_cannot_skip_its_body_so_a_cancel_at_step_begin_reaches_the_loop():
    learner, recorder = recorded(RaiseAt(CancelStepException(), StepBegin))
    ran = False
    with pytest.raises(CancelStepException):
        with runstep(learner, TrainingPhase()):
            ran = True
    assert not ran
    assert recorder.events == ["StepBegin"]
    assert learner.scope is None


# Ctrl+C

INTERRUPTED = "interrupted (Ctrl+C)"

SCRIPT = '''
import functools, json, signal, sys
import torch
from fluxloop import *
from fluxloop.testing import EventRecorder, toy_learner

torch.set_num_threads(1)
token = 0

def wait():
    """Say that a fit is running, and go on when told; meanwhile the signal comes."""
    global token
    token += 1
    print("waiting", token, flush=True)
    while sys.stdin.readline().strip() != str(token):
        pass

def train(self, learner, batch, waits):
    with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
        state.preds = learner.model(state.xs)
        handle(LossBegin())
        for _ in range(waits if learner.history[type(self)].steps == 0 else 0):
            wait()
        state.loss = learner.loss_fn(state.preds, state.ys)
        if self.gradients:
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            learner.update()

class Once(AbstractTrainingPhase):
    def step(self, learner, batch):
        train(self, learner, batch, 1)

class Twice(AbstractTrainingPhase):
    def step(self, learner, batch):
        train(self, learner, batch, 2)

class Bare(AbstractTrainingPhase):
    steps = 0
    def step(self, learner, batch):
        if self.steps == 0:
            wait()
        self.steps += 1

class Watching(AbstractValidationPhase):
    def step(self, learner, batch):
        train(self, learner, batch, 1)

class Inline(AbstractTrainingPhase):
    def epoch(self, learner, data):
        with runepoch(learner, self):
            for batch in data:
                train(self, learner, batch, 1)

class Decorated(AbstractTrainingPhase):
    @torch.enable_grad()
    def step(self, learner, batch):
        train(self, learner, batch, 1)

class Base:
    def step(self, learner, batch):
        train(self, learner, batch, 1)

class Mixed(Base, AbstractTrainingPhase):
    pass

def run(name, *phases):
    recorder = EventRecorder()
    learner = toy_learner(recorder, Recorder(), num_batches=2)
    result = {"name": name, "error": None, "trace": recorder.trace}
    try:
        history = learner.fit(2, phases=phases)
        result["stop_reason"] = history.stop_reason
    except BaseException as error:
        result["error"] = repr(error)
    result["handler_is_back"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result["steps"] = getattr(phases[0], "steps", None)
    result["trace"] = list(recorder.trace)
    recorder.trace.clear()
    try:
        result["next_stop_reason"] = learner.fit(1).stop_reason
    except BaseException as error:
        result["error"] = repr(error)
    result["next_trace"] = recorder.trace
    print(json.dumps(result), flush=True)

run("once", Once(), ValidationPhase())
run("twice", Twice(), ValidationPhase())
run("bare", Bare())
run("validation", TrainingPhase(), Watching())
run("inline", Inline())
run("decorated", Decorated())
run("mixed", Mixed())
'''


@pytest.fixture(scope="module")
def interrupted() -> dict[str, dict[str, Any]]:
    """Run the script, send it a SIGINT whenever it says that it waits, and collect what it prints."""
    paths = [str(Path(fluxloop.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    results: dict[str, dict[str, Any]] = {}
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        for line in process.stdout:
            if line.startswith("waiting"):
                process.send_signal(signal.SIGINT)
                process.stdin.write(line.split()[1] + "\n")
                process.stdin.flush()
            elif line.startswith("{"):
                result = json.loads(line)
                results[result["name"]] = result
        errors = process.stderr.read()
        assert process.wait() == 0, errors
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
    return results


def trace_of(result: dict[str, Any]) -> Trace:
    return [(event, phase) for event, phase in result["trace"]]


@pytest.mark.slow
def test_ctrl_c_ends_the_fit_after_the_running_step(interrupted):
    result = interrupted["once"]
    assert result["error"] is None
    assert result["stop_reason"] == INTERRUPTED
    assert trace_of(result) == read(
        """
        FittingPhase FitBegin CycleBegin
        Once         EpochBegin
        Once         StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
        FittingPhase FitEnd
        """
    )


@pytest.mark.slow
def test_ctrl_c_pressed_twice_ends_the_fit_at_once(interrupted):
    result = interrupted["twice"]
    assert result["error"] is None
    assert result["stop_reason"] == INTERRUPTED
    assert trace_of(result) == read(
        """
        FittingPhase FitBegin CycleBegin
        Twice        EpochBegin
        Twice        StepBegin LossBegin
        FittingPhase FitEnd
        """
    )


@pytest.mark.slow
def test_ctrl_c_ends_a_fit_whose_steps_fire_no_events(interrupted):
    result = interrupted["bare"]
    assert result["error"] is None
    assert result["stop_reason"] == INTERRUPTED
    assert result["steps"] == 1
    assert trace_of(result) == read(
        """
        FittingPhase FitBegin CycleBegin
        Bare         EpochBegin
        FittingPhase FitEnd
        """
    )


@pytest.mark.slow
def test_ctrl_c_ends_a_fit_in_validation(interrupted):
    result = interrupted["validation"]
    assert result["error"] is None
    assert result["stop_reason"] == INTERRUPTED
    assert trace_of(result)[-5:] == read(
        """
        Watching     EpochBegin
        Watching     StepBegin LossBegin StepEnd
        FittingPhase FitEnd
        """
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inline", "decorated", "mixed"])
def test_ctrl_c_ends_a_fit_after_the_step_however_the_step_is_written(interrupted, name):
    result = interrupted[name]
    phase = name.capitalize()
    assert result["error"] is None
    assert result["stop_reason"] == INTERRUPTED
    assert trace_of(result) == read(
        f"""
        FittingPhase FitBegin CycleBegin
        {phase}      EpochBegin
        {phase}      StepBegin LossBegin BackwardBegin BackwardEnd UpdateBegin UpdateEnd StepEnd
        FittingPhase FitEnd
        """
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["once", "twice", "bare", "validation"])
def test_after_ctrl_c_the_signal_is_pythons_again_and_the_next_fit_is_a_normal_one(interrupted, name):
    result = interrupted[name]
    assert result["handler_is_back"]
    assert result["next_stop_reason"] is None
    assert [(event, phase) for event, phase in result["next_trace"]] == read(ONE_EPOCH)


@pytest.mark.parametrize("event", [FitBegin, EpochBegin, StepBegin, LossBegin, StepEnd, EpochEnd, fluxloop.CycleEnd])
def test_a_keyboard_interrupt_raised_in_a_handler_ends_the_fit_in_good_order(event):
    learner, recorder = recorded(RaiseAt(KeyboardInterrupt(), event))
    assert learner.fit(1).stop_reason == INTERRUPTED
    assert recorder.events[-2:] == [event.__name__, "FitEnd"]
    assert recorder.events.count("FitEnd") == 1
    assert learner.scope is None


def test_a_fit_leaves_somebody_elses_signal_handler_alone():
    received: list[int] = []

    def mine(number: int, frame: object) -> None:
        received.append(number)

    class Press(Callback):
        draws = False

        @on(LossBegin)
        def press(self, event: Event, phase: Phase, learner: Any) -> None:
            assert signal.getsignal(signal.SIGINT) is mine
            if not received:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, mine)
    try:
        learner, recorder = recorded(Press())
        assert learner.fit(1).stop_reason is None
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT]
    assert recorder.trace == read(ONE_EPOCH)


def test_a_fit_runs_in_a_thread_where_signals_cannot_be_handled():
    learner, recorder = recorded()
    thread = threading.Thread(target=learner.fit, args=(1,))
    thread.start()
    thread.join()
    assert recorder.trace == read(ONE_EPOCH)


# What an event finds


@define
class ParameterWatch(Callback):
    """Holds copies of the optimizer's parameters before and after its step, as seen through its groups."""

    before: list[Tensor] | None = None
    after: list[Tensor] | None = None
    gradients: list[Tensor] | None = None
    reads = ("optimizer",)

    @on(BackwardBegin)
    def keep_before(self, event: BackwardBegin, phase: Any, learner: Any) -> None:
        self.before = [p.detach().clone() for p in learner.optimizer.param_groups[0]["params"]]

    @on(BackwardEnd)
    def keep_gradients(self, event: BackwardEnd, phase: Any, learner: Any) -> None:
        parameters = learner.optimizer.param_groups[0]["params"]
        assert all(torch.equal(p, old) for p, old in zip(parameters, self.before or (), strict=True))
        self.gradients = [p.grad.clone() for p in parameters]

    @on(UpdateEnd)
    def keep_after(self, event: UpdateEnd, phase: Any, learner: Any) -> None:
        self.after = [p.detach().clone() for p in learner.optimizer.param_groups[0]["params"]]


def test_parameters_change_between_update_begin_and_update_end_alone() -> None:
    watch = ParameterWatch()
    model = nn.Linear(3, 1)
    data = [(torch.randn(100, 3), torch.randn(100, 1))]
    adam = partial(Adam, lr=0.01, fused=False)
    learner = Learner(model, mse_loss, data=(data,), optimizer=adam, callbacks=[watch], default_callbacks=False)
    learner.fit(1)
    assert watch.before
    assert watch.after
    assert watch.gradients
    for before, gradient, after, parameter in zip(
        watch.before, watch.gradients, watch.after, model.parameters(), strict=True
    ):
        torch.testing.assert_close(after, before - 0.01 * gradient.sign(), rtol=0, atol=1e-6)
        assert torch.equal(after, parameter.detach())
