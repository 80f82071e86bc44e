from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Callback,
    CustomCallback,
    EpochEnd,
    Event,
    FitBegin,
    Learner,
    ModelError,
    Phase,
    Recorder,
    StateAccessError,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    runstep,
    throttle,
)
from fluxloop.order.access import Access
from fluxloop.order.view import make_view
from fluxloop.state import State
from fluxloop.testing import EventRecorder, toy_learner
from processes.pretended import Alone
from toys import Touch, get, refused, run


class Publisher(Callback):
    """Publishes a dict for others to read."""

    writes = ("cbstate.table",)

    def init(self, learner: Any) -> None:
        learner.cbstate.table = {"a": 1, "b": {"c": [1, 2]}}


# Reading


def test_a_declared_read_gives_the_object_itself() -> None:
    found: list[Any] = []
    learner = run(lambda view: found.extend([view.model, view.step.loss]), reads=("model", "step.loss"))
    assert found[0] is learner.model
    assert found[1].data_ptr() == learner.step.loss.data_ptr()  # kept without its graph after the epoch


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


def test_a_whole_that_is_read_and_of_which_a_part_is_written_can_be_iterated() -> None:
    assert get(lambda learner: "xs" in set(learner.step), ("step",), ("step.mark",)) is True


def test_keys_of_a_dict_can_be_read_where_one_of_them_is_written() -> None:
    class Later(Touch):
        run_after = (Publisher,)

    found: list[int] = []
    use = Later(lambda learner: found.append(learner.cbstate.table["a"]), ("cbstate.table",), ("cbstate.table.b",))
    toy_learner(use, Publisher(), num_batches=1).fit(1)
    assert found == [1]


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
        assert error.mode == "write"


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
            if part in (("step",), ("cbstate",)):  # the refusal waits until it can name the entry
                return ".".join(path[:2]), mode if len(path) == 2 else "read"
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


# The weights


def test_declared_weights_are_the_modules_themselves() -> None:
    found: list[Any] = []
    reads = ("model", "model@ema")
    learner = run(lambda view: found.extend(view.weights[n] for n in ("model", "model@ema")), reads, (), EMA("model"))
    assert found == [learner.model, learner.weights["model@ema"]]
    assert found[0] is not found[1]


def test_a_declared_path_of_weights_allows_its_parts_and_no_other_model() -> None:
    class Both(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                learner.backward(learner.model.head(learner.model.body(state.xs)).mean())
                learner.update()

    def use(view: Any) -> None:
        assert view.weights["body"] is view.weights["model.body"]
        assert view.weights["body.0"] is view.weights["body"][0]
        assert view.weights["body.0@ema"] is view.weights["body@ema"][0]
        for name, path in (("head", "model.head"), ("head@ema", "model.head@ema"), ("body@slow", "model.body@slow")):
            with pytest.raises(StateAccessError) as caught:
                view.weights[name]
            assert (caught.value.path, caught.value.mode) == (path, "read")
        used.append(view)

    used: list[Any] = []
    models = {"body": torch.nn.Sequential(torch.nn.Linear(1, 2)), "head": torch.nn.Linear(2, 1)}
    touch = Touch(use, reads=("model.body", "model.body@ema"))
    batch = (torch.ones(2, 1), torch.ones(2, 1))
    learner = Learner(models, data=([batch],), callbacks=[touch, EMA("body"), EMA("head")], default_callbacks=False)
    learner.fit(1, phases=[Both()])
    assert len(used) == 1


def test_undeclared_weights_are_refused_with_the_path_and_the_event() -> None:
    error = refused(lambda view: view.weights["model"], ("step",))
    assert (error.callback, error.path, error.mode, error.event) == ("Touch", "model", "read", "StepEnd")
    error = refused(lambda view: view.weights["model@ema"], ("model",), (), EMA("model"))
    assert (error.path, error.mode) == ("model@ema", "read")
    error = refused(lambda view: view.weights["model"], ("model@ema",), (), EMA("model"))
    assert error.path == "model"


def test_a_view_of_weights_does_not_let_the_live_ones_be_read_as_an_attribute() -> None:
    assert refused(lambda view: view.model, ("model@ema",), (), EMA("model")).path == "model"


def test_which_weights_there_are_may_be_asked_by_anybody() -> None:
    assert get(lambda view: list(view.weights), (), (), EMA("model")) == ["model", "model@ema"]
    found = get(
        lambda view: [n in view.weights for n in ("model", "model@ema", "model@no", "encoder")], (), (), EMA("model")
    )
    assert found == [True, True, False, False]


def test_a_view_is_assigned_by_who_declares_to_write_it() -> None:
    def use(view: Any) -> None:
        view.weights["model@mine"] = torch.nn.Linear(1, 1)
        assert isinstance(view.weights["model@mine"], torch.nn.Linear)
        with pytest.raises(StateAccessError) as caught:
            view.weights["model@ema"] = torch.nn.Linear(1, 1)
        assert (caught.value.path, caught.value.mode) == ("model@ema", "write")

    learner = run(use, (), ("model@mine",))
    assert list(learner.weights) == ["model", "model@mine"]
    assert (
        refused(lambda view: view.weights.__setitem__("model@mine", None), ("model@mine",), (), Mine()).mode == "write"
    )


class Mine(Callback):
    """Keeps a view of its own."""

    writes = ("model@mine",)

    def init(self, learner: Any) -> None:
        learner.weights["model@mine"] = torch.nn.Linear(1, 1)


def test_live_weights_cannot_be_assigned_even_by_who_may_write_them() -> None:
    with pytest.raises(ModelError, match="weights 'model' were assigned; expected the name of a view"):
        run(lambda view: view.weights.__setitem__("model", torch.nn.Linear(1, 1)), (), ("model",))


def test_reading_everything_gives_every_view_of_the_weights() -> None:
    def use(view: Any) -> bool:
        with pytest.raises(StateAccessError):
            view.weights["model@ema"] = torch.nn.Linear(1, 1)
        return view.weights["model@ema"] is not view.weights["model"]

    assert get(use, ("*",), (), EMA("model")) is True


def test_an_unsafe_callback_has_all_weights() -> None:
    class Raw(UnsafeCallback):
        @on(StepEnd)
        def look(self, event: Any, phase: Any, learner: Any) -> None:
            learner.weights["model@raw"] = torch.nn.Linear(1, 1)

    learner = toy_learner(Raw(), num_batches=1)
    learner.fit(1)
    assert list(learner.weights) == ["model", "model@raw"]


def test_everybody_may_read_where_the_fit_is() -> None:
    class Watches(Callback):
        draws = False

        def __init__(self) -> None:
            self.seen: list[Any] = []

        @on(StepBegin, TrainingPhase)
        def look(self, event: Any, phase: Any, learner: Any) -> None:
            self.seen.append((learner.cycle, learner.num_epochs, learner.trained_steps, len(learner.fit_phases)))

    watches = Watches()
    learner = toy_learner(watches, Recorder(), num_batches=1)
    learner.fit(2)
    learner.fit(1, phases=[TrainingPhase()])
    learner.epoch(TrainingPhase())
    assert watches.seen == [(1, 2, 0, 2), (2, 2, 1, 2), (3, 3, 2, 1), (None, None, 3, 0)]


def test_an_evaluation_inside_a_fit_is_in_no_cycle() -> None:
    seen: list[Any] = []

    class Asks(ValidationPhase):
        def step(self, learner: Any, batch: Any) -> Any:
            seen.append((learner.cycle, learner.num_epochs, learner.fit_phases))
            return super().step(learner, batch)

    class Evaluates(UnsafeCallback):
        draws = False

        @on(EpochEnd, TrainingPhase)
        def evaluate(self, event: Any, phase: Any, learner: Any) -> None:
            learner.evaluate(phase=Asks())
            seen.append((learner.cycle, learner.num_epochs))

    toy_learner(Recorder(), Evaluates(), num_batches=1).fit(1, phases=[TrainingPhase()])
    assert seen == [(None, None, ()), (1, 1)]


def test_every_callback_may_ask_the_accelerator_which_process_this_is() -> None:
    seen: list[Any] = []

    class Asks(Callback):
        draws = False

        @on(EpochEnd)
        def ask(self, event: Event, phase: Phase, learner: Any) -> None:
            seen.append((learner.accelerator.is_main, learner.accelerator.rank, learner.accelerator.world_size))
            with pytest.raises(StateAccessError, match="tried to write 'accelerator'"):
                learner.accelerator = None

    class Declares(Asks):
        reads = ("accelerator.rank",)

        @on(EpochEnd)
        def ask(self, event: Event, phase: Phase, learner: Any) -> None:
            seen.append(learner.accelerator.rank)

    toy_learner(Asks(), Declares()).epoch(TrainingPhase())
    assert sorted(map(str, seen)) == ["(True, 0, 1)", "0"]


def test_of_several_processes_a_callback_for_the_main_one_is_handled_there_alone() -> None:
    seen: list[tuple[str, int]] = []

    class Shows(Callback):
        draws = False
        main_only = True

        def init(self, learner: Any) -> None:
            seen.append(("init", learner.accelerator.rank))

        @on(EpochEnd)
        def show(self, event: Event, phase: Phase, learner: Any) -> None:
            seen.append(("show", learner.accelerator.rank))

    for rank in (0, 1):
        learner = toy_learner(throttle(Shows(), EpochEnd, freq=1))
        learner.accelerator.group = Alone(rank, 2)
        learner.callbacks.forget()
        learner.callbacks.handle(learner, TrainingPhase())(EpochEnd())
    assert seen == [("init", 0), ("show", 0), ("init", 0)]
