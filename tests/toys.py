"""Callbacks, data and functions that the tests of several modules need, the same in each."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    Event,
    Learner,
    Phase,
    StateAccessError,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    runstep,
)
from fluxloop.augment import add_noise, random_affine
from fluxloop.testing import toy_learner

Use = Callable[[Any], object]
"""A function of what a handler gets as `learner`."""


# What ends a run, and what comes back from a file


class BrokenError(Exception):
    """An error that nothing but a test raises."""


class Killed(BaseException):
    """Stand for the end of the process in the middle of a run."""


def through_a_file(state: Any) -> Any:
    """Return a state as a checkpoint returns it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# What a callback does at an event


class Do(UnsafeCallback):
    """Call a function of the learner at each event of a type."""

    draws = None

    def __init__(self, action: Any, event: type[Event], phase: type[Phase] = Phase) -> None:
        super().__init__()
        self.action, self.event, self.phase = action, event, phase

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: Learner) -> None:
        if isinstance(event, self.event) and isinstance(phase, self.phase):
            self.action(learner)


class Touch(Callback):
    """Call a function of the learner at the end of each training step, with these declarations."""

    draws = True  # the function may make a module, which draws its weights

    def __init__(self, use: Use, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
        super().__init__()
        self.use = use
        self.reads = reads
        self.writes = writes

    @on(StepEnd, AbstractTrainingPhase)
    def run(self, event: Any, phase: Any, learner: Any) -> None:
        self.use(learner)


def raising(error: BaseException) -> Any:
    """Return a function of anything that raises the error."""

    def action(*args: Any, **kwargs: Any) -> None:
        raise error

    return action


def error_of(action: Callable[..., object], *args: Any, **options: Any) -> BaseException | None:
    """Return the error with which a call ends, or None."""
    try:
        action(*args, **options)
    except Exception as error:
        return error
    return None


def run(use: Use, reads: Sequence[str] = (), writes: Sequence[str] = (), *others: Callback) -> Learner:
    """Run one step with a `Touch`, and return the learner."""
    learner = toy_learner(Touch(use, reads, writes), *others, num_batches=1)
    learner.fit(1, phases=[TrainingPhase()])
    return learner


def get(use: Use, reads: Sequence[str] = (), writes: Sequence[str] = (), *others: Callback) -> Any:
    """Return what the function of a `Touch` returns at the end of a step."""
    found: list[object] = []
    run(lambda learner: found.append(use(learner)), reads, writes, *others)
    return found[0]


def refused(use: Use, reads: Sequence[str] = (), writes: Sequence[str] = (), *others: Callback) -> StateAccessError:
    """Return the error with which the function of a `Touch` is refused."""
    with pytest.raises(StateAccessError) as caught:
        run(use, reads, writes, *others)
    return caught.value


# Phases, models and learners


class Scored(ValidationPhase):
    """Record the next value of a list in each epoch, as the loss."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = values

    def step(self, learner: Learner[Any], batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            state.loss = torch.tensor(self.values[learner.history[type(self)].epochs], dtype=torch.float64)


class Versioned(nn.Linear):
    """A layer whose weights were a hundredth of today's in its first version."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 100
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def noisy_learner(*callbacks: Callback, rows: int = 22, default_callbacks: bool = False, **options: Any) -> Learner:
    """Make a learner in which everything is random that can be: order, dropout, batch statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
    xs = torch.randn(rows, 3)
    data = TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=4, shuffle=True)
    options = {"data": (data, data), "optimizer": partial(torch.optim.Adam, lr=0.01), "seed": 3, **options}
    return Learner(model, nn.functional.mse_loss, callbacks=callbacks, default_callbacks=default_callbacks, **options)


# Data


class Numbers(Dataset[int]):
    """The numbers from 0 on, which are looked up one by one."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """The numbers from 0 on, one after the other, without a length."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rows))


def image_batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return five batches of four images of one channel and 8 x 8 pixels."""
    return list(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).split(4))


def augment(images: Tensor) -> Tensor:
    """Return another view of the images: turned, moved, scaled and with noise."""
    return add_noise(random_affine(images, degrees=20, translate=0.1, scale=(0.8, 1.3)), 0.05)


# Losses


def doubles(seed: int, *shape: int) -> Tensor:
    """Draw normal numbers of double precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_with_gradients(found: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare two functions of tensors: what they return, and the gradient with respect to each input."""
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    a, b = found(*inputs), expected(*inputs)
    assert a.shape == ()
    torch.testing.assert_close(a, b)
    for one, other in zip(*(torch.autograd.grad(value, inputs) for value in (a, b)), strict=True):
        torch.testing.assert_close(one, other)


def waves(k: float, *shape: int) -> Tensor:
    """Return numbers that other libraries were given when their values were recorded: sin(k * i * i), i from 1."""
    return torch.sin(k * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).square()).reshape(shape)


def assert_recorded(loss: Callable[..., Tensor], value: float, norms: Sequence[float], *inputs: Tensor) -> None:
    """Compare a loss, and the norm of its gradient with respect to each input, with what was recorded."""
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    found = loss(*inputs)
    assert found.item() == pytest.approx(value, rel=1e-7)  # temperatures of lightly are in single precision
    gradients = torch.autograd.grad(found, inputs)
    assert [gradient.norm().item() for gradient in gradients] == pytest.approx(list(norms), rel=1e-7)
