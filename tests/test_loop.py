from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from attrs import define
from torch import Tensor, nn

import fluxloop
from fluxloop import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Accelerator,
    BackwardBegin,
    Callback,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    CycleBegin,
    CycleEnd,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    GANPhase,
    Learner,
    LossBegin,
    MissingEntryError,
    Phase,
    PhaseError,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    runepoch,
    runstep,
)
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner
from toys import BrokenError, Do, error_of, raising


def batch_of(learner: Learner) -> Any:
    return next(iter(learner.data.training))


# What a step stores


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Data:
    x: Tensor
    label: str


@define
class Attrs:
    x: Tensor
    inner: Any = None


def test_tensors_in_a_steps_entries_are_moved_to_the_device_however_they_are_nested():
    learner = Learner(nn.Linear(1, 1), accelerator=Accelerator("meta"), default_callbacks=False)
    x = torch.zeros(3)
    entries: dict[str, Any] = {
        "plain": x,
        "pair": (x, [x]),
        "table": {"a": x, "b": {"c": x}},
        "named": Pair(x, x),
        "data": Data(x, "kept"),
        "attrs": Attrs(x, Attrs(x)),
    }
    with runstep(learner, TrainingPhase(), **entries) as (_, state):
        pass
    moved = [
        state.plain,
        state.pair[0],
        state.pair[1][0],
        state.table["a"],
        state.table["b"]["c"],
        *state.named,
        state.data.x,
        state.attrs.x,
        state.attrs.inner.x,
    ]
    assert {tensor.device.type for tensor in moved} == {"meta"}
    kinds = [type(state[name]) for name in entries]
    assert kinds == [Tensor, tuple, dict, Pair, Data, Attrs]
    assert state.data.label == "kept"
    assert x.device.type == "cpu"
    assert entries["table"]["a"] is x, "what the caller holds is not changed"


def test_what_is_on_the_device_already_and_what_is_no_tensor_is_stored_as_it_is():
    learner = toy_learner()
    x, table, thing = torch.zeros(3), {"a": torch.zeros(1)}, object()
    with runstep(learner, TrainingPhase(), x=x, table=table, thing=thing, number=3) as (_, state):
        assert (state.x is x, state.table is table, state.thing is thing, state.number) == (True, True, True, 3)


def test_the_state_is_the_learners_step_and_stays_readable_after_it():
    learner = toy_learner()
    with runstep(learner, TrainingPhase(), real=torch.ones(4, 1)) as (_, state):
        assert learner.step is state
        state.fake = torch.zeros(2)
        state.anything = "goes"
    assert learner.step is state
    assert list(state) == ["real", "fake", "anything"]
    assert state.anything == learner.step["anything"] == "goes"
    assert learner.batch_size == 4
    with pytest.raises(MissingEntryError, match=r"has no entry 'fakes'; it has: anything, fake, real; did you mean"):
        _ = learner.step.fakes


@pytest.mark.parametrize("error", [CancelStepException(), CancelEpochException(), BrokenError()])
def test_the_state_stays_readable_after_a_step_that_ended_early(error):
    learner = toy_learner()
    try:
        with runstep(learner, TrainingPhase(), real=torch.ones(4, 1)) as (_, state):
            state.fake = 1
            raise error
    except (CancelEpochException, BrokenError):
        pass
    assert learner.step is state
    assert learner.step.fake == 1


def test_a_step_without_entries_has_an_empty_state():
    with runstep(toy_learner(), TrainingPhase()) as (_, state):
        assert list(state) == []


def test_entries_may_be_called_learner_and_phase():
    with runstep(toy_learner(), TrainingPhase(), learner=1, phase=2, self=3) as (_, state):
        assert (state.learner, state.phase, state["self"]) == (1, 2, 3)


def test_the_steps_handle_fires_events_for_the_running_phase():
    class Ping(Event):
        pass

    recorder = EventRecorder()
    learner = toy_learner(recorder)
    with runepoch(learner, ValidationPhase()) as handle_epoch:
        handle_epoch(Ping())
        with runstep(learner, ValidationPhase()) as (handle, _):
            handle(Ping())
    assert recorder.events == ["EpochBegin", "Ping", "StepBegin", "Ping", "StepEnd", "EpochEnd"]
    assert {phase for _, phase in recorder.trace} == {"ValidationPhase"}


# Phases with a step of their own


class Custom(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            state.stored = "by the body"
        return state


def test_a_custom_phases_step_returns_what_its_body_stored():
    learner = toy_learner()
    state = Custom().step(learner, batch_of(learner))
    assert list(state) == ["xs", "stored"]
    assert state.stored == "by the body"


def test_a_cancelled_epoch_raises_nothing_in_the_body_that_cancelled_it():
    learner = toy_learner()
    reached = False
    with runepoch(learner, Custom()):
        raise CancelEpochException
    reached = True
    assert reached


def test_a_training_step_returns_inputs_targets_predictions_loss_and_gradients():
    learner = toy_learner()
    xs, ys = batch_of(learner)
    state = TrainingPhase().step(learner, (xs, ys))
    assert list(state) == ["xs", "ys", "preds", "loss", "grads"]
    assert torch.equal(state.preds, xs * 0)
    assert torch.equal(state.loss, ys.abs().mean())
    assert torch.equal(state.grads["value"], -xs.mean().reshape(1))


def test_a_validation_step_returns_the_same_without_gradients():
    learner = toy_learner()
    xs, ys = batch_of(learner)
    state = ValidationPhase().step(learner, (xs, ys))
    assert list(state) == ["xs", "ys", "preds", "loss"]
    assert torch.equal(state.loss, ys.abs().mean())
    assert not state.preds.requires_grad
    assert learner.model.value.grad is None
    assert learner.model.value.item() == 0


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.001),
        partial(torch.optim.Adam, lr=0.05, fused=False),
        partial(torch.optim.RMSprop, lr=0.05),
    ],
    ids=["SGD", "Adam", "RMSprop"],
)
def test_five_epochs_find_the_coefficient_with_the_weights_of_a_hand_written_loop(optimizer):
    learner = toy_learner(optimizer=optimizer)
    learner.fit(5)
    assert abs(learner.model.value.item() - 3) < 0.1
    weight = nn.Parameter(torch.zeros(1))
    stepper = optimizer([weight])
    for _ in range(5):
        for xs, ys in learner.data.training:
            loss = nn.functional.l1_loss(xs * weight, ys)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
    assert torch.equal(learner.model.value, weight)


def test_a_loop_of_ones_own_with_runepoch_and_runstep_is_the_fit_to_the_bit():
    own, fitted = toy_learner(Recorder()), toy_learner(Recorder())
    phase = TrainingPhase()
    for _ in range(2):
        with runepoch(own, phase):
            for xs, ys in own.data.training:
                with runstep(own, phase, xs=xs, ys=ys) as (_, state):
                    state.loss = own.loss_fn(own.model(state.xs), state.ys)
                    own.backward(state.loss)
                    own.update()
    fitted.fit(2, phases=[TrainingPhase()])
    assert_same_bits(own, fitted)
    assert own.history[TrainingPhase] == fitted.history[TrainingPhase]


# What a scope changes is undone


WAYS_OUT = [None, CancelStepException(), CancelEpochException(), CancelFittingException(), BrokenError()]
SCOPES = {"step": (StepBegin, StepEnd), "epoch": (EpochBegin, EpochEnd), "fit": (FitBegin, FitEnd)}


class Defer(Callback):
    """Defer two changes at the begin of a scope; note when they are undone, and the scope's End."""

    draws = False

    def __init__(self, scope: str) -> None:
        super().__init__()
        self.begin, self.end = SCOPES[scope]
        self.log: list[str] = []

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.begin):
            learner.defer(lambda: self.log.append("first"))
            learner.defer(lambda: self.log.append("second"))
        if isinstance(event, self.end):
            self.log.append("end")


@pytest.mark.parametrize("error", WAYS_OUT, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("scope", SCOPES)
def test_what_was_deferred_is_undone_in_reverse_and_once_on_each_way_out(scope, error):
    defer = Defer(scope)
    learner = toy_learner(defer, *([Do(raising(error), BackwardBegin)] if error else []), num_batches=1)
    assert error_of(learner.fit, 1, phases=[TrainingPhase()]) is (error if isinstance(error, BrokenError) else None)
    ended = {
        "step": error is None,
        "epoch": error is None or isinstance(error, (CancelStepException, CancelEpochException)),
        "fit": True,
    }
    assert defer.log == [*(["end"] if ended[scope] else []), "second", "first"]
    assert learner.scope is None


@pytest.mark.parametrize("error", WAYS_OUT, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("scope", SCOPES)
def test_what_was_deferred_for_an_early_end_is_called_there_alone_before_the_rest(scope, error):
    class Early(Defer):
        @on(Event)
        def act(self, event: Event, phase: Phase, learner: Any) -> None:
            if isinstance(event, self.begin):
                learner.defer(lambda: self.log.append("early"), early=True)
                learner.defer(lambda: self.log.append("always"))

    early = Early(scope)
    learner = toy_learner(early, *([Do(raising(error), BackwardBegin)] if error else []), num_batches=1)
    error_of(learner.fit, 1, phases=[TrainingPhase()])
    is_early = {
        "step": error is not None,
        "epoch": error is not None and not isinstance(error, CancelStepException),
        "fit": isinstance(error, BrokenError),  # one that is cancelled ends in good order
    }
    assert early.log == [*(["early"] if is_early[scope] else []), "always"]


@pytest.mark.parametrize("scope", SCOPES)
def test_what_was_deferred_is_undone_when_a_later_handler_of_the_same_begin_fails(scope):
    defer = Defer(scope)
    learner = toy_learner(defer, Do(raising(BrokenError()), SCOPES[scope][0]), num_batches=1)
    with pytest.raises(BrokenError):
        learner.fit(1)
    assert [word for word in defer.log if word != "end"] == ["second", "first"]
    assert learner.scope is None


@pytest.mark.parametrize("scope", SCOPES)
def test_what_was_deferred_is_undone_when_a_handler_of_the_end_fails(scope):
    defer = Defer(scope)
    learner = toy_learner(defer, Do(raising(BrokenError()), SCOPES[scope][1]), num_batches=1)
    with pytest.raises(BrokenError):
        learner.fit(1)
    assert defer.log == ["end", "second", "first"]


def test_each_step_undoes_its_own_before_the_next_begins():
    log: list[str] = []

    def change(learner: Learner) -> None:
        log.append("change")
        learner.defer(lambda: log.append("undo"))

    toy_learner(Do(change, StepBegin), num_batches=3).fit(1, phases=[TrainingPhase()])
    assert log == ["change", "undo"] * 3


def test_what_is_deferred_in_the_middle_of_a_step_is_undone_with_the_innermost_scope():
    log: list[str] = []
    learner = toy_learner()
    with runepoch(learner, TrainingPhase()):
        learner.defer(lambda: log.append("epoch"))
        with runstep(learner, TrainingPhase()):
            learner.defer(lambda: log.append("step"))
            with runepoch(learner, ValidationPhase()):
                learner.defer(lambda: log.append("inner epoch"))
            assert log == ["inner epoch"]
        assert log == ["inner epoch", "step"]
    assert log == ["inner epoch", "step", "epoch"]


def test_what_is_deferred_at_an_end_is_undone_too():
    log: list[str] = []
    events = [StepEnd, EpochEnd, FitEnd]
    callbacks = [
        Do(lambda learner, event=event: learner.defer(lambda: log.append(event.__name__)), event) for event in events
    ]
    for index, callback in enumerate(callbacks):
        callback.name = f"at-{index}"
    toy_learner(*callbacks, num_batches=1).fit(1, phases=[TrainingPhase()])
    assert log == ["StepEnd", "EpochEnd", "FitEnd"]


def test_deferring_while_nothing_runs_is_an_error():
    with pytest.raises(PhaseError, match="defer was called while nothing is running; expected a fit"):
        toy_learner().defer(print)


class FailingUndo(Callback):
    draws = False

    def __init__(self, scope: str) -> None:
        super().__init__()
        self.begin = SCOPES[scope][0]
        self.log: list[str] = []
        self.failure = ZeroDivisionError("cannot undo")

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.begin):
            learner.defer(lambda: self.log.append("first"))
            learner.defer(raising(self.failure))
            learner.defer(lambda: self.log.append("third"))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_failing_undo_keeps_no_other_from_running_and_reaches_the_caller(scope):
    undo, recorder = FailingUndo(scope), EventRecorder()
    learner = toy_learner(undo, recorder, num_batches=1)
    with pytest.raises(ZeroDivisionError, match="cannot undo"):
        learner.fit(1, phases=[TrainingPhase()])
    assert undo.log == ["third", "first"]
    assert recorder.events.count("FitEnd") == 1
    assert learner.scope is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_failing_undo_is_noted_on_the_error_that_ends_the_fit(scope):
    undo = FailingUndo(scope)
    learner = toy_learner(undo, Do(raising(BrokenError()), BackwardBegin), num_batches=1)
    with pytest.raises(BrokenError) as caught:
        learner.fit(1, phases=[TrainingPhase()])
    assert undo.log == ["third", "first"]
    assert any("undoing" in note and "cannot undo" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("cancel", [CancelStepException, CancelEpochException, CancelFittingException])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_failing_undo_is_not_lost_when_the_scope_was_cancelled(scope, cancel):
    undo = FailingUndo(scope)
    learner = toy_learner(undo, Do(raising(cancel()), BackwardBegin), num_batches=1)
    with pytest.raises(ZeroDivisionError, match="cannot undo"):
        learner.fit(1, phases=[TrainingPhase()])
    assert undo.log == ["third", "first"]
    assert learner.scope is None


# Modes


def normalizing_learner(*callbacks: Callback, model: nn.Module | None = None, **options: Any) -> Learner:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    xs = torch.linspace(0, 1, 16).reshape(16, 1)
    data = TensorBatches(xs, 2 * xs, batch_size=4, shuffle=True)
    options = {"data": (data, data), "optimizer": partial(torch.optim.SGD, lr=0.1), "seed": 1, **options}
    return Learner(model, nn.functional.mse_loss, callbacks=callbacks, default_callbacks=False, **options)


def modes(learner: Learner) -> list[bool]:
    return [module.training for model in learner.modules() for module in model.modules()]


@pytest.mark.parametrize("phase", [TrainingPhase(), ValidationPhase()], ids=["train", "eval"])
@pytest.mark.parametrize("error", WAYS_OUT, ids=lambda error: type(error).__name__)
def test_every_submodule_gets_its_own_mode_back_after_an_epoch(phase, error):
    learner = normalizing_learner()
    learner.model[1].eval()  # frozen
    before = modes(learner)
    assert before == [True, True, False, True, True]
    inside = None
    try:
        with runepoch(learner, phase):
            inside = modes(learner)
            if error is not None:
                raise error
    except (CancelStepException, CancelFittingException, BrokenError):
        pass
    assert inside == [phase.train_mode] * 5
    assert modes(learner) == before


def test_modes_are_put_back_when_a_handler_of_the_begin_fails():
    learner = normalizing_learner(Do(raising(BrokenError()), EpochBegin))
    learner.model[1].eval()
    before = modes(learner)
    with pytest.raises(BrokenError):
        learner.epoch(ValidationPhase())
    assert modes(learner) == before


def test_a_batch_norm_that_its_model_keeps_frozen_is_frozen_in_training_too():
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self[1].eval()
            return self

    model = Frozen(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).train()
    learner = normalizing_learner(model=model)
    before = model[1].running_mean.clone()
    learner.fit(1)
    assert torch.equal(model[1].running_mean, before)
    assert not model[1].training


def test_every_model_of_several_is_switched():
    models = {"g": nn.Linear(1, 1), "d": nn.Sequential(nn.Dropout())}
    learner = Learner(models, default_callbacks=False)
    models["g"].eval()
    with runepoch(learner, ValidationPhase()):
        assert modes(learner) == [False] * 3
    assert modes(learner) == [False, True, True]


def test_handlers_of_the_epochs_begin_and_end_see_the_phases_mode():
    seen: list[tuple[str, bool, bool]] = []

    class Look(UnsafeCallback):
        @on(EpochBegin)
        @on(EpochEnd)
        def look(self, event: Event, phase: Phase, learner: Learner) -> None:
            seen.append((repr(phase), learner.model.training, torch.is_grad_enabled()))

    toy_learner(Look(), num_batches=1).fit(1)
    assert seen == [("TrainingPhase()", True, True)] * 2 + [("ValidationPhase()", False, False)] * 2


# Gradient mode


@pytest.mark.parametrize("outside", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("phase", [TrainingPhase(), ValidationPhase()], ids=["train", "eval"])
@pytest.mark.parametrize("manager", [runstep, runepoch])
@pytest.mark.parametrize("error", WAYS_OUT, ids=lambda error: type(error).__name__)
def test_gradients_are_as_the_phase_says_inside_and_as_before_outside(manager, phase, outside, error):
    learner = toy_learner()
    inside: list[bool] = []

    def run() -> None:
        with manager(learner, phase):
            inside.append(torch.is_grad_enabled())
            if error is not None:
                raise error

    with torch.set_grad_enabled(outside):
        escaped = error_of(run)
        after = torch.is_grad_enabled()
    taken = {runstep: CancelStepException, runepoch: CancelEpochException}[manager]
    assert escaped is (None if isinstance(error, taken) else error)
    assert inside == [phase.gradients]
    assert after is outside


@pytest.mark.parametrize("event", [StepBegin, StepEnd])
@pytest.mark.parametrize("outside", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("phase", [TrainingPhase(), ValidationPhase()], ids=["train", "eval"])
def test_gradients_are_as_before_when_a_handler_of_a_steps_begin_or_end_fails(event, outside, phase):
    learner = toy_learner(Do(raising(BrokenError()), event))
    with torch.set_grad_enabled(outside):
        with pytest.raises(BrokenError):
            phase.step(learner, batch_of(learner))
        after = torch.is_grad_enabled()
    assert after is outside
    assert learner.scope is None


def test_a_validation_step_makes_no_graph_even_without_an_epoch():
    learner = toy_learner()
    with runstep(learner, ValidationPhase(), xs=torch.ones(2, 1)) as (_, state):
        state.preds = learner.model(state.xs)
    assert state.preds.grad_fn is None


def test_a_training_fit_inside_no_grad_trains_as_outside():
    inside, outside = toy_learner(), toy_learner()
    with torch.no_grad():
        inside.fit(1)
        still_off = not torch.is_grad_enabled()
    outside.fit(1)
    assert still_off
    assert_same_bits(inside, outside)


# An epoch inside a step


class Validating(TrainingPhase):
    """Validate in the middle of each training step."""

    inner = True

    def __init__(self) -> None:
        self.drawn: list[Any] = []
        self.batches: list[Any] = []

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.preds = learner.model(state.xs)
            before = modes(learner), torch.is_grad_enabled(), learner.num_batches
            if self.inner:
                learner.epoch(ValidationPhase(), [batch, batch])
            assert learner.step is state
            assert (modes(learner), torch.is_grad_enabled(), learner.num_batches) == before
            self.drawn.append((torch.rand(2).tolist(), np.random.standard_normal(), random.random()))
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys) + state.preds.mean()
            learner.backward(state.loss)
            learner.update()
        return state


class NotValidating(Validating):
    inner = False


def test_a_validation_epoch_inside_a_training_step_gives_everything_back():
    with_it, without = normalizing_learner(), normalizing_learner()
    watched, plain = Validating(), NotValidating()
    with_it.fit(2, phases=[watched])
    without.fit(2, phases=[plain])
    assert watched.drawn == plain.drawn
    assert len(plain.drawn) == 8
    assert_same_bits(with_it, without)


def test_a_validation_epoch_inside_a_training_step_fires_its_events_there():
    recorder = EventRecorder()
    learner = toy_learner(recorder, num_batches=1)
    learner.fit(1, phases=[Validating()])
    inner = ["EpochBegin", *["StepBegin", "LossBegin", "StepEnd"] * 2, "EpochEnd"]
    training = [event for event, phase in recorder.trace if phase == "Validating"]
    assert [event for event, phase in recorder.trace if phase == "ValidationPhase"] == inner
    assert training == ["EpochBegin", "StepBegin", "UpdateBegin", "UpdateEnd", "StepEnd", "EpochEnd"]


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("event", [StepBegin, LossBegin, BackwardBegin, StepEnd])
def test_a_handler_may_run_a_validation_epoch_and_the_step_goes_on_as_it_was(event):
    steps: list[bool] = []

    def validate(learner: Learner) -> None:
        state = learner.step
        learner.epoch(ValidationPhase())
        steps.append(learner.step is state)

    watched, plain = normalizing_learner(Do(validate, event, TrainingPhase)), normalizing_learner()
    watched.fit(2, phases=[TrainingPhase()])
    plain.fit(2, phases=[TrainingPhase()])
    assert steps == [True] * 8
    assert_same_bits(watched, plain)


def test_what_was_running_goes_on_after_a_nested_epoch_that_failed():
    class Careful(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                scope, before = learner.scope, modes(learner)
                with pytest.raises(TypeError):
                    learner.epoch(ValidationPhase(), [(1, None)])
                assert learner.scope is scope
                assert learner.step is state
                assert modes(learner) == before
                assert torch.is_grad_enabled()
            return state

    learner = normalizing_learner(Recorder())
    learner.fit(1, phases=[Careful()])
    assert learner.history[Careful].steps == 4


def test_a_cancelled_fit_passes_from_a_nested_epoch_to_the_fit():
    cancel = CancelFittingException("seen enough")
    recorder = EventRecorder()
    learner = toy_learner(recorder, Do(raising(cancel), LossBegin, ValidationPhase), num_batches=1)
    assert learner.fit(1, phases=[Validating()]).stop_reason == "seen enough"
    assert recorder.trace[-1] == ("FitEnd", "FittingPhase")
    assert recorder.trace.count(("EpochEnd", "Validating")) == 0


def test_a_cancelled_epoch_nested_in_a_step_ends_alone():
    learner = toy_learner(Recorder(), Do(raising(CancelEpochException()), LossBegin, ValidationPhase), num_batches=2)
    learner.fit(1, phases=[Validating()])
    assert learner.history[Validating].steps == 2
    assert (learner.history[ValidationPhase].epochs, learner.history[ValidationPhase].steps) == (2, 0)


# Notes on errors


def test_an_error_in_a_handler_leaves_with_its_type_and_says_where_it_was_raised():
    calls = 0

    def fail_late(learner: Learner) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyError("no such thing")

    learner = toy_learner(Do(fail_late, LossBegin, TrainingPhase), num_batches=4)
    with pytest.raises(KeyError) as caught:
        learner.fit(3)
    assert type(caught.value) is KeyError
    assert caught.value.args == ("no such thing",)
    notes = "\n".join(caught.value.__notes__)
    assert "raised by Do at LossBegin of TrainingPhase()" in notes
    assert "in TrainingPhase(), epoch 2, step 6 of the run" in notes


def test_an_error_in_a_step_says_in_which_phase_epoch_and_step():
    class Third(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch[0]):
                if learner.history[Third].steps == 2:
                    raise BrokenError("three")

    learner = toy_learner(Recorder(), num_batches=2)
    with pytest.raises(BrokenError) as caught:
        learner.fit(2, phases=[Third()])
    assert [note for note in caught.value.__notes__ if "fluxloop" in note] == [
        "fluxloop: in Third(), epoch 2, step 3 of the run (both counted from 1)"
    ]


@pytest.mark.parametrize("event", [EpochBegin, StepBegin, StepEnd, EpochEnd])
def test_an_error_in_a_handler_names_its_callback_and_event_at_begins_and_ends_too(event):
    learner = toy_learner(Do(raising(BrokenError()), event), num_batches=1)
    with pytest.raises(BrokenError) as caught:
        learner.fit(1)
    notes = "\n".join(caught.value.__notes__)
    assert f"raised by Do at {event.__name__} of TrainingPhase()" in notes
    place = "before the first step" if event is EpochBegin else "step 1 of the run (both counted from 1)"
    assert f"in TrainingPhase(), epoch 1, {place}" in notes


@pytest.mark.parametrize("event", [FitBegin, CycleBegin, CycleEnd, FitEnd])
def test_an_error_in_a_handler_of_the_fit_names_no_epoch_or_step_that_did_not_run(event):
    learner = toy_learner(num_batches=1)
    learner.fit(2)
    learner.add_callback(Do(raising(BrokenError()), event))
    with pytest.raises(BrokenError) as caught:
        learner.fit(1)
    notes = "\n".join(caught.value.__notes__)
    assert f"raised by Do at {event.__name__} of FittingPhase()" in notes
    assert "epoch 0" not in notes
    assert "step 0" not in notes


def test_an_error_in_the_data_says_before_which_step_it_came():
    def batches() -> Any:
        yield torch.ones(2, 1), torch.ones(2, 1)
        raise BrokenError("the disk is gone")

    learner = toy_learner(data=(), num_batches=1)
    with pytest.raises(BrokenError, match="the disk is gone") as caught:
        learner.epoch(TrainingPhase(), batches())
    assert any("TrainingPhase(), epoch 1, step 1 of the run" in note for note in caught.value.__notes__)


def test_a_nested_error_is_noted_where_it_was_raised_and_only_there():
    learner = toy_learner(Do(raising(BrokenError()), LossBegin, ValidationPhase), num_batches=1)
    with pytest.raises(BrokenError) as caught:
        learner.fit(1, phases=[Validating()])
    assert sum("fluxloop: in " in note for note in caught.value.__notes__) == 1
    assert any("in ValidationPhase(), epoch 1, step 1 of the run" in note for note in caught.value.__notes__)


def test_cancels_carry_no_notes():
    cancel = CancelFittingException("enough")
    learner = toy_learner(Do(raising(cancel), LossBegin), num_batches=1)
    learner.fit(1)
    assert not getattr(cancel, "__notes__", [])


# StopIteration is an exception like any other


class Stopping(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0]):
            raise StopIteration("in a step")


class StoppingValidation(AbstractValidationPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        raise StopIteration("in a bare step")


def stop_in_loss(preds: Tensor, ys: Tensor) -> Tensor:
    raise StopIteration("in the loss")


@pytest.mark.parametrize("action", ["fit", "epoch"])
@pytest.mark.parametrize("where", ["step", "bare step", "loss", "handler"])
def test_a_stop_iteration_reaches_the_caller_and_does_not_end_the_epoch(where, action):
    recorder = EventRecorder()
    learner = toy_learner(recorder, *([Do(raising(StopIteration("in a handler")), LossBegin)] * (where == "handler")))
    phases: dict[str, Phase] = {"step": Stopping(), "bare step": StoppingValidation()}
    phase = phases.get(where, TrainingPhase())
    if where == "loss":
        learner.loss_fn = stop_in_loss
    run = partial(learner.fit, 1, phases=[phase]) if action == "fit" else partial(learner.epoch, phase)
    with pytest.raises(StopIteration, match=f"in (a|the) {where}"):
        run()
    assert "EpochEnd" not in recorder.events
    assert recorder.events.count("FitEnd") == (action == "fit")


def test_a_stop_iteration_in_the_loss_reaches_who_evaluates():
    learner = toy_learner()
    learner.loss_fn = stop_in_loss
    with pytest.raises(StopIteration, match="in the loss"):
        learner.evaluate()
    assert learner.scope is None


def test_a_stop_iteration_in_the_model_reaches_who_predicts():
    class Stops(nn.Linear):
        def forward(self, xs: Tensor) -> Tensor:
            raise StopIteration("in the model")

    with pytest.raises(StopIteration, match="in the model"):
        Learner(Stops(1, 1), default_callbacks=False).predict(torch.ones(3, 1))


def test_a_stop_iteration_in_a_deferred_undo_reaches_the_caller():
    learner = toy_learner(Do(lambda learner: learner.defer(raising(StopIteration("in an undo"))), EpochBegin))
    with pytest.raises(StopIteration, match="in an undo"):
        learner.fit(1)


# Something that is no phase


@pytest.mark.parametrize("wrong", [TrainingPhase, "training", None, (1, 2)], ids=["class", "text", "None", "tuple"])
@pytest.mark.parametrize("manager", [runstep, runepoch])
def test_runstep_and_runepoch_want_an_instance_of_a_phase(manager, wrong):
    learner = toy_learner()
    with pytest.raises(PhaseError, match=r"was given as a phase; expected an instance, e\.g\. TrainingPhase\(\)"):
        with manager(learner, wrong):
            pass
    assert learner.scope is None
    assert torch.is_grad_enabled()


# One scope for all steps of an epoch


def test_the_steps_of_an_epoch_share_a_scope_and_each_has_a_state_of_its_own() -> None:
    learner, phase = toy_learner(), TrainingPhase()
    scopes, states = set(), []
    with runepoch(learner, phase):
        for number in range(3):
            with runstep(learner, phase, xs=torch.full((1,), float(number))) as (_, state):
                scopes.add(learner.scope)
                states.append(state)
        assert [state.xs.item() for state in states] == [0, 1, 2]
        assert learner.step is states[-1]
    assert len(scopes) == 1
    assert learner.scope is None


def test_a_step_inside_a_step_of_the_same_phase_has_a_scope_of_its_own() -> None:
    learner, phase = toy_learner(Recorder()), TrainingPhase()
    with runepoch(learner, phase):
        for _ in range(2):
            with runstep(learner, phase, xs=torch.ones(1)) as (_, outer):
                around = learner.scope
                for _ in range(2):
                    with runstep(learner, phase, xs=torch.zeros(1)) as (_, inner):
                        assert learner.scope is not around
                        assert learner.step is inner
                assert learner.scope is around
                assert learner.step is outer
                assert outer.xs.item() == 1
    assert learner.history[TrainingPhase].steps == 6


def test_steps_that_are_made_before_they_begin_do_not_share_a_scope() -> None:
    learner, phase = toy_learner(), TrainingPhase()
    with runepoch(learner, phase):
        with runstep(learner, phase):
            pass
        first, second = runstep(learner, phase, xs=torch.ones(1)), runstep(learner, phase, xs=torch.zeros(1))
        with second as (_, state):
            assert state.xs.item() == 0
        with first as (_, state):
            assert state.xs.item() == 1


@pytest.mark.parametrize("error", [CancelStepException, BrokenError])
def test_after_a_step_that_did_not_end_in_good_order_the_next_is_a_normal_one(error: type[Exception]) -> None:
    learner, phase = toy_learner(Recorder()), TrainingPhase()
    undone: list[str] = []
    with runepoch(learner, phase):
        for number in range(4):
            try:
                with runstep(learner, phase, xs=torch.ones(1)):
                    if number % 2:
                        learner.defer(lambda: undone.append("once"))
                        raise error
            except BrokenError:
                pass
            assert type(learner.scope) is runepoch
        assert undone == ["once", "once"]
        with runstep(learner, phase):
            pass
    assert undone == ["once", "once"]
    assert learner.history[TrainingPhase].steps == 3


def test_the_epochs_of_two_learners_side_by_side_do_not_meet() -> None:
    phase, recorders = TrainingPhase(), [EventRecorder(), EventRecorder()]
    learners = [toy_learner(recorder, seed=seed) for seed, recorder in enumerate(recorders)]
    with runepoch(learners[0], phase), runepoch(learners[1], phase):
        for number in range(4):
            learner = learners[number % 2]
            with runstep(learner, phase, xs=torch.full((1,), float(number))):
                assert learners[number % 2].scope is not learners[1 - number % 2].scope
                assert learner.step.xs.item() == number
    for recorder in recorders:
        assert recorder.events == ["EpochBegin", "StepBegin", "StepEnd", "StepBegin", "StepEnd", "EpochEnd"]


def test_a_step_of_another_phase_in_between_leaves_the_epochs_scope_to_the_epochs_phase() -> None:
    recorder = EventRecorder()
    learner, training, validation = toy_learner(recorder), TrainingPhase(), ValidationPhase()
    with runepoch(learner, training):
        for phase in (training, validation, training, TrainingPhase(), training):
            with runstep(learner, phase) as (_, state):
                assert learner.scope.phase is phase
                assert torch.is_grad_enabled() is phase.gradients
                assert learner.step is state
    assert recorder.events.count("StepBegin") == recorder.events.count("StepEnd") == 5


def test_a_callback_added_between_two_steps_of_an_epoch_hears_of_the_next() -> None:
    learner, phase, recorder = toy_learner(), TrainingPhase(), EventRecorder()
    with runepoch(learner, phase) as handle:
        with runstep(learner, phase) as (handle_in_step, _):
            handle_in_step(LossBegin())
        learner.add_callback(recorder)
        handle(LossBegin())
        with runstep(learner, phase) as (handle_in_step, _):
            handle_in_step(LossBegin())
    assert recorder.events == ["LossBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]


# Equal phases


@define
class Options(TrainingPhase):
    rate: float = 0.1


class Keeps(TrainingPhase):
    def __init__(self, value: int = 0) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("outer", "inner", "same"),
    [
        (TrainingPhase(), TrainingPhase(), True),
        (Options(), Options(), True),
        (Options(), Options(0.2), False),
        (Keeps(), Keeps(), False),
        (TrainingPhase(), ValidationPhase(), False),
    ],
)
def test_a_step_of_an_equal_phase_is_the_epochs_own(outer: Phase, inner: Phase, same: bool) -> None:
    learner = toy_learner()
    batch = next(iter(learner.data.training))
    with runepoch(learner, outer):
        inner.step(learner, batch)
        assert ("loss" in learner.step) is same


def test_a_loop_with_a_new_phase_for_each_step_is_the_loop_with_one() -> None:
    losses = []
    for phase_of in (lambda phase: phase, lambda phase: TrainingPhase()):
        learner = toy_learner()
        phase = TrainingPhase()
        with runepoch(learner, phase):
            for batch in learner.data.training:
                phase_of(phase).step(learner, batch)
                losses.append(learner.step.loss.item())
    assert losses[: len(losses) // 2] == losses[len(losses) // 2 :]


class Acquires(Callback):
    """Holds something from StepBegin to the end of the step, whatever end that is."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.log: list[int] = []

    @on(StepBegin)
    def acquire(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        self.held += 1
        self.log.append(self.held)
        learner.defer(self.release)

    def release(self) -> None:
        self.held -= 1


@pytest.mark.parametrize("event", [StepBegin, LossBegin, StepEnd])
@pytest.mark.parametrize("error", WAYS_OUT[1:], ids=lambda error: type(error).__name__)
def test_what_a_step_acquired_is_released_wherever_the_step_is_cut_short(event, error):
    acquires = Acquires()
    learner = toy_learner(acquires, Do(raising(error), event), num_batches=2)
    error_of(learner.fit, 1, phases=[TrainingPhase()])
    assert acquires.log
    assert set(acquires.log) == {1}
    assert acquires.held == 0


def test_a_model_that_was_given_in_eval_mode_is_trained_in_train_mode_and_then_as_it_was():
    learner = normalizing_learner()
    learner.model.eval()
    before = modes(learner)
    seen: list[bool] = []
    learner.add_callback(Do(lambda learner: seen.extend(modes(learner)), StepEnd))
    learner.fit(1, phases=[TrainingPhase()])
    assert seen
    assert all(seen)
    assert modes(learner) == before
    assert not any(before)


# What a step costs: functions of fluxloop that it enters


def entered(learner: Learner, phase: Phase, batch: Any) -> int:
    """Count the functions of fluxloop, comprehensions too, that one step in the middle of an epoch enters."""
    root, count = str(Path(fluxloop.__file__).parent), 0

    def note(frame: Any, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(root)

    with runepoch(learner, phase):
        for _ in range(2):
            phase.step(learner, batch)
        sys.setprofile(note)
        try:
            phase.step(learner, batch)
        finally:
            sys.setprofile(None)
    return count


def test_a_bare_step_enters_few_functions() -> None:
    layer = nn.Linear(4, 2)
    bare: dict[str, Any] = {"default_callbacks": False, "seed": 0}
    learner = Learner(layer, nn.CrossEntropyLoss(), optimizer=partial(torch.optim.SGD, lr=0.1), **bare)
    assert 0 < entered(learner, TrainingPhase(), (torch.ones(3, 4), torch.tensor([0, 1, 1]))) <= 36


def test_a_bare_step_of_a_gan_enters_few_functions() -> None:
    models = {"G": nn.Linear(64, 4), "D": nn.Linear(4, 1)}
    learner = Learner(models, optimizer=torch.optim.Adam, default_callbacks=False, seed=0)
    assert 0 < entered(learner, GANPhase(), (torch.ones(3, 4),)) <= 72
