"""Schedules: functions from a step, counted from 0, to a value.

Anything that takes a number of steps and gives a value is a schedule; a plain number is one that
never changes. A schedule keeps nothing between calls. It counts whatever its user counts: training
steps in ``Scheduler({LearningRate: ...})``, epochs with ``unit="epoch"``.

Those below are small values: they can be compared, pickled and printed. One with a `total` keeps
its last value from there on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from attrs import NOTHING, field, fields, frozen

from fluxloop.guard.assign import fields_of_the_class
from fluxloop.guard.given import as_plain, as_python, is_number, number

Schedule = Callable[[int], float]

_FINITE = number()


def value_at(schedule: float | Schedule, t: int) -> float:
    """Return a schedule's value at step `t`; a number is the same at every step."""
    return schedule(t) if callable(schedule) else schedule


def check_schedule(schedule: object, whose: str) -> None:
    """Raise for something that is neither a number nor a function.

    Args:
        schedule: What was given.
        whose: Where, for the message.

    Raises:
        ValueError: It is neither, or a class of schedules rather than one.
    """
    number_given: Any = schedule
    fixed = is_number(schedule) and math.isfinite(number_given)
    if isinstance(schedule, type) or not (callable(schedule) or fixed):
        given = f"the class {schedule.__name__}" if isinstance(schedule, type) else repr(schedule)
        raise ValueError(
            f"{whose} was given {given}; expected a schedule such as cosine(1000, 0.1, 0.0), a function of the step, "
            "or a number"
        )


def _check_total(schedule: Any, attribute: Any, total: Any) -> None:
    counted = is_number(total) and 1 <= total < math.inf
    if counted and attribute is not None and not float(total).is_integer():
        raise ValueError(
            f"a schedule of {total!r} steps was asked for; expected a whole number: {_usage(type(schedule))}"
        )
    if not counted:
        usage = "" if attribute is None else f": {_usage(type(schedule))}"
        raise ValueError(f"a schedule of {total!r} steps was asked for; expected 1 or more{usage}")


def _usage(cls: type) -> str:
    """Return a schedule's arguments in their order: torch has the number of steps last."""
    return f"{cls.__name__}({', '.join(a.name for a in fields(cls) if a.default is NOTHING)})"


def _check_schedule(schedule: Any, attribute: Any, value: Any) -> None:
    check_schedule(value, f"{type(schedule).__name__}({attribute.name}=...)")


def written(schedule: Any) -> str:
    """Write a schedule as a text, the same one for equal schedules; functions are not told apart."""
    if isinstance(schedule, Real):
        return repr(float(schedule)).removesuffix(".0")
    if isinstance(schedule, tuple):
        return f"({', '.join(map(written, schedule))})"
    if type(schedule).__module__ != __name__:
        return "None" if schedule is None else "a function"
    parts = (f"{a.name}={written(getattr(schedule, a.name))}" for a in fields(type(schedule)))
    return f"{type(schedule).__name__}({', '.join(parts)})"


# Converters of fields: NumPy's small numbers would wrap or round in silence, ``np.uint8(250) + 10`` is 4. There is one
# for each type, as type checkers read from it what the arguments are.


def _real(value: float) -> float:
    held: float = as_python(value)
    return held


def _whole(value: int) -> int:
    held: int = as_python(value)
    return held


def _times(value: int | None) -> int | None:
    held: int | None = as_python(value)
    return held


def _schedule(value: float | Schedule) -> float | Schedule:
    held: float | Schedule = as_python(value)
    return held


def _between(start: float, end: float, share: float) -> float:
    """Return the point at a share of the way; the ends are met exactly."""
    return end if share >= 1 else start + (end - start) * share


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@fields_of_the_class
@frozen
class constant:  # noqa: N801 - used like a function
    """Stay at `value`.

    >>> constant(0.1)(1000)
    0.1
    """

    value: float = field(converter=_real, validator=_FINITE)

    def __call__(self, t: int) -> float:
        """Return the value."""
        return self.value


@frozen
class _Span:
    """Base of what goes from `start` to `end`, and stays there."""

    total: int = field(converter=_whole, validator=_check_total)
    start: float = field(converter=_real, validator=_FINITE)
    end: float = field(converter=_real, validator=_FINITE)

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        return self.end if t >= self.total else self._at(max(t, 0) / self.total)

    def _at(self, share: float) -> float:
        """Return the value at a share of the way, from 0 to below 1."""
        raise NotImplementedError


@fields_of_the_class
@frozen
class linear(_Span):  # noqa: N801 - used like a function
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

    def _at(self, share: float) -> float:
        return _between(self.start, self.end, share)


@fields_of_the_class
@frozen
class cosine(_Span):  # noqa: N801 - used like a function
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

    def _at(self, share: float) -> float:
        return _half_cosine(self.start, self.end, share)


@fields_of_the_class
@frozen
class exponential(_Span):  # noqa: N801 - used like a function
    """Go from `start` to `end` by the same factor at every step: a straight line on a logarithmic scale.

    Without an end, by a given factor, is ``step(1, start, gamma)``.

    Args:
        total: Steps until `end` is reached; it is kept from then on.
        start: Value at step 0.
        end: Value at step `total`, of the sign of `start`.

    Raises:
        ValueError: `total` is less than 1, or there is no such factor.

    >>> [round(exponential(2, 1.0, 0.01)(t), 3) for t in (0, 1, 2, 9)]
    [1.0, 0.1, 0.01, 0.01]
    """

    def __attrs_post_init__(self) -> None:
        if not self.start * self.end > 0:
            raise ValueError(
                f"exponential(start={self.start!r}, end={self.end!r}) was given; no factor leads from one to the "
                "other: expected two numbers of one sign, neither 0"
            )

    def _at(self, share: float) -> float:
        return self.start * math.exp(math.log(self.end / self.start) * share)


@fields_of_the_class
@frozen
class polynomial(_Span):  # noqa: N801 - used like a function
    """Go from `start` to `end` as a power of what is left: ``(1 - t / total) ** power``.

    Args:
        total: Steps until `end` is reached; it is kept from then on.
        start: Value at step 0.
        end: Value at step `total`.
        power: 1 is a straight line; more is fast first.

    Raises:
        ValueError: `total` is less than 1, or `power` is not above 0.

    >>> [polynomial(4, 1.0, 0.0)(t) for t in (0, 1, 2, 4, 9)]
    [1.0, 0.5625, 0.25, 0.0, 0.0]
    """

    power: float = field(default=2.0, converter=_real, validator=_FINITE)

    def __attrs_post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"polynomial(power={self.power!r}) was given; expected more than 0")

    def _at(self, share: float) -> float:
        return float(self.end + (self.start - self.end) * (1 - share) ** self.power)


@fields_of_the_class
@frozen
class step:  # noqa: N801 - used like a function
    """Multiply by `gamma` every `every` steps, without an end.

    Args:
        every: Steps between two changes.
        start: Value at step 0.
        gamma: The factor.

    Raises:
        ValueError: `every` is less than 1.

    >>> [round(step(10, 1.0)(t), 3) for t in (0, 9, 10, 25)]
    [1.0, 1.0, 0.1, 0.01]
    """

    every: int = field(converter=_whole, validator=_check_total)
    start: float = field(converter=_real, validator=_FINITE)
    gamma: float = field(default=0.1, converter=_real, validator=_FINITE)

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        return float(self.start * self.gamma ** (max(t, 0) // self.every))


@fields_of_the_class
@frozen
class triangle:  # noqa: N801 - used like a function
    """Go from `start` to `peak` and back in straight lines; repeated, the cyclical rates of Smith (2017).

    Args:
        total: Steps until `start` is reached again; it is kept from then on (see `repeat`).
        start: Value at both ends.
        peak: Value in the middle.

    Raises:
        ValueError: `total` is less than 1.

    >>> [triangle(4, 0.0, 1.0)(t) for t in (0, 1, 2, 3, 4, 9)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    total: int = field(converter=_whole, validator=_check_total)
    start: float = field(converter=_real, validator=_FINITE)
    peak: float = field(converter=_real, validator=_FINITE)

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        share = min(max(t, 0) / self.total, 1.0)
        return _between(self.peak, self.start, abs(2 * share - 1))


@fields_of_the_class
@frozen
class sine:  # noqa: N801 - used like a function
    """Go from `start` to `peak` and back along half a sine.

    Args:
        total: Steps until `start` is reached again; it is kept from then on (see `repeat`).
        start: Value at both ends.
        peak: Value in the middle.

    Raises:
        ValueError: `total` is less than 1.

    >>> [round(sine(4, 0.0, 1.0)(t), 3) for t in (0, 1, 2, 4, 9)]
    [0.0, 0.707, 1.0, 0.0, 0.0]
    """

    total: int = field(converter=_whole, validator=_check_total)
    start: float = field(converter=_real, validator=_FINITE)
    peak: float = field(converter=_real, validator=_FINITE)

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        if t >= self.total:
            return self.start
        return self.start + (self.peak - self.start) * math.sin(math.pi * max(t, 0) / self.total)


@fields_of_the_class
@frozen
class inverse_sqrt:  # noqa: N801 - used like a function
    """Rise in a straight line for `warmup` steps, then fall as one over the square root of the step.

    The learning rate of the transformer (Vaswani et al., 2017, 5.3), which counts steps from 1:
    with ``peak = (width * warmup) ** -0.5`` the value at `t` is that of their step ``t + 1``.

    Args:
        warmup: Steps until the peak.
        peak: The highest value, at step ``warmup - 1``.

    Raises:
        ValueError: `warmup` is less than 1.

    >>> [round(inverse_sqrt(4, 1.0)(t), 3) for t in (0, 1, 3, 15)]
    [0.25, 0.5, 1.0, 0.5]
    """

    warmup: int = field(converter=_whole, validator=_check_total)
    peak: float = field(converter=_real, validator=_FINITE)

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        count = max(t, 0) + 1
        return self.peak * min(count / self.warmup, math.sqrt(self.warmup / count))


@fields_of_the_class
@frozen
class warmup:  # noqa: N801 - used like a function
    """Go from `start` to the first value of `then` in a straight line, then follow it.

    Args:
        steps: Steps until `then` begins, from its step 0.
        then: A schedule or a number.
        start: Value at step 0.

    Raises:
        ValueError: `steps` is less than 1, or `then` is no schedule.

    >>> [warmup(2, linear(4, 1.0, 0.0))(t) for t in (0, 1, 2, 3, 6)]
    [0.0, 0.5, 1.0, 0.75, 0.0]
    """

    steps: int = field(converter=_whole, validator=_check_total)
    then: float | Schedule = field(converter=_schedule, validator=_check_schedule)
    start: float = field(default=0.0, converter=_real, validator=_FINITE)

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        if t >= self.steps:
            return value_at(self.then, t - self.steps)
        return _between(self.start, value_at(self.then, 0), max(t, 0) / self.steps)


@fields_of_the_class
@frozen
class one_cycle:  # noqa: N801 - used like a function
    """Go up from ``max_value / div`` to `max_value`, then down to ``max_value / div_final``, along half cosines.

    The super-convergence of Smith and Topin (2018), in the form that fastai made known. After
    `total` steps it stays where it ended.

    Args:
        total: Steps until the end.
        max_value: The highest value.
        pct_start: Share of the steps that go up, 0 to 1; their number is rounded up.
        div: The first value is this many times less than the highest.
        div_final: The last value is this many times less than the highest.

    Raises:
        ValueError: `total` is less than 1, `pct_start` is no share, or a divisor is not above 0.

    >>> [round(one_cycle(8, 1.0)(t), 5) for t in (0, 1, 2, 5, 8, 20)]
    [0.04, 0.52, 1.0, 0.50001, 1e-05, 1e-05]
    """

    total: int = field(converter=_whole, validator=_check_total)
    max_value: float = field(converter=_real, validator=_FINITE)
    pct_start: float = field(default=0.25, converter=_real, validator=_FINITE)
    div: float = field(default=25.0, converter=_real, validator=_FINITE)
    div_final: float = field(default=1e5, converter=_real, validator=_FINITE)

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.pct_start <= 1:
            raise ValueError(
                f"one_cycle(pct_start={self.pct_start!r}) was given; expected a share of the steps, 0 to 1"
            )
        if not (self.div > 0 and self.div_final > 0):
            raise ValueError(
                f"one_cycle(div={self.div!r}, div_final={self.div_final!r}) was given; expected more than 0"
            )

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        up = math.ceil(self.total * self.pct_start)
        end = self.max_value / self.div_final
        if t >= self.total:
            return end
        if t < up:
            return _half_cosine(self.max_value / self.div, self.max_value, max(t, 0) / up)
        return _half_cosine(self.max_value, end, (t - up) / (self.total - up))


@fields_of_the_class
@frozen(init=False)
class sequence:  # noqa: N801 - used like a function
    """Follow schedules one after the other; each begins at its step 0.

    Args:
        parts: Pairs (schedule, number of steps, rounded up). The last may be a schedule alone, which goes on
            without an end; of a pair, the value after its steps is kept.

    Raises:
        ValueError: There is none, or one is no such pair.

    >>> schedule = sequence((linear(2, 0.0, 1.0), 2), (constant(1.0), 3), step(1, 1.0, 0.5))
    >>> [schedule(t) for t in (0, 1, 2, 4, 5, 6, 7)]
    [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.25]
    """

    parts: tuple[tuple[float | Schedule, float], ...]

    def __init__(self, *parts: tuple[float | Schedule, int] | float | Schedule) -> None:
        read: list[tuple[Any, float]] = []
        for index, part in enumerate(map(as_plain, parts)):
            alone = index == len(parts) - 1 and not isinstance(part, (tuple, list))
            pair: Any = (part, math.inf) if alone else part
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(
                    f"sequence was given {part!r} as part {index}; expected pairs (schedule, number of steps), only "
                    "the last may be a schedule alone: sequence((linear(10, 0.0, 0.1), 10), constant(0.1))"
                )
            check_schedule(pair[0], f"part {index} of a sequence")
            if not alone:
                _check_total(self, None, pair[1])
            read.append((_schedule(pair[0]), math.inf if alone else math.ceil(pair[1])))
        if not read:
            raise ValueError("sequence() was given nothing; expected pairs (schedule, number of steps)")
        self.__attrs_init__(tuple(read))

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        for schedule, length in self.parts[:-1]:
            if t < length:
                return value_at(schedule, t)
            t -= int(length)
        schedule, length = self.parts[-1]
        return value_at(schedule, t if t < length else int(length))

    def __repr__(self) -> str:
        shown = [repr(part[0]) if part[1] == math.inf else repr(part) for part in self.parts]
        return f"sequence({', '.join(shown)})"


@fields_of_the_class
@frozen
class shift:  # noqa: N801 - used like a function
    """Begin a schedule later: its first value is kept for `steps` steps. A negative number begins inside it.

    Args:
        schedule: The schedule.
        steps: How much later.

    Raises:
        ValueError: `schedule` is no schedule, or `steps` no whole number.

    >>> [shift(linear(2, 1.0, 0.0), 2)(t) for t in (0, 2, 3, 4)]
    [1.0, 1.0, 0.5, 0.0]
    >>> shift(linear(2, 1.0, 0.0), -1)(0)
    0.5
    """

    schedule: float | Schedule = field(converter=_schedule, validator=_check_schedule)
    steps: int = field(converter=_whole)

    @steps.validator
    def _check_steps(self, attribute: object, steps: object) -> None:
        if not is_number(steps, whole=True):
            raise ValueError(f"shift(steps={steps!r}) was given; expected a whole number")

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        return value_at(self.schedule, max(t - self.steps, 0))


@fields_of_the_class
@frozen
class repeat:  # noqa: N801 - used like a function
    """Begin a schedule anew every `every` steps; with a restart of `cosine`, SGDR (Loshchilov and Hutter, 2017).

    Args:
        schedule: The schedule.
        every: Steps of one round.
        times: How many rounds, after which the schedule's value at its step `every` is kept; left
            out, there is no end.

    Raises:
        ValueError: `schedule` is no schedule, or a number is less than 1.

    >>> [repeat(linear(2, 1.0, 0.0), 2)(t) for t in (0, 1, 2, 3, 4)]
    [1.0, 0.5, 1.0, 0.5, 1.0]
    >>> [repeat(linear(2, 1.0, 0.0), 2, times=1)(t) for t in (0, 1, 2, 3)]
    [1.0, 0.5, 0.0, 0.0]
    """

    schedule: float | Schedule = field(converter=_schedule, validator=_check_schedule)
    every: int = field(converter=_whole, validator=_check_total)
    times: int | None = field(default=None, converter=_times)

    @times.validator
    def _check_times(self, attribute: object, times: Any) -> None:
        if times is not None and not (is_number(times, whole=True) and times >= 1):
            raise ValueError(f"repeat(times={times!r}) was given; expected a whole number, 1 or more, or None")

    def __call__(self, t: int) -> float:
        """Return the value at step `t`."""
        if self.times is not None and t >= self.every * self.times:
            return value_at(self.schedule, self.every)
        return value_at(self.schedule, max(t, 0) % self.every)
