from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from compiled_training import SGD, Every, both, full, gradients, graphs, learner, mlp, rows, weights
from torch import Tensor, nn

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    BackwardEnd,
    Callback,
    CancelStepException,
    GANPhase,
    GradientClip,
    Learner,
    LearningRate,
    Scheduler,
    SimCLRPhase,
    StepEnd,
    StopOnNaNLoss,
    TrainingPhase,
    TwoViews,
    UpdateEnd,
    linear,
    on,
)
from fluxloop.testing import assert_resumes_exactly

pytestmark = [pytest.mark.usefixtures("imported"), pytest.mark.slow]

EXACT = 1e-9


def double() -> nn.Module:
    return mlp().double()


def doubled() -> tuple[Tensor, Tensor]:
    xs, ys = rows()
    return xs.double(), ys


def windows(k: Any, epochs: int = 3, phases: Any = None, callbacks: Any = list, **options: Any) -> Any:
    """Train eagerly and compiled, with updates of k batches, in float64."""
    defaults = {"model": double, "data": (doubled(), doubled()), "tolerance": EXACT}
    return both(epochs, phases, callbacks, **{**defaults, **options}, how={"accumulate": k})


# Windows of several batches


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("k", [2, 3, 4])
def test_updates_of_ragged_batches_equal_those_of_large_ones_by_hand(k: int) -> None:
    batches = [
        (doubled()[0][n : n + m], doubled()[1][n : n + m]) for n, m in ((0, 20), (20, 7), (27, 9), (36, 20), (56, 14))
    ]
    _, made = windows(
        k,
        data=(batches,),
        callbacks=lambda: [GradientClip(0.1)],
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    )
    torch.manual_seed(0)
    model = double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    updates = 0
    for _ in range(3):
        for first in range(0, 5, k):
            joined = [torch.cat(parts) for parts in zip(*batches[first : first + k], strict=True)]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(joined[0]), joined[1]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            updates += 1
    for a, b in zip(model.parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    assert made.history[TrainingPhase].updates == {None: updates}


@pytest.mark.usefixtures("plain")
def test_a_window_has_a_graph_that_begins_one_that_adds_and_one_that_closes_whatever_its_size() -> None:
    xs, ys = doubled()
    batches = [(xs[n : n + 5], ys[n : n + 5]) for n in range(0, 70, 5)]
    _, made = windows(7, data=(batches,))
    assert graphs(made) == 3


@pytest.mark.usefixtures("plain")
def test_schedules_averages_and_counts_act_once_per_update() -> None:
    def callbacks() -> list[Callback]:
        return [EMA("model", 0.5), GradientClip(0.2), Scheduler({LearningRate: linear(6, 0.1, 0.01)}, unit="update")]

    eager, made = windows(2, callbacks=callbacks)
    assert made.history[TrainingPhase].updates == eager.history[TrainingPhase].updates == {None: 6}
    for name in ("training/loss", "training/grad_norm", "validation/loss"):
        assert made.history[name] == pytest.approx(eager.history[name], abs=EXACT)
    for a, b in zip(eager.weights["model@ema"].parameters(), made.weights["model@ema"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def gan(**options: Any) -> dict[str, Any]:
    data = torch.randn(42, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {
        "model": lambda: {"generator": nn.Linear(2, 3).double(), "critic": nn.Linear(3, 1).double()},
        "loss_fn": None,
        "optimizer": SGD,
        "data": ([data[n : n + 6] for n in range(0, 42, 6)],),
        **options,
    }


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("k", [2, {"critic": 3}, {"generator": 2, "critic": 4}])
@pytest.mark.parametrize("critic_steps", [1, 2])
def test_windows_of_several_optimizers(k: Any, critic_steps: int) -> None:
    def phases() -> list[Any]:
        return [GANPhase(noise=2, critic_steps=critic_steps)]

    eager, made = windows(k, phases=phases, **gan())
    assert made.history[GANPhase].updates == eager.history[GANPhase].updates


class Twice(TrainingPhase):
    """Updates twice in a step, with the halves of the batch."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        for xs, ys in zip(state.xs.chunk(2), state.ys.chunk(2), strict=True):
            learner.backward(learner.loss_fn(learner.model(xs), ys))
            learner.update()


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_windows_that_close_in_the_middle_of_a_step(k: int) -> None:
    eager, made = windows(k, phases=lambda: [Twice()])
    assert made.history[Twice].updates == eager.history[Twice].updates


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("k", [2, 3])
def test_a_body_that_adds_up_batches_itself_counts_them_as_one(every: int, k: int) -> None:
    eager, made = windows(k, 4, phases=lambda: [Every(every)])
    assert made.history[Every].updates == eager.history[Every].updates
    if made.updates.slots[0].first_step is not None:  # those of an open window
        for a, b in zip(gradients(eager), gradients(made), strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


class Later(Every):
    """Updates in the step after the one that computes gradients."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        if self.updates:
            learner.update()
        else:
            learner.backward(self.loss(learner, state))


@pytest.mark.usefixtures("plain")
def test_a_batch_may_be_counted_in_a_later_step() -> None:
    eager, made = windows(2, 4, phases=lambda: [Later(2)])
    assert made.history[Later].updates == eager.history[Later].updates


class Weighed(TrainingPhase):
    """Weighs a batch by a number that the step computes."""

    def weight(self, state: Any) -> Tensor:
        found: Tensor = state.xs.square().sum()
        return found


@pytest.mark.usefixtures("plain")
def test_a_weight_that_the_step_computes_is_part_of_the_graph() -> None:
    windows(2, phases=lambda: [Weighed()])
    windows(3, phases=lambda: [Weighed()], callbacks=lambda: [StopOnNaNLoss()])


class Cancels(TrainingPhase):
    """Cancels some steps once their gradients are there."""

    def __init__(self, *cancelled: int) -> None:
        self.cancelled = cancelled
        self.number = 0

    def finish(self, learner: Any, state: Any) -> None:
        self.number += 1
        if self.number in self.cancelled:
            raise CancelStepException


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("cancelled", [(4,), (5,), (6,), (4, 5), (5, 6, 7)])
def test_a_batch_of_a_step_that_is_cancelled_does_not_count(cancelled: tuple[int, ...]) -> None:
    batches = [(doubled()[0][n : n + m], doubled()[1][n : n + m]) for n, m in ((0, 9), (9, 5), (14, 9), (23, 5)) * 3]
    eager, made = windows(3, 1, lambda: [Cancels(*cancelled)], data=(batches,))
    assert made.history[Cancels].updates == eager.history[Cancels].updates


@pytest.mark.usefixtures("plain")
def test_an_open_window_resumes_to_the_bit() -> None:
    def make() -> Any:
        return learner(how={"accumulate": 2}, data=(rows(),))

    assert_resumes_exactly(make, epochs=3, at=[4, 5])
    assert_resumes_exactly(make, epochs=3, phases=lambda: [Every(2)], at=[6])


@pytest.mark.usefixtures("plain")
def test_a_copy_of_a_learner_goes_on_in_its_own_window() -> None:
    batches = [(doubled()[0][n : n + 7], doubled()[1][n : n + 7]) for n in range(0, 63, 7)]
    phase = TrainingPhase()
    found = []
    for compile in (False, "step"):
        made = learner(compile, how={"accumulate": 4}, model=double)
        for batch in batches[:6]:
            phase.step(made, batch)
        copied = copy.deepcopy(made)
        for each in (made, copied):
            for batch in batches[6:]:
                phase.step(each, batch)
            found.append(weights(each))
    for a, b in zip(found[0] * 3, [*found[1], *found[2], *found[3]], strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("bad", [2, 3, 4, 5])
def test_a_loss_that_is_not_finite_leaves_the_window_as_it_was(bad: int) -> None:
    xs, ys = doubled()
    batches = [(xs[n : n + 7], ys[n : n + 7]) for n in range(0, 63, 7)]
    batches[bad] = (batches[bad][0] * float("nan"), batches[bad][1])
    found = []
    for compile in (False, "step"):
        made = learner(compile, how={"accumulate": 3}, model=double, data=(batches,), callbacks=[StopOnNaNLoss()])
        assert f"step {bad + 1} of the run" in made.fit(1).stop_reason
        window = made.updates.slots[0].window
        found.append([*weights(made), *gradients(made), torch.tensor([window.count, float(window.weight)])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


class LeavesOut(Callback):
    """Leaves out batches whose first number is negative."""

    in_compiled_step = "inside"
    reads = ("step.xs",)

    @on(BackwardEnd, AbstractTrainingPhase)
    def leave_out(self, event: Any, phase: Any, learner: Any) -> None:
        if torch.compiler.is_compiling():
            learner.skip_update(learner.step.xs[0, 0] < 0)


@pytest.mark.usefixtures("plain")
def test_a_batch_that_is_left_out_weighs_nothing() -> None:
    xs, ys = doubled()
    xs[:, 0].abs_()
    batches = [(xs[n : n + m], ys[n : n + m]) for n, m in ((0, 5), (5, 7), (12, 9), (21, 5), (26, 7), (33, 9))]
    batches[4][0][0, 0] *= -1
    made = learner(how={"accumulate": 3}, model=double, data=(batches,), callbacks=[LeavesOut()])
    made.fit(1)
    eager = learner(False, how={"accumulate": 3}, model=double, data=(batches[:3],))
    eager.fit(1)
    second = learner(False, how={"accumulate": 2}, model=double, data=([batches[3], batches[5]],))
    with torch.no_grad():
        for a, b in zip(second.model.parameters(), eager.model.parameters(), strict=True):
            a.copy_(b)
    second.optimizer.load_state_dict(eager.optimizer.state_dict())
    second.fit(1)
    for a, b in zip(weights(second), weights(made), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.usefixtures("plain")
def test_layers_that_are_frozen_and_unfrozen_in_an_open_window() -> None:
    class Thaws(TrainingPhase):
        number = 0

        def finish(self, learner: Any, state: Any) -> None:
            self.number += 1
            for parameter in learner.model[0].parameters():
                parameter.requires_grad_(self.number % 5 != 0)

    windows(3, phases=lambda: [Thaws()])


def test_windows_in_graphs_of_inductor() -> None:
    xs, ys = doubled()
    windows(2, data=((xs[:64], ys[:64]),), callbacks=lambda: [GradientClip(0.1)])


# bf16


def halved(epochs: int = 3, phases: Any = None, callbacks: Any = list, **options: Any) -> Any:
    """Train eagerly and compiled in bf16: the graph, run as it was traced, has the casts of the step."""
    return both(epochs, phases, callbacks, **{"tolerance": 1e-6, "how": {"precision": "bf16"}, **options})


class Looks(Callback):
    """Keeps what handlers see of the type of what is computed: in them nothing is cast."""

    in_compiled_step = "after"
    reads = ("step.xs", "model")

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @on(UpdateEnd, AbstractTrainingPhase)
    @on(StepEnd)
    def look(self, event: Any, phase: Any, learner: Any) -> None:
        self.seen.append((learner.step.xs.float() @ torch.ones(16, 1)).dtype)


@pytest.mark.usefixtures("plain")
def test_a_graph_has_the_casts_of_an_eager_step_and_handlers_have_none() -> None:
    eager, made = halved(callbacks=lambda: [GradientClip(0.5), Looks()])
    single, _ = both()
    assert not torch.equal(weights(eager)[0], weights(single)[0])
    assert made.history["validation/loss"] == pytest.approx(eager.history["validation/loss"], rel=1e-5)
    assert made.model[0].weight.dtype == torch.float32
    looks = next(callback for callback in made.callbacks if isinstance(callback, Looks))
    assert set(looks.seen) == {torch.float32}
    assert made.step.preds.dtype == torch.float32  # from LossBegin on
    assert torch.equal(made.predict(rows()[0]), eager.predict(rows()[0]))
    assert not torch.is_autocast_enabled("cpu")


class Rounds(TrainingPhase):
    """Updates several times in a step, each time with what the update before made of the weights."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        for _ in range(3):
            learner.backward(learner.loss_fn(learner.model(state.xs), state.ys))
            learner.update()


@pytest.mark.usefixtures("plain")
def test_weights_that_were_cast_are_cast_anew_after_an_update_in_the_same_graph() -> None:
    halved(phases=lambda: [Rounds()], tolerance=1e-5)


@pytest.mark.usefixtures("plain")
def test_with_bf16_and_windows_of_several_batches() -> None:
    halved(how={"precision": "bf16", "accumulate": 2})


@pytest.mark.usefixtures("plain")
def test_with_bf16_with_several_optimizers() -> None:
    options = {**gan(), "model": networks, "data": (single_rows(),)}
    # An eager step casts a weight once, and adds up the gradients of its uses in bf16; a graph casts it for each use
    torch.set_autocast_cache_enabled(False)
    try:
        halved(phases=lambda: [GANPhase(noise=2)], **options)
    finally:
        torch.set_autocast_cache_enabled(True)
    halved(phases=lambda: [GANPhase(noise=2)], tolerance=1e-2, **options)


def networks() -> dict[str, nn.Module]:
    return {"generator": nn.Linear(2, 3), "critic": nn.Linear(3, 1)}


def single_rows() -> list[Tensor]:
    return [batch.float() for batch in gan()["data"][0]]


def test_what_a_step_has_in_float32_is_compiled_in_float32() -> None:
    torch.manual_seed(0)
    models = {"encoder": nn.Linear(4, 8), "projector": nn.Linear(8, 8)}
    half = Accelerator("cpu", precision="bf16", compile="step")
    made = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False, accelerator=half, seed=0)
    made.fit(1, phases=[SimCLRPhase(TwoViews(lambda xs: 2 * xs))])
    loss = made.step.loss
    assert loss.dtype == torch.float32
    assert loss != loss.bfloat16()  # nor was it rounded on the way


def test_with_bf16_in_graphs_of_inductor() -> None:
    halved(tolerance=2e-3, data=(full(),))
