from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    BackwardBegin,
    BYOLPhase,
    CancelStepException,
    CheckpointError,
    CustomCallback,
    Data2VecPhase,
    DiffusionPhase,
    DINOPhase,
    DINOv2Phase,
    FlowMatchingPhase,
    GANPhase,
    GradientClip,
    IBOTPhase,
    IJEPAPhase,
    Learner,
    LeJEPAPhase,
    LinearProbe,
    LossBegin,
    Metrics,
    MoCoV3Phase,
    MSNPhase,
    NNCLRPhase,
    OptimizerError,
    SimCLRPhase,
    StepBegin,
    StepEnd,
    SwAVPhase,
    TensorBatches,
    TrainingPhase,
    TwoViews,
    UpdateBegin,
    ValidationPhase,
    accuracy,
    losses,
    runstep,
)
from fluxloop.compute.precision import LossScale
from fluxloop.testing import assert_resumes_exactly
from toys import BrokenError, Do

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def data(rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def net(seed: int = 1) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def learner(precision: Any, *callbacks: Any, accumulate: Any = 1, **options: Any) -> Learner:
    made = {
        "model": net(),
        "loss_fn": nn.functional.cross_entropy,
        "data": (TensorBatches(*data(), batch_size=16),),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, fused=False),
    } | options
    accelerator = Accelerator("cpu", precision=precision, accumulate=accumulate)
    return Learner(made.pop("model"), made.pop("loss_fn"), callbacks=callbacks, accelerator=accelerator, seed=0, **made)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def by_hand(precision: str, epochs: int, clip: float | None = None) -> nn.Module:
    """Train as everybody does: autocast around forward and loss, and torch's scaler in fp16."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=False)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=2.0**16)
    for _ in range(epochs):
        for xs, ys in TensorBatches(*data(), batch_size=16):
            optimizer.zero_grad()
            with torch.autocast("cpu", HALVES[precision]):
                loss = nn.functional.cross_entropy(model(xs), ys)
            scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    return model


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_training_has_the_bits_of_a_loop_with_autocast_and_scaler(precision: str, clip: float | None) -> None:
    ours = learner(precision, *([] if clip is None else [GradientClip(clip)]))
    ours.fit(3)
    assert torch.equal(weights(ours.model), weights(by_hand(precision, 3, clip)))
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())


class Types(nn.Module):
    """A model that notes the type in which it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.seen: list[tuple[bool, torch.dtype]] = []

    def forward(self, xs: Tensor) -> Tensor:
        preds: Tensor = self.layer(xs)
        self.seen.append((self.training, preds.dtype))
        return preds


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_validation_and_prediction_compute_alike_and_predictions_are_in_single_precision(
    precision: str,
) -> None:
    model = Types()
    xs, ys = data()
    ours = learner(precision, model=model, data=((xs, ys), (xs, ys)))
    ours.fit(1)
    preds = ours.predict(xs)
    ours.evaluate((xs, ys))
    assert {dtype for _, dtype in model.seen} == {HALVES[precision]}
    assert {training for training, _ in model.seen} == {True, False}
    assert preds.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_handlers_and_the_updates_of_optimizers_compute_in_full_precision_and_the_body_does_not() -> None:
    seen: dict[str, bool] = {}
    on = partial(torch.is_autocast_enabled, "cpu")

    def noting(event: type) -> CustomCallback:
        return CustomCallback(lambda learner: seen.update({event.__name__: on()}), event)

    class Noting(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            seen["body"] = on()
            super().body(learner, handle, state)
            seen["after"] = on()

    class NotingSGD(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen["optimizer"] = on()
            return super().step(closure)

    events = (StepBegin, LossBegin, BackwardBegin, UpdateBegin, StepEnd)
    ours = learner("bf16", *map(noting, events), optimizer=partial(NotingSGD, lr=0.1))
    ours.fit(1, phases=[Noting()])
    expected = {event.__name__: False for event in events} | {"body": True, "after": True, "optimizer": False}
    assert seen == expected


def test_what_a_model_predicts_is_in_single_precision_from_loss_begin_on() -> None:
    seen: list[torch.dtype] = []

    def loss_fn(preds: Tensor, ys: Tensor) -> Tensor:
        seen.append(preds.dtype)
        return preds.sum(1).sub(ys).square().sum()  # a sum of bfloat16 numbers has three digits

    learner("bf16", loss_fn=loss_fn).fit(1)
    assert set(seen) == {torch.float32}


def test_metrics_are_computed_of_single_precision_and_agree_with_those_of_a_loop() -> None:
    xs, ys = data()
    ours = learner("bf16", Metrics(accuracy), data=((xs, ys), (xs, ys)))
    ours.fit(2)
    model = copy.deepcopy(ours.model).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        preds = model(xs).float()
    assert ours.history["validation/accuracy"][-1] == (preds.argmax(1) == ys).double().mean().item()


# The copies that autocast keeps of weights


class ManyUpdates(AbstractTrainingPhase):
    """Three updates of one network in one step, each by the weights that the one before has left."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"xs": batch}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.outputs = []
        for _ in range(3):
            with learner.optimizing() as block:
                output = learner.model(state.xs).mean()
                state.outputs.append(output.item())
                block.loss = output


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_each_update_in_a_step_is_by_the_weights_that_the_one_before_has_left(precision: str, fused: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 1, bias=False)
    optimizer = partial(torch.optim.Adam, lr=1.0, fused=fused)
    ours = learner(precision, model=model, loss_fn=None, data=([torch.ones(3, 4)],), optimizer=optimizer)
    first = model.weight.sum().item()
    ours.fit(1, phases=[ManyUpdates()])
    outputs = ours.step.outputs
    assert outputs == pytest.approx([first, first - 4, first - 8], abs=0.1)


def test_weights_that_a_handler_changes_are_those_that_the_step_goes_on_with() -> None:
    model = nn.Linear(4, 1, bias=False)

    def double(learner: Learner) -> None:
        with torch.no_grad():
            model.weight.mul_(2)

    seen: list[float] = []

    class Again(AbstractTrainingPhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"xs": batch}

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            seen.append(learner.model(state.xs).mean().item())
            handle(LossBegin())
            seen.append(learner.model(state.xs).mean().item())

    ours = learner("bf16", Do(double, LossBegin), model=model, loss_fn=None, data=([torch.ones(3, 4)],))
    ours.fit(1, phases=[Again()])
    assert seen[1] == pytest.approx(2 * seen[0], rel=0.02)


# The loss scale


class TwoHeads(AbstractTrainingPhase):
    """Two networks; the gradients of the second are not finite in the steps that are named."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad, self.number = bad, 0

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"xs": batch[0], "ys": batch[1]}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        for name, model in learner.models.items():
            with learner.optimizing(name) as block:
                loss = nn.functional.cross_entropy(model(state.xs).float(), state.ys)
                if name == "b" and self.number in self.bad:
                    loss = loss + 1e36 * model[0].weight.sum()  # finite, and infinite times the scale
                block.loss = loss

    def finish(self, learner: Any, state: Any) -> None:
        self.number += 1


def two(precision: str = "fp16", **options: Any) -> Learner:
    return learner(precision, model={"a": net(1), "b": net(2)}, loss_fn=None, default_callbacks=True, **options)


def test_an_optimizer_whose_gradients_are_not_finite_is_not_stepped_and_the_other_is() -> None:
    ours, without = two(), two()
    scale = ours.updates.scale
    assert scale is not None
    ours.fit(1, phases=[TwoHeads({2})])
    without.fit(1, phases=[TwoHeads(set())])
    assert ours.history[TwoHeads].updates == {"a": 4, "b": 3}
    assert torch.equal(weights(ours.models["a"]), weights(without.models["a"]))
    assert weights(ours.models["b"]).isfinite().all()
    assert scale.value == 2.0**15
    assert ours.history.stop_reason is None


def test_the_scale_grows_once_in_a_step_and_is_halved_once_in_a_step() -> None:
    scale = LossScale(8.0, interval=3)
    steps = [object() for _ in range(6)]
    for step in steps[:3]:
        scale.stepped(step)
        scale.stepped(step)  # of another optimizer
    assert (scale.value, scale.growth) == (16.0, 0)
    scale.stepped(steps[3])
    scale.overflowed(steps[4], "the optimizer")
    scale.overflowed(steps[4], "another")
    assert (scale.value, scale.growth) == (8.0, 0)
    scale.stepped(steps[5])
    assert (scale.value, scale.growth) == (8.0, 1)


def test_a_training_that_leaves_out_all_updates_says_so() -> None:
    class Infinite(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            state.loss = learner.model(state.xs).float().sqrt().nan_to_num().mean()
            learner.backward(state.loss)
            learner.update()

    ours = learner("fp16", data=([data(8)] * 50,), default_callbacks=False)
    with pytest.warns(UserWarning, match="the last 40 updates were left out"):
        ours.fit(1, phases=[Infinite()])


def test_a_loss_that_is_in_fp16_itself_begins_with_a_scale_that_fp16_can_hold() -> None:
    class Scores(AbstractTrainingPhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"xs": batch[0]}

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            with learner.optimizing() as block:
                block.loss = learner.model(state.xs).mean()

    updates: list[Any] = []
    ours = learner("fp16", Do(lambda learner: updates.append(1), UpdateBegin), loss_fn=None)
    ours.fit(1, phases=[Scores()])
    assert len(updates) == 4  # none was left out
    assert ours.updates.scale is not None
    assert ours.updates.scale.value == 2.0**15


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_in_less_precision_that_is_killed_goes_on_to_the_bit(precision: str, accumulate: int) -> None:
    assert_resumes_exactly(lambda: learner(precision, GradientClip(0.05), accumulate=accumulate), epochs=2)


def test_the_scale_is_in_checkpoints() -> None:
    ours = two()
    ours.fit(1, phases=[TwoHeads({1, 2})])
    assert ours.updates.scale is not None
    assert ours.updates.scale.value == 2.0**14
    other = two()
    other.load_state_dict(ours.state_dict())
    assert other.updates.scale is not None
    assert other.updates.scale.state() == ours.updates.scale.state()


@pytest.mark.parametrize(("before", "now"), [("fp16", "fp32"), ("fp32", "bf16"), ("bf16", "fp16")])
def test_a_run_is_not_resumed_in_another_precision(tmp_path: Any, before: str, now: str) -> None:
    ours = learner(before)
    ours.fit(1)
    ours.save(tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=rf"precision='{now}' was given, and the run has '{before}'"):
        learner(now).fit(2, resume=tmp_path / "state.pt")


@pytest.mark.parametrize("accumulate", [2, 3])
def test_scaled_gradients_of_several_batches_are_those_of_a_large_one(accumulate: int) -> None:
    ours = learner("fp16", accumulate=accumulate, optimizer=partial(torch.optim.SGD, lr=0.1))
    large = learner(
        "fp16",
        data=(TensorBatches(*data(), batch_size=16 * accumulate),),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    ours.fit(2)
    large.fit(2)
    torch.testing.assert_close(weights(ours.model), weights(large.model), rtol=0, atol=1e-4)


def test_a_closure_is_refused_in_fp16() -> None:
    class Closing(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            learner.update(closure=lambda: None)

    with pytest.raises(OptimizerError, match=r"expected Accelerator\(precision='bf16'\)|Expected Accelerator"):
        learner("fp16", optimizer=torch.optim.LBFGS).fit(1, phases=[Closing()])


def test_a_closure_computes_in_bf16_and_has_the_bits_of_a_loop_by_hand() -> None:
    class Closing(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            def closure() -> Tensor:
                loss = nn.functional.cross_entropy(learner.model(state.xs), state.ys)
                learner.backward(loss)
                state.loss = loss.detach()
                return loss

            learner.update(closure=closure)

    lbfgs = partial(torch.optim.LBFGS, lr=0.1)
    ours, model = learner("bf16", optimizer=lbfgs), net()
    ours.fit(2, phases=[Closing()])
    optimizer = lbfgs(model.parameters())
    for _ in range(2):
        for xs, ys in TensorBatches(*data(), batch_size=16):

            def closure(xs: Tensor = xs, ys: Tensor = ys) -> float:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(xs), ys)
                loss.backward()
                return loss.item()

            optimizer.step(closure)
    assert torch.equal(weights(ours.model), weights(model))


class Overflowing(TrainingPhase):
    """The gradients of the steps that are named are not finite; each step computes some twice, the second ones fine."""

    def __init__(self, bad: set[int], twice: bool) -> None:
        super().__init__()
        self.bad, self.twice, self.number = bad, twice, 0

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.loss = loss = nn.functional.cross_entropy(learner.model(state.xs).float(), state.ys)
        if self.number in self.bad:
            loss = loss + 1e36 * learner.model[0].weight.sum()
        self.number += 1
        learner.backward(loss, retain_graph=self.twice)
        if self.twice:
            learner.backward(state.loss)
        learner.update()


def test_gradients_that_are_not_finite_are_found_also_where_later_ones_are() -> None:
    ours = learner("fp16", default_callbacks=False)
    ours.fit(1, phases=[Overflowing({1}, twice=True)])
    assert weights(ours.model).isfinite().all()
    assert ours.updates.count == 3


def test_after_an_update_that_was_left_out_a_batch_weighs_its_own_rows() -> None:
    xs, ys = data()
    sizes = [16, 16, 16, 2, 7, 7]
    batches = [*zip(xs.split(sizes), ys.split(sizes), strict=True)]
    options: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=0.1), "default_callbacks": False}
    ours = learner("fp16", accumulate=3, data=(batches,), **options)
    ours.fit(1, phases=[Overflowing({2}, twice=False)])
    without = learner("fp16", accumulate=3, data=(batches[3:],), **options)
    assert without.updates.scale is not None
    without.updates.scale.value = 2.0**15
    without.fit(1)
    assert torch.equal(weights(ours.model), weights(without.model))
    assert ours.updates.count == 1


def test_a_classifier_beside_the_training_is_trained_in_single_precision() -> None:
    xs, ys = data()
    views = TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows))
    probe = LinearProbe("model", 3, entries=("features", "ys"))
    ours = learner("bf16", probe, loss_fn=None, data=((xs, ys), (xs, ys)))
    ours.fit(2, phases=[SimCLRPhase(views)])
    assert probe._probe is not None
    assert probe._probe.weight.dtype == torch.float32
    assert 0 <= ours.history["validation/linear_model"][-1] <= 1


def test_sparse_gradients_are_scaled_back_too() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding.from_pretrained(torch.ones(20, 3), freeze=False, sparse=True)

        def forward(self, xs: Tensor) -> Tensor:
            found: Tensor = self.rows(xs)
            return found.mean(1)

    def run(precision: str) -> Learner:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, 20, (64, 4), generator=generator), torch.randint(0, 3, (64,), generator=generator)
        options = {"optimizer": partial(torch.optim.SparseAdam, lr=0.1), "default_callbacks": False}
        made = learner(precision, model=Bag(), data=(TensorBatches(*rows, batch_size=16),), accumulate=2, **options)
        made.fit(2)
        return made

    less, full = run("fp16"), run("fp32")
    assert less.updates.count == full.updates.count == 4
    torch.testing.assert_close(weights(less.model), weights(full.model), rtol=0, atol=1e-2)


def test_weights_in_fp16_are_refused_where_losses_are_scaled() -> None:
    with pytest.raises(OptimizerError, match=r"the weights '0\.weight' are in float16 already.*model\.float\(\)"):
        learner("fp16", model=net().half())
    learner("bf16", model=net().bfloat16())


# Every way out of a step


@pytest.mark.parametrize("event", [StepBegin, LossBegin, BackwardBegin, UpdateBegin, StepEnd])
@pytest.mark.parametrize("error", [BrokenError, CancelStepException])
def test_autocast_is_off_again_whatever_way_a_step_is_left(event: Any, error: type[BaseException]) -> None:
    def leave(learner: Any) -> None:
        raise error

    ours = learner("bf16", Do(leave, event))
    if error is BrokenError:
        with pytest.raises(BrokenError):
            ours.fit(1)
    else:
        ours.fit(1)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") is torch.bfloat16


def test_autocast_around_a_step_of_ones_own_is_as_it_was_after_it() -> None:
    ours = learner("bf16")
    with torch.autocast("cpu", torch.float16):
        with runstep(ours, TrainingPhase(), xs=data()[0]) as (_, state):
            assert ours.model(state.xs).dtype == torch.bfloat16
        assert ours.model(data()[0]).dtype == torch.float16
    assert not torch.is_autocast_enabled("cpu")


def test_a_validation_in_the_middle_of_a_step_leaves_it_in_its_precision() -> None:
    seen: list[Any] = []

    class Validates(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            learner.epoch(ValidationPhase(), [data(8)])
            seen.append(learner.model(state.xs).dtype)
            super().body(learner, handle, state)

    learner("bf16").fit(1, phases=[Validates()])
    assert set(seen) == {torch.bfloat16}


def test_models_can_be_run_in_the_precision_by_hand() -> None:
    accelerator = Accelerator("cpu", precision="bf16")
    model, xs = net(), data()[0]
    with accelerator.autocast():
        assert model(xs).dtype == torch.bfloat16
    assert model(xs).dtype == torch.float32
    with Accelerator("cpu").autocast():
        assert model(xs).dtype == torch.float32


# Phases


def phases() -> dict[str, Any]:
    views = TwoViews(lambda xs: xs + 0.1 * torch.randn_like(xs))
    encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
    copied = copy.deepcopy(encoder).requires_grad_(False)
    teacher_moves = [EMA("student", 0.9, into="teacher")]
    return {
        "GAN": (GANPhase(noise=4), {"G": nn.Linear(4, 6), "D": nn.Linear(6, 1)}, []),
        "WGAN-GP": (
            GANPhase(noise=4, loss="wasserstein", critic_steps=2, gradient_penalty=10.0),
            {"G": nn.Linear(4, 6), "D": nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))},
            [],
        ),
        "BYOL": (
            BYOLPhase(views),
            {"student": encoder, "teacher": copied, "predictor": nn.Linear(8, 8)},
            [EMA("student", 0.9, into="teacher")],
        ),
        "DINO": (
            DINOPhase(views),
            {"student": encoder, "teacher": copied},
            [EMA("student", 0.9, into="teacher")],
        ),
        "flow matching": (FlowMatchingPhase(), Flow(), []),
        "MoCo v3": (
            MoCoV3Phase(views),
            {"student": encoder, "teacher": copied, "predictor": nn.Linear(8, 8)},
            [EMA("student", 0.9, into="teacher")],
        ),
        "MSN": (
            MSNPhase(views, temperature=0.5, sharpening=0.5),
            {"student": encoder, "teacher": copied, "prototypes": nn.Linear(8, 6, bias=False)},
            [EMA("student", 0.9, into="teacher")],
        ),
        "LeJEPA": (LeJEPAPhase(views, num_directions=16), {"encoder": encoder}, []),
        "NNCLR": (
            NNCLRPhase(views, queue_size=20),
            {"encoder": encoder, "projector": nn.Linear(8, 8), "predictor": nn.Linear(8, 8)},
            [],
        ),
        "SwAV": (
            SwAVPhase(views, queue_size=16),
            {"encoder": encoder, "projector": nn.Linear(8, 8), "prototypes": nn.Linear(8, 6, bias=False)},
            [],
        ),
        "iBOT": (IBOTPhase(images, patch_size=1, masks=hidden), seeing(), teacher_moves),
        "DINOv2": (DINOv2Phase(images, patch_size=1, masks=hidden, **SOFT), seeing(), teacher_moves),
        "I-JEPA": (SeenJEPA(1, masks=blocks), of_places(), teacher_moves),
        "data2vec": (SeenLayers(1, masks=hidden, layers=1), of_layers(), teacher_moves),
        "diffusion": (DiffusionPhase("edm"), Flow(), []),
        "own": (OwnGAN(), {"G": nn.Linear(4, 6), "D": nn.Linear(6, 1)}, []),
    }


def images(xs: Tensor) -> tuple[Tensor, Tensor]:
    """Make two views of rows, as images of 2 x 3 pixels."""
    first, second = (xs + 0.1 * torch.randn_like(xs) for _ in range(2))
    return first.reshape(-1, 1, 2, 3), second.reshape(-1, 1, 2, 3)


SOFT = {"teacher_temperature": 0.5, "student_temperature": 0.5}


def hidden(n: int, grid: Any, device: Any) -> Tensor:
    return torch.arange(6).expand(n, -1) < 2


def blocks(n: int, grid: Any, device: Any) -> tuple[Tensor, Tensor]:
    return torch.arange(3).expand(n, -1), torch.arange(3, 6).expand(n, 1, -1)


class Seeing(nn.Module):
    """Sees patches of one pixel, with a number in place of hidden ones; gives a class token and patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(1, 8), nn.Linear(8, 8)

    def patches(self, xs: Tensor, mask: Tensor | None) -> Tensor:
        pixels = xs.flatten(1)
        out: Tensor = self.embed((pixels if mask is None else pixels.masked_fill(mask, 0.0))[..., None])
        return out

    def forward(self, xs: Tensor, mask: Tensor | None) -> Any:
        patches = self.patches(xs, mask)
        token = self.mix(patches.mean(1)).tanh()
        return token, patches + token[:, None]


class SeeingLayers(Seeing):
    """Gives its layers."""

    def forward(self, xs: Tensor, mask: Tensor | None) -> Any:
        return [super().forward(xs, mask)[1]]


class Placed(Seeing):
    """Sees patches at places; and says what stands at others."""

    def forward(self, xs: Tensor, places: Tensor, wanted: Tensor | None = None) -> Tensor:
        if wanted is not None:
            mean: Tensor = self.mix(xs.mean(1, keepdim=True) + self.embed(wanted[..., None] / 6))
            return mean
        out: Tensor = self.mix(self.embed(xs) + self.embed(places[..., None] / 6))
        return out


class SeenJEPA(IJEPAPhase):
    """Makes images of rows."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries(batch.reshape(-1, 1, 2, 3))


class SeenLayers(Data2VecPhase):
    """Makes images of rows."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries(batch.reshape(-1, 1, 2, 3))


def with_teacher(student: nn.Module, **more: nn.Module) -> dict[str, nn.Module]:
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False), **more}


def seeing() -> dict[str, nn.Module]:
    return with_teacher(nn.ModuleDict({"encoder": Seeing(), "projector": nn.Linear(8, 5)}))


def of_layers() -> dict[str, nn.Module]:
    return with_teacher(SeeingLayers(), predictor=nn.Linear(8, 8))


def of_places() -> dict[str, nn.Module]:
    return with_teacher(Placed(), predictor=Placed())


class Flow(nn.Module):
    """A model of noised rows and their times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, xs: Tensor, times: Tensor) -> Tensor:
        out: Tensor = self.layer(xs * (1 + times[:, None]))
        return out


class OwnGAN(AbstractTrainingPhase):
    """A GAN with a step of its own, as a user writes it."""

    def step(self, learner: Any, batch: Any) -> Any:
        G, D = learner.model  # noqa: N806 - what papers call them
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = G(torch.randn(len(state.real), 4))
            with learner.optimizing("D") as d:
                d.loss = softplus(-D(state.real)).mean() + softplus(D(state.fake.detach())).mean()
            with learner.optimizing("G") as g:
                g.loss = softplus(-D(state.fake)).mean()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", list(phases()))
def test_a_phase_runs_unchanged_in_less_precision_near_what_it_is_in_full(name: str, precision: str) -> None:
    def run(chosen: str) -> Learner:
        torch.manual_seed(2)
        phase, models, callbacks = phases()[name]
        made = learner(
            chosen,
            *callbacks,
            model=models,
            loss_fn=None,
            data=(TensorBatches(data()[0], batch_size=16),),
            optimizer=partial(torch.optim.SGD, lr=0.05),
        )
        if chosen == "fp16":  # one that fits at once, so that no update is left out
            made.updates.scale.value = 2.0**8
        made.fit(2, phases=[phase])
        return made

    full, less = run("fp32"), run(precision)
    assert full.updates.count == less.updates.count
    for one, other in zip(full.models.values(), less.models.values(), strict=True):
        torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0.02)
        assert weights(other).dtype == torch.float32
    assert not torch.equal(*(torch.cat([*map(weights, made.models.values())]) for made in (full, less)))


@pytest.mark.parametrize("precision", ["fp8", "float32", None, "bfloat16", 16])
def test_an_unknown_precision_is_an_error(precision: Any) -> None:
    with pytest.raises(ValueError, match="expected 'fp32', 'bf16' or 'fp16'"):
        Accelerator("cpu", precision=precision)


def test_a_step_in_full_precision_has_no_part_in_this() -> None:
    assert Accelerator("cpu").casting is None
    assert not learner("fp32").updates.is_windowed


# Losses


def of_losses() -> dict[str, Any]:
    z1, z2 = (torch.randn(300, 12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    labels = torch.arange(300) % 5
    patches, mask = z1.reshape(30, 10, 12), torch.arange(300).reshape(30, 10) % 3 == 0
    directions = torch.nn.functional.normalize(z2[:12, :8], dim=0)
    return {
        "sigreg": (losses.sigreg, z1, directions),
        "sinkhorn": (losses.sinkhorn, z1),
        "ibot_loss": (losses.ibot_loss, patches, z2.reshape(30, 10, 12), mask),
        "msn_loss": (losses.msn_loss, z1, z2[:150], z2[:7]),
        "koleo_loss": (losses.koleo_loss, z1),
        "alignment": (losses.alignment, z1, z2),
        "uniformity": (losses.uniformity, z1),
        "dcl_loss": (losses.dcl_loss, z1, z2),
        "tico_loss": (losses.tico_loss, z1, z2),
        "wmse_loss": (losses.wmse_loss, z1, z2),
        "mmcr_loss": (losses.mmcr_loss, patches),
        "nt_xent": (losses.nt_xent, z1, z2),
        "info_nce": (losses.info_nce, z1, z2, z1.flip(0)),
        "supervised_contrastive": (losses.supervised_contrastive, z1, labels),
        "barlow_twins_loss": (losses.barlow_twins_loss, z1, z2),
        "vicreg_loss": (losses.vicreg_loss, z1, z2),
        "negative_cosine": (losses.negative_cosine, z1, z2),
        "distillation_loss": (losses.distillation_loss, z1, z2),
        "masked_mse": (losses.masked_mse, z1[:, None], z2[:, None], torch.ones(300, 1)),
        "row_errors": (losses.row_errors, z1, z2),
        "squared_error": (losses.squared_error, z1, z2),
        "kl_standard_normal": (losses.kl_standard_normal, z1, z2),
        **{f"{name} critic": (loss.critic, z1[:, 0], z2[:, 0]) for name, loss in losses.ADVERSARIAL_LOSSES.items()},
        **{
            f"{name} generator": (loss.generator, *(z1[:, 0], z2[:, 0])[: 1 + loss.paired])
            for name, loss in losses.ADVERSARIAL_LOSSES.items()
        },
    }


@pytest.mark.parametrize("name", list(of_losses()))
def test_a_loss_is_computed_in_single_precision_of_what_a_network_gives_in_half(name: str) -> None:
    loss, *arguments = of_losses()[name]
    halves = [a.bfloat16() if a.is_floating_point() else a for a in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*halves)
    expected = loss(*(a.float() if a.is_floating_point() else a for a in halves))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# TF32


@pytest.fixture
def tf32_as_it_was() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", [True, False])
def test_with_tf32_is_switched_for_products_and_convolutions(tf32_as_it_was: None, allowed: bool) -> None:
    Accelerator("cpu", tf32=allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed


def test_with_tf32_is_left_as_it_is_unless_it_is_asked_for(tf32_as_it_was: None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    Accelerator("cpu")
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("options", [{"tf32": "high"}, {"tf32": 1}, {"seed_per_process": None}])
def test_switches_are_true_or_false(options: Any) -> None:
    with pytest.raises(ValueError, match="expected True or False"):
        Accelerator("cpu", **options)
