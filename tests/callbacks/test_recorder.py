from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from fluxloop import (
    AbstractTrainingPhase,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    Counts,
    CustomCallback,
    EpochBegin,
    EpochEnd,
    Learner,
    Metrics,
    MetricsPrinter,
    Recorder,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UpdateEnd,
    ValidationPhase,
    runepoch,
    runstep,
)
from fluxloop.testing import Coefficient, assert_observer, assert_order, toy_learner

pytestmark = pytest.mark.filterwarnings("ignore:.* did no step with them")


class FiveCriticSteps(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch) as (_, state):
            for name in ["critic"] * 5 + ["generator"]:
                with learner.optimizing(name) as block:
                    block.loss = getattr(learner.model, name)(state.xs).mean()


class Quiet(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        pass


def test_counts_are_zero_before_and_complete_after() -> None:
    learner = toy_learner(Recorder())
    assert learner.cbstate.history[TrainingPhase] == Counts(0, 0, 0, {})
    learner.fit(10)
    assert learner.cbstate.history[TrainingPhase] == Counts(epochs=10, steps=160, steps_epoch=16, updates={None: 160})
    assert learner.cbstate.history[ValidationPhase] == Counts(epochs=10, steps=160, steps_epoch=16, updates={})


def test_epochs_run_one_by_one_add_up() -> None:
    learner = toy_learner(Recorder())
    for _ in range(10):
        learner.epoch(TrainingPhase())
    assert learner.history[TrainingPhase] == Counts(10, 160, 16, {None: 160})


def test_updates_are_counted_by_the_optimizers_name() -> None:
    learner = Learner(
        {"generator": Coefficient(), "critic": Coefficient()},
        data=([torch.ones(2, 1)] * 3,),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=[Recorder()],
        default_callbacks=False,
    )
    learner.fit(2, phases=[FiveCriticSteps()])
    assert learner.history[FiveCriticSteps].updates == {"critic": 30, "generator": 6}
    assert learner.history[FiveCriticSteps].steps == 6


def test_cancelled_steps_are_not_counted() -> None:
    begun: list[int] = []

    def cancel_every_second(learner: Any) -> None:
        begun.append(1)
        if len(begun) % 2 == 0:
            raise CancelStepException

    learner = toy_learner(Recorder(), CustomCallback(cancel_every_second, StepBegin))
    learner.fit(1, phases=[TrainingPhase()])
    assert len(begun) == 16
    assert learner.history[TrainingPhase] == Counts(epochs=1, steps=8, steps_epoch=8, updates={None: 8})


@pytest.mark.parametrize(
    ("signal", "epochs"), [(CancelEpochException, 1), (CancelFittingException, 0), (RuntimeError, 0)]
)
def test_an_epoch_counts_when_it_ends_also_when_it_was_cancelled(signal: type[Exception], epochs: int) -> None:
    def cancel(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].steps == 5:
            raise signal("enough")

    learner = toy_learner(Recorder(), CustomCallback(cancel, StepBegin))
    with pytest.raises(RuntimeError, match="enough") if signal is RuntimeError else nullcontext():
        learner.fit(1, phases=[TrainingPhase()])
    assert learner.history[TrainingPhase] == Counts(epochs=epochs, steps=5, steps_epoch=5, updates={None: 5})


def test_a_step_that_a_later_handler_cancels_at_its_end_is_counted() -> None:
    def cancel(learner: Any) -> None:
        raise CancelFittingException("low loss")

    learner = toy_learner(Recorder(), CustomCallback(cancel, StepEnd))
    learner.fit(1)
    assert learner.history[TrainingPhase] == Counts(epochs=0, steps=1, steps_epoch=1, updates={None: 1})


def test_the_steps_of_an_epoch_are_counted_from_zero() -> None:
    seen: list[tuple[int, int]] = []

    def look(learner: Any) -> None:
        counts = learner.cbstate.history[TrainingPhase]
        seen.append((counts.steps, counts.steps_epoch))

    learner = toy_learner(Recorder(), *(CustomCallback(look, event, TrainingPhase) for event in (EpochBegin, EpochEnd)))
    learner.fit(2, phases=[TrainingPhase()])
    assert seen == [(0, 0), (16, 16), (16, 0), (32, 16)]


def test_an_epoch_inside_another_is_counted_apart() -> None:
    class ValidatesOften(TrainingPhase):
        def epoch(self, learner: Learner, data: Any) -> None:
            with runepoch(learner, self):
                for batch in data:
                    self.step(learner, batch)
                    learner.epoch(ValidationPhase())

    learner = toy_learner(Recorder(), num_batches=4)
    learner.fit(1, phases=[ValidatesOften()])
    assert learner.history[ValidatesOften] == Counts(1, 4, 4, {None: 4})
    assert learner.history[ValidationPhase] == Counts(4, 16, 4, {})


def test_a_phase_without_step_events_has_epochs_and_no_steps() -> None:
    learner = toy_learner(Recorder())
    learner.fit(3, phases=[Quiet()])
    assert learner.history[Quiet] == Counts(epochs=3, steps=0, steps_epoch=0, updates={})


def test_whoever_reads_the_counts_runs_after_they_were_made() -> None:
    seen: list[tuple[int, int]] = []

    def look(learner: Any) -> None:
        counts = learner.cbstate.history[TrainingPhase]
        seen.append((counts.steps, counts.updates.get(None, 0)))

    learner = toy_learner(
        CustomCallback(look, StepEnd, TrainingPhase, reads=("cbstate.history",), name="a reader"),
        CustomCallback(look, UpdateEnd, TrainingPhase, reads=("cbstate.history",), name="b reader"),
        MetricsPrinter(),
        Metrics(),
        Recorder(),
        num_batches=2,
    )
    assert_order(learner, Recorder, Metrics, MetricsPrinter)
    assert_order(learner, Recorder, "a reader")
    learner.fit(1, phases=[TrainingPhase()])
    assert seen == [(0, 1), (1, 1), (1, 2), (2, 2)]


def test_counting_changes_nothing() -> None:
    assert_observer(Recorder(), toy_learner)


def epochs_of(learner: Learner, phase: Any) -> list[int]:
    return [epoch for epoch, _ in learner.cbstate.metrics[phase].epochs["loss"]]


def test_values_stand_at_the_cycle_of_the_fit_in_which_they_were_recorded() -> None:
    class Later(TrainingPhase):
        pass

    learner = toy_learner(Recorder(), Metrics(), num_batches=2)
    learner.fit(4, phases=[TrainingPhase(), ValidationPhase(every=2)])
    learner.fit(2, phases=[Later(), ValidationPhase()])
    assert epochs_of(learner, TrainingPhase) == [1, 2, 3, 4]
    assert epochs_of(learner, Later) == [5, 6]
    assert epochs_of(learner, ValidationPhase) == [2, 4, 5, 6]
    assert learner.history[ValidationPhase].epochs == 4


def test_a_validation_outside_of_the_cycles_stands_at_the_training_before_it() -> None:
    learner = toy_learner(Recorder(), Metrics(), num_batches=2)
    learner.fit(3, phases=[TrainingPhase()])
    learner.fit(1, phases=[ValidationPhase()])
    learner.fit(2, phases=[TrainingPhase()])
    learner.epoch(ValidationPhase())
    learner.epoch(TrainingPhase())
    assert epochs_of(learner, TrainingPhase) == [1, 2, 3, 4, 5, 6]
    assert epochs_of(learner, ValidationPhase) == [3, 5]


def test_a_phase_that_runs_several_times_in_a_cycle_keeps_every_value() -> None:
    learner = toy_learner(Recorder(), Metrics(), num_batches=2)
    learner.fit(3, phases=[TrainingPhase()])
    learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), ValidationPhase()])
    assert epochs_of(learner, ValidationPhase) == [4, 5, 6, 7]
    assert len(learner.history["validation/loss"]) == 4


def test_a_fit_after_one_that_was_cut_in_a_cycle_stands_at_the_next_epoch() -> None:
    def stop(learner: Any) -> None:
        if not stopped and learner.cycle == 2:
            stopped.append(1)
            raise CancelFittingException("enough")

    stopped: list[int] = []
    learner = toy_learner(Recorder(), Metrics(), CustomCallback(stop, StepEnd, ValidationPhase), num_batches=2)
    learner.fit(4)
    learner.fit(2)
    assert epochs_of(learner, TrainingPhase) == [1, 2, 3, 4]
    assert epochs_of(learner, ValidationPhase) == [1, 3, 4]
