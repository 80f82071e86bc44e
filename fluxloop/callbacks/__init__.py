"""The built-in callbacks; each handles events as a user's callback would."""

from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.conditional import ConditionalCallback, throttle
from fluxloop.callbacks.custom import CustomCallback
from fluxloop.callbacks.defaults import default_callbacks
from fluxloop.callbacks.ema import EMA
from fluxloop.callbacks.feature_stats import FeatureStats
from fluxloop.callbacks.garbage_collect import GarbageCollect
from fluxloop.callbacks.keep_best import KeepBestModel
from fluxloop.callbacks.metrics import Metrics
from fluxloop.callbacks.printer import MetricsPrinter
from fluxloop.callbacks.probe import KNNProbe, LinearProbe, MetricSource
from fluxloop.callbacks.progress import ProgressBar
from fluxloop.callbacks.recorder import Recorder
from fluxloop.callbacks.sample_images import SampleImages
from fluxloop.callbacks.sanity_check import Check, SanityCheck
from fluxloop.callbacks.stop_on_nan_loss import StopOnNaNLoss
from fluxloop.callbacks.traces import Traces

__all__ = [
    "EMA",
    "Check",
    "Checkpointer",
    "ConditionalCallback",
    "CustomCallback",
    "FeatureStats",
    "GarbageCollect",
    "KNNProbe",
    "KeepBestModel",
    "LinearProbe",
    "MetricSource",
    "Metrics",
    "MetricsPrinter",
    "ProgressBar",
    "Recorder",
    "SampleImages",
    "SanityCheck",
    "StopOnNaNLoss",
    "Traces",
    "default_callbacks",
    "throttle",
]
