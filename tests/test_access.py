from __future__ import annotations

import ast
import copy
import json
import pickle
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxloop import (
    AbstractTrainingPhase,
    BackwardBegin,
    Callback,
    CallbackConflictError,
    CallbackError,
    Counts,
    CustomCallback,
    EpochEnd,
    FitBegin,
    Learner,
    Metric,
    Metrics,
    MissingEntryError,
    Recorder,
    StateAccessError,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    runstep,
)
from fluxloop.access import Access
from fluxloop.state import State
from fluxloop.testing import EventRecorder, toy_learner
from fluxloop.view import make_view

Use = Callable[[Any], object]


class Touch(Callback):
    """Does `use(learner)` at the end of each training step."""

    def __init__(self, use: Use, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
        self.use = use
        self.reads = reads
        self.writes = writes

    @on(StepEnd, AbstractTrainingPhase)
    def run(self, event: Any, phase: Any, learner: Any) -> None:
        self.use(learner)


class Publisher(Callback):
    """Publishes containers of each kind for others to read."""

    writes = ("cbstate.table", "cbstate.series", "cbstate.box", "cbstate.special")

    def init(self, learner: Any) -> None:
        learner.cbstate.table = {"a": 1, "b": {"c": [1, 2]}}
        learner.cbstate.series = [3, 1, {"d": 2}]
        learner.cbstate.box = State({"inner": State({"x": 1}), "values": 7})
        learner.cbstate.special = {}


def run(use: Use, reads: Sequence[str] = (), writes: Sequence[str] = (), *others: Callback) -> Learner:
    """Run one step with a callback that does `use(learner)` at its end; give the learner."""
    learner = toy_learner(Touch(use, reads, writes), *others, num_batches=1)
    learner.fit(1, phases=[TrainingPhase()])
    return learner


def get(use: Use, reads: Sequence[str] = (), writes: Sequence[str] = (), *others: Callback) -> Any:
    """Give what `use(learner)` gives at the end of a step."""
    found: list[object] = []
    run(lambda learner: found.append(use(learner)), reads, writes, *others)
    return found[0]


def refused(use: Use, reads: Sequence[str] = (), writes: Sequence[str] = (), *others: Callback) -> StateAccessError:
    """Give the error with which `use(learner)` is refused."""
    with pytest.raises(StateAccessError) as caught:
        run(use, reads, writes, *others)
    return caught.value


def store(learner: Any, **entries: Any) -> None:
    for name, value in entries.items():
        setattr(learner.step, name, value)


# FluxTraining's checks of its protected states


def test_protect_jl_reading_what_is_not_declared_raises() -> None:
    error = refused(lambda learner: learner.step.loss)
    assert (error.callback, error.path, error.mode, error.event) == ("Touch", "step", "read", "StepEnd")


def test_protect_jl_writing_what_is_only_declared_as_read_raises() -> None:
    error = refused(lambda learner: store(learner, loss=0), reads=("step.loss",))
    assert (error.path, error.mode) == ("step.loss", "write")


def test_protect_jl_writing_what_is_declared_as_written_works() -> None:
    learner = run(lambda learner: store(learner, mark=5), writes=("step.mark",))
    assert learner.step.mark == 5


def test_protect_jl_of_a_nested_path_only_the_named_leaf_is_writable() -> None:
    def use(learner: Any) -> None:
        learner.cbstate.box.inner.x = 2
        for attempt in (
            lambda: setattr(learner.cbstate.box.inner, "y", 1),
            lambda: setattr(learner.cbstate.box, "other", 1),
            lambda: setattr(learner.cbstate.box, "inner", 1),
            lambda: setattr(learner.cbstate, "box", 1),
            lambda: setattr(learner, "cbstate", 1),
            lambda: learner.cbstate.box.inner.y,
            lambda: learner.cbstate.table,
        ):
            with pytest.raises(StateAccessError):
                attempt()

    class Later(Touch):
        run_after = (Publisher,)

    learner = toy_learner(Later(use, writes=("cbstate.box.inner.x",)), Publisher(), num_batches=1)
    learner.fit(1, phases=[TrainingPhase()])
    assert learner.cbstate.box.inner.x == 2


# Reading


def test_a_declared_read_gives_the_object_itself() -> None:
    found: list[Any] = []
    learner = run(lambda view: found.extend([view.model, view.step.loss]), reads=("model", "step.loss"))
    assert found[0] is learner.model
    assert found[1] is learner.step.loss


def test_a_prefix_covers_everything_below_it() -> None:
    assert sorted(get(lambda learner: [n for n in ("xs", "loss") if learner.step[n] is not None], ("step",))) == [
        "loss",
        "xs",
    ]
    assert get(lambda learner: learner.cbstate.box.inner.x, ("cbstate",), (), Publisher()) == 1


def test_an_entry_named_like_the_beginning_of_a_declared_one_is_not_covered() -> None:
    error = refused(lambda learner: learner.step.loss_ema, reads=("step.loss",))
    assert error.path == "step.loss_ema"


def test_writing_implies_reading() -> None:
    def use(learner: Any) -> int:
        learner.step.mark = 4
        return learner.step.mark + 1

    assert get(use, writes=("step.mark",)) == 5


def test_a_sibling_of_a_declared_entry_raises() -> None:
    assert refused(lambda learner: learner.step.xs, reads=("step.loss",)).path == "step.xs"


def test_items_are_declared_as_attributes_are() -> None:
    assert get(lambda learner: learner.step["loss"] is learner.step.loss, ("step.loss",)) is True
    assert refused(lambda learner: learner.step["xs"], ("step.loss",)).path == "step.xs"


def test_a_key_of_a_dict_can_be_declared_by_itself() -> None:
    assert get(lambda learner: learner.cbstate.table["a"], ("cbstate.table.a",), (), Publisher()) == 1
    error = refused(lambda learner: learner.cbstate.table["b"], ("cbstate.table.a",), (), Publisher())
    assert error.path == "cbstate.table.b"


def test_in_tells_of_a_declared_entry_whether_it_is_there() -> None:
    def use(learner: Any) -> tuple[bool, bool]:
        return "loss" in learner.step, "mark" in learner.step

    assert get(use, ("step.loss", "step.mark")) == (True, False)
    assert get(use, ("step",)) == (True, False)


def test_in_of_an_undeclared_entry_raises() -> None:
    assert refused(lambda learner: "xs" in learner.step, ("step.loss",)).path == "step.xs"


def test_hasattr_of_an_undeclared_path_raises_instead_of_saying_no() -> None:
    assert refused(lambda learner: hasattr(learner.step, "xs"), ("step.loss",)).path == "step.xs"
    assert refused(lambda learner: hasattr(learner, "model"), ("step.loss",)).path == "model"


def test_getattr_with_a_default_raises_for_an_undeclared_path() -> None:
    assert refused(lambda learner: getattr(learner.step, "xs", None), ("step.loss",)).path == "step.xs"


def test_hasattr_of_a_declared_entry_tells_whether_it_is_there() -> None:
    assert get(lambda learner: hasattr(learner.step, "loss"), ("step.loss",)) is True
    assert get(lambda learner: hasattr(learner.step, "mark"), ("step.mark",)) is False


def test_reading_everything_gives_every_entry_and_allows_no_write() -> None:
    def use(learner: Any) -> tuple[int, bool]:
        return learner.batch_size, learner.step.loss.requires_grad

    assert get(use, ("*",)) == (8, True)
    for attempt in (
        lambda learner: store(learner, loss=1),
        lambda learner: setattr(learner, "model", 1),
        lambda learner: setattr(learner.cbstate, "mine", 1),
        lambda learner: delattr(learner.step, "loss"),
    ):
        assert refused(attempt, ("*",)).mode == "write"


def test_writing_everything_allows_every_write() -> None:
    learner = run(lambda learner: store(learner, mark=3), writes=("*",))
    assert learner.step.mark == 3


def test_one_may_read_a_whole_and_write_a_part_of_it() -> None:
    def use(learner: Any) -> bool:
        learner.step.mark = 1
        return "xs" in learner.step and learner.step.xs is not None and learner.step["ys"] is not None

    assert get(use, ("step",), ("step.mark",)) is True
    assert refused(lambda learner: store(learner, loss=0), ("step",), ("step.mark",)).path == "step.loss"


def test_a_whole_that_is_read_and_of_which_a_part_is_written_can_be_iterated() -> None:
    assert get(lambda learner: "xs" in set(learner.step), ("step",), ("step.mark",)) is True


def test_keys_of_a_dict_can_be_read_where_one_of_them_is_written() -> None:
    class Later(Touch):
        run_after = (Publisher,)

    found: list[int] = []
    use = Later(lambda learner: found.append(learner.cbstate.table["a"]), ("cbstate.table",), ("cbstate.table.b",))
    toy_learner(use, Publisher(), num_batches=1).fit(1)
    assert found == [1]


def test_two_declared_paths_below_one_branch_add_up() -> None:
    """FluxTraining merges permissions shallowly, so that the second replaces the first (D-FT-07)."""

    def use(learner: Any) -> tuple[int, int]:
        learner.step.first, learner.step.second = 1, 2
        return learner.step.first, learner.step.second

    assert get(use, ("step.loss", "step.xs"), ("step.first", "step.second")) == (1, 2)


def test_named_models_and_optimizers_are_paths_of_their_own() -> None:
    found: list[Any] = []

    class Read(Callback):
        reads = ("model.G", "params.G", "optimizer.G")

        @on(FitBegin)
        def look(self, event: Any, phase: Any, learner: Any) -> None:
            found.extend([learner.model.G, learner.params.G, learner.optimizer.G])
            with pytest.raises(StateAccessError, match=r"'model\.D'"):
                _ = learner.model.D

    models = {"G": torch.nn.Linear(1, 1), "D": torch.nn.Linear(1, 1)}
    learner = Learner(models, callbacks=[Read()], default_callbacks=False)
    learner.fit(0, phases=[])
    assert found[0] is learner.model.G
    assert found[1] is learner.params.G
    assert found[2] is learner.optimizer.G


def test_models_of_a_tuple_are_paths_by_position() -> None:
    found: list[Any] = []
    read = CustomCallback(lambda learner: found.append(learner.model[1]), FitBegin, reads=("model.1",))
    models = (torch.nn.Linear(1, 1), torch.nn.Linear(2, 1))
    learner = Learner(models, callbacks=[read], default_callbacks=False)
    learner.fit(0, phases=[])
    assert found == [learner.model[1]]


# Read-only containers


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


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_d_ft_08_no_container_that_is_only_read_can_be_changed_through_the_view(mutation: str) -> None:
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
def test_d_ft_08_other_containers_that_are_only_read_stay_as_they_are(value: Any, mutate: Use) -> None:
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


# Deleting, items


def test_an_entry_that_is_declared_as_written_can_be_deleted() -> None:
    def use(learner: Any) -> None:
        learner.step.mark = 1
        del learner.step.mark

    assert "mark" not in run(use, writes=("step.mark",)).step
    assert "mark" not in run(use, writes=("step",)).step


def test_an_entry_that_is_not_declared_as_written_cannot_be_deleted() -> None:
    for reads in (("step",), ("step.loss",), ("*",), ()):
        error = refused(lambda learner: delattr(learner.step, "loss"), reads)
        assert (error.callback, error.event) == ("Touch", "StepEnd")
        assert error.mode == ("write" if reads else "read")


def test_a_key_of_a_dict_declared_as_written_can_be_set_and_no_other() -> None:
    class Later(Touch):
        run_after = (Publisher,)

    def use(learner: Any) -> None:
        learner.cbstate.table["a"] = 5
        with pytest.raises(StateAccessError, match=r"'cbstate\.table\.b'"):
            learner.cbstate.table["b"] = 5

    learner = toy_learner(Later(use, writes=("cbstate.table.a",)), Publisher(), num_batches=1)
    learner.fit(1)
    assert learner.cbstate.table["a"] == 5


def test_what_lies_below_a_written_path_can_be_changed_freely() -> None:
    class Owner(Callback):
        writes = ("cbstate.mine",)

        def init(self, learner: Any) -> None:
            learner.cbstate.mine = {"list": [1]}

        @on(EpochEnd)
        def grow(self, event: Any, phase: Any, learner: Any) -> None:
            learner.cbstate.mine["list"].append(2)
            learner.cbstate.mine["new"] = 3

    learner = toy_learner(Owner(), num_batches=1)
    learner.fit(1, phases=[TrainingPhase()])
    assert learner.cbstate.mine == {"list": [1, 2], "new": 3}


# Messages


def test_the_message_says_who_when_what_and_the_line_to_add() -> None:
    error = refused(lambda learner: store(learner, loss=0), ("step.loss", "model"), ("step.mark",))
    message = str(error)
    assert message.startswith("Touch tried to write 'step.loss' at StepEnd")
    assert "declared: reads = ('step.loss', 'model'), writes = ('step.mark',)" in message
    assert "to allow it, write in the class: writes = ('step.mark', 'step.loss')" in message


def test_the_message_of_a_refused_read_gives_the_line_for_reads() -> None:
    message = str(refused(lambda learner: learner.step.xs, ("step.loss",)))
    assert "Touch tried to read 'step.xs' at StepEnd" in message
    assert "to allow it, write in the class: reads = ('step.loss', 'step.xs')" in message


def test_the_message_names_the_event_at_which_it_happened() -> None:
    for event in (StepBegin, BackwardBegin, EpochEnd):
        hook = CustomCallback(lambda learner: learner.model, event, reads=("step",), name="hook")
        with pytest.raises(StateAccessError, match=rf"hook tried to read 'model' at {event.__name__}"):
            toy_learner(hook, num_batches=1).fit(1)


def test_the_message_of_an_access_in_init_says_so() -> None:
    class Early(Callback):
        def init(self, learner: Any) -> None:
            learner.cbstate.mine = 1

    with pytest.raises(StateAccessError, match="Early tried to read 'cbstate' at init"):
        toy_learner(Early())


def test_a_second_instance_is_named_by_its_name() -> None:
    hooks = [CustomCallback(lambda learner: learner.model, StepEnd, reads=(), name=name) for name in ("one", "two")]
    with pytest.raises(StateAccessError, match="one tried to read 'model'"):
        toy_learner(*hooks, num_batches=1).fit(1)


LINE_CASES: dict[str, tuple[Use, tuple[str, ...]]] = {
    "read": (lambda learner: learner.step.xs, ("step.loss",)),
    "read from nothing": (lambda learner: learner.step.xs.shape, ()),
    "write": (lambda learner: setattr(learner.step, "mark", 1), ("step",)),
    "write of a root": (lambda learner: setattr(learner, "loss_fn", torch.nn.functional.l1_loss), ("loss_fn",)),
    "item of a dict": (lambda learner: learner.cbstate.table.__setitem__("a", 2), ("cbstate.table",)),
    "item of a nested dict": (lambda learner: learner.cbstate.table["b"].__setitem__("c", 2), ("cbstate.table",)),
    "append to a list": (lambda learner: learner.cbstate.series.append(1), ("cbstate.series",)),
    "item of a list": (lambda learner: learner.cbstate.series[2].__setitem__("d", 1), ("cbstate.series",)),
    "count of a phase": (lambda learner: add_step(learner.cbstate.history[TrainingPhase]), ("cbstate.history",)),
    "count of a phase by instance": (
        lambda learner: add_step(learner.cbstate.history[TrainingPhase()]),
        ("cbstate.history",),
    ),
    "a gradient": (lambda learner: learner.step.grads.__setitem__("value", None), ("step.grads",)),
    "delete": (lambda learner: delattr(learner.step, "ys"), ("step",)),
}


@pytest.mark.parametrize("case", LINE_CASES)
def test_the_lines_that_the_messages_say_to_add_allow_the_access(case: str) -> None:
    use, reads = LINE_CASES[case]

    class Touching(Callback):
        run_after = (Publisher, Recorder)

        @on(StepEnd, AbstractTrainingPhase)
        def run(self, event: Any, phase: Any, learner: Any) -> None:
            use(learner)

    Touching.reads = reads
    for _ in range(3):  # a read may be refused first, then a write
        try:
            toy_learner(Touching(), Publisher(), Recorder(), num_batches=1).fit(1, phases=[TrainingPhase()])
            return
        except StateAccessError as error:
            line = re.search(r"write in the class: (reads|writes) = (\(.*\))", str(error))
            assert line is not None
            setattr(Touching, line[1], ast.literal_eval(line[2]))
    raise AssertionError(f"still refused with reads = {Touching.reads}, writes = {Touching.writes}")


def test_a_declared_entry_that_this_phase_does_not_store_is_another_error_that_lists_what_there_is() -> None:
    with pytest.raises(MissingEntryError, match="has no entry 'embedding'; it has: grads, loss, preds, xs, ys"):
        run(lambda learner: learner.step.embedding, ("step.embedding",))


def test_a_missing_entry_suggests_a_near_one() -> None:
    with pytest.raises(MissingEntryError, match="did you mean 'preds'"):
        run(lambda learner: learner.step.pred, ("step",))


def test_a_missing_entry_below_everything_is_reported_likewise() -> None:
    with pytest.raises(MissingEntryError, match="it has: grads, loss, preds, xs, ys"):
        run(lambda learner: learner.step.embedding, ("*",))


# Declarations


def test_a_bare_string_is_refused_with_the_tuple_to_write() -> None:
    class Bare(Callback):
        reads = "step.loss"

    with pytest.raises(CallbackError, match=r"Bare declares reads = 'step.loss'; .*reads = \('step.loss',\)"):
        toy_learner(Bare())


def test_a_bare_string_for_writes_is_refused_too() -> None:
    class Bare(Callback):
        writes = "cbstate.mine"

    with pytest.raises(CallbackError, match=r"writes = \('cbstate.mine',\)"):
        toy_learner(Bare())


def test_a_bare_string_given_to_a_hook_is_refused_with_the_tuple_to_write() -> None:
    with pytest.raises(CallbackError, match=r"expected a tuple of paths: reads = \('step.loss',\)"):
        toy_learner(CustomCallback(print, StepEnd, reads="step.loss"))


@pytest.mark.parametrize(
    ("path", "words"),
    [("stp.loss", "did you mean 'step'"), ("cbstates.x", "did you mean 'cbstate'"), ("", "expected one that starts")],
)
def test_a_path_with_an_unknown_root_is_an_error_when_the_learner_is_built(path: str, words: str) -> None:
    with pytest.raises(CallbackError, match=words):
        toy_learner(CustomCallback(print, StepEnd, reads=(path,)))
    with pytest.raises(CallbackError, match="starts with model, params, optimizer"):
        toy_learner(CustomCallback(print, StepEnd, reads=(), writes=(path,)))


def test_a_path_that_is_no_string_is_an_error_when_the_learner_is_built() -> None:
    with pytest.raises(CallbackError, match="declares the path 3"):
        toy_learner(CustomCallback(print, StepEnd, reads=(3,)))


@pytest.mark.parametrize("path", ["step.", "step..loss", ".step", "step.loss.", "*.loss"])
def test_a_path_with_an_empty_part_is_an_error_when_the_learner_is_built(path: str) -> None:
    with pytest.raises(CallbackError, match="CustomCallback declares the path"):
        toy_learner(CustomCallback(print, StepEnd, reads=(path,)))


def test_an_instance_may_compute_what_it_reads() -> None:
    class Watch(Callback):
        def __init__(self, entry: str) -> None:
            self.entry = entry
            self.seen: list[int] = []

        @property
        def reads(self) -> tuple[str, ...]:
            return (f"step.{self.entry}",)

        @on(StepEnd)
        def look(self, event: Any, phase: Any, learner: Any) -> None:
            self.seen.append(len(learner.step[self.entry]))
            with pytest.raises(StateAccessError):
                _ = learner.step.loss

    watches = [Watch("xs"), Watch("preds")]
    for watch in watches:
        toy_learner(watch, num_batches=1).fit(1, phases=[TrainingPhase()])
        assert watch.seen == [8]


def test_an_instance_may_compute_what_it_writes_and_conflicts_follow() -> None:
    class Write(Callback):
        def __init__(self, entry: str, name: str) -> None:
            super().__init__(name=name)
            self.writes = (f"cbstate.{entry}",)

        def init(self, learner: Any) -> None:
            setattr(learner.cbstate, self.writes[0].removeprefix("cbstate."), self.name)

    learner = toy_learner(Write("a", "one"), Write("b", "two"))
    assert (learner.cbstate.a, learner.cbstate.b) == ("one", "two")
    with pytest.raises(CallbackConflictError, match=r"'cbstate\.a'"):
        toy_learner(Write("a", "one"), Write("a", "two"))


# Who gets what


def test_an_unsafe_callback_gets_the_learner_itself() -> None:
    class Raw(UnsafeCallback):
        writes = ("cbstate.raw",)

        def init(self, learner: Any) -> None:
            self.given = [learner]

        @on(StepEnd)
        def look(self, event: Any, phase: Any, learner: Any) -> None:
            self.given.append(learner)
            learner.step.undeclared = 1
            learner.cbstate.raw = learner.step.loss

    raw = Raw()
    learner = toy_learner(raw, num_batches=1)
    learner.fit(1, phases=[TrainingPhase()])
    assert all(given is learner for given in raw.given)
    assert len(raw.given) == 2
    assert learner.step.undeclared == 1


def test_what_an_unsafe_callback_declares_still_orders_it() -> None:
    class Raw(UnsafeCallback):
        writes = ("step.loss",)

    class After(Callback):
        reads = ("step.loss",)

    assert toy_learner(After(), Raw()).callbacks.order == ["Raw", "After"]


def test_a_view_is_made_once_per_callback_and_not_per_event() -> None:
    views: list[Any] = []
    hook = CustomCallback(views.append, StepEnd, reads=("step",))
    learner = toy_learner(hook, num_batches=3)
    learner.fit(2)
    assert len(views) == 12
    assert all(view is views[0] for view in views)


def test_everybody_may_defer_and_ask_for_numbers_on_the_host() -> None:
    trace: list[Any] = []

    class Serve(Callback):
        reads = ("step.loss",)

        @on(StepEnd, AbstractTrainingPhase)
        def ask(self, event: Any, phase: Any, learner: Any) -> None:
            learner.host(learner.step.loss, trace.append)
            learner.defer(lambda: trace.append("undone"))

    learner = toy_learner(Serve(), num_batches=1)
    learner.fit(1, phases=[TrainingPhase()])
    assert trace == [learner.step.loss.item(), "undone"]


def test_a_view_says_whose_it_is() -> None:
    assert get(repr) == "<Touch's view of the learner>"


def test_callbacks_without_declarations_may_watch_events_and_touch_nothing() -> None:
    recorder = EventRecorder()
    learner = toy_learner(recorder, num_batches=1)
    learner.fit(1, phases=[TrainingPhase()])
    assert recorder.events.count("StepEnd") == 1
    assert refused(lambda view: view.seed).path == "seed"


# Against an oracle: an access is allowed exactly where a declared path is a prefix of it

NAMES = ("a", "b", "c")
paths = st.lists(st.sampled_from(NAMES), min_size=0, max_size=3).map(lambda names: ("cbstate", *names))
leaves = st.tuples(*[st.sampled_from(NAMES)] * 3).map(lambda names: ("cbstate", *names))
declared = st.lists(paths, max_size=4)


def tree(depth: int) -> State:
    inner: Callable[[], Any] = (lambda: tree(depth - 1)) if depth > 1 else (lambda: 0)
    return State({name: inner() for name in NAMES})


class Root:
    """Stands for a learner."""

    def __init__(self) -> None:
        self.cbstate = tree(3)


def covered(path: tuple[str, ...], by: Sequence[tuple[str, ...]]) -> bool:
    return any(path[: len(prefix)] == prefix for prefix in by)


def expected(
    reads: Sequence[tuple[str, ...]], writes: Sequence[tuple[str, ...]], path: tuple[str, ...], mode: str
) -> tuple[str, str] | None:
    """Give (path, mode) of the refusal, or None: each part on the way must lead to something declared."""
    both = [*reads, *writes]
    for length in range(1, len(path)):
        part = path[:length]
        if not covered(part, both) and not any(p[:length] == part for p in both):
            return ".".join(part), "read"
    if not covered(path, writes if mode == "write" else both):
        return ".".join(path), mode
    return None


def access(view: Any, path: tuple[str, ...], mode: str, by_item: bool) -> tuple[str, str] | None:
    try:
        for name in path[:-1]:
            view = view[name] if by_item and view is not None and name != "cbstate" else getattr(view, name)
        if mode == "write":
            setattr(view, path[-1], 1)
        elif mode == "in":
            assert path[-1] in view
        else:
            assert (view[path[-1]] if by_item else getattr(view, path[-1])) == 0
    except StateAccessError as error:
        return error.path, error.mode
    return None


@settings(deadline=None, max_examples=60)
@given(reads=declared, writes=declared, everything=st.booleans(), leaf=leaves, by_item=st.booleans())
def test_reads_and_writes_are_allowed_exactly_below_the_declared_paths(
    reads: list[tuple[str, ...]],
    writes: list[tuple[str, ...]],
    everything: bool,
    leaf: tuple[str, ...],
    by_item: bool,
) -> None:
    given_reads = [".".join(path) for path in reads] + (["*"] if everything else [])
    prefixes = [*reads, *([()] if everything else [])]
    root = Root()
    view = make_view(Access.declared("someone", given_reads, [".".join(path) for path in writes]), root)  # type: ignore[arg-type]
    assert access(view, leaf, "read", by_item) == expected(prefixes, writes, leaf, "read")
    refused_in = expected(prefixes, writes, leaf, "read")
    assert access(view, leaf, "in", by_item) == refused_in
    refused_write = expected(prefixes, writes, leaf, "write")
    assert access(view, leaf, "write", by_item) == refused_write
    value: Any = root
    for name in leaf:
        value = getattr(value, name)
    assert value == (0 if refused_write else 1)
