from __future__ import annotations

import gc
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    default_collate,
)

from drawn import numbers, plain, scramble
from fluxloop import TensorBatches
from fluxloop.data.changes import put_source_back, source_state
from fluxloop.data.copies import copy_of
from fluxloop.data.generators import own_generators
from fluxloop.data.kinds import can_skip, is_loader, keeps_place
from fluxloop.data.sources import iterate
from fluxloop.persist.plain import from_plain, to_plain
from fluxloop.randomness import stream_seed


class Rows(Dataset[Any]):
    """Draws from all three generators, and notes what it loads."""

    def __init__(self, count: int = 10) -> None:
        self.count = count
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        self.loaded.append(index)
        return index, torch.rand(()), numpy.random.normal(), random.random(), random.gauss(0, 1)


class Several(Rows):
    """Loads several at once."""

    def __getitems__(self, indices: list[int]) -> Any:
        return [self[index] for index in indices]


class Still(Rows):
    def __getitem__(self, index: int) -> Any:
        self.loaded.append(index)
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class Stateful(Stream):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class FromNumpy(Sampler[int]):
    """Shuffles with NumPy and Python when its iteration begins, and draws as it goes."""

    def __init__(self, count: int = 10) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count).tolist()
        numpy.random.shuffle(order)
        random.shuffle(order)
        for index in order:
            yield (index + numpy.random.randint(2) + random.randint(0, 1)) % self.count


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(Rows(), batch_size=3),
    "shuffled": lambda: DataLoader(Rows(), batch_size=3, shuffle=True),
    "without the last": lambda: DataLoader(Rows(), batch_size=3, shuffle=True, drop_last=True),
    "with replacement": lambda: DataLoader(Rows(), batch_size=3, sampler=RandomSampler(Rows(), True, 12)),
    "one by one": lambda: DataLoader(Rows(), batch_size=None, shuffle=True, collate_fn=list),
    "several at once": lambda: DataLoader(Several(), batch_size=4, shuffle=True),
    "from NumPy and Python": lambda: DataLoader(Rows(), batch_size=3, sampler=FromNumpy()),
    "a list of batches": lambda: DataLoader(Rows(), batch_sampler=[[1, 2], [3], [4, 5, 6]]),
    "its own generator": lambda: DataLoader(
        Rows(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "a collate function that draws": lambda: DataLoader(
        Still(),
        batch_size=3,
        shuffle=True,
        collate_fn=lambda items: (default_collate(items), torch.rand(()), numpy.random.normal(), random.random()),
    ),
    "of tensors": lambda: DataLoader(TensorDataset(torch.arange(10)), batch_size=3, shuffle=True),
}


@pytest.mark.slow(quick=7)
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_an_iteration_from_a_batch_on_is_the_rest_of_a_whole_one(make: Callable[[], DataLoader[Any]]) -> None:
    scramble(1)
    whole = plain(iterate(make(), numbers()))
    assert len(whole) > 2
    for skip in range(len(whole) + 1):
        scramble(2 + skip)
        loader = make()
        assert plain(iterate(loader, numbers(), skip)) == whole[skip:]
        if isinstance(loader.dataset, Rows):
            assert len(loader.dataset.loaded) == sum(len(b[0]) if isinstance(b[0], list) else 1 for b in whole[skip:])


@pytest.mark.parametrize("make", [LOADERS[name] for name in ("shuffled", "from NumPy and Python", "of tensors")])
def test_epochs_and_seeds_have_orders_of_their_own(make: Callable[[], DataLoader[Any]]) -> None:
    orders = [[batch[0] for batch in plain(iterate(make(), numbers(e, s)))] for e in range(3) for s in range(3)]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])


def test_an_order_drawn_by_numpy_alone_differs_between_epochs_and_seeds() -> None:
    class Alone(FromNumpy):
        def __iter__(self) -> Iterator[int]:
            return iter(numpy.random.permutation(self.count).tolist())

    loader = DataLoader(Still(), batch_size=10, sampler=Alone())
    orders = [next(iterate(loader, numbers(epoch, seed))).tolist() for epoch in range(3) for seed in range(3)]
    assert len(set(map(tuple, orders))) == 9


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [None, FromNumpy(6)], ids=["shuffled", "a sampler that draws"])
def test_samples_do_not_depend_on_the_number_of_workers(sampler: Any) -> None:
    def load(workers: int, skip: int = 0) -> list[Any]:
        scramble(workers)
        context = "fork" if workers else None
        loader = DataLoader(
            Rows(6),
            batch_size=2,
            shuffle=sampler is None,
            sampler=sampler,
            num_workers=workers,
            multiprocessing_context=context,
        )
        return plain(iterate(loader, numbers(), skip))

    assert load(0) == load(1) == load(2)
    assert load(2, skip=1) == load(0)[1:]


@pytest.mark.slow
def test_workers_that_stay_load_what_new_ones_do() -> None:
    def make(persistent: bool) -> DataLoader[Any]:
        return DataLoader(
            Rows(6),
            batch_size=2,
            shuffle=True,
            num_workers=1,
            persistent_workers=persistent,
            multiprocessing_context="fork",
        )

    stay, new = make(True), make(False)
    for epoch in range(3):
        assert plain(iterate(stay, numbers(epoch), epoch)) == plain(iterate(new, numbers(epoch), epoch))
    del stay, new
    gc.collect()  # ends the workers


def test_loading_leaves_numpys_and_pythons_generators_alone() -> None:
    loader = DataLoader(Rows(), batch_size=3, sampler=FromNumpy())
    scramble(3)
    before = states()[1:]
    for _ in iterate(loader, numbers()):
        assert states()[1:] == before
    for _ in iterate(loader, numbers(), 2):
        assert states()[1:] == before


def test_what_a_sample_draws_depends_on_its_place_alone() -> None:
    first = plain(iterate(DataLoader(Rows(), batch_size=3), numbers()))
    other = plain(iterate(DataLoader(Rows(), batch_size=5), numbers()))
    rows = [[each for batch in first for each in batch[part]] for part in range(5)]
    assert rows == [[each for batch in other for each in batch[part]] for part in range(5)]
    torch.manual_seed(stream_seed(0, "sample/0", 4))
    assert rows[1][4] == torch.rand(()).item()


def test_the_users_loader_is_not_changed() -> None:
    data = Rows()
    loader = DataLoader(data, batch_size=3, shuffle=True)
    before = dict(vars(loader))
    list(iterate(loader, numbers()))
    assert loader.dataset is data
    assert {name: vars(loader)[name] for name in before} == before


@pytest.mark.slow
def test_a_loader_that_is_forgotten_is_freed_with_its_copy() -> None:
    loader = DataLoader(Rows(), batch_size=3)
    list(iterate(loader, numbers()))
    copied = copy_of(loader)
    assert copied is not None
    gone = weakref.ref(loader), weakref.ref(copied)
    del loader, copied
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_dataset_behind_a_loader_keeps_its_attributes_and_can_be_pickled() -> None:
    loader = DataLoader(Rows(), batch_size=3)
    list(iterate(loader, numbers()))
    copied = copy_of(loader)
    assert copied is not None
    assert len(copied.dataset) == 10  # type: ignore[arg-type]
    assert copied.dataset.count == 10  # type: ignore[attr-defined]
    copied.dataset.count = 4  # type: ignore[attr-defined]
    assert loader.dataset.count == 4  # type: ignore[attr-defined]
    assert len(pickle.loads(pickle.dumps(copied.dataset))) == 4
    with pytest.raises(AttributeError, match="nothing"):
        copied.dataset.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("source", "skips", "keeps"),
    [
        ([1, 2], True, False),
        ((1, 2), True, False),
        (TensorBatches(torch.zeros(3), batch_size=2), True, False),
        (DataLoader(Rows()), True, False),
        (DataLoader(Subset(Rows(), [0])), True, False),
        (DataLoader(Stream()), False, False),
        (iter([1]), False, False),
        (range(3), False, False),
        (Stateful(), False, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sources_that_can_be_gone_on_with_are_known(source: Any, skips: bool, keeps: bool) -> None:
    assert (can_skip(source), keeps_place(source)) == (skips, keeps)


def test_a_loader_that_iterates_in_a_way_of_its_own_is_not_taken_for_torchs() -> None:
    class Mine(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([1])

    class Named(DataLoader[Any]):
        pass

    assert not is_loader(Mine(Rows()))
    assert is_loader(Named(Rows()))
    assert not is_loader(DataLoader(Stream()))
    assert not is_loader([1])
    assert list(iterate(Mine(Rows()), numbers())) == [1]


def test_datasets_that_only_hand_out_tensors_are_not_started_anew_for_each_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    monkeypatch.setattr("fluxloop.data.rows.start_generators", started.append)
    tensors = TensorDataset(torch.arange(6))
    for data in (tensors, Subset(tensors, [0, 1]), ConcatDataset([tensors, tensors])):
        assert len(list(iterate(DataLoader(data, batch_size=2), numbers()))) == len(data) // 2  # type: ignore[arg-type]
    assert started == []
    assert len(list(iterate(DataLoader(Subset(Still(), [0, 1])), numbers()))) == 2
    assert len(started) == 2


def test_a_sampler_of_the_users_deep_inside_draws_apart() -> None:
    def make() -> DataLoader[Any]:
        deep = BatchSampler(FromNumpy(), 3, False)
        return DataLoader(TensorDataset(torch.arange(10)), batch_size=None, sampler=deep)

    scramble(1)
    before = states()[1:]
    whole = plain(iterate(make(), numbers()))
    assert states()[1:] == before
    scramble(2)
    assert plain(iterate(make(), numbers())) == whole


def test_tensors_can_be_reached_where_workers_begin() -> None:
    def begin(worker: int) -> None:
        data = torch.utils.data.get_worker_info().dataset  # type: ignore[union-attr]
        data.tensors = (data.tensors[0] + 100,)

    loader = DataLoader(
        TensorDataset(torch.arange(4)),
        batch_size=2,
        num_workers=1,
        worker_init_fn=begin,
        multiprocessing_context="fork",
    )
    assert plain(iterate(loader, numbers())) == plain(loader) == [[[100, 101]], [[102, 103]]]


@given(rows=st.integers(1, 23), size=st.integers(1, 7), drop=st.booleans(), shuffle=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=30)
def test_batches_of_tensors_from_one_on_are_the_rest(
    rows: int, size: int, drop: bool, shuffle: bool, data: st.DataObject
) -> None:
    if drop and rows < size:
        size = rows
    seed = data.draw(st.none() | st.integers(0, 5))
    loader = TensorBatches(torch.arange(rows), batch_size=size, drop_last=drop, shuffle=shuffle, seed=seed)
    skip = data.draw(st.integers(0, len(loader)))
    torch.manual_seed(1)
    loader.set_epoch(2)
    whole = [batch.tolist() for batch in iterate(loader, numbers())]
    torch.manual_seed(1)
    loader.set_epoch(2)
    assert [batch.tolist() for batch in iterate(loader, numbers(), skip)] == whole[skip:]


def test_own_generators_are_found_once_wherever_they_are() -> None:
    first, second = torch.Generator(), torch.Generator()
    sampler = RandomSampler(range(4), generator=second)
    loader = DataLoader(Rows(4), batch_sampler=BatchSampler(sampler, 2, False), generator=first)
    assert own_generators(loader) == [first, second]
    assert own_generators(DataLoader(Rows(), shuffle=True, generator=first)) == [first]
    assert own_generators([1]) == []


class Counting(FromNumpy):
    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Still(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(5)),
        lambda: DataLoader(Still(), batch_size=5, sampler=Counting()),
        lambda: DataLoader(Still(), batch_sampler=BatchSampler(Counting(), 5, False)),
    ],
    ids=["a generator", "a sampler that counts", "a batch sampler around one"],
)
def test_what_a_loader_keeps_for_itself_is_put_back(make: Callable[[], DataLoader[Any]]) -> None:
    loader = make()
    list(iterate(loader, numbers(0)))
    state = from_plain(to_plain(source_state(loader), "it"))
    then = [batch.tolist() for batch in iterate(loader, numbers(1))]
    other = make()
    put_source_back(other, state)
    assert [batch.tolist() for batch in iterate(other, numbers(1))] == then
    assert [batch.tolist() for batch in iterate(make(), numbers(1))] != then
