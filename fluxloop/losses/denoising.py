"""The loss of models that learn to remove noise."""

from __future__ import annotations

from torch import Tensor

from fluxloop.compute.precision import in_full_precision


@in_full_precision
def row_errors(preds: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of each row: what diffusion and flow matching minimise, before the mean over rows.

    Args:
        preds: Shape (N, ...).
        targets: The same shape.

    Returns:
        Shape (N,).

    Raises:
        ValueError: The shapes differ, and torch would broadcast them.

    Example:
        >>> row_errors(torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]]))
        tensor([1., 3.])
    """
    if preds.shape != targets.shape:
        raise ValueError(
            f"a model that was given noised rows of shape {tuple(targets.shape)} returned {tuple(preds.shape)}; "
            "expected the same shape"
        )
    return (preds - targets).pow(2).flatten(1).mean(1)
