"""Small models: one of two parts; a GAN, a phase that trains it in two update blocks, and the same training by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fluxloop import (
    Learner,
    Phase,
    TensorBatches,
    TrainingPhase,
    runstep,
)

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01, fused=False)


class Two(nn.Module):
    """A model with two named parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))

    def forward(self, xs: Tensor) -> Tensor:
        return self.head(self.encoder(xs))


class Pair(TrainingPhase):
    """A small GAN step: the critic on real rows and fakes, then the generator; `inside` is called in each block."""

    def __init__(self, inside: Callable[[Learner, str], object] = lambda learner, name: None) -> None:
        self.inside = inside

    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = gen(state.real)
            with learner.optimizing("D") as block:
                block.loss = critic_loss(dis, state.real, state.fake)
                self.inside(learner, "D")
            with learner.optimizing("G") as block:
                block.loss = generator_loss(dis, state.fake)
                self.inside(learner, "G")


def critic_loss(dis: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-dis(real)).mean() + softplus(dis(fake.detach())).mean()


def generator_loss(dis: nn.Module, fake: Tensor) -> Tensor:
    return softplus(-dis(fake)).mean()


def images(rows: int = 12) -> TensorBatches:
    generator = torch.Generator().manual_seed(0)
    return TensorBatches(torch.randn(rows, 3, generator=generator), batch_size=3)


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {"G": nn.Linear(3, 3), "D": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))}


def gan(*callbacks: Any, optimizer: Any = SGD, data: Any = None) -> Learner:
    return Learner(
        models(),
        data=(images() if data is None else data,),
        optimizer=optimizer,
        callbacks=callbacks,
        default_callbacks=False,
        seed=0,
    )


def train_by_hand(skipped: tuple[int, ...] = (), epochs: int = 1, optimizer: Any = SGD) -> dict[str, nn.Module]:
    """Train the same GAN in plain PyTorch, leaving out the steps of these numbers."""
    both = models()
    gen, dis = both["G"], both["D"]
    step_g, step_d = optimizer(gen.parameters()), optimizer(dis.parameters())
    number = 0
    for _ in range(epochs):
        for real in images():
            if number not in skipped:
                fake = gen(real)
                step_d.zero_grad()
                critic_loss(dis, real, fake).backward()
                step_d.step()
                step_g.zero_grad()
                generator_loss(dis, fake).backward()
                step_g.step()
            number += 1
    return both


def weights(learner: Learner) -> list[Tensor]:
    return [p.detach().clone() for model in learner.modules() for p in model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_equals(learner: Learner, expected: dict[str, nn.Module]) -> None:
    for name, model in expected.items():
        assert same(list(learner.models[name].parameters()), list(model.parameters())), f"{name} differs"


def one_step(learner: Learner, phase: Phase | None = None) -> None:
    """Run the first step of an epoch."""
    learner.epoch(Pair() if phase is None else phase, [next(iter(images()))])


def trainable(learner: Learner) -> list[bool]:
    return [p.requires_grad for model in learner.modules() for p in model.parameters()]


def reached(loss: Tensor) -> set[Tensor]:
    """Collect the leaves at the end of a loss's graph."""
    found: set[Tensor] = set()
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo.extend(following for following, _ in node.next_functions)
    return found
