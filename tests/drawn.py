"""What the random numbers of an epoch's data start from, as a learner derives it, and batches as plain lists."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from fluxloop.data.indices import Numbers
from fluxloop.randomness import stream_seed


def numbers(epoch: int = 0, seed: int = 0) -> Numbers:
    return Numbers(
        stream_seed(seed, "order", epoch),
        lambda batch: stream_seed(seed, f"fetch/{epoch}", batch),
        lambda sample: stream_seed(seed, f"sample/{epoch}", sample),
    )


def plain(batches: Any) -> list[Any]:
    return [[part.tolist() if isinstance(part, torch.Tensor) else part for part in batch] for batch in batches]


def scramble(number: int) -> None:
    torch.manual_seed(number)
    numpy.random.seed(number)
    random.seed(number)


# The global generators


def draw() -> tuple[float, ...]:
    return (
        torch.rand(()).item(),
        float(numpy.random.randn()),
        float(numpy.random.rand()),
        random.random(),
        random.gauss(0, 1),
    )


def draw_odd() -> None:
    """Leave every generator elsewhere, with a normal number in store in NumPy's and Python's."""
    torch.rand(3)
    numpy.random.randn()
    random.gauss(0, 1)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, numpy.ndarray):
        return numpy.array_equal(first, second)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def states() -> tuple[Any, ...]:
    return torch.get_rng_state(), numpy.random.get_state(), random.getstate()
