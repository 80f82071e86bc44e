"""Accuracy and its relatives."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fluxloop.errors import MetricError
from fluxloop.guard.given import check_number


def _classes(ys: Tensor, preds: Tensor) -> Tensor:
    """Return class indices, from indices or from one-hot (or soft) targets of the shape of `preds`.

    Raises:
        MetricError: The shapes do not match, or there is one class only.
    """
    shape = preds.shape
    if len(shape) == 2:
        rows, classes = shape
        if classes > 1 and ys.shape == (rows,):  # as nearly always
            return ys
    if len(shape) < 2 or shape[1] < 2:
        raise MetricError(
            f"preds of shape {tuple(shape)} were given; expected scores of shape (N, C) with two classes or "
            "more: for one score per row use binary_accuracy"
        )
    if ys.shape == shape:
        return ys.argmax(1)
    expected = shape[:1] + shape[2:]
    if ys.shape != expected:
        raise MetricError(
            f"preds of shape {tuple(shape)} were compared with ys of shape {tuple(ys.shape)}; expected class "
            f"indices of shape {tuple(expected)}, or targets of the shape of preds"
        )
    return ys


def _share(hits: Tensor) -> Tensor:
    """Return the share of True; counting takes half the time of a mean."""
    return hits.count_nonzero() / hits.numel()


def _hits(preds: Tensor, ys: Tensor) -> Tensor:
    """Tell for each row whether its highest score is at the target class."""
    return preds.argmax(1).eq(_classes(ys, preds))


def accuracy(preds: Tensor, ys: Tensor) -> Tensor:
    """Compute the share of rows whose highest score is at the target class.

    Args:
        preds: Scores of shape (N, C) or (N, C, …), in any unit: only their order matters.
        ys: Class indices of shape (N) or (N, …), or one-hot or soft targets of the shape of `preds`.

    Returns:
        A scalar in [0, 1].

    Raises:
        MetricError: The shapes do not match, or there is one class only.

    Example:
        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor(0.5000)
    """
    return _share(_hits(preds, ys))


HITS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {accuracy: _hits}
"""For metrics that are shares of True, the function whose True are counted: the counts of many steps are divided
at once, in a third of the time."""


def binary_accuracy(preds: Tensor, ys: Tensor, threshold: float = 0.5, logits: bool = False) -> Tensor:
    """Compute the share of predictions on the right side of a threshold.

    Args:
        preds: Probabilities, or logits with ``logits=True``, of any shape.
        ys: Targets 0 or 1 (numbers or booleans), of the shape of `preds` or with a last dimension
            of size 1 more or less.
        threshold: A probability; a prediction above it counts as 1.
        logits: Whether `preds` are logits; for a metric: ``partial(binary_accuracy, logits=True)``.

    Returns:
        A scalar in [0, 1].

    Raises:
        MetricError: The shapes do not match.

    Example:
        >>> binary_accuracy(torch.tensor([-1.0, 2.0]), torch.tensor([0, 1]), logits=True)
        tensor(1.)
    """
    if preds.shape != ys.shape:
        if preds.squeeze(-1).shape != ys.squeeze(-1).shape or abs(preds.ndim - ys.ndim) != 1:
            raise MetricError(
                f"binary_accuracy was given preds of shape {tuple(preds.shape)} and ys of shape "
                f"{tuple(ys.shape)}; expected equal shapes"
            )
        ys = ys.reshape(preds.shape)
    probabilities = preds.sigmoid() if logits else preds
    return _share((probabilities > threshold) == (ys > 0.5))


def top_k(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Make the metric "the target class is among the k highest scores".

    Args:
        k: How many; its metric is called ``"top_<k>"``.

    Returns:
        A function of scores (N, C) and class indices (N) (or targets of the scores' shape), which
        gives a scalar in [0, 1].

    Raises:
        MetricError: `k` is less than 1, or (when called) larger than the number of classes.

    Example:
        >>> top_k(2)(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([1]))
        tensor(1.)
    """
    check_number("top_k", "k", k, least=1, whole=True, error=MetricError)

    def metric(preds: Tensor, ys: Tensor) -> Tensor:
        if preds.shape[1] < k:
            raise MetricError(f"top_k({k}) was given {preds.shape[1]} classes; expected at least {k}")
        best = preds.topk(k, dim=1).indices
        return _share((best == _classes(ys, preds).unsqueeze(1)).any(1))

    metric.__name__ = f"top_{k}"
    setattr(metric, "higher_is_better", True)  # noqa: B010 - mypy knows no other way
    return metric


for share in (accuracy, binary_accuracy):
    setattr(share, "higher_is_better", True)  # noqa: B010 - mypy knows no other way
