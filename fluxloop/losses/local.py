"""VICRegL: the loss of VICReg on whole images and on the patches that match."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, relu

from fluxloop.compute.precision import in_full_precision


@in_full_precision
def vicregl_loss(
    embeddings: list[Tensor],
    maps: list[Tensor],
    grids: list[Tensor],
    *,
    num_global: int = 2,
    share: float = 0.75,
    matches: tuple[int, int] = (20, 4),
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """Keep views alike as a whole and patch by patch (VICRegL, Bardes et al., 2022).

    `share` times the loss of the images plus ``1 - share`` times that of the patches, each with VICReg's three terms,
    averaged over pairs of a global view and another one. Patches are matched twice: with the nearest in the space of
    embeddings, and with the nearest in the image; of all matches the nearest count. As in the authors' code: the first
    number of `matches` is taken from a view to the other, the second one back, and the covariance term is half of
    `vicreg_loss`'s.

    Args:
        embeddings: Of each view's image, the global views first, each of shape (N, D).
        maps: Of each view's patches, each of shape (N, L, E); L may be another in each view.
        grids: Where the middle of each patch lies in the image that was cropped, in one unit for all, (N, L, 2).
        num_global: How many of the views, the first ones, are global.
        share: Of the images' loss, from 0 to 1; the paper's α.
        matches: How many patches count, there and back; at most as many as there are.
        invariance: Weight of the distance between what matches.
        variance: Weight of the hinge on the standard deviations.
        covariance: Weight of the squared covariances.

    Returns:
        A scalar.

    Raises:
        ValueError: There is one row or one view alone, or lists of different length.

    Example:
        >>> embeddings = [torch.randn(4, 8) for _ in range(2)]  # of two global views of four images
        >>> maps = [torch.randn(4, 9, 6) for _ in range(2)]  # of their nine patches
        >>> grids = [torch.rand(4, 9, 2) for _ in range(2)]
        >>> vicregl_loss(embeddings, maps, grids).shape
        torch.Size([])

    Example:
        >>> whole, patches, places = torch.randn(8, 4), torch.randn(8, 9, 4), torch.rand(8, 9, 2)
        >>> alike = vicregl_loss([whole, whole], [patches, patches], [places, places])
        >>> (alike < vicregl_loss([whole, -whole], [patches, patches], [places, places])).item()
        True
    """
    if len(embeddings) < 2 or not len(embeddings) == len(maps) == len(grids) or len(embeddings[0]) < 2:
        raise ValueError(
            f"vicregl_loss was given {len(embeddings)} views with {len(maps)} maps and {len(grids)} grids, of "
            f"{len(embeddings[0]) if embeddings else 0} rows; expected two or more views, one map and grid of each, "
            "and two or more rows"
        )
    weights = invariance, variance, covariance
    pairs = [(i, j) for i in range(num_global) for j in range(len(embeddings)) if i != j]
    spreads = [_spread(z, variance, covariance) for z in embeddings]
    distances = [mse_loss(embeddings[i], embeddings[j]) for i, j in pairs]
    whole = invariance * torch.stack(distances).mean() + torch.stack(spreads).mean()
    terms = []
    for i, j in pairs:
        for found in (torch.cdist(maps[i], maps[j]), torch.cdist(grids[i], grids[j])):
            there = _nearest(maps[i], maps[j], found.detach(), matches[0])
            back = _nearest(maps[j], maps[i], found.detach().transpose(1, 2), matches[1])
            terms.append((_vicreg(*there, *weights) + _vicreg(*back, *weights)) / 2)
    return share * whole + (1 - share) * torch.stack(terms).sum() / len(pairs)


def _vicreg(a: Tensor, b: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """Return the three terms for what matches."""
    spread = (_spread(a, variance, covariance) + _spread(b, variance, covariance)) / 2
    return invariance * mse_loss(a, b) + spread


def _spread(z: Tensor, variance: float, covariance: float) -> Tensor:
    """Return the weighted terms of variance and covariance, shape (N, ..., D), a mean over what is in the middle."""
    centred = z - z.mean(0)
    hinge = relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
    together = torch.einsum("n...d,n...e->...de", centred, centred) / (len(z) - 1)
    squares = together.square()
    beside = squares.sum((-2, -1)) - squares.diagonal(dim1=-2, dim2=-1).sum(-1)
    return variance * hinge + covariance * beside.mean() / z.shape[-1]


def _nearest(patches: Tensor, others: Tensor, distances: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the patches with the nearest neighbours, and these, nearest first, each of shape (N, count, E)."""
    nearest, places = distances.min(2)
    chosen = nearest.topk(min(count, nearest.shape[1]), largest=False).indices
    places = places.gather(1, chosen)
    size = patches.shape[2]

    def taken(rows: Tensor, at: Tensor) -> Tensor:
        return rows.gather(1, at[:, :, None].expand(-1, -1, size))

    return taken(patches, chosen), taken(others, places)
