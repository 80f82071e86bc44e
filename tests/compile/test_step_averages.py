"""Averages of weights that a compiled step moves itself, against eager steps and hand-written averages."""

from __future__ import annotations

import copy
from collections.abc import Callable as Function
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_training import ADAM, SGD, both, graphs, learner, rows, weights
from torch import Tensor, nn

from fluxloop import (
    EMA,
    BackwardEnd,
    Callback,
    CancelStepException,
    CustomCallback,
    GANPhase,
    Learner,
    LRScheduler,
    Phase,
    StepEnd,
    StopOnNaNLoss,
    TrainingPhase,
    on,
    throttle,
)
from fluxloop.compute.models import move_towards
from fluxloop.compute.pairs import Pairs

pytestmark = pytest.mark.usefixtures("imported")


def warm_up(count: int) -> float:
    return min(0.95, (1 + count) / (10 + count))


@pytest.fixture
def by_callbacks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the moves of averages that callbacks make themselves."""
    moved: list[str] = []

    def noting(self: Pairs, average: nn.Module, live: nn.Module, weight: Any, buffers: Any, whose: str) -> None:
        if weight != 1:  # else it begins with the live weights
            moved.append(whose)
        move_towards(average, live, weight, buffers, whose)

    monkeypatch.setattr(Pairs, "move", noting)
    return moved


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 4))


def mixed() -> nn.Module:
    """A model of three precisions, the first layer frozen."""
    frozen = nn.Linear(16, 16).requires_grad_(False)
    model = nn.Sequential(frozen, nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    frozen.register_buffer("in_sixteen_bits", torch.randn(3, dtype=torch.bfloat16))
    frozen.register_buffer("in_sixty_four", torch.randn(3, dtype=torch.float64))
    return model


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("buffers", ["copy", "average", "keep"])
@pytest.mark.parametrize("decay", [0.9, 0.0, warm_up], ids=["number", "zero", "schedule"])
@pytest.mark.parametrize("model", [normed, mixed])
def test_a_graph_averages_the_weights_to_the_bit_of_lerp(
    by_callbacks: list[str], model: Any, decay: Any, buffers: Any
) -> None:
    expected: list[nn.Module] = []

    def average_by_hand(made: Any) -> None:
        (average,) = expected
        weight = 1 - (decay(ema.num_averaged - 1) if callable(decay) else decay)
        move_towards(average, made.weights["model"], weight, {"copy": 1, "average": weight, "keep": 0}[buffers], "")

    ema = EMA("model", decay, buffers=buffers)
    made = learner(model=model, callbacks=[ema, CustomCallback(average_by_hand, StepEnd, TrainingPhase)])
    expected.append(copy.deepcopy(made.model))
    made.fit(7)  # 21 steps, each third of another shape
    assert ema.num_averaged == 21
    assert len(by_callbacks) == (decay != 0)  # in the first step of a run
    assert graphs(made) == 2
    found, wanted = made.weights["model@ema"].state_dict(), expected[0].state_dict()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def two_models() -> dict[str, nn.Module]:
    return {"G": nn.Linear(8, 16), "D": nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 1))}


def noise(count: int, device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, count * 8).reshape(count, 8)


def averages(of: Learner[Any]) -> list[Tensor]:
    views = [name for name in of.weights if "@" in name]
    return [tensor.clone() for name in views for tensor in of.weights[name].state_dict().values()]


def counts(of: Learner[Any]) -> list[int]:
    return [callback.num_averaged for callback in of.callbacks if isinstance(callback, EMA)]


def same(a: Learner[Any], b: Learner[Any], tolerance: float = 2e-6) -> None:
    assert counts(a) == counts(b)
    assert len(averages(a)) == len(averages(b)) > 0
    for one, other in zip(averages(a), averages(b), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("optimizer", [SGD, ADAM, partial(torch.optim.AdamW, lr=1e-3)], ids=["SGD", "unfused", "fused"])
def test_several_averages_follow_the_optimizers_of_their_models(by_callbacks: list[str], optimizer: Any) -> None:
    def emas() -> list[Callback]:
        return [EMA("G", 0.9), EMA("D", warm_up), EMA("D", 0.5, view="slow"), EMA("D.0", 0.8, view="part")]

    gan = {"phases": lambda: [GANPhase(noise=noise, critic_steps=2)], "model": two_models, "data": (rows()[0],)}
    eager, compiled = both(4, callbacks=emas, optimizer=optimizer, tolerance=2e-5, **gan)
    assert sorted(counts(compiled)) == [6, 12, 12, 12]
    # three in the critic's first step, all in the generator's: an optimizer's state is not made in a graph
    assert len(by_callbacks) - sum(counts(eager)) == 7
    same(eager, compiled, 2e-5)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("how", "outside"),
    [
        ({"accumulate": 3}, 1),
        ({"accumulate": 2, "precision": "bf16"}, 5),
    ],  # the last window of an epoch closes after it
    ids=str,
)
def test_of_a_window_the_last_batch_alone_moves_the_average(
    by_callbacks: list[str], how: dict[str, Any], outside: int
) -> None:
    eager, compiled = both(4, callbacks=lambda: [EMA("model", 0.9)], how=how, tolerance=2e-3 if len(how) > 1 else 2e-6)
    (updates,) = compiled.history[TrainingPhase].updates.values()
    assert counts(compiled) == counts(eager) == [updates]
    assert len(by_callbacks) - updates == outside
    same(eager, compiled, 2e-3 if len(how) > 1 else 2e-6)


class Clamps(TrainingPhase):
    """Clamps the weights after the body."""

    def finish(self, learner: Any, state: Any) -> None:
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter.clamp_(-0.1, 0.1)


class Clamp(Callback):
    """Clamps the weights at the end of the step."""

    writes = ("model.0",)

    @on(StepEnd, TrainingPhase)
    def clamp(self, event: Any, phase: Any, learner: Any) -> None:
        with torch.no_grad():
            learner.model[0].weight.clamp_(-0.1, 0.1)


class Doubled(EMA):
    """Moves twice."""

    @on(StepEnd, TrainingPhase)
    def end_step(self, event: Any, phase: Any, learner: Any) -> None:
        super().end_step(event, phase, learner)
        move_towards(learner.weights[self.average], learner.weights[self.model], 0.5, 1, "")


CASES: dict[str, tuple[Function[[], list[Callback]], type[Phase]]] = {
    "finish": (lambda: [EMA("model", 0.9)], Clamps),
    "writer": (lambda: [EMA("model", 0.9), Clamp()], TrainingPhase),
    "subclass": (lambda: [Doubled("model", 0.9)], TrainingPhase),
    "throttled": (lambda: [throttle(EMA("model", 0.9), StepEnd, freq=2)], TrainingPhase),
}


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("case", CASES)
def test_an_average_that_others_may_come_before_is_moved_at_the_end_of_the_step(
    by_callbacks: list[str], case: str
) -> None:
    callbacks, phase = CASES[case]
    eager, compiled = both(3, callbacks=callbacks, phases=lambda: [phase()])
    same(eager, compiled)
    assert len(by_callbacks) == 2 * sum(counts(eager))


class Spoiled(GANPhase):
    """A GAN whose generator's loss becomes NaN with a batch that says so."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"real": batch[0], "factor": batch[1]}

    def penalized(self, loss: Tensor, critic: Any, state: Any, fake: Tensor, labels: Any) -> Tensor:
        state.fake = state.fake * state.factor
        return loss


@pytest.mark.usefixtures("plain")
def test_an_update_that_is_left_out_moves_no_average() -> None:
    good, bad = torch.ones(()), torch.tensor(float("nan"))
    batches = [(rows()[0][:32], bad if number == 4 else good) for number in range(6)]
    made = []
    for compile in (False, "step"):
        emas = [EMA("G", 0.9), EMA("D", 0.5, buffers="keep")]
        each = learner(
            compile, two_models, data=(batches,), callbacks=[*emas, StopOnNaNLoss()], default_callbacks=False
        )
        with pytest.warns(UserWarning, match="the fit stops"):
            each.fit(1, phases=[Spoiled(noise=noise)])
        made.append(each)
    assert counts(made[1]) == [5, 4]  # the critic had stepped
    same(*made)
    for a, b in zip(*map(weights, made), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


class LeavesOut(Callback):
    """Leaves out the updates of a batch whose first number is negative: in a graph, and without one."""

    in_compiled_step = "inside"
    reads = ("step.xs",)

    @on(BackwardEnd, TrainingPhase)
    def leave_out(self, event: Any, phase: Any, learner: Any) -> None:
        negative = learner.step.xs[0, 0] < 0
        if torch.compiler.is_compiling():
            learner.skip_update(negative)
        elif negative:
            raise CancelStepException


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("decay", [0.9, warm_up], ids=["number", "schedule"])
def test_an_update_that_a_handler_leaves_out_counts_nowhere(decay: Any) -> None:
    xs, ys = rows()
    batches = [(xs[n : n + 8].abs(), ys[n : n + 8]) for n in range(0, 64, 8)]
    for number in (2, 5, 6):
        batches[number][0][0, 0] *= -1
    made = []
    for compile in (False, "step"):
        rates = LRScheduler(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7), unit="update")
        each = learner(compile, data=(batches,), callbacks=[LeavesOut(), EMA("model", decay), rates])
        each.fit(2)
        made.append(each)
    eager, compiled = made
    assert counts(eager) == counts(compiled) == [10]
    assert eager.history[TrainingPhase].updates == compiled.history[TrainingPhase].updates == {None: 10}
    assert eager.optimizer.param_groups[0]["lr"] == compiled.optimizer.param_groups[0]["lr"]
    same(*made)
    for a, b in zip(*map(weights, made), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("plain")
def test_a_run_goes_on_to_the_bit_from_a_checkpoint_in_a_new_learner_a_trained_one_and_a_copy(tmp_path: Path) -> None:
    def make() -> Learner[Any]:
        return learner(model=normed, callbacks=[EMA("model", warm_up)], default_callbacks=False)

    whole = make()
    whole.fit(2)
    whole.save(tmp_path / "half.pt")
    copied = copy.deepcopy(whole)
    whole.fit(2)
    new, trained = make(), make()
    trained.fit(3)
    for other in (new, trained):
        other.load(tmp_path / "half.pt")
    for other in (new, trained, copied):
        other.fit(2)
        assert counts(other) == counts(whole) == [12]
        for a, b in zip([*weights(whole), *averages(whole)], [*weights(other), *averages(other)], strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("plain")
def test_another_module_in_the_place_of_an_average_is_moved_from_then_on() -> None:
    made = learner(model=normed, callbacks=[EMA("model", 0.5)], data=(rows(),), default_callbacks=False)
    phase, batch = TrainingPhase(), [tuple(each[:32] for each in rows())]
    for _ in range(4):
        made.epoch(phase, batch)
    other = copy.deepcopy(made.weights["model@ema"])
    old = copy.deepcopy(other.state_dict())
    before, made.weights["model@ema"] = made.weights["model@ema"], other
    made.epoch(phase, batch)
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), old.values(), strict=True))
    wanted = copy.deepcopy(before)
    move_towards(wanted, made.model, 0.5, 1.0, "")
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_the_compiler_moves_averages_as_eager_steps_do() -> None:
    def emas() -> list[Callback]:
        return [EMA("model", warm_up, buffers="average")]

    eager, compiled = both(
        7, callbacks=emas, model=normed, tolerance=2e-5, data=([tuple(each[:32] for each in rows())] * 3,)
    )
    assert graphs(compiled) == 1
    same(eager, compiled, 1e-4)
