from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
from attrs import evolve, field, frozen
from attrs.exceptions import FrozenInstanceError

import fluxloop
from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CancelFittingException,
    Event,
    FitEnd,
    Learner,
    Phase,
    StepEnd,
    UpdateBegin,
    UpdateEnd,
    on,
    runstep,
)
from fluxloop.events import STANDARD_EVENTS, event_types
from fluxloop.testing import EventRecorder, toy_learner


@frozen
class Sampled(Event):
    """An event with fields, one of them with a default."""

    count: int
    tags: tuple[str, ...] = field(default=())


@frozen
class SampledTwice(Sampled):
    """A more specific one."""


class Bare(Event):
    """An event without fields."""


@dataclass(frozen=True)
class FromDataclass(Event):
    value: int = 0


class Fires(AbstractTrainingPhase):
    """A phase that fires events in its step."""

    def __init__(self, *events: Event) -> None:
        self.events = events

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self) as (handle, _):
            for event in self.events:
                handle(event)


class Hears(Callback):
    draws = False

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, Event]] = []

    @on(Sampled, Fires)
    def sampled(self, event: Sampled, phase: Phase, learner: Any) -> None:
        self.heard.append(("sampled", event))

    @on(Bare)
    def bare(self, event: Bare, phase: Phase, learner: Any) -> None:
        self.heard.append(("bare", event))

    @on(FromDataclass)
    def from_dataclass(self, event: FromDataclass, phase: Phase, learner: Any) -> None:
        self.heard.append(("dataclass", event))


def test_users_events_and_their_fields_reach_the_handlers_of_their_type():
    events = [Sampled(3, ("a",)), Bare(), FromDataclass(7), Sampled(1)]
    hears = Hears()
    toy_learner(hears, num_batches=1).fit(1, phases=[Fires(*events)])
    assert [name for name, _ in hears.heard] == ["sampled", "bare", "dataclass", "sampled"]
    assert all(heard is fired for (_, heard), fired in zip(hears.heard, events, strict=True))


def test_an_event_reaches_the_handlers_of_its_base_type():
    hears, recorder = Hears(), EventRecorder()
    event = SampledTwice(2)
    toy_learner(hears, recorder, num_batches=1).fit(1, phases=[Fires(event)])
    assert hears.heard == [("sampled", event)]
    assert recorder.events.count("SampledTwice") == 1, "a handler of Event hears all of them"


def test_a_handler_of_the_more_specific_event_goes_before_one_of_its_base():
    class HearsBoth(Hears):
        @on(SampledTwice)
        def twice(self, event: SampledTwice, phase: Phase, learner: Any) -> None:
            self.heard.append(("twice", event))

        @on(SampledTwice, Fires)
        def twice_here(self, event: SampledTwice, phase: Phase, learner: Any) -> None:
            self.heard.append(("twice here", event))

    hears = HearsBoth()
    toy_learner(hears, num_batches=1).fit(1, phases=[Fires(SampledTwice(1), Sampled(2))])
    assert [name for name, _ in hears.heard] == ["twice here", "sampled"]


def test_a_handler_of_a_standard_event_hears_a_users_subclass_of_it():
    class LastStepEnd(StepEnd):
        pass

    class HearsEnds(Callback):
        heard = 0
        draws = False

        @on(StepEnd)
        def hear(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.heard += 1

    hears = HearsEnds()
    toy_learner(hears, num_batches=1).fit(1, phases=[Fires(LastStepEnd())])
    assert hears.heard == 2


@pytest.mark.parametrize(("ends_scope", "heard_by_all"), [(True, True), (False, False)])
def test_a_users_event_may_say_that_a_cancel_at_it_waits_for_the_other_handlers(ends_scope, heard_by_all):
    class Mine(Event):
        pass

    Mine.ends_scope = ends_scope

    class Cancels(Callback):
        draws = False

        @on(Mine)
        def cancel(self, event: Mine, phase: Phase, learner: Any) -> None:
            raise CancelFittingException("heard")

    class Late(EventRecorder):
        pass

    late = Late()
    learner = toy_learner(Cancels(), late, num_batches=1)
    assert learner.fit(1, phases=[Fires(Mine())]).stop_reason == "heard"
    assert ("Mine" in late.events) is heard_by_all


@pytest.mark.parametrize("event", [Sampled(1), StepEnd(), FitEnd("why"), UpdateBegin("D")], ids=repr)
def test_events_cannot_be_changed(event):
    with pytest.raises(FrozenInstanceError):
        event.count = 2
    with pytest.raises(FrozenInstanceError):
        event.name = "other"


def test_events_are_compared_by_type_and_fields():
    assert UpdateBegin("D") == UpdateBegin("D")
    assert UpdateBegin("D") != UpdateBegin("G")
    assert UpdateBegin("D") != UpdateEnd("D")
    assert StepEnd() == StepEnd()
    assert evolve(Sampled(1), count=2) == Sampled(2)
    assert {UpdateBegin("D"), UpdateBegin("D")} == {UpdateBegin("D")}


def test_the_standard_events_have_these_fields():
    assert (FitEnd().reason, FitEnd().error) == (None, None)
    assert (UpdateBegin().name, UpdateEnd().name) == (None, None)
    assert repr(UpdateEnd("critic")) == "UpdateEnd(name='critic')"


def test_event_types_lists_the_standard_events_in_firing_order_and_then_users():
    listed = event_types()
    names = [cls.__name__ for cls in listed]
    assert names[:13] == [
        *["FitBegin", "CycleBegin", "EpochBegin", "StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd"],
        *["UpdateBegin", "UpdateEnd", "StepEnd", "EpochEnd", "CycleEnd", "FitEnd"],
    ]
    assert tuple(listed[:13]) == STANDARD_EVENTS
    assert {Sampled, SampledTwice, Bare, FromDataclass} <= set(listed[13:])
    assert names[13:] == sorted(names[13:])
    assert len(listed) == len(set(listed))


def test_the_standard_events_are_at_the_top_of_the_package():
    for cls in (Event, *STANDARD_EVENTS):
        assert getattr(fluxloop, cls.__name__) is cls
        assert cls.__doc__


def test_the_ends_of_scopes_are_those_whose_cancels_wait():
    assert [cls.__name__ for cls in STANDARD_EVENTS if cls.ends_scope] == [
        "BackwardEnd",
        "UpdateEnd",
        "StepEnd",
        "EpochEnd",
        "CycleEnd",
        "FitEnd",
    ]


def test_a_class_that_attrs_has_made_anew_is_listed_once_also_while_no_garbage_is_collected():
    gc.disable()
    try:

        def cell() -> type[Event]:
            @frozen
            class Again(Event):
                """An event of a cell of a notebook."""

            return Again

        cell()
        newest = cell()
        assert [cls for cls in event_types() if cls.__name__ == "Again"] == [newest]
        assert len(event_types()) == len({(cls.__module__, cls.__qualname__) for cls in event_types()})
    finally:
        gc.enable()
