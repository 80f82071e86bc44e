from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxloop import (
    AbstractTrainingPhase,
    BackwardBegin,
    Callback,
    CallbackConflictError,
    CallbackCycleError,
    CallbackTypeError,
    CancelFittingException,
    CustomCallback,
    DuplicateCallbackError,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    GarbageCollect,
    Learner,
    LossBegin,
    Metrics,
    MetricsPrinter,
    MissingProducerError,
    Phase,
    ProgressBar,
    Recorder,
    StateAccessError,
    StepBegin,
    StepEnd,
    StopOnNaNLoss,
    TrainingPhase,
    ValidationPhase,
    on,
    runstep,
    throttle,
)
from fluxloop.order.runner import Callbacks
from fluxloop.testing import EventRecorder, assert_same_bits, bits, toy_learner


class Note(Callback):
    """Does `then()` at the end of each training step."""

    def __init__(self, then: Callable[[], object], name: str | None = None) -> None:
        super().__init__(name=name)
        self.then = then

    @on(StepEnd, AbstractTrainingPhase)
    def run(self, event: Any, phase: Any, learner: Any) -> None:
        self.then()


class Inits(Callback):
    """Counts its calls of init."""

    writes = ("cbstate.inits",)

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name=name)
        self.learners: list[Any] = []

    def init(self, learner: Any) -> None:
        self.learners.append(learner)
        if "inits" not in learner.cbstate:
            learner.cbstate.inits = 0


def snapshot(learner: Learner) -> tuple[Any, ...]:
    callbacks = learner.callbacks
    return (
        callbacks.order,
        callbacks.digest,
        list(callbacks),
        callbacks.graph.edges,
        str(callbacks.explain()),
        dict(vars(learner.cbstate)),
    )


# Resolving handlers


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[type[Event], type[Phase]]]:
    """Count how often the handlers of an (event type, phase type) are looked for."""
    calls: list[tuple[type[Event], type[Phase]]] = []
    original = Callbacks.resolve

    def resolve(self: Callbacks, event: type[Event], phase: type[Phase]) -> Any:
        calls.append((event, phase))
        return original(self, event, phase)

    monkeypatch.setattr(Callbacks, "resolve", resolve)
    return calls


@pytest.mark.parametrize("epochs", [1, 4])
def test_handlers_are_resolved_once_per_event_and_phase_type(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """FluxTraining sorts all callbacks at each event."""
    calls = counted(monkeypatch)
    learner = toy_learner(EventRecorder(), Recorder(), Metrics(), num_batches=4)
    learner.fit(epochs)
    assert len(calls) == len(set(calls))
    # 4 of the fit, 9 of a training epoch (2 epoch, 7 step), 5 of a validation epoch (2 epoch, 3 step)
    assert len(calls) == 18
    learner.fit(epochs)
    assert len(calls) == 18


def test_handlers_of_a_phase_are_resolved_once_for_all_its_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    learner = toy_learner(EventRecorder(), num_batches=1)
    for _ in range(3):
        learner.epoch(ValidationPhase())
    assert sorted(event.__name__ for event, _ in calls) == [
        "EpochBegin",
        "EpochEnd",
        "LossBegin",
        "StepBegin",
        "StepEnd",
    ]


def test_an_event_that_nobody_handles_calls_nobody() -> None:
    learner = toy_learner(Recorder())
    assert learner.callbacks.table(TrainingPhase)[LossBegin] == ()
    assert [id for _, _, id in learner.callbacks.table(TrainingPhase)[StepEnd]] == ["Recorder"]


def test_one_event_instance_reaches_all_handlers_in_order() -> None:
    seen: list[tuple[str, int]] = []

    class Sees(Callback):
        @on(StepEnd)
        def see(self, event: Any, phase: Any, learner: Any) -> None:
            seen.append((str(self.name), id(event)))

    learner = toy_learner(Sees(name="b"), Sees(name="a"), num_batches=1)
    learner.epoch(TrainingPhase())
    assert [name for name, _ in seen] == ["a", "b"]
    assert seen[0][1] == seen[1][1]


# Managing: get, add, replace, remove, set


def test_get_gives_the_instance_or_none() -> None:
    recorder = Recorder()
    learner = toy_learner(recorder)
    assert learner.get_callback(Recorder) is recorder
    assert learner.get_callback(Metrics) is None


def test_get_finds_subclasses_and_what_is_wrapped() -> None:
    class MyRecorder(Recorder): ...

    mine = MyRecorder()
    collect = GarbageCollect()
    learner = toy_learner(mine, throttle(collect, StepEnd, freq=2))
    assert learner.get_callback(Recorder) is mine
    assert learner.get_callback(GarbageCollect) is collect


@pytest.mark.parametrize("method", ["get_callback", "remove_callback"])
def test_an_instance_where_a_class_belongs_is_an_error(method: str) -> None:
    with pytest.raises(CallbackTypeError, match=r"expected the class of a callback, e\.g\. Recorder"):
        getattr(toy_learner(), method)(Recorder())


def test_add_takes_its_place_in_the_order() -> None:
    learner = toy_learner(Metrics(), Recorder())
    learner.add_callback(GarbageCollect())
    assert learner.callbacks.order == ["GarbageCollect", "Recorder", "Metrics"]
    assert len(learner.callbacks) == 3


def test_remove_gives_the_removed_instance_or_none() -> None:
    collect = GarbageCollect()
    learner = toy_learner(collect, Recorder())
    assert learner.remove_callback(GarbageCollect) is collect
    assert learner.callbacks.order == ["Recorder"]
    assert learner.remove_callback(GarbageCollect) is None
    assert learner.callbacks.order == ["Recorder"]


def test_remove_takes_what_is_wrapped_with_its_wrapper() -> None:
    collect = GarbageCollect()
    learner = toy_learner(throttle(collect, StepEnd, freq=2))
    assert learner.remove_callback(GarbageCollect) is collect
    assert len(learner.callbacks) == 0


def test_replace_gives_the_replaced_instance() -> None:
    old, new = GarbageCollect(every=1), GarbageCollect(every=2)
    learner = toy_learner(old, Recorder())
    assert learner.replace_callback(new) is old
    assert learner.get_callback(GarbageCollect) is new
    assert learner.callbacks.order == ["GarbageCollect", "Recorder"]


def test_replace_adds_when_there_is_none() -> None:
    learner = toy_learner()
    new = GarbageCollect()
    assert learner.replace_callback(new) is None
    assert list(learner.callbacks) == [new]


def test_replace_sees_through_wrappers_on_both_sides() -> None:
    old, new = GarbageCollect(every=1), GarbageCollect(every=2)
    learner = toy_learner(throttle(old, StepEnd, freq=2))
    assert learner.replace_callback(throttle(new, StepEnd, freq=3)) is old
    assert list(learner.callbacks) == [new]


def test_set_puts_these_in_the_place_of_all_default_ones_included() -> None:
    learner = toy_learner(default_callbacks=True)
    learner.set_callbacks([GarbageCollect()])
    assert learner.callbacks.order == ["GarbageCollect"]
    learner.set_callbacks([])
    assert len(learner.callbacks) == 0
    learner.fit(1)


def test_everything_works_on_a_learner_without_callbacks() -> None:
    learner = toy_learner(num_batches=1)
    assert learner.get_callback(Recorder) is None
    assert learner.remove_callback(Recorder) is None
    learner.add_callback(Recorder())
    learner.fit(1)
    assert learner.history[TrainingPhase].epochs == 1


def test_a_callback_passed_by_the_user_replaces_the_default_of_its_type() -> None:
    mine = Metrics()
    learner = toy_learner(mine, default_callbacks=True)
    assert learner.get_callback(Metrics) is mine
    assert learner.callbacks.order.count("Metrics") == 1
    throttled = throttle(Recorder(), StepEnd, freq=2)
    assert toy_learner(throttled, default_callbacks=True).callbacks.order.count("Recorder") == 1


# init


@pytest.mark.slow
def test_init_runs_once_for_each_new_callback_whatever_brings_it() -> None:
    """FluxTraining leaves callbacks that are set or replaced without init."""
    first, second, third = Inits(), Inits(), Inits()
    learner = toy_learner(first)
    assert len(first.learners) == 1
    learner.add_callback(GarbageCollect())
    learner.remove_callback(GarbageCollect)
    assert len(first.learners) == 1
    learner.replace_callback(second)
    assert (len(first.learners), len(second.learners)) == (1, 1)
    learner.set_callbacks([Recorder(), second])
    assert len(second.learners) == 1
    learner.set_callbacks([third])
    assert len(third.learners) == 1
    learner.fit(1)
    learner.evaluate()
    assert [len(callback.learners) for callback in (first, second, third)] == [1, 1, 1]


def test_wrapping_a_callback_that_is_there_does_not_init_it_again() -> None:
    inits = Inits()
    learner = toy_learner(inits)
    learner.replace_callback(throttle(inits, StepEnd, freq=2))
    assert len(inits.learners) == 1
    assert [type(callback).__name__ for callback in learner.callbacks.given()] == ["ConditionalCallback"]


def test_each_learner_gets_an_init_of_its_own() -> None:
    inits = Inits()
    learners = [toy_learner(inits), toy_learner(inits)]
    assert len(inits.learners) == 2
    assert all(learner.cbstate.inits == 0 for learner in learners)


def test_init_is_idempotent_what_was_recorded_stays_when_it_runs_again() -> None:
    recorder, metrics = Recorder(), Metrics()
    learner = toy_learner(recorder, metrics, num_batches=2)
    learner.fit(2)
    losses = learner.history["training/loss"]
    learner.set_callbacks([])
    learner.set_callbacks([recorder, metrics])
    assert learner.history[TrainingPhase].steps == 4
    assert learner.history["training/loss"] == losses
    learner.fit(1)
    assert learner.history[TrainingPhase].epochs == 3
    assert learner.history["training/loss"][:2] == losses


def test_init_runs_in_the_proved_order_before_the_first_event_and_sees_the_same_view_as_handlers() -> None:
    seen: list[Any] = []

    class Publishes(Callback):
        writes = ("cbstate.word",)

        def init(self, learner: Any) -> None:
            learner.cbstate.word = "hello"

    class Hears(Callback):
        reads = ("cbstate.word",)

        def init(self, learner: Any) -> None:
            seen.extend([learner, learner.cbstate.word])

        @on(FitBegin)
        def begin(self, event: Any, phase: Any, learner: Any) -> None:
            seen.append(learner)

    learner = toy_learner(Hears(), Publishes(), num_batches=1)
    assert seen[1:] == ["hello"]
    learner.fit(1)
    assert seen[2] is seen[0]


def test_an_undeclared_access_in_init_is_an_error_when_the_learner_is_built() -> None:
    class Greedy(Callback):
        def init(self, learner: Any) -> None:
            _ = learner.model

    with pytest.raises(StateAccessError, match="Greedy tried to read 'model' at init"):
        toy_learner(Greedy())


def test_the_callbacks_of_a_copied_learner_are_its_own() -> None:
    learner = toy_learner(EventRecorder(), Recorder(), Metrics(), num_batches=2)
    learner.fit(1)
    twin = copy.deepcopy(learner)
    recorders = [one.get_callback(EventRecorder) for one in (learner, twin)]
    assert recorders[0] is not None
    assert recorders[1] is not None
    before, told = len(recorders[0].trace), bits(learner)
    twin.fit(1)
    assert len(recorders[0].trace) == before
    assert len(recorders[1].trace) == 2 * before
    assert (learner.history[TrainingPhase].epochs, twin.history[TrainingPhase].epochs) == (1, 2)
    assert all(torch.equal(tensor, bits(learner)[name]) for name, tensor in told.items())
    learner.fit(1)
    assert_same_bits(learner, twin)


# Failing changes nothing


class Loser(Callback):
    writes = ("cbstate.history",)


def failing() -> dict[str, tuple[type[Exception], Callable[[Learner], object]]]:
    class Broken(Callback):
        def init(self, learner: Any) -> None:
            raise ValueError("broken")

    class Before(Callback):
        run_after = (Metrics,)
        writes = ("cbstate.history",)

    return {
        "add a conflict": (CallbackConflictError, lambda learner: learner.add_callback(Loser())),
        "add a cycle": (CallbackCycleError, lambda learner: learner.add_callback(Before())),
        "add what misses a producer": (
            MissingProducerError,
            lambda learner: learner.add_callback(CustomCallback(print, StepEnd, reads=("cbstate.nothing",))),
        ),
        "add the same": (DuplicateCallbackError, lambda learner: learner.add_callback(next(iter(learner.callbacks)))),
        "add a class": (CallbackTypeError, lambda learner: learner.add_callback(Recorder)),  # type: ignore[arg-type]
        "add what fails in init": (ValueError, lambda learner: learner.add_callback(Broken())),
        "replace with a class": (CallbackTypeError, lambda learner: learner.replace_callback(Metrics)),  # type: ignore[arg-type]
        "replace with what fails in init": (ValueError, lambda learner: learner.replace_callback(Broken())),
        "remove what is needed": (MissingProducerError, lambda learner: learner.remove_callback(Recorder)),
        "set a conflict": (CallbackConflictError, lambda learner: learner.set_callbacks([Recorder(), Loser()])),
        "set what is no list": (CallbackTypeError, lambda learner: learner.set_callbacks(Recorder())),  # type: ignore[arg-type]
        "set what fails in init": (ValueError, lambda learner: learner.set_callbacks([Recorder(), Broken()])),
    }


@pytest.mark.slow(quick=5)
@pytest.mark.parametrize("case", failing())
def test_a_failing_change_leaves_everything_as_before(case: str) -> None:
    kind, change = failing()[case]
    learner, twin = (toy_learner(Recorder(), Metrics(), EventRecorder(), num_batches=2) for _ in range(2))
    learner.fit(1)
    twin.fit(1)
    before = snapshot(learner)
    with pytest.raises(kind):
        change(learner)
    assert snapshot(learner) == before
    learner.fit(1)
    twin.fit(1)
    traces = [next(c for c in one.callbacks if isinstance(c, EventRecorder)).trace for one in (learner, twin)]
    assert traces[0] == traces[1]
    assert learner.history["training/loss"] == twin.history["training/loss"]
    assert_same_bits(learner, twin)


def test_a_failing_init_leaves_nothing_that_the_others_published() -> None:
    class Published(Callback):
        writes = ("cbstate.early",)

        def init(self, learner: Any) -> None:
            learner.cbstate.early = 1

    class Sour(Callback):
        run_after = (Published,)

        def init(self, learner: Any) -> None:
            raise ValueError("sour")

    learner = toy_learner(Recorder())
    with pytest.raises(ValueError, match="sour"):
        learner.set_callbacks([Published(), Sour()])
    assert sorted(vars(learner.cbstate)) == ["history"]


# In the middle of a fit


def test_a_callback_added_in_the_middle_of_a_fit_hears_the_next_event() -> None:
    recorder = EventRecorder()
    learner = toy_learner(num_batches=2)
    learner.add_callback(CustomCallback(lambda view: add_once(learner, recorder), LossBegin, TrainingPhase))
    learner.fit(1, phases=[TrainingPhase()])
    assert recorder.events[:4] == ["BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd"]
    assert recorder.events[-2:] == ["CycleEnd", "FitEnd"]


def add_once(learner: Learner, callback: Callback) -> None:
    if callback not in list(learner.callbacks):
        learner.add_callback(callback)


def test_a_callback_removed_in_the_middle_of_a_fit_hears_no_further_event() -> None:
    recorder = EventRecorder()
    learner = toy_learner(recorder, num_batches=2)
    hook = CustomCallback(lambda view: learner.remove_callback(EventRecorder), BackwardBegin, name="last")
    learner.add_callback(hook)
    learner.fit(1, phases=[TrainingPhase()])
    assert recorder.events == ["FitBegin", "CycleBegin", "EpochBegin", "StepBegin", "LossBegin", "BackwardBegin"]


def test_the_running_event_still_reaches_those_who_were_there() -> None:
    heard: list[str] = []
    learner = toy_learner(
        Note(lambda: learner.remove_callback(GarbageCollect), name="a"),
        GarbageCollect(),
        Note(lambda: heard.append("z"), name="z"),
        num_batches=1,
    )
    learner.fit(1, phases=[TrainingPhase()])
    assert heard == ["z"]
    assert learner.callbacks.order == ["a", "z"]


def test_replacing_in_the_middle_of_a_fit_takes_effect() -> None:
    first, second = EventRecorder(), EventRecorder()
    learner = toy_learner(first, num_batches=2)
    hook = CustomCallback(lambda view: add_second(), EpochEnd, TrainingPhase)

    def add_second() -> None:
        learner.replace_callback(second)

    learner.add_callback(hook)
    learner.fit(1)
    assert first.events[-1] == "EpochEnd"
    assert first.events.count("EpochEnd") == 1
    assert (second.trace[0], second.trace[-1]) == (("EpochBegin", "ValidationPhase"), ("FitEnd", "FittingPhase"))


# Any order of the list


class Replaces(Callback):
    """Replaces the step's inputs and its loss."""

    writes = ("step.xs", "step.loss")
    draws = True

    @on(StepBegin, AbstractTrainingPhase)
    def inputs(self, event: Any, phase: Any, learner: Any) -> None:
        learner.step.xs = learner.step.xs * (1 + 0.1 * torch.rand(()))

    @on(BackwardBegin, AbstractTrainingPhase)
    def penalty(self, event: Any, phase: Any, learner: Any) -> None:
        learner.step.loss = learner.step.loss * (1 + 0.1 * random.random())


class Watches(Callback):
    """Publishes the largest loss; draws without saying so."""

    reads = ("step.loss",)
    writes = ("cbstate.largest",)

    def init(self, learner: Any) -> None:
        learner.cbstate.largest = 0.0

    @on(StepEnd)
    def watch(self, event: Any, phase: Any, learner: Any) -> None:
        torch.rand(3)
        random.random()
        learner.cbstate.largest = max(learner.cbstate.largest, learner.step.loss.item())


class Fired(Event):
    """A user's event."""


class Firing(TrainingPhase):
    """The usual phase with dropout of its own and an event of its own."""

    def step(self, learner: Any, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            state.preds = torch.nn.functional.dropout(learner.model(state.xs), 0.2)
            handle(LossBegin())
            state.loss = learner.loss_fn(state.preds, state.ys)
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(Fired())
            learner.update()


def realistic() -> dict[str, Callback]:
    """Make the default callbacks and a set of users' own, by what they are called here."""
    recorded: list[float] = []
    return {
        "recorder": Recorder(),
        "metrics": Metrics(),
        "bar": ProgressBar(enabled=False),
        "printer": MetricsPrinter(),
        "nan": StopOnNaNLoss(),
        "events": EventRecorder(),
        "replaces": Replaces(),
        "watches": Watches(),
        "throttled": throttle(GarbageCollect(every=1000), StepEnd, freq=3),
        "hook": CustomCallback(lambda learner: recorded.append(learner.step.loss.item()), StepEnd, name="hook"),
        "second hook": CustomCallback(lambda learner: torch.rand(1), EpochEnd, TrainingPhase, name="second"),
    }


def outcome(names: Iterable[str]) -> tuple[Learner, list[tuple[str, str]], tuple[Any, ...]]:
    made = realistic()
    learner = toy_learner(*(made[name] for name in names), num_batches=3)
    learner.fit(2, phases=[Firing(), ValidationPhase()])
    events = made["events"]
    assert isinstance(events, EventRecorder)
    callbacks = learner.callbacks
    told = (callbacks.order, callbacks.digest, str(callbacks.explain()), callbacks.to_mermaid(), callbacks.to_dot())
    return learner, events.trace, (*told, learner.history["training/loss"], learner.cbstate.largest)


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(names=st.permutations(list(realistic())))
def test_the_list_s_order_changes_neither_digest_nor_trace_nor_bits(names: list[str]) -> None:
    expected, trace, told = outcome(realistic())
    learner, same_trace, same_told = outcome(names)
    assert same_told == told
    assert same_trace == trace
    assert_same_bits(learner, expected)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(names=st.permutations(list(realistic())), position=st.integers(0, 11))
def test_adding_callbacks_one_by_one_gives_the_same_as_a_list(names: list[str], position: int) -> None:
    made = realistic()
    callbacks = [made[name] for name in names]
    learner = toy_learner(num_batches=3)
    learner.set_callbacks([made["recorder"], made["metrics"]])  # what others need goes first
    for callback in callbacks:
        if callback not in (made["recorder"], made["metrics"]):
            learner.add_callback(callback)
    learner.fit(2, phases=[Firing(), ValidationPhase()])
    assert learner.callbacks.digest == outcome(realistic())[2][1]
    assert_same_bits(learner, outcome(realistic())[0])


def test_the_realistic_set_is_no_observer() -> None:
    """The property above would hold for callbacks that do nothing: these do."""
    learner, _, _ = outcome(realistic())
    plain = toy_learner(num_batches=3)
    plain.fit(2, phases=[Firing(), ValidationPhase()])
    assert not torch.equal(bits(learner)["model..value"], bits(plain)["model..value"])


def test_the_order_is_seen_in_the_repr_and_by_iterating() -> None:
    recorder, metrics = Recorder(), Metrics()
    callbacks = toy_learner(metrics, recorder).callbacks
    assert repr(callbacks) == "Callbacks(Recorder → Metrics)"
    assert list(callbacks) == [recorder, metrics]
    assert len(callbacks) == 2


# Errors in handlers


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


def raising(error: BaseException, event: type[Event], phase: type[Phase] = Phase, after: int = 0) -> CustomCallback:
    calls: list[int] = []

    def fail(learner: Any) -> None:
        calls.append(1)
        if len(calls) > after:
            raise error

    return CustomCallback(fail, event, phase, name="culprit")


def test_an_error_in_a_handler_says_callback_event_phase_epoch_and_step_and_keeps_its_type() -> None:
    error = KeyError("mine")
    learner = toy_learner(raising(error, LossBegin, TrainingPhase, after=7), num_batches=3)
    with pytest.raises(KeyError) as caught:
        learner.fit(4)
    assert caught.value is error
    assert "raised by culprit at LossBegin of TrainingPhase()" in notes(error)
    assert "in TrainingPhase(), epoch 3, step 8" in notes(error)


@pytest.mark.parametrize("event", [FitBegin, EpochBegin, StepBegin, BackwardBegin, StepEnd, EpochEnd, FitEnd])
def test_the_note_is_there_once_at_every_kind_of_event(event: type[Event]) -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine"):
        toy_learner(raising(error, event), num_batches=1).fit(1)
    assert notes(error).count(f"raised by culprit at {event.__name__} of ") == 1
    assert notes(error).count("fluxloop: in ") == 1


def test_an_error_in_a_wrapped_callback_names_the_callback_itself() -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine"):
        toy_learner(throttle(raising(error, StepEnd), StepEnd, freq=1), num_batches=1).fit(1)
    assert "raised by culprit at StepEnd of TrainingPhase()" in notes(error)


def test_an_error_in_the_step_itself_names_phase_epoch_and_step_and_no_callback() -> None:
    class Failing(TrainingPhase):
        def step(self, learner: Any, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]):
                raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError) as caught:
        toy_learner(EventRecorder(), num_batches=1).fit(1, phases=[Failing()])
    assert "in Failing(), epoch 1, step 1" in notes(caught.value)
    assert "raised by" not in notes(caught.value)


def test_a_cancel_of_a_fit_carries_no_note_and_its_reason() -> None:
    cancel = CancelFittingException("enough")
    learner = toy_learner(raising(cancel, StepEnd), num_batches=2)
    assert learner.fit(3).stop_reason == "enough"
    assert notes(cancel) == ""


class A(Note): ...


class B(Note): ...


def test_callbacks_whose_names_resemble_ids_run_once_each() -> None:
    ran: list[str] = []
    callbacks = [
        A(lambda: ran.append("plain A")),
        B(lambda: ran.append("B called A"), name="A"),
        A(lambda: ran.append("A called A-2"), name="A-2"),
    ]
    learner = toy_learner(*callbacks, num_batches=1)
    assert len(set(learner.callbacks.order)) == 3
    learner.epoch(TrainingPhase())
    assert sorted(ran) == ["A called A-2", "B called A", "plain A"]


@define
class Counted(Callback):
    """What it is shown as changes while it runs."""

    start: int

    draws = False

    @on(StepEnd)
    def count(self, event: Event, phase: Phase, learner: Any) -> None:
        self.start = 10 - self.start


def test_ids_stay_although_the_state_of_callbacks_changes() -> None:
    learner = toy_learner(Counted(1), Counted(2), Counted(3), num_batches=1)

    def ids() -> dict[int, str]:
        return {id(node.callback): node.id for node in learner.callbacks.graph.nodes if type(node.callback) is Counted}

    before, order = ids(), learner.callbacks.order
    learner.epoch(TrainingPhase())
    learner.set_callbacks(list(learner.callbacks)[::-1])
    assert learner.callbacks.order == order
    assert ids() == before
    learner.add_callback(EventRecorder())
    assert ids() == before


def test_an_error_in_init_says_whose_it_is() -> None:
    class Fails(Callback):
        def init(self, learner: Any) -> None:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        toy_learner(Fails())
    assert getattr(caught.value, "__notes__", []) == ["fluxloop: raised by Fails in init"]


def test_a_subclass_of_a_default_callback_replaces_it() -> None:
    class MyRecorder(Recorder): ...

    learner = toy_learner(default_callbacks=True)
    size, mine = len(learner.callbacks), MyRecorder()
    old = learner.replace_callback(mine)
    assert type(old) is Recorder
    assert [callback for callback in learner.callbacks if isinstance(callback, Recorder)] == [mine]
    assert len(learner.callbacks) == size


def test_one_object_holds_the_callbacks_however_they_are_changed() -> None:
    learner = toy_learner()
    held = learner.callbacks
    learner.set_callbacks([GarbageCollect()])
    learner.add_callback(Recorder())
    learner.replace_callback(GarbageCollect())
    learner.remove_callback(GarbageCollect)
    assert learner.callbacks is held
    assert held.order == ["Recorder"]
