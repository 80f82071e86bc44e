"""Let a callback through at some of its events only, transparent to everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Literal

from attrs import define, field

from fluxloop.callback import Callback, Handler, require_call
from fluxloop.errors import CallbackTypeError, HandlerError, describe
from fluxloop.events import Event
from fluxloop.guard.given import check_number
from fluxloop.phase import Phase

Condition = Callable[[Event, Phase], bool]


class ConditionalCallback(Callback):
    """Pass an event on to a callback when a condition holds.

    Access, order, conflicts, handlers, state and identity are those of the wrapped callback:
    ``learner.get_callback(Type)`` finds it, and it replaces a default callback of its type.

    Args:
        callback: The callback to wrap.
        condition: ``(event, phase) -> bool``.

    Raises:
        CallbackTypeError: `callback` is no callback, or `condition` cannot be called.
        HandlerError: `condition` takes other arguments.

    Example:
        >>> seen = []
        >>> note = CustomCallback(lambda learner: seen.append(learner.step.loss.item()), StepEnd)
        >>> often = ConditionalCallback(note, lambda event, phase: isinstance(phase, ValidationPhase))
        >>> history = testing.toy_learner(often, num_batches=4).fit(1)
        >>> len(seen)  # of validation steps alone
        4
    """

    def __init__(self, callback: Callback, condition: Condition) -> None:
        if not isinstance(callback, Callback):
            raise CallbackTypeError(f"{describe(callback)} was given to be wrapped; expected a callback")
        if not callable(condition):
            raise CallbackTypeError(f"{describe(condition)} was given as a condition; expected a function")
        require_call(condition, 2, "(event, phase)", f"the condition {getattr(condition, '__name__', condition)!s}")
        self.callback = callback
        self.condition = condition

    @property
    def unwrapped(self) -> Callback:
        """The wrapped callback."""
        return self.callback.unwrapped

    @property
    def identity(self) -> str:
        """The wrapped callback's identity."""
        return self.callback.identity

    @property
    def name(self) -> str | None:  # type: ignore[override]  # the wrapped callback's
        """The wrapped callback's name."""
        return self.callback.name

    @property
    def reads(self) -> Sequence[str]:  # type: ignore[override]  # the wrapped callback's
        """The wrapped callback's reads."""
        return self.callback.reads

    @property
    def writes(self) -> Sequence[str]:  # type: ignore[override]  # the wrapped callback's
        """The wrapped callback's writes."""
        return self.callback.writes

    @property
    def run_after(self) -> Sequence[type[Callback]]:  # type: ignore[override]  # the wrapped callback's
        """The wrapped callback's order."""
        return self.callback.run_after

    @property
    def draws(self) -> bool | None:  # type: ignore[override]  # the wrapped callback's
        """Whether the wrapped callback draws random numbers."""
        draws = self.callback.draws
        return None if draws is False and not isinstance(self.condition, Every) else draws

    @property
    def in_compiled_step(self) -> Literal["after", "inside", "never", "watched"] | None:  # type: ignore[override]  # as above
        """As that of the wrapped callback; but a handler under a condition cannot be part of a graph."""
        inner = self.callback.in_compiled_step
        return None if inner == "inside" else inner

    def init(self, learner: Any) -> None:
        """Set the wrapped callback up; counting begins anew."""
        if isinstance(self.condition, Every):
            self.condition.reset()
        self.callback.init(learner)

    def handles(self) -> list[tuple[type[Event], type[Phase]]]:
        """List what the wrapped callback handles."""
        return self.callback.handles()

    def handler(self, event: type[Event], phase: type[Phase]) -> Handler | None:
        """Return a handler that calls the wrapped callback's where the condition holds."""
        inner = self.callback.handler(event, phase)
        if inner is None:
            return None

        def call(event: Event, phase: Phase, learner: Any) -> None:
            if self.condition(event, phase):
                inner(event, phase, learner)

        return call

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the wrapped callback, which may be nothing."""
        inner = getattr(self.callback, "state_dict", None)
        return inner() if inner is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps of the wrapped callback."""
        inner = getattr(self.callback, "load_state_dict", None)
        if inner is not None:
            inner(state)

    def __repr__(self) -> str:
        return f"ConditionalCallback({self.callback!r}, {self.condition!r})"


@define
class Every:
    """True at the first occurrence of an event and then at every `freq`-th, or after `seconds`.

    Other events always pass. Occurrences are counted over all phases.
    """

    event: type[Event]
    freq: int | None = None
    seconds: float | None = None
    _count: int = field(default=0, init=False)
    _last: float | None = field(default=None, init=False)

    def reset(self) -> None:
        """Begin counting anew."""
        self._count, self._last = 0, None

    def __call__(self, event: Event, phase: Phase) -> bool:
        """Return whether to pass this event on."""
        if not isinstance(event, self.event):
            return True
        if self.freq is not None:
            self._count += 1
            return (self._count - 1) % self.freq == 0
        now = monotonic()
        if self._last is None or now - self._last >= (self.seconds or 0.0):
            self._last = now
            return True
        return False


def throttle(
    callback: Callback, event: type[Event], *, freq: int | None = None, seconds: float | None = None
) -> ConditionalCallback:
    """Let a callback handle only some occurrences of an event.

    The first one passes, then every `freq`-th, or the next one after `seconds` have gone by. Its
    other events always pass.

    Args:
        callback: The callback to throttle.
        event: The event type.
        freq: Occurrences, 1 or more.
        seconds: Seconds, 0 or more.

    Returns:
        The callback that takes the place of the given one.

    Raises:
        HandlerError: `event` is no event type.
        ValueError: Not exactly one of `freq` and `seconds`, or one out of range.

    Example:
        >>> throttled = throttle(CustomCallback(print, StepEnd), StepEnd, freq=10)
    """
    if not (isinstance(event, type) and issubclass(event, Event)):
        raise HandlerError(f"throttle was given {describe(event)} as an event; expected a type, e.g. StepEnd")
    if (freq is None) == (seconds is None):
        raise ValueError(
            f"throttle(freq={freq}, seconds={seconds}) was given; expected exactly one of the two: freq=10"
        )
    if freq is not None:
        check_number("throttle", "freq", freq, whole=True)
    if seconds is not None:
        check_number("throttle", "seconds", seconds)
    if (freq is not None and freq < 1) or (seconds is not None and seconds < 0):
        raise ValueError(f"throttle(freq={freq}, seconds={seconds}) was given; expected freq >= 1 or seconds >= 0")
    return ConditionalCallback(callback, Every(event, freq, seconds))
