from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    CustomCallback,
    CycleEnd,
    EpochBegin,
    EpochEnd,
    FitBegin,
    FitEnd,
    Learner,
    Metrics,
    Phase,
    Recorder,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.checkpoint.folder import Folder
from fluxloop.errors import CheckpointError
from fluxloop.run.scope import FitScope, place_of
from fluxloop.testing import EventRecorder, assert_resumes_exactly, assert_same_bits, toy_learner


def toy(*callbacks: Callback, **options: Any) -> Learner[Any]:
    return toy_learner(*callbacks, **{"num_batches": 3, "batch_size": 2, **options})


def watched(learner: Learner[Any], look: Callable[[], object]) -> Learner[Any]:
    """Have a learner's next fit call a function at its safe points."""
    learner.at_safe_point(look)
    return learner


def where(learner: Learner[Any]) -> str:
    scope = learner.scope
    assert isinstance(scope, FitScope) or (scope is not None and isinstance(scope.parent, FitScope))
    return type(scope.phase).__name__


# When


def test_they_are_before_each_batch_after_each_phase_and_cycle_and_at_the_end() -> None:
    trace = EventRecorder()
    learner = toy(trace)
    watched(learner, lambda: trace.trace.append(("safe point", where(learner)))).fit(1)
    shown = trace.events
    step = ["StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd"]
    watch = ["StepBegin", "LossBegin", "StepEnd"]
    safe = ["safe point"]
    begin = shown.index("CycleBegin")
    assert shown[:begin] in (["FitBegin"], ["FitBegin", "safe point"])
    assert shown[begin:] == [
        "CycleBegin",
        *["EpochBegin", *(safe + step) * 3, *safe, "EpochEnd", *safe],
        *["EpochBegin", *(safe + watch) * 3, *safe, "EpochEnd", *safe],
        *["CycleEnd", *safe, "FitEnd", *safe],
    ]


def test_no_step_is_under_way_at_any_and_the_state_can_be_asked_for() -> None:
    seen: list[int] = []
    learner = toy(Recorder(), Metrics())
    watched(learner, lambda: seen.append(len(learner.state_dict()))).fit(2)
    assert len(seen) >= 20
    assert len(set(seen)) == 1


def test_a_learner_forgets_them_when_the_fit_ends_also_by_an_error() -> None:
    seen: list[int] = []
    learner = watched(toy(), lambda: seen.append(1))
    learner.fit(1)
    count = len(seen)
    learner.fit(1)
    assert len(seen) == count

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        watched(toy(), fail).fit(1)
    broken = watched(toy(), fail)
    with pytest.raises(OSError, match="no"):
        broken.fit(1)
    broken.fit(1)
    assert broken.history.cycles == 1


def test_there_are_none_in_evaluation_prediction_and_single_epochs() -> None:
    seen: list[int] = []
    learner = watched(toy(Recorder(), Metrics()), lambda: seen.append(1))
    learner.evaluate()
    learner.predict(torch.rand(4, 1))
    learner.epoch(TrainingPhase())
    assert seen == []


def test_an_evaluation_inside_a_fit_has_none_either() -> None:
    inside: list[bool] = []
    outside: list[int] = []

    class Evaluates(UnsafeCallback):
        @on(StepEnd, AbstractTrainingPhase)
        def evaluate(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            before = len(outside)
            learner.evaluate()
            inside.append(len(outside) == before)

    watched(toy(Recorder(), Metrics(), Evaluates()), lambda: outside.append(1)).fit(1)
    assert inside == [True] * 3


def test_a_phase_inside_of_a_phase_has_no_place_to_go_on_from() -> None:
    class Nested(UnsafeCallback):
        @on(StepEnd, TrainingPhase)
        def nested(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            learner.epoch(ValidationPhase())

    learner = toy(Recorder(), Nested())
    refused: list[int] = []

    def look() -> None:
        try:
            place_of(learner)
        except CheckpointError:
            refused.append(1)

    watched(learner, look).fit(1, phases=[TrainingPhase()])
    assert refused == []  # they are not asked inside
    assert_resumes_exactly(lambda: toy(Recorder(), Nested()), epochs=1, phases=lambda: [TrainingPhase()], at=[2, 4])


# Ending a fit


def test_a_stop_takes_effect_between_two_batches() -> None:
    class Ask(UnsafeCallback):
        @on(StepBegin, AbstractTrainingPhase)
        def ask(self, event: StepBegin, phase: Phase, learner: Any) -> None:
            if learner.history[type(phase)].steps == 4:
                learner._running.stop_requested = "the budget is used up"

    trace = EventRecorder()
    learner = toy(Recorder(), Ask(), trace)
    assert learner.fit(9).stop_reason == "the budget is used up"
    assert learner.history[TrainingPhase].steps == 5  # the running step is finished, and no other begins
    assert trace.events[-1] == "FitEnd"


def test_a_cancel_at_a_safe_point_ends_the_fit_there() -> None:
    learner = toy(Recorder())

    def stop() -> None:
        if learner.history[TrainingPhase].steps == 2:
            raise CancelFittingException("two are enough")

    assert watched(learner, stop).fit(3).stop_reason == "two are enough"
    assert learner.history[TrainingPhase].steps == 2


@pytest.mark.slow
def test_a_cancelled_step_or_epoch_leaves_a_run_that_can_be_gone_on_with() -> None:
    class Cancels(UnsafeCallback):
        @on(StepBegin, AbstractTrainingPhase)
        def cancel(self, event: StepBegin, phase: Phase, learner: Any) -> None:
            place = learner.scope.parent.parent.feed.count if learner.scope.parent is not None else 0
            if place == 2 and learner.history[type(phase)].epochs == 0:
                raise CancelStepException
            if place == 2 and learner.history[type(phase)].epochs == 1:
                raise CancelEpochException

    assert_resumes_exactly(lambda: toy(Recorder(), Metrics(), Cancels()), epochs=3, at=[3, 4, 8, 12, 15])


def test_an_error_in_one_undo_or_handler_of_the_end_does_not_keep_the_others() -> None:
    done: list[str] = []

    class Resource(UnsafeCallback):
        def __init__(self, name: str, fails: bool) -> None:
            super().__init__(name=name)
            self.fails = fails

        @on(FitBegin)
        def begin(self, event: FitBegin, phase: Phase, learner: Any) -> None:
            learner.defer(self.close)

        @on(FitEnd)
        def end(self, event: FitEnd, phase: Phase, learner: Any) -> None:
            done.append(f"end {self.name}")
            if self.fails:
                raise OSError(f"end {self.name}")

        def close(self) -> None:
            done.append(f"close {self.name}")
            if self.fails:
                raise ValueError(f"close {self.name}")

    learner = toy(Resource("a", True), Resource("b", False), Resource("c", True))
    with pytest.raises(OSError, match="end a") as caught:
        learner.fit(1)
    assert sorted(done) == ["close a", "close b", "close c", "end a", "end b", "end c"]
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert "close a" in notes
    assert "close c" in notes
    assert "end c" in notes
    assert not learner._running.fitting
    assert learner.scope is None


def test_an_error_at_the_end_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    def fail(learner: Any) -> None:
        raise OSError("the report cannot be sent")

    with pytest.raises(OSError, match="the report"):
        toy(Checkpointer(tmp_path), CustomCallback(fail, FitEnd)).fit(2)
    assert Folder(tmp_path).files()[-1][0][0] == 2
    again = toy(Checkpointer(tmp_path))
    again.fit(3, resume=tmp_path)
    plain = toy()
    plain.fit(3)
    assert_same_bits(plain, again)


def test_counts_are_whole_numbers_also_after_a_resume(tmp_path: Path) -> None:
    for until in (1, 2):
        learner = toy(Recorder(), Metrics(), Checkpointer(tmp_path))
        learner.fit(until, resume=tmp_path)
    counts = learner.history[TrainingPhase]
    numbers = [counts.epochs, counts.steps, counts.steps_epoch, counts.updates[None], learner.history.cycles]
    assert numbers == [2, 6, 3, 6, 2]
    assert {type(number) for number in numbers} == {int}
    assert {type(row["epoch"]) for row in learner.history.rows()} == {int}


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_ctrl_c_between_any_two_batches_can_be_gone_on_from(step: int, tmp_path: Path) -> None:
    class Press(UnsafeCallback):
        @on(StepBegin, AbstractTrainingPhase)
        def press(self, event: StepBegin, phase: Phase, learner: Any) -> None:
            if learner.history[type(phase)].steps + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)

    toy(Recorder(), Press(), Checkpointer(tmp_path)).fit(2, resume=tmp_path)
    again = toy(Recorder(), Checkpointer(tmp_path))
    assert again.fit(2, resume=tmp_path).stop_reason is None
    plain = toy(Recorder())
    plain.fit(2)
    assert_same_bits(plain, again)


# What begins again


def test_begin_events_of_a_resumed_run_say_so_once(tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []

    class Tells(Callback):
        @on(FitBegin)
        def fit(self, event: FitBegin, phase: Phase, learner: Any) -> None:
            told.append(("fit", event.resumed))

        @on(EpochBegin)
        def epoch(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
            told.append((type(phase).__name__, event.resumed))

    class Crash(UnsafeCallback):
        @on(StepEnd, ValidationPhase)
        def crash(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            if learner.history[type(phase)].steps == 2:
                raise OSError("gone")

    def folder() -> Checkpointer:
        return Checkpointer(tmp_path, unit="second", every=1e-9)

    with pytest.raises(OSError, match="gone"):
        toy(Recorder(), Tells(), Crash(), folder()).fit(2, resume=tmp_path)
    assert told == [("fit", False), ("TrainingPhase", False), ("ValidationPhase", False)]
    told.clear()
    toy(Recorder(), Tells(), folder()).fit(2, resume=tmp_path)
    assert told == [
        ("fit", True),
        ("ValidationPhase", True),
        ("TrainingPhase", False),
        ("ValidationPhase", False),
    ]


def test_an_epoch_that_goes_on_loads_no_sample_twice(tmp_path: Path) -> None:
    loaded: list[int] = []

    class Loads(TensorDataset):
        def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
            loaded.append(int(index))
            return super().__getitem__(index)

    def learner(*callbacks: Callback) -> Learner[Any]:
        xs = torch.arange(8.0)[:, None]
        return toy(Recorder(), *callbacks, data=(DataLoader(Loads(xs, xs), batch_size=2, shuffle=True),))

    def fail(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].steps == 3:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        learner(CustomCallback(fail, StepEnd), Checkpointer(tmp_path, unit="step")).fit(1)
    assert len(loaded) == 6
    first = loaded[:4]  # those of the two steps that the checkpoint has
    loaded.clear()
    learner(Checkpointer(tmp_path, unit="step")).fit(1, resume=tmp_path)
    assert sorted(first + loaded) == list(range(8))


def test_a_phase_with_an_epoch_of_its_own_waits_for_its_end_and_says_so_once(tmp_path: Path) -> None:
    class Own(TrainingPhase):
        def epoch(self, learner: Any, data: Any) -> None:
            super().epoch(learner, data)

    class GoesOn(Own):
        resumable = True

    with pytest.warns(
        UserWarning, match=r"Own has an epoch\(\) of its own.*resumable = True.*written when an epoch ends"
    ) as t:
        toy(Checkpointer(tmp_path / "a", unit="step", keep_last=None)).fit(2, phases=[Own()])
    assert len(t) == 1
    assert {progress[1] for progress, _ in Folder(tmp_path / "a").files()} <= {0, 3, 6}
    toy(Checkpointer(tmp_path / "b", unit="step", keep_last=None)).fit(1, phases=[GoesOn()])
    assert {progress[1] for progress, _ in Folder(tmp_path / "b").files()} >= {1, 2, 3}


@pytest.mark.slow
def test_a_callback_that_ends_the_epoch_early_leaves_a_run_that_can_be_gone_on_with() -> None:
    class Short(UnsafeCallback):
        @on(StepEnd, AbstractTrainingPhase)
        def end(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            if learner.history[type(phase)].steps_epoch == 2:
                raise CancelEpochException

    assert_resumes_exactly(lambda: toy(Recorder(), Metrics(), Short()), epochs=2, at=[2, 4, 6, 9])


def test_the_state_cannot_be_asked_for_while_an_epoch_ends(tmp_path: Path) -> None:
    class AsksFirst(UnsafeCallback):
        """Runs before those that count the epoch and record its metrics."""

        @on(EpochEnd, AbstractTrainingPhase)
        def ask(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
            learner.save(tmp_path / "state.pt")

    with pytest.raises(CheckpointError, match=r"learner\.at_safe_point"):
        toy(AsksFirst(), Recorder(), Metrics()).fit(1)


def test_what_a_callback_saves_between_epochs_can_be_gone_on_from(tmp_path: Path) -> None:
    class Saves(UnsafeCallback):
        @on(CycleEnd)
        def save(self, event: CycleEnd, phase: Phase, learner: Any) -> None:
            learner.save(tmp_path / f"{learner.history.cycles}.pt")

    plain = toy(Recorder(), Metrics(), Saves())
    plain.fit(3)
    for epochs in (1, 2, 3):
        again = toy(Recorder(), Metrics())
        again.fit(3, resume=tmp_path / f"{epochs}.pt")
        assert_same_bits(plain, again)
        assert again.history.rows() == plain.history.rows()
