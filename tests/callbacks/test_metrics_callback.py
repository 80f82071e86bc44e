from __future__ import annotations

from typing import Any

import pytest
import torch

from fluxloop import (
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    CustomCallback,
    Loss,
    Metric,
    MetricError,
    Metrics,
    MissingProducerError,
    Recorder,
    SmoothLoss,
    StateAccessError,
    StepBegin,
    StepEnd,
    TrainingPhase,
    ValidationPhase,
    mae,
    throttle,
)
from fluxloop.testing import assert_observer, assert_order, toy_learner


def level(preds: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    return ys.mean()


def test_the_loss_comes_first_and_is_always_there() -> None:
    for metrics in (Metrics(), Metrics(mae), Metrics(mae, SmoothLoss())):
        learner = toy_learner(Recorder(), metrics)
        learner.fit(1)
        assert next(iter(learner.history.metrics[TrainingPhase])) == "loss"
        assert [metric.name for metric in metrics.metrics] == list(learner.history.metrics[TrainingPhase])
    given = Loss()
    assert Metrics(given).metrics == [given]


def test_values_are_published_by_phase_name_and_epoch() -> None:
    learner = toy_learner(Recorder(), Metrics(mae))
    learner.fit(3)
    published = learner.cbstate.metrics[ValidationPhase]
    assert [epoch for epoch, _ in published.epochs["mae"]] == [1, 2, 3]
    assert [value for _, value in published.epochs["mae"]] == learner.history["validation/mae"]
    assert published.last("mae") == published.epochs["mae"][-1]
    assert "mae: " in repr(published)


def test_a_metric_without_a_value_says_which_there_are() -> None:
    learner = toy_learner(Recorder(), Metrics(mae))
    learner.fit(1)
    with pytest.raises(MetricError, match=r"no metric 'accuracy' was recorded; there are \['loss', 'mae'\]"):
        learner.cbstate.metrics[TrainingPhase].last("accuracy")


def test_other_callbacks_read_the_last_steps_values_and_the_average_so_far() -> None:
    seen: list[tuple[float, float]] = []

    def look(learner: Any) -> None:
        metrics = learner.cbstate.metrics[TrainingPhase]
        seen.append((metrics.latest()["level"].item(), metrics.running()["level"].item()))

    reader = CustomCallback(look, StepEnd, TrainingPhase, reads=("cbstate.metrics",), name="a reader")
    learner = toy_learner(reader, Metrics(level), Recorder(), num_batches=5)
    assert_order(learner, Recorder, Metrics, "a reader")
    learner.fit(1, phases=[TrainingPhase()])
    means = [batch[1].mean().item() for batch in learner.data.training]
    assert [latest for latest, _ in seen] == means
    assert [running for _, running in seen] == pytest.approx([sum(means[: n + 1]) / (n + 1) for n in range(5)])


def test_cancelled_steps_are_left_out() -> None:
    begun: list[int] = []

    def cancel_the_first(learner: Any) -> None:
        begun.append(1)
        if len(begun) == 1:
            raise CancelStepException

    learner = toy_learner(Recorder(), Metrics(level), CustomCallback(cancel_the_first, StepBegin), num_batches=3)
    learner.fit(1, phases=[TrainingPhase()])
    means = [batch[1].mean().item() for batch in learner.data.training][1:]
    assert learner.history["training/level"] == [pytest.approx(sum(means) / 2)]


@pytest.mark.parametrize(("signal", "values"), [(CancelEpochException, 1), (CancelFittingException, 0)])
def test_a_cancelled_epoch_publishes_what_it_saw_and_a_cancelled_fit_nothing(signal: Any, values: int) -> None:
    def cancel(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].steps == 2:
            raise signal

    learner = toy_learner(Recorder(), Metrics(level), CustomCallback(cancel, StepBegin), num_batches=4)
    learner.fit(1, phases=[TrainingPhase()])
    means = [batch[1].mean().item() for batch in learner.data.training][:2]
    published = learner.history.metrics[TrainingPhase].get("level", [])
    assert published == [pytest.approx(sum(means) / 2)] * values


def test_a_value_that_is_no_scalar_is_kept_as_a_tensor() -> None:
    class Extremes:
        def reset(self) -> None:
            self.seen: list[torch.Tensor] = []

        def update(self, preds: torch.Tensor, ys: torch.Tensor) -> None:
            self.seen.append(ys)

        def compute(self) -> torch.Tensor:
            return torch.stack([torch.cat(self.seen).min(), torch.cat(self.seen).max()])

    learner = toy_learner(Recorder(), Metrics(Metric(Extremes(), name="extremes")))
    learner.fit(1)
    ys = torch.cat([batch[1] for batch in learner.data.training])
    assert torch.equal(learner.history["training/extremes"][0], torch.stack([ys.min(), ys.max()]))


def test_metrics_restricted_to_a_phase_are_not_called_in_another() -> None:
    calls: list[int] = []

    def spy(preds: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
        calls.append(len(preds))
        return preds.mean()

    learner = toy_learner(Recorder(), Metrics(Metric(spy, phase=ValidationPhase)), num_batches=3)
    learner.fit(1)
    assert calls == [8, 8, 8]


def test_without_a_recorder_the_error_says_what_to_add() -> None:
    with pytest.raises(MissingProducerError, match=r"Metrics reads 'cbstate\.history'.*add Recorder\(\)"):
        toy_learner(Metrics())


def test_what_metrics_publishes_can_only_be_read() -> None:
    def spoil(learner: Any) -> None:
        learner.cbstate.metrics[TrainingPhase].epochs["loss"] = []

    learner = toy_learner(Recorder(), Metrics(), CustomCallback(spoil, StepEnd))
    with pytest.raises(StateAccessError, match=r"CustomCallback tried to write 'cbstate\.metrics"):
        learner.fit(1)


def test_throttled_metrics_see_the_steps_that_pass() -> None:
    learner = toy_learner(Recorder(), throttle(Metrics(level), StepEnd, freq=4), num_batches=8)
    learner.fit(1, phases=[TrainingPhase()])
    means = [batch[1].mean().item() for batch in learner.data.training]
    assert learner.history["training/level"] == [pytest.approx((means[0] + means[4]) / 2)]


def test_evaluate_computes_the_learners_metrics_or_those_given() -> None:
    learner = toy_learner(Recorder(), Metrics(mae, SmoothLoss()))
    assert learner.evaluate().keys() == {"loss", "mae", "smoothloss"}
    assert learner.evaluate(metrics=[level]).keys() == {"loss", "level"}
    assert toy_learner().evaluate().keys() == {"loss"}


def test_measuring_changes_nothing() -> None:
    assert_observer(Metrics(mae, SmoothLoss(), level), lambda: toy_learner(Recorder()))
