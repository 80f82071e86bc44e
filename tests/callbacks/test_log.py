from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from matplotlib.figure import Figure as Drawing
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy, l1_loss

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    AveragedValidationPhase,
    Callback,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    CustomCallback,
    EpochBegin,
    KNNProbe,
    Learner,
    LearningRate,
    LossBegin,
    Metric,
    Metrics,
    MissingProducerError,
    Momentum,
    Phase,
    Recorder,
    SampleImages,
    Scheduler,
    StepBegin,
    TensorBatches,
    Traces,
    TrainingPhase,
    ValidationPhase,
    on,
)
from fluxloop.callbacks.log import (
    LogCallback,
    LogHyperParams,
    LogMetrics,
    LogTraces,
)
from fluxloop.callbacks.log_pictures import LogHistograms, LogImages, LogVisualization
from fluxloop.errors import CallbackTypeError, LogExistsError
from fluxloop.history import History
from fluxloop.logging import (
    CSV,
    JSONL,
    Histogram,
    Image,
    Memory,
    MLflow,
    Scalar,
    TensorBoard,
    WandB,
    log_to,
)
from fluxloop.logging.wandb import offline_rows
from fluxloop.testing import assert_observer, assert_order, toy_learner

STEPS = 4
toy = partial(toy_learner, num_batches=STEPS)


def by_hand(epochs: int) -> tuple[list[float], list[float], list[float]]:
    """Train in plain PyTorch; give the loss of each step, the mean of each epoch, and that of validation."""
    value, data = torch.zeros(1, requires_grad=True), list(toy().data.training)
    steps, epoch_means, validation = [], [], []
    for _ in range(epochs):
        for xs, ys in data:
            value.grad = None
            loss = l1_loss(xs * value, ys)
            loss.backward()
            with torch.no_grad():
                value -= 0.001 * value.grad
            steps.append(loss.item())
        epoch_means.append(sum(steps[-STEPS:]) / STEPS)
        with torch.no_grad():
            validation.append(sum(l1_loss(xs * value, ys).item() for xs, ys in data) / STEPS)
    return steps, epoch_means, validation


# Metrics


def test_the_logged_metrics_are_those_of_a_hand_written_loop() -> None:
    memory = Memory()
    toy(Recorder(), Metrics(), LogMetrics(memory)).fit(3)
    steps, epochs, validation = by_hand(3)
    assert memory.series("step/training/loss") == list(enumerate(steps, 1))
    assert memory.names == ["step/training/loss", "epoch/training/loss", "epoch/validation/loss"]
    for name, values in (("training", epochs), ("validation", validation)):
        found = memory.series(f"epoch/{name}/loss")
        assert [epoch for epoch, _ in found] == [1, 2, 3]
        assert [value for _, value in found] == pytest.approx(values, rel=1e-6)


def test_epoch_values_are_those_of_the_history() -> None:
    memory = Memory()
    learner = toy(Recorder(), Metrics(), LogMetrics(memory))
    history = learner.fit(2)
    assert [value for _, value in memory.series("epoch/validation/loss")] == history["validation/loss"]


def test_every_so_many_steps_are_logged_and_validation_steps_where_asked() -> None:
    few, both = Memory(), Memory()
    toy(Recorder(), Metrics(), LogMetrics(few, every=3), LogMetrics(both, phase=Phase, name="both")).fit(2)
    assert [step for step, _ in few.series("step/training/loss")] == [3, 6]
    assert [step for step, _ in both.series("step/training/loss")] == list(range(1, 9))
    assert [step for step, _ in both.series("step/validation/loss")] == list(range(1, 9))


def test_nothing_is_logged_for_a_validation_that_does_not_happen() -> None:
    memory = Memory()
    data = (toy().data.training,)
    toy(Recorder(), Metrics(), LogMetrics(memory), data=data).fit(2)
    toy(Recorder(), Metrics(), LogMetrics(memory)).fit(1, phases=[TrainingPhase()])
    assert not any("validation" in name for name in memory.names)


def test_the_steps_of_two_training_phases_stand_on_one_axis() -> None:
    class Other(TrainingPhase):
        pass

    memory = Memory()
    toy(Recorder(), Metrics(), LogMetrics(memory)).fit(2, phases=[TrainingPhase(), Other()])
    first, second = (memory.series(f"step/{name}/loss") for name in ("TrainingPhase", "Other"))
    assert [step for step, _ in first] == [*range(1, STEPS + 1), *range(2 * STEPS + 1, 3 * STEPS + 1)]
    assert sorted(step for step, _ in [*first, *second]) == list(range(1, 4 * STEPS + 1))


class Shifted(ValidationPhase):
    def step(self, learner: Any, batch: Any) -> Any:
        return super().step(learner, (batch[0], batch[1] + 5))


def test_two_phases_on_one_data_are_logged_apart_and_the_only_one_by_its_data() -> None:
    memory = Memory()
    learner = toy(Recorder(), Metrics(), LogMetrics(memory))
    learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), Shifted()])
    assert {name for name in memory.names if name.startswith("epoch")} == {
        "epoch/training/loss",
        "epoch/ValidationPhase/loss",
        "epoch/Shifted/loss",
    }
    assert [value for _, value in memory.series("epoch/Shifted/loss")] == learner.history["Shifted/loss"]


def test_a_series_keeps_its_name_when_a_second_phase_joins_in_a_later_fit() -> None:
    memory = Memory()
    learner = toy(Recorder(), Metrics(), LogMetrics(memory))
    learner.fit(2)
    learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), Shifted()])
    assert [epoch for epoch, _ in memory.series("epoch/validation/loss")] == [1, 2, 3, 4]
    assert [epoch for epoch, _ in memory.series("epoch/Shifted/loss")] == [3, 4]


def test_a_sparse_validation_is_logged_at_the_epochs_it_belongs_to() -> None:
    memory = Memory()
    toy(Recorder(), Metrics(), LogMetrics(memory)).fit(7, phases=[TrainingPhase(), ValidationPhase(every=3)])
    assert [epoch for epoch, _ in memory.series("epoch/validation/loss")] == [3, 6, 7]


def test_a_cancelled_step_is_not_logged_and_a_cancelled_epoch_is_logged_once() -> None:
    def cancel(learner: Any) -> None:
        if len(memory.records) == 2:
            memory.records.append(memory.records[0])
            raise CancelStepException
        if len(memory.records) == 5:
            raise CancelEpochException

    memory = Memory()
    learner = toy(Recorder(), Metrics(), LogMetrics(memory), CustomCallback(cancel, LossBegin, TrainingPhase))
    learner.fit(1)
    steps = memory.series("step/training/loss")
    assert [step for step, _ in steps] == [1, 2, 1, 3]
    assert [epoch for epoch, _ in memory.series("epoch/training/loss")] == [1]


def test_an_epoch_that_was_cancelled_when_it_began_logs_no_value_again() -> None:
    def cancel(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].epochs:
            raise CancelEpochException

    memory = Memory()
    learner = toy(Recorder(), Metrics(), LogMetrics(memory), CustomCallback(cancel, EpochBegin, TrainingPhase))
    learner.fit(3, phases=[TrainingPhase()])
    assert learner.history[TrainingPhase].epochs > 1
    assert [epoch for epoch, _ in memory.series("epoch/training/loss")] == [1]


def test_what_probes_and_averages_record_is_logged_under_its_name() -> None:
    memory = Memory()
    learner = classifier(KNNProbe("model", k=3), EMA("model", 0.5), LogMetrics(memory))
    learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), AveragedValidationPhase()])
    assert [epoch for epoch, _ in memory.series("epoch/validation/knn_model")] == [1, 2]
    assert [value for _, value in memory.series("epoch/validation/loss@ema")] == learner.history["validation/loss@ema"]


def test_metrics_that_are_no_numbers_are_left_out() -> None:
    class Table:
        def __init__(self) -> None:
            self.reset()

        def reset(self) -> None:
            self.table = torch.zeros(2, 2)

        def update(self, preds: Any, ys: Any) -> None:
            self.table += 1

        def compute(self) -> Any:
            return self.table

    memory = Memory()
    learner = toy(Recorder(), Metrics(Metric(Table(), "table")), LogMetrics(memory))
    with pytest.warns(UserWarning, match="the metrics 'table' .* are kept in the history"):
        learner.fit(1)
    assert not any("table" in name for name in memory.names)


def test_two_with_backends_of_their_own_log_the_same() -> None:
    first, second = Memory(), Memory()
    learner = toy(Recorder(), Metrics(), LogMetrics(first, name="a"), LogMetrics(second, name="b"))
    learner.fit(1)
    assert first.records == second.records
    assert len(first.records) == STEPS + 2
    assert_order(learner, Recorder, Metrics, "a")


def test_numbers_that_reach_the_host_later_stand_at_the_step_that_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    learner = toy(Recorder(), Metrics(), LogMetrics(memory))
    waiting: list[tuple[Any, Any]] = []
    queue = learner._host_queue

    def deliver() -> None:
        while waiting:
            tensor, then = waiting.pop(0)
            then(tensor.item())

    monkeypatch.setattr(queue, "request", lambda tensor, then: waiting.append((tensor.clone(), then)))
    monkeypatch.setattr(queue, "flush", deliver)
    learner.fit(2)
    assert memory.series("step/training/loss") == list(enumerate(by_hand(2)[0], 1))


def test_an_epoch_outside_of_a_fit_is_logged_and_written_when_it_ends(tmp_path: Path) -> None:
    backend = JSONL(tmp_path / "log.jsonl")
    learner = toy(Recorder(), Metrics(), LogMetrics(backend))
    learner.epoch(TrainingPhase())
    assert read_jsonl(backend.path)["step/training/loss"] == list(enumerate(by_hand(1)[0], 1))


def test_evaluation_and_prediction_log_nothing() -> None:
    memory = Memory()
    learner = toy(Recorder(), Metrics(), LogMetrics(memory), LogHistograms(memory, every=1))
    learner.evaluate()
    learner.predict(learner.data.validation)
    assert memory.records == []


def test_a_second_fit_goes_on_in_the_same_log(tmp_path: Path) -> None:
    backend = JSONL(tmp_path / "log.jsonl")
    learner = toy(Recorder(), Metrics(), LogMetrics(backend))
    learner.fit(1)
    learner.fit(1)
    assert read_jsonl(backend.path)["step/training/loss"] == list(enumerate(by_hand(2)[0], 1))


# What every one of them keeps to


def classifier(*given: Callback) -> Learner:
    """Make a learner of two layers, with batch norm and dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4, 3))
    xs = torch.rand(32, 3, generator=torch.Generator().manual_seed(0))
    batches = TensorBatches(xs, torch.arange(32) % 3, batch_size=8, shuffle=True)
    return Learner(
        model,
        cross_entropy,
        data=(batches, batches),
        optimizer=torch.optim.Adam,
        callbacks=[Recorder(), Metrics(), *given],
        default_callbacks=False,
        seed=1,
    )


def draw(step: Any) -> Any:
    return torch.rand(3, 4, 4)


ALL: dict[str, Callable[..., LogCallback]] = {
    "LogMetrics": LogMetrics,
    "LogHyperParams": partial(LogHyperParams, params={"lr": 0.1}),
    "LogHistograms": partial(LogHistograms, every=2),
    "LogVisualization": partial(LogVisualization, draw, every=2),
}


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("name", ALL)
def test_logging_changes_no_weight(name: str) -> None:
    assert_observer(ALL[name](Memory()), classifier)


@pytest.mark.parametrize("name", ALL)
def test_there_must_be_a_backend(name: str) -> None:
    with pytest.raises(CallbackTypeError, match=rf"{name} was given nothing to log to; expected a backend"):
        ALL[name]()
    with pytest.raises(CallbackTypeError, match=rf"{name} was given 'log\.csv' to log to; expected a backend"):
        ALL[name]("log.csv")
    assert len(ALL[name]([Memory(), Memory()]).backends) == 2


@pytest.mark.parametrize("name", ALL)
def test_its_repr_names_where_it_logs_to(name: str) -> None:
    shown = repr(ALL[name](CSV("log.csv")))
    assert shown.startswith(f"{name}(")
    assert shown.endswith("CSV('log.csv'))")


@pytest.mark.parametrize("cls", [LogMetrics, LogHistograms, partial(LogVisualization, draw)])
def test_a_number_of_steps_is_at_least_one(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"every=0\) was given; expected a whole number, 1 or more"):
        cls(Memory(), every=0)


def leave(error: BaseException) -> CustomCallback:
    def throw(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].steps == 2:
            raise error

    return CustomCallback(throw, StepBegin, TrainingPhase, reads=("cbstate.history",))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("broken"), KeyboardInterrupt(), CancelFittingException("enough")],
    ids=lambda e: type(e).__name__,
)
def test_in_every_outcome_what_was_logged_is_written_and_the_backend_closed(
    error: BaseException, tmp_path: Path
) -> None:
    text, board = JSONL(tmp_path / "log.jsonl"), TensorBoard(tmp_path / "board")
    learner = toy(Recorder(), Metrics(), LogMetrics(text, board), LogHyperParams(board, params={"a": 1}), leave(error))
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="broken"):
            learner.fit(1)
    else:
        learner.fit(1)
    assert board.writer is None
    expected = list(enumerate(by_hand(1)[0][:2], 1))
    assert read_jsonl(text.path)["step/training/loss"] == expected
    assert read_board(board.folder)["step/training/loss"] == expected  # the toy's losses fit into 32 bits


def test_what_was_logged_is_written_when_each_epoch_ends(tmp_path: Path) -> None:
    seen: list[int] = []
    backend = CSV(tmp_path / "log.csv")

    def count(learner: Any) -> None:
        seen.append(len(backend.path.read_text().splitlines()))

    look = CustomCallback(count, EpochBegin, ValidationPhase, reads=())
    toy(Recorder(), Metrics(), LogMetrics(backend), look).fit(1)
    assert seen == [1 + STEPS + 1]


def test_a_refused_fit_has_trained_nothing_and_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("of somebody\n")
    learner = toy(Recorder(), Metrics(), LogMetrics(CSV(tmp_path / "log.csv")))
    with pytest.raises(LogExistsError, match="earlier run's log"):
        learner.fit(1)
    assert learner.model.value.item() == 0
    assert (tmp_path / "log.csv").read_text() == "of somebody\n"


# Hyperparameters


class Publish(Callback):
    """Publish a value for every other training step, as a scheduler does."""

    writes = ("cbstate.hyperparameters",)
    run_after = (Recorder,)

    def init(self, learner: Any) -> None:
        self.steps = 0
        learner.cbstate.hyperparameters = {}

    @on(StepBegin, AbstractTrainingPhase)
    def set(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        self.steps += 1
        if self.steps % 2:
            table = learner.cbstate.hyperparameters
            table.setdefault("learning_rate", []).append((self.steps, 1 / self.steps))
            table.setdefault("betas", []).append((self.steps, (0.9, 0.99)))


def test_given_hyperparameters_are_logged_once_and_scheduled_ones_when_they_are_set() -> None:
    memory = Memory()
    learner = toy(Recorder(), Publish(), LogHyperParams(memory, params={"model": {"width": 8}}))
    learner.fit(1)
    learner.fit(1)
    assert [record.loggable.values for record in memory.records if record.name == "hyperparameters"] == [  # type: ignore[attr-defined]
        {"model.width": 8}
    ]
    expected = [(step, 1 / step) for step in (1, 3, 5, 7)]
    assert memory.series("step/hyperparameters/learning_rate") == expected
    assert_order(learner, Publish, LogHyperParams)


def test_hyperparameters_and_traces_are_logged_in_training_with_its_steps() -> None:
    memory = Memory()
    traces = Traces({"rows": lambda learner: len(learner.step.xs)})
    toy(Recorder(), Publish(), traces, LogHyperParams(memory), LogTraces(memory)).fit(3)  # with validation
    assert [step for step, _ in memory.series("step/hyperparameters/learning_rate")] == list(range(1, 3 * STEPS, 2))
    assert [step for step, _ in memory.series("step/traces/rows")] == list(range(1, 3 * STEPS + 1))


def test_without_a_scheduler_there_is_nothing_scheduled_to_log() -> None:
    memory = Memory()
    toy(Recorder(), LogHyperParams(memory, params={"lr": 0.1})).fit(1)
    assert memory.names == ["hyperparameters"]
    toy(Recorder(), LogHyperParams(empty := Memory())).fit(1)
    assert empty.records == []


# Traces


def test_numbers_and_loggables_are_logged_and_other_traces_are_not() -> None:
    memory = Memory()
    traces = Traces(
        {
            "loss": lambda learner: learner.step.loss,
            "rows": lambda learner: len(learner.step.xs),
            "preds": lambda learner: learner.step.preds,
            "spread": lambda learner: Histogram(learner.step.preds),
        }
    )
    toy(Recorder(), traces, LogTraces(memory)).fit(1)
    names = ["loss", "rows", "spread"]
    assert memory.names == [f"step/traces/{at}{name}" for at in ("", "validation/") for name in names]
    assert memory.series("step/traces/loss") == list(enumerate(by_hand(1)[0], 1))


def test_traces_of_a_validation_are_logged_over_its_own_steps() -> None:
    memory = Memory()
    traces = Traces({"loss": lambda learner: learner.step.loss}, phase=ValidationPhase)
    learner = toy(Recorder(), traces, LogTraces(memory))
    learner.fit(4, phases=[TrainingPhase(), ValidationPhase(every=2)])
    recorded = [(step, value.item()) for step, value in learner.cbstate.traces[ValidationPhase]["loss"]]
    assert memory.names == ["step/traces/validation/loss"]
    assert memory.series("step/traces/validation/loss") == recorded
    assert [step for step, _ in recorded] == list(range(1, 2 * STEPS + 1))


def test_traces_of_two_phases_on_one_data_are_logged_apart() -> None:
    memory = Memory()
    traces = Traces({"loss": lambda learner: learner.step.loss})
    learner = toy(Recorder(), traces, LogTraces(memory))
    learner.fit(1, phases=[TrainingPhase(), ValidationPhase(), Shifted(name="shifted")])
    for name in ("ValidationPhase", "shifted"):
        logged = [value for _, value in memory.series(f"step/traces/{name}/loss")]
        assert logged == [value.item() for _, value in learner.cbstate.traces[named(learner, name)]["loss"]]
    assert len(memory.series("step/traces/loss")) == STEPS


def named(learner: Learner, name: str) -> Any:
    return next(phase for phase in learner.cbstate.traces if phase.__name__ == name)


def test_what_is_scheduled_from_a_later_fit_on_stands_at_the_steps_of_the_training() -> None:
    memory = Memory()
    learner = toy(Recorder(), Scheduler({LearningRate: 0.1}), LogHyperParams(memory))
    learner.fit(1)
    learner.add_callback(Scheduler({Momentum: 0.5}, name="later"))
    learner.fit(1)
    rates, momenta = (memory.series(f"step/hyperparameters/{name}") for name in ("learning_rate", "momentum"))
    assert [step for step, _ in rates] == list(range(1, 2 * STEPS + 1))
    assert [step for step, _ in momenta] == list(range(STEPS + 1, 2 * STEPS + 1))


def test_without_traces_it_says_who_would_trace() -> None:
    with pytest.raises(MissingProducerError, match="Traces"):
        toy(Recorder(), LogTraces(Memory()))


# Histograms


def test_histograms_of_weights_gradients_and_activations_are_those_of_the_step() -> None:
    memory = Memory()
    learner = classifier(LogHistograms(memory, every=4))
    learner.fit(2, phases=[TrainingPhase()])
    assert sorted({record.step for record in memory.records}) == [4, 8]
    last = {(record.group[1], record.name): record.loggable.values for record in memory.records if record.step == 8}  # type: ignore[attr-defined]
    parameters = [name for name, _ in learner.model.named_parameters()]
    assert [name for group, name in last if group == "weights"] == parameters
    assert [name for group, name in last if group == "gradients"] == parameters
    assert [name for group, name in last if group == "activations"] == ["0", "1", "2", "3", "4"]
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(last["weights", name], parameter.detach().flatten())
    assert torch.equal(last["activations", "4"], learner.step.preds.flatten())
    assert (last["activations", "1"] < 0).any()  # as it was before ReLU changed it in place
    assert (last["activations", "2"] >= 0).all()


def test_the_gradients_are_those_of_a_hand_written_step() -> None:
    memory = Memory()
    learner = toy(Recorder(), LogHistograms(memory, of=("gradients",), every=1))
    learner.fit(1, phases=[TrainingPhase()])
    value = torch.zeros(1, requires_grad=True)
    for (xs, ys), record in zip(learner.data.training, memory.records, strict=True):
        value.grad = None
        l1_loss(xs * value, ys).backward()
        assert torch.equal(record.loggable.values, value.grad)  # type: ignore[attr-defined]
        with torch.no_grad():
            value -= 0.001 * value.grad


def test_a_pattern_chooses_names_and_models_have_theirs_before_them() -> None:
    models = {"G": nn.Linear(2, 1), "D": nn.Linear(1, 1)}

    class Both(TrainingPhase):
        def step(self, learner: Any, batch: Any) -> None:
            from fluxloop import runstep

            with runstep(learner, self, xs=batch) as (_, state):
                for name in ("G", "D"):
                    with learner.optimizing(name) as block:
                        block.loss = learner.model.D(learner.model.G(state.xs)).mean()

    memory = Memory()
    logger = LogHistograms(memory, every=1, pattern=r"^G|weight$")
    learner = Learner(models, data=(torch.rand(8, 2),), callbacks=[Recorder(), logger], default_callbacks=False)
    learner.fit(1, phases=[Both()])
    assert set(memory.names) == {
        "step/weights/G.weight",
        "step/weights/G.bias",
        "step/weights/D.weight",
        "step/gradients/G.weight",
        "step/gradients/G.bias",
        "step/gradients/D.weight",
        "step/activations/G",
    }


@pytest.mark.parametrize("error", [RuntimeError("broken"), CancelStepException(), KeyboardInterrupt(), None])
def test_the_hooks_are_there_in_the_steps_that_are_logged_alone(error: BaseException | None) -> None:
    hooks: list[int] = []

    def count(learner: Any) -> None:
        hooks.append(len(learner.model._forward_hooks))
        if error is not None and len(hooks) == 2:
            raise error

    look = CustomCallback(count, LossBegin, TrainingPhase, reads=("model",))
    learner = toy(Recorder(), look, LogHistograms(Memory(), every=2))
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="broken"):
            learner.fit(1)
    else:
        learner.fit(1)
    assert hooks[:2] == [0, 1]
    assert not learner.model._forward_hooks


def test_only_what_is_asked_for_is_logged() -> None:
    memory = Memory()
    toy(Recorder(), LogHistograms(memory, of="weights", every=STEPS)).fit(1)
    assert memory.names == ["step/weights/value"]
    with pytest.raises(ValueError, match=r"of=\('biases',\)\) was given; expected some of weights, gradients"):
        LogHistograms(memory, of=("biases",))  # type: ignore[arg-type]  # that is the point


# Pictures


def test_a_picture_of_the_step_is_logged_every_so_many_training_steps() -> None:
    def inputs(step: Any) -> Any:
        return step.xs.reshape(2, 1, 2, 2) / 100

    memory = Memory()
    toy(Recorder(), LogVisualization(inputs, memory, every=2), batch_size=8).fit(2)
    assert [(record.step, record.group, record.name) for record in memory.records] == [
        (step, ("step", "visualization"), "inputs") for step in (2, 4, 6, 8)
    ]
    assert all(isinstance(record.loggable, Image) for record in memory.records)


def test_a_picture_may_be_a_figure_a_loggable_or_nothing() -> None:
    made = [Drawing(), Scalar(3), None, torch.zeros(2, 2)]
    memory = Memory()
    toy(Recorder(), LogVisualization(lambda step: made.pop(0), memory, every=1, name="look")).fit(1)
    assert [type(record.loggable).__name__ for record in memory.records] == ["Figure", "Scalar", "Image"]
    assert memory.names == ["step/visualization/look"]


def test_what_cannot_be_shown_is_an_error_that_says_what_can() -> None:
    learner = toy(Recorder(), LogVisualization(lambda step: object(), Memory(), every=1))
    with pytest.raises(TypeError, match="cannot be logged; expected an image"):
        learner.fit(1)
    with pytest.raises(CallbackTypeError, match=r"LogVisualization\(a Memory, .*expected a function first"):
        LogVisualization(Memory(), Memory())  # type: ignore[arg-type]  # that is the point


def test_sampled_images_are_logged_in_the_epochs_in_which_they_are_made() -> None:
    memory = Memory()
    sample = SampleImages("model", shape=(1, 1, 3), folder=None, every=2)
    learner = classifier(sample, LogImages(memory))
    learner.fit(5)
    assert [(record.step, record.group, record.name) for record in memory.records] == [
        (2, ("epoch", "images"), "model"),
        (4, ("epoch", "images"), "model"),
    ]
    assert torch.equal(memory.records[-1].loggable.pixels, learner.cbstate.images["model"])  # type: ignore[attr-defined]


# Resume


def read_jsonl(path: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found.setdefault("/".join((*row["group"], row["name"])), []).append((row["step"], row["value"]))
    return found


def read_csv(path: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines()[1:]:
        step, group, name, value = line.split(",")
        found.setdefault(f"{group}/{name}", []).append((int(step), float(value)))
    return found


def read_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    # files begun in one second are read in the order of their names as texts
    return {tag: sorted((event.step, event.value) for event in found.Scalars(tag)) for tag in found.Tags()["scalars"]}


def read_mlflow(folder: Path) -> dict[str, list[tuple[int, float]]]:
    client = MlflowClient(tracking_uri=folder.as_uri())
    (run,) = client.search_runs(["0"])
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }


def read_wandb(folder: Path) -> dict[str, list[tuple[int, float]]]:
    wandb.teardown()  # its process has written everything when it has ended
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        for row in offline_rows(path):
            for name, value in row.items():
                if "/" in name:
                    found.setdefault(name, []).append((row[name.partition("/")[0]], value))
    return found


def make_wandb(folder: Path) -> WandB:
    folder.mkdir(exist_ok=True)
    return WandB("tests", mode="offline", dir=str(folder))


BACKENDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], dict[str, list[tuple[int, float]]]]]] = {
    "csv": (CSV, read_csv),
    "jsonl": (JSONL, read_jsonl),
    "tensorboard": (TensorBoard, read_board),
    "mlflow": (lambda folder: MLflow(tracking_uri=folder.as_uri()), read_mlflow),
    "wandb": (make_wandb, read_wandb),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKENDS)
def test_a_resumed_log_equals_that_of_a_run_that_was_never_stopped(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    make, read = BACKENDS[kind]

    def loggers(place: Path) -> tuple[LogMetrics, LogTraces]:
        backend = make(place)
        return LogMetrics(backend), LogTraces(backend)

    def learner_with(*given: Callback) -> Learner:
        return toy(Recorder(), Metrics(), Traces({"rows": lambda learner: len(learner.step.xs)}), *given)

    learner_with(*loggers(tmp_path / "whole")).fit(2)

    killed = loggers(tmp_path / "resumed")
    learner = learner_with(*killed)
    learner.fit(1)
    learner.save(tmp_path / "state.pt")
    learner.fit(1)  # which nobody will remember
    if kind == "wandb":
        wandb.teardown()  # the process that is killed takes wandb's with it

    learner_with(*loggers(tmp_path / "resumed")).fit(2, resume=tmp_path / "state.pt")

    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "resumed")
    assert whole == resumed
    assert [step for step, _ in whole["step/training/loss"]] == list(range(1, 2 * STEPS + 1))
    assert [step for step, _ in whole["epoch/validation/loss"]] == [1, 2]
    assert [step for step, _ in whole["step/traces/rows"]] == list(range(1, 2 * STEPS + 1))


def test_given_hyperparameters_are_not_logged_again_by_a_resumed_run(tmp_path: Path) -> None:
    def logger() -> LogHyperParams:
        return LogHyperParams(JSONL(tmp_path / "log.jsonl"), params={"lr": 0.1})

    first = toy(Recorder(), Publish(), logger())
    first.fit(1)
    first.save(tmp_path / "state.pt")
    toy(Recorder(), Publish(), logger()).fit(2, resume=tmp_path / "state.pt")
    assert read_jsonl(tmp_path / "log.jsonl")["hyperparameters/lr"] == [(0, 0.1)]


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "tensorboard"])
def test_a_branch_from_an_older_file_does_not_cut_the_log_of_the_run_it_leaves(kind: str, tmp_path: Path) -> None:
    make, read = BACKENDS[kind]

    def learner_with(place: str) -> Learner:
        return toy(Recorder(), Metrics(), LogMetrics(make(tmp_path / place)))

    learner = learner_with("log")
    learner.fit(1)
    learner.save(tmp_path / "state.pt")
    learner.fit(2)
    before = read(tmp_path / "log")
    branch = learner_with("log")
    branch.load(tmp_path / "state.pt")
    for train in (lambda: branch.fit(1), lambda: branch.epoch(TrainingPhase())):
        with pytest.raises(LogExistsError, match="would write into an earlier run's log"):
            train()
    assert read(tmp_path / "log") == before
    elsewhere = learner_with("new")
    elsewhere.load(tmp_path / "state.pt")
    elsewhere.fit(1)
    assert [epoch for epoch, _ in read(tmp_path / "new")["epoch/training/loss"]] == [2]
    learner.load(tmp_path / "state.pt")  # it wrote the log itself, and goes back in it
    learner.fit(1)
    found = read(tmp_path / "log")["epoch/training/loss"]
    assert sorted(epoch for epoch, _ in found) == [1, 2]  # TensorBoard sorts the files of one second as words


def test_a_branch_begins_a_run_of_its_own_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def learner_with() -> Learner:
        return toy(Recorder(), Metrics(), LogMetrics(MLflow(tracking_uri=(tmp_path / "runs").as_uri())))

    learner, branch = learner_with(), learner_with()
    learner.fit(1)
    learner.save(tmp_path / "state.pt")
    branch.load(tmp_path / "state.pt")
    branch.fit(1)
    assert len(MlflowClient(tracking_uri=(tmp_path / "runs").as_uri()).search_runs(["0"])) == 2


# What an idle step costs


@pytest.mark.parametrize("name", [each for each in ALL if each != "LogHyperParams"])
def test_steps_that_are_not_logged_do_not_look_at_the_learner(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    count = History.trained_steps
    assert isinstance(count, property)
    monkeypatch.setattr(History, "trained_steps", property(lambda history: asked.append(1) or count.__get__(history)))
    logger = ALL[name](memory := Memory(), every=3)
    toy(Recorder(), Metrics(), logger).fit(3, phases=[TrainingPhase()])
    assert sorted({record.step for record in memory.records if record.group[0] == "step"}) == [3, 6, 9, 12]
    assert len(asked) == 3 + 4  # the epochs' begins, the logged steps


def test_every_so_many_steps_are_those_of_the_run_for_a_logger_that_comes_late_or_a_run_that_is_resumed(
    tmp_path: Path,
) -> None:
    late = toy(Recorder(), Metrics())
    late.fit(1)
    late.add_callback(LogMetrics(memory := Memory(), every=3))
    late.fit(2)
    assert [step for step, _ in memory.series("step/training/loss")] == [6, 9, 12]
    resumed = toy(Recorder(), Metrics(), LogMetrics(again := Memory(), every=3))
    late.save(tmp_path / "state.pt")
    resumed.fit(5, resume=tmp_path / "state.pt")
    assert [step for step, _ in again.series("step/training/loss")] == [15, 18]


def test_a_cancelled_step_is_not_counted_among_those_that_are_logged() -> None:
    begun: list[int] = []

    def cancel(learner: Any) -> None:
        begun.append(1)
        if len(begun) % 2 == 0:
            raise CancelStepException

    memory = Memory()
    logger = LogHistograms(memory, of=("weights", "activations"), every=2)
    toy(Recorder(), logger, CustomCallback(cancel, LossBegin, TrainingPhase)).fit(3, phases=[TrainingPhase()])
    assert [(record.step, record.group[1]) for record in memory.records] == [
        (step, group) for step in (2, 4, 6) for group in ("weights", "activations")
    ]


# Whole runs


def test_the_log_callbacks_run_clean_without_a_scheduler() -> None:
    memory = Memory()
    toy_learner(
        Recorder(),
        Metrics(),
        LogMetrics(memory),
        LogHyperParams(memory),
        LogHistograms(memory),
        LogVisualization(lambda step: torch.rand(3, 10, 10), memory),
    ).fit(7)
    assert "step/training/loss" in memory.names


def test_two_optimizers_two_sets_ten_epochs_give_40_scalars_and_20_histograms(tmp_path: Path) -> None:
    from fluxloop import PerOptimizerPhase
    from fluxloop.phases.per_optimizer import PerOptimizerValidationPhase

    class Two(PerOptimizerPhase):
        def loss(self, learner: Any, state: Any, name: str) -> Any:
            xs, ys = state.xs, state.ys
            return l1_loss(learner.model[["a", "b"].index(name)](xs), ys)

    backend = TensorBoard(tmp_path)
    phase = Two()
    xs = torch.rand(8, 1)
    learner = Learner(
        {"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)},
        data=((xs, xs), (xs, xs)),
        optimizer=torch.optim.SGD,
        callbacks=[
            Recorder(),
            Metrics(),
            LogMetrics(backend, every=10**9),
            LogHistograms(backend, of=("weights",), every=1),
        ],
        default_callbacks=False,
    )
    learner.fit(10, phases=[phase, PerOptimizerValidationPhase(phase)])
    found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    assert sum(len(found.Scalars(tag)) for tag in found.Tags()["scalars"]) == 40
    assert sum(len(found.Histograms(tag)) for tag in found.Tags()["histograms"]) == 20


def test_steps_continue_from_1_to_12_after_a_resume(tmp_path: Path) -> None:
    data = (toy_learner(num_batches=3).data.training,)
    first = toy(Recorder(), Metrics(), LogMetrics(TensorBoard(tmp_path)), data=data)
    first.fit(2)
    first.save(tmp_path / "state.pt")
    toy(Recorder(), Metrics(), LogMetrics(TensorBoard(tmp_path)), data=data).fit(4, resume=tmp_path / "state.pt")
    found = read_board(tmp_path)
    assert {tag: len(events) for tag, events in found.items()} == {"step/training/loss": 12, "epoch/training/loss": 4}
    assert [step for step, _ in found["step/training/loss"]] == list(range(1, 13))


def test_log_to_and_the_callbacks_write_one_file_side_by_side(tmp_path: Path) -> None:
    backend = CSV(tmp_path / "log.csv")
    learner = toy(Recorder(), Metrics(), LogMetrics(backend, every=STEPS))
    learner.fit(1)
    log_to(backend, Scalar(0.5), "test_accuracy", 1, "final")
    backend.close()
    assert re.search(r"^1,final,test_accuracy,0\.5$", backend.path.read_text(), re.MULTILINE)
