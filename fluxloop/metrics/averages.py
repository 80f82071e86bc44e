"""Averages that stay on the device until their value is asked for."""

from __future__ import annotations

from collections import deque
from math import ceil, log
from typing import Any

import torch
from torch import Tensor

FOLD_AFTER = 128
"""How many values `Mean` collects before it adds them up: one kernel for many steps."""

LEAST = 1e-17
"""A share in a moving average that changes no digit of it."""


class Mean:
    """A weighted mean of scalars that stays on their device; hardly anything is computed per step.

    One kernel adds up many of them, and one counts what is true in many tensors.
    """

    __slots__ = ("_last", "_over", "_pending", "_total", "_weight", "_weights")

    def __init__(self) -> None:
        self._pending: list[Tensor] = []
        self._weights: list[float | Tensor] = []
        self._over: list[int] = []
        self._total: Tensor | None = None
        self._weight: float | Tensor = 0

    def add(self, value: Tensor, weight: float | Tensor = 1, over: int = 1) -> None:
        """Add a value, which must not be changed in place afterwards.

        Args:
            value: A scalar; or truth values, with a dimension or more, which stand for how many of them are true.
            weight: Of the value in the mean, 0 or more; a value that weighs nothing may be NaN.
            over: What the value is to be divided by: many are divided at once.
        """
        self._last = value
        self._pending.append(value)
        self._weights.append(weight)
        self._over.append(over)
        if len(self._pending) >= FOLD_AFTER:
            self._fold()

    def latest(self) -> Tensor:
        """Return the newest value."""
        return self._last

    def _sum(self) -> Tensor | None:
        """Return the sum so far. Asking for it at one time or another changes no bit of later sums."""
        if not self._pending:
            return self._total
        values = stacked(self._pending)
        # in 64 bits, so that the sum of a long epoch loses no digits; Apple's GPUs have none
        exact = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
        if self._over.count(1) != len(self._over):
            exact = exact / torch.tensor(self._over, dtype=exact.dtype, device=exact.device)
        first = self._weights[0]  # nearly all batches weigh the same, and need no tensor of weights
        if not isinstance(first, Tensor) and first > 0 and self._weights.count(first) == len(self._weights):
            total = exact.sum() * first
        else:
            weights = self._stacked(exact)  # a value that weighs nothing may be NaN, which times 0 stays NaN
            total = torch.where(weights == 0, 0.0, exact * weights).sum()
        return total if self._total is None else self._total + total

    def _stacked(self, values: Tensor) -> Tensor:
        """Return the weights that wait as one tensor, in the type and on the device of the values."""
        if any(isinstance(weight, Tensor) for weight in self._weights):
            return torch.stack([torch.as_tensor(weight).to(values) for weight in self._weights])
        return torch.tensor(self._weights, dtype=values.dtype, device=values.device)

    def _fold(self) -> None:
        self._total, self._weight = self._sum(), self._weight + sum(self._weights)
        self._pending, self._weights, self._over = [], [], []

    def compute(self) -> Tensor | None:
        """Return the mean so far, as a scalar tensor on the device; None where no value weighs anything."""
        total = self._sum()
        weight = self._weight + sum(self._weights)
        return None if total is None or (not isinstance(weight, Tensor) and weight == 0) else total / weight

    def told(self) -> tuple[float, float] | None:
        """Return the sum so far and its weight, for other processes; None before the first value."""
        total = self._sum()
        return None if total is None else (float(total), float(self._weight + sum(self._weights)))

    @staticmethod
    def joined(told: list[tuple[float, float]]) -> Tensor | None:
        """Return the mean of what several processes have `told`; None where no value weighs anything."""
        weight = sum(weight for _, weight in told)
        return torch.tensor(sum(total for total, _ in told) / weight, dtype=torch.float64) if weight else None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        kept = {name.lstrip("_"): getattr(self, name, None) for name in self.__slots__}
        return kept | {"pending": [counted(value) for value in self._pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)
        if "over" not in state:  # of a checkpoint written before there was one
            self._over = [1] * len(self._pending)


def counted(value: Tensor) -> Tensor:
    """Return a scalar: the value, or how many of its truth values are true."""
    return value.count_nonzero() if value.ndim else value


def stacked(values: list[Tensor]) -> Tensor:
    """Return scalars as one tensor; of truth values the counts, in one kernel where all have one shape, as most do."""
    if values[0].ndim and len({value.shape for value in values}) == 1:
        return torch.stack(values).flatten(1).sum(1)
    return torch.stack([counted(value) for value in values])


class MovingAverage:
    """An exponential moving average of scalars, on their device.

    Args:
        decay: Weight of the past.
        keeps_steps: Whether it keeps its last values, as many as count in the average, to be joined with those of
            other processes: the average of several is that of the steps' means, each process weighted.
    """

    def __init__(self, decay: float, keeps_steps: bool = False) -> None:
        self._decay = decay
        self._value: Tensor | None = None
        self._weight = 0.0
        self._count = 0
        self._steps: deque[tuple[Tensor, float | Tensor]] | None = None
        if keeps_steps:
            self._steps = deque(maxlen=ceil(log(LEAST) / log(decay)) if decay > LEAST else 1)

    def add(self, value: Tensor, weight: float | Tensor = 1) -> None:
        """Add a value; its weight plays no part in this process's average."""
        past = self._value if self._value is not None else torch.zeros_like(value)
        self._value = self._decay * past + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        self._count += 1
        if self._steps is not None:
            self._steps.append((value, weight))

    def latest(self) -> Tensor:
        """Return the average after the newest value."""
        if self._value is None:
            raise ValueError("no value was added")
        return self._value / self._weight

    def compute(self) -> Tensor | None:
        """Return the average so far."""
        return None if self._value is None else self.latest()

    def told(self) -> tuple[int, list[tuple[float, float]]] | None:
        """Return how many values there were, and the last ones with their weights; None before the first value."""
        if self._value is None:
            return None
        if self._steps is None:  # of a checkpoint of one process: as one value
            return 1, [(float(self.latest()), 1.0)]
        return self._count, [(float(value), float(weight)) for value, weight in self._steps]

    def joined(self, told: list[tuple[int, list[tuple[float, float]]]]) -> Tensor | None:
        """Return the average over the steps of processes that have `told` theirs; None where there are none."""
        steps: dict[int, list[tuple[float, float]]] = {}
        for count, values in told:
            for place, value in enumerate(values, count - len(values)):
                steps.setdefault(place, []).append(value)
        last, total, past = max(steps, default=0), 0.0, 0.0
        for place, values in sorted(steps.items()):
            weight = sum(weight for _, weight in values)
            if weight:
                share = self._decay ** (last - place)
                total += share * sum(value * weight for value, weight in values if weight) / weight
                past += share
        return torch.tensor(total / past, dtype=torch.float64) if past else None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        state: dict[str, Any] = {"value": self._value, "weight": self._weight}
        return state if self._steps is None else state | {"count": self._count, "steps": list(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self._value, self._weight = state["value"], state["weight"]
        self._count = state.get("count", 0)
        if self._steps is not None:
            self._steps.clear()
            self._steps.extend(state.get("steps", ()))
