"""Measures of a representation that need no labels: how many dimensions it uses."""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(features: Tensor) -> Tensor:
    """Return the effective rank of features: RankMe (Garrido et al., 2023).

    The exponential of the entropy of the singular values' shares (Roy and Vetterli, 2007), computed in float64. (The
    paper adds 1e-7 to the shares, so that their logarithms exist; here a share of 0 counts nothing.)

    Args:
        features: Shape (N, F); of fewer rows than dimensions it says how many rows there are. They are not centred.

    Returns:
        A scalar between 1 and min(N, F); 0 for features that are all zero, NaN where one is not finite.

    Example:
        >>> rankme(torch.eye(4))
        tensor(4., dtype=torch.float64)
    """
    if not features.isfinite().all():
        return features.new_full((), float("nan"))
    return _effective(torch.linalg.svdvals(features.double()))


def lidar(embeddings: Tensor, delta: float = 1e-4) -> Tensor:
    """Return how many dimensions tell things apart better than their views differ: LiDAR (Thilak et al., 2024).

    The effective rank of linear discriminant analysis with each row as a class: that of
    ``W**-0.5 @ B @ W**-0.5``, where B is the covariance of the rows' means over their views and W that of the views
    around these, plus `delta` times the identity. Computed in float64.

    Args:
        embeddings: Of V views of each row, shape (N, V, D), N and V from 2; the paper has N from D, and V = 50.
        delta: Added to the diagonal of W.

    Returns:
        A scalar between 1 and min(N - 1, D); 0 where all means are the same, NaN where a number is not finite.

    Raises:
        ValueError: There are fewer than two rows or views.

    Example:
        >>> rows = torch.randn(100, 1, 8) * torch.tensor([9.0] * 3 + [0.0] * 5)
        >>> 2.5 < lidar(rows + torch.randn(100, 10, 8)) < 3.5
        tensor(True)
    """
    if embeddings.ndim != 3 or min(embeddings.shape[:2]) < 2:
        raise ValueError(
            f"lidar was given embeddings of shape {tuple(embeddings.shape)}; expected two or more views of two or more "
            "rows, (N, V, D): torch.stack([z1, z2], dim=1)"
        )
    if not embeddings.isfinite().all():
        return embeddings.new_full((), float("nan"))
    z = embeddings.double()
    rows, views, size = z.shape
    means = z.mean(1)
    apart, around = means - means.mean(0), (z - means[:, None]).flatten(0, 1)
    within = around.T @ around / (rows * (views - 1)) + delta * torch.eye(size, dtype=z.dtype, device=z.device)
    # B is a product of `apart` with itself, so the eigenvalues are squares of singular values of what W whitens
    factor = torch.linalg.cholesky(within)
    whitened = torch.linalg.solve_triangular(factor, apart.T / (rows - 1) ** 0.5, upper=False)
    return _effective(torch.linalg.svdvals(whitened).square())


def _effective(values: Tensor) -> Tensor:
    """Return the exponential of the entropy of the values' shares; 0 where all are 0."""
    if not values.any():
        return values.new_zeros(())
    entropy: Tensor = torch.special.entr(values / values.sum()).sum()
    return entropy.exp()
