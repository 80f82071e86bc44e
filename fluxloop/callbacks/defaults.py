"""The callbacks a learner gets unless told otherwise."""

from __future__ import annotations

from fluxloop.callback import Callback
from fluxloop.callbacks.metrics import Metrics
from fluxloop.callbacks.printer import MetricsPrinter
from fluxloop.callbacks.progress import ProgressBar
from fluxloop.callbacks.recorder import Recorder
from fluxloop.callbacks.stop_on_nan_loss import StopOnNaNLoss


def default_callbacks() -> list[Callback]:
    """Make the default callbacks, fresh: counts, loss, progress bar, a line per epoch, stop on NaN."""
    return [Recorder(), Metrics(), ProgressBar(), MetricsPrinter(), StopOnNaNLoss()]


def with_defaults(callbacks: list[object]) -> list[object]:
    """Add the default callbacks whose type is not among `callbacks`, wrapped or not."""
    given = [callback.unwrapped for callback in callbacks if isinstance(callback, Callback)]
    missing = [default for default in default_callbacks() if not any(isinstance(c, type(default)) for c in given)]
    return [*callbacks, *missing]
