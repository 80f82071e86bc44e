from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from fluxloop import CheckpointError, CombinedLoader, DataError, TensorBatches, as_dataloader
from fluxloop.data.feed import Feed
from fluxloop.data.share import Share
from fluxloop.data.sharing import SharedLoader, shared
from fluxloop.nested import map_tensors, tensors
from fluxloop.randomness import Streams
from processes.pretended import Alone, Threaded, together

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it in torch 2.9


class Augmented(Dataset[Any]):
    """Rows with what an augmentation of each draws from all three generators."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return index, torch.rand(()), numpy.random.normal(), random.random()


class Shuffled(Sampler[int]):
    """Shuffles with NumPy and Python, and draws as it goes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        numpy.random.shuffle(order)
        random.shuffle(order)
        for index in order:
            yield (index + numpy.random.randint(2)) % self.count


Make = Callable[[int, int, bool], Any]
"""Makes data of so many rows, in batches of so many, with or without the last one."""

BY_ROWS: dict[str, Make] = {
    "tensors": lambda rows, size, drop: TensorBatches(torch.arange(rows), batch_size=size, drop_last=drop),
    "shuffled tensors": lambda rows, size, drop: TensorBatches(
        {"xs": torch.arange(rows), "more": torch.arange(16.0 * rows).view(rows, 16)},
        batch_size=size,
        shuffle=True,
        drop_last=drop,
    ),
    "tensors with a seed": lambda rows, size, drop: TensorBatches(
        torch.arange(rows), torch.arange(rows), batch_size=size, shuffle=True, drop_last=drop, seed=3
    ),
    "a loader": lambda rows, size, drop: DataLoader(Augmented(rows), batch_size=size, drop_last=drop),
    "a loader that shuffles": lambda rows, size, drop: DataLoader(
        Augmented(rows), batch_size=size, shuffle=True, drop_last=drop
    ),
    "a loader of tensors": lambda rows, size, drop: DataLoader(
        TensorDataset(torch.arange(rows)), batch_size=size, shuffle=True, drop_last=drop
    ),
    "a loader with a generator": lambda rows, size, drop: DataLoader(
        Augmented(rows), batch_size=size, shuffle=True, drop_last=drop, generator=torch.Generator().manual_seed(5)
    ),
    "weights": lambda rows, size, drop: DataLoader(
        Augmented(rows),
        batch_size=size,
        sampler=WeightedRandomSampler([1.0 + (row % 3) for row in range(rows)], rows),
        drop_last=drop,
    ),
    "with replacement": lambda rows, size, drop: DataLoader(
        Augmented(rows), batch_size=size, sampler=RandomSampler(range(rows), True, rows), drop_last=drop
    ),
    "a sampler that draws elsewhere": lambda rows, size, drop: DataLoader(
        Augmented(rows), batch_size=size, sampler=Shuffled(rows), drop_last=drop
    ),
    "a stateful loader": lambda rows, size, drop: StatefulDataLoader(
        Augmented(rows), batch_size=size, shuffle=True, drop_last=drop
    ),
    "several loaders": lambda rows, size, drop: CombinedLoader(
        {
            "first": TensorBatches(torch.arange(rows), batch_size=size, shuffle=True, drop_last=drop),
            "second": DataLoader(Augmented(rows), batch_size=size, shuffle=True, drop_last=drop),
        }
    ),
}


def feed(source: Any, group: Any = None) -> Feed:
    return Feed(source, "training", Streams(7), "training", group=group)


def given_batches(data: Feed) -> list[Any]:
    """Return the batches of an epoch; None for spare ones."""
    group = data._group
    batches = [None if group is not None and group.spare else batch for batch in data]
    assert group is None or not group.spare  # after the last one
    return batches


def joined(pieces: list[Any]) -> Any:
    """Join batches of the same structure."""
    leaves = [list(tensors(piece)) for piece in pieces]
    together = iter([torch.cat(each) for each in zip(*leaves, strict=True)])
    return map_tensors(lambda tensor: next(together), pieces[0])


def same(a: Any, b: Any) -> bool:
    first, second = list(tensors(a)), list(tensors(b))
    return len(first) == len(second) and all(map(torch.equal, first, second))


def check_shares(make: Callable[[int], Any], size: int, batch: int, epochs: int = 2) -> None:
    """Check that the batches of processes, one after the other, are those of one process, in each epoch.

    Args:
        make: Makes the data, from the rows per batch.
        size: How many processes.
        batch: Rows of each in a batch.
        epochs: How many.
    """
    sources = []
    for rows in (batch * size, *[batch] * size):
        torch.manual_seed(0)  # torchdata's loaders draw a seed as they are made
        sources.append(make(rows))
    alone = feed(sources[0])
    of_all = [feed(source, Alone(rank, size)) for rank, source in enumerate(sources[1:])]
    assert {data.num_batches for data in of_all} == {alone.num_batches}
    for _ in range(epochs):
        expected = given_batches(alone)
        found = list(map(given_batches, of_all))
        assert {len(each) for each in found} == {len(expected)}
        for whole, pieces in zip(expected, zip(*found, strict=True), strict=True):
            given = [piece for piece in pieces if piece is not None]
            assert same(joined(given), whole)
            counts = [len(next(tensors(piece))) if piece is not None else 0 for piece in pieces]
            assert max(counts) - min(counts) <= 1
            assert max(counts) <= batch


@pytest.mark.parametrize("make", BY_ROWS.values(), ids=BY_ROWS)
@pytest.mark.parametrize(("rows", "size", "batch"), [(24, 2, 4), (23, 2, 4), (17, 4, 2), (3, 4, 2), (9, 4, 2)])
def test_batches_of_processes_are_together_the_batch_of_one(make: Make, rows: int, size: int, batch: int) -> None:
    check_shares(lambda per_batch: make(rows, per_batch, False), size, batch)
    if rows >= size * batch:
        check_shares(lambda per_batch: make(rows, per_batch, True), size, batch)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(BY_ROWS)),
    st.integers(1, 40),
    st.integers(2, 5),
    st.integers(1, 6),
    st.booleans(),
)
def test_they_are_for_any_numbers(name: str, rows: int, size: int, batch: int, drop_last: bool) -> None:
    if drop_last and rows < size * batch:
        drop_last = False
    check_shares(lambda per_batch: BY_ROWS[name](rows, per_batch, drop_last), size, batch)


def test_they_are_where_workers_load_them() -> None:
    options: dict[str, Any] = {"shuffle": True, "num_workers": 2, "persistent_workers": True}
    check_shares(lambda batch: DataLoader(Augmented(13), batch_size=batch, **options), 3, 2)


def test_a_process_without_rows_repeats_its_last_batch() -> None:
    for make in (BY_ROWS["tensors"], BY_ROWS["a loader"]):
        batches = list(feed(make(9, 2, False), Alone(3, 4)))
        assert len(batches) == 2
        assert same(batches[0], batches[1])
        assert list(next(tensors(batches[1]))) == [6, 7]


def test_where_it_had_none_it_repeats_rows_of_others() -> None:
    for make in (BY_ROWS["tensors"], BY_ROWS["a loader"]):
        assert given_batches(feed(make(2, 2, False), Alone(3, 4))) == [None]
        (batch,) = feed(make(2, 2, False), Alone(3, 4))
        assert list(next(tensors(batch))) == [0, 1]


def test_whole_batches_go_to_the_processes_in_turn_where_a_sampler_makes_them() -> None:
    lists = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10]]
    found = [given_batches(feed(DataLoader(Augmented(11), batch_sampler=lists), Alone(rank, 2))) for rank in range(2)]
    assert [batch[0].tolist() for batch in found[0]] == [[0, 1, 2], [4, 5], [10]]
    assert [batch[0].tolist() for batch in found[1] if batch] == [[3], [6, 7, 8, 9]]
    assert found[1][2] is None
    alone = torch.cat([batch[1] for batch in feed(DataLoader(Augmented(11), batch_sampler=lists))])
    draws = torch.cat([batch[1] for step in zip(*found, strict=True) for batch in step if batch])
    assert torch.equal(draws, alone)  # a row's augmentation is the same


def test_items_go_to_the_processes_in_turn_where_a_loader_makes_no_batches() -> None:
    alone = [batch[:2] for batch in feed(DataLoader(Augmented(7), batch_size=None, shuffle=True))]
    found = [
        [batch[:2] for batch in feed(DataLoader(Augmented(7), batch_size=None, shuffle=True), Alone(rank, 2))]
        for rank in range(2)
    ]
    assert [item for step in zip(*found, strict=True) for item in step][:7] == alone
    assert found[1][3] == found[1][2]


def test_lists_of_indices_without_batches_are_dealt_by_rows() -> None:
    class Whole(Augmented):
        def __getitem__(self, index: Any) -> Any:
            return torch.tensor(index)

    def make(size: int) -> Any:
        order = RandomSampler(range(11))
        return DataLoader(Whole(11), sampler=BatchSampler(order, size, False), batch_size=None)

    check_shares(make, 2, 3)


def test_batches_of_a_list_go_to_the_processes_in_turn() -> None:
    batches = [torch.full((2,), number) for number in range(5)]
    first = feed(batches, Alone(0, 2))
    assert [int(batch[0]) for batch in first] == [0, 2, 4]
    assert first.num_batches == 3
    assert [int(batch[0]) for batch in feed(batches, Alone(1, 2))] == [1, 3, 3]
    assert given_batches(feed(batches, Alone(1, 2)))[2] is None
    assert [int(batch[0]) for batch in feed(batches[:1], Alone(1, 2))] == [0]


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size", "sequential"])
def test_each_of_several_loaders_is_shared(mode: str) -> None:
    def make(size: int) -> Any:
        loaders = {
            "short": DataLoader(Augmented(24), batch_size=size, shuffle=True),
            "long": TensorBatches(torch.arange(72), batch_size=size, shuffle=True),
        }
        return CombinedLoader(loaders, mode)

    alone = list(feed(make(12)))
    found = [list(feed(make(4), Alone(rank, 3))) for rank in range(3)]
    assert {len(each) for each in found} == {len(alone)}
    for whole, pieces in zip(alone, zip(*found, strict=True), strict=True):
        assert same(joined(list(pieces)), whole)


def test_the_first_of_several_loaders_says_whether_a_batch_is_spare() -> None:
    def spares(first: int, second: int) -> list[bool]:
        loaders = [TensorBatches(torch.arange(rows), batch_size=2) for rows in (first, second)]
        return [batch is None for batch in given_batches(feed(CombinedLoader(loaders), Alone(3, 4)))]

    assert spares(9, 16) == [False, True]
    assert spares(16, 9) == [False, False]


# Going on


@pytest.mark.parametrize("name", ["shuffled tensors", "a loader that shuffles", "several loaders", "weights"])
def test_an_epoch_goes_on_by_another_number_of_processes(name: str) -> None:
    whole = list(feed(BY_ROWS[name](21, 8, False)))
    for then, now in [(1, 2), (2, 4), (4, 1), (2, 2), (8, 2)]:
        of_then = feed(BY_ROWS[name](21, 8 // then, False), None if then == 1 else Alone(0, then))
        iterator = iter(of_then)
        next(iterator)
        place = of_then.place()
        assert place is not None
        found = []
        for rank in range(now):
            other = feed(BY_ROWS[name](21, 8 // now, False), None if now == 1 else Alone(rank, now))
            other.check_place(place)
            place["global_generators"] = _generators()
            other.go_on(place, lambda: None)
            found.append(given_batches(other))
        for expected, pieces in zip(whole[1:], zip(*found, strict=True), strict=True):
            assert same(joined([piece for piece in pieces if piece is not None]), expected)


def _generators() -> Any:
    from fluxloop.persist.plain import to_plain
    from fluxloop.randomness import generator_states

    return to_plain(generator_states(), "generators")


def _place(source: Any, group: Any) -> dict[str, Any]:
    data = feed(source, group)
    iterator = iter(data)
    next(iterator)
    place = data.place()
    assert place is not None
    return place


def test_it_goes_on_with_as_many_rows_per_step_only() -> None:
    xs = torch.arange(64)
    place = _place(TensorBatches(xs, batch_size=4), Alone(0, 4))
    with pytest.raises(CheckpointError, match=r"left after 1 of 4 .*with 4 processes, and there are 2 processes now"):
        feed(TensorBatches(xs, batch_size=4), Alone(0, 2)).check_place(place)
    with pytest.raises(
        CheckpointError, match=r"rows per step \(16\), which is batch_size=16 on 1 process, or .*=4 was"
    ):
        feed(TensorBatches(xs, batch_size=4)).check_place(place)
    with pytest.raises(CheckpointError, match="batch_size: 16 then, 32 now"):
        feed(TensorBatches(xs, batch_size=8), Alone(0, 4)).check_place({**place, "length": 2})


def test_lists_go_on_by_as_many_processes_only() -> None:
    place = _place([torch.zeros(2)] * 8, Alone(0, 2))
    feed([torch.zeros(2)] * 8, Alone(0, 2)).check_place(place)
    with pytest.raises(CheckpointError, match="expected as many as then"):
        feed([torch.zeros(2)] * 4).check_place(place)


# Data that is not the same on all processes


def differing(make: Callable[[int], Any], size: int = 2) -> DataError:
    results = together(size, lambda group: list(feed(make(group.rank), group)))
    assert all(isinstance(result, DataError) for result in results)
    assert len({str(result) for result in results}) == 1
    error: DataError = results[0]
    return error


def test_rows_that_differ_between_processes_are_an_error_on_all() -> None:
    rows = torch.arange(40)
    error = differing(lambda rank: TensorBatches(rows[rank::2], batch_size=4))
    assert "some values" in str(error)
    assert "leave a split by rank out" in str(error)
    assert "rows: 39 on process 0, 40 on process 2" in str(
        differing(lambda r: TensorBatches(rows[r < 2 :], batch_size=4), 3)
    )
    assert "batch_size: 4 on process 0, 5 on process 1" in str(
        differing(lambda rank: DataLoader(Augmented(40), batch_size=4 + rank))
    )
    assert "some values" in str(differing(lambda rank: [torch.full((2,), rank)] * 4))


class Private(Shuffled):
    """Shuffles with a generator of its own."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count)
        self.own = random.Random(seed)

    def __iter__(self) -> Iterator[int]:
        return iter(self.own.sample(range(self.count), self.count))


def test_an_order_that_differs_between_processes_is_an_error_on_all() -> None:
    def make(rank: int) -> Any:
        return DataLoader(TensorDataset(torch.arange(40)), batch_size=4, sampler=Private(40, rank))

    assert "first rows of the order" in str(differing(make))


def test_generators_of_loaders_stand_where_those_of_the_first_process_do() -> None:
    def run(group: Threaded) -> Any:
        own = torch.Generator().manual_seed(group.rank)
        loader = DataLoader(TensorDataset(torch.arange(40)), batch_size=4, shuffle=True, generator=own)
        return [[batch.tolist() for (batch,) in feed(loader, group)] for _ in range(2)]

    first, second = together(2, run)
    assert all(sorted(chain(*a, *b)) == list(range(40)) for a, b in zip(first, second, strict=True))


# Data of which each process has batches of its own


class Sharded(IterableDataset[int]):
    def __init__(self, rows: range) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


def of_each(make: Callable[[Threaded], Any], size: int) -> list[tuple[list[Any], list[bool]]]:
    """Return the batches that each process was given, and which of them are spare."""

    def run(group: Threaded) -> tuple[list[Any], list[bool]]:
        data = feed(make(group), group)
        data.check()
        batches = [(batch.tolist() if isinstance(batch, Tensor) else batch, group.spare) for batch in data]
        assert data.num_batches in (None, len(batches))
        return [batch for batch, _ in batches], [is_spare for _, is_spare in batches]

    results = together(size, run)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_iterables_of_different_length_end_together() -> None:
    found = of_each(lambda group: DataLoader(Sharded(range(group.rank, 10 - 3 * group.rank, 2)), batch_size=2), 3)
    assert found[0] == ([[0, 2], [4, 6], [8]], [False, False, False])
    assert found[1] == ([[1, 3], [5], [5]], [False, False, True])
    assert found[2] == ([[2], [2], [2]], [False, True, True])


def test_so_do_they_beside_other_loaders() -> None:
    def run(mode: str) -> list[Any]:
        def of_one(group: Threaded) -> list[Any]:
            own = DataLoader(Sharded(range(group.rank, 10 - 3 * group.rank, 2)), batch_size=2)
            data = feed(CombinedLoader([own, TensorBatches(torch.arange(8), batch_size=1)], mode), group)
            data.check()
            assert data.num_batches is None
            plain = [[part if part is None else part.tolist() for part in batch] for batch in data]
            return plain

        return together(2, of_one)

    first, second = run("min_size")
    assert first == [[[0, 2], [0]], [[4, 6], [2]], [[8], [4]]]
    assert second == [[[1, 3], [1]], [[5], [3]], [[5], [5]]]
    first, second = run("max_size_cycle")
    assert [own for own, _ in second] == [[1, 3], [5], [5], [1, 3]]
    assert [own for own, _ in first] == [[0, 2], [4, 6], [8], [0, 2]]


def test_one_that_has_nothing_repeats_a_batch_of_another() -> None:
    found = of_each(lambda group: DataLoader(Sharded(range(2 * group.rank)), batch_size=1), 2)
    assert found == [([[0], [0]], [True, True]), ([[0], [1]], [False, False])]


def test_a_limit_ends_them_all_at_once() -> None:
    def run(group: Threaded) -> list[list[int]]:
        data = feed(Kept(list(range(group.rank, 7 - 5 * group.rank))), group)
        epochs = []
        for _ in range(3):
            data.limit = 3
            epochs.append([int(batch) for batch in data])
            assert not group.spare
        return epochs

    first, second = together(2, run)
    assert first == [[0, 1, 2], [3, 4, 5], [6]]
    assert second == [[1, 1, 1], [1, 1, 1], [1]]


def test_where_all_have_nothing_it_is_an_error() -> None:
    results = together(2, lambda group: list(feed(DataLoader(Sharded(range(0)), batch_size=1), group)))
    assert all(isinstance(result, DataError) for result in results)


def test_sized_loaders_of_different_length_have_the_largest_number_of_batches() -> None:
    class Own:
        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __iter__(self) -> Iterator[Tensor]:
            return iter([torch.full((1,), number + 10 * self.count) for number in range(self.count)])

    found = of_each(lambda group: Own(2 + group.rank), 2)
    assert [len(batches) for batches, _ in found] == [3, 3]


@pytest.mark.filterwarnings("error")
def test_a_loader_with_a_distributed_sampler_is_left_as_it_is() -> None:
    def make(group: Threaded) -> Any:
        rows = torch.arange(11)
        return DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, group.size, group.rank, shuffle=False))  # type: ignore[arg-type]  # has rows by number

    found = of_each(make, 2)
    assert found[0][0] == [[0, 2], [4, 6], [8, 10]]
    assert found[1][0] == [[1, 3], [5, 7], [9, 0]]
    with pytest.raises(
        DataError, match=r"DistributedSampler for process 0 of 3.* process 1 of 2; expected num_replicas=2"
    ):
        list(feed(DataLoader(Augmented(6), sampler=DistributedSampler(Augmented(6), 3, 0)), Alone(1, 2)))


class Own(Augmented):
    """A data set of which each process has rows of its own."""

    def __init__(self, count: int, group: Alone) -> None:
        super().__init__(count)
        self.num_replicas, self.rank = group.size, group.rank


def test_so_is_a_data_set_that_says_it_has_been_divided() -> None:
    def run(group: Threaded) -> Any:
        data = feed(DataLoader(Own(4 - group.rank, group), batch_size=1), group)
        return [(int(batch[0]), group.spare) for batch in data]

    first, second = together(2, run)
    assert first == [(row, False) for row in range(4)]
    assert second == [*((row, False) for row in range(3)), (2, True)]


def test_data_of_no_full_batch_of_all_processes_is_an_error() -> None:
    source = TensorBatches(torch.arange(10), batch_size=8, drop_last=True)
    feed(source).check()
    with pytest.raises(DataError, match=r"gave no batch.*A full batch is one of all 2 processes together"):
        feed(source, Alone(0, 2)).check()


def test_samples_of_such_loaders_draw_numbers_of_their_own() -> None:
    def make(rank: int) -> Any:
        sampler = DistributedSampler(Augmented(6), 2, rank, shuffle=False)
        return DataLoader(Augmented(6), batch_size=3, sampler=sampler)

    (first,), (second,) = (list(feed(make(rank), Alone(rank, 2))) for rank in range(2))
    (alone,) = feed(DataLoader(Augmented(6), batch_size=6))
    assert torch.equal(torch.stack([first[1], second[1]], 1).flatten(), alone[1])


def test_the_same_first_batch_on_all_processes_is_told() -> None:
    def run(group: Threaded) -> None:
        source = DataLoader(Sharded(range(6)), batch_size=2)
        for _ in range(2):
            assert len(list(feed(source, group))) == 3

    with pytest.warns(UserWarning, match=r"gave processes \[0, 1\] the same first batch") as told:
        together(2, run)
    assert len(told) == 1


def test_an_error_in_the_data_of_one_is_not_swallowed() -> None:
    class Broken(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 1
            raise ArithmeticError("broken")

    def make(group: Threaded) -> Any:
        return DataLoader(Broken() if group.rank else Sharded(range(3, 9)), batch_size=1)

    with pytest.raises(ArithmeticError, match="broken"):
        together(2, lambda group: list(feed(make(group), group)))


class Kept:
    """Keeps its place itself."""

    def __init__(self, rows: list[int]) -> None:
        self.rows, self.next = rows, 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.next < len(self.rows):
            self.next += 1
            yield torch.tensor([self.rows[self.next - 1]])
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_loader_that_keeps_its_place_goes_on_at_that_of_each_process(after: int) -> None:
    rows = [[0, 1, 2, 3], [10, 11]]

    def leave(group: Threaded) -> dict[str, Any]:
        data = feed(Kept(rows[group.rank]), group)
        iterator = iter(data)
        for _ in range(after):
            next(iterator)
        place = data.place()
        assert place is not None
        return place

    def go_on(group: Threaded) -> Any:
        data = feed(Kept(rows[group.rank]), group)
        place = {**places[0], "global_generators": _generators()}  # that of the first is the one that is written
        data.check_place(place)
        data.go_on(place, lambda: None)
        batches = [(int(batch), group.spare) for batch in data]
        return [batch for batch, _ in batches], [is_spare for _, is_spare in batches]

    places = together(2, leave)
    first, second = together(2, go_on)
    assert first == (rows[0][after:], [False] * (4 - after))
    own = rows[1][after:]
    assert second[1] == [False] * len(own) + [True] * (4 - after - len(own))
    assert second[0][: len(own)] == own
    with pytest.raises(CheckpointError, match="expected as many as then"):
        feed(Kept(rows[0]), Alone(0, 3)).check_place(places[0])


# Loops of the user's own


def test_a_loop_of_the_users_own_gets_the_same_shares() -> None:
    source = TensorBatches(torch.arange(10), batch_size=2, shuffle=True)
    assert shared(source, None) is source
    before = torch.get_rng_state()
    found = []
    for rank in range(2):
        torch.set_rng_state(before)
        loader = shared(source, Alone(rank, 2))
        assert isinstance(loader, SharedLoader)
        assert len(loader) == 3
        assert loader.batch_size == 2
        drawn = torch.get_rng_state()
        first = list(loader)
        torch.set_rng_state(drawn)
        torch.rand(1)
        found.append(first)
    assert sorted(torch.cat([row for each in found for row in each]).tolist()) == list(range(10))


def test_a_learner_divides_such_a_loader_itself() -> None:
    source = TensorBatches(torch.arange(10), batch_size=2, shuffle=True)
    assert as_dataloader(shared(source, Alone(0, 2))) is source


def test_a_piece_is_as_large_as_any() -> None:
    for rows in range(20):
        pieces = [list(range(rows))[Share(Alone(rank, 6)).piece(rows)] for rank in range(6)]
        assert list(chain(*pieces)) == list(range(rows))
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
