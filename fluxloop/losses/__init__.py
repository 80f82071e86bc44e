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
    path_lengths,
    r1_penalty,
    relativistic,
    relativistic_loss,
    wasserstein,
)
from fluxloop.losses.contrastive import batch_nce, dcl_loss, info_nce, nt_xent, supervised_contrastive
from fluxloop.losses.denoising import row_errors
from fluxloop.losses.distillation import dino_loss, distillation_loss, negative_cosine
from fluxloop.losses.isotropic import draw_directions, lejepa_loss, sigreg
from fluxloop.losses.local import vicregl_loss
from fluxloop.losses.mixed import MixedLoss, MixedTargets
from fluxloop.losses.prototypes import ibot_loss, masked_code_loss, msn_loss, sinkhorn, swav_loss
from fluxloop.losses.reconstruction import kl_standard_normal, masked_mse, normalize_patches, squared_error
from fluxloop.losses.redundancy import (
    barlow_twins_loss,
    mmcr_loss,
    tico_covariance,
    tico_loss,
    vicreg_loss,
    wmse_loss,
)
from fluxloop.losses.spread import alignment, koleo_loss, uniformity

__all__ = [
    "ADVERSARIAL_LOSSES",
    "AdversarialLoss",
    "MixedLoss",
    "MixedTargets",
    "alignment",
    "barlow_twins_loss",
    "batch_nce",
    "dcl_loss",
    "dino_loss",
    "distillation_loss",
    "draw_directions",
    "gradient_penalty",
    "hinge",
    "ibot_loss",
    "info_nce",
    "kl_standard_normal",
    "koleo_loss",
    "least_squares",
    "lejepa_loss",
    "masked_code_loss",
    "masked_mse",
    "mmcr_loss",
    "msn_loss",
    "negative_cosine",
    "non_saturating",
    "normalize_patches",
    "nt_xent",
    "path_lengths",
    "r1_penalty",
    "relativistic",
    "relativistic_loss",
    "row_errors",
    "sigreg",
    "sinkhorn",
    "squared_error",
    "supervised_contrastive",
    "swav_loss",
    "tico_covariance",
    "tico_loss",
    "uniformity",
    "vicreg_loss",
    "vicregl_loss",
    "wasserstein",
    "wmse_loss",
]
