from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from fluxloop.metrics import frechet_distance, kernel_distance, precision_recall
from toys import doubles

FAKE = doubles(0, 40, 6)
REAL = doubles(1, 30, 6) @ torch.diag(torch.arange(1.0, 7.0).double()) + 0.3


def statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), rows.T.cov()


def test_the_frechet_distance_is_that_of_torchmetrics_and_of_scipys_square_root() -> None:
    found = frechet_distance(FAKE, REAL)
    assert found.item() == pytest.approx(_compute_fid(*statistics(FAKE), *statistics(REAL)).item(), rel=1e-9)
    a, b = (np.cov(rows.numpy().T) for rows in (FAKE, REAL))
    means = (FAKE.mean(0) - REAL.mean(0)).square().sum().item()
    expected = means + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert found.item() == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(REAL, FAKE).item() == pytest.approx(found.item(), rel=1e-9)


def test_the_frechet_distance_of_normal_distributions_of_one_dimension_is_known() -> None:
    fake, real = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])  # deviations sqrt(2) and sqrt(8)
    assert frechet_distance(fake, real).item() == pytest.approx(2**2 + (8**0.5 - 2**0.5) ** 2)
    assert frechet_distance(fake, fake).item() == pytest.approx(0, abs=1e-12)


def test_fewer_rows_than_dimensions_have_a_distance_too() -> None:
    few = doubles(2, 4, 6)
    found = frechet_distance(few, REAL).item()
    assert found == pytest.approx(_compute_fid(*statistics(few), *statistics(REAL)).item(), rel=1e-5)
    assert frechet_distance(few, few).item() == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few * torch.nan, REAL).isnan()


def test_the_kernel_distance_is_that_of_torchmetrics() -> None:
    real = REAL[:20]
    expected = poly_mmd(real, FAKE[:20])
    assert kernel_distance(FAKE[:20], real).item() == pytest.approx(expected.item(), rel=1e-9)
    halves = doubles(3, 4000, 3).split(2000)
    assert abs(kernel_distance(*halves).item()) < 0.05  # no bias


def test_precision_and_recall_are_those_of_the_paper_row_by_row() -> None:
    def share(rows: Tensor, of: Tensor, k: int) -> float:
        inside = 0
        for row in rows:
            for number, other in enumerate(of):
                rest = sorted((other - each).norm().item() for i, each in enumerate(of) if i != number)
                if (row - other).norm().item() <= rest[k - 1]:
                    inside += 1
                    break
        return inside / len(rows)

    fake, real = FAKE[:15, :2], REAL[:12, :2]
    for k in (1, 3):
        precision, recall = precision_recall(fake, real, k)
        assert precision.item() == pytest.approx(share(fake, real, k))
        assert recall.item() == pytest.approx(share(real, fake, k))
    assert precision_recall(real, real) == (1, 1)
    far = precision_recall(fake + 1000, real)
    assert far == (0, 0)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, precision_recall])
def test_features_that_cannot_be_compared_are_an_error(measure: object) -> None:
    for fake, real in [(FAKE, REAL[:, :3]), (FAKE[0], REAL), (FAKE[:1], REAL), (FAKE[None], REAL[None])]:
        with pytest.raises(ValueError, match=r"expected \(N, F\) and \(M, F\)"):
            measure(fake, real)  # type: ignore[operator]  # a function
