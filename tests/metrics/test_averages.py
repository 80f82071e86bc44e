from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxloop.metrics.averages import FOLD_AFTER, Mean, MovingAverage


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 100)), min_size=1, max_size=FOLD_AFTER * 2 + 10)
)
def test_a_mean_is_that_of_all_values_with_their_weights(pairs: list[tuple[float, int]]) -> None:
    mean = Mean()
    for value, weight in pairs:
        mean.add(torch.tensor(value), weight)
    expected = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    result = mean.compute()
    assert result is not None
    assert result.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("count", [1, FOLD_AFTER - 1, FOLD_AFTER, FOLD_AFTER + 1, 3 * FOLD_AFTER])
def test_a_mean_may_be_asked_for_at_any_time(count: int) -> None:
    mean = Mean()
    for number in range(count):
        mean.add(torch.tensor(float(number)))
        if number % 50 == 0:
            mean.compute()
    assert mean.compute().item() == (count - 1) / 2


def test_a_mean_of_many_small_steps_is_exact() -> None:
    mean = Mean()
    for _ in range(1000):
        mean.add(torch.tensor(0.1), 3)
    assert mean.compute().item() == pytest.approx(torch.tensor(0.1).double().item(), rel=1e-14)


@pytest.mark.parametrize("count", [3, FOLD_AFTER, 2 * FOLD_AFTER + 5])
def test_values_may_be_divided_later(count: int) -> None:
    mean, hits = Mean(), [(number % 7, 7 + number % 3) for number in range(count)]
    for hit, rows in hits:
        mean.add(torch.tensor(hit), rows, over=rows)
    restored = Mean()
    restored.load_state_dict(mean.state_dict())
    expected = sum(hit for hit, _ in hits) / sum(rows for _, rows in hits)
    assert mean.compute().item() == restored.compute().item() == pytest.approx(expected, rel=1e-14)
    with_last = Mean()
    for hit, rows in [(1, 2), (3, 4)]:
        with_last.add(torch.tensor(hit), 1, over=rows)
    assert with_last.compute().item() == 0.625


def test_without_values_there_is_no_mean() -> None:
    assert Mean().compute() is None
    assert MovingAverage(0.9).compute() is None


def test_smoothloss_is_smooth() -> None:
    average = MovingAverage(0.98)
    for _ in range(200):
        average.add(torch.tensor(1.0))
    average.add(torch.tensor(11.0))
    assert average.compute().item() == pytest.approx(1 + 10 * 0.02, rel=0.02)


@pytest.mark.parametrize("count", [4, FOLD_AFTER + 3])
def test_weights_may_be_tensors_and_fractions(count: int) -> None:
    values = [torch.tensor(float(number)) for number in range(count)]
    weights = [torch.tensor(number % 5) if number % 2 else 0.5 + number % 3 for number in range(count)]
    mean = Mean()
    for value, weight in zip(values, weights, strict=True):
        mean.add(value, weight)
    restored = Mean()
    restored.load_state_dict(mean.state_dict())
    expected = sum(v.item() * float(w) for v, w in zip(values, weights, strict=True)) / sum(map(float, weights))
    assert mean.compute().item() == restored.compute().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nothing", [0, 0.0, torch.tensor(0)])
def test_a_value_that_weighs_nothing_may_be_nan(nothing: float | torch.Tensor) -> None:
    mean = Mean()
    mean.add(torch.tensor(2.0), 3)
    mean.add(torch.tensor(float("nan")), nothing)
    assert mean.compute().item() == 2


def test_values_that_all_weigh_nothing_have_no_mean() -> None:
    mean = Mean()
    mean.add(torch.tensor(2.0), 0)
    assert mean.compute() is None
