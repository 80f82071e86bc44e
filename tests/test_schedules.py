from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs.exceptions import FrozenInstanceError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

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


def test_arguments_in_torchs_order_are_told_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"0.1 steps was asked for; expected 1 or more: cosine\(total, start, end\)$"):
        cosine(0.1, 0.0, 100)  # type: ignore[arg-type]  # the mistake


def test_equal_schedules_are_written_alike() -> None:
    made = schedules.sequence((schedules.warmup(2, cosine(8, 0.1, 0)), 10), (lambda t: 0.1, 5), schedules.repeat(1, 2))
    assert schedules.written(made) == (
        "sequence(parts=((warmup(steps=2, then=cosine(total=8, start=0.1, end=0), start=0), 10), (a function, 5), "
        "(repeat(schedule=1, every=2, times=None), inf)))"
    )
    assert schedules.written(linear(4, 1, 0)) == schedules.written(linear(4.0, 1.0, 0.0))  # type: ignore[arg-type]
    assert schedules.written(linear(4, 1, 0)) != schedules.written(linear(4, 1, 0.1))


def test_a_number_is_a_schedule_that_never_changes() -> None:
    assert [value_at(0.9, t) for t in (0, 1, 100)] == [0.9, 0.9, 0.9]
    assert [value_at(lambda t: t / 2, t) for t in (0, 1, 100)] == [0.0, 0.5, 50.0]


def test_schedules_are_offered_at_the_top_and_in_their_module() -> None:
    assert cosine is schedules.cosine
    assert linear is schedules.linear


PLAIN: dict[str, Schedule] = {
    "constant": schedules.constant(0.5),
    "linear": linear(10, 1.0, 0.1),
    "cosine": cosine(10, 1.0, 0.1),
    "exponential": schedules.exponential(10, 1.0, 0.1),
    "polynomial": schedules.polynomial(10, 1.0, 0.1, power=3.0),
    "step": schedules.step(3, 1.0, 0.5),
    "triangle": schedules.triangle(10, 0.1, 1.0),
    "sine": schedules.sine(10, 0.1, 1.0),
    "inverse_sqrt": schedules.inverse_sqrt(4, 1.0),
    "warmup": schedules.warmup(3, cosine(7, 1.0, 0.1)),
    "one_cycle": schedules.one_cycle(10, 1.0),
    "sequence": schedules.sequence((linear(3, 0.0, 1.0), 3), schedules.step(2, 1.0, 0.5)),
    "shift": schedules.shift(linear(10, 1.0, 0.1), 2),
    "repeat": schedules.repeat(linear(4, 1.0, 0.1), 4, times=2),
}


@pytest.mark.parametrize("schedule", PLAIN.values(), ids=PLAIN)
def test_a_schedule_is_a_small_value(schedule: Schedule) -> None:
    copied = pickle.loads(pickle.dumps(schedule))
    assert copied == schedule
    assert hash(copied) == hash(schedule)
    assert repr(copied) == repr(schedule)
    assert " at 0x" not in repr(schedule)
    with pytest.raises(FrozenInstanceError):
        schedule.start = 3.0  # type: ignore[attr-defined]  # what is to be refused


@pytest.mark.parametrize("schedule", PLAIN.values(), ids=PLAIN)
def test_a_schedule_keeps_nothing_between_calls(schedule: Schedule) -> None:
    forwards = [schedule(t) for t in range(25)]
    assert [schedule(t) for t in reversed(range(25))] == forwards[::-1]
    assert all(isinstance(value, float) for value in forwards)


ENDING = ("linear", "cosine", "exponential", "polynomial", "triangle", "sine", "one_cycle")


@pytest.mark.parametrize("name", ENDING)
def test_a_schedule_with_a_total_stays_where_it_ended_and_begins_no_earlier(name: str) -> None:
    schedule = PLAIN[name]
    assert schedule(10) == schedule(11) == schedule(10_000)
    assert schedule(-1) == schedule(0)


@settings(deadline=None, max_examples=30)
@given(total=totals, start=st.floats(1e-6, 1e3), end=st.floats(1e-6, 1e3), t=st.integers(0, 2000))
def test_exponential_is_a_straight_line_of_logarithms(total: int, start: float, end: float, t: int) -> None:
    share = min(t, total) / total
    expected = math.log(start) + share * (math.log(end) - math.log(start))
    assert math.log(schedules.exponential(total, start, end)(t)) == pytest.approx(expected, abs=1e-9)


def optimizer_of(lr: float, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=momentum)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (schedules.step(3, 0.1, 0.5), lambda o: lr_scheduler.StepLR(o, 3, 0.5)),
        (schedules.step(1, 0.1, 0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        (linear(10, 0.1, 0.02), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=10)),
        (cosine(10, 0.1, 0.01), lambda o: lr_scheduler.CosineAnnealingLR(o, 10, 0.01)),
        (schedules.polynomial(10, 0.1, 0.0, 2.0), lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0)),
        (schedules.repeat(cosine(4, 0.1, 0.0), 4), lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4)),
        (
            schedules.repeat(schedules.triangle(6, 0.1, 0.5), 6),
            lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=3),
        ),
    ],
)
def test_a_schedule_gives_the_rates_of_the_torch_scheduler_of_its_name(ours: Schedule, theirs: Any) -> None:
    optimizer = optimizer_of(0.1)
    scheduler = theirs(optimizer)
    for t in range(11):
        assert ours(t) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_one_cycle_is_that_of_torch_where_the_peaks_fall_on_the_same_step() -> None:
    optimizer = optimizer_of(0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=21, pct_start=6 / 21, final_div_factor=4e3)
    ours = schedules.one_cycle(20, 1.0, pct_start=5 / 20)
    for t in range(21):
        assert ours(t) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        if t < 20:
            scheduler.step()


@settings(deadline=None, max_examples=30)
@given(total=totals, pct=st.floats(0, 1), after=st.integers(0, 5000))
def test_one_cycle_has_a_true_end_and_anneals_by_cosine(total: int, pct: float, after: int) -> None:
    schedule = schedules.one_cycle(total, 1.0, pct)
    up = math.ceil(total * pct)
    assert schedule(total + after) == 1e-5
    values = [schedule(t) for t in range(total + 1)]
    assert max(values) <= 1.0
    assert up == total or values[up] == 1.0
    assert values[:up] == sorted(values[:up])
    assert values[up:] == sorted(values[up:], reverse=True)
    if (total - up) % 2 == 0 and total > up:  # a quarter of a sine would be at sqrt(1/2) of the way
        assert values[up + (total - up) // 2] == pytest.approx((1 + 1e-5) / 2)


def test_inverse_sqrt_is_the_formula_of_the_transformer() -> None:
    """The rate is width^-0.5 min(step^-0.5, step warmup^-1.5) at step 1, 2, … (Vaswani et al., 2017, equation 3)."""
    ours = schedules.inverse_sqrt(40, (512 * 40) ** -0.5)
    for number in (1, 2, 39, 40, 41, 1000):
        assert ours(number - 1) == pytest.approx(512**-0.5 * min(number**-0.5, number * 40**-1.5))


def test_a_warm_up_leads_to_the_first_value_and_hands_over_from_step_0() -> None:
    schedule = schedules.warmup(10, linear(10, 2.0, 1.0), start=1.0)
    assert [schedule(t) for t in (0, 5, 10, 15, 20, 30)] == [1.0, 1.5, 2.0, 1.5, 1.0, 1.0]
    assert schedules.warmup(4, 0.5)(2) == 0.25
    assert schedules.warmup(4, 0.5)(100) == 0.5


def test_in_a_sequence_each_begins_at_0_and_the_last_may_go_on() -> None:
    seen: list[int] = []

    def third(t: int) -> float:
        seen.append(t)
        return 3.0

    endless = schedules.sequence((1.0, 2), (lambda t: 10.0 + t, 3), third)
    assert [endless(t) for t in range(7)] == [1.0, 1.0, 10.0, 11.0, 12.0, 3.0, 3.0]
    assert seen == [0, 1]
    ending = schedules.sequence((linear(4, 0.0, 1.0), 2), (linear(4, 1.0, 0.0), 4))
    assert [ending(t) for t in (0, 1, 2, 5, 6, 100)] == [0.0, 0.25, 1.0, 0.25, 0.0, 0.0]


def test_a_length_that_is_no_whole_number_is_rounded_up() -> None:
    schedule = schedules.sequence((1.0, 2.5), lambda t: 10.0 + t)
    assert [schedule(t) for t in range(5)] == [1.0, 1.0, 1.0, 10.0, 11.0]


def test_the_same_schedule_counts_epochs_where_its_user_does() -> None:
    in_epochs = schedules.sequence((0.1, 2), (0.01, 1))
    in_steps = schedules.sequence((0.1, 2 * 50), (0.01, 1 * 50))
    assert [in_epochs(t // 50) for t in range(200)] == [in_steps(t) for t in range(200)]


def test_a_shift_delays_or_begins_inside() -> None:
    schedule = linear(4, 0.0, 1.0)
    assert [schedules.shift(schedule, 3)(t) for t in range(9)] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [schedules.shift(schedule, -2)(t) for t in range(4)] == [0.5, 0.75, 1.0, 1.0]


def test_a_repeated_schedule_begins_anew_and_may_end() -> None:
    assert [schedules.repeat(linear(2, 0.0, 1.0), 3)(t) for t in range(7)] == [0, 0.5, 1, 0, 0.5, 1, 0]
    assert [schedules.repeat(linear(2, 0.0, 1.0), 3, times=2)(t) for t in (4, 5, 6, 99)] == [0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0, 0.0, 1.0), "a schedule of 0 steps was asked for; expected 1 or more"),
        (lambda: schedules.step(0, 0.1), "a schedule of 0 steps"),
        (lambda: schedules.one_cycle(True, 0.1), "a schedule of True steps"),
        (lambda: schedules.sine("10", 0.1, 0.2), "a schedule of '10' steps"),
        (lambda: schedules.exponential(10, 0.1, 0.0), "no factor leads from one to the other"),
        (lambda: schedules.polynomial(10, 0.1, 0.0, power=0), r"power=0\) was given; expected more than 0"),
        (lambda: schedules.one_cycle(10, 0.1, pct_start=25), "pct_start=25.*expected a share of the steps, 0 to 1"),
        (lambda: schedules.one_cycle(10, 0.1, div=0), "div=0.*expected more than 0"),
        (lambda: schedules.warmup(10, "cosine"), r"warmup\(then=...\) was given 'cosine'; expected a schedule such as"),
        (lambda: schedules.warmup(10, cosine), "was given the class cosine; expected a schedule"),
        (lambda: schedules.warmup(0, 0.1), "a schedule of 0 steps"),
        (lambda: schedules.sequence(), "was given nothing"),
        (lambda: schedules.sequence(linear(5, 0.0, 1.0), (0.1, 5)), "only the last may be a schedule alone"),
        (lambda: schedules.sequence((0.1, 0), 0.2), "a schedule of 0 steps"),
        (lambda: schedules.sequence((None, 2), 0.2), "part 0 of a sequence was given None"),
        (lambda: schedules.shift(0.1, 1.5), r"shift\(steps=1.5\) was given; expected a whole number"),
        (lambda: schedules.repeat(0.1, 0), "a schedule of 0 steps"),
        (lambda: schedules.repeat(0.1, 2, times=0), "times=0.*1 or more, or None"),
    ],
)
def test_what_makes_no_schedule_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
