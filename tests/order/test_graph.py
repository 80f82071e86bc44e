from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st

import fluxloop
from fluxloop import (
    BackwardEnd,
    Callback,
    CallbackConflictError,
    CallbackCycleError,
    CallbackError,
    CallbackTypeError,
    ConditionalCallback,
    Counts,
    CustomCallback,
    DuplicateCallbackError,
    EpochEnd,
    GarbageCollect,
    GradientClip,
    Learner,
    Metrics,
    MetricsPrinter,
    MissingProducerError,
    NoConflict,
    ProgressBar,
    Recorder,
    RunFirst,
    StateAccessError,
    StepBegin,
    StepEnd,
    StopOnNaNLoss,
    Traces,
    TrainingPhase,
    Unresolvable,
    UnsafeCallback,
    on,
    resolve_conflict,
    throttle,
)
from fluxloop.order.graph import CallbackGraph
from fluxloop.order.runner import Callbacks
from fluxloop.state import PhaseDict
from fluxloop.testing import EventRecorder, assert_order, toy_learner


class Member(Callback):
    """A callback whose declarations are given."""

    def __init__(
        self,
        reads: Sequence[str] = (),
        writes: Sequence[str] = (),
        run_after: Sequence[type[Callback]] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.reads = reads
        self.writes = writes
        self.run_after = run_after


class A(Member): ...


class B(Member): ...


class C(Member): ...


class D(Member): ...


class E(Member): ...


KINDS: tuple[type[Member], ...] = (A, B, C, D, E)
LETTERS = [kind.__name__ for kind in KINDS]


def build(*callbacks: Callback) -> Callbacks:
    return toy_learner(*callbacks).callbacks


def order(*callbacks: Callback) -> list[str]:
    return build(*callbacks).order


def edges(*callbacks: Callback) -> list[str]:
    return [str(edge) for edge in build(*callbacks).graph.edges]


def fresh(*names: str, **body: Any) -> list[type[Member]]:
    """Make classes of their own, for declarations that other tests must not see."""
    return [type(name, (Member,), dict(body)) for name in names]


# Edges and their reasons


def test_the_writer_of_a_path_runs_before_its_readers_and_the_edge_says_why() -> None:
    callbacks = [A(reads=("step.loss",)), B(writes=("step.loss",)), C(reads=("step.loss",))]
    assert order(*callbacks) == ["B", "A", "C"]
    assert edges(*callbacks) == [
        "B before A: B writes 'step.loss', A reads 'step.loss'",
        "B before C: B writes 'step.loss', C reads 'step.loss'",
    ]


def test_a_prefix_and_what_is_below_it_touch_each_other_in_both_directions() -> None:
    assert edges(A(reads=("step",)), B(writes=("step.loss",))) == ["B before A: B writes 'step.loss', A reads 'step'"]
    assert edges(A(reads=("step.loss",)), B(writes=("step",))) == ["B before A: B writes 'step', A reads 'step.loss'"]


def test_paths_that_only_begin_with_the_same_letters_do_not_touch() -> None:
    assert edges(A(reads=("step.loss",)), B(writes=("step.loss_ema",)), C(writes=("step.losses",))) == []


def test_who_reads_everything_follows_every_writer() -> None:
    assert edges(A(reads=("*",)), B(writes=("step.loss",)), C(writes=("cbstate.mine",))) == [
        "B before A: B writes 'step.loss', A reads '*'",
        "C before A: C writes 'cbstate.mine', A reads '*'",
    ]


def test_two_readers_are_not_ordered() -> None:
    assert edges(A(reads=("step",)), B(reads=("step.loss",)), C(reads=("*",))) == []


def test_run_after_orders_and_the_edge_says_so() -> None:
    callbacks = [A(run_after=(B,)), B()]
    assert order(*callbacks) == ["B", "A"]
    assert edges(*callbacks) == ["B before A: A declares run_after = B"]


def test_run_after_means_every_instance_of_the_class_and_of_its_subclasses() -> None:
    class Sub(B): ...

    assert edges(A(run_after=(B,)), B(name="one"), B(name="two"), Sub()) == [
        "Sub before A: A declares run_after = B",
        "one before A: A declares run_after = B",
        "two before A: A declares run_after = B",
    ]


def test_run_after_a_callback_that_is_not_there_says_nothing() -> None:
    assert edges(A(run_after=(B, Recorder))) == []


def test_an_edge_has_each_of_its_reasons() -> None:
    assert edges(A(reads=("step.loss",), run_after=(B,)), B(writes=("step.loss",))) == [
        "B before A: A declares run_after = B",
        "B before A: B writes 'step.loss', A reads 'step.loss'",
    ]


def test_the_default_callbacks_are_ordered_with_reasons() -> None:
    learner = toy_learner(default_callbacks=True)
    assert learner.callbacks.order == ["Recorder", "Metrics", "ProgressBar", "MetricsPrinter", "StopOnNaNLoss"]
    assert_order(learner, Recorder, Metrics, MetricsPrinter)
    assert_order(learner, Recorder, Metrics, ProgressBar)
    assert [str(edge) for edge in learner.callbacks.graph.edges] == [
        "Metrics before MetricsPrinter: Metrics writes 'cbstate.metrics', MetricsPrinter reads 'cbstate.metrics'",
        "Metrics before MetricsPrinter: MetricsPrinter declares run_after = Metrics",
        "Metrics before ProgressBar: Metrics writes 'cbstate.metrics', ProgressBar reads 'cbstate'",
        "ProgressBar before MetricsPrinter: MetricsPrinter declares run_after = ProgressBar",
        "Recorder before Metrics: Metrics declares run_after = Recorder",
        "Recorder before Metrics: Recorder writes 'cbstate.history', Metrics reads 'cbstate.history'",
        "Recorder before MetricsPrinter: MetricsPrinter declares run_after = Recorder",
        "Recorder before MetricsPrinter: Recorder writes 'cbstate.history', MetricsPrinter reads 'cbstate.history'",
        "Recorder before ProgressBar: Recorder writes 'cbstate.history', ProgressBar reads 'cbstate'",
    ]


def test_a_hook_without_declarations_runs_last() -> None:
    class Zealous(Member): ...

    assert order(CustomCallback(print, StepEnd), Zealous(), Zealous(writes=("step.loss",), name="writer")) == [
        "Zealous",
        "writer",
        "CustomCallback",
    ]


def test_a_wrapper_passes_on_access_and_order() -> None:
    wrapped = throttle(A(reads=("step.loss",), run_after=(C,)), StepEnd, freq=2)
    assert edges(wrapped, B(writes=("step.loss",)), C()) == [
        "B before A: B writes 'step.loss', A reads 'step.loss'",
        "C before A: A declares run_after = C",
    ]


def test_run_after_finds_a_wrapped_callback() -> None:
    wrapped = ConditionalCallback(throttle(B(), StepEnd, freq=2), lambda event, phase: True)
    assert edges(A(run_after=(B,)), wrapped) == ["B before A: A declares run_after = B"]


# Write/write


def test_two_writers_of_one_path_are_a_conflict_that_names_both_and_says_what_to_type() -> None:
    with pytest.raises(CallbackConflictError) as caught:
        build(A(writes=("step.loss",)), B(writes=("step",)))
    message = str(caught.value)
    assert "A writes 'step.loss' and B writes 'step', and nothing says which goes first" in message
    assert "run_after = (A,)   # in B" in message
    assert "@resolve_conflict.register(A, B)" in message
    assert "return RunFirst(a)" in message
    assert "NoConflict()" in message
    assert "Unresolvable()" in message


def test_the_conflict_is_told_the_same_for_any_order_of_the_list() -> None:
    told = set()
    for callbacks in itertools.permutations([A(writes=("step.loss",)), B(writes=("step",)), C(writes=("step.xs",))]):
        with pytest.raises(CallbackConflictError) as caught:
            build(*callbacks)
        told.add(str(caught.value))
    assert len(told) == 1


def test_what_the_conflict_says_to_type_first_ends_it() -> None:
    assert order(A(writes=("step.loss",)), B(writes=("step",), run_after=(A,))) == ["A", "B"]


def test_what_the_conflict_says_to_type_for_the_pair_ends_it() -> None:
    one, two = fresh("One", "Two", writes=("step.loss",))
    with pytest.raises(CallbackConflictError) as caught:
        build(*[declared_by(one), declared_by(two)])
    _, decorator, code = str(caught.value).partition("@resolve_conflict.register(")
    exec(textwrap.dedent(f"    {decorator}{code}"), {**vars(fluxloop), "One": one, "Two": two})
    assert order(declared_by(two), declared_by(one)) == ["One", "Two"]


def declared_by(cls: type[Member]) -> Member:
    """Make a callback of a class with its class's own declarations."""
    callback = cls.__new__(cls)
    callback.name = None
    return callback


def test_the_conflict_of_two_instances_of_one_class_says_something_that_works() -> None:
    (counter,) = fresh("Counter", writes=("cbstate.count",))

    def pair() -> list[Callback]:
        one, two = declared_by(counter), declared_by(counter)
        one.name, two.name = "one", "two"
        return [one, two]

    with pytest.raises(CallbackConflictError, match=r"one writes 'cbstate.count' and two writes") as caught:
        build(*pair())
    message = str(caught.value)
    if "run_after = (Counter,)" in message:  # what it says to type in the class
        counter.run_after = (counter,)
        build(*pair())
        counter.run_after = ()
    said, decorator, code = message.partition("@resolve_conflict.register(")
    assert said
    if decorator:  # what it says to type for the pair
        typed = textwrap.dedent(f"    {decorator}{code}")
        exec(typed, {**vars(fluxloop), "Counter": counter})
        assert sorted(order(*pair())) == ["one", "two"]


@pytest.mark.parametrize("later", ["A", "B"])
def test_run_after_in_either_direction_resolves_a_conflict(later: str) -> None:
    callbacks = [
        kind(writes=("step.loss",), run_after=(other,) if kind.__name__ == later else ())
        for kind, other in ((A, B), (B, A))
    ]
    assert order(*callbacks) == [*({"A", "B"} - {later}), later]


@pytest.mark.parametrize("reverse", [False, True])
def test_an_order_through_other_callbacks_resolves_a_conflict(reverse: bool) -> None:
    """FluxTraining lets a direct edge alone suppress the conflict."""
    callbacks = [A(writes=("step.loss",)), C(run_after=(A,)), D(run_after=(C,)), B(writes=("step",), run_after=(D,))]
    assert order(*(reversed(callbacks) if reverse else callbacks)) == ["A", "C", "D", "B"]


def test_an_order_that_follows_from_another_path_resolves_a_conflict() -> None:
    callbacks = [
        A(writes=("step.loss",), reads=("step.mark",)),
        C(writes=("step.mark",), reads=("step.seen",)),
        B(writes=("step.loss", "step.seen")),
    ]
    assert order(*callbacks) == ["B", "C", "A"]


def test_two_writers_that_also_read_what_they_write_make_no_cycle() -> None:
    callbacks = [A(reads=("step.loss",), writes=("step.loss",)), B(writes=("step.loss",), run_after=(A,))]
    assert edges(*callbacks) == ["A before B: B declares run_after = A"]


@pytest.mark.parametrize("direction", [(0, 1), (1, 0)])
@pytest.mark.parametrize("first", [0, 1])
def test_run_first_orders_two_writers(direction: tuple[int, int], first: int) -> None:
    """FluxTraining fails there with a MethodError."""
    pair = fresh("One", "Two")

    @resolve_conflict.register(pair[direction[0]], pair[direction[1]])
    def _(a: Callback, b: Callback) -> RunFirst:
        return RunFirst(a if isinstance(a, pair[first]) else b)

    names = ["One", "Two"] if first == 0 else ["Two", "One"]
    for callbacks in ([0, 1], [1, 0]):
        assert order(*(pair[i](writes=("step.loss",)) for i in callbacks)) == names
    assert edges(*(kind(writes=("step.loss",)) for kind in pair)) == [
        f"{names[0]} before {names[1]}: resolve_conflict says RunFirst({names[0]})"
    ]


@pytest.mark.parametrize("direction", [(0, 1), (1, 0)])
def test_run_first_lets_a_reader_run_before_the_writer(direction: tuple[int, int]) -> None:
    pair = fresh("Writes", "Reads")

    @resolve_conflict.register(pair[direction[0]], pair[direction[1]])
    def _(a: Callback, b: Callback) -> RunFirst:
        return RunFirst(a if isinstance(a, pair[1]) else b)

    callbacks = [pair[0](writes=("step.loss",)), pair[1](reads=("step",))]
    assert order(*callbacks) == ["Reads", "Writes"]
    assert edges(*callbacks) == ["Reads before Writes: resolve_conflict says RunFirst(Reads)"]


def test_a_resolution_reaches_wrapped_callbacks() -> None:
    one, two = fresh("One", "Two")
    resolve_conflict.register(one, two)(lambda a, b: RunFirst(b))
    wrapped = [throttle(kind(writes=("step.loss",)), StepEnd, freq=2) for kind in (one, two)]
    assert order(*wrapped) == ["Two", "One"]


def test_no_conflict_leaves_two_writers_in_the_order_of_their_names() -> None:
    one, two = fresh("One", "Two")
    resolve_conflict.register(one, two)(lambda a, b: NoConflict())
    callbacks = [two(writes=("step.loss",)), one(writes=("step.loss",))]
    assert order(*callbacks) == ["One", "Two"]
    assert edges(*callbacks) == []


def test_no_conflict_leaves_a_writer_and_a_reader_unordered() -> None:
    writes, reads = fresh("Writes", "Reads")
    resolve_conflict.register(writes, reads)(lambda a, b: NoConflict())
    assert order(writes(writes=("step.loss",)), reads(reads=("step",))) == ["Reads", "Writes"]


@pytest.mark.parametrize("reading", [False, True])
def test_unresolvable_is_an_error_that_names_both_and_says_to_remove_one(reading: bool) -> None:
    one, two = fresh("One", "Two")
    resolve_conflict.register(one, two)(lambda a, b: Unresolvable())
    second = two(reads=("step",)) if reading else two(writes=("step",))
    with pytest.raises(CallbackConflictError, match=r"One and Two cannot be used together.*remove one") as caught:
        build(one(writes=("step.loss",)), second)
    assert "'step.loss'" in str(caught.value)
    assert "'step'" in str(caught.value)


def test_unresolvable_says_nothing_about_two_that_touch_nothing_together() -> None:
    one, two = fresh("One", "Two")
    resolve_conflict.register(one, two)(lambda a, b: Unresolvable())
    assert order(one(writes=("step.loss",)), two(writes=("step.xs",))) == ["One", "Two"]


# Cycles


def cycle(*callbacks: Callback) -> list[str]:
    """Give the lines between the first and the last of the message: one per edge."""
    with pytest.raises(CallbackCycleError) as caught:
        build(*callbacks)
    first, *told, last = str(caught.value).splitlines()
    assert "cannot be ordered" in first
    assert "Drop one run_after, or say with resolve_conflict" in last
    return [line.strip() for line in told]


def test_a_callback_after_its_own_type_is_a_cycle_of_one() -> None:
    assert cycle(A(run_after=(A,))) == ["A before A: A declares run_after = A"]


def test_a_cycle_of_two_is_printed_with_both_reasons() -> None:
    assert cycle(A(run_after=(B,)), B(run_after=(A,))) == [
        "A before B: B declares run_after = A",
        "B before A: A declares run_after = B",
    ]


def test_a_cycle_of_three_with_mixed_reasons_is_printed_edge_by_edge() -> None:
    callbacks = [
        A(writes=("step.loss",), run_after=(C,)),
        B(reads=("step.loss",), writes=("step.mark",)),
        C(reads=("step.mark",)),
    ]
    assert cycle(*callbacks) == [
        "A before B: A writes 'step.loss', B reads 'step.loss'",
        "B before C: B writes 'step.mark', C reads 'step.mark'",
        "C before A: A declares run_after = C",
    ]


def test_a_cycle_with_a_resolution_says_so() -> None:
    one, two = fresh("One", "Two")
    resolve_conflict.register(one, two)(lambda a, b: RunFirst(a))
    assert cycle(one(writes=("step.loss",), run_after=(two,)), two(writes=("step.loss",))) == [
        "One before Two: resolve_conflict says RunFirst(One)",
        "Two before One: One declares run_after = Two",
    ]


@pytest.mark.parametrize("length", [4, 5])
def test_a_long_cycle_is_printed_whole_and_bystanders_are_left_out(length: int) -> None:
    ring = [kind(run_after=(KINDS[(i - 1) % length],)) for i, kind in enumerate(KINDS[:length])]
    told = cycle(*ring, Recorder(), Metrics(), CustomCallback(print, StepEnd))
    names = LETTERS[:length]
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    assert sorted(told) == sorted(f"{a} before {b}: {b} declares run_after = {a}" for a, b in following.items())
    assert [line.split()[0] for line in told[1:]] == [line.split()[2].rstrip(":") for line in told[:-1]]


def test_of_several_cycles_the_shortest_is_told() -> None:
    callbacks = [A(run_after=(C,)), B(run_after=(A,)), C(run_after=(B,)), D(run_after=(E, C)), E(run_after=(D,))]
    assert cycle(*callbacks) == ["D before E: E declares run_after = D", "E before D: D declares run_after = E"]


def test_what_hangs_on_a_cycle_is_not_told() -> None:
    assert all("C" not in line for line in cycle(A(run_after=(B,)), B(run_after=(A,)), C(run_after=(A,))))


def test_a_cycle_is_found_when_the_learner_is_built_and_when_a_callback_is_added() -> None:
    learner = toy_learner(A(run_after=(B,)))
    with pytest.raises(CallbackCycleError, match="A declares run_after = B"):
        learner.add_callback(B(run_after=(A,)))
    assert learner.callbacks.order == ["A"]


# Producers


@pytest.mark.parametrize(
    ("path", "builtin"),
    [("cbstate.history", "Recorder"), ("cbstate.metrics", "Metrics"), ("cbstate.traces", "Traces")],
)
def test_reading_what_nobody_writes_names_the_built_in_that_provides_it(path: str, builtin: str) -> None:
    with pytest.raises(MissingProducerError, match=rf"A reads '{path}', which no callback writes; add .*{builtin}\(\)"):
        build(A(reads=(path,)))


def test_a_class_of_the_user_s_that_would_do_as_well_does_not_hide_the_built_in() -> None:
    doing_as_well = [type("Mine", (Callback,), {"writes": ("cbstate.history",)}) for _ in range(2)]
    assert len(doing_as_well) == 2
    with pytest.raises(MissingProducerError, match=r"add Recorder\(\) to the callbacks"):
        build(A(reads=("cbstate.history",)))


def test_the_producer_of_what_lies_below_is_named_too() -> None:
    with pytest.raises(MissingProducerError, match=r"A reads 'cbstate\.history\.epochs'.*Recorder\(\)"):
        build(A(reads=("cbstate.history.epochs",)))


def test_an_entry_that_nobody_knows_is_an_error_too() -> None:
    with pytest.raises(MissingProducerError, match=r"'cbstate\.unheard_of'.*add a callback that writes it"):
        build(A(reads=("cbstate.unheard_of",)))


def test_the_metrics_without_a_recorder_are_refused_when_the_learner_is_built() -> None:
    with pytest.raises(MissingProducerError, match=r"Metrics reads 'cbstate\.history'.*Recorder\(\)"):
        build(Metrics())


def test_a_producer_that_is_there_is_enough_in_any_order() -> None:
    assert order(A(reads=("cbstate.mine",)), B(writes=("cbstate.mine",))) == ["B", "A"]
    assert order(A(reads=("cbstate.mine.deep",)), B(writes=("cbstate.mine",))) == ["B", "A"]
    assert order(A(reads=("cbstate",))) == ["A"]
    assert order(A(writes=("cbstate.mine",), reads=("cbstate.mine",))) == ["A"]


def test_a_producer_that_is_needed_cannot_be_removed() -> None:
    learner = toy_learner(Recorder(), Metrics())
    with pytest.raises(MissingProducerError, match="Recorder"):
        learner.remove_callback(Recorder)
    assert learner.callbacks.order == ["Recorder", "Metrics"]


# What is given


def test_the_same_instance_twice_is_an_error_that_says_where() -> None:
    twice = A()
    with pytest.raises(
        DuplicateCallbackError, match=r"the same A was given twice, as callbacks\[0\] and callbacks\[2\]"
    ):
        build(twice, B(), twice)


def test_the_same_instance_wrapped_and_bare_is_the_same_twice() -> None:
    twice = A()
    with pytest.raises(DuplicateCallbackError, match="the same A was given twice"):
        build(throttle(twice, StepEnd, freq=2), twice)


def test_a_class_instead_of_an_instance_is_an_error_that_shows_the_call() -> None:
    with pytest.raises(CallbackTypeError, match=r"callbacks\[1\] is the class Recorder; .*Recorder\(\.\.\.\)"):
        toy_learner(A(), Recorder)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [3, "Recorder", None, int, [A()]])
def test_what_is_no_callback_is_an_error_that_says_what_it_is(wrong: Any) -> None:
    with pytest.raises(CallbackTypeError, match=r"callbacks\[0\] is .*expected a Callback"):
        toy_learner(wrong)


def test_a_function_is_no_callback_and_the_error_shows_how_it_becomes_one() -> None:
    with pytest.raises(CallbackTypeError, match=r"CustomCallback\(function, StepEnd\)"):
        toy_learner(lambda learner: None)  # type: ignore[arg-type]


def test_a_single_callback_instead_of_a_list_is_an_error_that_shows_the_list() -> None:
    with pytest.raises(CallbackTypeError, match=r"callbacks=\[\.\.\.\]"):
        Learner(toy_learner().model, callbacks=Recorder())  # type: ignore[arg-type]


def test_run_after_without_a_tuple_is_an_error_that_names_the_callback() -> None:
    with pytest.raises(CallbackError, match=r"A .*run_after = \(Recorder,\)"):
        build(A(run_after=Recorder))  # type: ignore[arg-type]


def test_run_after_with_something_that_is_no_class_is_an_error_that_names_the_callback() -> None:
    for wrong in ("Recorder", Recorder(), int):
        with pytest.raises(CallbackError, match=r"A .*run_after"):
            build(A(run_after=(wrong,)), Recorder())  # type: ignore[arg-type]


# Names and ids


def test_two_instances_that_nothing_tells_apart_need_names() -> None:
    with pytest.raises(
        DuplicateCallbackError, match=r"two A callbacks cannot be told apart.*A\(\.\.\., name='first'\)"
    ):
        build(A(), A())


def test_named_instances_are_two_nodes_with_their_names_as_ids() -> None:
    assert order(A(name="two"), A(name="one"), A()) == ["A", "one", "two"]


def test_instances_with_different_fields_are_told_apart_by_them() -> None:
    @define
    class Weighted(Callback):
        weight: float = 1.0

    two = build(Weighted(0.5), Weighted(0.25))
    assert two.order == ["Weighted", "Weighted-2"]
    assert [callback.weight for callback in two] == [0.25, 0.5]
    assert [callback.weight for callback in build(Weighted(0.25), Weighted(0.5))] == [0.25, 0.5]


def test_instances_that_differ_only_in_their_address_are_not_told_apart_by_it() -> None:
    @define
    class Holding(Callback):
        thing: Any = None

    with pytest.raises(DuplicateCallbackError, match="cannot be told apart"):
        build(Holding(object()), Holding(object()))


def test_the_same_name_twice_is_told_apart_by_the_class() -> None:
    assert order(A(name="same"), B(name="same")) == ["same", "same-2"]
    assert [type(callback) for callback in build(B(name="same"), A(name="same"))] == [A, B]


def test_two_instances_that_write_one_path_are_ordered_or_refused() -> None:
    with pytest.raises(CallbackConflictError, match=r"one writes 'step.loss' and two writes 'step.loss'"):
        build(A(writes=("step.loss",), name="one"), A(writes=("step.loss",), name="two"))


def test_a_class_and_its_subclass_are_two_callbacks() -> None:
    class Sub(A): ...

    assert order(Sub(), A()) == ["A", "Sub"]


# The canonical order


@pytest.mark.slow
def test_callbacks_without_edges_run_in_the_order_of_class_names_then_names() -> None:
    callbacks = [C(), A(name="z"), B(), A(name="b"), A(), D()]
    for given_order in itertools.permutations(callbacks):
        assert order(*given_order) == ["A", "b", "z", "B", "C", "D"]


def test_who_reads_everything_comes_after_who_does_not() -> None:
    assert order(A(reads=("*",)), B(), C(reads=("step",))) == ["B", "C", "A"]


def test_the_smallest_that_may_run_goes_first() -> None:
    assert order(A(run_after=(D,)), B(), C(), D()) == ["B", "C", "D", "A"]
    assert order(D(), A(), B(run_after=(C,)), C()) == ["A", "C", "B", "D"]


def test_the_digest_changes_with_an_edge_or_a_callback() -> None:
    digests = {
        build(A(), B()).digest,
        build(A()).digest,
        build(A(), B(run_after=(A,))).digest,
        build(A(writes=("step.loss",)), B(reads=("step.loss",))).digest,
        build(A(writes=("step.xs",)), B(reads=("step.xs",))).digest,
        build(A(name="other"), B()).digest,
    }
    assert len(digests) == 6


def test_the_digest_is_the_same_for_callbacks_made_anew() -> None:
    assert build(A(), B(run_after=(A,))).digest == build(B(run_after=(A,)), A()).digest


# Against oracles

STEP_PATHS = ("step", "step.a", "step.a.x", "step.b", "step.ab", "*")
access = st.lists(st.sampled_from(STEP_PATHS[:-1]), max_size=2)
reading = st.lists(st.sampled_from(STEP_PATHS), max_size=2)


@st.composite
def members(draw: Any, size: int = 5) -> list[tuple[type[Member], list[str], list[str], list[type[Member]]]]:
    """Give declarations of a random set of callbacks; run_after mostly points backwards in a random order."""
    kinds = draw(st.permutations(KINDS))[: draw(st.integers(1, size))]
    made = []
    for index, kind in enumerate(kinds):
        earlier = kinds[:index] if draw(st.integers(0, 9)) else kinds
        after = draw(st.lists(st.sampled_from(earlier), max_size=2, unique=True)) if earlier else []
        made.append((kind, draw(reading), draw(access), after))
    return made


def make(declared: Iterable[tuple[type[Member], list[str], list[str], list[type[Member]]]]) -> list[Member]:
    return [kind(tuple(reads), tuple(writes), tuple(after)) for kind, reads, writes, after in declared]


def outcome(callbacks: Sequence[Callback]) -> tuple[Any, ...]:
    try:
        built = build(*callbacks)
    except CallbackError as error:
        return type(error), str(error)
    return built.order, built.digest, built.graph.edges


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(declared=members(), data=st.data())
def test_any_permutation_gives_the_same_order_digest_and_edges_or_the_same_error(
    declared: list[Any], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(declared))
    assert outcome(make(shuffled)) == outcome(make(declared))


def parts(path: str) -> list[str]:
    return [] if path == "*" else path.split(".")


def touch(a: str, b: str) -> bool:
    return all(x == y for x, y in zip(parts(a), parts(b), strict=False))


def oracle_edges(callbacks: Sequence[Member]) -> set[tuple[str, str]]:
    found = set()
    for one, two in itertools.permutations(callbacks, 2):
        if type(one) in two.run_after:
            found.add((type(one).__name__, type(two).__name__))
        for written in one.writes:
            for read in two.reads:
                if touch(written, read) and not any(touch(written, own) for own in two.writes):
                    found.add((type(one).__name__, type(two).__name__))
    return found | {(type(one).__name__,) * 2 for one in callbacks if type(one) in one.run_after}  # type: ignore[misc]


def closure(names: Sequence[str], given_edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    found = set(given_edges)
    for middle in names:
        for a in names:
            for b in names:
                if (a, middle) in found and (middle, b) in found:
                    found.add((a, b))
    return found


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(declared=members())
def test_conflicts_cycles_and_edges_are_those_of_an_oracle(declared: list[Any]) -> None:
    callbacks = make(declared)
    names = [type(callback).__name__ for callback in callbacks]
    wanted = oracle_edges(callbacks)
    reachable = closure(names, wanted)
    clashes = [
        {type(a).__name__, type(b).__name__}
        for a, b in itertools.combinations(callbacks, 2)
        if any(touch(p, q) for p in a.writes for q in b.writes)
    ]
    undecided = [pair for pair in clashes if not any((a, b) in reachable for a, b in itertools.permutations(pair))]
    if any((name, name) in reachable for name in names):
        with pytest.raises(CallbackCycleError) as cyclic:
            build(*callbacks)
        assert_is_cycle(str(cyclic.value), wanted)
    elif undecided:
        with pytest.raises(CallbackConflictError) as conflict:
            build(*callbacks)
        named = re.match(r"(\w) writes '(.*)' and (\w) writes '(.*)', and", str(conflict.value))
        assert named is not None
        assert {named[1], named[3]} in undecided
        assert touch(named[2], named[4])
    else:
        graph = build(*callbacks).graph
        assert {(edge.before, edge.after) for edge in graph.edges} == wanted
        assert all(graph.reaches(a, b) == ((a, b) in reachable) for a, b in itertools.permutations(names, 2))


def assert_is_cycle(message: str, wanted: set[tuple[str, str]]) -> None:
    told = [(line.split()[0], line.split()[2].rstrip(":")) for line in message.splitlines()[1:-1]]
    assert set(told) <= wanted
    assert [after for _, after in told] == [before for before, _ in told[1:]] + [told[0][0]]
    assert len({before for before, _ in told}) == len(told)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(1, 5))
def test_the_order_respects_every_edge_and_is_the_smallest_that_does(data: st.DataObject, size: int) -> None:
    """The oracle tries every permutation: of those that respect run_after, the smallest by key is the order."""
    hidden = data.draw(st.permutations(KINDS[:size]))
    callbacks = []
    for index, kind in enumerate(hidden):
        after = data.draw(st.lists(st.sampled_from(hidden[:index]), unique=True)) if index else []
        everything = data.draw(st.booleans())
        callbacks.append(kind(("*",) if everything else (), (), tuple(after)))
    pairs = {(type(c).__name__, before.__name__) for c in callbacks for before in c.run_after}
    key = {type(c).__name__: (bool(c.reads), type(c).__name__) for c in callbacks}
    possible = [
        list(names)
        for names in itertools.permutations(key)
        if all(names.index(before) < names.index(after) for after, before in pairs)
    ]
    expected = min(possible, key=lambda names: [key[name] for name in names])
    assert order(*data.draw(st.permutations(callbacks))) == expected


# When errors are found, and how often callbacks are sorted


def counting(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[Any]:
    """Count the calls of a method."""
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(owner, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_the_callbacks_are_sorted_once_and_never_during_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """FluxTraining sorts the graph at every event."""
    graphs = counting(monkeypatch, CallbackGraph, "__init__")
    learner = toy_learner(EventRecorder(), Recorder(), Metrics())
    built = len(graphs)
    learner.fit(3)
    assert len(graphs) == built
    assert built <= 2  # one that is empty, one that is proved


def test_a_cycle_is_an_error_at_construction_not_at_the_first_event() -> None:
    with pytest.raises(CallbackCycleError, match="A before B: B declares run_after = A"):
        toy_learner(A(run_after=(B,)), B(run_after=(A,)))


def test_a_missing_producer_is_an_error_at_construction_not_at_the_first_event() -> None:
    with pytest.raises(MissingProducerError, match=r"add .*Recorder"):
        toy_learner(MetricsPrinter(), Metrics())


def test_declarations_on_one_branch_are_merged_deeply_over_callbacks_and_within_one() -> None:
    one, two = A(writes=("cbstate.rates.a",)), B(writes=("cbstate.rates.b",))
    reader = C(reads=("cbstate.rates.a", "cbstate.rates.b"))
    assert order(reader, two, one) == ["A", "B", "C"]
    assert edges(reader, two, one) == [
        "A before C: A writes 'cbstate.rates.a', C reads 'cbstate.rates.a'",
        "B before C: B writes 'cbstate.rates.b', C reads 'cbstate.rates.b'",
    ]


def test_reading_a_container_does_not_let_one_change_it() -> None:
    def spoil(learner: Any) -> None:
        learner.cbstate.history[TrainingPhase].epochs = 99

    spoiler = CustomCallback(spoil, StepEnd, reads=("cbstate.history",), name="spoiler")
    learner = toy_learner(Recorder(), spoiler, num_batches=1)
    with pytest.raises(StateAccessError, match=r"spoiler tried to write 'cbstate.history"):
        learner.fit(1)
    assert learner.cbstate.history[TrainingPhase] == Counts(epochs=0, steps=1, steps_epoch=1, updates={None: 1})


def test_a_callback_that_is_set_or_put_in_place_of_another_is_initialised() -> None:
    class Publish(Callback):
        writes = ("cbstate.published",)

        def init(self, learner: Any) -> None:
            learner.cbstate.published = self.name

    learner = toy_learner()
    learner.set_callbacks([Publish(name="set")])
    assert learner.cbstate.published == "set"
    learner.replace_callback(Publish(name="replaced"))
    assert learner.cbstate.published == "replaced"
    learner.remove_callback(Publish)
    learner.add_callback(Publish(name="added"))
    assert learner.cbstate.published == "added"


def test_several_of_one_built_in_may_be_used_when_named() -> None:
    """They take a name to be told apart, so there is a way to use two."""
    traces = [Traces({name: lambda learner: learner.num_batches}, reads=("num_batches",), name=name) for name in "ab"]
    learner = toy_learner(*traces, num_batches=2)
    learner.fit(1, phases=[TrainingPhase()])
    assert learner.cbstate.traces[TrainingPhase] == {"a": [(1, 2), (2, 2)], "b": [(1, 2), (2, 2)]}


def test_two_that_read_everything_and_publish_something_are_a_cycle_that_says_so() -> None:
    told = cycle(A(reads=("*",), writes=("cbstate.a",)), B(reads=("*",), writes=("cbstate.b",)))
    assert told == [
        "A before B: A writes 'cbstate.a', B reads '*'",
        "B before A: B writes 'cbstate.b', A reads '*'",
    ]


def test_unsafe_callbacks_conflict_as_others_do() -> None:
    class Raw(UnsafeCallback):
        writes = ("step.loss",)

    with pytest.raises(CallbackConflictError, match=r"A writes 'step' and Raw writes 'step.loss'"):
        build(Raw(), A(writes=("step",)))


def test_the_order_is_that_in_which_handlers_are_called() -> None:
    called: list[str] = []

    def note(name: str, reads: Sequence[str]) -> CustomCallback:
        return CustomCallback(lambda learner: called.append(name), StepBegin, reads=reads, name=name)

    learner = toy_learner(note("a", ("*",)), note("c", ()), note("b", ("step",)), num_batches=1)
    learner.epoch(TrainingPhase())
    assert called == learner.callbacks.order == ["b", "c", "a"]


def test_every_writer_of_the_step_is_seen_by_the_later_one() -> None:
    class First(Callback):
        writes = ("step.marks",)

        @on(StepBegin)
        def start(self, event: Any, phase: Any, learner: Any) -> None:
            learner.step.marks = ["first"]

    class Second(Callback):
        writes = ("step.marks",)
        run_after = (First,)

        @on(StepBegin)
        def follow(self, event: Any, phase: Any, learner: Any) -> None:
            learner.step.marks.append("second")

    learner = toy_learner(Second(), First(), num_batches=1)
    learner.epoch(TrainingPhase())
    assert learner.step.marks == ["first", "second"]


def test_a_silent_bar_garbage_collection_and_nan_stop_need_nobody() -> None:
    assert order(StopOnNaNLoss(), GarbageCollect(), ProgressBar(enabled=False)) == [
        "GarbageCollect",
        "ProgressBar",
        "StopOnNaNLoss",
    ]
    assert isinstance(toy_learner(Recorder()).cbstate.history, PhaseDict)


def test_a_reader_of_the_history_runs_after_who_fills_it() -> None:
    learner = toy_learner(Recorder(), Metrics(), A(reads=("history",)))
    assert_order(learner, Recorder, A)
    assert_order(learner, Metrics, A)


def test_writers_of_the_parameters_and_of_the_model_conflict() -> None:
    with pytest.raises(CallbackConflictError, match=r"A writes 'params' and B writes 'model'"):
        build(A(writes=("params",)), B(writes=("model",)))
    assert order(A(run_after=(B,), writes=("params",)), B(writes=("model",))) == ["B", "A"]


def test_a_reader_of_the_batch_size_runs_after_a_writer_of_the_step() -> None:
    assert order(A(reads=("batch_size",)), B(writes=("step",))) == ["B", "A"]
    assert order(A(reads=("batch_size",)), B(writes=("step.xs",))) == ["B", "A"]


# Views of weights


def test_a_view_of_weights_that_nobody_keeps_says_what_keeps_it() -> None:
    with pytest.raises(MissingProducerError, match=r"A reads 'model@ema', which no callback writes; .*EMA\('model', "):
        build(A(reads=("model@ema",)))
    with pytest.raises(MissingProducerError, match=r"A reads 'model\.G\.0@ema', .*EMA\('G\.0', 0\.999\)"):
        build(A(reads=("model.G.0@ema",)))
    with pytest.raises(MissingProducerError, match="A reads 'model@ema'"):
        build(A(reads=("model@ema",)), B(writes=("model",)), C(writes=("model@slow",)))


def test_the_callback_to_add_keeps_the_view_that_is_missing() -> None:
    with pytest.raises(MissingProducerError, match=r"EMA\('model', 0\.999, view='slow'\)"):
        build(A(reads=("model@slow",)), B(writes=("model@ema",)))


def test_who_keeps_a_view_of_weights_runs_before_its_readers_and_the_edge_says_why() -> None:
    callbacks = [A(reads=("model.G@ema",)), B(writes=("model@ema",)), C(reads=("model@ema",)), D(reads=("model",))]
    assert edges(*callbacks) == [
        "B before A: B writes 'model@ema', A reads 'model.G@ema'",
        "B before C: B writes 'model@ema', C reads 'model@ema'",
    ]
    assert order(*callbacks) == ["B", "A", "C", "D"]


def test_live_weights_and_their_views_do_not_touch_each_other() -> None:
    assert edges(A(reads=("model", "params")), B(writes=("model@ema",)), C(writes=("model.G@slow",))) == []
    assert edges(A(writes=("model",)), B(writes=("model@ema",))) == []


def test_two_who_keep_one_view_conflict_unless_they_keep_it_of_different_weights() -> None:
    with pytest.raises(CallbackConflictError, match=r"A writes 'model@ema' and B writes 'model\.G@ema'"):
        build(A(writes=("model@ema",)), B(writes=("model.G@ema",)))
    assert edges(A(writes=("model.G@ema",)), B(writes=("model.D@ema",)), C(writes=("model.G@slow",))) == []


def test_who_reads_everything_runs_after_who_keeps_a_view() -> None:
    assert edges(A(reads=("*",)), B(writes=("model.G@ema",))) == ["B before A: B writes 'model.G@ema', A reads '*'"]


def test_writers_of_a_view_are_found_by_its_path_alone() -> None:
    callbacks = build(A(writes=("model.G@ema",)), B(writes=("model.G",)))
    assert callbacks.writers("model.G@ema") == callbacks.writers("model.G.0@ema") == ["A"]
    assert callbacks.writers("model.G") == ["B"]
    assert callbacks.writers("model@ema") == callbacks.writers("model.D") == []  # only a part of it
    assert "A writes 'model.G@ema'" in callbacks.explain("model.G@ema")
    assert "B writes" not in callbacks.explain("model.G@ema")
    assert "the optimizer" not in callbacks.explain("model@ema")


# Callbacks that read everything


def halve(learner: Any) -> None:
    learner.step.xs = learner.step.xs / 2


def test_a_quick_hook_that_writes_an_entry_runs_before_those_that_read_it() -> None:
    hook = CustomCallback(halve, StepBegin, TrainingPhase, writes=("step.xs",))
    learner = toy_learner(hook, Traces({"xs": lambda learner: learner.step.xs.mean()}), default_callbacks=True)
    order = learner.callbacks.order
    assert order.index("Recorder") < order.index("CustomCallback") < order.index("Metrics") < order.index("Traces")
    learner.fit(1)


def test_two_quick_hooks_that_write_different_entries_have_an_order_whatever_the_list() -> None:
    def hooks() -> list[Callback]:
        first = CustomCallback(halve, StepBegin, writes=("step.xs",), name="first")
        return [first, CustomCallback(lambda learner: None, StepBegin, writes=("step.ys",), name="second")]

    orders = {tuple(toy_learner(*given).callbacks.order) for given in (hooks(), hooks()[::-1])}
    assert len(orders) == 1


def test_a_quick_hook_that_writes_still_runs_after_whoever_it_reads_from() -> None:
    hook = CustomCallback(lambda learner: None, EpochEnd, writes=("cbstate.mine",))
    order = toy_learner(hook, default_callbacks=True).callbacks.order
    assert order.index("CustomCallback") > order.index("Metrics")


def test_advice_for_a_conflict_names_the_users_own_class() -> None:
    class Mine(Callback):
        writes = ("step.grads",)

        @on(BackwardEnd)
        def scale(self, event: Any, phase: Any, learner: Any) -> None: ...

    class Alpha(Mine):  # before GradientClip in the order of names
        pass

    for own in (Mine, Alpha):
        with pytest.raises(CallbackConflictError) as caught:
            toy_learner(own(), GradientClip(1.0))
        assert f"run_after = (GradientClip,)   # in {own.__name__}" in str(caught.value)


def test_a_users_own_class_that_writes_what_is_missing_is_named() -> None:
    class WritesThings(Callback):
        writes = ("cbstate.things",)

    with pytest.raises(
        MissingProducerError, match=r"A reads 'cbstate\.things', which no callback writes; add .*WritesThings"
    ):
        build(A(reads=("cbstate.things",)))
    assert order(A(reads=("cbstate.things",)), WritesThings()) == ["WritesThings", "A"]
