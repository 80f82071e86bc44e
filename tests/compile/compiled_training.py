"""Learners whose steps are compiled, models and phases for them, and the same training without a graph."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fluxloop import Accelerator, BackwardBegin, BackwardEnd, Callback, Learner, MetricsPrinter, Phase, TrainingPhase

WITH_COMPILER = "FLUXLOOP_COMPILER" in os.environ
"""Whether these tests use the compiler, which takes many minutes."""
ROWS = 70
"""Two full batches of 32 and a ragged one."""
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
RMSPROP = partial(torch.optim.RMSprop, lr=1e-3)
ADAM = partial(torch.optim.Adam, lr=1e-3, fused=False)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 16, generator=generator), torch.randint(4, (ROWS,), generator=generator)


def full() -> tuple[Tensor, Tensor]:
    """Two full batches: for each other shape the compiler takes seconds."""
    xs, ys = rows()
    return xs[:64], ys[:64]


def learner(
    compile: Any = "step", model: Callable[[], Any] = mlp, how: dict[str, Any] | None = None, **options: Any
) -> Learner[Any]:
    torch.manual_seed(0)
    defaults = {"data": (rows(), rows()), "optimizer": SGD, "loss_fn": functional.cross_entropy}
    accelerator = Accelerator("cpu", compile=compile, **(how or {}))
    made = Learner(model(), **{**defaults, **options}, accelerator=accelerator, seed=0)
    made.remove_callback(MetricsPrinter)
    return made


def weights(of: Learner[Any]) -> list[Tensor]:
    return [t.detach().clone() for m in of.modules() for t in (*m.parameters(), *m.buffers())]


def both(
    epochs: int = 3,
    phases: Callable[[], list[Phase]] | None = None,
    callbacks: Callable[[], list[Callback]] = list,
    tolerance: float = 2e-6,
    **options: Any,
) -> tuple[Learner[Any], Learner[Any]]:
    """Train eagerly and compiled; the weights have to agree as floating point allows."""
    trained = []
    for compile in (False, "step"):
        made = learner(compile, callbacks=callbacks(), **options)
        made.fit(epochs, phases=None if phases is None else phases())
        trained.append(made)
    eager, compiled = trained
    tolerance *= 10 if WITH_COMPILER else 1  # other kernels add up in another order
    for a, b in zip(weights(eager), weights(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return eager, compiled


def graphs(of: Learner[Any], phase: type[Phase] = TrainingPhase) -> int:
    assert of._compiled is not None
    return sum(map(len, of._compiled._plans[phase]._graphs.values()))


def gradients(of: Learner[Any]) -> list[Tensor | None]:
    return [parameter.grad for module in of.modules() for parameter in module.parameters()]


class Every(TrainingPhase):
    """Updates with the mean gradient of `every` batches."""

    def __init__(self, every: int = 3) -> None:
        self.every = every
        self.batches = 0
        self.updates = every == 1

    def loss(self, learner: Any, state: Any) -> Tensor:
        state.preds = learner.model(state.xs)
        found: Tensor = learner.loss_fn(state.preds, state.ys)
        return found

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.loss = self.loss(learner, state)
        handle(BackwardBegin())
        learner.backward(state.loss / self.every)
        handle(BackwardEnd())
        if self.updates:
            learner.update()

    def finish(self, learner: Any, state: Any) -> None:
        self.batches += 1
        self.updates = (self.batches + 1) % self.every == 0


class SpoiledGradient(torch.autograd.Function):
    """Passes a tensor on; where `bad` is true, its gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.where(ctx.saved_tensors[0], float("nan"), gradients[0]), None


class Model(nn.Module):
    """Calls a function on itself and what its layer gives."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.function = function
        self.count, self.seen, self.last = 0, [], None  # type: ignore[var-annotated]  # what is put there is told

    def forward(self, xs: Tensor) -> Tensor:
        return self.function(self, self.layer(xs))


class Scale(nn.Module):
    """Multiplies by what an object says, and has a part that may be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.config = nn.Linear(6, 3), nn.Tanh(), SimpleNamespace(scale=1.0)

    def forward(self, xs: Tensor) -> Tensor:
        out: Tensor = self.act(self.layer(xs)) * self.config.scale
        return out


def learner_of(model: nn.Module, loss_fn: Any = functional.cross_entropy, **options: Any) -> Learner[Any]:
    xs, ys = torch.randn(32, 6), torch.randint(3, (32,))
    defaults: dict[str, Any] = {
        "data": ([(xs[:8], ys[:8]), (xs[8:16], ys[8:16]), (xs[16:24], ys[16:24])],),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "default_callbacks": False,
        "accelerator": Accelerator("cpu", compile="step"),
    }
    return Learner(model, loss_fn, **{**defaults, **options}, seed=0)
