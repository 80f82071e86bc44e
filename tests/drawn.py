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
