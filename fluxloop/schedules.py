"""Schedules: functions from a step, counted from 0, to a value."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def linear(total: int, start: float, end: float) -> Schedule:
    """Go from `start` to `end` in a straight line.

    Args:
        total: Steps until `end` is reached; it is kept from then on.
        start: Value at step 0.
        end: Value at step `total`.

    Raises:
        ValueError: `total` is less than 1.

    >>> [linear(4, 1.0, 0.0)(t) for t in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """
    _check(total)
    return lambda t: start + (end - start) * min(t / total, 1.0)


def cosine(total: int, start: float, end: float) -> Schedule:
    """Go from `start` to `end` along half a cosine: slow, fast, slow.

    From the learning rates of SGDR (Loshchilov and Hutter, 2017) and the teacher's momentum of
    BYOL (Grill et al., 2020), ``cosine(total, 0.996, 1.0)``.

    Args:
        total: Steps until `end` is reached; it is kept from then on.
        start: Value at step 0.
        end: Value at step `total`.

    Raises:
        ValueError: `total` is less than 1.

    >>> [round(cosine(4, 1.0, 0.0)(t), 3) for t in (0, 1, 2, 4, 9)]
    [1.0, 0.854, 0.5, 0.0, 0.0]
    """
    _check(total)
    return lambda t: end + (start - end) * (1 + math.cos(math.pi * min(t / total, 1.0))) / 2


def value_at(schedule: float | Schedule, t: int) -> float:
    """Give a schedule's value at step `t`; a number is the same at every step."""
    return schedule(t) if callable(schedule) else schedule


def _check(total: int) -> None:
    if total < 1:
        raise ValueError(f"a schedule of {total!r} steps was asked for; expected 1 or more")
