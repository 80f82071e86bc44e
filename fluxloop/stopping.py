"""Criteria that say when to stop: those of EarlyStopping.jl, combined with ``|`` and ``&``.

A criterion is given one value after another, such as the validation loss of each epoch. What is
better is less, or with ``mode="max"`` more; in that mode every formula is that of the negated
values. NaN is never better than anything. `InvalidValue` stops at it; `NoImprovement` counts it as
no improvement, `Patience` as an increase; to the others it says nothing.

>>> running = (Patience(2) | Threshold(0.1)).start()
>>> [running.update(value) for value in (1.0, 0.5, 0.6, 0.7)][-1]
'2 increases in a row, to 0.7'

`GL`, `PQ` and `Patience` are those of Prechelt, "Early Stopping - But When?" (1998).
"""

from __future__ import annotations

import copy
import sys
from math import inf, isfinite, isnan
from time import monotonic
from typing import Any, ClassVar, TypeVar

from attrs import Attribute, define, evolve, field, fields

from fluxloop.errors import CheckpointError, describe
from fluxloop.guard.assign import fields_of_the_class
from fluxloop.guard.given import is_number
from fluxloop.monitor import Mode

C = TypeVar("C", bound="Criterion")


def _count(instance: object, attribute: Attribute[Any], value: Any) -> None:
    """Raise for anything but a whole number, 1 or more."""
    if not is_number(value, whole=True) or value < 1:
        raise ValueError(
            f"{type(instance).__name__}({attribute.name}={value!r}) was given; expected a whole number, 1 or more"
        )


def _positive(instance: object, attribute: Attribute[Any], value: Any) -> None:
    """Raise for anything but a number above 0."""
    if not is_number(value) or not value > 0:
        raise ValueError(f"{type(instance).__name__}({attribute.name}={value!r}) was given; expected a number above 0")


def _number(instance: object, attribute: Attribute[Any], value: Any) -> None:
    """Raise for anything but a number."""
    if not is_number(value) or isnan(value):
        raise ValueError(f"{type(instance).__name__}({attribute.name}={value!r}) was given; expected a number")


def _criterion(instance: object, attribute: Attribute[Any], value: Any) -> None:
    """Raise for anything but a criterion."""
    if not isinstance(value, Criterion):
        raise TypeError(f"{type(instance).__name__} was given {describe(value)}; expected a criterion: Patience(5)")


@fields_of_the_class
@define
class Criterion:
    """Base of stopping criteria. A subclass is an ``attrs`` class and says `update`.

    What it keeps between values are fields with ``init=False``: `start` gives a copy in which they
    are as at first, and a checkpoint keeps them. One of one's own::

        @define
        class NumberBelow(Criterion):
            limit: float
            seen: int = field(default=0, init=False, repr=False)

            def update(self, value, training_losses=()):
                self.seen += value < self.limit
                return "three values were low enough" if self.seen >= 3 else None

    Attributes:
        mode: ``"min"`` where less is better, ``"max"`` where more is; set by `start`.
    """

    mode: Mode = field(default="min", init=False, repr=False, eq=False)

    needs_training_losses: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields_of_the_class(cls)

    needs_mode: ClassVar[bool] = True
    """Whether it matters which way is better."""

    def start(self: C, mode: Mode = "min") -> C:
        """Return a copy that has seen no value yet; this one stays as it is.

        Args:
            mode: ``"min"`` where less is better, ``"max"`` where more is.
        """
        begun = evolve(self)
        begun.mode = mode
        for name, inner in self._inner().items():
            setattr(begun, name, inner.start(mode))
        return begun

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Take in a value.

        Args:
            value: The newest.
            training_losses: Those since the value before, the oldest first.

        Returns:
            Why to stop, in words; None to go on.
        """
        raise NotImplementedError

    def wants_training_losses(self) -> bool:
        """Return whether it needs training losses."""
        return self.needs_training_losses or any(inner.wants_training_losses() for inner in self._inner().values())

    def wants_mode(self) -> bool:
        """Return whether it, or one that it is made of, has to know which way is better."""
        inner = self._inner().values()
        return any(each.wants_mode() for each in inner) if inner else self.needs_mode

    def _inner(self) -> dict[str, Criterion]:
        """Return the criteria of which it is made, by field."""
        held = {each.name: getattr(self, each.name) for each in fields(type(self))}
        return {name: value for name, value in held.items() if isinstance(value, Criterion)}

    def _loss(self, value: float) -> float:
        """Return a value such that less is better."""
        return value if self.mode == "min" else -value

    def state_dict(self) -> dict[str, Any]:
        """Return what it has between values, as plain data."""
        kept = [each.name for each in fields(type(self)) if not each.init and each.name not in ("mode", "_since")]
        inner = {name: criterion.state_dict() for name, criterion in self._inner().items()}
        return {"kind": type(self).__name__, **{name: copy.deepcopy(getattr(self, name)) for name in kept}, **inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a kept state; numbers such as a patience may be others than they were.

        Raises:
            CheckpointError: It is of another criterion.
        """
        kind = type(self).__name__
        if state.get("kind") != kind:
            raise CheckpointError(
                f"the kept state is of the criterion {state.get('kind')}, and this is {kind}; go on with the "
                "same criterion, or begin anew in another folder"
            )
        inner = self._inner()
        for name, value in state.items():
            if name in inner:
                inner[name].load_state_dict(value)
            elif name != "kind":
                setattr(self, name, copy.deepcopy(value))

    def __or__(self, other: Criterion) -> Criterion:
        return AnyOf(self, other) if isinstance(other, Criterion) else NotImplemented

    def __and__(self, other: Criterion) -> Criterion:
        return AllOf(self, other) if isinstance(other, Criterion) else NotImplemented


@define
class _Pair(Criterion):
    """Two criteria; each sees every value and has a state of its own."""

    first: Criterion = field(validator=_criterion)
    second: Criterion = field(validator=_criterion)

    _sign: ClassVar[str] = ""

    def _reasons(self, value: float, training_losses: tuple[float, ...]) -> list[str]:
        """Return the reasons of those of the two that would stop now."""
        reasons = [each.update(value, training_losses) for each in (self.first, self.second)]
        return [reason for reason in reasons if reason is not None]

    def __repr__(self) -> str:
        return f"({self.first!r} {self._sign} {self.second!r})"


@define(repr=False)
class AnyOf(_Pair):
    """Stop where one of two criteria does: ``Patience(5) | InvalidValue()``."""

    _sign: ClassVar[str] = "|"

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Take in a value."""
        return " and ".join(self._reasons(value, training_losses)) or None


@define(repr=False)
class AllOf(_Pair):
    """Stop where two criteria do at the same value: ``Threshold(0.1) & NumberLimit(20)``."""

    _sign: ClassVar[str] = "&"

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Take in a value."""
        reasons = self._reasons(value, training_losses)
        return " and ".join(reasons) if len(reasons) == 2 else None


@define
class Never(Criterion):
    """Never stop.

    >>> Never().start().update(float("nan"))  # None: go on
    """

    needs_mode = False

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Go on."""
        return None


@define
class InvalidValue(Criterion):
    """Stop when a value or a training loss is NaN or infinite, and at every value after it.

    >>> InvalidValue().start().update(float("nan")) is None, InvalidValue().start().update(0.5) is None
    (False, True)
    """

    needs_mode = False

    invalid: float | None = field(default=None, init=False, repr=False, eq=False)

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Take in a value."""
        if self.invalid is None:
            self.invalid = next((each for each in (*training_losses, value) if not isfinite(each)), None)
        return None if self.invalid is None else f"a value was {self.invalid}"


@define
class TimeLimit(Criterion):
    """Stop when so much time has passed since it was started, summed over resumed runs.

    It is looked at when a value comes; for a limit that is looked at after every step use `Timer`.

    Args:
        seconds: Above 0.

    >>> TimeLimit(3600).start().update(0.5)  # None: an hour has not passed
    """

    needs_mode = False

    seconds: float = field(validator=_positive)
    elapsed: float = field(default=0.0, init=False, repr=False, eq=False)
    _since: float = field(factory=lambda: monotonic(), init=False, repr=False, eq=False)

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Look at the clock."""
        now = monotonic()
        self.elapsed, self._since = self.elapsed + now - self._since, now
        return f"{self.elapsed:.6g} seconds of {self.seconds:g} have passed" if self.elapsed > self.seconds else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the time that had passed."""
        super().load_state_dict(state)
        self._since = monotonic()


@define
class GL(Criterion):
    """Stop when the generalization loss exceeds a threshold (Prechelt, 1998).

    It is ``100 * (value - best) / abs(best)``: by how many per cent the value is worse than the
    best so far.

    Args:
        alpha: Per cent, above 0.

    >>> running = GL(alpha=10.0).start()
    >>> [running.update(value) is not None for value in (1.0, 0.5, 0.52, 0.6)]  # 4 and 20 per cent worse than 0.5
    [False, False, False, True]
    """

    alpha: float = field(default=2.0, validator=_positive)
    best: float | None = field(default=None, init=False, repr=False, eq=False)

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Take in a value."""
        worse = self._generalization_loss(value)
        return f"worse than the best by {worse:.6g} %, more than {self.alpha:g}" if worse > self.alpha else None

    def _generalization_loss(self, value: float) -> float:
        loss = self._loss(value)
        if self.best is None or isnan(self.best) or loss < self.best:
            self.best = loss
        return 100 * _relative(loss - self.best, self.best)


def _relative(difference: float, base: float) -> float:
    """Divide by the size of a number that may be 0."""
    return difference / abs(base) if base else (inf if difference > 0 else 0.0)


@define
class PQ(GL):
    """Stop when the generalization loss is large next to the training progress (Prechelt, 1998).

    The progress is ``1000 * (mean - least) / abs(least)`` of the last `k` training losses, the
    generalization loss that of `GL`. It stops too when there is no progress, and says nothing
    before there are `k` training losses.

    Args:
        alpha: Largest quotient of the two, above 0.
        k: Number of training losses, 2 or more.
        tol: Least progress, above 0.

    >>> running = PQ(alpha=0.75, k=2).start()
    >>> [running.update(0.5, (1.0, 0.9)) is None, running.update(0.9, (0.9, 0.9)) is None]  # worse, without progress
    [True, False]
    """

    alpha: float = field(default=0.75, validator=_positive)
    k: int = field(default=5, validator=_count)
    tol: float = field(default=sys.float_info.epsilon, validator=_positive)
    losses: list[float] = field(factory=list, init=False, repr=False, eq=False)

    needs_training_losses = True

    def __attrs_post_init__(self) -> None:
        if self.k < 2:
            raise ValueError("PQ(k=1) was given; expected 2 or more: one training loss shows no progress")

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Take in a value and the training losses since the one before."""
        self.losses = [*self.losses, *training_losses][-self.k :]
        worse = self._generalization_loss(value)
        if len(self.losses) < self.k:
            return None
        least = min(self.losses)
        progress = 1000 * _relative(sum(self.losses) / self.k - least, least)
        if not progress > self.tol:
            return f"the last {self.k} training losses show no progress ({progress:.6g})"
        quotient = worse / progress
        if quotient > self.alpha:
            return f"generalization loss over training progress is {quotient:.6g}, more than {self.alpha:g}"
        return None


@define
class Patience(Criterion):
    """Stop at so many consecutive increases, each above the value before it (Prechelt's UP).

    With ``mode="max"``: consecutive decreases. A plateau or an oscillation never ends it:
    `NoImprovement` compares with the best instead.

    Args:
        n: How many, 1 or more.

    >>> running = Patience(2).start()
    >>> [running.update(value) for value in (1.0, 1.1, 1.2)]
    [None, None, '2 increases in a row, to 1.2']
    """

    n: int = field(default=5, validator=_count)
    previous: float | None = field(default=None, init=False, repr=False, eq=False)
    increases: int = field(default=0, init=False, repr=False, eq=False)

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Take in a value."""
        loss = self._loss(value)
        rose = isnan(loss) or (self.previous is not None and loss > self.previous)
        self.previous, self.increases = loss, self.increases + 1 if rose else 0
        if self.increases < self.n:
            return None
        what = "increase" if self.mode == "min" else "decrease"
        return f"{self.increases} {what}{'s' * (self.increases > 1)} in a row, to {value:.6g}"


@define
class NoImprovement(Criterion):
    """Stop when so many values in a row were no improvement on the best.

    Args:
        n: How many, 1 or more.
        min_delta: An improvement is by more than this, in the value's unit, 0 or more.

    >>> running = NoImprovement(2).start()
    >>> [running.update(value) is not None for value in (1.0, 1.2, 0.9, 1.1, 1.0)]
    [False, False, False, False, True]
    """

    n: int = field(default=6, validator=_count)
    min_delta: float = field(default=0.0, validator=_number)
    best: float | None = field(default=None, init=False, repr=False, eq=False)
    since_best: int = field(default=0, init=False, repr=False, eq=False)

    @min_delta.validator
    def _check_min_delta(self, attribute: object, value: float) -> None:
        if value < 0:
            raise ValueError(f"{type(self).__name__}(min_delta={value!r}) was given; expected 0 or more")

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Take in a value."""
        loss = self._loss(value)
        if not isnan(loss) and (self.best is None or loss < self._loss(self.best) - self.min_delta):
            self.best, self.since_best = value, 0
        else:
            self.since_best += 1
        if self.since_best < self.n:
            return None
        best = "a number" if self.best is None else f"the best, {self.best:.6g}"
        return f"no improvement on {best}, for {self.since_best} value{'s' * (self.since_best > 1)}"


NumberSinceBest = NoImprovement
"""EarlyStopping.jl's name for it."""


@define
class NumberLimit(Criterion):
    """Stop at the n-th value.

    Args:
        n: 1 or more.

    >>> running = NumberLimit(2).start()
    >>> [running.update(value) is not None for value in (0.5, 0.4)]
    [False, True]
    """

    needs_mode = False

    n: int = field(default=100, validator=_count)
    seen: int = field(default=0, init=False, repr=False, eq=False)

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Count a value."""
        self.seen += 1
        return f"{self.seen} value{'s' * (self.seen > 1)} of {self.n}" if self.seen >= self.n else None


@define
class Threshold(Criterion):
    """Stop when a value is better than a given one: below it, or above it with ``mode="max"``.

    Args:
        value: In the value's unit.

    >>> running = Threshold(0.9).start("max")
    >>> [running.update(accuracy) is not None for accuracy in (0.5, 0.95)]
    [False, True]
    """

    value: float = field(default=0.0, validator=_number)

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Look at a value."""
        if self._loss(value) < self._loss(self.value):
            return f"{value:.6g} is {'below' if self.mode == 'min' else 'above'} {self.value:g}"
        return None


@define
class Warmup(Criterion):
    """Hide the first values from a criterion; it sees those after them.

    Args:
        criterion: Any.
        n: How many values it does not see, 1 or more.

    >>> running = Warmup(Threshold(0.1), n=2).start()
    >>> [running.update(value) is not None for value in (0.0, 0.0, 0.0)]
    [False, False, True]
    """

    criterion: Criterion = field(validator=_criterion)
    n: int = field(default=1, validator=_count)
    seen: int = field(default=0, init=False, repr=False, eq=False)

    def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
        """Count a value, or take it in."""
        self.seen += 1
        return None if self.seen <= self.n else self.criterion.update(value, training_losses)
