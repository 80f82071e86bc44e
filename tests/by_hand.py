"""The training loop that everybody writes by hand, in plain PyTorch: what fluxloop trains is compared with it.

The loop of a method that a paper describes stands beside the tests of its phase, written from the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop import stream_seed

Batches = Iterable[tuple[Tensor, Tensor]]
"""Inputs and targets, which are gone through once in each epoch."""


class Step(NamedTuple):
    """An update that was just made."""

    epoch: int
    """From 0."""
    number: int
    """From 0, in the whole training."""
    loss: float


def steps(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    batches: Batches,
    *,
    epochs: int = 1,
    seed: int | None = None,
    clip: Callable[[list[nn.Parameter]], Any] | None = None,
) -> Iterator[Step]:
    """Train, and yield after each update: there a loop averages weights, or steps a scheduler.

    Args:
        model: It is trained in the mode that it is in.
        loss_fn: A function of predictions and targets.
        optimizer: Of the model's parameters.
        batches: The training data.
        epochs: How often it is gone through.
        seed: Of a learner whose steps draw the same numbers; without one, torch's generator goes on.
        clip: Called with the parameters when their gradients are complete.
    """
    number = 0
    for epoch in range(epochs):
        for xs, ys in batches:
            if seed is not None:
                torch.manual_seed(stream_seed(seed, "training/step", number))
            optimizer.zero_grad()
            loss = loss_fn(model(xs), ys)
            loss.backward()
            if clip is not None:
                clip(list(model.parameters()))
            optimizer.step()
            yield Step(epoch, number, loss.item())
            number += 1


def train(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    batches: Batches,
    **options: Any,
) -> list[float]:
    """Train to the end, with the options of `steps`, and return the loss of each step."""
    return [step.loss for step in steps(model, loss_fn, optimizer, batches, **options)]
