from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import MutableMapping
from types import MappingProxyType
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fluxloop.nested import arguments_among, batch_size, call_with, concatenate, contents, map_tensors, tensors

Pair = namedtuple("Pair", ["xs", "ys"])


@dataclasses.dataclass
class Data:
    xs: Any
    ys: Any


@attrs.define
class Entry:
    xs: Any
    _ys: Any


@attrs.frozen
class Aliased:
    xs: Any = attrs.field(alias="inputs")


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Data):
        return same((a.xs, a.ys), (b.xs, b.ys))
    if isinstance(a, Entry):
        return same((a.xs, a._ys), (b.xs, b._ys))
    return bool(a == b)


def containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    two = st.tuples(inside, inside)
    return st.one_of(
        st.lists(inside, min_size=1, max_size=3),
        st.lists(inside, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inside, min_size=1, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inside, min_size=1, max_size=3).map(OrderedDict),
        two.map(lambda pair: Pair(*pair)),
        two.map(lambda pair: Data(*pair)),
        two.map(lambda pair: Entry(*pair)),
    )


def rows(count: int) -> st.SearchStrategy[Tensor]:
    return st.lists(st.integers(-9, 9), min_size=count, max_size=count).map(lambda v: torch.tensor(v).reshape(count, 1))


leaves = st.one_of(rows(3), st.integers(), st.text(max_size=2), st.none())
anything = st.recursive(leaves, containers, max_leaves=8)
tensors_alone = st.recursive(rows(5), containers, max_leaves=8)
quick = settings(deadline=None, max_examples=50)


@pytest.mark.slow
@quick
@given(anything)
def test_changing_every_tensor_and_changing_it_back_gives_the_same_nest(nest: Any) -> None:
    there = map_tensors(lambda tensor: tensor + 1, nest)
    assert same(map_tensors(lambda tensor: tensor - 1, there), nest)


@quick
@given(anything)
def test_a_nest_in_which_nothing_changes_is_returned_as_it_is(nest: Any) -> None:
    assert map_tensors(lambda tensor: tensor, nest) is nest


@quick
@given(anything)
def test_tensors_come_in_the_order_in_which_they_are_changed(nest: Any) -> None:
    seen: list[Tensor] = []
    map_tensors(lambda tensor: seen.append(tensor) or tensor, nest)
    assert [id(tensor) for tensor in tensors(nest)] == [id(tensor) for tensor in seen]


@quick
@given(tensors_alone, st.integers(1, 4))
def test_what_was_cut_into_batches_is_joined_again(nest: Any, cut: int) -> None:
    parts = [map_tensors(lambda tensor, s=s: tensor[s], nest) for s in (slice(0, cut), slice(cut, 5))]
    assert same(concatenate(parts), nest)


@pytest.mark.parametrize(
    "nest",
    [
        (torch.zeros(2), "a"),
        [torch.zeros(2), 1],
        {"xs": torch.zeros(2), "name": "a"},
        OrderedDict(xs=torch.zeros(2), name="a"),
        MappingProxyType({"xs": torch.zeros(2)}),
        Pair(torch.zeros(2), None),
        Data(torch.zeros(2), [torch.zeros(1)]),
        Entry(torch.zeros(2), {"a": torch.zeros(1)}),
    ],
    ids=lambda nest: type(nest).__name__,
)
def test_containers_keep_their_type_and_what_is_no_tensor(nest: Any) -> None:
    changed = map_tensors(lambda tensor: tensor + 1, nest)
    assert type(changed) is type(nest)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in tensors(changed))
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in tensors(nest)), "the original was changed"


def test_a_defaultdict_keeps_its_tensors_and_its_default() -> None:
    nest = defaultdict(list, xs=torch.zeros(2))
    changed = map_tensors(lambda tensor: tensor + 1, nest)
    assert changed["xs"].tolist() == [1, 1]
    joined = concatenate([nest, changed])
    assert joined["xs"].tolist() == [0, 0, 1, 1]


def test_an_attrs_class_whose_field_has_an_alias_is_rebuilt() -> None:
    assert map_tensors(lambda tensor: tensor + 1, Aliased(torch.zeros(1))).xs.tolist() == [1]


def test_scalars_are_stacked_and_other_leaves_collected_when_batches_are_joined() -> None:
    joined = concatenate([{"loss": torch.tensor(1.0), "id": "a"}, {"loss": torch.tensor(2.0), "id": "b"}])
    assert joined["loss"].tolist() == [1.0, 2.0]
    assert joined["id"] == ["a", "b"]


def test_batches_of_different_structure_are_not_joined() -> None:
    with pytest.raises(ValueError, match="shorter"):
        concatenate([(torch.zeros(1), torch.zeros(1)), (torch.zeros(1),)])


def test_classes_are_no_containers() -> None:
    assert map_tensors(lambda tensor: tensor + 1, Data) is Data
    assert list(tensors(Entry)) == []


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({"xs": torch.zeros(7, 2), "ys": torch.zeros(3)}, 7),
        ({"name": "a", "xs": {"left": torch.zeros(4, 2)}}, 4),
        ({"loss": torch.tensor(1.0), "views": (torch.zeros(5, 2), torch.zeros(5, 2))}, 5),
        ({"pair": Pair(None, torch.zeros(6))}, 6),
        ({"empty": torch.zeros(0, 2)}, 0),
        ({"loss": torch.tensor(1.0), "name": "a"}, 1),
        ({}, 1),
    ],
)
def test_the_batch_size_is_the_length_of_the_first_tensor_with_rows(entries: dict[str, Any], size: int) -> None:
    assert batch_size(entries) == size


IMAGES = [torch.zeros(3, 8 + index, 9) for index in range(5)]


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({"images": IMAGES, "ys": torch.zeros(5)}, 5),
        ({"images": IMAGES}, 5),
        ({"texts": ["a", "b"], "ys": torch.zeros(2)}, 2),
        ({"targets": [{"boxes": torch.zeros(7, 4)}, {"boxes": torch.zeros(1, 4)}]}, 2),
        ({"views": [torch.zeros(6, 4), torch.zeros(6, 4)], "ys": torch.zeros(6)}, 6),  # a loader's collate makes lists
        ({"views": (torch.zeros(6, 4), torch.zeros(6, 4))}, 6),
        ({"crops": [torch.zeros(6, 8), torch.zeros(6, 8), torch.zeros(6, 4)], "names": list("abcdef")}, 6),
        ({"batch": {"classes": torch.zeros(5, 2), "xs": torch.zeros(8, 4), "ys": torch.zeros(8)}}, 8),
        ({"batch": {"classes": torch.zeros(5, 2), "images": [*IMAGES, *IMAGES], "ys": torch.zeros(10)}}, 10),
        ({"scale": torch.tensor(2.0), "none": [], "xs": torch.zeros(4, 1)}, 4),
        ({"words": pack_sequence([torch.zeros(3), torch.zeros(2), torch.zeros(1)])}, 3),
    ],
)
def test_a_list_has_a_row_per_item_and_a_mapping_those_of_most_of_its_items(entries: dict[str, Any], size: int) -> None:
    assert batch_size(entries) == size


class NoUpdate(OrderedDict[str, Any]):
    """Refuses update(), as the outputs of some models do."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("You cannot use update on this")


class WithNotes(dict[str, Any]):
    def __init__(self, items: Any, note: str) -> None:
        super().__init__(items)
        self.note = note


class Frozen(dict[str, Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("frozen")


class WithRows(MutableMapping[str, Any]):
    """As a ``TensorDict``: made of its items alone, it has no rows."""

    def __init__(self, items: Any, batch_size: Any = ()) -> None:
        self.items_held, self.batch_size = dict(items), tuple(batch_size)

    def __getitem__(self, key: str) -> Any:
        return self.items_held[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_held[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_held[key]

    def __iter__(self) -> Any:
        return iter(self.items_held)

    def __len__(self) -> int:
        return len(self.items_held)


def test_a_mapping_that_says_its_rows_keeps_them() -> None:
    given = WithRows({"xs": torch.zeros(4, 2), "in": WithRows({"ys": torch.ones(4)}, [4])}, [4])
    found = map_tensors(lambda tensor: tensor + 1, given)
    assert found is not given
    assert (found.batch_size, found["in"].batch_size) == ((4,), (4,))
    assert torch.equal(found["in"]["ys"], torch.full((4,), 2.0))
    assert map_tensors(lambda tensor: tensor, given) is given


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held["list"].append(1),
        lambda held: held["list"].__setitem__(0, held["list"][0] + 0),
        lambda held: held["pair"].__setattr__("xs", 3),
        lambda held: held.pop("name"),
        lambda held: held.__setitem__("name", 1),
        lambda held: held.__setitem__("list", tuple(held["list"])),
    ],
)
def test_contents_tell_that_something_else_is_in_a_container(change: Any) -> None:
    held = {"list": [torch.zeros(2)], "pair": Data(torch.ones(1), 2), "name": True, "nan": float("nan")}
    before = contents(held)
    assert contents(held) == before
    change(held)
    assert contents(held) != before


class Stored(UserDict[str, Any]):
    note = ""


class Rows(list[Any]):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__([first, second])
        self.note = "kept"


class Pairs(tuple[Any, ...]):
    def __new__(cls, first: Any, second: Any) -> Pairs:
        made = super().__new__(cls, (first, second))
        made.note = "kept"
        return made

    note: str


class Validated(namedtuple("Validated", ["xs", "ys"])):
    def __new__(cls, *, both: Any) -> Validated:
        return super().__new__(cls, both, both)


ONE = torch.ones(2)


@pytest.mark.parametrize(
    "value",
    [
        NoUpdate(a=ONE, b=ONE),
        WithNotes({"a": ONE, "b": ONE}, "kept"),
        Frozen(a=ONE, b=ONE),
        Stored(a=ONE, b=ONE),
        Rows(ONE, ONE),
        Pairs(ONE, ONE),
        Validated(both=ONE),
        torch.max(torch.ones(2, 2), 0),
        defaultdict(list, a=ONE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_container_of_a_class_of_its_own_stays_what_it_is(value: Any) -> None:
    if isinstance(value, Stored):
        value.note = "kept"

    def items() -> list[Any]:
        return list(value.values()) if isinstance(value, (dict, UserDict)) else list(value)

    before = items()
    for new in (map_tensors(lambda tensor: tensor.double() + 1, value), concatenate([value, value])):
        assert type(new) is type(value)
        assert new is not value
        assert getattr(new, "note", "kept") == "kept"
        assert len(new) == len(value)
    assert all(new is old for new, old in zip(items(), before, strict=True))


def test_a_container_that_gives_no_copy_is_an_error_that_names_its_class() -> None:
    class Closed(dict[str, Any]):
        def __init__(self) -> None:
            super().__init__(a=ONE)

        def __setitem__(self, key: Any, value: Any) -> None:
            raise TypeError("frozen")

    with pytest.raises(TypeError, match="a Closed gives no copy with other tensors in it"):
        map_tensors(lambda tensor: tensor + 1, Closed())


class Graphs:
    """A batch of a class of its own that says how many graphs it has, as those of torch_geometric and DGL do."""

    def __init__(self, rows: Any) -> None:
        self.batch_size = rows
        self.x = torch.zeros(12, 2)


@pytest.mark.parametrize(("said", "rows"), [(3, 3), (torch.Size([3]), 1), (True, 1), (0, 1), (None, 1)])
def test_a_batch_of_another_class_says_its_rows_by_its_batch_size(said: Any, rows: int) -> None:
    assert batch_size({"batch": Graphs(said)}) == rows
    assert batch_size({"batch": Graphs(said), "preds": torch.zeros(5)}) == (3 if said == 3 else 5)


def test_inputs_of_a_compiled_model_and_of_its_copy_are_given_as_its_forward_takes_them() -> None:
    class Whole(nn.Module):
        def forward(self, batch: Any) -> Any:
            return batch["xs"] * batch["factor"]

    class ByName(nn.Module):
        def forward(self, xs: Tensor, factor: Tensor) -> Any:
            return xs * factor

    batch = {"xs": torch.tensor([2.0]), "factor": torch.tensor([3.0])}
    for model in (Whole(), ByName()):
        compiled = torch.compile(model, backend="eager")
        for each in (model, compiled, copy.deepcopy(compiled)):
            assert call_with(each, batch).tolist() == [6.0]
            assert arguments_among(each, {**batch, "label": 0}) == (batch if isinstance(model, ByName) else {})
