from __future__ import annotations

import csv
import itertools
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxloop import (
    EMA,
    AveragedValidationPhase,
    Callback,
    CancelFittingException,
    CustomCallback,
    EpochEnd,
    KNNProbe,
    Metric,
    Metrics,
    Phase,
    Recorder,
    StepBegin,
    TrainingPhase,
    ValidationPhase,
    on,
)
from fluxloop.callbacks.csv_logger import CSVLogger
from fluxloop.errors import LogExistsError
from fluxloop.testing import assert_observer, assert_order, toy_learner

toy = partial(toy_learner, num_batches=3)


def error(preds: Any, ys: Any) -> Any:
    return (preds - ys).abs().mean()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def epochs_and_sets(path: Path) -> list[tuple[int, str]]:
    return [(int(row["epoch"]), row["set"]) for row in read(path)]


def test_five_epochs_give_five_rows_and_ten_with_validation(tmp_path: Path) -> None:
    data = (toy().data.training,)
    toy(Recorder(), Metrics(error), CSVLogger(tmp_path / "a.csv"), data=data).fit(5)
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "epoch,set,loss,error"
    assert epochs_and_sets(tmp_path / "a.csv") == [(epoch, "training") for epoch in range(1, 6)]
    toy(Recorder(), Metrics(error), CSVLogger(tmp_path / "b.csv")).fit(5)
    sets = ("training", "validation")
    assert epochs_and_sets(tmp_path / "b.csv") == list(itertools.product(range(1, 6), sets))


def test_the_values_are_those_of_the_history_to_the_bit(tmp_path: Path) -> None:
    learner = toy(Recorder(), Metrics(error), CSVLogger(tmp_path / "log.csv"))
    history = learner.fit(3)
    for name in ("training", "validation"):
        rows = [row for row in read(tmp_path / "log.csv") if row["set"] == name]
        for metric in ("loss", "error"):
            assert [float(row[metric]) for row in rows] == history[f"{name}/{metric}"]


def test_there_is_no_row_for_a_validation_that_does_not_happen(tmp_path: Path) -> None:
    toy(Recorder(), Metrics(), CSVLogger(tmp_path / "log.csv")).fit(2, phases=[TrainingPhase()])
    assert epochs_and_sets(tmp_path / "log.csv") == [(1, "training"), (2, "training")]


class StopAfter(Callback):
    """Stop the fit at the end of an epoch, as early stopping does."""

    reads = ("cbstate.history", "cbstate.metrics")
    run_after = (Metrics,)

    @on(EpochEnd, ValidationPhase)
    def stop(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        if learner.cbstate.history[phase].epochs == 2:
            raise CancelFittingException("enough")


@pytest.mark.slow
def test_early_stopping_leaves_the_same_rows_whatever_the_order_of_the_list(tmp_path: Path) -> None:
    found = set()
    for index, order in enumerate(itertools.permutations(range(4))):
        path = tmp_path / f"{index}.csv"
        given = [Recorder(), Metrics(), CSVLogger(path), StopAfter()]
        toy(*(given[place] for place in order)).fit(9)
        found.add(path.read_text())
    assert len(found) == 1
    assert epochs_and_sets(path) == [(1, "training"), (1, "validation"), (2, "training"), (2, "validation")]


def test_a_metric_that_comes_up_later_gets_a_column(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    metrics = Metrics(Metric(error, "valid_only", phase=ValidationPhase))
    learner = toy(Recorder(), metrics, CSVLogger(path), EMA("model", 0.5))
    learner.fit(1)
    assert path.read_text().splitlines()[0] == "epoch,set,loss,valid_only"
    learner.fit(1, phases=[TrainingPhase(), AveragedValidationPhase()])
    rows = read(path)
    assert list(rows[0]) == ["epoch", "set", "loss", "valid_only", "loss@ema", "valid_only@ema"]
    assert [bool(row["valid_only"]) for row in rows] == [False, True, False, False]
    assert [bool(row["loss@ema"]) for row in rows] == [False, False, False, True]
    assert [path.name] == [each.name for each in tmp_path.iterdir()]


def probe_of(**options: Any) -> KNNProbe:
    rows = torch.rand(16, 1, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
    return KNNProbe("model", k=1, bank=rows, queries=rows, **options)


def found(path: Path) -> list[tuple[int, str, str]]:
    """The rows with a value of the probe, and the loss that stands beside it."""
    rows = [row for row in read(path) if row["knn_model"]]
    return [(int(row["epoch"]), row["set"], "loss" if row["loss"] else "") for row in rows]


def test_what_a_probe_finds_stands_in_the_validation_row_of_its_epoch(tmp_path: Path) -> None:
    learner = toy(Recorder(), Metrics(), CSVLogger(tmp_path / "log.csv"), probe_of(every=2))
    learner.fit(4)
    assert found(tmp_path / "log.csv") == [(2, "validation", "loss"), (4, "validation", "loss")]
    values = [float(row["knn_model"]) for row in read(tmp_path / "log.csv") if row["knn_model"]]
    assert values == learner.history["validation/knn_model"]


def test_what_a_probe_finds_has_a_row_of_its_own_where_no_validation_follows(tmp_path: Path) -> None:
    learner = toy(Recorder(), Metrics(), CSVLogger(tmp_path / "log.csv"), probe_of())
    learner.fit(3, phases=[TrainingPhase(), ValidationPhase(every=2)])
    learner.epoch(TrainingPhase())
    assert found(tmp_path / "log.csv") == [
        (1, "validation", ""),
        (2, "validation", "loss"),
        (3, "validation", "loss"),
        (4, "validation", ""),
    ]


def test_what_a_probe_finds_beside_two_validations_has_a_row_of_its_own(tmp_path: Path) -> None:
    learner = toy(Recorder(), Metrics(), CSVLogger(tmp_path / "log.csv"), probe_of())
    learner.fit(1, phases=[TrainingPhase(), ValidationPhase(), ValidationPhase(name="again")])
    sets = ["training", "ValidationPhase", "again", "validation"]
    assert epochs_and_sets(tmp_path / "log.csv") == [(1, name) for name in sets]


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("moment", range(1, 10))
def test_a_table_with_probes_is_the_same_after_a_kill_at_any_moment(tmp_path: Path, moment: int) -> None:
    class Killed(BaseException):
        pass

    def make(folder: str) -> Any:
        phases = [TrainingPhase(), ValidationPhase(every=2)]
        logger = CSVLogger(tmp_path / folder / "log.csv")
        return toy(Recorder(), Metrics(), logger, probe_of(), num_batches=1), {"epochs": 3, "phases": phases}

    def kill() -> None:
        seen.append(1)
        if len(seen) == moment:
            killed.save(tmp_path / "state.pt")
            raise Killed

    seen: list[int] = []
    whole, options = make("whole")
    whole.fit(**options)
    killed, options = make("killed")
    killed.at_safe_point(kill)
    with pytest.raises(Killed):
        killed.fit(**options)
    resumed, options = make("killed")
    resumed.fit(**options, resume=tmp_path / "state.pt")
    assert read(tmp_path / "killed" / "log.csv") == read(tmp_path / "whole" / "log.csv")


def test_each_row_may_have_the_time_at_which_it_was_written(tmp_path: Path) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    toy(Recorder(), Metrics(), CSVLogger(tmp_path / "log.csv", time=True)).fit(1)
    times = [datetime.fromisoformat(row["time"]) for row in read(tmp_path / "log.csv")]
    assert len(times) == 2
    assert all(before <= time <= datetime.now(timezone.utc) for time in times)


def test_rows_are_in_the_file_when_their_epoch_has_ended_whatever_comes_then(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.csv"

    def fail(learner: Any) -> None:
        assert epochs_and_sets(path) == [(1, "training")]
        raise RuntimeError("broken")

    learner = toy(Recorder(), Metrics(), CSVLogger(path), CustomCallback(fail, StepBegin, ValidationPhase, reads=()))
    with pytest.raises(RuntimeError, match="broken"):
        learner.fit(1)
    assert epochs_and_sets(path) == [(1, "training")]


def test_a_second_fit_appends_and_a_new_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    learner = toy(Recorder(), Metrics(), CSVLogger(path))
    learner.fit(1)
    learner.fit(1)
    assert [epoch for epoch, _ in epochs_and_sets(path)] == [1, 1, 2, 2]
    before = path.read_bytes()
    fresh = toy(Recorder(), Metrics(), CSVLogger(path))
    with pytest.raises(LogExistsError, match=r"earlier run's log.*log\.csv"):
        fresh.fit(1)
    assert fresh.model.value.item() == 0
    assert path.read_bytes() == before


def killed(path: Path, phases: Any = None) -> Path:
    """Run an epoch, save, run a second one, which nobody will remember; give the file."""
    learner = toy(Recorder(), Metrics(error), CSVLogger(path), EMA("model", 0.5))
    learner.fit(1)
    learner.save(path.with_suffix(".pt"))
    learner.fit(1, phases=phases)
    return path.with_suffix(".pt")


def two_epochs(path: Path, **options: Any) -> None:
    """Run two epochs in a new learner."""
    toy(Recorder(), Metrics(error), CSVLogger(path), EMA("model", 0.5)).fit(2, **options)


@pytest.mark.parametrize("tail", ["", "2,train", "2,training,0.5,0.5\n3,tr"])
def test_a_resumed_run_goes_on_in_its_file_without_gap_or_duplicate(tail: str, tmp_path: Path) -> None:
    two_epochs(tmp_path / "whole.csv")
    path = tmp_path / "log.csv"
    state = killed(path)
    with path.open("a") as file:
        file.write(tail)  # and there it is killed
    two_epochs(path, resume=state)
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_columns_that_came_up_after_the_state_are_taken_back(tmp_path: Path) -> None:
    two_epochs(tmp_path / "whole.csv")
    path = tmp_path / "log.csv"
    state = killed(path, [TrainingPhase(), AveragedValidationPhase()])
    assert "loss@ema" in path.read_text()
    two_epochs(path, resume=state)
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_state_from_before_the_first_row_takes_all_back(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    learner = toy(Recorder(), Metrics(), CSVLogger(path))
    learner.save(tmp_path / "state.pt")
    learner.fit(3)
    toy(Recorder(), Metrics(), CSVLogger(path)).fit(1, resume=tmp_path / "state.pt")
    assert epochs_and_sets(path) == [(1, "training"), (1, "validation")]


def test_a_branch_from_an_older_file_does_not_cut_the_table_of_the_run_it_leaves(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    state, before = killed(path), path.read_bytes()
    branch = toy(Recorder(), Metrics(error), CSVLogger(path), EMA("model", 0.5))
    branch.load(state)
    with pytest.raises(LogExistsError, match=r"earlier run's log.*log\.csv"):
        branch.fit(1)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written_is_warned_about_once_and_the_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    learner = toy(Recorder(), Metrics(), CSVLogger(tmp_path / "file" / "log.csv"))
    with pytest.warns(UserWarning, match=r"CSVLogger\(.*log\.csv'\) failed to .*left alone") as caught:
        learner.fit(3)
    assert len(caught) == 1
    assert learner.history[TrainingPhase].epochs == 3


def test_it_runs_after_the_metrics_and_changes_nothing(tmp_path: Path) -> None:
    learner = toy(CSVLogger(tmp_path / "a.csv"), Metrics(), Recorder())
    assert_order(learner, Recorder, Metrics, CSVLogger)
    assert_observer(CSVLogger(tmp_path / "b.csv"), lambda: toy(Recorder(), Metrics()))
    assert repr(CSVLogger("log.csv")) == "CSVLogger(path='log.csv')"


def test_the_rows_of_two_phases_on_one_data_name_the_phase(tmp_path: Path) -> None:
    phases = [TrainingPhase(), ValidationPhase(), ValidationPhase(name="again", every=2)]
    toy(Recorder(), Metrics(), CSVLogger(tmp_path / "log.csv")).fit(3, phases=phases)
    both = ["training", "ValidationPhase", "again"]
    assert epochs_and_sets(tmp_path / "log.csv") == [
        *((1, name) for name in both[:2]),
        *((2, name) for name in both),
        *((3, name) for name in both),
    ]
