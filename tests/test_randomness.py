from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    seed_everything,
    start_generators,
    stream_seed,
)
from fluxloop.randomness import (
    NOTICED,
    Stream,
    Streams,
    between_steps,
    preserved,
    putting_back,
    start_step,
    with_own_stream,
)
from fluxloop.testing import toy_learner

SEEDS = st.integers(0, 2**32 - 1)
OWNERS = st.text(max_size=12)
INDICES = st.integers(0, 2**32 - 1)


def draw() -> tuple[float, ...]:
    return torch.rand(()).item(), float(np.random.randn()), float(np.random.rand()), random.random(), random.gauss(0, 1)


def draw_odd() -> None:
    """Leave every generator elsewhere, with a normal number in store in NumPy's and Python's."""
    torch.rand(3)
    np.random.randn()
    random.gauss(0, 1)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


@given(seed=SEEDS, owner=OWNERS, first=INDICES, second=INDICES)
@settings(deadline=None, max_examples=60)
def test_distinct_indices_of_one_owner_start_from_distinct_numbers(
    seed: int, owner: str, first: int, second: int
) -> None:
    assert (stream_seed(seed, owner, first) == stream_seed(seed, owner, second)) == (first == second)


@given(seed=SEEDS, owner=OWNERS, index=INDICES)
@settings(deadline=None, max_examples=60)
def test_a_stream_starts_from_a_number_that_every_generator_takes(seed: int, owner: str, index: int) -> None:
    assert 0 <= stream_seed(seed, owner, index) < 2**32


@given(seed=SEEDS, owner=st.sampled_from(["training/step", "training/data", "callback/Probe"]), start=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_a_stream_gives_the_numbers_of_stream_seed_one_index_after_the_other(seed: int, owner: str, start: int) -> None:
    stream = Stream(seed, owner)
    numbers = [stream.next() for _ in range(start + 3)]
    assert numbers == [stream_seed(seed, owner, index) for index in range(start + 3)]
    assert stream.index == start + 3


@pytest.mark.parametrize(
    ("seed", "owner", "index", "number"),
    [
        (0, "training/step", 0, 2438395694),
        (0, "training/step", 1, 3813740059),
        (0, "training/data", 0, 2528129377),
        (1, "training/step", 0, 3977588200),
        (2**32 - 1, "callback/Probe", 10**6, 3961525543),
    ],
)
def test_the_numbers_are_the_same_in_every_release(seed: int, owner: str, index: int, number: int) -> None:
    assert stream_seed(seed, owner, index) == number


def test_seeds_and_owners_each_decide_the_stream() -> None:
    owners = [f"{key}/{part}" for key in ("training", "validation") for part in ("step", "data", "epoch", "fetch")]
    numbers = {stream_seed(seed, owner) for seed in range(50) for owner in owners}
    assert len(numbers) == 50 * len(owners)


def test_the_index_counts_from_zero_when_it_is_left_out() -> None:
    assert stream_seed(3, "training/step") == stream_seed(3, "training/step", 0)


def test_streams_keep_their_place_and_say_where_they_stand() -> None:
    streams = Streams(5)
    streams["b"].next()
    streams["a"].next()
    streams["b"].next()
    assert streams["b"] is streams["b"]
    assert streams.positions() == {"a": 1, "b": 2}


def test_a_prefix_keeps_streams_apart_from_those_of_the_same_owner() -> None:
    assert Streams(5, prefix="evaluate/")["validation/step"].next() == stream_seed(5, "evaluate/validation/step")


def test_seed_everything_decides_torch_numpy_and_python() -> None:
    assert seed_everything(7) == 7
    numbers = draw()
    draw_odd()
    seed_everything(7)
    assert draw() == numbers
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    assert draw() == numbers
    seed_everything(8)
    assert draw() != numbers


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_everything_says_which_seeds_there_are(seed: int) -> None:
    before = states()
    with pytest.raises(ValueError, match=rf"seed={seed} was given.*0 to 4294967295"):
        seed_everything(seed)
    assert same(states(), before)


def test_start_generators_starts_all_three_as_their_own_seeding_functions_do() -> None:
    start_generators(11)
    numbers = draw()
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    assert draw() == numbers


def test_a_step_starts_torch_alone_and_numpy_forgets_the_normal_number_in_store() -> None:
    seed_everything(3)
    np.random.randn()
    after_one = np.random.get_state()
    python = random.getstate()
    start_step(12)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(12)))
    assert random.getstate() == python
    state = np.random.get_state()
    assert np.array_equal(state[1], after_one[1])
    assert state[2] == after_one[2], "NumPy goes on where it was"
    assert (after_one[3], state[3]) == (1, 0), "but without the number in store"


@pytest.mark.parametrize("in_store", [False, True], ids=["nothing in store", "a normal number in store"])
def test_preserved_puts_every_generator_back_to_the_last_bit(in_store: bool) -> None:
    if in_store:
        draw_odd()
    before = states()
    with preserved():
        draw_odd()
        start_generators(1)
    assert same(states(), before)


def test_preserved_puts_back_after_an_error_too() -> None:
    def draw_and_fail() -> None:
        with preserved():
            draw_odd()
            raise KeyError("inside")

    before = states()
    with pytest.raises(KeyError, match="inside"):
        draw_and_fail()
    assert same(states(), before)


def test_what_is_drawn_after_preserved_is_what_would_have_been_drawn() -> None:
    draw_odd()
    with preserved():
        expected = draw()
    with preserved():
        draw_odd()
    assert draw() == expected


WRAPPERS: dict[str, Callable[[Callable[..., None]], Callable[..., None]]] = {
    "putting_back": putting_back,
    "between_steps": lambda call: between_steps(call, lambda: Stream(5, "callback")),
    "with_own_stream": lambda call: with_own_stream(call, lambda: Stream(5, "callback/Probe")),
}


@pytest.mark.parametrize("wrapper", ["putting_back", "with_own_stream"])
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


def test_numpys_bit_generator_is_the_same_object_after_a_handler_between_two_steps() -> None:
    own = np.random.get_bit_generator()
    inside: list[object] = []
    between_steps(lambda: inside.append(np.random.get_bit_generator()), lambda: Stream(5, "callback"))()
    assert np.random.get_bit_generator() is own
    assert inside[0] is not own


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
@pytest.mark.parametrize("kind", ["torch", "Python"])
def test_a_handler_that_writes_and_draws_is_told_once_to_say_so(kind: str, event: type[Event]) -> None:
    learner = toy_learner(noise(DRAWING[kind], event))
    words = (
        rf"CustomCallback draws random numbers at {event.__name__} and writes step.noise: .*CustomCallback\(..., draws="
    )
    with pytest.warns(UserWarning, match=words) as told:
        learner.fit(2)
    assert len(told) == 1


def test_numpys_numbers_in_the_middle_of_a_step_are_told_and_between_two_steps_they_are_ones_own() -> None:
    with pytest.warns(UserWarning, match="draws random numbers at LossBegin"):
        toy_learner(noise(DRAWING["NumPy"], LossBegin)).fit(1)
    toy_learner(noise(DRAWING["NumPy"], StepBegin)).fit(1)  # warnings are errors here


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
