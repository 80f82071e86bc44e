"""Whether one of several processes wants something, asked now and then at the same moment of the training in all."""

from __future__ import annotations

from time import monotonic

import torch

from fluxloop.processes.gather import host_of
from fluxloop.processes.group import Group


class NowAndThen:
    """Asks all processes about once a second whether one of them wants something that all do together.

    Asking at every step would be a message at every step. How many steps go by before the next time follows from
    how many went by in the last second, in the process that had the fewest.

    Args:
        group: The processes; all of them call `any_of` at the same moments.
        seconds: About how long it is from one time to the next.
    """

    def __init__(self, group: Group, seconds: float = 1.0) -> None:
        self._group = group
        self._seconds = seconds
        self._calls, self._next = 0, 1
        self._since = monotonic()

    def any_of(self, wants: bool, at_once: bool = False) -> bool:
        """Return whether a process wants it; False where it is not asked at this moment.

        Args:
            wants: Whether this one does. It is to say so until it is asked.
            at_once: Whether it is asked now in any case; the same in all processes.
        """
        self._calls += 1
        if self._calls < self._next and not at_once:
            return False
        now = monotonic()
        fitting = self._calls / max(now - self._since, 1e-6) * self._seconds
        soon = max(1, min(int(fitting), 2 * self._next))  # the first steps of a training are slow, or quick
        told = torch.tensor([int(wants), -soon], dtype=torch.int64, device=host_of(self._group))
        wanted, fewest = self._group.all_reduce(told, "max").tolist()
        self._calls, self._next, self._since = 0, -fewest, now
        return bool(wanted)
