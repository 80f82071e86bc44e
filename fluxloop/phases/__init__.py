"""The phases that come with fluxloop; each uses nothing that a user's phase could not use.

- What ``fit`` and ``predict`` run by default: ``supervised``.
- A model that computes its own loss, as those of transformers: ``model_loss``.
- Bases: ``objective`` (one loss), ``per_optimizer`` (one loss for each optimizer), ``joint_embedding`` (views of each
  row; a student and its teacher), ``twin`` (a validation phase that does what a training phase does).
- Views of each row: ``simclr``, ``barlow_twins``, ``vicreg``, ``simsiam``, ``byol``, ``moco``, ``moco_v3``, ``nnclr``,
  ``swav``, ``dino``, ``ibot``, ``msn``, ``lejepa``; with a queue of past rows: ``queue``.
- Labels: ``metric_learning``, ``distillation``.
- Reconstruction: ``autoencoder``, ``vae``, ``mae``; of what a teacher has of hidden patches: ``predicting``.
- Adversaries: ``gan``, ``cycle_gan``.
- Noise to data: ``noised`` (their base, and their validation phase), ``diffusion``, ``flow_matching``.
"""

from fluxloop.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "autoencoder": "AutoencoderPhase",
        "barlow_twins": "BarlowTwinsPhase",
        "byol": "BYOLPhase",
        "cycle_gan": "CycleGANPhase CycleGANValidationPhase",
        "diffusion": "DiffusionPhase",
        "dino": "DINOPhase",
        "distillation": "DistillationPhase",
        "flow_matching": "FlowMatchingPhase",
        "gan": "GANPhase GANValidationPhase",
        "ibot": "DINOv2Phase IBOTPhase",
        "joint_embedding": "JointEmbeddingPhase TeacherPhase",
        "lejepa": "LeJEPAPhase",
        "mae": "MAEPhase",
        "metric_learning": "SupConPhase TripletPhase",
        "model_loss": "ModelLossPhase",
        "moco": "MoCoPhase",
        "noised": "NoisedPhase NoisedValidationPhase",
        "moco_v3": "MoCoV3Phase",
        "msn": "MSNPhase",
        "nnclr": "NNCLRPhase",
        "objective": "ObjectivePhase ObjectiveValidationPhase",
        "per_optimizer": "PerOptimizerPhase PerOptimizerValidationPhase",
        "predicting": "Data2VecPhase IJEPAPhase",
        "simclr": "SimCLRPhase",
        "simsiam": "SimSiamPhase",
        "supervised": "AveragedValidationPhase PredictionPhase TrainingPhase ValidationPhase",
        "swav": "SwAVPhase",
        "twin": "TwinPhase",
        "vae": "VAEPhase",
        "vicreg": "VICRegPhase",
    },
)
