"""Losses that look at how the dimensions of embeddings vary together, so that these do not collapse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, relu

from fluxloop.compute.precision import in_full_precision


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Return the entries beside the diagonal of a square matrix, shape (D * (D - 1),)."""
    size = len(matrix)
    return matrix.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten()


@in_full_precision
def barlow_twins_loss(z1: Tensor, z2: Tensor, weight: float = 5e-3) -> Tensor:
    """Make the cross-correlation of two views' embeddings the identity (Zbontar et al., 2021).

    Each dimension is standardised over the batch (with the biased variance, as batch norm does,
    and its epsilon of 1e-5). The sum of ``(1 - c_ii)**2`` plus `weight` times that of ``c_ij**2``.

    Args:
        z1: Embeddings of the first view, shape (N, D).
        z2: Those of the second, shape (N, D).
        weight: Of the entries beside the diagonal.

    Returns:
        A scalar.
    """
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    correlation = a.T @ b / len(a)
    return (torch.diagonal(correlation) - 1).pow(2).sum() + weight * _off_diagonal(correlation).pow(2).sum()


@in_full_precision
def vicreg_loss(
    z1: Tensor, z2: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """Keep two views alike, each dimension varied, and dimensions uncorrelated (Bardes et al., 2022).

    As in the paper's code: the mean squared distance; the hinge of each dimension's standard
    deviation (unbiased, 1e-4 added to the variance) at 1, averaged over dimensions and views; and
    the squared covariances beside the diagonal, summed and divided by D, for both views.

    Args:
        z1: Embeddings of the first view, shape (N, D), N > 1.
        z2: Those of the second, shape (N, D).
        invariance: Weight of the first term.
        variance: Weight of the second.
        covariance: Weight of the third.

    Returns:
        A scalar.

    Raises:
        ValueError: There is one row alone.
    """
    if len(z1) < 2:
        raise ValueError("vicreg_loss was given one row, which has no variance; expected two or more: drop_last=True")
    loss = invariance * mse_loss(z1, z2)
    for z in (z1, z2):
        centred = z - z.mean(0)
        deviation = (z.var(0) + 1e-4).sqrt()
        together = centred.T @ centred / (len(z) - 1)
        loss = loss + variance * relu(1 - deviation).mean() / 2
        loss = loss + covariance * _off_diagonal(together).pow(2).sum() / z.shape[1]
    return loss
