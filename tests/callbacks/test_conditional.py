from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import define

from fluxloop import (
    Callback,
    CallbackConflictError,
    CallbackTypeError,
    CancelStepException,
    ConditionalCallback,
    CustomCallback,
    DuplicateCallbackError,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    HandlerError,
    LossBegin,
    Metrics,
    MetricsPrinter,
    Phase,
    Recorder,
    RunFirst,
    StateAccessError,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    resolve_conflict,
    throttle,
)
from fluxloop.callbacks import conditional
from fluxloop.testing import EventRecorder, assert_observer, assert_order, assert_same_bits, toy_learner


def always(event: Event, phase: Phase) -> bool:
    return True


def never(event: Event, phase: Phase) -> bool:
    return False


@define
class Doubles(Callback):
    factor: float = 2.0
    calls: int = 0

    reads = ("step.xs",)
    writes = ("step.preds", "cbstate.doubled")

    def init(self, learner: Any) -> None:
        learner.cbstate.doubled = 0

    @on(LossBegin, TrainingPhase)
    def double(self, event: Event, phase: Phase, learner: Any) -> None:
        learner.step.preds = self.factor * learner.step.preds
        learner.cbstate.doubled += 1
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


@define
class Halves(Callback):
    writes = ("step.preds",)

    @on(LossBegin, TrainingPhase)
    def halve(self, event: Event, phase: Phase, learner: Any) -> None:
        learner.step.preds = learner.step.preds / 2


@define
class Draws(Callback):
    draws = True

    @on(StepEnd)
    def draw(self, event: Event, phase: Phase, learner: Any) -> None:
        torch.rand(1)


@define
class LooksAtAll(UnsafeCallback):
    seen: Any = None

    @on(FitBegin)
    def look(self, event: Event, phase: Phase, learner: Any) -> None:
        self.seen = learner


def wrappers(callback: Callback) -> list[ConditionalCallback]:
    return [
        ConditionalCallback(callback, always),
        throttle(callback, FitEnd, freq=1),
        throttle(ConditionalCallback(callback, always), FitEnd, freq=1),
    ]


# Which events pass


@pytest.mark.parametrize(
    ("options", "steps"), [({"freq": 1}, 16), ({"freq": 2}, 8), ({"freq": 3}, 6), ({"freq": 16}, 1)]
)
def test_every_so_many_occurrences_pass_beginning_with_the_first(options: dict[str, int], steps: int) -> None:
    learner = toy_learner(throttle(Recorder(), StepEnd, **options))
    learner.fit(1, phases=[TrainingPhase()])
    assert learner.history[TrainingPhase].steps == steps
    assert learner.history[TrainingPhase].epochs == 1, "its other events pass"


def test_after_seconds_the_next_occurrence_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, steps in ((0, 16), (1, 16), (2, 8), (10, 2), (100, 1)):
        clock = iter(range(1000))
        monkeypatch.setattr(conditional, "monotonic", lambda clock=clock: float(next(clock)))
        learner = toy_learner(throttle(Recorder(), StepEnd, seconds=seconds))
        learner.fit(1, phases=[TrainingPhase()])
        assert learner.history[TrainingPhase].steps == steps


def test_occurrences_are_counted_over_phases_and_fits() -> None:
    learner = toy_learner(throttle(Recorder(), StepEnd, freq=3), num_batches=4)
    learner.fit(1)
    assert (learner.history[TrainingPhase].steps, learner.history[ValidationPhase].steps) == (2, 1)
    learner.fit(1)
    assert (learner.history[TrainingPhase].steps, learner.history[ValidationPhase].steps) == (3, 3)


def test_an_event_type_stands_for_its_subclasses() -> None:
    recorder = EventRecorder()
    toy_learner(throttle(recorder, Event, freq=1000)).fit(1)
    assert recorder.events == ["FitBegin"]


def test_a_condition_decides_on_event_and_phase() -> None:
    recorder = EventRecorder()

    def condition(event: Event, phase: Phase) -> bool:
        return isinstance(event, StepEnd) and isinstance(phase, ValidationPhase)

    toy_learner(ConditionalCallback(recorder, condition), num_batches=3).fit(1)
    assert recorder.trace == [("StepEnd", "ValidationPhase")] * 3


def test_a_condition_is_asked_only_about_events_that_are_handled() -> None:
    asked: set[str] = set()

    def condition(event: Event, phase: Phase) -> bool:
        asked.add(f"{type(event).__name__} {type(phase).__name__}")
        return True

    learner = toy_learner(ConditionalCallback(Doubles(), condition))
    learner.fit(1)
    assert asked == {"LossBegin TrainingPhase"}


def test_steps_cancelled_on_a_condition_are_not_counted() -> None:
    def cancel(learner: Any) -> None:
        raise CancelStepException

    canceller = CustomCallback(cancel, StepBegin, TrainingPhase)
    learner = toy_learner(Recorder(), throttle(canceller, StepBegin, freq=2))
    learner.fit(1, phases=[TrainingPhase()])
    assert learner.history[TrainingPhase].steps == 8


# Transparency


@pytest.mark.parametrize("index", range(3))
def test_access_order_and_identity_are_those_of_the_wrapped(index: int) -> None:
    inner = Doubles(factor=3.0, name="tripling")
    wrapped = wrappers(inner)[index]
    assert wrapped.unwrapped is inner
    assert (wrapped.name, wrapped.identity) == ("tripling", inner.identity)
    assert (wrapped.reads, wrapped.writes) == (inner.reads, inner.writes)
    assert wrapped.run_after == inner.run_after
    assert wrapped.handles() == inner.handles()
    assert "Doubles" in repr(wrapped)
    metrics = Metrics()
    assert wrappers(metrics)[index].run_after == (Recorder,)
    assert wrappers(Draws())[index].draws is True


@pytest.mark.parametrize("index", range(3))
def test_a_wrapper_that_always_passes_changes_nothing(index: int) -> None:
    bare, wrapped = toy_learner(Doubles(), Recorder()), toy_learner(wrappers(Doubles())[index], Recorder())
    bare.fit(2)
    wrapped.fit(2)
    assert_same_bits(bare, wrapped)
    assert bare.callbacks.order == wrapped.callbacks.order
    assert bare.callbacks.digest == wrapped.callbacks.digest
    assert bare.cbstate.doubled == wrapped.cbstate.doubled == 32


def test_a_wrapped_callback_sees_exactly_what_it_declares() -> None:
    @define
    class Reaches(Callback):
        @on(StepEnd)
        def reach(self, event: Event, phase: Phase, learner: Any) -> None:
            _ = learner.step.loss

    learner = toy_learner(ConditionalCallback(Reaches(), always))
    with pytest.raises(StateAccessError, match=r"Reaches tried to read 'step"):
        learner.fit(1)


def test_a_wrapped_unsafe_callback_gets_the_learner_itself() -> None:
    looks = LooksAtAll()
    learner = toy_learner(ConditionalCallback(looks, always))
    learner.fit(1)
    assert looks.seen is learner


def test_the_wrapped_callback_is_found_and_replaces_the_default() -> None:
    recorder = Recorder()
    learner = toy_learner(throttle(recorder, StepEnd, freq=2), default_callbacks=True)
    assert learner.get_callback(Recorder) is recorder
    assert [type(callback) for callback in learner.callbacks].count(Recorder) == 1


def test_run_after_holds_in_both_directions() -> None:
    learner = toy_learner(
        throttle(MetricsPrinter(), EpochEnd, freq=5),
        throttle(Metrics(), StepEnd, freq=2),
        throttle(Recorder(), StepEnd, freq=3),
    )
    assert_order(learner, Recorder, Metrics, MetricsPrinter)
    assert learner.callbacks.order == ["Recorder", "Metrics", "MetricsPrinter"]


def test_conflicts_are_found_and_resolved_through_wrappers() -> None:
    with pytest.raises(CallbackConflictError, match=r"Doubles writes 'step\.preds' and Halves writes 'step\.preds'"):
        toy_learner(throttle(Doubles(), LossBegin, freq=2), ConditionalCallback(Halves(), always))

    class DoublesFirst(Doubles):
        pass

    @resolve_conflict.register(DoublesFirst, Halves)
    def _(a: DoublesFirst, b: Halves) -> RunFirst:
        return RunFirst(a)

    for pair in (
        [throttle(DoublesFirst(), LossBegin, freq=1), Halves()],
        [ConditionalCallback(Halves(), always), DoublesFirst()],
    ):
        learner = toy_learner(*pair)
        assert learner.callbacks.order == ["DoublesFirst", "Halves"]
        assert "RunFirst(DoublesFirst)" in learner.callbacks.explain()


def test_one_callback_wrapped_twice_is_the_same_callback_twice() -> None:
    inner = EventRecorder()
    with pytest.raises(DuplicateCallbackError, match="the same EventRecorder was given twice"):
        toy_learner(inner, throttle(inner, StepEnd, freq=2))


def test_names_tell_wrapped_callbacks_apart() -> None:
    with pytest.raises(DuplicateCallbackError, match="two EventRecorder callbacks cannot be told apart"):
        toy_learner(throttle(EventRecorder(), StepEnd, freq=2), EventRecorder())
    learner = toy_learner(throttle(EventRecorder(name="few"), StepEnd, freq=2), EventRecorder(name="all"))
    assert sorted(learner.callbacks.order) == ["all", "few"]


def test_a_wrapped_callback_is_initialised_once() -> None:
    learner = toy_learner(ConditionalCallback(Doubles(), never))
    assert learner.cbstate.doubled == 0
    learner.fit(1)
    assert learner.cbstate.doubled == 0


@pytest.mark.parametrize("index", range(3))
def test_the_state_is_that_of_the_wrapped(index: int) -> None:
    inner = Doubles()
    wrapped = wrappers(inner)[index]
    toy_learner(wrapped).fit(1)
    assert wrapped.state_dict() == inner.state_dict() == {"calls": 16}
    wrapped.load_state_dict({"calls": 3})
    assert inner.calls == 3
    stateless = wrappers(Recorder())[index]
    assert stateless.state_dict() == {}
    stateless.load_state_dict({})


def test_a_handler_taught_from_outside_is_heard_through_a_wrapper() -> None:
    @define
    class Mute(Callback):
        heard: int = 0

    @on(StepEnd, TrainingPhase, Mute)
    def hear(callback: Mute, event: Event, phase: Phase, learner: Any) -> None:
        callback.heard += 1

    mute = Mute()
    learner = toy_learner(throttle(mute, StepEnd, freq=4))
    learner.fit(1)
    assert mute.heard == 4


def test_throttled_watching_changes_nothing() -> None:
    assert_observer(throttle(Draws(), StepEnd, freq=3), toy_learner)
    assert_observer(throttle(Metrics(), StepEnd, freq=3), lambda: toy_learner(Recorder()))


# Bad input


@pytest.mark.parametrize("thing", [Recorder, None, print, "Recorder"])
def test_what_is_no_callback_is_not_wrapped(thing: Any) -> None:
    with pytest.raises(CallbackTypeError, match="was given to be wrapped; expected a callback"):
        ConditionalCallback(thing, always)
    with pytest.raises(CallbackTypeError, match="was given to be wrapped; expected a callback"):
        throttle(thing, StepEnd, freq=2)


@pytest.mark.parametrize("condition", [True, None, "always"])
def test_a_condition_must_be_a_function(condition: Any) -> None:
    with pytest.raises(CallbackTypeError, match="was given as a condition; expected a function"):
        ConditionalCallback(Recorder(), condition)


@pytest.mark.parametrize("event", ["StepEnd", StepEnd(), Recorder, None])
def test_what_is_no_event_type_is_not_throttled(event: Any) -> None:
    with pytest.raises(HandlerError, match=r"throttle was given .* as an event; expected a type, e\.g\. StepEnd"):
        throttle(Recorder(), event, freq=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"freq=None, seconds=None.*exactly one of the two: freq=10"),
        ({"freq": 2, "seconds": 3.0}, r"freq=2, seconds=3\.0.*exactly one of the two"),
        ({"freq": 0}, "freq=0.*expected freq >= 1"),
        ({"freq": -1}, "freq=-1.*expected freq >= 1"),
        ({"seconds": -0.5}, r"seconds=-0\.5.*seconds >= 0"),
    ],
)
def test_how_often_must_be_said_once_and_in_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        throttle(Recorder(), StepEnd, **options)


def test_a_condition_with_other_arguments_is_refused_when_it_is_given() -> None:
    with pytest.raises(
        HandlerError, match=r"the condition <lambda> has the arguments \(event\); expected \(event, phase\)"
    ):
        ConditionalCallback(Recorder(), lambda event: True)  # type: ignore[arg-type, misc]  # that is the test
