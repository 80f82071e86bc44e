from __future__ import annotations

import gc
import pickle
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any, cast

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
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
    WeightedRandomSampler,
    default_collate,
)

from fluxloop import TensorBatches
from fluxloop.data.changes import put_source_back, source_state
from fluxloop.data.copies import copy_of
from fluxloop.data.generators import own_generators
from fluxloop.data.indices import Numbers
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


def numbers(epoch: int = 0, seed: int = 0) -> Numbers:
    return Numbers(
        stream_seed(seed, "order", epoch),
        lambda batch: stream_seed(seed, f"fetch/{epoch}", batch),
        lambda sample: stream_seed(seed, f"sample/{epoch}", sample),
    )


def plain(batches: Any) -> list[Any]:
    return [[part.tolist() if isinstance(part, torch.Tensor) else part for part in batch] for batch in batches]


def scramble(number: int) -> None:
    torch.manual_seed(number)
    numpy.random.seed(number)
    random.seed(number)


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
def test_a_loader_that_is_forgotten_is_freed_with_its_twin() -> None:
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


# Whole batches of torch's own tensors


def tensor_rows(rows: int = 23) -> TensorDataset:
    generator = torch.Generator().manual_seed(rows)
    images = torch.randn(rows, 1, 4, 4, generator=generator)
    return TensorDataset(
        images, torch.arange(rows), torch.rand(rows, 3, dtype=torch.float64, generator=generator) < 0.5
    )


WHOLE: dict[str, Callable[[], Dataset[Any]]] = {
    "tensors": tensor_rows,
    "one tensor": lambda: TensorDataset(torch.arange(23)),
    "subset": lambda: Subset(tensor_rows(40), list(range(40, 17, -1))[1:]),
    "subset by arrays": lambda: Subset(tensor_rows(40), numpy.arange(3, 26)),  # type: ignore[arg-type]
    "subset of a subset": lambda: Subset(Subset(tensor_rows(), [5, 3, 1, 3, 22, 7]), [0, 5, 2, 3, 4, 2, 1]),
    "several": lambda: ConcatDataset([tensor_rows(4), Subset(tensor_rows(9), [8, 2, 4]), tensor_rows(16)]),
    "several in one": lambda: Subset(ConcatDataset([tensor_rows(9), tensor_rows(14)]), [20, 3, 5, 22, 1, 8, 9, 13, 0]),
}
IN_ORDER: dict[str, Callable[[int], dict[str, Any]]] = {
    "in order": lambda rows: {"batch_size": 5},
    "shuffled": lambda rows: {"batch_size": 5, "shuffle": True},
    "without the last": lambda rows: {"batch_size": 3, "shuffle": True, "drop_last": True},
    "weighted": lambda rows: {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * rows, 11)},
    "a list of batches": lambda rows: {"batch_sampler": [[1, 2], [0], [2, 2, 3]]},
    "NumPy's numbers": lambda rows: {"batch_size": 2, "sampler": numpy.random.RandomState(0).permutation(rows)},
    "torch's numbers": lambda rows: {"batch_size": 2, "sampler": torch.arange(rows).flip(0)},
    "from the end": lambda rows: {"batch_size": 2, "sampler": [0, -1, 2, -3]},
}


def assert_like_plain(make: Callable[[], DataLoader[Any]]) -> None:
    """A loader run through its copied gives what it gives by itself: types, bits and strides."""
    torch.manual_seed(numbers().order)
    expected = list(make())
    scramble(3)
    given = list(iterate(make(), numbers()))
    assert len(given) == len(expected) > 1
    for ours, theirs in zip(given, expected, strict=True):
        assert type(ours) is type(theirs) is list
        assert [(part.dtype, part.stride(), part.is_contiguous()) for part in ours] == [
            (part.dtype, part.stride(), part.is_contiguous()) for part in theirs
        ]
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.slow(quick=27)
@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("options", IN_ORDER.values(), ids=IN_ORDER)
def test_whole_batches_are_those_of_the_loader(
    data: Callable[[], Dataset[Any]], options: Callable[[int], dict[str, Any]]
) -> None:
    dataset = data()
    count = len(dataset)  # type: ignore[arg-type]
    assert_like_plain(lambda: DataLoader(dataset, **options(count)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensors", "several in one"])
def test_workers_fetch_whole_batches_too(name: str) -> None:
    options: dict[str, Any] = {"batch_size": 4, "shuffle": True, "multiprocessing_context": "fork"}
    assert_like_plain(lambda: DataLoader(WHOLE[name](), num_workers=2, **options))


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_rows_of_tensors_are_not_fetched_one_by_one(
    data: Callable[[], Dataset[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = data()
    monkeypatch.delattr(TensorDataset, "__getitem__")
    assert len(list(iterate(DataLoader(dataset, batch_size=2, shuffle=True), numbers()))) > 1


@pytest.mark.filterwarnings("ignore:'set_vital'")
def test_batches_are_whole_for_loaders_of_torchdata() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    assert_like_plain(lambda: stateful(tensor_rows(), batch_size=4))


def test_whole_batches_are_pinned_where_the_loader_says_so() -> None:
    pinned = torch.cuda.is_available()
    loader = DataLoader(tensor_rows(), batch_size=4, pin_memory=True)
    with nullcontext() if pinned else pytest.warns(UserWarning, match="pin_memory"):
        batches = list(iterate(loader, numbers()))
    assert all(part.is_pinned() == pinned for batch in batches for part in batch)


class Doubled(Tensor):
    """A tensor of the user's own, with rows of its own."""

    def __getitem__(self, index: Any) -> Any:
        return 2 * self.as_subclass(Tensor)[index]


OTHERS: dict[str, Callable[[], Dataset[Any]]] = {
    "rows that are not contiguous": lambda: TensorDataset(torch.randn(8, 6).T, torch.randn(6, 3, 4, 5)[:, :, ::2]),
    "channels last": lambda: TensorDataset(torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last)),
    "a tensor of a class of its own": lambda: TensorDataset(torch.randn(6, 2).as_subclass(Doubled)),
    "several of two types": lambda: ConcatDataset(
        [TensorDataset(torch.zeros(3, 2)), TensorDataset(torch.ones(3, 2, dtype=torch.float64))]
    ),
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_what_cannot_be_fetched_at_once_comes_as_torch_gives_it(data: Callable[[], Dataset[Any]]) -> None:
    dataset = data()
    assert_like_plain(lambda: DataLoader(dataset, batch_size=2, shuffle=True))


def test_gradients_reach_the_rows_of_a_dataset() -> None:
    latents = torch.randn(6, 2, requires_grad=True)
    for (rows,) in iterate(DataLoader(TensorDataset(latents), batch_size=2), numbers()):
        (3 * rows).sum().backward()
    assert torch.equal(cast(Tensor, latents.grad), torch.full((6, 2), 3.0))


def failure(batches: Any) -> tuple[type[BaseException], str] | list[Any]:
    try:
        return plain(batches)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("sampler", [[True, False], [0.5, 1], [7, 30], [2, -24], [[1, 2], [3, 4]], ["a"], []], ids=str)
def test_indices_that_torch_refuses_are_refused_in_its_words(sampler: list[Any]) -> None:
    tensors = tensor_rows()
    for data in (tensors, Subset(tensor_rows(30), list(range(23))), ConcatDataset([tensors, tensors])):
        loader = DataLoader(data, batch_sampler=[sampler])
        expected = failure(loader)
        assert failure(iterate(loader, numbers())) == expected


@pytest.mark.parametrize("other", [(torch.zeros(3, 4),), (torch.zeros(3, 2), torch.zeros(3))], ids=["shape", "number"])
def test_rows_that_make_no_batch_are_refused_in_torchs_words(other: tuple[Tensor, ...]) -> None:
    loader = DataLoader(ConcatDataset([TensorDataset(torch.zeros(3, 2)), TensorDataset(*other)]), batch_size=6)
    expected = failure(loader)
    assert expected[0] is RuntimeError
    assert failure(iterate(loader, numbers())) == expected


def test_rows_that_come_one_by_one_are_collated_one_by_one() -> None:
    data = TensorDataset(torch.arange(4), torch.arange(4))
    loader = DataLoader(data, batch_size=None, collate_fn=default_collate)
    assert [row.tolist() for row in iterate(loader, numbers())] == [[n, n] for n in range(4)]


class Batch(list[Any]):
    """What a collate function of the user's makes."""


@pytest.mark.parametrize("taught", [{Tensor: lambda rows, **_: len(rows)}, {tuple: lambda rows, **_: Batch(rows)}])
def test_what_default_collate_was_taught_is_done(taught: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ways = sys.modules[default_collate.__module__].default_collate_fn_map
    for kind, way in taught.items():
        monkeypatch.setitem(ways, kind, way)
    loader = DataLoader(TensorDataset(torch.arange(6)), batch_size=2)
    assert list(iterate(loader, numbers())) == list(loader)


def test_without_knowing_what_default_collate_was_taught_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[default_collate.__module__], "default_collate_fn_map")
    loader = DataLoader(tensor_rows(), batch_size=4)
    list(islice(iterate(loader, numbers()), 0))
    copied = copy_of(loader)
    assert copied is not None
    assert copied.collate_fn is default_collate


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
