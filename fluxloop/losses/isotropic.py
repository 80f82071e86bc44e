"""The loss of LeJEPA: embeddings that agree, and whose distribution is the standard normal one in all directions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fluxloop.compute.precision import in_full_precision
from fluxloop.processes.gather import sum_over
from fluxloop.processes.group import Group


def draw_directions(dimensions: int, count: int, like: Tensor) -> Tensor:
    """Draw directions, evenly over the sphere, from torch's global generator.

    Args:
        dimensions: D of the embeddings.
        count: How many directions.
        like: Has the device and the type that they are to have.

    Returns:
        Shape (D, count), each column of length 1.

    Example:
        >>> directions = draw_directions(16, 64, like=torch.zeros(1))
        >>> directions.shape, torch.allclose(directions.norm(dim=0), torch.ones(64))
        (torch.Size([16, 64]), True)

    Example:
        >>> draw_directions(8, 16, like=torch.zeros(1)).shape
        torch.Size([8, 16])
    """
    return normalize(torch.randn(dimensions, count, device=like.device, dtype=like.dtype), dim=0)


@in_full_precision
def sigreg(
    embeddings: Tensor, directions: Tensor, *, knots: int = 17, largest: float = 3.0, group: Group | None = None
) -> Tensor:
    """Return how far embeddings are from standard normal ones: SIGReg of LeJEPA (Balestriero and LeCun, 2025).

    Along each direction it is the statistic of Epps and Pulley: the squared distance of the rows' empirical
    characteristic function from that of the standard normal distribution, weighted by ``exp(-t**2 / 2)``, integrated
    over t from ``-largest`` to ``largest`` by the trapezoidal rule, times the number of rows; then the mean over
    directions. Of normal rows its size does not depend on their number; of others it grows in proportion.

    Args:
        embeddings: Shape (..., N, D); what stands before, such as views, is looked at one by one and averaged.
        directions: Shape (D, M), of length 1, drawn anew for each step: `draw_directions`.
        knots: At how many t from 0 the functions are compared, 2 or more; the others are symmetric.
        largest: The largest t.
        group: The processes whose rows are looked at together, with the same directions; left out, this one alone.

    Returns:
        A scalar.

    Example:
        >>> directions = torch.eye(2)
        >>> normal, shrunken = torch.randn(256, 2), torch.zeros(256, 2)
        >>> (sigreg(normal, directions) < sigreg(shrunken, directions)).item()
        True

    Example:
        >>> directions = draw_directions(8, 64, like=torch.zeros(1))
        >>> (sigreg(torch.randn(500, 8), directions) < sigreg(torch.zeros(500, 8), directions)).item()
        True
    """
    t = torch.linspace(0, largest, knots, dtype=embeddings.dtype, device=embeddings.device)
    normal = (-t.square() / 2).exp()  # its characteristic function, and the weight
    weight = 2 * largest / (knots - 1) * normal
    weight[0], weight[-1] = weight[0] / 2, weight[-1] / 2
    angles = (embeddings @ directions).unsqueeze(-1) * t
    real, imaginary = angles.cos().sum(-3), angles.sin().sum(-3)
    rows = real.new_full((), embeddings.shape[-2])
    if group is not None:
        sums = sum_over(torch.cat([real.flatten(), imaginary.flatten(), rows[None]]), group)
        real, imaginary = (part.view_as(real) for part in sums[:-1].chunk(2))
        rows = sums[-1]
    errors = (real / rows - normal).square() + (imaginary / rows).square()
    return (errors @ weight).mean() * rows


@in_full_precision
def lejepa_loss(
    views: list[Tensor],
    directions: Tensor,
    num_global: int = 2,
    weight: float = 0.05,
    *,
    group: Group | None = None,
) -> Tensor:
    """Pull each view to the mean of the global ones, and all rows to a normal distribution (LeJEPA).

    ``(1 - weight)`` times the mean squared distance of all views' embeddings to the mean of the global views', plus
    `weight` times `sigreg`, which is a mean over the views. There is no teacher, and gradients go everywhere.

    Args:
        views: Embeddings of the views, the global ones first, each of shape (N, D).
        directions: Shape (D, M), of length 1, drawn anew for each step: `draw_directions`.
        num_global: How many of the views, the first ones, are global.
        weight: Of SIGReg, from 0 to 1; the paper's λ.
        group: The processes whose rows SIGReg looks at together; left out, this one alone.

    Returns:
        A scalar.

    Example:
        >>> view = torch.randn(64, 8)
        >>> directions = draw_directions(8, 32, like=view)
        >>> (lejepa_loss([view, view], directions) < lejepa_loss([view, view.roll(1, 0)], directions)).item()
        True

    Example:
        >>> directions, collapsed = draw_directions(8, 64, like=torch.zeros(1)), torch.zeros(500, 8)
        >>> views = [torch.randn(500, 8)] * 3
        >>> (lejepa_loss(views, directions) < lejepa_loss([collapsed] * 3, directions)).item()
        True
    """
    stacked = torch.stack(views)
    distance = (stacked - stacked[:num_global].mean(0)).square().mean()
    return (1 - weight) * distance + weight * sigreg(stacked, directions, group=group)
