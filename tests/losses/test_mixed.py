from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fluxloop.errors import LossError
from fluxloop.losses.mixed import MixedLoss, MixedTargets

PREDS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
FIRST, SECOND = torch.arange(6) % 3, torch.arange(1, 7) % 3
SHARES = torch.tensor([1.0, 0.9, 0.75, 0.6, 0.5, 0.0])


def by_hand(weight: Any, loss: Any = functional.nll_loss) -> Tensor:
    rows = [
        w * loss(PREDS[i : i + 1], FIRST[i : i + 1]) + (1 - w) * loss(PREDS[i : i + 1], SECOND[i : i + 1])
        for i, w in enumerate(weight)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("loss", [nn.NLLLoss(), functional.nll_loss, nn.CrossEntropyLoss()])
def test_each_row_is_blended_by_its_own_share(loss: Any) -> None:
    found = MixedLoss(loss)(PREDS, MixedTargets(FIRST, SECOND, SHARES))
    torch.testing.assert_close(found, by_hand(SHARES).mean())
    wrong = functional.nll_loss(PREDS, FIRST, reduction="none") * SHARES.mean()
    wrong = (wrong + functional.nll_loss(PREDS, SECOND, reduction="none") * (1 - SHARES.mean())).mean()
    assert not torch.isclose(found, wrong)


@pytest.mark.parametrize("weight", [0.9, 1.0])
def test_one_share_for_all_rows_blends_the_two_losses(weight: float) -> None:
    loss = nn.CrossEntropyLoss()
    found = MixedLoss(loss)(PREDS, MixedTargets(FIRST, SECOND, torch.full((6,), weight)))
    torch.testing.assert_close(found, weight * loss(PREDS, FIRST) + (1 - weight) * loss(PREDS, SECOND))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("as_function", [False, True])
def test_the_rows_are_reduced_as_the_loss_reduces(reduction: str, as_function: bool) -> None:
    mixed = MixedLoss(functional.nll_loss, reduction) if as_function else MixedLoss(nn.NLLLoss(reduction=reduction))
    expected = {"mean": by_hand(SHARES).mean(), "sum": by_hand(SHARES).sum(), "none": by_hand(SHARES)}[reduction]
    torch.testing.assert_close(mixed(PREDS, MixedTargets(FIRST, SECOND, SHARES)), expected)


@pytest.mark.parametrize("loss", [nn.NLLLoss(), nn.NLLLoss(reduction="sum"), functional.nll_loss])
def test_with_plain_targets_it_is_the_loss_itself(loss: Any) -> None:
    assert torch.equal(MixedLoss(loss)(PREDS, FIRST), loss(PREDS, FIRST))


def test_the_given_loss_is_never_changed_not_even_by_an_error() -> None:
    loss = nn.NLLLoss(reduction="sum")
    mixed = MixedLoss(loss)
    mixed(PREDS, MixedTargets(FIRST, SECOND, SHARES))
    assert loss.reduction == "sum"
    with pytest.raises(ValueError, match="batch_size"):
        mixed(PREDS, MixedTargets(FIRST[:2], SECOND, SHARES))
    assert loss.reduction == "sum"


def test_a_loss_with_parameters_is_trained_through_it() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduction = "mean"
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, preds: Tensor, ys: Tensor) -> Tensor:
            return self.scale * functional.nll_loss(preds, ys, reduction=self.reduction)

    mixed = MixedLoss(Scaled())
    assert [name for name, _ in mixed.named_parameters()] == ["loss.scale"]
    mixed(PREDS, MixedTargets(FIRST, SECOND, SHARES)).backward()
    torch.testing.assert_close(mixed.loss.scale.grad, by_hand(SHARES).mean())


def test_losses_of_several_entries_per_row_are_blended_row_by_row() -> None:
    preds, ones = torch.zeros(2, 3), torch.ones(2, 3)
    found = MixedLoss(nn.L1Loss(reduction="none"))(preds, MixedTargets(ones, 3 * ones, torch.tensor([1.0, 0.25])))
    assert torch.equal(found, torch.tensor([[1.0] * 3, [2.5] * 3]))


def test_mixtures_of_mixtures_are_blended_too() -> None:
    half = torch.full((6,), 0.5)
    inner = MixedTargets(FIRST, SECOND, SHARES)
    found = MixedLoss(nn.NLLLoss())(PREDS, MixedTargets(inner, FIRST, half))
    pure = functional.nll_loss(PREDS, FIRST)
    torch.testing.assert_close(found, 0.5 * by_hand(SHARES).mean() + 0.5 * pure)


def test_a_partial_of_a_function_is_taken() -> None:
    smooth = partial(functional.cross_entropy, label_smoothing=0.1)
    found = MixedLoss(smooth)(PREDS, MixedTargets(FIRST, SECOND, SHARES))
    torch.testing.assert_close(found, by_hand(SHARES, smooth).mean())


@pytest.mark.parametrize(
    "loss",
    [lambda preds, ys: preds.sum(), nn.Linear(2, 2), nn.NLLLoss, "nll"],
    ids=["lambda", "module", "class", "text"],
)
def test_a_loss_without_a_reduction_is_refused(loss: Any) -> None:
    with pytest.raises(LossError, match=r"expected a module or function of torch's kind, with a reduction of 'mean'"):
        MixedLoss(loss)


def test_a_loss_that_reduces_although_told_not_to_is_an_error() -> None:
    def stubborn(preds: Tensor, ys: Tensor, reduction: str = "mean") -> Tensor:
        return functional.nll_loss(preds, ys)

    with pytest.raises(LossError, match="gave a scalar with reduction='none'; expected a loss per row"):
        MixedLoss(stubborn)(PREDS, MixedTargets(FIRST, SECOND, SHARES))
