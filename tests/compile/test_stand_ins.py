from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_training import (
    ADAM,
    Every,
    Model,
    SpoiledGradient,
    both,
    gradients,
    graphs,
    learner,
    learner_of,
    rows,
    weights,
)
from torch import Tensor, nn

from fluxloop import Accelerator, Callback, CompileError, GradientClip, TrainingPhase, UpdateBegin, on

pytestmark = pytest.mark.usefixtures("imported")


# What a body, and a handler inside the graph, may do


class Asks(TrainingPhase):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        super().body(learner, handle, state)
        _ = learner.history


@pytest.mark.usefixtures("uncompiled")
def test_a_body_that_uses_more_of_the_learner_is_told_what_it_may_use() -> None:
    with pytest.raises(CompileError, match=r"uses learner.history.*finish\(learner, state\)"):
        learner_of(Model(lambda model, out: out)).fit(1, phases=[Asks()])


class Fails(Callback):
    in_compiled_step = "inside"
    writes = ("step.grads",)

    @on(UpdateBegin)
    def ask(self, event: Any, phase: Any, learner: Any) -> None:
        for gradient in learner.step.grads.values():
            float(gradient.sum())


@pytest.mark.usefixtures("uncompiled")
def test_a_handler_inside_the_graph_that_asks_for_a_number_is_named() -> None:
    with pytest.raises(CompileError, match="cannot be one graph") as caught:
        learner_of(Model(lambda model, out: out), callbacks=[Fails()]).fit(1)
    assert "raised by Fails at UpdateBegin" in "".join(getattr(caught.value.__cause__, "__notes__", []))


class Doubles(Callback):
    """Doubles the gradients inside the graph."""

    in_compiled_step = "inside"
    writes = ("step.grads",)

    @on(UpdateBegin)
    def double(self, event: Any, phase: Any, learner: Any) -> None:
        for name in learner.step.grads:
            learner.step.grads[name] = learner.step.grads[name] * 2


@pytest.mark.usefixtures("uncompiled")
def test_a_handler_inside_the_graph_reads_and_replaces_gradients() -> None:
    weights = []
    for accelerator in (Accelerator("cpu"), Accelerator("cpu", compile="step")):
        torch.manual_seed(0)
        made = learner_of(Model(lambda model, out: out), callbacks=[Doubles()], accelerator=accelerator)
        made.fit(2)
        weights.append(made.model.layer.weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.usefixtures("uncompiled")
def test_skip_update_belongs_to_a_step_that_is_compiled() -> None:
    made = learner_of(Model(lambda model, out: out))
    with pytest.raises(CompileError, match="outside of a step that is compiled"):
        made.skip_update(torch.tensor(True))


@pytest.mark.usefixtures("plain")
def test_an_update_with_a_closure_cannot_be_compiled() -> None:
    class WithClosure(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            def closure() -> Tensor:
                state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
                learner.backward(state.loss)
                loss: Tensor = state.loss
                return loss

            learner.update(closure=closure)

    with pytest.raises(CompileError, match="compiled = False"):
        learner().fit(1, phases=[WithClosure()])


# Losses and gradients that are not finite


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.usefixtures("plain")
def test_a_loss_that_is_not_finite_leaves_weights_and_state_as_they_are_and_ends_the_fit() -> None:
    xs, ys = rows()
    batches = [(xs[:32], ys[:32]), (xs[32:64], ys[32:64]), (xs[:32] * float("nan"), ys[:32]), (xs[:32], ys[:32])]
    eager, compiled = both(2, data=(batches,), optimizer=ADAM)
    assert graphs(compiled) == 1
    reason = "the loss became nan in TrainingPhase(), epoch 1, step 3 of the run"
    assert compiled.history.stop_reason == eager.history.stop_reason == reason
    assert compiled.history[TrainingPhase].steps == eager.history[TrainingPhase].steps == 2
    assert compiled.history[TrainingPhase].updates == eager.history[TrainingPhase].updates == {None: 2}
    steps = [state["step"].item() for state in compiled.optimizer.state.values()]
    assert steps == [2.0] * 4


class SpoiledNet(nn.Module):
    """Batches with a seven have a gradient that is NaN, those with NaN a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, xs: Tensor) -> Tensor:
        found: Tensor = SpoiledGradient.apply(self.layers(xs), (xs == 7.0).any())
        return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.parametrize("bad", [7.0, float("nan")])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.usefixtures("plain")
def test_a_compiled_step_that_is_not_finite_changes_neither_weights_nor_buffers_nor_counts(
    bad: float, window: int, clip: bool
) -> None:
    xs, ys = (tensor.clone() for tensor in rows())
    batches = [(xs[n : n + 8], ys[n : n + 8]) for n in range(0, 48, 8)]
    batches[-1][0][3, 2] = bad
    found = []
    for compile in (False, "step"):
        callbacks = [GradientClip(0.1)] if clip else []
        made = learner(compile, model=SpoiledNet, data=(batches,), callbacks=callbacks)
        history = made.fit(1, phases=[Every(window)])
        found.append((str(history.stop_reason), history[Every].steps, history[Every].updates, made.updates.count))
        found[-1] += ([g is not None and bool(g.isfinite().all()) for g in gradients(made)] if window == 2 else [],)
        expected = learner(False, model=SpoiledNet, data=(batches[:-1],), callbacks=callbacks)
        expected.fit(1, phases=[Every(window)])
        for a, b in zip(weights(made), weights(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert found[0] == found[1]
    assert found[0][0].endswith(f"Every(every={window}), epoch 1, step 6 of the run")
    assert ("the loss" if bad != bad else "layers.0.weight") in found[0][0]


class TwoBlocks(TrainingPhase):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        with learner.optimizing("D") as block:
            block.loss = learner.model.D(state.xs.nan_to_num()).square().mean()
        with learner.optimizing("G") as block:
            block.loss = SpoiledGradient.apply(learner.model.G(state.xs), (state.xs == 7.0).any()).square().mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.parametrize("bad", [7.0, float("nan")])
@pytest.mark.usefixtures("plain")
def test_of_two_compiled_blocks_the_update_before_the_bad_one_is_made_and_counted(bad: float) -> None:
    xs = rows()[0].clone()
    batches = [(xs[n : n + 8], 0) for n in range(0, 40, 8)]
    batches[3][0][0, 0] = bad
    found = []
    for compile in (False, "step"):
        model = lambda: {"G": nn.Linear(16, 2), "D": nn.Linear(16, 2)}  # noqa: E731
        made = learner(compile, model=model, data=(batches,), optimizer=ADAM)
        history = made.fit(1, phases=[TwoBlocks()])
        found.append((history.stop_reason, history[TwoBlocks].updates, weights(made)))
    assert found[0][:2] == found[1][:2]
    assert found[0][1] == {"D": 4, "G": 3}
    for a, b in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
