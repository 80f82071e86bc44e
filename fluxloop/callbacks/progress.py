"""A progress bar for the running phase."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Any, TextIO

from attrs import define, field
from tqdm.auto import tqdm

from fluxloop.callback import Callback, on
from fluxloop.errors import shown
from fluxloop.events import EpochBegin, EpochEnd, FitBegin, FitEnd, StepEnd
from fluxloop.guard.given import number, yes_or_no
from fluxloop.phase import Phase
from fluxloop.randomness import preserved
from fluxloop.state import name_of


def in_notebook() -> bool:
    """Return whether a notebook's kernel runs this process."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and getattr(shell, "kernel", None) is not None


@define
class FitClock:
    """How long a fit has run, and how far it has come."""

    since: float | None = None
    cycles: int = 0
    several: bool = False

    def begin(self, event: FitBegin, learner: Any) -> None:
        """Begin with a fit."""
        self.since, self.cycles = monotonic(), learner.cycle or 1
        self.several = learner.num_epochs - (0 if event.resumed else self.cycles - 1) > 1

    def epoch(self, epoch: int, learner: Any) -> str:
        """Return the number of an epoch, with how many a fit of several comes to: ``"3/10"``."""
        return f"{epoch}/{learner.num_epochs}" if self.several and epoch == learner.cycle else f"{epoch}"

    def times(self, learner: Any) -> str:
        """Return the time gone and left, ``"0:12, 0:28 left"``; nothing before a cycle is complete."""
        if self.since is None or learner.cycle is None or learner.cycle <= self.cycles:
            return ""
        spent = monotonic() - self.since
        rest = spent / (learner.cycle - self.cycles) * (learner.num_epochs - learner.cycle + 1)
        return f"{_time(spent)}, {_time(rest)} left"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


@define(eq=False)
class _Bar:
    """The bar of one epoch: what tqdm shows, how many steps it has seen, when it is due, its numbers."""

    due: float
    shown: Any = None
    seen: int = 0
    numbers: dict[str, str] = field(factory=dict)

    def note(self, name: str, number: float) -> None:
        """Note a number for the next refresh; from a device it comes later than it was asked for."""
        self.numbers[name] = f"{number:.4g}"

    def catch_up(self) -> None:
        """Show the steps seen so far."""
        self.shown.update(self.seen - self.shown.n)


@define
class ProgressBar(Callback):
    """Show a bar per epoch of a phase, with the running values of the metrics.

    Works for sized and unsized data, in a terminal and in a notebook; the bar disappears when
    its epoch ends, in whatever way. Its title tells the phase, the epoch and, from the second cycle of a
    fit on, how long the fit has run and about how long it still will:
    ``TrainingPhase 3/10 (0:12, 0:42 left)``. Steps look at the clock; only a refresh computes metrics.
    While ``Accelerator(compile="step")`` compiles a step, a line below the bar counts the seconds; where no bars
    are shown because the output is no terminal, a line says afterwards how many it took.

    Args:
        enabled: None shows bars in a terminal and in a notebook only; False shows nothing at all.
        interval: Seconds between refreshes.
        file: Where a terminal's bar is written; None: standard error.

    Raises:
        ValueError: `enabled` is not True, False or None, or `interval` is less than 0.

    Reads: num_batches, cbstate

    Example:
        >>> import io
        >>> terminal = io.StringIO()
        >>> bar = ProgressBar(enabled=True, interval=0, file=terminal)
        >>> history = testing.toy_learner(Recorder(), Metrics(), bar).fit(1)
        >>> "TrainingPhase" in terminal.getvalue(), "16/16" in terminal.getvalue()
        (True, True)
    """

    enabled: bool | None = field(default=None, validator=yes_or_no(none=True))
    interval: float = field(default=0.1, validator=number(least=0))
    file: TextIO | None = field(default=None, repr=False)
    _open: list[_Bar] = field(factory=list, init=False, repr=False)
    _is_silent: bool = field(default=False, init=False, repr=False)
    _clock: FitClock = field(factory=FitClock, init=False, repr=False)

    reads = ("num_batches", "cbstate")
    draws = False
    main_only = True
    transient = ("_open", "_is_silent", "_clock")
    _begins_anywhere = True

    def is_shown(self) -> bool:
        """Return whether bars are shown."""
        if self.enabled is False:
            return False
        stream = self.file or sys.stderr
        if stream is None or getattr(stream, "closed", False):
            return in_notebook()
        return bool(self.enabled) or in_notebook() or stream.isatty()

    @on(FitBegin)
    def begin(self, event: FitBegin, phase: Phase, learner: Any) -> None:
        """Start the clock."""
        self._clock.begin(event, learner)

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: Any) -> None:
        """Stop the clock."""
        self._clock = FitClock()

    @on(EpochBegin)
    def open(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Open a bar, to be closed when the epoch ends."""
        if self._is_silent or not self.is_shown():
            return
        epoch = _epoch(phase, learner) if "history" in learner.cbstate else None
        title = name_of(phase) + (f" {self._clock.epoch(epoch, learner)}" if epoch else "")
        times = self._clock.times(learner)
        bar = _Bar(due=monotonic() + self.interval, seen=event.batches)

        def show() -> None:
            bar.shown = tqdm(
                initial=event.batches,
                total=learner.num_batches,
                desc=f"{title} ({times})" if times else title,
                leave=False,
                unit="batch",
                file=self.file or sys.stderr,
                mininterval=0,  # refreshes are asked for when they are due
                miniters=1,
            )

        if self._shows(show):
            self._open.append(bar)
            learner.defer(partial(self._take_away, bar))

    @contextmanager
    def _compiling(self, learner: Any, phase: Phase, took: list[float]) -> Iterator[None]:
        """Show how long a step has been compiled; where no bars are shown, say afterwards how long it took.

        Args:
            learner: Whose step it is.
            phase: The running phase.
            took: Gets the seconds, if a graph comes of it.
        """
        what = f"a step of {name_of(phase)}"
        if self.enabled is False or self._is_silent or not learner.accelerator.is_main:
            yield
        elif self.is_shown():
            with self._counting(f"compiling {what}"):
                yield
        else:
            yield
            stream = self.file or sys.stderr
            if took and stream is not None and not getattr(stream, "closed", False):
                self._shows(lambda: print(f"compiled {what} in {took[0]:.1f} s", file=stream))

    @contextmanager
    def _counting(self, title: str) -> Iterator[None]:
        """Show the seconds that go by below the bars, in a thread of its own: who is waited for writes nothing."""
        over, lines = threading.Event(), list[Any]()

        def show() -> None:
            lines.append(tqdm(desc=title, bar_format="{desc} ({elapsed})", leave=False, file=self.file or sys.stderr))

        def count() -> None:
            while not over.wait(1) and self._shows(lines[0].refresh):
                pass

        if not self._shows(show):
            yield
            return
        counting = threading.Thread(target=count, daemon=True)
        counting.start()
        try:
            yield
        finally:
            over.set()
            counting.join()
            self._shows(lines[0].close)

    def _shows(self, show: Callable[[], object]) -> bool:
        """Write something of a bar; where that cannot be written, show none from now on."""
        if not self._is_silent:
            self._is_silent = not shown("ProgressBar", show)
        return not self._is_silent

    @on(StepEnd)
    def advance(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Count the step; refresh the bar when it is time."""
        if self._open:
            bar = self._open[-1]
            bar.seen += 1
            if monotonic() >= bar.due:
                self._refresh(bar, phase, learner)

    def _refresh(self, bar: _Bar, phase: Phase, learner: Any) -> None:
        if "metrics" in learner.cbstate:
            with preserved():  # a metric may draw when it is computed, and when that is depends on the clock
                values = learner.cbstate.metrics[phase].running()
            for name, value in values.items():
                if getattr(value, "numel", lambda: 0)() == 1:
                    learner.host(value, partial(bar.note, name))
        bar.shown.set_postfix(bar.numbers, refresh=False)
        self._shows(bar.catch_up)
        bar.due = monotonic() + self.interval

    @on(EpochEnd)
    def close(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Take the bar away before others print about the epoch."""
        if self._open:
            self._shows(self._open[-1].catch_up)
            self._take_away(self._open[-1])

    def _take_away(self, bar: _Bar) -> None:
        if bar in self._open:
            self._open.remove(bar)
            self._shows(bar.shown.close)


def _epoch(phase: Phase, learner: Any) -> int:
    """Return where the values of the epoch that begins will stand."""
    counts = learner.cbstate.history[phase]
    return int(max(counts.epoch + 1, counts.epochs + 1, learner.cycle or 0))
