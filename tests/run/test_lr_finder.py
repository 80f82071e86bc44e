from __future__ import annotations

import gc
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, softplus
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    EMA,
    CancelFittingException,
    CancelStepException,
    CustomCallback,
    DataError,
    EpochBegin,
    Learner,
    LossBegin,
    LossError,
    OptimizerError,
    PhaseError,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    runstep,
)
from fluxloop.callbacks.lr_scheduler import LRScheduler
from fluxloop.callbacks.scheduler import Scheduler
from fluxloop.hyperparameters import LearningRate
from fluxloop.run.lr_finder import LRSweep, find_lr
from fluxloop.schedules import one_cycle
from fluxloop.testing import EventRecorder, assert_same_bits, bits, toy_learner


def rows(count: int = 64) -> tuple[Tensor, Tensor]:
    xs = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return xs, xs[:, :3].argmax(1)


def noisy_learner(*callbacks: Any, data: Any = None, optimizer: Any = torch.optim.Adam) -> Learner:
    """Make a learner with dropout, batch norm and shuffled data, that has trained for an epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    batches = TensorBatches(*rows(), batch_size=8, shuffle=True) if data is None else data
    learner = Learner(
        model,
        cross_entropy,
        data=(batches, batches),
        optimizer=optimizer,
        callbacks=callbacks,
        default_callbacks=False,
        seed=3,
    )
    learner.fit(1)
    return learner


def global_states() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]


def loader(generator: torch.Generator | None = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows()), batch_size=8, shuffle=True, generator=generator, **options)


def test_the_rates_rise_by_one_factor_from_the_first_to_the_last() -> None:
    sweep = find_lr(toy_learner(), start=1e-6, end=1e-3, steps=31)
    assert len(sweep.learning_rates) == len(sweep.losses) == len(sweep.smoothed) == 31
    assert sweep.learning_rates[0] == 1e-6
    assert sweep.learning_rates[-1] == 1e-3
    assert sweep.learning_rates == pytest.approx([1e-6 * 10 ** (k / 10) for k in range(31)])
    assert sweep.stop_reason is None


def test_the_losses_are_those_of_a_loop_by_hand() -> None:
    learner = toy_learner(num_batches=4)
    sweep = find_lr(learner, start=1e-5, end=1e-2, steps=10, smoothing=0.5)
    value = torch.zeros(1, requires_grad=True)
    optimizer, losses, average, smoothed = torch.optim.SGD([value]), [], 0.0, []
    batches = [*learner.data.training] * 3
    for k, (xs, ys) in enumerate(batches[:10]):
        optimizer.param_groups[0]["lr"] = sweep.learning_rates[k]
        loss = nn.functional.l1_loss(xs * value, ys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        average = 0.5 * average + 0.5 * losses[-1]
        smoothed.append(average / (1 - 0.5 ** (k + 1)))
    assert list(sweep.losses) == losses
    assert list(sweep.smoothed) == smoothed


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_nothing_of_the_learner_is_changed_to_the_bit(optimizer: Any) -> None:
    recorder = EventRecorder()
    learner, other = (
        noisy_learner(EMA("model", 0.9), Scheduler({LearningRate: one_cycle(100, 0.01)}), each, optimizer=optimizer)
        for each in (recorder, EventRecorder())
    )
    before, events, states = bits(learner), len(recorder.events), global_states()
    entries, groups = dict(vars(learner.step)), [dict(group) for group in learner.optimizer.param_groups]
    records, positions = list(learner.cbstate.hyperparameters["learning_rate"]), learner.streams.positions()
    modes = [module.training for module in learner.model.modules()]

    sweep = find_lr(learner)

    assert len(sweep.losses) > 20
    after = bits(learner)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert global_states() == states
    assert len(recorder.events) == events
    assert vars(learner.step) == entries
    assert [dict(group) for group in learner.optimizer.param_groups] == groups
    assert learner.cbstate.hyperparameters["learning_rate"] == records
    assert learner.streams.positions() == positions
    assert [module.training for module in learner.model.modules()] == modes
    assert learner.scope is None
    assert not learner._running.fitting
    learner.fit(1)
    other.fit(1)
    assert_same_bits(learner, other)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("seeded", [True, False])
def test_the_order_of_the_data_is_that_without_a_sweep(seeded: bool) -> None:
    learners = []
    for sweep in (True, False):
        generator = torch.Generator().manual_seed(4) if seeded else None
        learner = noisy_learner(data=loader(generator))
        state = None if generator is None else generator.get_state()
        if sweep:
            find_lr(learner, steps=30)
        assert generator is None or torch.equal(generator.get_state(), state)  # type: ignore[arg-type]  # it is there
        learner.fit(1)
        learners.append(learner)
    assert_same_bits(*learners)


@pytest.mark.slow
def test_workers_that_wait_for_the_next_epoch_draw_what_they_would_have_drawn() -> None:
    learners = []
    for sweep in (True, False):
        learner = noisy_learner(data=loader(num_workers=1, persistent_workers=True))
        if sweep:
            find_lr(learner, steps=10)
        learner.fit(1)
        assert len(multiprocessing.active_children()) == 1
        learners.append(bits(learner))
        del learner
        gc.collect()
    first, second = learners
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_data_is_begun_again_as_often_as_needed() -> None:
    seen = []
    hook = CustomCallback(lambda learner: seen.append(1), EpochBegin, TrainingPhase)
    sweep = find_lr(toy_learner(num_batches=3), steps=20, end=1e-3, callbacks=[hook])
    assert len(sweep.losses) == 20
    assert len(seen) == 7


@pytest.mark.slow
def test_the_sweep_is_the_same_when_it_is_run_again() -> None:
    learner = noisy_learner()
    assert find_lr(learner) == find_lr(learner)


def test_a_sweep_that_diverges_ends_early_and_says_so() -> None:
    sweep = find_lr(toy_learner(), end=1e6)
    assert sweep.stop_reason is not None
    assert sweep.stop_reason.startswith("the loss diverged at a learning rate of")
    assert len(sweep.losses) < 100
    assert all(value <= 4 * min(sweep.smoothed) for value in sweep.smoothed[:-1])
    assert sweep.smoothed[-1] > 4 * min(sweep.smoothed)


class Losses(TrainingPhase):
    """Gives the losses of a list, one after the other."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = iter(losses)

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            state.loss = torch.tensor(next(self.losses))


def sweep_of(losses: list[float], **options: Any) -> LRSweep:
    return find_lr(toy_learner(), **{"phase": Losses(losses), "steps": len(losses), "smoothing": 0.0, **options})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_sweep_before_it_counts(bad: float) -> None:
    sweep = sweep_of([3.0, 2.0, bad, 1.0])
    assert sweep.losses == (3.0, 2.0)
    assert sweep.stop_reason is not None
    assert f"the loss became {bad}" in sweep.stop_reason
    with pytest.raises(LossError, match="find_lr saw no finite loss: the loss became"):
        sweep_of([bad, 1.0])


def test_negative_losses_diverge_when_they_rise_far_above_the_lowest() -> None:
    assert sweep_of([-0.1, -0.5, -0.9, -0.8, -0.2]).stop_reason is None
    assert len(sweep_of([-0.1, -0.5, -0.9, 2.0, 1.0]).losses) == 4


def test_valley_is_the_middle_of_the_longest_fall_and_steepest_where_it_falls_fastest() -> None:
    sweep = sweep_of([5.0, 5.1, 4.9, 4.8, 4.85, 4.0, 2.0, 1.5, 1.4, 1.3, 1.2, 3.0], start=1e-10, end=10.0)
    assert sweep.valley == pytest.approx(1e-4)  # 5.0 (or 5.1), 4.9, 4.8, 4.0, 2.0, 1.5, 1.4, 1.3, 1.2: the fifth
    assert sweep.steepest == pytest.approx(1e-5)  # from 4.85 to 2.0
    assert sweep.suggestion == sweep.valley


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    sweep = sweep_of([1.0, 1.1, 1.2, 1.3])
    assert (sweep.suggestion, sweep.valley, sweep.steepest) == (None, None, None)
    assert "suggestion none" in repr(sweep)
    assert sweep.plot().axes


def test_what_was_found_can_be_read_and_drawn() -> None:
    sweep = find_lr(toy_learner())
    assert repr(sweep).startswith(f"LRSweep(suggestion {sweep.suggestion:.2g}; valley {sweep.valley:.2g}, steepest")
    assert "stopped: the loss diverged" in repr(sweep)
    (axes,) = sweep.plot().axes
    assert axes.get_xscale() == "log"
    assert [line.get_label().split(":")[0] for line in axes.lines] == ["loss", "smoothed", "valley", "steepest"]


def test_a_drawing_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of([3.0, 2.0, 1.0])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"find_lr\(...\).plot\(\) needs matplotlib: pip install 'torch-fluxloop"):
        sweep.plot()


def test_there_is_a_row_per_step_and_a_suggestion_that_trains() -> None:
    learner = toy_learner()
    sweep = find_lr(learner, steps=100, end=1e-1)
    assert len(sweep.losses) == 100
    assert sweep.suggestion is not None
    learner.optimizer.param_groups[0]["lr"] = sweep.suggestion
    learner.fit(5)
    assert learner.model.value.item() == pytest.approx(3.0, abs=0.2)


def rates_seen(learner: Learner, **options: Any) -> tuple[LRSweep, list[list[float]]]:
    """Sweep, and give the learning rates of all groups at each step."""
    path = []

    def look(copied: Any) -> None:
        held = [copied.optimizer] if isinstance(copied.optimizer, torch.optim.Optimizer) else copied.optimizer
        path.append([group["lr"] for optimizer in held for group in optimizer.param_groups])

    hook = Hook(look)
    return find_lr(learner, callbacks=[hook], **options), path


class Hook(CustomCallback):
    """A hook that is not copied with the learner."""

    def __init__(self, look: Callable[[Any], None], event: Any = LossBegin, reads: str = "optimizer") -> None:
        super().__init__(look, event, reads=(reads,))

    def __deepcopy__(self, memo: Any) -> Hook:
        return self


def test_parameter_groups_keep_their_ratios() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.025}, {"params": model[1].parameters()}]
    data = TensorBatches(torch.ones(8, 2), torch.ones(8, 1), batch_size=2)
    learner = Learner(
        model, mse_loss, data=(data,), optimizer=torch.optim.SGD(groups, lr=0.1), default_callbacks=False, seed=0
    )
    sweep, path = rates_seen(learner, steps=5, end=1e-3)
    assert [largest for _, largest in path] == pytest.approx(list(sweep.learning_rates))
    assert [small for small, _ in path] == pytest.approx([0.25 * rate for rate in sweep.learning_rates])


class GAN(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        G, D = learner.model  # noqa: N806 - as the paper calls them
        with runstep(learner, self, real=batch) as (handle, state):
            state.fake = G(torch.randn(len(state.real), 2))
            handle(LossBegin())
            with learner.optimizing("D") as d:
                d.loss = softplus(-D(state.real)).mean() + softplus(D(state.fake.detach())).mean()
            with learner.optimizing("G") as g:
                g.loss = softplus(-D(state.fake)).mean()


def gan() -> Learner:
    torch.manual_seed(0)
    models = {"G": nn.Linear(2, 2), "D": nn.Linear(2, 1)}
    data = TensorBatches(torch.randn(16, 2), batch_size=4)
    optimizers = {"G": partial(torch.optim.Adam, lr=0.1), "D": partial(torch.optim.SGD, lr=0.2)}
    return Learner(models, data=(data,), optimizer=optimizers, default_callbacks=False, seed=0)


def test_any_phase_and_any_optimizer_can_be_searched() -> None:
    learner = gan()
    before = bits(learner)
    both, path = rates_seen(learner, phase=GAN(), steps=8, end=1e-2)
    assert [d for _, d in path] == pytest.approx(list(both.learning_rates))
    assert [g for g, _ in path] == pytest.approx([0.5 * rate for rate in both.learning_rates])
    one, path = rates_seen(learner, phase=GAN(), steps=8, end=1e-2, optimizer="G")
    assert [g for g, _ in path] == pytest.approx(list(one.learning_rates))
    assert {d for _, d in path} == {0.2}
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())


def test_the_loss_of_a_sweep_is_that_of_the_chosen_optimizer_or_the_sum() -> None:
    losses: list[dict[str, float]] = []
    hook = Hook(lambda view: losses.append({k: float(v) for k, v in view.step.losses.items()}), StepEnd, "step.losses")
    for name in (None, "G", "D"):
        losses.clear()
        sweep = find_lr(gan(), phase=GAN(), steps=8, end=1e-2, optimizer=name, callbacks=[hook])
        expected = [loss["D"] + loss["G"] if name is None else loss[name] for loss in losses]
        assert list(sweep.losses) == expected


def test_callbacks_that_the_phase_needs_run_on_the_copy() -> None:
    learner = noisy_learner()
    ema = EMA("model", 0.9)
    find_lr(learner, steps=5, callbacks=[ema])
    assert ema.num_averaged == 0
    assert "model@ema" not in learner.weights


def test_schedulers_of_the_learner_stay_out_of_the_sweep() -> None:
    torch_scheduler = LRScheduler(partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5), unit="step")
    learner = toy_learner(torch_scheduler)
    plain = toy_learner()
    assert find_lr(learner) == find_lr(plain)
    assert torch_scheduler.schedulers[None].last_epoch == 0


def test_data_that_can_be_iterated_once_only_is_refused_and_not_touched() -> None:
    def once() -> Iterator[Any]:
        yield from toy_learner().data.training

    data = once()
    learner = toy_learner(data=(data,))
    with pytest.raises(DataError, match="the 'training' data can be iterated once only, and find_lr would use it up"):
        find_lr(learner)
    assert len(list(data)) == 16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": 0.0}, ValueError, "expected 0 < start < end"),
        ({"start": 1.0, "end": 0.1}, ValueError, "expected 0 < start < end"),
        ({"steps": 1}, ValueError, "steps=1.*expected a whole number, 2 or more"),
        ({"smoothing": 1.0}, ValueError, "smoothing=1.0.*less than 1"),
        ({"phase": ValidationPhase()}, PhaseError, r"ValidationPhase\(\) was given to find_lr, and it does not train"),
        ({"phase": TrainingPhase}, PhaseError, "expected an instance"),
        ({"optimizer": "G"}, OptimizerError, "there is no optimizer 'G'"),
    ],
)
def test_what_cannot_be_swept_is_refused(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        find_lr(toy_learner(), **options)


def test_rates_of_zero_have_no_ratio() -> None:
    with pytest.raises(OptimizerError, match="all of them are 0; give one above 0"):
        find_lr(toy_learner(optimizer=partial(torch.optim.SGD, lr=0.0)))


def test_a_step_without_a_loss_is_named() -> None:
    class Silent(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]):
                pass

    with pytest.raises(LossError, match=r"Silent\(\) stores no loss in its step; find_lr needs state.loss"):
        find_lr(toy_learner(), phase=Silent())


def test_steps_that_are_all_cancelled_are_no_endless_sweep() -> None:
    def cancel(learner: Any) -> None:
        raise CancelStepException

    with pytest.raises(LossError, match="every step was cancelled"):
        find_lr(toy_learner(num_batches=2), steps=3, callbacks=[CustomCallback(cancel, StepBegin)])


def test_a_callback_may_end_the_sweep() -> None:
    def cancel(learner: Any) -> None:
        raise CancelFittingException("enough")

    hook = CustomCallback(cancel, EpochBegin)
    with pytest.raises(LossError, match="find_lr saw no finite loss: enough"):
        find_lr(toy_learner(), callbacks=[hook])


def test_inside_a_fit_there_is_no_sweep() -> None:
    learner = toy_learner()
    learner.add_callback(CustomCallback(lambda view: find_lr(learner), StepBegin))
    with pytest.raises(PhaseError, match="find_lr was called while the learner is running; call it before the fit"):
        learner.fit(1)
