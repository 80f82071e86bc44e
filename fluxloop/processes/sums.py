"""Add up a tensor of each process, in place: small ones in pairs, where that is quicker than a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fluxloop.processes.group import Group

SMALL = 1 << 20
"""How many bytes are added up in pairs at most: up to that it takes the CPU 0.4 to 0.85 of the time of gloo's own.
Among more than `FEW` processes a sixteenth, as each pair more sends all of it once more."""
FEW = 4

_TAG = 0x666C
"""Of our messages; those that a user sends have 0."""


class Work(Protocol):
    """What is on its way."""

    def wait(self, /) -> Any:
        """Wait until it is done."""


class Sums:
    """Adds up tensors that have the same size on all processes.

    gloo gives each collective to a thread, in which the data of each process goes around in rings. A
    small tensor is there sooner where each process sends it to one other, adds up, sends the sum to
    another pair, and so on: the threads that wait are then those that compute. All processes add up the
    same numbers in the same order, so the sums have the same bits.

    Args:
        group: The processes.
        collective: Whether collectives alone are used, as in compiled steps: other processes may be in one.
    """

    def __init__(self, group: Group, *, collective: bool = False) -> None:
        self.group = group
        self._limit: int | None = 0 if collective else None

    def begin(self, tensor: Tensor, *, waits: bool = True) -> Work:
        """Begin to add up a tensor, in place; all processes begin the same in the same order.

        Args:
            tensor: Contiguous; of the same type and size everywhere.
            waits: Whether nothing is done before it is waited for. What a process sends in pairs has to be waited for
                on all, or the next tensor would be taken for it.

        Returns:
            What to wait for.
        """
        process_group = self.group.process_group
        if self._limit is None:
            size = self.group.size
            in_pairs = size & (size - 1) == 0 and "gloo" in dist.get_backend(process_group)
            self._limit = (SMALL if size <= FEW else SMALL >> 4) if in_pairs else 0
        if waits and tensor.is_cpu and tensor.nbytes <= self._limit:
            return _InPairs(process_group, self.group.rank, self.group.size, tensor)
        # As torch.distributed.all_reduce calls it, which costs as much again as a small message.
        work: Work = process_group.allreduce([tensor])
        return work


def mean_of(group: Group, value: Tensor | float, weight: Tensor | float) -> Tensor:
    """Return the mean of a number that each process has, the same on all; one that weighs nothing is left out.

    Args:
        group: The processes.
        value: Of this one.
        weight: What it weighs.
    """
    value, weight = (
        torch.as_tensor(number, dtype=torch.float64, device=group.device).detach().reshape(())
        for number in (value, weight)
    )
    total, weights = group.all_reduce(torch.stack([torch.where(weight == 0, 0.0, value * weight), weight]))
    mean: Tensor = total / torch.where(weights == 0, 1.0, weights)
    return mean


def with_mean_loss(
    closure: Callable[[], Any], group: Group | None, weigh: Callable[[], Tensor | float]
) -> Callable[[], Any]:
    """Return a closure whose loss is the mean of all processes: by it an optimizer decides how often it calls it.

    Args:
        closure: Computes gradients, and returns this process's loss.
        group: The processes; None for one alone.
        weigh: Says what that loss weighs.
    """
    if group is None:
        return closure

    def mean_loss() -> Any:
        loss = closure()
        return loss if loss is None else mean_of(group, loss, weigh())

    return mean_loss


class _InPairs:
    """A tensor that is added up in pairs.

    Args:
        process_group: Of all processes.
        rank: The number of this one.
        size: How many there are: a power of two.
        tensor: What is added up.
    """

    __slots__ = ("_arrives", "_process_group", "_rank", "_received", "_sent", "_size", "_tensor")

    def __init__(self, process_group: dist.ProcessGroup, rank: int, size: int, tensor: Tensor) -> None:
        self._process_group, self._rank, self._size = process_group, rank, size
        self._tensor, self._received = tensor, torch.empty_like(tensor)
        self._swap(1)

    def _swap(self, distance: int) -> None:
        other = self._rank ^ distance
        self._arrives: Work = self._process_group.recv([self._received], other, _TAG)
        self._sent: Work = self._process_group.send([self._tensor], other, _TAG)

    def wait(self) -> None:
        """Wait for the other of each pair."""
        distance = 1
        while True:
            self._arrives.wait()
            self._sent.wait()
            self._tensor += self._received
            distance *= 2
            if distance >= self._size:
                return
            self._swap(distance)
