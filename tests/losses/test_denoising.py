from __future__ import annotations

import pytest
import torch

from fluxloop.losses import row_errors


def test_row_errors_are_mean_squares_of_each_row_also_in_their_gradient() -> None:
    preds = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(5, 2, 3, dtype=torch.float64)
    found = row_errors(preds, targets)
    expected = [sum(float(p - t) ** 2 for p, t in zip(*map(torch.flatten, pair), strict=True)) / 6
                for pair in zip(preds.detach(), targets, strict=True)]  # fmt: skip
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), preds)
    torch.testing.assert_close(gradient, 2 * (preds.detach() - targets) / 6)


def test_another_shape_is_an_error_and_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 3\) returned \(4, 1\); expected the same shape"):
        row_errors(torch.zeros(4, 1), torch.zeros(4, 3))
