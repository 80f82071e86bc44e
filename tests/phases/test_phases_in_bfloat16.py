"""Methods of research under bf16, and with several batches to an update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attrs import field, frozen
from test_cycle_gan import models as two_generators
from test_ibot import crops as crops_of_patches
from test_ibot import untied
from test_predicting import data2vec_models, ijepa_models
from torch import Generator, Tensor, nn

from fluxloop import (
    EMA,
    Accelerator,
    CombinedLoader,
    CustomCallback,
    CycleGANPhase,
    Data2VecPhase,
    DiffusionPhase,
    DINOv2Phase,
    FlowMatchingPhase,
    GANPhase,
    IBOTPhase,
    IJEPAPhase,
    Learner,
    LeJEPAPhase,
    MoCoV3Phase,
    MSNPhase,
    NNCLRPhase,
    Recorder,
    StepEnd,
    SwAVPhase,
    TensorBatches,
)
from fluxloop.augment import BlockMasks, MultiBlock
from fluxloop.testing import assert_resumes_exactly
from self_supervised import crops, parts, student_and_teacher, two_views

STEPS, BATCH = 4, 4
SGD = partial(torch.optim.SGD, lr=0.001, momentum=0.9)


def images(seed: int = 0) -> Tensor:
    return torch.rand(STEPS * BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def gan_models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    generator = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 64), nn.Unflatten(1, (1, 8, 8)))
    return {"G": generator, "D": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Softplus(), nn.Linear(8, 1))}


class Denoiser(nn.Module):
    """Sees noised images and their times."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(65, 16), nn.Tanh(), nn.Linear(16, 64))

    def forward(self, xs: Tensor, times: Tensor) -> Tensor:
        rows = torch.cat([xs.flatten(1), times.to(xs.dtype)[:, None] / 1000], dim=1)
        out: Tensor = self.body(rows).reshape(xs.shape)
        return out


def denoiser() -> nn.Module:
    torch.manual_seed(1)
    return Denoiser()


@frozen
class Method:
    """A phase, and the models that it trains."""

    phase: Callable[[], Any]
    models: Callable[[], Any]
    kinds: tuple[str, ...] = field(default=(), kw_only=True)
    """Names of the kinds of images, where a batch has several."""

    def data(self, batch_size: int = BATCH, dtype: torch.dtype = torch.float32) -> Any:
        loaders = [TensorBatches(images(seed).to(dtype), batch_size=batch_size) for seed in range(len(self.kinds) or 1)]
        return CombinedLoader(dict(zip(self.kinds, loaders, strict=True))) if self.kinds else loaders[0]

    def learner(
        self, *callbacks: Any, batch_size: int = BATCH, dtype: torch.dtype = torch.float32, **options: Any
    ) -> Learner:
        models = self.models()
        for model in models.values() if isinstance(models, dict) else [models]:
            model.to(dtype)
        average = [EMA("student", 0.9, into="teacher")] if isinstance(models, dict) and "teacher" in models else []
        return Learner(
            models,
            data=(self.data(batch_size, dtype),),
            optimizer=SGD,
            callbacks=[*average, *callbacks],
            default_callbacks=False,
            accelerator=Accelerator("cpu", **options),
            seed=3,
        )


METHODS = {
    "LeJEPA": Method(lambda: LeJEPAPhase(crops), parts),
    "I-JEPA": Method(lambda: IJEPAPhase(2, masks=MultiBlock(2, share=0.2, least=4)), ijepa_models),
    "iBOT": Method(lambda: IBOTPhase(crops_of_patches, patch_size=2), untied),
    "DINOv2": Method(lambda: DINOv2Phase(crops_of_patches, patch_size=2), untied),
    "SwAV": Method(lambda: SwAVPhase(crops, queue_size=8, queue_from=2), partial(parts, "prototypes")),
    "NNCLR": Method(lambda: NNCLRPhase(two_views, queue_size=6), partial(parts, "predictor")),
    "MoCo v3": Method(lambda: MoCoV3Phase(two_views), partial(student_and_teacher, "predictor")),
    "data2vec": Method(lambda: Data2VecPhase(2, masks=BlockMasks(2, share=0.2), layers=2), data2vec_models),
    "MSN": Method(lambda: MSNPhase(crops), partial(student_and_teacher, "prototypes")),
    "R3GAN": Method(lambda: GANPhase("relativistic", noise=6, r1=1.0, r2=1.0), gan_models),
    "CycleGAN": Method(lambda: CycleGANPhase(pool_size=4), two_generators, kinds=("a", "b")),
    "diffusion": Method(lambda: DiffusionPhase(), denoiser),
    "EDM": Method(lambda: DiffusionPhase("edm"), denoiser),
    "flow matching": Method(lambda: FlowMatchingPhase(), denoiser),
}

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def trained(method: Method, **options: Any) -> tuple[Learner, list[dict[str, Tensor]]]:
    """Train for one epoch; also give the losses of each step, by the names of their entries."""
    losses: list[dict[str, Tensor]] = []

    def note(learner: Any) -> None:
        found = learner.step.losses if "losses" in learner.step else {"loss": learner.step.loss}
        losses.append({name: loss.detach() for name, loss in found.items()})

    learner = method.learner(CustomCallback(note, StepEnd), **options)
    learner.fit(1, phases=[method.phase()])
    return learner, losses


def weights_of(learner: Learner) -> list[Tensor]:
    return [p.detach() for model in learner.modules() for p in model.parameters()]


def tensors_of(learner: Learner) -> list[Tensor]:
    """List the weights and what the optimizers keep of them."""
    optimizers = learner.optimizer if isinstance(learner.optimizer, tuple) else [learner.optimizer]
    kept = [value for each in optimizers for state in each.state.values() for value in state.values()]
    return [*weights_of(learner), *kept]


@each_method
def test_in_bfloat16_losses_and_weights_are_those_of_single_precision_but_for_the_rounding(method: Method) -> None:
    (single, exact), (half, rounded) = (trained(method, precision=name) for name in ("fp32", "bf16"))
    assert len(rounded) == len(exact) == STEPS
    assert rounded != exact  # something was computed in bfloat16
    for losses in rounded:
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert all(loss.isfinite() for loss in losses.values())
    # later ones may choose another nearest neighbour, or another code
    torch.testing.assert_close(rounded[0], exact[0], rtol=0.05, atol=0.01)
    assert {tensor.dtype for tensor in tensors_of(half)} == {torch.float32}
    weights, expected = (torch.cat([p.flatten() for p in weights_of(learner)]) for learner in (half, single))
    assert (weights - expected).norm() < 0.02 * expected.norm()  # batch norm of four rows makes much of roundings


@each_method
def test_in_bfloat16_with_two_batches_to_an_update_a_killed_run_ends_in_the_same_bits(method: Method) -> None:
    make = partial(method.learner, precision="bf16", accumulate=2)
    assert_resumes_exactly(make, epochs=2, phases=lambda: [method.phase()], at=[1, 3])


@each_method
def test_two_batches_to_an_update_make_half_the_updates_and_all_models_learn(method: Method) -> None:
    learner = method.learner(Recorder(), accumulate=2)
    phase = method.phase()
    learner.fit(1, phases=[phase])
    updates = learner.history[type(phase)].updates
    assert set(updates.values()) == {STEPS // 2}
    before = method.models()
    for name, model in before.items() if isinstance(before, dict) else [(None, before)]:
        now = learner.model if name is None else getattr(learner.model, name)
        assert any(not torch.equal(a, b) for a, b in zip(now.parameters(), model.parameters(), strict=True)), name


def fixed(n: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Hide the same patches of each image."""
    return (torch.arange(grid[0] * grid[1], device=device) % 3 == 0).expand(n, -1)


def fixed_blocks(n: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Have each image show its upper half, and ask for two blocks of the lower one."""
    places = torch.arange(grid[0] * grid[1], device=device)
    upper, lower = places.chunk(2)
    return upper.expand(n, -1), torch.stack([lower[:4], lower[4:]]).expand(n, -1, -1)


class FixedFlow(FlowMatchingPhase):
    """Noise and times follow from the rows."""

    def draw_times(self, xs: Tensor, generator: Generator | None = None) -> Tensor:
        return xs[:, 0, 0, 0]

    def draw_noise(self, xs: Tensor, generator: Generator | None = None) -> Tensor:
        return xs.flip(-1)


class FixedNoise(DiffusionPhase):
    """Noise and times follow from the rows."""

    def draw_times(self, xs: Tensor, generator: Generator | None = None) -> Tensor:
        return (xs[:, 0, 0, 0] * 900).long()

    def draw_noise(self, xs: Tensor, generator: Generator | None = None) -> Tensor:
        return xs.flip(-1)


def without_dropout(make: Callable[[], Any]) -> Any:
    models = make()
    for module in (each for model in models.values() for each in model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return models


MEANS = {
    "I-JEPA": Method(lambda: IJEPAPhase(2, masks=fixed_blocks), partial(without_dropout, ijepa_models)),
    "data2vec": Method(lambda: Data2VecPhase(2, masks=fixed, layers=2), partial(without_dropout, data2vec_models)),
    "CycleGAN": Method(lambda: CycleGANPhase(pool_size=0), two_generators, kinds=("a", "b")),
    "diffusion": Method(lambda: FixedNoise(), denoiser),
    "flow matching": Method(lambda: FixedFlow(), denoiser),
}
"""Those whose loss is a mean over rows, each by itself, without random numbers."""


@pytest.mark.parametrize("method", MEANS.values(), ids=MEANS)
def test_two_batches_to_an_update_are_one_of_both_where_the_loss_is_a_mean_over_rows(method: Method) -> None:
    twice, once = method.learner(dtype=torch.float64, accumulate=2), method.learner(dtype=torch.float64, batch_size=8)
    for learner in (twice, once):
        learner.fit(2, phases=[method.phase()])
    torch.testing.assert_close(tensors_of(twice), tensors_of(once), rtol=1e-9, atol=1e-12)
