from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import threading
import warnings
from collections.abc import Callable
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fluxloop
from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Callback,
    CancelFittingException,
    CustomCallback,
    CycleEnd,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    FittingPhase,
    Learner,
    MetricError,
    Metrics,
    MissingProducerError,
    PerOptimizerPhase,
    Phase,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.early_stopping import EarlyStopping
from fluxloop.checkpoint import folder as folder_module
from fluxloop.checkpoint.folder import LATEST, MARKER, Folder, read
from fluxloop.errors import CallbackConflictError, CheckpointError
from fluxloop.persist.plain import snapshot
from fluxloop.signals import EXIT_CODE
from fluxloop.testing import (
    Coefficient,
    EventRecorder,
    assert_observer,
    assert_same_bits,
    bits,
    infer_access,
    toy_learner,
)
from toys import Scored, Versioned

adam = partial(torch.optim.Adam, lr=0.01)


def toy(*callbacks: Callback, **options: Any) -> Learner[Any]:
    """Four batches of training data in a shuffled order, and the same for validation."""
    torch.manual_seed(7)
    xs = torch.rand(8, 1)
    data = (TensorBatches(xs, 3 * xs, batch_size=2, shuffle=True), TensorBatches(xs, 3 * xs, batch_size=2))
    return toy_learner(*callbacks, **{"data": data, "optimizer": adam, **options})


def files(folder: Path) -> list[tuple[int, int, int]]:
    return [progress for progress, _ in Folder(folder).files()]


def epochs_of(folder: Path) -> list[int]:
    return [progress[0] for progress in files(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def parts(state: Any, path: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {k: v for key, item in state.items() for k, v in parts(item, f"{path}.{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for key, item in enumerate(state) for k, v in parts(item, f"{path}.{key}").items()}
    return {path: state.tolist() if isinstance(state, Tensor) else state}


class Crash(UnsafeCallback):
    """Raises in a step of training, counted over all epochs from 1."""

    def __init__(self, step: int, error: type[BaseException] = OSError) -> None:
        self.step = step
        self.error = error

    @on(StepEnd, AbstractTrainingPhase)
    def crash(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        if learner.history[type(phase)].steps == self.step:
            raise self.error("the disk with the data is gone")


class Stop(UnsafeCallback):
    """Ends the fit at the end of an epoch of a phase."""

    def __init__(self, epochs: int, phase: type[Phase] = ValidationPhase) -> None:
        self.epochs = epochs
        self.phase = phase

    @on(EpochEnd)
    def stop(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        if isinstance(phase, self.phase) and learner.history[type(phase)].epochs == self.epochs:
            raise CancelFittingException("good enough")


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"every=0\) was given; expected 1 or more epochs"),
        ({"every": -1}, r"every=-1\) was given; expected 1 or more"),
        ({"every": 1.5}, r"every=1.5\) was given; expected 1 or more epochs"),
        ({"every": True}, r"every=True\) was given"),
        ({"every": nan}, r"every=nan\) was given"),
        ({"every": float("inf")}, r"every=inf\) was given"),
        ({"every": "often"}, "every='often'"),
        ({"every": 0, "unit": "second"}, r"expected 1 or more seconds|more than 0 seconds"),
        ({"unit": "minute"}, r"unit='minute'\) was given; expected 'epoch', 'step' or 'second'"),
        ({"keep_last": 0}, r"keep_last=0\) was given; expected a whole number, 1 or more, or None for all"),
        ({"keep_last": True}, "keep_last=True"),
        ({"keep_last": 1.5}, "keep_last=1.5"),
        ({"keep_last": "all"}, "keep_last='all'"),
        ({"keep_best": -1}, "keep_best=-1"),
        ({"keep_best": 1.5}, "keep_best=1.5"),
        ({"keep_best": None}, "keep_best=None"),
        ({"mode": "least"}, "mode='least' was given; expected 'min' or 'max'"),
        ({"monitor": "loss"}, "monitor='loss' was given; expected the data's key and the metric's name"),
    ],
    ids=repr,
)
def test_arguments_out_of_range_are_refused_before_anything_is_made(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError, MetricError), match=message):
        Checkpointer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_it_prints_its_arguments(tmp_path: Path) -> None:
    assert repr(Checkpointer("runs/a", every=2)).startswith("Checkpointer(folder=PosixPath('runs/a'), every=2, unit=")


# Which files there are


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])])
def test_the_last_epoch_is_always_there(every: int, expected: list[int], tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path, every=every, keep_last=None)).fit(5)
    assert epochs_of(tmp_path) == expected
    assert files(tmp_path)[-1] == (5, 40, 0)


def test_after_so_many_training_steps(tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path, every=3, unit="step", keep_last=None)).fit(2)
    assert files(tmp_path) == [(0, 3, 0), (1, 10, 0), (2, 16, 0)]  # validation's four steps count in the name
    toy(Checkpointer(tmp_path / "b", every=4, unit="step", keep_last=None)).fit(2, phases=[TrainingPhase()])
    assert files(tmp_path / "b") == [(0, 4, 0), (1, 8, 0), (2, 8, 0)]


def test_after_so_many_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(Callback):
        now = 100.0

        @on(StepEnd)
        def tick(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            Clock.now += 1

    monkeypatch.setattr("fluxloop.callbacks.checkpointer.monotonic", lambda: Clock.now)
    toy(Clock(), Checkpointer(tmp_path, every=2.5, unit="second", keep_last=None)).fit(2, phases=[TrainingPhase()])
    assert files(tmp_path) == [(0, 3, 0), (1, 6, 0), (2, 8, 0)]


@pytest.mark.filterwarnings("ignore:.*__closure__.*cannot be saved")
def test_where_the_run_begins_is_kept_until_there_is_more(tmp_path: Path) -> None:
    seen: list[list[tuple[int, int, int]]] = []
    look = CustomCallback(lambda learner: seen.append(files(tmp_path)), StepEnd, AbstractTrainingPhase)
    learner = toy(look, Checkpointer(tmp_path, every=3, unit="step", keep_last=None))
    learner.fit(1, phases=[TrainingPhase()])
    assert seen == [[(0, 0, 0)]] * 3 + [[(0, 3, 0)]]


def test_a_run_without_a_seed_that_is_killed_early_begins_again_with_the_same(tmp_path: Path) -> None:
    first = toy(Recorder(), Crash(2), Checkpointer(tmp_path), seed=3)
    with pytest.raises(OSError, match="gone"):
        first.fit(1)
    data = vars(first.data)
    again = Learner(
        Coefficient(), nn.functional.l1_loss, data=data, optimizer=adam, callbacks=[Recorder()], default_callbacks=False
    )
    again.fit(1, resume=tmp_path)
    plain = toy(Recorder(), seed=3)
    plain.fit(1)
    assert again.seed == 3
    assert_same_bits(plain, again)


def test_the_newest_stay_and_the_pointer_names_the_last(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=3)
    assert keeper.last is None
    toy(keeper).fit(5)
    assert epochs_of(tmp_path) == [3, 4, 5]
    assert keeper.last == tmp_path / (tmp_path / LATEST).read_text().strip() == Folder(tmp_path).files()[-1][1]


def test_the_new_one_is_written_before_an_old_one_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    replace, unlink = os.replace, Path.unlink

    def renamed(a: Path, b: Path) -> None:
        done.append(f"write {b.name[:10]}")
        replace(a, b)

    def removed(path: Path, missing_ok: bool = False) -> None:
        done.append(f"remove {path.name[:10]}")
        unlink(path, missing_ok)

    learner = toy(Checkpointer(tmp_path, keep_last=1))
    monkeypatch.setattr(folder_module.os, "replace", renamed)
    monkeypatch.setattr(Path, "unlink", removed)
    learner.fit(2)
    assert [what for what in done if "epoch" in what or "latest" in what] == [
        "write epoch-0000",
        "write latest",
        "write epoch-0001",
        "write latest",
        "remove epoch-0000",
        "write epoch-0002",
        "write latest",
        "remove epoch-0001",
    ]


def test_the_tenth_is_newer_than_the_second(tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path, keep_last=2)).fit(11, phases=[TrainingPhase()])
    assert epochs_of(tmp_path) == [10, 11]
    learner = toy(Checkpointer(tmp_path, keep_last=2))
    learner.fit(12, resume=tmp_path, phases=[TrainingPhase()])
    assert learner.history.cycles == 12


def test_other_files_in_a_runs_folder_are_left_alone(tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path, keep_last=1)).fit(1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "epoch-0001-best.pt").write_text("mine")
    toy(Checkpointer(tmp_path, keep_last=1)).fit(3, resume=tmp_path)
    assert epochs_of(tmp_path) == [3]
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "epoch-0001-best.pt").read_text() == "mine"


# The best


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([5, 1, 4, 2, 3, 6], {"keep_last": 1, "keep_best": 2}, [2, 4, 6]),
        ([5, 1, 4, 2, 3, 6], {"keep_last": 2, "keep_best": 1}, [2, 5, 6]),
        ([5, 1, 4, 2, 3, 6], {"keep_last": 1, "keep_best": 1, "mode": "max"}, [6]),
        ([5, 1, 4, 2, 3, 6], {"keep_last": 1, "keep_best": 2, "mode": "max"}, [1, 6]),
        ([nan, 1, nan, 2, nan, nan], {"keep_last": 1, "keep_best": 2}, [2, 4, 6]),
        ([nan, 1, nan, 2, nan, nan], {"keep_last": 1, "keep_best": 3, "mode": "max"}, [2, 4, 6]),
        ([nan] * 6, {"keep_last": 1, "keep_best": 3}, [6]),
        ([1] * 6, {"keep_last": 1, "keep_best": 1}, [1, 6]),
    ],
    ids=repr,
)
def test_the_best_stay_besides_the_newest(
    values: list[float], options: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    learner = toy(Recorder(), Metrics(), Checkpointer(tmp_path, **options))
    learner.fit(6, phases=[TrainingPhase(), Scored(values)])
    assert epochs_of(tmp_path) == expected


def test_five_epochs_five_files_and_eight_of_ten_stay_and_a_very_bad_newest_is_still_kept(tmp_path: Path) -> None:
    values = [10 - n for n in range(9)] + [1e6]

    def learner() -> Learner[Any]:
        return toy(Recorder(), Metrics(), Checkpointer(tmp_path, keep_last=1, keep_best=8))

    learner().fit(5, phases=[TrainingPhase(), Scored(values)])
    assert epochs_of(tmp_path) == [1, 2, 3, 4, 5]
    learner().fit(10, resume=tmp_path, phases=[TrainingPhase(), Scored(values)])
    assert epochs_of(tmp_path) == [2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_a_resumed_run_keeps_the_best_of_before(tmp_path: Path) -> None:
    values = [3, 1, 4, 5, 2, 6]
    for until in range(1, 7):
        learner = toy(Recorder(), Metrics(), Checkpointer(tmp_path, keep_last=1, keep_best=1))
        learner.fit(until, resume=tmp_path, phases=[TrainingPhase(), Scored(values)])
    assert epochs_of(tmp_path) == [2, 6]


def test_another_metric_than_the_validation_loss(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=1, keep_best=1, monitor="training/loss", mode="max")
    toy(Recorder(), Metrics(), keeper).fit(3, phases=[TrainingPhase()])
    assert epochs_of(tmp_path) == [1, 3]  # the loss falls


@pytest.mark.parametrize(("unit", "every"), [("step", 3), ("second", 1e9)])
def test_the_best_epochs_stay_whatever_the_unit(unit: Any, every: float, tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, unit=unit, every=every, keep_last=1, keep_best=1)
    toy(Recorder(), Metrics(), keeper).fit(4, phases=[TrainingPhase(), Scored([3, 1, 2, 4])])
    assert epochs_of(tmp_path) == [2, 4]


def test_an_epoch_without_a_new_value_is_no_best(tmp_path: Path) -> None:
    class Sometimes(Scored):
        def epoch(self, learner: Learner[Any], data: Any) -> None:
            if learner.history[TrainingPhase].epochs % 2 == 1:
                super().epoch(learner, data)

    learner = toy(Recorder(), Metrics(), Checkpointer(tmp_path, keep_last=1, keep_best=2))
    learner.fit(7, phases=[TrainingPhase(), Sometimes([4.0, 3.0, 2.0, 5.0])])
    assert epochs_of(tmp_path) == [3, 5, 7]


def test_an_unknown_metric_is_named_with_those_there_are(tmp_path: Path) -> None:
    learner = toy(Recorder(), Metrics(), Checkpointer(tmp_path, keep_best=1, monitor="validation/acuracy"))
    with pytest.raises(
        MetricError, match=r"no phase of this fit records 'validation/acuracy', .*; it records .*'validation/loss'"
    ):
        learner.fit(2)


def test_the_best_without_metrics_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises((MissingProducerError, CheckpointError), match=r"Metrics\(\)"):
        toy(steps := EventRecorder(), Checkpointer(tmp_path, keep_best=1)).fit(2)
    assert "StepBegin" not in steps.events


# Whose folder


def test_a_foreign_folder_is_refused_and_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is no folder of checkpoints: it has thesis.tex in it"):
        toy(Checkpointer(tmp_path))
    recorder = EventRecorder()
    with pytest.raises(CheckpointError, match=r"is no folder of checkpoints: it has thesis.tex in it"):
        toy(recorder).fit(1, resume=tmp_path)
    assert recorder.trace == []
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


def test_new_empty_and_earlier_folders_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        for until in (1, 2):
            learner = toy(Checkpointer(tmp_path / name))
            learner.fit(until, resume=tmp_path / name)
            assert learner.history.cycles == until


def test_a_folder_of_a_run_killed_before_its_first_checkpoint_is_taken(tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]
    toy(Checkpointer(tmp_path)).fit(1, resume=tmp_path)
    assert epochs_of(tmp_path) == [1]


def test_a_fresh_run_in_a_used_folder_is_refused_before_training(tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path)).fit(3)
    before = contents(tmp_path)
    learner, recorder = toy(Checkpointer(tmp_path)), EventRecorder()
    learner.add_callback(recorder)
    weights = bits(learner)
    for epochs in (1, 5, 3):
        with pytest.raises(CheckpointError, match=r"an earlier run has come further .*fit\(epochs, resume="):
            learner.fit(epochs)
    assert "StepBegin" not in recorder.events
    assert contents(tmp_path) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bits(learner).items())


def test_a_second_fit_of_the_same_learner_goes_on(tmp_path: Path) -> None:
    learner = toy(Checkpointer(tmp_path, keep_last=None))
    learner.fit(2)
    first = contents(tmp_path)
    learner.fit(2)
    assert epochs_of(tmp_path) == [1, 2, 3, 4]
    assert {name: bytes for name, bytes in contents(tmp_path).items() if name in first and name != LATEST} == {
        name: bytes for name, bytes in first.items() if name != LATEST
    }
    plain = toy()
    plain.fit(2)
    plain.fit(2)
    assert_same_bits(learner, plain)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_second_fit_goes_on_also_where_the_first_was_ended_inside_a_cycle(
    phase: type[Phase], unit: Any, tmp_path: Path
) -> None:
    learner = toy(Stop(1, phase), Checkpointer(tmp_path, unit=unit, keep_last=1))
    learner.fit(3)
    learner.fit(1)
    newest = Folder(tmp_path).files()[-1][1]
    assert learner.get_callback(Checkpointer).last == newest  # type: ignore[union-attr]  # it is there
    assert read(newest)["history"]["cycles"] == learner.history.cycles


def test_a_second_fit_goes_on_where_ctrl_c_ended_the_first_in_its_validation(tmp_path: Path) -> None:
    class Interrupt(UnsafeCallback):
        @on(StepEnd, ValidationPhase)
        def interrupt(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            if learner.history[ValidationPhase].steps == 2:
                os.kill(os.getpid(), signal.SIGINT)

    learner = toy(Recorder(), Interrupt(), Checkpointer(tmp_path, keep_last=1))
    assert learner.fit(3).stop_reason == "interrupted (Ctrl+C)"
    assert files(tmp_path)[0][0] == 0
    learner.fit(1)
    assert epochs_of(tmp_path) == [1]


def test_the_advice_after_an_early_stop_works(tmp_path: Path) -> None:
    toy(Recorder(), Stop(2, TrainingPhase), Checkpointer(tmp_path)).fit(5)
    with pytest.warns(UserWarning, match=r"To train further: learner.load\(file\), then learner.fit\(epochs\)"):
        toy(Recorder(), Checkpointer(tmp_path)).fit(5, resume=tmp_path)
    learner = toy(Recorder(), keeper := Checkpointer(tmp_path))
    learner.load(Folder(tmp_path).files()[-1][1])
    learner.fit(2)
    assert keeper.last is not None
    assert read(keeper.last)["history"]["cycles"] == learner.history.cycles == 3


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    learner = toy(Checkpointer(tmp_path))
    learner.fit(1)

    class Competitor(UnsafeCallback):
        @on(EpochEnd, ValidationPhase)
        def write(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
            Folder(tmp_path).add((2, 16, 0), {"fluxloop": 1, "of": "another run"})

    learner.add_callback(Competitor())
    with pytest.raises(
        CheckpointError, match=r"epoch-0002-step-00000016-.*.pt is there already, and is not overwritten"
    ):
        learner.fit(1)
    assert read(tmp_path / "epoch-0002-step-00000016-phase-0.pt")["of"] == "another run"


def test_trying_a_callback_out_leaves_the_runs_folder_alone(tmp_path: Path) -> None:
    learner = toy(Checkpointer(tmp_path, unit="step"))
    infer_access(EventRecorder(), learner)
    learner.check()
    learner.evaluate()
    learner.predict(torch.zeros(2, 1))
    assert files(tmp_path) == []
    learner.fit(1)


# Going on


@pytest.mark.slow
def test_the_epochs_are_the_total_and_the_end_is_the_same_to_the_bit(tmp_path: Path) -> None:
    plain = toy(Recorder(), Metrics())
    plain.fit(5)
    for until in (2, 5):
        learner = toy(Recorder(), Metrics(), Checkpointer(tmp_path))
        history = learner.fit(until, resume=tmp_path)
    assert history.cycles == learner.history[TrainingPhase].epochs == 5
    assert history["validation/loss"] == plain.history["validation/loss"]
    assert_same_bits(plain, learner)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_finished_run_trains_nothing_however_often(every: int, tmp_path: Path) -> None:
    first = toy(Checkpointer(tmp_path, every=every))
    first.fit(4)
    before = contents(tmp_path)
    for _ in range(3):
        fired: list[Phase] = []
        note = CustomCallback(lambda learner, into=fired: into.append(learner.scope.phase), Event)
        learner = toy(note, Checkpointer(tmp_path, every=every))
        history = learner.fit(4, resume=tmp_path)
        assert len(fired) == 2
        assert all(isinstance(phase, FittingPhase) for phase in fired)
        assert history.cycles == 4
        assert_same_bits(first, learner)
        assert contents(tmp_path) == before


def test_fewer_epochs_than_trained_are_refused(tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path)).fit(3)
    learner = toy(Checkpointer(tmp_path))
    before = bits(learner)
    with pytest.raises(CheckpointError, match=r"fit\(2, resume=...\) was asked for, and 3 epochs are complete; epochs"):
        learner.fit(2, resume=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert learner.history.cycles == 0


def test_an_epoch_under_way_counts_as_one_that_has_to_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        toy(Recorder(), Crash(6), Checkpointer(tmp_path, unit="step")).fit(3)
    with pytest.raises(CheckpointError, match=r"1 epochs are complete and one is under way; .*: fit\(2, resume=...\)"):
        toy(Recorder(), Checkpointer(tmp_path, unit="step")).fit(1, resume=tmp_path)


def test_a_run_stopped_early_trains_nothing_and_warns_and_keeps_its_reason(tmp_path: Path) -> None:
    first = toy(Recorder(), Stop(2), Checkpointer(tmp_path))
    assert first.fit(5).stop_reason == "good enough"
    before = contents(tmp_path)
    for _ in range(2):
        learner = toy(Recorder(), Stop(2), Checkpointer(tmp_path))
        with pytest.warns(UserWarning, match="has already stopped: good enough. Nothing is trained. To train further"):
            history = learner.fit(9, resume=tmp_path)
        assert history.stop_reason == "good enough"
        assert_same_bits(first, learner)
        assert contents(tmp_path) == before


def test_a_run_that_early_stopping_ended_trains_nothing_and_warns(tmp_path: Path) -> None:
    def learner() -> Learner[Any]:
        return toy(Recorder(), Metrics(), EarlyStopping(2), Checkpointer(tmp_path))

    values = [1.0, 2, 3, 4, 5, 6]
    first = learner()
    reason = first.fit(6, phases=[TrainingPhase(), Scored(values)]).stop_reason
    assert reason is not None
    assert first.history.cycles == 3
    again = learner()
    with pytest.warns(UserWarning, match="has already stopped: .*Nothing is trained"):
        history = again.fit(6, phases=[TrainingPhase(), Scored(values)], resume=tmp_path)
    assert (history.stop_reason, history.cycles) == (reason, 3)
    assert_same_bits(first, again)


def test_a_resumed_early_stopping_goes_on_counting(tmp_path: Path) -> None:
    values = [1.0, 2, 3, 4, 5, 6]
    for until in (2, 6):
        learner = toy(Recorder(), Metrics(), EarlyStopping(3), Checkpointer(tmp_path))
        learner.fit(until, phases=[TrainingPhase(), Scored(values)], resume=tmp_path)
    assert learner.history.cycles == 4


def test_a_crash_leaves_the_epochs_before_it_and_the_rerun_ends_with_the_same_bits(tmp_path: Path) -> None:
    plain = toy(Recorder())
    plain.fit(5)
    crashing = toy(Recorder(), Crash(10), Checkpointer(tmp_path))
    with pytest.raises(OSError, match="the disk with the data is gone"):
        crashing.fit(5, resume=tmp_path)
    assert epochs_of(tmp_path) == [1, 2]
    second = Folder(tmp_path).files()[-1][1]
    two = toy(Recorder())
    two.fit(2)
    loaded = toy(Recorder())
    with pytest.warns(UserWarning, match="states of Checkpointer, which are not among the callbacks now"):
        loaded.load(second)
    assert_same_bits(two, loaded)
    again = toy(Recorder(), Checkpointer(tmp_path))
    again.fit(5, resume=tmp_path)
    assert_same_bits(plain, again)
    assert epochs_of(tmp_path) == [4, 5]


def test_a_crashed_epoch_is_saved_under_no_number(tmp_path: Path) -> None:
    for error in (OSError, KeyError, SystemExit):
        folder = tmp_path / error.__name__
        with pytest.raises(error):
            toy(Recorder(), Crash(3, error), Checkpointer(folder)).fit(2)
        assert files(folder) == [(0, 0, 0)]


def test_a_fit_cut_in_the_middle_of_an_epoch_keeps_what_was_written_before(tmp_path: Path) -> None:
    plain = toy(Recorder())
    plain.fit(3)
    cancelled = toy(Recorder(), Crash(6, CancelFittingException), Checkpointer(tmp_path))
    assert cancelled.fit(3).stop_reason == "the disk with the data is gone"
    assert files(tmp_path) == [(1, 8, 0)]
    again = toy(Recorder(), Checkpointer(tmp_path))
    again.fit(3, resume=tmp_path)
    assert_same_bits(plain, again)


def test_an_incomplete_newest_checkpoint_is_trained_again(tmp_path: Path) -> None:
    plain = toy(Checkpointer(tmp_path, keep_last=3))
    plain.fit(3)
    cut(Folder(tmp_path).files()[-1][1])
    learner = toy(Checkpointer(tmp_path, keep_last=3))
    with pytest.warns(UserWarning, match="epoch-0003-.* is incomplete or damaged.*; the one before it is taken"):
        learner.fit(3, resume=tmp_path)
    assert_same_bits(plain, learner)
    assert Folder(tmp_path).is_complete(Folder(tmp_path).files()[-1][1])


def test_where_no_checkpoint_is_complete_nothing_is_trained(tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path)).fit(2)
    for _, path in Folder(tmp_path).files():
        cut(path)
    recorder = EventRecorder()
    learner = toy(recorder, Checkpointer(tmp_path))
    with (
        pytest.warns(UserWarning, match="the one before it is taken"),
        pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is complete"),
    ):
        learner.fit(2, resume=tmp_path)
    assert recorder.trace == []


def test_one_file_can_be_gone_on_from_in_another_folder(tmp_path: Path) -> None:
    first = toy(Checkpointer(tmp_path / "a", keep_last=None))
    first.fit(3)
    early = Folder(tmp_path / "a").files()[0][1]
    with pytest.raises(CheckpointError, match="an earlier run has come further"):
        toy(Checkpointer(tmp_path / "a", keep_last=None)).fit(3, resume=early)
    branch = toy(Checkpointer(tmp_path / "b", keep_last=None))
    branch.fit(3, resume=str(early))
    assert epochs_of(tmp_path / "b") == [1, 2, 3]  # the folder stands on its own
    assert_same_bits(first, branch)


def test_other_phases_than_those_of_the_run_are_refused_inside_a_cycle(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        toy(Recorder(), Crash(6), Checkpointer(tmp_path, unit="step")).fit(3)
    with pytest.raises(CheckpointError, match=r"the fit ran the phases .*ValidationPhase.*expected the same"):
        toy(Recorder(), Checkpointer(tmp_path)).fit(3, resume=tmp_path, phases=[TrainingPhase()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed=1 was given, and the run has seed=0"),
        ({"optimizer": partial(torch.optim.Adam, lr=0.5)}, "was made with lr=0.01, and now with lr=0.5"),
        ({"optimizer": torch.optim.SGD}, "was a torch.optim.adam.Adam and is a torch.optim.sgd.SGD"),
    ],
    ids=["seed", "option", "class"],
)
def test_another_run_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path)).fit(1)
    learner = toy(Checkpointer(tmp_path), **options)
    with pytest.raises(CheckpointError, match=message):
        learner.fit(2, resume=tmp_path)
    assert learner.history.cycles == 0


# Ending a process


class Signal(UnsafeCallback):
    """Sends this process a signal in a step of training, counted from 1."""

    def __init__(self, number: int, step: int) -> None:
        self.number = number
        self.step = step

    @on(StepBegin, AbstractTrainingPhase)
    def send(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        if learner.history[type(phase)].steps + 1 == self.step:
            os.kill(os.getpid(), self.number)


def test_sigterm_finishes_the_step_writes_a_checkpoint_and_exits_with_143(tmp_path: Path) -> None:
    plain = toy(Recorder())
    plain.fit(3)
    ends = EventRecorder()
    terminated = toy(Recorder(), Signal(signal.SIGTERM, 6), ends, Checkpointer(tmp_path))
    with pytest.raises(SystemExit) as exit:
        terminated.fit(3, resume=tmp_path)
    assert exit.value.code == EXIT_CODE == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert terminated.history.stop_reason == "terminated (SIGTERM)"
    assert ends.events[-1] == "FitEnd"
    assert files(tmp_path)[-1] == (1, 10, 0)
    again = toy(Recorder(), Checkpointer(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the checkpoint has states of")
        assert again.fit(3, resume=tmp_path).stop_reason is None
    assert_same_bits(plain, again)


def test_ctrl_c_ends_the_fit_with_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    plain = toy(Recorder())
    plain.fit(3)
    interrupted = toy(Recorder(), Signal(signal.SIGINT, 6), Checkpointer(tmp_path))
    assert interrupted.fit(3).stop_reason == "interrupted (Ctrl+C)"
    assert files(tmp_path) == [(1, 8, 0), (1, 10, 0)]
    again = toy(Recorder(), Checkpointer(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the checkpoint has states of")
        assert again.fit(3, resume=tmp_path).stop_reason is None
    assert_same_bits(plain, again)


def test_a_signal_handler_of_the_scripts_own_is_left_alone(tmp_path: Path) -> None:
    asked: list[int] = []

    def mine(number: int, frame: object) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, mine)
    try:
        learner = toy(Recorder(), Signal(signal.SIGTERM, 2), Checkpointer(tmp_path))
        assert learner.fit(1).stop_reason is None
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert asked == [signal.SIGTERM]


def test_it_works_outside_of_the_main_thread(tmp_path: Path) -> None:
    learner = toy(Checkpointer(tmp_path, background=True))
    thread = threading.Thread(target=learner.fit, args=(2,))
    thread.start()
    thread.join()
    assert epochs_of(tmp_path) == [1, 2]


# Write errors


FULL = OSError(errno.ENOSPC, "No space left on device")


def fails_from(count: int, where: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a function of the system fail from a checkpoint on, counted from 0: that of the beginning."""
    owner, name = (torch, "save") if where == "save" else (os, where)
    original: Callable[..., Any] = getattr(owner, name)
    seen: list[str] = []

    def fail(first: Any, *rest: Any, **options: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{first}") if where == "fsync" else str(getattr(rest[0], "name", rest[0]))
        if "epoch-" in path:
            seen.append(path)
            if len(seen) > count:
                raise error
        return original(first, *rest, **options)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize(
    ("where", "error"),
    [("replace", FULL), ("fsync", FULL), ("save", FULL), ("replace", PermissionError(errno.EACCES, "denied"))],
    ids=["replace", "fsync", "save", "permission"],
)
def test_a_failing_write_is_an_error_and_the_checkpoint_before_it_goes_on(
    where: str, error: OSError, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = toy()
    plain.fit(4)
    keeper = Checkpointer(tmp_path, background=background)
    with monkeypatch.context() as patched:
        fails_from(2, where, error, patched)
        with pytest.raises(CheckpointError, match=r"epoch-0002-.* cannot be written") as caught:
            toy(keeper).fit(4)
    assert caught.value.__cause__ is error
    assert epochs_of(tmp_path) == [1]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".json", ".pt", ".txt"]  # the last says why
    again = toy(Checkpointer(tmp_path))
    again.fit(4, resume=tmp_path)
    assert_same_bits(plain, again)


def test_the_same_learner_goes_on_when_the_disk_has_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = toy(Checkpointer(tmp_path))
    with monkeypatch.context() as patched:
        fails_from(2, "replace", FULL, patched)
        with pytest.raises(CheckpointError, match="No space left"):
            learner.fit(4)
    learner.fit(1)
    assert epochs_of(tmp_path) == [2, 3]


# In the background


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_folder_that_is_removed_while_the_run_goes_on_is_told(
    moment: str, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Folder.add

    def removing(self: Folder, progress: Any, state: Any, again: bool = False) -> Path:
        if progress[0] == 2 and moment == "before":
            shutil.rmtree(self.path)
        path = add(self, progress, state, again)
        if progress[0] == 2:
            shutil.rmtree(self.path)
        return path

    monkeypatch.setattr(Folder, "add", removing)
    learner = toy(Checkpointer(tmp_path / "run", background=background))
    told = "its folder is not there" if moment == "before" else "was written, and is gone: was the folder removed"
    with pytest.raises(CheckpointError, match=told):
        learner.fit(4)


def test_files_written_in_the_background_equal_those_of_the_foreground(tmp_path: Path) -> None:
    for name, background in (("a", False), ("b", True)):
        learner = toy(Recorder(), Metrics(), EMA("model", 0.9), Checkpointer(tmp_path / name, background=background))
        learner.fit(3)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for (_, front), (_, back) in zip(Folder(tmp_path / "a").files(), Folder(tmp_path / "b").files(), strict=True):
        assert parts(read(front)) == parts(read(back))


def test_what_is_written_in_the_background_is_a_copy_and_steps_go_on_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, threads = threading.Event(), set()
    save = torch.save

    def slow(state: Any, file: Any) -> None:
        if "fluxloop" in state and state["history"]["cycles"] == 1:
            assert go_on.wait(30), "training waited for the file"
        threads.add(threading.current_thread())
        save(state, file)

    class Release(UnsafeCallback):
        @on(StepEnd, AbstractTrainingPhase)
        def release(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            if learner.history[type(phase)].steps == 7:
                go_on.set()

    toy(Recorder(), Checkpointer(tmp_path / "a", keep_last=None)).fit(2)
    monkeypatch.setattr("fluxloop.checkpoint.folder.torch.save", slow)
    learner = toy(Recorder(), Release(), keeper := Checkpointer(tmp_path / "b", keep_last=None, background=True))
    learner.fit(2)
    assert threading.current_thread() not in threads
    assert keeper.last == Folder(tmp_path / "b").files()[-1][1]  # the fit has waited for the last one
    for (_, front), (_, back) in zip(Folder(tmp_path / "a").files(), Folder(tmp_path / "b").files(), strict=True):
        a, b = parts(read(front)), parts(read(back))
        assert {k: v for k, v in a.items() if "Checkpointer" not in k} == {
            k: v for k, v in b.items() if "Checkpointer" not in k and "Release" not in k
        }
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoints")]


def test_an_error_of_the_last_background_write_leaves_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_from(1, "replace", FULL, monkeypatch)
    learner = toy(Checkpointer(tmp_path, background=True))
    with pytest.raises(CheckpointError, match="No space left on device"):
        learner.fit(1)
    assert not learner._running.fitting
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoints")]


def test_a_snapshot_shares_no_memory_with_what_it_is_of() -> None:
    learner = toy()
    learner.fit(1)
    state = learner.state_dict()
    copied = snapshot(state)
    before = parts(copied)
    learner.fit(1)
    assert parts(copied) == before
    assert parts(state) != before


@pytest.mark.parametrize("background", [False, True])
def test_a_modules_version_is_kept(background: bool, tmp_path: Path) -> None:
    def learner(until: int) -> Learner[Any]:
        data = vars(toy().data)
        keeper = Checkpointer(tmp_path, background=background)
        torch.manual_seed(0)
        learner = Learner(
            Versioned(1, 1), nn.functional.l1_loss, data=data, callbacks=[keeper], default_callbacks=False
        )
        learner.fit(until, resume=tmp_path)
        return learner

    assert_same_bits(learner(1), learner(1))


# What is kept


@pytest.mark.parametrize("path", ["data", "accelerator"])
def test_a_callback_that_writes_what_nobody_keeps_is_an_error_next_to_it(path: str, tmp_path: Path) -> None:
    class Writer(Callback):
        writes = (path,)

        @on(FitBegin)
        def begin(self, event: FitBegin, phase: Phase, learner: Any) -> None:
            pass

    class Told(Writer):
        transient = (path,)

    toy(Writer()).fit(1)
    learner = toy(Writer(), Checkpointer(tmp_path))
    with pytest.raises(
        CheckpointError, match=rf"Writer writes '{path}', which no checkpoint keeps.*transient = \('{path}'"
    ):
        learner.fit(1)
    assert learner.history.cycles == 0
    toy(Told(), Checkpointer(tmp_path)).fit(1)
    assert epochs_of(tmp_path) == [1]


def test_shared_state_that_cannot_be_kept_names_its_path_and_writer(tmp_path: Path) -> None:
    class Publisher(Callback):
        writes = ("cbstate.cursor",)

        def init(self, learner: Any) -> None:
            learner.cbstate.cursor = (n for n in range(3))

        @on(FitBegin)
        def begin(self, event: FitBegin, phase: Phase, learner: Any) -> None:
            pass

    class Told(Publisher):
        transient = ("cbstate.cursor",)

    with pytest.raises(
        CheckpointError, match=r"cbstate.cursor is a generator.*\n.*written by Publisher.*transient = \("
    ):
        toy(Publisher(), Checkpointer(tmp_path)).fit(1)
    toy(Told(), Checkpointer(tmp_path)).fit(1)


class Opaque:
    def __init__(self, count: int = 0) -> None:
        self.count = count


def test_attributes_that_cannot_be_kept_are_told_once(tmp_path: Path) -> None:
    class Holder(Callback):
        def __init__(self) -> None:
            self.thing: Any = None
            self.other: Any = None

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.thing, self.other = Opaque(), lambda: None

    class Told(Holder):
        transient = ("thing", "other")

    with pytest.warns(
        UserWarning,
        match=r"callbacks.Holder.thing, callbacks.Holder.other changed in training .* transient = \('thing', 'other'\)",
    ) as told:
        toy(Holder(), Checkpointer(tmp_path / "a")).fit(3)
    assert len(told) == 1
    toy(Told(), Checkpointer(tmp_path / "b")).fit(1)


def test_a_new_callback_with_state_needs_no_further_line(tmp_path: Path) -> None:
    class Average(Callback):
        """Nothing in it speaks of checkpoints."""

        reads = ("step.loss",)

        def __init__(self) -> None:
            self.mean: float | None = None
            self.seen: dict[str, list[int]] = {}
            self.total = torch.zeros(())
            self.generator = torch.Generator().manual_seed(3)
            self.random = random.Random(3)

        @on(StepEnd, AbstractTrainingPhase)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            noise = torch.rand((), generator=self.generator).item() + self.random.random()
            self.mean = (0.0 if self.mean is None else 0.9 * self.mean) + noise * learner.step.loss.item()
            self.seen.setdefault(type(phase).__name__, []).append(len(self.seen))
            self.total += 1

    plain, again = toy(Average()), toy(Average(), Checkpointer(tmp_path, unit="step"))
    plain.fit(3)
    again.add_callback(Recorder())
    again.add_callback(Crash(6))
    with pytest.raises(OSError, match="gone"):
        again.fit(3)
    resumed = toy(Average(), Recorder(), Checkpointer(tmp_path, unit="step"))
    resumed.fit(3, resume=tmp_path)
    first, second = plain.get_callback(Average), resumed.get_callback(Average)
    assert first is not None
    assert second is not None
    assert (first.mean, first.seen, first.total) == (second.mean, second.seen, second.total)
    assert torch.rand(1, generator=first.generator) == torch.rand(1, generator=second.generator)
    assert first.random.random() == second.random.random()


def test_it_only_watches(tmp_path: Path) -> None:
    assert_observer(Checkpointer(tmp_path / "a", unit="step"), toy)
    assert_observer(Checkpointer(tmp_path / "b", background=True), toy)


def test_it_works_twice_on_two_learners(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path)
    toy(keeper).fit(2)
    again = toy(keeper)
    again.fit(3, resume=tmp_path)
    assert again.history.cycles == 3
    assert epochs_of(tmp_path) == [2, 3]


def test_two_of_them_keep_a_run_in_two_folders(tmp_path: Path) -> None:
    learner = toy(Checkpointer(tmp_path / "a"), Checkpointer(tmp_path / "b", every=3, unit="step", keep_last=1))
    learner.fit(2)
    assert files(tmp_path / "a") == [(1, 8, 0), (2, 16, 0)]
    assert files(tmp_path / "b") == [(2, 16, 0)]


def test_data_that_cannot_be_gone_on_with_is_told_once_and_checkpoints_wait(tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return ((torch.ones(2, 1) * n, torch.ones(2, 1)) for n in range(4))

    learner = toy(Checkpointer(tmp_path, unit="step", keep_last=None), data=(Stream(),))
    with pytest.warns(UserWarning, match="'training' data .* cannot be resumed in the middle of an epoch") as told:
        learner.fit(2)
    assert len(told) == 1
    assert epochs_of(tmp_path)[-1] == 2
    assert all(read(path)["place"]["feed"] is None for _, path in Folder(tmp_path).files())


# Defects of the older systems


def test_the_whole_state_is_kept_and_any_metric_decides(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=1, keep_best=1, monitor="validation/loss")
    learner = toy(Recorder(), Metrics(), keeper)
    learner.fit(3, phases=[TrainingPhase(), Scored([2.0, 1.0, 3.0])])
    assert epochs_of(tmp_path) == [2, 3]
    state = read(Folder(tmp_path).files()[-1][1])
    assert state["history"]["cycles"] == 3
    assert state["optimizers"][""]["state"]["state"][0]["step"] == 12
    assert {"models", "callbacks", "streams", "cbstate", "place"} < state.keys()
    again = toy(Recorder(), Metrics(), Checkpointer(tmp_path))
    again.load(tmp_path / "epoch-0003-step-00000024-phase-0.pt")
    assert_same_bits(learner, again)


def test_resuming_fires_no_skipped_epochs_and_removes_nothing(tmp_path: Path) -> None:
    said: list[str] = []

    class Prints(Callback):
        @on(EpochBegin, TrainingPhase)
        def say(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
            said.append("resumed" if event.resumed else "begin")

    toy(Prints(), Recorder(), Checkpointer(tmp_path)).fit(2)
    interrupted = toy(Prints(), Recorder(), Signal(signal.SIGINT, 10), Checkpointer(tmp_path))
    interrupted.fit(4, resume=tmp_path)
    assert files(tmp_path)[-1] == (2, 18, 0)  # still there after Ctrl+C, with the loader's position
    learner = toy(Prints(), Recorder(), Checkpointer(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the checkpoint has states of")
        learner.fit(4, resume=tmp_path)
    assert said == ["begin"] * 3 + ["resumed", "begin"]
    plain = toy(Recorder())
    plain.fit(4)
    assert_same_bits(plain, learner)
    assert epochs_of(tmp_path) == [3, 4]  # still there after the end


def test_the_number_of_the_epoch_goes_on(tmp_path: Path) -> None:
    for until in (9, 10, 12):
        learner = toy(Recorder(), Metrics(), Checkpointer(tmp_path, keep_last=None))
        learner.fit(until, resume=tmp_path)
    assert [row["epoch"] for row in learner.history.rows() if row["phase"] == "TrainingPhase"] == list(range(1, 13))
    assert learner.history[TrainingPhase].epochs == 12


def test_a_checkpoint_is_one_file_that_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    save = torch.save

    def look(state: Any, file: Any) -> None:
        seen.append(all(Folder(tmp_path).is_complete(path) for _, path in Folder(tmp_path).files()))
        file.write(b"half of it")
        seen.append(all(Folder(tmp_path).is_complete(path) for _, path in Folder(tmp_path).files()))
        file.seek(0)
        save(state, file)
        seen.append(all(Folder(tmp_path).is_complete(path) for _, path in Folder(tmp_path).files()))

    monkeypatch.setattr("fluxloop.checkpoint.folder.torch.save", look)
    toy(Checkpointer(tmp_path, unit="step", every=2)).fit(2)
    assert len(seen) >= 12
    assert all(seen)
    assert len(list(tmp_path.glob("*.pt"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".pt") == [MARKER, LATEST]


# Checks of the older systems


def test_a_callback_can_end_training_before_its_first_epoch(tmp_path: Path) -> None:
    class Never(Callback):
        @on(FitBegin)
        def begin(self, event: FitBegin, phase: Phase, learner: Any) -> None:
            raise CancelFittingException("not today")

    assert toy(Never(), Checkpointer(tmp_path)).fit(3).stop_reason == "not today"
    assert files(tmp_path) == [(0, 0, 0)]
    with pytest.warns(UserWarning, match="has already stopped: not today. Nothing is trained"):
        toy(Checkpointer(tmp_path)).fit(3, resume=tmp_path)


def test_several_optimizers_go_on(tmp_path: Path) -> None:
    class Both(PerOptimizerPhase):
        def loss(self, learner: Any, state: Any, name: str) -> Tensor:
            return ((learner.models[name](state.xs) - 1) ** 2).mean()

    def learner() -> Learner[Any]:
        torch.manual_seed(0)
        models = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 2)}
        optimizers = {"a": torch.optim.Adam, "b": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
        data = (TensorBatches(torch.rand(8, 1), torch.rand(8, 1), batch_size=2, shuffle=True),)
        return Learner(models, data=data, optimizer=optimizers, callbacks=[Recorder()], default_callbacks=False, seed=1)

    plain = learner()
    plain.fit(5, phases=[Both()])
    crashing = learner()
    crashing.add_callback(Crash(14))
    crashing.add_callback(Checkpointer(tmp_path))
    with pytest.raises(OSError, match="gone"):
        crashing.fit(5, phases=[Both()])
    again = learner()
    again.add_callback(Checkpointer(tmp_path))
    again.fit(5, phases=[Both()], resume=tmp_path)
    assert_same_bits(plain, again)


def test_the_count_of_steps_goes_on_where_the_batch_size_has_changed(tmp_path: Path) -> None:
    toy(Recorder(), Checkpointer(tmp_path)).fit(2)
    xs = torch.rand(8, 1)
    data = (TensorBatches(xs, xs, batch_size=4), TensorBatches(xs, xs, batch_size=4))
    learner = toy(Recorder(), Checkpointer(tmp_path), data=data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the (training|validation) data .* is not the same as in the run")
        learner.fit(3, resume=tmp_path)
    assert learner.history[TrainingPhase].steps == 8 + 2


def test_the_middle_of_an_epoch_of_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        toy(Recorder(), Crash(6), Checkpointer(tmp_path, unit="step")).fit(3)
    xs = torch.rand(8, 1)
    learner = toy(Recorder(), Checkpointer(tmp_path), data=(TensorBatches(xs, xs, batch_size=4), (xs, xs)))
    with pytest.raises(CheckpointError, match="left after 2 of 4 batches of the training data, and there are 2 now"):
        learner.fit(3, resume=tmp_path)


def test_callbacks_without_a_state_may_come_and_go(tmp_path: Path) -> None:
    class Silent(Callback):
        @on(CycleEnd)
        def end(self, event: CycleEnd, phase: Phase, learner: Any) -> None:
            pass

        @on(FitEnd)
        def fit_end(self, event: FitEnd, phase: Phase, learner: Any) -> None:
            pass

    toy(Silent(), Checkpointer(tmp_path)).fit(1)
    toy(Checkpointer(tmp_path)).fit(2, resume=tmp_path)
    toy(Silent(), Checkpointer(tmp_path)).fit(3, resume=tmp_path)
    assert epochs_of(tmp_path) == [2, 3]


def test_two_that_write_to_one_folder_are_refused_when_the_learner_is_made(tmp_path: Path) -> None:
    with pytest.raises(CallbackConflictError, match=r"two Checkpointers write to .*give each a folder of its own"):
        toy(Checkpointer(tmp_path, name="a"), Checkpointer(tmp_path, name="b"))
    toy(Checkpointer(tmp_path / "a", name="a"), Checkpointer(tmp_path / "b", name="b")).fit(1)
    assert epochs_of(tmp_path / "a") == epochs_of(tmp_path / "b") == [1]


def test_the_pointer_to_the_newest_can_be_resumed_from(tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path)).fit(1)
    plain, resumed = toy(), toy(Checkpointer(tmp_path))
    plain.fit(2)
    resumed.fit(2, resume=tmp_path / LATEST)
    assert_same_bits(plain, resumed)


@pytest.mark.filterwarnings("ignore:.*__closure__.*cannot be saved")
def test_the_best_epoch_stays_also_where_few_epochs_are_due(tmp_path: Path) -> None:
    values = iter([5.0, 1.0, 4.0, 3.0])
    scores = fluxloop.Metric(lambda preds, ys: torch.tensor(next(values)), name="score", phase=ValidationPhase)
    keeper = Checkpointer(tmp_path, every=4, keep_last=1, keep_best=1, monitor="validation/score", mode="min")
    learner = toy(Recorder(), Metrics(scores), keeper)
    learner.data.validation = TensorBatches(torch.rand(2, 1), torch.rand(2, 1), batch_size=2)
    learner.fit(4)
    assert epochs_of(tmp_path) == [2, 4]


def test_a_slice_of_the_data_does_not_bring_all_of_the_data_into_the_file(tmp_path: Path) -> None:
    class Looks(Callback):
        reads = ("step.xs",)

        def __init__(self) -> None:
            self.last: Any = None

        @on(StepEnd, TrainingPhase)
        def look(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.last = learner.step.xs

    xs = torch.rand(100_000, 1)
    toy(Looks(), Checkpointer(tmp_path), data=(TensorBatches(xs, xs, batch_size=50_000),)).fit(1)
    assert Folder(tmp_path).files()[-1][1].stat().st_size < 300_000


# Numbers that are not finite


class BadOnce(TrainingPhase):
    """The gradient of step `at` is NaN."""

    transient = ("count",)

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        self.count += 1
        if self.count == self.at:
            hook = next(learner.model.parameters()).register_hook(lambda gradient: gradient * nan)
            learner.defer(hook.remove)
        super().body(learner, handle, state)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("at", [3, 8])
def test_a_run_that_stopped_at_a_gradient_goes_on_from_before_it_once_the_cause_is_mended(
    tmp_path: Path, unit: Any, at: int
) -> None:
    run = tmp_path / "run"
    learner = toy(fluxloop.StopOnNaNLoss(), Recorder(), Checkpointer(run, unit=unit))
    with pytest.warns(UserWarning, match=f"the fit stops: gradients of the optimizer .* step {at}"):
        learner.fit(3, phases=[BadOnce(at)])
    assert learner.history.stop_reason is not None
    mended = toy(fluxloop.StopOnNaNLoss(), Recorder(), Checkpointer(run, unit=unit))
    assert mended.fit(3, phases=[BadOnce(0)], resume=run).stop_reason is None
    expected = toy(fluxloop.StopOnNaNLoss(), Recorder())
    expected.fit(3, phases=[BadOnce(0)])
    assert mended.history[BadOnce].steps == expected.history[BadOnce].steps == 12
    assert_same_bits(mended, expected)


@pytest.mark.parametrize("background", [False, True])
def test_a_state_with_numbers_that_are_not_finite_is_never_the_newest(tmp_path: Path, background: bool) -> None:
    run = tmp_path / "run"
    learner = toy(Recorder(), Checkpointer(run, background=background))
    with pytest.warns(UserWarning, match=r"became nan or infinite \(.*the newest checkpoint stays .*run") as told:
        learner.fit(3, phases=[BadOnce(7)])
    assert len(told) == 1
    assert epochs_of(run) == [1]
    mended = toy(Recorder(), Checkpointer(run))
    assert mended.fit(3, phases=[BadOnce(0)], resume=run).stop_reason is None
    expected = toy(Recorder())
    expected.fit(3, phases=[BadOnce(0)])
    assert_same_bits(mended, expected)


def test_numbers_that_were_infinite_when_the_fit_began_keep_no_checkpoint_from_being_written(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1)
            self.register_buffer("mask", torch.full((2,), -float("inf")))

    learner = Learner(
        Masked(),
        nn.functional.mse_loss,
        data=([(torch.ones(2, 1), torch.ones(2, 1))],),
        callbacks=[Recorder(), Checkpointer(tmp_path / "run")],
        default_callbacks=False,
    )
    learner.fit(2)
    assert epochs_of(tmp_path / "run") == [1, 2]


# Where a run is looked for


@pytest.mark.parametrize("begun", [False, True], ids=["a new run", "one that has checkpoints"])
def test_a_run_that_is_looked_for_where_nobody_writes_is_refused(begun: bool, tmp_path: Path) -> None:
    if begun:
        toy(Checkpointer(tmp_path / "run")).fit(1, resume=tmp_path / "run")
    learner = toy(Checkpointer(tmp_path / "run"))
    before = bits(learner)
    told = "has checkpoints of a run" if begun else "is where this run would be kept"
    with pytest.raises(CheckpointError, match=rf"rum' was given, .* nothing to go on from: .*run, which {told}"):
        learner.fit(2, resume=tmp_path / "rum")
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert learner.history.cycles == 0
    learner.fit(2, resume=tmp_path / "run" / "." / LATEST if begun else tmp_path / "x" / ".." / "run")
    assert learner.history.cycles == 2


def test_a_run_kept_in_two_folders_may_be_looked_for_in_either(tmp_path: Path) -> None:
    for name in ("a", "b"):
        both = [Checkpointer(tmp_path / each / name, name=each) for each in ("a", "b")]
        toy(*both).fit(1, resume=tmp_path / name / name)
    with pytest.warns(UserWarning, match="no Checkpointer is among the callbacks"):
        toy().fit(1, resume=tmp_path / "new")


def test_a_run_that_is_refused_for_another_folder_leaves_no_mark_in_its_own(tmp_path: Path) -> None:
    learner = toy(Checkpointer(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="nothing to go on from"):
        learner.fit(1, resume=tmp_path / "rum")
    assert list((tmp_path / "run").iterdir()) == []
    learner.fit(1, resume=tmp_path / "run")
    assert (tmp_path / "run" / "fluxloop.json").exists()


def test_a_run_that_is_refused_leaves_the_mark_of_a_run_with_checkpoints(tmp_path: Path) -> None:
    toy(Checkpointer(tmp_path / "run")).fit(1)
    with pytest.raises(CheckpointError, match="nothing to go on from"):
        toy(Checkpointer(tmp_path / "run")).fit(1, resume=tmp_path / "rum")
    assert (tmp_path / "run" / "fluxloop.json").exists()
