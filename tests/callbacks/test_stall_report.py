from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from time import sleep
from typing import Any

import pytest
import torch

from fluxloop import Learner, StallReport, TrainingPhase
from fluxloop.testing import assert_observer, toy_learner


class Slow:
    """Batches of which one comes late."""

    def __init__(self, late: int, seconds: float) -> None:
        self.late, self.seconds = late, seconds

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(3):
            if number == self.late:
                sleep(self.seconds)
            yield torch.ones(2, 1), torch.ones(2, 1)


class SlowStep(TrainingPhase):
    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        sleep(0.4)


def test_a_batch_that_does_not_come_is_reported_with_the_stack_that_waits_for_it() -> None:
    out = io.StringIO()
    learner = toy_learner(StallReport(0.1, file=out), data=(Slow(1, 0.4),))
    learner.fit(1)
    text = out.getvalue()
    assert text.count("nothing has happened for") == 1  # once for a standstill
    assert "since a step ended (TrainingPhase()); waited for: the next batch, which does not come" in text
    assert "thread MainThread:" in text
    assert "sleep(self.seconds)" in text


def test_a_step_that_does_not_end_is_told_from_a_batch_that_does_not_come() -> None:
    out = io.StringIO()
    toy_learner(StallReport(0.1, file=out), data=(Slow(9, 0),)).fit(1, phases=[SlowStep()], steps_per_epoch=1)
    assert "since a step began (SlowStep()); waited for: what the main thread does, below" in out.getvalue()
    assert "sleep(0.4)" in out.getvalue()


def test_a_fit_that_goes_on_is_not_reported_and_leaves_no_thread() -> None:
    out = io.StringIO()
    learner = toy_learner(StallReport(30, file=out))
    learner.fit(2)
    with pytest.raises(ZeroDivisionError):
        learner.fit(1, phases=[Fails()])
    assert out.getvalue() == ""
    assert not any(thread.name == "stall report" for thread in threading.enumerate())


class Fails(TrainingPhase):
    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        raise ZeroDivisionError


def test_a_closed_stream_does_not_matter() -> None:
    out = io.StringIO()
    out.close()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        toy_learner(StallReport(0.1, file=out), data=(Slow(1, 0.3),)).fit(1)
    assert any("StallReport falls silent" in str(warning.message) for warning in told)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "60", None, True])
def test_what_is_no_time_is_refused(seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"StallReport\(.*expected a number of seconds above 0"):
        StallReport(seconds)


def test_watching_changes_nothing() -> None:
    assert_observer(StallReport(), toy_learner)
