from __future__ import annotations

import dataclasses
import enum
import io
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import attrs
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fluxloop import CheckpointError, TrainingPhase, ValidationPhase
from fluxloop.persist.attributes import plain_attributes
from fluxloop.persist.plain import class_name, from_plain, size, snapshot, to_plain
from fluxloop.persist.series import Series
from fluxloop.state import PhaseDict
from toys import through_a_file


def again(value: Any, live: Any = None, **how: Any) -> Any:
    return from_plain(through_a_file(to_plain(value, "it")), live, **how)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a)).all())
    if isinstance(a, numpy.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))


PLAIN: dict[str, Any] = {
    "none": None,
    "truth": True,
    "a whole number": 2**70,
    "a number": 0.1,
    "infinity": float("inf"),
    "no number": float("nan"),
    "a complex number": 1 + 2j,
    "a text": "ä\n",
    "bytes": b"\x00\xff",
    "a dtype": torch.bfloat16,
    "a device": torch.device("cpu"),
    "a size": torch.Size([2, 3]),
    "a tensor": torch.arange(6.0).reshape(2, 3),
    "a tensor of halves": torch.ones(2, dtype=torch.bfloat16),
    "an empty tensor": torch.empty(0, 3),
    "a tensor that is no block": torch.arange(6.0).reshape(2, 3).t(),
    "a list": [1, [2, (3,)], None],
    "an empty list": [],
    "a tuple": (1, (), ["a"]),
    "a dict": {"a": 1, 2: [3], (1, "b"): {}, None: True},
    "a dict with the mark as a key": {"__kept__": "set", "items": [1]},
    "a set": {1, "a", (2, 3)},
    "a frozen set": frozenset({1}),
    "a deque": deque([1, 2], maxlen=3),
    "an array": numpy.arange(6, dtype=numpy.int16).reshape(2, 3)[:, ::2],
    "an array of texts": numpy.array(["ab", "c"]),
    "an empty array": numpy.zeros((0, 2)),
    "an array of truths": numpy.array([True, False]),
    "a number of NumPy's": numpy.float64(0.1),
    "a small number of NumPy's": numpy.int8(-3),
    "containers in containers": {"a": deque([{1: (torch.ones(2), {2})}])},
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_data_comes_back_from_a_file_as_it_was(value: Any) -> None:
    assert same(again(value), value)


numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary())
keys = st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text()))


@pytest.mark.slow
@given(
    st.recursive(
        numbers,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.tuples(inner, inner),
            st.dictionaries(keys, inner, max_size=4),
            st.lists(inner, max_size=3).map(deque),
            st.sets(st.integers(), max_size=3),
        ),
        max_leaves=12,
    )
)
@settings(deadline=None, max_examples=60)
def test_any_nest_of_plain_data_comes_back_from_a_file_as_it_was(value: Any) -> None:
    assert same(again(value), value)


def test_a_dict_of_a_type_of_its_own_comes_back_as_what_is_there_now() -> None:
    for value in (OrderedDict(b=1, a=2), Counter("aab")):
        live = type(value)()
        assert again(value, live) is live
        assert live == value
    live = defaultdict(list, old=[0])
    assert again(defaultdict(list, a=[1]), live) is live
    assert live == {"a": [1]}
    assert live["new"] == []


def test_a_list_that_others_hold_too_is_the_same_one_afterwards() -> None:
    live = [0]
    other = live
    again([1, 2], live)
    assert other == [1, 2]


def test_what_comes_back_shares_no_memory_with_what_was_kept() -> None:
    value = {"a": torch.zeros(2)}
    kept = to_plain(value, "it")
    first, second = from_plain(kept), from_plain(kept)
    first["a"] += 1
    assert second["a"].tolist() == [0, 0]
    value["a"] += 5
    assert first["a"].tolist() == [1, 1]


def test_equal_sets_are_kept_alike() -> None:
    texts = [f"name {n}" for n in range(20)]
    assert to_plain(set(texts), "it") == to_plain(set(reversed(texts)), "it")
    assert to_plain({"b", "a", "c"}, "it")["items"] == ["a", "b", "c"]


@attrs.define
class Fields:
    count: int = 0
    items: list[int] = attrs.field(factory=list)


@dataclasses.dataclass
class Data:
    count: int = 0
    inner: Fields = dataclasses.field(default_factory=Fields)


class Own:
    def __init__(self) -> None:
        self.n = 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


def test_an_object_with_fields_is_put_back_into_the_live_one() -> None:
    live = Data()
    fields = live.inner
    assert again(Data(3, Fields(4, [5])), live) is live
    assert live == Data(3, Fields(4, [5]))
    assert live.inner is fields


def test_an_object_with_a_state_is_put_back_into_the_live_one() -> None:
    value, live = Own(), Own()
    value.n = 3
    assert again(value, live) is live
    assert live.n == 3


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(3, generator=g).tolist()),
        (lambda: random.Random(3), lambda g: [g.random(), g.gauss(0, 1)]),
        (lambda: numpy.random.default_rng(3), lambda g: g.random(3).tolist()),
        (lambda: numpy.random.RandomState(3), lambda g: g.normal(size=3).tolist()),
    ],
    ids=["torch's", "Python's", "NumPy's", "NumPy's old one"],
)
def test_a_random_generator_goes_on_where_it_was(make: Callable[[], Any], draw: Callable[[Any], Any]) -> None:
    generator, live = make(), make()
    draw(generator)
    kept = through_a_file(to_plain(generator, "it"))
    then = draw(generator)
    assert from_plain(kept, live) is live
    assert draw(live) == then


def test_entries_by_phase_come_back_for_the_phases_there_are() -> None:
    value: PhaseDict[list[int]] = PhaseDict(list)
    value[TrainingPhase].append(1)
    value[ValidationPhase].append(2)
    live: PhaseDict[list[int]] = PhaseDict(list)
    live[ValidationPhase].append(9)
    kept = through_a_file(to_plain(value, "it"))
    assert from_plain(kept, live, phases=[TrainingPhase, ValidationPhase]) is live
    assert dict(live) == {TrainingPhase: [1], ValidationPhase: [2]}
    with pytest.warns(UserWarning, match=rf"it was kept for the phases \['{class_name(ValidationPhase)}'\]"):
        from_plain(kept, PhaseDict(list), phases=[TrainingPhase])


def test_entries_of_phases_with_names_come_back_under_them() -> None:
    value: PhaseDict[list[int]] = PhaseDict(list)
    value[ValidationPhase(name="noisy")].append(1)
    value[ValidationPhase()].append(2)
    live: PhaseDict[list[int]] = PhaseDict(list)
    live[ValidationPhase(name="gone")].append(3)
    from_plain(through_a_file(to_plain(value, "it")), live, phases=[ValidationPhase])
    assert [(phase.__name__, held) for phase, held in live.items()] == [("noisy", [1]), ("ValidationPhase", [2])]


class Colour(enum.Enum):
    RED = object()


class Opaque:
    pass


UNKEPT: dict[str, tuple[Any, str]] = {
    "an object": (Opaque(), r"it is .*Opaque"),
    "a function": (print, "it is "),
    "a class": (Own, "it is "),
    "an iterator": (itertools.count(), "it is "),
    "an object in a dict": ({"a": [Opaque()]}, r"it\['a'\]\[0\] is .*Opaque"),
    "an object with a state in a list": ([0, Own()], r"it\[1\] is .*Own.* inside a container"),
    "an object with fields in a dict": ({"a": Fields()}, r"it\['a'\] is .*Fields.* inside a container"),
    "a generator in a dict": ({"a": torch.Generator()}, r"it\['a'\] is .*Generator.* inside a container"),
    "an object in a field": (Fields(0, Opaque()), r"it\.items is .*Opaque"),  # type: ignore[arg-type]
    "a key": ({Opaque: 1}, "it has the key .*Opaque"),
    "an array of objects": (numpy.array([Opaque()]), "it is .*NumPy"),
    "an enumeration": (Colour.RED, "it is .*Colour"),
}


@pytest.mark.parametrize(("value", "message"), UNKEPT.values(), ids=UNKEPT)
def test_what_cannot_be_kept_is_named_with_its_path(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        to_plain(value, "it")


def test_what_contains_itself_is_told() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CheckpointError, match="contains itself"):
        to_plain(value, "it")


@pytest.mark.parametrize("value", [Own(), torch.Generator(), Fields()], ids=["a state", "a generator", "fields"])
def test_a_state_without_its_object_is_told(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the checkpoint has a state for Mine\.thing, which is None now"):
        from_plain(to_plain(value, "it"), None, where="Mine.thing")


def test_the_plain_attributes_of_a_module_are_its_own_and_its_buffers() -> None:
    class Metric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 3
            self.function = print
            self.register_buffer("total", torch.ones(1))

    assert list(plain_attributes(Metric())) == ["count", "total"]


def test_a_snapshot_is_not_changed_by_what_happens_next() -> None:
    state: dict[str, Any] = {"a": [torch.zeros(2)], "b": OrderedDict(c=torch.zeros(1)), "d": (1, {"e": 2})}
    copied = snapshot(state)
    state["a"][0] += 1
    state["b"]["c"] += 1
    state["d"][1]["e"] = 3
    state["a"].append(1)
    assert copied["a"][0].tolist() == [0, 0]
    assert copied["b"]["c"].tolist() == [0]
    assert copied["d"] == (1, {"e": 2})
    assert len(copied["a"]) == 1


def test_the_size_of_plain_data_counts_its_tensors() -> None:
    assert size({"a": torch.zeros(10), "b": [torch.zeros(5, dtype=torch.float64)]}) == 80 + 2


def test_a_long_series_of_numbers_or_scalars_is_kept_as_two_arrays() -> None:
    steps = 2_000
    for values in (
        [torch.tensor(n / 7) for n in range(steps)],
        [n / 7 for n in range(steps)],
        list(range(steps)),
    ):
        series = Series(enumerate(values, start=1))
        file = io.BytesIO()
        torch.save(to_plain(series, "it"), file)
        numbers = steps * (8 + (4 if isinstance(values[0], torch.Tensor) else 8))
        assert len(file.getvalue()) < 1.2 * numbers
        for live in (None, Series([(0, 1.0)]), [(0, 1.0)]):
            assert again(series, live) == list(enumerate(values, start=1))


def test_a_series_of_other_things_or_one_that_was_changed_comes_back_as_it_is() -> None:
    mixed = Series((n, value) for n, value in enumerate([1.0, torch.ones(2), None, "a", 2**70, torch.ones(())] * 50))
    assert same(again(mixed), list(mixed))
    series = Series()
    for n in range(300):
        series.append((n, float(n)))
    series.pop()
    series.append((299, -1.0))
    assert again(series)[-2:] == [(298, 298.0), (299, -1.0)]
    del series[50:]
    assert again(series) == [(n, float(n)) for n in range(50)]
    series[49] = (49, 7.0)
    assert again(series)[-1] == (49, 7.0)


@pytest.mark.parametrize("value", [b"", b"\x00\xff", 1 + 2j, {b"k": 1, (1, 2j): 2}, [b"a", {"b": 3j}]], ids=repr)
def test_no_bytes_and_no_complex_numbers_are_in_a_file(value: Any) -> None:
    def plain(kept: Any) -> bool:
        if isinstance(kept, dict):
            return all(plain(key) and plain(item) for key, item in kept.items())
        if isinstance(kept, (list, tuple)):
            return all(map(plain, kept))
        return isinstance(kept, (type(None), bool, int, float, str, torch.Tensor))

    assert plain(to_plain(value, "it"))
    assert again(value) == value


def test_what_older_files_hold_is_read() -> None:
    assert from_plain({"__kept__": "no bytes"}) == b""
    assert from_plain(b"a") == b"a"
    assert from_plain(1j) == 1j
    assert from_plain({"__kept__": "dict", "items": {"__kept__": 1}}) == {"__kept__": 1}
