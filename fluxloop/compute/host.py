"""Numbers on the host without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fluxloop.errors import annotate

Then = Callable[[Any], object]


class HostQueue:
    """Brings scalars to the host: at once on the CPU; elsewhere in one copy per step, delivered later.

    On a device, what one step asked for travels in one non-blocking copy when the step ends, and
    is delivered when it has arrived: at the end of a later step, at the latest when the epoch ends.

    Args:
        device: Where the numbers are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked: list[tuple[Tensor, Then]] = []
        self._travelling: list[tuple[Tensor, Any, list[Then]]] = []
        self.busy = False
        """Whether something was asked for and not yet delivered."""

    def request(self, tensor: Tensor, then: Then) -> None:
        """Call ``then(number)`` once the scalar `tensor` is on the host."""
        if tensor.device.type == "cpu":
            then(tensor.item())
        else:
            self._asked.append((tensor.detach(), then))
            self.busy = True

    def send(self) -> None:
        """Start the copy of what was asked for, and deliver what has arrived."""
        if self._asked:
            # One copy for all numbers of a step, as each costs a launch; float64 holds whole numbers up to 2**53 and
            # every narrower float exactly. MPS has no float64.
            exact = torch.float32 if self._device.type == "mps" else torch.float64
            numbers = torch.stack([tensor.reshape(()).to(exact) for tensor, _ in self._asked])
            copy = numbers.to("cpu", non_blocking=True)
            arrived: Any = None
            if self._device.type == "cuda":
                arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types there
                arrived.record()
            self._travelling.append((copy, arrived, [then for _, then in self._asked]))
            self._asked = []
        while self._travelling:
            _, arrived, _ = self._travelling[0]
            if arrived is None or not arrived.query():  # None: nothing tells whether it has, so it waits for `flush`
                break
            self._deliver()

    def flush(self) -> None:
        """Wait for what is travelling and deliver it."""
        self.send()
        while self._travelling:
            _, arrived, _ = self._travelling[0]
            if arrived is not None:
                arrived.synchronize()
            elif self._device.type == "mps":
                torch.mps.synchronize()
            self._deliver()

    def drop(self) -> None:
        """Forget what was asked for."""
        self._asked, self._travelling, self.busy = [], [], False

    def _deliver(self) -> None:
        copy, _, thens = self._travelling.pop(0)  # before anyone is called: one that raises is not called again
        self.busy = bool(self._asked or self._travelling)
        first: BaseException | None = None
        for number, then in zip(copy.tolist(), thens, strict=True):
            try:
                then(number)
            except BaseException as error:
                if first is None:
                    first = error
                else:
                    annotate(first, f"fluxloop: another number was refused as well: {error!r}")
        if first is not None:
            raise first
