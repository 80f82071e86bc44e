from __future__ import annotations

from math import exp, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from fluxloop.metrics import neighbors
from fluxloop.metrics.neighbors import knn_predict


def votes_in_a_loop(bank: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float | None) -> list[float]:
    """Count one query's votes in float64, one neighbour at a time."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    found = [(cosine(row, query.tolist()), label) for row, label in zip(bank.tolist(), labels.tolist(), strict=True)]
    nearest = sorted(found, key=lambda pair: -pair[0])[:k]
    votes = [0.0] * (int(labels.max()) + 1)
    for similarity, label in nearest:
        votes[label] += 1.0 if temperature is None else exp((similarity - nearest[0][0]) / temperature)
    return votes


def random_rows(seed: int, count: int, size: int) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 6),
    count=st.integers(1, 20),
    classes=st.integers(1, 5),
    temperature=st.sampled_from([None, 0.005, 0.07, 0.5, 3.0]),
    data=st.data(),
)
def test_it_gives_a_class_with_the_most_votes_of_a_loop(
    seed: int, size: int, count: int, classes: int, temperature: float | None, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, count))
    bank, queries = random_rows(seed, count, size), random_rows(seed + 1, 4, size)
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    found = knn_predict(bank, labels, queries, k=k, temperature=temperature)
    assert found.shape == (4,)
    for query, predicted in zip(queries, found.tolist(), strict=True):
        votes = votes_in_a_loop(bank, labels, query, k, temperature)
        assert votes[predicted] == pytest.approx(max(votes), rel=1e-9)  # where two have as many, either


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_the_length_of_features_does_not_matter(seed: int, scale: float) -> None:
    bank, queries = random_rows(seed, 12, 3), random_rows(seed + 1, 5, 3)
    labels = torch.arange(12) % 4
    expected = knn_predict(bank, labels, queries, k=3)
    assert torch.equal(knn_predict(scale * bank, labels, queries / scale, k=3), expected)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), chunk=st.integers(1, 9))
def test_queries_are_classified_alike_however_they_are_cut(seed: int, chunk: int) -> None:
    bank, queries = random_rows(seed, 12, 3), random_rows(seed + 1, 7, 3)
    labels = torch.arange(12) % 4
    expected = knn_predict(bank, labels, queries, k=5)
    whole, neighbors.CHUNK = neighbors.CHUNK, chunk
    try:
        assert torch.equal(knn_predict(bank, labels, queries, k=5), expected)
    finally:
        neighbors.CHUNK = whole


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("temperature", [None, 0.07])
def test_it_agrees_with_scikit_learn(k: int, temperature: float | None) -> None:
    bank, queries = random_rows(0, 40, 8), random_rows(1, 200, 8)
    labels = torch.randint(5, (40,), generator=torch.Generator().manual_seed(2))
    weights = "uniform" if temperature is None else lambda distance: np.exp((1 - distance) / temperature)
    reference = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(bank.numpy(), labels.numpy())
    assert knn_predict(bank, labels, queries, k=k, temperature=temperature).tolist() == list(
        reference.predict(queries.numpy())
    )


def test_each_row_of_the_bank_finds_itself() -> None:
    bank = random_rows(0, 30, 4).float()
    labels = torch.arange(30)
    assert torch.equal(knn_predict(bank, labels, bank, k=1), labels)
    assert torch.equal(knn_predict(bank, labels, bank, k=30, temperature=0.01), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_low_temperature_lets_the_nearest_decide_in_every_precision(dtype: torch.dtype) -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], dtype=dtype)
    labels = torch.tensor([0, 0, 1])
    near_both = torch.tensor([[0.1, 0.2], [0.2, 0.1]], dtype=dtype)
    for temperature in (0.07, 0.01, 0.005):
        assert knn_predict(bank, labels, near_both, k=3, temperature=temperature).tolist() == [1, 0]


def test_many_far_neighbours_outvote_one_near_one_without_a_temperature_only() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.4, 1.0]])
    labels, query = torch.tensor([2, 1, 1]), torch.tensor([[1.0, 0.05]])
    assert knn_predict(bank, labels, query, k=3, temperature=None).tolist() == [1]
    assert knn_predict(bank, labels, query, k=3, temperature=0.07).tolist() == [2]
    assert knn_predict(bank, labels, query, k=1, temperature=None).tolist() == [2]


@pytest.mark.parametrize(
    ("bank", "labels", "queries"),
    [((4, 3), (4, 1), (2, 3)), ((4, 3), (3,), (2, 3)), ((4, 3), (4,), (2, 2)), ((4, 3, 1), (4,), (2, 3))],
)
def test_shapes_that_do_not_fit_are_named(
    bank: tuple[int, ...], labels: tuple[int, ...], queries: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, F\), \(B,\) and \(N, F\)"):
        knn_predict(torch.ones(bank), torch.zeros(labels), torch.ones(queries), k=1)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_more_neighbours_than_rows_or_none_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} neighbours .* 4 rows; expected 1 to 4"):
        knn_predict(torch.ones(4, 3), torch.zeros(4), torch.ones(2, 3), k=k)
