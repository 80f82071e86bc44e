"""fluxloop: a training-loop framework for PyTorch, for people whose training step is the research."""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import Any as _Any

from fluxloop import errors, events
from fluxloop.accelerator import Accelerator
from fluxloop.callback import Callback, NoConflict, RunFirst, Unresolvable, UnsafeCallback, on, resolve_conflict
from fluxloop.callbacks import (
    Check,
    ConditionalCallback,
    CustomCallback,
    GarbageCollect,
    Metrics,
    MetricsPrinter,
    ProgressBar,
    Recorder,
    SanityCheck,
    StopOnNaNLoss,
    Traces,
    throttle,
)
from fluxloop.data import TensorBatches, as_dataloader, split
from fluxloop.errors import (
    AmbiguousHandlerError,
    BatchError,
    CallbackConflictError,
    CallbackCycleError,
    CallbackError,
    CallbackTypeError,
    CancelEpochException,
    CancelFittingException,
    CancelSignal,
    CancelStepException,
    DataError,
    DuplicateCallbackError,
    FluxloopError,
    HandlerError,
    LossError,
    MetricError,
    MissingEntryError,
    MissingProducerError,
    ModelError,
    OptimizerError,
    PhaseError,
    ReentrantFitError,
    SanityCheckError,
    StateAccessError,
)
from fluxloop.events import (
    BackwardBegin,
    BackwardEnd,
    CycleBegin,
    CycleEnd,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LossBegin,
    StepBegin,
    StepEnd,
    UpdateBegin,
    UpdateEnd,
)
from fluxloop.history import Counts, History
from fluxloop.learner import Learner
from fluxloop.loop import runepoch, runstep
from fluxloop.metrics import Loss, Metric, SmoothLoss, accuracy, binary_accuracy, mae, mse, rmse, top_k
from fluxloop.phase import AbstractTrainingPhase, AbstractValidationPhase, FittingPhase, Phase
from fluxloop.phases import (
    PerOptimizerPhase,
    PerOptimizerValidationPhase,
    PredictionPhase,
    TrainingPhase,
    ValidationPhase,
)
from fluxloop.randomness import seed_everything, start_generators, stream_seed

__version__ = "0.1.0"

__all__ = [
    "AbstractTrainingPhase",
    "AbstractValidationPhase",
    "Accelerator",
    "AmbiguousHandlerError",
    "BackwardBegin",
    "BackwardEnd",
    "BatchError",
    "Callback",
    "CallbackConflictError",
    "CallbackCycleError",
    "CallbackError",
    "CallbackTypeError",
    "CancelEpochException",
    "CancelFittingException",
    "CancelSignal",
    "CancelStepException",
    "Check",
    "ConditionalCallback",
    "Counts",
    "CustomCallback",
    "CycleBegin",
    "CycleEnd",
    "DataError",
    "DuplicateCallbackError",
    "EpochBegin",
    "EpochEnd",
    "Event",
    "FitBegin",
    "FitEnd",
    "FittingPhase",
    "FluxloopError",
    "GarbageCollect",
    "HandlerError",
    "History",
    "Learner",
    "Loss",
    "LossBegin",
    "LossError",
    "Metric",
    "MetricError",
    "Metrics",
    "MetricsPrinter",
    "MissingEntryError",
    "MissingProducerError",
    "ModelError",
    "NoConflict",
    "OptimizerError",
    "PerOptimizerPhase",
    "PerOptimizerValidationPhase",
    "Phase",
    "PhaseError",
    "PredictionPhase",
    "ProgressBar",
    "Recorder",
    "ReentrantFitError",
    "RunFirst",
    "SanityCheck",
    "SanityCheckError",
    "SmoothLoss",
    "StateAccessError",
    "StepBegin",
    "StepEnd",
    "StopOnNaNLoss",
    "TensorBatches",
    "Traces",
    "TrainingPhase",
    "Unresolvable",
    "UnsafeCallback",
    "UpdateBegin",
    "UpdateEnd",
    "ValidationPhase",
    "accuracy",
    "as_dataloader",
    "binary_accuracy",
    "errors",
    "events",
    "mae",
    "mse",
    "on",
    "resolve_conflict",
    "rmse",
    "runepoch",
    "runstep",
    "seed_everything",
    "split",
    "start_generators",
    "stream_seed",
    "testing",
    "throttle",
    "top_k",
]


def __getattr__(name: str) -> _Any:
    """Load `fluxloop.testing` when it is asked for; say what else is not there."""
    if name == "testing":
        return _import_module("fluxloop.testing")
    raise AttributeError(f"fluxloop has no {name!r}{errors.did_you_mean(name, __all__)}")
