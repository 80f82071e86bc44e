from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attrs import define, field
from torch import Tensor

from fluxloop import (
    BackwardBegin,
    BackwardEnd,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    CustomCallback,
    Event,
    Learner,
    Phase,
    Recorder,
    StepBegin,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    UpdateEnd,
    on,
    runstep,
)
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner
from small_models import (
    ADAM,
    SGD,
    Pair,
    assert_equals,
    critic_loss,
    gan,
    generator_loss,
    images,
    models,
    one_step,
    reached,
    same,
    train_by_hand,
    trainable,
    weights,
)

BODY = "body"
BEFORE_THE_UPDATE = [BODY, BackwardBegin, BackwardEnd, UpdateBegin]

# Whose gradients


def test_inside_a_block_the_other_optimizers_parameters_require_no_gradient() -> None:
    seen: dict[str, list[bool]] = {}
    learner = gan()
    one_step(learner, Pair(lambda learner, name: seen.update({name: trainable(learner)})))
    assert seen == {"D": [False, False, True, True, True, True], "G": [True, True, False, False, False, False]}
    assert all(trainable(learner))


def test_in_a_generators_block_no_gradient_is_computed_for_the_critic() -> None:
    computed: list[str] = []
    leaves: dict[str, set[Tensor]] = {}
    learner = gan()
    for name, parameter in [*learner.model.G.named_parameters("G"), *learner.model.D.named_parameters("D")]:
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: computed.append(name[0]))

    def inside(learner: Learner, name: str) -> None:
        computed.append(f"{name}:")

    class Look(UnsafeCallback):
        @on(BackwardBegin)
        def look(self, event: Event, phase: Phase, learner: Any) -> None:
            name = next(reversed(learner.step.losses))
            leaves[name] = reached(learner.step.losses[name])

    learner.add_callback(Look())
    one_step(learner, Pair(inside))
    assert computed == ["D:", "D", "D", "D", "D", "G:", "G", "G"]
    assert leaves["G"] == set(learner.model.G.parameters())
    assert leaves["D"] == set(learner.model.D.parameters())


def test_a_block_computes_its_own_gradients_alone_whatever_its_loss_was_computed_from() -> None:
    class ComputedBefore(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            gen, dis = learner.model
            with runstep(learner, self, real=batch) as (_, state):
                loss = generator_loss(dis, gen(state.real))
                with learner.optimizing("G") as block:
                    block.loss = loss

    learner = gan()
    before = weights(learner)
    one_step(learner, ComputedBefore())
    assert all(p.grad is None for p in learner.model.D.parameters())
    assert all(p.grad is not None for p in learner.model.G.parameters())
    assert same(weights(learner)[2:], before[2:])
    assert not same(weights(learner)[:2], before[:2])


def test_frozen_parameters_of_the_others_stay_frozen_after_a_block() -> None:
    learner = gan()
    learner.model.D[0].weight.requires_grad_(False)
    one_step(learner)
    assert [p.requires_grad for p in learner.model.D.parameters()] == [False, True, True, True]
    assert all(p.requires_grad for p in learner.model.G.parameters())


# Events and losses


def test_a_block_fires_its_events_around_the_gradients_and_the_update() -> None:
    recorder = EventRecorder()
    one_step(gan(recorder))
    around = ["BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd"]
    assert recorder.events == ["EpochBegin", "StepBegin", *around, *around, "StepEnd", "EpochEnd"]
    assert {phase for _, phase in recorder.trace} == {"Pair"}


def test_update_events_carry_the_optimizers_name() -> None:
    names: list[tuple[str, str | None]] = []

    class Names(UnsafeCallback):
        @on(UpdateBegin)
        @on(UpdateEnd)
        def note(self, event: Any, phase: Phase, learner: Any) -> None:
            names.append((type(event).__name__, event.name))

    one_step(gan(Names()))
    assert names == [("UpdateBegin", "D"), ("UpdateEnd", "D"), ("UpdateBegin", "G"), ("UpdateEnd", "G")]
    names.clear()
    toy_learner(Names(), num_batches=1).epoch(TrainingPhase())
    assert names == [("UpdateBegin", None), ("UpdateEnd", None)]


def test_weights_change_between_update_begin_and_update_end_alone() -> None:
    changed: list[str] = []

    class Watch(UnsafeCallback):
        last: list[Tensor] | None = None

        @on(Event)
        def look(self, event: Event, phase: Phase, learner: Any) -> None:
            now = weights(learner)
            if self.last is not None and not same(now, self.last):
                changed.append(f"{type(event).__name__} {getattr(event, 'name', '')}")
            self.last = now

    one_step(gan(Watch()))
    assert changed == ["UpdateEnd D", "UpdateEnd G"]


def test_losses_are_stored_by_name_and_detached() -> None:
    attached: list[bool] = []

    class Look(UnsafeCallback):
        @on(BackwardBegin)
        @on(BackwardEnd)
        def look(self, event: Event, phase: Phase, learner: Any) -> None:
            attached.append(next(reversed(learner.step.losses.values())).requires_grad)

    learner = gan(Look())
    expected = models()
    real = next(iter(images()))
    loss_d = critic_loss(expected["D"], real, expected["G"](real))
    one_step(learner)
    assert list(learner.step.losses) == ["D", "G"]
    assert torch.equal(learner.step.losses["D"], loss_d)
    assert not any(loss.requires_grad for loss in learner.step.losses.values())
    assert attached == [True, False, True, False]
    assert "loss" not in learner.step


def test_the_loss_of_a_single_unnamed_optimizer_is_stored_as_the_loss() -> None:
    class InABlock(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state), learner.optimizing() as block:
                block.loss = learner.loss_fn(learner.model(state.xs), state.ys)

    learner = toy_learner(num_batches=1)
    learner.epoch(InABlock())
    assert learner.step.loss.shape == ()
    assert not learner.step.loss.requires_grad
    assert "losses" not in learner.step


def test_a_callback_may_replace_a_blocks_loss_before_its_gradients_are_computed() -> None:
    def double(learner: Any) -> None:
        name = next(reversed(learner.step.losses))
        if name == "D":
            learner.step.losses["D"] = 2 * learner.step.losses["D"]

    learner = gan(CustomCallback(double, BackwardBegin, writes=("step.losses",), reads=()))
    one_step(learner)
    both = models()
    gen, dis = both["G"], both["D"]
    real = next(iter(images()))
    fake = gen(real)
    loss = 2 * critic_loss(dis, real, fake)
    loss.backward()
    SGD(dis.parameters()).step()
    generator_loss(dis, fake).backward()
    SGD(gen.parameters()).step()
    assert_equals(learner, both)
    assert torch.equal(learner.step.losses["D"], loss.detach())


def test_a_callback_may_replace_the_loss_of_a_block_without_a_name() -> None:
    class InABlock(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state), learner.optimizing() as block:
                block.loss = learner.loss_fn(learner.model(state.xs), state.ys)

    def halve(learner: Any) -> None:
        learner.step.loss = learner.step.loss / 2

    plain = toy_learner(optimizer=partial(torch.optim.SGD, lr=0.0005))
    halved = toy_learner(CustomCallback(halve, BackwardBegin, writes=("step.loss",), reads=()))
    plain.fit(1, phases=[InABlock()])
    halved.fit(1, phases=[InABlock()])
    assert torch.allclose(plain.model.value, halved.model.value, rtol=1e-5)
    assert plain.model.value.item() != 0


def test_a_block_without_a_loss_makes_no_update() -> None:
    class Nothing(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, real=batch), learner.optimizing("D"):
                pass

    recorder = EventRecorder()
    learner = gan(recorder)
    before = weights(learner)
    one_step(learner, Nothing())
    assert recorder.events == ["EpochBegin", "StepBegin", "StepEnd", "EpochEnd"]
    assert same(weights(learner), before)


# Left by an exception


@define
class RaiseAt(UnsafeCallback):
    """Raises at an event of one optimizer's block, in the step of one number."""

    event: type[Event]
    error: Callable[[], Exception]
    block: str = "D"
    number: int = 1
    steps: int = field(default=-1, init=False)

    @on(StepBegin)
    def count(self, event: Event, phase: Phase, learner: Any) -> None:
        self.steps += 1

    @on(Event)
    def raise_at(self, event: Event, phase: Phase, learner: Any) -> None:
        if type(event) is self.event and self.steps == self.number and self.block in vars(learner.step)["losses"]:
            raise self.error()


class Leaves(Pair):
    """Raises in the body of one optimizer's block, in the step of one number."""

    def __init__(self, error: Callable[[], Exception], block: str = "D", number: int = 1) -> None:
        super().__init__(self.leave)
        self.error, self.block, self.number, self.steps = error, block, number, -1

    def leave(self, learner: Learner, name: str) -> None:
        self.steps += name == "D"
        if name == self.block and self.steps == self.number:
            raise self.error()


def leaving(where: Any, error: Callable[[], Exception], block: str = "D") -> tuple[Learner, Phase]:
    if where == BODY:
        return gan(Recorder(), optimizer=ADAM), Leaves(error, block)
    return gan(Recorder(), RaiseAt(where, error, block), optimizer=ADAM), Pair()


@pytest.mark.slow(quick=8)
@pytest.mark.parametrize("where", BEFORE_THE_UPDATE)
@pytest.mark.parametrize("error", [KeyError, CancelStepException, CancelEpochException, CancelFittingException])
def test_a_block_left_by_an_exception_changes_no_parameter(where: Any, error: type[Exception]) -> None:
    expected = gan(optimizer=ADAM)
    one_step(expected)
    learner, phase = leaving(where, error)
    outcome: type[Exception] | None = None
    try:
        learner.epoch(phase, [*images()][:2])
    except (KeyError, CancelFittingException) as raised:
        outcome = type(raised)
    assert outcome is (error if error in (KeyError, CancelFittingException) else None)
    assert_same_bits(learner, expected)
    assert all(trainable(learner))
    assert learner.updates.block is None
    assert learner.history[type(phase)].updates == {"D": 1, "G": 1}


@pytest.mark.parametrize("where", BEFORE_THE_UPDATE)
@pytest.mark.parametrize("error", [KeyError, CancelStepException])
def test_a_block_left_by_an_exception_leaves_no_gradient_for_the_next_step(where: Any, error: type[Exception]) -> None:
    learner, phase = leaving(where, error)
    batches = [*images()]
    if error is KeyError:
        with pytest.raises(KeyError):
            learner.epoch(phase, batches[:2])
        learner.epoch(phase, batches[2:])
    else:
        learner.epoch(phase, batches)
    assert_equals(learner, train_by_hand(skipped=(1,), optimizer=ADAM))
    assert learner.history[type(phase)].updates == {"D": 3, "G": 3}


@pytest.mark.parametrize("where", BEFORE_THE_UPDATE)
def test_the_second_block_left_by_a_cancel_keeps_the_update_of_the_first(where: Any) -> None:
    learner, phase = leaving(where, CancelStepException, "G")
    learner.epoch(phase, images())

    both = models()
    gen, dis = both["G"], both["D"]
    step_g, step_d = ADAM(gen.parameters()), ADAM(dis.parameters())
    for number, real in enumerate(images()):
        fake = gen(real)
        step_d.zero_grad()
        critic_loss(dis, real, fake).backward()
        step_d.step()
        if number != 1:
            step_g.zero_grad()
            generator_loss(dis, fake).backward()
            step_g.step()
    assert_equals(learner, both)
    assert learner.history[type(phase)].updates == {"D": 4, "G": 3}


@pytest.mark.parametrize("error", [KeyError, CancelStepException])
def test_an_exception_at_update_end_finds_the_update_made_and_everything_unfrozen(error: type[Exception]) -> None:
    learner, phase = leaving(UpdateEnd, error)
    before = weights(learner)
    try:
        learner.epoch(phase, [*images()][:2])
    except KeyError:
        assert error is KeyError
    assert not same(weights(learner), before)
    assert all(trainable(learner))
    learner.epoch(phase, [*images()][2:])
    assert all(trainable(learner))


@pytest.mark.parametrize("where", BEFORE_THE_UPDATE)
def test_an_error_caught_inside_the_step_leaves_no_gradient_for_the_next_block(where: Any) -> None:
    class Retries(Pair):
        """Tries the critic's block once more where it was left by an error, as it is in every step."""

        attempt = 0

        def step(self, learner: Learner, batch: Any) -> Any:
            gen, dis = learner.model
            with runstep(learner, self, real=batch) as (_, state):
                state.fake = gen(state.real)
                for self.attempt in range(2):
                    try:
                        with learner.optimizing("D") as block:
                            block.loss = critic_loss(dis, state.real, state.fake) * (1 if self.attempt else 100)
                            if where == BODY and self.attempt == 0:
                                raise KeyError
                    except KeyError:
                        assert all(trainable(learner))
                with learner.optimizing("G") as block:
                    block.loss = generator_loss(dis, state.fake)

    class FailsFirst(UnsafeCallback):
        @on(Event, Retries)
        def fail(self, event: Event, phase: Retries, learner: Any) -> None:
            if type(event) is where and phase.attempt == 0:
                raise KeyError

    learner = gan(FailsFirst(), optimizer=ADAM)
    learner.epoch(Retries(), images())
    assert_equals(learner, train_by_hand(optimizer=ADAM))


@pytest.mark.parametrize("event", [BackwardBegin, BackwardEnd, UpdateBegin])
def test_a_cancel_drops_the_gradients_of_explicit_calls_too(event: type[Event]) -> None:
    class CancelSecond(UnsafeCallback):
        count = 0

        @on(Event)
        def cancel(self, fired: Event, phase: Phase, learner: Any) -> None:
            if type(fired) is event:
                self.count += 1
                if self.count == 2:
                    raise CancelStepException

    learner = toy_learner(CancelSecond(), num_batches=4, optimizer=partial(torch.optim.Adam, lr=0.1))
    learner.epoch(TrainingPhase())
    assert_same_bits(learner, toy_without_step(1))


def toy_without_step(skipped: int) -> Learner:
    learner = toy_learner(num_batches=4, optimizer=partial(torch.optim.Adam, lr=0.1))
    kept = [batch for number, batch in enumerate(learner.data.training) if number != skipped]
    learner.epoch(TrainingPhase(), kept)
    return learner


def test_a_cancel_between_backward_and_update_drops_the_gradient() -> None:
    class CancelsBetween(TrainingPhase):
        count = 0

        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
                learner.backward(state.loss)
                self.count += 1
                if self.count == 2:
                    raise CancelStepException
                learner.update()

    learner = toy_learner(num_batches=4, optimizer=partial(torch.optim.Adam, lr=0.1))
    learner.epoch(CancelsBetween())
    assert_same_bits(learner, toy_without_step(1))
