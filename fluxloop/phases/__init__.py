"""The phases that come with fluxloop; each uses nothing that a user's phase could not use.

- What ``fit`` and ``predict`` run by default: ``supervised``.
- Bases: ``objective`` (one loss), ``per_optimizer`` (one loss for each optimizer), ``joint_embedding`` (views of each
  row; a student and its teacher), ``twin`` (a validation phase that does what a training phase does).
- Views of each row: ``simclr``, ``barlow_twins``, ``vicreg``, ``simsiam``, ``byol``, ``moco``, ``dino``.
- Labels: ``metric_learning``, ``distillation``.
- Reconstruction: ``autoencoder``, ``vae``, ``mae``.
- Adversaries: ``gan``.
"""

from typing import TYPE_CHECKING

from fluxloop.lazy import lazily

if TYPE_CHECKING:
    from fluxloop.phases.autoencoder import AutoencoderPhase
    from fluxloop.phases.barlow_twins import BarlowTwinsPhase
    from fluxloop.phases.byol import BYOLPhase
    from fluxloop.phases.dino import DINOPhase
    from fluxloop.phases.distillation import DistillationPhase
    from fluxloop.phases.gan import GANPhase, GANValidationPhase
    from fluxloop.phases.joint_embedding import JointEmbeddingPhase, TeacherPhase
    from fluxloop.phases.mae import MAEPhase
    from fluxloop.phases.metric_learning import SupConPhase, TripletPhase
    from fluxloop.phases.moco import MoCoPhase
    from fluxloop.phases.objective import ObjectivePhase, ObjectiveValidationPhase
    from fluxloop.phases.per_optimizer import PerOptimizerPhase, PerOptimizerValidationPhase
    from fluxloop.phases.simclr import SimCLRPhase
    from fluxloop.phases.simsiam import SimSiamPhase
    from fluxloop.phases.supervised import AveragedValidationPhase, PredictionPhase, TrainingPhase, ValidationPhase
    from fluxloop.phases.twin import TwinPhase
    from fluxloop.phases.vae import VAEPhase
    from fluxloop.phases.vicreg import VICRegPhase

__all__ = [
    "AutoencoderPhase",
    "AveragedValidationPhase",
    "BYOLPhase",
    "BarlowTwinsPhase",
    "DINOPhase",
    "DistillationPhase",
    "GANPhase",
    "GANValidationPhase",
    "JointEmbeddingPhase",
    "MAEPhase",
    "MoCoPhase",
    "ObjectivePhase",
    "ObjectiveValidationPhase",
    "PerOptimizerPhase",
    "PerOptimizerValidationPhase",
    "PredictionPhase",
    "SimCLRPhase",
    "SimSiamPhase",
    "SupConPhase",
    "TeacherPhase",
    "TrainingPhase",
    "TripletPhase",
    "TwinPhase",
    "VAEPhase",
    "VICRegPhase",
    "ValidationPhase",
]

if not TYPE_CHECKING:  # so that type checkers see misspelt names
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "autoencoder": "AutoencoderPhase",
            "barlow_twins": "BarlowTwinsPhase",
            "byol": "BYOLPhase",
            "dino": "DINOPhase",
            "distillation": "DistillationPhase",
            "gan": "GANPhase GANValidationPhase",
            "joint_embedding": "JointEmbeddingPhase TeacherPhase",
            "mae": "MAEPhase",
            "metric_learning": "SupConPhase TripletPhase",
            "moco": "MoCoPhase",
            "objective": "ObjectivePhase ObjectiveValidationPhase",
            "per_optimizer": "PerOptimizerPhase PerOptimizerValidationPhase",
            "simclr": "SimCLRPhase",
            "simsiam": "SimSiamPhase",
            "supervised": "AveragedValidationPhase PredictionPhase TrainingPhase ValidationPhase",
            "twin": "TwinPhase",
            "vae": "VAEPhase",
            "vicreg": "VICRegPhase",
        },
    )
