"""A list of (step, value) that a checkpoint keeps as two arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

CHUNK = 128
"""After how many new entries they are packed: one kernel stacks many tensors."""


class Series(list[tuple[int, Any]]):
    """A list of (step, value), appended to at every step; numbers and scalar tensors are also held packed in arrays.

    A checkpoint writes the arrays, so it neither grows nor slows down by a Python object per step.
    """

    def __init__(self, entries: Iterable[tuple[int, Any]] = ()) -> None:
        super().__init__(entries)
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Series:
        return Series(self)  # its entries are never changed

    def _forget(self) -> None:
        self._steps = array("q")
        self._values: list[Tensor] = []  # packed, chunk by chunk; joined when a checkpoint asks for them
        self._last: Any = None

    def append(self, entry: tuple[int, Any]) -> None:
        """Add an entry at the end."""
        super().append(entry)
        if len(self) - len(self._steps) >= CHUNK:
            self._pack()

    def __setitem__(self, index: Any, entry: Any) -> None:
        super().__setitem__(index, entry)
        self._forget()

    def __delitem__(self, index: Any) -> None:
        super().__delitem__(index)
        self._forget()

    def _pack(self) -> None:
        """Pack the entries that are new; what was replaced is packed anew."""
        if self._steps and (len(self) < len(self._steps) or self[len(self._steps) - 1] is not self._last):
            self._forget()
        new = self[len(self._steps) :]
        if new:
            steps, values = zip(*new, strict=True)
            self._values.append(_packed(values))
            self._steps.extend(steps)
            self._last = new[-1]

    def arrays(self) -> tuple[Tensor, Tensor] | None:
        """Return the steps and the values as one tensor each; None where the values are not of one kind."""
        if not self or {type(self[0][1]), type(self[-1][1])} - {int, float, Tensor}:
            return None
        try:
            self._pack()
            if len({(values.dtype, values.device) for values in self._values}) != 1:
                return None
            self._values = [torch.cat(self._values)]
            return torch.frombuffer(bytearray(self._steps.tobytes()), dtype=torch.int64), self._values[0]
        except (TypeError, ValueError, RuntimeError, OverflowError):  # something else is among them
            self._forget()
            return None


def _packed(values: tuple[Any, ...]) -> Tensor:
    """Return numbers of one kind, or scalar tensors, as one tensor.

    Raises:
        TypeError: They are something else.
    """
    kinds = set(map(type, values))
    if kinds == {float}:
        return torch.frombuffer(array("d", values), dtype=torch.float64)
    if kinds == {int}:
        return torch.frombuffer(array("q", values), dtype=torch.int64)
    if kinds == {Tensor} and not any(map(Tensor.dim, values)) and len({value.dtype for value in values}) == 1:
        return torch.stack(values)
    raise TypeError(kinds)
