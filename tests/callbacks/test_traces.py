from __future__ import annotations

from typing import Any

import pytest
import torch

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CancelStepException,
    CustomCallback,
    Event,
    HandlerError,
    LossBegin,
    Metrics,
    MissingEntryError,
    Phase,
    Recorder,
    StateAccessError,
    StepEnd,
    Traces,
    TrainingPhase,
    ValidationPhase,
    on,
)
from fluxloop.testing import assert_observer, assert_order, toy_learner


def loss(learner: Any) -> Any:
    return learner.step.loss


def rows(learner: Any) -> int:
    return len(learner.step.xs)


def traced(learner: Any, phase: Any, name: str) -> list[Any]:
    return [value for _, value in learner.cbstate.traces[phase][name]]


class Zebra(Callback):
    writes = ("step.mark",)

    @on(StepEnd)
    def mark(self, event: Event, phase: Phase, learner: Any) -> None:
        learner.step.mark = "z"


def test_functions_of_every_step_are_recorded_by_phase_name_and_step() -> None:
    learner = toy_learner(Traces({"loss": loss, "rows": rows}), num_batches=3)
    learner.fit(2)
    for phase in (TrainingPhase, ValidationPhase):
        assert [step for step, _ in learner.cbstate.traces[phase]["loss"]] == [1, 2, 3, 4, 5, 6]
        assert traced(learner, phase, "rows") == [8] * 6
    assert len(traced(learner, TrainingPhase, "loss")) == 6


def test_the_values_are_those_of_a_hand_written_loop() -> None:
    learner = toy_learner(Traces({"loss": loss, "value": lambda learner: learner.model.value}), num_batches=4)
    learner.fit(1, phases=[TrainingPhase()])
    value = torch.zeros(1, requires_grad=True)
    losses, values = [], []
    for xs, ys in learner.data.training:
        value.grad = None
        out = torch.nn.functional.l1_loss(xs * value, ys)
        out.backward()
        with torch.no_grad():
            value -= 0.001 * value.grad
        losses.append(out.item())
        values.append(value.item())
    assert [v.item() for v in traced(learner, TrainingPhase, "loss")] == losses
    assert [v.item() for v in traced(learner, TrainingPhase, "value")] == values


def test_tensors_are_kept_without_their_graph_and_not_changed_later() -> None:
    learner = toy_learner(
        Traces({"preds": lambda learner: learner.step.preds, "w": lambda learner: learner.model.value})
    )
    learner.fit(1, phases=[TrainingPhase()])
    assert not any(value.requires_grad for value in traced(learner, TrainingPhase, "preds"))
    assert len({value.item() for value in traced(learner, TrainingPhase, "w")}) == 16


@pytest.mark.parametrize(("phase", "other"), [(TrainingPhase, ValidationPhase), (ValidationPhase, TrainingPhase)])
def test_traces_of_a_phase_are_recorded_there_alone(phase: Any, other: Any) -> None:
    learner = toy_learner(Traces({"loss": loss}, phase=phase))
    learner.fit(1)
    assert len(traced(learner, phase, "loss")) == 16
    assert other not in learner.cbstate.traces


def test_an_abstract_phase_stands_for_its_subclasses() -> None:
    learner = toy_learner(Traces({"loss": loss}, phase=AbstractTrainingPhase))
    learner.fit(1)
    assert list(learner.cbstate.traces) == [TrainingPhase]


def test_it_reads_everything_and_runs_after_whoever_writes() -> None:
    functions = {
        "steps": lambda learner: learner.cbstate.history[TrainingPhase].steps,
        "mark": lambda learner: learner.step.mark,
    }
    learner = toy_learner(Traces(functions), Zebra(), Metrics(), Recorder(), num_batches=2)
    assert_order(learner, Recorder, Metrics, Traces)
    assert_order(learner, Zebra, Traces)
    learner.fit(1, phases=[TrainingPhase()])
    assert traced(learner, TrainingPhase, "steps") == [1, 2]
    assert traced(learner, TrainingPhase, "mark") == ["z", "z"]


def test_what_it_published_can_be_read_by_others() -> None:
    seen: list[int] = []
    reader = CustomCallback(
        lambda learner: seen.append(len(learner.cbstate.traces[TrainingPhase]["rows"])),
        StepEnd,
        TrainingPhase,
        reads=("cbstate.traces",),
        name="a reader",
    )
    learner = toy_learner(reader, Traces({"rows": rows}), num_batches=3)
    assert_order(learner, Traces, "a reader")
    learner.fit(1)
    assert seen == [1, 2, 3]


def test_a_function_writes_nothing() -> None:
    def spoil(learner: Any) -> None:
        learner.step.loss = 0

    with pytest.raises(StateAccessError, match=r"Traces tried to write 'step\.loss' at StepEnd"):
        toy_learner(Traces({"spoil": spoil})).fit(1)


def test_declared_reads_are_held_to() -> None:
    learner = toy_learner(Traces({"rows": rows}, reads=("step.xs",)))
    learner.fit(1)
    assert len(traced(learner, TrainingPhase, "rows")) == 16
    with pytest.raises(StateAccessError, match=r"Traces tried to read 'step\.loss'"):
        toy_learner(Traces({"loss": loss}, reads=("step.xs",))).fit(1)


def test_an_entry_that_a_phase_does_not_store_says_what_there_is() -> None:
    with pytest.raises(MissingEntryError, match="The step has no entry 'z'; it has: grads, loss, preds, xs, ys"):
        toy_learner(Traces({"z": lambda learner: learner.step.z})).fit(1)


def test_cancelled_steps_are_not_traced() -> None:
    def cancel(learner: Any) -> None:
        raise CancelStepException

    learner = toy_learner(Traces({"loss": loss}), CustomCallback(cancel, LossBegin, TrainingPhase))
    learner.fit(1)
    assert list(learner.cbstate.traces) == [ValidationPhase]


def test_two_with_names_of_their_own_trace_side_by_side() -> None:
    learner = toy_learner(
        Traces({"rows": rows}, phase=TrainingPhase, name="first"), Traces({"loss": loss}, name="second"), num_batches=3
    )
    learner.fit(1)
    assert traced(learner, TrainingPhase, "rows") == [8, 8, 8]
    assert len(traced(learner, TrainingPhase, "loss")) == len(traced(learner, ValidationPhase, "loss")) == 3


@pytest.mark.parametrize("functions", [{}, {"loss": 3}, {"loss": None}])
def test_without_functions_there_is_nothing_to_trace(functions: Any) -> None:
    with pytest.raises(ValueError, match=r"Traces\(.*\) was given; expected functions by name: Traces\("):
        Traces(functions)


def test_repr_lists_what_is_traced() -> None:
    assert repr(Traces({"loss": loss, "rows": rows})) == "Traces(loss, rows)"


def test_tracing_changes_nothing() -> None:
    assert_observer(Traces({"loss": loss, "drawn": lambda learner: torch.rand(1)}), toy_learner)


def test_a_function_with_other_arguments_is_refused_when_it_is_given() -> None:
    with pytest.raises(
        HandlerError, match=r"the function 'loss' of Traces has the arguments \(\); expected \(learner\)"
    ):
        Traces({"loss": lambda: 1})  # type: ignore[dict-item, misc]  # that is the test


def test_traces_added_in_a_later_fit_stand_at_the_steps_of_their_phase() -> None:
    learner = toy_learner(Recorder(), num_batches=3)
    learner.fit(2)
    learner.add_callback(Traces({"rows": lambda learner: len(learner.step.xs)}))
    learner.fit(1)
    for phase in (TrainingPhase, ValidationPhase):
        assert [step for step, _ in learner.cbstate.traces[phase]["rows"]] == [7, 8, 9]


def test_traces_of_two_phases_of_one_class_are_kept_apart() -> None:
    learner = toy_learner(Recorder(), Traces({"rows": lambda learner: len(learner.step.xs)}), num_batches=3)
    noisy = ValidationPhase(name="noisy")
    learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), noisy])
    assert len(learner.cbstate.traces[noisy]["rows"]) == len(learner.cbstate.traces[ValidationPhase]["rows"]) == 6
