"""A callback from a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fluxloop.callback import Callback, Handler, require_call
from fluxloop.errors import CallbackTypeError, HandlerError, describe
from fluxloop.events import Event
from fluxloop.guard.given import as_plain, check_paths
from fluxloop.phase import Phase


class CustomCallback(Callback):
    """Call ``f(learner)`` at an event: a quick hook.

    Without declarations it reads everything and writes nothing, and therefore runs last at its event. With `writes`
    alone it runs as late as the callbacks that read those paths allow.

    Args:
        f: Called with the learner view: what a handler gets as ``learner``.
        event: The event type.
        phase: The phase type; left out: any.
        reads: Paths it reads; None: everything.
        writes: Paths it writes.
        run_after: Callback types that run before it.
        draws: Whether the function draws random numbers, and gets a stream of its own; None: what it
            draws is put back.
        name: Tells two of them apart.

    Raises:
        CallbackTypeError: `f` cannot be called, or `run_after` holds something other than types.
        CallbackError: `reads` or `writes` is no tuple of paths.
        HandlerError: `event` is no event type, `phase` no phase type, or `f` takes other arguments.

    Example:
        >>> hello = CustomCallback(lambda learner: print("a step"), StepEnd, TrainingPhase)
    """

    _begins_anywhere = True

    def __init__(
        self,
        f: Callable[[Any], object],
        event: type[Event],
        phase: type[Phase] = Phase,
        *,
        reads: Sequence[str] | None = None,
        writes: Sequence[str] = (),
        run_after: Sequence[type[Callback]] = (),
        draws: bool | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(f):
            raise CallbackTypeError(f"CustomCallback was given {describe(f)}; expected a function of the learner")
        if not (isinstance(event, type) and issubclass(event, Event)):
            raise HandlerError(f"CustomCallback was given {describe(event)} as an event; expected a type, e.g. StepEnd")
        if not (isinstance(phase, type) and issubclass(phase, Phase)):
            raise HandlerError(f"CustomCallback was given {describe(phase)} as a phase; expected a type")
        require_call(f, 1, "(learner)", f"the function {getattr(f, '__name__', f)!s} of a CustomCallback")
        reads, writes, run_after = map(as_plain, (reads, writes, run_after))
        check_paths("CustomCallback", "reads", ("*",) if reads is None else reads)
        check_paths("CustomCallback", "writes", writes)
        if not isinstance(run_after, (tuple, list)) or not all(isinstance(each, type) for each in run_after):
            raise CallbackTypeError(
                f"CustomCallback(run_after={run_after!r}) was given; expected a tuple of callback types: (Recorder,)"
            )
        super().__init__(name=name)
        self.f = f
        self.event = event
        self.phase = phase
        self.reads_left_out = reads is None
        self.reads = ("*",) if reads is None else reads  # type: ignore[misc]  # computed per instance
        self.writes = writes  # type: ignore[misc]  # computed per instance
        self.run_after = run_after  # type: ignore[misc]  # computed per instance
        self.draws = draws  # type: ignore[misc]  # computed per instance

    def handles(self) -> list[tuple[type[Event], type[Phase]]]:
        """Return the one event and phase it is for."""
        return [(self.event, self.phase)]

    def handler(self, event: type[Event], phase: type[Phase]) -> Handler | None:
        """Return the function where the event and phase fit."""
        if not (issubclass(event, self.event) and issubclass(phase, self.phase)):
            return None

        def call(event: Event, phase: Phase, learner: Any) -> None:
            self.f(learner)

        return call

    def __repr__(self) -> str:
        name = getattr(self.f, "__qualname__", type(self.f).__name__)
        return f"CustomCallback({name}, {self.event.__name__}, {self.phase.__name__})"
