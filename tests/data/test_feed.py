from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from fluxloop import (
    BatchLimit,
    Checkpointer,
    CombinedLoader,
    DataError,
    Learner,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    find_lr,
)
from fluxloop.data.feed import Feed
from fluxloop.data.passes import untouched
from fluxloop.randomness import Streams
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner
from toys import Numbers, Stream


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


class Sized:
    """Says that it has so many batches, and gives so many."""

    def __init__(self, says: int, gives: int) -> None:
        self.says = says
        self.gives = gives
        self.begun_at = 0

    def __len__(self) -> int:
        return self.says

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        begin, self.begun_at = self.begun_at, 0
        for place in range(begin, self.gives):
            self.now = place
            yield torch.ones(1, 1), torch.ones(1, 1)

    def state_dict(self) -> dict[str, int]:
        return {"next": self.now + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begun_at = state["next"]


class Short(RandomSampler):
    def __len__(self) -> int:
        return 2 * super().__len__()


@pytest.mark.parametrize(
    ("source", "says", "gives"),
    [
        (Sized(10, 5), 10, 5),
        (Sized(5, 10), 5, 10),
        (DataLoader(TensorDataset(*[torch.ones(20, 1)] * 2), batch_size=4, sampler=Short(range(20))), 10, 5),
        (CombinedLoader([Sized(10, 5)], mode="sequential"), 10, 5),
    ],
    ids=["fewer", "more", "a sampler", "combined"],
)
def test_data_with_another_number_of_batches_than_its_length_is_told_once(source: Any, says: int, gives: int) -> None:
    learner = toy_learner(data=(source,))
    with pytest.warns(UserWarning, match=rf"has {says} batches by its len\(\), and gave {gives}") as caught:
        learner.fit(3)
    assert len(caught) == 1


def test_an_epoch_that_is_cut_short_on_purpose_is_not_told(recwarn: pytest.WarningsRecorder) -> None:
    learner = toy_learner(BatchLimit(3), data=(Sized(10, 5),))
    learner.fit(1)
    learner = toy_learner(data=(Sized(10, 5),))
    learner.fit(1, steps_per_epoch=4)
    assert [str(each.message) for each in recwarn] == []


def test_an_epoch_that_is_resumed_has_to_have_as_many_batches_as_its_length(tmp_path: Path) -> None:
    def make() -> Learner:
        return toy_learner(Checkpointer(tmp_path / "run", unit="step"), data=(Sized(10, 5),))

    with pytest.raises(OSError, match="killed"):
        make().fit(1, data=(Killed(10, 5),), resume=tmp_path / "run")
    with pytest.raises(DataError, match=r"has 10 batches by its len\(\), and gave 5; the epoch was resumed"):
        make().fit(1, resume=tmp_path / "run")


class Killed(Sized):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for place, batch in enumerate(super().__iter__()):
            if place == 3:
                raise OSError("killed")
            yield batch


class Counting:
    """A loader of the user's that keeps its place: it goes on from there, and begins anew once it has ended."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.next < 10:
            self.next += 1
            yield torch.full((1, 1), float(self.next)), torch.rand(1, 1)
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Streaming(Counting):
    """As streaming data sets of a library are: from a loaded state they go on there until their epoch changes."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for place in range(self.start + 1, 11):
            self.next = place
            yield torch.full((1, 1), float(self.next + 100 * self.epoch)), torch.rand(1, 1)

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start, self.epoch = state["next"], state["epoch"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Counting, Streaming])
@pytest.mark.parametrize("limit", [None, 4, 5, 10])
def test_a_loader_that_keeps_its_place_resumes_exactly_wherever_epochs_were_cut(
    limit: int | None, kind: type[Counting], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def run(folder: Path, at: int | None, epochs: int) -> tuple[Learner, list[float]]:
        seen: list[float] = []

        class Seen(TrainingPhase):
            transient = ("seen",)

            def entries(self, batch: Any) -> dict[str, Any]:
                if len(seen) == at:
                    raise OSError("killed")
                seen.append(batch[0].item())
                return super().entries(batch)

        learner = toy_learner(Checkpointer(folder, unit="step"), data=(kind(),))
        try:
            learner.fit(epochs, phases=[Seen()], steps_per_epoch=limit, resume=folder)
        except OSError:
            assert at is not None
        return learner, seen

    whole, batches = run(tmp_path / "whole", None, 3)
    for at in range(1, len(batches), 3):
        first = run(tmp_path / f"{at}", at, 3)[1]
        resumed, rest = run(tmp_path / f"{at}", None, 3)
        assert first + rest == batches
        assert_same_bits(whole, resumed)
    first = run(tmp_path / "parts", None, 2)[1]
    assert first + run(tmp_path / "parts", None, 3)[1] == batches
    assert [str(each.message) for each in recwarn] == []


def test_watching_a_loader_that_keeps_its_place_leaves_it_there() -> None:
    source = Counting()
    learner = toy_learner(data=(source,))
    learner.fit(1, steps_per_epoch=3)
    assert source.next == 3
    learner.evaluate(source)
    learner.predict(source)
    find_lr(learner, steps=3)
    assert source.next == 3
    learner.fit(1, steps_per_epoch=3)
    assert source.next == 6


class Halves(list[Any]):
    def __len__(self) -> Any:
        return 2.5


def test_a_length_that_is_no_number_of_batches_is_told_before_the_first_step() -> None:
    batches = Halves([(torch.zeros(2, 4), torch.zeros(2, 1))])
    learner = Learner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, data=(batches,), default_callbacks=False)
    before = learner.model.weight.clone()
    with pytest.raises(DataError, match=r"the len\(\) of the training data \(a Halves\) is no number of batches"):
        learner.fit(1)
    assert torch.equal(learner.model.weight, before)
