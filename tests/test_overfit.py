from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import Learner, Recorder, TensorBatches, TrainingPhase
from fluxloop.data.loaders import overfit
from fluxloop.errors import DataError

XS = torch.arange(40.0)[:, None]


def equal(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_it_gives_the_same_first_batches_every_time() -> None:
    loader = TensorBatches(XS, 2 * XS, batch_size=8)
    given = overfit(loader, 2)
    assert equal(given, list(loader)[:2])
    assert equal(list(given), list(given))


def test_a_shuffled_loader_is_asked_once_and_moves_no_random_numbers() -> None:
    loader = DataLoader(TensorDataset(XS, 2 * XS), batch_size=8, shuffle=True)
    before = torch.get_rng_state()
    given = overfit(loader, 3)
    assert torch.equal(torch.get_rng_state(), before)
    rows = torch.cat([batch[0] for batch in given])
    assert len(rows.unique()) == 24
    assert not torch.equal(rows, XS[:24])


def test_rows_become_batches_as_for_a_learner() -> None:
    assert equal(overfit((XS, 2 * XS)), [(XS[:32], 2 * XS[:32])])


def test_an_endless_source_is_read_no_further_than_needed() -> None:
    read: list[int] = []

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            read.append(1)
            yield XS, XS

    assert len(overfit(endless(), 3)) == 3
    assert len(read) == 3


def test_fewer_batches_than_asked_for_are_all_there_are() -> None:
    assert len(overfit(TensorBatches(XS, batch_size=20), 9)) == 2


def test_a_learner_trains_on_them_alone_and_learns_them() -> None:
    torch.manual_seed(0)
    xs, ys = torch.randn(64, 8), torch.arange(64) % 2
    learner = Learner(
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)),
        nn.CrossEntropyLoss(),
        data=(overfit(TensorBatches(xs, ys, batch_size=16, shuffle=True, seed=0)),),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        callbacks=[Recorder()],
        default_callbacks=False,
    )
    learner.fit(40)
    assert learner.history[TrainingPhase].steps == 40
    assert learner.step.loss.item() < 0.01


@pytest.mark.parametrize("batches", [0, -1])
def test_less_than_a_batch_is_refused(batches: int) -> None:
    with pytest.raises(ValueError, match=r"overfit\(batches=-?\d\) was given; expected 1 or more"):
        overfit([XS], batches)


def test_data_without_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match="gave no batch"):
        overfit([])
