from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fluxloop import (
    AbstractTrainingPhase,
    BackwardBegin,
    Callback,
    CallbackError,
    CallbackTypeError,
    CancelFittingException,
    CustomCallback,
    DuplicateCallbackError,
    EpochEnd,
    Event,
    FitEnd,
    HandlerError,
    LossBegin,
    Metrics,
    Phase,
    Recorder,
    StateAccessError,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UpdateBegin,
    ValidationPhase,
    on,
)
from fluxloop.testing import EventRecorder, assert_observer, assert_order, assert_same_bits, toy_learner


def nothing(learner: Any) -> None: ...


class Zebra(Callback):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    @on(StepEnd)
    def note(self, event: Event, phase: Phase, learner: Any) -> None:
        self.log.append("zebra")


# When it runs


def test_a_function_is_called_at_its_event() -> None:
    calls: list[Any] = []
    toy_learner(CustomCallback(calls.append, StepBegin)).fit(1, phases=[TrainingPhase()])
    assert len(calls) == 16


@pytest.mark.parametrize(
    ("event", "phase", "count"),
    [
        (StepEnd, Phase, 32),
        (StepEnd, TrainingPhase, 16),
        (StepEnd, AbstractTrainingPhase, 16),
        (StepEnd, ValidationPhase, 16),
        (BackwardBegin, ValidationPhase, 0),
        (EpochEnd, Phase, 2),
        (FitEnd, Phase, 1),
        (FitEnd, TrainingPhase, 0),
    ],
)
def test_it_is_called_in_its_phase_alone(event: Any, phase: Any, count: int) -> None:
    calls: list[Any] = []
    toy_learner(CustomCallback(calls.append, event, phase)).fit(1)
    assert len(calls) == count


def test_an_event_type_stands_for_its_subclasses() -> None:
    calls: list[Any] = []
    recorder = EventRecorder()
    toy_learner(CustomCallback(calls.append, Event), recorder).fit(1)
    assert len(calls) == len(recorder.trace)


def test_without_declarations_it_runs_last_at_its_event() -> None:
    log: list[str] = []
    custom = CustomCallback(lambda learner: log.append("custom"), StepEnd)
    for callbacks in ([custom, Zebra(log), Recorder()], [Recorder(), Zebra(log), custom]):
        log.clear()
        learner = toy_learner(*callbacks, num_batches=1)
        assert learner.callbacks.order[-1] == "CustomCallback"
        learner.fit(1, phases=[TrainingPhase()])
        assert log == ["zebra", "custom"]


def test_it_sees_what_every_other_callback_wrote_at_its_event() -> None:
    seen: list[tuple[int, int]] = []

    def look(learner: Any) -> None:
        seen.append(
            (learner.cbstate.history[TrainingPhase].steps, len(learner.cbstate.metrics[TrainingPhase].latest()))
        )

    learner = toy_learner(CustomCallback(look, StepEnd, TrainingPhase), Metrics(), Recorder(), num_batches=3)
    assert_order(learner, Recorder, Metrics, CustomCallback)
    learner.fit(1)
    assert seen == [(1, 1), (2, 1), (3, 1)]


def test_it_may_be_told_to_run_after_another() -> None:
    log: list[str] = []
    first = CustomCallback(lambda learner: log.append("first"), StepEnd, reads=(), run_after=(Zebra,), name="a")
    learner = toy_learner(first, Zebra(log), num_batches=1)
    assert_order(learner, Zebra, "a")
    learner.fit(1, phases=[TrainingPhase()])
    assert log == ["zebra", "first"]


def test_a_cancelled_fit_counts_no_epoch() -> None:
    def stop(learner: Any) -> None:
        raise CancelFittingException("interrupt")

    learner = toy_learner(Recorder(), CustomCallback(stop, StepEnd))
    assert learner.fit(1).stop_reason == "interrupt"
    assert learner.history[TrainingPhase].epochs == 0


# What it may touch


def read_everything(learner: Any) -> None:
    _ = learner.model, learner.params, learner.optimizer, learner.loss_fn, learner.data.training, learner.seed
    _ = learner.step.loss, learner.cbstate.history, learner.history, learner.accelerator, learner.num_batches
    _ = learner.batch_size, list(learner.step), "loss" in learner.step


def test_without_declarations_it_reads_everything() -> None:
    learner = toy_learner(Recorder(), CustomCallback(read_everything, StepEnd))
    learner.fit(1)
    assert learner.history[TrainingPhase].epochs == 1


def set_loss(learner: Any) -> None:
    learner.step.loss = torch.zeros(())


def set_item(learner: Any) -> None:
    learner.cbstate.history[TrainingPhase] = 3


def set_attribute(learner: Any) -> None:
    learner.cbstate.history[TrainingPhase].steps = 3


def set_root(learner: Any) -> None:
    learner.model = None


def delete(learner: Any) -> None:
    del learner.step.xs


def publish(learner: Any) -> None:
    learner.cbstate.mine = 1


def clear(learner: Any) -> None:
    learner.history.metrics.clear()


@pytest.mark.parametrize(
    ("function", "path"),
    [
        (set_loss, "step.loss"),
        (set_item, "cbstate.history"),
        (set_attribute, "cbstate.history"),
        (set_root, "model"),
        (delete, "step.xs"),
        (publish, "cbstate.mine"),
        (clear, "history"),
    ],
)
def test_without_declarations_it_writes_nothing(function: Any, path: str) -> None:
    learner = toy_learner(Recorder(), CustomCallback(function, StepEnd))
    with pytest.raises(StateAccessError) as caught:
        learner.fit(1)
    text = str(caught.value)
    assert f"CustomCallback tried to write '{path}' at StepEnd" in text
    assert f"writes = ('{path}',)" in text


def test_with_a_declared_write_it_changes_the_training() -> None:
    def triple(learner: Any) -> None:
        learner.step.loss = 3 * learner.step.loss

    changed = toy_learner(CustomCallback(triple, BackwardBegin, writes=("step.loss",)))
    reference = toy_learner(optimizer=partial(torch.optim.SGD, lr=0.003))
    changed.fit(1, phases=[TrainingPhase()])
    reference.fit(1, phases=[TrainingPhase()])
    assert changed.model.value.item() == pytest.approx(reference.model.value.item(), rel=1e-6)
    plain = toy_learner()
    plain.fit(1, phases=[TrainingPhase()])
    assert changed.model.value.item() != plain.model.value.item()


def test_preds_replaced_at_lossbegin_are_what_the_loss_sees() -> None:
    def zero(learner: Any) -> None:
        learner.step.preds = learner.step.preds * 0

    learner = toy_learner(CustomCallback(zero, LossBegin, writes=("step.preds",)))
    learner.fit(1)
    assert learner.model.value.item() == 0.0


def test_what_it_publishes_is_read_by_others() -> None:
    seen: list[int] = []

    def count(learner: Any) -> None:
        learner.cbstate.count = getattr(learner.cbstate, "count", 0) + 1 if "count" in learner.cbstate else 1

    writer = CustomCallback(count, StepEnd, TrainingPhase, reads=(), writes=("cbstate.count",), name="writer")
    reader = CustomCallback(
        lambda learner: seen.append(learner.cbstate.count), StepEnd, TrainingPhase, reads=("cbstate.count",), name="a"
    )
    learner = toy_learner(reader, writer, num_batches=3)
    assert_order(learner, "writer", "a")
    learner.fit(1)
    assert seen == [1, 2, 3]


def test_narrower_declarations_are_held_to() -> None:
    learner = toy_learner(CustomCallback(lambda learner: learner.step.loss, StepEnd, reads=("step.preds",)))
    with pytest.raises(StateAccessError, match=r"tried to read 'step\.loss' at StepEnd"):
        learner.fit(1)


def test_a_path_with_an_unknown_root_is_refused() -> None:
    with pytest.raises(CallbackError, match=r"declares the path 'stpe\.loss'.*did you mean 'step'"):
        toy_learner(CustomCallback(nothing, StepEnd, reads=("stpe.loss",)))


# Names


def test_several_without_names_are_told_apart_by_their_functions() -> None:
    learner = toy_learner(CustomCallback(nothing, StepEnd), CustomCallback(set_loss, UpdateBegin, ValidationPhase))
    assert sorted(learner.callbacks.order) == ["CustomCallback", "CustomCallback-2"]


def test_two_that_nothing_tells_apart_need_names() -> None:
    first, second = (lambda learner: None), (lambda learner: None)
    with pytest.raises(DuplicateCallbackError, match=r"CustomCallback callbacks cannot be told apart.*name='first'"):
        toy_learner(CustomCallback(first, StepEnd), CustomCallback(second, StepEnd))
    learner = toy_learner(CustomCallback(first, StepEnd, name="one"), CustomCallback(second, StepEnd, name="two"))
    assert learner.callbacks.order == ["one", "two"]


def test_repr_tells_function_event_and_phase() -> None:
    assert repr(CustomCallback(nothing, StepEnd, TrainingPhase)) == "CustomCallback(nothing, StepEnd, TrainingPhase)"


# Bad input, and what it leaves as it was


@pytest.mark.parametrize("function", [None, "print", 3])
def test_what_cannot_be_called_is_refused(function: Any) -> None:
    with pytest.raises(CallbackTypeError, match=r"CustomCallback was given .*; expected a function of the learner"):
        CustomCallback(function, StepEnd)


@pytest.mark.parametrize("event", ["StepEnd", StepEnd(), TrainingPhase, None])
def test_what_is_no_event_type_is_refused(event: Any) -> None:
    with pytest.raises(HandlerError, match=r"CustomCallback was given .* as an event; expected a type, e\.g\. StepEnd"):
        CustomCallback(nothing, event)


@pytest.mark.parametrize("phase", ["training", TrainingPhase(), StepEnd, None])
def test_what_is_no_phase_type_is_refused(phase: Any) -> None:
    with pytest.raises(HandlerError, match=r"CustomCallback was given .* as a phase; expected a type"):
        CustomCallback(nothing, StepEnd, phase)


def test_watching_and_drawing_change_nothing() -> None:
    assert_observer(CustomCallback(lambda learner: torch.rand(3), StepEnd), toy_learner)
    assert_observer(CustomCallback(read_everything, StepEnd), lambda: toy_learner(Recorder()))


def test_a_write_that_changes_nothing_changes_nothing() -> None:
    def same(learner: Any) -> None:
        learner.step.loss = learner.step.loss

    plain, written = toy_learner(), toy_learner(CustomCallback(same, BackwardBegin, writes=("step.loss",)))
    plain.fit(1)
    written.fit(1)
    assert_same_bits(plain, written)


def test_a_function_with_other_arguments_is_refused_when_the_callback_is_made() -> None:
    for function in (lambda: None, lambda event, phase, learner: None):
        with pytest.raises(HandlerError, match=r"of a CustomCallback has the arguments .*; expected \(learner\)"):
            CustomCallback(function, StepEnd)
    CustomCallback(print, StepEnd)
    CustomCallback(lambda learner, more=1: None, StepEnd)
