from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, TensorDataset

from fluxloop import (
    CancelEpochException,
    CustomCallback,
    Learner,
    Recorder,
    StepBegin,
    TrainingPhase,
    ValidationPhase,
)
from fluxloop.callbacks.set_epoch import SetEpoch
from fluxloop.testing import Coefficient, assert_resumes_exactly

XS = torch.arange(12.0)[:, None]
ROWS = TensorDataset(XS, 3 * XS)


def learner_of(*data: Any, callbacks: Any = ()) -> Learner:
    return Learner(
        Coefficient(),
        nn.functional.l1_loss,
        data=data,
        optimizer=torch.optim.SGD,
        callbacks=[Recorder(), *callbacks],
        default_callbacks=False,
        seed=0,
    )


class Told(Sampler[int]):
    """A sampler that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(12))

    def __len__(self) -> int:
        return 12


class ToldBatches(BatchSampler):
    def __init__(self, sampler: Told) -> None:
        super().__init__(sampler, 4, drop_last=False)
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)


class ToldRows(Dataset[Any]):
    def __init__(self) -> None:
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return ROWS[index]  # type: ignore[return-value]  # a pair


def order_of(loader: Any) -> list[float]:
    return torch.cat([batch[0] for batch in loader])[:, 0].tolist()


def test_a_distributed_sampler_shuffles_anew_every_epoch_as_by_hand() -> None:
    def sampler() -> DistributedSampler[Any]:
        return DistributedSampler(ROWS, num_replicas=1, rank=0, shuffle=True, seed=5)

    seen: list[float] = []
    look = CustomCallback(lambda learner: seen.extend(learner.step.xs[:, 0].tolist()), StepBegin, TrainingPhase)
    learner_of(DataLoader(ROWS, batch_size=4, sampler=sampler()), callbacks=[look]).fit(3)
    by_hand: list[float] = []
    plain = sampler()
    for epoch in range(3):
        plain.set_epoch(epoch)
        by_hand += order_of(DataLoader(ROWS, batch_size=4, sampler=plain))
    assert seen == by_hand
    assert seen[:12] != seen[12:24]


def test_samplers_batch_samplers_and_datasets_are_told_once_each() -> None:
    sampler, rows = Told(), ToldRows()
    batches = ToldBatches(sampler)
    learner_of(DataLoader(rows, batch_sampler=batches)).fit(3)
    assert sampler.told == batches.told == rows.told == [0, 1, 2]


def test_each_phase_is_told_its_own_epochs() -> None:
    train, valid = Told(), Told()
    learner = learner_of(*(DataLoader(ROWS, batch_size=4, sampler=each) for each in (train, valid)))
    learner.fit(2, phases=[TrainingPhase(), TrainingPhase(), ValidationPhase()])
    assert train.told == [0, 1, 2, 3]
    assert valid.told == [0, 1]


def test_epochs_go_on_in_a_further_fit_and_in_an_epoch_of_no_fit() -> None:
    sampler = Told()
    learner = learner_of(DataLoader(ROWS, batch_size=4, sampler=sampler))
    learner.fit(2)
    learner.fit(1)
    learner.epoch(TrainingPhase())
    assert sampler.told == [0, 1, 2, 3]


def test_the_data_given_to_a_fit_is_told_and_not_the_learners() -> None:
    own, given = Told(), Told()
    learner = learner_of(DataLoader(ROWS, batch_size=4, sampler=own))
    learner.fit(2, data=(DataLoader(ROWS, batch_size=4, sampler=given),))
    assert (own.told, given.told) == ([], [0, 1])


def test_epochs_that_were_cancelled_or_failed_count_as_for_the_random_numbers() -> None:
    sampler = Told()
    signals: list[BaseException] = [CancelEpochException(), RuntimeError("broken")]

    def leave(learner: Any) -> None:
        if signals:
            raise signals.pop(0)

    look = CustomCallback(leave, StepBegin, reads=())
    learner = learner_of(DataLoader(ROWS, batch_size=4, sampler=sampler), callbacks=[look])
    with pytest.raises(RuntimeError, match="broken"):
        learner.fit(2)
    learner.fit(1)
    assert sampler.told == [0, 1, 2]


def test_a_script_that_lists_the_callback_runs_as_before() -> None:
    sampler = Told()
    learner_of(DataLoader(ROWS, batch_size=4, sampler=sampler), callbacks=[SetEpoch()]).fit(3)
    assert sampler.told == [0, 1, 2]


@pytest.mark.parametrize("speaks", [True, False], ids=["says its epoch", "says nothing"])
def test_watching_data_of_the_training_leaves_it_in_its_epoch(speaks: bool) -> None:
    rows = ToldRows()
    learner = learner_of(DataLoader(rows, batch_size=4))
    learner.fit(3)
    if speaks:
        rows.epoch = 2  # type: ignore[attr-defined]  # as those that keep it do
    learner.evaluate(learner.data.training)
    assert rows.told == ([0, 1, 2, 0] if speaks else [0, 1, 2, 0, 2])
    learner.fit(1)
    assert rows.told[-1] == 3


def test_an_error_of_the_users_method_leaves_the_fit() -> None:
    class Broken(Told):
        def set_epoch(self, epoch: int) -> None:
            raise KeyError("epoch")

    with pytest.raises(KeyError) as caught:
        learner_of(DataLoader(ROWS, batch_size=4, sampler=Broken())).fit(1)
    assert "in TrainingPhase(), epoch 1" in caught.value.__notes__[0]


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("at", [[1, 2], [4, 5, 8]], ids=["in the first epoch", "later"])
def test_a_run_that_was_killed_is_told_the_same_epochs(at: list[int]) -> None:
    def make() -> Learner:
        sampler: DistributedSampler[Any] = DistributedSampler(ROWS, num_replicas=1, rank=0, seed=5)
        return learner_of(DataLoader(ROWS, batch_size=4, sampler=sampler))

    assert_resumes_exactly(make, epochs=3, at=at)
