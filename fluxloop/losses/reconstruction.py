"""Losses of models that reconstruct their input."""

from __future__ import annotations

from torch import Tensor

from fluxloop.compute.precision import in_full_precision


def require_same_shape(preds: Tensor, targets: Tensor) -> None:
    """Raise `ValueError` for a reconstruction of another shape: torch would broadcast the two."""
    if preds.shape != targets.shape:
        raise ValueError(
            f"a reconstruction of shape {tuple(preds.shape)} was compared with {tuple(targets.shape)}; expected "
            "the same shape"
        )


@in_full_precision
def kl_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the divergence of diagonal normal distributions from the standard one (Kingma and Welling, 2014).

    Args:
        mean: Shape (N, ...).
        logvar: Logarithms of the variances, the same shape.

    Returns:
        A scalar: summed over dimensions, a mean over rows.

    Example:
        >>> kl_standard_normal(torch.ones(4, 6), torch.zeros(4, 6)).item()  # variance 1: half the squared mean, 6 times
        3.0
    """
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


@in_full_precision
def squared_error(preds: Tensor, xs: Tensor) -> Tensor:
    """Sum the squared errors of each row, and halve them: minus the log-likelihood of a normal of variance 1.

    Args:
        preds: Shape (N, ...).
        xs: The same shape.

    Returns:
        A scalar: the mean over rows, up to a constant.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> squared_error(torch.ones(4, 6), torch.zeros(4, 6)).item()
        3.0
    """
    require_same_shape(preds, xs)
    return (preds - xs).pow(2).flatten(1).sum(1).mean() / 2


def normalize_patches(patches: Tensor) -> Tensor:
    """Scale each patch to zero mean and unit variance: the targets of MAE (He et al., 2022, section 4.1).

    Args:
        patches: Shape (N, L, P).

    Returns:
        The same shape; the variance is unbiased, with 1e-6 added to it.

    Example:
        >>> patches = normalize_patches(torch.rand(2, 9, 16))
        >>> torch.allclose(patches.mean(-1), torch.zeros(2, 9), atol=1e-5)
        True
    """
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


@in_full_precision
def masked_mse(preds: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error over masked patches alone: MAE's loss (He et al., 2022).

    Args:
        preds: Shape (N, L, P).
        targets: Shape (N, L, P).
        mask: True (or 1) where a patch was hidden, shape (N, L).

    Returns:
        A scalar; 0 where nothing is masked.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> preds, targets = torch.tensor([[[1.0], [5.0]]]), torch.zeros(1, 2, 1)
        >>> masked_mse(preds, targets, torch.tensor([[True, False]])).item()  # the visible patch does not count
        1.0
    """
    require_same_shape(preds, targets)
    errors = (preds - targets).pow(2).mean(-1)
    return (errors * mask).sum() / mask.sum().clamp(min=1)
