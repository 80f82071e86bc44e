from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    AbstractTrainingPhase,
    BackwardBegin,
    Callback,
    CustomCallback,
    EpochEnd,
    Event,
    GarbageCollect,
    Learner,
    LossBegin,
    Metrics,
    MissingProducerError,
    ObjectivePhase,
    Phase,
    ProgressBar,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    runstep,
    throttle,
)
from fluxloop.testing import (
    Coefficient,
    EventRecorder,
    assert_observer,
    assert_order,
    assert_same_bits,
    bits,
    infer_access,
    toy_learner,
)

# The toy learner


def test_the_toy_learner_learns_its_coefficient_in_five_epochs() -> None:
    for coefficient in (3.0, -2.0):
        learner = toy_learner(coefficient=coefficient)
        learner.fit(5)
        assert abs(learner.model.value.item() - coefficient) < 0.1


def test_the_toy_learner_trains_as_a_hand_written_loop_to_the_bit() -> None:
    learner = toy_learner(num_batches=4, batch_size=5)
    xs, ys = learner.data.training.data
    learner.fit(3)
    model = Coefficient()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for _ in range(3):
        for start in range(0, 20, 5):
            optimizer.zero_grad()
            nn.functional.l1_loss(model(xs[start : start + 5]), ys[start : start + 5]).backward()
            optimizer.step()
    assert torch.equal(learner.model.value, model.value)


def test_the_toy_learner_s_data_are_as_many_as_asked_for_and_multiples_of_the_coefficient() -> None:
    learner = toy_learner(coefficient=2.0, num_batches=3, batch_size=4)
    for key in ("training", "validation"):
        batches = list(learner.data[key])
        assert [tuple(xs.shape) for xs, _ in batches] == [(4, 1)] * 3
        assert all(torch.equal(ys, 2 * xs) for xs, ys in batches)
        assert all(bool(((xs >= 1) & (xs < 100)).all()) for xs, _ in batches)


def test_the_toy_learner_s_default_is_sixteen_batches_and_no_callback() -> None:
    learner = toy_learner()
    assert len(learner.data.training) == 16
    assert len(learner.callbacks) == 0
    assert isinstance(learner.optimizer, torch.optim.SGD)
    assert learner.optimizer.param_groups[0]["lr"] == 0.001
    assert learner.seed == 0


def test_callbacks_may_be_given_one_by_one_and_as_a_list() -> None:
    first, second, third = EventRecorder(name="a"), EventRecorder(name="b"), EventRecorder(name="c")
    assert list(toy_learner(first, third, callbacks=[second]).callbacks) == [first, second, third]


def test_the_default_callbacks_come_when_asked_for() -> None:
    assert toy_learner(default_callbacks=True).callbacks.order[0] == "Recorder"


def test_the_optimizer_may_be_another() -> None:
    learner = toy_learner(optimizer=partial(torch.optim.Adam, lr=0.5))
    assert isinstance(learner.optimizer, torch.optim.Adam)
    assert learner.optimizer.param_groups[0]["lr"] == 0.5


def test_the_seed_decides_the_data_and_nothing_else_does() -> None:
    torch.rand(3)
    first = toy_learner(seed=1)
    torch.rand(5)
    second, third = toy_learner(seed=1), toy_learner(seed=2)
    assert torch.equal(first.data.training.data[0], second.data.training.data[0])
    assert not torch.equal(first.data.training.data[0], third.data.training.data[0])
    assert (first.seed, third.seed) == (1, 2)


def test_making_a_toy_learner_draws_nothing() -> None:
    before, python = torch.get_rng_state(), random.getstate()
    toy_learner()
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_further_options_are_the_learner_s() -> None:
    data = (TensorBatches(torch.ones(4, 1), torch.ones(4, 1), batch_size=2),)
    learner = toy_learner(data=data)
    assert len(learner.data.training) == 2
    assert "validation" not in learner.data


# The event recorder

STEP = ["StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd"]


def test_the_event_recorder_records_every_event_with_its_phase_in_order() -> None:
    recorder = EventRecorder()
    toy_learner(recorder, num_batches=2).fit(1)
    assert recorder.trace == [
        ("FitBegin", "FittingPhase"),
        ("CycleBegin", "FittingPhase"),
        ("EpochBegin", "TrainingPhase"),
        *[(event, "TrainingPhase") for event in STEP * 2],
        ("EpochEnd", "TrainingPhase"),
        ("EpochBegin", "ValidationPhase"),
        *[(event, "ValidationPhase") for event in ["StepBegin", "LossBegin", "StepEnd"] * 2],
        ("EpochEnd", "ValidationPhase"),
        ("CycleEnd", "FittingPhase"),
        ("FitEnd", "FittingPhase"),
    ]
    assert recorder.events == [event for event, _ in recorder.trace]


def test_the_event_recorder_records_users_own_events_and_phases() -> None:
    class Sampled(Event):
        pass

    class Sampling(TrainingPhase):
        def step(self, learner: Any, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (handle, _):
                handle(Sampled())

    recorder = EventRecorder()
    toy_learner(recorder, num_batches=1).epoch(Sampling())
    assert recorder.events == ["EpochBegin", "StepBegin", "Sampled", "StepEnd", "EpochEnd"]
    assert {phase for _, phase in recorder.trace} == {"Sampling"}


def test_two_event_recorders_have_traces_of_their_own() -> None:
    first, second = EventRecorder(), EventRecorder()
    toy_learner(first, num_batches=1).epoch(ValidationPhase())
    assert second.trace == []
    assert first.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]


# Order


class First(Callback):
    writes = ("cbstate.first",)


class Second(Callback):
    reads = ("cbstate.first",)


class Third(Callback):
    run_after = (Second,)


class Unordered(Callback):
    pass


def test_assert_order_holds_for_what_edges_prove_directly_or_through_others() -> None:
    learner = toy_learner(Third(), Second(), First(), Unordered())
    assert_order(learner, First, Second, Third)
    assert_order(learner, First, Third)
    assert_order(learner, "First", Second, "Third")
    assert_order(learner, First)


def test_assert_order_finds_subclasses_wrapped_and_named_callbacks() -> None:
    learner = toy_learner(throttle(Second(name="reader"), StepEnd, freq=2), First())
    assert_order(learner, First, Second)
    assert_order(learner, "First", "reader")


def test_assert_order_fails_for_the_reverse_and_shows_the_edges() -> None:
    learner = toy_learner(First(), Second())
    with pytest.raises(AssertionError, match="nothing orders Second before First") as caught:
        assert_order(learner, Second, First)
    assert "First before Second: First writes 'cbstate.first', Second reads 'cbstate.first'" in str(caught.value)


def test_assert_order_fails_for_an_order_that_is_only_that_of_the_names() -> None:
    learner = toy_learner(First(), Unordered())
    assert learner.callbacks.order == ["First", "Unordered"]
    with pytest.raises(AssertionError, match="nothing orders First before Unordered"):
        assert_order(learner, First, Unordered)


def test_assert_order_fails_for_a_callback_that_is_not_there_and_lists_those_that_are() -> None:
    learner = toy_learner(First())
    with pytest.raises(AssertionError, match=r"the learner has no Recorder; it has \['First'\]"):
        assert_order(learner, First, Recorder)
    with pytest.raises(AssertionError, match=r"the learner has no callback 'nobody'; it has \['First'\]"):
        assert_order(learner, "nobody")


# Bits


def test_bits_names_every_parameter_buffer_and_optimizer_tensor() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    learner = Learner({"G": model}, optimizer=torch.optim.Adam, default_callbacks=False)
    (learner.model.G(torch.rand(4, 1)) ** 2).sum().backward()
    learner.optimizer.G.step()
    named = bits(learner)
    assert {"model.G.0.weight", "model.G.1.running_mean", "model.G.1.num_batches_tracked"} <= set(named)
    assert {"optimizer.G.0.exp_avg", "optimizer.G.3.step"} <= set(named)


def test_bits_are_copies() -> None:
    learner = toy_learner(num_batches=1)
    before = bits(learner)
    learner.fit(1)
    assert before["model..value"].item() == 0
    assert bits(learner)["model..value"].item() != 0


def test_the_same_training_gives_the_same_bits() -> None:
    learners = [toy_learner(optimizer=torch.optim.Adam, num_batches=3) for _ in range(2)]
    for learner in learners:
        learner.fit(2)
    assert_same_bits(*learners)


def test_a_difference_in_one_weight_is_named_with_its_size() -> None:
    first, second = toy_learner(), toy_learner()
    with torch.no_grad():
        second.model.value += 0.5
    with pytest.raises(AssertionError, match=r"model\.\.value differs by up to 0\.5"):
        assert_same_bits(first, second)


def test_the_smallest_difference_counts() -> None:
    first, second = toy_learner(), toy_learner()
    for learner, value in ((first, 1.0), (second, math.nextafter(1.0, 2.0))):
        learner.model.to(torch.float64)
        with torch.no_grad():
            learner.model.value.fill_(value)
    with pytest.raises(AssertionError, match=r"model\.\.value differs"):
        assert_same_bits(first, second)


def test_a_difference_in_an_optimizer_s_state_alone_is_found() -> None:
    learners = [toy_learner(optimizer=partial(torch.optim.SGD, lr=0.001, momentum=0.9)) for _ in range(2)]
    for learner in learners:
        learner.fit(1)
    next(iter(learners[1].optimizer.state.values()))["momentum_buffer"] += 1
    with pytest.raises(AssertionError, match=r"optimizer\.\.0\.momentum_buffer differs by up to 1"):
        assert_same_bits(*learners)


def test_learners_with_other_tensors_are_told_so() -> None:
    with pytest.raises(AssertionError, match=r"different tensors.*model\.\.bias"):
        assert_same_bits(toy_learner(), Learner(nn.Linear(1, 1), default_callbacks=False))


def test_weights_of_other_shapes_are_a_failed_assertion_that_names_them() -> None:
    first, second = (Learner(nn.Linear(size, 1), default_callbacks=False) for size in (2, 3))
    with pytest.raises(AssertionError, match=r"model\.\.weight"):
        assert_same_bits(first, second)


def test_weights_that_became_nan_in_the_same_way_have_the_same_bits() -> None:
    learners = [toy_learner(num_batches=1) for _ in range(2)]
    for learner in learners:
        with torch.no_grad():
            learner.model.value.fill_(math.nan)
        assert math.isnan(learner.model.value.item())
    assert_same_bits(*learners)


# Observers


class NoisyLoss(nn.Module):
    """Draws random numbers after LossBegin."""

    def forward(self, preds: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
        return nn.functional.l1_loss(nn.functional.dropout(preds, 0.5), ys)


def learner_with_noisy_loss() -> Learner:
    generator = torch.Generator().manual_seed(1)
    data = TensorBatches(torch.rand(24, 1, generator=generator), torch.rand(24, 1, generator=generator), batch_size=8)
    return Learner(
        Coefficient(1.0),
        NoisyLoss(),
        data=(data, data),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        default_callbacks=False,
        seed=4,
    )


@pytest.mark.parametrize(
    "watcher",
    [
        lambda: EventRecorder(),
        lambda: CustomCallback(lambda learner: learner.step.loss.item(), StepEnd),
        lambda: CustomCallback(lambda learner: torch.rand(7), LossBegin),
        lambda: ValidationPhase(),
    ],
)
def test_assert_observer_holds_for_what_only_watches(watcher: Callable[[], Callback | Phase]) -> None:
    assert_observer(watcher(), learner_with_noisy_loss)


class ChangesLoss(Callback):
    writes = ("step.loss",)

    @on(BackwardBegin, AbstractTrainingPhase)
    def change(self, event: Any, phase: Any, learner: Any) -> None:
        learner.step.loss = 2 * learner.step.loss


class ChangesInputs(Callback):
    writes = ("step.xs",)

    @on(StepBegin, AbstractTrainingPhase)
    def change(self, event: Any, phase: Any, learner: Any) -> None:
        learner.step.xs = learner.step.xs + 1


class NudgesWeights(Callback):
    """A view cannot keep a tensor from being changed in place: the assertion finds it."""

    reads = ("model",)

    @on(EpochEnd)
    def nudge(self, event: Any, phase: Any, learner: Any) -> None:
        with torch.no_grad():
            learner.model.value += 1e-6


class TouchesMomentum(Callback):
    reads = ("optimizer",)

    @on(EpochEnd)
    def touch(self, event: Any, phase: Any, learner: Any) -> None:
        for state in learner.optimizer.state.values():
            state["momentum_buffer"] *= 2


class DrawsThoughItPromisedNotTo(Callback):
    draws = False

    @on(LossBegin)
    def draw(self, event: Any, phase: Any, learner: Any) -> None:
        torch.rand(1)


class TrainsTwice(TrainingPhase):
    """No observer: a phase that trains."""


@pytest.mark.parametrize(
    "culprit",
    [ChangesLoss, ChangesInputs, NudgesWeights, TouchesMomentum, DrawsThoughItPromisedNotTo, TrainsTwice],
)
def test_assert_observer_fails_for_what_writes_or_perturbs(culprit: Callable[[], Callback | Phase]) -> None:
    with pytest.raises(AssertionError, match=r"differ|different"):
        assert_observer(culprit(), learner_with_noisy_loss)


def test_assert_observer_trains_as_long_as_asked() -> None:
    class Late(Callback):
        writes = ("step.loss",)
        seen = 0

        @on(BackwardBegin)
        def late(self, event: Any, phase: Any, learner: Any) -> None:
            self.seen += 1
            if self.seen > 7:  # in the third epoch
                learner.step.loss = 2 * learner.step.loss

    assert_observer(Late(), learner_with_noisy_loss, epochs=2)
    with pytest.raises(AssertionError, match="differs"):
        assert_observer(Late(), learner_with_noisy_loss, epochs=3)


class Doubling(ObjectivePhase):
    def loss(self, learner: Any, state: Any) -> Tensor:
        loss: Tensor = learner.loss_fn(learner.model(2 * state.xs), state.ys)
        return loss


class WritesInDoubling(UnsafeCallback):
    @on(StepEnd, Doubling)
    def write(self, event: StepEnd, phase: Doubling, learner: Any) -> None:
        with torch.no_grad():
            learner.model.value += 0.1


def test_assert_observer_trains_with_the_phases_asked_for() -> None:
    assert_observer(WritesInDoubling(), toy_learner)  # never called
    assert_observer(ValidationPhase(), toy_learner, phases=lambda: [Doubling()])
    with pytest.raises(AssertionError, match="value"):
        assert_observer(WritesInDoubling(), toy_learner, phases=lambda: [Doubling()])


@pytest.mark.parametrize("wrong", [EventRecorder, ValidationPhase, 3, None, print])
def test_assert_observer_takes_a_callback_or_a_phase_and_nothing_else(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected a callback or a phase"):
        assert_observer(wrong, toy_learner)


# Declarations to paste


class Undeclared(Callback):
    """Declares nothing, and touches this and that."""

    def init(self, learner: Any) -> None:
        if "seen" not in learner.cbstate:
            learner.cbstate.seen = []

    @on(StepEnd, AbstractTrainingPhase)
    def look(self, event: Any, phase: Any, learner: Any) -> None:
        learner.cbstate.seen = [*learner.cbstate.seen, learner.step.loss.item()]
        learner.step.mark = learner.step["xs"].sum() + learner.num_batches


def test_infer_access_prints_and_gives_the_declarations(capsys: pytest.CaptureFixture[str]) -> None:
    reads, writes = infer_access(Undeclared(), toy_learner())
    assert reads == ("num_batches", "step.loss", "step.xs")
    assert writes == ("cbstate.seen", "step.mark")
    assert capsys.readouterr().out == f"reads = {reads!r}\nwrites = {writes!r}\n"


def pasted(callback: type[Callback], learner: Learner) -> type[Callback]:
    reads, writes = infer_access(callback(), learner)
    after = tuple(type(other) for other in learner.callbacks)
    return type("Pasted", (callback,), {"reads": reads, "writes": writes, "run_after": after})


class CountsUp(Callback):
    @on(StepEnd)
    def count(self, event: Any, phase: Any, learner: Any) -> None:
        learner.cbstate.history[phase].steps += 1


class CountsUpdates(Callback):
    @on(StepEnd)
    def count(self, event: Any, phase: Any, learner: Any) -> None:
        learner.cbstate.history[phase].updates.update(extra=1)


class Publishes(Callback):
    writes = ("cbstate.log",)

    def init(self, learner: Any) -> None:
        learner.cbstate.log = []


class Appends(Callback):
    @on(StepEnd)
    def append(self, event: Any, phase: Any, learner: Any) -> None:
        learner.cbstate.log.append(1)


class Asks(Callback):
    @on(StepEnd)
    def ask(self, event: Any, phase: Any, learner: Any) -> None:
        if "losses" not in learner.step and hasattr(learner.step, "preds"):
            learner.host(learner.step.loss, lambda number: None)


@pytest.mark.parametrize("callback", [Undeclared, CountsUp, CountsUpdates, Appends, Asks])
def test_a_callback_runs_with_the_declarations_that_infer_access_gives(callback: type[Callback]) -> None:
    others = [Recorder(), Publishes()]
    declared = pasted(callback, toy_learner(*others))
    learner = toy_learner(declared(), Recorder(), Publishes(), num_batches=2)
    learner.fit(2)
    assert learner.history[TrainingPhase].epochs == 2


def test_infer_access_leaves_the_learner_and_the_callback_as_they_were() -> None:
    recorder = EventRecorder()
    learner = toy_learner(recorder, Recorder(), num_batches=2)
    learner.fit(1)
    before, trace, callback = bits(learner), list(recorder.trace), Undeclared()
    infer_access(callback, learner)
    assert all(torch.equal(tensor, bits(learner)[name]) for name, tensor in before.items())
    assert recorder.trace == trace
    assert learner.callbacks.order == ["EventRecorder", "Recorder"]
    assert "seen" not in learner.cbstate
    assert learner.history[TrainingPhase].epochs == 1
    assert vars(callback) == {"name": None, "_adopted": False}


def test_infer_access_of_a_callback_that_others_need_works_while_they_are_there() -> None:
    assert infer_access(Recorder(), toy_learner(Recorder(), Metrics())) == ((), ("cbstate.history",))


def test_infer_access_runs_the_phases_it_is_given() -> None:
    class Own(TrainingPhase):
        def step(self, learner: Any, batch: Any) -> None:
            with runstep(learner, self, image=batch[0]):
                pass

    class Looks(Callback):
        @on(StepEnd, Own)
        def look(self, event: Any, phase: Any, learner: Any) -> None:
            _ = learner.step.image

    assert infer_access(Looks(), toy_learner(), phases=[Own()]) == (("step.image",), ())


def test_infer_access_of_the_built_in_ones_is_covered_by_what_they_declare() -> None:
    for callback in (GarbageCollect(), ProgressBar(enabled=False), Metrics()):
        reads, writes = infer_access(callback, toy_learner(Recorder()))
        for path in (*reads, *writes):
            assert any(path == d or path.startswith(f"{d}.") for d in (*callback.reads, *callback.writes))


def test_a_learner_without_the_producer_says_which_one_to_add() -> None:
    """What infer_access is for: what is pasted is checked when the learner is built."""
    declared = pasted(CountsUp, toy_learner(Recorder()))
    declared.writes, declared.reads = (), ("cbstate.history",)
    with pytest.raises(MissingProducerError, match=r"Recorder\(\)"):
        toy_learner(declared())
