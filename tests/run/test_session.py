from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fluxloop import (
    CycleEnd,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    Metrics,
    Phase,
    Recorder,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    ValidationPhase,
    find_lr,
    mae,
    on,
)
from fluxloop.run.session import NAMES, Session
from fluxloop.testing import assert_same_bits, bits, toy_learner


class Do(UnsafeCallback):
    """Does something with the learner itself, once, the second time that an event is fired."""

    reads = ("*",)
    draws = False

    def __init__(self, event: type[Event], phase: type[Phase], then: Callable[[Learner], object]) -> None:
        super().__init__()
        self.event, self.phase, self.then, self.count = event, phase, then, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Do:
        return Do(self.event, self.phase, lambda learner: None)

    @on(Event)
    def hear(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event) and isinstance(phase, self.phase):
            self.count += 1
            if self.count == (1 if self.event in (FitBegin, FitEnd) else 2):
                self.then(learner)


class Counting(ValidationPhase):
    """A validation phase with a state of its own."""

    def __init__(self) -> None:
        self.seen = 0

    def entries(self, batch: Any) -> dict[str, Any]:
        self.seen += 1
        return super().entries(batch)


class Nested(ValidationPhase):
    """Evaluates and predicts inside of each of its steps."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        inner = learner.evaluate(metrics=[mae])
        assert inner == learner.evaluate(metrics=[mae])
        assert learner.predict(state.xs).shape == state.xs.shape
        super().body(learner, handle, state)


class BrokenError(Exception):
    """Raised by a model."""


class Breaking(ValidationPhase):
    """Fails in its second step."""

    def __init__(self) -> None:
        self.seen = 0

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        self.seen += 1
        if self.seen == 2:
            raise BrokenError
        super().body(learner, handle, state)


def fail(learner: Learner) -> None:
    with pytest.raises(BrokenError):
        learner.evaluate(phase=Breaking())


def learner_with(*callbacks: Any) -> Learner:
    return toy_learner(Recorder(), Metrics(mae), *callbacks, num_batches=3, optimizer=torch.optim.Adam)


def everything(learner: Learner) -> dict[str, Any]:
    """Return what of a learner a run beside it must leave as it was: which objects it holds, and what is in them."""
    found: dict[str, Any] = {name: id(value) for name, value in vars(learner).items() if name not in NAMES}
    found |= {f"session {name}": vars(learner)[name] for name in NAMES}
    found |= {f"running {name}": getattr(learner._running, name) for name in ("fitting", "phase", "stop_requested")}
    found["safe points"] = list(learner._running.safe_points)
    found["phases"] = dict(learner.phases)
    found["kept phases"] = [watched.thing for watched in learner._ledger.phases]
    found["waiting"] = {key: len(states) for key, states in learner._ledger.waiting.items()}
    found["begun data"] = set(learner._ledger.begun_data)
    found["entries"] = dict(vars(learner.step))
    found["rows"] = learner.history.rows()
    found["positions"] = learner.streams.positions()
    found["updates"] = (learner.updates.count, id(learner.updates.block), learner.updates.findings)
    found["gradients"] = [id(parameter.grad) for parameter in learner.updates.names]
    found["modes"] = [module.training for module in learner.model.modules()]
    found["bits"] = {name: tensor.tolist() for name, tensor in bits(learner).items()}
    return found


BESIDE: dict[str, Callable[[Learner], object]] = {
    "evaluate": lambda learner: learner.evaluate(),
    "evaluate on other data": lambda learner: learner.evaluate(learner.data.training, metrics=[mae]),
    "evaluate a phase with a state": lambda learner: learner.evaluate(phase=Counting()),
    "evaluate inside evaluate": lambda learner: learner.evaluate(phase=Nested()),
    "evaluate and fail": fail,
    "predict": lambda learner: learner.predict(torch.ones(5, 1)),
    "check": lambda learner: learner.check(),
    "check a phase": lambda learner: learner.check(phases=[TrainingPhase(), Counting()]),
    "summary": lambda learner: learner.summary(),
    "copy": copy.deepcopy,
}


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("name", [*BESIDE, "find_lr"])
def test_a_run_beside_a_learner_leaves_everything_in_it_as_it_was(name: str, epochs: int) -> None:
    learner, plain = learner_with(), learner_with()
    run = BESIDE.get(name, lambda learner: find_lr(learner, steps=10))
    for each in (learner, plain):
        each.fit(epochs)
    before = everything(learner)
    run(learner)
    assert everything(learner) == before
    for each in (learner, plain):
        each.fit(1)
    assert_same_bits(learner, plain)
    assert learner.history.rows() == plain.history.rows()


MOMENTS = [
    (FitBegin, Phase),
    (EpochBegin, TrainingPhase),
    (StepBegin, TrainingPhase),
    (UpdateBegin, TrainingPhase),
    (StepEnd, TrainingPhase),
    (StepEnd, ValidationPhase),
    (EpochEnd, TrainingPhase),
    (CycleEnd, Phase),
    (FitEnd, Phase),
]


@pytest.mark.slow(quick=5)
@pytest.mark.parametrize(("event", "phase"), MOMENTS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("name", BESIDE)
def test_a_run_beside_a_fit_leaves_everything_in_it_as_it_was(
    name: str, event: type[Event], phase: type[Phase]
) -> None:
    same: list[bool] = []

    def run(learner: Learner) -> None:
        before = everything(learner)
        BESIDE[name](learner)
        same.append(everything(learner) == before)

    watched, plain = learner_with(Do(event, phase, run)), learner_with()
    for learner in (watched, plain):
        learner.fit(2)
    assert same == [True]
    assert_same_bits(watched, plain)
    assert watched.history.rows() == plain.history.rows()


def test_a_stop_that_is_requested_in_an_evaluation_ends_the_fit_around_it() -> None:
    class Stops(ValidationPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            super().body(learner, handle, state)
            learner.request_stop("seen enough")

    learner = learner_with(Do(EpochEnd, TrainingPhase, lambda learner: learner.evaluate(phase=Stops())))
    assert learner.fit(5).stop_reason == "seen enough"
    assert learner.history[TrainingPhase].epochs == 2


def test_an_instance_that_was_only_evaluated_takes_no_place_in_checkpoints() -> None:
    learner, trained = learner_with(), Counting()
    learner.fit(2, phases=[TrainingPhase(), trained])
    kept = learner.state_dict()["phases"]
    assert trained.seen > 0
    learner.evaluate(phase=Counting())
    assert learner.state_dict()["phases"] == kept
    assert [state for states in kept.values() for state in states] == [{"seen": trained.seen}]


def test_a_loaded_state_waits_for_the_instance_of_the_fit_although_another_is_evaluated_first() -> None:
    first, trained = learner_with(), Counting()
    first.fit(1, phases=[TrainingPhase(), trained])
    second, other = learner_with(), Counting()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.evaluate(phase=Counting())
    second.fit(0, phases=[TrainingPhase(), other])
    assert other.seen == trained.seen > 0


def test_a_sweep_calls_no_function_that_waits_for_the_safe_points_of_the_next_fit() -> None:
    learner, calls = learner_with(), 0

    def count() -> None:
        nonlocal calls
        calls += 1

    learner.at_safe_point(count)
    find_lr(learner, steps=10)
    assert calls == 0
    learner.fit(1)
    assert calls > 0


AT_REST = [each for each in MOMENTS if each[0] is not UpdateBegin]  # a fit drops gradients that wait, and warns


@pytest.mark.parametrize(("event", "phase"), AT_REST, ids=lambda cls: cls.__name__)
def test_in_a_copy_nothing_is_running_also_where_a_fit_of_the_original_is(
    event: type[Event], phase: type[Phase]
) -> None:
    copies: list[Learner] = []
    learner, calls = learner_with(Do(event, phase, lambda learner: copies.append(copy.deepcopy(learner)))), 0

    def count() -> None:
        nonlocal calls
        calls += 1

    learner.at_safe_point(count)
    learner.fit(2)
    passed, (copied,) = calls, copies
    assert (copied.scope, copied.num_batches, copied.num_epochs, copied.fit_phases) == (None, None, None, ())
    assert copied.cycle is None
    before = bits(learner)
    copied.fit(1)  # which would say that it is fitting
    copied.data = ([(torch.ones(2, 1), torch.ones(2, 1))],)
    assert calls == passed
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())


def test_a_copy_of_a_learner_whose_loader_has_workers_under_way_trains_as_one_made_at_rest() -> None:
    xs = torch.randn(12, 1)
    rows = torch.utils.data.TensorDataset(xs, 2 * xs)
    copies: list[Learner] = []
    loader = torch.utils.data.DataLoader(rows, batch_size=4, num_workers=1)
    learner = Learner(
        nn.Linear(1, 1),
        nn.functional.mse_loss,
        data=(loader,),
        callbacks=[Do(StepEnd, TrainingPhase, lambda learner: copies.append(copy.deepcopy(learner)))],
        default_callbacks=False,
        seed=1,
    )
    learner.fit(1)
    (copied,) = copies
    copied.fit(1)
    assert copied.trained_steps == learner.trained_steps


def test_whatever_a_learner_has_is_of_its_session_or_stays_the_same_in_a_run() -> None:
    learner = learner_with()
    found: dict[str, Any] = {}
    before = dict(vars(learner))  # the objects, whose ids would be free for others otherwise

    def look(learner: Learner) -> None:
        found.update(vars(learner))

    learner.add_callback(Do(StepEnd, TrainingPhase, look))
    learner.fit(1)
    changed = {name for name in found if found[name] is not before.get(name)}
    assert {"scope", "step", "num_batches", "fit_phases", "num_epochs"} <= changed <= set(NAMES)


def test_a_session_of_a_learner_holds_what_that_has() -> None:
    learner = learner_with()
    session = Session.of(learner)
    assert all(getattr(session, name) is vars(learner)[name] for name in NAMES)
    other = Session.begin(learner, "evaluate")
    assert other.streams.prefix == "evaluate/"
    assert other.history is not learner.history
    other.put_into(learner)
    assert learner.history is other.history
    session.put_into(learner)
    assert learner.history is session.history
