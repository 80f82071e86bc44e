from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fluxloop import (
    AbstractTrainingPhase,
    BackwardEnd,
    BatchError,
    Callback,
    CancelEpochException,
    CancelFittingException,
    CustomCallback,
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
    Metrics,
    OptimizerError,
    Phase,
    PhaseError,
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
    on,
    runstep,
)
from fluxloop.nested import map_tensors
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner
from toys import BrokenError, Do, noisy_learner


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


@pytest.mark.slow(quick=1)
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
        "one-element tuple": (batches,),
        "mapping": {"training": batches},
        "list of batches": batches,
        "tensor batches": TensorBatches(xs, ys, batch_size=8),
        "loader": DataLoader(TensorDataset(xs, ys), batch_size=8),
        "iterable dataset's loader": DataLoader(Stream(), batch_size=8),
        "unsized iterable": Batches(*batches),
        "batches as lists": [list(batch) for batch in batches],
    }


@pytest.mark.slow(quick=9)
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
    "another key": (
        {"data": {"trainin": [1]}},
        {},
        DataError,
        r"there is \['trainin'\]; .*; did you mean 'trainin'\?$",
    ),
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
    "fewer rows than batch_size": (
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
    assert not learner._running.fitting


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


@pytest.mark.slow(quick=3)
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
    assert (learner._running.fitting, learner.scope, learner.num_batches) == (False, None, None)
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


def unfreezing_learner(*callbacks: Callback) -> Learner:
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    xs = torch.ones(4, 1)
    return Learner(
        model,
        nn.functional.mse_loss,
        data=(TensorBatches(xs, xs, batch_size=2),),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=callbacks,
        default_callbacks=False,
    )


def test_a_parameter_unfrozen_without_an_optimizer_is_an_error_at_the_next_epoch():
    recorder = EventRecorder()
    learner = unfreezing_learner(Do(lambda learner: learner.model[0].requires_grad_(), EpochEnd), recorder)
    with pytest.raises(OptimizerError, match=r"in no optimizer: 0\.weight, 0\.bias.*add_param_group"):
        learner.fit(3)
    assert recorder.events.count("EpochEnd") == 1
    learner.optimizer.add_param_group({"params": learner.model[0].parameters()})
    before = learner.model[0].weight.detach().clone()
    learner.fit(1)
    assert not torch.equal(learner.model[0].weight, before)


class KeepsHidden(TrainingPhase):
    """Stores tensors with graphs, in containers too."""

    def step(self, learner, batch):
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.hidden = [learner.model(state.xs), {"twice": 2 * learner.model(state.xs)}]
            state.preds = learner.model(state.xs)
            state.loss = learner.loss_fn(state.preds, state.ys)
            learner.backward(state.loss)
            learner.update()


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("phases", [None, [TrainingPhase()], [KeepsHidden()]], ids=["default", "training", "own"])
@pytest.mark.parametrize("stop", [False, True], ids=["to its end", "stopped"])
def test_no_entry_of_the_last_step_keeps_its_graph_after_a_fit(phases, stop):
    callbacks = [RaiseOnce(CancelFittingException("enough"), StepEnd)] if stop else []
    learner = toy_learner(*callbacks)
    learner.fit(1, phases=phases)
    tensors = []
    map_tensors(tensors.append, dict(vars(learner.step)))
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    assert len(tensors) >= 4
    assert all(tensor.grad_fn is None for tensor in tensors)


# A phase that does not say which data it runs on


class Keyless(Phase):
    train_mode = gradients = True

    def step(self, learner, batch):
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            learner.backward(state.loss)
            learner.update()


class OwnEpoch(Keyless):
    given: ClassVar[list[Any]] = []

    def epoch(self, learner, data):
        self.given.append(list(data))


BATCHES = [(torch.ones(2, 1) * i, torch.ones(2, 1)) for i in (1.0, 2.0, 3.0)]


@pytest.mark.parametrize(
    "train",
    [
        lambda learner, phase: learner.epoch(phase, BATCHES),
        lambda learner, phase: learner.fit(1, BATCHES, phases=[phase]),
        lambda learner, phase: learner.fit(1, (BATCHES,), phases=[phase]),
        lambda learner, phase: learner.fit(1, {"anything": BATCHES}, phases=[phase]),
    ],
)
def test_data_that_is_given_to_a_phase_without_a_data_key_is_used(train):
    learner, named = toy_learner(Recorder(), data=()), toy_learner(Recorder(), data=(BATCHES,))
    train(learner, Keyless())
    named.fit(1)
    assert learner.history[Keyless].steps == 3
    assert torch.equal(learner.model.value, named.model.value)


def test_a_phase_without_a_data_key_runs_on_the_only_data_there_is():
    learner = toy_learner(Recorder(), data=(BATCHES,))
    learner.fit(2, phases=[Keyless()])
    assert learner.history[Keyless].steps == 6


def test_rows_that_are_given_to_a_training_phase_without_a_data_key_are_shuffled():
    learner = toy_learner(data=())
    seen = []
    learner.add_callback(CustomCallback(lambda learner: seen.extend(learner.step.xs.flatten().tolist()), StepEnd))
    learner.epoch(Keyless(), (torch.arange(64.0)[:, None], torch.zeros(64, 1)))
    assert sorted(seen) == list(range(64)) != seen


@pytest.mark.parametrize(("data", "known"), [((), "no data"), ((BATCHES, BATCHES), r"\['training', 'validation'\]")])
@pytest.mark.parametrize("train", [lambda le, p: le.epoch(p), lambda le, p: le.fit(2, phases=[TrainingPhase(), p])])
def test_a_phase_whose_data_nobody_knows_is_an_error_before_anything_has_begun(train, data, known):
    learner = toy_learner(recorder := EventRecorder(), data=data)
    with pytest.raises(DataError, match=rf"there is {known}|runs on the 'training' data") as caught:
        train(learner, Keyless())
    assert recorder.events == []
    if data:
        assert "data_key = 'training', or give it data: learner.epoch(phase, data)" in str(caught.value)


def test_a_phase_with_an_epoch_of_its_own_needs_no_data_and_gets_what_is_given():
    learner = toy_learner(data=())
    phase = OwnEpoch()
    learner.epoch(phase)
    learner.epoch(phase, BATCHES)
    learner.fit(1, BATCHES, phases=[phase])
    assert [len(given) for given in phase.given] == [0, 3, 3]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train", r"did you mean 'train'\? Then say so: data=\{'training': data\['train'\]\}"),
        ("training_set", "'training_set'"),
    ],
)
def test_data_under_the_name_it_has_elsewhere_says_what_to_type(name: str, hint: str) -> None:
    learner = toy_learner(data={name: [1], "test": [1]})
    with pytest.raises(DataError, match=hint):
        learner.fit(1, phases=[TrainingPhase()])


# What has no effect is said


class DoesNothing(AbstractTrainingPhase):
    def step(self, learner, batch):
        pass


class DoesLittle(DoesNothing):
    def __init__(self):
        self.seen = 0

    def step(self, learner, batch):
        self.seen += 1
        if self.seen > 1:
            with runstep(learner, self, xs=batch[0]):
                pass


def test_a_phase_whose_steps_do_nothing_is_told():
    learner = toy_learner(Recorder())
    with pytest.warns(UserWarning, match=r"DoesNothing\(\) was given 16 batches and did no step .*\n.*runstep") as told:
        learner.fit(1, phases=[DoesNothing()])
    assert len(told) == 1
    learner.fit(1, phases=[DoesLittle()])  # a step may pass a batch over


@pytest.mark.parametrize("train", [lambda learner: learner.fit(1), lambda learner: learner.epoch(TrainingPhase())])
def test_a_batch_without_rows_is_an_error_before_anything_is_changed(train):
    learner = toy_learner(data=([(torch.zeros(0, 1), torch.zeros(0, 1))],))
    before = learner.model.value.detach().clone()
    with pytest.raises(BatchError, match=r"batch without rows: a Tensor of shape \(0, 1\); expected one or more"):
        train(learner)
    assert torch.equal(learner.model.value, before)


def test_weights_that_are_not_finite_are_told_before_the_first_step():
    learner = toy_learner()
    with torch.no_grad():
        learner.model.value.fill_(float("nan"))
    with pytest.warns(UserWarning, match="weights are not finite before the first step: value"):
        learner.fit(0)


def test_fits_in_two_threads_are_told_of_each_other():
    learner, other, told = toy_learner(), toy_learner(), []

    def fit_other(_):
        if other.history.cycles == 0:
            thread = threading.Thread(target=lambda: told.extend(warned(lambda: other.fit(1))))
            thread.start()
            thread.join()

    learner.add_callback(CustomCallback(fit_other, EpochBegin))
    learner.fit(1)
    assert len(told) == 1
    assert "a fit is running in another thread" in told[0]
    assert warned(lambda: other.fit(1)) == []  # none runs any more


def test_a_fit_of_another_learner_in_a_handler_is_in_the_same_thread():
    learner, other = toy_learner(), toy_learner()
    learner.add_callback(CustomCallback(lambda _: other.fit(1), CycleEnd))
    assert warned(lambda: learner.fit(1)) == []
    assert other.history.cycles == 1


def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]
