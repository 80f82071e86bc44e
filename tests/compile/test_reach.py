from __future__ import annotations

from functools import wraps
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import torch
from compiled_training import SGD, full, graphs, learner, learner_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fluxloop import CompileError, Learner, TrainingPhase
from fluxloop.compile.reach import Reach

pytestmark = pytest.mark.usefixtures("imported", "uncompiled")

KEPT: list[Any] = []
TABLE = {"a": 1}
SCALE = 1.0
LAST: Any = None
SETTINGS = SimpleNamespace(scale=1.0, others=5, items=[], last=None)


def test_what_functions_change_is_named_and_put_back() -> None:
    mine: set[int] = {1}
    inner: dict[str, Any] = {"a": {"b": [1]}}

    def helper() -> None:
        global LAST
        LAST = 3
        SETTINGS.items.append(3)
        SETTINGS.last = SETTINGS.new = 3
        inner["a"]["b"].append(2)

    def changes() -> None:
        KEPT.append(1)
        TABLE["a"] = 2
        mine.add(2)
        helper()

    def reads() -> int:
        return len(KEPT) + TABLE["a"] + len(mine)

    with Reach([reads, len], []).unchanged() as noted:
        reads()
    assert noted == []
    with Reach([changes], []).unchanged() as noted:
        changes()
    named = ["KEPT", "LAST", "SETTINGS.items", "SETTINGS.last", "SETTINGS.new", "TABLE", "inner", "mine"]
    assert sorted(noted) == named
    assert (KEPT, TABLE, mine, LAST, inner) == ([], {"a": 1}, {1}, None, {"a": {"b": [1]}})
    assert SimpleNamespace(scale=1.0, others=5, items=[], last=None) == SETTINGS


class Loading(dict[str, Any]):
    """As some libraries have: it lists what it would have to load."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        raise ImportError("this is not installed")

    keys = values = items = __iter__  # type: ignore[assignment]  # it raises


MODELS = Loading(own=[1])


def test_a_dict_that_loads_what_it_lists_is_not_asked_to() -> None:
    def looks() -> bool:
        return "own" in MODELS

    reach = Reach([looks], [])
    with reach.unchanged() as noted:
        MODELS["own"].append(2)
    assert noted == ["MODELS"]
    assert MODELS["own"] == [1]
    before = reach.said()
    MODELS["own"] = [5]
    assert reach.said() != before
    MODELS["own"] = [1]


def test_a_dict_that_gains_something_without_tensors_is_a_cache_and_keeps_it() -> None:
    sizes: dict[int, Any] = {1: (1,)}
    masks: dict[int, Any] = {1: torch.ones(1)}

    def fills() -> None:
        sizes[2] = (2, [3])
        masks[2] = [torch.ones(2)]

    with Reach([fills], []).unchanged() as noted:
        fills()
    assert noted == ["masks"]
    assert sizes == {1: (1,), 2: (2, [3])}
    assert list(masks) == [1]


class Sees(nn.Module):
    """Keeps what it has seen in its class, in a helper's list, or in itself."""

    seen: ClassVar[list[Any]] = []
    last: Any = None

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how, self.own = nn.Linear(6, 3), how, {"deep": [[]]}

    def forward(self, xs: Tensor) -> Tensor:
        out: Tensor = self.layer(xs)
        if self.how == "list":
            self.seen.append(out)
        elif self.how == "class":
            type(self).last = out
        elif self.how == "helper":
            keeps(out)
        elif self.how == "own":
            self.own["deep"][0].append(out)
        return out


def keeps(out: Tensor) -> None:
    KEPT.append(out)


@pytest.mark.parametrize(
    ("how", "name"),
    [("list", "Sees.seen"), ("class", "Sees.last"), ("helper", "KEPT"), ("own", "Sees.own")],
)
def test_no_stand_in_stays_where_a_step_was_refused(how: str, name: str) -> None:
    made = learner_of(Sees(how))
    with pytest.raises(CompileError, match=rf"it changes {name}.*finish\(learner, state\)"):
        made.fit(1)
    found = [*Sees.seen, Sees.last, *KEPT, *made.model.own["deep"][0]]
    assert {type(each) for each in found} <= {Tensor, type(None)}  # of the first step, which runs as it is
    Sees.seen.clear()
    KEPT.clear()
    Sees.last = None


def scaled(preds: Tensor, ys: Tensor) -> Tensor:
    return cross_entropy(preds, ys) * factor()


def factor() -> float:
    return SCALE * SETTINGS.scale


class Scaled(TrainingPhase):
    """Multiplies its loss by what its class says."""

    scale = 1.0

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.xs)
        state.loss = learner.loss_fn(state.preds, state.ys) * self.scale
        learner.backward(state.loss)
        learner.update()


def change(name: str, value: float) -> None:
    global SCALE
    if name == "global":
        SCALE = value
    elif name == "object":
        SETTINGS.scale = value
    elif name == "class":
        Scaled.scale = value


@pytest.mark.parametrize("name", ["global", "object", "class", "closure"])
def test_what_a_step_reaches_by_name_is_looked_at_when_an_epoch_begins(name: str) -> None:
    found = []
    for compile in (False, "step"):
        weight = 1.0

        def closed(preds: Tensor, ys: Tensor) -> Tensor:
            return scaled(preds, ys) * weight  # noqa: B023 - that is the test

        change(name, 1.0)
        made: Learner[Any] = learner(compile, optimizer=SGD, loss_fn=closed, default_callbacks=False)
        made.fit(2, phases=[Scaled()])
        if compile:
            assert graphs(made, Scaled) == 2
        change(name, 0.25)
        weight = 0.25 if name == "closure" else 1.0
        made.fit(1, phases=[Scaled()])
        change(name, 1.0)
        found.append(made.model[0].weight.detach())
    torch.testing.assert_close(*found, rtol=2e-6, atol=2e-6)


def double(x: Tensor, by: float = 2.0) -> Tensor:
    return x * by


def triple(x: Tensor, by: float = 3.0) -> Tensor:
    return x * by + 1


def halve(x: Tensor) -> Tensor:
    return x / 2


class Factors:
    """Of `times`."""

    first = 1.0


def times(function: Any) -> Any:
    """Wrap a function, by a function that reaches something by name itself."""

    @wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args) * Factors.first

    return wrapper


class Shop:
    """Holds what `Shopping` reaches by name."""

    turn = staticmethod(double)
    activation = torch.tanh
    table: ClassVar[dict[str, Any]] = {"by": {"each": [1.0, 2.0]}}
    array = numpy.ones(2)
    settings = SimpleNamespace(each=[{"first": SimpleNamespace(scale=1.0)}])


class Shopping(nn.Module):
    """A model that calls functions of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, xs: Tensor) -> Tensor:
        by = Shop.table["by"]["each"][1] * float(Shop.array[0]) * Shop.settings.each[0]["first"].scale
        return self.after(double(Shop.turn(Shop.activation(self.layer(xs))))) * by

    @times
    def after(self, xs: Tensor) -> Tensor:
        return xs + SCALE


def after_other(self: Any, xs: Tensor) -> Tensor:
    return xs - 1


CHANGES: dict[str, Any] = {
    "a function's code": lambda patch: patch.setattr(double, "__code__", triple.__code__),
    "a function's defaults": lambda patch: patch.setattr(double, "__defaults__", (0.5,)),
    "a function of a module": lambda patch: patch.setitem(globals(), "double", triple),
    "a function of a class": lambda patch: patch.setattr(Shop, "turn", staticmethod(halve)),
    "a method": lambda patch: patch.setattr(Shopping, "after", after_other),
    "what a decorated method reaches": lambda patch: patch.setitem(globals(), "SCALE", 0.5),
    "a function of torch's": lambda patch: patch.setattr(Shop, "activation", torch.sigmoid),
    "a list in a dict in a dict": lambda patch: patch.setitem(Shop.table["by"], "each", [1.0, 0.5]),
    "an object in a dict in a list": lambda patch: patch.setattr(Shop.settings.each[0]["first"], "scale", 0.5),
    "what a decorator closes over": lambda patch: patch.setattr(Factors, "first", 0.5),
    "an array": lambda patch: patch.setattr(Shop, "array", numpy.full(2, 0.5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_code_that_is_written_anew_is_traced_anew_when_an_epoch_begins(change: Any) -> None:
    found = []
    for compile in (False, "step"):
        with pytest.MonkeyPatch.context() as patch:
            made: Learner[Any] = learner(compile, model=Shopping, data=(full(),), optimizer=SGD)
            made.fit(2)
            if compile:
                assert graphs(made) == 1  # also after an epoch in which nothing has changed
            change(patch)
            made.fit(2)
        found.append(made.model.layer.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_functions_of_one_code_are_followed_each() -> None:
    def scaled_by(values: list[float]) -> Any:
        return lambda x: x * values[0]

    first, second = [1.0], [2.0]
    one, two = scaled_by(first), scaled_by(second)

    def both_of_them(x: Tensor) -> Tensor:
        out: Tensor = one(x) + two(x)
        return out

    before = Reach([both_of_them], []).said()
    assert Reach([both_of_them], []).said() == before
    second[0] = 3.0
    assert Reach([both_of_them], []).said() != before
