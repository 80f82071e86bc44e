from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    BackwardBegin,
    BackwardEnd,
    Callback,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    CheckpointError,
    CustomCallback,
    GANPhase,
    GradientClip,
    Learner,
    LearningRate,
    LogHistograms,
    LRScheduler,
    Metrics,
    OptimizerError,
    Recorder,
    Scheduler,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    Unfreeze,
    UpdateBegin,
    UpdateEnd,
    find_lr,
    linear,
    on,
    runstep,
)
from fluxloop.logging import Memory
from fluxloop.testing import EventRecorder, assert_resumes_exactly
from toys import Do

ROWS = 103


def data(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    xs = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    return xs, torch.randn(rows, 1, dtype=torch.float64, generator=generator)


def net(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def learner(batch_size: int, accumulate: Any, *callbacks: Any, rows: int = ROWS, **options: Any) -> Learner:
    made = {"optimizer": partial(torch.optim.AdamW, lr=1e-2, fused=False), "loss_fn": nn.MSELoss()} | options
    return Learner(
        made.pop("model", None) or net(),
        data=(made.pop("source", None) or TensorBatches(*data(rows), batch_size=batch_size, shuffle=True),),
        callbacks=[Recorder(), *callbacks],
        default_callbacks=False,
        accelerator=Accelerator("cpu", accumulate=accumulate),
        seed=3,
        **made,
    )


def weights(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for model in learner.models.values() for p in model.parameters()])


def assert_equal(one: Learner, other: Learner) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=1e-12)


# The gradient of one large batch


@pytest.mark.parametrize(("small", "k"), [(7, 4), (10, 3), (26, 4), (50, 9)])
@pytest.mark.parametrize("clip", [False, True])
def test_several_batches_make_the_update_of_one_large_one_also_where_the_last_are_ragged(
    small: int, k: int, clip: bool
) -> None:
    clipping = [[GradientClip(0.3)] if clip else [] for _ in range(2)]
    large, parts = learner(small * k, 1, *clipping[0]), learner(small, k, *clipping[1])
    large.fit(3)
    parts.fit(3)
    assert_equal(large, parts)
    assert parts.history[TrainingPhase].updates == large.history[TrainingPhase].updates
    assert parts.history[TrainingPhase].steps == 3 * -(-ROWS // small)


def test_the_gradients_are_to_the_bit_those_of_a_loop_by_hand_that_weighs_and_divides() -> None:
    ours, by_hand = learner(16, 3, rows=100, optimizer=partial(torch.optim.SGD, lr=0.1)), net()
    batches = [*TensorBatches(*data(100), batch_size=16)]
    ours.fit(2, data=(batches,))
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.1)
    for _ in range(2):
        for start in range(0, len(batches), 3):
            window = batches[start : start + 3]
            optimizer.zero_grad()
            for xs, ys in window:
                (nn.functional.mse_loss(by_hand(xs), ys) * float(len(xs))).backward()
            for parameter in by_hand.parameters():
                assert parameter.grad is not None
                parameter.grad /= float(sum(len(xs) for xs, _ in window))
            optimizer.step()
    assert torch.equal(weights(ours), torch.cat([p.detach().flatten() for p in by_hand.parameters()]))


class Masked(TrainingPhase):
    """The loss is a mean over the rows whose target is positive, and so says the weight."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        kept = state.ys > 0
        state.kept = kept.sum()
        loss = ((learner.model(state.xs) - state.ys) ** 2)[kept].mean()
        state.loss = loss
        handle(BackwardBegin())
        learner.backward(loss)
        learner.update()

    def weight(self, state: Any) -> Any:
        return state.kept


def test_a_batch_weighs_what_its_phase_says() -> None:
    large, parts = learner(40, 1), learner(10, 4)
    large.fit(2, phases=[Masked()])
    parts.fit(2, phases=[Masked()])
    assert_equal(large, parts)


@pytest.mark.parametrize(
    "make",
    [
        lambda unit: Scheduler({LearningRate: linear(12, 0.1, 0.0)}, unit=unit),
        lambda unit: LRScheduler(
            partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=12), unit=unit
        ),
    ],
    ids=["Scheduler", "LRScheduler"],
)
@pytest.mark.parametrize("unit", ["step", "update", "epoch"])
def test_a_schedule_goes_on_once_per_update(make: Callable[[str], Any], unit: str) -> None:
    large, parts = learner(28, 1, make(unit)), learner(7, 4, make(unit))
    large.fit(3)
    parts.fit(3)
    assert_equal(large, parts)


def test_an_average_of_weights_moves_once_per_update() -> None:
    large, parts = learner(28, 1, EMA("model", 0.9)), learner(7, 4, EMA("model", 0.9))
    large.fit(3)
    parts.fit(3)
    for a, b in zip(large.weights["model@ema"].parameters(), parts.weights["model@ema"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def unsized(batch_size: int) -> Any:
    """Return batches of which nobody knows how many there are."""

    class Unsized:
        def __iter__(self) -> Any:
            return iter(TensorBatches(*data(), batch_size=batch_size))

    return Unsized()


@pytest.mark.parametrize("is_sized", [True, False])
def test_updates_are_announced_once_and_the_last_window_of_an_epoch_closes_before_it_ends(is_sized: bool) -> None:
    recorder = EventRecorder()
    learner(26, 3, recorder).fit(1, data=None if is_sized else (unsized(26),))
    inner = [name for name in recorder.events if name in ("StepEnd", "UpdateBegin", "UpdateEnd", "EpochEnd")]
    pair = ["UpdateBegin", "UpdateEnd"]
    last = [*pair, "StepEnd"] if is_sized else ["StepEnd", *pair]
    assert inner == ["StepEnd", "StepEnd", *pair, "StepEnd", *last, "EpochEnd"]


def test_all_that_follows_updates_follows_those_after_the_last_step_too() -> None:
    def run(batch_size: int, k: int) -> Learner:
        schedule = Scheduler({LearningRate: linear(12, 0.1, 0.0)})
        made = learner(batch_size, k, GradientClip(0.3), EMA("model", 0.9), schedule, Metrics())
        made.fit(3, data=(unsized(batch_size),))
        return made

    large, parts = run(28, 1), run(7, 4)
    assert_equal(large, parts)
    for a, b in zip(large.weights["model@ema"].parameters(), parts.weights["model@ema"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    norms = [made.history["training/grad_norm"] for made in (large, parts)]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-6, atol=0)


def test_an_epoch_that_is_cut_short_closes_its_window_too() -> None:
    large, parts = learner(35, 1), learner(7, 8)
    large.fit(1, steps_per_epoch=1)
    parts.fit(1, steps_per_epoch=5)
    assert_equal(large, parts)


def test_handlers_of_an_update_see_the_mean_gradient_of_all_batches() -> None:
    batches = [*TensorBatches(*data(90), batch_size=10)]
    seen: list[Any] = []
    waits: list[bool] = []
    ours = learner(
        *(10, 3),
        Do(lambda learner: seen.append(learner.step.grads["0.weight"].clone()), UpdateBegin),
        CustomCallback(lambda learner: waits.append(learner.is_accumulating), StepEnd),
    )
    ours.fit(1, data=(batches[:3],))
    assert waits == [True, True, False]
    model = net()
    xs, ys = (torch.cat([batch[place] for batch in batches[:3]]) for place in (0, 1))
    nn.functional.mse_loss(model(xs), ys).backward()
    torch.testing.assert_close(seen, [next(model.parameters()).grad], rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_sized", [True, False])
def test_a_learning_rate_is_tried_with_each_update_and_its_loss_is_that_of_all_batches(is_sized: bool) -> None:
    sweeps = []
    for batch_size, k in ((28, 1), (7, 4)):
        made = learner(batch_size, k, optimizer=torch.optim.SGD)
        if not is_sized:
            made = learner(batch_size, k, optimizer=torch.optim.SGD, source=unsized(batch_size))
        sweeps.append(find_lr(made, steps=20))
    large, parts = sweeps
    assert parts.learning_rates == large.learning_rates
    assert parts.losses == pytest.approx(large.losses, rel=1e-12)


@pytest.mark.parametrize("is_sized", [True, False])
def test_parts_are_unfrozen_after_so_many_updates(is_sized: bool) -> None:
    def run(batch_size: int, k: int) -> Learner:
        made = learner(batch_size, k, Unfreeze({"0": 5, "2": 0}, unit="step"))
        made.fit(2, data=None if is_sized else (unsized(batch_size),))
        return made

    assert_equal(run(28, 1), run(7, 4))


@pytest.mark.parametrize("is_sized", [True, False])
def test_histograms_are_those_of_updates(is_sized: bool) -> None:
    shown = []
    for batch_size, k in ((28, 1), (7, 4)):
        made = learner(batch_size, k, LogHistograms(memory := Memory(), of="gradients", every=1))
        made.fit(2, data=None if is_sized else (unsized(batch_size),))
        shown.append([record for record in memory.records if record.group == ("step", "gradients")])
    large, parts = shown
    assert len(large) == len(parts) == 4 * 2 * 4  # parameters, epochs, updates
    for one, other in zip(large, parts, strict=True):
        assert one.name == other.name
        torch.testing.assert_close(*(each.loggable.values for each in (one, other)), rtol=0, atol=1e-12)


class Rows:
    """Noise that is the same for a row in batches of any size."""

    def __init__(self, number: int) -> None:
        self.rows = torch.randn(number, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.place = 0

    def __call__(self, count: int, device: torch.device) -> Tensor:
        begin, self.place = self.place, (self.place + count) % len(self.rows)
        return self.rows[begin : begin + count]


@pytest.mark.parametrize("is_sized", [True, False])
def test_the_generators_turn_comes_after_as_many_updates_of_the_critic(is_sized: bool) -> None:
    def run(batch_size: int, k: int) -> Learner:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            models = {"G": nn.Linear(4, 5).double(), "D": nn.Linear(5, 1).double()}
        made = learner(batch_size, k, model=models, loss_fn=None, optimizer=partial(torch.optim.SGD, lr=0.1))
        rows = data()[0].split(batch_size)

        class Unsized:
            def __iter__(self) -> Any:
                return iter(rows)

        made.fit(5, data=(list(rows) if is_sized else Unsized(),), phases=[GANPhase(noise=Rows(ROWS), critic_steps=3)])
        return made

    large, parts = run(28, 1), run(7, 4)
    assert parts.history[GANPhase].updates == large.history[GANPhase].updates == {"D": 20, "G": 6}


# Several optimizers


class TwoBlocks(AbstractTrainingPhase):
    """Two networks, each with a block and a loss of its own."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"xs": batch[0], "ys": batch[1]}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        for name, model in learner.models.items():
            with learner.optimizing(name) as block:
                block.loss = ((model(state.xs) - state.ys) ** 2).mean()


def two(batch_size: int, accumulate: Any) -> Learner:
    return learner(batch_size, accumulate, model={"a": net(1), "b": net(2)}, loss_fn=None)


def test_each_optimizer_has_a_window_of_its_own() -> None:
    large, small, both = two(40, 1), two(10, 1), two(10, {"a": 4})
    for each in (large, small, both):
        each.fit(2, phases=[TwoBlocks()])
    a, b = both.models["a"], both.models["b"]
    for expected, model in ((large.models["a"], a), (small.models["b"], b)):
        for p, q in zip(expected.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert both.history[TwoBlocks].updates == {"a": 6, "b": 22}


@pytest.mark.parametrize("accumulate", [{"c": 2}, {"A": 2}])
def test_a_name_that_is_no_optimizers_is_an_error(accumulate: Any) -> None:
    with pytest.raises(OptimizerError, match=r"expected names of optimizers, \['a', 'b'\]"):
        two(10, accumulate)


@pytest.mark.parametrize("accumulate", [0, -1, 2.0, True, "4", {"a": 0}, None])
def test_what_is_no_number_of_batches_is_an_error(accumulate: Any) -> None:
    with pytest.raises(ValueError, match="expected how many batches make one update"):
        Accelerator("cpu", accumulate=accumulate)


# Steps with more than one backward or update


class Twice(TrainingPhase):
    """Two losses are added up before the update."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        preds = learner.model(state.xs)
        state.loss = ((preds - state.ys) ** 2).mean()
        learner.backward(state.loss, retain_graph=True)
        learner.backward(preds.abs().mean())
        learner.update()


def test_losses_that_are_added_up_in_a_step_are_one_batch() -> None:
    large, parts = learner(28, 1), learner(7, 4)
    large.fit(2, phases=[Twice()])
    parts.fit(2, phases=[Twice()])
    assert_equal(large, parts)


class Thrice(TrainingPhase):
    """The same batch makes three updates."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        for _ in range(3):
            with learner.optimizing() as block:
                block.loss = ((learner.model(state.xs) - state.ys) ** 2).mean()


def test_each_update_that_is_asked_for_counts_as_a_batch() -> None:
    ours, plain = learner(10, 3), learner(10, 1)
    ours.fit(1, phases=[Thrice()])
    plain.fit(1)
    assert_equal(ours, plain)  # three times the same gradient, at the same weights


def test_an_update_without_a_new_gradient_is_told() -> None:
    class Doubled(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            super().body(learner, handle, state)
            learner.update()

    with pytest.warns(UserWarning, match="called twice for the optimizer, and no gradient was computed in between"):
        learner(10, 3).fit(1, phases=[Doubled()], steps_per_epoch=2)


def test_a_closure_is_refused_as_it_computes_gradients_of_one_batch() -> None:
    class Closing(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            def closure() -> Any:
                loss = ((learner.model(state.xs) - state.ys) ** 2).mean()
                learner.backward(loss)
                return loss

            learner.update(closure=closure)

    lbfgs = partial(torch.optim.LBFGS, lr=0.1)
    with pytest.raises(OptimizerError, match="whose updates are of 2 batches: a closure computes gradients of one"):
        learner(10, 2, optimizer=lbfgs).fit(1, phases=[Closing()])


def test_gradients_computed_by_hand_cannot_be_weighed() -> None:
    class ByHand(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            ((learner.model(state.xs) - state.ys) ** 2).mean().backward()
            learner.update()

    with pytest.raises(OptimizerError, match=r"expected learner\.backward\(loss\) in place of"):
        learner(10, 2).fit(1, phases=[ByHand()])


# Cancelled steps


@pytest.mark.parametrize("vetoed", [{1}, {2}, {3}, {4}, {2, 3}, {1, 2, 3}])
def test_a_batch_that_is_vetoed_does_not_count(vetoed: set[int]) -> None:
    number = 0

    def veto(learner: Learner) -> None:
        nonlocal number
        number += 1
        if number in vetoed:
            raise CancelStepException

    batches = [*TensorBatches(*data(80), batch_size=10)]
    ours = learner(10, 3, Do(veto, BackwardBegin))
    ours.fit(1, data=(batches,))
    without = learner(10, 3)
    without.fit(1, data=([batch for n, batch in enumerate(batches, 1) if n not in vetoed],))
    assert torch.equal(weights(ours), weights(without))


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_step_that_is_cancelled_after_its_update_was_asked_for_does_not_count(at: int) -> None:
    class Late(TrainingPhase):
        number = 0

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            super().body(learner, handle, state)
            self.number += 1
            if self.number == at and learner.is_accumulating:
                raise CancelStepException

    batches = [*TensorBatches(*data(60), batch_size=10)]
    ours = learner(10, 3)
    ours.fit(1, data=(batches,), phases=[Late()])
    counts = at in (1, 2, 5)
    without = learner(10, 3)
    without.fit(1, data=([b for n, b in enumerate(batches, 1) if n != at or not counts],))
    assert torch.equal(weights(ours), weights(without))


# Checkpoints and copies


def test_a_run_that_is_killed_anywhere_goes_on_to_the_bit() -> None:
    def make() -> Learner:
        return learner(17, 3, GradientClip(0.3), EMA("model", 0.9), Scheduler({LearningRate: linear(9, 0.1, 0.0)}))

    assert_resumes_exactly(make, epochs=2)


def test_a_run_with_two_windows_that_is_killed_anywhere_goes_on_to_the_bit() -> None:
    assert_resumes_exactly(lambda: two(17, {"a": 3, "b": 2}), epochs=2, phases=lambda: [TwoBlocks()])


def test_a_checkpoint_in_an_open_window_is_refused_where_windows_are_of_another_size(tmp_path: Path) -> None:
    saved = learner(10, 4)
    saved.at_safe_point(lambda: saved.trained_steps == 2 and saved.save(tmp_path / "state.pt"))
    saved.fit(1)
    other = learner(10, 2)
    before = weights(other)
    with pytest.raises(
        CheckpointError, match=r"gradients of 2 of 4 batches wait .* expected Accelerator\(accumulate=4\)"
    ):
        other.load(tmp_path / "state.pt")
    assert torch.equal(weights(other), before)


def test_a_copy_made_in_an_open_window_begins_one_of_its_own() -> None:
    copies: list[Learner] = []

    def copy_second(learner: Learner) -> None:
        if len(copies) < 1 and learner.is_accumulating:
            copies.append(copy.deepcopy(learner))

    ours, plain = learner(10, 3, Do(copy_second, StepEnd)), learner(10, 3)
    ours.fit(1)
    plain.fit(1)
    assert torch.equal(weights(ours), weights(plain))
    with pytest.warns(UserWarning, match="gradients of 1 batch of TrainingPhase still wait"):
        copies[0].fit(1)
    assert weights(copies[0]).isfinite().all()


def test_a_loop_of_ones_own_accumulates_too() -> None:
    ours, plain = learner(10, 3), learner(30, 1)
    phase = TrainingPhase()
    xs, ys = data(60)
    for made, rows in ((ours, 10), (plain, 30)):
        for start in range(0, 60, rows):
            with runstep(made, phase, xs=xs[start : start + rows], ys=ys[start : start + rows]) as (_, state):
                state.loss = nn.functional.mse_loss(made.model(state.xs), state.ys)
                made.backward(state.loss)
                made.update()
    assert_equal(ours, plain)


def test_a_frozen_part_stays_and_one_unfrozen_later_takes_part() -> None:
    def run(batch_size: int, k: int) -> Learner:
        model = net()
        made = learner(batch_size, k, model=model)
        first = model[0]  # type: ignore[index]  # a Sequential
        first.requires_grad_(False)
        made.fit(1)
        first.requires_grad_(True)
        made.fit(1)
        return made

    assert_equal(run(28, 1), run(7, 4))


# Meetings with what else a step may do


class Joint(AbstractTrainingPhase):
    """Two networks with an optimizer each, and one loss of both."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"xs": batch[0], "ys": batch[1]}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.loss = sum(((model(state.xs) - state.ys) ** 2).mean() for model in learner.models.values())
        learner.backward(state.loss)
        learner.update()


def test_one_loss_of_several_optimizers_has_a_window_for_each() -> None:
    large, small, both = two(30, 1), two(10, 1), two(10, {"b": 3})
    for each in (large, small, both):
        each.fit(2, phases=[Joint()])
    for expected, name in ((small, "a"), (large, "b")):
        pairs = zip(expected.models[name].parameters(), both.models[name].parameters(), strict=True)
        for p, q in pairs:
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert both.history[Joint].updates == {"a": 22, "b": 8}


def test_after_an_update_of_one_optimizer_that_is_cancelled_the_windows_of_both_go_on() -> None:
    class Veto(Callback):
        draws = False
        number = 0

        @on(UpdateBegin, AbstractTrainingPhase)
        def veto(self, event: UpdateBegin, phase: Any, learner: Any) -> None:
            if event.name == "b":
                self.number += 1
                if self.number == 1:
                    raise CancelStepException

    ours = learner(10, 3, Veto(), model={"a": net(1), "b": net(2)}, loss_fn=None)
    ours.fit(1, phases=[Joint()])
    assert ours.history[Joint].updates == {"a": 4, "b": 4}  # b's in the steps 4, 7, 10 and 11


def test_gradients_that_a_handler_replaces_in_an_open_window_are_used() -> None:
    def replace(learner: Learner) -> None:
        step = learner.step
        step.grads = {name: None if grad is None else torch.zeros_like(grad) for name, grad in step.grads.items()}

    number = 0

    def in_the_first_two(learner: Learner) -> None:
        nonlocal number
        number += 1
        if number < 3:
            replace(learner)

    sgd = partial(torch.optim.SGD, lr=0.1)
    batches = [*TensorBatches(*data(30), batch_size=10)]
    ours = learner(10, 3, Do(in_the_first_two, BackwardEnd), optimizer=sgd)
    ours.fit(1, data=(batches,))
    last = learner(10, 1, optimizer=partial(torch.optim.SGD, lr=0.1 / 3))
    last.fit(1, data=(batches[2:],))
    assert_equal(ours, last)


def test_a_batch_that_is_cancelled_among_those_of_an_accumulation_by_hand_leaves_the_weight_of_the_others() -> None:
    class ByHand(TrainingPhase):
        """Gradients of two steps are one batch; the step between them is cancelled."""

        def __init__(self, cancels: bool) -> None:
            super().__init__()
            self.number, self.cancels = 0, cancels

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            self.number += 1
            if self.number == 2 and not self.cancels:
                self.number += 1
            state.loss = ((learner.model(state.xs) - state.ys) ** 2).mean()
            learner.backward(state.loss)
            if self.number == 2:
                raise CancelStepException
            if self.number > 2:
                learner.update()

    xs, ys = data(38)
    sizes = [10, 4, 4, 10, 10]
    batches = [*zip(xs.split(sizes), ys.split(sizes), strict=True)]
    ours, without = learner(10, 3), learner(10, 3)
    ours.fit(1, data=(batches,), phases=[ByHand(True)])
    without.fit(1, data=(batches[:1] + batches[2:],), phases=[ByHand(False)])
    assert torch.equal(weights(ours), weights(without))


@pytest.mark.parametrize("is_sized", [True, False])
def test_an_update_that_is_cancelled_after_the_last_step_is_not_made_and_the_epoch_ends(is_sized: bool) -> None:
    number = 0

    def veto(learner: Learner) -> None:
        nonlocal number
        number += 1
        if number >= 4:
            raise CancelStepException

    ours, without = learner(10, 3, Do(veto, UpdateBegin)), learner(10, 3)
    batches = [*TensorBatches(*data(110), batch_size=10)]

    class Unsized:
        def __iter__(self) -> Any:
            return iter(batches)

    ours.fit(1, data=(batches if is_sized else Unsized(),))
    without.fit(1, data=(batches[:9],))
    assert torch.equal(weights(ours), weights(without))
    assert ours.history.cycles == 1
    assert not ours.is_accumulating


@pytest.mark.parametrize("event", [BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, StepEnd])
def test_an_epoch_that_is_cancelled_anywhere_leaves_no_window_open(event: Any) -> None:
    number = 0

    def cancel(learner: Learner) -> None:
        nonlocal number
        number += 1
        if number == (2 if event in (UpdateBegin, UpdateEnd) else 5):
            raise CancelEpochException

    ours = learner(10, 3, Do(cancel, event))
    ours.fit(1)
    assert not ours.is_accumulating
    assert ours.history[TrainingPhase].updates == {None: 2}


def test_a_fit_after_one_that_was_cancelled_in_a_window_says_what_is_dropped() -> None:
    def cancel(learner: Learner) -> None:
        if learner.history[TrainingPhase].steps == 4:
            raise CancelFittingException("enough")

    ours = learner(10, 3, Do(cancel, StepEnd))
    ours.fit(1)
    with pytest.warns(UserWarning, match="gradients of 1 batch of TrainingPhase still wait"):
        ours.fit(1)


def test_an_accelerator_of_ones_own_is_asked_for_each_backward_and_each_update() -> None:
    called: list[str] = []

    class Own(Accelerator):
        def backward(self, *args: Any, **options: Any) -> None:
            called.append("backward")
            super().backward(*args, **options)

        def update(self, *args: Any) -> None:
            called.append("update")
            super().update(*args)

    batches = [*TensorBatches(*data(60), batch_size=10)]
    own = Learner(net(), nn.MSELoss(), data=(batches,), accelerator=Own("cpu", accumulate=3), default_callbacks=False)
    own.fit(1)
    assert called == 2 * ["backward", "backward", "backward", "update"]


def test_without_windows_the_updates_of_a_learner_are_plain() -> None:
    assert not learner(10, 1).updates.is_windowed
    assert learner(10, 2).updates.is_windowed
