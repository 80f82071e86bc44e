"""Loss functions of self-supervised learning and GANs, to use in phases of one's own; each names its paper.

They take and return tensors, have no state and draw no random numbers unless they say so. What
PyTorch already has (cross entropy, `torch.nn.functional.triplet_margin_loss`) is not repeated.
"""

from fluxloop.losses.adversarial import (
    ADVERSARIAL_LOSSES,
    AdversarialLoss,
    gradient_penalty,
    hinge,
    least_squares,
    non_saturating,
    r1_penalty,
    wasserstein,
)
from fluxloop.losses.contrastive import info_nce, nt_xent, supervised_contrastive
from fluxloop.losses.distillation import dino_loss, distillation_loss, negative_cosine
from fluxloop.losses.mixed import MixedLoss, MixedTargets
from fluxloop.losses.reconstruction import kl_standard_normal, masked_mse, normalize_patches, squared_error
from fluxloop.losses.redundancy import barlow_twins_loss, vicreg_loss

__all__ = [
    "ADVERSARIAL_LOSSES",
    "AdversarialLoss",
    "MixedLoss",
    "MixedTargets",
    "barlow_twins_loss",
    "dino_loss",
    "distillation_loss",
    "gradient_penalty",
    "hinge",
    "info_nce",
    "kl_standard_normal",
    "least_squares",
    "masked_mse",
    "negative_cosine",
    "non_saturating",
    "normalize_patches",
    "nt_xent",
    "r1_penalty",
    "squared_error",
    "supervised_contrastive",
    "vicreg_loss",
    "wasserstein",
]
