"""Averages that stay on the device until somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

FOLD_AFTER = 128
"""How many values `Mean` keeps before it adds them up: one kernel for many steps."""


class Mean:
    """A weighted mean of scalars that stays on their device; nothing is computed per step but `add`."""

    __slots__ = ("_last", "_pending", "_total", "_weight", "_weights")

    def __init__(self) -> None:
        self._pending: list[Tensor] = []
        self._weights: list[int] = []
        self._total: Tensor | None = None
        self._weight = 0

    def add(self, value: Tensor, weight: int = 1) -> None:
        """Take one more value; it must not be changed in place afterwards."""
        self._last = value
        self._pending.append(value)
        self._weights.append(weight)
        if len(self._pending) >= FOLD_AFTER:
            self._fold()

    def latest(self) -> Tensor:
        """Give the newest value."""
        return self._last

    def _fold(self) -> None:
        if not self._pending:
            return
        values = torch.stack(self._pending)
        exact = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
        weights = set(self._weights)
        if len(weights) == 1:
            total = exact.sum() * weights.pop()
        else:
            total = (exact * torch.tensor(self._weights, dtype=exact.dtype, device=exact.device)).sum()
        self._total = total if self._total is None else self._total + total
        self._weight += sum(self._weights)
        self._pending, self._weights = [], []

    def compute(self) -> Tensor | None:
        """Give the mean so far, as a scalar tensor on the device; None without values."""
        self._fold()
        return None if self._total is None else self._total / self._weight


class MovingAverage:
    """An exponential moving average of scalars, on their device."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._value: Tensor | None = None
        self._weight = 0.0

    def add(self, value: Tensor, weight: int = 1) -> None:
        """Take one more value; the batch size plays no part."""
        past = self._value if self._value is not None else torch.zeros_like(value)
        self._value = self._decay * past + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)

    def latest(self) -> Tensor:
        """Give the average after the newest value."""
        if self._value is None:
            raise ValueError("no value was added")
        return self._value / self._weight

    def compute(self) -> Tensor | None:
        """Give the average so far."""
        return None if self._value is None else self.latest()
