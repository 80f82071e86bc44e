from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import count, permutations
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from fluxloop import (
    EMA,
    BackwardBegin,
    BackwardEnd,
    Callback,
    CallbackConflictError,
    CancelEpochException,
    CustomCallback,
    EpochEnd,
    KNNProbe,
    Learner,
    LossBegin,
    Metric,
    MetricError,
    Metrics,
    MissingProducerError,
    OptimizerError,
    Recorder,
    StepBegin,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    runstep,
)
from fluxloop.callbacks.lr_scheduler import LRScheduler
from fluxloop.callbacks.scheduler import Scheduler
from fluxloop.errors import CheckpointError
from fluxloop.hyperparameters import LearningRate, Momentum, WeightDecay
from fluxloop.testing import assert_order, assert_resumes_exactly, assert_same_bits, toy_learner
from toys import through_a_file

BATCHES, EPOCHS = 3, 5
STEPS = BATCHES * EPOCHS

sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def chained(optimizer: Optimizer) -> Any:
    return ChainedScheduler([ConstantLR(optimizer, total_iters=3), ExponentialLR(optimizer, gamma=0.9)])


def sequential(optimizer: Optimizer) -> Any:
    parts = [ConstantLR(optimizer, total_iters=3), ExponentialLR(optimizer, gamma=0.9)]
    return SequentialLR(optimizer, parts, milestones=[2])


def halve(step: int) -> float:
    return 0.5


FACTORIES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda t: 0.9**t),
    "MultiplicativeLR": partial(MultiplicativeLR, lr_lambda=halve),
    "StepLR": partial(StepLR, step_size=2),
    "MultiStepLR": partial(MultiStepLR, milestones=[2, 3, 3]),
    "ConstantLR": partial(ConstantLR, total_iters=3),
    "LinearLR": partial(LinearLR, total_iters=3),
    "ExponentialLR": partial(ExponentialLR, gamma=0.9),
    "SequentialLR": sequential,
    "PolynomialLR": partial(PolynomialLR, total_iters=4),
    "CosineAnnealingLR": partial(CosineAnnealingLR, T_max=5),
    "ChainedScheduler": chained,
    "CyclicLR": partial(CyclicLR, base_lr=0.001, max_lr=0.1, step_size_up=2),
    "CosineAnnealingWarmRestarts": partial(CosineAnnealingWarmRestarts, T_0=3),
    "OneCycleLR": partial(OneCycleLR, max_lr=0.1, total_steps=STEPS + 1),
}

every = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
units = pytest.mark.parametrize("unit", ["step", "epoch"])


def learner_of(*callbacks: Callback, **options: Any) -> Learner:
    return toy_learner(*callbacks, **{"num_batches": BATCHES, "optimizer": sgd, **options})


def by_hand(
    factory: Callable[[Optimizer], Any], unit: str, epochs: int = EPOCHS, optimizer: Any = sgd
) -> tuple[Learner, list[Any]]:
    """Train as everybody does by hand; give the learner whose model it was, and (lr, momentum) of each step."""
    learner = learner_of(optimizer=optimizer)
    stepper = learner.optimizer
    scheduler = factory(stepper)
    used = []
    for _ in range(epochs):
        for xs, ys in learner.data.training:
            group = stepper.param_groups[0]
            used.append((group["lr"], group.get("momentum")))
            stepper.zero_grad()
            nn.functional.l1_loss(learner.model(xs), ys).backward()
            stepper.step()
            if unit == "step":
                scheduler.step()
        if unit == "epoch":
            scheduler.step()
    return learner, used


def watch() -> tuple[CustomCallback, list[Any]]:
    """Make what keeps (lr, momentum) of each training step."""
    used: list[Any] = []

    def look(learner: Any) -> None:
        group = learner.optimizer.param_groups[0]
        used.append((group["lr"], group.get("momentum")))

    return CustomCallback(look, LossBegin, TrainingPhase, reads=("optimizer",)), used


def scheduler_of(learner: Learner) -> LRScheduler:
    found = learner.get_callback(LRScheduler)
    assert found is not None
    return found


def test_every_scheduler_of_torch_is_tried_here() -> None:
    public = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert public == {*FACTORIES, "ReduceLROnPlateau"}


@pytest.mark.slow(quick=4)
@every
@units
def test_every_torch_scheduler_gives_the_bits_of_a_loop_by_hand(factory: Any, unit: Any) -> None:
    hook, used = watch()
    learner = learner_of(LRScheduler(factory, unit=unit), hook)
    learner.fit(EPOCHS, phases=[TrainingPhase(), ValidationPhase()])
    other, expected = by_hand(factory, unit)
    assert used == expected
    assert_same_bits(learner, other)
    every_step = [(step, lr) for step, (lr, _) in enumerate(expected, 1)]
    assert learner.cbstate.hyperparameters["learning_rate"] == (every_step if unit == "step" else every_step[::BATCHES])


@pytest.mark.slow(quick=4)
@every
@units
def test_loading_a_state_leaves_optimizer_and_schedule_exactly_as_saved(factory: Any, unit: Any) -> None:
    whole, used = by_hand(factory, unit)
    first = learner_of(LRScheduler(factory, unit=unit))
    first.fit(2, phases=[TrainingPhase()])
    kept = through_a_file([scheduler_of(first).state_dict(), first.optimizer.state_dict(), first.model.state_dict()])
    hook, again = watch()
    resumed = learner_of(LRScheduler(factory, unit=unit), hook)
    for _ in range(2):  # in either order, and twice
        resumed.optimizer.load_state_dict(kept[1])
        scheduler_of(resumed).load_state_dict(kept[0])
        resumed.optimizer.load_state_dict(kept[1])
    resumed.model.load_state_dict(kept[2])
    assert resumed.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    assert scheduler_of(resumed).state_dict() == scheduler_of(first).state_dict()
    resumed.fit(EPOCHS - 2, phases=[TrainingPhase()])
    assert again == used[2 * BATCHES :]
    assert_same_bits(resumed, whole)
    assert resumed.cbstate.hyperparameters["learning_rate"][0] == (2 * BATCHES + 1, used[2 * BATCHES][0])


@pytest.mark.slow(quick=1)
@every
@units
def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bits(factory: Any, unit: Any) -> None:
    assert_resumes_exactly(lambda: learner_of(LRScheduler(factory, unit=unit), Recorder()), epochs=3, at=[2, 4])


@pytest.mark.slow
def test_a_plateau_and_a_phase_that_updates_one_optimizer_now_and_then_resume_in_the_same_bits() -> None:
    def with_plateau() -> Learner:
        return learner_of(LRScheduler(plateau), Recorder(), Metrics())

    def with_two() -> Learner:
        return gan(LRScheduler(partial(ExponentialLR, gamma=0.5), unit="step"), Scheduler({WeightDecay: 0.1}))

    assert_resumes_exactly(with_plateau, epochs=6, at=[10, 20, 30])
    assert_resumes_exactly(with_two, phases=lambda: [GAN()])


@pytest.mark.slow
def test_milestones_inside_another_scheduler_resume_in_the_same_bits() -> None:
    def factory(optimizer: Optimizer) -> Any:
        parts = [ConstantLR(optimizer, total_iters=3), MultiStepLR(optimizer, milestones=[1, 1, 2])]
        return SequentialLR(optimizer, parts, milestones=[2])

    assert_resumes_exactly(lambda: learner_of(LRScheduler(factory), Recorder()), epochs=5)


def test_a_loaded_state_is_not_shared_with_the_one_who_gave_it() -> None:
    first, second = learner_of(LRScheduler(chained)), learner_of(LRScheduler(chained))
    first.fit(1)
    state = scheduler_of(first).state_dict()
    before = copy.deepcopy(state)
    scheduler_of(second).load_state_dict(state)
    second.fit(1)
    assert state == before == scheduler_of(first).state_dict()


def test_the_state_of_other_optimizers_is_refused() -> None:
    first, second = (
        learner_of(LRScheduler(partial(StepLR, step_size=2))),
        gan(LRScheduler(partial(StepLR, step_size=2))),
    )
    with pytest.raises(CheckpointError, match=r"for the optimizers \[None\], this one for \['G', 'D'\]"):
        scheduler_of(second).load_state_dict(scheduler_of(first).state_dict())


def test_a_scheduler_is_made_once_for_a_learner() -> None:
    made = []

    def factory(optimizer: Optimizer) -> Any:
        made.append(optimizer)
        return CyclicLR(optimizer, 0.001, 0.1, step_size_up=2)

    learner = learner_of(LRScheduler(factory))
    learner.fit(1)
    rate = learner.optimizer.param_groups[0]["lr"]
    given = learner.callbacks.given()
    learner.set_callbacks([])
    learner.set_callbacks(given)
    assert learner.optimizer.param_groups[0]["lr"] == rate
    learner.fit(1)
    assert made == [learner.optimizer]
    again = learner_of(*given)
    assert made == [learner.optimizer, again.optimizer]


def test_an_optimizer_is_as_it_was_where_a_scheduler_cannot_be_made() -> None:
    calls = count()

    def factory(optimizer: Optimizer) -> Any:
        if next(calls):
            raise RuntimeError("no")
        return OneCycleLR(optimizer, 0.1, total_steps=10)

    learner = gan()
    before = copy.deepcopy([o.state_dict() for o in learner.optimizer])
    with pytest.raises(RuntimeError, match="no"):
        learner.add_callback(LRScheduler(factory))
    assert [o.state_dict() for o in learner.optimizer] == before
    assert all("step" not in vars(o) for o in learner.optimizer)


def groups_learner(*callbacks: Callback) -> Learner:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    data = TensorBatches(torch.ones(8, 2), torch.ones(8, 1), batch_size=2)
    return Learner(
        model, nn.functional.mse_loss, data=(data,), optimizer=optimizer, callbacks=callbacks, default_callbacks=False
    )


def test_one_cycle_works_with_several_parameter_groups() -> None:
    learner = groups_learner(LRScheduler(partial(OneCycleLR, max_lr=[0.1, 0.2], total_steps=5), unit="step"))
    learner.fit(1)
    other = groups_learner().optimizer
    scheduler = OneCycleLR(other, max_lr=[0.1, 0.2], total_steps=5)
    for _ in range(4):
        other.step()
        scheduler.step()
    for name in ("lr", "momentum"):
        assert [g[name] for g in learner.optimizer.param_groups] == [g[name] for g in other.param_groups]
    assert sorted(learner.cbstate.hyperparameters) == ["learning_rate/0", "learning_rate/1"]


def test_cosine_annealing_with_restarts_starts_anew_every_second_epoch() -> None:
    learner = learner_of(LRScheduler(partial(CosineAnnealingWarmRestarts, T_0=2)))
    learner.fit(5)
    rates = [rate for _, rate in learner.cbstate.hyperparameters["learning_rate"]]
    assert rates == pytest.approx([0.01, 0.005, 0.01, 0.005, 0.01])


def test_a_multiplicative_schedule_halves_the_rate_each_epoch() -> None:
    learner = learner_of(LRScheduler(partial(MultiplicativeLR, lr_lambda=halve)))
    learner.fit(5)
    rates = [rate for _, rate in learner.cbstate.hyperparameters["learning_rate"]]
    assert rates == [0.01 * 0.5**epoch for epoch in range(5)]
    assert learner.optimizer.param_groups[0]["lr"] == 0.01 * 0.5**5


@pytest.mark.parametrize(
    ("factory", "final"),
    [
        (partial(StepLR, step_size=1, gamma=0.1), 0.01 * 0.1**3),
        (lambda o: LambdaLR(o, lambda epoch: 2.0**epoch), 0.01 * 2**3),
        (partial(MultiplicativeLR, lr_lambda=lambda epoch: 0.95), 0.01 * 0.95**3),
        (partial(CosineAnnealingLR, T_max=3), 0.0),
    ],
)
def test_the_final_rate_is_that_of_the_formula(factory: Any, final: float) -> None:
    learner = learner_of(LRScheduler(factory))
    learner.fit(3)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(final, abs=1e-12)


def test_one_cycle_ends_and_a_step_beyond_is_an_error() -> None:
    learner = learner_of(LRScheduler(partial(OneCycleLR, max_lr=0.1, total_steps=2 * BATCHES), unit="step"))
    learner.fit(2, phases=[TrainingPhase()])
    with pytest.raises(ValueError, match="Tried to step 7 times"):
        learner.fit(1, phases=[TrainingPhase()])


class GAN(TrainingPhase):
    """Updates D in every step, G in every second one."""

    def __init__(self) -> None:
        self.calls = 0

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def step(self, learner: Learner, batch: Any) -> None:
        self.calls += 1
        G, D = learner.model  # noqa: N806 - as the paper calls them
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = G(torch.randn(len(state.real), 2))
            with learner.optimizing("D") as d:
                d.loss = softplus(-D(state.real)).mean() + softplus(D(state.fake.detach())).mean()
            if self.calls % 2 == 0:
                with learner.optimizing("G") as g:
                    g.loss = softplus(-D(state.fake)).mean()


def gan(*callbacks: Callback) -> Learner:
    torch.manual_seed(0)
    models = {"G": nn.Linear(2, 2), "D": nn.Linear(2, 1)}
    data = TensorBatches(torch.randn(16, 2), batch_size=4)
    return Learner(models, data=(data,), optimizer=sgd, callbacks=callbacks, default_callbacks=False, seed=0)


def test_per_step_every_step_counts_and_per_update_those_of_its_optimizer() -> None:
    rates, records = {}, {}
    for unit in ("step", "update"):
        learner = gan(LRScheduler(partial(ExponentialLR, gamma=0.5), unit=unit))
        learner.fit(2, phases=[GAN()])
        rates[unit] = {name: getattr(learner.optimizer, name).param_groups[0]["lr"] for name in ("G", "D")}
        records[unit] = learner.cbstate.hyperparameters
        assert [step for step, _ in records[unit]["learning_rate/G"]] == list(range(1, 9))
    assert rates["step"] == {"G": 0.01 * 0.5**8, "D": 0.01 * 0.5**8}
    assert rates["update"] == {"G": 0.01 * 0.5**4, "D": 0.01 * 0.5**8}
    assert [rate for _, rate in records["update"]["learning_rate/G"][:4]] == [0.01, 0.01, 0.005, 0.005]


class Accumulating(TrainingPhase):
    """Updates after every second batch, twice."""

    def __init__(self) -> None:
        self.calls = count()

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            if next(self.calls) % 2:
                learner.update()
                learner.update()


@pytest.mark.parametrize("unit", ["step", "update"])
def test_where_gradients_add_up_it_counts_what_a_scheduler_of_the_same_unit_counts(unit: Any) -> None:
    rates = []
    for callback in (
        LRScheduler(partial(ExponentialLR, gamma=0.5), unit=unit),
        Scheduler({LearningRate: lambda count: 0.01 * 0.5**count}, unit=unit),
    ):
        learner = learner_of(callback, Recorder(), num_batches=5)
        learner.fit(2, phases=[Accumulating()])
        rates.append([rate for _, rate in learner.cbstate.hyperparameters["learning_rate"]])
    assert rates[0] == rates[1]
    assert len(rates[0]) == 10


def test_per_update_every_update_counts() -> None:
    learner = learner_of(LRScheduler(partial(ExponentialLR, gamma=0.5), unit="update"), num_batches=5)
    learner.fit(1, phases=[Accumulating()])
    rates = [rate for _, rate in learner.cbstate.hyperparameters["learning_rate"]]
    assert rates == [0.01 * 0.5**k for k in (0, 0, 2, 2, 4)]


def test_the_optimizer_that_is_named_is_the_one_that_is_scheduled() -> None:
    learner = gan(LRScheduler(partial(ExponentialLR, gamma=0.5), optimizer="D"))
    learner.fit(2, phases=[GAN()])
    assert learner.optimizer.G.param_groups[0]["lr"] == 0.01
    assert learner.optimizer.D.param_groups[0]["lr"] == 0.0025
    assert learner.cbstate.hyperparameters == {"learning_rate/D": [(1, 0.01), (5, 0.005)]}
    assert list(scheduler_of(learner).schedulers) == ["D"]


def test_several_optimizers_have_schedulers_of_their_own() -> None:
    learner = gan(
        LRScheduler(partial(ExponentialLR, gamma=0.5), optimizer="D"),
        LRScheduler(partial(StepLR, step_size=1), optimizer="G", unit="update"),
    )
    learner.fit(1, phases=[GAN()])
    assert learner.optimizer.G.param_groups[0]["lr"] == pytest.approx(0.0001)
    assert learner.optimizer.D.param_groups[0]["lr"] == 0.005


def test_an_optimizer_that_is_not_there_is_named() -> None:
    with pytest.raises(OptimizerError, match=r"there is no optimizer 'H'; the learner has \['G', 'D'\]"):
        gan(LRScheduler(partial(StepLR, step_size=1), optimizer="H"))


def plateau(optimizer: Optimizer) -> Any:
    return ReduceLROnPlateau(optimizer, patience=1, factor=0.1)


def scripted(values: list[float]) -> Metrics:
    """Make a metric of the validation data that has these values, epoch by epoch."""
    script = iter(values)

    class Script:
        def reset(self) -> None:
            pass

        def update(self, preds: Any, ys: Any) -> None:
            pass

        def compute(self) -> float:
            return next(script)

    return Metrics(Metric(Script(), name="score", phase=ValidationPhase))


def plateau_rates(values: list[float], **options: Any) -> list[float]:
    factory = partial(ReduceLROnPlateau, **{"patience": 1, "factor": 0.1, **options})
    learner = learner_of(LRScheduler(factory, monitor="validation/score"), Recorder(), scripted(values))
    rates = []
    for _ in values:
        learner.fit(1)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0], {}),
        ([5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0], {"cooldown": 2}),
        ([1.0, 2.0, 1.0, 1.0, 1.0, 1.0], {"mode": "max"}),
        ([1.0, 0.95, 0.91, 0.9, 0.85], {"threshold": 0.2, "threshold_mode": "abs"}),
        ([1.0, 0.95, 0.91, 0.9, 0.85], {"threshold": 0.2, "patience": 0}),
    ],
)
def test_a_plateau_reduces_as_torch_does(values: list[float], options: dict[str, Any]) -> None:
    optimizer = sgd([nn.Parameter(torch.zeros(1))])
    scheduler = ReduceLROnPlateau(optimizer, **{"patience": 1, "factor": 0.1, **options})
    expected = []
    for value in values:
        scheduler.step(value)
        expected.append(optimizer.param_groups[0]["lr"])
    assert plateau_rates(values, **options) == expected
    assert len(set(expected)) > 1


def test_a_plateau_watches_the_epochs_validation_loss() -> None:
    hook, used = watch()
    learner = learner_of(LRScheduler(plateau), Recorder(), Metrics(), hook)
    learner.fit(8)
    optimizer = sgd([nn.Parameter(torch.zeros(1))])
    scheduler, expected = plateau(optimizer), []
    for loss in learner.history["validation/loss"]:
        expected += [optimizer.param_groups[0]["lr"]] * BATCHES
        scheduler.step(loss)
    assert [rate for rate, _ in used] == expected
    assert scheduler_of(learner).schedulers[None].state_dict() == scheduler.state_dict()
    assert len(set(expected)) > 1


def test_a_plateau_is_stepped_only_when_there_is_a_new_value() -> None:
    learner = learner_of(LRScheduler(plateau), Recorder(), Metrics())
    learner.fit(1)
    learner.epoch(TrainingPhase())
    learner.epoch(TrainingPhase())
    assert scheduler_of(learner).schedulers[None].last_epoch == 1
    learner.epoch(ValidationPhase())
    assert scheduler_of(learner).schedulers[None].last_epoch == 2


def test_a_plateau_that_is_added_later_begins_with_the_next_value() -> None:
    learner = learner_of(Recorder(), Metrics())
    learner.fit(2)
    learner.add_callback(LRScheduler(plateau))
    learner.epoch(TrainingPhase())
    assert scheduler_of(learner).schedulers[None].last_epoch == 0


def test_a_nan_is_no_improvement() -> None:
    nan = math.nan
    assert plateau_rates([1.0, nan, nan, 0.5]) == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert plateau_rates([nan, nan, 1.0]) == pytest.approx([0.01, 0.001, 0.001])


def test_a_metric_that_nobody_records_is_an_error_before_the_first_step() -> None:
    learner = learner_of(LRScheduler(plateau, monitor="validation/acuracy"), Recorder(), Metrics())
    with pytest.raises(MetricError, match=r"fit records 'validation/acuracy', .* it records \['training/loss'"):
        learner.fit(1)
    with pytest.raises(MissingProducerError, match=r"LRScheduler reads 'cbstate.metrics'.*add Metrics\(\)"):
        learner_of(LRScheduler(plateau))


def test_a_plateau_in_a_factory_that_does_not_say_so_has_to_be_told_what_to_watch() -> None:
    def hidden(optimizer: Optimizer) -> Any:
        return plateau(optimizer)

    with pytest.raises(ValueError, match=r"ReduceLROnPlateau watches a metric; say which: LRScheduler\(..., monitor="):
        learner_of(LRScheduler(hidden), Recorder(), Metrics())
    learner_of(LRScheduler(hidden, monitor="validation/loss"), Recorder(), Metrics()).fit(1)


def test_the_plateaus_state_goes_on_in_another_learner() -> None:
    first, second = (learner_of(LRScheduler(plateau), Recorder(), Metrics()) for _ in range(2))
    first.fit(2)
    scheduler_of(second).load_state_dict(through_a_file(scheduler_of(first).state_dict()))
    assert scheduler_of(second).state_dict() == scheduler_of(first).state_dict()
    assert scheduler_of(second).schedulers[None].best == min(first.history["validation/loss"])


def test_no_warning_is_raised_where_an_epoch_has_no_update() -> None:
    class Idle(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]):
                pass

    learner = learner_of(LRScheduler(sequential))
    learner.fit(3, phases=[Idle()])
    assert scheduler_of(learner).schedulers[None].last_epoch == 3


def test_an_epoch_that_was_cancelled_counts_as_it_does_in_the_history() -> None:
    def cancel(learner: Any) -> None:
        raise CancelEpochException

    learner = learner_of(LRScheduler(partial(ExponentialLR, gamma=0.5)), CustomCallback(cancel, StepBegin))
    learner.fit(2)
    assert learner.optimizer.param_groups[0]["lr"] == 0.0025


def test_a_learning_rate_in_a_tensor_stays_the_same_tensor() -> None:
    rate = torch.tensor(0.01)
    learner = learner_of(
        LRScheduler(partial(ExponentialLR, gamma=0.5), unit="step"),
        optimizer=partial(torch.optim.Adam, lr=rate, foreach=False),
    )
    held = learner.optimizer.param_groups[0]["lr"]
    learner.fit(1)
    assert learner.optimizer.param_groups[0]["lr"] is held
    rates = [value for _, value in learner.cbstate.hyperparameters["learning_rate"]]
    assert rates == pytest.approx([0.01, 0.005, 0.0025])
    state = through_a_file(scheduler_of(learner).state_dict())
    scheduler_of(learner).load_state_dict(state)
    assert held.item() == pytest.approx(0.00125)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: LRScheduler(StepLR(sgd([nn.Parameter(torch.zeros(1))]), 1)),
            TypeError,
            "expected a function of the opt",
        ),
        (lambda: learner_of(LRScheduler(lambda o: None)), TypeError, "made None; expected a torch.optim.lr_scheduler"),
        (
            lambda: learner_of(
                LRScheduler(partial(StepLR, step_size=1), monitor="validation/loss"), Recorder(), Metrics()
            ),
            ValueError,
            "'validation/loss' was given for StepLR, which watches nothing",
        ),
        (
            lambda: learner_of(LRScheduler(plateau, unit="step"), Recorder(), Metrics()),
            ValueError,
            "each epoch; expected",
        ),
        (lambda: LRScheduler(plateau, monitor="loss"), MetricError, "expected the data's key and the metric's name"),
        (lambda: LRScheduler(plateau, optimizer=0), OptimizerError, "expected the name of an optimizer"),
        (
            lambda: learner_of(LRScheduler(lambda o: StepLR(sgd([nn.Parameter(torch.zeros(1))]), 1))),
            ValueError,
            "made a scheduler of another optimizer",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_misspelt_unit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"unit='on_batch_end'\) was given; expected 'step' or 'epoch'"):
        LRScheduler(partial(StepLR, step_size=1), unit="on_batch_end")


def test_two_of_one_optimizer_are_refused_and_so_is_a_scheduler_of_the_same_rate() -> None:
    step = partial(StepLR, step_size=1)
    with pytest.raises(CallbackConflictError, match="schedule the same optimizer"):
        gan(LRScheduler(step), LRScheduler(step, optimizer="G"))
    with pytest.raises(CallbackConflictError, match=r"LearningRate\(.*of a Scheduler is set by LRScheduler\("):
        learner_of(LRScheduler(step), Scheduler({LearningRate: 0.1}))
    with pytest.raises(CallbackConflictError, match=r"Momentum\(.*of a Scheduler is set by"):
        learner_of(LRScheduler(FACTORIES["OneCycleLR"]), Scheduler({Momentum: 0.1}))
    gan(LRScheduler(step, optimizer="G"), Scheduler({LearningRate("D"): 0.1})).fit(1, phases=[GAN()])
    learner = learner_of(LRScheduler(step), Scheduler({WeightDecay: 0.5, Momentum: 0.1}))
    learner.fit(1)
    assert sorted(learner.cbstate.hyperparameters) == ["learning_rate", "momentum", "weight_decay"]


class ReadsTheOptimizer(Callback):
    """Records a metric, as what clips gradients does."""

    reads = ("optimizer", "cbstate.history")
    writes = ("cbstate.metrics",)
    run_after = (Metrics,)
    draws = False


@pytest.mark.slow
@pytest.mark.parametrize("factory", [plateau, FACTORIES["StepLR"]])
def test_it_sorts_without_a_cycle_next_to_what_reads_the_optimizer_and_records_metrics(factory: Any) -> None:
    digests = set()
    for order in permutations(range(5)):
        given = [LRScheduler(factory), Recorder(), Metrics(), EMA("model", 0.9), ReadsTheOptimizer()]
        learner = learner_of(*(given[index] for index in order))
        digests.add(learner.callbacks.digest)
    assert len(digests) == 1
    learner.fit(1)
    if factory is plateau:
        assert_order(learner, Metrics, ReadsTheOptimizer, LRScheduler)


def test_a_plateau_follows_a_probe_of_an_average() -> None:
    xs = torch.randn(32, 1, generator=torch.Generator().manual_seed(0))
    batches = TensorBatches(xs, (xs[:, 0] > 0).long(), batch_size=8)
    learner = Learner(
        nn.Sequential(nn.Linear(1, 2)),
        nn.functional.cross_entropy,
        data=(batches, batches),
        optimizer=sgd,
        callbacks=[
            LRScheduler(partial(ReduceLROnPlateau, mode="max", patience=0), monitor="validation/knn_0@ema"),
            EMA("0", 0.9),
            KNNProbe("0@ema", k=3),
            Recorder(),
            Metrics(),
        ],
        default_callbacks=False,
        seed=0,
    )
    assert_order(learner, EMA, KNNProbe, LRScheduler)
    learner.fit(3)
    values = learner.history["validation/knn_0@ema"]
    scheduler = scheduler_of(learner).schedulers[None]
    assert (scheduler.last_epoch, scheduler.best) == (3, max(values))


def test_what_reads_the_records_sees_those_of_the_epoch() -> None:
    seen = []
    look = CustomCallback(
        lambda learner: seen.append(list(learner.cbstate.hyperparameters["learning_rate"])),
        EpochEnd,
        TrainingPhase,
        reads=("cbstate.hyperparameters",),
    )
    learner = learner_of(look, LRScheduler(plateau), Recorder(), Metrics())
    assert_order(learner, LRScheduler, CustomCallback)
    learner.fit(2)
    assert seen == [[(1, 0.01)], [(1, 0.01), (4, 0.01)]]


def test_one_added_in_a_later_fit_records_at_the_steps_of_the_training() -> None:
    learner = toy_learner(Recorder(), num_batches=3)
    learner.fit(2)
    learner.add_callback(LRScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=1), unit="step"))
    learner.fit(1)
    assert [step for step, _ in learner.cbstate.hyperparameters["learning_rate"]] == [7, 8, 9]


class Told:
    """A scheduler that is told how far the training is, as timm's are."""

    def __init__(self, optimizer: torch.optim.Optimizer, by_updates: bool = False) -> None:
        self.optimizer, self.by_updates, self.heard = optimizer, by_updates, []

    def step(self, epoch: int, metric: float | None = None) -> None:
        self.heard.append(epoch)
        if not self.by_updates:
            self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + epoch)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        self.heard.append(num_updates)
        if self.by_updates:
            self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + num_updates)

    def state_dict(self) -> dict[str, Any]:
        return {"heard": list(self.heard)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heard = list(state["heard"])


@pytest.mark.parametrize(("unit", "heard"), [("epoch", [1, 2, 3]), ("step", [*range(1, 13)])])
def test_a_scheduler_that_is_told_how_far_the_training_is_hears_it_also_resumed(unit: Any, heard: list[int]) -> None:
    def make() -> tuple[Learner, LRScheduler]:
        scheduler = LRScheduler(partial(Told, by_updates=unit == "step"), unit=unit)
        return toy_learner(scheduler, num_batches=4, optimizer=partial(torch.optim.SGD, lr=0.1)), scheduler

    learner, scheduler = make()
    learner.fit(1)
    other, copied = make()
    other.load_state_dict(learner.state_dict())
    for each, callback in ((learner, scheduler), (other, copied)):
        each.fit(2)
        assert callback.schedulers[None].heard == heard
        assert each.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / (1 + heard[-1]))
    assert torch.equal(learner.model.value, other.model.value)


def test_a_scheduler_that_is_told_epochs_alone_is_refused_for_steps() -> None:
    class Epochs(Told):
        step_update = property()  # type: ignore[assignment]  # it has none

    with pytest.raises(ValueError, match=r"Epochs needs the number of epochs; expected .*unit='epoch'"):
        toy_learner(LRScheduler(Epochs, unit="step"))


def test_a_factory_that_lacks_arguments_is_refused_with_what_to_type() -> None:
    with pytest.raises(TypeError, match=r"LRScheduler\(StepLR\).*step_size.*LRScheduler\(partial\(StepLR, \.\.\.\)\)"):
        toy_learner(LRScheduler(torch.optim.lr_scheduler.StepLR))
