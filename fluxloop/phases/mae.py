"""The masked autoencoder: reconstruct the patches of an image that were hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.augment.patches import grid_of, patchify, unpatchify  # noqa: F401 - where they once were
from fluxloop.errors import BatchError, PhaseError, describe
from fluxloop.guard.given import check_number
from fluxloop.losses.reconstruction import masked_mse, normalize_patches
from fluxloop.phases.objective import ObjectivePhase

if TYPE_CHECKING:
    from fluxloop.state import StepState


class MAEPhase(ObjectivePhase):
    """MAE (He et al., 2022): hide most patches, encode the others, decode all.

    1. Cut the images into patches. 2. Draw for each image which stay visible. 3. The encoder sees the
    visible patches and where they are. 4. The decoder gets its output and returns all patches. 5. The
    mean squared error over the hidden ones.

    Args:
        patch_size: Height and width of a patch.
        mask_ratio: Share of the patches that is hidden.
        normalize: Whether the targets are patches of zero mean and unit variance.

    Raises:
        PhaseError: `mask_ratio` is no share between 0 and 1, or `patch_size` less than 1.
        BatchError: Images are not (N, C, H, W), `patch_size` does not divide H and W, or there is one patch alone.

    Models: ``encoder(patches, places) -> tokens`` with the visible patches (N, K, P), their places
    (N, K), whole numbers from 0, in the order in which they were drawn, and tokens (N, K, D);
    ``decoder(tokens, places) -> patches`` (N, L, P), all of them, in the images' order. Batches:
    images (N, C, H, W), or ``(images, ys)``. Entries: ``xs``, ``ys`` where there are labels,
    ``patches`` (N, L, P), ``places`` (N, K), ``mask`` (N, L), True where hidden, ``features`` (N, D), the
    mean token, ``preds`` (N, L, P), ``loss``. The events are those of `ObjectivePhase`.

    Example:
        >>> class Encoder(torch.nn.Linear):
        ...     def forward(self, patches, places):
        ...         return super().forward(patches)
        >>> class Decoder(torch.nn.Linear):
        ...     def forward(self, tokens, places):
        ...         return super().forward(tokens.mean(1)).reshape(-1, 4, 16)
        >>> learner = Learner({"encoder": Encoder(16, 8), "decoder": Decoder(8, 64)}, data=(torch.rand(32, 1, 8, 8),))
        >>> learner.set_callbacks([])
        >>> history = learner.fit(1, phases=[MAEPhase(patch_size=4, mask_ratio=0.75)])
        >>> learner.step.patches.shape, learner.step.places.shape, int(learner.step.mask.sum())
        (torch.Size([32, 4, 16]), torch.Size([32, 1]), 96)
    """

    parts = ("encoder", "decoder")

    def __init__(self, patch_size: int, *, mask_ratio: float = 0.75, normalize: bool = False) -> None:
        check_number("MAEPhase", "mask_ratio", mask_ratio, error=PhaseError)
        check_number("MAEPhase", "patch_size", patch_size, whole=True, error=PhaseError)
        if not 0 < mask_ratio < 1:
            raise PhaseError(
                f"MAEPhase(mask_ratio={mask_ratio!r}) was given; expected a share between 0 and 1, e.g. 0.75"
            )
        if patch_size < 1:
            raise PhaseError(f"MAEPhase({patch_size!r}) was given; expected the size of a patch in pixels, e.g. 4")
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.normalize = normalize

    def draw_order(self, state: StepState) -> Tensor:
        """Draw an order of each image's patches, shape (N, L); the first of them stay visible."""
        n, count, _ = state.patches.shape
        return torch.rand(n, count, device=state.patches.device).argsort(1)

    def forward(self, learner: Any, state: StepState) -> None:
        """Hide patches, encode the others, decode all."""
        state.patches = patchify(state.xs, self.patch_size)
        n, count, size = state.patches.shape
        if count < 2:
            raise BatchError(
                f"MAEPhase({self.patch_size}) makes one patch of {describe(state.xs)}, so that nothing can be hidden; "
                "expected two or more: a smaller patch_size"
            )
        shown = max(1, int(count * (1 - self.mask_ratio) + 1e-9))  # 1 - 0.9 is a little less than 0.1
        state.places = self.draw_order(state)[:, :shown]
        state.mask = torch.ones(n, count, dtype=torch.bool, device=state.patches.device).scatter_(
            1, state.places, False
        )
        visible = state.patches.gather(1, state.places[:, :, None].expand(-1, -1, size))
        tokens = learner.model.encoder(visible, state.places)
        state.features = tokens.mean(1)
        state.preds = learner.model.decoder(tokens, state.places)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the hidden patches."""
        targets = normalize_patches(state.patches) if self.normalize else state.patches
        return masked_mse(state.preds, targets, state.mask)
