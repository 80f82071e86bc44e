from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from fluxloop import (
    Callback,
    Learner,
    Metrics,
    MetricsPrinter,
    ProgressBar,
    Recorder,
    StepEnd,
    StopOnNaNLoss,
    TrainingPhase,
    accuracy,
    mae,
    throttle,
)
from fluxloop.callbacks.defaults import default_callbacks, with_defaults
from fluxloop.testing import (
    Coefficient,
    EventRecorder,
    assert_observer,
    assert_order,
    assert_same_bits,
    toy_learner,
)

TYPES = [Recorder, Metrics, ProgressBar, MetricsPrinter, StopOnNaNLoss]


def test_the_defaults_are_five_and_fresh_each_time() -> None:
    first, second = default_callbacks(), default_callbacks()
    assert [type(callback) for callback in first] == TYPES
    assert not {id(callback) for callback in first} & {id(callback) for callback in second}


def test_a_learner_has_them_unless_told_otherwise() -> None:
    learner = Learner(Coefficient())
    assert {type(callback) for callback in learner.callbacks} == set(TYPES)
    assert list(Learner(Coefficient(), default_callbacks=False).callbacks) == []


def test_their_order_is_proved() -> None:
    learner = Learner(Coefficient())
    assert_order(learner, Recorder, Metrics, MetricsPrinter)
    assert_order(learner, Recorder, ProgressBar)
    assert_order(learner, Metrics, ProgressBar)


@pytest.mark.slow
def test_any_list_of_them_gives_the_same_order() -> None:
    digests = {
        toy_learner(*(TYPES[index]() for index in order)).callbacks.digest for order in permutations(range(len(TYPES)))
    }
    assert digests == {Learner(Coefficient()).callbacks.digest}


@pytest.mark.parametrize("replaced", TYPES)
def test_one_given_stands_in_for_its_type_alone(replaced: Any) -> None:
    mine = replaced()
    for given in (mine, throttle(mine, StepEnd, freq=2), throttle(throttle(mine, StepEnd, freq=2), StepEnd, freq=2)):
        callbacks = with_defaults([given])
        assert callbacks[0] is given
        assert [type(callback) for callback in callbacks[1:]] == [cls for cls in TYPES if cls is not replaced]


def test_others_are_added_to_them() -> None:
    recorder = EventRecorder()
    callbacks = with_defaults([recorder])
    assert [type(callback) for callback in callbacks] == [EventRecorder, *TYPES]


def test_without_a_terminal_a_fit_prints_a_line_per_epoch_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    learner = toy_learner(Metrics(mae), default_callbacks=True)
    learner.fit(2)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [line.split()[:3] for line in captured.out.splitlines()] == [
        ["TrainingPhase", "epoch", "1/2"],
        ["ValidationPhase", "epoch", "1/2"],
        ["TrainingPhase", "epoch", "2/2"],
        ["ValidationPhase", "epoch", "2/2"],
    ]
    assert all("loss" in line and "mae" in line for line in captured.out.splitlines())


def test_a_fit_with_the_defaults_records_loss_and_metrics_of_both_sets(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    xs, ys = torch.randn(60, 4), torch.randint(0, 3, (60,))
    learner = Learner(
        torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=((xs, ys), (xs, ys)), callbacks=[Metrics(accuracy)]
    )
    history = learner.fit(10)
    for monitor in ("training/loss", "training/accuracy", "validation/loss", "validation/accuracy"):
        assert len(history[monitor]) == 10
    assert history["training/loss"][-1] < history["training/loss"][0]
    assert history[TrainingPhase].steps == 20


@pytest.mark.parametrize("default", TYPES)
def test_each_of_them_only_watches(default: Any, capsys: pytest.CaptureFixture[str]) -> None:
    others: list[Callback] = [] if default is Recorder else [Recorder()]
    if default is MetricsPrinter:
        others.append(Metrics())

    def make() -> Learner:
        return toy_learner(*(type(callback)() for callback in others))

    assert_observer(default(), make)


def test_all_of_them_only_watch(capsys: pytest.CaptureFixture[str]) -> None:
    plain, watched = toy_learner(), toy_learner(default_callbacks=True)
    plain.fit(3)
    watched.fit(3)
    assert_same_bits(plain, watched)


def test_without_validation_data_they_announce_no_validation(capsys: pytest.CaptureFixture[str]) -> None:
    toy_learner(data=((torch.ones(8, 1), torch.ones(8, 1)),), default_callbacks=True).fit(1)
    printed = "".join(capsys.readouterr())
    assert "rain" in printed
    assert "alid" not in printed
