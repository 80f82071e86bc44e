from __future__ import annotations

from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluxloop import (
    CancelFittingException,
    Checkpointer,
    CustomCallback,
    EpochBegin,
    Learner,
    Metric,
    Metrics,
    MetricsPrinter,
    MissingProducerError,
    Recorder,
    StepEnd,
    TrainingPhase,
    ValidationPhase,
    runstep,
)
from fluxloop.callbacks import progress
from fluxloop.signals import TERMINATED
from fluxloop.testing import Coefficient, assert_observer, assert_order, toy_learner


class Probe(ValidationPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            state.preds = state.xs


def number(value: float, name: str, **options: Any) -> Metric:
    return Metric(lambda preds: torch.tensor(value, dtype=torch.float64), name=name, inputs=("preds",), **options)


def still_learner(*metrics: Any, printer: MetricsPrinter | None = None) -> Learner:
    """Loss 0.125 in each epoch."""
    xs = torch.ones(2, 1)
    return Learner(
        Coefficient(0.125),
        lambda preds, ys: preds.mean() + 0 * ys.mean(),
        data=([(xs, xs)], [(xs, xs)]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        callbacks=[Recorder(), Metrics(*metrics), printer or MetricsPrinter()],
        default_callbacks=False,
    )


def test_a_line_per_epoch_and_phase_with_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    still_learner(number(2 / 3, "level"), number(12345678.0, "size")).fit(2)
    assert capsys.readouterr().out == (
        "TrainingPhase      epoch 1/2  loss 0.125    level 0.6667   size 1.235e+07\n"
        "ValidationPhase    epoch 1/2  loss 0.125    level 0.6667   size 1.235e+07\n"
        "TrainingPhase      epoch 2/2  loss 0.125    level 0.6667   size 1.235e+07\n"
        "ValidationPhase    epoch 2/2  loss 0.125    level 0.6667   size 1.235e+07\n"
    )


class AVeryLongNameOfAPhase(TrainingPhase): ...


def test_values_of_a_metric_stand_below_each_other_in_all_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    values = iter([0.5176, 0.541, 0.06327, 12.345, 1.234e-05, 0.3, *[0.25] * 5])  # one in each epoch
    turning = Metric(lambda preds: torch.tensor(next(values)), name="turning", inputs=("preds",))
    still_learner(turning, number(0.5, "still")).fit(11, phases=[AVeryLongNameOfAPhase()])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "AVeryLongNameOfAPhase epoch 1/11  loss 0.125    turning 0.5176   still 0.5"
    assert lines[4] == "AVeryLongNameOfAPhase epoch 5/11  loss 0.125    turning 1.234e-05  still 0.5"
    assert lines[10] == "AVeryLongNameOfAPhase epoch 11/11 loss 0.125    turning 0.25       still 0.5"
    assert {line.index("turning") for line in lines} == {48}
    assert [line.index("still") for line in lines] == [65] * 4 + [67] * 7  # one wider value moves what follows once


def test_the_number_of_digits_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    still_learner(number(2 / 3, "level"), printer=MetricsPrinter(digits=2)).fit(1, phases=[TrainingPhase()])
    assert capsys.readouterr().out == "TrainingPhase      epoch 1    loss 0.12   level 0.67\n"


def test_a_phase_without_metrics_prints_its_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    still_learner().fit(1, phases=[Probe()])
    assert capsys.readouterr().out == "Probe              epoch 1\n"


def test_values_that_are_no_numbers_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    class Confusion:
        def reset(self) -> None: ...

        def update(self, preds: torch.Tensor, ys: torch.Tensor) -> None: ...

        def compute(self) -> torch.Tensor:
            return torch.zeros(2, 2)

    learner = still_learner(Metric(Confusion(), name="confusion"))
    with pytest.warns(UserWarning, match=r"the metrics 'confusion' .* are kept in the history"):
        learner.fit(1, phases=[TrainingPhase()])
    assert capsys.readouterr().out == "TrainingPhase      epoch 1    loss 0.125\n"


def test_metrics_of_one_phase_are_printed_there_alone(capsys: pytest.CaptureFixture[str]) -> None:
    still_learner(number(1.0, "hits", phase=ValidationPhase)).fit(1)
    assert capsys.readouterr().out == (
        "TrainingPhase      epoch 1    loss 0.125\nValidationPhase    epoch 1    loss 0.125    hits 1\n"
    )


def test_an_epoch_that_did_not_end_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(learner: Any) -> None:
        raise CancelFittingException("enough")

    toy_learner(Recorder(), Metrics(), MetricsPrinter(), CustomCallback(stop, StepEnd)).fit(1)
    assert capsys.readouterr().out == "stopped: enough\n"


def test_a_fit_that_fails_or_is_ended_by_a_signal_has_no_line_of_why(capsys: pytest.CaptureFixture[str]) -> None:
    """An error speaks for itself, and a process that ends says so on standard error."""

    def stop(learner: Any) -> None:
        raise error

    learner = toy_learner(Recorder(), Metrics(), MetricsPrinter(), CustomCallback(stop, StepEnd))
    for error in (KeyError("gone"), CancelFittingException(TERMINATED)):
        with pytest.raises(KeyError) if isinstance(error, KeyError) else nullcontext():
            learner.fit(1)
    assert capsys.readouterr().out == ""


def test_epochs_go_on_counting_in_the_next_fit(capsys: pytest.CaptureFixture[str]) -> None:
    learner = still_learner()
    learner.fit(1, phases=[TrainingPhase()])
    learner.fit(1, phases=[TrainingPhase()])
    assert [line.split("loss")[0].split() for line in capsys.readouterr().out.splitlines()] == [
        ["TrainingPhase", "epoch", "1"],
        ["TrainingPhase", "epoch", "2"],
    ]


def test_two_phases_on_one_data_are_printed_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    still_learner().fit(1, phases=[TrainingPhase(), ValidationPhase(name="noisy"), ValidationPhase()])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["TrainingPhase", "noisy", "ValidationPhase"]


def test_a_sparse_validation_is_printed_at_the_epochs_of_the_fit(capsys: pytest.CaptureFixture[str]) -> None:
    still_learner().fit(5, phases=[TrainingPhase(), ValidationPhase(every=2)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines if line[0] == "ValidationPhase"] == ["2/5", "4/5", "5/5"]


def test_the_time_gone_and_left_can_be_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])

    def work(learner: Any) -> None:
        now[0] += 10

    learner = still_learner(printer=MetricsPrinter(time=True))
    learner.add_callback(CustomCallback(work, EpochBegin))
    learner.fit(3)
    assert [line.split("loss 0.125")[1].strip() for line in capsys.readouterr().out.splitlines()] == [
        "(00:10, 00:20 left)",  # what validation takes, nobody has seen yet
        "(00:20, 00:40 left)",
        "(00:30, 00:30 left)",
        "(00:40, 00:20 left)",
        "(00:50, 00:10 left)",
        "(01:00, 00:00 left)",
    ]


def test_lines_of_a_log_can_begin_with_date_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    before = datetime.now().replace(microsecond=0)
    still_learner(printer=MetricsPrinter(stamps=True)).fit(2, phases=[TrainingPhase()])
    lines = capsys.readouterr().out.splitlines()
    assert [line[20:].split()[:3] for line in lines] == [["TrainingPhase", "epoch", f"{n}/2"] for n in (1, 2)]
    stamps = [datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in lines]
    assert before <= stamps[0] <= stamps[1] <= datetime.now()


def test_it_runs_after_what_it_prints_and_says_what_is_missing() -> None:
    assert_order(toy_learner(MetricsPrinter(), Metrics(), Recorder()), Recorder, Metrics, MetricsPrinter)
    with pytest.raises(MissingProducerError, match=r"MetricsPrinter reads 'cbstate\.metrics'.*add Metrics\(\)"):
        toy_learner(Recorder(), MetricsPrinter())


def test_printing_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert_observer(MetricsPrinter(), lambda: toy_learner(Recorder(), Metrics()))
    assert "TrainingPhase      epoch 2" in capsys.readouterr().out


def test_evaluate_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    learner = Learner(Coefficient(), nn.functional.l1_loss, default_callbacks=True)
    learner.evaluate((torch.ones(4, 1), torch.ones(4, 1)))
    assert capsys.readouterr().out == ""


def test_one_epoch_of_one_step_is_told_in_the_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def learner() -> Learner:
        made = still_learner()
        made.add_callback(Checkpointer(tmp_path))
        return made

    learner().fit(1, phases=[TrainingPhase()], resume=tmp_path)
    learner().fit(2, phases=[TrainingPhase()], resume=tmp_path)
    assert "resumed after TrainingPhase 1 epoch, 1 step\n" in capsys.readouterr().out
