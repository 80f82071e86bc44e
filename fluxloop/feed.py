"""The data of one epoch, batch by batch, with its random numbers where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch

from fluxloop.data import TensorBatches
from fluxloop.errors import DataError, describe
from fluxloop.randomness import Streams, start_torch


@contextmanager
def untouched(source: Any, workers_too: bool = True) -> Iterator[None]:
    """Put a loader's own generators, its waiting workers and its place among epochs back on leaving.

    Its own are those of the loader, its sampler and its batch sampler; what a dataset keeps for
    itself cannot be known.

    Args:
        source: A loader, or anything.
        workers_too: Whether persistent workers, which go on drawing from where they are, are left
            out meanwhile.
    """
    sampler, batch_sampler = getattr(source, "sampler", None), getattr(source, "batch_sampler", None)
    owners = (source, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    own = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in own.values()]
    workers = getattr(source, "_iterator", None)
    epoch = source.epoch if isinstance(source, TensorBatches) else 0
    if workers is not None and workers_too:
        source._iterator = None
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        if workers_too and hasattr(source, "_iterator"):
            source._iterator = workers
        if isinstance(source, TensorBatches):
            source.epoch = epoch


class Feed:
    """The data of one epoch, with its random numbers where they belong; what `Phase.epoch` iterates.

    The order of the data, and whatever a dataset draws while a batch is fetched, come from
    streams of the data's own, so that nothing that happens between two steps changes them.

    Args:
        source: Any iterable of batches.
        owner: Names the streams: the phase's owner.
        streams: The learner's streams.
        name: What the data is called in messages; None where the phase needs none.
        before_batch: Called before each batch is fetched.
    """

    def __init__(
        self,
        source: Iterable[Any],
        owner: str,
        streams: Streams,
        name: str | None = None,
        before_batch: Callable[[], object] = lambda: None,
    ) -> None:
        self.source = source
        self._owner = owner
        self._streams = streams
        self._name = name
        self._before_batch = before_batch

    @property
    def num_batches(self) -> int | None:
        """Number of batches, None where the source does not know it."""
        if not isinstance(self.source, Sized):
            return None
        try:
            return len(self.source)
        except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
            return None

    def check(self) -> None:
        """Raise `DataError` for a source known to be empty."""
        if self.num_batches == 0 and self._name is not None:
            raise self._empty()

    def _empty(self) -> DataError:
        return DataError(
            f"the {self._name} data ({describe(self.source)}) gave no batch; expected at least one: fewer "
            "rows than batch_size with drop_last=True, or an iterator that was used up before?"
        )

    def __iter__(self) -> Iterator[Any]:
        order = self._streams[f"{self._owner}/data"]
        set_epoch = getattr(self.source, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(order.index)
        start_torch(order.next())
        batches = iter(self.source)
        fetch = None
        if getattr(self.source, "draws_at_fetch", not isinstance(self.source, (list, tuple))):
            fetch = self._streams[f"{self._owner}/fetch"]
        count = 0
        while True:
            self._before_batch()
            if fetch is not None and count:  # not the first: loaders draw the order when they are first asked
                start_torch(fetch.next())
            try:
                batch = next(batches)
            except StopIteration:
                break
            count += 1
            yield batch
        if count == 0 and self._name is not None:
            raise self._empty()

    def __len__(self) -> int:
        length = self.num_batches
        if length is None:
            raise TypeError(f"{describe(self.source)} has no length")
        return length
