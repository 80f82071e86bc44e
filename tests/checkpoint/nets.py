"""A small learner for the tests of checkpoints, and a callback that counts its steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    Learner,
    Phase,
    StepEnd,
    TensorBatches,
    on,
)
from fluxloop.testing import bits


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 1)

    def forward(self, xs: Tensor) -> Tensor:
        result: Tensor = self.head(self.encoder(xs))
        return result


def net(*callbacks: Callback, model: Any = None, seed: int = 7, **options: Any) -> Learner[Any]:
    torch.manual_seed(seed)
    xs = torch.linspace(0, 1, 8)[:, None]
    data = (TensorBatches(xs, 3 * xs, batch_size=4, shuffle=True), TensorBatches(xs, 3 * xs, batch_size=4))
    arguments = {"data": data, "optimizer": partial(torch.optim.Adam, lr=0.01), "seed": 1, **options}
    return Learner(
        Net() if model is None else model,
        nn.functional.mse_loss,
        callbacks=callbacks,
        default_callbacks=False,
        **arguments,
    )


def unchanged(learner: Learner[Any], before: dict[str, Tensor]) -> bool:
    after = bits(learner)
    return after.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in after.items())


class Counting(Callback):
    """Counts steps, from a number of its own on."""

    def __init__(self, start: int = 0, name: str | None = None) -> None:
        super().__init__(name=name)
        self.start = start
        self.count = start

    @on(StepEnd, AbstractTrainingPhase)
    def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.count += 1
