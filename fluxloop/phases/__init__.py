"""The phases that come with fluxloop; each uses nothing that a user's phase could not use."""

from fluxloop.phases.per_optimizer import PerOptimizerPhase, PerOptimizerValidationPhase
from fluxloop.phases.supervised import PredictionPhase, TrainingPhase, ValidationPhase

__all__ = [
    "PerOptimizerPhase",
    "PerOptimizerValidationPhase",
    "PredictionPhase",
    "TrainingPhase",
    "ValidationPhase",
]
