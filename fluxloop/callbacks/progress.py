"""A progress bar for the running phase."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TextIO

from attrs import define, field
from tqdm.std import tqdm

from fluxloop.callback import Callback, on
from fluxloop.errors import counted
from fluxloop.events import CycleBegin, EpochBegin, EpochEnd, FitBegin, FitEnd, StepEnd
from fluxloop.guard.given import number, yes_or_no
from fluxloop.phase import Phase
from fluxloop.randomness import preserved
from fluxloop.screen.bars import Bar, Screen, in_notebook, on_screen, use
from fluxloop.screen.lines import in_words
from fluxloop.state import name_of

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


@define
class FitClock:
    """How long a fit has run, and how far it has come."""

    since: float | None = None
    """When it began; None outside of a fit."""
    first: int = 1
    """The number of its first cycle."""
    turned: float = 0.0
    """When the running cycle began."""
    whole: tuple[float, int] | None = None
    """When the first cycle began that was begun in this fit, and its number."""
    several: bool = False

    def begin(self, event: FitBegin, learner: Any) -> None:
        """Begin with a fit."""
        self.since = self.turned = monotonic()
        self.first, self.whole = learner.cycle or 1, None
        self.several = learner.num_epochs - (0 if event.resumed else self.first - 1) > 1

    def turn(self, event: CycleBegin, learner: Any) -> None:
        """Note that a cycle begins; or, of a resumed fit, goes on: how long that one takes is not seen."""
        self.turned = monotonic()
        if self.whole is None and not event.resumed and learner.cycle is not None:
            self.whole = (self.turned, learner.cycle)

    def epoch(self, epoch: int, learner: Any) -> str:
        """Return the number of an epoch, with how many a fit of several comes to: ``"3/10"``."""
        return f"{epoch}/{learner.num_epochs}" if self.several and epoch == learner.cycle else f"{epoch}"

    def times(self, learner: Any, rest: float | None) -> tuple[float, float | None] | None:
        """Return the seconds gone, and about how many are left, if that is known; None outside of a fit.

        Args:
            learner: The learner.
            rest: Seconds that the running epoch will still take; None where nobody knows.
        """
        if self.since is None or learner.cycle is None:
            return None
        now = monotonic()
        began, first = self.whole or (self.turned, learner.cycle)
        done, in_cycle = learner.cycle - first, now - self.turned
        if done <= 0 and rest is None:
            return now - self.since, None
        rest = rest or 0.0
        # Before a cycle is complete, nobody knows what its other phases take: then it is at least what has been seen
        one = (self.turned - began) / done if done > 0 else in_cycle + rest
        left = max(one * (learner.num_epochs - learner.cycle + 1) - in_cycle, rest)
        return now - self.since, left


@define
class ProgressBar(Callback):
    """Show a bar per epoch of a phase, with the running values of the metrics.

    Works for sized and unsized data. In a terminal the bar disappears when its epoch ends, in whatever way. Its title
    tells the phase, the epoch, how long the fit has run and about how long it still will:
    ``TrainingPhase epoch 3/10 (00:12, 00:42 left)``. A notebook shows all bars of a fit in one place, and keeps one
    line of them. `find_lr`, probes and checkpoints show bars where the learner does, once they take longer than a
    second. Steps look at the clock; only a refresh computes metrics. Nothing is shown with ``Learner(quiet=True)``, nor
    with ``FLUXLOOP_QUIET=1`` in the environment. While ``Accelerator(compile="step")`` compiles a step, a line below
    the bar counts the seconds; where no bars are shown because the output is no terminal, a line says afterwards how
    many it took.

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
        >>> "TrainingPhase epoch 1" in terminal.getvalue(), "16/16" in terminal.getvalue()
        (True, True)
    """

    enabled: bool | None = field(default=None, validator=yes_or_no(none=True))
    interval: float = field(default=0.1, validator=number(least=0))
    file: TextIO | None = field(default=None, repr=False)
    _open: list[Bar] = field(factory=list, init=False, repr=False)
    _screen: Screen | None = field(default=None, init=False, repr=False)
    _clock: FitClock = field(factory=FitClock, init=False, repr=False)
    _beside: str = field(default="", init=False, repr=False)
    """What runs beside a training, ``"evaluate"`` or ``"predict"``: no epoch is counted there."""

    reads = ("num_batches", "cbstate")
    draws = False
    main_only = True
    transient = ("_open", "_screen", "_clock", "_beside")
    _begins_anywhere = True

    def is_shown(self) -> bool:
        """Return whether bars are shown."""
        return self._new_screen() is not None

    def _new_screen(self) -> Screen | None:
        """Return where bars are shown; None where they are not."""
        if self.enabled is False:
            return None
        if self.file is None and in_notebook():
            return Screen(None)
        stream = self.file or sys.stderr
        if stream is None or getattr(stream, "closed", False):
            return None
        return Screen(stream) if self.enabled or in_notebook() or stream.isatty() else None

    def _take_screen(self, learner: Any) -> Screen | None:
        """Have bars shown until the running fit or epoch ends; return where."""
        if self._screen is None and not learner.quiet:
            self._screen = self._new_screen()
            if self._screen is not None:
                learner.defer(partial(self._leave_screen, use(self._screen)))
        return self._screen

    def _leave_screen(self, leave: Any) -> None:
        self._screen = None
        leave()

    @on(FitBegin)
    def begin(self, event: FitBegin, phase: Phase, learner: Any) -> None:
        """Start the clock."""
        self._clock.begin(event, learner)
        screen = self._take_screen(learner)
        if screen is not None and screen.file is None:  # the line that a notebook keeps stands where the fit began
            screen.leave("fit")

    @on(CycleBegin)
    def turn(self, event: CycleBegin, phase: Phase, learner: Any) -> None:
        """Note when a cycle begins."""
        self._clock.turn(event, learner)

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: Any) -> None:
        """Stop the clock; a notebook keeps a line."""
        clock, self._clock = self._clock, FitClock()
        if self._screen is not None and clock.since is not None:
            done, asked = (n - clock.first for n in (learner.cycle or 1, learner.num_epochs + 1))
            ended = type(event.error).__name__ if event.error is not None else event.reason
            line = f"{counted(done, 'epoch') if done == asked else f'{done} of {asked} epochs'} in "
            line += in_words(monotonic() - clock.since) + ("" if ended is None else f"; stopped: {ended}")
            screen = self._screen
            learner.defer(lambda: screen.write(lambda: screen.leave(line)))  # when all bars are gone

    @on(EpochBegin)
    def open(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Open a bar, to be closed when the epoch ends."""
        screen = self._take_screen(learner)
        if screen is None:
            return
        epoch = 0 if self._beside or "history" not in learner.cbstate else _epoch(phase, learner)
        title = self._beside or name_of(phase) + (f" epoch {self._clock.epoch(epoch, learner)}" if epoch else "")
        bar = screen.bar(title, learner.num_batches, seen=event.batches, interval=self.interval)
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
        screen = self._screen or self._new_screen()
        if self.enabled is False or learner.quiet or not learner.accelerator.is_main:
            yield
        elif screen is None:
            yield
            stream = self.file or sys.stderr
            if took and stream is not None and not getattr(stream, "closed", False):
                line = f"compiled {what} in {took[0]:.1f} s"
                Screen(stream).write(lambda: print(line, file=stream))
        elif screen.is_broken:
            yield
        elif screen.file is None:
            with screen.bar(f"compiling {what}", unit="s") as bar:
                bar.refresh()
                yield
        else:
            with _counting(screen, f"compiling {what}"):
                yield

    @on(StepEnd)
    def advance(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Count the step; refresh the bar when it is time."""
        if self._open:
            bar = self._open[-1]
            bar.seen += 1
            if monotonic() >= bar.due:
                self._refresh(bar, phase, learner)

    def _refresh(self, bar: Bar, phase: Phase, learner: Any) -> None:
        if "metrics" in learner.cbstate:
            with preserved():  # a metric may draw when it is computed, and when that is depends on the clock
                values = learner.cbstate.metrics[phase].running()
            for name, value in values.items():
                if getattr(value, "numel", lambda: 0)() == 1:
                    learner.host(value, partial(_note, bar, name))
        bar.times = self._clock.times(learner, bar.rest())
        bar.refresh()

    @on(EpochEnd)
    def close(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Take the bar away before others print about the epoch."""
        if self._open:
            bar = self._open[-1]
            if bar.is_visible:
                bar.refresh()
            self._take_away(bar)

    def _take_away(self, bar: Bar) -> None:
        if bar in self._open:
            self._open.remove(bar)
            bar.close()


@contextmanager
def _counting(screen: Screen, title: str) -> Iterator[None]:
    """Show the seconds that go by below the bars, in a thread of its own: who is waited for writes nothing."""
    over, lines = threading.Event(), list[Any]()

    def show() -> None:
        lines.append(tqdm(desc=title, bar_format=COUNTED, leave=False, file=screen.file))

    def count() -> None:
        while not over.wait(1) and not screen.is_broken:
            screen.write(lines[0].refresh)

    screen.write(show)
    if not lines:
        yield
        return
    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    try:
        yield
    finally:
        over.set()
        counting.join()
        screen.write(lines[0].close)


COUNTED = "<desc> (<elapsed>)".replace("<", "{").replace(">", "}")
"""What tqdm shows of something that only takes its time."""


def _note(bar: Bar, name: str, number: float) -> None:
    """Note a number for the next refresh; from a device it comes later than it was asked for."""
    bar.numbers[name] = f"{number:.4g}"


def _epoch(phase: Phase, learner: Any) -> int:
    """Return where the values of the epoch that begins will stand."""
    counts = learner.cbstate.history[phase]
    return int(max(counts.epoch + 1, counts.epochs + 1, learner.cycle or 0))


def bar_beside(learner: RunLearner, what: str) -> list[Callback]:
    """Make a progress bar like the learner's, if it has one, for what runs beside its training."""
    own = learner.callbacks.get(ProgressBar)
    if not isinstance(own, ProgressBar):
        return []
    bar = ProgressBar(own.enabled, own.interval, own.file)
    bar._beside = what
    return [bar]


@contextmanager
def showing_as(learner: RunLearner) -> Iterator[None]:
    """Show bars inside where the learner's `ProgressBar` shows those of its epochs, if it does.

    For what runs beside a fit, such as `find_lr`.
    """
    own = learner.callbacks.get(ProgressBar)
    shows = isinstance(own, ProgressBar) and learner.accelerator.is_main and not learner.quiet
    with on_screen(own._new_screen() if shows and isinstance(own, ProgressBar) else None):
        yield
