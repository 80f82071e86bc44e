"""The methods of `research.py` in Lightning and in Ignite, as their users write them: each step by hand, in their loop.

A step is written once, over the few calls that differ: Lightning has its own for backward, clipping and freezing the
other optimizer's parameters (manual optimization), in Ignite they are PyTorch's. Averages are moved by one call, losses
are logged as means of the epoch, and a progress bar runs, as each framework offers them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from peers import WARM_UP, Loader, silence
from timing import Lap
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, softplus
from torch.nn.utils import clip_grad_norm_

from fluxloop.losses import dino_loss, gradient_penalty

Models = dict[str, nn.Module]
Draw = Callable[[int], Tensor]
Losses = dict[str, Tensor]


@dataclass
class Tools:
    """What a step calls: of PyTorch, or of a framework.

    Args:
        noise: Draws noise for so many rows.
        share: Draws a share for each of so many rows.
        decay: Of averages.
        clip: The largest norm of gradients.
        center: How slowly DINO's center moves.
    """

    noise: Draw
    share: Draw
    decay: float
    clip: float
    center: float

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()

    def clipped(self, optimizer: Any, model: nn.Module) -> None:
        """Clip the gradients of an optimizer."""
        clip_grad_norm_(model.parameters(), self.clip)

    def alone(self, optimizer: Any) -> contextlib.AbstractContextManager[Any]:
        """Keep the parameters of other optimizers from taking gradients."""
        return contextlib.nullcontext()

    def train(self, optimizer: Any, loss: Tensor, clipped: nn.Module | None = None) -> None:
        """Make an update."""
        optimizer.zero_grad()
        self.backward(loss)
        if clipped is not None:
            self.clipped(optimizer, clipped)
        optimizer.step()

    @torch.no_grad()
    def move(self, average: nn.Module, live: nn.Module) -> None:
        """Move an average."""
        torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - self.decay)


Step = Callable[[Models, Sequence[Any], Any, int, Tools], Losses]
"""Trains on a batch: the models, the optimizers, the batch, its number, the tools."""


def gan(models: Models, optimizers: Sequence[Any], real: Tensor, index: int, tools: Tools) -> Losses:
    """Update the critic, then the generator, and move the generator's average."""
    generator, critic, (of_critic, of_generator) = models["G"], models["D"], optimizers
    fake = generator(tools.noise(len(real)))
    with tools.alone(of_critic):
        loss_d = softplus(-critic(real)).mean() + softplus(critic(fake.detach())).mean()
        tools.train(of_critic, loss_d, critic)
    with tools.alone(of_generator):
        loss_g = softplus(-critic(fake)).mean()
        tools.train(of_generator, loss_g, generator)
    tools.move(models["average"], generator)
    return {"loss_d": loss_d, "loss_g": loss_g}


def wgan_gp(models: Models, optimizers: Sequence[Any], real: Tensor, index: int, tools: Tools) -> Losses:
    """Update the critic, and in every fifth step the generator."""
    generator, critic, (of_critic, of_generator) = models["G"], models["D"], optimizers
    trains_generator = index % 5 == 4
    with torch.set_grad_enabled(trains_generator):
        fake = generator(tools.noise(len(real)))
    with tools.alone(of_critic):
        loss_d = critic(fake.detach()).mean() - critic(real).mean()
        loss_d = loss_d + 10 * gradient_penalty(critic, real, fake, epsilon=tools.share(len(real)))
        tools.train(of_critic, loss_d)
    if trains_generator:
        with tools.alone(of_generator):
            tools.train(of_generator, -critic(fake).mean())
    return {"loss_d": loss_d}


def byol(models: Models, optimizers: Sequence[Any], views: Any, index: int, tools: Tools) -> Losses:
    """Update the student and the predictor, and move the teacher."""
    student, teacher, predictor = models["student"], models["teacher"], models["predictor"]
    view1, view2 = views
    p1, p2 = predictor(student(view1)), predictor(student(view2))
    with torch.no_grad():
        t1, t2 = teacher(view1), teacher(view2)
    loss = 4 - 2 * (cosine_similarity(p1, t2).mean() + cosine_similarity(p2, t1).mean())
    tools.train(optimizers[0], loss)
    tools.move(teacher, student)
    return {"loss": loss}


class DINOStep:
    """Update the student, move the center and the teacher."""

    def __init__(self) -> None:
        self.center: Tensor | None = None

    def __call__(self, models: Models, optimizers: Sequence[Any], crops: Any, index: int, tools: Tools) -> Losses:
        student, teacher = models["student"], models["teacher"]
        guesses = [student(crop) for crop in crops]
        with torch.no_grad():
            targets = [teacher(crop) for crop in crops[:2]]
        if self.center is None:
            self.center = torch.zeros_like(targets[0][0])
        loss = dino_loss(guesses, targets, self.center)
        tools.train(optimizers[0], loss)
        self.center = self.center * tools.center + torch.cat(targets).mean(0) * (1 - tools.center)
        tools.move(teacher, student)
        return {"loss": loss}


Frame = Callable[[Models, Sequence[torch.optim.Optimizer], Loader, Step, Tools], Callable[[], object]]
"""Makes what runs a fit."""


def lightning(
    models: Models, optimizers: Sequence[torch.optim.Optimizer], loader: Loader, step: Step, tools: Tools
) -> Callable[[], object]:
    """Make a fit of Lightning's, by manual optimization."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.models = nn.ModuleDict(models)

        def training_step(self, batch: Any, index: int) -> None:
            given: Any = self.optimizers()
            losses = step(models, given if isinstance(given, list) else [given], batch, index, tools)
            self.log_dict(losses, on_step=False, on_epoch=True, prog_bar=True)

        def configure_optimizers(self) -> Any:
            return list(optimizers)

    module = Module()
    setattr(tools, "backward", module.manual_backward)  # noqa: B010 - mypy takes no method to be set
    if len(optimizers) > 1:
        setattr(tools, "alone", module.toggled_optimizer)  # noqa: B010

    def clipped(optimizer: Any, model: nn.Module) -> None:
        module.clip_gradients(optimizer, gradient_clip_val=tools.clip, gradient_clip_algorithm="norm")

    setattr(tools, "clipped", clipped)  # noqa: B010
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return lambda: pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, **options).fit(module, loader)


def ignite(
    models: Models, optimizers: Sequence[torch.optim.Optimizer], loader: Loader, step: Step, tools: Tools
) -> Callable[[], object]:
    """Make a fit of Ignite's."""
    from ignite.engine import Engine
    from ignite.handlers import ProgressBar
    from ignite.metrics import Average

    def train(engine: Engine, batch: Any) -> Losses:
        losses = step(models, optimizers, batch, (engine.state.iteration - 1) % len(loader), tools)
        return {name: loss.detach() for name, loss in losses.items()}

    engine = Engine(train)
    for name in ("loss_d", "loss_g") if step is gan else ("loss_d",) if step is wgan_gp else ("loss",):
        Average(output_transform=lambda output, name=name: output[name]).attach(engine, name)
    ProgressBar().attach(engine)
    return lambda: engine.run(loader, max_epochs=1)


FRAMES: dict[str, tuple[str, str, Frame]] = {
    "Lightning": ("lightning", "lightning", lightning),
    "Ignite": ("ignite", "pytorch-ignite", ignite),
}
"""By name: what is imported, the distribution that it comes with, and how it trains."""


def installed() -> dict[str, Frame]:
    """Give those that are installed, with their versions."""
    return {
        f"{name} {version(distribution)}": frame
        for name, (module, distribution, frame) in FRAMES.items()
        if importlib.util.find_spec(module) is not None
    }


def missing() -> list[str]:
    """Name those that are not installed."""
    return [name for name, (module, *_) in FRAMES.items() if importlib.util.find_spec(module) is None]


@dataclass
class Fit:
    """A fit of a framework's, whose clock runs from a batch in the middle to the last: setting up is not counted."""

    loader: Loader
    fit: Callable[[], object]

    def __call__(self) -> Lap:
        with silence():
            self.fit()
        lap, batches = self.loader.watch.lap, len(self.loader)
        if lap is None:
            raise RuntimeError("the last batch was not asked for")
        times = batches / (batches - 1 - WARM_UP)
        return Lap(lap.wall * times, lap.cpu * times)
