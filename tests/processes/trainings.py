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
    DINOPhase,
    GANPhase,
    GradientClip,
    Learner,
    MAEPhase,
    SimCLRPhase,
    TensorBatches,
    TrainingPhase,
    VICRegPhase,
    runstep,
)
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
    "a GAN's own step": written_gan,
    "a GAN's own step, accumulated": partial(written_gan, accumulate=3),
    "BYOL, two averages": byol,
    "SimCLR": simclr,
    "VICReg": vicreg,
    "DINO": dino,
    "MAE": mae,
    "a penalty alone": penalised,
}
