"""The built-in callbacks; each handles events as a user's callback would.

- Counting and measuring: ``recorder``, ``metrics``, ``traces``, ``probe``, ``feature_stats``, ``activation_stats``,
  ``profile``.
- Showing and logging: ``progress``, ``printer``, ``csv_logger``, ``log``, ``log_pictures``, ``sample_images``,
  ``stall_report``.
- What a step uses: ``mixup`` (inputs), ``gradient_clip``, ``scheduler`` and ``lr_scheduler`` (with
  ``torch_schedulers``), ``unfreeze``, ``batch_limit``.
- Weights beside the live ones: ``ema``, ``swa``, ``keep_best``.
- The run: ``checkpointer``, ``early_stopping``, ``stop_on_nan_loss``, ``sanity_check``, ``garbage_collect``.
- Callbacks from other things: ``defaults``, ``custom``, ``conditional``; and ``set_epoch``, which is no longer needed.
"""

from typing import TYPE_CHECKING

from fluxloop.lazy import lazily

if TYPE_CHECKING:
    from fluxloop.callbacks.activation_stats import ActivationStats
    from fluxloop.callbacks.batch_limit import BatchLimit
    from fluxloop.callbacks.checkpointer import Checkpointer
    from fluxloop.callbacks.conditional import ConditionalCallback, throttle
    from fluxloop.callbacks.csv_logger import CSVLogger
    from fluxloop.callbacks.custom import CustomCallback
    from fluxloop.callbacks.defaults import default_callbacks
    from fluxloop.callbacks.early_stopping import EarlyStopping, Timer
    from fluxloop.callbacks.ema import EMA
    from fluxloop.callbacks.feature_stats import FeatureStats
    from fluxloop.callbacks.garbage_collect import GarbageCollect
    from fluxloop.callbacks.gradient_clip import GradientClip
    from fluxloop.callbacks.keep_best import KeepBestModel
    from fluxloop.callbacks.log import (
        LogHyperParams,
        LogMetrics,
        LogTraces,
    )
    from fluxloop.callbacks.log_pictures import (
        LogHistograms,
        LogImages,
        LogVisualization,
    )
    from fluxloop.callbacks.lr_scheduler import LRScheduler
    from fluxloop.callbacks.metrics import Metrics
    from fluxloop.callbacks.mixup import CutMix, MixUp
    from fluxloop.callbacks.printer import MetricsPrinter
    from fluxloop.callbacks.probe import KNNProbe, LinearProbe, MetricSource
    from fluxloop.callbacks.profile import Profile
    from fluxloop.callbacks.progress import ProgressBar
    from fluxloop.callbacks.recorder import Recorder
    from fluxloop.callbacks.sample_images import SampleImages
    from fluxloop.callbacks.sanity_check import Check, SanityCheck
    from fluxloop.callbacks.scheduler import Scheduler
    from fluxloop.callbacks.set_epoch import SetEpoch
    from fluxloop.callbacks.stall_report import StallReport
    from fluxloop.callbacks.stop_on_nan_loss import StopOnNaNLoss
    from fluxloop.callbacks.swa import StochasticWeightAveraging
    from fluxloop.callbacks.traces import Traces
    from fluxloop.callbacks.unfreeze import Unfreeze

__all__ = [
    "EMA",
    "ActivationStats",
    "BatchLimit",
    "CSVLogger",
    "Check",
    "Checkpointer",
    "ConditionalCallback",
    "CustomCallback",
    "CutMix",
    "EarlyStopping",
    "FeatureStats",
    "GarbageCollect",
    "GradientClip",
    "KNNProbe",
    "KeepBestModel",
    "LRScheduler",
    "LinearProbe",
    "LogHistograms",
    "LogHyperParams",
    "LogImages",
    "LogMetrics",
    "LogTraces",
    "LogVisualization",
    "MetricSource",
    "Metrics",
    "MetricsPrinter",
    "MixUp",
    "Profile",
    "ProgressBar",
    "Recorder",
    "SampleImages",
    "SanityCheck",
    "Scheduler",
    "SetEpoch",
    "StallReport",
    "StochasticWeightAveraging",
    "StopOnNaNLoss",
    "Timer",
    "Traces",
    "Unfreeze",
    "default_callbacks",
    "throttle",
]

if not TYPE_CHECKING:  # so that type checkers see misspelt names
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "activation_stats": "ActivationStats",
            "batch_limit": "BatchLimit",
            "checkpointer": "Checkpointer",
            "conditional": "ConditionalCallback throttle",
            "csv_logger": "CSVLogger",
            "custom": "CustomCallback",
            "defaults": "default_callbacks",
            "early_stopping": "EarlyStopping Timer",
            "ema": "EMA",
            "feature_stats": "FeatureStats",
            "garbage_collect": "GarbageCollect",
            "gradient_clip": "GradientClip",
            "keep_best": "KeepBestModel",
            "log": "LogHyperParams LogMetrics LogTraces",
            "log_pictures": "LogHistograms LogImages LogVisualization",
            "lr_scheduler": "LRScheduler",
            "metrics": "Metrics",
            "mixup": "CutMix MixUp",
            "printer": "MetricsPrinter",
            "probe": "KNNProbe LinearProbe MetricSource",
            "profile": "Profile",
            "progress": "ProgressBar",
            "recorder": "Recorder",
            "sample_images": "SampleImages",
            "sanity_check": "Check SanityCheck",
            "scheduler": "Scheduler",
            "set_epoch": "SetEpoch",
            "stop_on_nan_loss": "StopOnNaNLoss",
            "stall_report": "StallReport",
            "swa": "StochasticWeightAveraging",
            "traces": "Traces",
            "unfreeze": "Unfreeze",
        },
    )
