"""What signals do to a running fit: Ctrl+C and SIGTERM end it in good order, SIGUSR1 asks for a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

INTERRUPTED, TERMINATED = "interrupted (Ctrl+C)", "terminated (SIGTERM)"
"""Reasons of fits that are to go on another time."""
EXIT_CODE = 128 + signal.SIGTERM
"""The status of a process that SIGTERM has ended, as a shell tells it."""
GRACE = 5.0
"""Seconds that a batch may still take to come after SIGTERM."""


class StopWaiting(BaseException):
    """Raised in the main thread where it waits for a batch that does not come, and the process is to end."""


@contextmanager
def heeding_signals(learner: RunLearner) -> Iterator[Terminates]:
    """Make the first Ctrl+C, or a SIGTERM, end the fit after its running step.

    A second Ctrl+C interrupts at once. After a SIGTERM the fit waits for its next batch a few
    seconds more and not for ever. Signals can be handled in the main thread alone, and handlers of
    the script's own are left as they are.

    Yields:
        What knows whether a SIGTERM came: then the process is to exit after the fit.
    """
    terminates = Terminates(learner)
    if threading.current_thread() is not threading.main_thread():
        yield terminates
        return
    with (
        instead_of(signal.default_int_handler, signal.SIGINT, _Interrupts(learner)),
        instead_of(signal.SIG_DFL, signal.SIGTERM, terminates),
    ):
        try:
            yield terminates
        finally:
            terminates.timer.cancel()


@contextmanager
def instead_of(usual: object, number: signal.Signals, handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle a signal for a while, where nobody but Python or the system does."""
    if signal.getsignal(number) is not usual:
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class _Interrupts:
    """Has a fit end at Ctrl+C."""

    def __init__(self, learner: RunLearner) -> None:
        self._learner = learner

    def __call__(self, number: int, frame: object) -> None:
        """Ask for the end; a second Ctrl+C is Python's again."""
        self._learner._running.ask_to_stop(INTERRUPTED)
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminates:
    """Has a fit end at SIGTERM.

    Attributes:
        came: Whether one came.
    """

    def __init__(self, learner: RunLearner) -> None:
        self._learner = learner
        self.came = self._late = False
        self.timer = threading.Timer(0, lambda: None)

    def __call__(self, number: int, frame: object) -> None:
        """Ask for the end; end waiting for a batch when that has lasted too long."""
        self.came = True
        self._learner._running.ask_to_stop(TERMINATED)
        if self._late and is_waiting(self._learner):
            raise StopWaiting
        if not self.timer.is_alive():
            self.timer = threading.Timer(GRACE, self._remind)
            self.timer.daemon = True
            self.timer.start()

    def _remind(self) -> None:
        """Send the signal again, to the main thread: it ends a system call in which that waits."""
        self._late = True
        ident = threading.main_thread().ident
        if ident is not None and signal.getsignal(signal.SIGTERM) is self:
            signal.pthread_kill(ident, signal.SIGTERM)


def is_waiting(learner: RunLearner) -> bool:
    """Return whether a fit waits for a batch: no step is under way."""
    scope = learner.scope
    while scope is not None:
        feed = getattr(scope, "feed", None)
        if feed is not None:
            waiting: bool = feed.waiting
            return waiting
        scope = scope.parent
    return False
