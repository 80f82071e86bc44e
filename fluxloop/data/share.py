"""Which rows of a pass a process takes, where several train together; and what the processes tell each other of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fluxloop.errors import DataError

if TYPE_CHECKING:
    from fluxloop.processes.group import Group

COMPARED = 16
"""How many of a pass's first indices the processes compare."""


class Share:
    """A process's part of one pass.

    A batch of a pass is that of all processes together; its rows go to them in the order of their
    numbers, as equal a number to each as can be. So the batches of W processes with b rows each are, one
    after the other, the batch of one process with W·b rows.

    Where the last batch has fewer rows than there are processes, some have none of it. They take
    part in the step all the same, with a *spare* batch: rows that they repeat, and whose weight is 0.

    Args:
        group: The processes.
        label: What the data is called in messages.

    Attributes:
        is_spare: Whether the batch given last is a spare one.
        spare_at: Which batch of this process is one, counted from 0; None for none that is known.
        is_out: Whether this process's own data has ended before that of others.
        described: What the processes compare of the data as a pass begins: it has to be the same on all.
    """

    def __init__(self, group: Group, label: str = "the data") -> None:
        self.group = group
        self.rank = group.rank
        self.size = group.size
        self.label = label
        self.is_spare = False
        self.spare_at: int | None = None
        self.is_out = False
        self.described: dict[str, Any] = {}

    # Rows

    def piece(self, rows: int) -> slice:
        """Return which of so many rows are this process's."""
        each, more = divmod(rows, self.size)
        begin = self.rank * each + min(self.rank, more)
        return slice(begin, begin + each + (self.rank < more))

    def ranges(self, rows: int, batch_size: int, drop_last: bool) -> list[slice]:
        """Return where this process's rows of each batch are, in the order of the pass.

        Args:
            rows: How many the data has.
            batch_size: Rows of this process in a full batch.
            drop_last: Whether a last batch that is not full, of all processes, is left out.
        """
        whole = self.size * batch_size
        full, rest = divmod(rows, whole)
        begins = range(self.rank * batch_size, full * whole, whole)
        found = [slice(begin, begin + batch_size) for begin in begins]
        if rest and not drop_last:
            piece, begin = self.piece(rest), full * whole
            if piece.start < piece.stop:
                found.append(slice(begin + piece.start, begin + piece.stop))
            else:
                self.spare_at = full
                found.append(found[-1] if found else slice(begin, begin + min(rest, batch_size)))
        return found

    def places(self, count: int, first: int) -> Iterator[int]:
        """Yield the places of this process's batches in a list of so many, from a step on: each takes a whole one."""
        for begin in range(first * self.size, count, self.size):
            place = begin + self.rank
            if place >= count:
                self.spare_at = begin // self.size
                place = place - self.size if begin else 0
            yield place

    def take(
        self, source: Iterator[Any], batched: bool, by_rows: bool, drop_last: bool
    ) -> tuple[list[Any], Any, int, int]:
        """Take the next indices from a sampler's iteration, those of all processes, and return this process's.

        Args:
            source: The iteration: of lists of indices, or of single ones.
            batched: Whether each item of a list has a number of its own.
            by_rows: Whether the rows of lists may be dealt out anew, where a list is not full or one is missing.
            drop_last: Whether they are left out where they are not full.

        Returns:
            All that were taken; this process's, None where it has none; how many numbers come before its own; and
            how many are used up in all.

        Raises:
            StopIteration: There are none.
        """
        items = list(islice(source, self.size))
        if not items or (drop_last and len(items) < self.size):
            raise StopIteration
        if by_rows and (len(items) < self.size or len(items[-1]) < len(items[0])):
            rows = [index for item in items for index in item]
            piece = self.piece(len(rows))
            own, before, count = rows[piece] or None, piece.start, len(rows)
        else:
            sizes = [len(item) for item in items] if batched else []
            own, before, count = (
                items[self.rank] if self.rank < len(items) else None,
                sum(sizes[: self.rank]),
                sum(sizes),
            )
        return items, own, *((before, count) if batched else (self.rank, self.size))

    def marked(self, batches: Iterator[Any], given: int) -> Iterator[Any]:
        """Yield batches, and note which is a spare one.

        Args:
            batches: This process's.
            given: How many batches were given before.
        """
        for batch in batches:
            self.is_spare = given == self.spare_at
            given += 1
            yield batch
        self.is_spare = False

    def told(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Tell the group before each batch whether it is a spare one, and at the end that none is."""
        for batch in batches:
            self.group.spare = self.is_spare
            yield batch
        self.group.spare = False

    # What the processes tell each other

    def compare(self, indices: Sequence[Any]) -> None:
        """Raise on all processes where they do not have the same data, or not in the same order.

        Args:
            indices: The first ones of the pass.

        Raises:
            DataError: Says what differs, and on which process.
        """
        says = {**self.described, "first rows of the order": [_plain(index) for index in indices[:COMPARED]]}
        digest = int.from_bytes(blake2b(repr(sorted(says.items())).encode(), digest_size=7).digest(), "little")
        most, least = extremes(digest, self.group)
        if most == least:
            return
        of_all = self.group.gather_objects(says)
        listed = "".join(
            f"\n  {what}: {value!r} on process 0, {other[what]!r} on process {rank}"
            for what, value in of_all[0].items()
            for rank, other in enumerate(of_all)
            if other.get(what, value) != value
        )
        raise DataError(
            f"{self.label} is not the same on all processes:{listed}\nExpected the same data in the same order on all, "
            "of which each takes its own rows: leave a split by rank out, and seed what is drawn for the data "
            "(seed_everything, split(seed=), samplers with a generator of their own). A data set of which each process "
            "has rows of its own says so by attributes num_replicas and rank"
        )

    def vote(self, number: int) -> list[int]:
        """Return what each process says, in the order of their numbers."""
        votes = torch.zeros(self.size, dtype=torch.int64, device=meeting_device(self.group))
        votes[self.rank] = number
        return [int(vote) for vote in self.group.all_reduce(votes).tolist()]

    def until_all_end(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches of data that each process has for itself, until it has ended on all.

        Before each batch the processes tell each other whether they have one: one small message. Who
        is out goes on with its last batch, as a spare one; who never had one, with another's.
        """
        last, has_last = None, False
        while True:
            batch = _END if self.is_out else next(batches, _END)
            self.is_out = batch is _END
            if not self.is_out:
                last, has_last = batch, True
            votes = self.vote(HAS_NEXT if not self.is_out else HAS_LAST if has_last else NOTHING)
            if HAS_NEXT not in votes:
                self.is_spare = False
                return
            if NOTHING in votes:
                lent = self.group.broadcast(last, votes.index(HAS_NEXT))
                last, has_last = last if has_last else lent, True
            self.is_spare = self.is_out
            yield last


@contextmanager
def unspoken(group: Group | None) -> Iterator[None]:
    """Say of no batch inside that it is a spare one, until one is; and of the step around it what was said before."""
    if group is None:
        yield
        return
    outer, group.spare = group.spare, False
    try:
        yield
    finally:
        group.spare = outer


def extremes(number: int, group: Group) -> tuple[int, int]:
    """Return the largest and the smallest of the numbers that the processes have."""
    both = torch.tensor([number, -number], dtype=torch.int64, device=meeting_device(group))
    most, least = group.all_reduce(both, "max").tolist()
    return most, -least


def meeting_device(group: Group) -> torch.device:
    """Return where numbers that the processes tell each other lie: on the host where these can be sent from there.

    To read a number from a device waits for all that it still computes.
    """
    if group.device.type == "cpu" or "cpu:" in dist.get_backend_config(group.process_group):
        return torch.device("cpu")
    return group.device


NOTHING, HAS_LAST, HAS_NEXT = range(3)
"""What a process says before a batch of data that each has for itself."""
_END = object()


def _plain(index: Any) -> Any:
    """Return an index as something whose text is the same on all processes."""
    if isinstance(index, (list, tuple)):
        return [_plain(each) for each in index]
    if isinstance(index, (str, bytes)):
        return index
    return int(index) if hasattr(index, "__index__") else type(index).__name__
