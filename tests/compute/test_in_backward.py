"""Parameters that are stepped while the backward pass runs: the same bits, fewer gradients, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import by_hand
from fluxloop import (
    EMA,
    Accelerator,
    BYOLPhase,
    CancelFittingException,
    CancelStepException,
    Checkpointer,
    CustomCallback,
    GANPhase,
    GradientClip,
    Learner,
    LearningRate,
    LossError,
    OptimizerError,
    PhaseError,
    Recorder,
    Scheduler,
    StepBegin,
    StepEnd,
    StopOnNaNLoss,
    TensorBatches,
    TrainingPhase,
    Unfreeze,
    find_batch_size,
    find_lr,
    linear,
    recompute_activations,
    runepoch,
    runstep,
    throttle,
)
from fluxloop.compute import in_backward
from fluxloop.compute.in_backward import FiniteInBackward
from fluxloop.testing import EventRecorder, assert_same_bits, bits
from small_models import Pair, assert_equals, images, models, train_by_hand
from toys import BrokenError, Killed, raising

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01)
IN_BACKWARD: dict[str, Any] = {"accelerator": Accelerator("cpu", optimizer_in_backward=True)}
ORDINARY: dict[str, Any] = {"accelerator": Accelerator("cpu")}


@pytest.fixture(params=[1, in_backward.TOGETHER], ids=["one by one", "small ones together"])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many bytes of gradients are used at once."""
    monkeypatch.setattr(in_backward, "TOGETHER", request.param)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_backward, "TOGETHER", 1)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(rows: int = 30) -> TensorBatches:
    generator = torch.Generator().manual_seed(2)
    return TensorBatches(torch.randn(rows, 4, generator=generator), torch.arange(rows) % 3, batch_size=8)


def learner_of(model: nn.Module, optimizer: Any = SGD, loss_fn: Any = cross_entropy, **options: Any) -> Learner:
    options = {"data": (batches(),), "default_callbacks": False, "seed": 3, **IN_BACKWARD, **options}
    return Learner(model, loss_fn, optimizer=optimizer, **options)


def assert_trains_alike(make: Callable[..., Learner], epochs: int = 2, phases: Any = None) -> Learner:
    """Assert that a learner ends with the same bits as one that steps after the backward pass, and return it."""
    made, ordinary = make(**IN_BACKWARD), make(**ORDINARY)
    before = bits(made)
    for learner in (made, ordinary):
        learner.fit(epochs, phases=None if phases is None else phases())
    assert_same_bits(made, ordinary)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in bits(made).items() if name in before)
    assert made.updates.count == ordinary.updates.count > 0
    return made


# The same bits as the loop that everybody writes, and as an ordinary learner

OPTIMIZERS = {
    "sgd": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "fused momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=False),
    "adamw, fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "adamw, lists": partial(torch.optim.AdamW, lr=0.01, foreach=True, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, lr_decay=0.1),
    "adafactor": torch.optim.Adafactor,
    "nadam": torch.optim.NAdam,
}


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_parameter_is_stepped_to_the_bits_of_the_loop_that_steps_after_the_backward_pass(optimizer: Any) -> None:
    model = net()
    made = optimizer(model.parameters())
    by_hand.train(model, cross_entropy, made, batches(), epochs=2)
    learner = learner_of(net(), optimizer)
    learner.fit(2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(learner.model.state_dict()[name], tensor), name
    expected, found = made.state_dict()["state"], learner.optimizer.state_dict()["state"]
    assert found.keys() == expected.keys()
    for number, entries in expected.items():
        assert all(torch.equal(torch.as_tensor(found[number][k]), torch.as_tensor(v)) for k, v in entries.items())


@pytest.mark.usefixtures("together")
def test_groups_and_schedules_act_in_the_step_for_which_they_are_set() -> None:
    model = net()
    groups = [{"params": [*model[0].parameters()]}, {"params": [*model[1:].parameters()], "lr": 0.02}]
    made = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for number, _ in enumerate(by_hand.steps(model, cross_entropy, made, batches(), epochs=2)):
        for group, rate in zip(made.param_groups, (0.1, 0.02), strict=True):
            group["lr"] = rate * (1 - (number + 1) / 10)
    mine = net()
    groups = [{"params": [*mine[0].parameters()]}, {"params": [*mine[1:].parameters()], "lr": 0.02}]
    learner = learner_of(mine, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    learner.add_callback(Scheduler({LearningRate: linear(10, 0.1, 0.0)}))
    learner.fit(2)
    for p, q in zip(model.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)
    assert_trains_alike(
        lambda **options: learner_of(net(), callbacks=[Scheduler({LearningRate: linear(10, 0.1, 0.0)})], **options)
    )


class Tied(nn.Module):
    """Uses one weight three times, another part twice, and a third never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed, self.head, self.inner = nn.Linear(4, 3, bias=False), nn.Linear(4, 3), nn.Linear(3, 3)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, xs: Tensor) -> Tensor:
        hidden = self.inner(self.inner(self.embed(xs)).tanh())
        return self.head(xs) + hidden @ self.embed.weight @ self.embed.weight.t()


@pytest.mark.filterwarnings("ignore:.* got no gradient in a whole epoch")
@pytest.mark.usefixtures("together")
def test_shared_weights_are_stepped_once_and_unused_ones_not_at_all() -> None:
    learner = assert_trains_alike(lambda **options: learner_of(Tied(), partial(SGD, weight_decay=0.1), **options))
    assert torch.equal(learner.model.unused.weight, Tied().unused.weight)


class Checkpointed(nn.Module):
    """Computes a shared layer again in the backward pass, three times."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.shared, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, xs: Tensor) -> Tensor:
        xs = self.first(xs)
        for _ in range(3):
            xs = checkpoint(lambda ys: self.shared(ys).tanh(), xs, use_reentrant=self.reentrant)
        return self.last(xs)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("reentrant", [False, True])
def test_weights_of_checkpointed_parts_are_stepped_once_their_whole_gradient_is_there(reentrant: bool) -> None:
    assert_trains_alike(lambda **options: learner_of(Checkpointed(reentrant), ADAM, **options))


@pytest.mark.usefixtures("together")
def test_activations_are_computed_again_from_weights_that_are_not_stepped_yet() -> None:
    assert_trains_alike(lambda **options: learner_of(recompute_activations(net(), "*"), ADAM, **options))


@pytest.mark.usefixtures("together")
def test_frozen_parts_stay_until_they_are_unfrozen() -> None:
    def make(**options: Any) -> Learner:
        return learner_of(net(), ADAM, callbacks=[Unfreeze({"3.*": 1, "0.*": 2})], **options)

    assert_trains_alike(make, 3)


@pytest.mark.usefixtures("together")
def test_reduced_precision_gives_the_bits_that_it_gives_with_an_update_after_the_pass() -> None:
    half = [Accelerator("cpu", precision="bf16", optimizer_in_backward=inside) for inside in (True, False)]
    first, second = (learner_of(net(), ADAM, accelerator=accelerator) for accelerator in half)
    first.fit(2)
    second.fit(2)
    assert_same_bits(first, second)
    full = learner_of(net(), ADAM)
    full.fit(2)
    assert not torch.equal(full.model[0].weight, first.model[0].weight)


def two_optimizers(**options: Any) -> Learner:
    model = net()
    made = {"body": torch.optim.SGD(model[:5].parameters(), lr=0.1), "head": torch.optim.AdamW(model[5:].parameters())}
    return learner_of(model, made, **options)


@pytest.mark.usefixtures("together")
def test_several_optimizers_over_one_loss_are_all_stepped_in_its_pass() -> None:
    learner = assert_trains_alike(two_optimizers)
    assert learner.updates.count == 16


@pytest.mark.usefixtures("together")
def test_the_two_blocks_of_a_gan_give_the_bits_of_the_same_loop_by_hand() -> None:
    learner = Learner(models(), data=(images(),), optimizer=SGD, default_callbacks=False, seed=0, **IN_BACKWARD)
    learner.fit(2, phases=[Pair()])
    assert_equals(learner, train_by_hand(epochs=2))


@pytest.mark.usefixtures("together")
def test_a_gradient_penalty_and_more_steps_of_the_critic_are_trained_alike() -> None:
    def make(**options: Any) -> Learner:
        torch.manual_seed(0)
        parts = {"generator": nn.Linear(5, 3), "critic": nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))}
        return Learner(parts, data=(images(),), optimizer=ADAM, seed=0, default_callbacks=False, **options)

    phase = partial(GANPhase, "wasserstein", noise=5, gradient_penalty=10, r1=1.0, critic_steps=2)
    assert_trains_alike(make, phases=lambda: [phase()])


@pytest.mark.usefixtures("together")
def test_a_teacher_follows_the_weights_after_their_update() -> None:
    def make(**options: Any) -> Learner:
        torch.manual_seed(0)
        parts = {"student": nn.Linear(3, 4), "teacher": nn.Linear(3, 4), "predictor": nn.Linear(4, 4)}
        parts["teacher"].requires_grad_(False)
        views = TensorBatches(torch.randn(12, 3), torch.randn(12, 3), batch_size=4)
        followed = [EMA("student", 0.9, into="teacher"), EMA("predictor", 0.5)]
        return Learner(
            parts, data=(views,), optimizer=SGD, callbacks=followed, seed=0, default_callbacks=False, **options
        )

    learner, ordinary = make(**IN_BACKWARD), make(**ORDINARY)
    for each in (learner, ordinary):
        each.fit(2, phases=[BYOLPhase()])
    assert_same_bits(learner, ordinary)
    averages = [each.weights["predictor@ema"].weight for each in (learner, ordinary)]
    assert torch.equal(*averages)
    assert not torch.equal(averages[0], learner.model.predictor.weight)


# Gradients


@pytest.mark.usefixtures("one_by_one")
def test_the_gradients_of_few_parameters_are_alive_at_once() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    alive: list[int] = []

    def note(parameter: Tensor) -> None:
        alive.append(sum(each.grad is not None for each in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(note)  # before the one that steps
    learner = learner_of(model, ADAM, loss_fn=lambda preds, ys: preds.square().mean())
    learner.fit(1)
    assert len(alive) == 4 * 12
    assert max(alive) == 1
    alive.clear()
    learner_of(model, ADAM, loss_fn=lambda preds, ys: preds.square().mean(), **ORDINARY).fit(1)
    assert max(alive) == 12


def test_small_gradients_wait_for_others_until_they_are_large_together() -> None:
    stepped: list[int] = []

    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(9)))  # a quarter of a MiB each
    learner = learner_of(model, loss_fn=lambda preds, ys: preds.mean(), data=([(torch.ones(2, 256), torch.ones(2))],))
    step = learner.optimizer.step
    learner.optimizer.step = lambda closure=None: (
        stepped.append(len(learner.optimizer.param_groups[0]["params"])),
        step(closure),
    )
    learner.fit(1)
    assert stepped == [4, 4, 1]
    assert len(learner.optimizer.param_groups[0]["params"]) == 9


def test_a_step_leaves_no_gradient_no_hook_and_the_groups_as_they_were() -> None:
    learner = learner_of(net())
    groups = learner.optimizer.param_groups
    learner.fit(1)
    assert learner.optimizer.param_groups is groups
    for parameter in learner.model.parameters():
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    assert "grads" not in learner.step
    assert "loss" in learner.step


def test_the_events_of_a_step_keep_their_order_and_updates_are_counted() -> None:
    recorder = EventRecorder()
    learner = learner_of(net(), callbacks=[recorder], data=(batches(8),))
    learner.fit(1)
    inside = [each for each in recorder.events if each.startswith(("Step", "Loss", "Backward", "Update"))]
    assert inside == ["StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd"]
    assert learner.updates.count == 1


# A run that is killed, and copies


def checkpointed(folder: Path, *callbacks: Any, **options: Any) -> Learner:
    return learner_of(
        net(), ADAM, callbacks=[Recorder(), Checkpointer(folder, every=3, unit="step"), *callbacks], **options
    )


@pytest.mark.parametrize(
    ("first", "then"), [(IN_BACKWARD, ORDINARY), (ORDINARY, IN_BACKWARD), (IN_BACKWARD, IN_BACKWARD)]
)
def test_a_run_that_was_killed_goes_on_to_the_bit_in_either_mode(
    tmp_path: Path, first: dict[str, Any], then: dict[str, Any]
) -> None:
    whole = learner_of(net(), ADAM)
    whole.fit(3)
    killed = checkpointed(tmp_path, CustomCallback(kill_at_the_sixth, StepEnd, TrainingPhase), **first)
    with pytest.raises(Killed):
        killed.fit(3)
    resumed = checkpointed(tmp_path, **then)
    resumed.fit(3, resume=tmp_path)
    assert_same_bits(resumed, whole)


def kill_at_the_sixth(learner: Any) -> None:
    if learner.trained_steps == 6:
        raise Killed


def test_gradients_that_wait_in_a_checkpoint_are_used_with_those_of_the_next_pass() -> None:
    ordinary = learner_of(net(), ADAM, **ORDINARY)
    ordinary.backward(cross_entropy(ordinary.model(torch.ones(8, 4)), torch.arange(8) % 3))
    state = ordinary.state_dict()
    made = learner_of(net(), ADAM)
    made.load_state_dict(state)
    for learner in (ordinary, made):
        learner.backward(cross_entropy(learner.model(torch.full((8, 4), 2.0)), torch.arange(8) % 3))
        learner.update()
    assert_same_bits(made, ordinary)


def test_a_copy_of_a_trained_learner_trains_on_alike() -> None:
    learner = learner_of(net(), ADAM)
    learner.fit(1)
    copied = copy.deepcopy(learner)
    before = bits(learner)
    copied.fit(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    learner.fit(1)
    assert_same_bits(copied, learner)


def test_what_tries_steps_out_leaves_the_learner_as_it_was() -> None:
    learner = learner_of(net(), ADAM)
    learner.fit(1)
    before = bits(learner)
    assert learner.check() == []
    assert find_batch_size(learner, largest=8) == 8
    assert find_lr(learner, steps=5).losses
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert_trains_alike(lambda **options: learner_of(net(), ADAM, **options))


# Loops of one's own


def test_a_loop_of_ones_own_calls_backward_and_update_as_ever() -> None:
    def train(learner: Learner) -> Learner:
        phase = TrainingPhase()
        with runepoch(learner, phase):
            for xs, ys in batches():
                with runstep(learner, phase, xs=xs, ys=ys) as (_, state):
                    learner.backward(cross_entropy(learner.model(state.xs), state.ys))
                    learner.update()
        return learner

    assert_same_bits(train(learner_of(net(), ADAM)), train(learner_of(net(), ADAM, **ORDINARY)))


def test_gradients_computed_by_hand_alone_are_used_by_the_update() -> None:
    class ByHand(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            cross_entropy(learner.model(state.xs), state.ys).backward()
            learner.update()

    assert_trains_alike(lambda **options: learner_of(net(), ADAM, **options), phases=lambda: [ByHand()])


# Numbers that are not finite


class Root(nn.Module):
    """Has an infinite gradient for its first weight alone, and a finite loss, from the third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.batches = 0

    def forward(self, xs: Tensor) -> Tensor:
        self.batches += 1
        inner = (self.first - 1) * 0.0 if self.batches == 3 else self.first
        return (inner.abs().sqrt() + self.last).sum()


def rooted(**options: Any) -> Learner:
    stop = {"callbacks": [StopOnNaNLoss()], "data": ([(torch.ones(2), torch.ones(2))] * 5,)}
    return learner_of(Root(), loss_fn=lambda preds, ys: preds, **{**stop, **options})


@pytest.mark.usefixtures("one_by_one")
def test_a_gradient_that_is_not_finite_is_found_before_it_is_used_and_the_others_are_told_of() -> None:
    learner = rooted()
    weights: list[Any] = []
    learner.add_callback(CustomCallback(lambda learner: weights.append(copy.deepcopy(learner.model)), StepBegin))
    with pytest.warns(UserWarning, match=r"when 1 of its 2 parameters had been stepped.*To go back, load a checkpoint"):
        learner.fit(1)
    assert "gradients of the optimizer became nan or infinite (first), when 1 of its 2" in learner.history.stop_reason
    assert "step 3 of the run" in learner.history.stop_reason
    assert torch.equal(learner.model.first, weights[-1].first)
    assert learner.model.last.isfinite().all()
    assert learner.updates.count == 2


def test_gradients_that_are_used_together_are_all_looked_at_before() -> None:
    learner, ordinary = rooted(), rooted(**ORDINARY)
    for each in (learner, ordinary):
        with pytest.warns(UserWarning, match="The weights stay as they were before this update"):
            each.fit(1)
    assert learner.history.stop_reason == ordinary.history.stop_reason
    assert_same_bits(learner, ordinary)


def test_a_loss_that_is_not_finite_begins_no_pass() -> None:
    learner = learner_of(net(), loss_fn=lambda preds, ys: preds.sum() * torch.inf, callbacks=[StopOnNaNLoss()])
    before = bits(learner)
    with pytest.warns(UserWarning, match="the loss became"):
        learner.fit(1)
    assert all(torch.equal(before[f"model..{name}"], p) for name, p in learner.model.named_parameters())


@pytest.mark.usefixtures("one_by_one")
def test_on_a_device_fused_steps_are_left_out_from_the_bad_gradient_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def later(finite: Any, slot: Any, parameters: list[nn.Parameter], norm: None, wait: bool) -> None:
        finite._require_later(slot, [each for each in parameters if each.grad is not None], [])

    asked: list[Any] = []
    learner = rooted(optimizer=partial(torch.optim.Adam, fused=True))
    monkeypatch.setattr(FiniteInBackward, "_look_at_each", later)
    monkeypatch.setattr(FiniteInBackward, "require_gradients", lambda *given: None)  # there are none left
    monkeypatch.setattr(learner._host_queue, "request", lambda tensor, then: asked.append((tensor, then)))
    seen: list[dict[str, Tensor]] = []
    learner.add_callback(CustomCallback(lambda view: seen.append(bits(learner)), StepEnd))
    learner.fit(1)
    assert [found.item() for found, _ in asked] == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert torch.equal(seen[1]["model..first"], seen[4]["model..first"])
    assert torch.equal(seen[2]["model..last"], seen[4]["model..last"])
    assert not torch.equal(seen[1]["model..last"], seen[2]["model..last"])
    with pytest.warns(UserWarning, match=r"\(first\), when others of its parameters had been stepped.*To go back"):
        with pytest.raises(CancelFittingException):
            asked[5][1](1.0)


def test_a_look_that_would_come_too_late_is_refused() -> None:
    learner = rooted(callbacks=[throttle(StopOnNaNLoss(), StepBegin, freq=2)])
    with pytest.raises(PhaseError, match="StopOnNaNLoss had not asked for a look at them"):
        learner.fit(1)


def test_without_anybody_who_asks_nothing_is_looked_at() -> None:
    learner = rooted(callbacks=[])
    learner.fit(1)
    assert not learner.model.first.isfinite().all()


# Passes that are not complete


class Breaks(nn.Module):
    """Raises in the backward pass, between the gradients of its last and of its first layer."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first, self.last, self.error = nn.Linear(4, 4), nn.Linear(4, 3), error

    def forward(self, xs: Tensor) -> Tensor:
        hidden = self.first(xs)
        if self.error is not None:
            hidden.register_hook(raising(self.error))
        return self.last(hidden)


@pytest.mark.usefixtures("one_by_one")
def test_an_error_in_the_pass_says_how_much_was_stepped_and_a_checkpoint_brings_all_back(tmp_path: Path) -> None:
    learner = learner_of(Breaks(None), ADAM)
    learner.fit(1)
    learner.save(tmp_path / "good.ckpt")
    good = bits(learner)
    learner.model.error = BrokenError("on the way")
    with pytest.raises(BrokenError) as caught:
        learner.fit(1)
    said = "\n".join(caught.value.__notes__)
    assert "a part of the weights has moved: 2 of 4 parameters had been stepped" in said
    assert "learner.load(file)" in said
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in learner.model.parameters())
    assert torch.equal(learner.model.first.weight, good["model..first.weight"])
    assert not torch.equal(learner.model.last.weight, good["model..last.weight"])
    learner.model.error = None
    learner.load(tmp_path / "good.ckpt")
    assert all(torch.equal(tensor, good[name]) for name, tensor in bits(learner).items())
    learner.fit(1)


@pytest.mark.usefixtures("one_by_one")
def test_out_of_memory_in_the_pass_does_not_say_that_the_learner_can_be_used_on() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        learner_of(Breaks(torch.OutOfMemoryError("CUDA out of memory."))).fit(1)
    said = "\n".join(caught.value.__notes__)
    assert "some weights may have moved" in said
    assert "the learner can be used on" not in said


def test_an_error_before_anything_was_stepped_has_no_such_note() -> None:
    learner = learner_of(Breaks(BrokenError("first")))
    before = bits(learner)
    with pytest.raises(BrokenError) as caught:
        learner.fit(1)
    assert not any("moved" in note for note in caught.value.__notes__)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


@pytest.mark.filterwarnings("ignore:.* got no gradient in a whole epoch")
@pytest.mark.usefixtures("one_by_one")
def test_a_cancel_in_the_pass_or_after_it_is_told_of_since_the_weights_stay_moved() -> None:
    with pytest.warns(UserWarning, match="2 of 4 parameters had been stepped in the backward pass when it was left"):
        learner_of(Breaks(CancelStepException())).fit(1)

    class Changes(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            learner.backward(learner.model(state.xs).mean())
            raise CancelStepException

    learner = learner_of(net(), data=(batches(8),))
    before = learner.model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="the optimizer had been stepped"):
        learner.fit(1, phases=[Changes()])
    assert not torch.equal(before, learner.model[0].weight)
    learner.fit(1)
    assert learner.updates.count == 1


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulate": 2}, r"accumulate=2: gradients of several batches are added up"),
        ({"accumulate": {"G": 2, "D": 1}}, r"accumulate=\{'G': 2"),
        ({"precision": "fp16"}, "expected precision='bf16'"),
        ({"compile": "step"}, "expected compile=False"),
        ({"compile": "model"}, "expected compile=False"),
        ({"optimizer_in_backward": 1}, "expected True or False"),
    ],
)
def test_an_accelerator_says_what_it_cannot_be_given_with(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Accelerator("cpu", **{"optimizer_in_backward": True, **options})


def test_several_processes_are_refused_unless_each_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxloop.compute.accelerator.are_several", lambda: True)
    with pytest.raises(ValueError, match="several processes: gradients are added up over them; expected strategy="):
        Accelerator("cpu", optimizer_in_backward=True)
    assert Accelerator("cpu", strategy="none", optimizer_in_backward=True).group is None


def test_an_update_of_one_batch_by_name_is_no_hindrance() -> None:
    assert "optimizer_in_backward=True" in repr(Accelerator("cpu", accumulate={"G": 1}, optimizer_in_backward=True))


def test_loops_without_a_learner_are_refused() -> None:
    accelerator = Accelerator("cpu", optimizer_in_backward=True)
    with pytest.raises(ValueError, match="which a learner alone does"):
        accelerator.prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="which a learner alone does"):
        accelerator.backward(nn.Linear(2, 1)(torch.ones(1, 2)).sum())


class Own(Accelerator):
    def update(self, optimizer: Any, closure: Any = None) -> None:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        super().update(optimizer, closure)


def test_an_accelerator_with_an_update_of_its_own_is_refused() -> None:
    with pytest.raises(OptimizerError, match="Own has a backward or update of its own"):
        learner_of(net(), accelerator=Own("cpu", optimizer_in_backward=True))


def test_an_optimizer_that_needs_all_gradients_is_refused_by_name() -> None:
    model = net()
    body, head = torch.optim.SGD(model[:5].parameters(), lr=0.1), torch.optim.LBFGS(model[5:].parameters())
    with pytest.raises(OptimizerError, match="optimizer 'head', LBFGS, takes all parameters for one vector"):
        learner_of(model, {"body": body, "head": head})


def in_a_step(*wrong: Callable[[Learner, Tensor], object]) -> type[TrainingPhase]:
    """Return a phase that does these things with its loss."""

    class Wrong(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            for each in wrong:
                each(learner, learner.model(state.xs).square().mean())

    return Wrong


def backward(learner: Learner, loss: Tensor) -> None:
    learner.backward(loss)


def update(learner: Learner, loss: Tensor) -> None:
    learner.update()


def backward_by_hand(learner: Learner, loss: Tensor) -> None:
    loss.backward()


def give_gradients(learner: Learner, loss: Tensor) -> None:
    learner.step.grads = {name: torch.ones_like(p) for name, p in learner.model.named_parameters()}


def with_closure(learner: Learner, loss: Tensor) -> None:
    learner.update(closure=lambda: loss)


def read_gradients(learner: Learner, loss: Tensor) -> None:
    learner.step.grads["0.weight"]


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ((backward, backward, update), LossError, "called again before learner.update.*the optimizer in the first"),
        ((backward,), LossError, r"ended without learner.update\(\)"),
        ((backward, backward_by_hand, update), LossError, "0.weight has a gradient after learner.backward"),
        ((backward, give_gradients, update), LossError, "step.grads was given after learner.backward"),
        ((with_closure,), OptimizerError, "whose backward passes step the optimizer themselves"),
        ((backward, read_gradients, update), AttributeError, "no entry 'grads'"),
    ],
)
def test_a_step_that_needs_gradients_after_the_pass_is_refused(wrong: Any, error: Any, said: str) -> None:
    learner = learner_of(net())
    with pytest.raises(error, match=said):
        learner.fit(1, phases=[in_a_step(*wrong)()])
    assert not learner.updates.used
    learner.fit(1)  # nothing of it is left


def test_an_optimizer_that_a_step_leaves_out_is_named() -> None:
    learner = two_optimizers()
    with pytest.raises(LossError, match=r"gradients of optimizer 'head' and ended without learner.update\('head'\)"):
        learner.fit(1, phases=[in_a_step(backward, lambda learner, loss: learner.update("body"))()])


def test_a_hook_of_the_step_is_refused_before_anything_is_stepped() -> None:
    learner = learner_of(net())
    before = bits(learner)
    learner.optimizer.register_step_pre_hook(lambda *given: None)
    with pytest.raises(OptimizerError, match="has hooks of its step"):
        learner.fit(1)
    assert all(torch.equal(before[f"model..{n}"], p) for n, p in learner.model.named_parameters())


def test_a_callback_that_joins_a_running_loop_is_refused_too() -> None:
    learner = learner_of(net())
    with pytest.raises(Exception, match=r"GradientClip handles UpdateBegin of TrainingPhase"):
        learner.add_callback(GradientClip(1.0))


def test_other_losses_say_what_is_wrong_with_them_as_ever() -> None:
    learner = learner_of(net())
    with pytest.raises(LossError, match="reaches none of its own parameters"):
        learner.backward(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(LossError, match="expected a tensor with one element"):
        learner.backward(2.0)  # type: ignore[arg-type]  # what is wrong
    learner.backward(mse_loss(learner.model(torch.ones(3, 4)), torch.ones(3, 3)))
    learner.update()


class Sparse(nn.Module):
    """Has an embedding with sparse gradients, used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed, self.last = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, xs: Tensor) -> Tensor:
        rows = (xs[:, 0] > 0).long()
        return self.last(self.embed(rows) + self.embed(rows + 2))


@pytest.mark.usefixtures("together")
def test_sparse_gradients_are_used_as_dense_ones_are() -> None:
    assert_trains_alike(lambda **options: learner_of(Sparse(), SGD, **options))


class Detached(nn.Module):
    """Uses its last weight a second time, detached, where the backward pass comes later."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, xs: Tensor) -> Tensor:
        hidden = self.first(xs) @ self.last.weight.detach()
        return self.last(hidden.tanh())[:, :3]


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_that_is_needed_after_it_was_stepped_is_an_error_and_no_wrong_gradient(fused: bool) -> None:
    optimizer = partial(torch.optim.AdamW, fused=fused)
    learner_of(Detached(), optimizer, **ORDINARY).fit(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        learner_of(Detached(), optimizer).fit(1)
    assert "of 4 parameters had been stepped" in "\n".join(caught.value.__notes__)
