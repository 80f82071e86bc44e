"""Absolute and squared errors."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxloop.errors import MetricError
from fluxloop.metrics.base import Averaged


def _difference(preds: Tensor, ys: Tensor) -> Tensor:
    if preds.shape != ys.shape:
        raise MetricError(
            f"preds of shape {tuple(preds.shape)} were compared with ys of shape {tuple(ys.shape)}; expected "
            "equal shapes, lest they broadcast: ys.reshape(preds.shape)?"
        )
    return preds - ys


def mae(preds: Tensor, ys: Tensor) -> Tensor:
    """Compute the mean absolute error, in the unit of the targets.

    Args:
        preds: Predictions of any shape.
        ys: Targets of the same shape.

    Returns:
        A scalar.

    Raises:
        MetricError: The shapes differ.

    Example:
        >>> mae(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0])).item()
        1.5
    """
    return _difference(preds, ys).abs().mean()


def mse(preds: Tensor, ys: Tensor) -> Tensor:
    """Compute the mean squared error, in the squared unit of the targets.

    Args:
        preds: Predictions of any shape.
        ys: Targets of the same shape.

    Returns:
        A scalar.

    Raises:
        MetricError: The shapes differ.

    Example:
        >>> mse(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0])).item()
        2.5
    """
    return _difference(preds, ys).square().mean()


rmse = Averaged(mse, torch.sqrt, "rmse")
"""The root of the mean squared error over all rows of an epoch (not a mean of batches' roots).

Example:
    >>> rmse(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 3.0])).item()
    2.0
"""

for error in (mae, mse):
    setattr(error, "higher_is_better", False)  # noqa: B010 - mypy knows no other way
