from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional import classification as reference

from fluxloop import Metric, MetricError, accuracy, binary_accuracy, top_k

quick = settings(deadline=None, max_examples=40)


def scores(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets(seed: int, classes: int, *shape: int) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed + 1))


def one_hot(ys: Tensor, classes: int) -> Tensor:
    hot = torch.nn.functional.one_hot(ys, classes)
    return hot.movedim(-1, 1)


# accuracy


@quick
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(2, 6))
def test_accuracy_is_the_share_of_rows_with_the_highest_score_at_the_target(seed: int, rows: int, classes: int) -> None:
    preds, ys = scores(seed, rows, classes), targets(seed, classes, rows)
    rated = zip(preds.tolist(), ys.tolist(), strict=True)
    hits = sum(max(range(classes), key=lambda c, row=row: row[c]) == y for row, y in rated)
    assert accuracy(preds, ys).item() == pytest.approx(hits / rows)
    assert accuracy(preds, ys).shape == ()
    theirs = reference.multiclass_accuracy(preds, ys, num_classes=classes, average="micro")
    assert accuracy(preds, ys).item() == pytest.approx(theirs.item())


@quick
@given(st.integers(0, 1000), st.integers(1, 4))
def test_accuracy_of_maps_is_the_share_of_pixels(seed: int, rows: int) -> None:
    preds, ys = scores(seed, rows, 3, 4, 5), targets(seed, 3, rows, 4, 5)
    expected = (preds.double().argmax(1) == ys).double().mean().item()
    assert accuracy(preds, ys).item() == pytest.approx(expected)
    assert accuracy(preds, one_hot(ys, 3)).item() == pytest.approx(expected)


def test_accuracy_takes_one_hot_and_soft_targets() -> None:
    preds, ys = scores(0, 50, 4), targets(0, 4, 50)
    expected = accuracy(preds, ys)
    assert accuracy(preds, one_hot(ys, 4)) == expected
    assert accuracy(preds, 0.9 * one_hot(ys, 4) + 0.025) == expected
    assert accuracy(one_hot(ys, 4).float(), ys) == 1
    assert accuracy(0.6 * one_hot(ys, 4) + 0.1, one_hot(ys, 4)) == 1


def test_accuracy_depends_on_the_order_of_the_scores_alone() -> None:
    preds, ys = scores(1, 50, 4), targets(1, 4, 50)
    assert accuracy(preds, ys) == accuracy(preds.softmax(1), ys) == accuracy(3 * preds - 7, ys)


@pytest.mark.parametrize("metric", [accuracy, top_k(2)], ids=["accuracy", "top_k"])
@pytest.mark.parametrize("shape", [(4, 1), (4, 4), (1,)], ids=str)
def test_targets_that_would_broadcast_are_refused(metric: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(MetricError, match=r"shape \(4, 3\)"):
        metric(scores(0, 4, 3), torch.zeros(shape, dtype=torch.long))


def test_a_single_score_per_row_is_no_choice_between_classes() -> None:
    with pytest.raises(MetricError, match="binary_accuracy"):
        accuracy(scores(0, 4, 1), torch.tensor([[0], [1], [1], [0]]))


# binary_accuracy


@quick
@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from([0.3, 0.5, 0.8]))
def test_binary_accuracy_of_probabilities_and_of_logits(seed: int, rows: int, threshold: float) -> None:
    logits, ys = scores(seed, rows), targets(seed, 2, rows)
    probabilities = logits.sigmoid()
    expected = sum((p > threshold) == bool(y) for p, y in zip(probabilities.tolist(), ys.tolist(), strict=True)) / rows
    assert binary_accuracy(probabilities, ys, threshold).item() == pytest.approx(expected)
    assert binary_accuracy(logits, ys, threshold, logits=True).item() == pytest.approx(expected)
    theirs = reference.binary_accuracy(probabilities, ys, threshold=threshold)
    assert binary_accuracy(probabilities, ys, threshold).item() == pytest.approx(theirs.item())


def test_binary_accuracy_of_logits_is_not_that_of_probabilities() -> None:
    logits, ys = torch.tensor([0.2, -0.2]), torch.tensor([1, 0])
    assert binary_accuracy(logits, ys, logits=True) == 1
    assert binary_accuracy(logits, ys) == 0.5


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32, torch.float64])
def test_binary_targets_may_be_numbers_or_booleans(kind: torch.dtype) -> None:
    assert binary_accuracy(torch.tensor([0.1, 0.9, 0.9]), torch.tensor([0, 1, 0]).to(kind)).item() == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize(
    ("preds_shape", "ys_shape"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 2, 1), (4, 2)), ((4, 2), (4, 2))], ids=str
)
def test_a_last_dimension_of_one_more_or_less_is_fine(preds_shape: Any, ys_shape: Any) -> None:
    flat = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.6, 0.4, 0.9, 0.1])
    count = torch.Size(preds_shape).numel()
    preds, ys = flat[:count].reshape(preds_shape), (flat[:count] > 0.5).reshape(ys_shape)
    assert binary_accuracy(preds, ys) == 1
    assert binary_accuracy(preds, ~ys) == 0


@pytest.mark.parametrize(
    ("preds_shape", "ys_shape"),
    [((4,), (3,)), ((4, 1), (1, 4)), ((4, 2), (4,)), ((2, 3), (6,)), ((6,), (2, 3))],
    ids=str,
)
def test_binary_accuracy_of_shapes_that_do_not_match_is_refused(preds_shape: Any, ys_shape: Any) -> None:
    with pytest.raises(MetricError, match=r"binary_accuracy was given preds of shape.*expected equal shapes") as caught:
        binary_accuracy(torch.rand(preds_shape), torch.zeros(ys_shape))
    assert str(preds_shape) in str(caught.value)
    assert str(ys_shape) in str(caught.value)


def test_binary_accuracy_of_logits_as_a_metric_keeps_its_name() -> None:
    assert Metric(partial(binary_accuracy, logits=True)).name == "binary_accuracy"


# top_k


@quick
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(2, 6), st.data())
def test_top_k_is_the_share_of_rows_with_the_target_among_the_k_highest(
    seed: int, rows: int, classes: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, classes))
    preds, ys = scores(seed, rows, classes), targets(seed, classes, rows)
    rated = zip(preds.tolist(), ys.tolist(), strict=True)
    hits = [y in sorted(range(classes), key=lambda c, row=row: -row[c])[:k] for row, y in rated]
    assert top_k(k)(preds, ys).item() == pytest.approx(sum(hits) / rows)
    assert top_k(k)(preds, one_hot(ys, classes)).item() == pytest.approx(sum(hits) / rows)
    theirs = reference.multiclass_accuracy(preds, ys, num_classes=classes, top_k=k, average="micro")
    assert top_k(k)(preds, ys).item() == pytest.approx(theirs.item())


def test_top_1_is_accuracy_and_top_of_all_is_1() -> None:
    preds, ys = scores(2, 30, 5), targets(2, 5, 30)
    assert top_k(1)(preds, ys) == accuracy(preds, ys)
    assert top_k(5)(preds, ys) == 1


def test_top_k_is_named_after_k() -> None:
    assert top_k(3).__name__ == "top_3"


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_is_refused(k: int) -> None:
    with pytest.raises(MetricError, match=rf"top_k\(k={k}\) was given; expected a whole number, 1 or more"):
        top_k(k)


def test_more_than_there_are_classes_is_refused() -> None:
    with pytest.raises(MetricError, match=r"top_k\(5\) was given 3 classes; expected at least 5"):
        top_k(5)(scores(0, 4, 3), targets(0, 3, 4))
