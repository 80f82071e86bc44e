from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from holders import Mine, Opaque, Own, Pool, states
from torch import nn

from fluxloop.persist.owners import Restoring, nobody
from fluxloop.persist.watched import Watched
from toys import through_a_file


class Counts:
    """Is called, and keeps what it saw."""

    steps = 0
    shared: ClassVar[list[int]] = []

    def __init__(self, inner: Any = None) -> None:
        self.seen: list[Any] = []
        self.inner = inner
        self.value: Any = None

    def __call__(self) -> None:
        self.seen.append(len(self.seen))
        self.value = torch.tensor(1.0)
        self.steps += 1


class Helpers:
    def __init__(self) -> None:
        self.pools = {"a": Pool()}
        self.calls = [Counts(Counts())]
        self.same = self.calls[0].inner
        self.call = partial(Counts.__call__, Counts())
        self.method = Counts().__call__
        self.generators = (torch.Generator().manual_seed(1),)
        self.opened: Any = None


def moved(helpers: Helpers) -> None:
    helpers.pools["a"].items.append(1.0)
    helpers.calls[0]()
    helpers.calls[0].inner()
    helpers.call()
    helpers.method()
    torch.rand(1, generator=helpers.generators[0])


def says(helpers: Helpers) -> Any:
    partials = helpers.call.args[0]
    bound: Any = helpers.method
    return (
        helpers.pools["a"].items,
        [(c.seen, c.steps, c.value) for c in (helpers.calls[0], helpers.calls[0].inner, partials, bound.__self__)],
        helpers.generators[0].get_state().tolist(),
        helpers.same is helpers.calls[0].inner,
    )


def test_helpers_in_containers_and_in_each_other_are_kept_and_go_back() -> None:
    first, second = Helpers(), Helpers()
    begin = says(second)
    kept, live = Watched(first, "phases.P"), Watched(second, "phases.P")
    moved(first)
    live.restore(through_a_file(states(kept)), Restoring())
    assert says(second) == says(first)
    moved(first)
    moved(second)
    assert says(second) == says(first)
    live.restore({}, Restoring())
    assert says(second) == begin


def test_what_was_none_or_absent_or_large_at_first_is_so_again() -> None:
    class Thing:
        def __init__(self) -> None:
            self.best: Any = None
            self.bank = torch.zeros(100_000)
            self.noise = torch.arange(100_000.0)

    thing = Thing()
    kept = Watched(thing, "Thing")
    thing.best = 3.0
    thing.bank += 1
    thing.noise = thing.noise * 2
    thing.late = 1  # type: ignore[attr-defined]  # came in training
    kept.restore({}, Restoring())
    assert thing.best is None
    assert thing.bank.sum() == 0
    assert torch.equal(thing.noise, torch.arange(100_000.0))
    assert not hasattr(thing, "late")


def test_an_attribute_that_was_removed_is_removed_again() -> None:
    first, second = Mine(), Mine()
    kept, live = Watched(first, "Mine"), Watched(second, "Mine")
    del first.n
    live.restore(through_a_file(states(kept)), Restoring())
    assert not hasattr(second, "n")
    live.restore({}, Restoring())
    assert second.n == 0


def test_what_is_shared_or_contains_itself_is_so_again() -> None:
    first, second = Mine(), Mine()
    kept, live = Watched(first, "Mine"), Watched(second, "Mine")
    first.last = first.items  # type: ignore[attr-defined]  # an alias of what was there
    first.new = [first.total, {}]  # type: ignore[attr-defined]  # new, and held twice
    first.again = first.new  # type: ignore[attr-defined]
    first.new[1]["self"] = first.new  # type: ignore[attr-defined]
    first.items.append(1)
    live.restore(through_a_file(states(kept)), Restoring())
    other: Any = second
    assert other.last is other.items
    assert other.items == [1]
    assert other.again is other.new
    assert other.new[0] is other.total
    assert other.new[1]["self"] is other.new


def test_a_list_of_helpers_keeps_its_new_order() -> None:
    class Two:
        def __init__(self) -> None:
            self.pools = [Pool(), Pool()]

    first, second = Two(), Two()
    kept, live = Watched(first, "Two"), Watched(second, "Two")
    pools = list(second.pools)
    first.pools[0].items.append(1.0)
    first.pools.reverse()
    live.restore(through_a_file(states(kept)), Restoring())
    assert second.pools == [pools[1], pools[0]]
    assert pools[0].items == [1.0]


def test_a_number_of_the_class_is_kept_too() -> None:
    class Shares:
        seen: ClassVar[list[int]] = []

    kept = Watched(Shares(), "Shares")
    Shares.seen.append(1)
    state = through_a_file(states(kept))
    Shares.seen.clear()
    kept.restore(state, Restoring())
    assert Shares.seen == [1]
    kept.restore({}, Restoring())
    assert Shares.seen == []


def test_what_a_subclass_adds_is_kept_beside_its_bases_pair() -> None:
    class More(Pool):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0
            self.pool = Pool()

    first, second = More(), More()
    kept, live = Watched(first, "More"), Watched(second, "More")
    first.items, first.count = [2.0], 3
    first.pool.items.append(4.0)
    state = through_a_file(states(kept))
    assert sorted(state) == ["count", "pair", "pool"]
    live.restore(state, Restoring())
    assert (second.items, second.count, second.pool.items) == ([2.0], 3, [4.0])


def test_a_metric_whose_state_dict_is_empty_is_kept() -> None:
    class Metric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total = torch.zeros(())
            self.values: list[torch.Tensor] = []
            self.register_buffer("rows", torch.zeros(()), persistent=False)

        def update(self, value: float) -> None:
            self.total = self.total + value
            self.values.append(torch.tensor(value))
            self.rows += 1

    class Holds:
        def __init__(self) -> None:
            self.metrics = {"a": Metric()}

    first, second = Holds(), Holds()
    kept, live = Watched(first, "Holds"), Watched(second, "Holds")
    assert not first.metrics["a"].state_dict()
    first.metrics["a"].update(2.0)
    live.restore(through_a_file(states(kept)), Restoring())
    metric = second.metrics["a"]
    assert (metric.total, metric.values, metric.rows) == (2, [2], 1)


def test_a_module_of_a_helper_keeps_gradients_modes_and_what_is_frozen() -> None:
    class Holds:
        def __init__(self) -> None:
            self.critic = nn.Linear(1, 1)

    first, second = Holds(), Holds()
    kept, live = Watched(first, "Holds"), Watched(second, "Holds")
    first.critic(torch.ones(1)).backward()
    first.critic.bias.requires_grad_(False)
    first.critic.eval()
    live.restore(through_a_file(states(kept)), Restoring())
    assert second.critic.weight.grad == first.critic.weight.grad
    assert not second.critic.bias.requires_grad
    assert not second.critic.training


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda helpers: helpers.pools.update(b=Pool()), r"phases\.P\.pools\['b'\]"),
        (lambda helpers: setattr(helpers, "opened", Opaque()), r"phases\.P\.opened"),
        (lambda helpers: setattr(helpers.calls[0], "value", iter([1])), r"phases\.P\.calls\[0\]\.value"),
        (lambda helpers: helpers.calls[0].seen.append(lambda: 1), r"phases\.P\.calls\[0\]\.seen\[0\]"),
    ],
    ids=["a new object in a dict", "an object of C's", "an iterator", "a function in a list"],
)
def test_what_cannot_be_kept_is_named_by_its_path(change: Callable[[Helpers], object], path: str) -> None:
    helpers = Helpers()
    kept = Watched(helpers, "phases.P")
    change(helpers)
    assert [re.fullmatch(path, lost) is not None for lost in kept.state(nobody)[1]] == [True]


def test_an_object_with_a_lock_is_left_as_it_is_and_named() -> None:
    class Writer:
        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.lines: list[str] = []

    class Holds:
        def __init__(self) -> None:
            self.writers = [Writer()]

    holds = Holds()
    kept = Watched(holds, "Holds")
    holds.writers[0].lines.append("a")
    assert kept.state(nobody) == ({}, ["Holds.writers[0]"])
    kept.restore({}, Restoring())
    assert holds.writers[0].lines == ["a"]


def test_what_a_function_closes_over_is_named_where_it_changed() -> None:
    lines: list[int] = []

    class Holds:
        def __init__(self) -> None:
            self.hook = lambda: lines.append(1)

    holds = Holds()
    kept = Watched(holds, "Holds")
    assert kept.state(nobody) == ({}, [])
    holds.hook()
    assert kept.state(nobody) == ({}, ["Holds.hook.__closure__.lines"])


@pytest.mark.parametrize("base", [object, Own], ids=["of an object", "of one with state_dict"])
@pytest.mark.parametrize("how", ["another number", "another list", "a list in place", "a helper"])
def test_an_attribute_may_be_called_pair(base: type, how: str) -> None:
    class Holds(base):
        def __init__(self) -> None:
            super().__init__()
            self.pair: Any = {"another number": 1, "a helper": Pool()}.get(how, [1])
            self.other = self.pair

    def change(holds: Holds) -> None:
        if how == "another number":
            holds.pair = 2
        elif how == "another list":
            holds.pair = [2]
        elif how == "a list in place":
            holds.pair.append(2)
        else:
            holds.pair.items.append(2.0)

    def says(holds: Holds) -> Any:
        return [getattr(each, "items", each) for each in (holds.pair, holds.other)]

    first, second = Holds(), Holds()
    begin = says(Holds())
    kept, live = Watched(first, "Holds"), Watched(second, "Holds")
    change(first)
    live.restore(through_a_file(states(kept)), Restoring())
    assert says(second) == says(first) != begin
    live.restore(through_a_file(states(Watched(Holds(), "Holds"))), Restoring())
    assert says(second) == begin


@pytest.mark.parametrize("make", [set, dict.fromkeys], ids=["a set", "a dict"])
def test_a_container_of_objects_that_changed_is_named_and_holds_again_what_it_held(make: Any) -> None:
    class Holds:
        def __init__(self) -> None:
            self.things = make([Opaque(), Opaque()])

    holds = Holds()
    kept, first = Watched(holds, "Holds"), holds.things.copy()
    assert kept.state(nobody) == ({}, [])
    holds.things.add(Opaque()) if make is set else holds.things.popitem()
    assert kept.state(nobody) == ({}, ["Holds.things"])
    kept.restore({}, Restoring())
    assert holds.things == first
