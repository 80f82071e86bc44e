from __future__ import annotations

from math import nan

from fluxloop import Metrics, Recorder
from fluxloop.monitor import Monitor
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
