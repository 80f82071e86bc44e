from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    AbstractValidationPhase,
    AveragedValidationPhase,
    Callback,
    Checkpointer,
    EarlyStopping,
    GradientClip,
    KeepBestModel,
    KNNProbe,
    Learner,
    LRScheduler,
    Metric,
    MetricError,
    Metrics,
    MissingProducerError,
    NumberLimit,
    Phase,
    Recorder,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    accuracy,
    mae,
    on,
)
from fluxloop.testing import EventRecorder

WATCHERS: list[Callable[[str, Path], Callback]] = [
    lambda monitor, folder: EarlyStopping(9, monitor=monitor),
    lambda monitor, folder: KeepBestModel(monitor),
    lambda monitor, folder: Checkpointer(folder, keep_best=1, monitor=monitor),
    lambda monitor, folder: LRScheduler(partial(ReduceLROnPlateau, mode="min"), monitor=monitor),
]


def classifier(*callbacks: Callback, valid: bool = True) -> Learner:
    torch.manual_seed(0)
    xs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    rows = (xs, (xs[:, 0] > 0).long())
    metrics = [] if any(isinstance(each, Metrics) for each in callbacks) else [Metrics(accuracy)]
    return Learner(
        nn.Linear(4, 2),
        nn.functional.cross_entropy,
        data=(rows, rows) if valid else (rows,),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        callbacks=[Recorder(), *metrics, *callbacks],
        default_callbacks=False,
        seed=0,
    )


class Shifted(ValidationPhase):
    def step(self, learner: Any, batch: Any) -> Any:
        return super().step(learner, (batch[0] + 3, batch[1]))


class Generates(AbstractValidationPhase):
    """Stores no loss."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.xs)


# What a fit will not record


@pytest.mark.slow(quick=9)
@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize(
    ("monitor", "said"),
    [
        ("validation/acuracy", "did you mean 'validation/accuracy'"),
        ("valid/accuracy", "did you mean 'validation/accuracy'"),
        ("Shifted/loss", "no phase of this fit records 'Shifted/loss'"),
        ("validation/loss@ema", "no phase of this fit records 'validation/loss@ema'"),
    ],
)
def test_a_metric_that_no_phase_records_is_refused_before_the_first_step(
    tmp_path: Path, watcher: Callable[..., Callback], monitor: str, said: str
) -> None:
    events = EventRecorder()
    learner = classifier(watcher(monitor, tmp_path), events)
    with pytest.raises(MetricError, match=said):
        learner.fit(3)
    assert events.events == []


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_fit_without_validation_data_says_what_to_give(tmp_path: Path, watcher: Callable[..., Callback]) -> None:
    learner = classifier(watcher("validation/loss", tmp_path), valid=False)
    with pytest.raises(
        MetricError, match=r"runs no phase on validation data: give the learner some, data=\(train, val"
    ):
        learner.fit(3)
    assert learner.history[TrainingPhase].steps == 0


def test_nobody_who_records_metrics_is_an_error_that_says_whom_to_add(tmp_path: Path) -> None:
    learner = Learner(nn.Linear(4, 1), nn.functional.mse_loss, data=(torch.ones(4, 4), torch.ones(4, 1)))
    learner.set_callbacks([Checkpointer(tmp_path, keep_best=1)])
    with pytest.raises(MissingProducerError, match=r"no callback records metrics; add Metrics\(\)"):
        learner.fit(1, data=((torch.ones(4, 4), torch.ones(4, 1)),))


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_name_that_two_phases_record_lists_them(tmp_path: Path, watcher: Callable[..., Callback]) -> None:
    learner = classifier(watcher("validation/loss", tmp_path))
    with pytest.raises(MetricError, match=r"2 phases record; expected .*'ValidationPhase/loss' or 'Shifted/loss'"):
        learner.fit(1, phases=[TrainingPhase(), ValidationPhase(), Shifted()])
    assert learner.history[TrainingPhase].steps == 0


def test_a_monitor_by_the_phases_name_follows_that_phase_alone() -> None:
    best, stop = KeepBestModel("Shifted/loss"), EarlyStopping(2, monitor="again/loss")
    learner = classifier(best, stop)
    learner.fit(4, phases=[TrainingPhase(), ValidationPhase(), Shifted(), ValidationPhase(name="again")])
    assert best.best == min(learner.history["Shifted/loss"])
    assert stop.state_dict()["criterion"]["best"] == min(learner.history["again/loss"])


def test_the_plain_name_means_the_phase_of_this_fit_where_another_fit_ran_another() -> None:
    best = KeepBestModel()
    learner = classifier(best)
    learner.fit(2)
    learner.fit(2, phases=[TrainingPhase(), Shifted()])
    assert best.best == min(learner.history["Shifted/loss"])


def test_a_second_phase_that_stores_no_loss_does_not_matter() -> None:
    best = KeepBestModel()
    learner = classifier(Metrics(), best)
    learner.fit(2, phases=[TrainingPhase(), Generates(), ValidationPhase()])
    assert best.best == min(learner.history["validation/loss"])


def test_a_second_phase_that_may_store_a_loss_is_told_when_it_does() -> None:
    class Own(AbstractValidationPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)

    learner = classifier(Metrics(), KeepBestModel())
    with pytest.raises(MetricError, match="'ValidationPhase/loss' or 'Own/loss'"):
        learner.fit(3, phases=[TrainingPhase(), ValidationPhase(), Own()])
    assert learner.history[TrainingPhase].epochs == 1


def test_a_phase_that_might_have_recorded_the_metric_is_awaited_once() -> None:
    learner = classifier(Metrics(), EarlyStopping(2))
    with pytest.raises(MetricError, match="no metric 'validation/loss' was recorded"):
        learner.fit(9, phases=[TrainingPhase(), GeneratesSeldom()])
    assert learner.history[TrainingPhase].epochs == 3


class GeneratesSeldom(Generates):
    every = 3


def test_what_a_block_of_a_phase_of_ones_own_records_is_awaited() -> None:
    class Named(AbstractTrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            with learner.optimizing(loss="r1") as block:
                block.loss = learner.loss_fn(learner.model(state.xs), state.ys)

    stop = EarlyStopping(NumberLimit(2), monitor="training/r1")
    assert classifier(Metrics(), stop).fit(5, phases=[Named()]).cycles == 2
    with pytest.raises(MetricError, match="no metric 'training/r2' was recorded"):
        classifier(Metrics(), EarlyStopping(NumberLimit(2), monitor="training/r2")).fit(5, phases=[Named()])


def test_a_validation_that_a_callback_runs_is_awaited() -> None:
    class Validates(UnsafeCallback):
        draws = False

        @on(StepEnd, AbstractTrainingPhase)
        def validate(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            learner.epoch(ValidationPhase())

    stop = EarlyStopping(NumberLimit(3))
    learner = classifier(stop, Validates())
    learner.fit(9, phases=[TrainingPhase()])
    assert learner.history[ValidationPhase].epochs == 3


def test_probes_averages_norms_and_collections_are_known() -> None:
    collection = Metric(lambda preds, ys: (preds.argmax(1) == ys).float().mean(), name="hits", higher_is_better=True)
    callbacks = [
        KNNProbe("model", every=2),
        EMA("model", 0.9),
        GradientClip(1.0),
        EarlyStopping(9, monitor="validation/knn_model", name="a"),
        EarlyStopping(9, monitor="validation/accuracy@ema", name="b"),
        EarlyStopping(9, monitor="training/grad_norm", mode="min", name="c"),
        EarlyStopping(9, monitor="AveragedValidationPhase/hits@ema", name="d"),
    ]
    learner = classifier(Metrics(accuracy, collection), *callbacks)
    learner.fit(3, phases=[TrainingPhase(), ValidationPhase(), AveragedValidationPhase()])
    assert learner.history.cycles == 3


def test_a_metric_of_a_sparse_validation_is_awaited_by_everybody(tmp_path: Path) -> None:
    watchers = [watcher("validation/loss", tmp_path) for watcher in WATCHERS]
    learner = classifier(*watchers)
    learner.fit(7, phases=[TrainingPhase(), ValidationPhase(every=3)])
    assert [row["epoch"] for row in learner.history.rows() if row["phase"] == "ValidationPhase"][:3] == [3, 6, 7]
    assert isinstance(watchers[1], KeepBestModel)
    assert watchers[1].epoch in (3, 6, 7)


def test_a_metric_that_had_no_value_when_the_fit_ended_is_told() -> None:
    learner = classifier(KNNProbe("model", every=5), EarlyStopping(2, monitor="validation/knn_model"))
    with pytest.warns(
        UserWarning, match="EarlyStopping watches 'validation/knn_model', which has had no value when the"
    ):
        learner.fit(3)
    learner.fit(3)


def test_patience_counts_the_values_of_a_sparse_validation() -> None:
    flat = Metric(lambda preds, ys: torch.tensor(1.0), name="flat", higher_is_better=False)
    learner = classifier(Metrics(flat), EarlyStopping(2, monitor="validation/flat"))
    history = learner.fit(20, phases=[TrainingPhase(), ValidationPhase(every=3)])
    assert history.cycles == 9
    assert "in epoch 9" in str(history.stop_reason)


# Which way is better


@pytest.mark.slow(quick=5)
@pytest.mark.parametrize(
    ("metric", "name", "mode"),
    [
        (accuracy, "accuracy", "max"),
        (partial(accuracy), "accuracy", "max"),
        (MulticlassAccuracy(2), "multiclassaccuracy", "max"),
        (Metric(lambda preds, ys: preds.mean(), name="mine", higher_is_better=True), "mine", "max"),
        (Metric(lambda preds, ys: preds.mean(), name="mine", higher_is_better=False), "mine", "min"),
        (Metric(lambda preds, ys: preds.mean(), name="my_loss"), "my_loss", "min"),
        (Metric(lambda preds, ys: mae(preds[:, 0], ys), name="mae_of_one"), "mae_of_one", None),
        (nn.functional.cross_entropy, "cross_entropy", "min"),
    ],
)
def test_a_metric_says_which_way_it_is_better_or_the_mode_is_asked_for(
    metric: Any, name: str, mode: str | None
) -> None:
    best = KeepBestModel(f"validation/{name}")
    learner = classifier(Metrics(metric), best)
    if mode is None:
        with pytest.raises(MetricError, match=r"which way is better; expected mode='max'.*KeepBestModel\(\.\.\., mode"):
            learner.fit(3)
        return
    learner.fit(4)
    assert best.best == (max if mode == "max" else min)(learner.history[f"validation/{name}"])


def test_a_mode_that_contradicts_the_metric_is_obeyed() -> None:
    best = KeepBestModel("validation/accuracy", "min")
    learner = classifier(best)
    learner.fit(4)
    assert best.best == min(learner.history["validation/accuracy"])


def test_a_criterion_that_compares_nothing_needs_no_mode() -> None:
    metric = Metric(lambda preds, ys: preds.mean(), name="mine")
    learner = classifier(Metrics(metric), EarlyStopping(NumberLimit(2), monitor="validation/mine"))
    assert learner.fit(5).cycles == 2


def test_outside_of_a_fit_the_metric_says_its_direction_too() -> None:
    best = KeepBestModel("validation/accuracy")
    learner = classifier(best)
    for _ in range(4):
        learner.epoch(TrainingPhase())
        learner.epoch(ValidationPhase())
    assert best.best == max(learner.history["validation/accuracy"])


def test_a_plateau_that_takes_better_for_worse_is_refused_unless_it_was_asked_for() -> None:
    def given(factory: Any) -> Learner:
        return classifier(LRScheduler(factory, monitor="validation/accuracy"))

    for factory in (ReduceLROnPlateau, lambda optimizer: ReduceLROnPlateau(optimizer, patience=3)):
        with pytest.raises(MetricError, match=r"say which: LRScheduler\(partial\(ReduceLROnPlateau, mode='max'\)"):
            given(factory).fit(1)
    for factory in (
        partial(ReduceLROnPlateau, mode="min"),
        partial(ReduceLROnPlateau, mode="max"),
        lambda optimizer: ReduceLROnPlateau(optimizer, mode="max"),
    ):
        assert given(factory).fit(1).cycles == 1


def test_the_best_checkpoints_are_those_of_the_highest_accuracy(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=1, keep_best=1, monitor="validation/accuracy")
    learner = classifier(keeper)
    learner.fit(6)
    series = learner.history["validation/accuracy"]
    best = 1 + series.index(max(series))
    assert {int(path.name[6:10]) for path in tmp_path.glob("*.pt")} == {best, 6}


def test_a_metric_that_will_not_come_is_told_with_those_that_will() -> None:
    learner = classifier(EarlyStopping(2, monitor="validation/acuracy"))
    with pytest.raises(
        MetricError,
        match=r"no phase of this fit records 'validation/acuracy', which EarlyStopping watches; it records \[.*\]; "
        r"did you mean 'validation/accuracy'\?$",
    ):
        learner.fit(1)
