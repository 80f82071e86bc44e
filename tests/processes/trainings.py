"""Whole trainings, each a function: several processes have to end as one process does on the joined batches."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    BYOLPhase,
    CycleGANPhase,
    Data2VecPhase,
    DiffusionPhase,
    DINOPhase,
    FlowMatchingPhase,
    GANPhase,
    GradientClip,
    IJEPAPhase,
    Learner,
    MAEPhase,
    SimCLRPhase,
    TensorBatches,
    TrainingPhase,
    VICRegPhase,
    runstep,
)
from fluxloop.augment import AdaptiveAugment
from fluxloop.nested import whole

JOINED = 12
"""Rows of a batch of all processes together."""

ADAM = partial(torch.optim.Adam, lr=0.01)


def mlp(*sizes: int) -> nn.Sequential:
    """A network of smooth layers, in double precision."""
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Softplus())]
    return nn.Sequential(*layers[:-1]).double()


def rows(number: int = 48) -> Tensor:
    return torch.randn(number, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def learner(model: Any, *data: Tensor, strategy: Any = "auto", accumulate: int = 1, **options: Any) -> Learner:
    """A learner whose batches have `JOINED` rows in all processes together."""
    accelerator = Accelerator("cpu", strategy=strategy, accumulate=accumulate)
    batches = TensorBatches(*data, batch_size=JOINED // accelerator.world_size)
    options = {"optimizer": ADAM, "default_callbacks": False, "seed": 3, **options}
    return Learner(model, data=(batches,), accelerator=accelerator, **options)


def regression(strategy: Any = "auto", number: int = 48, model: nn.Module | None = None, **options: Any) -> Learner:
    """A learner of a curve."""
    torch.manual_seed(1)
    xs = rows(number)
    model = mlp(6, 16, 8, 1) if model is None else model
    return learner(model, xs, xs.sin().sum(1, keepdim=True), strategy=strategy, loss_fn=nn.MSELoss(), **options)


def weights(trained: Learner) -> dict[str, Tensor]:
    """The weights of all models and their averages, whole ones."""
    models = {str(name): model for name, model in trained.models.items()}
    models |= {f"average {index}": model for index, model in enumerate(trained.weights.views.values())}
    return {
        f"{name}.{path}": whole(tensor).detach().clone()
        for name, model in models.items()
        for path, tensor in model.state_dict().items()
    }


def shared(draw: Callable[[int, torch.Generator], Tensor], number: int, seed: int) -> Tensor:
    """What is drawn for the rows of a joined batch, of which each process takes those of its rows."""
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    drawn = draw(number * processes, torch.Generator().manual_seed(seed))
    return drawn[rank * number : (rank + 1) * number]


class Noise:
    """The generator's input: that of a joined batch, of which each process takes its rows."""

    def __init__(self, columns: int = 3) -> None:
        self.columns = columns
        self.drawn = 0

    def __call__(self, number: int, device: torch.device | None = None) -> Tensor:
        self.drawn += 1
        return shared(self._draw, number, self.drawn)

    def _draw(self, number: int, generator: torch.Generator) -> Tensor:
        return torch.rand(number, self.columns, generator=generator, dtype=torch.float64)


class PenalisedGAN(GANPhase):
    """A GAN whose gradients are penalised at points that are shared, as its noise is."""

    def draw_epsilon(self, state: Any) -> Tensor:
        return self.noise(len(state.real), None)[:, 0]  # type: ignore[operator]  # it is a `Noise`


class SharedMAE(MAEPhase):
    """Hides patches that are drawn for the joined batch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.numbers = Noise(4)

    def draw_order(self, state: Any) -> Tensor:
        return self.numbers(len(state.xs)).argsort(1)


class OnPatches(nn.Module):
    """Encodes visible patches and their places, each alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        return self.network(torch.cat([patches, places[..., None].to(patches)], -1))


class Decoder(nn.Module):
    """Tells all patches of what is visible, and of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(9, 16)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        grid = torch.arange(4).to(tokens).expand(len(tokens), 4)
        return self.network(torch.cat([tokens.mean(1, keepdim=True).expand(-1, 4, -1), grid[..., None]], -1))


class WrittenGAN(TrainingPhase):
    """A GAN as a user writes it: a ``step`` with two updates of the critic, the second on another batch of fakes."""

    def __init__(self) -> None:
        self.noise = Noise()

    def step(self, learner: Any, batch: Any) -> None:
        """Train both."""
        gen, critic = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            for _ in range(2):
                fake = gen(self.noise(len(state.real)))
                with learner.optimizing("D") as block:
                    block.loss = softplus(-critic(state.real)).mean() + softplus(critic(fake.detach())).mean()
            with learner.optimizing("G") as block:
                block.loss = softplus(-critic(fake)).mean()


class Penalised(AbstractTrainingPhase):
    """A block whose loss is a penalty alone, and reaches no output; then one of the usual loss."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        """Train both."""
        xs = state.xs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(learner.model(xs).sum(), xs, create_graph=True)
        with learner.optimizing(loss="penalty") as block:
            block.loss = gradient.square().sum(1).mean()
        with learner.optimizing() as block:
            block.loss = (learner.model(state.xs) - state.ys).square().mean()


def supervised(strategy: Any = "auto") -> Learner:
    made = regression(strategy, callbacks=[GradientClip(0.1)])
    made.fit(3)
    return made


def largest_gradient(strategy: Any = "auto") -> Learner:
    made = regression(strategy, callbacks=[GradientClip(0.01, norm_type=float("inf"))])
    made.fit(2)
    return made


def accumulated(strategy: Any = "auto") -> Learner:
    made = regression(strategy, number=60, accumulate=3, callbacks=[GradientClip(0.1)])
    made.fit(2)
    return made


def gan(strategy: Any = "auto", **options: Any) -> Learner:
    torch.manual_seed(1)
    made = learner({"G": mlp(3, 8, 6), "D": mlp(6, 8, 8, 1)}, rows(120), strategy=strategy)
    made.fit(2, phases=[PenalisedGAN("wasserstein", noise=Noise(), critic_steps=5, **options)])
    return made


def written_gan(strategy: Any = "auto", accumulate: int = 1) -> Learner:
    torch.manual_seed(1)
    made = learner({"G": mlp(3, 8, 6), "D": mlp(6, 8, 1)}, rows(60), strategy=strategy, accumulate=accumulate)
    made.fit(2, phases=[WrittenGAN()])
    return made


def two_views(xs: Tensor) -> tuple[Tensor, Tensor]:
    return xs + 0.1 * xs.sin(), 0.9 * xs


def byol(strategy: Any = "auto") -> Learner:
    """A teacher that is an average, and an average of the student beside it."""
    torch.manual_seed(1)
    student = nn.Module()
    student.encoder, student.projector = mlp(6, 8), mlp(8, 8)
    models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False), "predictor": mlp(8, 8)}
    averages = [EMA("student", 0.9, into="teacher"), EMA("predictor", 0.8)]
    made = learner(models, rows(), strategy=strategy, callbacks=averages)
    made.fit(2, phases=[BYOLPhase(views=two_views)])
    return made


def simclr(strategy: Any = "auto") -> Learner:
    torch.manual_seed(1)
    made = learner(mlp(6, 8, 8), rows(), strategy=strategy)
    made.fit(2, phases=[SimCLRPhase(views=two_views)])
    return made


class Searching(TrainingPhase):
    """Steps an optimizer that decides by the loss how often it computes gradients."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        """Step it with a closure."""

        def closure() -> Tensor:
            loss = (learner.model(state.xs) - state.ys).square().mean()
            learner.backward(loss)
            return loss

        learner.update(closure=closure)


def line_search(strategy: Any = "auto") -> Learner:
    made = regression(
        strategy, optimizer=partial(torch.optim.LBFGS, lr=0.5, max_iter=5, line_search_fn="strong_wolfe"), number=50
    )
    made.fit(1, phases=[Searching()])
    return made


def dino(strategy: Any = "auto") -> Learner:
    torch.manual_seed(1)
    student = nn.Module()
    student.encoder, student.projector = mlp(6, 8), mlp(8, 5)
    models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
    made = learner(models, rows(), strategy=strategy, callbacks=[EMA("student", 0.9, into="teacher")])
    made.fit(2, phases=[DINOPhase(views=two_views)])
    return made


def mae(strategy: Any = "auto") -> Learner:
    torch.manual_seed(1)
    images = rows(48)[:, :4, None, None].repeat(1, 1, 4, 4) * torch.linspace(0, 1, 16, dtype=torch.float64).view(4, 4)
    models = {"encoder": OnPatches(mlp(17, 8)), "decoder": Decoder()}
    made = learner(models, images, strategy=strategy)
    made.fit(2, phases=[SharedMAE(2)])
    return made


def vicreg(strategy: Any = "auto") -> Learner:
    torch.manual_seed(1)
    # The loss does not depend on the last bias: its gradient is what rounding leaves, which Adam would make large
    made = learner(mlp(6, 8, 8), rows(), strategy=strategy, optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9))
    made.fit(2, phases=[VICRegPhase(views=two_views)])
    return made


class SharedPaths(GANPhase):
    """Moves images in directions that are drawn for the joined batch."""

    def draw_directions(self, images: Tensor) -> Tensor:
        return self.noise(len(images), None) @ torch.ones(3, images.shape[1], dtype=torch.float64)  # type: ignore[operator]  # it is a `Noise`


class ByProbability(SharedPaths):
    """Changes each row by as much as the probability is, without a draw."""

    def judging(self, critic: Any, state: Any) -> Any:
        factor = 1 + state.augment_probability.double()
        return lambda rows: critic(rows * factor)


def style_gan(strategy: Any = "auto", make: Any = SharedPaths, **options: Any) -> Learner:
    torch.manual_seed(1)
    made = learner({"G": mlp(3, 8, 6), "D": mlp(6, 8, 1)}, rows(116), strategy=strategy)
    made.fit(2, phases=[make(**{"loss": "non-saturating", "noise": Noise(), **options})])
    return made


def adaptive_gan(strategy: Any = "auto") -> Learner:
    augment = AdaptiveAugment(Tensor.neg, target=0.0, every=2, images=100, probability=0.2)
    made = style_gan(strategy, ByProbability, augment=augment, r1=0.1)
    assert abs(float(augment.probability) - 0.2) > 0.01
    return made


class Timed(nn.Module):
    """A network of noised rows and times."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(7, 12, 6)

    def forward(self, noised: Tensor, times: Tensor) -> Tensor:
        return self.network(torch.cat([noised, times[:, None].to(noised) / 10], 1))


class SharedNoise:
    """Draws noise and times for the joined batch."""

    def draw_noise(self, xs: Tensor, generator: Any = None) -> Tensor:
        self.numbers = getattr(self, "numbers", Noise(7))
        return self.numbers(len(xs))[:, :6] * 2 - 1

    def draw_times(self, xs: Tensor, generator: Any = None) -> Tensor:
        times = self.numbers(len(xs))[:, 6]
        return times if isinstance(self, FlowMatchingPhase) else (10 * times).long()


class SharedFlow(SharedNoise, FlowMatchingPhase):
    """A flow."""


class SharedDiffusion(SharedNoise, DiffusionPhase):
    """A diffusion."""


def noised(make: Any, strategy: Any = "auto") -> Learner:
    torch.manual_seed(1)
    made = learner(Timed(), rows(44), strategy=strategy, callbacks=[EMA("model", 0.9)])
    made.fit(2, phases=[make()])
    return made


def cycle_gan(strategy: Any = "auto", accumulate: int = 1) -> Learner:
    """Two kinds, with pools that are full after the first batch and a half."""
    torch.manual_seed(1)
    models = {
        "generators": nn.ModuleDict({"ab": mlp(6, 8, 6), "ba": mlp(6, 8, 6)}),
        "critics": nn.ModuleDict({"a": mlp(6, 8, 1), "b": mlp(6, 8, 1)}),
    }
    made = learner(models, rows(56), rows(56).sin(), strategy=strategy, accumulate=accumulate)
    made.fit(2, phases=[CycleGANPhase(pool_size=18)])
    return made


class HiddenPlaces:
    """Hides of each image as many of its four patches as are drawn for the joined batch."""

    def __init__(self) -> None:
        self.numbers = Noise(5)

    def __call__(self, count: int, grid: Any, device: Any) -> Tensor:
        drawn = self.numbers(count)
        return drawn[:, :4].argsort(1).argsort(1) < (4 * drawn[:, 4:]).floor()


class Blocks(HiddenPlaces):
    """Two places of each image are the context, the others two blocks of one."""

    def __call__(self, count: int, grid: Any, device: Any) -> Any:
        order = self.numbers(count)[:, :4].argsort(1)
        return order[:, :2], order[:, 2:, None]


class OfLayers(nn.Module):
    """Two layers of the patches of images of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Conv2d(1, 5, 2, 2).double(), mlp(5, 5), mlp(5, 5)
        self.hidden = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def forward(self, images: Tensor, mask: Tensor | None) -> list[Tensor]:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask[:, :, None], self.hidden, tokens)
        first = self.first(tokens + tokens.mean(1, keepdim=True)).tanh()
        return [first, self.second(first)]


class Wanted(nn.Module):
    """Tells what stands at the places wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(9, 8)

    def forward(self, tokens: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
        mean = (tokens * (1 + places[..., None])).mean(1, keepdim=True).expand(-1, wanted.shape[1], -1)
        return self.network(torch.cat([mean, wanted[..., None].to(mean)], -1))


def hidden_patches(make: Any, student: Any, predictor: Any, strategy: Any = "auto", accumulate: int = 1) -> Learner:
    torch.manual_seed(1)
    images = rows(44)[:, :4, None, None].repeat(1, 1, 4, 4).sum(1, keepdim=True)
    images = (images + torch.linspace(0, 3, 16, dtype=torch.float64).view(4, 4)).sin()
    network = student()
    models = {"student": network, "teacher": copy.deepcopy(network).requires_grad_(False), "predictor": predictor()}
    options: Any = {"strategy": strategy, "accumulate": accumulate, "callbacks": [EMA("student", 0.9, into="teacher")]}
    made = learner(models, images, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), **options)
    made.fit(2, phases=[make()])
    return made


def i_jepa(strategy: Any = "auto") -> Learner:
    make = partial(IJEPAPhase, 2, masks=Blocks())
    return hidden_patches(make, lambda: OnPatches(mlp(5, 8)), Wanted, strategy)


def data2vec(strategy: Any = "auto", accumulate: int = 1) -> Learner:
    make = partial(Data2VecPhase, 2, masks=HiddenPlaces(), layers=2)
    return hidden_patches(make, OfLayers, lambda: mlp(5, 5), strategy, accumulate)


def penalised(strategy: Any = "auto") -> Learner:
    made = regression(strategy, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    made.fit(2, phases=[Penalised()])
    return made


TRAININGS: dict[str, Callable[..., Learner]] = {
    "supervised, clipped": supervised,
    "largest gradient clipped": largest_gradient,
    "accumulated, clipped": accumulated,
    "Wasserstein, 5 critic steps": gan,
    "Wasserstein, R1": partial(gan, r1=0.5),
    "Wasserstein, gradient penalty": partial(gan, gradient_penalty=10.0),
    "lazy R1": partial(gan, r1=0.5, every=3),
    "relativistic, lazy R1 and R2": partial(style_gan, loss="relativistic", r1=0.3, r2=0.2, every=2),
    "path length": partial(style_gan, path_length=2.0),
    "adaptive augmentation": adaptive_gan,
    "CycleGAN": cycle_gan,
    "CycleGAN, accumulated": partial(cycle_gan, accumulate=2),
    "flow matching": partial(noised, SharedFlow),
    "diffusion": partial(noised, partial(SharedDiffusion, "velocity", steps=10)),
    "I-JEPA": i_jepa,
    "data2vec": data2vec,
    "data2vec, accumulated": partial(data2vec, accumulate=2),
    "a GAN's own step": written_gan,
    "a GAN's own step, accumulated": partial(written_gan, accumulate=3),
    "BYOL, two averages": byol,
    "SimCLR": simclr,
    "VICReg": vicreg,
    "DINO": dino,
    "MAE": mae,
    "a penalty alone": penalised,
}
