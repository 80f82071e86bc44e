"""Report what a training waits for when it stands still."""

from __future__ import annotations

import sys
import threading
import traceback
from time import monotonic
from typing import Any, TextIO

from attrs import define, field

from fluxloop.callback import UnsafeCallback, on
from fluxloop.events import EpochBegin, EpochEnd, FitBegin, StepBegin, StepEnd
from fluxloop.guard.given import is_number
from fluxloop.phase import FittingPhase, Phase
from fluxloop.screen.bars import shown
from fluxloop.signals import is_waiting


@define
class StallReport(UnsafeCallback):
    """Write a report where no step of a fit begins or ends for a while: what it waits for, and every thread's stack.

    A loader whose workers hang, a file system that does not answer, a deadlock between threads: the
    process stands still and prints nothing. The report comes once for each standstill; training goes
    on as soon as it can. It is written by a thread, so it comes too while the main thread waits.

    Args:
        seconds: How long nothing may happen: more than the slowest step or batch takes.
        file: Where the report is written; None: standard error.

    Raises:
        ValueError: `seconds` is no number above 0.

    Reads: (it is given the whole learner)

    Example:
        >>> import io, time
        >>> report = io.StringIO()
        >>> slow = CustomCallback(lambda learner: time.sleep(0.3), StepEnd, TrainingPhase)
        >>> history = testing.toy_learner(StallReport(0.05, file=report), slow, num_batches=1).fit(1)
        >>> report.getvalue().split(" for ")[0]
        'fluxloop: nothing has happened'
    """

    seconds: float = field(default=300.0)
    file: TextIO | None = field(default=None, repr=False)
    _since: float = field(default=0.0, init=False, repr=False)
    _doing: str = field(default="", init=False, repr=False)
    _phase: Phase | None = field(default=None, init=False, repr=False)

    draws = False
    in_compiled_step = "after"
    transient = ("_since", "_doing", "_phase")

    @seconds.validator
    def _check_seconds(self, attribute: object, seconds: Any) -> None:
        if not is_number(seconds) or not 0 < seconds < threading.TIMEOUT_MAX:
            raise ValueError(f"StallReport({seconds!r}) was given; expected a number of seconds above 0, such as 300")

    @on(FitBegin, FittingPhase)
    def start(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Begin to watch, until the fit ends."""
        self._note("the fit began", phase)
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(learner, ended), name="stall report", daemon=True)
        thread.start()
        learner.defer(thread.join)
        learner.defer(ended.set)

    @on(EpochBegin)
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Note that an epoch has begun."""
        self._note("an epoch began", phase)

    @on(StepBegin)
    def begin_step(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        """Note that a step has begun."""
        self._note("a step began", phase)

    @on(StepEnd)
    def end_step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Note that a step has ended."""
        self._note("a step ended", phase)

    @on(EpochEnd)
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Note that an epoch has ended."""
        self._note("an epoch ended", phase)

    def _note(self, doing: str, phase: Phase) -> None:
        self._since, self._doing, self._phase = monotonic(), doing, phase

    def _watch(self, learner: Any, ended: threading.Event) -> None:
        """Write a report for each standstill, until the fit has ended."""
        reported = None
        while not ended.wait(self.seconds / 4):
            since = self._since
            if monotonic() - since >= self.seconds and since != reported:
                reported = since
                text = self._report(learner, monotonic() - since)
                stream = self.file or sys.stderr
                if stream is not None:
                    shown("StallReport", lambda text=text, stream=stream: _write(stream, text))  # type: ignore[misc]

    def _report(self, learner: Any, seconds: float) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        waits = "the next batch, which does not come" if is_waiting(learner) else "what the main thread does, below"
        since = f"{self._doing} ({self._phase!r})"
        group = learner.accelerator.group
        where = "" if group is None else f" on process {group.rank}"
        lines = [f"fluxloop: nothing has happened for {seconds:.0f} seconds{where}, since {since}; waited for: {waits}"]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines += [f"thread {names.get(ident, ident)}:", "".join(traceback.format_stack(frame)).rstrip()]
        return "\n".join(lines) + "\n"


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
