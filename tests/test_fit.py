from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fluxloop import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    BackwardBegin,
    BackwardEnd,
    BatchError,
    Callback,
    CancelEpochException,
    CancelFittingException,
    CycleEnd,
    DataError,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LossBegin,
    LossError,
    Metric,
    Metrics,
    Phase,
    PhaseError,
    PredictionPhase,
    Recorder,
    ReentrantFitError,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    mae,
    mse,
    on,
    rmse,
    runstep,
)
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner


class BrokenError(Exception):
    pass


class Do(UnsafeCallback):
    """Call a function of the learner at an event."""

    def __init__(self, action: Any, event: type[Event], phase: type[Phase] = Phase) -> None:
        super().__init__()
        self.action, self.event, self.phase = action, event, phase

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: Learner) -> None:
        if isinstance(event, self.event) and isinstance(phase, self.phase):
            self.action(learner)


class RaiseOnce(Callback):
    draws = False

    def __init__(self, error: BaseException, event: type[Event]) -> None:
        super().__init__()
        self.error: BaseException | None = error
        self.event = event

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event) and self.error is not None:
            error, self.error = self.error, None
            raise error


def noisy_learner(*callbacks: Callback, rows: int = 22, default_callbacks: bool = False, **options: Any) -> Learner:
    """A learner in which everything is random that can be: order, dropout, batch statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
    xs = torch.randn(rows, 3)
    data = TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=4, shuffle=True)
    options = {"data": (data, data), "optimizer": partial(torch.optim.Adam, lr=0.01), "seed": 3, **options}
    return Learner(model, nn.functional.mse_loss, callbacks=callbacks, default_callbacks=default_callbacks, **options)


# How long


@pytest.mark.parametrize("epochs", [2, np.int64(2), np.uint8(2), torch.tensor(2)], ids=lambda n: type(n).__name__)
def test_whole_numbers_of_any_kind_are_numbers_of_epochs(epochs):
    learner = toy_learner(Recorder(), num_batches=1)
    history = learner.fit(epochs)
    assert history is learner.history
    assert (history[TrainingPhase].epochs, history[ValidationPhase].epochs, history.cycles) == (2, 2, 2)


@pytest.mark.parametrize("epochs", [-1, 1.5, 2.0, True, False, "3", None, [1], np.float32(2)], ids=repr)
def test_anything_else_is_refused_with_what_was_given_and_what_to_type(epochs):
    recorder = EventRecorder()
    learner = toy_learner(recorder)
    with pytest.raises(ValueError, match=r"was asked for; expected a number of epochs, 0 or more, e\.g\. fit\(10\)"):
        learner.fit(epochs)
    assert recorder.events == []


def test_the_refusal_shows_the_number():
    with pytest.raises(ValueError, match=r"fit\(-1\) was asked for"):
        toy_learner().fit(-1)
    with pytest.raises(ValueError, match=r"fit\('3'\) was asked for"):
        toy_learner().fit("3")


def test_a_fit_of_no_epochs_fires_the_events_of_the_fit_alone():
    recorder = EventRecorder()
    learner = toy_learner(recorder)
    before = learner.model.value.item()
    assert learner.fit(0) is learner.history
    assert recorder.trace == [("FitBegin", "FittingPhase"), ("FitEnd", "FittingPhase")]
    assert learner.model.value.item() == before
    assert learner.history.cycles == 0


@pytest.mark.parametrize("parts", [(1, 2), (2, 1), (1, 1, 1), (0, 3)])
def test_repeated_fits_are_one_longer_fit_to_the_bit(parts):
    whole, several = noisy_learner(Recorder(), Metrics(mae)), noisy_learner(Recorder(), Metrics(mae))
    whole.fit(3)
    for epochs in parts:
        several.fit(epochs)
    assert_same_bits(whole, several)
    assert several.history.rows() == whole.history.rows()
    assert several.history[TrainingPhase] == whole.history[TrainingPhase]
    assert whole.history[TrainingPhase].steps == 18
    assert several.history.cycles == 3


def test_repeated_fits_with_a_shuffling_data_loader_are_one_longer_fit_to_the_bit():
    def make() -> Learner:
        xs = torch.linspace(-1, 1, 24).reshape(8, 3)
        loader = DataLoader(TensorDataset(xs, xs.sum(1, keepdim=True)), batch_size=3, shuffle=True)
        return noisy_learner(data=(loader,))

    whole, several = make(), make()
    whole.fit(3)
    several.fit(1)
    several.fit(2)
    assert_same_bits(whole, several)


# On which data


def rows(count: int = 20) -> tuple[Tensor, Tensor]:
    xs = torch.linspace(1, 2, count).reshape(count, 1)
    return xs, 3 * xs


class Batches:
    """An iterable of batches without a length."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*rows(), strict=True)


def unshuffled() -> dict[str, Any]:
    xs, ys = rows()
    batches = list(zip(xs.split(8), ys.split(8), strict=True))
    return {
        "one-element tuple (D-FT-12)": (batches,),
        "mapping": {"training": batches},
        "list of batches": batches,
        "tensor batches": TensorBatches(xs, ys, batch_size=8),
        "loader": DataLoader(TensorDataset(xs, ys), batch_size=8),
        "iterable dataset's loader": DataLoader(Stream(), batch_size=8),
        "unsized iterable": Batches(*batches),
        "batches as lists": [list(batch) for batch in batches],
    }


@pytest.mark.parametrize("place", ["learner", "fit"])
@pytest.mark.parametrize("form", unshuffled())
def test_every_form_of_data_trains_as_a_hand_written_loop(form, place):
    data = unshuffled()[form]
    learner = toy_learner(data=data) if place == "learner" else toy_learner(data=())
    learner.fit(2, None if place == "learner" else data)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.001)
    xs, ys = rows()
    for _ in range(2):
        for x, y in zip(xs.split(8), ys.split(8), strict=True):
            optimizer.zero_grad()
            nn.functional.l1_loss(x * weight, y).backward()
            optimizer.step()
    assert torch.equal(learner.model.value, weight)


@pytest.mark.parametrize("place", ["learner", "fit"])
@pytest.mark.parametrize("kind", ["tensors", "arrays", "dataset"])
def test_what_holds_rows_is_shuffled_for_training_and_kept_in_order_for_validation(kind, place):
    xs, ys = rows(70)
    held = {
        "tensors": (xs, ys),
        "arrays": (xs.numpy(), ys.numpy()),
        "dataset": TensorDataset(xs, ys),
    }[kind]
    seen: dict[str, list[Tensor]] = {"TrainingPhase()": [], "ValidationPhase()": []}

    class Look(UnsafeCallback):
        @on(StepBegin)
        def look(self, event: StepBegin, phase: Phase, learner: Learner) -> None:
            seen[repr(phase)].append(learner.step.xs)

    data = (held, held)
    learner = toy_learner(Look(), data=data if place == "learner" else ())
    learner.fit(2, None if place == "learner" else data)
    assert [len(batch) for batch in seen["TrainingPhase()"]] == [32, 32, 6] * 2
    first, second = (torch.cat(seen["TrainingPhase()"][i : i + 3]) for i in (0, 3))
    assert torch.equal(first.sort(dim=0).values, xs)
    assert not torch.equal(first, xs)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat(seen["ValidationPhase()"][:3]), xs)


def test_data_given_to_fit_is_used_instead_of_the_learners_and_not_kept():
    learner = toy_learner(Recorder(), num_batches=16)
    kept = learner.data
    xs, ys = rows(4)
    learner.fit(1, ([(xs, ys)],))
    assert learner.history[TrainingPhase].steps == 1
    assert learner.history[ValidationPhase].epochs == 0, "no validation data was given"
    learner.fit(1, ([(xs, ys)], [(xs, ys)] * 3))
    assert learner.history[ValidationPhase].steps == 3
    assert learner.data is kept
    learner.fit(1)
    assert learner.history[TrainingPhase].steps == 18


def test_num_batches_is_that_of_the_running_epoch():
    seen: list[int | None] = []
    xs, ys = rows(4)
    learner = toy_learner(Do(lambda learner: seen.append(learner.num_batches), StepBegin), num_batches=2)
    learner.fit(1, ([(xs, ys)], Batches((xs, ys))))
    learner.epoch(TrainingPhase())
    assert seen == [1, None, 2, 2]
    assert learner.num_batches is None


def test_a_fit_without_validation_data_trains_alone():
    recorder = EventRecorder()
    xs, ys = rows(4)
    toy_learner(recorder, data=([(xs, ys)],)).fit(1)
    assert {phase for _, phase in recorder.trace} == {"FittingPhase", "TrainingPhase"}


BAD = {
    "no data": ({"data": ()}, {}, DataError, r"TrainingPhase runs on the 'training' data, and there is no data"),
    "another key": ({"data": {"trainin": [1]}}, {}, DataError, r"there is \['trainin'\]; did you mean 'trainin'\?"),
    "no validation data": (
        {"data": ([1],)},
        {"phases": [ValidationPhase()]},
        DataError,
        r"runs on the 'validation' data, and there is \['training'\].*data=\{'validation': \.\.\.\}",
    ),
    "empty list": ({"data": ([],)}, {}, DataError, r"training data \(a list of length 0\) gave no batch"),
    "empty validation": (
        {"data": ([1], [])},
        {"phases": [ValidationPhase()]},
        DataError,
        r"validation data \(a list of length 0\) gave no batch; expected at least one",
    ),
    "D-LZ-13: fewer rows than batch_size": (
        {"data": (DataLoader(TensorDataset(*rows(4)), batch_size=8, drop_last=True),)},
        {},
        DataError,
        r"gave no batch.*fewer rows than batch_size with drop_last=True",
    ),
    "three data": ({}, {"data": ([1], [2], [3])}, DataError, r"tuple of 3; expected \(train,\), \(train, valid\)"),
    "no loss function": ({"loss_fn": None}, {}, LossError, r"needs a loss function, and the learner has none"),
    "class as phase": ({}, {"phases": [TrainingPhase]}, PhaseError, r"expected an instance: TrainingPhase\(\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_the_fit_begins(case):
    options, given, error, words = BAD[case]
    recorder = EventRecorder()
    learner = toy_learner(recorder, **{key: value for key, value in options.items() if key != "loss_fn"})
    if "loss_fn" in options:
        learner.loss_fn = None
    with pytest.raises(error, match=f"(?s){words}"):
        learner.fit(1, **given)
    assert recorder.events == []
    assert not learner.fitting


def test_the_second_phase_is_checked_before_the_fit_begins_too():
    recorder = EventRecorder()
    xs, ys = rows(4)
    learner = toy_learner(recorder, data=([(xs, ys)],))
    with pytest.raises(DataError, match="ValidationPhase runs on the 'validation' data"):
        learner.fit(1, phases=[TrainingPhase(), ValidationPhase()])
    assert recorder.events == []
    assert learner.model.value.item() == 0


def test_data_that_is_used_up_is_an_error_in_the_epoch_that_finds_nothing():
    xs, ys = rows(4)
    recorder = EventRecorder()
    learner = toy_learner(recorder, Recorder(), data=(pair for pair in [(xs, ys)]))
    with pytest.raises(DataError, match=r"gave no batch.*an iterator that was used up before"):
        learner.fit(2)
    assert learner.history[TrainingPhase].steps == 1
    assert recorder.events[-2:] == ["EpochBegin", "FitEnd"]


@pytest.mark.parametrize(
    ("batch", "described"),
    [(torch.ones(3, 1), r"a Tensor of shape \(3, 1\)"), ((1, 2, 3), "a tuple of length 3"), ({"x": 1}, "a dict")],
    ids=["tensor", "triple", "dict"],
)
def test_a_batch_that_is_no_pair_is_described(batch, described):
    for phase in (TrainingPhase(), ValidationPhase()):
        with pytest.raises(BatchError, match=rf"{described}.*as a batch; expected a pair \(xs, ys\)"):
            toy_learner().epoch(phase, [batch])


# One fit at a time


@pytest.mark.parametrize("event", [FitBegin, StepEnd, CycleEnd, FitEnd], ids=lambda event: event.__name__)
def test_a_fit_inside_a_fit_of_the_same_learner_is_an_error(event):
    recorder = EventRecorder()
    learner = toy_learner(recorder, Do(lambda learner: learner.fit(1), event), num_batches=2)
    with pytest.raises(ReentrantFitError, match=r"called while this learner is fitting;.*learner\.epoch\(phase\)"):
        learner.fit(1)
    assert recorder.events.count("FitEnd") == 1
    assert learner.scope is None
    learner.set_callbacks([Recorder()])
    learner.fit(1)
    assert learner.history[TrainingPhase].steps == 2


def test_two_learners_may_fit_inside_each_other():
    inner, alone = toy_learner(Recorder()), toy_learner(Recorder())
    outer = toy_learner(Recorder(), Do(lambda learner: inner.fit(1), EpochEnd, TrainingPhase))
    outer.fit(2)
    alone.fit(2)
    assert_same_bits(inner, alone)
    assert_same_bits(outer, alone)
    assert inner.history.cycles == outer.history.cycles == 2


# After a fit that stopped


def test_the_next_fit_resets_the_reason_why_the_last_one_stopped():
    learner = toy_learner(RaiseOnce(CancelFittingException("enough"), StepEnd), num_batches=2)
    assert learner.fit(1).stop_reason == "enough"
    assert "stopped: enough" in repr(learner.history)
    assert learner.fit(1).stop_reason is None
    assert "stopped" not in repr(learner.history)


def test_a_fit_that_fails_at_once_has_no_reason_of_the_last_one():
    seen: list[Any] = []
    learner = toy_learner(
        RaiseOnce(CancelFittingException("enough"), StepEnd),
        Do(lambda learner: seen.append(learner.history.stop_reason), FitBegin),
        num_batches=2,
    )
    learner.fit(1)
    learner.fit(1)
    assert seen == [None, None]


ENDS = {
    "error": BrokenError(),
    "cancelled fit": CancelFittingException("enough"),
    "cancelled epoch": CancelEpochException(),
    "interrupt": KeyboardInterrupt(),
}


@pytest.mark.parametrize("event", [FitBegin, EpochBegin, StepBegin, LossBegin, BackwardEnd, UpdateBegin, UpdateEnd])
@pytest.mark.parametrize("end", [name for name in ENDS if name != "cancelled epoch"])
def test_the_fit_after_one_that_stopped_is_that_of_a_fresh_learner_in_the_same_state(end, event):
    optimizer = partial(torch.optim.SGD, lr=0.001, momentum=0.9)
    learner = toy_learner(optimizer=optimizer)
    learner.fit(1)
    learner.add_callback(RaiseOnce(ENDS[end], event))
    try:
        learner.fit(1)
    except BrokenError:
        pass
    assert (learner.fitting, learner.scope, learner.num_batches) == (False, None, None)
    fresh = toy_learner(optimizer=optimizer)
    fresh.model.load_state_dict(learner.model.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(learner.optimizer.state_dict()))
    learner.fit(2)
    fresh.fit(2)
    assert_same_bits(learner, fresh)


class Bare(AbstractTrainingPhase):
    """A step without runstep, which fails once between backward and update."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def step(self, learner: Learner, batch: Any) -> None:
        learner.backward(learner.loss_fn(learner.model(batch[0]), batch[1]))
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        learner.update()


def test_gradients_of_a_step_that_failed_do_not_reach_the_next_fit_although_it_has_no_runstep():
    learner, fresh = toy_learner(), toy_learner()
    with pytest.raises(BrokenError):
        learner.fit(1, phases=[Bare(BrokenError())])
    assert learner.model.value.item() == 0
    learner.fit(1, phases=[Bare()])
    fresh.fit(1, phases=[Bare()])
    assert_same_bits(learner, fresh)


@pytest.mark.parametrize("end", ENDS)
def test_random_order_and_dropout_go_on_alike_however_the_first_fit_ended(end):
    learner = noisy_learner(Recorder(), RaiseOnce(ENDS[end], BackwardEnd))
    other = noisy_learner(Recorder(), RaiseOnce(CancelFittingException(), BackwardEnd))
    phases = [TrainingPhase()]
    for stopped in (learner, other):
        try:
            stopped.fit(1, phases=phases)
        except BrokenError:
            pass
        stopped.fit(1, phases=phases)
    assert_same_bits(learner, other)


def test_a_failed_epoch_outside_a_fit_leaves_the_learner_as_usable():
    learner = toy_learner(Recorder(), RaiseOnce(BrokenError(), LossBegin))
    with pytest.raises(BrokenError):
        learner.epoch(TrainingPhase())
    learner.epoch(TrainingPhase())
    assert learner.history[TrainingPhase].epochs == 1
    assert learner.scope is None


# Evaluate


class Half(nn.Module):
    """Gives half of its input; has a parameter that plays no part."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, xs: Tensor) -> Tensor:
        return xs / 2 + 0 * self.unused


def half_learner(*callbacks: Callback, **options: Any) -> Learner:
    xs = torch.tensor([1.0, 2, 3, 4, 50]).reshape(5, 1)
    data = (TensorBatches(xs, xs, batch_size=2), TensorBatches(xs, 0 * xs, batch_size=2))
    return Learner(
        Half(), nn.functional.l1_loss, **{"data": data, **options}, callbacks=callbacks, default_callbacks=False
    )


def test_d_lz_15_evaluate_weighs_a_ragged_last_batch_by_its_rows():
    learner = half_learner(Recorder(), Metrics(mse, rmse, mae))
    values = learner.evaluate()
    mean, square = (0.5 + 1 + 1.5 + 2 + 25) / 5, (0.25 + 1 + 2.25 + 4 + 625) / 5
    assert values == pytest.approx({"loss": mean, "mse": square, "rmse": square**0.5, "mae": mean}, rel=1e-6)
    assert all(type(value) is float for value in values.values())


def test_evaluate_takes_other_data_metrics_and_another_phase():
    class Twice(AbstractValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                state.z = 2 * state.xs
                state.loss = state.z.mean()

    learner = half_learner()
    assert learner.evaluate() == {"loss": 6.0}
    assert learner.evaluate(torch.ones(3, 1), phase=Twice()) == {"loss": 2.0}
    largest = Metric(lambda z: z.max(), name="largest", inputs=("z",))
    assert learner.evaluate([[torch.ones(3, 1)]], metrics=[largest], phase=Twice()) == {"loss": 2.0, "largest": 2.0}
    assert learner.evaluate((torch.ones(3, 1), torch.zeros(3, 1))) == {"loss": 0.5}


def test_metrics_given_to_evaluate_are_used_once():
    metrics = Metrics(mae)
    learner = half_learner(Recorder(), metrics)
    assert set(learner.evaluate(metrics=[mse])) == {"loss", "mse"}
    assert set(learner.evaluate(metrics=[])) == {"loss"}
    assert set(learner.evaluate()) == {"loss", "mae"}
    assert learner.get_callback(Metrics) is metrics


def test_evaluate_without_data_says_which_is_missing():
    with pytest.raises(DataError, match="ValidationPhase runs on the 'validation' data, and there is no data"):
        half_learner(data=()).evaluate()


def surroundings(learner: Learner) -> dict[str, Any]:
    """All that evaluating and predicting must leave as it was."""
    return {
        "history": repr(learner.history),
        "rows": learner.history.rows(),
        "cbstate": sorted(vars(learner.cbstate)),
        "objects": [id(thing) for thing in (learner.history, learner.cbstate, learner.step, learner.callbacks)],
        "step": list(learner.step),
        "streams": learner.streams.positions(),
        "modes": [module.training for module in learner.model.modules()],
        "weights": [tensor.tolist() for tensor in learner.model.state_dict().values()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in learner.model.parameters()],
        "numbers": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "running": (learner.fitting, learner.scope, learner.num_batches),
    }


LOOKS = {
    "evaluate": lambda learner: learner.evaluate(),
    "evaluate on training data": lambda learner: learner.evaluate(learner.data.training),
    "predict": lambda learner: learner.predict(torch.ones(5, 3)),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("epochs", [0, 1])
def test_evaluating_and_predicting_leave_no_trace(look, epochs):
    recorder = EventRecorder()
    learner = noisy_learner(recorder, Recorder(), Metrics(mae))
    learner.model[1].eval()
    learner.fit(epochs)
    before, events = surroundings(learner), len(recorder.events)
    LOOKS[look](learner)
    after = surroundings(learner)
    for name, value in before.items():
        assert after[name] == value, name
    assert len(recorder.events) == events, "the learner's callbacks do not hear of it"


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_explained_of_the_callbacks_does_not_change_by_evaluating_and_predicting(look):
    learner = noisy_learner(Recorder(), Metrics(mae))
    before = str(learner.callbacks.explain())
    LOOKS[look](learner)
    assert str(learner.callbacks.explain()) == before
    assert "TrainingPhase" in before


@pytest.mark.parametrize("look", LOOKS)
def test_evaluating_and_predicting_that_fail_leave_no_trace_either(look):
    learner = noisy_learner(Recorder(), Metrics(mae))
    learner.fit(1)
    before, forward = surroundings(learner), learner.model[3].forward
    calls = 0

    def fail_late(xs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1 + (look != "predict"):
            raise BrokenError
        return forward(xs)

    learner.model[3].forward = fail_late
    with pytest.raises(BrokenError):
        LOOKS[look](learner)
    del learner.model[3].forward
    assert surroundings(learner) == before


@pytest.mark.parametrize("look", LOOKS)
def test_evaluating_and_predicting_again_gives_the_same_and_changes_no_later_training(look):
    learner, plain = noisy_learner(Recorder()), noisy_learner(Recorder())
    learner.fit(1)
    first, second = LOOKS[look](learner), LOOKS[look](learner)
    assert torch.equal(first, second) if isinstance(first, Tensor) else first == second
    learner.fit(1)
    plain.fit(2)
    assert_same_bits(learner, plain)


@pytest.mark.parametrize(
    ("event", "phase"),
    [
        *((event, TrainingPhase) for event in (StepBegin, BackwardBegin, UpdateEnd, StepEnd, EpochEnd)),
        (StepEnd, ValidationPhase),
        (CycleEnd, Phase),
        (FitEnd, Phase),
    ],
    ids=lambda cls: cls.__name__,
)
def test_a_handler_may_evaluate_and_predict_while_fitting(event, phase):
    found: list[tuple[dict[str, float], Tensor]] = []
    same: list[bool] = []

    def look(learner: Learner) -> None:
        before = surroundings(learner)
        found.append((learner.evaluate(metrics=[mae]), learner.predict(torch.ones(5, 3))))
        same.append(surroundings(learner) == before)

    watched = noisy_learner(Recorder(), Metrics(mse), Do(look, event, phase))
    plain = noisy_learner(Recorder(), Metrics(mse))
    watched.fit(2)
    plain.fit(2)
    assert same
    assert all(same)
    assert_same_bits(watched, plain)
    assert watched.history.rows() == plain.history.rows()
    if event is FitEnd:
        assert found[0][0] == watched.evaluate(metrics=[mae])
        assert torch.equal(found[0][1], watched.predict(torch.ones(5, 3)))


# Predict


def test_e08_predictions_are_those_of_the_model_in_eval_mode_in_the_order_of_the_data():
    learner = noisy_learner()
    learner.fit(1)
    xs = torch.randn(70, 3)
    predictions = learner.predict(xs)
    learner.model.eval()
    with torch.no_grad():
        assert torch.equal(predictions, torch.cat([learner.model(batch) for batch in xs.split(32)]))
    learner.model.train()
    assert predictions.shape == (70, 1)
    assert not predictions.requires_grad


@pytest.mark.parametrize(
    "data",
    [
        torch.arange(6.0).reshape(6, 1),
        np.arange(6, dtype=np.float32).reshape(6, 1),
        (torch.arange(6.0).reshape(6, 1), torch.zeros(6)),
        [torch.arange(4.0).reshape(4, 1), torch.tensor([[4.0], [5]])],
        [(torch.arange(4.0).reshape(4, 1), "targets"), [torch.tensor([[4.0], [5]])]],
        TensorBatches(torch.arange(6.0).reshape(6, 1), batch_size=4),
        TensorDataset(torch.arange(6.0).reshape(6, 1)),
        DataLoader(TensorDataset(torch.arange(6.0).reshape(6, 1), torch.zeros(6)), batch_size=4),
    ],
    ids=["tensor", "array", "pair", "batches", "pairs and lists", "tensor batches", "dataset", "loader"],
)
def test_predict_takes_inputs_in_any_form_and_leaves_targets_out(data):
    assert torch.equal(half_learner().predict(data), torch.arange(6.0).reshape(6, 1) / 2)


def test_predict_gives_a_dict_of_inputs_to_the_model_as_it_is():
    class Sum(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return inputs["a"] + inputs["b"]

    predictions = Learner(Sum(), default_callbacks=False).predict({"a": torch.arange(40), "b": torch.ones(40)})
    assert torch.equal(predictions, torch.arange(40) + 1.0)


class Named(NamedTuple):
    mean: Tensor
    spread: Tensor


@dataclass
class Data:
    mean: Tensor
    inner: tuple[Tensor, str]


STRUCTURES: dict[str, Any] = {
    "tuple": lambda xs: (xs, xs + 1),
    "list": lambda xs: [xs, xs + 1],
    "dict": lambda xs: {"a": xs, "b": {"c": xs + 1}},
    "named tuple": lambda xs: Named(xs, xs + 1),
    "dataclass": lambda xs: Data(xs, (xs + 1, "label")),
}

EXPECTED: dict[str, Any] = {**STRUCTURES, "dataclass": lambda xs: Data(xs, (xs + 1, ["label", "label"]))}


def flat(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Data):
        return ["Data", flat(value.mean), flat(value.inner)]
    if isinstance(value, dict):
        return ["dict", *((key, flat(item)) for key, item in value.items())]
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *map(flat, value)]
    return value


@pytest.mark.parametrize("structure", STRUCTURES)
def test_d_lz_29_structured_predictions_are_joined_leaf_by_leaf(structure):
    class Structured(nn.Module):
        def forward(self, xs: Tensor) -> Any:
            return STRUCTURES[structure](xs)

    xs = torch.arange(50.0).reshape(50, 1)
    predictions = Learner(Structured(), default_callbacks=False).predict(xs)
    assert flat(predictions) == flat(EXPECTED[structure](xs))


def test_a_model_that_says_how_it_predicts_is_asked_through_that():
    class Classes(Half):
        def predict(self, xs: Tensor) -> Tensor:
            assert not self.training
            return self(xs) > 1

    learner = Learner(Classes(), nn.functional.l1_loss, default_callbacks=False)
    assert learner.predict(torch.tensor([[1.0], [3.0]])).tolist() == [[False], [True]]


def test_a_custom_phase_says_what_is_predicted():
    class Embed(AbstractValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch) as (_, state):
                state.preds = {"z": learner.model.a(state.xs) + learner.model.b(state.xs)}

    learner = Learner({"a": Half(), "b": Half()}, default_callbacks=False)
    assert torch.equal(learner.predict(torch.ones(40, 2), phase=Embed())["z"], torch.ones(40, 2))


def test_predictions_keep_the_order_of_the_rows_in_a_phase_on_training_data_too():
    class OnTraining(PredictionPhase):
        data_key = "training"

    xs = torch.arange(50.0).reshape(50, 1)
    assert torch.equal(half_learner().predict(xs, phase=OnTraining()), xs / 2)


def test_predicting_with_several_models_needs_a_phase_and_says_so():
    learner = Learner({"a": Half(), "b": Half()}, default_callbacks=False)
    with pytest.raises(PhaseError, match=r"predict runs one model.*\['a', 'b'\].*predict\(data, phase=MyPhase\(\)\)"):
        learner.predict(torch.ones(3, 1))


def test_a_phase_that_makes_no_predictions_says_so():
    class Silent(AbstractValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            pass

    with pytest.raises(PhaseError, match=r"Silent\(\) made no predictions.*stores state\.preds"):
        half_learner().predict(torch.ones(3, 1), phase=Silent())


def test_predicting_without_rows_is_an_error():
    for nothing in ([], torch.ones(0, 1)):
        with pytest.raises(DataError, match=r"no batch|no rows"):
            half_learner().predict(nothing)


def test_a_model_that_draws_predicts_the_same_each_time_and_leaves_the_generator():
    class Sampler(nn.Module):
        def forward(self, xs: Tensor) -> Tensor:
            return xs + torch.rand_like(xs)

    learner = Learner(Sampler(), default_callbacks=False, seed=1)
    before = torch.get_rng_state()
    first = learner.predict(torch.ones(40, 1))
    assert torch.equal(first, learner.predict(torch.ones(40, 1)))
    assert len(first.unique()) > 30
    assert torch.equal(torch.get_rng_state(), before)
