"""Reduced precision: torch's autocast around what a phase computes, and the scale of losses in fp16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import log2
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import Tensor

from fluxloop.errors import warn_user
from fluxloop.events import Event, LossBegin
from fluxloop.nested import map_tensors, tensors

if TYPE_CHECKING:
    from fluxloop.processes.group import Group

TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions, with what autocast computes in; None for what the tensors are."""

HALF = (torch.bfloat16, torch.float16)


def in_single(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision as float32, any other as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


P = ParamSpec("P")


def in_full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Have a loss be computed in float32 where autocast is on: its products, sums and means too.

    On the CPU torch 2.13 leaves means, sums and norms in bfloat16, in which 257 ones add up to 256.
    """

    @wraps(loss)
    def compute(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        # most losses are given tensors first: one call more in a step of full precision
        first: Any = args[0] if args and type(args[0]) is Tensor else next(tensors((args, kwargs)), None)
        if first is None or not torch.is_autocast_enabled(first.device.type):
            return loss(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            # for type checkers: the same arguments, with other tensors in them
            single: Any = map_tensors(in_single, (args, kwargs))
            return loss(*single[0], **single[1])

    return compute


class Casting:
    """Autocast for the steps of a learner: on while the phase computes, off in handlers, backward and update.

    The flags are set by hand: ``with torch.autocast`` costs 3.3 µs, this 0.9. Autocast keeps a copy of each weight that
    it has cast, and does not see that the weight changes; so the copies go wherever weights may have changed.

    Args:
        device: The type of device, ``"cuda"`` or ``"cpu"``.
        dtype: What autocast computes in.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device = device
        self.dtype = dtype

    def begin(self) -> tuple[bool, torch.dtype]:
        """Switch autocast on; return what was, for `end`."""
        before = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        torch.set_autocast_dtype(self._device, self.dtype)
        torch.set_autocast_enabled(self._device, True)
        return before

    def end(self, before: tuple[bool, torch.dtype]) -> None:
        """Switch autocast to what it was."""
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(self._device, before[0])
        torch.set_autocast_dtype(self._device, before[1])

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch autocast off inside, and forget the weights that it has cast: they may change there."""
        enabled = torch.is_autocast_enabled(self._device)
        torch.set_autocast_enabled(self._device, False)
        try:
            yield
        finally:
            torch.clear_autocast_cache()
            torch.set_autocast_enabled(self._device, enabled)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Switch autocast on inside."""
        before = self.begin()
        try:
            yield
        finally:
            self.end(before)

    def outside(self, learner: Any, handle: Callable[[Event], None]) -> Callable[[Event], None]:
        """Return a function that fires events as `handle` does, with autocast off.

        What the model predicted is in float32 from `LossBegin` on: on the CPU autocast leaves sums and means in the
        type of their input, and bfloat16 has no whole number above 256 that is odd.
        """

        def fire(event: Event) -> None:
            if type(event) is LossBegin:
                entries = vars(learner.step)
                if "preds" in entries:
                    entries["preds"] = map_tensors(in_single, entries["preds"])
            with self.off():
                handle(event)

        return fire

    def __repr__(self) -> str:
        return f"Casting({self._device!r}, {self.dtype})"


def power_next_to(weight: float, group: Group | None) -> float:
    """Return the power of two next to what a batch weighs, of all processes together, which all call this.

    Weights relative to it make small products with a loss scale, and gradients as large as those of one process on the
    joined batch: so as many of them overflow.

    >>> power_next_to(12.0, None)
    16.0
    """
    if group is not None:
        weight = group.all_reduce(torch.tensor(weight, device=group.device)).item()
    return float(2.0 ** round(log2(max(weight, 1e-6))))


class LossScale:
    """What losses are multiplied by in fp16, so that small gradients do not become 0; as torch's ``GradScaler`` does.

    One for all optimizers. It is halved in a step in which gradients of one of them were not finite (that one is not
    stepped then), and doubled after `interval` steps without.

    Attributes:
        value: The scale, a power of two.
        growth: Steps since it was changed.
    """

    LARGEST = 2.0**24
    PATIENCE = 40
    """Warn after so many updates in a row that were left out."""

    def __init__(self, value: float = 2.0**16, interval: int = 2000) -> None:
        self.value = value
        self.growth = 0
        self.interval = interval
        self.reference: float | None = None
        """What a batch weighed first: weights are taken relative to it, as products with the scale have to be small."""
        self.largest = LossScale.LARGEST
        self._left_out = 0
        self._changed_in: object = None
        self._counted_in: object = None

    def of_half_loss(self) -> None:
        """Take note that a loss itself is in fp16, in which 2**16 is infinite: the first gradient is the scale."""
        self.largest = 2.0**15
        self.value = min(self.value, self.largest)

    def stepped(self, step: object) -> None:
        """Note that an optimizer was stepped."""
        self._left_out = 0
        if self._counted_in is step:
            return
        self._counted_in = step
        self.growth += 1
        if self.growth >= self.interval:
            self.value, self.growth = min(2 * self.value, self.largest), 0

    def overflowed(self, step: object, whose: str) -> None:
        """Note that an optimizer was not stepped, as its gradients were not finite."""
        self._left_out += 1
        if self._changed_in is not step:
            self._changed_in = self._counted_in = step
            self.value, self.growth = self.value / 2, 0
        if self._left_out == LossScale.PATIENCE:
            warn_user(
                f"the last {self._left_out} updates were left out, those of {whose} among them: their gradients were "
                f"not finite in fp16, with a loss scale of {self.value:g} at last. Nothing is trained so: expected "
                "finite gradients, or precision='bf16', which needs no scale"
            )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"value": self.value, "growth": self.growth, "largest": self.largest, "reference": self.reference}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.value, self.growth = state["value"], state["growth"]
        self.largest, self.reference = state["largest"], state["reference"]
        self._left_out, self._changed_in, self._counted_in = 0, None, None
