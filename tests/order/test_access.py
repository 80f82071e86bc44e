from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    BackwardBegin,
    Callback,
    CallbackConflictError,
    CallbackError,
    CustomCallback,
    EpochEnd,
    MissingEntryError,
    Recorder,
    StateAccessError,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    on,
)
from fluxloop.order import readonly
from fluxloop.order.access import covers, dotted, overlap, parse, weights_path
from fluxloop.state import State
from fluxloop.testing import toy_learner
from toys import Touch, Use, get, refused, run


class Publisher(Callback):
    """Publishes containers of each kind for others to read."""

    writes = ("cbstate.table", "cbstate.series", "cbstate.box")

    def init(self, learner: Any) -> None:
        learner.cbstate.table = {"a": 1, "b": {"c": [1, 2]}}
        learner.cbstate.series = [3, 1, {"d": 2}]
        learner.cbstate.box = State({"inner": State({"x": 1}), "values": 7})


def store(learner: Any, **entries: Any) -> None:
    for name, value in entries.items():
        setattr(learner.step, name, value)


def add_step(counts: Any) -> None:
    counts.steps += 1


# What is declared, and what is not


def test_reading_what_is_not_declared_raises() -> None:
    error = refused(lambda learner: learner.step.loss)
    assert (error.callback, error.path, error.mode, error.event) == ("Touch", "step.loss", "read", "StepEnd")


def test_writing_what_is_only_declared_as_read_raises() -> None:
    error = refused(lambda learner: store(learner, loss=0), reads=("step.loss",))
    assert (error.path, error.mode) == ("step.loss", "write")


def test_writing_what_is_declared_as_written_works() -> None:
    learner = run(lambda learner: store(learner, mark=5), writes=("step.mark",))
    assert learner.step.mark == 5


def test_of_a_nested_path_only_the_named_leaf_is_writable() -> None:
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


# What a declared path covers


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


def test_two_declared_paths_below_one_branch_add_up() -> None:
    """FluxTraining merges permissions shallowly, so that the second replaces the first."""

    def use(learner: Any) -> tuple[int, int]:
        learner.step.first, learner.step.second = 1, 2
        return learner.step.first, learner.step.second

    assert get(use, ("step.loss", "step.xs"), ("step.first", "step.second")) == (1, 2)


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

    with pytest.raises(StateAccessError, match=r"Early tried to write 'cbstate\.mine' at init"):
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


def test_what_an_unsafe_callback_declares_still_orders_it() -> None:
    class Raw(UnsafeCallback):
        writes = ("step.loss",)

    class After(Callback):
        reads = ("step.loss",)

    assert toy_learner(After(), Raw()).callbacks.order == ["Raw", "After"]


class Long(Callback):
    """Publishes a long list."""

    writes = ("cbstate.long",)

    def init(self, learner: Any) -> None:
        learner.cbstate.long = [{"number": n} for n in range(20_000)]


def test_an_item_of_a_long_list_is_read_without_looking_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    original = readonly.guarded

    def counted(value: Any, path: Any, access: Any) -> Any:
        calls.append(path)
        return original(value, path, access)

    monkeypatch.setattr(readonly, "guarded", counted)
    assert get(lambda learner: learner.cbstate.long[-1], ("cbstate.long",), (), Long()) == {"number": 19_999}
    assert get(lambda learner: len(learner.cbstate.long), ("cbstate.long",), (), Long()) == 20_000
    assert len(calls) < 20


# Paths of weights, which may have several views


def test_a_view_of_weights_is_a_path_of_its_own_that_the_live_ones_do_not_cover() -> None:
    assert parse("model.G@ema", "X") == ("model@ema", "G")
    assert parse("model@ema", "X") == ("model@ema",)
    assert parse("model.G.0.weight@ema", "X") == ("model@ema", "G", "0", "weight")
    for path in ("model@ema", "model.G@ema", "model.G.0@slow"):
        assert not covers(parse("model", "X"), parse(path, "X"))
        assert not overlap(parse("model.G", "X"), parse(path, "X"))
        assert covers(parse("*", "X"), parse(path, "X"))
    assert covers(parse("model@ema", "X"), parse("model.G@ema", "X"))
    assert covers(parse("model.G@ema", "X"), parse("model.G.0@ema", "X"))
    assert not overlap(parse("model.G@ema", "X"), parse("model.G@slow", "X"))
    assert not overlap(parse("model.G@ema", "X"), parse("model.D@ema", "X"))


@pytest.mark.parametrize("path", ["step.loss", "model", "model.G", "model@ema", "model.G@ema", "model.encoder.0@slow"])
def test_a_path_is_written_as_it_was_read(path: str) -> None:
    assert dotted(parse(path, "X")) == path


@pytest.mark.parametrize(
    "path",
    [
        "model.G@",
        "model.@ema",
        "@ema",
        "model@ema.G",
        "model.G@ema.0",
        "model.G@one@two",
        "model.G@two words",
        "step.loss@ema",
        "params.G@ema",
        "cbstate.history@ema",
    ],
)
def test_a_path_with_a_view_in_the_wrong_place_is_an_error_when_the_learner_is_built(path: str) -> None:
    with pytest.raises(CallbackError, match=f"CustomCallback declares the path {re.escape(repr(path))}; expected"):
        toy_learner(CustomCallback(print, StepEnd, reads=(path,)))
    with pytest.raises(CallbackError, match="declares the path"):
        toy_learner(CustomCallback(print, StepEnd, reads=(), writes=(path,)))


@pytest.mark.parametrize("path", ["step.loss@ema", "params.G@ema"])
def test_a_view_of_something_else_than_weights_says_where_views_are(path: str) -> None:
    with pytest.raises(CallbackError, match=r"at the end of a path of weights: 'model\.G@ema'"):
        toy_learner(CustomCallback(print, StepEnd, reads=(path,)))


def test_weights_called_by_name_have_paths() -> None:
    names = {
        "G": "model.G",
        "model": "model",
        "model@ema": "model@ema",
        "model.G": "model.G",
        "G@ema": "model.G@ema",
        "encoder.0@ema": "model.encoder.0@ema",
        "models": "model.models",
    }
    assert {name: weights_path(name) for name in names} == names


WEIGHTS_CASES: dict[str, tuple[Use, tuple[str, ...]]] = {
    "live weights": (lambda learner: learner.weights["model"], ()),
    "an average": (lambda learner: learner.weights["model@ema"], ("model",)),
    "assigning a view": (
        lambda learner: learner.weights.__setitem__("model@mine", torch.nn.Linear(1, 1)),
        (),
    ),
}


@pytest.mark.parametrize("case", WEIGHTS_CASES)
def test_the_lines_that_a_refused_access_to_weights_says_to_add_allow_it(case: str) -> None:
    use, reads = WEIGHTS_CASES[case]

    class Touching(Callback):
        draws = True  # a new module draws its weights

        @on(StepEnd, AbstractTrainingPhase)
        def run(self, event: Any, phase: Any, learner: Any) -> None:
            use(learner)

    Touching.reads = reads
    with pytest.raises(
        StateAccessError, match=r"Touching tried to (read|write) 'model(@ema|@mine)?' at StepEnd"
    ) as caught:
        toy_learner(Touching(), EMA("model"), num_batches=1).fit(1, phases=[TrainingPhase()])
    line = re.search(r"write in the class: (reads|writes) = (\(.*\))", str(caught.value))
    assert line is not None
    setattr(Touching, line[1], ast.literal_eval(line[2]))
    toy_learner(Touching(), EMA("model"), num_batches=1).fit(1, phases=[TrainingPhase()])


# Advice


class Asks(Callback):
    def __init__(self, ask: Callable[[Any], object]) -> None:
        self.ask = ask

    @on(StepEnd)
    def look(self, event: Any, phase: Any, learner: Any) -> None:
        self.ask(learner)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda learner: learner.get_callback(Recorder), ["'get_callback'", "UnsafeCallback"]),
        (lambda learner: learner.fit(1), ["'fit'", "UnsafeCallback"]),
        (lambda learner: learner.modle, ["'modle'", "did you mean 'model'?"]),
        (lambda learner: learner.requst_stop("x"), ["did you mean 'request_stop'?"]),
    ],
)
def test_a_refusal_never_suggests_what_is_refused_when_a_learner_is_made(ask: Any, words: list[str]) -> None:
    with pytest.raises(StateAccessError) as caught:
        toy_learner(Asks(ask)).fit(1)
    text = str(caught.value)
    assert "reads = ('" not in text.split("declared:")[1].split("\n", 1)[1]
    assert all(word in text for word in words), text
