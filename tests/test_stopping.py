from __future__ import annotations

import json
from itertools import pairwise
from math import inf, isnan, nan
from typing import Any

import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxloop import stopping
from fluxloop.errors import CheckpointError
from fluxloop.monitor import Mode
from fluxloop.stopping import (
    GL,
    PQ,
    AllOf,
    AnyOf,
    Criterion,
    InvalidValue,
    Never,
    NoImprovement,
    NumberLimit,
    NumberSinceBest,
    Patience,
    Threshold,
    TimeLimit,
    Warmup,
)

LOSSES = (10.0, 8.0, 9.0, 10.0, 11.0, 12.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 16.0)

values = st.lists(st.floats(0.1, 10).map(lambda x: round(x, 1)), min_size=1, max_size=15)


def stops_at(criterion: Criterion, losses: Any, mode: Mode = "min", training: Any = None) -> int | None:
    """Give the place, from 1, of the value at which a criterion stops; None where it does not."""
    running = criterion.start(mode)
    for place, loss in enumerate(losses):
        told = () if training is None else (training[place],)
        if running.update(loss, told) is not None:
            return place + 1
    return None


# The criteria of EarlyStopping.jl


@pytest.mark.parametrize(
    ("criterion", "place"),
    [
        (Never(), None),
        (InvalidValue(), None),
        (NumberLimit(4), 4),
        (NumberLimit(100), None),
        (Threshold(8.5), 2),
        (Threshold(8.0), None),  # below, not at it
        (Patience(1), 3),
        (Patience(2), 4),
        (Patience(4), 6),
        (Patience(5), 12),  # 12.0 twice is no increase
        (Patience(6), None),
        (NoImprovement(1), 3),
        (NoImprovement(6), 8),
        (NumberSinceBest(6), 8),
        (NoImprovement(1, min_delta=2.5), 2),
        (NoImprovement(1, min_delta=1.9), 3),
        (GL(12.4), 3),  # 9 is 12.5 per cent above 8
        (GL(12.5), 4),
        (GL(112.4), 12),
        (GL(112.5), None),
        (Warmup(NumberLimit(2), 3), 5),
        (Warmup(Threshold(20.0), 3), 4),
    ],
    ids=repr,
)
def test_a_criterion_stops_at_its_value(criterion: Criterion, place: int | None) -> None:
    assert stops_at(criterion, LOSSES) == place
    assert stops_at(type(criterion)(**vars_of(criterion)), LOSSES) == place


def vars_of(criterion: Criterion) -> dict[str, Any]:
    return {name: getattr(criterion, name) for name in type(criterion).__match_args__}


@settings(deadline=None, max_examples=30)
@given(values, st.integers(1, 4))
def test_patience_is_that_many_increases_in_a_row(losses: list[float], n: int) -> None:
    rises = [False, *(b > a for a, b in pairwise(losses))]
    expected = next((t + 1 for t in range(len(losses)) if t + 1 >= n and all(rises[t + 1 - n : t + 1])), None)
    assert stops_at(Patience(n), losses) == expected


@settings(deadline=None, max_examples=30)
@given(values, st.integers(1, 4))
def test_no_improvement_counts_from_the_best(losses: list[float], n: int) -> None:
    best = [min(range(t + 1), key=losses.__getitem__) for t in range(len(losses))]
    expected = next((t + 1 for t in range(len(losses)) if t - best[t] >= n), None)
    assert stops_at(NoImprovement(n), losses) == expected


@settings(deadline=None, max_examples=30)
@given(values, st.floats(1, 100))
def test_gl_is_the_generalization_loss_of_prechelt(losses: list[float], alpha: float) -> None:
    found = [100 * (loss - (best := min(losses[: t + 1]))) / best for t, loss in enumerate(losses)]
    assert stops_at(GL(alpha), losses) == next((t + 1 for t, gl in enumerate(found) if gl > alpha), None)


@settings(deadline=None, max_examples=30)
@given(values, st.floats(0.001, 1), st.integers(2, 4))
def test_pq_is_the_generalization_loss_over_the_training_progress(losses: list[float], alpha: float, k: int) -> None:
    training = [loss / 2 for loss in losses]
    expected = None
    for t in range(k - 1, len(losses)):
        best, last = min(losses[: t + 1]), training[t + 1 - k : t + 1]
        gl, progress = 100 * (losses[t] - best) / best, 1000 * (sum(last) / k - min(last)) / min(last)
        if not progress > 2.3e-16 or gl / progress > alpha:
            expected = t + 1
            break
    assert stops_at(PQ(alpha, k), losses, training=training) == expected


def test_pq_takes_several_training_losses_per_value_and_waits_for_enough() -> None:
    running = PQ(0.75, k=4).start()
    assert running.update(1.0, (4.0, 3.0)) is None
    assert running.update(2.0, (2.0,)) is None  # three so far
    # GL = 100; of 4, 3, 2, 1 the progress is 1000 * (2.5 / 1 - 1) = 1500
    assert running.update(2.0, (1.0,)) is None
    # of 3, 2, 1, 1: 750, and GL of 1000 gives 1.33
    assert running.update(11.0, (1.0,)) == "generalization loss over training progress is 1.33333, more than 0.75"


def test_pq_stops_where_the_training_makes_no_progress() -> None:
    assert stops_at(PQ(k=2), [1.0, 0.9, 0.8], training=[1.0, 0.5, 0.5]) == 3


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize(
    "criterion",
    [Patience(2), NoImprovement(2, 0.3), GL(3), PQ(0.1, 2), Warmup(Patience(1), 2), Threshold(4.0)],
    ids=repr,
)
@settings(deadline=None, max_examples=30)
@given(losses=values)
def test_in_mode_max_a_criterion_is_that_of_the_negated_values(criterion: Criterion, losses: list[float]) -> None:
    training = [loss / 2 for loss in losses]
    negated = Threshold(-4.0) if isinstance(criterion, Threshold) else criterion
    upwards = stops_at(criterion, losses, "max", training)
    assert upwards == stops_at(negated, [-loss for loss in losses], "min", training)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_an_invalid_value_stops_and_does_not_go_away(bad: float) -> None:
    running = InvalidValue().start()
    assert running.update(1.0, (1.0,)) is None
    assert running.update(bad) == f"a value was {bad}"
    assert running.update(1.0) == f"a value was {bad}"


def test_an_invalid_training_loss_counts_too() -> None:
    assert InvalidValue().start().update(1.0, (1.0, nan)) == "a value was nan"


def test_a_nan_is_no_improvement_and_an_increase_and_nothing_to_the_others() -> None:
    assert stops_at(NoImprovement(2), [nan, nan]) == 2
    assert stops_at(NoImprovement(2), [nan, 5.0, nan, 4.0, nan, nan]) == 6
    assert stops_at(Patience(2), [1.0, nan, nan]) == 3
    assert stops_at(Patience(1), [nan]) == 1
    assert stops_at(Patience(2), [nan, 2.0, 3.0]) is None  # two values, one increase
    for quiet in (GL(), Threshold(10), PQ(k=2), Never()):
        assert stops_at(quiet, [nan, nan, nan], training=[1.0, 2.0, 3.0]) is None
    assert stops_at(GL(50), [nan, 1.0, nan, 2.0]) == 4  # the best is 1


def test_a_best_of_0_is_no_division_by_0() -> None:
    assert stops_at(GL(), [0.0, 0.0, 0.1]) == 3
    assert stops_at(PQ(k=2), [0.0, 1.0], training=[1.0, 0.0]) is None  # endless progress
    assert stops_at(GL(9), [-1.0, -0.95, -0.9]) == 3  # 10 per cent of |-1|


def test_a_time_limit_looks_at_a_clock_that_runs_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stopping, "monotonic", lambda: now[0])
    limit = TimeLimit(10)
    now[0] = 500.0  # made long before
    running = limit.start()
    now[0] = 510.0
    assert running.update(1.0) is None
    now[0] = 510.5
    assert running.update(1.0) == "10.5 seconds of 10 have passed"


def test_a_time_limit_goes_on_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stopping, "monotonic", lambda: now[0])
    first = TimeLimit(10).start()
    now[0] = 7.0
    assert first.update(1.0) is None
    now[0] = 1000.0
    second = TimeLimit(10).start()
    now[0] = 2000.0  # loading took long
    second.load_state_dict(first.state_dict())
    now[0] = 2003.0
    assert second.update(1.0) is None
    now[0] = 2003.5
    assert second.update(1.0) == "10.5 seconds of 10 have passed"


# Reasons


@pytest.mark.parametrize(
    ("criterion", "mode", "told", "reason"),
    [
        (Patience(2), "min", (1, 2, 3), "2 increases in a row, to 3"),
        (Patience(1), "max", (3, 2), "1 decrease in a row, to 2"),
        (NoImprovement(2), "min", (1, 2, 3), "no improvement on the best, 1, for 2 values"),
        (NoImprovement(1), "max", (3, 2), "no improvement on the best, 3, for 1 value"),
        (NoImprovement(1), "min", (nan,), "no improvement on a number, for 1 value"),
        (GL(10), "min", (1, 1.5), "worse than the best by 50 %, more than 10"),
        (NumberLimit(2), "min", (1, 1), "2 values of 2"),
        (NumberLimit(1), "min", (1,), "1 value of 1"),
        (Threshold(0.5), "min", (0.25,), "0.25 is below 0.5"),
        (Threshold(0.5), "max", (0.75,), "0.75 is above 0.5"),
        (NumberLimit(1) | Threshold(2), "min", (1,), "1 value of 1 and 1 is below 2"),
        (NumberLimit(5) | Threshold(2), "min", (1,), "1 is below 2"),
        (NumberLimit(1) & Threshold(2), "min", (1,), "1 value of 1 and 1 is below 2"),
    ],
    ids=repr,
)
def test_the_reason_is_told_in_words(criterion: Criterion, mode: Mode, told: Any, reason: str) -> None:
    running = criterion.start(mode)
    assert [running.update(value) for value in told] == [None] * (len(told) - 1) + [reason]


def test_a_criterion_shows_what_it_was_given() -> None:
    shown = repr(((Patience(2) | GL(3.0)) & Warmup(Never(), 2)).start())
    assert shown == "((Patience(n=2) | GL(alpha=3.0)) & Warmup(criterion=Never(), n=2))"


# Combined


@settings(deadline=None, max_examples=30)
@given(values)
def test_either_of_two_stops_where_the_first_of_them_does(losses: list[float]) -> None:
    places = [stops_at(each, losses) for each in (Patience(2), Threshold(1.0))]
    expected = min((place for place in places if place), default=None)
    assert stops_at(Patience(2) | Threshold(1.0), losses) == expected


def test_both_stop_at_a_value_at_which_each_would() -> None:
    both = Patience(1) & Threshold(5.0)
    assert stops_at(both, [6.0, 7.0, 4.0, 4.5]) == 4
    assert stops_at(both, [6.0, 7.0, 4.0, 3.0, 5.5]) is None


def test_each_of_two_keeps_its_own_state_and_is_told_every_value() -> None:
    nested = (Patience(2) & NumberLimit(4)) | (Patience(2) & Threshold(0.0)) | NoImprovement(9)
    assert stops_at(nested, [1.0, 2.0, 3.0, 2.0, 3.0, 4.0]) == 6  # two increases at the third too: not yet four values


def test_the_same_instance_twice_is_told_each_value_once_by_each() -> None:
    limit = NumberLimit(3)
    assert stops_at(limit | limit, LOSSES) == 3
    assert stops_at(Warmup(limit, 2) & limit, LOSSES) == 5


def test_only_criteria_are_combined() -> None:
    with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for \|"):
        Patience(2) | 3
    with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for &"):
        Patience(2) & None
    with pytest.raises(TypeError, match=r"Warmup was given 3; expected a criterion: Patience\(5\)"):
        Warmup(3)  # type: ignore[arg-type]
    assert isinstance(Patience(2) | Never(), AnyOf)
    assert isinstance(Patience(2) & Never(), AllOf)


@pytest.mark.parametrize(
    ("criterion", "needs"),
    [(PQ(), True), (Warmup(PQ() & Never()), True), (GL() | InvalidValue(), False), (Never(), False)],
    ids=repr,
)
def test_it_tells_whether_it_needs_training_losses(criterion: Criterion, needs: bool) -> None:
    assert criterion.wants_training_losses() is needs


# State


EVERY = [
    Never(),
    InvalidValue(),
    NumberLimit(6),
    Threshold(0.3),
    Patience(2),
    NoImprovement(3, 0.1),
    NumberSinceBest(3),
    GL(60),
    PQ(0.2, 3),
    Warmup(Patience(2), 2),
    (Patience(3) & NumberLimit(4)) | Warmup(PQ(0.2, 3) | GL(90), 1),
]


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("criterion", EVERY, ids=repr)
@settings(deadline=None, max_examples=30)
@given(losses=values, cut=st.integers(0, 15), mode=st.sampled_from(["min", "max"]))
def test_a_kept_state_goes_on_as_if_nothing_had_been(
    criterion: Criterion, losses: list[float], cut: int, mode: Mode
) -> None:
    whole, first, second = (criterion.start(mode) for _ in range(3))
    told = [whole.update(loss, (loss / 3,)) for loss in losses]
    before = [first.update(loss, (loss / 3,)) for loss in losses[:cut]]
    state = json.loads(json.dumps(first.state_dict()))
    first.update(123.0, (123.0,))  # changes nothing of what was kept
    second.load_state_dict(state)
    assert before + [second.update(loss, (loss / 3,)) for loss in losses[cut:]] == told


@pytest.mark.parametrize("criterion", EVERY, ids=repr)
def test_starting_gives_a_copy_that_has_been_told_nothing(criterion: Criterion) -> None:
    before = criterion.state_dict()
    running = criterion.start("max")
    told = [running.update(loss, (loss,)) for loss in LOSSES]
    assert criterion.state_dict() == before
    assert criterion.mode == "min"
    again = running.start("max")
    assert [again.update(loss, (loss,)) for loss in LOSSES] == told


def test_the_state_of_another_criterion_is_refused() -> None:
    state = Patience(2).state_dict()
    with pytest.raises(CheckpointError, match="kept state is of the criterion Patience, and this is NoImprovement"):
        NoImprovement(2).load_state_dict(state)
    with pytest.raises(CheckpointError, match="kept state is of the criterion Never, and this is Patience"):
        Warmup(Patience(2)).load_state_dict(Warmup(Never()).state_dict())


def test_a_patience_may_be_longer_when_it_goes_on() -> None:
    first, second = Patience(2).start(), Patience(3).start()
    for loss in (1.0, 2.0, 3.0):
        first.update(loss)
    second.load_state_dict(first.state_dict())
    assert second.update(4.0) == "3 increases in a row, to 4"


def test_a_criterion_of_ones_own_begins_anew_and_is_kept() -> None:
    @define
    class Below(Criterion):
        limit: float
        seen: int = field(default=0, init=False, repr=False)

        def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
            self.seen += value < self.limit
            return f"{self.seen} below" if self.seen >= 2 else None

    mine = Below(3.0)
    assert stops_at(mine, [1, 5, 2]) == 3
    assert mine.seen == 0
    running = (mine | Never()).start()
    running.update(1.0)
    other = (mine | Never()).start()
    other.load_state_dict(running.state_dict())
    assert other.update(1.0) == "2 below"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patience(0), r"Patience\(n=0\) was given; expected a whole number, 1 or more"),
        (lambda: Patience(True), r"Patience\(n=True\)"),
        (lambda: NoImprovement(1.5), r"NoImprovement\(n=1.5\)"),
        (lambda: NoImprovement(1, -0.1), r"NoImprovement\(min_delta=-0.1\) was given; expected 0 or more"),
        (lambda: NumberLimit(-1), r"NumberLimit\(n=-1\)"),
        (lambda: TimeLimit(0), r"TimeLimit\(seconds=0\) was given; expected a number above 0"),
        (lambda: GL(-1), r"GL\(alpha=-1\)"),
        (lambda: GL(nan), r"GL\(alpha=nan\)"),
        (lambda: PQ(k=1), r"PQ\(k=1\) was given; expected 2 or more"),
        (lambda: PQ(tol=0), r"PQ\(tol=0\)"),
        (lambda: Threshold("low"), r"Threshold\(value='low'\) was given; expected a number"),
        (lambda: Threshold(nan), r"Threshold\(value=nan\)"),
        (lambda: Warmup(Never(), 0), r"Warmup\(n=0\)"),
    ],
)
def test_bad_numbers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_defaults_are_those_of_early_stopping_jl() -> None:
    assert (Patience().n, NumberSinceBest().n, NumberLimit().n, Threshold().value, GL().alpha) == (5, 6, 100, 0.0, 2.0)
    assert (PQ().alpha, PQ().k) == (0.75, 5)
    assert not isnan(PQ().tol)
