"""A progress bar for the running phase."""

from __future__ import annotations

import sys
from functools import partial
from time import monotonic
from typing import Any, TextIO

from attrs import define, field
from tqdm.auto import tqdm

from fluxloop.callback import Callback, on
from fluxloop.events import EpochBegin, EpochEnd, StepEnd
from fluxloop.phase import Phase
from fluxloop.randomness import preserved


def in_notebook() -> bool:
    """Tell whether a notebook's kernel runs this process."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and getattr(shell, "kernel", None) is not None


@define
class ProgressBar(Callback):
    """Show a bar per epoch of a phase, with the running values of the metrics.

    Works for sized and unsized data, in a terminal and in a notebook; the bar disappears when
    its epoch ends, whatever way. Steps look at the clock; only a refresh computes metrics.

    Args:
        enabled: None shows bars in a terminal and in a notebook only.
        interval: Seconds between refreshes.
        file: Where a terminal's bar is written; None: standard error.

    Reads: num_batches, cbstate
    """

    enabled: bool | None = None
    interval: float = 0.1
    file: TextIO | None = field(default=None, repr=False)
    _bars: list[Any] = field(factory=list, init=False, repr=False)
    _numbers: dict[int, dict[str, str]] = field(factory=dict, init=False, repr=False)
    _seen: int = field(default=0, init=False, repr=False)
    _due: float = field(default=0.0, init=False, repr=False)

    reads = ("num_batches", "cbstate")
    draws = False

    def is_shown(self) -> bool:
        """Tell whether bars are shown."""
        if self.enabled is not None:
            return self.enabled
        return in_notebook() or (self.file or sys.stderr).isatty()

    def _options(self) -> dict[str, Any]:
        """Give tqdm's options: refreshing when told, where the bar is shown."""
        return {"file": self.file or sys.stderr, "mininterval": 0, "miniters": 1}

    @on(EpochBegin)
    def open(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Open a bar, to be closed when the epoch ends."""
        if not self.is_shown():
            return
        epoch = learner.cbstate.history[phase].epochs + 1 if "history" in learner.cbstate else None
        title = type(phase).__name__ + (f" {epoch}" if epoch else "")
        bar = tqdm(total=learner.num_batches, desc=title, leave=False, unit="batch", **self._options())
        outer = self._seen, self._due
        self._bars.append(bar)
        self._seen, self._due = 0, monotonic() + self.interval

        def close() -> None:
            if bar in self._bars:
                self._bars.remove(bar)
                self._numbers.pop(id(bar), None)
                bar.close()
            self._seen, self._due = outer

        learner.defer(close)

    @on(StepEnd)
    def advance(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Count the step; refresh the bar when it is time."""
        self._seen += 1
        if self._bars and monotonic() >= self._due:
            self._refresh(self._bars[-1], phase, learner)

    def _refresh(self, bar: Any, phase: Phase, learner: Any) -> None:
        if "metrics" in learner.cbstate:
            with preserved():  # a metric may draw when it is computed, and when that is depends on the clock
                values = learner.cbstate.metrics[phase].running()
            for name, value in values.items():
                if getattr(value, "numel", lambda: 0)() == 1:
                    learner.host(value, partial(self._note, bar, name))
        bar.set_postfix(self._numbers.get(id(bar), {}), refresh=False)
        bar.update(self._seen - bar.n)
        self._due = monotonic() + self.interval

    def _note(self, bar: Any, name: str, number: float) -> None:
        """Keep a number for the bar's next refresh; from a device it comes later than it was asked for."""
        self._numbers.setdefault(id(bar), {})[name] = f"{number:.4g}"

    @on(EpochEnd)
    def close(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Take the bar away before others print about the epoch."""
        if self._bars:
            bar = self._bars.pop()
            self._numbers.pop(id(bar), None)
            bar.update(self._seen - bar.n)
            bar.close()
