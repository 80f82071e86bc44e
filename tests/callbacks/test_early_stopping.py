from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import permutations
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CancelFittingException,
    CustomCallback,
    CycleEnd,
    EpochEnd,
    FeatureStats,
    FitEnd,
    KNNProbe,
    Learner,
    Metric,
    MetricError,
    Metrics,
    Phase,
    Recorder,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    runstep,
)
from fluxloop.callbacks import early_stopping
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.early_stopping import EarlyStopping, Timer
from fluxloop.errors import CheckpointError
from fluxloop.stopping import GL, PQ, Criterion, InvalidValue, NoImprovement, NumberLimit, Patience, Threshold, Warmup
from fluxloop.testing import EventRecorder, assert_observer, toy_learner

FALLING = [1 / n for n in range(1, 30)]
FLAT = [1.0] * 30


class Script(ValidationPhase):
    """Records the next value of a list in each epoch, as the loss."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = values

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            state.loss = torch.tensor(self.values[learner.history[type(self)].epochs], dtype=torch.float64)


class TrainingScript(AbstractTrainingPhase):
    """The same on the training data, without any training."""

    __init__ = Script.__init__
    step = Script.step


def learner_of(*callbacks: Callback, **options: Any) -> Learner:
    return toy_learner(Recorder(), Metrics(), *callbacks, num_batches=2, batch_size=2, **options)


def epochs_run(values: Sequence[float], stopping: EarlyStopping, epochs: int = 12) -> int:
    """Fit for so many epochs with these validation losses; give how many there were."""
    learner = learner_of(stopping)
    learner.fit(epochs, phases=[TrainingPhase(), Script(values)])
    ran = learner.history[Script].epochs
    assert learner.history[TrainingPhase].epochs == learner.history.cycles == ran
    assert (learner.history.stop_reason is not None) == (ran < epochs)
    return int(ran)


# A number is patience


def test_default_early_stopping_goes_on_while_it_improves() -> None:
    assert epochs_run(FALLING, EarlyStopping(1)) == 12
    with pytest.raises(ValueError, match="EarlyStopping\\(0\\) was given; expected a number of epochs without"):
        EarlyStopping(0)


@pytest.mark.parametrize(
    ("stopping", "epochs"),
    [
        (EarlyStopping(1), 2),
        (EarlyStopping(2), 3),
        (EarlyStopping(1, min_epochs=5), 5),
        (EarlyStopping(1, min_epochs=2), 2),
        (EarlyStopping(4, min_epochs=2), 5),
        (EarlyStopping(Threshold(0.5), mode="max"), 1),
    ],
    ids=repr,
)
def test_epochs_run_where_nothing_improves(stopping: EarlyStopping, epochs: int) -> None:
    assert epochs_run(FLAT, stopping) == epochs


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("values", [[1, 2] * 10, [1.0] * 20, [1, 3, 2] * 7], ids=["oscillation", "plateau", "waves"])
def test_a_number_stops_at_a_plateau_or_an_oscillation_where_consecutive_rises_never_come(values: Any) -> None:
    assert epochs_run(values, EarlyStopping(3)) == 4
    assert epochs_run(values, EarlyStopping(Patience(3))) == 12


def test_patience_1_stops_the_toy_learner_with_too_large_a_learning_rate_before_100_epochs() -> None:
    learner = toy_learner(
        EarlyStopping(1), Recorder(), Metrics(), optimizer=partial(torch.optim.SGD, lr=0.1), num_batches=4
    )
    history = learner.fit(100)
    assert history[TrainingPhase].epochs < 100
    assert "no improvement on the best" in str(history.stop_reason)


def test_an_improvement_is_by_more_than_min_delta() -> None:
    values = [1.0, 0.75, 0.5, 0.25, 0.0, -0.25]
    assert epochs_run(values, EarlyStopping(1, min_delta=0.125), 6) == 6
    assert epochs_run(values, EarlyStopping(1, min_delta=0.25), 6) == 2
    assert epochs_run(values, EarlyStopping(2, min_delta=0.25), 6) == 6  # 0.5 is by 0.5 better than 1


def test_the_new_value_is_compared_with_the_best_and_there_is_no_mode_zero() -> None:
    assert epochs_run([4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7], EarlyStopping(1, min_delta=0.5)) == 12
    with pytest.raises(ValueError, match="mode='zero' was given; expected 'min' or 'max'"):
        EarlyStopping(1, mode="zero")  # type: ignore[arg-type]


def test_in_mode_max_more_is_better() -> None:
    assert epochs_run(FALLING, EarlyStopping(3, mode="max")) == 4
    assert epochs_run([1, 2, 3, 4, 4, 4, 4], EarlyStopping(2, mode="max"), 7) == 6


# Criteria


@pytest.mark.parametrize(
    ("criterion", "epochs"),
    [
        (NumberLimit(3), 3),
        (Patience(2) | NumberLimit(7), 7),
        (NumberLimit(3) & NumberLimit(5), 5),
        (Warmup(NoImprovement(1), 4), 6),
        (Threshold(2.0), 1),
    ],
    ids=repr,
)
def test_a_criterion_is_told_each_epochs_value(criterion: Criterion, epochs: int) -> None:
    assert epochs_run(FLAT, EarlyStopping(criterion)) == epochs


def test_a_first_value_of_nan_is_no_improvement_and_does_not_keep_it_from_stopping() -> None:
    assert epochs_run([nan] * 12, EarlyStopping(3)) == 3
    assert epochs_run([nan, 1, 2, 3, 4, 5, 6, 7], EarlyStopping(3), 8) == 5
    assert epochs_run([nan, 3, 2, 1, 0, -1], EarlyStopping(2), 6) == 6


def test_an_invalid_value_stops_at_once() -> None:
    assert epochs_run([2, 1, nan, 1, 1, 1], EarlyStopping(3), 6) == 5
    assert epochs_run([2, 1, nan, 1, 1, 1], EarlyStopping(InvalidValue() | NoImprovement(3)), 6) == 3


def test_pq_is_told_the_training_losses() -> None:
    training, validation = [8, 7, 6, 5, 4, 3, 2.5, 2.4, 2.3, 2.2], [4, 3, 3.1, 3, 3.2, 3.5, 4, 4.5, 5, 6]
    by_hand = PQ(0.2, k=3).start()
    told = [by_hand.update(loss, (of_training,)) for loss, of_training in zip(validation, training, strict=True)]
    expected = next(reason for reason in told if reason)
    learner = learner_of(EarlyStopping(PQ(0.2, k=3)))
    learner.fit(10, phases=[TrainingScript(training), Script(validation)])
    assert learner.history[Script].epochs == told.index(expected) + 1 < 10
    assert expected in str(learner.history.stop_reason)


def test_pq_is_told_all_training_losses_since_the_last_value() -> None:
    told: list[Any] = []

    class Listening(PQ):
        def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
            told.append((value, training_losses))
            return None

    learner = learner_of(EarlyStopping(Listening()))
    script = TrainingScript([5, 4, 3, 2])
    learner.fit(2, phases=[script, script, Script([1, 2])])
    assert told == [(1, (5, 4)), (2, (3, 2))]


def test_pq_without_a_training_loss_is_an_error_that_says_so() -> None:
    learner = learner_of(EarlyStopping(PQ()))
    with pytest.raises(MetricError, match=r"PQ\(.*\) needs training losses: no metric 'training/loss' was recorded"):
        learner.fit(3, phases=[Script(FLAT)])


# What is monitored


def test_a_metric_is_found_in_any_case_and_with_underscores_in_its_name() -> None:
    metric = Metric(lambda preds, ys: torch.tensor(1.0), name="Top_1_of_Preds")
    stopping = EarlyStopping(2, monitor="validation/TOP_1_of_preds", mode="max")
    learner = toy_learner(stopping, Recorder(), Metrics(metric), num_batches=2)
    learner.fit(9)
    assert learner.history[ValidationPhase].epochs == 3
    assert str(learner.history.stop_reason).startswith("validation/top_1_of_preds was 1 in epoch 3: no improvement")


def test_a_metric_that_a_fit_will_not_record_is_an_error_before_its_first_step() -> None:
    learner = learner_of(EarlyStopping(3, monitor="validation/acuracy"))
    message = r"no phase of this fit records 'validation/acuracy', .* it records \['training/loss', 'validation/loss'\]"
    with pytest.raises(MetricError, match=message):
        learner.fit(5)
    assert learner.history[TrainingPhase].steps == 0


def test_a_name_without_data_is_refused_at_once() -> None:
    with pytest.raises(MetricError, match="monitor='loss' was given; expected the data's key and the metric's name"):
        EarlyStopping(3, monitor="loss")


def test_a_training_metric_can_be_monitored_and_the_cycle_is_completed() -> None:
    learner = learner_of(EarlyStopping(1, monitor="training/loss"))
    learner.fit(9, phases=[TrainingScript([3, 2, 2, 2]), Script(FLAT)])
    assert learner.history["training/loss"] == [3, 2, 2]
    assert learner.history["validation/loss"] == [1, 1, 1]


def test_what_others_record_after_the_metrics_is_seen_in_its_own_epoch() -> None:
    stats = FeatureStats("preds")
    probe = EarlyStopping(NumberLimit(2), monitor="training/preds_std")
    learner = learner_of(probe, stats)
    learner.fit(5)
    assert learner.history[TrainingPhase].epochs == 2
    assert learner.callbacks.graph.reaches("FeatureStats", "EarlyStopping")
    assert learner.callbacks.graph.reaches("Metrics", "EarlyStopping")


def test_a_metric_of_every_second_epoch_is_told_when_it_comes() -> None:
    xs, ys = torch.rand(8, 1), torch.arange(8) % 2
    probe = KNNProbe("model", bank=(xs, ys), queries=(xs, ys), k=1, every=2)
    learner = learner_of(probe, EarlyStopping(NumberLimit(2), monitor="validation/knn_model", mode="max"))
    learner.epoch(TrainingPhase())
    learner.fit(9)  # its first cycle is the second epoch
    assert learner.history[TrainingPhase].epochs == 4


# The reason


def test_the_reason_tells_the_metric_its_value_its_epoch_and_the_criterion() -> None:
    learner = learner_of(EarlyStopping(2))
    history = learner.fit(9, phases=[TrainingPhase(), Script([3, 1, 2, 4, 0, 0, 0, 0, 0])])
    assert history.stop_reason == (
        "validation/loss was 4 in epoch 4: no improvement on the best, 1, for 2 values "
        "(EarlyStopping, NoImprovement(n=2, min_delta=0.0))"
    )
    assert history[Script].epochs == 4
    assert history["validation/loss"] == [3, 1, 2, 4]


def test_the_epoch_is_counted_over_all_fits() -> None:
    learner = learner_of(EarlyStopping(2))
    for _ in range(2):
        learner.fit(9, phases=[Script(FLAT)])
    assert "in epoch 6: " in str(learner.history.stop_reason)


def test_every_handler_of_the_last_epoch_and_cycle_has_run_and_the_end_knows_the_reason() -> None:
    recorder, ends = EventRecorder(), []

    class Last(Callback):
        @on(FitEnd)
        def note(self, event: FitEnd, phase: Phase, learner: Any) -> None:
            ends.append(event.reason)

    learner = learner_of(EarlyStopping(1), recorder, Last())
    learner.fit(9, phases=[TrainingPhase(), Script(FLAT)])
    assert recorder.events[-3:] == ["EpochEnd", "CycleEnd", "FitEnd"]
    assert recorder.events.count("CycleEnd") == 2
    assert ends == [learner.history.stop_reason]
    assert learner.history.cycles == 2


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_where_it_stands_in_the_list_changes_nothing(order: tuple[int, ...]) -> None:
    rows: list[int] = []
    csv = CustomCallback(lambda learner: rows.append(learner.cbstate.history[Script].epochs), EpochEnd, Script)
    callbacks = [EarlyStopping(2), EarlyStopping(GL(900)), csv]
    learner = learner_of(*(callbacks[place] for place in order))
    learner.fit(9, phases=[TrainingPhase(), Script(FLAT)])
    assert rows == [1, 2, 3]
    assert "NoImprovement" in str(learner.history.stop_reason)


def test_two_side_by_side_watch_two_metrics() -> None:
    learner = learner_of(EarlyStopping(3), EarlyStopping(2, monitor="training/loss"))
    learner.fit(12, phases=[TrainingScript(FALLING[:3] + FLAT), Script(FALLING)])
    assert learner.history[Script].epochs == 5
    assert str(learner.history.stop_reason).startswith("training/loss was 1 in epoch 5")


def test_it_does_not_disturb_the_training() -> None:
    assert_observer(EarlyStopping(9, monitor="training/loss"), learner_of)


# More than one fit


@pytest.mark.parametrize(
    ("given", "epochs"),
    [(2, 3), (NoImprovement(2), 3), (Warmup(NoImprovement(2), 1) | InvalidValue(), 4)],
    ids=["number", "criterion", "combined"],
)
def test_the_best_value_and_the_counter_begin_anew_in_each_fit(given: Any, epochs: int) -> None:
    stopping = EarlyStopping(given)
    learner = learner_of(stopping)
    script = Script([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    learner.fit(2, phases=[script])  # the last value is no improvement
    assert learner.history.stop_reason is None
    for _ in range(2):
        before = learner.history[Script].epochs
        learner.fit(9, phases=[script])
        assert learner.history[Script].epochs - before == epochs
        assert learner.history.stop_reason is not None


def test_one_criterion_in_two_learners_counts_for_each() -> None:
    shared = NoImprovement(2)
    first, second = EarlyStopping(shared), EarlyStopping(shared)
    assert epochs_run([1, 2, 2, 2], first, 2) == 2
    assert epochs_run(FLAT, second) == 3
    assert epochs_run(FLAT, second) == 3  # the same one in another learner
    assert (shared.best, shared.since_best) == (None, 0)


def test_the_least_number_of_epochs_is_counted_in_each_fit() -> None:
    learner = learner_of(EarlyStopping(1, min_epochs=4))
    for epochs in (4, 8):
        learner.fit(9, phases=[Script(FLAT)])
        assert learner.history[Script].epochs == epochs


def test_after_an_error_the_next_fit_stops_as_usual() -> None:
    learner = learner_of(EarlyStopping(2))

    class Broken(Script):
        def step(self, learner: Learner, batch: Any) -> None:
            raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        learner.fit(3, phases=[Broken(FLAT)])
    learner.fit(9, phases=[TrainingPhase(), Script(FLAT)])
    assert learner.history[Script].epochs == learner.history[TrainingPhase].epochs == 3


# Outside of a fit


def test_in_a_loop_of_epochs_the_signal_reaches_the_caller() -> None:
    learner = learner_of(EarlyStopping(2))

    def loop() -> None:
        for _ in range(9):
            learner.epoch(TrainingPhase())
            learner.epoch(Script(FLAT))

    with pytest.raises(CancelFittingException, match="validation/loss was 1 in epoch 3: no improvement"):
        loop()
    assert learner.history[Script].epochs == learner.history[TrainingPhase].epochs == 3
    assert learner.history["validation/loss"] == [1, 1, 1]


def test_a_fit_after_a_loop_of_epochs_begins_anew() -> None:
    learner = learner_of(EarlyStopping(2))
    learner.epoch(Script(FLAT))
    learner.epoch(Script(FLAT))
    learner.fit(9, phases=[Script(FLAT)])
    assert learner.history[Script].epochs == 5


def test_a_validation_in_the_middle_of_an_epoch_stops_it_there() -> None:
    class Validate(UnsafeCallback):
        @on(StepEnd, TrainingPhase)
        def validate(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            learner.epoch(Script(FLAT))

    learner = toy_learner(EarlyStopping(2), Validate(), Recorder(), Metrics(), num_batches=16)
    learner.fit(3, phases=[TrainingPhase()])
    assert learner.history[Script].epochs == 3
    assert learner.history[TrainingPhase].steps == 3
    assert "in epoch 3" in str(learner.history.stop_reason)


# Going on


def test_a_kept_state_goes_on_with_the_best_value_and_the_counter() -> None:
    first = EarlyStopping(Patience(9) | NoImprovement(3), min_epochs=2)
    learner_of(first).fit(3, phases=[Script([1, 2, 2])])
    state = json.loads(json.dumps(first.state_dict()))
    second = EarlyStopping(Patience(9) | NoImprovement(3), min_epochs=2)
    learner = learner_of(second)
    for _ in range(3):  # three epochs that it is not to be told again
        learner.epoch(Script(FLAT))
    second.load_state_dict(state)
    with pytest.raises(CancelFittingException, match="in epoch 4: no improvement on the best, 1, for 3 values"):
        learner.epoch(Script(FLAT))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (EarlyStopping(3, monitor="training/loss"), "monitor='validation/loss', and this one monitor='training/loss'"),
        (EarlyStopping(3, mode="max"), "mode='min', and this one mode='max'"),
        (EarlyStopping(Patience(3)), "kept state is of the criterion NoImprovement, and this is Patience"),
    ],
    ids=["monitor", "mode", "criterion"],
)
def test_the_state_of_another_one_is_refused_and_changes_nothing(other: EarlyStopping, message: str) -> None:
    stopping = EarlyStopping(3)
    learner_of(stopping).fit(2, phases=[TrainingPhase(), Script(FLAT)])
    before = other.state_dict()
    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict(stopping.state_dict())
    assert other.state_dict() == before


class Kill(Callback):
    """Kills a run when so many epochs of validation are done."""

    reads = ("cbstate.history",)

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    @on(StepBegin, TrainingPhase)
    def kill(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        if learner.cbstate.history[Script].epochs == self.epochs:
            raise OSError("killed")


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_a_resumed_run_goes_on_with_the_best_value_and_the_counter(epochs: int, tmp_path: Path) -> None:
    values = [1, 2, 0.5, 3, 2, 1, 0.75, 4, 4, 4, 4]
    criterion = NoImprovement(4) | PQ(0.1, k=9)
    phases = [TrainingPhase(), Script(values)]
    whole, killed, resumed = (
        learner_of(EarlyStopping(criterion, min_epochs=3), *more)
        for more in ([], [Checkpointer(tmp_path), Kill(epochs)], [Checkpointer(tmp_path)])
    )
    whole.fit(11, phases=phases)
    with pytest.raises(OSError, match="killed"):
        killed.fit(11, phases=phases)
    resumed.fit(11, phases=phases, resume=tmp_path)
    assert resumed.history.stop_reason == whole.history.stop_reason is not None
    assert resumed.history["validation/loss"] == whole.history["validation/loss"] == values[:7]


def test_a_resumed_run_that_monitors_another_metric_is_refused(tmp_path: Path) -> None:
    learner_of(EarlyStopping(4), Checkpointer(tmp_path)).fit(2)
    other = learner_of(EarlyStopping(4, monitor="training/loss"), Checkpointer(tmp_path))
    with pytest.raises(CheckpointError, match="monitor='validation/loss', and this one monitor='training/loss'"):
        other.fit(4, resume=tmp_path)


# What it is given


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EarlyStopping("3"), TypeError, r"EarlyStopping\('3'\) was given; expected a number of epochs, or a"),
        (lambda: EarlyStopping(Patience), TypeError, r"EarlyStopping\(the class Patience\) was given"),
        (lambda: EarlyStopping(True), TypeError, r"EarlyStopping\(True\)"),
        (lambda: EarlyStopping(-1), ValueError, r"EarlyStopping\(-1\) was given"),
        (lambda: EarlyStopping(3, min_epochs=-1), ValueError, "min_epochs=-1 was given; expected a number of epochs"),
        (lambda: EarlyStopping(3, min_delta=-1), ValueError, r"min_delta=-1\) was given; expected 0 or more"),
        (
            lambda: EarlyStopping(GL(), min_delta=0.1),
            ValueError,
            r"it belongs to that: NoImprovement\(5, min_d",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_it_shows_what_it_watches() -> None:
    assert repr(EarlyStopping(Patience(2) | GL(3), mode="max")) == (
        "EarlyStopping(criterion=(Patience(n=2) | GL(alpha=3)), monitor='validation/loss', mode='max', min_epochs=0, "
        "min_delta=0.0)"
    )


# Timer


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float, event: Any = StepEnd, phase: type[Phase] = Phase) -> Callback:
        def move(learner: Any) -> None:
            self.now += seconds

        return CustomCallback(move, event, phase, reads=(), name="tick")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(early_stopping, "monotonic", clock)
    return clock


@pytest.mark.parametrize(
    "timer",
    [Timer(90), Timer(minutes=1.5), Timer(30, minutes=1), Timer(hours=0.025), Timer(timedelta(minutes=1, seconds=30))],
    ids=repr,
)
def test_a_timer_ends_the_fit_at_the_step_at_which_the_time_has_passed(timer: Timer, clock: Clock) -> None:
    learner = learner_of(timer, clock.tick(20, StepEnd, TrainingPhase))
    clock.now += 500  # before the fit
    history = learner.fit(50, phases=[TrainingPhase()])
    assert history[TrainingPhase].steps == 5
    assert history.stop_reason == "0:01:40 of training, of 0:01:30 allowed (Timer)"
    assert timer.elapsed == 100


def test_a_timer_counts_everything_in_a_fit(clock: Clock) -> None:
    learner = learner_of(Timer(100), clock.tick(60, CycleEnd))
    learner.fit(50)
    assert learner.history[TrainingPhase].epochs == 2
    assert learner.history[TrainingPhase].steps == 5  # two cycles, and the first step that looked


def test_a_timer_looks_after_steps_of_validation_too(clock: Clock) -> None:
    learner = learner_of(Timer(100), clock.tick(60, StepEnd, ValidationPhase))
    learner.fit(50)
    assert (learner.history[TrainingPhase].epochs, learner.history[ValidationPhase].steps) == (1, 2)


def test_a_timer_begins_anew_in_each_fit(clock: Clock) -> None:
    learner = learner_of(Timer(90), clock.tick(20, StepEnd, TrainingPhase))
    for steps in (5, 10):
        clock.now += 500
        learner.fit(50, phases=[TrainingPhase()])
        assert learner.history[TrainingPhase].steps == steps


def test_the_time_is_summed_over_resumed_runs(clock: Clock, tmp_path: Path) -> None:
    def make(*callbacks: Callback) -> Learner:
        tick = clock.tick(20, StepEnd, TrainingPhase)
        return learner_of(Timer(90), tick, Checkpointer(tmp_path, unit="step"), *callbacks)

    with pytest.raises(OSError, match="killed"):
        make(Kill(1)).fit(50, phases=[TrainingPhase(), Script(FLAT)])
    clock.now += 5000  # while nothing runs
    resumed = make()
    resumed.fit(50, phases=[TrainingPhase(), Script(FLAT)], resume=tmp_path)
    assert resumed.history[TrainingPhase].steps == 5
    assert str(resumed.history.stop_reason).startswith("0:01:40 of training")


def test_a_timer_ends_at_a_checkpoint_of_the_very_step(clock: Clock, tmp_path: Path) -> None:
    def make() -> Learner:
        return learner_of(Timer(50), clock.tick(20, StepEnd, TrainingPhase), Checkpointer(tmp_path))

    first = make()
    first.fit(50)  # two steps per epoch: in the middle of the second
    keeper = first.get_callback(Checkpointer)
    assert keeper is not None
    assert keeper.last is not None
    resumed = make()
    resumed.load(keeper.last)
    assert resumed.history[TrainingPhase].steps == 3
    assert resumed.history.stop_reason == "0:01:00 of training, of 0:00:50 allowed (Timer)"
    with pytest.warns(UserWarning, match="0:01:00 of training"):
        make().fit(50, resume=tmp_path)


def test_outside_of_a_fit_a_timer_runs_during_epochs(clock: Clock) -> None:
    learner = learner_of(Timer(90), clock.tick(20, StepEnd, TrainingPhase))

    def loop() -> None:
        for _ in range(9):
            clock.now += 500
            learner.epoch(TrainingPhase())

    with pytest.raises(CancelFittingException, match="0:01:40 of training"):
        loop()
    assert learner.history[TrainingPhase].steps == 5


def test_a_timer_does_not_disturb_the_training() -> None:
    assert_observer(Timer(hours=9), learner_of)


@pytest.mark.parametrize(
    "make", [Timer, lambda: Timer(0), lambda: Timer(-5, minutes=0), lambda: Timer(timedelta(0)), lambda: Timer("1h")]
)
def test_a_timer_needs_a_time(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"Timer\(.*\) was given; expected .*Timer\(hours=8\)"):
        make()


class Pretext(TrainingScript):
    pass


def test_two_training_phases_do_not_matter_to_a_criterion_that_needs_no_training_losses() -> None:
    learner = learner_of(EarlyStopping(9))
    phases = [Pretext([5, 4, 3, 2]), TrainingScript([5, 4, 3, 2]), Script([4, 3, 2, 1])]
    for _ in range(2):
        learner.fit(2, phases=phases)
    assert learner.history.cycles == 4


def test_which_of_two_training_losses_is_meant_is_asked_for_and_said() -> None:
    told = []

    @define
    class Listening(Criterion):
        needs_training_losses = True

        def update(self, value: float, training_losses: tuple[float, ...] = ()) -> str | None:
            told.append(training_losses)
            return None

    def fit(**options: Any) -> None:
        phases = [Pretext([9, 8]), TrainingScript([5, 4]), Script([2, 1])]
        learner_of(EarlyStopping(Listening(), **options)).fit(2, phases=phases)

    with pytest.raises(MetricError, match="'Pretext/loss' or 'TrainingScript/loss'"):
        fit()
    told.clear()
    fit(training="Pretext/loss")
    assert told == [(9,), (8,)]


def test_an_option_that_is_assigned_while_it_runs_keeps_what_it_has_been_told() -> None:
    stopping = EarlyStopping(3, monitor="validation/accuracy")
    hits = Metric(lambda preds, ys: torch.tensor(1.0), name="accuracy", higher_is_better=True)
    assign = CustomCallback(lambda learner: setattr(stopping, "min_epochs", 2), CycleEnd)
    learner = toy_learner(stopping, assign, Recorder(), Metrics(hits), num_batches=2)
    learner.fit(9)
    assert learner.history.cycles == 4
