"""The built-in callbacks; each handles events as a user's callback would."""

from fluxloop.callbacks.conditional import ConditionalCallback, throttle
from fluxloop.callbacks.custom import CustomCallback
from fluxloop.callbacks.defaults import default_callbacks
from fluxloop.callbacks.garbage_collect import GarbageCollect
from fluxloop.callbacks.metrics import Metrics
from fluxloop.callbacks.printer import MetricsPrinter
from fluxloop.callbacks.progress import ProgressBar
from fluxloop.callbacks.recorder import Recorder
from fluxloop.callbacks.sanity_check import Check, SanityCheck
from fluxloop.callbacks.stop_on_nan_loss import StopOnNaNLoss
from fluxloop.callbacks.traces import Traces

__all__ = [
    "Check",
    "ConditionalCallback",
    "CustomCallback",
    "GarbageCollect",
    "Metrics",
    "MetricsPrinter",
    "ProgressBar",
    "Recorder",
    "SanityCheck",
    "StopOnNaNLoss",
    "Traces",
    "default_callbacks",
    "throttle",
]
