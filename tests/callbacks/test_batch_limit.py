from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxloop import (
    CancelStepException,
    CustomCallback,
    EpochEnd,
    Learner,
    LossBegin,
    Metrics,
    PhaseError,
    PredictionPhase,
    Recorder,
    StepBegin,
    TrainingPhase,
    ValidationPhase,
    runstep,
)
from fluxloop.callbacks.batch_limit import BatchLimit
from fluxloop.testing import EventRecorder, assert_resumes_exactly, toy_learner


def test_every_epoch_ends_after_its_steps_and_its_metrics_are_of_those() -> None:
    learner = toy_learner(BatchLimit(3), Recorder(), Metrics(), num_batches=8)
    learner.fit(2)
    for phase in (TrainingPhase, ValidationPhase):
        assert learner.history[phase].steps == 6
        assert learner.history[phase].epochs == 2
    xs, ys = (torch.cat(rows) for rows in zip(*list(learner.data.validation)[:3], strict=True))
    expected = (learner.model(xs) - ys).abs().mean().item()
    assert learner.history["validation/loss"][-1] == pytest.approx(expected)


def test_an_epoch_that_is_ended_fires_its_end_and_the_next_phase_runs() -> None:
    recorder = EventRecorder()
    toy_learner(recorder, BatchLimit(1), num_batches=4).fit(1)
    training = ["EpochBegin", "StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd"]
    validation = ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    assert recorder.events[2:] == [*training, "StepEnd", "EpochEnd", *validation, "CycleEnd", "FitEnd"]


def test_a_limit_of_one_phase_leaves_the_others_whole() -> None:
    learner = toy_learner(BatchLimit(2, phase=ValidationPhase), Recorder(), num_batches=5)
    learner.fit(1)
    assert learner.history[TrainingPhase].steps == 5
    assert learner.history[ValidationPhase].steps == 2


def test_each_phase_can_have_a_limit_of_its_own() -> None:
    limits = (BatchLimit(4, phase=TrainingPhase, name="long"), BatchLimit(2, phase=ValidationPhase, name="short"))
    learner = toy_learner(*limits, Recorder(), num_batches=5)
    learner.fit(2)
    assert learner.history[TrainingPhase].steps == 8
    assert learner.history[ValidationPhase].steps == 4


def test_a_limit_beyond_the_data_changes_nothing() -> None:
    learner = toy_learner(BatchLimit(100), Recorder(), num_batches=5)
    learner.fit(1)
    assert learner.history[TrainingPhase].steps == 5


def test_data_without_an_end_can_be_trained_on() -> None:
    class Endless:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                xs = torch.rand(4, 1)
                yield xs, 3 * xs

    learner = toy_learner(BatchLimit(7), Recorder(), data=(Endless(),))
    learner.fit(3)
    assert learner.history[TrainingPhase].steps == 21
    assert learner.history[TrainingPhase].epochs == 3


def test_the_steps_that_are_run_are_those_of_a_loop_over_the_first_batches() -> None:
    learner = toy_learner(BatchLimit(3), num_batches=8)
    learner.fit(2, phases=[TrainingPhase()])
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.001)
    for _ in range(2):
        for xs, ys in list(learner.data.training)[:3]:
            optimizer.zero_grad()
            torch.nn.functional.l1_loss(xs * weight, ys).backward()
            optimizer.step()
    assert torch.equal(learner.model.value, weight)


def test_cancelled_steps_are_not_counted() -> None:
    seen: list[int] = []

    def cancel_odd(learner: Any) -> None:
        seen.append(1)
        if len(seen) % 2:
            raise CancelStepException

    learner = toy_learner(BatchLimit(2), CustomCallback(cancel_odd, LossBegin, TrainingPhase), Recorder())
    learner.fit(1, phases=[TrainingPhase()])
    assert len(seen) == 4
    assert learner.history[TrainingPhase].steps == 2


def test_a_step_of_another_phase_inside_a_step_ends_no_epoch() -> None:
    class Looks(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, ValidationPhase(), xs=batch[0], ys=batch[1]):
                pass
            return super().step(learner, batch)

    learner = toy_learner(BatchLimit(1, phase=ValidationPhase), Recorder(), num_batches=4)
    learner.fit(1, phases=[Looks()])
    assert learner.history[Looks].steps == 4


def test_an_epoch_that_failed_leaves_no_count_behind() -> None:
    failures = [RuntimeError("broken")]

    def fail(learner: Any) -> None:
        if failures and learner.cbstate.history[TrainingPhase].steps == 1:
            raise failures.pop()

    learner = toy_learner(BatchLimit(2), Recorder(), CustomCallback(fail, StepBegin, TrainingPhase), num_batches=4)
    with pytest.raises(RuntimeError, match="broken"):
        learner.fit(1)
    learner.fit(1, phases=[TrainingPhase()])
    assert learner.history[TrainingPhase].steps_epoch == 2


def test_prediction_and_evaluation_see_all_rows() -> None:
    learner = toy_learner(BatchLimit(1), Recorder(), Metrics(), num_batches=4)
    learner.fit(1)
    assert len(learner.predict(learner.data.validation, phase=PredictionPhase())) == 32


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_1_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=r"BatchLimit\(-?\d\) was given; expected a number of steps, 1 or more"):
        BatchLimit(limit)


@pytest.mark.parametrize("limit", [0.5, "3", None])
def test_a_limit_that_is_no_whole_number_is_refused(limit: Any) -> None:
    with pytest.raises(TypeError):
        BatchLimit(limit)


@pytest.mark.parametrize("phase", [TrainingPhase(), "training", EpochEnd])
def test_a_phase_that_is_no_phase_type_is_refused(phase: Any) -> None:
    with pytest.raises(PhaseError, match=r"expected a phase type, e\.g\. phase=TrainingPhase"):
        BatchLimit(3, phase=phase)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_its_epochs_where_it_would_have() -> None:
    assert_resumes_exactly(lambda: toy_learner(BatchLimit(3), Recorder(), Metrics(), num_batches=5))
