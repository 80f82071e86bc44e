from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fluxloop import (
    Callback,
    Counts,
    Learner,
    Metric,
    Metrics,
    Recorder,
    StateAccessError,
    TrainingPhase,
    ValidationPhase,
    runstep,
)
from fluxloop.state import State
from fluxloop.testing import toy_learner
from toys import Touch, Use, run


class Publisher(Callback):
    """Publishes containers of each kind for others to read."""

    writes = ("cbstate.table", "cbstate.series", "cbstate.box", "cbstate.special")

    def init(self, learner: Any) -> None:
        learner.cbstate.table = {"a": 1, "b": {"c": [1, 2]}}
        learner.cbstate.series = [3, 1, {"d": 2}]
        learner.cbstate.box = State({"inner": State({"x": 1}), "values": 7})
        learner.cbstate.special = {}


def reader_of(use: Use) -> None:
    run(use, ("step", "cbstate", "history", "data"), (), Publisher(), Recorder())


MUTATIONS: dict[str, Use] = {
    "set an entry of the step": lambda learner: setattr(learner.step, "loss", 1),
    "add an entry to the step": lambda learner: setattr(learner.step, "mark", 1),
    "delete an entry of the step": lambda learner: delattr(learner.step, "loss"),
    "set through vars": lambda learner: vars(learner.step).__setitem__("loss", 1),
    "set an entry of cbstate": lambda learner: setattr(learner.cbstate, "table", 1),
    "set a nested entry": lambda learner: setattr(learner.cbstate.box.inner, "x", 1),
    "set data": lambda learner: setattr(learner.data, "training", 1),
    "set a count": lambda learner: setattr(learner.cbstate.history[TrainingPhase], "steps", 0),
    "add to a count": lambda learner: add_step(learner.cbstate.history[TrainingPhase]),
    "set a count by optimizer": lambda learner: learner.cbstate.history[TrainingPhase].updates.update(G=1),
    "set a count through history": lambda learner: setattr(learner.history[TrainingPhase], "epochs", 9),
    "set the stop reason": lambda learner: setattr(learner.history, "stop_reason", "no"),
    "set a phase": lambda learner: learner.cbstate.history.__setitem__(TrainingPhase, Counts()),
    "delete a phase": lambda learner: learner.cbstate.history.__delitem__(TrainingPhase),
    "pop a phase": lambda learner: learner.cbstate.history.pop(TrainingPhase),
    "popitem": lambda learner: learner.cbstate.history.popitem(),
    "clear phases": lambda learner: learner.cbstate.history.clear(),
    "update phases": lambda learner: learner.cbstate.history.update({TrainingPhase: Counts()}),
    "setdefault": lambda learner: learner.cbstate.history.setdefault(ValidationPhase, Counts()),
    "count of items()": lambda learner: setattr(next(iter(learner.cbstate.history.items()))[1], "steps", 0),
    "count of values()": lambda learner: setattr(next(iter(learner.cbstate.history.values())), "steps", 0),
    "count of get()": lambda learner: setattr(learner.cbstate.history.get(TrainingPhase), "steps", 0),
    "set a gradient": lambda learner: learner.step.grads.__setitem__("value", None),
    "dict: set": lambda learner: learner.cbstate.table.__setitem__("a", 2),
    "dict: delete": lambda learner: learner.cbstate.table.__delitem__("a"),
    "dict: pop": lambda learner: learner.cbstate.table.pop("a"),
    "dict: popitem": lambda learner: learner.cbstate.table.popitem(),
    "dict: clear": lambda learner: learner.cbstate.table.clear(),
    "dict: update": lambda learner: learner.cbstate.table.update(a=2),
    "dict: setdefault": lambda learner: learner.cbstate.table.setdefault("z", 2),
    "dict: |=": lambda learner: learner.cbstate.table.__ior__({"a": 2}),
    "dict in a dict": lambda learner: learner.cbstate.table["b"].update(c=2),
    "list in a dict in a dict": lambda learner: learner.cbstate.table["b"]["c"].append(3),
    "dict of values()": lambda learner: list(learner.cbstate.table.values())[1].clear(),
    "list: set": lambda learner: learner.cbstate.series.__setitem__(0, 2),
    "list: set a slice": lambda learner: learner.cbstate.series.__setitem__(slice(0, 1), [2]),
    "list: delete": lambda learner: learner.cbstate.series.__delitem__(0),
    "list: append": lambda learner: learner.cbstate.series.append(2),
    "list: extend": lambda learner: learner.cbstate.series.extend([2]),
    "list: insert": lambda learner: learner.cbstate.series.insert(0, 2),
    "list: pop": lambda learner: learner.cbstate.series.pop(),
    "list: remove": lambda learner: learner.cbstate.series.remove(3),
    "list: clear": lambda learner: learner.cbstate.series.clear(),
    "list: sort": lambda learner: learner.cbstate.series.sort(),
    "list: reverse": lambda learner: learner.cbstate.series.reverse(),
    "list: +=": lambda learner: learner.cbstate.series.__iadd__([2]),
    "list: *=": lambda learner: learner.cbstate.series.__imul__(2),
    "dict in a list": lambda learner: learner.cbstate.series[2].update(d=1),
}


def add_step(counts: Any) -> None:
    counts.steps += 1


def published(learner: Learner) -> dict[str, Any]:
    shared = learner.cbstate
    return {
        "table": copy.deepcopy(shared.table),
        "series": copy.deepcopy(shared.series),
        "x": shared.box.inner.x,
        "counts": copy.deepcopy(shared.history[TrainingPhase]),
        "phases": list(shared.history),
        "entries": sorted(vars(shared)),
    }


@pytest.mark.slow(quick=15)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_no_container_that_is_only_read_can_be_changed_through_the_view(mutation: str) -> None:
    touch = Touch(MUTATIONS[mutation], ("step", "cbstate", "history", "data"))
    learner = toy_learner(touch, Publisher(), Recorder(), num_batches=1)
    with pytest.raises(StateAccessError, match="Touch tried to write") as caught:
        learner.fit(1, phases=[TrainingPhase()])
    assert caught.value.mode == "write"
    assert published(learner) == {
        "table": {"a": 1, "b": {"c": [1, 2]}},
        "series": [3, 1, {"d": 2}],
        "x": 1,
        "counts": Counts(epochs=0, steps=1, steps_epoch=1, updates={None: 1}),
        "phases": [TrainingPhase],
        "entries": ["box", "history", "series", "special", "table"],
    }


def test_read_only_dicts_and_lists_are_real_ones() -> None:
    def use(learner: Any) -> None:
        table, series = learner.cbstate.table, learner.cbstate.series
        assert isinstance(table, dict)
        assert isinstance(series, list)
        assert isinstance(table["b"], dict)
        assert table == {"a": 1, "b": {"c": [1, 2]}}
        assert series == [3, 1, {"d": 2}]
        assert json.loads(json.dumps(table)) == table
        assert {**table} == table
        assert [*series, 4] == [3, 1, {"d": 2}, 4]
        assert table | {"z": 1} == {"a": 1, "b": {"c": [1, 2]}, "z": 1}
        assert sorted(table) == ["a", "b"]
        assert series.index(1) == 1

    reader_of(use)


def test_a_copy_of_a_read_only_dict_or_list_is_the_reader_s_own() -> None:
    def use(learner: Any) -> None:
        table, series = dict(learner.cbstate.table), list(learner.cbstate.series)
        table["mine"] = 1
        series.append(1)
        learner.cbstate.table.copy()["mine"] = 1
        learner.cbstate.series[:].append(1)
        assert "mine" not in learner.cbstate.table
        assert len(learner.cbstate.series) == 3

    reader_of(use)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_snapshot_of_a_read_only_dict_or_list_can_be_taken(duplicate: Callable[[Any], Any]) -> None:
    def use(learner: Any) -> None:
        table, series = duplicate(learner.cbstate.table), duplicate(learner.cbstate.series)
        assert table == {"a": 1, "b": {"c": [1, 2]}}
        assert series == [3, 1, {"d": 2}]
        table["mine"] = 1
        series.append(1)

    reader_of(use)


def test_a_snapshot_of_read_only_counts_can_be_taken() -> None:
    def use(learner: Any) -> None:
        counts = copy.deepcopy(learner.cbstate.history[TrainingPhase])
        assert (counts.steps, counts.updates) == (1, {None: 1})

    reader_of(use)


def test_read_only_containers_read_as_the_containers_do() -> None:
    def use(learner: Any) -> None:
        history = learner.cbstate.history
        assert history[TrainingPhase].steps == history.get(TrainingPhase).steps == 1
        assert TrainingPhase in history
        assert ValidationPhase not in history
        assert history.get(ValidationPhase, "none") == "none"
        assert list(history) == list(history.keys()) == [TrainingPhase]
        assert len(history) == 1
        assert [counts.steps for _, counts in history.items()] == [1]
        assert [counts.steps for counts in history.values()] == [1]
        assert history[TrainingPhase] == Counts(epochs=0, steps=1, steps_epoch=1, updates={None: 1})
        assert "xs" in learner.step
        assert {"xs", "ys", "preds", "loss", "grads"} <= set(learner.step)
        assert learner.step["xs"] is learner.step.xs

    reader_of(use)


@pytest.mark.parametrize("name", ["values", "items", "keys", "get", "update", "pop", "clear", "copy"])
def test_a_step_entry_may_be_named_like_a_method_of_a_dict(name: str) -> None:
    """A critic's ``values``, say: any entry may be stored."""

    class Storing(TrainingPhase):
        def step(self, learner: Any, batch: Any) -> None:
            with runstep(learner, self, **{name: batch[0]}):
                pass

    found: list[Any] = []
    watch = Touch(lambda learner: found.append(getattr(learner.step, name)), ("step",))
    metric = Metric(torch.mean, name="mean", inputs=(name,))
    learner = toy_learner(watch, Metrics(metric), Recorder(), num_batches=1)
    learner.fit(1, phases=[Storing()])
    assert found[0] is getattr(learner.step, name)
    assert learner.history["training/mean"] == [found[0].mean().item()]


@pytest.mark.parametrize(
    ("value", "mutate"),
    [
        (OrderedDict(a=1), lambda value: value.update(a=2)),
        (defaultdict(list), lambda value: value["new"]),
        ({1, 2}, lambda value: value.add(3)),
        (({"a": 1}, [1]), lambda value: value[0].update(a=2)),
        (({"a": 1}, [1]), lambda value: value[1].append(2)),
    ],
    ids=["OrderedDict", "defaultdict", "set", "dict in a tuple", "list in a tuple"],
)
def test_other_containers_that_are_only_read_stay_as_they_are(value: Any, mutate: Use) -> None:
    class Owner(Callback):
        writes = ("cbstate.owned",)

        def init(self, learner: Any) -> None:
            learner.cbstate.owned = value

    before = copy.deepcopy(value)

    def use(learner: Any) -> None:
        try:
            mutate(learner.cbstate.owned)
        except (StateAccessError, AttributeError, KeyError):
            pass  # refused; whatever is not refused must have changed the reader's own copy

    run(use, ("cbstate.owned",), (), Owner())
    assert value == before
