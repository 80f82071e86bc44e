"""Numbers of NumPy's, such as those of ``np.arange`` and ``np.logspace``, are numbers wherever one is taken."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fluxloop import (
    EMA,
    Accelerator,
    Callback,
    Checkpointer,
    DataError,
    EarlyStopping,
    GANPhase,
    GarbageCollect,
    GradientClip,
    HyperParameters,
    KeepBestModel,
    Learner,
    LearningRate,
    LogHyperParams,
    LogMetrics,
    LogVisualization,
    Memory,
    Metrics,
    MixUp,
    NoImprovement,
    ObjectivePhase,
    OptimizerError,
    Patience,
    Profile,
    Recorder,
    Scheduler,
    Shard,
    StallReport,
    StochasticWeightAveraging,
    TensorBatches,
    TrainingPhase,
    Unfreeze,
    ValidationPhase,
    constant,
    cosine,
    exponential,
    find_lr,
    linear,
    one_cycle,
    repeat,
    schedules,
    sequence,
    shift,
    split,
    warmup,
)
from fluxloop.guard.given import as_python, is_number
from fluxloop.nested import batch_size
from fluxloop.phase import is_due
from fluxloop.testing import bits, toy_learner


def test_numbers_are_those_of_python_and_numpy() -> None:
    assert all(map(is_number, (1, 0.5, np.int64(1), np.float32(0.5), float("nan"))))
    assert not any(map(is_number, (True, np.True_, "1", None, torch.tensor(1), 1j, Fraction(1, 2), Decimal(1))))
    assert [is_number(value, whole=True) for value in (1, np.int8(1), 1.0, np.float64(1.0))] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.array])
def test_numpys_numbers_become_pythons(kind: Any) -> None:
    assert (type(as_python(kind(0.5))), as_python(kind(0.5))) == (float, 0.5)
    assert [*map(type, as_python((kind(0.5), np.int8(1), np.True_, "x")))] == [float, int, bool, str]


def train(whole: Callable[[int], Any], real: Callable[[float], Any], folder: Path, cycles: int) -> Learner[Any]:
    torch.manual_seed(0)
    xs = torch.randn(48, 4)
    ys = xs.sum(1, keepdim=True)
    callbacks: list[Callback] = [
        Recorder(),
        Metrics(),
        EMA("0", real(0.75)),
        GradientClip(real(0.5)),
        Scheduler({LearningRate(group=whole(0)): warmup(whole(2), cosine(whole(30), real(0.125), 0.0))}),
        EarlyStopping(Patience(whole(9)) | NoImprovement(whole(9), min_delta=real(0.0)), min_epochs=whole(1)),
        KeepBestModel(min_delta=real(0.0)),
        Unfreeze({"1": whole(1)}),
        StochasticWeightAveraging("1", start=whole(1), every=whole(1)),
        Checkpointer(folder, every=whole(1), keep_last=whole(2)),
    ]
    learner = Learner(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)),
        mse_loss,
        data=(
            TensorBatches(xs, ys, batch_size=whole(8), shuffle=True),
            TensorBatches(xs, ys, batch_size=whole(8)),
        ),
        optimizer=partial(torch.optim.SGD, lr=real(0.125)),
        callbacks=callbacks,
        accelerator=Accelerator("cpu", accumulate=whole(2)),
        default_callbacks=False,
        seed=whole(3),
    )
    learner.fit(whole(cycles), phases=[TrainingPhase(), ValidationPhase(every=whole(2))], resume=folder)
    return learner


def test_a_run_of_numpys_numbers_that_is_killed_is_that_of_pythons(tmp_path: Path) -> None:
    expected = train(int, float, tmp_path / "python", 4)
    train(np.int64, np.float32, tmp_path / "numpy", 2)
    found = train(np.int64, np.float32, tmp_path / "numpy", 4)
    torch.testing.assert_close(bits(found), bits(expected), rtol=0, atol=0)
    assert found.history["validation/loss"] == expected.history["validation/loss"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: one_cycle(np.int64(8), np.float32(0.5))(3), lambda: one_cycle(8, 0.5)(3)),
        (lambda: repeat(cosine(4, 1.0, 0.0), np.int64(4), times=np.int64(2))(5), lambda: cosine(4, 1.0, 0.0)(1)),
        (lambda: shift(cosine(4, 1.0, 0.0), np.int64(-1))(0), lambda: cosine(4, 1.0, 0.0)(1)),
        (lambda: len(split(torch.arange(8), np.float32(0.25))[1]), lambda: 2),
        (lambda: MixUp(np.float32(0.5)).alpha, lambda: 0.5),
        (lambda: len(find_lr(toy_learner(), steps=np.int64(4)).losses), lambda: 4),
        (lambda: toy_learner().fit(1, steps_per_epoch=np.int64(2))[TrainingPhase].steps, lambda: 0),
    ],
)
def test_a_number_of_numpys_is_taken_as_pythons(found: Callable[[], Any], expected: Callable[[], Any]) -> None:
    assert found() == expected()


def test_sizes_and_options_of_parts_are_taken_as_pythons() -> None:
    assert Shard(min_parameters=np.int64(8), replicas=np.int64(2)).num_replicas(4) == 2
    assert StallReport(np.float32(300)).seconds == 300
    assert Profile(steps=(np.int64(2), np.int64(1))).steps == (2, 1)
    assert Accelerator("cpu", accumulate={"G": np.int64(4)}).accumulate == {"G": 4}
    assert repr(ValidationPhase(every=np.int64(2))) == f"ValidationPhase(every={np.int64(2)!r})"
    assert HyperParameters({"lr": np.float32(0.5), "on": np.True_}).values == {"lr": 0.5, "on": True}
    models = {"generator": nn.Linear(4, 2), "critic": nn.Linear(2, 1)}
    learner = Learner(models, data=(torch.randn(8, 2),), callbacks=[Recorder()], default_callbacks=False)
    assert learner.fit(1, phases=[GANPhase(noise=np.int64(4))])[GANPhase].steps == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shard(replicas=np.float32(2)),
        lambda: StallReport(np.float32("nan")),
        lambda: Accelerator(accumulate=np.float64(2)),
        lambda: TensorBatches(torch.ones(4), batch_size=np.float64(2)),
        lambda: EMA("0", np.True_),
        lambda: toy_learner(optimizer=partial(torch.optim.SGD, lr=np.float32("inf"))),
        lambda: toy_learner(Recorder(), Scheduler({LearningRate: lambda t: np.float32("nan")})).fit(1),
        lambda: EMA("0", Fraction(1, 2)),  # the rest, torch refuses in the middle of a step
        lambda: GradientClip(Fraction(1, 2)),
        lambda: cosine(8, Fraction(1, 2), 0.0),
        lambda: Scheduler({LearningRate: Fraction(1, 2)}),
        lambda: toy_learner(Recorder(), Scheduler({LearningRate: lambda t: Fraction(1, 2)})).fit(1),
    ],
)
def test_numpys_numbers_that_do_not_fit_are_refused_in_words(make: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, DataError, OptimizerError), match="expected"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda whole, real: shift(linear(1000, 1.0, 0.0), whole(120)),
        lambda whole, real: shift(linear(1000, 1.0, 0.0), -whole(120)),
        lambda whole, real: repeat(linear(10, 1.0, 0.0), whole(10), times=whole(100)),
        lambda whole, real: repeat(linear(whole(100), 1.0, 0.0), whole(120)),
        lambda whole, real: warmup(whole(120), linear(whole(120), real(1.0), real(0.0)), real(0.1)),
        lambda whole, real: one_cycle(whole(120), real(0.1), real(0.3), real(7.0)),
        lambda whole, real: cosine(whole(100), real(0.1), real(0.001)),
        lambda whole, real: exponential(whole(100), real(0.1), real(0.001)),
        lambda whole, real: schedules.step(whole(100), real(0.1), real(0.3)),
        lambda whole, real: sequence((cosine(whole(100), real(0.1), 0.0), whole(100)), real(0.1)),
        lambda whole, real: constant(real(0.1)),
    ],
)
def test_schedules_neither_wrap_nor_round_as_numpys_small_numbers_do(make: Callable[..., Any]) -> None:
    found, expected = make(np.int8, np.float16), make(int, lambda value: float(np.float16(value)))
    assert [found(t) for t in range(0, 1200, 7)] == [expected(t) for t in range(0, 1200, 7)]
    assert repr(found) == repr(expected)
    assert type(found(1)) is float


def test_intervals_of_numpys_small_numbers_go_on_after_the_largest() -> None:
    collect, log, seen = GarbageCollect(np.int8(64)), Memory(), []
    learner = toy_learner(
        Recorder(),
        Metrics(),
        collect,
        LogMetrics(log, every=np.int8(64)),
        LogVisualization(lambda step: seen.append(1) or 1.0, log, every=np.int8(64)),
        data=(TensorBatches(torch.ones(10, 1), torch.ones(10, 1), batch_size=1),),
    )
    learner.fit(np.int16(30), phases=[TrainingPhase()])  # 300 steps
    assert (type(collect.every), len(seen)) == (int, 300 // 64)
    collect.every = np.int8(100)
    assert type(collect.every) is int
    assert is_due(ValidationPhase(every=np.int8(100)), 300, 999)


def test_a_schedule_of_another_length_is_told_from_numpys_too(tmp_path: Path) -> None:
    from fluxloop import CheckpointError

    def make(total: Any) -> Learner[Any]:
        return toy_learner(Recorder(), Scheduler({LearningRate: cosine(total, 0.001, 0.0)}), Checkpointer(tmp_path))

    make(np.int64(64)).fit(1, resume=tmp_path)
    make(64).fit(2, resume=tmp_path)
    with pytest.raises(CheckpointError, match="cosine"):
        make(np.int64(32)).fit(3, resume=tmp_path)


def test_a_rate_that_a_schedule_gives_as_numpys_is_logged() -> None:
    log = Memory()
    rate = Scheduler({LearningRate: lambda t: np.float32(0.5) / (t + 1)})
    toy_learner(Recorder(), rate, LogHyperParams(log, params={"a": 1})).fit(1)
    assert [value for _, value in log.series("step/hyperparameters/learning_rate")][:2] == [0.5, 0.25]


def test_rows_and_weights_that_objects_say_in_numpys_numbers_count() -> None:
    class Graphs:
        def __init__(self, rows: int) -> None:
            self.xs, self.batch_size = torch.ones(rows, 1) * rows, np.int64(rows)

    class Mean(ObjectivePhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"graphs": batch}

        def loss(self, learner: Any, state: Any) -> Tensor:
            loss: Tensor = learner.model(state.graphs.xs).mean()
            return loss

    class Weighted(Mean):
        def weight(self, state: Any) -> Any:
            return np.float32(state.graphs.batch_size)

    assert batch_size({"graphs": Graphs(5)}) == 5
    for phase in (Mean(), Weighted()):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        learner = Learner(
            model,
            data=([Graphs(1), Graphs(3)],),
            optimizer=partial(torch.optim.SGD, lr=0.0),
            callbacks=[Recorder(), Metrics()],
            default_callbacks=False,
        )
        learner.fit(1, phases=[phase])
        assert learner.history["training/loss"] == [(1 * 1 + 3 * 3) / 4]
