# Written by tests/write_stubs.py from the table in __init__.py, where the public names are.

from fluxloop.phases.autoencoder import AutoencoderPhase as AutoencoderPhase
from fluxloop.phases.barlow_twins import BarlowTwinsPhase as BarlowTwinsPhase
from fluxloop.phases.byol import BYOLPhase as BYOLPhase
from fluxloop.phases.dino import DINOPhase as DINOPhase
from fluxloop.phases.distillation import DistillationPhase as DistillationPhase
from fluxloop.phases.gan import GANPhase as GANPhase
from fluxloop.phases.gan import GANValidationPhase as GANValidationPhase
from fluxloop.phases.joint_embedding import JointEmbeddingPhase as JointEmbeddingPhase
from fluxloop.phases.joint_embedding import TeacherPhase as TeacherPhase
from fluxloop.phases.mae import MAEPhase as MAEPhase
from fluxloop.phases.metric_learning import SupConPhase as SupConPhase
from fluxloop.phases.metric_learning import TripletPhase as TripletPhase
from fluxloop.phases.moco import MoCoPhase as MoCoPhase
from fluxloop.phases.objective import ObjectivePhase as ObjectivePhase
from fluxloop.phases.objective import ObjectiveValidationPhase as ObjectiveValidationPhase
from fluxloop.phases.per_optimizer import PerOptimizerPhase as PerOptimizerPhase
from fluxloop.phases.per_optimizer import PerOptimizerValidationPhase as PerOptimizerValidationPhase
from fluxloop.phases.simclr import SimCLRPhase as SimCLRPhase
from fluxloop.phases.simsiam import SimSiamPhase as SimSiamPhase
from fluxloop.phases.supervised import AveragedValidationPhase as AveragedValidationPhase
from fluxloop.phases.supervised import PredictionPhase as PredictionPhase
from fluxloop.phases.supervised import TrainingPhase as TrainingPhase
from fluxloop.phases.supervised import ValidationPhase as ValidationPhase
from fluxloop.phases.twin import TwinPhase as TwinPhase
from fluxloop.phases.vae import VAEPhase as VAEPhase
from fluxloop.phases.vicreg import VICRegPhase as VICRegPhase
