from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxloop import cosine, linear, schedules
from fluxloop.schedules import Schedule, value_at

totals = st.integers(1, 1000)
values = st.floats(-1e3, 1e3)


@settings(deadline=None, max_examples=30)
@given(total=totals, start=values, end=values, t=st.integers(0, 2000))
def test_linear_is_a_straight_line_that_ends_and_stays(total: int, start: float, end: float, t: int) -> None:
    share = min(t, total) / total
    assert linear(total, start, end)(t) == pytest.approx((1 - share) * start + share * end, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(total=totals, start=values, end=values, t=st.integers(0, 2000))
def test_cosine_is_half_a_cosine_that_ends_and_stays(total: int, start: float, end: float, t: int) -> None:
    share = min(t, total) / total
    expected = start + (end - start) * (1 - math.cos(math.pi * share)) / 2
    assert cosine(total, start, end)(t) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(total=totals, start=values, end=values)
@pytest.mark.parametrize("schedule", [linear, cosine])
def test_a_schedule_begins_at_its_start_and_reaches_its_end_and_no_further(
    schedule: object, total: int, start: float, end: float
) -> None:
    value: Schedule = schedule(total, start, end)  # type: ignore[operator]  # one of the two
    assert value(0) == pytest.approx(start, abs=1e-9)
    assert value(total) == pytest.approx(end, abs=1e-9)
    assert value(total) == value(total + 1) == value(10 * total)
    low, high = min(start, end), max(start, end)
    assert all(low - 1e-9 <= value(t) <= high + 1e-9 for t in range(0, total + 2, max(1, total // 20)))


def test_the_momentum_of_byol_is_the_one_of_its_paper() -> None:
    """The target network's rate is 1 - (1 - 0.996) * (cos(pi k / K) + 1) / 2 in step k of K (Grill et al., 2020)."""
    momentum = cosine(1000, 0.996, 1.0)
    for k in (0, 1, 250, 500, 999, 1000):
        assert momentum(k) == pytest.approx(1 - (1 - 0.996) * (math.cos(math.pi * k / 1000) + 1) / 2, abs=1e-12)
    assert momentum(1000) == 1.0


def test_the_middle_of_a_cosine_is_the_mean_and_its_ends_are_flat() -> None:
    value = cosine(100, 1.0, 0.0)
    assert value(50) == pytest.approx(0.5)
    assert value(0) - value(1) < 0.001 < 0.01 < value(50) - value(51)


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("total", [0, -3])
def test_a_schedule_of_no_steps_is_refused(schedule: object, total: int) -> None:
    with pytest.raises(ValueError, match=rf"a schedule of {total} steps was asked for; expected 1 or more"):
        schedule(total, 0.0, 1.0)  # type: ignore[operator]  # one of the two


def test_a_number_is_a_schedule_that_never_changes() -> None:
    assert [value_at(0.9, t) for t in (0, 1, 100)] == [0.9, 0.9, 0.9]
    assert [value_at(lambda t: t / 2, t) for t in (0, 1, 100)] == [0.0, 0.5, 50.0]


def test_schedules_are_offered_at_the_top_and_in_their_module() -> None:
    assert cosine is schedules.cosine
    assert linear is schedules.linear
