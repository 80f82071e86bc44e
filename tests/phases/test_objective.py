from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fluxloop import (
    EMA,
    Accelerator,
    BackwardBegin,
    BatchError,
    CancelStepException,
    CustomCallback,
    Event,
    Learner,
    LossBegin,
    LossError,
    Metrics,
    ObjectivePhase,
    ObjectiveValidationPhase,
    PhaseError,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    UpdateEnd,
    on,
    stream_seed,
)
from fluxloop.phases.objective import may_have, require_parts
from fluxloop.testing import EventRecorder, assert_observer, assert_same_bits

SEED = 3
ADAM = partial(torch.optim.Adam, lr=0.05, fused=False)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STEP = ["StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd"]


class Denoising(ObjectivePhase):
    def forward(self, learner: Any, state: Any) -> None:
        state.preds = learner.model(state.xs + 0.1 * torch.randn_like(state.xs))

    def loss(self, learner: Any, state: Any) -> Tensor:
        return mse_loss(state.preds, state.xs)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.decoder = nn.Linear(8, 5)

    def forward(self, xs: Tensor) -> Tensor:
        return self.decoder(self.encoder(xs))


def rows() -> Tensor:
    return torch.randn(20, 5, generator=torch.Generator().manual_seed(0))


def batches() -> TensorBatches:
    return TensorBatches(rows(), batch_size=4)


def make_learner(*callbacks: Any, model: Any = None, **options: Any) -> Learner:
    given = {"data": (batches(), batches()), "optimizer": ADAM, "default_callbacks": False, "seed": SEED, **options}
    return Learner(
        Autoencoder() if model is None else model, callbacks=callbacks, accelerator=Accelerator("cpu"), **given
    )


def losses_of(losses: list[Tensor], phase: Any = ObjectivePhase) -> CustomCallback:
    return CustomCallback(lambda learner: losses.append(learner.step.loss.detach()), StepEnd, phase)


def train_by_hand(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 5) -> list[Tensor]:
    losses = []
    for step, xs in enumerate(rows().split(4)[:steps]):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        loss = mse_loss(model(xs + 0.1 * torch.randn_like(xs)), xs)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    wanted = expected.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert not [name for name, tensor in found.state_dict().items() if not torch.equal(tensor, wanted[name])]


# A phase of five lines


@pytest.mark.parametrize("make", [ADAM, SGD], ids=["adam", "sgd"])
def test_a_phase_of_five_lines_equals_a_hand_written_loop(make: Any) -> None:
    expected = Autoencoder()
    by_hand = train_by_hand(expected, [make(expected.parameters())])
    losses: list[Tensor] = []
    learner = make_learner(losses_of(losses), optimizer=make)
    learner.fit(1, phases=[Denoising()])
    assert len(losses) == 5
    assert all(map(torch.equal, losses, by_hand))
    assert_equal(learner.model, expected)


def test_several_optimizers_step_in_order_on_the_gradients_of_one_backward() -> None:
    expected = Autoencoder()
    by_hand = train_by_hand(expected, [ADAM(expected.encoder.parameters()), SGD(expected.decoder.parameters())])
    losses: list[Tensor] = []
    updated: list[str] = []
    recorder = EventRecorder()

    class Names(UnsafeCallback):
        @on(UpdateBegin)
        def note(self, event: Any, phase: Any, learner: Any) -> None:
            updated.append(event.name)

    both = {"encoder": ADAM, "decoder": SGD}
    learner = make_learner(losses_of(losses), Names(), recorder, Recorder(), optimizer=both)
    learner.fit(1, phases=[Denoising()])
    assert all(map(torch.equal, losses, by_hand))
    assert_equal(learner.model, expected)
    assert updated == ["encoder", "decoder"] * 5
    assert recorder.events.count("BackwardBegin") == 5
    assert learner.history[Denoising].updates == {"encoder": 5, "decoder": 5}


def test_the_events_of_a_step_are_those_of_supervised_training() -> None:
    recorder = EventRecorder()
    make_learner(recorder).epoch(Denoising())
    assert recorder.events == ["EpochBegin", *STEP * 5, "EpochEnd"]
    assert {phase for _, phase in recorder.trace} == {"Denoising"}


def test_each_event_finds_the_entries_stored_by_then() -> None:
    seen: dict[str, list[str]] = {}

    class Notes(UnsafeCallback):
        @on(Event, ObjectivePhase)
        def note(self, event: Event, phase: Any, learner: Any) -> None:
            seen[type(event).__name__] = list(learner.step)

    class Counting(Denoising):
        def finish(self, learner: Any, state: Any) -> None:
            state.kept = state.preds.detach()

    make_learner(Notes()).epoch(Counting())
    assert seen["StepBegin"] == ["xs"]
    assert seen["LossBegin"] == ["xs", "preds"]
    assert seen["BackwardBegin"] == ["xs", "preds", "loss"]
    assert seen["BackwardEnd"] == seen["UpdateBegin"] == seen["UpdateEnd"] == ["xs", "preds", "loss", "grads"]
    assert seen["StepEnd"] == ["xs", "preds", "loss", "grads", "kept"]


@pytest.mark.parametrize(
    ("event", "entry", "new"),
    [
        (StepBegin, "xs", lambda xs: 2 * xs),
        (LossBegin, "preds", lambda preds: preds.clamp(-0.5, 0.5)),
        (BackwardBegin, "loss", lambda loss: 3 * loss),
    ],
)
def test_what_a_callback_puts_in_the_place_of_an_entry_is_used_next(event: type[Event], entry: str, new: Any) -> None:
    def replace(learner: Any) -> None:
        setattr(learner.step, entry, new(learner.step[entry]))

    change = CustomCallback(replace, event, reads=(), writes=(f"step.{entry}",))
    learner = make_learner(change, optimizer=SGD)
    learner.epoch(Denoising())
    expected = Autoencoder()
    optimizer = SGD(expected.parameters())
    stages = {"xs": lambda x: x, "preds": lambda x: x, "loss": lambda x: x, entry: new}
    for step, xs in enumerate(rows().split(4)):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        xs = stages["xs"](xs)
        preds = stages["preds"](expected(xs + 0.1 * torch.randn_like(xs)))
        optimizer.zero_grad()
        stages["loss"](mse_loss(preds, xs)).backward()
        optimizer.step()
    assert_equal(learner.model, expected)


def test_a_step_returns_its_state() -> None:
    learner = make_learner()
    state = Denoising().step(learner, rows()[:4])
    assert state is learner.step
    assert state.preds.shape == (4, 5)


# Batches


@pytest.mark.parametrize(
    ("batch", "entries"),
    [
        (rows()[:4], {"xs": (4, 5)}),
        ((rows()[:4],), {"xs": (4, 5)}),
        ([rows()[:4]], {"xs": (4, 5)}),
        ((rows()[:4], torch.arange(4)), {"xs": (4, 5), "ys": (4,)}),
        ([rows()[:4], torch.arange(4)], {"xs": (4, 5), "ys": (4,)}),
    ],
    ids=["tensor", "tuple of one", "list of one", "pair", "list of two"],
)
def test_a_batch_is_the_inputs_or_a_pair_with_labels(batch: Any, entries: dict[str, Any]) -> None:
    learner = make_learner()
    learner.epoch(Denoising(), [batch])
    given = {name: tuple(learner.step[name].shape) for name in ("xs", "ys") if name in learner.step}
    assert given == entries


@pytest.mark.parametrize("batch", [(rows()[:4],) * 3, [rows()[:4]] * 4, ()])
def test_a_batch_of_more_items_is_refused_with_what_to_do(batch: Any) -> None:
    words = rf"a batch of {len(batch)} items was given .*; expected xs, \(xs,\) or \(xs, ys\).*entries\(batch\)"
    with pytest.raises(BatchError, match=words):
        make_learner().epoch(Denoising(), [batch])


def test_a_phase_may_say_other_entries() -> None:
    class Columns(Denoising):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"xs": batch["x"], "weight": batch["w"]}

        def loss(self, learner: Any, state: Any) -> Tensor:
            return (state.weight * (state.preds - state.xs).pow(2).mean(1)).mean()

    learner = make_learner()
    learner.fit(1, [{"x": rows()[:4], "w": torch.ones(4)}], phases=[Columns()])
    assert sorted(learner.step) == ["grads", "loss", "preds", "weight", "xs"]


# What is wrong


def test_a_phase_without_a_loss_says_what_to_write() -> None:
    class Silent(ObjectivePhase):
        pass

    with pytest.raises(PhaseError, match=r"Silent says no loss; write one:\n    def loss\(self, learner, state\):"):
        make_learner().epoch(Silent())


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    class PerRow(Denoising):
        def loss(self, learner: Any, state: Any) -> Tensor:
            return (state.preds - state.xs).pow(2).mean(1)

    with pytest.raises(LossError, match=r"the loss has shape \(4,\); expected a scalar"):
        make_learner().epoch(PerRow())


def test_what_a_phase_requires_is_asked_before_anything_runs() -> None:
    class Picky(Denoising):
        def require(self, learner: Any) -> None:
            raise PhaseError("no good")

    recorder = EventRecorder()
    learner = make_learner(recorder)
    picky = Picky()
    for run in (
        lambda: learner.fit(1, phases=[picky]),
        lambda: learner.epoch(picky),
        lambda: learner.fit(1, phases=[Denoising(), ObjectiveValidationPhase(picky)]),
        lambda: learner.evaluate(phase=ObjectiveValidationPhase(picky)),
    ):
        with pytest.raises(PhaseError, match="no good"):
            run()
    assert recorder.trace == []


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(1, 1), nn.Linear(1, 1)


def test_parts_are_models_of_the_learner_or_attributes_of_the_only_one() -> None:
    phase = Denoising()
    require_parts(phase, Pair(), "left", "right")
    require_parts(phase, make_learner(model={"left": nn.Linear(1, 1), "right": nn.Linear(1, 1)}).model, "left")
    words = (
        r"Denoising calls learner.model.middle, and the models are \['left', 'right'\]; expected left, middle: "
        r"Learner\(\{'left': ..., 'middle': ...\}\), or one module with these attributes"
    )
    with pytest.raises(PhaseError, match=words):
        require_parts(phase, Pair(), "left", "middle")
    with pytest.raises(PhaseError, match=r"calls learner.model.left, and the models are none"):
        require_parts(phase, nn.Linear(1, 1), "left")


# After the update


class Following(Denoising):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def loss(self, learner: Any, state: Any) -> Tensor:
        self.calls.append("loss")
        return super().loss(learner, state)

    def finish(self, learner: Any, state: Any) -> None:
        self.calls.append("finish")


def test_finish_follows_the_update_and_comes_before_the_end_of_the_step() -> None:
    phase = Following()
    notes = [
        CustomCallback(lambda learner, event=event: phase.calls.append(event.__name__), event, name=event.__name__)
        for event in (UpdateEnd, StepEnd)
    ]
    make_learner(*notes).epoch(phase, [rows()[:4]])
    assert phase.calls == ["loss", "UpdateEnd", "finish", "StepEnd"]


def test_finish_is_left_out_of_validation_and_of_a_cancelled_step() -> None:
    phase = Following()
    make_learner().epoch(ObjectiveValidationPhase(phase))
    assert phase.calls == ["loss"] * 5

    def cancel(learner: Any) -> None:
        raise CancelStepException

    make_learner(CustomCallback(cancel, BackwardBegin)).epoch(phase)
    assert phase.calls == ["loss"] * 10


# The validation twin


def test_the_twin_computes_the_loss_of_the_models_in_eval_mode() -> None:
    phase = Denoising()
    recorder, losses = EventRecorder(), []
    learner = make_learner(recorder, losses_of(losses, ObjectiveValidationPhase))
    learner.epoch(ObjectiveValidationPhase(phase))
    expected, by_hand = Autoencoder().eval(), []
    for step, xs in enumerate(rows().split(4)):
        torch.manual_seed(stream_seed(SEED, "validation/ObjectiveValidationPhase/step", step))
        with torch.no_grad():
            by_hand.append(mse_loss(expected(xs + 0.1 * torch.randn_like(xs)), xs))
    assert all(map(torch.equal, losses, by_hand))
    assert len(losses) == 5
    assert recorder.events == ["EpochBegin", *["StepBegin", "LossBegin", "StepEnd"] * 5, "EpochEnd"]
    assert not learner.step.loss.requires_grad
    assert "grads" not in learner.step


def test_the_twin_changes_no_weights_and_no_random_numbers() -> None:
    def make() -> Learner:
        return make_learner(
            data={"training": batches(), "validation": TensorBatches(rows(), batch_size=3, shuffle=True)}
        )

    alone, watched = make(), make()
    alone.fit(3, phases=[Denoising()])
    phase = Denoising()
    watched.fit(3, phases=[phase, ObjectiveValidationPhase(phase)])
    assert_same_bits(alone, watched)


def test_the_twin_is_an_observer_of_any_training() -> None:
    def make() -> Learner:
        data = TensorBatches(rows(), rows(), batch_size=4)
        options = {"data": (data, data), "optimizer": ADAM, "default_callbacks": False, "seed": SEED}
        return Learner(Autoencoder(), mse_loss, accelerator=Accelerator("cpu"), **options)

    assert_observer(ObjectiveValidationPhase(Denoising()), make)


def test_the_twin_works_in_evaluate() -> None:
    learner = make_learner(Recorder(), Metrics())
    learner.fit(1, phases=[Denoising()])
    modes = [module.training for module in learner.model.modules()]
    found = learner.evaluate(rows(), phase=ObjectiveValidationPhase(Denoising()))
    assert set(found) == {"loss"}
    again = learner.evaluate(rows(), phase=ObjectiveValidationPhase(Denoising()))
    assert found == again  # evaluation draws the same numbers each time
    assert [module.training for module in learner.model.modules()] == modes


def test_the_losses_of_both_are_in_the_history() -> None:
    losses: list[Tensor] = []
    valid: list[Tensor] = []
    callbacks = [losses_of(losses, Denoising), losses_of(valid, ObjectiveValidationPhase)]
    learner = Learner(
        Autoencoder(), data=(batches(), batches()), optimizer=ADAM, callbacks=callbacks, accelerator=Accelerator("cpu")
    )
    phase = Denoising()
    history = learner.fit(2, phases=[phase, ObjectiveValidationPhase(phase)])
    for series, each in (("training/loss", losses), ("validation/loss", valid)):
        expected = [torch.stack(each[:5]).mean().item(), torch.stack(each[5:]).mean().item()]
        assert history[series] == pytest.approx(expected)


def test_a_twin_may_run_the_averaged_weights() -> None:
    class Averaged(ObjectiveValidationPhase):
        model_view = "ema"

    class Clean(ObjectivePhase):
        def forward(self, learner: Any, state: Any) -> None:
            state.preds = learner.model(state.xs)

        def loss(self, learner: Any, state: Any) -> Tensor:
            return mse_loss(state.preds, state.xs)

    losses: list[Tensor] = []
    learner = make_learner(EMA("model", 0.5), losses_of(losses, Averaged))
    phase = Clean()
    learner.fit(1, phases=[phase, Averaged(phase)])
    average = learner.weights["model@ema"].eval()
    with torch.no_grad():
        expected = [mse_loss(average(xs), xs) for xs in rows().split(4)]
        live = mse_loss(learner.model.eval()(rows()[:4]), rows()[:4])
    assert all(map(torch.equal, losses, expected))
    assert not torch.equal(losses[0], live)


@pytest.mark.parametrize("given", [Denoising, TrainingPhase(), None])
def test_a_twin_of_something_else_is_refused(given: Any) -> None:
    words = (
        r"ObjectiveValidationPhase was given .*; expected an instance of the training phase, .*ObjectivePhase: "
        r"ObjectiveValidationPhase\(MyPhase\(\)\)"
    )
    with pytest.raises(PhaseError, match=words):
        ObjectiveValidationPhase(given)


def test_a_twin_shows_whose_it_is() -> None:
    assert repr(ObjectiveValidationPhase(Denoising())) == "ObjectiveValidationPhase(Denoising())"


def test_a_training_phase_is_refused_by_evaluate() -> None:
    with pytest.raises(PhaseError, match=r"Denoising\(\) was given to evaluate or predict, and it trains"):
        make_learner().evaluate(rows(), phase=Denoising())


class InClass(nn.Module):
    part = 1


class AsProperty(nn.Module):
    @property
    def part(self) -> int:
        return 1


class OnDemand(nn.Module):
    def __getattr__(self, name: str) -> Any:
        return 1 if name == "part" else super().__getattr__(name)


class OnEveryDemand(nn.Module):
    def __getattribute__(self, name: str) -> Any:
        return 1 if name == "part" else super().__getattribute__(name)


class InInstance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = 1


class AsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.ones(1))


class AsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("part", torch.ones(1))


class AsModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()


@pytest.mark.parametrize(
    "make",
    [InClass, AsProperty, OnDemand, OnEveryDemand, InInstance, AsParameter, AsBuffer, AsModule, nn.Identity, object],
)
def test_a_model_that_surely_lacks_a_part_is_one_that_has_none(make: Any) -> None:
    model = make()
    has = make not in (nn.Identity, object)
    assert hasattr(model, "part") == has
    assert may_have(model, "part") or not has
    assert may_have(model, "part") != (make is nn.Identity)  # others are asked
    if isinstance(model, nn.Module):
        assert may_have(torch.compile(model, backend="eager"), "part")
