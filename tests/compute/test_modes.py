"""Train and eval mode of modules, and of optimizers whose weights differ between the two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fluxloop import (
    EMA,
    Accelerator,
    Callback,
    CancelStepException,
    CustomCallback,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    GANPhase,
    KeepBestModel,
    KNNProbe,
    Learner,
    Metrics,
    Phase,
    PredictionPhase,
    Recorder,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    find_lr,
    on,
    runepoch,
    runstep,
)
from fluxloop.compute.modes import is_held_in_eval, watching
from fluxloop.testing import assert_observer, assert_resumes_exactly, assert_same_bits, bits

EPOCHS = 3


class ScheduleFree(torch.optim.Optimizer):
    """SGD whose gradients are computed beside the average that is evaluated (Defazio et al., 2024)."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def train(self) -> None:
        self._turn(True, lambda beta: 1 - beta)

    @torch.no_grad()
    def eval(self) -> None:
        self._turn(False, lambda beta: 1 - 1 / beta)

    def _turn(self, train: bool, weight: Callable[[float], float]) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight(group["beta"]))
                group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call train() before step()")
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "z" not in state:
                    state["z"] = parameter.clone()
                parameter.lerp_(state["z"], 1 / group["k"])
                parameter.sub_(parameter.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - 1 / group["k"])))
                state["z"].sub_(parameter.grad, alpha=group["lr"])


class Swapping(torch.optim.SGD):
    """Keeps an average, and swaps it with the weights in eval mode; says its mode under a name of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.param_groups[0]["averaged"] = False

    @torch.no_grad()
    def _swap(self, averaged: bool) -> None:
        for state, parameter in [(self.state[p], p) for group in self.param_groups for p in group["params"]]:
            if "average" in state and self.param_groups[0]["averaged"] is not averaged:
                kept = parameter.clone()
                parameter.copy_(state["average"])
                state["average"].copy_(kept)
        self.param_groups[0]["averaged"] = averaged

    def train(self) -> None:
        self._swap(False)

    def eval(self) -> None:
        self._swap(True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's returns the closure's loss
        if self.param_groups[0]["averaged"]:
            raise RuntimeError("call train() before step()")
        super().step()
        for parameter in [p for group in self.param_groups for p in group["params"]]:
            self.state[parameter].setdefault("average", parameter.detach().clone()).lerp_(parameter, 0.1)


KINDS = [ScheduleFree, Swapping]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def rows() -> tuple[Tensor, Tensor]:
    xs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    return xs, xs.sum(1, keepdim=True)


def batches(shuffle: bool = False) -> TensorBatches:
    return TensorBatches(*rows(), batch_size=5, shuffle=shuffle)


def labelled() -> tuple[Tensor, Tensor]:
    xs, ys = rows()
    return xs, (ys[:, 0] > 0).long()


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def learner_of(*callbacks: Callback, kind: Any = ScheduleFree, model: Any = None, **options: Any) -> Learner[Any]:
    return Learner(
        net() if model is None else model,
        mse_loss,
        callbacks=[Recorder(), Metrics(), *callbacks],
        seed=4,
        accelerator=Accelerator("cpu"),
        **{
            "data": (batches(), batches()),
            "optimizer": partial(kind, lr=0.05),
            "default_callbacks": False,
            **options,
        },
    )


def by_hand(kind: Any, epochs: int = EPOCHS) -> Iterator[tuple[nn.Module, float]]:
    """Train in plain PyTorch; give the model in eval mode, and its loss, after each epoch."""
    model = net()
    optimizer = kind(model.parameters(), lr=0.05)
    for _ in range(epochs):
        optimizer.train()
        for xs, ys in batches():
            optimizer.zero_grad()
            mse_loss(model(xs), ys).backward()
            optimizer.step()
        optimizer.eval()
        with torch.no_grad():
            yield model, torch.stack([mse_loss(model(xs), ys) for xs, ys in batches()]).mean().item()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def is_train(optimizer: Any) -> bool:
    group = optimizer.param_groups[0]
    return bool(group["train_mode"] if "train_mode" in group else not group["averaged"])


# Optimizers


@pytest.mark.slow(quick=1)
@each_kind
@pytest.mark.parametrize("validated", [True, False])
def test_an_optimizer_with_modes_trains_as_in_a_hand_written_loop_to_the_bit(kind: Any, validated: bool) -> None:
    learner = learner_of(kind=kind)
    learner.fit(EPOCHS, phases=[TrainingPhase(), ValidationPhase()] if validated else [TrainingPhase()])
    *_, (model, loss) = by_hand(kind)
    assert same(learner.model, model)
    assert learner.evaluate()["loss"] == pytest.approx(loss, rel=1e-6)
    if validated:
        assert learner.history["validation/loss"] == pytest.approx([loss for _, loss in by_hand(kind)], rel=1e-6)
    assert not is_train(learner.optimizer)


@each_kind
def test_whatever_evaluates_in_the_middle_of_an_epoch_sees_the_weights_of_eval_mode_and_leaves_no_trace(
    kind: Any,
) -> None:
    found: list[Any] = []

    class Look(UnsafeCallback):
        @on(StepEnd, TrainingPhase)
        def look(self, event: Event, phase: Phase, learner: Any) -> None:
            before = bits(learner)
            inside = copy.deepcopy(learner.model), copy.deepcopy(learner.optimizer)
            own = kind(inside[0].parameters(), lr=0.05)
            own.load_state_dict(inside[1].state_dict())
            own.eval()
            xs, ys = rows()
            expected = mse_loss(inside[0](xs), ys).item()
            with watching(learner.model):
                found.append((mse_loss(learner.model(xs), ys).item(), expected))
            found.append((learner.evaluate([(xs, ys)])["loss"], expected))
            found.append((mse_loss(learner.predict(xs), ys).item(), expected))
            learner.epoch(ValidationPhase(), [(xs, ys)])
            found.append((learner.history["validation/loss"][-1], expected))
            with runstep(learner, ValidationPhase(), xs=xs, ys=ys) as (_, state):
                found.append((mse_loss(learner.model(state.xs), state.ys).item(), expected))
            assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items() if name in before)
            assert is_train(learner.optimizer)

    learner, plain = learner_of(Look(), kind=kind), learner_of(kind=kind)
    learner.fit(1, phases=[TrainingPhase()])
    plain.fit(1, phases=[TrainingPhase()])
    assert same(learner.model, plain.model)
    assert [value for value, _ in found] == pytest.approx([expected for _, expected in found], rel=1e-6)


@each_kind
def test_a_probe_measures_the_weights_of_eval_mode_and_training_goes_on_as_without_it(kind: Any) -> None:
    seen: list[list[Tensor]] = []

    def features(module: nn.Module, xs: Tensor) -> Tensor:
        seen.append(weights(module))
        out: Tensor = module(xs)
        return out

    probe = KNNProbe("model", bank=labelled(), queries=labelled(), features=features)
    learner = learner_of(probe, kind=kind)
    learner.fit(EPOCHS)
    ends = [weights(model) for model, _ in by_hand(kind)]
    assert all(map(torch.equal, seen[0], ends[0]))
    assert all(map(torch.equal, seen[-1], ends[-1]))
    assert same(learner.model, list(by_hand(kind))[-1][0])
    assert_observer(KNNProbe("model", bank=labelled(), queries=labelled()), lambda *more: learner_of(*more, kind=kind))


@pytest.mark.slow
@each_kind
def test_a_run_with_such_an_optimizer_is_resumed_anywhere_to_the_bit(kind: Any) -> None:
    def make() -> Learner[Any]:
        data = (batches(shuffle=True), batches())
        probe = KNNProbe("model", bank=labelled(), queries=labelled())
        return learner_of(EMA("model", 0.9), KeepBestModel(), probe, kind=kind, data=data)

    assert_resumes_exactly(make, epochs=EPOCHS, at=[1, 5, 9])


@pytest.mark.slow(quick=1)
@each_kind
def test_a_file_of_the_middle_of_an_epoch_goes_on_where_it_was_written_also_after_an_evaluation(
    kind: Any, tmp_path: Path
) -> None:
    class Save(UnsafeCallback):
        transient = ("steps",)
        steps = 0

        @on(StepEnd, TrainingPhase)
        def save(self, event: Event, phase: Phase, learner: Any) -> None:
            self.steps += 1
            if self.steps == 6:
                learner.at_safe_point(lambda: (tmp_path / "it").exists() or learner.save(tmp_path / "it"))

    learner = learner_of(Save(), kind=kind)
    learner.fit(2)
    end = weights(learner.model)
    for other in (learner_of(kind=kind), learner):
        other.load(tmp_path / "it")
        before = bits(other)
        assert is_train(other.optimizer)
        other.evaluate()
        assert all(torch.equal(before[name], tensor) for name, tensor in bits(other).items())
    again = learner_of(kind=kind)
    again.fit(2, resume=tmp_path / "it")
    assert all(map(torch.equal, weights(again.model), end))


@each_kind
def test_the_best_weights_are_those_that_were_evaluated_and_a_second_fit_goes_on_from_them(kind: Any) -> None:
    class Scored(ValidationPhase):
        def step(self, learner: Learner[Any], batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                state.loss = torch.tensor([2.0, 1.0, 3.0, 0.5][learner.history[Scored].epochs])

    learner = learner_of(KeepBestModel(), kind=kind)
    learner.fit(3, phases=[TrainingPhase(), Scored()])
    expected = list(by_hand(kind, 2))[-1][0]
    assert same(learner.model, expected)
    learner.fit(1, phases=[TrainingPhase(), Scored()])
    assert same(learner.model, list(by_hand(kind, 3))[-1][0])  # as if the third epoch had not been


@each_kind
def test_a_training_metric_keeps_the_weights_that_would_be_evaluated(kind: Any) -> None:
    learner = learner_of(KeepBestModel("training/loss", "max"), kind=kind)
    learner.fit(EPOCHS, phases=[TrainingPhase()])
    assert same(learner.model, list(by_hand(kind, 1))[-1][0])


@each_kind
def test_an_optimizer_begins_anew_with_weights_that_are_loaded(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(8)
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    trained, fresh = learner_of(kind=kind), learner_of(kind=kind)
    trained.fit(2, phases=[TrainingPhase()])
    for learner in (trained, fresh):
        learner.load_weights(tmp_path / "weights.pt")
        assert same(learner.model, other)
        learner.fit(2, phases=[TrainingPhase()])
    assert same(trained.model, fresh.model)


@each_kind
def test_a_rate_finder_and_a_check_work_and_leave_no_trace(kind: Any) -> None:
    learner = learner_of(kind=kind)
    learner.fit(1)
    before, mode = bits(learner), is_train(learner.optimizer)
    assert len(find_lr(learner, start=1e-4, end=1e-2, steps=6).losses) == 6
    assert learner.check(phases=[TrainingPhase()]) == []
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())
    assert is_train(learner.optimizer) is mode
    learner.fit(2)
    assert same(learner.model, list(by_hand(kind))[-1][0])


@each_kind
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_however_an_epoch_ends_the_optimizer_is_in_eval_mode_after_it(kind: Any, error: BaseException) -> None:
    def leave(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].steps == 2:
            raise error

    learner = learner_of(CustomCallback(leave, StepEnd, TrainingPhase, reads=("cbstate.history",)), kind=kind)
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            learner.fit(1)
    else:
        learner.fit(1)
    assert not is_train(learner.optimizer)


def test_an_optimizer_that_has_taken_no_step_is_not_asked_for_its_weights() -> None:
    class Fragile(ScheduleFree):
        def eval(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["z"]  # there after the first step
            super().eval()

    def cancel(learner: Any) -> None:
        raise CancelStepException

    learner = learner_of(CustomCallback(cancel, StepEnd, TrainingPhase, reads=()), kind=Fragile)
    learner.evaluate()
    with runepoch(learner, TrainingPhase()):
        learner.evaluate()
    learner.fit(1)
    assert same(learner.model, list(by_hand(ScheduleFree, 1))[-1][0])


def test_dropout_while_predicting_does_not_have_the_weights_of_training() -> None:
    class MonteCarlo(PredictionPhase):
        train_mode = True

    learner = learner_of()
    learner.fit(2)
    model = list(by_hand(ScheduleFree, 2))[-1][0]
    assert torch.equal(learner.predict(rows()[0], phase=MonteCarlo()), model(rows()[0]).detach())


def test_of_several_optimizers_those_with_modes_are_switched() -> None:
    models = {"generator": nn.Linear(2, 3), "critic": nn.Linear(3, 1)}
    optimizers = {"generator": ScheduleFree, "critic": torch.optim.Adam}
    modes: list[bool] = []
    look = CustomCallback(
        lambda learner: modes.append(is_train(learner.optimizer.generator)), StepEnd, reads=("optimizer",)
    )
    learner = learner_of(look, model=models, optimizer=optimizers, data=(list(torch.split(rows()[0], 5)),))
    learner.fit(2, phases=[GANPhase(noise=2)])
    assert modes == [True] * 8
    assert not is_train(learner.optimizer.generator)
    assert learner.optimizer.generator.param_groups[0]["k"] == 8


def test_an_average_of_the_weights_of_training_goes_beside_such_an_optimizer() -> None:
    seen: list[Tensor] = []
    look = CustomCallback(
        lambda learner: seen.append(learner.model[0].weight.detach().clone()), StepEnd, TrainingPhase, reads=("model",)
    )
    learner = learner_of(EMA("model", 0.5), look)
    learner.fit(2)
    average = net()[0].weight.detach()
    for live in seen:
        average = torch.lerp(average, live, 0.5)
    assert torch.equal(learner.weights["model@ema"][0].weight, average)


@each_kind
def test_a_copied_learner_trains_to_the_same_bits(kind: Any) -> None:
    learner = learner_of(kind=kind)
    learner.fit(1)
    copied = copy.deepcopy(learner)
    for each in (copied, learner):
        each.fit(2)
    assert_same_bits(copied, learner)
    assert same(learner.model, list(by_hand(kind))[-1][0])


# Models


class Modes(Callback):
    """Notes the modes of the models, by name, at the first step of each phase."""

    reads = ("model",)

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    @on(StepEnd)
    def look(self, event: Event, phase: Phase, learner: Any) -> None:
        self.seen[type(phase).__name__] = [model.training for model in learner.model]


class Both(TrainingPhase):
    """Trains the second of two models on what the first makes."""

    def check(self, learner: Learner[Any]) -> None: ...

    def step(self, learner: Learner[Any], batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.preds = learner.model.head(learner.model.body(state.xs))
            learner.backward(mse_loss(state.preds, state.ys))
            learner.update()


def body(frozen: bool = True, train: bool = False) -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    return made.requires_grad_(not frozen).train(train)


@pytest.mark.parametrize(
    ("frozen", "train", "expected"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_a_frozen_model_that_was_put_into_eval_mode_stays_in_it(frozen: bool, train: bool, expected: bool) -> None:
    modes = Modes()
    learner = learner_of(modes, model={"body": body(frozen, train), "head": nn.Linear(4, 1)}, optimizer=torch.optim.SGD)
    learner.fit(2, phases=[Both()])
    assert modes.seen == {"Both": [expected, True]}
    norm = learner.model.body[1]
    assert torch.equal(norm.running_mean, torch.zeros(4)) is not expected
    assert [model.training for model in learner.models.values()] == [train, True]


def test_a_frozen_network_inside_of_a_loss_function_stays_in_eval_mode() -> None:
    class Perceptual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
            self.eval().requires_grad_(False)

        def forward(self, preds: Tensor, ys: Tensor) -> Tensor:
            return mse_loss(self.features(preds), self.features(ys))

    loss = Perceptual()
    learner = Learner(net(), loss, data=(batches(),), seed=0, default_callbacks=False)
    learner.fit(1)
    assert not any(module.training for module in loss.modules())
    assert torch.equal(loss.features[1].running_mean, torch.zeros(4))


def test_a_model_that_is_unfrozen_while_training_is_in_train_mode_from_the_next_epoch_on() -> None:
    seen: list[bool] = []

    class Unfreezing(UnsafeCallback):
        @on(EpochBegin, TrainingPhase)
        def look(self, event: Event, phase: Phase, learner: Any) -> None:
            seen.append(learner.model.body.training)

        @on(EpochEnd, TrainingPhase)
        def unfreeze(self, event: Event, phase: Phase, learner: Any) -> None:
            learner.model.body.requires_grad_(True)

    models = {"body": body(), "head": nn.Linear(4, 1)}
    both = torch.optim.SGD([p for model in models.values() for p in model.parameters()], lr=0.1)
    learner_of(Unfreezing(), model=models, optimizer=both).fit(2, phases=[Both()])
    assert seen == [False, True]


def test_a_phase_that_predicts_in_train_mode_has_a_frozen_model_in_it() -> None:
    class MonteCarlo(PredictionPhase):
        train_mode = True

    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).eval().requires_grad_(False)
    learner = Learner(model, data=(), seed=0, default_callbacks=False)
    assert (learner.predict(rows()[0], phase=MonteCarlo()) == 0).any()
    assert not (learner.predict(rows()[0]) == 0).any()


def test_what_is_held_in_eval_mode_is_frozen_as_a_whole_and_in_eval_mode() -> None:
    assert is_held_in_eval(body())
    assert not is_held_in_eval(body(train=True))
    partly = body()
    partly[0].weight.requires_grad = True
    assert not is_held_in_eval(partly)


@pytest.mark.parametrize("joined_in_train_mode", [True, False])
def test_a_group_that_joins_in_train_mode_is_evaluated_with_the_weights_of_eval_mode(
    joined_in_train_mode: bool,
) -> None:
    def trained(joining: type[Event]) -> Learner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        model[0].requires_grad_(False)

        def join(learner: Any) -> None:
            if len(learner.optimizer.param_groups) == 1:
                learner.model[0].requires_grad_(True)
                learner.optimizer.add_param_group({"params": list(learner.model[0].parameters())})

        xs = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
        batches = TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=4)
        hook = CustomCallback(join, joining, reads=("model", "optimizer"), writes=("model", "optimizer"))
        learner = Learner(
            model, mse_loss, data=(batches,), optimizer=ByMode, callbacks=[hook], default_callbacks=False, seed=0
        )
        learner.fit(1)
        return learner

    learner = trained(StepEnd if joined_in_train_mode else FitBegin)
    for group in learner.optimizer.param_groups:
        assert group["train_mode"] is False
        assert all(torch.equal(each, learner.optimizer.state[each]["x"]) for each in group["params"])


class ByMode(ScheduleFree):
    """One that steps a group that has another mode as well, as those of schedulefree do, and notes its average."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        modes = [group["train_mode"] for group in self.param_groups]
        for group in self.param_groups:
            group["train_mode"] = True
        super().step(closure)
        for group, mode in zip(self.param_groups, modes, strict=True):
            for each in group["params"]:
                if "z" in self.state[each]:
                    self.state[each]["x"] = each.lerp(self.state[each]["z"], 1 - 1 / group["beta"])
            group["train_mode"] = mode
