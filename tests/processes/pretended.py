"""Groups of processes that are none: one alone whose messages come back as they are, and some that are threads."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxloop.processes.group import Group


class Alone(Group):
    """A process whose others have all said what it says: for what is the same on all of them."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device("cpu")
        self.is_main = rank == 0
        self.spare = False

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor

    def broadcast(self, thing: Any, source: int = 0) -> Any:
        return thing

    def gather_objects(self, thing: Any) -> list[Any]:
        return [thing] * self.size

    def wait(self) -> None:
        pass


class Threaded(Alone):
    """One of several threads that stand for processes."""

    def __init__(self, rank: int, size: int, barrier: Barrier, slots: list[Any]) -> None:
        super().__init__(rank, size)
        self._barrier = barrier
        self._slots = slots

    def gather_objects(self, thing: Any) -> list[Any]:
        self._slots[self.rank] = copy.deepcopy(thing)
        self._barrier.wait(10)
        found = copy.deepcopy(self._slots)
        self._barrier.wait(10)
        return found

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        of_all = torch.stack(self.gather_objects(tensor))
        return tensor.copy_({"sum": of_all.sum, "max": of_all.amax, "min": of_all.amin}[op](0))

    def broadcast(self, thing: Any, source: int = 0) -> Any:
        return self.gather_objects(thing)[source]


def together(size: int, function: Callable[[Threaded], Any]) -> list[Any]:
    """Call a function in as many threads, each with its group; return what each returned, or raised."""
    barrier, slots = Barrier(size), [None] * size
    results: list[Any] = [None] * size

    def call(rank: int) -> None:
        try:
            results[rank] = function(Threaded(rank, size, barrier, slots))
        except BaseException as error:
            results[rank] = error
            time.sleep(0.2)  # until the others have left the last one
            barrier.abort()  # or they would wait for this one at the next

    threads = [Thread(target=call, args=(rank,)) for rank in range(size)]
    bits = np.random.get_bit_generator()  # threads that preserve it at once leave one another's
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    np.random.set_bit_generator(bits)
    broken = [result for result in results if isinstance(result, BaseException)]
    others = [error for error in broken if not isinstance(error, BrokenBarrierError)]
    if others and len(others) < size:
        raise others[0]
    return results
