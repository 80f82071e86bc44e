"""The processes that train together, as ``torchrun`` started them; torch's process groups do the transport."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """The processes that train together.

    There is one in a process, and none where a process trains alone: `current` returns it.

    Args:
        process_group: Torch's, of all processes.
        device: Where this process computes.

    Attributes:
        rank: The number of this process, from 0.
        size: How many processes there are.
        is_main: Whether this is the first process, which alone prints and writes.
        spare: Whether the running step repeats rows, because this process has run out of others and all have to take
            part in each step: its rows count nothing. Who gives the batch sets it before the step.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device) -> None:
        self.process_group = process_group
        self.device = device
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self.is_main = self.rank == 0
        self.spare = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Return the group itself: a copied learner trains with the same processes."""
        return self

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Add up a tensor over all processes, in place (or "max", "min").

        Args:
            tensor: Of one shape and type on all processes, on the group's device.
            op: What is done with the numbers.

        Returns:
            The tensor.
        """
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()), group=self.process_group)
        return tensor

    def broadcast(self, thing: Any, source: int = 0) -> Any:
        """Return what one process has, on all processes; anything that can be pickled."""
        things = [thing if self.rank == source else None]
        dist.broadcast_object_list(things, src=source, group=self.process_group)
        return things[0]

    def gather_objects(self, thing: Any) -> list[Any]:
        """Return what each process has, in the order of their numbers; anything that can be pickled."""
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.process_group)
        return things

    def wait(self) -> None:
        """Wait until all processes have come here."""
        dist.barrier(group=self.process_group)


_current: Group | None = None


def current() -> Group | None:
    """Return the group of this process; None where it trains alone."""
    return _current


def started_by_torchrun() -> bool:
    """Return whether this is one of several processes that ``torchrun`` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def join(device: torch.device) -> Group:
    """Join the processes that ``torchrun`` started; once joined, the same group is returned.

    Args:
        device: Where this process computes.
    """
    global _current
    if _current is None:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        world = dist.group.WORLD
        assert world is not None  # for type checkers: it is there once it was initialised
        _current = Group(world, device)
    return _current
