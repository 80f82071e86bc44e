"""Indices of a loader, batch by batch, each with the number that its sample's random numbers start from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from fluxloop.data.generators import own_generators
from fluxloop.randomness import NumPyAndPythonContinued, start_torch

if TYPE_CHECKING:
    from fluxloop.data.share import Share


@frozen
class Numbers:
    """What the random numbers of one epoch's data start from.

    Args:
        order: The number for the order and the first batch.
        fetch: Returns the number for batch ``j``, from 1.
        sample: Returns the number for the n-th sample of the epoch, from 0.
    """

    order: int
    fetch: Callable[[int], int]
    sample: Callable[[int], int]


class LoaderIndices:
    """A loader's indices, batch by batch; each with the number its sample draws from, where samples draw.

    Args:
        loader: The loader: it may batch, or give indices one by one.
        draws: Whether samples may draw.
    """

    def __init__(self, loader: DataLoader[Any], draws: bool) -> None:
        self.generator = loader.generator
        self.own = own_generators(loader)  # and not the loader, which would live as long as its copy
        self.batched = loader.batch_sampler is not None
        self.sampler: Any = loader.batch_sampler if self.batched else loader.sampler
        self.draws = draws
        self.others_too = not _is_torchs(self.sampler)  # others may draw from NumPy's and Python's generators
        self.current: IndexPass | None = None
        self.share: Share | None = None

    def prepare(self, numbers: Numbers, skip: int, share: Share | None = None) -> None:
        """Say from which numbers, and from which batch on, the next iteration goes; and whose part it is."""
        self.numbers = numbers
        self.skip = skip
        self.share = share
        self.generators = self.states()

    def __iter__(self) -> IndexPass:
        self.current = IndexPass(self) if self.share is None else SharedIndexPass(self, self.share)
        return self.current

    def __len__(self) -> int:
        return len(self.sampler) if self.share is None else shared_length(self.sampler, self.share.size)

    def ended_after(self, batches: int) -> bool:
        """Return whether the indices ended after so many batches, those that were used before too."""
        return self.current is None or (self.current.ended and self.current.drawn <= batches)

    def states(self) -> list[tuple[torch.Generator, Tensor]]:
        """Return the generators an order may be drawn from, and where they stand."""
        return [(generator, generator.get_state()) for generator in (torch.default_generator, *self.own)]


def _is_torchs(sampler: Any) -> bool:
    """Return whether a sampler is torch's own, down to the innermost: it draws from torch's generators alone."""
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler).__module__ == BatchSampler.__module__


def deals_rows(sampler: Any) -> bool:
    """Return whether a batch sampler cuts its sampler's indices into batches and does nothing else: torch's own."""
    return type(sampler).__name__ == "BatchSampler" and type(sampler).__module__.split(".")[0] in ("torch", "torchdata")


def shared_length(sampler: Any, processes: int) -> int:
    """Return how many batches several processes make together of a sampler's or a batch sampler's."""
    count = len(sampler)
    if deals_rows(sampler) and sampler.drop_last:
        return count // processes
    return ceil(count / processes)


def _set_generators(states: list[tuple[torch.Generator, Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state)


class IndexPass:
    """One pass through a loader's indices.

    A loader draws a number for its workers when it makes them, after the sampler's iteration has
    begun and before the sampler is asked; workers that stay are made once. Here each pass draws as
    the first one does, so that new and persistent workers give the same order.
    """

    def __init__(self, indices: LoaderIndices) -> None:
        self._indices = indices
        _set_generators(indices.generators)
        start_torch(indices.numbers.order)
        self._others: AbstractContextManager[None] = (
            NumPyAndPythonContinued(indices.numbers.order) if indices.others_too else nullcontext()
        )
        with self._others:
            self._source = iter(indices.sampler)
        # what torch draws here for its workers' seeds, where it makes new ones (_BaseDataLoaderIter.__init__)
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
        """Return the next indices, and the place in the epoch of the first of them."""
        if self.drawn:
            start_torch(self._indices.numbers.fetch(self.drawn))
        else:  # the first indices go on with the numbers the pass began with, whoever has drawn since
            _set_generators(self._begins)
        with self._others:
            try:
                indices, before, count = self._take()
            except StopIteration:
                self.ended = True
                raise
        first = self._sample + before
        self.drawn += 1
        self._sample += count
        return indices, first

    def _take(self) -> tuple[Any, int, int]:
        """Return the next indices, how many come before them in their batch, and how many that has."""
        indices = next(self._source)
        return indices, 0, len(indices) if self._indices.batched else 1

    def __iter__(self) -> IndexPass:
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


class SharedIndexPass(IndexPass):
    """A process's part of one pass through a loader's indices: all draw the same, and each takes its own."""

    def __init__(self, indices: LoaderIndices, share: Share) -> None:
        super().__init__(indices)
        self._share = share
        self._by_rows = deals_rows(indices.sampler)
        self._last: tuple[Any, int] | None = None
        """The indices that this process had last, and the place in the epoch of the first of them."""

    def _take(self) -> tuple[Any, int, int]:
        share, batched = self._share, self._indices.batched
        drop_last = self._by_rows and self._indices.sampler.drop_last
        items, own, before, count = share.take(self._source, batched, self._by_rows, drop_last)
        if not self.drawn:
            share.compare(items)
        if own is not None:
            self._last = own, self._sample + before
            return own, before, count
        share.spare_at = self.drawn
        if self._last is not None:  # of as many rows as any: what looks at a batch as a whole can do with it
            indices, first = self._last
            return indices, first - self._sample, count
        return items[0], 0, count
