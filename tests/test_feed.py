from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from fluxloop import DataError, TensorBatches, ValidationPhase
from fluxloop.feed import Feed, untouched
from fluxloop.randomness import Streams
from fluxloop.testing import EventRecorder, toy_learner


class Numbers(Dataset[int]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rows))


class CountsEpochs:
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.zeros(1)])


def feed(source: Any) -> Feed:
    return Feed(source, "training", Streams(0))


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ([1, 2, 3], 3),
        (TensorBatches(torch.zeros(5), batch_size=2), 3),
        (DataLoader(Numbers(5), batch_size=2, drop_last=True), 2),
        (DataLoader(Stream(5), batch_size=2), None),
        (iter([1]), None),
        ((n for n in range(3)), None),
    ],
)
def test_the_number_of_batches_is_known_where_the_source_knows_it(source: Any, count: int | None) -> None:
    data = feed(source)
    assert data.num_batches == count
    if count is None:
        with pytest.raises(TypeError, match="has no length"):
            len(data)
    else:
        assert len(data) == count


@pytest.mark.parametrize("source", [[1, 2, 3], DataLoader(Stream(3), batch_size=1), iter([1, 2])])
def test_a_feed_gives_the_batches_of_its_source(source: Any) -> None:
    assert len(list(feed(source))) >= 2


@pytest.mark.parametrize(
    "source",
    [[], DataLoader(Numbers(0)), DataLoader(Numbers(3), batch_size=4, drop_last=True)],
    ids=["list", "no rows", "no full batch"],
)
def test_empty_data_of_known_size_is_an_error_before_anything_has_begun(source: Any) -> None:
    recorder = EventRecorder()
    learner = toy_learner(recorder, data=(source,))
    with pytest.raises(DataError, match=r"the training data \(.*\) gave no batch; expected at least one.*drop_last"):
        learner.fit(1)
    assert recorder.trace == []


@pytest.mark.parametrize(
    "source", [iter([]), DataLoader(Stream(0)), (n for n in ())], ids=["iterator", "stream", "generator"]
)
def test_empty_data_of_unknown_size_is_an_error(source: Any) -> None:
    learner = toy_learner(data=(source,))
    with pytest.raises(DataError, match=r"the training data \(.*\) gave no batch.*used up before"):
        learner.fit(1)


def test_a_generator_lasts_for_one_epoch_and_says_so_in_the_second() -> None:
    xs = torch.ones(2, 1)
    learner = toy_learner(data=((pair for pair in [(xs, 3 * xs)] * 4),))
    with pytest.raises(DataError, match=r"the training data \(a generator\) gave no batch.*used up before") as caught:
        learner.fit(2)
    assert any("epoch 2" in note for note in caught.value.__notes__)


def test_empty_validation_data_names_itself() -> None:
    learner = toy_learner(data={"validation": []})
    with pytest.raises(DataError, match="the validation data"):
        learner.epoch(ValidationPhase())


def test_a_sampler_that_counts_epochs_is_told_which_one_begins() -> None:
    source = CountsEpochs()
    data = feed(source)
    for _ in range(3):
        assert len(list(data)) == 1
    assert source.epochs == [0, 1, 2]


def test_the_training_data_is_shuffled_and_the_validation_data_is_not() -> None:
    xs = torch.arange(64.0).reshape(64, 1)
    learner = toy_learner(data=((xs, 3 * xs), (xs, 3 * xs)))
    assert [batch[0].tolist() for batch in learner.data.validation] == [part.tolist() for part in xs.split(32)]
    order = [row for batch in learner.data.training for row in batch[0].flatten().tolist()]
    assert sorted(order) == xs.flatten().tolist() != order


@pytest.mark.parametrize("batched", [False, True], ids=["sampler", "batch sampler"])
def test_untouched_puts_the_generator_of_a_sampler_back(batched: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    sampler = RandomSampler(Numbers(6), generator=generator)
    if batched:
        loader = DataLoader(Numbers(6), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    else:
        loader = DataLoader(Numbers(6), batch_size=2, sampler=sampler)
    before = generator.get_state()
    with untouched(loader):
        first = [batch.tolist() for batch in loader]
        assert not torch.equal(generator.get_state(), before)
    assert torch.equal(generator.get_state(), before)
    assert [batch.tolist() for batch in loader] == first
