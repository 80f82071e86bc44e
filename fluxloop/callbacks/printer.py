"""Print the metrics of each epoch."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from attrs import define, field

from fluxloop.callback import Callback, on
from fluxloop.callbacks.metrics import Metrics
from fluxloop.callbacks.progress import FitClock, ProgressBar
from fluxloop.callbacks.recorder import Recorder
from fluxloop.errors import counted
from fluxloop.events import CycleBegin, EpochEnd, FitBegin, FitEnd
from fluxloop.guard.given import number, yes_or_no
from fluxloop.history import shown_as
from fluxloop.phase import Phase, ProbePhase
from fluxloop.screen.bars import between_bars, in_notebook, shown
from fluxloop.screen.lines import gone_and_left
from fluxloop.signals import TERMINATED
from fluxloop.state import name_of


@define
class MetricsPrinter(Callback):
    """Print a line per epoch of a phase: the phase, the epoch (of how many) and every metric.

    Values of one metric stand below each other, once one has needed the most room. A fit that ends early gets a line
    that says why. Nothing is printed with ``Learner(quiet=True)``, nor with ``FLUXLOOP_QUIET=1`` in the environment.

    Args:
        digits: Significant digits.
        time: Whether to print how long the fit has run, and about how long it still will.
        stamps: Whether each line begins with the date and the time of day, for the logs of long runs.

    Raises:
        ValueError: `digits` is no whole number of 0 or more, or `time` or `stamps` is not True or False.

    Reads: cbstate.history, cbstate.metrics
    Runs after: Recorder, Metrics, ProgressBar

    Example:
        >>> learner = testing.toy_learner(Recorder(), Metrics(), MetricsPrinter(), coefficient=0.0)
        >>> history = learner.fit(1)  # the model is right from the start
        TrainingPhase      epoch 1    loss 0
        ValidationPhase    epoch 1    loss 0
    """

    digits: int = field(default=4, validator=number(least=0, whole=True))
    _is_silent: bool = field(default=False, init=False, repr=False)
    time: bool = field(default=False, kw_only=True, repr=False, validator=yes_or_no())
    stamps: bool = field(default=False, kw_only=True, repr=False, validator=yes_or_no())
    _clock: FitClock = field(factory=FitClock, init=False, repr=False)
    _widths: dict[str | int, int] = field(factory=dict, init=False, repr=False)
    """How wide each column has become: those of phases, epochs and metrics."""

    reads = ("cbstate.history", "cbstate.metrics")
    run_after = (Recorder, Metrics, ProgressBar)
    draws = False
    main_only = True
    transient = ("_is_silent", "_clock", "_widths")
    _begins_anywhere = True

    @on(FitBegin)
    def print_resumed(self, event: FitBegin, phase: Phase, learner: Any) -> None:
        """Print where a resumed fit goes on."""
        self._clock.begin(event, learner)
        if event.resumed:
            done = (
                f"{name_of(each)} {counted(c.epochs, 'epoch')}, {counted(c.steps, 'step')}"
                for each, c in learner.cbstate.history.items()
            )
            self._print(f"resumed after {'; '.join(done) or 'nothing'}", learner)

    @on(CycleBegin)
    def turn(self, event: CycleBegin, phase: Phase, learner: Any) -> None:
        """Note when a cycle begins."""
        self._clock.turn(event, learner)

    @on(EpochEnd)
    def print_epoch(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Print what this epoch recorded, and what probes found at its end."""
        epoch = learner.cbstate.history[phase].epoch
        metrics = learner.cbstate.metrics
        recorded = [metrics[phase], metrics[ProbePhase]] if phase.gradients else [metrics[phase]]
        usual = self.digits + len("0.0")
        values = [
            f"{name} {self._column(name, shown_as(value, self.digits), usual)}"
            for of_phase in recorded
            for name, value in of_phase.numbers_at(epoch).items()
        ]
        if self.time and (times := self._clock.times(learner, rest=0.0)):
            values.append(f"({gone_and_left(*times)})")
        last = len(f"{learner.num_epochs}/{learner.num_epochs}") if self._clock.several else 0
        name = self._column(0, name_of(phase), 18)
        number = self._column(1, self._clock.epoch(epoch, learner), max(4, last))
        self._print(f"{name} epoch {number} {'  '.join(values)}".rstrip(), learner)

    @on(FitEnd)
    def print_stopped(self, event: FitEnd, phase: Phase, learner: Any) -> None:
        """Print why a fit ended early; an error speaks for itself, and the end of the process is told after it."""
        if event.reason is not None and event.error is None and event.reason != TERMINATED:
            self._print(f"stopped: {event.reason}", learner)

    def _column(self, key: str | int, text: str, least: int) -> str:
        """Return a text with spaces behind it, as wide as the widest of its column so far."""
        self._widths[key] = max(least, len(text), self._widths.get(key, 0))
        return text.ljust(self._widths[key])

    def _print(self, line: str, learner: Any) -> None:
        """Print a line, until standard output is gone."""
        if not self._is_silent and not learner.quiet:
            stamp = f"{datetime.now():%Y-%m-%d %H:%M:%S} " if self.stamps else ""
            with between_bars():
                # Into a file a line is written at once, so that whoever follows it sees it; a notebook joins them
                flush = not in_notebook()
                self._is_silent = not shown("MetricsPrinter", lambda: print(stamp + line, flush=flush))
