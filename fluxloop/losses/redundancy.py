"""Losses that look at how the dimensions of embeddings vary together, so that these do not collapse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize, relu

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

    Example:
        >>> views = torch.randn(64, 8)
        >>> (barlow_twins_loss(views, views) < barlow_twins_loss(views, views.roll(1, 0))).item()
        True
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

    Example:
        >>> collapsed = torch.zeros(8, 4)
        >>> round(vicreg_loss(collapsed, collapsed).item(), 2), vicreg_loss(collapsed, collapsed, variance=0).item()
        (24.75, 0.0)
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


@in_full_precision
def tico_loss(
    z1: Tensor, z2: Tensor, past: Tensor | None = None, *, weight: float = 8.0, momentum: float = 0.9
) -> Tensor:
    """Keep two views alike, and rows out of the directions in which most lie: TiCo (Zhu et al., 2022).

    One minus the mean cosine of the views, plus `weight` times the mean of ``z.T @ C @ z`` over the first view's
    normalised rows, where C is the moving average of ``z @ z.T`` with this step's rows in it, `tico_covariance`. No
    gradient goes to C.

    Args:
        z1: Embeddings of the first view, shape (N, D); need not be normalised.
        z2: Those of the second, row by row, shape (N, D).
        past: The average of the steps before, shape (D, D); left out, zeros. After the step it is
            ``tico_covariance(z1, past)``.
        weight: Of the second term; the paper's ρ.
        momentum: Weight of the past in the average; the paper's β.

    Returns:
        A scalar.

    Example:
        >>> views, past = torch.eye(4), None
        >>> for _ in range(3):  # as a phase's steps
        ...     loss = tico_loss(views, views, past)
        ...     past = tico_covariance(views, past)
        >>> past.shape, past.requires_grad
        (torch.Size([4, 4]), False)

    Example:
        >>> z = torch.randn(16, 4)
        >>> (tico_loss(z, z) < tico_loss(z, -z)).item()
        True
    """
    z1, z2 = normalize(z1, dim=1), normalize(z2, dim=1)
    average = tico_covariance(z1, past, momentum)
    return 1 - (z1 * z2).sum(1).mean() + weight * (z1 @ average * z1).sum(1).mean()


@in_full_precision
def tico_covariance(z1: Tensor, past: Tensor | None = None, momentum: float = 0.9) -> Tensor:
    """Return the moving average of ``z @ z.T`` of normalised rows after a step, for the next one's `tico_loss`.

    Args:
        z1: Embeddings of the step's first view, shape (N, D).
        past: The average before, shape (D, D); left out, zeros.
        momentum: Its weight.

    Returns:
        Shape (D, D), without gradient.

    Example:
        >>> torch.allclose(tico_covariance(torch.eye(4), momentum=0.0), torch.eye(4) / 4)  # of this step alone
        True

    Example:
        >>> tico_covariance(torch.eye(2), momentum=0.5)
        tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]])
    """
    z = normalize(z1.detach(), dim=1)
    now = (1 - momentum) * (z.T @ z) / len(z)
    return now if past is None else momentum * past + now


@in_full_precision
def wmse_loss(z1: Tensor, z2: Tensor, eps: float = 0.0) -> Tensor:
    """Keep two views alike after each was whitened over the batch: W-MSE (Ermolov et al., 2021).

    Each view's rows are centred and multiplied by the inverse of the Cholesky factor of their covariance. The loss is
    the mean squared distance of the normalised results, 2 minus twice the cosine. (The paper whitens parts of a batch,
    drawn anew a few times: call it for each part.)

    Args:
        z1: Embeddings of the first view, shape (N, D), N > D; the paper has N = 2D or more.
        z2: Those of the second, row by row, shape (N, D).
        eps: Share of the identity that is mixed into the covariance.

    Returns:
        A scalar, from 0 to 4.

    Raises:
        ValueError: There are not more rows than dimensions, so that the covariance has no inverse.

    Example:
        >>> views = torch.randn(16, 4)
        >>> wmse_loss(views, 2 * views + 1).item() < 1e-3  # whitening takes scale and shift away
        True

    Example:
        >>> z = torch.randn(16, 4)
        >>> (wmse_loss(z, z) < wmse_loss(z, z.roll(1, 0))).item()
        True
    """
    rows, size = z1.shape
    if rows <= size and eps <= 0:
        raise ValueError(
            f"wmse_loss was given {rows} rows of {size} dimensions, whose covariance has no inverse; expected more "
            "rows than dimensions, twice as many at best, or eps=0.01"
        )
    whitened = []
    for z in (z1, z2):
        centred = z - z.mean(0)
        together = (1 - eps) * centred.T @ centred / (rows - 1) + eps * torch.eye(size, dtype=z.dtype, device=z.device)
        factor = torch.linalg.cholesky(together)
        whitened.append(normalize(torch.linalg.solve_triangular(factor, centred.T, upper=False).T, dim=1))
    return 2 - 2 * (whitened[0] * whitened[1]).sum(1).mean()


@in_full_precision
def mmcr_loss(embeddings: Tensor, weight: float = 5e-3) -> Tensor:
    """Have the means of the rows' views fill as many directions as they can: MMCR (Yerxa et al., 2023).

    Minus the sum of the singular values of the matrix of centroids, plus `weight` times that of each row's views, a
    mean over rows. Views are normalised first, as in the paper.

    Args:
        embeddings: Of V views of each row, shape (N, V, D).
        weight: Of the second term; the paper's λ.

    Returns:
        A scalar.

    Example:
        >>> spread = mmcr_loss(torch.eye(4)[:, None].expand(4, 2, 4))  # four rows of two views, in four directions
        >>> collapsed = mmcr_loss(torch.ones(4, 2, 4))
        >>> (spread < collapsed).item()
        True

    Example:
        >>> (mmcr_loss(torch.eye(4)[:, None]) < mmcr_loss(torch.ones(4, 1, 4))).item()
        True
    """
    z = normalize(embeddings, dim=2)
    loss: Tensor = -torch.linalg.svdvals(z.mean(1)).sum()
    return loss + weight * torch.linalg.svdvals(z).sum(1).mean() if weight else loss
