from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from fluxloop import (
    AbstractValidationPhase,
    BackwardBegin,
    BackwardEnd,
    Callback,
    Checkpointer,
    CustomCallback,
    Event,
    GradientClip,
    Learner,
    LossBegin,
    LossError,
    LRScheduler,
    MetricError,
    Metrics,
    OptimizerError,
    Phase,
    PhaseError,
    Recorder,
    StepBegin,
    StepEnd,
    StopOnNaNLoss,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    UpdateEnd,
    on,
    runepoch,
    runstep,
)
from fluxloop.state import Gradients
from fluxloop.testing import EventRecorder, assert_same_bits, bits, toy_learner
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
    same,
    train_by_hand,
    trainable,
    weights,
)

# Misuse: each an error that says what to do, and nothing changed


class Misuse(TrainingPhase):
    """A step that does one thing wrong in the middle of a GAN step."""

    def __init__(self, wrong: Callable[[Learner, Any], object]) -> None:
        self.wrong = wrong

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = learner.model.G(state.real)
            self.wrong(learner, state)


def nested(learner: Learner, state: Any) -> None:
    with learner.optimizing("D") as block:
        block.loss = critic_loss(learner.model.D, state.real, state.fake)
        with learner.optimizing("G") as inner:
            inner.loss = generator_loss(learner.model.D, state.fake)


def nested_in_itself(learner: Learner, state: Any) -> None:
    with learner.optimizing("D"), learner.optimizing("D") as block:
        block.loss = critic_loss(learner.model.D, state.real, state.fake)


def unknown_name(learner: Learner, state: Any) -> None:
    with learner.optimizing("g"):
        pass


def no_name(learner: Learner, state: Any) -> None:
    with learner.optimizing():
        pass


def another_in_the_block(learner: Learner, state: Any) -> None:
    with learner.optimizing("D"):
        learner.backward(critic_loss(learner.model.D, state.real, state.fake))
        learner.update("G")


def reaches_nothing(learner: Learner, state: Any) -> None:
    with learner.optimizing("D") as block:
        block.loss = state.fake.sum()


def reaches_nothing_explicitly(learner: Learner, state: Any) -> None:
    with learner.optimizing("D"):
        learner.backward(state.fake.sum())
        learner.update()


def detached(learner: Learner, state: Any) -> None:
    with learner.optimizing("G") as block:
        block.loss = generator_loss(learner.model.D, state.fake.detach())


def not_scalar(learner: Learner, state: Any) -> None:
    with learner.optimizing("D") as block:
        block.loss = learner.model.D(state.real)


def no_tensor(learner: Learner, state: Any) -> None:
    with learner.optimizing("D") as block:
        block.loss = 0.5


def constant(learner: Learner, state: Any) -> None:
    with learner.optimizing("D") as block:
        block.loss = torch.tensor(1.0)


def without_gradients(learner: Learner, state: Any) -> None:
    with torch.no_grad(), learner.optimizing("D") as block:
        block.loss = critic_loss(learner.model.D, state.real, state.fake)


def unknown_update(learner: Learner, state: Any) -> None:
    learner.backward(generator_loss(learner.model.D, state.fake))
    learner.update("critic")


def all_frozen(learner: Learner, state: Any) -> None:
    learner.model.D.requires_grad_(False)
    with learner.optimizing("D") as block:
        block.loss = generator_loss(learner.model.D, state.fake)


MISUSES: list[tuple[Callable[[Learner, Any], object], type[Exception], list[str]]] = [
    (nested, OptimizerError, ["the block of optimizer 'G' was opened inside that of optimizer 'D'", "close one"]),
    (nested_in_itself, OptimizerError, ["the block of optimizer 'D' was opened inside that of optimizer 'D'"]),
    (unknown_name, OptimizerError, ["there is no optimizer 'g'", "['G', 'D']"]),
    (no_name, OptimizerError, ["which of the optimizers ['G', 'D']", "learner.optimizing('G')"]),
    (
        another_in_the_block,
        OptimizerError,
        ["learner.update('G') was called inside the block of optimizer 'D'", "learner.optimizing('G')"],
    ),
    (reaches_nothing, LossError, ["the loss of optimizer 'D' reaches none of its own parameters", "D.0.weight"]),
    (reaches_nothing_explicitly, LossError, ["the loss of optimizer 'D' reaches none of its own parameters"]),
    (detached, LossError, ["no gradient can be computed from the loss", "detached"]),
    (not_scalar, LossError, ["the loss of optimizer", "has shape (3, 1)", "expected a scalar", ".mean()"]),
    (no_tensor, LossError, ["the loss of optimizer", "is 0.5", "expected a tensor"]),
    (constant, LossError, ["no gradient can be computed from the loss", "constants"]),
    (without_gradients, LossError, ["no gradient can be computed from the loss", "no_grad"]),
    (unknown_update, OptimizerError, ["there is no optimizer 'critic'", "['G', 'D']"]),
]


@pytest.mark.slow(quick=8)
@pytest.mark.parametrize(("wrong", "error", "words"), MISUSES, ids=[wrong.__name__ for wrong, *_ in MISUSES])
def test_misuse_says_what_is_wrong_and_changes_nothing(
    wrong: Callable[[Learner, Any], object], error: type[Exception], words: list[str]
) -> None:
    learner = gan()
    one_step(learner)
    before = bits(learner)
    with pytest.raises(error) as raised:
        learner.epoch(Misuse(wrong), [[*images()][1]])
    assert [word for word in words if word not in str(raised.value)] == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert all(trainable(learner))
    assert learner.updates.block is None

    untouched = gan()
    one_step(untouched)
    for again in (learner, untouched):
        again.epoch(Pair(), [*images()][2:])
    assert_same_bits(learner, untouched)


def test_a_training_in_inference_mode_is_told_that_it_cannot_be_there_and_goes_on_outside() -> None:
    learner, untouched = toy_learner(), toy_learner()
    with torch.inference_mode(), pytest.raises(LossError, match=r"inference_mode\(\) is on.*outside of that block"):
        learner.fit(1)
    with torch.no_grad():  # where steps switch gradients on
        learner.fit(1)
    untouched.fit(1)
    assert torch.equal(learner.model.value, untouched.model.value)


def test_a_block_whose_parameters_are_all_frozen_changes_nothing_and_says_so_once() -> None:
    learner = gan()
    before = weights(learner)
    with pytest.warns(UserWarning, match=r"all parameters of optimizer 'D' are frozen") as told:
        learner.fit(2, phases=[Misuse(all_frozen)])
    assert len(told) == 1
    assert same(weights(learner), before)
    assert learner.step.losses["D"].grad_fn is None


def test_one_network_can_be_trained_alone_first() -> None:
    learner, alone = gan(), gan()
    learner.model.G.requires_grad_(False)
    with pytest.warns(UserWarning, match="optimizer 'G' are frozen"):
        learner.epoch(Pair())
    for real in images():
        with runstep(alone, TrainingPhase(), real=real):
            with alone.optimizing("D") as block:
                block.loss = critic_loss(alone.model.D, real, alone.model.G(real))
    assert same(weights(learner), weights(alone))
    learner.model.G.requires_grad_(True)
    before = weights(learner)
    learner.epoch(Pair())
    assert not torch.equal(before[0], weights(learner)[0])


def test_where_every_network_is_frozen_a_block_is_an_error() -> None:
    learner = gan()
    learner.model.G.requires_grad_(False)
    with pytest.raises(LossError, match="frozen"):
        one_step(learner, Misuse(all_frozen))


class Puts(Callback):
    """Puts something in the place of the step's gradients."""

    writes = ("step.grads",)

    def __init__(self, make: Callable[[dict[str, Any]], Any], event: Any = BackwardEnd) -> None:
        self.make, self.event = make, event

    @on(BackwardEnd)
    def after_backward(self, event: BackwardEnd, phase: Phase, learner: Any) -> None:
        if self.event is BackwardEnd:
            learner.step.grads = self.make(dict(learner.step.grads))

    @on(UpdateBegin)
    def before_update(self, event: UpdateBegin, phase: Phase, learner: Any) -> None:
        if self.event is UpdateBegin:
            learner.step.grads = self.make(dict(learner.step.grads))


def halved(grads: dict[str, Any]) -> dict[str, Any]:
    return {name: None if grad is None else grad / 2 for name, grad in grads.items()}


@pytest.mark.parametrize("event", [BackwardEnd, UpdateBegin])
def test_gradients_that_are_put_in_the_place_of_the_steps_are_used(event: Any) -> None:
    learner, slower = gan(Puts(halved, event)), gan(optimizer=partial(torch.optim.SGD, lr=SGD.keywords["lr"] / 2))
    one_step(learner)
    one_step(slower)
    assert all(torch.allclose(a, b) for a, b in zip(weights(learner), weights(slower), strict=True))
    assert isinstance(learner.step.grads, Gradients)


def test_a_gradient_that_is_put_away_is_none() -> None:
    learner = gan(Puts(lambda grads: dict.fromkeys(grads)))
    before = weights(learner)
    one_step(learner)
    assert same(weights(learner), before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda grads: 3, "replaced by 3; expected gradients by name"),
        (lambda grads: [*grads.values()], "replaced by a list of length"),
        (lambda grads: {}, "lacks 'D"),
        (lambda grads: {**grads, "G.0.wieght": None}, "'G.0.wieght', which is no parameter"),
        (lambda grads: {name: torch.zeros(7) for name in grads}, "expected a tensor of shape"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_before_anything_is_changed(make: Any, words: str) -> None:
    learner = gan(Puts(make))
    before = weights(learner)
    with pytest.raises(LossError, match=words):
        one_step(learner)
    assert same(weights(learner), before)


def test_an_update_outside_of_a_step_without_gradients_is_refused() -> None:
    learner = gan()
    for _ in range(2):  # before anything has run, and when all gradients have been used
        before = weights(learner)
        with pytest.raises(PhaseError, match=r"outside of a step.*\n.*runstep"):
            learner.update()
        assert same(weights(learner), before)
        learner.epoch(Pair())


Begin = Callable[[Learner], object]
BEGINNINGS: list[Begin] = [
    lambda learner: learner.fit(1, phases=[Pair()]),
    lambda learner: learner.epoch(Pair()),
    lambda learner: runepoch(learner, Pair()).__enter__(),
]


def join(learner: Learner) -> None:
    learner.model.D.append(nn.Linear(1, 1))


def replace(learner: Learner) -> None:
    learner.model.D[2] = nn.Linear(4, 1)


def thaw(learner: Learner) -> None:
    learner.model.D.append(nn.Linear(1, 1).requires_grad_(False))
    learner.epoch(Pair())
    learner.model.D[3].requires_grad_(True)


@pytest.mark.parametrize("begin", BEGINNINGS, ids=["fit", "epoch", "runepoch"])
@pytest.mark.parametrize(("change", "number"), [(join, 3), (replace, 2), (thaw, 3)])
def test_parameters_that_join_later_and_are_in_no_optimizer_are_named_when_training_begins(
    change: Callable[[Learner], None], number: int, begin: Begin
) -> None:
    learner = gan(Recorder())
    change(learner)
    before, epochs = weights(learner), learner.history[Pair].epochs
    with pytest.raises(
        OptimizerError, match=rf"in no optimizer: D.{number}.weight, D.{number}.bias.*\['G'\].add_param_group"
    ):
        begin(learner)
    assert same(weights(learner), before)
    assert learner.scope is None
    assert learner.history[Pair].epochs == epochs


@pytest.mark.parametrize(("change", "number"), [(join, 3), (replace, 2), (thaw, 3)])
def test_parameters_that_join_an_optimizer_later_are_known_everywhere(
    change: Callable[[Learner], None], number: int
) -> None:
    learner = gan(Recorder())
    change(learner)
    part = learner.model.D[number]
    learner.optimizer.D.add_param_group({"params": part.parameters()})
    before = part.weight.detach().clone()
    one_step(learner)
    assert not torch.equal(part.weight, before)
    assert learner.step.grads[f"D.{number}.weight"] is part.weight.grad
    assert list(learner.params.D) == list(learner.model.D.parameters())
    copied = copy.deepcopy(learner)
    copied.load_state_dict(learner.state_dict())
    one_step(copied)
    one_step(learner)
    assert same(weights(learner), weights(copied))


def test_a_part_that_was_replaced_keeps_its_name_where_an_optimizer_still_holds_it() -> None:
    learner = gan()
    replace(learner)
    learner.optimizer.D.add_param_group({"params": learner.model.D[2].parameters()})
    one_step(learner)
    assert {"D.2.weight", "D.2.weight (no longer in the model)"} <= set(learner.step.grads)


def test_a_name_that_no_optimizer_has_is_reported_for_a_learner_with_a_single_unnamed_one() -> None:
    with pytest.raises(OptimizerError, match=r"no optimizer 'D'.*a single one without a name: learner.optimizing\(\)"):
        toy_learner().optimizing("D")


class Validate(AbstractValidationPhase):
    def __init__(self, wrong: Callable[[Learner, Any], object]) -> None:
        self.wrong = wrong

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = learner.model.G(state.real)
            self.wrong(learner, state)


def block_in_validation(learner: Learner, state: Any) -> None:
    with learner.optimizing("D") as block:
        block.loss = critic_loss(learner.model.D, state.real, state.fake)


def backward_in_validation(learner: Learner, state: Any) -> None:
    learner.backward(critic_loss(learner.model.D, state.real, state.fake))


@pytest.mark.parametrize("wrong", [block_in_validation, backward_in_validation])
def test_a_loss_in_a_validation_phase_has_no_gradient_and_says_why(wrong: Callable[[Learner, Any], object]) -> None:
    learner = gan()
    one_step(learner)
    before = bits(learner)
    with pytest.raises(LossError, match=r"gradients are off here: is this a validation phase"):
        learner.epoch(Validate(wrong), images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert all(trainable(learner))


def test_an_update_in_a_validation_phase_is_refused_and_changes_nothing() -> None:
    learner = gan(optimizer=ADAM)
    one_step(learner)
    before = bits(learner)
    with pytest.raises(PhaseError, match="validation"):
        learner.epoch(Validate(lambda learner, state: learner.update()), images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


# Explicit calls


class Explicit(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (handle, state):
            state.fake = gen(state.real)
            for name, loss in (("D", critic_loss), ("G", lambda dis, real, fake: generator_loss(dis, fake))):
                with learner.optimizing(name):
                    state.loss = loss(dis, state.real, state.fake)
                    handle(BackwardBegin())
                    learner.backward(state.loss)
                    handle(BackwardEnd())
                    learner.update()


def test_explicit_calls_inside_a_block_act_for_its_optimizer_alone() -> None:
    recorder = EventRecorder()
    learner = gan(recorder, Recorder(), optimizer=ADAM)
    learner.epoch(Explicit(), images())
    assert_equals(learner, train_by_hand(optimizer=ADAM))
    assert recorder.events.count("BackwardBegin") == recorder.events.count("UpdateEnd") == 8
    assert learner.history[Explicit].updates == {"D": 4, "G": 4}


def test_an_update_may_name_the_optimizer_of_its_block() -> None:
    def update_by_name(learner: Learner, state: Any) -> None:
        with learner.optimizing("D"):
            learner.backward(critic_loss(learner.model.D, state.real, state.fake))
            learner.update("D")

    learner = gan(Recorder())
    one_step(learner, Misuse(update_by_name))
    assert learner.history[Misuse].updates == {"D": 1}


def test_an_update_without_a_name_steps_every_optimizer_in_order() -> None:
    def update_all(learner: Learner, state: Any) -> None:
        learner.backward(generator_loss(learner.model.D, state.fake))
        learner.update()

    recorder = EventRecorder()
    learner = gan(recorder, Recorder())
    before = weights(learner)
    one_step(learner, Misuse(update_all))
    assert not any(torch.equal(a, b) for a, b in zip(weights(learner), before, strict=True))
    assert learner.history[Misuse].updates == {"G": 1, "D": 1}
    assert recorder.events.count("UpdateBegin") == 2


def test_an_update_by_name_steps_that_optimizer_alone() -> None:
    def update_one(learner: Learner, state: Any) -> None:
        learner.backward(generator_loss(learner.model.D, state.fake))
        learner.update("G")

    learner = gan()
    before = weights(learner)
    one_step(learner, Misuse(update_one))
    assert not same(weights(learner)[:2], before[:2])
    assert same(weights(learner)[2:], before[2:])


def test_gradients_are_readable_when_the_step_ends_and_released_at_the_next() -> None:
    seen: list[tuple[str, list[bool]]] = []

    def look(name: str) -> Callable[[Any], None]:
        def note(learner: Any) -> None:
            grads = [p.grad is not None for params in learner.params for p in params]
            seen.append((name, grads))

        return note

    learner = gan(
        *(CustomCallback(look(event.__name__), event, reads=("params",), name=event.__name__) for event in EVENTS)
    )
    learner.epoch(Pair(), [*images()][:2])
    nothing, critic, both = [False] * 6, [False] * 2 + [True] * 4, [True] * 6
    one = [("BackwardBegin", nothing), ("UpdateEnd", critic), ("BackwardBegin", critic), ("UpdateEnd", both)]
    step = [("StepBegin", nothing), *one, ("StepEnd", both)]
    assert seen == step + step


EVENTS = [StepBegin, BackwardBegin, UpdateEnd, StepEnd]


def test_the_gradients_of_a_step_are_its_own() -> None:
    grads: list[Tensor] = []
    learner = toy_learner(
        CustomCallback(lambda learner: grads.append(learner.step.grads["value"].clone()), StepEnd, TrainingPhase),
        num_batches=3,
    )
    learner.epoch(TrainingPhase())
    expected = []
    for xs, ys in toy_learner(num_batches=3).data.training:
        value = torch.zeros(1, requires_grad=True)
        nn.functional.l1_loss(xs * value, ys).backward()
        expected.append(value.grad)
    assert same(grads, expected)


def test_gradients_of_two_backward_calls_before_one_update_are_added_up() -> None:
    class Twice(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                half = len(state.xs) // 2
                for rows in (slice(None, half), slice(half, None)):
                    learner.backward(learner.loss_fn(learner.model(state.xs[rows]), state.ys[rows]) / 2)
                learner.update()

    twice, once = toy_learner(), toy_learner()
    twice.fit(1, phases=[Twice()])
    once.fit(1, phases=[TrainingPhase()])
    assert torch.allclose(twice.model.value, once.model.value, rtol=1e-6)
    assert once.model.value.item() != 0


def test_gradients_are_added_up_over_steps_until_an_update_is_made() -> None:
    class EverySecond(TrainingPhase):
        count = 0

        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                learner.backward(learner.loss_fn(learner.model(state.xs), state.ys))
                self.count += 1
                if self.count % 2 == 0:
                    learner.update()

    learner = toy_learner(num_batches=6)
    learner.epoch(EverySecond())
    by_hand = toy_learner(num_batches=6)
    model, optimizer = by_hand.model, by_hand.optimizer
    for number, (xs, ys) in enumerate(by_hand.data.training):
        nn.functional.l1_loss(model(xs), ys).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(learner.model.value, model.value)


def test_gradients_from_before_the_learner_are_not_used() -> None:
    both = models()
    for model in both.values():
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 100.0)
    learner = Learner(both, data=(images(),), optimizer=ADAM, default_callbacks=False, seed=0)
    learner.epoch(Pair())
    assert_equals(learner, train_by_hand(optimizer=ADAM))


def test_gradients_computed_by_hand_between_two_epochs_are_not_used() -> None:
    learner = gan(optimizer=ADAM)
    learner.epoch(Pair())
    for model in learner.modules():
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 100.0)
    learner.epoch(Pair())
    assert_equals(learner, train_by_hand(epochs=2, optimizer=ADAM))


def test_a_block_works_outside_of_a_step_too() -> None:
    learner = gan(optimizer=ADAM)
    gen, dis = learner.model
    for real in images():
        fake = gen(real)
        with learner.optimizing("D") as block:
            block.loss = critic_loss(dis, real, fake)
        with learner.optimizing("G") as block:
            block.loss = generator_loss(dis, fake)
    assert_equals(learner, train_by_hand(optimizer=ADAM))


# By hand: exactly what PyTorch does


class ByHand(TrainingPhase):
    """Zeroes nothing, as the loop it is compared with."""

    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            fake = gen(state.real)
            (critic_loss(dis, state.real, fake) + generator_loss(dis, fake)).backward()
            learner.optimizer.D.step()
            learner.optimizer.G.step()


def test_hand_called_backward_and_step_do_exactly_what_pytorch_does() -> None:
    learner = gan(EventRecorder(), Recorder(), optimizer=ADAM)
    learner.fit(2, phases=[ByHand()])

    both = models()
    gen, dis = both["G"], both["D"]
    step_g, step_d = ADAM(gen.parameters()), ADAM(dis.parameters())
    for _ in range(2):
        for real in images():
            fake = gen(real)
            (critic_loss(dis, real, fake) + generator_loss(dis, fake)).backward()
            step_d.step()
            step_g.step()
    assert_equals(learner, both)
    for name, model in both.items():
        for found, wanted in zip(learner.models[name].parameters(), model.parameters(), strict=True):
            assert torch.equal(found.grad, wanted.grad)
    assert learner.history[ByHand].updates == {}


# The wiring that trains a critic on the generator's gradients


class AllTogether(TrainingPhase):
    """Both losses, then both backwards, then both updates, with explicit calls."""

    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            fake = gen(state.real)
            loss_d, loss_g = critic_loss(dis, state.real, fake), generator_loss(dis, fake)
            learner.backward(loss_d)
            learner.backward(loss_g)
            learner.update("D")
            learner.update("G")


def test_both_losses_then_both_backwards_then_both_updates_is_refused() -> None:
    learner = gan()
    before = weights(learner)
    with pytest.raises(LossError, match="called twice in one step") as raised:
        one_step(learner, AllTogether())
    message = str(raised.value)
    assert "['G', 'D']" in message
    assert "both losses would reach all of them" in message
    assert "with learner.optimizing('G') as block:" in message
    assert same(weights(learner), before)
    learner.epoch(Pair(), images())
    assert_equals(learner, train_by_hand())


def test_an_update_between_the_two_backwards_does_not_let_the_generators_gradient_through() -> None:
    class OneAfterTheOther(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            gen, dis = learner.model
            with runstep(learner, self, real=batch) as (_, state):
                fake = gen(state.real)
                learner.backward(critic_loss(dis, state.real, fake))
                learner.update("D")
                learner.backward(generator_loss(dis, fake))
                learner.update("G")

    learner = gan()
    with pytest.raises(LossError, match="called twice in one step"):
        learner.epoch(OneAfterTheOther(), images())


class Planned(TrainingPhase):
    """Explicit calls as planned for each step: "d" and "g" for the backward of a loss, "D" and "G" for an update.

    `used` collects the gradients of the critic's first weight with which it was stepped, and those of its own loss.
    """

    def __init__(self, plan: list[str]) -> None:
        self.plan = iter(plan)
        self.own: Tensor | None = None
        self.used: list[tuple[Tensor, Tensor]] = []

    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        weight = dis[0].weight
        with runstep(learner, self, real=batch) as (_, state):
            fake = gen(state.real)
            for action in next(self.plan):
                if action == "d":
                    loss = critic_loss(dis, state.real, fake)
                    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
                    self.own = gradient if self.own is None else self.own + gradient
                    learner.backward(loss)
                elif action == "g":
                    learner.backward(generator_loss(dis, fake))
                else:
                    if action == "D":
                        self.used.append((weight.grad.clone(), self.own))
                        self.own = None
                    learner.update(action)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(["dgDG"] * 4, id="both backwards, then both updates"),
        pytest.param(["dDgG"] * 4, id="one after the other"),
        pytest.param(["dD", "dD", "dDgG", "dD"], id="the generator on every third batch"),
        pytest.param(["dD", "gG", "dD", "gG"], id="in turns"),
        pytest.param(["d", "dgDG", "dD", "dD"], id="a gradient kept over the first step"),
    ],
)
def test_explicit_calls_never_step_a_critic_on_the_gradient_of_the_generators_loss(plan: list[str]) -> None:
    learner, phase = gan(), Planned(plan)
    refused = ""
    try:
        learner.epoch(phase, images())
    except (LossError, OptimizerError) as error:
        refused = str(error)
    assert refused == "" or "learner.optimizing(" in refused
    for used, own in phase.used:
        assert torch.equal(used, own), "the critic was stepped on more than the gradient of its own loss"


def test_with_blocks_a_critic_steps_on_the_gradient_of_its_own_loss_alone() -> None:
    class LossesFirst(TrainingPhase):
        """Both losses before the blocks: the critic's parameters are in the generator's graph."""

        def step(self, learner: Learner, batch: Any) -> Any:
            gen, dis = learner.model
            with runstep(learner, self, real=batch) as (_, state):
                fake = gen(state.real)
                losses = {"D": critic_loss(dis, state.real, fake), "G": generator_loss(dis, fake)}
                with learner.optimizing("G") as block:
                    block.loss = losses["G"]
                with learner.optimizing("D") as block:
                    block.loss = losses["D"]

    used: list[list[Tensor]] = []
    both = models()
    real = next(iter(images()))
    own = torch.autograd.grad(critic_loss(both["D"], real, both["G"](real)), list(both["D"].parameters()))

    def note(learner: Any) -> None:
        used.append([p.grad.clone() for p in learner.params.D if p.grad is not None])

    learner = gan(CustomCallback(note, UpdateBegin, reads=("params.D",)))
    before = weights(learner)
    one_step(learner, LossesFirst())
    assert not used[0], "the generator's block computes nothing for the critic"
    assert same(used[1], list(own))
    expected = [weight.add(gradient, alpha=-0.1) for weight, gradient in zip(before[2:], own, strict=True)]
    assert same(weights(learner)[2:], expected)


# Frozen and unfrozen while training


def two_layers() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


class InABlock(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch) as (_, state), learner.optimizing() as block:
            block.loss = (learner.model(state.xs) - state.xs).square().mean()


class WithCalls(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch) as (handle, state):
            state.preds = learner.model(state.xs)
            handle(LossBegin())
            state.loss = (state.preds - state.xs).square().mean()
            learner.backward(state.loss)
            learner.update()


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("phase", [InABlock, WithCalls])
@pytest.mark.parametrize("plan", [(True, False, True), (False, True, True), (False, True, False)])
def test_a_layer_frozen_or_unfrozen_while_training_trains_as_in_a_hand_written_loop(
    phase: type[Phase], plan: tuple[bool, ...]
) -> None:
    factory = partial(torch.optim.Adam, lr=0.05, weight_decay=0.1, fused=False)
    by_hand = two_layers()
    optimizer = factory(by_hand.parameters())
    trained = two_layers()
    learner = Learner(
        trained, data=(images(),), optimizer=factory(trained.parameters()), default_callbacks=False, seed=0
    )
    for trains in plan:
        by_hand[0].requires_grad_(trains)
        for xs in images():
            optimizer.zero_grad()
            (by_hand(xs) - xs).square().mean().backward()
            optimizer.step()
        trained[0].requires_grad_(trains)
        learner.epoch(phase())
        assert same(list(trained.parameters()), list(by_hand.parameters()))


@pytest.mark.parametrize("phase", [InABlock, WithCalls])
def test_a_layer_unfrozen_and_added_to_the_optimizer_while_training_trains_as_in_a_hand_written_loop(
    phase: type[Phase],
) -> None:
    by_hand = two_layers()
    optimizer = SGD(by_hand[2].parameters())
    trained = two_layers()
    trained[0].requires_grad_(False)
    learner = Learner(trained, data=(images(),), optimizer=SGD, default_callbacks=False, seed=0)
    for unfrozen in (False, True):
        by_hand[0].requires_grad_(unfrozen)
        trained[0].requires_grad_(unfrozen)
        if unfrozen:
            optimizer.add_param_group({"params": by_hand[0].parameters(), "lr": 0.01})
            learner.optimizer.add_param_group({"params": trained[0].parameters(), "lr": 0.01})
        for xs in images():
            optimizer.zero_grad()
            (by_hand(xs) - xs).square().mean().backward()
            optimizer.step()
        learner.epoch(phase())
        assert same(list(trained.parameters()), list(by_hand.parameters()))


def test_a_layer_frozen_by_a_callback_at_the_end_of_a_step_no_longer_moves() -> None:
    seen: list[Tensor] = []

    class Freeze(UnsafeCallback):
        @on(StepEnd)
        def freeze(self, event: Event, phase: Phase, learner: Any) -> None:
            learner.model[0].requires_grad_(False)
            seen.append(learner.model[0].weight.detach().clone())

    learner = Learner(
        two_layers(), data=(images(),), optimizer=ADAM, callbacks=[Freeze()], default_callbacks=False, seed=0
    )
    learner.epoch(InABlock())
    assert not torch.equal(seen[0], two_layers()[0].weight)
    assert same(seen, [seen[0]] * 4)


def rows() -> TensorBatches:
    xs = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    return TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=3)


def two_parts() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        OrderedDict(body=nn.Sequential(nn.Linear(3, 4), nn.Tanh()), head=nn.Sequential(nn.Tanh(), nn.Linear(4, 1)))
    )


class Reentrant(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            with learner.optimizing() as block:
                preds = checkpoint(learner.model, state.xs.clone().requires_grad_(), use_reentrant=True)
                block.loss = mse_loss(preds, state.ys)


def test_a_reentrant_checkpoint_works_in_the_block_of_a_single_optimizer() -> None:
    learner = Learner(two_parts(), data=(rows(),), optimizer=SGD, default_callbacks=False)
    learner.fit(2, phases=[Reentrant()])
    model = two_parts()
    optimizer = SGD(model.parameters())
    for xs, ys in [*rows(), *rows()]:
        optimizer.zero_grad()
        mse_loss(model(xs), ys).backward()
        optimizer.step()
    assert same(weights(learner), list(model.parameters()))


class Checkpointed(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            for name in ("head", "body"):
                state.preds = checkpoint(learner.model, state.xs, use_reentrant=False)
                with learner.optimizing(name) as block:
                    block.loss = mse_loss(state.preds, state.ys)


def test_a_checkpoint_computed_before_the_block_works_with_two_optimizers_on_one_model() -> None:
    learner = Learner(two_parts(), data=(rows(),), optimizer={"body": SGD, "head": ADAM}, default_callbacks=False)
    learner.fit(2, phases=[Checkpointed()])
    model = two_parts()
    optimizers = {"head": ADAM(model.head.parameters()), "body": SGD(model.body.parameters())}
    for xs, ys in [*rows(), *rows()]:
        for optimizer in optimizers.values():
            model.zero_grad()
            mse_loss(model(xs), ys).backward()
            optimizer.step()
    assert same(weights(learner), list(model.parameters()))


def step_at_once(parameter: Tensor) -> None:
    """Step when the gradient is there, and take it away."""
    with torch.no_grad():
        parameter -= 0.1 * parameter.grad
    parameter.grad = None


def test_a_hook_that_takes_the_gradients_away_is_no_error() -> None:
    learner = Learner(two_parts(), mse_loss, data=(rows(),), optimizer=SGD, default_callbacks=False)
    plain = Learner(two_parts(), mse_loss, data=(rows(),), optimizer=SGD, default_callbacks=False)
    for parameter in learner.model.parameters():
        parameter.register_post_accumulate_grad_hook(step_at_once)
    for each in (learner, plain):
        each.fit(2, phases=[TrainingPhase()])
    assert all(torch.allclose(a, b) for a, b in zip(weights(learner), weights(plain), strict=True))
    assert not same(weights(learner), list(two_parts().parameters()))


def test_a_hook_that_takes_the_gradients_of_a_block_away_is_no_error() -> None:
    learner, before = gan(), list(models()["D"].parameters())
    for parameter in learner.model.D.parameters():
        parameter.register_post_accumulate_grad_hook(step_at_once)
    one_step(learner)
    assert not any(torch.equal(a, b) for a, b in zip(learner.model.D.parameters(), before, strict=True))


def product() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {"A": nn.Linear(3, 2), "B": nn.Linear(3, 2)}


class SharedGraph(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            shared = (learner.model.A(state.xs) * learner.model.B(state.xs)).tanh()
            with learner.optimizing("A", retain_graph=True) as block:
                block.loss = (shared - 1).square().mean()
            with learner.optimizing("B") as block:
                block.loss = shared.exp().mean()


def test_two_blocks_over_one_graph_equal_the_loop_by_hand() -> None:
    learner = Learner(product(), data=(rows(),), optimizer=SGD, default_callbacks=False)
    learner.fit(2, phases=[SharedGraph()])
    both = product()
    first, second = SGD(both["A"].parameters()), SGD(both["B"].parameters())
    for xs, _ in [*rows(), *rows()]:
        shared = (both["A"](xs) * both["B"](xs)).tanh()
        first.zero_grad()
        (shared - 1).square().mean().backward(retain_graph=True)
        first.step()
        second.zero_grad()
        shared.exp().mean().backward()
        second.step()
    assert_equals(learner, both)


class TwoLosses(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.preds = learner.model(state.xs)
            learner.backward(mse_loss(state.preds, state.ys), retain_graph=True)
            learner.backward(0.1 * state.preds.square().mean())
            learner.update()


def test_two_explicit_losses_over_one_graph_equal_the_loop_by_hand() -> None:
    learner = Learner(two_parts(), data=(rows(),), optimizer=ADAM, default_callbacks=False)
    learner.fit(2, phases=[TwoLosses()])
    model = two_parts()
    optimizer = ADAM(model.parameters())
    for xs, ys in [*rows(), *rows()]:
        optimizer.zero_grad()
        preds = model(xs)
        mse_loss(preds, ys).backward(retain_graph=True)
        (0.1 * preds.square().mean()).backward()
        optimizer.step()
    assert same(weights(learner), list(model.parameters()))


class Mixed(TrainingPhase):
    """The generator's loss outside of a block, by the learner or by hand; then the critic's block."""

    def __init__(self, by_hand: bool) -> None:
        self.by_hand = by_hand

    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            fake = gen(state.real)
            loss = generator_loss(dis, fake)
            if self.by_hand:
                loss.backward()
            else:
                learner.backward(loss)
            learner.update("G")
            with learner.optimizing("D") as block:
                block.loss = critic_loss(dis, state.real, fake)


def test_a_block_after_an_explicit_backward_of_another_loss_is_refused() -> None:
    learner = gan()
    before = list(models()["D"].parameters())
    with pytest.raises(LossError, match=r"block of optimizer 'D' would add to gradients.*give each loss a block"):
        one_step(learner, Mixed(by_hand=False))
    assert same(list(learner.model.D.parameters()), before)


def test_a_block_after_a_backward_by_hand_uses_its_own_gradients_alone() -> None:
    learner = gan()
    learner.fit(2, phases=[Mixed(by_hand=True)])
    both = models()
    gen, dis = both["G"], both["D"]
    step_g, step_d = SGD(gen.parameters()), SGD(dis.parameters())
    for real in [*images(), *images()]:
        fake = gen(real)
        step_g.zero_grad()
        generator_loss(dis, fake).backward()
        step_g.step()
        step_d.zero_grad()
        critic_loss(dis, real, fake).backward()
        step_d.step()
    assert_equals(learner, both)


def test_an_optimizer_that_needs_a_closure_is_an_error_that_says_so() -> None:
    with pytest.raises(OptimizerError, match=r"(?s)LBFGS needs a closure.*learner\.update\(closure=closure\)"):
        toy_learner(optimizer=torch.optim.LBFGS).fit(1)


@pytest.mark.parametrize("name", ["", "a/b", 3])
def test_a_name_of_a_blocks_loss_that_cannot_be_recorded_is_refused(name: Any) -> None:
    learner = toy_learner()
    with pytest.raises(LossError, match=r"optimizing\(loss=.*was given; expected the name"):
        learner.optimizing(loss=name)


def test_a_blocks_loss_may_not_take_the_name_of_another() -> None:
    class Twice(TrainingPhase):
        def step(self, learner: Any, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                for name in (None, "loss"):
                    with learner.optimizing(loss=name) as block:
                        block.loss = learner.model(state.xs).mean()

    learner = toy_learner(Recorder(), Metrics())
    with pytest.raises(MetricError, match="two losses of a step are recorded as 'loss'"):
        learner.fit(1, phases=[Twice()])


# Optimizers that compute gradients themselves


class SharpnessAware(torch.optim.Optimizer):
    """Foret et al. (2021): steps with the gradients at the worst place nearby; the first ones are there already."""

    def __init__(self, parameters: Any, lr: float = 0.1, rho: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]  # as torch's own
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
        steps = [p.grad * (group["rho"] / norm) for p in parameters]
        for p, there in zip(parameters, steps, strict=True):
            p.add_(there)
        with torch.enable_grad():
            loss = closure()
        for p, there in zip(parameters, steps, strict=True):
            p.sub_(there)
            state = self.state[p]
            state["momentum"] = p.grad.clone() if not state else state["momentum"].mul_(0.9).add_(p.grad)
            p.add_(state["momentum"], alpha=-group["lr"])
        return loss


LBFGS = partial(torch.optim.LBFGS, lr=0.5, max_iter=4, history_size=3)
STRONG_WOLFE = partial(LBFGS, line_search_fn="strong_wolfe")


class WithClosure(TrainingPhase):
    """Updates with a closure; `first` computes gradients before as well, `bad` makes those of an evaluation NaN."""

    transient = ("evaluations", "bad")

    def __init__(self, first: bool = False, block: str | None = None, bad: int = 0) -> None:
        self.first, self.block, self.bad = first, block, bad
        self.evaluations = 0

    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        def closure() -> Tensor:
            self.evaluations += 1
            model = learner.model if self.block is None else learner.models[self.block]
            state.loss = mse_loss(model(state.xs), state.ys)
            learner.backward(state.loss * (float("nan") if self.evaluations == self.bad else 1.0))
            return state.loss

        with nullcontext() if self.block is None else learner.optimizing(self.block):
            if self.first:
                closure()
            learner.update(closure=closure)


def regression(optimizer: Any, *callbacks: Any, model: Any = None) -> Learner:
    torch.manual_seed(0)
    xs = torch.randn(24, 4)
    made = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) if model is None else model
    return Learner(
        made,
        data=(TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=8),),
        optimizer=optimizer,
        callbacks=[Recorder(), *callbacks],
        default_callbacks=False,
        seed=0,
    )


CLOSURES = {
    "LBFGS": (LBFGS, False),
    "with a line search": (STRONG_WOLFE, False),
    "sharpness-aware": (SharpnessAware, True),
    "Adam": (partial(torch.optim.Adam, fused=False), False),
    "fused": (partial(torch.optim.Adam, fused=True), False),
}


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("kind", CLOSURES)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_an_update_with_a_closure_is_that_of_a_loop_by_hand(kind: str, clip: float | None) -> None:
    optimizer, first = CLOSURES[kind]
    clips = [] if clip is None else [GradientClip(clip)]
    recorder, phase = EventRecorder(), WithClosure(first)
    learner = regression(optimizer, recorder, StopOnNaNLoss(), *clips)
    hand = copy.deepcopy(learner.model)
    history = learner.fit(2, phases=[phase])
    made = optimizer(hand.parameters())
    evaluations = 0
    for xs, ys in 2 * list(learner.data.training):

        def closure(xs: Tensor = xs, ys: Tensor = ys) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            made.zero_grad()
            loss = mse_loss(hand(xs), ys)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(hand.parameters(), clip)
            return loss

        if first:
            closure()
        made.step(closure)
    for a, b in zip(learner.model.parameters(), hand.parameters(), strict=True):
        assert torch.equal(a, b)
    assert history[WithClosure].updates == {None: 6}
    assert phase.evaluations == evaluations
    assert recorder.events.count("UpdateBegin") == evaluations
    assert recorder.events.count("UpdateEnd") == 6


def test_a_closure_in_a_block_is_of_its_optimizer_alone() -> None:
    model = {name: nn.Linear(4, 1) for name in ("G", "D")}
    learner = regression(LBFGS, model=model)
    before = learner.model.D.weight.detach().clone()
    history = learner.fit(1, phases=[WithClosure(block="G")])
    assert history[WithClosure].updates == {"G": 3}
    assert torch.equal(learner.model.D.weight, before)
    assert learner.model.D.weight.grad is None
    assert learner.step.loss.item() < 1.0


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("kind", ["LBFGS", "with a line search", "sharpness-aware"])
@pytest.mark.parametrize("bad", [5, 6, 7])
@pytest.mark.filterwarnings("ignore:the fit stops")
def test_a_gradient_that_is_not_finite_in_the_middle_of_a_closure_changes_nothing(kind: str, bad: int) -> None:
    optimizer, first = CLOSURES[kind]
    learner = regression(optimizer, StopOnNaNLoss())
    kept: list[Any] = []

    def keep(learner: Any) -> None:
        kept.append((copy.deepcopy(learner.model.state_dict()), copy.deepcopy(learner.optimizer.state_dict())))

    learner.add_callback(CustomCallback(keep, StepBegin, reads=("model", "optimizer")))
    reason = learner.fit(2, phases=[WithClosure(first, bad=bad)]).stop_reason
    assert str(reason).startswith("gradients of the optimizer became nan or infinite (0.weight, 0.bias, 2.weight and")
    weights_before, state_before = kept[-1]
    assert all(torch.equal(tensor, weights_before[name]) for name, tensor in learner.model.state_dict().items())
    assert repr(learner.optimizer.state_dict()) == repr(state_before)
    assert learner.history[WithClosure].updates.get(None, 0) == len(kept) - 1


@pytest.mark.slow
def test_a_run_of_lbfgs_that_was_killed_goes_on_to_the_bit(tmp_path: Any) -> None:
    class Fails(Callback):
        reads = ("history",)

        @on(StepEnd)
        def fail(self, event: Any, phase: Any, learner: Any) -> None:
            if learner.history[phase].steps == 5:
                raise OSError("killed")

    run = tmp_path / "run"
    with pytest.raises(OSError, match="killed"):
        regression(STRONG_WOLFE, Checkpointer(run, unit="step"), Fails()).fit(3, phases=[WithClosure()], resume=run)
    resumed = regression(STRONG_WOLFE, Checkpointer(run, unit="step"))
    resumed.fit(3, phases=[WithClosure()], resume=run)
    expected = regression(STRONG_WOLFE)
    expected.fit(3, phases=[WithClosure()])
    assert_same_bits(resumed, expected)
    assert repr(resumed.optimizer.state_dict()) == repr(expected.optimizer.state_dict())


@pytest.mark.parametrize(
    ("closure", "error", "words"),
    [
        (3, OptimizerError, "expected a function that computes the loss"),
        (lambda: None, LossError, "returned None; expected the loss"),
    ],
)
def test_a_closure_that_is_none_is_refused_and_changes_nothing(closure: Any, error: Any, words: str) -> None:
    class Bad(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            learner.update(closure=closure)

    learner = regression(LBFGS)
    before = bits(learner)
    with pytest.raises(error, match=words):
        learner.fit(1, phases=[Bad()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


def test_a_closure_for_several_optimizers_is_refused() -> None:
    learner = regression(LBFGS, model={name: nn.Linear(4, 1) for name in ("G", "D")})
    with pytest.raises(OptimizerError, match=r"(?s)outside of a block.*with learner\.optimizing\('G'\):"):
        learner.fit(1, phases=[WithClosure()])


# Optimizers that a phase steps by hand


class SteppedByHand(TrainingPhase):
    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        state.loss = mse_loss(learner.model(state.xs), state.ys)
        learner.optimizer.zero_grad()
        state.loss.backward()
        learner.optimizer.step()


@pytest.mark.parametrize("optimizer", [SGD, torch.optim.Adam])
def test_callbacks_that_hear_of_no_update_are_named_once(optimizer: Any) -> None:
    steps = LRScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=1), unit="step")
    learner = regression(optimizer, GradientClip(0.1), StopOnNaNLoss(), steps)
    with pytest.warns(
        UserWarning, match=r"SteppedByHand\(\) changed .*, so LRScheduler, GradientClip heard of none"
    ) as told:
        learner.fit(3, phases=[SteppedByHand()])
    assert len(told) == 1
    assert "learner.update(closure=closure)" in str(told[0].message)


def test_nothing_is_told_where_nobody_waits_for_updates_or_they_are_the_learners() -> None:
    epochs = LRScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    regression(SGD, StopOnNaNLoss(), EventRecorder(), epochs).fit(2, phases=[SteppedByHand()])
    regression(LBFGS, GradientClip(0.1)).fit(2, phases=[WithClosure()])
    regression(partial(torch.optim.SGD, lr=0.0), GradientClip(0.1)).fit(1, phases=[Idle()])


class Idle(TrainingPhase):
    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        state.loss = mse_loss(learner.model(state.xs), state.ys)


# An update without a gradient


class Forgets(TrainingPhase):
    """Forgets the backward, or computes none in its closure."""

    def __init__(self, with_closure: bool = False) -> None:
        super().__init__()
        self.with_closure = with_closure

    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
        learner.update(closure=(lambda: state.loss) if self.with_closure else None)


@pytest.mark.parametrize(
    ("with_closure", "said"),
    [
        (
            False,
            r"no parameter of the optimizer has a gradient, so nothing changes; call learner\.backward\(loss\) first",
        ),
        (True, r"a closure that computed no gradient, so nothing changes: call learner\.backward\(loss\) in it"),
    ],
)
def test_an_update_without_any_gradient_is_told_once(with_closure: bool, said: str) -> None:
    learner = toy_learner()
    with pytest.warns(UserWarning, match=said) as warned:
        learner.fit(2, phases=[Forgets(with_closure)])
    assert len([each for each in warned if "learner.update" in str(each.message)]) == 1


def test_gradients_that_somebody_computes_by_hand_are_no_reason_to_warn() -> None:
    class ByHand(TrainingPhase):
        def body(self, learner: Learner, handle: Any, state: Any) -> None:
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            state.loss.backward()
            learner.update()

    learner = toy_learner()
    before = learner.model.value.item()
    learner.fit(1, phases=[ByHand()])
    assert learner.model.value.item() != before


def test_an_update_of_frozen_parameters_is_not_told_as_one_without_a_gradient() -> None:
    learner = toy_learner()
    learner.model.requires_grad_(False)
    learner.fit(1, phases=[Forgets()])
