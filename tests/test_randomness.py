from __future__ import annotations

import copy
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import MT19937, Generator, RandomState

from drawn import draw, draw_odd, same, states
from fluxloop import randomness, seed_everything, start_generators, stream_seed
from fluxloop.randomness import Stream, Streams, preserved, python_memory, quick_bits, start_step

SEEDS = st.integers(0, 2**32 - 1)
OWNERS = st.text(max_size=12)
INDICES = st.integers(0, 2**32 - 1)


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


def test_what_is_preserved_inside_of_it_is_put_back_to_the_last_bit_too() -> None:
    draw_odd()
    before = states()
    with preserved():
        start_generators(4)
        draw_odd()
        inside = states()
        with preserved():
            start_generators(1)
            draw_odd()
        assert same(states(), inside)
        numbers = draw()
        start_generators(4)
        draw_odd()
        assert draw() == numbers
    assert same(states(), before)


def test_inside_numpys_numbers_are_those_that_its_own_generator_gives() -> None:
    np.random.seed(3)
    expected = np.random.randn(1000).tolist()
    np.random.seed(3)
    own = np.random.get_bit_generator()
    with preserved():
        assert np.random.get_bit_generator() is not own
        assert np.random.randn(1000).tolist() == expected
    assert np.random.get_bit_generator() is own
    assert np.random.randn(1000).tolist() == expected


def test_another_bit_generator_of_numpys_is_put_back_with_its_state() -> None:
    own = np.random.get_bit_generator()
    other = np.random.PCG64(5)
    try:
        np.random.set_bit_generator(other)
        before = other.state
        with preserved():
            np.random.rand(7)
        assert np.random.get_bit_generator() is other
        assert other.state == before
        with preserved():
            np.random.set_bit_generator(own)
        assert np.random.get_bit_generator() is other
    finally:
        np.random.set_bit_generator(own)


@pytest.mark.parametrize("numpy_too", [True, False])
def test_it_does_the_same_where_states_are_not_copied_in_one_piece(
    numpy_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randomness, "python_memory", lambda: None)
    monkeypatch.setattr(randomness, "quick_bits", lambda: None)
    monkeypatch.setattr(randomness, "_spare_bits", [])
    draw_odd()
    before = states()
    with preserved(numpy_too):
        torch.rand(3)
        random.gauss(0, 1)
        if numpy_too:
            np.random.randn()
        with preserved(numpy_too):
            random.random()
    assert same(states(), before)


def test_the_state_of_pythons_generator_is_where_it_is_looked_for() -> None:
    python = python_memory()
    assert python is not None, "else every handler costs 12 µs more in this Python"
    for _ in range(700):
        random.random()
        *key, place = random.getstate()[1]
        assert (place, key[0], key[-1]) == (python.words[0], python.words[1], python.words[-1])


def test_the_generators_of_every_device_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)  # stand for those of two GPUs
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    before = [device.get_state() for device in devices]
    with preserved():
        for device in devices:
            torch.rand(3, generator=device)
    assert all(map(torch.equal, before, [device.get_state() for device in devices]))


# NumPy's bit generator


def test_this_release_of_numpy_has_the_state_where_it_is_looked_for() -> None:
    assert quick_bits() is not None, "else every handler that may draw costs 90 µs more"


def test_a_release_that_keeps_its_state_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(MT19937):
        ctypes = SimpleNamespace(state_address=12345)  # type: ignore[assignment]  # an address in no object

    monkeypatch.setattr(np.random, "MT19937", Elsewhere)
    assert quick_bits.__wrapped__() is None


@pytest.mark.parametrize("drawn", [0, 1, 623, 624, 625, 1999])
def test_it_draws_what_numpys_own_does_and_gives_the_same_state(drawn: int) -> None:
    ours, theirs = quick_bits()(7), MT19937(7)
    assert ours.random_raw(drawn).tolist() == theirs.random_raw(drawn).tolist()
    state, expected = ours.state, theirs.state
    assert np.array_equal(state["state"]["key"], expected["state"]["key"])
    assert state["state"]["pos"] == expected["state"]["pos"]
    assert type(state["state"]["pos"]) is int
    fresh = MT19937()
    fresh.state = state
    assert fresh.random_raw(1300).tolist() == theirs.random_raw(1300).tolist()


def test_a_state_that_was_read_is_no_view_of_the_next_one() -> None:
    bits = quick_bits()(1)
    before = bits.state
    kept = before["state"]["key"].copy()
    bits.random_raw(1000)
    assert np.array_equal(before["state"]["key"], kept)
    before["state"]["key"][0] += 1  # as whoever reads it may
    bits.state = before


def test_it_takes_the_states_that_numpys_own_takes_and_refuses_others_as_that_does() -> None:
    theirs = MT19937(5)
    theirs.random_raw(3)
    state = theirs.state["state"]
    for form in (theirs.state, ("MT19937", state["key"], state["pos"])):
        ours = quick_bits()(1)
        ours.state = form
        assert ours.random_raw(9).tolist() == copy.deepcopy(theirs).random_raw(9).tolist()
    with pytest.raises(ValueError, match="state must be for a MT19937"):
        quick_bits()(1).state = np.random.PCG64(1).state


def test_a_copy_and_what_is_pickled_need_nothing_of_fluxloops() -> None:
    ours = quick_bits()(3)
    ours.random_raw(5)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is MT19937
        assert copied.random_raw(9).tolist() == copy.deepcopy(ours).random_raw(9).tolist()
    assert b"fluxloop" not in pickle.dumps(RandomState(ours))


def test_numpys_other_generators_draw_from_it() -> None:
    assert Generator(quick_bits()(3)).normal(size=3).tolist() == Generator(MT19937(3)).normal(size=3).tolist()
    assert RandomState(quick_bits()(3)).randn(3).tolist() == RandomState(MT19937(3)).randn(3).tolist()
