from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxloop.metrics import lidar, rankme
from toys import doubles

# RankMe


def test_the_effective_rank_of_equal_singular_values_is_their_number() -> None:
    assert rankme(torch.eye(5)).item() == pytest.approx(5.0)
    assert rankme(3 * torch.eye(6)[:4]).item() == pytest.approx(4.0)
    assert rankme(torch.ones(7, 3)).item() == pytest.approx(1.0)
    assert rankme(torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0))).item() == pytest.approx(1.0)
    assert rankme(torch.zeros(4, 3)).item() == 0.0


def test_rankme_is_the_papers_formula_but_for_its_small_constant() -> None:
    features = 3 * doubles(0, 40, 6).float()
    values = np.linalg.svd(features.numpy().astype(np.float64), compute_uv=False)
    shares = values / np.abs(values).sum() + 1e-7
    assert rankme(features).item() == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert rankme(features).dtype == torch.float64


@pytest.mark.parametrize("measure", [rankme, lambda z: lidar(z.expand(2, 3, 4))])
def test_a_number_that_is_not_finite_makes_the_rank_nan(measure: object) -> None:
    assert torch.isnan(measure(torch.tensor([[1.0, 2.0, 3.0, float("inf")]] * 3)))  # type: ignore[operator]  # it is a function


# LiDAR


def lidar_by_eigenvalues(embeddings: Tensor, delta: float) -> float:
    """Write the paper's equations 1 to 5 in NumPy, with the square root of the inverse of W."""
    z = embeddings.numpy().astype(np.float64)
    n, views, d = z.shape
    middle = z.reshape(-1, d).mean(0)
    between = sum(np.outer(row.mean(0) - middle, row.mean(0) - middle) for row in z) / (n - 1)
    within = sum(np.outer(v - row.mean(0), v - row.mean(0)) for row in z for v in row) / (n * (views - 1))
    values, vectors = np.linalg.eigh(within + delta * np.eye(d))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    shares = np.linalg.eigvalsh(root @ between @ root).clip(1e-300)
    shares /= shares.sum()
    return float(math.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize(("shape", "delta"), [((12, 5, 4), 1e-4), ((9, 2, 3), 0.5), ((4, 6, 7), 1e-4)])
def test_lidar_is_the_papers_formula_also_with_fewer_rows_than_dimensions(
    shape: tuple[int, int, int], delta: float
) -> None:
    z = doubles(0, *shape) + 2 * doubles(1, shape[0], 1, shape[2]) * torch.arange(1.0, shape[2] + 1)
    assert lidar(z.float(), delta).item() == pytest.approx(lidar_by_eigenvalues(z.float(), delta), rel=1e-8)


def test_lidar_counts_the_dimensions_in_which_rows_differ_more_than_their_views() -> None:
    rows = 100 * doubles(0, 400, 1, 6) * torch.tensor([1.0, 1, 1, 0, 0, 0])
    assert lidar(rows + doubles(1, 400, 8, 6)).item() == pytest.approx(3, abs=0.05)
    assert lidar(torch.ones(4, 3, 2)).item() == 0.0


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (4, 1, 6)])
def test_lidar_of_one_row_or_one_view_says_what_it_needs(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected two or more views of two or more rows, \(N, V, D\)"):
        lidar(torch.zeros(shape))
