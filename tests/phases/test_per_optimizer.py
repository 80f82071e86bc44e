from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    BackwardBegin,
    BatchError,
    CustomCallback,
    Event,
    Learner,
    LossBegin,
    Metrics,
    PerOptimizerPhase,
    PerOptimizerValidationPhase,
    Phase,
    PhaseError,
    Recorder,
    StepBegin,
    StopOnNaNLoss,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    ValidationPhase,
    on,
)
from fluxloop.testing import EventRecorder, assert_observer, assert_same_bits, bits

mse = nn.functional.mse_loss
SGD = partial(torch.optim.SGD, lr=0.1)
BLOCK = ["LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd"]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(4, 1)

    def forward(self, xs: Tensor) -> Tensor:
        return self.fc2(self.fc1(xs).tanh())


class Penalised(PerOptimizerPhase):
    """The same loss for both optimizers, with a penalty on the first layer for its own."""

    def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
        loss = learner.loss_fn(state.preds, state.ys)
        return loss + learner.model.fc1.weight.abs().sum() if name == "fc1" else loss


class Plain(PerOptimizerPhase):
    def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
        return learner.loss_fn(state.preds, state.ys)


def data() -> TensorBatches:
    xs = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    return TensorBatches(xs, xs.sum(dim=1, keepdim=True), batch_size=4)


def make_learner(*callbacks: Any, optimizer: Any = None, **options: Any) -> Learner:
    given = {"data": (data(), data()), "default_callbacks": False, "seed": 0, **options}
    both = {"fc1": SGD, "fc2": partial(torch.optim.SGD, lr=0.01)}
    return Learner(Two(), mse, optimizer=both if optimizer is None else optimizer, callbacks=callbacks, **given)


def own_gradients(model: Two, xs: Tensor, ys: Tensor, name: str) -> dict[str, Tensor]:
    """Compute the gradients of one optimizer's loss with respect to its parameters alone."""
    loss = mse(model(xs), ys)
    if name == "fc1":
        loss = loss + model.fc1.weight.abs().sum()
    part = dict(getattr(model, name).named_parameters(name))
    return dict(zip(part, torch.autograd.grad(loss, list(part.values())), strict=True))


def test_each_optimizer_in_order_has_its_forward_loss_backward_and_update() -> None:
    recorder = EventRecorder()
    updated: list[str | None] = []

    class Names(UnsafeCallback):
        @on(UpdateBegin)
        def note(self, event: Any, phase: Phase, learner: Any) -> None:
            updated.append(event.name)

    learner = make_learner(recorder, Names(), Recorder())
    learner.epoch(Penalised())
    assert recorder.events == ["EpochBegin", *["StepBegin", *BLOCK, *BLOCK, "StepEnd"] * 3, "EpochEnd"]
    assert updated == ["fc1", "fc2"] * 3
    assert learner.history[Penalised].updates == {"fc1": 3, "fc2": 3}


def test_each_optimizer_steps_on_the_gradient_of_its_own_loss_alone() -> None:
    steps: list[bool] = []

    class Compare(UnsafeCallback):
        @on(UpdateBegin)
        def compare(self, event: Any, phase: Phase, learner: Any) -> None:
            own = own_gradients(learner.model, learner.step.xs, learner.step.ys, event.name)
            steps.extend(torch.equal(learner.step.grads[name], gradient) for name, gradient in own.items())

    learner = make_learner(Compare())
    for model in learner.modules():  # as if a former loop had left something there
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    learner.epoch(Penalised())
    assert steps == [True] * 12


def test_the_forward_of_the_second_optimizer_sees_the_update_of_the_first() -> None:
    preds: list[Tensor] = []
    learner = make_learner(CustomCallback(lambda learner: preds.append(learner.step.preds.detach()), LossBegin))
    xs, ys = next(iter(data()))
    learner.epoch(Penalised(), [(xs, ys)])
    expected = Two()
    assert torch.equal(preds[0], expected(xs))
    for name, gradient in own_gradients(expected, xs, ys, "fc1").items():
        expected.get_parameter(name).data.add_(gradient, alpha=-0.1)
    assert torch.equal(preds[1], expected(xs))


def test_losses_are_kept_by_name_and_in_the_history() -> None:
    learner = make_learner(Recorder(), Metrics(), StopOnNaNLoss())
    phase = Penalised()
    learner.fit(2, phases=[phase, PerOptimizerValidationPhase(phase)])
    assert list(learner.step.losses) == ["fc1", "fc2"]
    assert "loss" not in learner.step
    for key in ("training", "validation"):
        assert len(learner.history[f"{key}/loss_fc1"]) == len(learner.history[f"{key}/loss_fc2"]) == 2
    assert learner.history["training/loss_fc1"][0] > learner.history["training/loss_fc2"][0]


@pytest.mark.parametrize("optimizer", [SGD, torch.optim.Adam])
def test_with_a_single_optimizer_it_is_the_training_phase_to_the_bit(optimizer: Any) -> None:
    recorders = [EventRecorder(), EventRecorder()]
    learners = [make_learner(recorder, optimizer=optimizer) for recorder in recorders]
    for learner, phase in zip(learners, (Plain(), TrainingPhase()), strict=True):
        learner.fit(3, phases=[phase])
    assert_same_bits(*learners)
    assert recorders[0].events == recorders[1].events
    assert torch.equal(learners[0].step.loss, learners[1].step.loss)
    assert "losses" not in learners[0].step


def test_a_single_optimizer_is_called_none() -> None:
    names: list[str | None] = []

    class Note(Plain):
        def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
            names.append(name)
            return super().loss(learner, state, name)

    make_learner(optimizer=SGD).epoch(Note())
    assert names == [None] * 3


# What callbacks replace


def replacing(entry: str, new: Any, event: type[Event]) -> CustomCallback:
    def replace(learner: Any) -> None:
        setattr(learner.step, entry, new(getattr(learner.step, entry)))

    return CustomCallback(replace, event, reads=(), writes=(f"step.{entry}",), name=f"replaces {entry}")


@pytest.mark.parametrize(
    ("entry", "event", "new"),
    [
        ("xs", StepBegin, lambda xs: 2 * xs),
        ("ys", LossBegin, lambda ys: ys.sign()),
        ("preds", LossBegin, lambda preds: preds.clamp(-0.2, 0.2)),
    ],
)
def test_what_a_callback_replaces_is_used_next(entry: str, event: type[Event], new: Any) -> None:
    def by_hand(change: Any) -> Two:
        model = Two()
        optimizers = {"fc1": SGD(model.fc1.parameters()), "fc2": torch.optim.SGD(model.fc2.parameters(), 0.01)}
        for xs, ys in data():
            for optimizer in optimizers.values():
                ys_, xs_ = (change(ys) if entry == "ys" else ys), (change(xs) if entry == "xs" else xs)
                model.zero_grad()
                preds = model(xs_)
                mse(change(preds) if entry == "preds" else preds, ys_).backward()
                optimizer.step()
        return model

    learner = make_learner(replacing(entry, new, event))
    learner.epoch(Plain())
    expected, untouched = by_hand(new), by_hand(lambda value: value)
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))
    assert not torch.equal(expected.fc1.weight, untouched.fc1.weight)


def test_one_optimizers_loss_replaced_at_backward_begin_is_the_one_that_is_used() -> None:
    def halve(learner: Any) -> None:
        if list(learner.step.losses)[-1] == "fc2":
            learner.step.losses["fc2"] = learner.step.losses["fc2"] / 2

    halved = make_learner(CustomCallback(halve, BackwardBegin, reads=(), writes=("step.losses",)))
    slower = make_learner(optimizer={"fc1": SGD, "fc2": partial(torch.optim.SGD, lr=0.005)})
    for learner in (halved, slower):
        learner.epoch(Plain())
    for found, expected in zip(halved.model.parameters(), slower.model.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(halved.model.fc2.weight, Two().fc2.weight)


# Batches and models of other shapes


class Autoencoder(PerOptimizerPhase):
    """Batches are tensors, and there are two models."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"image": batch}

    def forward(self, learner: Learner, state: Any, name: str | None) -> None:
        state.code = learner.model.encoder(state.image)
        state.copy = learner.model.decoder(state.code)

    def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
        loss = (state.copy - state.image).square().mean()
        return loss + state.code.abs().mean() if name == "encoder" else loss


def autoencoder(*callbacks: Any) -> Learner:
    torch.manual_seed(1)
    models = {"encoder": nn.Linear(3, 2), "decoder": nn.Linear(2, 3)}
    images = TensorBatches(data().data[0], batch_size=4)
    return Learner(models, data=(images, images), optimizer=SGD, callbacks=callbacks, default_callbacks=False, seed=0)


def test_batches_and_models_of_other_shapes_need_entries_and_forward() -> None:
    learner = autoencoder()
    phase = Autoencoder()
    learner.fit(2, phases=[phase, PerOptimizerValidationPhase(phase)])

    expected = autoencoder().model
    optimizers = {name: SGD(getattr(expected, name).parameters()) for name in ("encoder", "decoder")}
    for _ in range(2):
        for image in data().data[0].split(4):
            for name, optimizer in optimizers.items():
                expected.encoder.zero_grad()
                expected.decoder.zero_grad()
                code = expected.encoder(image)
                loss = (expected.decoder(code) - image).square().mean()
                if name == "encoder":
                    loss = loss + code.abs().mean()
                loss.backward()
                optimizer.step()
    for name in optimizers:
        found, wanted = getattr(learner.model, name), getattr(expected, name)
        assert torch.equal(found.weight, wanted.weight)
        assert torch.equal(found.bias, wanted.bias)


def test_with_several_models_the_forward_stores_nothing_unless_it_says_so() -> None:
    class LossAlone(Autoencoder):
        forward = PerOptimizerPhase.forward

        def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
            return (learner.model.decoder(learner.model.encoder(state.image)) - state.image).square().mean()

    learner = autoencoder()
    learner.epoch(LossAlone())
    assert sorted(learner.step) == ["grads", "image", "losses"]


def test_a_phase_without_a_loss_says_what_to_write() -> None:
    class Forgot(PerOptimizerPhase):
        pass

    learner = make_learner()
    before = bits(learner)
    with pytest.raises(PhaseError, match=r"Forgot says no loss; write one") as raised:
        learner.epoch(Forgot())
    assert "def loss(self, learner, state, name):" in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert all(p.requires_grad for p in learner.model.parameters())


@pytest.mark.parametrize("twin", [False, True])
def test_a_batch_that_is_no_pair_is_refused(twin: bool) -> None:
    phase = Plain()
    with pytest.raises(BatchError, match=r"Plain was given a Tensor of shape \(4, 3\) as a batch"):
        make_learner().epoch(PerOptimizerValidationPhase(phase) if twin else phase, [torch.zeros(4, 3)])


# The validation twin


def test_the_twin_computes_the_same_losses_without_updates() -> None:
    xs, ys = next(iter(data()))
    recorder = EventRecorder()
    learner = make_learner(recorder)
    before = bits(learner)
    learner.epoch(PerOptimizerValidationPhase(Penalised()), [(xs, ys)])
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "LossBegin", "StepEnd", "EpochEnd"]
    model = Two()
    with torch.no_grad():
        loss = mse(model(xs), ys)
        assert torch.equal(learner.step.losses["fc2"], loss)
        assert torch.equal(learner.step.losses["fc1"], loss + model.fc1.weight.abs().sum())
    assert not learner.step.losses["fc1"].requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert all(p.grad is None for p in learner.model.parameters())


def test_the_twin_of_a_phase_with_a_single_optimizer_is_the_validation_phase() -> None:
    traces, losses = [], []
    for phase in (PerOptimizerValidationPhase(Plain()), ValidationPhase()):
        recorder = EventRecorder()
        learner = make_learner(recorder, optimizer=SGD)
        learner.epoch(phase)
        traces.append(recorder.events)
        losses.append(learner.step.loss)
        assert "losses" not in learner.step
    assert traces[0] == traces[1]
    assert torch.equal(*losses)


def test_the_twin_reads_again_what_callbacks_replace() -> None:
    xs, ys = next(iter(data()))
    learner = make_learner(
        replacing("xs", lambda xs: 2 * xs, StepBegin), replacing("preds", lambda preds: preds.tanh(), LossBegin)
    )
    learner.epoch(PerOptimizerValidationPhase(Plain()), [(xs, ys)])
    with torch.no_grad():
        assert torch.equal(learner.step.losses["fc2"], mse(Two()(2 * xs).tanh(), ys))


def test_the_twin_only_watches() -> None:
    phase = Penalised()
    plain, watched = make_learner(), make_learner()
    plain.fit(3, phases=[phase])
    watched.fit(3, phases=[phase, PerOptimizerValidationPhase(phase)])
    assert_same_bits(plain, watched)
    assert_observer(PerOptimizerValidationPhase(Plain()), partial(make_learner, optimizer=SGD))


def test_the_twin_is_evaluated_like_any_validation_phase() -> None:
    learner = make_learner()
    found = learner.evaluate(phase=PerOptimizerValidationPhase(Penalised()))
    xs, ys = data().data
    with torch.no_grad():
        loss = mse(learner.model(xs), ys).item()
    assert found["loss_fc2"] == pytest.approx(loss)
    assert found["loss_fc1"] == pytest.approx(loss + learner.model.fc1.weight.abs().sum().item())


@pytest.mark.parametrize(
    ("given", "described"),
    [(Plain, "the class Plain"), (TrainingPhase(), "a TrainingPhase"), (None, "None")],
    ids=["class", "another phase", "none"],
)
def test_the_twin_wants_an_instance_of_the_training_phase(given: Any, described: str) -> None:
    with pytest.raises(PhaseError, match=f"PerOptimizerValidationPhase was given {described}; expected an instance"):
        PerOptimizerValidationPhase(given)


def test_the_twin_shows_whose_it_is() -> None:
    assert repr(PerOptimizerValidationPhase(Plain())) == "PerOptimizerValidationPhase(Plain())"
