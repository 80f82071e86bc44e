"""The data of one epoch, batch by batch, with its random numbers where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

from fluxloop.data.fingerprint import differences, fingerprint, rows_per_step
from fluxloop.data.indices import Numbers
from fluxloop.data.passes import Pass, check_place, obstacle, of_process
from fluxloop.data.sharing import agree_on_length, is_dealt_by_rows, steps
from fluxloop.errors import CancelFittingException, CheckpointError, DataError, describe, warn_user
from fluxloop.persist.plain import from_plain
from fluxloop.randomness import Stream, Streams, put_generators, start_torch
from fluxloop.signals import TERMINATED, StopWaiting

if TYPE_CHECKING:
    from fluxloop.processes.group import Group


def _nothing() -> None:
    """Undo nothing."""


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
        told: Names of data that a warning has said to have more or fewer batches than its length.
        group: The processes that share the data (`fluxloop.data.sharing`); None for this one alone. Then all lengths,
            counts and places are those of the batches of all processes together, and `Group.spare` says of each
            batch whether it is a spare one: it repeats rows, so that this process takes part in a step for which it has
            none, and weighs nothing.

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
        told: set[str] | None = None,
        group: Group | None = None,
    ) -> None:
        self.source = source
        self._owner = owner
        self._streams = streams
        self.name = name
        self._before_batch = before_batch
        self._told = set() if told is None else told
        self._group = group
        self._pass: Pass | None = None
        self._from: dict[str, Any] | None = None
        self._undo: Callable[[], None] = _nothing
        self.count = 0
        self.limit: int | None = None
        self.waiting = False
        """Whether a batch is being fetched: no step is under way."""

    @property
    def num_batches(self) -> int | None:
        """Number of batches, None where nobody knows it; of several processes, of each of them."""
        length = self._length()
        if self.limit is None or length is None:
            return length
        return min(length, self.limit)

    def _length(self) -> int | None:
        if not isinstance(self.source, Sized):
            return None
        try:
            return len(self.source) if self._group is None else self._steps(self._group)
        except (TypeError, ValueError) as error:
            if not any(words in str(error) for words in ("interpreted as an integer", "should return >= 0")):
                return None  # a DataLoader over an IterableDataset has a __len__ that raises
            raise DataError(
                f"the len() of the {self.name} data ({describe(self.source)}) is no number of batches: "
                f"{str(error).removesuffix('.')}; expected a whole number, 0 or more, or no __len__ at all"
            ) from error

    def _steps(self, group: Group) -> int | None:
        len(self.source)  # type: ignore[arg-type]  # it is Sized: raises what is wrong with it
        return steps(self.source, group)

    @property
    def is_at_end(self) -> bool:
        """Whether the batch given last is known to be the last one of the epoch."""
        return self.count == self.num_batches

    # Going on in the middle of an epoch

    @property
    def obstacle(self) -> str | None:
        """Why an epoch of this data cannot be resumed in the middle; None where it can."""
        return obstacle(self.source, self.name)

    def place(self) -> dict[str, Any] | None:
        """Return where the running epoch is, as plain data; None where it has not begun or cannot be resumed.

        Raises:
            CheckpointError: The source cannot say where it is.
        """
        if self._pass is None or self.obstacle is not None:
            return None
        place = self._pass.place(self.count, self.name)
        told = {"key": self.name, "length": self._length(), "fingerprint": fingerprint(self.source, self._processes)}
        return {**place, **told, **({} if self._group is None else {"processes": self._processes})}

    @property
    def _processes(self) -> int:
        return 1 if self._group is None else self._group.size

    def go_on(self, place: dict[str, Any], undo: Callable[[], None]) -> None:
        """Begin the next iteration where another one was.

        Args:
            place: Where that was.
            undo: Puts the learner back as it was before it took up the run; called where the data refuses its state.
        """
        self._from, self._undo = place, undo

    def check_place(self, place: dict[str, Any]) -> None:
        """Raise where an iteration cannot begin where another one was.

        Raises:
            CheckpointError: The data cannot be resumed, or is not the data of then; says what differs.
        """
        self._check_processes(place)
        length = self._length()
        differ = differences(place.get("fingerprint", {}), fingerprint(self.source, self._processes))
        listed = "".join(f"\n  {each}" for each in differ)
        if self.obstacle is not None or place["length"] != length:
            raise CheckpointError(
                f"the epoch was left after {place['batch']} of {place['length']} batches of the {self.name} data, and "
                f"there are {length} now ({describe(self.source)}); expected the same data, or a checkpoint of the end "
                f"of an epoch{listed}"
            )
        check_place(self.source, of_process(place, self._group) or place, self.name)
        if differ:
            raise CheckpointError(
                f"the epoch was left after {place['batch']} of {length} batches of the {self.name} data "
                f"({describe(self.source)}), which is not the same now:{listed}\nRows would be repeated or left out; "
                "expected the same data, or a checkpoint of the end of an epoch"
            )

    def _check_processes(self, place: dict[str, Any]) -> None:
        """Raise where an epoch was left by another number of processes, and cannot go on with as many as there are.

        Raises:
            CheckpointError: Says how it could.
        """
        then, now = place.get("processes", 1), self._processes
        if then == now:
            return
        found, kept = fingerprint(self.source), place.get("fingerprint", {})
        sizes, wanted = rows_per_step(found), rows_per_step(kept)
        left = (
            f"the epoch was left after {place['batch']} of {place['length']} batches of the {self.name} data, with "
            f"{_count(then)}, and there {'is' if now == 1 else 'are'} {_count(now)} now ({describe(self.source)}); "
        )
        if not is_dealt_by_rows(self.source) or len(sizes) != len(wanted):
            raise CheckpointError(
                f"{left}expected as many as then, or a checkpoint of the end of an epoch: another number goes on only "
                "with tensors and data sets in batches of one size"
            )
        if [size * now for size in sizes] != wanted:
            rows = ", ".join(map(str, wanted))
            fitting = ", ".join(
                f"batch_size={size // now}" if size % now == 0 else f"no batch_size makes {size} here"
                for size in wanted
            )
            raise CheckpointError(
                f"{left}expected the same number of rows per step ({rows}), which is {fitting} on {_count(now)}, or a "
                f"checkpoint of the end of an epoch; batch_size={', '.join(map(str, sizes))} was given"
            )

    def check(self) -> None:
        """Raise `DataError` for a source known to be empty.

        All processes that share it call this at once: they take the same length where each has batches of its own.
        """
        if self._group is not None:
            agree_on_length(self.source, self._group)
        if self.num_batches == 0 and self.name is not None:
            raise self._empty()

    def _empty(self) -> DataError:
        return DataError(
            f"the {self.name} data ({describe(self.source)}) gave no batch; expected at least one: fewer "
            "rows than batch_size with drop_last=True, an iterator that was used up before, or a loader with a "
            "state_dict() that is, once its iteration has ended, still that of the end?"
            f"{'' if self._group is None else f' A full batch is one of all {self._processes} processes together.'}"
        )

    def _begin(self, numbers: Numbers, epoch: int, place: dict[str, Any] | None) -> Pass:
        """Begin a pass, where another one was left if there is a place.

        Raises:
            CheckpointError: The source refuses the state that it had there; nothing is changed.
        """
        undo, self._undo = self._undo, _nothing
        if place is None:
            return Pass(self.source, numbers, epoch, None, self._group, self.name)
        try:
            begun = Pass(self.source, numbers, epoch, place, self._group, self.name)
            put_generators(from_plain(place["global_generators"]))
        except Exception as error:
            undo()
            raise CheckpointError(
                f"the {self.name} data ({describe(self.source)}) does not take the state it had in the "
                f"checkpoint: {type(error).__name__}: {error}"
            ) from error
        return begun

    def __iter__(self) -> Iterator[Any]:
        order, fetch = self._streams[f"{self._owner}/data"], self._streams[f"{self._owner}/fetch"]
        place, self._from = self._from, None
        epoch = order.index
        samples = self._streams.apart(f"{self._owner}/sample/{epoch}")
        self.count = 0 if place is None else place["batch"]
        # The first batch goes on with the numbers of the order and takes none of its own, so batch j of the epoch has
        # the number j - 1 after the one at which this epoch's began.
        fetched = fetch.index - max(self.count - 1, 0)
        if type(self.source) not in (list, tuple):  # of which nothing can be noted
            fingerprint(self.source)  # before a step may change its rows
        numbers = Numbers(order.next(), lambda batch: fetch.at(fetched + batch - 1), samples.at)
        self._pass = self._begin(numbers, epoch, place)
        batches = self._pass.batches
        if self._pass.draws_at_fetch:
            batches = self._starting(batches, fetch)
        if self.limit is not None:
            batches = islice(batches, max(self.limit - self.count, 0))
        if self._pass.share is not None:
            batches = self._pass.share.told(batches)
        before_batch = self._before_batch
        before_batch()
        try:
            for batch in self._awaiting(batches, fetch):
                self.count += 1
                yield batch
                before_batch()
        finally:
            run, self._pass = self._pass, None  # it holds the loader's workers, which end when nothing refers to them
        if self.count == 0 and self.name is not None:
            raise self._empty()
        if self.count != self.limit:
            run.end()
        if self.count != self.limit and not run.went_on:
            self._check_count(resumed=place is not None)

    def _check_count(self, resumed: bool) -> None:
        """Say where an epoch had fewer or more batches than the data's length: a warning, once for a learner's data.

        Raises:
            DataError: The epoch was resumed, so nobody knows whether it went on where it was left.
        """
        length = self._length()
        if length is None or length == self.count or self.name is None:
            return
        named = f"the {self.name} data ({describe(self.source)})"
        said = f"{named} has {length} batches by its len(), and gave {self.count}; "
        if resumed:
            raise DataError(
                f"{said}the epoch was resumed in the middle, and whether it went on where it was left is not known: "
                "expected as many as its len(). Mend its __len__ or what it iterates"
            )
        if self.name not in self._told:
            self._told.add(self.name)
            warn_user(
                f"{said}progress, schedules by epoch and resuming in the middle of an epoch go by its len(): mend its "
                "__len__, or that of its sampler or data set"
            )

    def _awaiting(self, batches: Iterator[Any], fetch: Stream) -> Iterator[Any]:
        """Wait for each batch, until the process is to end and none comes.

        Where workers fetch, nothing of this process has changed meanwhile: the state between the
        last step and this batch is one to resume from, which a checkpoint may hold.

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


def _count(processes: int) -> str:
    return f"{processes} process{'' if processes == 1 else 'es'}"
