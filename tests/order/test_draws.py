from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from drawn import draw, draw_odd, same, states
from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    ConditionalCallback,
    CustomCallback,
    Event,
    FitBegin,
    LossBegin,
    Phase,
    StepBegin,
    StepEnd,
    on,
)
from fluxloop.order.draws import NOTICED, drawing_apart, putting_back, with_own_stream
from fluxloop.randomness import Stream, Streams, preserved, start_step
from fluxloop.testing import toy_learner

WRAPPERS: dict[str, Callable[[Callable[..., None]], Callable[..., None]]] = {
    "putting_back": putting_back,
    "in a step": lambda call: drawing_apart(call, lambda: Stream(5, "callback"), in_step=True),
    "between steps": lambda call: drawing_apart(call, lambda: Stream(5, "callback"), in_step=False),
    "with_own_stream": lambda call: with_own_stream(call, lambda: Stream(5, "callback/Probe")),
}


@pytest.fixture(params=["in an epoch", "outside", "other releases"], autouse=True)
def around(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test where states are copied in one piece, where NumPy's is not, and where neither is."""
    if request.param == "other releases":
        monkeypatch.setattr("fluxloop.order.draws.python_memory", lambda: None)
        monkeypatch.setattr("fluxloop.randomness.python_memory", lambda: None)
    with preserved() if request.param == "in an epoch" else nullcontext():
        yield


@pytest.mark.parametrize("wrapper", ["putting_back", "in a step", "with_own_stream"])
@pytest.mark.parametrize("in_store", [False, True], ids=["nothing in store", "a normal number in store"])
def test_a_wrapped_function_that_draws_leaves_the_generators_as_they_were(wrapper: str, in_store: bool) -> None:
    if in_store:
        draw_odd()
    before = states()
    WRAPPERS[wrapper](draw_odd)()
    assert same(states(), before)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("draws", [False, True], ids=["draws nothing", "draws"])
def test_the_next_step_draws_the_same_whether_the_wrapped_function_drew_or_not(wrapper: str, draws: bool) -> None:
    draw_odd()
    start_step(9)
    with preserved():
        expected = draw()
    WRAPPERS[wrapper](lambda: draw_odd() if draws else None)()
    start_step(9)
    assert draw() == expected


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_function_gets_its_arguments(wrapper: str) -> None:
    got: list[tuple[Any, ...]] = []
    WRAPPERS[wrapper](lambda *args: got.append(args))(1, "two")
    assert got == [(1, "two")]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_function_that_fails_after_drawing_changes_no_number(wrapper: str) -> None:
    def fail() -> None:
        draw_odd()
        raise KeyError("inside")

    start_step(9)
    with preserved():
        expected = draw()
    with pytest.raises(KeyError, match="inside"):
        WRAPPERS[wrapper](fail)()
    start_step(9)
    assert draw() == expected


@pytest.mark.parametrize("in_step", [True, False], ids=["in a step", "between steps"])
def test_numpys_bit_generator_is_the_same_object_after_a_handler_whatever_that_did(in_step: bool) -> None:
    own = np.random.get_bit_generator()
    drawing_apart(lambda: np.random.set_bit_generator(np.random.PCG64(1)), lambda: Stream(5, "callback"), in_step)()
    assert np.random.get_bit_generator() is own


@pytest.mark.parametrize("in_step", [True, False], ids=["in a step", "between steps"])
def test_a_handler_that_does_not_say_that_it_draws_gets_other_numbers_at_each_call_that_draws(in_step: bool) -> None:
    def numbers(calls: list[bool], index: int = 0) -> tuple[list[tuple[float, ...]], int]:
        found: list[tuple[float, ...]] = []
        stream = Stream(5, "callback")
        stream.index = index

        def handler(draws: bool) -> None:
            if draws:
                found.append((float(np.random.randn()), float(np.random.rand()), random.random(), random.gauss(0, 1)))

        call = drawing_apart(handler, lambda: stream, in_step)
        for draws in calls:
            start_step(7)
            call(draws)
        return found, stream.index

    first, index = numbers([True, True, False, True])
    assert (len(set(first)), index) == (3, 3)
    assert numbers([False, False, True, True, True])[0] == first, "only calls that draw count"
    assert numbers([True], index=2)[0] == first[2:], "and a resumed run goes on there"


def test_each_handler_that_does_not_say_that_it_draws_has_numbers_of_its_own() -> None:
    streams, found = Streams(5), []
    for owner in ("a", "b"):
        drawing_apart(
            lambda: found.append((float(np.random.rand()), random.random())), partial(streams.__getitem__, owner), True
        )()
    assert found[0] != found[1]


def test_a_handler_whose_stream_is_set_elsewhere_starts_from_there() -> None:
    stream, found = Stream(5, "callback"), []
    call = drawing_apart(lambda: found.append(random.random()), lambda: stream, in_step=False)
    for index in (0, 1, 0):
        stream.index = index
        call()
    assert found[0] == found[2] != found[1]


def test_a_handler_inside_of_itself_leaves_the_generators_as_they_were() -> None:
    depth = []

    def inner() -> None:
        draw_odd()
        if len(depth) < 2:
            depth.append(1)
            call()
            draw_odd()

    call = drawing_apart(inner, lambda: Stream(5, "callback"), in_step=True)
    draw_odd()
    before = states()
    call()
    assert same(states(), before)


def test_an_own_stream_gives_other_numbers_at_each_call_and_the_same_in_each_run() -> None:
    def numbers() -> list[tuple[float, ...]]:
        found: list[tuple[float, ...]] = []
        stream = Stream(5, "callback/Probe")
        call = with_own_stream(lambda: found.append(draw()), lambda: stream)
        for _ in range(3):
            draw_odd()
            call()
        return found

    first = numbers()
    assert len(set(first)) == 3
    assert numbers() == first


# Handlers that draw


DRAWING: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "NumPy": lambda: float(np.random.rand()),
    "Python": random.random,
}


def noise(draw: Callable[[], float], event: type[Event], from_call: int = 0, **declared: Any) -> CustomCallback:
    calls: list[int] = []

    def add(learner: Any) -> None:
        calls.append(1)
        if len(calls) > from_call:
            draw()

    return CustomCallback(add, event, AbstractTrainingPhase, **{"reads": (), "writes": ("step.noise",), **declared})


@pytest.mark.parametrize("event", [StepBegin, LossBegin, StepEnd], ids=lambda event: event.__name__)
def test_a_handler_that_writes_and_draws_is_told_once_to_say_so(event: type[Event]) -> None:
    learner = toy_learner(noise(DRAWING["torch"], event))
    words = (
        rf"CustomCallback draws random numbers at {event.__name__} and writes step.noise: .*CustomCallback\(..., draws="
    )
    with pytest.warns(UserWarning, match=words) as told:
        learner.fit(2)
    assert len(told) == 1


@pytest.mark.parametrize("event", [StepBegin, LossBegin, StepEnd], ids=lambda event: event.__name__)
@pytest.mark.parametrize("kind", ["NumPy", "Python"])
def test_numpys_and_pythons_numbers_are_a_handlers_own_and_others_in_each_step(kind: str, event: type[Event]) -> None:
    found: dict[str, list[float]] = {"a": [], "b": []}

    def add(name: str) -> CustomCallback:
        record = found[name]
        return noise(lambda: record.append(DRAWING[kind]()) or 0.0, event, name=name)

    first, second = add("a"), add("b")
    second.writes = ("step.other",)  # type: ignore[misc]  # of this one
    toy_learner(first, second).fit(2)  # warnings are errors here
    assert len({*found["a"], *found["b"]}) == len(found["a"]) * 2


def test_a_class_is_told_the_line_to_add_and_with_it_two_of_them_draw_different_numbers() -> None:
    class Noise(Callback):
        def __init__(self, entry: str) -> None:
            super().__init__(name=entry)
            self.writes = (f"step.{entry}",)  # type: ignore[misc]  # of this one
            self.seen: list[float] = []

        @on(StepBegin, AbstractTrainingPhase)
        def add(self, event: Event, phase: Phase, learner: Any) -> None:
            self.seen.append(torch.rand(()).item())

    class OwnNoise(Noise):
        draws = True

    first, second = Noise("a"), Noise("b")
    with pytest.warns(UserWarning, match="write draws = True in the class Noise") as told:
        toy_learner(first, second).fit(2)
    assert len(told) == 2
    assert first.seen == second.seen
    first, second = OwnNoise("a"), OwnNoise("b")
    toy_learner(first, second).fit(1)
    assert not set(first.seen) & set(second.seen)


def test_whoever_draws_and_only_watches_has_a_stream_or_promises_not_to_draw_is_told_nothing() -> None:
    torchs = DRAWING["torch"]
    toy_learner(
        noise(torchs, StepEnd, writes=(), name="watches"),
        noise(torchs, LossBegin, draws=True, name="owns"),
        noise(torchs, LossBegin, writes=("cbstate.noise",), name="records"),
        noise(lambda: 0.0, LossBegin, writes=("step.more",), name="draws nothing"),
    ).fit(1)


def test_a_condition_that_draws_is_not_taken_for_its_callback() -> None:
    quiet = noise(lambda: 0.0, StepEnd, draws=False)
    toy_learner(ConditionalCallback(quiet, lambda event, phase: random.random() < 0.5)).fit(1)


def test_the_first_calls_alone_are_looked_at() -> None:
    batches = len(list(toy_learner().data.training))
    toy_learner(noise(DRAWING["torch"], StepEnd, from_call=NOTICED)).fit(NOTICED // batches + 2)
    with pytest.warns(UserWarning, match="draws random numbers at StepEnd"):
        toy_learner(noise(DRAWING["torch"], StepEnd, from_call=NOTICED - 1)).fit(NOTICED // batches + 2)


def test_a_handler_of_the_fits_own_events_is_told_too() -> None:
    draw = CustomCallback(lambda learner: torch.rand(()), FitBegin, reads=(), writes=("model",))
    with pytest.warns(UserWarning, match="draws random numbers at FitBegin and writes model"):
        toy_learner(draw).fit(1)
