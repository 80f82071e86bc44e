from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, softplus

import by_hand
import fluxloop.compile.graphs
from fluxloop import (
    EMA,
    Accelerator,
    AveragedValidationPhase,
    BackwardBegin,
    BackwardEnd,
    BYOLPhase,
    Callback,
    CallbackConflictError,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    CustomCallback,
    EpochBegin,
    EpochEnd,
    Event,
    GANPhase,
    GANValidationPhase,
    KeepBestModel,
    KNNProbe,
    Learner,
    LossBegin,
    Metrics,
    MissingProducerError,
    ModelError,
    Phase,
    PhaseError,
    PredictionPhase,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    TwoViews,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    cosine,
    find_lr,
    loop,
    on,
    runepoch,
    runstep,
    stream_seed,
    throttle,
)
from fluxloop.schedules import value_at
from fluxloop.testing import (
    EventRecorder,
    assert_observer,
    assert_order,
    assert_resumes_exactly,
    assert_same_bits,
    bits,
)

SEED = 4
BATCH, BATCHES, EPOCHS = 4, 10, 10
STEPS = BATCHES * EPOCHS

Decay = float | Callable[[int], float]

adam = partial(torch.optim.Adam, lr=0.01, fused=False)
sgd = partial(torch.optim.SGD, lr=0.1)


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH * BATCHES, 3, generator=generator), torch.arange(BATCH * BATCHES) % 3


def batches() -> TensorBatches:
    return TensorBatches(*rows(), batch_size=BATCH)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def learner_of(*callbacks: Callback, model: Any = None, **options: Any) -> Learner:
    return Learner(
        net() if model is None else model,
        cross_entropy,
        callbacks=callbacks,
        seed=SEED,
        **{"data": (batches(), batches()), "optimizer": adam, "default_callbacks": False, **options},
    )


def with_teacher() -> dict[str, nn.Module]:
    return {"student": net(), "teacher": net().requires_grad_(False)}


class StudentPhase(TrainingPhase):
    """Trains the model called student."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            with learner.optimizing("student") as block:
                block.loss = cross_entropy(learner.model.student(state.xs), state.ys)


def train_by_hand(
    decay: Decay, optimizer: Callable[..., torch.optim.Optimizer] = adam, steps: int = STEPS
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Train in plain PyTorch; give the model and its average of the parameters after each step."""
    model, average = net(), net()
    epochs = -(-steps // BATCHES)
    training = by_hand.steps(
        model, cross_entropy, optimizer(model.parameters()), list(batches()), epochs=epochs, seed=SEED
    )
    for step in islice(training, steps):
        with torch.no_grad():
            for a, b in zip(average.parameters(), model.parameters(), strict=True):
                a.copy_(torch.lerp(a, b, 1 - value_at(decay, step.number)))
        yield model, average


def equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def buffers_equal(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


DECAYS: dict[str, Decay] = {"number": 0.97, "schedule": cosine(STEPS, 0.5, 1.0)}


# The formula


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("into", [None, "teacher"], ids=["copy", "teacher"])
def test_after_100_steps_the_average_equals_the_formula_and_a_hand_written_loop_to_the_bit(
    kind: str, into: str | None
) -> None:
    decay = DECAYS[kind]
    formula = [p.detach().double() for p in net().parameters()]
    for step, pair in enumerate(train_by_hand(decay)):
        model, average = pair
        d = value_at(decay, step)
        formula = [d * a + (1 - d) * b.detach() for a, b in zip(formula, model.parameters(), strict=True)]
    ema = EMA("model", decay) if into is None else EMA("student", decay, into=into)
    learner = learner_of(ema, model=None if into is None else with_teacher())
    learner.fit(EPOCHS, phases=[TrainingPhase() if into is None else StudentPhase()])
    assert ema.num_averaged == STEPS == 100
    assert equal(learner.weights[ema.model], model)
    assert equal(learner.weights[ema.average], average)
    for a, b in zip(learner.weights[ema.average].parameters(), formula, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_decay_of_0_gives_the_live_weights_and_one_of_1_the_first() -> None:
    learner = learner_of(EMA("model", 0), EMA("model", 1, view="first"))
    learner.fit(1, phases=[TrainingPhase()])
    assert equal(learner.weights["model@ema"], learner.model)
    assert equal(learner.weights["model@first"], net())
    assert not equal(learner.model, net())


def test_a_schedule_is_asked_for_the_number_of_the_average_from_0() -> None:
    asked: list[int] = []

    def decay(t: int) -> float:
        asked.append(t)
        return 0.5

    learner_of(EMA("model", decay)).fit(2, phases=[TrainingPhase()])
    assert asked == list(range(2 * BATCHES))


def test_the_average_begins_as_the_live_weights_and_takes_no_gradient() -> None:
    learner = learner_of(EMA("model"))
    average = learner.weights["model@ema"]
    assert average is not learner.model
    assert equal(average, learner.model)
    assert buffers_equal(average, learner.model)
    assert not any(p.requires_grad for p in average.parameters())
    assert not any(module.training for module in average.modules())
    assert all(p.requires_grad for p in learner.model.parameters())


def test_the_average_begins_with_the_weights_of_the_first_step_also_where_they_were_loaded_after_it() -> None:
    learner = learner_of(EMA("model", 0.5))
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    learner.model.load_state_dict(other.state_dict())
    learner.epoch(TrainingPhase(), [next(iter(batches()))])
    average = learner.weights["model@ema"]
    assert torch.equal(average[0].weight, torch.lerp(other[0].weight, learner.model[0].weight, 0.5))


def test_a_teacher_begins_as_it_is_given() -> None:
    torch.manual_seed(7)
    teacher = nn.Linear(3, 3).requires_grad_(False)
    torch.manual_seed(8)
    student = nn.Linear(3, 3)
    before = teacher.weight.clone()
    learner = learner_of(EMA("student", 0.5, into="teacher"), model={"student": student, "teacher": teacher})
    assert torch.equal(teacher.weight, before)
    learner.epoch(StudentPhase(), [next(iter(batches()))])
    assert torch.equal(teacher.weight, torch.lerp(before, student.weight, 0.5))


def test_complex_weights_are_averaged_too() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.ones(3, dtype=torch.complex64))

        def forward(self, xs: Tensor) -> Tensor:
            return torch.fft.ifft(torch.fft.fft(xs) * self.filter).real

    learner = learner_of(EMA("model", 0.75), model=Spectral(), optimizer=sgd)
    before = learner.model.filter.detach().clone()
    learner.epoch(TrainingPhase(), [next(iter(batches()))])
    assert not torch.equal(learner.model.filter, before)
    assert torch.allclose(learner.weights["model@ema"].filter, 0.75 * before + 0.25 * learner.model.filter)


def test_tied_weights_are_averaged_once_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, xs: Tensor) -> Tensor:
            return self.second(self.first(xs))

    learner = learner_of(EMA("model", 0.5), model=Tied(), optimizer=sgd)
    before = learner.model.first.weight.detach().clone()
    learner.epoch(TrainingPhase(), [next(iter(batches()))])
    average = learner.weights["model@ema"]
    assert average.first.weight is average.second.weight
    assert torch.equal(average.first.weight, torch.lerp(before, learner.model.first.weight, 0.5))


# Buffers


def test_a_copy_has_the_newest_statistics_of_batch_norm() -> None:
    learner = learner_of(EMA("model"))
    learner.fit(2, phases=[TrainingPhase()])
    assert buffers_equal(learner.weights["model@ema"], learner.model)
    assert learner.model[1].num_batches_tracked == 2 * BATCHES
    assert not torch.equal(learner.model[1].running_mean, torch.zeros(8))


@pytest.mark.parametrize("into", [None, "teacher"], ids=["copy", "teacher"])
def test_buffers_can_be_averaged_and_whole_numbers_are_copied(into: str | None) -> None:
    ema = EMA("student", 0.5, into=into, buffers="average")
    learner = learner_of(ema, model=with_teacher())
    one = [next(iter(batches()))]
    learner.epoch(StudentPhase(), one)
    live, average = learner.model.student[1], learner.weights[ema.average][1]
    assert torch.equal(average.running_mean, torch.lerp(torch.zeros(8), live.running_mean, 0.5))
    assert torch.equal(average.running_var, torch.lerp(torch.ones(8), live.running_var, 0.5))
    assert average.num_batches_tracked == live.num_batches_tracked == 1
    assert average.num_batches_tracked.dtype is torch.int64


def test_a_teacher_keeps_its_own_buffers() -> None:
    learner = learner_of(EMA("student", 0.5, into="teacher"), model=with_teacher())
    learner.fit(1, phases=[StudentPhase()])
    assert buffers_equal(learner.model.teacher, net())
    assert not equal(learner.model.teacher, net())


@pytest.mark.parametrize(("into", "buffers"), [(None, "keep"), ("teacher", "copy")])
def test_what_happens_to_buffers_can_be_said(into: str | None, buffers: Any) -> None:
    ema = EMA("student", 0.5, into=into, buffers=buffers)
    learner = learner_of(ema, model=with_teacher())
    learner.fit(1, phases=[StudentPhase()])
    expected = net() if buffers == "keep" else learner.model.student
    assert buffers_equal(learner.weights[ema.average], expected)


@pytest.mark.parametrize("buffers", ["copy", "average", "keep"])
def test_the_average_shares_no_storage_with_the_live_weights(buffers: Any) -> None:
    learner = learner_of(EMA("model", 0.5, buffers=buffers))
    learner.fit(1, phases=[TrainingPhase()])
    live, average = learner.model.state_dict(), learner.weights["model@ema"].state_dict()
    assert {t.data_ptr() for t in live.values()}.isdisjoint(t.data_ptr() for t in average.values())
    kept = {name: tensor.clone() for name, tensor in average.items()}
    for tensor in live.values():
        tensor.add_(1)
    assert all(torch.equal(average[name], kept[name]) for name in kept)
    moved = {name: tensor.clone() for name, tensor in live.items()}
    for tensor in average.values():
        tensor.zero_()
    assert all(torch.equal(live[name], moved[name]) for name in moved)


def test_running_the_average_in_train_mode_moves_its_own_statistics_alone() -> None:
    learner = learner_of(EMA("model"))
    learner.fit(1, phases=[TrainingPhase()])
    before = bits(learner)
    average = learner.weights["model@ema"].train()
    average(rows()[0])
    assert not torch.equal(average[1].running_mean, learner.model[1].running_mean)
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())


# When an average is taken


def gan_models() -> dict[str, nn.Module]:
    torch.manual_seed(2)
    return {"generator": nn.Linear(2, 3), "critic": nn.Linear(3, 1)}


def test_in_a_gan_with_three_critic_steps_each_average_follows_the_updates_of_its_model() -> None:
    emas = EMA("generator", 0.9), EMA("critic", 0.9)
    learner = learner_of(*emas, Recorder(), model=gan_models(), data=(rows()[0],))
    learner.fit(6, phases=[GANPhase(noise=2, critic_steps=3)])  # 12 steps
    updates = learner.history[GANPhase].updates
    assert updates == {"critic": 12, "generator": 4}
    assert [ema.num_averaged for ema in emas] == [4, 12]


def test_between_two_updates_of_the_generator_its_average_stays() -> None:
    seen: list[Tensor] = []
    look = CustomCallback(
        lambda learner: seen.append(learner.weights["generator@ema"].weight.clone()),
        StepEnd,
        reads=("model.generator@ema",),
    )
    learner = learner_of(EMA("generator", 0.5), look, model=gan_models(), data=(list(torch.split(rows()[0], 4)),))
    learner.fit(1, phases=[GANPhase(noise=2, critic_steps=3)])
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False, True, False, False, True, False, False, True, False]  # steps 3, 6 and 9


class ByHand(TrainingPhase):
    """Zeroes, differentiates and steps as PyTorch's users do; says nothing of it."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            learner.optimizer.zero_grad()
            cross_entropy(learner.model(state.xs), state.ys).backward()
            learner.optimizer.step()


class ByHandWithEvents(TrainingPhase):
    """The same, and fires the events of the backward."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            learner.optimizer.zero_grad()
            state.loss = cross_entropy(learner.model(state.xs), state.ys)
            handle(BackwardBegin())
            state.loss.backward()
            handle(BackwardEnd())
            learner.optimizer.step()


class HalfByHand(TrainingPhase):
    """Has the learner differentiate, and steps by itself."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            learner.optimizer.zero_grad()
            state.loss = cross_entropy(learner.model(state.xs), state.ys)
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            learner.optimizer.step()


class UpdatesOnly(TrainingPhase):
    """Differentiates by itself, and has the learner step."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            learner.optimizer.zero_grad()
            cross_entropy(learner.model(state.xs), state.ys).backward()
            learner.update()


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("phase", [ByHand, ByHandWithEvents, HalfByHand, UpdatesOnly])
@pytest.mark.parametrize("fused", [False, True, None], ids=["", "fused", "chosen"])
def test_steps_that_call_the_optimizer_by_hand_are_averaged(phase: type[Phase], fused: bool | None) -> None:
    optimizer = partial(torch.optim.Adam, lr=0.01, fused=fused)
    same = partial(optimizer, fused=fused is not False)
    *_, (model, average) = train_by_hand(0.9, same, steps=2 * BATCHES)
    ema = EMA("model", 0.9)
    learner = learner_of(ema, optimizer=optimizer)
    learner.fit(2, phases=[phase()])
    assert equal(learner.model, model)
    assert ema.num_averaged == 2 * BATCHES
    assert equal(learner.weights["model@ema"], average)


@pytest.mark.parametrize("fused", [False, True, None], ids=["", "fused", "chosen"])
def test_bare_steps_that_call_the_optimizer_by_hand_are_averaged(fused: bool | None) -> None:
    ema = EMA("model", 0.9)
    learner, phase = learner_of(ema, optimizer=partial(torch.optim.Adam, lr=0.01, fused=fused)), ByHand()
    for batch in batches():
        phase.step(learner, batch)
    assert ema.num_averaged == BATCHES


def test_updates_that_a_step_announces_without_a_name_are_averaged() -> None:
    class Both(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
                for optimizer in learner.optimizer:
                    optimizer.zero_grad()
                cross_entropy(learner.model.head(learner.model.body(state.xs)), state.ys).backward()
                handle(UpdateBegin())
                for optimizer in learner.optimizer:
                    optimizer.step()
                handle(UpdateEnd())

    ema = EMA("body", 0.5)
    learner = learner_of(ema, model={"body": nn.Linear(3, 4), "head": nn.Linear(4, 3)})
    learner.fit(1, phases=[Both()])
    assert ema.num_averaged == BATCHES


def test_a_step_that_updates_nothing_is_not_averaged() -> None:
    class EverySecond(TrainingPhase):
        """Accumulates gradients over two batches by hand."""

        count = 0

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                cross_entropy(learner.model(state.xs), state.ys).backward()
                self.count += 1
                if self.count % 2 == 0:
                    learner.optimizer.step()
                    learner.optimizer.zero_grad()

    ema = EMA("model", 0.5)
    learner_of(ema).fit(1, phases=[EverySecond()])
    assert ema.num_averaged == BATCHES // 2


def test_a_block_without_a_loss_updates_nothing_and_is_not_averaged() -> None:
    class Alternating(TrainingPhase):
        count = 0

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                for name, model in zip(("a", "b"), learner.model, strict=True):
                    with learner.optimizing(name) as block:
                        if name == "b" or self.count % 2 == 0:
                            block.loss = cross_entropy(model(state.xs), state.ys)
                self.count += 1

    emas = EMA("a", 0.5), EMA("b", 0.5)
    learner_of(*emas, model={"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}).fit(1, phases=[Alternating()])
    assert [ema.num_averaged for ema in emas] == [BATCHES // 2, BATCHES]


def test_a_cancelled_step_that_updated_nothing_is_not_averaged() -> None:
    def cancel(learner: Any) -> None:
        raise CancelStepException

    ema = EMA("model", 0.5)
    learner = learner_of(ema, CustomCallback(cancel, BackwardBegin, reads=()))
    learner.fit(1, phases=[TrainingPhase()])
    assert ema.num_averaged == 0
    assert equal(learner.weights["model@ema"], net())


def test_validation_takes_no_average() -> None:
    ema = EMA("model", 0.5)
    learner = learner_of(ema)
    learner.fit(1)
    learner.evaluate()
    learner.epoch(ValidationPhase())
    assert ema.num_averaged == BATCHES


class Around(TrainingPhase):
    """Trains on a batch by another phase's step, then by its own."""

    def __init__(self, inner: Phase) -> None:
        self.inner = inner

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            self.inner.step(learner, batch)
            with learner.optimizing() as block:
                block.loss = cross_entropy(learner.model(state.xs), state.ys)


class Cancelled(TrainingPhase):
    """Ends each step before it updates anything."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]):
            raise CancelStepException


@pytest.mark.parametrize(("inner", "averages"), [(TrainingPhase, 2), (ByHand, 2), (Cancelled, 1)])
def test_a_step_inside_another_does_not_hide_the_updates_of_either(inner: type[Phase], averages: int) -> None:
    ema = EMA("model", 0.5)
    learner_of(ema).fit(1, phases=[Around(inner())])
    assert ema.num_averaged == averages * BATCHES


def test_an_average_does_not_have_the_steps_save_the_random_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving and restoring them costs more than the average itself."""
    saved: list[int] = []

    class Counting(loop.preserved):  # type: ignore[name-defined,misc]  # imported there
        def __enter__(self) -> None:
            saved.append(1)
            super().__enter__()

    monkeypatch.setattr(loop, "preserved", Counting)
    counts = []
    for callbacks in ([], [EMA("model", 0.5)]):
        saved.clear()
        learner_of(*callbacks).fit(1, phases=[TrainingPhase()])
        counts.append(len(saved))
    assert counts[0] == counts[1]


def test_a_throttled_average_is_taken_at_some_steps_and_keeps_its_place() -> None:
    ema = EMA("model", 0.5)
    probe = KNNProbe("model@ema", bank=rows(), queries=rows())
    learner = learner_of(throttle(ema, StepEnd, freq=5), probe, Recorder())
    assert_order(learner, EMA, KNNProbe)
    learner.fit(1, phases=[TrainingPhase()])
    assert ema.num_averaged == 2
    assert not equal(learner.weights["model@ema"], net())


def test_an_optimizer_named_otherwise_than_its_model_counts() -> None:
    ema = EMA("0", 0.5)
    learner = learner_of(ema, optimizer={"0": sgd, "1": adam, "4": sgd})
    learner.fit(1, phases=[TrainingPhase()])
    assert ema.num_averaged == BATCHES
    assert not torch.equal(learner.weights["0@ema"].weight, net()[0].weight)


class EveryThird(TrainingPhase):
    """Accumulates the gradients of three batches by hand, and counts its steps in an attribute."""

    def __init__(self) -> None:
        self.count = 0

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            learner.backward(cross_entropy(learner.model(state.xs), state.ys) / 3)
            self.count += 1
            if self.count % 3 == 0:
                learner.update()


def checked(learner: Learner, phase: Phase, path: Path) -> None:
    assert learner.check(phases=[TrainingPhase()]) == []


def loaded(learner: Learner, phase: Phase, path: Path) -> None:
    learner.save(path)
    learner.load(path)


def loaded_weights(learner: Learner, phase: Phase, path: Path) -> None:
    torch.save(learner.model.state_dict(), path)
    learner.model.load_state_dict(torch.load(path))


def evaluated(learner: Learner, phase: Phase, path: Path) -> None:
    learner.evaluate()
    find_lr(learner, steps=3)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("between", [checked, loaded, loaded_weights, evaluated], ids=lambda f: f.__name__)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_what_is_done_between_two_steps_is_no_update(
    between: Callable[[Learner, Phase, Path], None], fused: bool, tmp_path: Path
) -> None:
    ema, phase = EMA("model", 0.5), EveryThird()
    optimizer = partial(torch.optim.Adam, lr=0.01, fused=fused)
    learner, plain = (
        learner_of(ema, Recorder(), optimizer=optimizer),
        learner_of(EMA("model", 0.5), optimizer=optimizer),
    )
    other = EveryThird()
    for batch in list(batches())[:7]:
        learner.epoch(phase, [batch])
        between(learner, phase, tmp_path / "state.pt")
        plain.epoch(other, [batch])
    assert ema.num_averaged == learner.history[EveryThird].updates[None] == 2
    assert equal(learner.weights["model@ema"], plain.weights["model@ema"])


def test_critic_steps_and_a_check_between_epochs_leave_one_average_per_update_of_each_model(tmp_path: Path) -> None:
    emas = EMA("generator", 0.9), EMA("critic", 0.9)
    learner = learner_of(*emas, Recorder(), Metrics(), KeepBestModel("training/loss_critic"), model=gan_models())
    phase = GANPhase(noise=2, critic_steps=3)
    for _ in range(3):
        learner.fit(1, data=(list(torch.split(rows()[0], 8)),), phases=[phase])  # the best weights are put back
        learner.check(rows()[0])
        learner.save(tmp_path / "state.pt")
        learner.load(tmp_path / "state.pt")
        learner = copy.deepcopy(learner)
        phase = learner.phases[GANPhase]
    updates = learner.history[GANPhase].updates
    averaged = {ema.model: ema.num_averaged for ema in learner.callbacks if isinstance(ema, EMA)}
    assert averaged == updates == {"critic": 15, "generator": 5}


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("event", [UpdateEnd, StepEnd], ids=lambda event: event.__name__)
@pytest.mark.parametrize("error", [CancelStepException(), CancelEpochException(), ValueError("broken")], ids=repr)
def test_a_step_that_is_left_after_its_update_is_averaged_there_and_then(
    event: type[Event], error: BaseException
) -> None:
    class Leave(Callback):
        reads = ("step.loss",)
        runs = 0

        @on(event, TrainingPhase)
        def leave(self, event: Event, phase: Phase, learner: Any) -> None:
            self.runs += 1
            if self.runs == 2:
                raise error

    ema = EMA("model", 0.9)
    learner = learner_of(Leave(), ema)
    with pytest.raises(ValueError, match="broken") if isinstance(error, ValueError) else nullcontext():
        learner.epoch(TrainingPhase(), list(batches())[:2])
    *_, (_, average) = train_by_hand(0.9, steps=2)
    assert ema.num_averaged == 2
    assert equal(learner.weights["model@ema"], average)


@pytest.mark.slow
def test_a_run_whose_steps_are_cancelled_after_their_updates_is_resumed_to_the_bit() -> None:
    class Leave(Callback):
        reads = ("step.loss",)
        runs = 0

        @on(UpdateEnd, TrainingPhase)
        def leave(self, event: Event, phase: Phase, learner: Any) -> None:
            self.runs += 1
            if self.runs % 3 == 2:
                raise CancelStepException

    def make() -> Learner:
        return learner_of(Leave(), EMA("model", cosine(20, 0.5, 1.0)), Recorder(), Metrics())

    assert_resumes_exactly(make, epochs=2, at=[2, 3, 11])


@pytest.mark.slow
def test_a_throttled_average_of_accumulated_updates_is_resumed_to_the_bit() -> None:
    """An update whose average waits for its turn is part of the checkpoint."""

    def make() -> Learner:
        return learner_of(throttle(EMA("model", 0.5), StepEnd, freq=4), Recorder(), Metrics())

    assert_resumes_exactly(make, epochs=2, phases=lambda: [EveryThird()], at=[3, 4, 13])


class BothWays(TrainingPhase):
    """Steps by hand from the fourth step on."""

    def __init__(self) -> None:
        self.count = 0

    def step(self, learner: Learner, batch: Any) -> None:
        self.count += 1
        (ByHand() if self.count > 3 else TrainingPhase()).step(learner, batch)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [ByHand, HalfByHand, BothWays, EveryThird])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_run_whose_optimizer_is_stepped_by_hand_is_resumed_to_the_bit(phase: type[Phase], fused: bool) -> None:
    def make() -> Learner:
        optimizer = partial(torch.optim.Adam, lr=0.01, fused=fused)
        return learner_of(EMA("model", 0.9), Recorder(), Metrics(), optimizer=optimizer)

    assert_resumes_exactly(make, epochs=1, phases=lambda: [phase()], at=[1, 4])


def test_each_phase_of_a_cycle_is_followed_in_its_own_way() -> None:
    ema = EMA("model", 0.9)
    learner = learner_of(ema)
    learner.fit(2, phases=[TrainingPhase(), ByHand(), ByHandWithEvents()])
    assert ema.num_averaged == 2 * 3 * BATCHES


def test_a_step_by_hand_is_averaged_where_it_is_cancelled_and_where_the_rate_is_0() -> None:
    class Cancelling(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                learner.optimizer.zero_grad()
                cross_entropy(learner.model(state.xs), state.ys).backward()
                learner.optimizer.step()
                raise CancelStepException

    for optimizer in (adam, partial(torch.optim.SGD, lr=0.0)):
        ema = EMA("model", 0.9)
        learner_of(ema, optimizer=optimizer).fit(1, phases=[Cancelling()])
        assert ema.num_averaged == BATCHES


def test_weights_that_a_callback_writes_in_a_step_without_an_update_are_no_update() -> None:
    class Clamp(Callback):
        reads, writes = ("model",), ("model",)

        @on(StepEnd, TrainingPhase)
        def clamp(self, event: Event, phase: Phase, learner: Any) -> None:
            with torch.no_grad():
                for parameter in learner.model.parameters():
                    parameter.clamp_(-0.5, 0.5)

    ema = EMA("model", 0.5)
    learner = learner_of(ema, Clamp())
    learner.epoch(TrainingPhase(), list(batches())[:1])
    averaged = learner.weights["model@ema"][0].weight
    assert torch.equal(averaged, torch.lerp(net()[0].weight, learner.model[0].weight, 0.5))  # clamped before
    phase = EveryThird()
    phase.count = 2
    learner.epoch(phase, list(batches())[:8])
    assert ema.num_averaged == 1 + 3


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD], ids=lambda o: o.__name__)
def test_no_hook_is_left_on_an_optimizer_not_even_while_training(optimizer: Any) -> None:
    hooks: list[int] = []

    def look(learner: Any) -> None:
        hooks.append(
            len(learner.optimizer._optimizer_step_post_hooks) + len(learner.optimizer._optimizer_step_pre_hooks)
        )

    callbacks = EMA("model", 0.5), CustomCallback(look, StepEnd, reads=("optimizer",))
    learner = learner_of(*callbacks, optimizer=partial(optimizer, lr=0.01, fused=True))
    learner.fit(1, phases=[ByHand(), TrainingPhase()])
    learner.replace_callback(EMA("model", 0.9))
    learner.fit(1, phases=[TrainingPhase()])
    look(learner)
    assert set(hooks) == {0}


def test_two_optimizers_over_one_model_give_one_average_per_step() -> None:
    class Turns(TrainingPhase):
        count = 0

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                learner.backward(cross_entropy(learner.model(state.xs), state.ys))
                learner.update()

    whole, head = EMA("model", 0.5), EMA("4", 0.5, view="head")
    learner = learner_of(whole, head, optimizer={"0": sgd, "1": sgd, "4": adam})
    learner.fit(1, phases=[Turns()])
    assert (whole.num_averaged, head.num_averaged) == (BATCHES, BATCHES)


# Steps that are compiled whole


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run graphs as they were traced, without gradients as the product does, and without a compiler."""

    def lower(graph: Any, inputs: Any, device: Any) -> Any:
        return torch.no_grad()(graph)

    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lower)


def views(xs: Tensor) -> Tensor:
    return xs + torch.linspace(0, 1, xs.numel()).reshape(xs.shape)


def byol_models() -> dict[str, nn.Module]:
    torch.manual_seed(5)
    student = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    return {
        "student": student,
        "teacher": copy.deepcopy(student).requires_grad_(False),
        "predictor": nn.Linear(4, 4),
    }


def byol_by_hand(decay: float) -> dict[str, nn.Module]:
    """Train BYOL in plain PyTorch."""
    models = byol_models()
    student, teacher, predictor = models.values()
    steppers = [torch.optim.AdamW(models[name].parameters(), lr=0.01, fused=True) for name in ("student", "predictor")]
    for _ in range(2):
        for xs in torch.split(rows()[0], 8):
            for stepper in steppers:
                stepper.zero_grad()
            pairs = [(views(xs), views(xs))] * 2
            losses = [
                2 - 2 * cosine_similarity(predictor(student(a)), teacher(b).detach(), dim=1).mean() for a, b in pairs
            ]
            (sum(losses) / 2).backward()
            for stepper in steppers:
                stepper.step()
            with torch.no_grad():
                for a, b in zip(teacher.parameters(), student.parameters(), strict=True):
                    a.lerp_(b, 1 - decay)
    return models


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("compile", [False, "step"], ids=["eager", "compiled"])
def test_a_teacher_moves_with_a_fused_optimizer_as_in_a_hand_written_loop(compile: Any) -> None:
    ema = EMA("student", 0.9, into="teacher")
    learner = learner_of(
        ema,
        Recorder(),
        model=byol_models(),
        data=(list(torch.split(rows()[0], 8)),),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        accelerator=Accelerator("cpu", compile=compile),
    )
    assert learner.optimizer.student.param_groups[0]["fused"]
    learner.fit(2, phases=[BYOLPhase(TwoViews(views))])
    assert ema.num_averaged == learner.history[BYOLPhase].updates["student"] == 10
    expected = byol_by_hand(0.9)
    for name in ("student", "teacher"):
        for a, b in zip(learner.weights[name].parameters(), expected[name].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("phase", [GANPhase, ByHand, EveryThird], ids=lambda phase: phase.__name__)
def test_compiled_steps_take_the_averages_that_eager_ones_take(phase: type[Phase]) -> None:
    class Body(TrainingPhase):
        """The body of a step by hand."""

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            learner.optimizer.zero_grad()
            cross_entropy(learner.model(state.xs), state.ys).backward()
            learner.optimizer.step()

    class Third(TrainingPhase):
        def __init__(self) -> None:
            self.is_third, self.count = False, 0

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            learner.backward(cross_entropy(learner.model(state.xs), state.ys))
            if self.is_third:
                learner.update()

        def finish(self, learner: Any, state: Any) -> None:
            self.count += 1
            self.is_third = self.count % 3 == 2

    found = []
    for compile in (False, "step"):
        torch.manual_seed(6)
        gan = phase is GANPhase
        emas = [EMA("generator", 0.9), EMA("critic", 0.9)] if gan else [EMA("model", 0.9)]
        learner = learner_of(
            *emas,
            model=gan_models() if gan else nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)),
            optimizer=partial(torch.optim.Adam if phase is ByHand else torch.optim.AdamW, lr=0.01),
            accelerator=Accelerator("cpu", compile=compile),
            **({"data": (list(torch.split(rows()[0], 8)),)} if gan else {}),
        )
        runs = {GANPhase: lambda: GANPhase(noise=2, critic_steps=2), ByHand: Body, EveryThird: Third}[phase]()
        learner.fit(2, phases=[runs])
        found.append(([ema.num_averaged for ema in emas], [learner.weights[ema.average] for ema in emas]))
    (counts, averages), (compiled_counts, compiled) = found
    assert counts == compiled_counts
    for a, b in zip(averages, compiled, strict=True):
        for one, other in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# What the average is before it begins, and after others have been loaded


def other_net() -> nn.Sequential:
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def test_until_the_first_step_the_average_is_the_live_weights_whatever_they_are(tmp_path: Path) -> None:
    learner = learner_of(EMA("model", 0.5), Recorder(), Metrics())
    other = other_net()
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    learner.load_weights(tmp_path / "weights.pt")
    assert learner.evaluate(phase=AveragedValidationPhase())["loss@ema"] == learner.evaluate()["loss"]
    assert equal(learner.weights["model@ema"], other)
    learner.model.load_state_dict(net().state_dict())
    assert equal(learner.weights["model@ema"], net())
    assert equal(learner.weights["4@ema"], net()[4])
    copied = copy.deepcopy(learner)
    copied.model.load_state_dict(other.state_dict())
    assert equal(copied.weights["model@ema"], other)
    assert equal(learner.weights["model@ema"], net())


def test_after_other_weights_were_loaded_the_average_begins_with_them(tmp_path: Path) -> None:
    ema = EMA("model", 0.5)
    learner = learner_of(ema)
    learner.fit(1, phases=[TrainingPhase()])
    other = other_net()
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    learner.load_weights(tmp_path / "weights.pt")
    assert equal(learner.weights["model@ema"], other)
    learner.epoch(TrainingPhase(), [next(iter(batches()))])
    assert ema.num_averaged == BATCHES + 1
    assert torch.equal(
        learner.weights["model@ema"][0].weight, torch.lerp(other[0].weight, learner.model[0].weight, 0.5)
    )


def test_weights_loaded_for_one_model_leave_the_averages_of_others(tmp_path: Path) -> None:
    learner = learner_of(EMA("student"), EMA("teacher"), model=with_teacher())
    torch.save(other_net().state_dict(), tmp_path / "weights.pt")
    learner.fit(1, phases=[StudentPhase()])
    before = copy.deepcopy(learner.weights["student@ema"])
    learner.load_weights(tmp_path / "weights.pt", "teacher")
    assert equal(learner.weights["teacher@ema"], other_net())
    assert equal(learner.weights["student@ema"], before)
    learner.load_weights(tmp_path / "weights.pt", "student")
    assert equal(learner.weights["student@ema"], other_net())


def test_an_average_that_was_given_weights_of_its_own_begins_with_those(tmp_path: Path) -> None:
    other = other_net()
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    learner = learner_of(EMA("model", 0.5))
    learner.load_weights(tmp_path / "weights.pt", "model@ema")
    assert equal(learner.weights["model@ema"], other)
    learner.epoch(TrainingPhase(), [next(iter(batches()))])
    assert torch.equal(
        learner.weights["model@ema"][0].weight, torch.lerp(other[0].weight, learner.model[0].weight, 0.5)
    )


def test_a_learner_that_is_loaded_before_its_first_step_has_an_average_that_follows_again(tmp_path: Path) -> None:
    learner = learner_of(EMA("model", 0.5))
    learner.save(tmp_path / "start.pt")
    learner.fit(1, phases=[TrainingPhase()])
    learner.load(tmp_path / "start.pt")
    assert equal(learner.weights["model@ema"], net())
    learner.model.load_state_dict(other_net().state_dict())
    assert equal(learner.weights["model@ema"], other_net())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD], ids=lambda o: o.__name__)
def test_fused_optimizers_are_followed(optimizer: Any) -> None:
    fused = partial(optimizer, lr=0.01, fused=True)
    *_, (model, average) = train_by_hand(0.9, fused, steps=BATCHES)
    learner = learner_of(EMA("model", 0.9), optimizer=fused)
    learner.fit(1, phases=[TrainingPhase()])
    assert equal(learner.model, model)
    assert equal(learner.weights["model@ema"], average)


# Names


def test_two_averages_of_one_model_stand_side_by_side() -> None:
    *_, (_, fast) = train_by_hand(0.5, steps=BATCHES)
    *_, (_, slow) = train_by_hand(0.99, steps=BATCHES)
    learner = learner_of(EMA("model", 0.5), EMA("model", 0.99, view="slow"))
    learner.fit(1, phases=[TrainingPhase()])
    assert equal(learner.weights["model@ema"], fast)
    assert equal(learner.weights["model@slow"], slow)
    assert list(learner.weights) == ["model", "model@ema", "model@slow"]


def test_averages_of_two_models_stand_side_by_side() -> None:
    learner = learner_of(
        EMA("generator", 0.5), EMA("critic", 0.9), model=gan_models(), data=(rows()[0],), optimizer=sgd
    )
    learner.fit(1, phases=[GANPhase(noise=2)])
    for name in ("generator", "critic"):
        assert not torch.equal(learner.weights[f"{name}@ema"].weight, learner.weights[name].weight)
        assert learner.weights[f"{name}@ema"].weight.shape == learner.weights[name].weight.shape


def test_two_averages_under_one_name_are_refused_with_the_view_to_type() -> None:
    with pytest.raises((CallbackConflictError, ModelError), match="view="):
        learner_of(EMA("model", 0.5), EMA("model", 0.99))


def test_an_average_and_one_of_its_parts_under_one_name_are_refused() -> None:
    with pytest.raises((CallbackConflictError, ModelError), match="ema"):
        learner_of(EMA("model", 0.5), EMA("0", 0.99))


@pytest.mark.parametrize("name", ["0", "model.0"])
def test_a_part_of_a_single_model_is_averaged_by_its_name(name: str) -> None:
    learner = learner_of(EMA(name, 0.5))
    learner.epoch(TrainingPhase(), [next(iter(batches()))])
    average = learner.weights["0@ema"]
    assert isinstance(average, nn.Linear)
    assert average is learner.weights["model.0@ema"]
    assert torch.equal(average.weight, torch.lerp(net()[0].weight, learner.model[0].weight, 0.5))
    assert "4@ema" not in learner.weights


def test_a_part_of_a_named_model_is_averaged_by_its_name() -> None:
    models = {"encoder": net(), "head": nn.Linear(3, 3)}

    class Together(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                learner.backward(cross_entropy(learner.model.head(learner.model.encoder(state.xs)), state.ys))
                learner.update()

    learner = learner_of(EMA("encoder.0", 0.5), model=models)
    learner.epoch(Together(), [next(iter(batches()))])
    expected = torch.lerp(net()[0].weight, learner.model.encoder[0].weight, 0.5)
    assert torch.equal(learner.weights["encoder.0@ema"].weight, expected)


def test_a_part_of_an_averaged_model_is_found_by_its_name() -> None:
    learner = learner_of(EMA("model"))
    assert learner.weights["4@ema"] is learner.weights["model@ema"][4]
    learner = learner_of(EMA("student"), model=with_teacher())
    assert learner.weights["student.4@ema"] is learner.weights["student@ema"][4]


def test_a_part_of_the_student_can_move_a_part_of_the_teacher() -> None:
    learner = learner_of(EMA("student.0", 0.5, into="teacher.0"), model=with_teacher())
    learner.fit(1, phases=[StudentPhase()])
    assert not torch.equal(learner.model.teacher[0].weight, net()[0].weight)
    assert torch.equal(learner.model.teacher[4].weight, net()[4].weight)


def test_the_order_says_that_the_average_is_taken_before_whoever_reads_it() -> None:
    look = CustomCallback(print, StepEnd, reads=("model@ema",), name="look")
    learner = learner_of(EMA("model"), look, default_callbacks=True)
    assert_order(learner, EMA, "look")
    assert "EMA writes 'model@ema' at" in learner.callbacks.explain("model@ema")
    assert "EMA writes" not in learner.callbacks.explain("model")


def test_a_teacher_is_moved_before_whoever_reads_the_teacher() -> None:
    probe = KNNProbe("teacher", bank=rows(), queries=rows())
    learner = learner_of(EMA("student", into="teacher"), probe, model=with_teacher(), default_callbacks=True)
    assert_order(learner, EMA, KNNProbe)
    assert learner.callbacks.writers("model.teacher") == ["EMA"]


# Mistakes


def trained_teacher() -> dict[str, nn.Module]:
    return {"student": net(), "teacher": net()}


def wide_teacher() -> dict[str, nn.Module]:
    return {"student": nn.Linear(3, 3), "teacher": nn.Linear(3, 4).requires_grad_(False)}


def other_teacher() -> dict[str, nn.Module]:
    return {"student": net(), "teacher": nn.Linear(3, 3).requires_grad_(False)}


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


MISTAKES: dict[str, tuple[Callable[[], EMA], Callable[[], Any], type[Exception], str]] = {
    "unknown model": (lambda: EMA("studnt"), with_teacher, ModelError, "'studnt'.*did you mean 'student'"),
    "unknown part": (lambda: EMA("encoder"), net, ModelError, r"no weights 'encoder'.*it has \['0', '1'"),
    "unknown part of a model": (lambda: EMA("student.9"), with_teacher, ModelError, "has no part '9'"),
    "unknown teacher": (lambda: EMA("student", into="techer"), with_teacher, ModelError, "did you mean 'teacher'"),
    "an average": (lambda: EMA("student@ema"), with_teacher, ModelError, r"expected live weights, such as EMA\('G'"),
    "lazy": (lambda: EMA("model"), lazy, ModelError, "seen no batch.*run the model on one before"),
    "trained teacher": (
        lambda: EMA("student", into="teacher"),
        trained_teacher,
        ModelError,
        r"write teacher\.requires_grad_\(False\)",
    ),
    "another width": (
        lambda: EMA("student", into="teacher"),
        wide_teacher,
        ModelError,
        r"'weight' has shape \(3, 3\) in one and \(4, 3\) in the other.*copy\.deepcopy\(student\)",
    ),
    "other parameters": (
        lambda: EMA("student", into="teacher"),
        other_teacher,
        ModelError,
        r"'0\.weight' has shape \(8, 3\) in one and none in the other",
    ),
    "into itself": (lambda: EMA("student", into="student"), with_teacher, ModelError, "into itself"),
    "negative decay": (lambda: EMA("model", -0.1), net, ValueError, "from 0 to 1, e.g. 0.999"),
    "decay above 1": (lambda: EMA("model", 1.001), net, ValueError, "from 0 to 1"),
    "no name": (lambda: EMA("", 0.9), net, ModelError, "expected live weights"),
    "decay True": (lambda: EMA("model", True), net, ValueError, "from 0 to 1"),
    "decay NaN": (lambda: EMA("model", float("nan")), net, ValueError, "from 0 to 1"),
    "buffers": (lambda: EMA("model", buffers="share"), net, ValueError, "expected 'copy', 'average' or 'keep'"),  # type: ignore[arg-type]  # on purpose
    "a decay for a name": (lambda: EMA(0.999), net, ModelError, r"EMA\(0\.999\) was given; expected live weights"),  # type: ignore[arg-type]  # on purpose
    "into a module": (lambda: EMA("model", into=net()), net, ModelError, "expected a model's name: into='teacher'"),  # type: ignore[arg-type]  # on purpose
    "name of the view": (lambda: EMA("model", view="my view"), net, ModelError, "expected the name of a weights view"),
}


@pytest.mark.slow(quick=10)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_says_what_to_type_and_changes_nothing(mistake: str) -> None:
    make, model, error, words = MISTAKES[mistake]
    learner = learner_of(Recorder(), model=model(), optimizer=sgd if mistake != "lazy" else torch.optim.SGD)
    names, order, tensors = list(learner.weights), learner.callbacks.order, list(learner.models.values())
    with pytest.raises(error, match=f"(?s){words}"):
        learner.add_callback(make())
    assert list(learner.weights) == names
    assert learner.callbacks.order == order
    assert list(learner.models.values()) == tensors
    with pytest.raises(error, match=f"(?s){words}"):
        learner_of(make(), model=model(), optimizer=sgd if mistake != "lazy" else torch.optim.SGD)


def test_callbacks_that_are_refused_leave_no_average_behind() -> None:
    learner = learner_of(Recorder())
    with pytest.raises(ModelError, match="no weights 'nope'"):
        learner.set_callbacks([Recorder(), Metrics(), EMA("model"), KNNProbe("nope")])
    assert learner.callbacks.order == ["Recorder"]
    assert list(learner.weights) == ["model"]


def test_a_lazy_teacher_is_refused_in_words() -> None:
    models = {"student": nn.Linear(3, 3), "teacher": nn.LazyLinear(3)}
    with pytest.raises(ModelError, match="seen no batch"):
        learner_of(EMA("student", into="teacher"), model=models)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weights_that_cannot_be_copied_say_what_to_use_instead() -> None:
    with pytest.raises(ModelError, match=r"cannot copy these weights.*torch\.nn\.utils\.parametrizations"):
        learner_of(EMA("model"), model=nn.utils.weight_norm(nn.Linear(3, 3)))
    learner = learner_of(EMA("model"), model=nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), optimizer=sgd)
    learner.fit(1, phases=[TrainingPhase()])
    assert not torch.equal(learner.weights["model@ema"].weight, learner.model.weight)


def test_a_schedule_that_leaves_0_to_1_is_an_error_before_the_average_moves() -> None:
    ema = EMA("model", lambda t: 0.5 if t < 3 else 1.5)
    learner = learner_of(ema)
    *_, (_, average) = train_by_hand(0.5, steps=3)
    with pytest.raises(ValueError, match=r"the decay 1\.5; expected a weight of the past from 0 to 1"):
        learner.fit(1, phases=[TrainingPhase()])
    assert ema.num_averaged == 3
    assert equal(learner.weights["model@ema"], average)


def test_a_reader_of_an_average_that_nobody_keeps_is_told_what_to_add() -> None:
    look = CustomCallback(print, StepEnd, reads=("model.student@ema",))
    with pytest.raises(MissingProducerError, match=r"reads 'model\.student@ema'.*EMA\('student', 0\.999\)"):
        learner_of(look, model=with_teacher())
    with pytest.raises(MissingProducerError, match=r"EMA\('model', 0\.999\)"):
        learner_of(CustomCallback(print, StepEnd, reads=("model@ema",)))


# State


def saved(ema: EMA) -> Any:
    """Give the state as a file gives it back."""
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("through_a_file", [False, True])
@pytest.mark.parametrize("into", [None, "teacher"], ids=["copy", "teacher"])
def test_an_average_goes_on_from_its_state_to_the_same_bits(into: str | None, through_a_file: bool) -> None:
    decay = cosine(40, 0.5, 1.0)
    phase = StudentPhase()
    whole = learner_of(EMA("student", decay, into=into, buffers="average"), model=with_teacher())
    whole.fit(4, phases=[phase])

    first = EMA("student", decay, into=into, buffers="average")
    learner = learner_of(first, model=with_teacher())
    learner.fit(2, phases=[phase])
    state = saved(first) if through_a_file else copy.deepcopy(first.state_dict())
    second = EMA("student", decay, into=into, buffers="average")
    learner.set_callbacks([second])
    second.load_state_dict(state)
    assert second.num_averaged == 2 * BATCHES
    learner.fit(2, phases=[phase])
    assert_same_bits(whole, learner)
    assert equal(whole.weights[first.average], learner.weights[first.average])
    assert buffers_equal(whole.weights[first.average], learner.weights[first.average])


def test_a_state_can_be_given_before_the_learner_is_made() -> None:
    first = EMA("model", 0.5)
    learner_of(first).fit(1, phases=[TrainingPhase()])
    second = EMA("model", 0.5)
    second.load_state_dict(saved(first))
    learner = learner_of(second)
    kept = saved(first)["average"]
    assert second.num_averaged == BATCHES
    assert all(torch.equal(kept[name], tensor) for name, tensor in learner.weights["model@ema"].state_dict().items())


def test_the_state_of_a_copy_holds_the_average_and_that_of_a_teacher_only_the_count() -> None:
    learner = learner_of(EMA("model", 0.5))
    learner.fit(1, phases=[TrainingPhase()])
    state = learner.get_callback(EMA).state_dict()
    assert state["num_averaged"] == BATCHES
    assert state["average"].keys() == net().state_dict().keys()
    learner = learner_of(EMA("student", into="teacher"), model=with_teacher())
    state = learner.get_callback(EMA).state_dict()
    assert (state["num_averaged"], state["average"]) == (0, None)


def test_in_a_second_learner_the_average_and_its_schedule_begin_anew() -> None:
    ema = EMA("model", cosine(20, 0.0, 1.0))
    averages = []
    for _ in range(2):
        learner = learner_of(ema)
        learner.fit(1, phases=[TrainingPhase()])
        assert ema.num_averaged == BATCHES
        averages.append(learner.weights["model@ema"])
    assert equal(*averages)
    assert averages[0] is not averages[1]


def test_a_copied_learner_averages_its_own_weights() -> None:
    learner = learner_of(EMA("model", 0.5))
    learner.fit(1, phases=[TrainingPhase()])
    before = copy.deepcopy(learner.weights["model@ema"])
    copied = copy.deepcopy(learner)
    copied.fit(1, phases=[TrainingPhase()])
    assert equal(learner.weights["model@ema"], before)
    learner.fit(1, phases=[TrainingPhase()])
    assert equal(learner.weights["model@ema"], copied.weights["model@ema"])
    assert learner.weights["model@ema"] is not copied.weights["model@ema"]


# Watching


def test_training_is_the_same_to_the_bit_with_and_without_copies() -> None:
    assert_observer(EMA("model", 0.9), learner_of)
    plain, watched = learner_of(), learner_of(EMA("model", 0.9), EMA("0", cosine(9, 0.0, 1.0), view="b"))
    plain.fit(3)
    watched.fit(3, phases=[TrainingPhase(), ValidationPhase(), AveragedValidationPhase()])
    assert_same_bits(plain, watched)


def test_a_gan_trains_the_same_to_the_bit_with_and_without_copies() -> None:
    plain, watched = (
        learner_of(*given, model=gan_models(), data=(rows()[0],))
        for given in ((), (EMA("generator"), EMA("critic", 0.5)))
    )
    for learner in (plain, watched):
        learner.fit(2, phases=[GANPhase("hinge", noise=2, critic_steps=2)])
    assert_same_bits(plain, watched)


def test_an_average_can_be_added_to_a_trained_learner_and_begins_as_its_weights() -> None:
    learner = learner_of()
    learner.fit(1)
    learner.add_callback(EMA("model", 0.5))
    assert equal(learner.weights["model@ema"], learner.model)
    assert buffers_equal(learner.weights["model@ema"], learner.model)
    learner.fit(1)
    assert not equal(learner.weights["model@ema"], learner.model)
    plain = learner_of()
    plain.fit(2)
    assert_same_bits(plain, learner)


def test_a_removed_average_is_gone_and_training_goes_on() -> None:
    plain, learner = learner_of(), learner_of(EMA("model", 0.5))
    for each in (plain, learner):
        each.fit(1)
    assert isinstance(learner.remove_callback(EMA), EMA)
    learner.fit(1)
    plain.fit(1)
    assert_same_bits(plain, learner)
    assert "model@ema" not in learner.weights
    with pytest.raises(PhaseError, match=r"EMA\('model', 0\.999\)"):
        learner.epoch(AveragedValidationPhase())


def test_an_average_that_somebody_reads_cannot_be_removed() -> None:
    learner = learner_of(Recorder(), EMA("model"), KNNProbe("model@ema"))
    with pytest.raises(MissingProducerError, match="KNNProbe reads 'model@ema'"):
        learner.remove_callback(EMA)
    assert learner.callbacks.order == ["EMA", "Recorder", "KNNProbe"]
    learner.fit(1)
    assert len(learner.history["validation/knn_model@ema"]) == 1


# Phases that run the average


def in_eval(model: nn.Module, data: Any = None) -> float:
    """Give the mean loss over the rows in plain PyTorch."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        losses = [cross_entropy(model(xs), ys) for xs, ys in (batches() if data is None else data)]
    return torch.stack(losses).mean().item()


def test_the_metrics_of_the_average_carry_its_name() -> None:
    learner = learner_of(EMA("model", 0.9), Recorder(), Metrics())
    learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), AveragedValidationPhase()])
    assert learner.history["validation/loss@ema"][-1] == pytest.approx(in_eval(learner.weights["model@ema"]), rel=1e-6)
    assert learner.history["validation/loss"][-1] == pytest.approx(in_eval(learner.model), rel=1e-6)
    assert learner.history["validation/loss"][-1] != learner.history["validation/loss@ema"][-1]
    assert list(learner.history.metrics[AveragedValidationPhase]) == ["loss@ema"]
    assert list(learner.history.metrics[ValidationPhase]) == ["loss"]


def test_the_printed_line_names_the_average(capsys: pytest.CaptureFixture[str]) -> None:
    learner = learner_of(EMA("model", 0.9), default_callbacks=True)
    learner.fit(1, phases=[TrainingPhase(), AveragedValidationPhase()])
    lines = capsys.readouterr().out.splitlines()
    assert "loss@ema" in lines[1]
    assert "loss@ema" not in lines[0]


def test_evaluation_of_the_average_carries_its_name() -> None:
    learner = learner_of(EMA("model", 0.9), Recorder(), Metrics())
    learner.fit(1, phases=[TrainingPhase()])
    found = learner.evaluate(phase=AveragedValidationPhase())
    assert list(found) == ["loss@ema"]
    assert found["loss@ema"] == pytest.approx(in_eval(learner.weights["model@ema"]), rel=1e-6)
    assert list(learner.evaluate()) == ["loss"]


def test_predictions_can_be_the_averages() -> None:
    class Averaged(PredictionPhase):
        model_view = "ema"

    learner = learner_of(EMA("model", 0.9))
    learner.fit(1, phases=[TrainingPhase()])
    xs, _ = rows()
    with torch.no_grad():
        expected = copy.deepcopy(learner.weights["model@ema"]).eval()(xs)
    torch.testing.assert_close(learner.predict(xs, phase=Averaged()), expected)
    assert not torch.equal(learner.predict(xs), learner.predict(xs, phase=Averaged()))


class Pair(NamedTuple):
    generator: nn.Module
    critic: nn.Module


def test_in_a_named_tuple_the_averaged_model_stands_in_its_place() -> None:
    seen: list[Any] = []

    class Look(ValidationPhase):
        model_view = "ema"

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, real=batch):
                seen.append(learner.model)

    models = Pair(**gan_models())  # type: ignore[arg-type]  # modules by name
    learner = learner_of(EMA("generator"), model=models, data=(rows()[0], [rows()[0]]))
    learner.fit(1, phases=[GANPhase(noise=2), Look()])
    assert isinstance(seen[0], Pair)
    assert seen[0].generator is learner.weights["generator@ema"]
    assert seen[0].critic is models.critic
    assert learner.model is models


def test_the_validation_twin_of_a_gan_can_run_the_average_of_the_generator() -> None:
    class Averaged(GANValidationPhase):
        model_view = "ema"

    phase = GANPhase(noise=2)
    learner = learner_of(
        EMA("generator", 0.5), Recorder(), Metrics(), model=gan_models(), data=(rows()[0], rows()[0]), optimizer=sgd
    )
    learner.fit(1, phases=[phase, GANValidationPhase(phase), Averaged(phase)])
    assert list(learner.history.metrics[Averaged]) == ["loss_critic@ema", "loss_generator@ema"]
    state, real = learner.step, rows()[0][32:]  # the last batch
    fake = learner.weights["generator@ema"](state.noise)
    assert torch.equal(state.fake, fake)
    assert torch.equal(state.fake_scores, learner.model.critic(fake))
    assert torch.equal(state.real, real)


def raising(event: type[Event], error: BaseException, phase: type[Phase] = AveragedValidationPhase) -> CustomCallback:
    def throw(learner: Any) -> None:
        raise error

    return CustomCallback(throw, event, phase, reads=(), name="thrower")


LEAVING: list[BaseException] = [
    RuntimeError("broken"),
    KeyboardInterrupt(),
    CancelStepException(),
    CancelEpochException(),
    CancelFittingException("enough"),
]


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("event", [EpochBegin, StepBegin, LossBegin, StepEnd, EpochEnd], ids=lambda e: e.__name__)
@pytest.mark.parametrize("error", LEAVING, ids=lambda e: type(e).__name__)
def test_however_a_phase_with_the_average_is_left_the_live_weights_are_back(
    error: BaseException, event: type[Event]
) -> None:
    learner = learner_of(EMA("model", 0.9), raising(event, error))
    live = learner.model
    learner.fit(1, phases=[TrainingPhase()])
    before, modes = bits(learner), [module.training for module in live.modules()]
    kept = copy.deepcopy(learner.weights["model@ema"].state_dict())
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="broken"):
            learner.fit(1, phases=[AveragedValidationPhase()])
    elif isinstance(error, CancelStepException) and event in (EpochBegin, EpochEnd):
        with pytest.raises(CancelStepException):  # there is no step to end
            learner.fit(1, phases=[AveragedValidationPhase()])
    else:
        learner.fit(1, phases=[AveragedValidationPhase()])
    assert learner.model is live is learner.weights["model"]
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())
    assert all(torch.equal(kept[name], tensor) for name, tensor in learner.weights["model@ema"].state_dict().items())
    assert [module.training for module in live.modules()] == modes
    assert learner.scope is None


@pytest.mark.slow(quick=12)
@pytest.mark.parametrize("error", LEAVING, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("run", ["evaluate", "epoch", "runepoch", "runstep", "inside a step"])
def test_the_live_weights_are_back_after_an_error_in_a_step_of_the_average(run: str, error: BaseException) -> None:
    shown: list[nn.Module] = []

    class Broken(AveragedValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]):
                shown.append(learner.model)
                raise error

    class Around(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]):
                Broken().step(learner, batch)

    learner = learner_of(EMA("model", 0.9))
    live, batch = learner.model, next(iter(batches()))

    def attempt() -> None:
        if run == "evaluate":
            learner.evaluate([batch], phase=Broken())
        elif run == "epoch":
            learner.epoch(Broken(), [batch])
        elif run == "runepoch":
            phase = Broken()
            with runepoch(learner, phase):
                assert learner.model is learner.weights["model@ema"]
                phase.step(learner, batch)
        elif run == "runstep":
            Broken().step(learner, batch)
        else:
            learner.epoch(Around(), [batch])

    caught: list[BaseException] = []
    try:
        attempt()
    except BaseException as left:
        caught.append(left)
    assert caught in ([], [error])
    assert bool(caught) or isinstance(error, (CancelStepException, CancelEpochException))
    assert shown == [learner.weights["model@ema"]]
    assert learner.model is live is learner.weights["model"]
    assert equal(live, net())
    assert torch.is_grad_enabled()


def test_a_bare_step_and_a_bare_epoch_show_the_average_and_then_the_live_weights() -> None:
    learner = learner_of(EMA("model", 0.9))
    live, average, phase = learner.model, learner.weights["model@ema"], AveragedValidationPhase()
    xs, ys = next(iter(batches()))
    with runstep(learner, phase, xs=xs, ys=ys):
        assert learner.model is average
    assert learner.model is live
    with runepoch(learner, phase):
        assert learner.model is average
        with runstep(learner, phase, xs=xs, ys=ys):
            assert learner.model is average
        assert learner.model is average
        with runstep(learner, ValidationPhase(), xs=xs, ys=ys):
            assert learner.weights["model"] is live
    assert learner.model is live


def test_whoever_watches_a_phase_of_the_average_can_ask_for_either_weights() -> None:
    seen: list[tuple[Any, Any]] = []
    look = CustomCallback(
        lambda learner: seen.append((learner.weights["model"], learner.weights["model@ema"])),
        StepEnd,
        AveragedValidationPhase,
        reads=("model", "model@ema"),
    )
    learner = learner_of(EMA("model", 0.9), look)
    learner.epoch(AveragedValidationPhase())
    assert seen == [(learner.model, learner.weights["model@ema"])] * BATCHES


def run_by(way: str, learner: Learner, phase: Phase) -> None:
    """Run a phase in one of the ways there are."""
    if way == "fit":
        learner.fit(1, phases=[*([] if phase.gradients else [TrainingPhase()]), phase])
    elif way == "epoch":
        learner.epoch(phase)
    elif way == "evaluate":
        learner.evaluate(phase=phase)
    else:
        with runepoch(learner, phase) if way == "runepoch" else runstep(learner, phase):
            raise AssertionError("it began")


@pytest.mark.parametrize("way", ["fit", "epoch", "evaluate", "runepoch", "runstep"])
def test_without_an_average_such_a_phase_is_refused_before_anything_is_changed(way: str) -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder, Recorder())
    live, before = learner.model, bits(learner)
    with pytest.raises(PhaseError, match=r"runs the weights '@ema', and there are none;.*EMA\('model', 0\.999\)"):
        run_by(way, learner, AveragedValidationPhase())
    assert recorder.events == []
    assert learner.model is live
    assert learner.scope is None
    assert learner.phases == {}
    assert not any(learner.streams.positions().values())
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())


def test_the_view_that_a_phase_runs_must_be_one_of_the_model() -> None:
    learner = learner_of(EMA("0"))
    with pytest.raises(PhaseError, match=r"there are \['0@ema'\]; keep them with a callback: EMA\('model', 0\.999\)"):
        learner.epoch(AveragedValidationPhase())


class TrainTheAverage(TrainingPhase):
    model_view = "ema"


@pytest.mark.parametrize("way", ["fit", "epoch", "runepoch", "runstep"])
def test_a_training_phase_of_the_average_is_refused(way: str) -> None:
    learner = learner_of(EMA("model", 0.9))
    with pytest.raises(PhaseError, match="has gradients and runs the weights '@ema'; a view is not trained"):
        run_by(way, learner, TrainTheAverage())
    assert equal(learner.weights["model@ema"], net())
    assert learner.model is learner.weights["model"]


def test_a_phase_of_the_average_in_train_mode_puts_the_average_into_it_and_back() -> None:
    modes: list[bool] = []

    class MonteCarlo(AveragedValidationPhase):
        train_mode = True

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]):
                modes.append(learner.model[3].training)

    learner = learner_of(EMA("model", 0.9))
    learner.epoch(MonteCarlo(), [next(iter(batches()))])
    assert modes == [True]
    assert not learner.weights["model@ema"][3].training


def test_a_user_gan_keeps_the_average_of_its_generator_without_a_line_for_it() -> None:
    class GAN(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            G, D = learner.model  # noqa: N806 - as the paper calls them
            with runstep(learner, self, real=batch) as (_, state):
                state.fake = G(torch.randn(len(state.real), 2))
                with learner.optimizing("D") as d:
                    d.loss = softplus(-D(state.real)).mean() + softplus(D(state.fake.detach())).mean()
                with learner.optimizing("G") as g:
                    g.loss = softplus(-D(state.fake)).mean()

    torch.manual_seed(3)
    models = {"G": nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "D": nn.Linear(3, 1)}
    average = copy.deepcopy(models["G"])
    reals = list(torch.split(rows()[0], 8))
    learner = learner_of(EMA("G", 0.8), model=copy.deepcopy(models), data=(reals,), optimizer=sgd)
    learner.fit(1, phases=[GAN()])

    G, D = models["G"], models["D"]  # noqa: N806
    steppers = sgd(D.parameters()), sgd(G.parameters())
    for step, real in enumerate(reals):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        fake = G(torch.randn(len(real), 2))
        steppers[0].zero_grad()
        (softplus(-D(real)).mean() + softplus(D(fake.detach())).mean()).backward()
        steppers[0].step()
        steppers[1].zero_grad()
        softplus(-D(fake)).mean().backward()
        steppers[1].step()
        with torch.no_grad():
            for a, b in zip(average.parameters(), G.parameters(), strict=True):
                a.copy_(torch.lerp(a, b, 1 - 0.8))
            for a, b in zip(average.buffers(), G.buffers(), strict=True):
                a.copy_(b)
    assert equal(learner.model.G, G)
    assert equal(learner.weights["G@ema"], average)
    assert buffers_equal(learner.weights["G@ema"], average)
