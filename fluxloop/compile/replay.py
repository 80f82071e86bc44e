"""A compiled step on a GPU, replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def can_replay(inputs: list[Any]) -> bool:
    """Return whether a step can be replayed as a CUDA graph: what it does on the host would happen once."""
    return all(tensor.is_cuda for tensor in inputs)


class Replayed:
    """A compiled step on a GPU, replayed as a CUDA graph: one launch for all kernels.

    Parameters, buffers and optimizers' states are at fixed places; the other inputs of a step are
    copied to where the graph expects them. The first calls run as they are.

    Args:
        compiled: The step.
        num_fixed: How many of its inputs, the first ones, are at fixed places.
        changed: Which of the others it changes in place, by number.
    """

    WARM_UP = 3
    """Calls before the recording: kernels are loaded and chosen in them, which no CUDA graph can record."""

    def __init__(self, compiled: Callable[..., Any], num_fixed: int, changed: Iterable[int]) -> None:
        self._compiled = compiled
        self._num_fixed = num_fixed
        self._changed = [num_fixed + number for number in changed]
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._graph: Any = None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run the step; its outputs are the caller's to keep."""
        self._calls += 1
        if self._calls <= self.WARM_UP:
            return list(self._compiled(*inputs))
        if self._graph is None:
            fixed, others = inputs[: self._num_fixed], inputs[self._num_fixed :]
            self._inputs = [*fixed, *(given.clone() for given in others)]
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and runs nothing
                self._outputs = list(self._compiled(*self._inputs))
        for place, given in zip(self._inputs[self._num_fixed :], inputs[self._num_fixed :], strict=True):
            place.copy_(given, non_blocking=True)
        self._graph.replay()
        for number in self._changed:
            inputs[number].copy_(self._inputs[number], non_blocking=True)
        # copies: the next replay writes to the same memory
        return [output.clone() for output in self._outputs]
