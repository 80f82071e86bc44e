"""How far generated rows are from real ones, by features of both."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(fake: Tensor, real: Tensor) -> Tensor:
    """Return the squared Fréchet distance of two normal distributions (FID; Heusel et al., 2017).

    ``|m1 - m2|**2 + tr(S1 + S2 - 2 (S1 S2)**0.5)``, with the rows' means and covariances (divided by N - 1), computed
    in float64. It is biased by the number of rows, so compare numbers of as many.

    Args:
        fake: Features (N, F).
        real: Features (M, F).

    Returns:
        A scalar, 0 for the same mean and covariance; NaN where a feature is not finite.

    Raises:
        ValueError: They have other shapes, or there are fewer than two rows.

    Example:
        >>> rows = torch.randn(100, 2)
        >>> round(frechet_distance(rows, rows + 3).item(), 4)  # 3**2 in each dimension
        18.0
    """
    fake, real = _checked("frechet_distance", fake, real)
    if not (fake.isfinite().all() and real.isfinite().all()):
        return fake.new_full((), float("nan"))
    apart, (a, b) = fake.mean(0) - real.mean(0), (_covariance(rows) for rows in (fake, real))
    # the roots of S1 S2 are those of the symmetric S1**0.5 S2 S1**0.5, whose eigenvalues are real and not negative
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    distance: Tensor = apart.square().sum() + a.trace() + b.trace() - 2 * cross
    return distance.clamp(min=0)


def kernel_distance(fake: Tensor, real: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy with a cubic kernel: KID (Binkowski et al., 2018), of all rows.

    The kernel is ``(x @ y / F + 1)**3``; without bias, so that it may be a little less than 0. Computed in float64.

    Args:
        fake: Features (N, F).
        real: Features (M, F).

    Returns:
        A scalar.

    Raises:
        ValueError: They have other shapes, or there are fewer than two rows.

    Example:
        >>> kernel_distance(torch.zeros(5, 1), torch.ones(7, 1)).item()  # 1 + 2**3 - 2
        7.0
    """
    fake, real = _checked("kernel_distance", fake, real)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [
        (table.sum() - table.diagonal().sum()) / (len(table) * (len(table) - 1))
        for table in (kernel(fake, fake), kernel(real, real))
    ]
    return within[0] + within[1] - 2 * kernel(fake, real).mean()


def precision_recall(fake: Tensor, real: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Return the share of fake rows that lie among real ones, and of real ones among fake (Kynkäänniemi et al., 2019).

    A row lies among others where it is no farther from one of them than that one's k-th nearest of its own kind.

    Args:
        fake: Features (N, F).
        real: Features (M, F).
        k: Which neighbour says how far a row reaches.

    Returns:
        Two scalars from 0 to 1: precision and recall.

    Raises:
        ValueError: They have other shapes, or `k` rows more than one are not there.

    Example:
        >>> rows = torch.arange(8.0)[:, None]
        >>> precision_recall(rows[:4], rows, k=1)  # nothing but real rows, and about half of them
        (tensor(1., dtype=torch.float64), tensor(0.6250, dtype=torch.float64))
    """
    fake, real = _checked("precision_recall", fake, real, k + 1)

    def share(rows: Tensor, of: Tensor) -> Tensor:
        reach = torch.cdist(of, of).kthvalue(k + 1, dim=1).values  # each is its own nearest
        return (torch.cdist(rows, of) <= reach).any(1).double().mean()

    return share(fake, real), share(real, fake)


def _covariance(rows: Tensor) -> Tensor:
    return rows.T.cov().reshape(rows.shape[1], rows.shape[1])  # torch gives a number for one dimension


def _checked(name: str, fake: Tensor, real: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Return features as float64; raise for what cannot be compared."""
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1] != real.shape[1] or min(len(fake), len(real)) < least:
        raise ValueError(
            f"{name} was given features of shapes {tuple(fake.shape)} and {tuple(real.shape)}; expected (N, F) and "
            f"(M, F), {least} rows or more of each: features.flatten(1)"
        )
    device = "cpu" if fake.device.type == "mps" else fake.device  # which has no float64
    return fake.detach().to(device).double(), real.detach().to(device).double()
