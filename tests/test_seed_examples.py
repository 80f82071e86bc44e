"""The examples of the systems fluxloop learnt from, with the behaviour their text intends."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, softplus
from torch.optim import SGD, Adam, AdamW, Optimizer

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
    LossError,
    Metric,
    Metrics,
    PerOptimizerPhase,
    PerOptimizerValidationPhase,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    accuracy,
    mae,
    mse,
    on,
    rmse,
    runepoch,
    runstep,
    stream_seed,
    throttle,
)
from fluxloop.testing import EventRecorder, assert_order, assert_same_bits, toy_learner


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


def regularized() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def quiet(model: Any, loss_fn: Any = None, **options: Any) -> Learner:
    return Learner(model, loss_fn, **{"default_callbacks": False, "seed": 0, **options})


def assert_equal_weights(first: nn.Module, second: nn.Module) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# E1: module, loss, optimizer and metric, and nothing else


def test_fit_reports_loss_and_accuracy_of_both_sets(capsys: pytest.CaptureFixture[str]) -> None:
    train, valid = batches(), batches(24)
    learner = Learner(
        Net(),
        nn.CrossEntropyLoss(),
        data=(train, valid),
        optimizer=partial(Adam, lr=0.05, fused=False),
        callbacks=[Metrics(accuracy)],
    )
    history = learner.fit(10)

    for name in ("training/loss", "training/accuracy", "validation/loss", "validation/accuracy"):
        assert len(history[name]) == 10
    assert history["training/loss"][-1] < history["training/loss"][0]
    assert history["training/accuracy"][-1] > history["training/accuracy"][0]
    xs, ys = valid.data
    with torch.no_grad():
        preds = learner.model(xs)
    assert history["validation/loss"][-1] == pytest.approx(cross_entropy(preds, ys).item(), rel=1e-6)
    assert history["validation/accuracy"][-1] == pytest.approx(accuracy(preds, ys).item())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert all("loss" in line and "accuracy" in line for line in lines)


# E2 and E4: two optimizers over one model; the first also pays for the size of its weights


class TwoRates(PerOptimizerPhase):
    def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
        loss = learner.loss_fn(state.preds, state.ys)
        return loss + 0.1 * learner.model.fc1.weight.abs().sum() if name == "fc1" else loss


TWO_RATES = {"fc1": partial(SGD, lr=0.1, momentum=0.9), "fc2": partial(SGD, lr=0.01, momentum=0.9)}


def by_hand_with_two_rates(net: Net, data: TensorBatches, epochs: int) -> dict[str, list[float]]:
    """Train as the text says, and give each epoch's average loss by optimizer."""
    optimizers = {name: factory(getattr(net, name).parameters()) for name, factory in TWO_RATES.items()}
    averages: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(epochs):
        totals = dict.fromkeys(optimizers, 0.0)
        for xs, ys in data:
            for name, optimizer in optimizers.items():
                loss = cross_entropy(net(xs), ys)
                if name == "fc1":
                    loss = loss + 0.1 * net.fc1.weight.abs().sum()
                net.zero_grad()
                loss.backward()
                optimizer.step()
                totals[name] += loss.item() * len(xs)
        for name, total in totals.items():
            averages[name].append(total / data.num_rows)
    return averages


def test_two_optimizers_over_one_model_equal_the_hand_written_loop() -> None:
    net, data = Net(), batches()
    own = deepcopy(net)
    learner = quiet(net, cross_entropy, data=(data,), optimizer=TWO_RATES, callbacks=[Recorder(), Metrics()])
    history = learner.fit(3, phases=[TwoRates()])
    averages = by_hand_with_two_rates(own, data, 3)

    assert_equal_weights(net, own)
    assert history["training/loss_fc1"] == pytest.approx(averages["fc1"])
    assert history["training/loss_fc2"] == pytest.approx(averages["fc2"])
    assert history[TwoRates].updates == {"fc1": 9, "fc2": 9}


@define
class GradientWatch(Callback):
    """Keep what gradients there are when an optimizer steps."""

    seen: list[tuple[str, dict[str, Tensor | None]]]
    reads = ("step.grads",)

    @on(UpdateBegin)
    def keep(self, event: UpdateBegin, phase: Any, learner: Any) -> None:
        grads = learner.step.grads
        self.seen.append((event.name, {key: None if grads[key] is None else grads[key].clone() for key in grads}))


def test_the_gradient_of_one_optimizers_loss_never_reaches_the_other() -> None:
    watch = GradientWatch([])
    learner = quiet(Net(), cross_entropy, data=(batches(32),), optimizer=TWO_RATES, callbacks=[watch])
    learner.fit(2, phases=[TwoRates()])
    assert [name for name, _ in watch.seen] == ["fc1", "fc2"] * 4
    for (_, first), (_, second) in zip(watch.seen[::2], watch.seen[1::2], strict=True):
        assert first["fc2.weight"] is None
        assert first["fc2.bias"] is None
        assert torch.equal(first["fc1.weight"], second["fc1.weight"])
        assert second["fc2.weight"].abs().sum() > 0


def test_validation_gives_each_optimizers_loss_and_touches_no_gradient() -> None:
    train, valid = batches(), batches(20)
    callbacks = [Recorder(), Metrics(accuracy)]
    learner = quiet(Net(), cross_entropy, data=(train, valid), optimizer=TWO_RATES, callbacks=callbacks)
    phase = TwoRates()
    learner.fit(1, phases=[phase])
    gradients = [p.grad.clone() for p in learner.model.parameters()]
    weights = deepcopy(learner.model)
    learner.epoch(PerOptimizerValidationPhase(phase))

    assert_equal_weights(learner.model, weights)
    assert all(torch.equal(p.grad, g) for p, g in zip(learner.model.parameters(), gradients, strict=True))
    xs, ys = valid.data
    with torch.no_grad():
        loss = cross_entropy(weights(xs), ys)
        size = 0.1 * weights.fc1.weight.abs().sum()
    history = learner.history
    assert history["validation/loss_fc2"] == [pytest.approx(loss.item())]
    assert history["validation/loss_fc1"] == [pytest.approx((loss + size).item())]
    assert history["validation/accuracy"] == [pytest.approx(accuracy(weights(xs), ys).item())]


def test_validation_between_the_epochs_changes_no_weight() -> None:
    net, train = Net(), batches()
    own = deepcopy(net)
    learner = quiet(net, cross_entropy, data=(train, batches(20)), optimizer=TWO_RATES)
    learner.fit(3, phases=[TwoRates(), PerOptimizerValidationPhase(TwoRates())])
    by_hand_with_two_rates(own, train, 3)
    assert_equal_weights(net, own)


# E3: the model brings its loss and its optimizers


class SelfContained(Net):
    def loss(self, preds: Tensor, ys: Tensor) -> Tensor:
        return cross_entropy(preds, ys)

    def optimizers(self) -> dict[str, Optimizer]:
        return {"fc1": SGD(self.fc1.parameters(), lr=0.1), "fc2": SGD(self.fc2.parameters(), lr=0.01)}


def test_a_learner_without_any_loss_is_refused_before_it_trains() -> None:
    learner = quiet(Net(), data=(batches(),))
    with pytest.raises(LossError, match="TrainingPhase needs a loss function, and the learner has none; give one"):
        learner.fit(1)


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


# E4: the whole step by hand, one method for training and validation


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


# E5: virtual batch size


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


def test_an_accumulated_update_equals_one_step_on_the_larger_batch() -> None:
    net, (xs, ys) = Net(), classification(32)
    small, large = deepcopy(net), deepcopy(net)
    for model, size, phase in ((small, 8, VirtualBatches(4)), (large, 32, TrainingPhase())):
        data = TensorBatches(xs, ys, batch_size=size)
        quiet(model, cross_entropy, data=(data,), optimizer=partial(SGD, lr=0.5)).fit(2, phases=[phase])
    for a, b, start in zip(small.parameters(), large.parameters(), net.parameters(), strict=True):
        assert not torch.equal(a, start)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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


# E7 and E8: hyperparameters that come later, prediction


class ConvNet(nn.Module):
    def __init__(self, num_classes: int, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, xs: Tensor) -> Tensor:
        return self.head(self.dropout(self.conv(xs).relu().mean((2, 3))))


def test_hyperparameters_of_the_model_and_the_optimizer_may_come_later() -> None:
    prepare = partial(ConvNet, channels=5)
    learner = quiet(prepare(num_classes=10), cross_entropy, optimizer=partial(Adam, lr=0.003, fused=False))
    learner.fit(1, ((torch.randn(8, 1, 6, 6), torch.randint(10, (8,))),))
    assert learner.model.head.weight.shape == (10, 5)
    assert learner.optimizer.param_groups[0]["lr"] == 0.003


def test_predictions_come_in_loader_order_in_eval_mode_without_gradients() -> None:
    images = torch.randn(22, 1, 6, 6)
    learner = quiet(ConvNet(3), cross_entropy, data=((images, torch.randint(3, (22,))),))
    learner.fit(1)
    learner.model.train()
    preds = learner.predict(TensorBatches(images, torch.zeros(22), batch_size=5))

    assert preds.shape == (22, 3)
    assert not preds.requires_grad
    assert learner.model.training
    learner.model.eval()
    torch.testing.assert_close(preds, learner.model(images).detach())
    assert torch.equal(preds, learner.predict(TensorBatches(images, batch_size=5)))


# E9: the loop


def test_the_loop_goes_from_init_over_training_and_validation_to_the_end() -> None:
    modes = []
    watch = CustomCallback(lambda learner: modes.append((learner.model.training, learner.step.xs.device)), StepBegin)
    recorder = EventRecorder()
    learner = quiet(
        Net(),
        cross_entropy,
        data=(batches(32), batches(16)),
        callbacks=[recorder, watch],
        optimizer=partial(SGD, lr=0.1),
    )
    learner.fit(1)
    step = ["StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd"]
    assert recorder.events == [
        *("FitBegin", "CycleBegin"),
        *("EpochBegin", *step, *step, "EpochEnd"),
        *("EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"),
        *("CycleEnd", "FitEnd"),
    ]
    device = learner.accelerator.device
    assert modes == [(True, device), (True, device), (False, device)]
    assert next(learner.model.parameters()).device == device


# E10 and E11: a metric of one's own, evaluation


class Correct:
    """Count what is right; give the share."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right = self.total = 0

    def update(self, preds: Tensor, ys: Tensor) -> None:
        self.right += int((preds.argmax(1) == ys).sum())
        self.total += len(ys)

    def compute(self) -> float:
        return self.right / self.total


def test_a_metric_with_update_and_compute_starts_anew_each_epoch_and_set() -> None:
    metrics = Metrics(Metric(Correct(), name="Acc"), accuracy)
    learner = quiet(Net(), cross_entropy, data=(batches(40), batches(20)), callbacks=[Recorder(), metrics])
    history = learner.fit(3)
    for key in ("training", "validation"):
        assert len(history[f"{key}/acc"]) == 3
        assert history[f"{key}/acc"] == pytest.approx(history[f"{key}/accuracy"])


def test_evaluate_computes_metrics_on_other_data_and_leaves_no_trace() -> None:
    xs, ys = torch.randn(100, 3), torch.randn(100, 1)
    learner = quiet(nn.Linear(3, 1), mse_loss, data=((xs, ys),), callbacks=[Recorder(), Metrics(mae)])
    learner.fit(1)
    before, rows = deepcopy(learner.model), learner.history.rows()
    values = learner.evaluate((xs, ys), metrics=[mae, mse, rmse])  # 100 rows in batches of 32: the last has 4

    errors = learner.model(xs).detach() - ys
    squared = errors.square().mean().item()
    expected = {"loss": squared, "mae": errors.abs().mean().item(), "mse": squared, "rmse": squared**0.5}
    assert values == pytest.approx(expected, rel=1e-5)
    assert list(values) == ["loss", "mae", "mse", "rmse"]
    assert list(learner.evaluate((xs, ys))) == ["loss", "mae"]
    assert_equal_weights(learner.model, before)
    assert learner.history.rows() == rows


# E12 and E13: callbacks


@define
class PrintCallback(Callback):
    message: str
    reads = ("cbstate.history",)

    @on(StepEnd, AbstractTrainingPhase)
    def print_iteration(self, event: StepEnd, phase: Any, learner: Any) -> None:
        print("Iteration", learner.cbstate.history[phase].steps_epoch)  # noqa: T201

    @on(EpochEnd, AbstractTrainingPhase)
    def print_message(self, event: EpochEnd, phase: Any, learner: Any) -> None:
        print(self.message)  # noqa: T201


def test_a_callback_with_an_argument_prints_the_iteration_and_its_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    toy_learner(PrintCallback("Done!"), Recorder(), num_batches=3).fit(2)
    assert capsys.readouterr().out.splitlines() == ["Iteration 1", "Iteration 2", "Iteration 3", "Done!"] * 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_order_of_callbacks_is_said_by_them_and_not_by_the_list(order: tuple[int, ...]) -> None:
    calls: list[str] = []

    class First(Callback):
        @on(EpochEnd, AbstractTrainingPhase)
        def note(self, event: EpochEnd, phase: Any, learner: Any) -> None:
            calls.append("First")

    class Second(Callback):
        run_after = (First,)

        @on(EpochEnd, AbstractTrainingPhase)
        def note(self, event: EpochEnd, phase: Any, learner: Any) -> None:
            calls.append("Second")

    class Ahead(Callback):
        run_after = (Second,)

        @on(EpochEnd, AbstractTrainingPhase)
        def note(self, event: EpochEnd, phase: Any, learner: Any) -> None:
            calls.append("Ahead")

    callbacks = [First(), Second(), Ahead()]
    learner = toy_learner(*(callbacks[i] for i in order))
    learner.fit(1)
    assert calls == ["First", "Second", "Ahead"]
    assert_order(learner, First, Second, Ahead)


# E14, E15 and E16: loss, optimizer and regression as in plain PyTorch


def test_a_loss_may_be_a_function_or_a_module() -> None:
    model, data = nn.Linear(3, 1), TensorBatches(torch.randn(20, 3), torch.randn(20, 1), batch_size=8)
    first, second = (quiet(deepcopy(model), loss, data=(data,)) for loss in (mse_loss, nn.MSELoss()))
    first.fit(2)
    second.fit(2)
    assert_same_bits(first, second)


@define
class ParameterWatch(Callback):
    """Keep the optimizer's parameters before and after its step, as seen through its groups."""

    before: list[Tensor] | None = None
    after: list[Tensor] | None = None
    gradients: list[Tensor] | None = None
    reads = ("optimizer",)

    @on(BackwardBegin)
    def keep_before(self, event: BackwardBegin, phase: Any, learner: Any) -> None:
        self.before = [p.detach().clone() for p in learner.optimizer.param_groups[0]["params"]]

    @on(BackwardEnd)
    def keep_gradients(self, event: BackwardEnd, phase: Any, learner: Any) -> None:
        parameters = learner.optimizer.param_groups[0]["params"]
        assert all(torch.equal(p, old) for p, old in zip(parameters, self.before or (), strict=True))
        self.gradients = [p.grad.clone() for p in parameters]

    @on(UpdateEnd)
    def keep_after(self, event: UpdateEnd, phase: Any, learner: Any) -> None:
        self.after = [p.detach().clone() for p in learner.optimizer.param_groups[0]["params"]]


def test_backward_changes_gradients_alone_and_the_first_adam_step_moves_each_parameter_by_lr() -> None:
    watch = ParameterWatch()
    model = nn.Linear(3, 1)
    data = [(torch.randn(100, 3), torch.randn(100, 1))]
    learner = quiet(model, mse_loss, data=(data,), optimizer=partial(Adam, lr=0.01, fused=False), callbacks=[watch])
    learner.fit(1)
    assert watch.before
    assert watch.after
    assert watch.gradients
    for before, gradient, after, parameter in zip(
        watch.before, watch.gradients, watch.after, model.parameters(), strict=True
    ):
        torch.testing.assert_close(after, before - 0.01 * gradient.sign(), rtol=0, atol=1e-6)
        assert torch.equal(after, parameter.detach())


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
    printed = []
    for step in range(200):
        loss = mse_loss(own(xs), ys, reduction="sum")
        if step % 10 == 0:
            printed.append(f"{loss.item():.6f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert capsys.readouterr().out.splitlines() == printed
    assert float(printed[-1]) < float(printed[0])
    assert_equal_weights(net, own)


# E17 to E21: from a bare step function to the full phase


def bare_step(model: nn.Module, batch: Any, optimizer: Optimizer, loss_fn: Any) -> Tensor:
    """E17."""
    xs, ys = batch
    optimizer.zero_grad()
    loss: Tensor = loss_fn(model(xs), ys)
    loss.backward()
    optimizer.step()
    return loss


class BareStep(AbstractTrainingPhase):
    """E18."""

    def step(self, learner: Learner, batch: Any) -> None:
        bare_step(learner.model, batch, learner.optimizer, learner.loss_fn)


class WithState(AbstractTrainingPhase):
    """E19."""

    def step(self, learner: Learner, batch: Any) -> None:
        xs, ys = batch
        with runstep(learner, self, xs=xs, ys=ys) as (_, state):
            state.preds = learner.model(state.xs)
            state.loss = learner.loss_fn(state.preds, state.ys)
            learner.backward(state.loss)
            learner.update()


class WithEvents(AbstractTrainingPhase):
    """E20."""

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
    ids=["e18", "e19", "e20", "built-in"],
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


def test_the_state_is_the_learners_step_and_feeds_the_metrics() -> None:
    learner = quiet(Net(), cross_entropy, data=(batches(),), callbacks=[Recorder(), Metrics(accuracy)])
    history = learner.fit(2, phases=[WithState()])
    assert {"xs", "ys", "preds", "loss"} <= set(vars(learner.step))
    assert len(history["training/loss"]) == len(history["training/accuracy"]) == 2
    assert history[WithState].steps == 6


@pytest.mark.parametrize("make_optimizer", [partial(SGD, lr=0.1, momentum=0.9), partial(AdamW, lr=0.01, fused=False)])
def test_the_phase_of_the_tutorial_is_the_training_phase_to_the_bit(make_optimizer: Any) -> None:
    model, data = regularized(), TensorBatches(*classification(40), batch_size=16, shuffle=True)
    recorders = EventRecorder(), EventRecorder()
    learners = [
        quiet(
            deepcopy(model),
            cross_entropy,
            data=(data,),
            optimizer=make_optimizer,
            callbacks=[recorder, Recorder(), Metrics(accuracy)],
        )
        for recorder in recorders
    ]
    learners[0].fit(3, phases=[WithEvents()])
    learners[1].fit(3, phases=[TrainingPhase()])

    assert recorders[0].events == recorders[1].events
    assert_same_bits(*learners)
    assert learners[0].history["training/loss"] == learners[1].history["training/loss"]
    assert not torch.equal(next(learners[0].model.parameters()), next(model.parameters()))


def test_counts_go_on_over_the_epochs_of_ones_own_loop() -> None:
    learner = toy_learner(Recorder(), num_batches=4)
    for i in range(1, 11):
        learner.epoch(WithEvents())
        counts = learner.history[WithEvents]
        assert (counts.epochs, counts.steps, counts.steps_epoch) == (i, 4 * i, 4)


# E22 to E24: validation, epochs, and ending a fit


class OwnValidation(AbstractValidationPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        xs, ys = batch
        with runstep(learner, self, xs=xs, ys=ys) as (_, state):
            state.preds = learner.model(state.xs)
            state.loss = learner.loss_fn(state.preds, state.ys)
        return state


def test_a_validation_step_of_ones_own_watches_and_changes_nothing() -> None:
    recorder = EventRecorder()
    learner = quiet(regularized(), cross_entropy, data=(batches(32), batches(16)), callbacks=[recorder])
    before = deepcopy(learner.model)
    learner.epoch(OwnValidation())
    assert recorder.events == ["EpochBegin", "StepBegin", "StepEnd", "EpochEnd"]
    assert_equal_weights(learner.model, before)
    assert {"preds", "loss"} <= set(vars(learner.step))
    assert not learner.step.loss.requires_grad
    assert all(p.grad is None for p in learner.model.parameters())


class OwnEpoch(TrainingPhase):
    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for batch in data:
                self.step(learner, batch)


def test_the_default_epoch_written_out_is_the_same_epoch() -> None:
    recorders = EventRecorder(), EventRecorder()
    first, second = (toy_learner(recorder, Recorder()) for recorder in recorders)
    first.fit(2, phases=[OwnEpoch()])
    second.fit(2, phases=[TrainingPhase()])
    assert_same_bits(first, second)
    assert recorders[0].events == recorders[1].events


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


# E25: a GAN


def make_gan() -> dict[str, nn.Module]:
    return {
        "generator": nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)),
        "critic": nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(), nn.Linear(8, 1)),
    }


class GAN(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        generator, critic = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            state.noise = torch.randn(len(state.real), 2)
            state.fake = generator(state.noise)
            with learner.optimizing("critic") as block:
                block.loss = softplus(-critic(state.real)).mean() + softplus(critic(state.fake.detach())).mean()
            with learner.optimizing("generator") as block:
                block.loss = softplus(-critic(state.fake)).mean()


def test_a_gan_with_named_models_equals_the_hand_written_loop() -> None:
    models, data = make_gan(), TensorBatches(torch.randn(40, 3), batch_size=8)
    own, adam = deepcopy(models), partial(Adam, lr=0.01, betas=(0.5, 0.999), fused=False)
    learner = quiet(models, data=(data,), optimizer=adam, callbacks=[Recorder(), Metrics()])
    history = learner.fit(3, phases=[GAN()])

    generator, critic = own["generator"], own["critic"]
    g, d = adam(generator.parameters()), adam(critic.parameters())
    step = 0
    for _ in range(3):
        for real in data:
            torch.manual_seed(stream_seed(learner.seed, "training/step", step))
            step += 1
            fake = generator(torch.randn(len(real), 2))
            d.zero_grad()
            (softplus(-critic(real)).mean() + softplus(critic(fake.detach())).mean()).backward()
            d.step()
            g.zero_grad()
            softplus(-critic(fake)).mean().backward()
            g.step()

    assert_equal_weights(learner.model.generator, generator)
    assert_equal_weights(learner.model.critic, critic)
    assert history[GAN].updates == {"critic": 15, "generator": 15}
    assert len(history["training/loss_critic"]) == len(history["training/loss_generator"]) == 3


def test_names_are_the_same_for_models_parameters_and_optimizers_and_the_step_keeps_what_is_put_there() -> None:
    models = make_gan()
    learner = quiet(models, data=(TensorBatches(torch.randn(8, 3), batch_size=8),))
    learner.fit(1, phases=[GAN()])
    for name in ("generator", "critic"):
        assert getattr(learner.model, name) is models[name]
        parameters = list(models[name].parameters())
        assert list(map(id, getattr(learner.params, name))) == list(map(id, parameters))
        groups = getattr(learner.optimizer, name).param_groups
        assert list(map(id, groups[0]["params"])) == list(map(id, parameters))
    assert {"real", "noise", "fake", "losses"} <= set(vars(learner.step))
    assert set(learner.step.losses) == {"generator", "critic"}


# E26: what a phase derives from decides who acts on it


@define
class HalveRate(Callback):
    """A schedule: the rate is halved at every training step."""

    rates: list[float]
    writes = ("optimizer",)

    @on(StepBegin, AbstractTrainingPhase)
    def halve(self, event: StepBegin, phase: Any, learner: Any) -> None:
        group = learner.optimizer.param_groups[0]
        group["lr"] /= 2
        self.rates.append(group["lr"])


def test_a_schedule_acts_in_every_training_phase_and_in_no_other() -> None:
    schedule = HalveRate([])
    learner = toy_learner(schedule, num_batches=2, optimizer=partial(SGD, lr=0.008))
    learner.epoch(WithEvents())
    learner.epoch(ValidationPhase())
    learner.epoch(OwnValidation())
    assert schedule.rates == [0.004, 0.002]
    learner.epoch(OwnEpoch())
    assert schedule.rates == [0.004, 0.002, 0.001, 0.0005]


# E29 and E30: a moving average of the loss


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
    """Train the toy by hand, and give the moving average at the end of each epoch."""
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


def test_a_callback_is_configured_after_it_was_made_and_read_after_the_fit() -> None:
    logger = CustomLogger()
    learner = toy_learner(logger, Recorder())
    logger.alpha = 0.05
    learner.fit(5)
    *_, last = averages(5, 0.05)
    found = learner.get_callback(CustomLogger)
    assert found is logger
    assert found.value == pytest.approx(last)
    assert found.state_dict() == {"value": found.value}
