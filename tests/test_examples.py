"""Whole trainings as a user writes them, compared with loops written by hand.

The trainings of the documentation and of docs/examples run in test_docs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam, AdamW, Optimizer

from by_hand import train
from fluxloop import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    BackwardBegin,
    BackwardEnd,
    Callback,
    CancelFittingException,
    CustomCallback,
    EpochBegin,
    EpochEnd,
    Learner,
    LossBegin,
    Metrics,
    PerOptimizerPhase,
    PerOptimizerValidationPhase,
    Recorder,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    accuracy,
    on,
    runepoch,
    runstep,
    throttle,
)
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner


def classification(rows: int = 40) -> tuple[Tensor, Tensor]:
    xs = torch.randn(rows, 4)
    return xs, (xs @ torch.randn(4, 3)).argmax(1)


def batches(rows: int = 40, batch_size: int = 16) -> TensorBatches:
    return TensorBatches(*classification(rows), batch_size=batch_size)


class Net(nn.Module):
    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, hidden)
        self.fc2 = nn.Linear(hidden, 3)

    def forward(self, xs: Tensor) -> Tensor:
        return self.fc2(self.fc1(xs).relu())


def quiet(model: Any, loss_fn: Any = None, **options: Any) -> Learner:
    return Learner(model, loss_fn, **{"default_callbacks": False, "seed": 0, **options})


def assert_equal_weights(first: nn.Module, second: nn.Module) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# A model that brings its loss and its optimizers


class SelfContained(Net):
    def loss(self, preds: Tensor, ys: Tensor) -> Tensor:
        return cross_entropy(preds, ys)

    def optimizers(self) -> dict[str, Optimizer]:
        return {"fc1": SGD(self.fc1.parameters(), lr=0.1), "fc2": SGD(self.fc2.parameters(), lr=0.01)}


def test_the_models_own_loss_and_optimizers_are_taken() -> None:
    net, data = SelfContained(), batches()
    own = deepcopy(net)
    learner = quiet(net, net.loss, data=(data,), optimizer=net.optimizers())
    learner.fit(2)
    optimizers = own.optimizers()
    for _ in range(2):
        for xs, ys in data:
            own.zero_grad()
            own.loss(own(xs), ys).backward()
            for optimizer in optimizers.values():
                optimizer.step()
    assert_equal_weights(net, own)
    assert learner.optimizer_names == ("fc1", "fc2")


# Two optimizers over one model; the first one's loss has a penalty for the size of its weights


class TwoRates(PerOptimizerPhase):
    def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
        loss = learner.loss_fn(state.preds, state.ys)
        return loss + 0.1 * learner.model.fc1.weight.abs().sum() if name == "fc1" else loss


TWO_RATES = {"fc1": partial(SGD, lr=0.1, momentum=0.9), "fc2": partial(SGD, lr=0.01, momentum=0.9)}


def whole_step(phase: Any, learner: Learner, batch: Any) -> None:
    with runstep(learner, phase, xs=batch[0], ys=batch[1]) as (_, state):
        state.losses = {}
        for name in learner.optimizer_names:
            state.preds = learner.model(state.xs)
            loss = learner.loss_fn(state.preds, state.ys)
            if name == "fc1":
                loss = loss + 0.1 * learner.model.fc1.weight.abs().sum()
            if phase.gradients:
                learner.model.zero_grad()
                loss.backward()
                getattr(learner.optimizer, name).step()
            state.losses[name] = loss.detach()


class OwnStep(AbstractTrainingPhase):
    step = whole_step


class OwnValidationStep(AbstractValidationPhase):
    step = whole_step


def test_the_whole_step_by_hand_equals_the_loss_by_optimizer() -> None:
    train, valid = batches(), batches(20)
    net, recorder = Net(), EventRecorder()
    first, second = (
        quiet(
            deepcopy(net),
            cross_entropy,
            data=(train, valid),
            optimizer=TWO_RATES,
            callbacks=[Recorder(), Metrics(accuracy), *more],
        )
        for more in ([], [recorder])
    )
    theirs = first.fit(3, phases=[TwoRates(), PerOptimizerValidationPhase(TwoRates())])
    ours = second.fit(3, phases=[OwnStep(), OwnValidationStep()])

    assert_same_bits(first, second)
    for name in ("loss_fc1", "loss_fc2", "accuracy"):
        assert ours[f"training/{name}"] == theirs[f"training/{name}"]
        assert ours[f"validation/{name}"] == theirs[f"validation/{name}"]
    assert {event for event, phase in recorder.trace if phase == "OwnStep"} == {
        "EpochBegin",
        "StepBegin",
        "StepEnd",
        "EpochEnd",
    }


# A larger batch from several smaller ones


class VirtualBatches(AbstractTrainingPhase):
    """An update every `every` batches; what is left at the end of an epoch waits for the next one."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen = 0

    def step(self, learner: Learner, batch: Any) -> None:
        xs, ys = batch
        with runstep(learner, self, xs=xs, ys=ys) as (_, state):
            self.seen += 1
            state.preds = learner.model(state.xs)
            state.loss = learner.loss_fn(state.preds, state.ys) / self.every
            learner.backward(state.loss)
            if self.seen % self.every == 0:
                learner.update()


class FlushedVirtualBatches(VirtualBatches):
    """The same, with an update for what is left at the end of an epoch."""

    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for batch in data:
                self.step(learner, batch)
            if self.seen % self.every:
                learner.update()
            self.seen = 0


def by_hand_accumulated(net: nn.Module, data: Any, every: int, epochs: int, flush: bool = False) -> None:
    optimizer = AdamW(net.parameters(), lr=0.01)
    seen = 0
    for _ in range(epochs):
        for xs, ys in data:
            seen += 1
            (cross_entropy(net(xs), ys) / every).backward()
            if seen % every == 0:
                optimizer.step()
                optimizer.zero_grad()
        if flush and seen % every:
            optimizer.step()
            optimizer.zero_grad()
            seen = 0


@pytest.mark.parametrize("rows", [48, 40])
def test_an_update_every_third_batch_equals_hand_written_accumulation(rows: int) -> None:
    net, data = Net(), batches(rows, batch_size=8)
    own = deepcopy(net)
    learner = quiet(
        net, cross_entropy, data=(data,), optimizer=partial(AdamW, lr=0.01, fused=False), callbacks=[Recorder()]
    )
    learner.fit(3, phases=[VirtualBatches(3)])
    by_hand_accumulated(own, data, every=3, epochs=3)
    assert_equal_weights(net, own)
    assert learner.history[VirtualBatches].steps == 3 * len(data)
    assert learner.history[VirtualBatches].updates == {None: 3 * len(data) // 3}


def test_batches_left_at_the_end_of_an_epoch_count_in_the_next_one() -> None:
    net, data = Net(), batches(40, batch_size=8)  # 5 batches
    learner = quiet(
        net, cross_entropy, data=(data,), optimizer=partial(AdamW, lr=0.01, fused=False), callbacks=[Recorder()]
    )
    phase = VirtualBatches(3)
    learner.epoch(phase)
    assert learner.history[phase].updates == {None: 1}
    left = [p.grad.clone() for p in net.parameters()]
    assert all(g.abs().sum() > 0 for g in left)
    learner.epoch(phase, [next(iter(data))])
    assert learner.history[phase].updates == {None: 2}


def test_an_epoch_of_ones_own_can_update_with_what_is_left() -> None:
    net, data = Net(), batches(40, batch_size=8)
    own = deepcopy(net)
    learner = quiet(
        net, cross_entropy, data=(data,), optimizer=partial(AdamW, lr=0.01, fused=False), callbacks=[Recorder()]
    )
    history = learner.fit(3, phases=[FlushedVirtualBatches(3)])
    by_hand_accumulated(own, data, every=3, epochs=3, flush=True)
    assert_equal_weights(net, own)
    assert history[FlushedVirtualBatches].updates == {None: 6}


# Regression on all rows at once


@pytest.mark.slow
def test_full_batch_regression_prints_the_loss_at_each_tenth_step(capsys: pytest.CaptureFixture[str]) -> None:
    xs = torch.randn(100, 3)
    ys = (xs * torch.tensor([0.2, -1.3, -0.5])).sum(1, keepdim=True) + torch.randn(100, 1)
    net = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1))
    own = deepcopy(net)
    show = CustomCallback(lambda learner: print(f"{learner.step.loss.item():.6f}"), StepEnd)  # noqa: T201
    learner = quiet(
        net,
        partial(mse_loss, reduction="sum"),
        data=([(xs, ys)],),
        optimizer=partial(Adam, lr=0.08, fused=False),
        callbacks=[throttle(show, StepEnd, freq=10)],
    )
    learner.fit(200)

    optimizer = Adam(own.parameters(), lr=0.08)
    losses = train(own, partial(mse_loss, reduction="sum"), optimizer, [(xs, ys)], epochs=200)
    printed = [f"{loss:.6f}" for loss in losses[::10]]
    assert capsys.readouterr().out.splitlines() == printed
    assert float(printed[-1]) < float(printed[0])
    assert_equal_weights(net, own)


# From a bare step function to a phase with all events


def bare_step(model: nn.Module, batch: Any, optimizer: Optimizer, loss_fn: Any) -> Tensor:
    xs, ys = batch
    optimizer.zero_grad()
    loss: Tensor = loss_fn(model(xs), ys)
    loss.backward()
    optimizer.step()
    return loss


class BareStep(AbstractTrainingPhase):
    """Call the function, and nothing else."""

    def step(self, learner: Learner, batch: Any) -> None:
        bare_step(learner.model, batch, learner.optimizer, learner.loss_fn)


class WithState(AbstractTrainingPhase):
    """Store what the step computes."""

    def step(self, learner: Learner, batch: Any) -> None:
        xs, ys = batch
        with runstep(learner, self, xs=xs, ys=ys) as (_, state):
            state.preds = learner.model(state.xs)
            state.loss = learner.loss_fn(state.preds, state.ys)
            learner.backward(state.loss)
            learner.update()


class WithEvents(AbstractTrainingPhase):
    """Fire the events of a step, too."""

    def step(self, learner: Learner, batch: Any) -> Any:
        xs, ys = batch
        with runstep(learner, self, xs=xs, ys=ys) as (handle, state):
            state.preds = learner.model(state.xs)
            handle(LossBegin())
            state.loss = learner.loss_fn(state.preds, state.ys)
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            learner.update()
        return state


STEP_EVENTS = ["StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd"]


@pytest.mark.parametrize(
    ("phase", "events"),
    [
        (BareStep(), []),
        (WithState(), ["StepBegin", "UpdateBegin", "UpdateEnd", "StepEnd"]),
        (WithEvents(), STEP_EVENTS),
        (TrainingPhase(), STEP_EVENTS),
    ],
    ids=["bare", "with state", "with events", "built-in"],
)
def test_each_stage_of_a_phase_trains_as_the_bare_step_function(phase: Any, events: list[str]) -> None:
    net, data, recorder = Net(), batches(32), EventRecorder()
    own = deepcopy(net)
    learner = quiet(
        net, cross_entropy, data=(data,), optimizer=partial(Adam, lr=0.05, fused=False), callbacks=[recorder]
    )
    for _ in range(3):
        learner.epoch(phase)
    optimizer = Adam(own.parameters(), lr=0.05)
    for _ in range(3):
        for batch in data:
            bare_step(own, batch, optimizer, cross_entropy)
    assert_equal_weights(net, own)
    assert recorder.events == ["EpochBegin", *events, *events, "EpochEnd"] * 3
    assert {name for _, name in recorder.trace} == {type(phase).__name__}


# Ending a training oneself


class UntilLow(TrainingPhase):
    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for batch in data:
                self.step(learner, batch)
                if learner.step.loss < 0.1:
                    raise CancelFittingException("Low loss reached.")


def test_a_low_loss_ends_the_training_with_its_message_for_whoever_called_the_epoch() -> None:
    recorder = EventRecorder()
    learner = toy_learner(recorder, Recorder(), optimizer=partial(SGD, lr=0.0001))

    def train() -> None:
        for _ in range(1000):
            learner.epoch(UntilLow())

    with pytest.raises(CancelFittingException, match=r"^Low loss reached\.$"):
        train()
    assert learner.step.loss < 0.1
    assert recorder.events[-1] == "StepEnd"
    assert learner.scope is None


def test_inside_fit_a_low_loss_is_the_reason_why_it_stopped() -> None:
    recorder = EventRecorder()
    history = toy_learner(recorder, optimizer=partial(SGD, lr=0.0001)).fit(1000, phases=[UntilLow(), ValidationPhase()])
    assert history.stop_reason == "Low loss reached."
    assert 0 < history.cycles < 1000
    assert recorder.events[-2:] == ["StepEnd", "FitEnd"]


# A callback that prints a moving average of the loss


@define
class CustomLogger(Callback):
    """Keep a moving average of the training loss; print it when a training epoch ends."""

    alpha: float = 0.1
    value: float | None = None
    reads = ("step.loss", "cbstate.history")

    @on(StepEnd, AbstractTrainingPhase)
    def update(self, event: StepEnd, phase: Any, learner: Any) -> None:
        loss = learner.step.loss.item()
        self.value = loss if self.value is None else self.alpha * loss + (1 - self.alpha) * self.value

    @on(EpochEnd, AbstractTrainingPhase)
    def print_value(self, event: EpochEnd, phase: Any, learner: Any) -> None:
        print(f"Epoch {learner.cbstate.history[phase].epochs}: {self.value:.2f}")  # noqa: T201

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def averages(epochs: int, alpha: float, start: float | None = None) -> Iterator[float]:
    """Train the toy by hand, and yield the moving average at the end of each epoch."""
    learner = toy_learner()
    value, weight = start, torch.zeros(1, requires_grad=True)
    for _ in range(epochs):
        for xs, ys in learner.data.training:
            loss = (xs * weight - ys).abs().mean()
            (gradient,) = torch.autograd.grad(loss, weight)
            weight = (weight - 0.001 * gradient).detach().requires_grad_()
            value = loss.item() if value is None else alpha * loss.item() + (1 - alpha) * value
        assert value is not None
        yield value


def test_the_moving_average_is_printed_before_validation_and_kept_after_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = CustomLogger(alpha=0.1)
    told = CustomCallback(lambda learner: print("validation"), EpochBegin, ValidationPhase)  # noqa: T201
    toy_learner(logger, told, Recorder()).fit(2)
    first, second = averages(2, 0.1)
    assert logger.value == pytest.approx(second)
    expected = [f"Epoch 1: {first:.2f}", "validation", f"Epoch 2: {second:.2f}", "validation"]
    assert capsys.readouterr().out.splitlines() == expected


def test_the_moving_average_goes_on_from_a_restored_state() -> None:
    first = CustomLogger()
    toy_learner(first, Recorder()).fit(1)
    second = CustomLogger()
    second.load_state_dict(first.state_dict())
    assert second.value == first.value
    toy_learner(second, Recorder()).fit(1)
    assert second.value == pytest.approx(next(averages(1, 0.1, start=first.value)))
