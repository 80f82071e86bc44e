from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from fluxloop import Checkpointer, CheckpointError, CombinedLoader, Learner, TensorBatches, TrainingPhase
from fluxloop.data.fingerprint import differences, fingerprint
from fluxloop.testing import toy_learner


def rows(count: int = 64, add: float = 0.0) -> Tensor:
    return torch.arange(count, dtype=torch.float32).reshape(count, 1) + add


def test_rows_are_digested_one_by_one_as_in_checkpoints_that_there_are() -> None:
    columns = (
        torch.arange(30),
        torch.randn(20, 3, 5)[:, ::2],
        torch.randn(9, 20_000),
        torch.randn(5, 4, dtype=torch.complex64).conj().T,
        torch.zeros(7, 0),
    )
    digest = blake2b(digest_size=8)
    for column in columns:
        digest.update(f"{column.dtype}{tuple(column.shape[1:])}".encode())
        count = min(len(column), 8)
        for row in [column[place * (len(column) - 1) // (count - 1)] for place in range(count)]:
            flat = row.reshape(-1).resolve_conj()
            digest.update(flat[:: max(1, flat.numel() // 4096)].numpy().tobytes())
    assert fingerprint([columns])["some values"] == digest.hexdigest()


class Own(Dataset[Any]):
    """Rows of a class of the user's, in arrays; it draws and counts as it loads them."""

    def __init__(self, xs: Any) -> None:
        self.xs = xs
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.xs)

    def __getitem__(self, index: int) -> Any:
        self.loaded += 1
        return torch.as_tensor(self.xs[index]) + torch.rand(1), torch.rand(1)


def tensors(xs: Tensor, **options: Any) -> TensorBatches:
    return TensorBatches(xs, xs, **{"batch_size": 8, "shuffle": True, **options})


def loader(dataset: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **{"batch_size": 8, **options})


CHANGED: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "rows": (lambda: tensors(rows()), lambda: tensors(rows(60)), "rows: 64 then, 60 now"),
    "batch size": (
        lambda: tensors(rows(), batch_size=8, drop_last=True),
        lambda: tensors(rows(71), batch_size=8, drop_last=True),
        "rows: 64 then, 71 now",
    ),
    "batch size of a loader": (
        lambda: loader(TensorDataset(rows(9), rows(9)), batch_size=5),
        lambda: loader(TensorDataset(rows(9), rows(9)), batch_size=6),
        "batch_size: 5 then, 6 now",
    ),
    "batch size, and so another number of batches": (
        lambda: tensors(rows()),
        lambda: tensors(rows(), batch_size=16),
        r"left after 3 of 8 batches .* there are 4 now.*\n  batch_size: 8 then, 16 now",
    ),
    "shuffle": (
        lambda: tensors(rows()),
        lambda: tensors(rows(), shuffle=False),
        "order: 'shuffled' then, 'as they are' now",
    ),
    "shuffle of a loader": (
        lambda: loader(Own(rows()), shuffle=True),
        lambda: loader(Own(rows())),
        "order: 'shuffled' then, 'as they are' now",
    ),
    "sampler": (
        lambda: loader(Own(rows()), sampler=RandomSampler(range(64))),
        lambda: loader(Own(rows()), sampler=WeightedRandomSampler([1.0] * 64, 64)),
        "order: 'shuffled' then, 'WeightedRandomSampler' now",
    ),
    "drop_last": (
        lambda: loader(Own(rows())),
        lambda: DataLoader(Own(rows()), batch_sampler=BatchSampler(SequentialSampler(range(64)), 8, True)),
        "drop_last: False then, True now",
    ),
    "seed": (lambda: tensors(rows(), seed=1), lambda: tensors(rows(), seed=2), "seed: 1 then, 2 now"),
    "values": (lambda: tensors(rows()), lambda: tensors(rows(add=1)), "some values"),
    "values of a loader": (
        lambda: loader(TensorDataset(rows(), rows())),
        lambda: loader(TensorDataset(rows(), rows(add=1))),
        "some values",
    ),
    "values in arrays": (
        lambda: loader(Own(rows().numpy())),
        lambda: loader(Own(rows(add=1).numpy())),
        "some values",
    ),
    "type": (
        lambda: loader(Own(rows().numpy())),
        lambda: loader(Own(rows().numpy().astype(np.float64))),
        "some values",
    ),
    "subset": (
        lambda: loader(Subset(TensorDataset(rows(), rows()), range(0, 64))),
        lambda: loader(Subset(TensorDataset(rows(), rows()), range(63, -1, -1))),
        "some values",
    ),
    "one of two": (
        lambda: loader(ConcatDataset([TensorDataset(rows(32), rows(32)), TensorDataset(rows(32), rows(32))])),
        lambda: loader(ConcatDataset([TensorDataset(rows(32), rows(32)), TensorDataset(rows(32), rows(32, 1))])),
        "some values",
    ),
    "batches": (
        lambda: [(row, row) for row in rows(8).split(1)],
        lambda: [(row, row) for row in rows(8, 1).split(1)],
        "some values",
    ),
    "part of several": (
        lambda: CombinedLoader([tensors(rows()), tensors(rows(60))], mode="sequential"),
        lambda: CombinedLoader([tensors(rows()), tensors(rows(61))], mode="sequential"),
        "rows of '1': 60 then, 61 now",
    ),
}


class Killed(TrainingPhase):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, learner: Any, batch: Any) -> Any:
        if learner.streams["training/step"].index == self.at:
            raise OSError("killed")
        return super().step(learner, batch)


Killed.__name__, Killed.__qualname__, Killed.__module__ = "TrainingPhase", "TrainingPhase", TrainingPhase.__module__


def leave(folder: Path, source: Any, at: int | None) -> None:
    learner = learner_of(folder, source)
    if at is None:
        learner.fit(1, resume=folder)
        return
    with pytest.raises(OSError, match="killed"):
        learner.fit(1, phases=[Killed(at)], resume=folder)


def learner_of(folder: Path, source: Any) -> Learner:
    return toy_learner(Checkpointer(folder, unit="step"), data=(source,))


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(("first", "other", "words"), CHANGED.values(), ids=CHANGED)
def test_an_epoch_does_not_go_on_with_other_data(
    first: Callable[[], Any], other: Callable[[], Any], words: str, tmp_path: Path
) -> None:
    source = first()
    leave(tmp_path, source, min(3, len(source) - 1))
    learner = learner_of(tmp_path, other())
    before = learner.state_dict()["models"][""]["state"]
    with pytest.raises(CheckpointError, match=words):
        learner.fit(1, resume=tmp_path)
    after = learner.state_dict()["models"][""]["state"]
    assert all(torch.equal(after[name], before[name]) for name in before)
    learner_of(tmp_path, first()).fit(1, resume=tmp_path)


def test_between_epochs_other_data_is_told(tmp_path: Path) -> None:
    leave(tmp_path, tensors(rows()), None)
    with pytest.warns(UserWarning, match="rows: 64 then, 60 now"):
        learner_of(tmp_path, tensors(rows(60))).fit(2, resume=tmp_path)


def test_the_same_data_is_not_told(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    leave(tmp_path, tensors(rows()), None)
    learner_of(tmp_path, tensors(rows())).fit(2, resume=tmp_path)
    assert [str(each.message) for each in recwarn] == []


def test_rows_are_not_loaded_to_be_looked_at() -> None:
    data = Own(rows())
    before = torch.get_rng_state()
    assert fingerprint(loader(data))["some values"] is not None
    assert data.loaded == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_that_training_changes_are_those_of_the_beginning(tmp_path: Path) -> None:
    class Changes(Killed):
        def step(self, learner: Any, batch: Any) -> Any:
            learner.data.training.data[0].add_(1)
            return super().step(learner, batch)

    Changes.__name__, Changes.__qualname__, Changes.__module__ = "TrainingPhase", "TrainingPhase", Killed.__module__
    xs = rows()
    learner = learner_of(tmp_path, TensorBatches(xs.clone(), xs, batch_size=8, shuffle=True))
    with pytest.raises(OSError, match="killed"):
        learner.fit(1, phases=[Changes(3)], resume=tmp_path)
    learner_of(tmp_path, TensorBatches(xs, xs, batch_size=8, shuffle=True)).fit(1, resume=tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        iter([1]),
        [1, "a", {}],
        [],
        DataLoader(Own([])),
        DataLoader(Own(["a", "b"])),
        TensorBatches(torch.zeros(3, 0), batch_size=1),
        TensorBatches(torch.zeros(3, 4, dtype=torch.bool).T, batch_size=1),
        TensorBatches(torch.randn(5, 100_000, dtype=torch.complex64).conj(), batch_size=1),
        DataLoader(Own(np.zeros(4, dtype=[("a", "f4")]))),
    ],
    ids=lambda source: type(source).__name__,
)
def test_any_source_has_a_description(source: Any) -> None:
    assert fingerprint(source) == fingerprint(source)


def test_what_an_earlier_version_did_not_tell_is_not_compared() -> None:
    assert differences({}, fingerprint(tensors(rows()))) == []
    assert differences({"rows": None, "gone": 3}, {"rows": 4}) == []
