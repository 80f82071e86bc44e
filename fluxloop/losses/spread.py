"""Losses that spread embeddings out over the sphere, and measure how they lie there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pairwise_distance

from fluxloop.compute.precision import in_full_precision


@in_full_precision
def koleo_loss(embeddings: Tensor) -> Tensor:
    """Push each row away from its nearest neighbour: the KoLeo regulariser (Sablayrolles et al., 2019).

    Minus the mean logarithm of the distance of each normalised row to the nearest other one, with the constants of
    DINOv2's code: 1e-8 is added to the differences, and to the distance. DINOv2 takes it of the class tokens of each
    global crop by itself.

    Args:
        embeddings: Shape (N, D); need not be normalised.

    Returns:
        A scalar.

    Raises:
        ValueError: There is one row alone.

    Example:
        >>> (koleo_loss(torch.eye(4)) < koleo_loss(torch.eye(4) + 1)).item()  # the less, the farther apart
        True

    Example:
        >>> (koleo_loss(torch.eye(4)) < koleo_loss(torch.ones(4, 4))).item()
        True
    """
    if len(embeddings) < 2:
        raise ValueError("koleo_loss was given one row, which has no neighbour; expected two or more: drop_last=True")
    z = normalize(embeddings, dim=1, eps=1e-8)
    with torch.no_grad():
        similarities = z @ z.T
        nearest = similarities.fill_diagonal_(-2.0).argmax(1)
    return -(pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).log().mean()


@in_full_precision
def alignment(z1: Tensor, z2: Tensor, power: float = 2.0) -> Tensor:
    """Return how far apart two views of a row lie on the sphere (Wang and Isola, 2020).

    Args:
        z1: Embeddings of the first view, shape (N, D); need not be normalised.
        z2: Those of the second, row by row, shape (N, D).
        power: Of the distances; the paper's α.

    Returns:
        A scalar: the mean distance to the power, from 0 to ``2**power``.

    Example:
        >>> rows = torch.eye(4)
        >>> alignment(rows, 2 * rows).item(), alignment(rows, -rows).item()
        (0.0, 4.0)

    Example:
        >>> alignment(torch.eye(4), 3 * torch.eye(4))
        tensor(0.)
    """
    distances: Tensor = torch.linalg.vector_norm(normalize(z1, dim=1) - normalize(z2, dim=1), dim=1)
    return distances.pow(power).mean()


@in_full_precision
def uniformity(embeddings: Tensor, t: float = 2.0) -> Tensor:
    """Return how unevenly rows lie on the sphere (Wang and Isola, 2020): the less, the more even.

    Args:
        embeddings: Shape (N, D); need not be normalised.
        t: Multiplies the squared distances.

    Returns:
        A scalar: the logarithm of the mean of ``exp(-t * distance**2)`` over pairs of rows, at most 0.

    Raises:
        ValueError: There is one row alone.

    Example:
        >>> uniformity(torch.ones(4, 2)).item(), uniformity(torch.eye(4)).item() < 0  # all rows as one; spread out
        (0.0, True)

    Example:
        >>> uniformity(torch.eye(4))
        tensor(-4.0000)
    """
    if len(embeddings) < 2:
        raise ValueError("uniformity was given one row, which makes no pair; expected two or more: drop_last=True")
    return torch.pdist(normalize(embeddings, dim=1)).square().mul(-t).exp().mean().log()
