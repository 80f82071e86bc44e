"""Measure where the time of a fit goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from attrs import define, field

from fluxloop.callback import Handler, UnsafeCallback, on
from fluxloop.errors import MetricError, counted
from fluxloop.events import CycleBegin, CycleEnd, EpochBegin, EpochEnd, Event, FitBegin, FitEnd, StepBegin, StepEnd
from fluxloop.guard.given import as_pair, is_number
from fluxloop.order.explain import fired_with
from fluxloop.phase import AbstractTrainingPhase, FittingPhase, Phase
from fluxloop.state import name_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA, STEPS, CALLBACKS = "data", "steps", "callbacks"

MOST_BARS = 10
"""How many calls of callbacks are drawn."""


@define
class Profile(UnsafeCallback):
    """Measure the seconds of a fit: of its epochs, of data, steps, events and callbacks.

    ``print(profile)`` shows two tables: for each phase the seconds of an epoch, split into
    waiting for data, the steps' own work, and callbacks; and for each callback and event the
    calls and what they took. `plot` draws both. A fit, an epoch or a step begins when the others have handled its
    Begin, and ends when they have handled its End; what they do at `FitBegin` and at the first `EpochBegin` of a
    phase is not seen. A cancelled step is in no column.

    Seconds are the host's: a GPU works on while the next step is prepared, and what waits for it
    is charged for the wait. A trace of `torch.profiler` shows both.

    Handlers are timed only while a fit is profiled. No checkpoint keeps what was measured.

    Args:
        trace: A folder for a trace of a few training steps by ``torch.profiler``, named after the
            first of them, ``trace-step-11.json``; open it in Perfetto or chrome://tracing.
        steps: How many training steps of a fit go by before the trace (at least 1: in the last one the
            profiler warms up), and how many it shows.
        clock: Gives seconds.

    Raises:
        ValueError: `steps` is not two numbers, each 1 or more.

    Attributes:
        seconds: By ``"fit"``, ``"cycle"`` and the phases' names: the seconds of each that ended.
        parts: By the phases' names: the seconds of each epoch spent waiting for ``"data"``, in ``"steps"``
            apart from callbacks, and in ``"callbacks"``.
        handlers: By (phase, event, callback): how many calls, and their seconds.

    Reads: *

    Example:
        >>> profile = Profile()
        >>> history = testing.toy_learner(Recorder(), profile).fit(2)  # then print(profile)
        >>> len(profile.seconds["TrainingPhase"]), sorted(profile.parts["TrainingPhase"])
        (2, ['callbacks', 'data', 'steps'])
    """

    trace: str | Path | None = None
    steps: tuple[int, int] = field(default=(10, 3), kw_only=True, converter=as_pair)
    clock: Callable[[], float] = field(default=time.perf_counter, kw_only=True, repr=False)
    seconds: dict[str, list[float]] = field(factory=dict, init=False, repr=False)
    parts: dict[str, dict[str, list[float]]] = field(factory=dict, init=False, repr=False)
    handlers: dict[tuple[str, str, str], tuple[int, float]] = field(factory=dict, init=False, repr=False)
    _began: dict[str, float] = field(factory=dict, init=False, repr=False)
    """When the fit, the cycle and the phases that run have begun, by name."""
    _spent: dict[str, dict[str, float]] = field(factory=dict, init=False, repr=False)
    """Seconds of the running epoch of each phase, by part."""
    _marks: dict[str, tuple[str, float, float]] = field(factory=dict, init=False, repr=False)
    """For each running epoch: the part that runs, since when, and the seconds in callbacks by then."""
    _in_callbacks: float = field(default=0.0, init=False, repr=False)
    """Seconds in handlers, one inside another counted once."""
    _depth: int = field(default=0, init=False, repr=False)
    """How many handlers run at the moment, one inside another."""
    _running: bool = field(default=False, init=False, repr=False)
    _steps_seen: int = field(default=0, init=False, repr=False)
    """Training steps ended in the fit."""
    _profiler: Any = field(default=None, init=False, repr=False)

    reads = ("*",)  # and so it runs after the others
    draws = False
    main_only = True
    transient = (
        "seconds",
        "parts",
        "handlers",
        "_began",
        "_spent",
        "_marks",
        "_in_callbacks",
        "_depth",
        "_running",
        "_steps_seen",
        "_profiler",
    )

    @steps.validator
    def _check_steps(self, attribute: object, value: Any) -> None:
        if not isinstance(value, tuple) or len(value) != 2 or any(not is_number(n, whole=True) or n < 1 for n in value):
            raise ValueError(
                f"Profile(steps={value!r}) was given; expected how many steps go by and how many are shown, each 1 or "
                "more: steps=(10, 3)"
            )

    def init(self, learner: Any) -> None:
        """Begin without measurements."""
        self.seconds, self.parts, self.handlers = {}, {}, {}

    # The fit and its cycles

    @on(FitBegin)
    def begin_fit(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Begin to time handlers, until the fit has ended in whatever way."""
        if self.trace is not None:
            Path(self.trace).mkdir(parents=True, exist_ok=True)
        self._began, self._spent, self._marks = {}, {}, {}
        self._depth, self._steps_seen, self._running = 0, 0, True
        learner.defer(lambda: self._stop(learner))
        self._time_handlers(learner, phase)
        self._begin("fit")
        self._trace_on()

    def _stop(self, learner: Any) -> None:
        self._running = False
        learner.callbacks.forget()  # the handlers are resolved anew, and not timed
        self._close_trace()
        if self.trace is not None and self._steps_seen < self.steps[0]:
            warn(
                f"{self!r} wrote no trace: the fit had {self._steps_seen} training steps, and {self.steps[0]} go by "
                "first; expected fewer: steps=(1, 1)",
                stacklevel=2,
            )

    @on(CycleBegin)
    def begin_cycle(self, event: CycleBegin, phase: FittingPhase, learner: Any) -> None:
        """Begin a cycle."""
        self._begin("cycle")

    @on(CycleEnd)
    def end_cycle(self, event: CycleEnd, phase: FittingPhase, learner: Any) -> None:
        """Note a cycle's seconds."""
        self._end("cycle")

    @on(FitEnd)
    def end_fit(self, event: FitEnd, phase: FittingPhase, learner: Any) -> None:
        """Note the fit's seconds."""
        self._end("fit")

    def _note(self, which: tuple[str, str, str], seconds: float) -> None:
        """Note a handler's call; one inside another's is part of that one."""
        calls, before = self.handlers.get(which, (0, 0.0))
        self.handlers[which] = calls + 1, before + seconds
        if self._depth == 0:
            self._in_callbacks += seconds

    def _begin(self, what: str) -> None:
        self._began[what] = self.clock()

    def _end(self, what: str) -> None:
        began = self._began.pop(what, None)
        if began is not None:
            self.seconds.setdefault(what, []).append(self.clock() - began)

    # Epochs and steps

    @on(EpochBegin)
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Begin an epoch; from now on its handlers are timed."""
        if self._running:
            self._time_handlers(learner, phase)
            self._spent[name_of(phase)] = dict.fromkeys((DATA, STEPS, CALLBACKS), 0.0)
            self._marks.pop(name_of(phase), None)
            self._begin(name_of(phase))
            self._switch(phase, "", DATA)

    @on(StepBegin)
    def begin_step(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        """Begin a step: the wait for its data is over."""
        self._switch(phase, DATA, STEPS)

    @on(StepEnd)
    def end_step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """End a step: the wait for the next one's data begins."""
        self._switch(phase, STEPS, DATA)
        if self._running and isinstance(phase, AbstractTrainingPhase):
            self._steps_seen += 1
            self._trace_on()

    @on(EpochEnd)
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Note an epoch's seconds."""
        name = name_of(phase)
        self._switch(phase, DATA, "")
        spent = self._spent.pop(name, None)
        if spent is not None:
            self._end(name)
            for part, seconds in spent.items():
                self.parts.setdefault(name, {}).setdefault(part, []).append(seconds)

    def _switch(self, phase: Phase, ends: str, begins: str) -> None:
        """Add what went by since the last switch, without callbacks; nothing where a step was cancelled.

        A part ends where its mark is the one expected: after a step that was cancelled it is another's, and the
        time that went by belongs to neither.
        """
        name = name_of(phase)
        spent = self._spent.get(name)
        if spent is not None:
            now = self.clock()
            what, since, before = self._marks.get(name, ("", now, self._in_callbacks))
            in_callbacks = self._in_callbacks - before
            spent[CALLBACKS] += in_callbacks
            if what == ends != "":
                spent[what] += now - since - in_callbacks
            self._marks[name] = begins, now, self._in_callbacks

    # Handlers

    def _time_handlers(self, learner: Any, phase: Phase) -> None:
        """Put a timed call in the place of every handler of a phase that is not timed yet."""
        table = learner.callbacks.table(type(phase))
        own = [node.id for node in learner.callbacks.graph.nodes if node.callback.unwrapped is self]
        for event in fired_with(type(phase)):
            table[event] = tuple(
                (call if isinstance(call, _Timed) or id in own else _Timed(call, self, id), view, id)
                for call, view, id in table[event]
            )

    # The trace

    def _trace_on(self) -> None:
        """Start the profiler in time, tell it of a step, and close it after the last one."""
        before, shown = self.steps
        if self._profiler is not None:
            self._profiler.step()
        if self.trace is not None and self._steps_seen == before - 1:
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=shown, repeat=1)
            self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write_trace)
            self._profiler.start()
        if self._steps_seen == before + shown:
            self._close_trace()

    def _write_trace(self, profiler: Any) -> None:
        profiler.export_chrome_trace(str(Path(self.trace or "") / f"trace-step-{self.steps[0] + 1}.json"))

    def _close_trace(self) -> None:
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()

    # Showing

    def __str__(self) -> str:
        """Show the tables."""
        if not self.seconds:
            return f"{self!r}: nothing was measured; fit first"
        return "\n".join([*self._phases(), "", *self._calls()])

    def plot(self) -> Figure:
        """Draw what the tables show: seconds of an epoch of each phase, by part, and the callbacks that took most.

        Returns:
            A matplotlib figure: a picture in a notebook; ``figure.savefig("profile.png")`` keeps it.

        Raises:
            ImportError: matplotlib is not installed.
            MetricError: Nothing was measured.
        """
        from fluxloop.screen.figures import new_figure

        if not self.parts:
            raise MetricError("profile.plot() was called, and nothing was measured; expected a fit with it first")
        figure = new_figure("profile.plot()", figsize=(10, 3.5))
        phases, calls = figure.subplots(1, 2)
        left = [0.0] * len(self.parts)
        for part in (DATA, STEPS, CALLBACKS):
            seconds = [sum(parts[part]) / len(parts[part]) for parts in self.parts.values()]
            phases.barh(list(self.parts), seconds, left=left, label=part)
            left = [before + more for before, more in zip(left, seconds, strict=True)]
        phases.set(title="an epoch", xlabel="seconds")
        phases.legend()
        most = sorted(self.handlers.items(), key=lambda item: -item[1][1])[:MOST_BARS]
        names = [f"{callback}, {event} of {phase}" for (phase, event, callback), _ in most]
        calls.barh(names, [spent for _, (_, spent) in most], color="tab:green")
        calls.set(title="callbacks that took most", xlabel="seconds in all")
        for axes in (phases, calls):
            axes.invert_yaxis()  # the first on top
            axes.grid(alpha=0.3, axis="x")
        return figure

    def _phases(self) -> list[str]:
        fits, cycles = self.seconds.get("fit", []), self.seconds.get("cycle", [])
        rows: list[tuple[str, ...]] = [("phase", "epochs", "s/epoch", "data", "steps", "callbacks")]
        for name, epochs in self.seconds.items():
            whole = sum(epochs)
            if name in self.parts and whole > 0:
                shares = (f"{100 * sum(seconds) / whole:.0f} %" for seconds in self.parts[name].values())
                rows.append((name, str(len(epochs)), f"{whole / len(epochs):.3g}", *shares))
        return [f"{counted(len(fits), 'fit')}, {counted(len(cycles), 'cycle')}, {sum(fits):.3g} s", *_table(rows)]

    def _calls(self) -> list[str]:
        rows: list[tuple[str, ...]] = [("callback", "event", "phase", "calls", "s", "µs/call")]
        for (phase, event, callback), (calls, spent) in sorted(self.handlers.items(), key=lambda item: -item[1][1]):
            rows.append((callback, event, phase, str(calls), f"{spent:.3g}", f"{1e6 * spent / calls:.3g}"))
        return _table(rows)


class _Timed:
    """A handler that notes how long it takes."""

    __slots__ = ("_call", "_callback", "_profile")

    def __init__(self, call: Handler, profile: Profile, callback: str) -> None:
        self._call = call
        self._profile = profile
        self._callback = callback

    def __call__(self, event: Event, phase: Phase, view: Any) -> None:
        profile = self._profile
        began = profile.clock()
        profile._depth += 1
        try:
            self._call(event, phase, view)
        finally:
            profile._depth -= 1
            profile._note((name_of(phase), type(event).__name__, self._callback), profile.clock() - began)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lay out rows in columns: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_text = [not any(row[at][:1].isdigit() for row in rows[1:]) for at in range(len(widths))]
    return [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, is_text, strict=True)
        ).rstrip()
        for row in rows
    ]
