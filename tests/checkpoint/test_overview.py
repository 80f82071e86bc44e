"""What runs have come to is read from their checkpoints: nothing is written, and nothing in them is executed."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxloop import (
    Checkpointer,
    CustomCallback,
    EarlyStopping,
    Learner,
    Metrics,
    MetricSource,
    Recorder,
    StepEnd,
    StopOnNaNLoss,
    TrainingPhase,
    ValidationPhase,
    mae,
)
from fluxloop.checkpoint.overview import peek, runs_below
from fluxloop.errors import CheckpointError
from fluxloop.testing import toy_learner


class Spread(MetricSource):
    metric_names = ("spread",)

    def measure(self, learner: Any) -> dict[str, Any]:
        return {"spread": torch.tensor([0.25, 0.5])}


def train(folder: Path, *callbacks: Any, epochs: int = 3, phases: Any = None) -> Learner[Any]:
    learner = toy_learner(Recorder(), Metrics(mae), Checkpointer(folder, keep_last=2), *callbacks, num_batches=4)
    learner.fit(epochs, phases=phases)
    return learner


def test_a_run_is_told_as_its_history_tells_it(tmp_path: Path) -> None:
    learner = train(tmp_path / "runs" / "first", Spread())
    (run,) = runs_below(tmp_path)
    files = list((tmp_path / "runs" / "first").glob("*.pt"))
    assert (run.path, run.files, run.epochs, run.steps) == (tmp_path / "runs" / "first", 2, 3, 12)
    assert run.size == sum(file.stat().st_size for file in files)
    assert run.written == max(file.stat().st_mtime for file in files)
    assert (run.reason, run.problem) == (None, None)
    for name in ("training/loss", "training/mae", "validation/loss", "validation/mae"):
        assert run.series[name] == list(enumerate(learner.history[name], 1))
    assert run.series["validation/spread/1"] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert len(run.series) == 6


def test_runs_in_several_folders_are_told_by_name_each_with_why_it_stopped(tmp_path: Path) -> None:
    first = train(tmp_path / "b", EarlyStopping(1, min_delta=1e6), epochs=9)
    train(tmp_path / "a" / "deep", epochs=1, phases=[TrainingPhase(), ValidationPhase(), ValidationPhase(name="Again")])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "epoch-of-mine.pt").write_text("no checkpoint")
    deep, other = runs_below(tmp_path)
    assert (deep.path, other.path) == (tmp_path / "a" / "deep", tmp_path / "b")
    assert (deep.reason, other.reason) == (None, first.history.stop_reason)
    assert other.epochs == 2
    assert {"training/loss", "ValidationPhase/loss", "Again/loss"} <= deep.series.keys()


def spoiled(step: int) -> Any:
    """Data whose row of a step is not finite."""
    xs = torch.ones(2, 1)
    return ([(xs, xs * (float("nan") if n == step else 1.0)) for n in range(1, 5)], [(xs, xs)])


def test_a_run_that_stopped_at_nan_says_why_until_it_goes_on(tmp_path: Path) -> None:
    def learner(data: Any) -> Learner[Any]:
        return toy_learner(Recorder(), Metrics(), StopOnNaNLoss(), Checkpointer(tmp_path), data=data)

    with pytest.warns(UserWarning, match="the fit stops"):
        learner(spoiled(3)).fit(2, resume=tmp_path)
    (run,) = runs_below(tmp_path)
    assert run.reason is not None
    assert re.fullmatch(r"the loss became nan in TrainingPhase\(\), epoch 1, step 3 of the run", run.reason)
    assert run.problem is None
    seen: list[str | None] = []
    again = learner(spoiled(0))
    again.at_safe_point(lambda: seen.extend(run.reason for run in runs_below(tmp_path)))
    with pytest.warns(UserWarning, match="data"):
        again.fit(2, resume=tmp_path)
    (run,) = runs_below(tmp_path)
    assert (run.epochs, run.reason) == (2, None)
    assert set(seen) == {None}


def test_a_run_that_failed_says_with_which_error(tmp_path: Path) -> None:
    def fail(learner: Any) -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError):
        train(tmp_path, CustomCallback(fail, StepEnd))
    (run,) = runs_below(tmp_path)
    assert run.reason == "KeyError: 'gone'"


def test_a_run_that_was_refused_says_nothing_in_the_folder_of_another(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(CheckpointError, match="an earlier run has come further"):
        train(tmp_path)
    (run,) = runs_below(tmp_path)
    assert run.reason is None
    (run,) = runs_below(tmp_path)
    (tmp_path / "ended.txt").mkdir()
    assert next(runs_below(tmp_path)).reason is None


def test_reading_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    train(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    assert len(list(runs_below(tmp_path))) == 1
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_a_damaged_newest_file_is_named_and_the_one_before_it_read(tmp_path: Path) -> None:
    train(tmp_path)
    newest = max(tmp_path.glob("epoch-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    (run,) = runs_below(tmp_path)
    assert (run.epochs, run.files, len(run.series["training/loss"])) == (2, 2, 2)
    assert run.problem is not None
    assert newest.name in run.problem
    for file in tmp_path.glob("epoch-*.pt"):
        file.write_bytes(b"")
    (run,) = runs_below(tmp_path)
    assert (run.epochs, run.steps, run.series, run.written, run.size) == (0, 0, {}, None, 0)


class Harm:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return Path.touch, (self.touched,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    path, touched = tmp_path / "epoch-0001-step-00000001-phase-0.pt", tmp_path / "touched"
    torch.save({"fluxloop": 1, "history": Harm(touched)}, path)
    (run,) = runs_below(tmp_path)
    assert run.problem is not None
    assert not touched.exists()
    pickle.loads(pickle.dumps(Harm(touched)))
    assert touched.exists()  # it would have been


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt is no checkpoint of fluxloop's"):
        peek(tmp_path / "weights.pt")


def test_the_parts_of_sharded_checkpoints_count_in_their_size_and_are_no_checkpoints(tmp_path: Path) -> None:
    train(tmp_path)
    (before,) = runs_below(tmp_path)
    newest = max(tmp_path.glob("epoch-*.pt"))
    newest.with_name(f"{newest.stem}.parts-0123abcd-1-of-2.pt").write_bytes(b"a part")
    (run,) = runs_below(tmp_path)
    assert (run.files, run.size, run.problem) == (2, before.size + 6, None)
