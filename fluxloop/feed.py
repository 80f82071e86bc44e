"""The data of one epoch, batch by batch, with its random numbers where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

from fluxloop.data import TensorBatches
from fluxloop.errors import CancelFittingException, CheckpointError, DataError, describe
from fluxloop.persist import keep, put_back
from fluxloop.phase import Stateful
from fluxloop.randomness import Stream, Streams, put_generators, start_torch
from fluxloop.signals import TERMINATED, StopWaiting
from fluxloop.sources import (
    Numbers,
    can_skip,
    is_loader,
    iterate,
    keeps_place,
    private_state,
    put_generators_back,
    put_private_back,
    put_source_back,
    put_twin_back,
    source_state,
    twin_of,
)


@contextmanager
def untouched(source: Any, workers_too: bool = True) -> Iterator[None]:
    """Put a loader's own generators, its waiting workers and its place among epochs back on leaving.

    Its own are those of the loader, its sampler and its batch sampler, and those found in its
    dataset's attributes and functions.

    Args:
        source: A loader, or anything.
        workers_too: Whether persistent workers, which go on drawing from where they are, are left
            out meanwhile.
    """
    state, epoch = source_state(source), source.epoch if isinstance(source, TensorBatches) else 0
    twin = twin_of(source)
    both: tuple[Any, ...] = (source, twin) if workers_too else ()
    loaders = [loader for loader in both if hasattr(loader, "_iterator")]
    workers = [loader._iterator for loader in loaders]
    for loader in loaders:
        loader._iterator = None
    try:
        yield
    finally:
        put_generators_back(source, state)
        put_twin_back(source, twin)
        if isinstance(source, TensorBatches):
            source.epoch = epoch
        for loader, iterator in zip(loaders, workers, strict=True):
            loader._iterator = iterator


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

    Attributes:
        count: Batches given in this epoch, those before a checkpoint it goes on from too.
        limit: How many batches an epoch has at most, as it begins; None for all there are.
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
        self._begun: dict[str, Any] | None = None
        self._from: dict[str, Any] | None = None
        self.count = 0
        self.limit: int | None = None
        self.waiting = False
        """Whether a batch is being fetched: no step is under way."""

    @property
    def num_batches(self) -> int | None:
        """Number of batches, None where nobody knows it."""
        length = self._length()
        if self.limit is None or length is None:
            return length
        return min(length, self.limit)

    def _length(self) -> int | None:
        if not isinstance(self.source, Sized):
            return None
        try:
            return len(self.source)
        except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
            return None

    # Going on in the middle of an epoch

    @property
    def obstacle(self) -> str | None:
        """Why an epoch of this data cannot be resumed in the middle; None where it can."""
        if can_skip(self.source) or keeps_place(self.source):
            return None
        named = f"the {self._name!r} data ({describe(self.source)})"
        if is_loader(self.source):
            return (
                f"{named} cannot be resumed in the middle of an epoch: its dataset draws from generators of its own in "
                "worker processes; expected it to draw from the global ones, which start from a number of its own for "
                "each sample, or num_workers=0"
            )
        return (
            f"{named} cannot be resumed in the middle of an epoch; expected tensors, a Dataset, a DataLoader over "
            "map-style data, or an object with state_dict() and load_state_dict(state)"
        )

    def place(self) -> dict[str, Any] | None:
        """Give where the running epoch is, as plain data; None where it has not begun or cannot be resumed."""
        if self._begun is None or self.obstacle is not None:
            return None
        own = (
            {"own": keep(cast(Stateful, self.source).state_dict(), f"the {self._name} data")}
            if keeps_place(self.source)
            else {}
        )
        now = {"private_now": private_state(self.source)}
        return {**self._begun, **own, **now, "key": self._name, "batch": self.count, "length": self._length()}

    def go_on(self, place: dict[str, Any]) -> None:
        """Begin the next iteration where another one was."""
        self._from = place

    def check_place(self, place: dict[str, Any]) -> None:
        """Raise where an iteration cannot begin where another one was.

        Raises:
            CheckpointError: The data has another length now, or cannot be resumed.
        """
        length = self._length()
        if self.obstacle is not None or place["length"] != length:
            raise CheckpointError(
                f"the epoch was left after {place['batch']} of {place['length']} batches of the {self._name} data, and "
                f"there are {length} now ({describe(self.source)}); expected the same data, or a checkpoint of the end "
                "of an epoch"
            )

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
        order, fetch = self._streams[f"{self._owner}/data"], self._streams[f"{self._owner}/fetch"]
        place, self._from = self._from, None
        self.count = 0
        if place is not None:
            put_source_back(self.source, place)
            self.count = place["batch"]
            if "own" in place:
                cast(Stateful, self.source).load_state_dict(put_back(place["own"]))
        set_epoch = getattr(self.source, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(order.index)
        self._begun = source_state(self.source)
        samples = self._streams.apart(f"{self._owner}/sample/{order.index}")
        fetched = fetch.index - max(self.count - 1, 0)
        numbers = Numbers(order.next(), lambda batch: fetch.at(fetched + batch - 1), samples.at)
        start_torch(numbers.order)
        batches = iterate(self.source, numbers, 0 if keeps_place(self.source) else self.count)
        if place is not None:
            put_generators(put_back(place["global_generators"]))
            put_private_back(self.source, place["private_now"])
        if getattr(self.source, "draws_at_fetch", not isinstance(self.source, (list, tuple))):
            batches = self._starting(batches, fetch)
        if self.limit is not None:
            batches = islice(batches, max(self.limit - self.count, 0))
        before_batch = self._before_batch
        before_batch()
        for batch in self._awaiting(batches, fetch):
            self.count += 1
            yield batch
            before_batch()
        if self.count == 0 and self._name is not None:
            raise self._empty()
        self._begun = None

    def _awaiting(self, batches: Iterator[Any], fetch: Stream) -> Iterator[Any]:
        """Wait for each batch, until the process is to end and none comes.

        Where workers fetch, nothing of this process has changed meanwhile: the state between the
        last step and this batch is one to go on from, and may be kept.

        Raises:
            CancelFittingException: The process is to end.
        """
        while True:
            number = fetch.index
            try:
                self.waiting = True
                batch = next(batches)
                self.waiting = False
            except StopIteration:
                self.waiting = False
                return
            except StopWaiting:
                self.waiting = False
                fetch.index = number
                if getattr(self.source, "num_workers", 0):
                    self._before_batch()
                raise CancelFittingException(TERMINATED) from None
            yield batch

    def _starting(self, batches: Iterator[Any], fetch: Stream) -> Iterator[Any]:
        """Start torch's generators for each batch but the first: loaders draw the order when they are first asked."""
        while True:
            if self.count:
                start_torch(fetch.next())
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def __len__(self) -> int:
        length = self.num_batches
        if length is None:
            raise TypeError(f"{describe(self.source)} has no length")
        return length
