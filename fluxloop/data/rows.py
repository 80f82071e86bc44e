"""Data sets behind other ways of fetching their rows: with random numbers of their own, or whole batches at once."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from itertools import chain
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate

from fluxloop.data.loaders import is_plain
from fluxloop.data.loading import Endless
from fluxloop.randomness import start_generators


class WrappedRows:
    """A map-style dataset behind another way of fetching: its attributes are the dataset's."""

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)  # past its own __setattr__, which sets attributes of the dataset

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # not there yet while a worker unpickles it
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __reduce__(self) -> Any:
        return type(self), (self._dataset,)


class SeededRows(WrappedRows):
    """A map-style dataset whose indices carry the number that the sample's random numbers start from."""

    def __getitem__(self, marked: Any) -> Any:
        number, index = marked
        start_generators(number)
        return self._dataset[index]

    def __getitems__(self, marked: list[Any]) -> Any:
        if not callable(getattr(self._dataset, "__getitems__", None)):
            return [self[each] for each in marked]
        start_generators(marked[0][0])  # once: nobody can stand between the rows of a data set that fetches them itself
        return self._dataset.__getitems__([index for _, index in marked])


class EndlessRows(WrappedRows):
    """A map-style dataset that ends no iteration: a ``StopIteration`` in it is an error."""

    def __getitem__(self, index: Any) -> Any:
        return Endless(self._dataset.__getitem__, "the data set")(index)

    def __getitems__(self, indices: Any) -> Any:
        if not callable(getattr(self._dataset, "__getitems__", None)):
            return [self[index] for index in indices]
        return Endless(self._dataset.__getitems__, "the data set")(indices)


class WholeBatches(WrappedRows):
    """One of torch's datasets that only hand out tensors; returns batches as `default_collate` makes them."""

    def __getitems__(self, indices: Any) -> Any:
        batch = _fetch(self._dataset, indices)
        return default_collate([self._dataset[index] for index in indices]) if batch is None else batch


def return_batch(batch: Any) -> Any:
    """Collate nothing: return a batch that is whole already."""
    return batch


def _fetch(dataset: Any, indices: Any) -> list[Tensor] | None:
    """Fetch rows of torch's own datasets at once, tensor by tensor; None where one by one may be another thing."""
    if type(dataset) is Subset:
        return _fetch(dataset.dataset, [dataset.indices[index] for index in indices])
    # What torch would refuse, or take for something else (True is a whole number, -1 the last row), is left to it.
    kinds = set(map(type, indices))
    if not kinds or not all(issubclass(kind, Integral) and not issubclass(kind, bool) for kind in kinds):
        return None
    if type(dataset) is ConcatDataset:
        return _fetch_from_several(dataset, indices)
    if not all(map(is_plain, dataset.tensors)) or min(indices) < 0 or max(indices) >= len(dataset):
        return None
    return _select(dataset.tensors, indices)


def _select(tensors: Iterable[Tensor], indices: Iterable[int]) -> list[Tensor]:
    rows = torch.frombuffer(array("q", indices), dtype=torch.int64)  # in a quarter of the time of torch.tensor
    return [tensor.index_select(0, rows.to(tensor.device)) for tensor in tensors]


def _fetch_from_several(dataset: ConcatDataset[Any], indices: Any) -> list[Tensor] | None:
    ends = dataset.cumulative_sizes
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(bisect_right(ends, index), []).append(place)
    parts: list[list[Tensor]] = []
    for which, at in places.items():
        begin = ends[which - 1] if which else 0
        part = _fetch(dataset.datasets[which], [indices[place] - begin for place in at])
        if part is None or _kinds(part) != _kinds(parts[0] if parts else part):
            return None
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    # rows were fetched data set by data set: put them into the order in which they were asked for
    where = {place: row for row, place in enumerate(chain.from_iterable(places.values()))}
    return _select(map(torch.cat, zip(*parts, strict=True)), [where[place] for place in range(len(where))])


def _kinds(tensors: list[Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors]


def never_draws(dataset: Any) -> bool:
    """Return whether a dataset is one of torch's own that only hand out tensors."""
    if type(dataset) is Subset:
        return never_draws(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(never_draws, dataset.datasets))
    return type(dataset) is TensorDataset


def collates_as_torch() -> bool:
    """Return whether nobody has taught `default_collate` another way with tuples or tensors; False where unknown."""
    # Users add to this map of torch's, by type, and there is no public way to see whether they have.
    module = default_collate.__module__
    ways = getattr(sys.modules[module], "default_collate_fn_map", {})
    own = getattr(ways.get(Tensor), "__module__", None) == module
    return own and not any(issubclass(tuple, kinds) for kinds in ways)
