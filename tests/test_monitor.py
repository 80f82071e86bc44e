from __future__ import annotations

from math import nan
from typing import Any

import pytest

from fluxloop import MetricError, Metrics, Recorder, TrainingPhase, ValidationPhase
from fluxloop.monitor import Monitor, all_series, find_series
from fluxloop.testing import toy_learner


def test_a_value_is_new_until_its_epoch_was_seen() -> None:
    learner, monitor = toy_learner(Recorder(), Metrics()), Monitor("training/loss")
    metrics = learner.cbstate.metrics
    assert monitor.new(metrics, 0) is None
    learner.fit(2)
    newest = (2, learner.history["training/loss"][-1])
    assert monitor.new(metrics, 0) == monitor.new(metrics, 1) == newest
    assert monitor.new(metrics, 2) is None
    assert not monitor.better(nan, None)


def test_the_newest_epoch_is_0_before_the_first_value() -> None:
    learner = toy_learner(Recorder(), Metrics())
    monitor = Monitor("training/loss")
    assert monitor.newest_epoch(learner.cbstate.metrics) == 0
    learner.fit(2)
    assert monitor.newest_epoch(learner.cbstate.metrics) == 2


def two_phases() -> Any:
    learner = toy_learner(Recorder(), Metrics(), num_batches=2)
    learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), ValidationPhase(name="again", every=2)])
    return learner.cbstate.metrics


def test_a_series_is_found_by_the_phases_name_and_by_its_data_where_it_is_alone() -> None:
    metrics = two_phases()
    assert [epoch for epoch, _ in find_series(metrics, "again/loss")] == [2]
    assert find_series(metrics, "training/loss") == find_series(metrics, "TrainingPhase/loss")
    assert find_series(metrics, "validation/loss", ("again",)) == find_series(metrics, "again/loss")
    for among in (None, ("again", "ValidationPhase")):
        with pytest.raises(MetricError, match="'ValidationPhase/loss' or 'again/loss'"):
            find_series(metrics, "validation/loss", among)
    assert find_series(metrics, "validation/other", missing_ok=True) == []


def test_every_series_has_the_shortest_name_that_no_other_one_has() -> None:
    assert sorted(all_series(two_phases())) == ["ValidationPhase/loss", "again/loss", "training/loss"]


def test_which_way_is_better_is_as_given_as_the_metric_says_or_as_for_a_loss() -> None:
    monitor = Monitor("validation/score")
    assert monitor.direction is None
    with pytest.raises(MetricError, match="nobody says which way is better"):
        monitor.better(1.0, 0.0)
    monitor.known = "max"
    assert monitor.better(1.0, 0.0)
    assert Monitor("validation/score", "min").after(monitor).better(0.0, 1.0)
    assert Monitor("validation/my_loss").direction == "min"
