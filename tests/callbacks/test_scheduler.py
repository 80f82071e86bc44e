from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import fields
from torch import nn
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import LambdaLR

from fluxloop import (
    EMA,
    Callback,
    CallbackConflictError,
    CancelEpochException,
    CancelStepException,
    CustomCallback,
    EpochBegin,
    Learner,
    LossBegin,
    LRScheduler,
    Metrics,
    OptimizerError,
    Recorder,
    StepBegin,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    cosine,
    linear,
    runstep,
    warmup,
)
from fluxloop.callbacks.scheduler import Scheduler
from fluxloop.errors import CheckpointError
from fluxloop.hyperparameters import (
    Attribute,
    HyperParameter,
    LearningRate,
    Momentum,
    WeightDecay,
    get_hyperparameter,
    set_hyperparameter,
)
from fluxloop.schedules import constant, exponential, one_cycle, sequence
from fluxloop.testing import EventRecorder, assert_order, assert_resumes_exactly, assert_same_bits, toy_learner

BATCHES = 4


def learner_of(*callbacks: Callback, **options: Any) -> Learner:
    return toy_learner(*callbacks, **{"num_batches": BATCHES, **options})


def rates(phase: type = TrainingPhase) -> CustomCallback:
    """Make what keeps the learning rate that each step uses, in its list ``seen``."""
    seen: list[float] = []
    hook = CustomCallback(
        lambda learner: seen.append(learner.optimizer.param_groups[0]["lr"]), LossBegin, phase, reads=("optimizer",)
    )
    hook.seen = seen  # type: ignore[attr-defined]  # for the test to read
    return hook


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_the_optimizer_uses_what_is_recorded_at_every_step(optimizer: Any) -> None:
    schedule, used = one_cycle(3 * BATCHES, 0.01), rates()
    learner = learner_of(Scheduler({LearningRate: schedule}), used, optimizer=optimizer)
    learner.fit(3)
    expected = [schedule(t) for t in range(3 * BATCHES)]
    assert learner.cbstate.hyperparameters == {"learning_rate": list(enumerate(expected, 1))}
    assert used.seen == expected
    assert get_hyperparameter(learner, LearningRate) == expected[-1]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_scheduled_weights_are_those_of_a_loop_by_hand(optimizer: Any) -> None:
    rate, decay = exponential(2 * BATCHES, 0.01, 0.0001), linear(2 * BATCHES, 0.0, 0.5)
    learner = learner_of(Scheduler({LearningRate: rate, WeightDecay: decay}), optimizer=optimizer)
    plain = learner_of(optimizer=optimizer)
    learner.fit(2, phases=[TrainingPhase()])
    value = torch.zeros(1, requires_grad=True)
    stepper = optimizer([value])
    for t, (xs, ys) in enumerate([*learner.data.training, *learner.data.training]):
        stepper.param_groups[0].update(lr=rate(t), weight_decay=decay(t))
        stepper.zero_grad()
        nn.functional.l1_loss(xs * value, ys).backward()
        stepper.step()
    assert torch.equal(learner.model.value, value)
    plain.fit(2, phases=[TrainingPhase()])
    assert not torch.equal(plain.model.value, value)


def test_only_training_phases_are_scheduled_counted_and_recorded() -> None:
    schedule = linear(100, 0.01, 0.0)
    learner = learner_of(Scheduler({LearningRate: schedule}))
    learner.fit(2, phases=[ValidationPhase(), TrainingPhase(), ValidationPhase()])
    learner.evaluate()
    learner.epoch(ValidationPhase())
    assert learner.cbstate.hyperparameters["learning_rate"] == [(t + 1, schedule(t)) for t in range(2 * BATCHES)]


def test_a_users_training_phase_is_scheduled_and_a_users_validation_phase_is_not() -> None:
    class Mine(TrainingPhase):
        pass

    class Watch(ValidationPhase):
        pass

    learner = learner_of(Scheduler({LearningRate: linear(100, 0.01, 0.0)}))
    learner.fit(1, phases=[Mine(), Watch(), TrainingPhase()])
    assert [step for step, _ in learner.cbstate.hyperparameters["learning_rate"]] == list(range(1, 2 * BATCHES + 1))


def test_epochs_are_counted_where_the_unit_says_so() -> None:
    used = rates()
    learner = learner_of(Scheduler({LearningRate: sequence((0.01, 2), (0.001, 1))}, unit="epoch"), used)
    learner.fit(4)
    assert used.seen == [0.01] * 2 * BATCHES + [0.001] * 2 * BATCHES
    assert learner.cbstate.hyperparameters == {"learning_rate": [(1, 0.01), (5, 0.01), (9, 0.001), (13, 0.001)]}


def test_a_second_fit_goes_on_counting() -> None:
    used = rates()
    learner = learner_of(Scheduler({LearningRate: linear(8, 0.008, 0.0)}), used)
    learner.fit(1)
    learner.fit(1)
    assert used.seen == pytest.approx([0.008, 0.007, 0.006, 0.005, 0.004, 0.003, 0.002, 0.001])


@pytest.mark.parametrize("event", [StepBegin, LossBegin])
def test_a_cancelled_step_does_not_count_so_the_next_has_its_value(event: Any) -> None:
    count = 0

    def cancel(learner: Any) -> None:
        nonlocal count
        count += 1
        if count % 2:
            raise CancelStepException

    learner = learner_of(Scheduler({LearningRate: linear(8, 0.008, 0.0)}), CustomCallback(cancel, event, TrainingPhase))
    learner.fit(2, phases=[TrainingPhase()])
    series = learner.cbstate.hyperparameters["learning_rate"]
    assert series == [(1, 0.008), (2, 0.007), (3, 0.006), (4, 0.005)]


def test_a_cancelled_epoch_counts_as_it_does_in_the_history() -> None:
    begun = []

    def cancel(learner: Any) -> None:
        begun.append(1)
        if len(begun) == 1:
            raise CancelEpochException

    scheduler = Scheduler({LearningRate: linear(4, 0.008, 0.0)}, unit="epoch")
    learner = learner_of(scheduler, Recorder(), CustomCallback(cancel, LossBegin, TrainingPhase))
    learner.fit(2, phases=[TrainingPhase()])
    assert learner.history[TrainingPhase].epochs == 2
    assert learner.cbstate.hyperparameters["learning_rate"] == [(1, 0.006)]


def counted(scheduler: Scheduler) -> dict[str, Any]:
    """Give the attributes that training has changed."""
    fresh = Scheduler(scheduler.schedules, scheduler.unit)
    names = [each.name for each in fields(Scheduler)]
    return {name: getattr(scheduler, name) for name in names if getattr(scheduler, name) != getattr(fresh, name)}


def test_an_epoch_that_is_begun_again_has_the_value_it_had() -> None:
    """A resumed run makes everything anew, puts the counters in place, and fires EpochBegin again."""
    schedule = linear(4, 0.008, 0.0)
    scheduler = Scheduler({LearningRate: schedule}, unit="epoch")
    learner = learner_of(scheduler)
    learner.fit(2)
    again = Scheduler({LearningRate: schedule}, unit="epoch")
    resumed = learner_of(again)
    for name, value in counted(scheduler).items():
        setattr(again, name, value)
    for _ in range(2):
        resumed.callbacks.handle(resumed, TrainingPhase())(EpochBegin())
        assert get_hyperparameter(resumed, LearningRate) == schedule(2)
    assert resumed.cbstate.hyperparameters["learning_rate"] == [(2 * BATCHES + 1, schedule(2))]


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bits(unit: Any) -> None:
    def make() -> Learner:
        ema = EMA("model", 0.5)
        decays = {Attribute(ema, "decay"): linear(12, 0.5, 1.0), LearningRate: one_cycle(12, 0.01), Momentum: 0.5}
        return learner_of(Scheduler(decays, unit=unit), ema, Recorder())

    assert_resumes_exactly(make, epochs=3)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            Scheduler({LearningRate: one_cycle(64, 0.01)}),
            r"learning_rate was scheduled by one_cycle\(total=32, .*\) per step, and is now by one_cycle\(total=64, ",
        ),
        (Scheduler({LearningRate: one_cycle(32, 0.01)}, unit="epoch"), r"per step, and is now by .* per epoch"),
        (Scheduler({LearningRate: lambda t: 0.01}), r"and is now by a function per step"),
        (Scheduler({WeightDecay: 0.1}), r"learning_rate was scheduled by one_cycle.*, and is now by nothing"),
    ],
    ids=["another length", "another unit", "a function", "another attribute"],
)
def test_a_resumed_run_with_another_schedule_is_refused(now: Scheduler, message: str, tmp_path: Path) -> None:
    first = learner_of(Scheduler({LearningRate: one_cycle(32, 0.01)}), Recorder())
    first.fit(1)
    first.save(tmp_path / "run.pt")
    second = learner_of(now, Recorder())
    with pytest.raises(CheckpointError, match=message):
        second.load(tmp_path / "run.pt")
    assert (now._steps, now._epochs) == (0, 0)


def faded(t: int, total: int) -> float:
    return 0.1 * max(0.0, 1 - t / total)


@pytest.mark.parametrize("kind", ["a partial", "a closure", "inside another"])
def test_a_function_with_other_arguments_is_another_schedule(kind: str, tmp_path: Path) -> None:
    def make(total: int) -> Learner:
        schedules: dict[str, Any] = {
            "a partial": partial(faded, total=total),
            "a closure": lambda t: 0.1 * max(0.0, 1 - t / total),
            "inside another": warmup(2, partial(faded, total=total)),
        }
        return learner_of(Scheduler({LearningRate: schedules[kind], WeightDecay: linear(8, 1, 0)}), Recorder())

    first, second, other = make(32), make(32), make(64)
    first.fit(1)
    first.save(tmp_path / "run.pt")
    second.load(tmp_path / "run.pt")
    second.fit(1)
    assert len(second.cbstate.hyperparameters["learning_rate"]) == 2 * BATCHES
    with pytest.raises(CheckpointError, match=r"made with learning_rate.*total=32, now learning_rate.*total=64"):
        other.load(tmp_path / "run.pt")


class GAN(TrainingPhase):
    weight = 1.0

    def step(self, learner: Learner, batch: Any) -> None:
        G, D = learner.model  # noqa: N806 - as the paper calls them
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = G(torch.randn(len(state.real), 2))
            with learner.optimizing("D") as d:
                d.loss = softplus(-D(state.real)).mean() + softplus(D(state.fake.detach())).mean()
            with learner.optimizing("G") as g:
                g.loss = self.weight * softplus(-D(state.fake)).mean()


def gan(*callbacks: Callback) -> Learner:
    torch.manual_seed(0)
    models = {"G": nn.Linear(2, 2), "D": nn.Linear(2, 1)}
    data = TensorBatches(torch.randn(16, 2), batch_size=4)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
    return Learner(models, data=(data,), optimizer=sgd, callbacks=callbacks, default_callbacks=False, seed=0)


def test_each_optimizer_and_any_attribute_may_have_a_schedule_of_its_own() -> None:
    phase, ema = GAN(), EMA("G", 0.9)
    scheduler = Scheduler(
        {
            LearningRate("G"): linear(4, 0.4, 0.0),
            LearningRate("D"): constant(0.2),
            Momentum("D"): 0.25,
            Attribute(phase, "weight"): linear(4, 0.0, 1.0),
            Attribute(ema, "decay"): linear(4, 0.5, 1.0),
        }
    )
    learner = gan(scheduler, ema)
    learner.fit(1, phases=[phase])
    assert learner.optimizer.G.param_groups[0]["lr"] == pytest.approx(0.1)
    assert (learner.optimizer.D.param_groups[0]["lr"], learner.optimizer.D.param_groups[0]["momentum"]) == (0.2, 0.25)
    assert learner.optimizer.G.param_groups[0]["momentum"] == 0.5
    assert (phase.weight, ema.decay) == (0.75, 0.875)
    records = learner.cbstate.hyperparameters
    assert sorted(records) == ["EMA.decay", "GAN.weight", "learning_rate/D", "learning_rate/G", "momentum/D"]
    assert all([step for step, _ in series] == [1, 2, 3, 4] for series in records.values())


def test_hyperparameters_that_touch_one_branch_are_all_allowed() -> None:
    names = ("G", "D")
    scheduler = Scheduler({kind(name): 0.01 for kind in (LearningRate, WeightDecay, Momentum) for name in names})
    learner = gan(scheduler)
    assert scheduler.writes == ("cbstate.hyperparameters", "optimizer.G", "optimizer.D")
    learner.fit(1, phases=[GAN()])
    for name in names:
        group = getattr(learner.optimizer, name).param_groups[0]
        assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.01, 0.01, 0.01)


class LossScale(HyperParameter):
    writes = ("loss_fn",)


@get_hyperparameter.register(LossScale)
def _(learner: Any, hp: LossScale) -> float:
    return float(learner.loss_fn.scale)


@set_hyperparameter.register(LossScale)
def _(learner: Any, hp: LossScale, value: float) -> None:
    learner.loss_fn.scale = value


class Scaled(nn.Module):
    scale = 1.0

    def forward(self, preds: Any, ys: Any) -> Any:
        return self.scale * (preds - ys).abs().mean()


def test_a_users_own_hyperparameter_is_scheduled_and_its_path_declared() -> None:
    loss = Scaled()
    batches = TensorBatches(torch.ones(8, 1), torch.ones(8, 1), batch_size=4)
    scheduler = Scheduler({LossScale: linear(4, 1.0, 0.0), LearningRate: 0.5})
    learner = Learner(nn.Linear(1, 1), loss, data=(batches,), callbacks=[scheduler], default_callbacks=False, seed=0)
    learner.fit(1)
    assert scheduler.writes == ("cbstate.hyperparameters", "loss_fn", "optimizer")
    assert loss.scale == 0.75
    assert learner.cbstate.hyperparameters["loss_scale"] == [(1, 1.0), (2, 0.75)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Scheduler({LearningRate: 0.1}, unit="batch"), ValueError, r"unit='batch'.*expected 'step' or 'epoch'"),
        (lambda: Scheduler({"lr": 0.1}), TypeError, "'lr' was given as a hyperparameter; expected one such as"),
        (lambda: Scheduler(LearningRate), TypeError, r"Scheduler\(the class LearningRate\).*expected schedules by"),
        (lambda: Scheduler({LearningRate: "cosine"}), ValueError, "'learning_rate' was given 'cosine'; expected a sch"),
        (lambda: Scheduler({LearningRate: cosine}), ValueError, "was given the class cosine"),
        (lambda: Scheduler({LearningRate: 0.1, LearningRate(): 0.2}), ValueError, "twice; expected one schedule"),
        (lambda: Scheduler({LearningRate: 0.1, LearningRate("G"): 0.2}), ValueError, "which set the same thing"),
        (
            lambda: Scheduler({Attribute(GAN(), "weight"): 0.1, Attribute(GAN(), "weight"): 0.2}),
            ValueError,
            r"both recorded as 'GAN.weight'; give one a label of its own: Attribute\(..., label='GAN.weight2'\)",
        ),
    ],
)
def test_what_cannot_be_scheduled_is_refused_at_once(make: Callable[[], object], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_misspelt_unit_is_an_error_that_says_what_was_meant() -> None:
    with pytest.raises(ValueError, match="did you mean 'epoch'"):
        Scheduler({LearningRate: 0.1}, unit="epochs")


def test_what_the_optimizer_does_not_have_is_refused_before_anything_is_changed() -> None:
    learner = learner_of()
    with pytest.raises(OptimizerError, match=r"SGD has no 'betas'; it has .*lr, .*momentum") as caught:
        learner.add_callback(Scheduler({LearningRate: 0.5, BETAS: 0.5}))
    assert "fluxloop: raised by Scheduler in init" in caught.value.__notes__
    assert len(learner.callbacks) == 0
    assert get_hyperparameter(learner, LearningRate) == 0.001
    with pytest.raises(OptimizerError, match=r"there is no optimizer 'H'; the learner has \['G', 'D'\]"):
        gan(Scheduler({LearningRate("H"): 0.5}))


BETAS = type("Betas", (LearningRate,), {"options": ("betas",), "__slots__": ()})()


def test_an_empty_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Scheduler\({}\) was given; expected at least one schedule"):
        Scheduler({})


NAN = float("nan")


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (lambda t: NAN if t == 2 else 0.1, r"learning_rate \(a function\), asked for its value at 2, gave nan"),
        (lambda t: 0.1 - 0.1 * t, r"value at 2, gave lr the value -0\.1"),
        (lambda t: None if t == 2 else 0.1, "value at 2, gave None"),
        (lambda t: "fast" if t == 2 else 0.1, "value at 2, gave lr the value 'fast'"),
        (linear(2, 0.1, -0.1), r"learning_rate \(linear\(.*value at 2, gave lr the value -0\.1"),
    ],
)
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_value_that_no_optimizer_takes_names_schedule_and_step_before_the_update(
    schedule: Any, said: str, unit: Any
) -> None:
    learner = toy_learner(Recorder(), Scheduler({LearningRate: schedule}, unit=unit), num_batches=4)
    with pytest.raises((ValueError, OptimizerError), match=said):
        learner.fit(4)
    assert learner.history[TrainingPhase].steps == (2 if unit == "step" else 8)
    assert learner.optimizer.param_groups[0]["lr"] >= 0


def test_other_hyperparameters_may_be_negative_and_not_nan() -> None:
    class Thing:
        weight = 1.0

    thing = Thing()
    learner = toy_learner(Scheduler({Attribute(thing, "weight"): lambda t: -1.0 if t < 3 else NAN}))
    with pytest.raises(ValueError, match=r"Thing.weight .* at 3, gave nan"):
        learner.fit(1)
    assert thing.weight == -1.0


def test_two_schedulers_of_different_things_get_along() -> None:
    by_epoch = Scheduler({WeightDecay: linear(2, 0.1, 0.0)}, unit="epoch")
    learner = learner_of(Scheduler({LearningRate: linear(8, 0.008, 0.0)}), by_epoch)
    learner.fit(2)
    assert get_hyperparameter(learner, LearningRate) == pytest.approx(0.001)
    assert learner.cbstate.hyperparameters["weight_decay"] == [(1, 0.1), (5, 0.05)]
    assert len(learner.cbstate.hyperparameters["learning_rate"]) == 8


def test_two_schedulers_of_the_same_thing_are_refused() -> None:
    with pytest.raises(CallbackConflictError, match="two Schedulers set the same thing, LearningRate"):
        learner_of(Scheduler({LearningRate: 0.1}), Scheduler({LearningRate(group=0): 0.1}, unit="epoch"))


def test_it_sorts_without_a_cycle_next_to_recorder_metrics_and_ema() -> None:
    digests = set()
    for order in permutations(range(4)):
        given = [Scheduler({LearningRate: 0.1}), Recorder(), Metrics(), EMA("model", 0.9)]
        learner = learner_of(*(given[index] for index in order))
        digests.add(learner.callbacks.digest)
    assert len(digests) == 1
    assert_order(learner, Scheduler, EMA)
    learner.fit(1)


def test_schedules_change_no_event_and_draw_nothing() -> None:
    recorder, plain = EventRecorder(), EventRecorder()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    learner_of(Scheduler({LearningRate: cosine(8, 0.001, 0.0)}), recorder).fit(2)
    learner_of(plain).fit(2)
    assert recorder.trace == plain.trace
    assert torch.equal(torch.get_rng_state(), state)


def test_it_begins_anew_in_a_second_learner() -> None:
    scheduler, records = Scheduler({LearningRate: linear(8, 0.008, 0.0)}), []
    for _ in range(2):
        learner = learner_of(scheduler)
        learner.fit(1)
        records.append(learner.cbstate.hyperparameters)
    assert records[0] == records[1]


def grouped(scheduler: Scheduler | None, *more: Callback, seed: int = 0, **adamw: Any) -> Learner:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    weights, biases = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.2}, {"params": biases, "weight_decay": 0.0, "lr": 0.001}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, **adamw)
    xs = torch.linspace(-1, 1, 8 * BATCHES)[:, None]
    callbacks = [*([] if scheduler is None else [scheduler]), *more]
    data = (TensorBatches(xs, xs.cos(), batch_size=8),)
    return Learner(model, nn.functional.mse_loss, data=data, optimizer=optimizer, callbacks=callbacks, seed=0)


@pytest.mark.parametrize("tensor", [False, True])
def test_groups_keep_the_ratios_that_they_were_given(tensor: bool) -> None:
    rate, decay = cosine(2 * BATCHES, 0.04, 0.0), linear(2 * BATCHES, 0.1, 0.3)
    learner = grouped(Scheduler({LearningRate: rate, WeightDecay: decay}))
    if tensor:
        for group in learner.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    learner.fit(2)
    by_hand = grouped(None)
    for epoch in range(2):
        for batch, (xs, ys) in enumerate(by_hand.data.training):
            t = epoch * BATCHES + batch
            for group, share, decays in zip(by_hand.optimizer.param_groups, (1.0, 0.1), (1, 0), strict=True):
                group["lr"], group["weight_decay"] = rate(t) * share, decay(t) * decays
            by_hand.optimizer.zero_grad()
            nn.functional.mse_loss(by_hand.model(xs), ys).backward()
            by_hand.optimizer.step()
    for ours, theirs in zip(learner.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if tensor else 0)
    assert learner.cbstate.hyperparameters["learning_rate"][-1] == (2 * BATCHES, rate(2 * BATCHES - 1))


def test_ratios_are_those_given_also_in_a_resumed_run(tmp_path: Path) -> None:
    def make(*callbacks: Callback) -> Learner:
        return grouped(Scheduler({LearningRate: cosine(3 * BATCHES, 0.04, 0.0)}), *callbacks)

    whole, file = make(), tmp_path / "file.pt"
    whole.fit(2)
    whole.save(file)
    whole.fit(1)
    again = make()
    again.load(file)
    again.fit(1)
    assert_same_bits(again, whole)
    assert [group["lr"] for group in again.optimizer.param_groups] == [g["lr"] for g in whole.optimizer.param_groups]


def test_two_optimizers_keep_the_ratio_of_their_rates_too() -> None:
    models = {"G": nn.Linear(2, 2), "D": nn.Linear(2, 1)}
    optimizers = {"G": partial(torch.optim.SGD, lr=0.1), "D": partial(torch.optim.SGD, lr=0.4)}
    data = (torch.randn(8, 2),)
    scheduler = Scheduler({LearningRate: constant(0.2)})
    learner = Learner(models, data=data, optimizer=optimizers, callbacks=[scheduler], seed=0)
    learner.fit(1, phases=[GAN()])
    assert get_hyperparameter(learner, LearningRate) == (pytest.approx(0.05), 0.2)
    named = Scheduler({LearningRate("G"): 0.3, LearningRate("D"): 0.3})
    learner.set_callbacks([named])
    learner.fit(1, phases=[GAN()])
    assert get_hyperparameter(learner, LearningRate) == 0.3


def test_a_group_that_is_named_gets_the_value_itself() -> None:
    learner = grouped(Scheduler({LearningRate(group=1): 0.5}))
    learner.fit(1)
    assert get_hyperparameter(learner, LearningRate) == (0.01, 0.5)


def test_a_group_that_joins_while_training_gets_its_share() -> None:
    extra = nn.Parameter(torch.zeros(1))

    def join(learner: Any) -> None:
        groups = learner.optimizer.param_groups
        if len(groups) == 2:
            learner.optimizer.add_param_group({"params": [extra], "lr": 0.005})

    learner = grouped(Scheduler({LearningRate: linear(2 * BATCHES, 0.02, 0.0)}))
    learner.fit(1)
    join(learner)
    learner.fit(1)
    rates = get_hyperparameter(learner, LearningRate)
    assert rates == tuple(pytest.approx(linear(2 * BATCHES, 0.02, 0.0)(2 * BATCHES - 1) * r) for r in (1, 0.1, 0.5))


def test_a_scale_of_a_groups_rate_is_respected() -> None:
    learner = grouped(None)
    for group, scale in zip(learner.optimizer.param_groups, (0.25, 1.0), strict=True):
        group["lr"], group["lr_scale"] = 0.01, scale
    learner.add_callback(Scheduler({LearningRate: 0.8}))
    learner.fit(1)
    assert get_hyperparameter(learner, LearningRate) == (0.2, 0.8)


def test_groups_that_differ_in_what_has_no_ratio_are_to_be_named() -> None:
    model = nn.Linear(1, 1)
    groups = [{"params": [model.weight], "momentum": 0.9}, {"params": [model.bias], "momentum": 0.5}]
    sgd = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(OptimizerError, match=r"would set all parameter groups alike.*'/0': 0\.9, '/1': 0\.5.*group=0"):
        Learner(model, nn.functional.mse_loss, optimizer=sgd, callbacks=[Scheduler({Momentum: 0.8})])


class Window(TrainingPhase):
    """Updates after every second batch."""

    batches = 0

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
        learner.backward(state.loss)
        if self.batches % 2:
            learner.update()

    def finish(self, learner: Any, state: Any) -> None:
        self.batches += 1


def test_updates_can_be_counted_instead_of_steps() -> None:
    rate = linear(6, 0.06, 0.0)
    by_step, by_update = (learner_of(Scheduler({LearningRate: rate}, unit=u), Recorder()) for u in ("step", "update"))
    theirs = learner_of(LRScheduler(lambda o: LambdaLR(o, lambda t: rate(t) / 0.001), unit="update"), Recorder())
    for learner in (by_step, by_update, theirs):
        learner.fit(1, phases=[Window()])
        learner.fit(1, phases=[Window()])

    def values(learner: Learner) -> list[float]:
        return [value for _, value in learner.cbstate.hyperparameters["learning_rate"]]

    assert values(by_step) == [rate(t) for t in range(8)]
    assert values(by_update) == [rate(t // 2) for t in range(8)]
    assert values(theirs) == pytest.approx(values(by_update))


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["step", "update", "epoch"])
def test_every_unit_resumes_exactly(unit: Any) -> None:
    def make() -> Learner:
        return learner_of(Scheduler({LearningRate: linear(12, 0.06, 0.0)}, unit=unit), Recorder())

    assert_resumes_exactly(make, phases=lambda: [Window()])


def test_with_several_optimizers_the_one_whose_updates_count_is_to_be_named() -> None:
    with pytest.raises(OptimizerError, match=r"has \['G', 'D'\]; name it, such as LearningRate\('G'\)"):
        gan(Scheduler({LearningRate: 0.1}, unit="update"), Recorder())
    learner = gan(Scheduler({LearningRate("D"): linear(8, 0.8, 0.0)}, unit="update"), Recorder())
    learner.fit(1, phases=[GAN()])
    assert get_hyperparameter(learner, LearningRate("D")) == pytest.approx(0.8 - 0.1 * (BATCHES - 1))


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_one_added_in_a_later_fit_records_at_the_steps_of_the_training_and_counts_its_own_from_0(unit: Any) -> None:
    seen: list[float] = []
    learner = toy_learner(Recorder(), num_batches=3)
    learner.fit(2)
    learner.add_callback(Scheduler({LearningRate: lambda t: seen.append(t) or 0.1}, unit))
    learner.fit(2)
    steps = [step for step, _ in learner.cbstate.hyperparameters["learning_rate"]]
    assert steps == (list(range(7, 13)) if unit == "step" else [7, 10])
    assert seen == list(range(len(steps)))


def test_one_added_later_records_on_after_a_resume_in_the_middle_of_an_epoch(tmp_path: Any) -> None:
    def make() -> Learner:
        learner = toy_learner(Recorder(), num_batches=3)
        learner.fit(1)
        learner.add_callback(Scheduler({LearningRate: lambda t: 0.1}))
        return learner

    def look() -> None:
        if learner.history[TrainingPhase].steps == 5:
            learner.save(tmp_path / "state.pt")

    learner = make()
    learner.at_safe_point(look)
    learner.fit(2)
    resumed = make()
    resumed.fit(3, resume=tmp_path / "state.pt")
    for each in (learner, resumed):
        assert [step for step, _ in each.cbstate.hyperparameters["learning_rate"]] == list(range(4, 10))


def test_ratios_are_not_lost_where_a_former_schedule_has_ended_at_zero() -> None:
    down, up = linear(BATCHES - 1, 0.1, 0.0), constant(0.1)
    learner = grouped(Scheduler({LearningRate: down, WeightDecay: down}))
    learner.fit(1)
    assert get_hyperparameter(learner, LearningRate) == get_hyperparameter(learner, WeightDecay) == 0
    learner.replace_callback(Scheduler({LearningRate: up, WeightDecay: up}))
    learner.fit(1)
    assert get_hyperparameter(learner, LearningRate) == (0.1, pytest.approx(0.01))
    assert get_hyperparameter(learner, WeightDecay) == (0.1, 0)
