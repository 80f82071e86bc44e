from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from by_hand import train
from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    Callback,
    CallbackConflictError,
    FeatureStats,
    GANPhase,
    Learner,
    Metric,
    Metrics,
    OptimizerError,
    PerOptimizerPhase,
    Recorder,
    StepBegin,
    StepEnd,
    StopOnNaNLoss,
    TensorBatches,
    Traces,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    on,
    runstep,
)
from fluxloop.callbacks import gradient_clip
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.gradient_clip import GradientClip
from fluxloop.testing import assert_observer, assert_same_bits, bits, toy_learner

BATCH, BATCHES = 4, 5

adam = partial(torch.optim.Adam, lr=0.01, fused=False)
sgd = partial(torch.optim.SGD, lr=0.1)


def batches() -> TensorBatches:
    generator = torch.Generator().manual_seed(0)
    xs = 5 * torch.randn(BATCH * BATCHES, 3, generator=generator)
    return TensorBatches(xs, torch.arange(BATCH * BATCHES) % 3, batch_size=BATCH)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))


def learner_of(*callbacks: Callback, model: Any = None, **options: Any) -> Learner:
    return Learner(
        net() if model is None else model,
        cross_entropy,
        callbacks=callbacks,
        seed=4,
        **{"data": (batches(), batches()), "optimizer": adam, "default_callbacks": False, **options},
    )


def train_by_hand(clip: Callable[[Any], Tensor | None], epochs: int) -> tuple[nn.Module, list[float]]:
    """Train in plain PyTorch; give the model and what clipping returned at each step."""
    model, norms = net(), []

    def noted(parameters: list[nn.Parameter]) -> None:
        norm = clip(parameters)
        norms.append(float("nan") if norm is None else norm.item())

    train(model, cross_entropy, adam(model.parameters()), batches(), epochs=epochs, clip=noted)
    return model, norms


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# Against PyTorch


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("norm_type", [0.5, 1.5, 2, 4, inf])
@pytest.mark.parametrize("max_norm", [0.05, 1])
def test_clipping_by_norm_equals_a_hand_written_loop_to_the_bit(max_norm: float, norm_type: float) -> None:
    by_hand, norms = train_by_hand(lambda ps: clip_grad_norm_(ps, max_norm, norm_type), 2)
    learner = learner_of(GradientClip(max_norm, norm_type=norm_type), Recorder())
    learner.fit(2)
    assert same(learner.model, by_hand)
    assert not same(learner.model, train_by_hand(lambda ps: None, 2)[0])
    averages = [sum(norms[begin : begin + BATCHES]) / BATCHES for begin in (0, BATCHES)]
    assert learner.history["training/grad_norm"] == pytest.approx(averages, rel=1e-12)


def test_clipping_by_value_equals_a_hand_written_loop_to_the_bit() -> None:
    by_hand, _ = train_by_hand(lambda ps: clip_grad_value_(ps, 0.01), 2)
    learner = learner_of(GradientClip(value=0.01))
    learner.fit(2)
    assert same(learner.model, by_hand)


@pytest.mark.parametrize("norm_type", [0.5, 1.5, 2.0, 4.0, inf])
def test_the_gradients_have_that_norm_after_it_and_the_step_tells_the_one_before(norm_type: float) -> None:
    before: list[Tensor] = []
    after: list[Tensor] = []

    class Look(Callback):
        reads = ("step.grads",)

        @on(UpdateEnd)
        def look(self, event: UpdateEnd, phase: Any, learner: Any) -> None:
            after.append(torch.cat([g.reshape(-1) for g in learner.step.grads.values()]).norm(norm_type))

    learner = learner_of(GradientClip(0.125, norm_type=norm_type), Look())
    trace = Traces({"norm": lambda learner: learner.step.grad_norm}, reads=("step.grad_norm",), phase=TrainingPhase)
    learner.add_callback(trace)
    learner.fit(1, phases=[TrainingPhase()])
    before = [norm for _, norm in learner.cbstate.traces[TrainingPhase]["norm"]]
    assert len(before) == len(after) == BATCHES
    assert all(norm > 0.125 for norm in before)
    torch.testing.assert_close(torch.stack(after), torch.full((BATCHES,), 0.125), rtol=1e-3, atol=0)


def test_small_gradients_stay_as_they_are() -> None:
    plain, clipped = learner_of(), learner_of(GradientClip(1000))
    plain.fit(2)
    clipped.fit(2)
    assert_same_bits(plain, clipped)


def test_a_largest_norm_of_0_keeps_all_weights_and_metrics_as_they_are() -> None:
    learner = learner_of(GradientClip(0), Recorder(), Metrics(), optimizer=sgd)
    learner.fit(3)
    assert same(learner.model, net())
    for data in ("training", "validation"):
        losses = learner.history[f"{data}/loss"]
        assert len(losses) == 3
        assert len(set(losses)) == 1


@pytest.mark.parametrize("value", [nan, inf])
def test_gradients_that_are_not_finite_become_what_torch_makes_of_them(value: float) -> None:
    def spoil(parameters: Any) -> None:
        parameters[0].grad[0, 0] = value

    def by_hand(parameters: Any) -> None:
        spoil(parameters)
        clip_grad_norm_(parameters, 1.0)

    class Spoil(Callback):
        writes = ("step.grads",)

        @on(UpdateBegin)
        def spoil(self, event: UpdateBegin, phase: Any, learner: Any) -> None:
            spoil(list(map(Grad, learner.step.grads.values())))

    class Grad:
        def __init__(self, grad: Any) -> None:
            self.grad = grad

    class After(GradientClip):
        run_after = (*GradientClip.run_after, Spoil)

    model, _ = train_by_hand(by_hand, 1)
    learner = learner_of(After(1), Spoil(), Recorder())
    learner.fit(1)
    assert all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(learner.model.parameters(), model.parameters(), strict=True)
    )
    assert not learner.history["training/grad_norm"][0] < inf


def test_a_frozen_parameter_and_one_without_a_gradient_are_left_out() -> None:
    learner = learner_of(GradientClip(0.1), Recorder())
    learner.model[0].requires_grad_(False)
    learner.fit(1)
    assert torch.equal(learner.model[0].weight, net()[0].weight)
    assert learner.model[0].weight.grad is None
    assert learner.history["training/grad_norm"][0] > 0.1


# Several optimizers


class Two(PerOptimizerPhase):
    """Each part of the network has a loss of its own size."""

    def loss(self, learner: Any, state: Any, name: str | None) -> Tensor:
        return cross_entropy(state.preds, state.ys) * (100 if name == "0" else 1)


def two(*callbacks: Callback) -> Learner:
    return learner_of(*callbacks, optimizer={"0": sgd, "2": sgd})


def test_each_optimizers_parameters_are_clipped_once_when_it_steps_and_whole_numbers_are_taken() -> None:
    by_hand = net()
    optimizers = [sgd(by_hand[0].parameters()), sgd(by_hand[2].parameters())]
    norms: list[list[float]] = [[], []]
    for xs, ys in batches():
        for index, part in enumerate((by_hand[0], by_hand[2])):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (cross_entropy(by_hand(xs), ys) * (1 if index else 100)).backward()
            norms[index].append(clip_grad_norm_(part.parameters(), 1).item())
            optimizers[index].step()
    learner = two(GradientClip(1), Recorder())
    learner.fit(1, phases=[Two()])
    assert same(learner.model, by_hand)
    metrics = learner.history.metrics[Two]
    assert metrics.keys() == {"grad_norm_0", "grad_norm_2"}
    assert metrics["grad_norm_0"] == pytest.approx([sum(norms[0]) / BATCHES])
    assert metrics["grad_norm_2"] == pytest.approx([sum(norms[1]) / BATCHES])
    assert learner.step.grad_norms["0"].item() == norms[0][-1]
    assert "grad_norm" not in learner.step


def test_the_gradients_of_the_other_optimizer_are_not_touched() -> None:
    kept: dict[str | None, dict[str, Tensor]] = {}

    class Both(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                learner.backward(cross_entropy(learner.model(state.xs), state.ys))
                before = {name: grad.clone() for name, grad in state.grads.items()}
                learner.update("2")
                kept.update({"before": before, "after": {name: grad.clone() for name, grad in state.grads.items()}})
                learner.update("0")

    two(GradientClip(0.01)).epoch(Both(), [next(iter(batches()))])
    for name, before in kept["before"].items():
        assert torch.equal(before, kept["after"][name]) is name.startswith("0."), name


def test_one_optimizers_gradients_alone_can_be_clipped() -> None:
    seen: dict[str, list[float]] = {"0": [], "2": []}

    class Look(Callback):
        reads = ("step.grads",)

        @on(UpdateEnd)
        def look(self, event: UpdateEnd, phase: Any, learner: Any) -> None:
            own = [g for name, g in learner.step.grads.items() if name.startswith(f"{event.name}.")]
            seen[str(event.name)].append(torch.cat([g.reshape(-1) for g in own]).norm().item())

    learner = two(GradientClip(0.5, optimizer="0"), Look(), Recorder())
    learner.fit(1, phases=[Two()])
    assert max(seen["0"]) < 0.50001
    assert max(seen["2"]) > 0.5
    assert list(learner.history.metrics[Two]) == ["grad_norm_0"]


def test_two_clip_two_optimizers_side_by_side() -> None:
    learner = two(GradientClip(0.5, optimizer="0"), GradientClip(0.25, optimizer="2"), Recorder())
    learner.fit(1, phases=[Two()])
    assert set(learner.history.metrics[Two]) == {"grad_norm_0", "grad_norm_2"}
    other = two(GradientClip(0.25, optimizer="2"), GradientClip(0.5, optimizer="0"), Recorder())
    other.fit(1, phases=[Two()])
    assert_same_bits(learner, other)


def test_two_that_clip_the_same_are_refused() -> None:
    with pytest.raises(CallbackConflictError, match="both clip the gradients of one optimizer; keep one"):
        learner_of(GradientClip(1), GradientClip(value=1))
    with pytest.raises(CallbackConflictError, match="both clip the gradients of one optimizer"):
        two(GradientClip(1), GradientClip(2, optimizer="2"))


def test_optimizers_of_a_tuple_of_models_have_numbers() -> None:
    def models() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        return nn.Linear(3, 3), nn.Linear(3, 3)

    class Each(PerOptimizerPhase):
        def loss(self, learner: Any, state: Any, name: str | None) -> Tensor:
            return cross_entropy(learner.model[int(name or 0)](state.xs), state.ys)

    learner = learner_of(GradientClip(0.1, optimizer=1), Recorder(), model=models())
    learner.fit(1, phases=[Each()])
    assert list(learner.history.metrics[Each]) == ["grad_norm_1"]


def test_the_blocks_of_a_gan_are_clipped_without_a_line_in_the_phase() -> None:
    def gan(*callbacks: Callback) -> Learner:
        torch.manual_seed(2)
        models = {"generator": nn.Linear(2, 3), "critic": nn.Linear(3, 1)}
        return learner_of(*callbacks, model=models, data=(next(iter(batches()))[0],), optimizer=sgd)

    still = gan(GradientClip(0))
    before = bits(still)
    still.fit(2, phases=[GANPhase(noise=2)])
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(still).items())
    learner = gan(GradientClip(1), Recorder())
    learner.fit(2, phases=[GANPhase(noise=2)])
    assert set(learner.history.metrics[GANPhase]) == {"grad_norm_generator", "grad_norm_critic"}
    assert not torch.equal(before["model.critic.weight"], learner.model.critic.weight)


def test_an_optimizer_that_there_is_not_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(OptimizerError, match=r"GradientClip\(optimizer='3'\): the learner has \['0', '2'\]"):
        two(GradientClip(optimizer="3"))
    with pytest.raises(OptimizerError, match="the learner has a single optimizer without a name: leave it out"):
        learner_of(GradientClip(optimizer="G"))


# With others


def test_metrics_may_read_the_norm_and_it_is_recorded_next_to_them_in_any_order() -> None:
    digests = set()
    for reverse in (False, True):
        norm = Metric(lambda norm: norm, name="norm", inputs=("grad_norm",), phase=AbstractTrainingPhase)
        given: list[Callback] = [
            GradientClip(0.5),
            Recorder(),
            Metrics(norm),
            EMA("model", 0.9),
            StopOnNaNLoss(),
            FeatureStats("preds"),
            Traces({"norm": lambda learner: learner.step.grad_norm}, phase=TrainingPhase),
        ]
        learner = learner_of(*(given[::-1] if reverse else given))
        learner.fit(2)
        digests.add(learner.callbacks.digest)
        assert learner.history["training/norm"] == pytest.approx(learner.history["training/grad_norm"])
        assert learner.history["training/grad_norm"][0] > 0.5
        assert "grad_norm" not in learner.history.metrics[ValidationPhase]
    assert len(digests) == 1


def test_without_a_recorder_it_clips_and_records_nothing() -> None:
    learner = learner_of(GradientClip(0.5))
    learner.fit(1)
    assert same(learner.model, train_by_hand(lambda ps: clip_grad_norm_(ps, 0.5), 1)[0])
    assert not learner.history.metrics[TrainingPhase]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_the_average_of_an_epoch_in_whose_middle_a_run_was_killed_is_that_of_the_whole_epoch(
    steps: int, tmp_path: Path
) -> None:
    class Kill(Callback):
        reads = ("cbstate.history",)

        @on(StepBegin, TrainingPhase)
        def kill(self, event: StepBegin, phase: Any, learner: Any) -> None:
            if learner.cbstate.history[phase].steps == steps:
                raise OSError("killed")

    whole, killed, resumed = (
        learner_of(GradientClip(0.5), Recorder(), *more)
        for more in ([], [Checkpointer(tmp_path, unit="step"), Kill()], [Checkpointer(tmp_path, unit="step")])
    )
    whole.fit(3)
    with pytest.raises(OSError, match="killed"):
        killed.fit(3)
    resumed.fit(3, resume=tmp_path)
    assert resumed.history["training/grad_norm"] == whole.history["training/grad_norm"]
    assert_same_bits(resumed, whole)


@pytest.mark.parametrize("at_once", [1, 2, 3, 128])
def test_an_epochs_average_is_that_of_its_steps_however_many_norms_are_added_up_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_clip, "FOLD_AFTER", at_once)
    _, norms = train_by_hand(lambda parameters: clip_grad_norm_(parameters, 0.5), 2)
    learner = learner_of(GradientClip(0.5), Recorder())
    learner.fit(2)
    wanted = [sum(norms[:BATCHES]) / BATCHES, sum(norms[BATCHES:]) / BATCHES]
    assert learner.history["training/grad_norm"] == pytest.approx(wanted, rel=1e-12)


def test_a_sum_of_an_older_checkpoint_goes_on() -> None:
    _, norms = train_by_hand(lambda parameters: clip_grad_norm_(parameters, 0.5), 1)
    clip = GradientClip(0.5)
    learner = learner_of(clip, Recorder())

    def as_it_was(step: int) -> None:
        if step == 2:  # all norms so far in one sum, as they were kept before
            total = sum(clip._waiting.pop("grad_norm"), torch.zeros((), dtype=torch.float64))
            clip._totals["grad_norm"] = total

    @define
    class Older(Callback):
        reads = ("cbstate.history",)
        run_after = (GradientClip, Recorder)

        @on(StepEnd, TrainingPhase)
        def change(self, event: StepEnd, phase: Any, learner: Any) -> None:
            as_it_was(learner.cbstate.history[phase].steps)

    learner.add_callback(Older())
    learner.fit(1)
    assert learner.history["training/grad_norm"] == pytest.approx([sum(norms) / BATCHES], rel=1e-12)


def test_a_clip_that_clips_nothing_changes_nothing() -> None:
    assert_observer(GradientClip(1e9), learner_of)


# What it is given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": "1"}, r"GradientClip\(max_norm='1'\) was given; expected a number, 0 or more"),
        ({"max_norm": True}, r"GradientClip\(max_norm=True\)"),
        ({"max_norm": None}, r"GradientClip\(max_norm=None\)"),
        ({"max_norm": -1}, r"GradientClip\(max_norm=-1\)"),
        ({"max_norm": nan}, r"GradientClip\(max_norm=nan\)"),
        ({"norm_type": 0}, r"GradientClip\(norm_type=0\) was given; expected a number, above 0"),
        ({"norm_type": "fro"}, r"GradientClip\(norm_type='fro'\)"),
        ({"value": -0.5}, r"GradientClip\(value=-0.5\) was given; expected a number, 0 or more"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientClip(**options)


def test_it_shows_what_it_was_given() -> None:
    assert repr(GradientClip(1)) == "GradientClip(max_norm=1, norm_type=2.0, value=None, optimizer=None)"


def test_clipping_sees_the_gradients_that_the_optimizer_steps_with_not_scaled_ones() -> None:
    class Scaled(Accelerator):
        """Computes gradients of a scaled loss, and has them unscaled before an update begins."""

        def backward(self, loss: Tensor, parameters: Any, **options: Any) -> None:
            super().backward(loss * 1024, parameters, **options)
            for parameter in parameters:
                parameter.grad /= 1024

    norms: dict[str, list[float]] = {}
    for name, accelerator in (("plain", Accelerator("cpu")), ("scaled", Scaled("cpu"))):
        learner = toy_learner(GradientClip(0.25), Recorder(), accelerator=accelerator)
        learner.fit(1, phases=[TrainingPhase()])
        norms[name] = [*learner.history["training/grad_norm"], learner.model.value.item()]
    assert norms["plain"] == norms["scaled"]
    assert norms["plain"][0] > 0.25
