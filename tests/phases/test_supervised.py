from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    BackwardBegin,
    BackwardEnd,
    BatchError,
    CustomCallback,
    Event,
    Learner,
    LossBegin,
    LossError,
    Metric,
    Metrics,
    Phase,
    PhaseError,
    PredictionPhase,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UpdateBegin,
    ValidationPhase,
    mae,
    runstep,
)
from fluxloop.testing import Coefficient, EventRecorder, assert_same_bits, bits, toy_learner

mse = nn.functional.mse_loss
ADAM = partial(torch.optim.Adam, lr=0.1, fused=False)
TRAINING = ["StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd"]


def data() -> TensorBatches:
    xs = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    return TensorBatches(xs, xs.sum(dim=1, keepdim=True), batch_size=4)


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def make_learner(*callbacks: Any, loss_fn: Any = mse, **options: Any) -> Learner:
    given = {"data": (data(), data()), "optimizer": ADAM, "seed": 0, "default_callbacks": False, **options}
    return Learner(model(), loss_fn, callbacks=callbacks, **given)


def replacing(entry: str, new: Callable[[Any], Any], event: type[Event], phase: type[Phase]) -> CustomCallback:
    """Make a callback that puts something else in the place of one entry of the step."""

    def replace(learner: Any) -> None:
        setattr(learner.step, entry, new(getattr(learner.step, entry)))

    return CustomCallback(replace, event, phase, reads=(), writes=(f"step.{entry}",), name=f"replaces {entry}")


def by_hand(
    xs_of: Callable[[Tensor], Tensor] = lambda xs: xs,
    ys_of: Callable[[Tensor], Tensor] = lambda ys: ys,
    preds_of: Callable[[Tensor], Tensor] = lambda preds: preds,
    loss_of: Callable[[Tensor], Tensor] = lambda loss: loss,
    grad_of: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> nn.Module:
    """Train one epoch in plain PyTorch, with something in the place of one stage's result."""
    trained = model()
    optimizer = ADAM(trained.parameters())
    for xs, ys in data():
        optimizer.zero_grad()
        loss_of(mse(preds_of(trained(xs_of(xs))), ys_of(ys))).backward()
        for parameter in trained.parameters():
            parameter.grad = grad_of(parameter.grad)
        optimizer.step()
    return trained


def assert_equals(learner: Learner, expected: nn.Module) -> None:
    for (name, found), wanted in zip(learner.model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted), f"{name} differs"
    untouched = by_hand()
    same = [torch.equal(a, b) for a, b in zip(expected.parameters(), untouched.parameters(), strict=True)]
    assert not all(same), "the replacement makes no difference: this shows nothing"


# TrainingPhase: every stage reads what is there


def test_inputs_replaced_at_step_begin_are_the_ones_the_model_gets() -> None:
    learner = make_learner(replacing("xs", lambda xs: 3 * xs, StepBegin, TrainingPhase))
    learner.epoch(TrainingPhase())
    assert_equals(learner, by_hand(xs_of=lambda xs: 3 * xs))


@pytest.mark.parametrize("event", [StepBegin, LossBegin])
def test_targets_replaced_before_the_loss_are_the_ones_it_gets(event: type[Event]) -> None:
    learner = make_learner(replacing("ys", lambda ys: ys.sign(), event, TrainingPhase))
    learner.epoch(TrainingPhase())
    assert_equals(learner, by_hand(ys_of=lambda ys: ys.sign()))


def test_predictions_replaced_at_loss_begin_are_the_ones_the_loss_gets() -> None:
    learner = make_learner(replacing("preds", lambda preds: preds.clamp(-0.5, 0.5), LossBegin, TrainingPhase))
    learner.epoch(TrainingPhase())
    assert_equals(learner, by_hand(preds_of=lambda preds: preds.clamp(-0.5, 0.5)))


def test_a_loss_replaced_at_backward_begin_is_the_one_whose_gradients_are_computed() -> None:
    learner = make_learner(replacing("loss", lambda loss: loss.sqrt(), BackwardBegin, TrainingPhase))
    learner.epoch(TrainingPhase())
    assert_equals(learner, by_hand(loss_of=lambda loss: loss.sqrt()))


@pytest.mark.parametrize("event", [BackwardEnd, UpdateBegin])
def test_gradients_replaced_before_the_update_are_the_ones_it_uses(event: type[Event]) -> None:
    def clip(learner: Any) -> None:
        for name, gradient in learner.step.grads.items():
            learner.step.grads[name] = gradient.clamp(-0.01, 0.01)

    learner = make_learner(CustomCallback(clip, event, TrainingPhase, reads=(), writes=("step.grads",)))
    learner.epoch(TrainingPhase())
    assert_equals(learner, by_hand(grad_of=lambda grad: grad.clamp(-0.01, 0.01)))


@pytest.mark.filterwarnings("ignore:.* got no gradient in a whole epoch")
def test_a_gradient_replaced_by_none_leaves_its_parameter_alone() -> None:
    def drop(learner: Any) -> None:
        learner.step.grads["0.weight"] = None

    learner = make_learner(CustomCallback(drop, BackwardEnd, TrainingPhase, reads=(), writes=("step.grads",)))
    learner.epoch(TrainingPhase())
    assert torch.equal(learner.model[0].weight, model()[0].weight)
    assert not torch.equal(learner.model[2].weight, model()[2].weight)


def test_the_step_stores_its_entries_by_the_event_that_announces_them() -> None:
    seen: list[tuple[str, list[str]]] = []

    def note(name: str) -> Callable[[Any], None]:
        return lambda learner: seen.append((name, sorted(learner.step)))

    events = [StepBegin, LossBegin, BackwardBegin, BackwardEnd, StepEnd]
    learner = make_learner(*(CustomCallback(note(e.__name__), e, name=e.__name__) for e in events))
    learner.epoch(TrainingPhase(), [next(iter(data()))])
    assert seen == [
        ("StepBegin", ["xs", "ys"]),
        ("LossBegin", ["preds", "xs", "ys"]),
        ("BackwardBegin", ["loss", "preds", "xs", "ys"]),
        ("BackwardEnd", ["grads", "loss", "preds", "xs", "ys"]),
        ("StepEnd", ["grads", "loss", "preds", "xs", "ys"]),
    ]


def test_the_entries_of_a_step_are_those_of_a_hand_written_one() -> None:
    learner = make_learner()
    state = TrainingPhase().step(learner, next(iter(data())))
    expected = model()
    xs, ys = next(iter(data()))
    preds = expected(xs)
    loss = mse(preds, ys)
    loss.backward()
    assert state is learner.step
    assert torch.equal(state.preds, preds)
    assert torch.equal(state.loss, loss)
    assert list(state.grads) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, parameter in expected.named_parameters():
        assert torch.equal(state.grads[name], parameter.grad)


@pytest.mark.parametrize("batch", [(0, 1), [0, 1]], ids=["tuple", "list"])
def test_a_batch_is_any_pair(batch: Any) -> None:
    xs, ys = next(iter(data()))
    learner = make_learner()
    learner.epoch(TrainingPhase(), [type(batch)((xs, ys))])
    assert torch.equal(learner.step.xs, xs)
    assert torch.equal(learner.step.ys, ys)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.layer(inputs["a"] + inputs["b"])


def test_inputs_may_be_nested() -> None:
    xs, ys = data().data
    batches = TensorBatches({"xs": xs}, batch_size=4)
    learner = Learner(TwoInputs(), mse, default_callbacks=False)
    pairs = [({"a": batch["xs"], "b": batch["xs"]}, ys[:4]) for batch in batches]
    learner.epoch(TrainingPhase(), pairs)
    assert learner.step.preds.shape == (4, 1)
    assert learner.batch_size == 4


# Validation


def test_a_validation_step_has_its_own_events_and_entries_and_no_gradients() -> None:
    recorder = EventRecorder()
    seen: list[tuple[bool, bool]] = []
    learner = make_learner(
        recorder,
        CustomCallback(lambda learner: seen.append((learner.model.training, torch.is_grad_enabled())), LossBegin),
    )
    before = bits(learner)
    learner.epoch(ValidationPhase(), [next(iter(data()))])
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    assert sorted(learner.step) == ["loss", "preds", "xs", "ys"]
    assert seen == [(False, False)]
    assert not learner.step.loss.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert all(p.grad is None for p in learner.model.parameters())


def test_a_validation_step_reads_again_what_callbacks_replace() -> None:
    xs, ys = next(iter(data()))
    learner = make_learner(
        replacing("xs", lambda xs: 3 * xs, StepBegin, ValidationPhase),
        replacing("preds", lambda preds: preds.tanh(), LossBegin, ValidationPhase),
        replacing("ys", lambda ys: ys.sign(), LossBegin, ValidationPhase),
    )
    learner.epoch(ValidationPhase(), [(xs, ys)])
    with torch.no_grad():
        expected = mse(model()(3 * xs).tanh(), ys.sign())
    assert torch.equal(learner.step.loss, expected)


def test_the_validation_loss_is_the_mean_over_the_rows() -> None:
    xs, ys = data().data
    learner = make_learner(Recorder(), Metrics(mae))
    learner.fit(1, data=(data(), TensorBatches(xs[:10], ys[:10], batch_size=4)))
    with torch.no_grad():
        preds = learner.model(xs[:10])
    assert learner.history["validation/loss"] == pytest.approx([mse(preds, ys[:10]).item()])
    assert learner.history["validation/mae"] == pytest.approx([(preds - ys[:10]).abs().mean().item()])


def test_a_validation_phase_only_watches() -> None:
    plain, validated = make_learner(), make_learner()
    plain.fit(3, phases=[TrainingPhase()])
    validated.fit(3)
    assert_same_bits(plain, validated)


# Prediction


class HasPredict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, xs: Tensor) -> Tensor:
        return self.layer(xs)

    def predict(self, xs: Tensor) -> Tensor:
        return self.layer(xs).argmax(dim=1)


@pytest.mark.parametrize(
    "batch", [lambda xs: xs, lambda xs: (xs,), lambda xs: [xs], lambda xs: (xs, None), lambda xs: (xs, 1, 2)]
)
def test_the_first_of_a_batch_is_what_the_model_gets(batch: Callable[[Tensor], Any]) -> None:
    xs = data().data[0][:4]
    learner = make_learner(loss_fn=None)
    learner.epoch(PredictionPhase(), [batch(xs)])
    with torch.no_grad():
        assert torch.equal(learner.step.preds, model()(xs))
    assert sorted(learner.step) == ["preds", "xs"]


def test_a_prediction_step_fires_step_begin_and_step_end_alone() -> None:
    recorder = EventRecorder()
    learner = make_learner(recorder)
    learner.epoch(PredictionPhase())
    assert recorder.events == ["EpochBegin", *["StepBegin", "StepEnd"] * 3, "EpochEnd"]
    assert not learner.step.preds.requires_grad


def test_a_models_own_predict_is_asked() -> None:
    xs = data().data[0]
    network = HasPredict()
    preds = Learner(network, default_callbacks=False).predict(xs)
    assert torch.equal(preds, network.predict(xs))
    assert preds.shape == (12,)


def test_inputs_replaced_at_step_begin_are_predicted() -> None:
    xs = data().data[0][:4]
    learner = make_learner(replacing("xs", lambda xs: 3 * xs, StepBegin, PredictionPhase))
    learner.epoch(PredictionPhase(), [xs])
    with torch.no_grad():
        assert torch.equal(learner.step.preds, model()(3 * xs))


# What cannot run


@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase])
@pytest.mark.parametrize(
    ("batch", "described"),
    [
        (torch.zeros(2, 3), "a Tensor of shape (2, 3)"),
        ((torch.zeros(2),), "a tuple of length 1"),
        ([torch.zeros(2)] * 3, "a list of length 3"),
        ({"xs": torch.zeros(2), "ys": torch.zeros(2)}, "a dict of length 2"),
        (None, "None"),
    ],
    ids=["tensor", "single", "triple", "dict", "none"],
)
def test_a_batch_that_does_not_unpack_says_what_it_is(phase: type[Phase], batch: Any, described: str) -> None:
    recorder = EventRecorder()
    learner = make_learner(recorder)
    before = bits(learner)
    with pytest.raises(BatchError) as raised:
        learner.epoch(phase(), [batch])
    message = str(raised.value)
    assert f"{phase.__name__} was given {described} as a batch; expected a pair (xs, ys)" in message
    assert "data=((xs, ys), (valid_xs, valid_ys))" in message
    assert recorder.events == ["EpochBegin"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


@pytest.mark.parametrize("phases", [[TrainingPhase()], [ValidationPhase()]], ids=["training", "validation"])
def test_a_missing_loss_is_reported_before_anything_begins(phases: list[Phase]) -> None:
    recorder = EventRecorder()
    learner = make_learner(recorder, loss_fn=None)
    with pytest.raises(LossError, match=f"{type(phases[0]).__name__} needs a loss function") as raised:
        learner.fit(1, phases=phases)
    assert "Learner(model, torch.nn.functional.cross_entropy, ...)" in str(raised.value)
    assert recorder.events == []


def test_a_missing_loss_does_not_keep_a_learner_from_predicting() -> None:
    assert make_learner(loss_fn=None).predict(data()).shape == (12, 1)


class Pair(NamedTuple):
    generator: nn.Module
    critic: nn.Module


@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase, PredictionPhase])
@pytest.mark.parametrize(
    ("models", "names"),
    [
        ({"G": 0, "D": 0}, "['D', 'G']"),
        ((0, 0), "['0', '1']"),
        (Pair(0, 0), "['critic', 'generator']"),
    ],
    ids=["mapping", "tuple", "named tuple"],
)
def test_several_models_are_refused_with_their_names_before_anything_begins(
    phase: type[Phase], models: Any, names: str
) -> None:
    recorder = EventRecorder()
    if isinstance(models, dict):
        modules: Any = {name: model() for name in models}
    else:
        modules = Pair(model(), model()) if isinstance(models, Pair) else (model(), model())
    learner = Learner(modules, mse, data=(data(), data()), callbacks=[recorder], default_callbacks=False)
    with pytest.raises(PhaseError, match="runs one model, and the learner has") as raised:
        learner.fit(1, phases=[phase()])
    assert names in str(raised.value)
    assert "write a phase" in str(raised.value)
    assert recorder.events == []


def test_a_step_of_ones_own_needs_neither_a_loss_function_nor_a_single_model() -> None:
    class Own(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch[0]) as (_, state), learner.optimizing("G") as block:
                block.loss = learner.model.G(state.xs).square().mean()

    learner = Learner({"G": model(), "D": model()}, data=(data(),), callbacks=[Recorder()], default_callbacks=False)
    learner.fit(1, phases=[Own()])
    assert learner.history[Own].updates == {"G": 3}


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (partial(mse, reduction="none"), r"the loss has shape \(4, 1\); expected a scalar.*reduction='mean'"),
        (lambda preds, ys: 0.5, r"the loss is 0.5; expected a tensor"),
        (lambda preds, ys: preds.detach().mean(), r"no gradient can be computed from the loss.*detached"),
        (lambda preds, ys: None, r"the loss is None; expected a tensor"),
    ],
    ids=["not scalar", "no tensor", "detached", "none"],
)
def test_a_loss_without_a_gradient_is_refused_and_changes_nothing(loss_fn: Any, words: str) -> None:
    learner = make_learner(loss_fn=loss_fn)
    before = bits(learner)
    with pytest.raises(LossError, match=words):
        learner.fit(1, phases=[TrainingPhase()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


def test_a_loss_with_one_element_is_a_scalar() -> None:
    one = make_learner(loss_fn=lambda preds, ys: mse(preds, ys).reshape(1))
    plain = make_learner()
    for learner in (one, plain):
        learner.epoch(TrainingPhase())
    assert_same_bits(one, plain)


def test_a_step_can_be_run_without_an_epoch() -> None:
    recorder = EventRecorder()
    learner = make_learner(recorder)
    before = bits(learner)
    TrainingPhase().step(learner, next(iter(data())))
    assert recorder.events == TRAINING
    assert any(not torch.equal(tensor, before[name]) for name, tensor in bits(learner).items() if name in before)


def test_the_toy_learner_learns_its_coefficient() -> None:
    learner = toy_learner()
    learner.fit(5)
    assert isinstance(learner.model, Coefficient)
    assert learner.model.value.item() == pytest.approx(3, abs=0.1)


def test_a_metric_of_one_phase_is_computed_in_it_alone() -> None:
    learner = make_learner(Recorder(), Metrics(Metric(mae, phase=ValidationPhase)))
    learner.fit(1)
    assert list(learner.history.metrics[ValidationPhase]) == ["loss", "mae"]
    assert list(learner.history.metrics[TrainingPhase]) == ["loss"]
