from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from holders import Mine, Opaque, Own, same, states
from torch import nn

from fluxloop import CheckpointError
from fluxloop.persist.owners import Owners, Restoring, nobody
from fluxloop.persist.watched import Watched
from toys import through_a_file

CHANGES: dict[str, tuple[str, Callable[[Mine], object]]] = {
    "another number": ("n", lambda mine: setattr(mine, "n", 1)),
    "a list in place": ("items", lambda mine: mine.items.append(1)),
    "an array in place": ("table", lambda mine: mine.table.__iadd__(1)),
    "a tensor in place": ("total", lambda mine: mine.total.add_(1)),
    "another tensor": ("total", lambda mine: setattr(mine, "total", torch.ones(2))),
    "a generator that was drawn from": ("generator", lambda mine: torch.rand(1, generator=mine.generator)),
    "a new attribute": ("new", lambda mine: setattr(mine, "new", 1)),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
def test_an_attribute_that_changed_is_kept_and_comes_back(name: str, change: Callable[[Mine], object]) -> None:
    first, second = Mine(), Mine()
    kept, live = Watched(first, "Mine"), Watched(second, "Mine")
    assert states(kept) == {}
    change(first)
    state = through_a_file(states(kept))
    assert list(state) == [name]
    live.restore(state, Restoring())
    a, b = getattr(first, name), getattr(second, name)
    assert same(a.get_state() if name == "generator" else a, b.get_state() if name == "generator" else b)


def test_a_setting_that_never_changed_is_not_overwritten_by_the_checkpoint() -> None:
    first, second = Mine(), Mine()
    kept = Watched(first, "Mine")
    first.n = 5
    second.every = 10
    live = Watched(second, "Mine")
    live.restore(states(kept), Restoring())
    assert (second.n, second.every) == (5, 10)


def test_what_the_checkpoint_does_not_name_is_as_at_first_again() -> None:
    first, second = Mine(), Mine()
    kept, live = Watched(first, "Mine"), Watched(second, "Mine")
    second.n, second.items = 3, [4]
    second.table += 1
    second.total += 1
    live.restore(states(kept), Restoring())
    assert (second.n, second.items, second.table.tolist(), second.total.tolist()) == (0, [], [0, 0], [0, 0])


def test_what_is_transient_is_not_kept() -> None:
    mine = Mine()
    kept = Watched(mine, "Mine")
    mine.file = 7
    assert states(kept) == {}


def test_what_changes_and_cannot_be_kept_is_lost_and_named() -> None:
    mine = Mine()
    kept = Watched(mine, "Mine")
    mine.thing = Opaque()
    mine.n = 1
    state, lost = kept.state(nobody)
    assert lost == ["Mine.thing"]
    assert list(state) == ["n"]


def test_what_belongs_to_somebody_else_is_kept_by_its_name() -> None:
    first, second = Mine(), Mine()
    kept, live = Watched(first, "Mine"), Watched(second, "Mine")
    first.thing = model = nn.Linear(1, 1)
    state, lost = kept.state(Owners([("model", model)]))
    assert lost == []
    other = nn.Linear(1, 1)
    live.restore(through_a_file(state), Restoring(Owners([("model", other)])))
    assert second.thing is other


def test_a_module_of_its_own_is_kept_though_it_did_not_change() -> None:
    class Holds:
        def __init__(self) -> None:
            self.critic = nn.Linear(1, 1)

    first, second = Holds(), Holds()
    state = through_a_file(states(Watched(first, "Holds")))
    Watched(second, "Holds").restore(state, Restoring())
    assert torch.equal(first.critic.weight, second.critic.weight)


def test_attributes_in_slots_are_kept_private_ones_too() -> None:
    class Base:
        __slots__ = ("__secret", "n")

        def __init__(self) -> None:
            self.n = 0
            self.__secret = 0

        def set(self) -> None:
            self.n, self.__secret = 1, 2

        def secret(self) -> int:
            return self.__secret

    class Slotted(Base):
        __slots__ = ("items",)

        def __init__(self) -> None:
            super().__init__()
            self.items: list[int] = []

    first, second = Slotted(), Slotted()
    kept, live = Watched(first, "Slotted"), Watched(second, "Slotted")
    first.set()
    first.items.append(3)
    live.restore(through_a_file(states(kept)), Restoring())
    assert (second.n, second.secret(), second.items) == (1, 2, [3])


@pytest.mark.parametrize("given", [0, {}, [], None, torch.zeros(2), torch.zeros(0), {"a": 1}], ids=repr)
def test_what_a_pair_gives_is_all_that_counts(given: Any) -> None:
    class Pair:
        def __init__(self) -> None:
            self.n = 0
            self.got: list[Any] = []

        def state_dict(self) -> Any:
            return given

        def load_state_dict(self, state: Any) -> None:
            self.got.append(state)

    first, second = Pair(), Pair()
    kept, live = Watched(first, "Pair"), Watched(second, "Pair")
    first.n = 5
    live.restore(through_a_file(kept.state(nobody)[0]), Restoring())
    assert len(second.got) == 1
    assert same(second.got[0], given)
    assert second.n == 0


def test_a_pair_that_gives_no_plain_data_is_told() -> None:
    class Pair(Own):
        def state_dict(self) -> Any:
            return {"thing": Opaque()}

    with pytest.raises(CheckpointError, match=r"Pair\.state_dict\(\)\['thing'\] is .*Opaque"):
        Watched(Pair(), "Pair").state(nobody)
