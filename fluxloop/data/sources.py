"""Sources of batches: samples with random numbers of their own, and going on in the middle of an epoch.

A ``DataLoader`` over map-style data is run through a twin: the same loader, with the same order,
whose indices carry the number that the sample's random numbers start from. So what an
augmentation draws depends on the epoch and on the sample's place in it, neither on the number of
workers nor on who loads it; and an epoch that is resumed begins behind the indices already
used, without loading them. Where the data is torch's own tensors, which draw nothing, the twin fetches whole
batches: the same, in a fraction of the time.
"""

from __future__ import annotations

import copy
import random
import sys
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, islice
from numbers import Integral
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from attrs import frozen
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from fluxloop.data.loaders import TensorBatches, is_plain
from fluxloop.data.loading import Endless, begin, watched
from fluxloop.data.notes import Notes
from fluxloop.errors import describe
from fluxloop.persist.owners import Restoring, models_apart
from fluxloop.persist.plain import SCALARS, WATCHED, attributes, from_plain, is_numpy_generator, is_stateful, to_plain
from fluxloop.persist.walk import Walk
from fluxloop.randomness import others_apart, others_going_on, start_generators, start_torch


@frozen
class Numbers:
    """What the random numbers of one epoch's data start from.

    Args:
        order: The number for the order and the first batch.
        fetch: Gives the number for batch ``j``, from 1.
        sample: Gives the number for the n-th sample of the epoch, from 0.
    """

    order: int
    fetch: Callable[[int], int]
    sample: Callable[[int], int]


class Combined(ABC):
    """Base of sources that are made of others.

    Attributes:
        parts: The others.
    """

    parts: list[Any]

    @abstractmethod
    def named_parts(self) -> list[tuple[str, Any]]:
        """List the parts with their names."""

    @abstractmethod
    def begin(self, numbers: Numbers, epoch: int | None, running: Any) -> Iterator[Any]:
        """Begin a pass, or go on with one from what its ``place(name)`` gave."""


def parts_of(source: Any) -> list[Any]:
    """List the parts of a source that is made of others."""
    return source.parts if isinstance(source, Combined) else []


class _Indices:
    """A loader's indices, batch by batch; each with the number its sample draws from, where samples draw.

    Args:
        loader: The loader: it may batch, or give indices one by one.
        draws: Whether samples may draw.
    """

    def __init__(self, loader: DataLoader[Any], draws: bool) -> None:
        self.generator = loader.generator
        self.own = own_generators(loader)  # and not the loader, which would live as long as its twin
        self.batched = loader.batch_sampler is not None
        self.sampler: Any = loader.batch_sampler if self.batched else loader.sampler
        self.draws = draws
        self.others_too = not _is_torchs(self.sampler)
        self.running: _Running | None = None

    def prepare(self, numbers: Numbers, skip: int) -> None:
        """Say from which numbers, and from which batch on, the next iteration goes."""
        self.numbers = numbers
        self.skip = skip
        self.generators = self.states()

    def __iter__(self) -> _Running:
        self.running = _Running(self)
        return self.running

    def __len__(self) -> int:
        return len(self.sampler)

    def ended_after(self, batches: int) -> bool:
        """Tell whether the indices ended after so many batches, those that were used before too."""
        return self.running is None or (self.running.ended and self.running.drawn <= batches)

    def states(self) -> list[tuple[torch.Generator, Tensor]]:
        """Give the generators an order may be drawn from, and where they stand."""
        return [(generator, generator.get_state()) for generator in (torch.default_generator, *self.own)]


def _is_torchs(sampler: Any) -> bool:
    """Tell whether a sampler is torch's own, down to the innermost: it draws from torch's generators alone."""
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler).__module__ == BatchSampler.__module__


def _put(states: list[tuple[torch.Generator, Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state)


class _Running:
    """One pass through a loader's indices.

    A loader draws a number for its workers when it makes them, after the sampler's iteration has
    begun and before the sampler is asked; workers that stay are made once. Here each pass draws as
    the first one does, so that the order is the same whether the workers are new.
    """

    def __init__(self, indices: _Indices) -> None:
        self._indices = indices
        _put(indices.generators)
        start_torch(indices.numbers.order)
        self._others: AbstractContextManager[None] = (
            others_going_on(indices.numbers.order) if indices.others_too else nullcontext()
        )
        with self._others:
            self._source = iter(indices.sampler)
        torch.empty((), dtype=torch.int64).random_(generator=indices.generator)
        self._begins = indices.states()
        self._sample = 0
        self._to_skip = indices.skip
        self.drawn = 0
        """How many batches' indices were drawn, those that were used before too."""
        self.ended = False
        """Whether the sampler has none left."""

    def begin(self) -> None:
        """Draw the indices that were used before, once; fewer where there are no more."""
        to_skip, self._to_skip = self._to_skip, 0
        for _ in range(to_skip):
            try:
                self._draw()
            except StopIteration:
                return

    def _draw(self) -> tuple[Any, int]:
        """Give the next indices, and the place in the epoch of the first of them."""
        if self.drawn:
            start_torch(self._indices.numbers.fetch(self.drawn))
        else:
            _put(self._begins)
        with self._others:
            try:
                indices = next(self._source)
            except StopIteration:
                self.ended = True
                raise
        first = self._sample
        self.drawn += 1
        self._sample += len(indices) if self._indices.batched else 1
        return indices, first

    def __iter__(self) -> _Running:
        return self

    def __next__(self) -> Any:
        self.begin()
        indices, first = self._draw()
        numbers = self._indices.numbers
        if not self._indices.draws:
            return indices
        if not self._indices.batched:
            return numbers.sample(first), indices
        return [(numbers.sample(first + place), index) for place, index in enumerate(indices)]


class _Behind:
    """A map-style dataset behind another way of fetching: its attributes are the dataset's."""

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)

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


class _Seeded(_Behind):
    """A map-style dataset whose indices carry the number that the sample's random numbers start from."""

    def __getitem__(self, marked: Any) -> Any:
        number, index = marked
        start_generators(number)
        return self._dataset[index]

    def __getitems__(self, marked: list[Any]) -> Any:
        if not callable(getattr(self._dataset, "__getitems__", None)):
            return [self[each] for each in marked]
        start_generators(marked[0][0])
        return self._dataset.__getitems__([index for _, index in marked])


class _Endless(_Behind):
    """A map-style dataset that ends no iteration: a ``StopIteration`` in it is an error."""

    def __getitem__(self, index: Any) -> Any:
        return Endless(self._dataset.__getitem__, "the data set")(index)

    def __getitems__(self, indices: Any) -> Any:
        if not callable(getattr(self._dataset, "__getitems__", None)):
            return [self[index] for index in indices]
        return Endless(self._dataset.__getitems__, "the data set")(indices)


class _Whole(_Behind):
    """One of torch's datasets that only hand out tensors; gives batches as `default_collate` makes them."""

    def __getitems__(self, indices: Any) -> Any:
        batch = _fetch(self._dataset, indices)
        return default_collate([self._dataset[index] for index in indices]) if batch is None else batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _fetch(dataset: Any, indices: Any) -> list[Tensor] | None:
    """Fetch rows of torch's own datasets at once, tensor by tensor; None where one by one may be another thing."""
    if type(dataset) is Subset:
        return _fetch(dataset.dataset, [dataset.indices[index] for index in indices])
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
    where = {place: row for row, place in enumerate(chain.from_iterable(places.values()))}
    return _select(map(torch.cat, zip(*parts, strict=True)), [where[place] for place in range(len(where))])


def _kinds(tensors: list[Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors]


def _never_draws(dataset: Any) -> bool:
    """Tell whether a dataset is one of torch's own that only hand out tensors."""
    if type(dataset) is Subset:
        return _never_draws(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_never_draws, dataset.datasets))
    return type(dataset) is TensorDataset


def _collates_as_torch() -> bool:
    """Tell whether nobody has taught `default_collate` another way with tuples or tensors; False where unknown."""
    module = default_collate.__module__
    ways = getattr(sys.modules[module], "default_collate_fn_map", {})
    own = getattr(ways.get(Tensor), "__module__", None) == module
    return own and not any(issubclass(tuple, kinds) for kinds in ways)


def is_loader(source: Any) -> bool:
    """Tell whether a source is a ``DataLoader`` over map-style data that iterates as torch's do."""
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
        return False
    module = str(getattr(type(source).__iter__, "__module__", "")).split(".")[0]
    return module in ("torch", "torchdata") and not (module == "torchdata" and is_stateful(source.dataset))


_twins: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()


def twin_of(source: Any) -> DataLoader[Any] | None:
    """Give the twin through which a loader was run last, if any."""
    return _twins.get(source) if isinstance(source, DataLoader) else None


def put_twin_back(source: Any, twin: DataLoader[Any] | None) -> None:
    """Have a loader be run through a former twin again, whose workers may wait."""
    if twin is not None:
        _twins[source] = twin


def _make_twin(loader: DataLoader[Any]) -> tuple[DataLoader[Any], _Indices]:
    """Give a loader's twin and its indices; one with workers that stay is kept."""
    twin = _twins.get(loader)
    place = "sampler" if loader.batch_sampler is None else "batch_sampler"
    if twin is None or twin._iterator is None or not twin.persistent_workers:
        twin = copy.copy(loader)
        draws = not (_never_draws(loader.dataset) and loader.collate_fn is default_collate)
        twin._iterator = None
        vars(twin)[place] = _Indices(loader, draws)
        if draws:
            vars(twin)["dataset"] = _Seeded(loader.dataset)
        elif loader.batch_sampler is not None and _collates_as_torch():
            vars(twin).update(dataset=_Whole(loader.dataset), collate_fn=_as_it_is)
        _twins[loader] = twin
    return twin, vars(twin)[place]


def iterate(source: Any, numbers: Numbers, skip: int = 0) -> Iterator[Any]:
    """Iterate a source from a batch on.

    Args:
        source: Of batches.
        numbers: What its random numbers start from.
        skip: How many batches were used before; more than 0 only where `can_skip`.
    """
    if isinstance(source, TensorBatches):
        return source.from_batch(skip)
    if isinstance(source, DataLoader) and not is_loader(source):
        return watched(_begin_iterable(source), lambda given: True, describe(source), skip)
    if not is_loader(source):
        return islice(iter(source), skip, None) if skip else iter(source)
    _watch(source)
    twin, indices = _make_twin(source)
    indices.prepare(numbers, skip)
    batches = begin(twin)
    if indices.running is not None:
        indices.running.begin()
    loaded = watched(batches, indices.ended_after, f"{describe(source)} of {_count(source)} batches", skip)
    return _apart(loaded) if indices.draws and not twin.num_workers else loaded


def complete(source: Any) -> Iterator[Any]:
    """Iterate a source outside of an epoch, as it is; an end that is none, and a worker that dies, are errors."""
    if not isinstance(source, DataLoader):
        return iter(source)
    if not is_loader(source):
        return watched(_begin_iterable(source), lambda given: True, describe(source))
    other = copy.copy(source)
    vars(other).update(dataset=_Endless(source.dataset), collate_fn=Endless(source.collate_fn))
    return watched(begin(other), lambda given: True, describe(source))


def _count(loader: DataLoader[Any]) -> int | str:
    try:
        return len(loader)
    except TypeError:  # its sampler has no length
        return "unknown"


def _begin_iterable(loader: DataLoader[Any]) -> Iterator[Any]:
    """Begin an iteration of a loader that is not run through a twin; what it collates with does not end it."""
    collate = loader.collate_fn
    loader.collate_fn = Endless(collate)
    try:
        return begin(loader)
    finally:
        loader.collate_fn = collate


def _apart(batches: Iterator[Any]) -> Iterator[Any]:
    """Load samples in this process without moving the training's NumPy and Python generators."""
    others = others_apart()
    while True:
        with others:
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def can_skip(source: Any) -> bool:
    """Tell whether a source can be iterated from any batch on."""
    return isinstance(source, (TensorBatches, list, tuple)) or (is_loader(source) and not draws_in_workers(source))


def draws_in_workers(source: DataLoader[Any]) -> bool:
    """Tell whether copies of a dataset draw, in workers, from generators of its own: nobody knows where those stand."""
    return bool(source.num_workers and private_generators(source, samplers_too=False))


def keeps_place(source: Any) -> bool:
    """Tell whether a source keeps its place itself, and gives it as ``state_dict()``."""
    return not can_skip(source) and is_stateful(source)


def own_generators(source: Any) -> list[torch.Generator]:
    """List the generators of a loader, its sampler and its batch sampler."""
    sampler, batch_sampler = getattr(source, "sampler", None), getattr(source, "batch_sampler", None)
    owners = (source, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    return list(found.values())


def _samplers(source: Any) -> list[Any]:
    """List a loader's samplers that are not torch's own."""
    sampler, batch_sampler = getattr(source, "sampler", None), getattr(source, "batch_sampler", None)
    found = (sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    own = {id(each): each for each in found if each is not None and type(each).__module__ != "torch.utils.data.sampler"}
    return list(own.values()) if isinstance(source, DataLoader) else []


_walks: Notes[Walk] = Notes()


def _watch(source: Any) -> Walk | None:
    """Look at what a source consists of, so that changes are seen; None where it is plain, or cannot be looked at."""
    if isinstance(source, (list, tuple, Tensor, Combined)) or type(source) is TensorBatches:
        return None
    if keeps_place(source) and not isinstance(source, DataLoader):  # it says itself what it keeps
        return None
    known = vars(source) if not isinstance(source, DataLoader) and hasattr(source, "__dict__") else None
    walk = _walks.get(source) if known is None else known.get(WATCHED)
    if walk is None:
        walk = Walk(
            {"": source if known is not None else SimpleNamespace(**_parts(source))}, "data", models_apart, True
        )
        if known is None:
            _walks.put(source, walk)
        else:  # with it, so that it lives no longer
            known[WATCHED] = walk
    return walk


def _parts(source: Any) -> dict[str, Any]:
    """Give what of a loader may change, by name: its data set, functions and samplers."""
    if keeps_place(source):
        return {f"sampler_{number}": sampler for number, sampler in enumerate(_samplers(source))}
    names = ("dataset", "collate_fn", "sampler", "batch_sampler") if isinstance(source, DataLoader) else ()
    return {name: part for name in names if (part := getattr(source, name, None)) is not None}


def changes_of(source: Any) -> tuple[dict[str, Any], list[str]]:
    """Give what has changed of a source's parts as plain data, and the paths of what is lost."""
    walk = _watch(source)
    return ({}, []) if walk is None else walk.state(models_apart)


def put_changes_back(source: Any, kept: dict[str, Any]) -> None:
    """Put a source's parts where `changes_of` found them."""
    walk = _watch(source)
    if walk is not None:
        walk.restore(kept, Restoring(models_apart))


KINDS = (torch.Generator, random.Random)
MOST = 500
"""How many objects are looked at for generators."""


def private_generators(source: Any, samplers_too: bool = True) -> list[Any]:
    """List the random generators that a loader's dataset, functions and samplers keep for themselves."""
    if not isinstance(source, DataLoader):
        return []
    return generators_of([source.dataset, source.collate_fn, *(_samplers(source) if samplers_too else ())])


def generators_of(things: list[Any]) -> list[Any]:
    """List the random generators that objects and functions keep for themselves.

    They are looked for in attributes, containers, partial functions and what functions close over.
    """
    found: list[Any] = []
    seen: set[int] = set()
    todo = list(things)
    while todo and len(seen) < MOST:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (Tensor, type, ModuleType, *SCALARS)):
            continue
        seen.add(id(thing))
        if isinstance(thing, KINDS) or is_numpy_generator(thing):
            found.append(thing)
        else:
            todo.extend(_inside(thing))
    return found


def _inside(thing: Any) -> list[Any]:
    """List what an object holds, as far as generators may be there."""
    if isinstance(thing, (list, tuple, set)):
        return list(thing) if len(thing) <= MOST else []
    if isinstance(thing, dict):
        return list(thing.values()) if len(thing) <= MOST else []
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__self__]
    if isinstance(thing, FunctionType):
        return [cell.cell_contents for cell in thing.__closure__ or () if cell != CellType()]
    return list(attributes(thing).values())


def source_state(source: Any) -> dict[str, Any]:
    """Give what of a source moves: generators, and what its data set, functions and samplers keep."""
    state = {**generators_state(source), "walk": changes_of(source)[0]}
    return {**state, "parts": [source_state(part) for part in source.parts]} if isinstance(source, Combined) else state


def generators_state(source: Any) -> dict[str, Any]:
    """Give where all generators of a source stand."""
    return {
        **({"parts": [generators_state(part) for part in source.parts]} if isinstance(source, Combined) else {}),
        "own_generators": [generator.get_state() for generator in own_generators(source)],
        "private": private_state(source),
    }


def private_state(source: Any) -> list[Any]:
    """Give where the generators stand that a loader's dataset and samplers keep for themselves."""
    return [to_plain(generator, "a generator of the data") for generator in private_generators(source)]


def put_private_back(source: Any, kept: list[Any]) -> None:
    """Put those generators where `private_state` found them."""
    for generator, state in zip(private_generators(source), kept, strict=False):
        from_plain(state, generator)


def put_generators_back(source: Any, state: dict[str, Any]) -> None:
    """Put all generators of a source where `generators_state` found them."""
    for part, of_part in zip(parts_of(source), state.get("parts", ()), strict=False):
        put_generators_back(part, of_part)
    for generator, kept in zip(own_generators(source), state["own_generators"], strict=False):
        generator.set_state(kept)
    put_private_back(source, state["private"])


def put_source_back(source: Any, state: dict[str, Any]) -> None:
    """Put a loader where `source_state` found it."""
    for part, of_part in zip(parts_of(source), state.get("parts", ()), strict=False):
        put_source_back(part, of_part)
    put_changes_back(source, state.get("walk", {}))
    for generator, kept in zip(own_generators(source), state["own_generators"], strict=False):
        generator.set_state(kept)
    put_private_back(source, state["private"])
