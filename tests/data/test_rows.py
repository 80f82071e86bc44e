from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from typing import Any, cast

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from drawn import numbers, plain, scramble
from fluxloop.data.copies import copy_of
from fluxloop.data.sources import iterate


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
