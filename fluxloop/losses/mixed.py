"""The loss of mixed rows: each row has two targets and a share of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

from attrs import frozen
from torch import Tensor, nn

from fluxloop.errors import LossError, describe


@frozen(eq=False)
class MixedTargets:
    """Two targets per row, and the share of the first.

    Args:
        first: Targets, N rows.
        second: Those of the rows that were mixed in.
        weight: Shares of `first`, shape (N,), 0 to 1.

    Example:
        >>> targets = MixedTargets(torch.tensor([0, 1]), torch.tensor([2, 2]), weight=torch.tensor([1.0, 0.25]))
        >>> [(a, b, w) for a, b, w in zip(targets.first.tolist(), targets.second.tolist(), targets.weight.tolist())]
        [(0, 2, 1.0), (1, 2, 0.25)]
    """

    first: Any
    second: Any
    weight: Tensor


class MixedLoss(nn.Module):
    """Let a loss function take `MixedTargets`; other targets go to the function as they are.

    Of row i it is ``weight[i] * loss(preds[i], first[i]) + (1 - weight[i]) * loss(preds[i],
    second[i])``, reduced over rows as the function reduces: the mean of the rows, their sum, or
    not at all. It is luz's ``nn_mixup_loss``, with each row's own share (mixup: Zhang et al., 2018).

    Args:
        loss: A module with an attribute ``reduction``, or a function with such a keyword, as those
            of torch: ``nn.NLLLoss()``, ``nn.functional.nll_loss``.
        reduction: ``"mean"`` or ``"sum"``, for a function; a module says its own.

    Raises:
        LossError: The loss has no ``reduction``, or returns no loss per row.

    Example:
        >>> loss = MixedLoss(nn.L1Loss())
        >>> targets = MixedTargets(torch.zeros(2), torch.ones(2), torch.tensor([1.0, 0.25]))
        >>> loss(torch.zeros(2), targets)
        tensor(0.3750)
    """

    def __init__(self, loss: Callable[..., Tensor], reduction: str = "mean") -> None:
        super().__init__()
        own = getattr(loss, "reduction", None) if isinstance(loss, nn.Module) else reduction
        if isinstance(loss, type) or not callable(loss) or own not in ("mean", "sum", "none") or not _reduces(loss):
            raise LossError(
                f"MixedLoss({describe(loss)}) was given, with the reduction {own!r}; expected a module or function of "
                "torch's kind, with a reduction of 'mean', 'sum' or 'none': MixedLoss(nn.NLLLoss())"
            )
        self.loss = loss
        self.reduction = own

    def forward(self, preds: Any, ys: Any) -> Tensor:
        """Compute the loss.

        Args:
            preds: N rows.
            ys: `MixedTargets`, or anything the loss function takes.
        """
        losses = self._rows(preds, ys) if isinstance(ys, MixedTargets) else None
        if losses is None:
            return self.loss(preds, ys) if isinstance(self.loss, nn.Module) else self._call(preds, ys, self.reduction)
        return losses.mean() if self.reduction == "mean" else losses.sum() if self.reduction == "sum" else losses

    def _rows(self, preds: Any, ys: Any) -> Tensor:
        """Compute the loss of each row, or of each of its entries."""
        if not isinstance(ys, MixedTargets):
            losses = self._call(preds, ys, "none")
            if losses.ndim == 0:
                raise LossError(f"{self.loss!r} gave a scalar with reduction='none'; expected a loss per row")
            return losses
        first, second = self._rows(preds, ys.first), self._rows(preds, ys.second)
        weight = ys.weight.to(first.dtype).view(-1, *[1] * (first.ndim - 1))
        return weight * first + (1 - weight) * second

    def _call(self, preds: Any, ys: Any, reduction: str) -> Tensor:
        if not isinstance(self.loss, nn.Module):
            return self.loss(preds, ys, reduction=reduction)
        loss = copy.copy(self.loss)  # with the same parameters; the given one stays as it is
        loss.reduction = reduction  # type: ignore[assignment]  # a plain attribute
        result: Tensor = loss(preds, ys)
        return result


def _reduces(loss: Callable[..., Tensor]) -> bool:
    """Return whether a loss takes the reduction that it is given."""
    if isinstance(loss, nn.Module):
        return True
    parameters = signature(loss).parameters
    return "reduction" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
