"""Data of several processes that train together: each takes its rows, and all rows are taken once.

============================================================ ===========================================================
given                                                        batch i of process r, of W processes
============================================================ ===========================================================
tensors, a loader over map-style data (also                  its part of the next W·b rows of the one order: the batches
``StatefulDataLoader``)                                      of all processes, one after the other, are the batch of one
                                                             process with W·b rows
the same with a batch sampler of another kind, or without    batch i·W + r of the one order, as it is
batches (``batch_size=None``); a list of batches
several loaders (`CombinedLoader`)                           each by itself, as above and below
a loader with a ``DistributedSampler``; iterable data; a     its own batch i: who made it has divided the data
loader that iterates in a way of its own
============================================================ ===========================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from math import ceil
from typing import TYPE_CHECKING, Any

from attrs import evolve
from torch.utils.data import DataLoader

from fluxloop.data.fingerprint import digest_of, fingerprint
from fluxloop.data.generators import own_generators
from fluxloop.data.indices import Numbers, deals_rows, shared_length
from fluxloop.data.kinds import Combined, is_loader
from fluxloop.data.loaders import Divided, TensorBatches
from fluxloop.data.notes import Notes
from fluxloop.data.share import Share, extremes
from fluxloop.data.sources import iterate
from fluxloop.errors import DataError, describe, warn_user
from fluxloop.randomness import Stream, draw_seed, preserved, start_torch

if TYPE_CHECKING:
    from fluxloop.processes.group import Group


# What is divided here, and what by who made it


def is_divided(source: Any, group: Group) -> bool:
    """Return whether each process takes its part of a source here; False where each has batches of its own.

    Raises:
        DataError: The source was divided for other processes than these.
    """
    if not isinstance(source, (TensorBatches, list, tuple)) and not is_loader(source):
        return False
    return not is_divided_already(source, group)


def is_divided_already(source: Any, group: Group) -> bool:
    """Return whether a source has a sampler, or is one, that knows how many processes there are, and which this is.

    Raises:
        DataError: It knows other numbers.
    """
    found = _division(source)
    if found is None:
        return False
    part, names, size, rank = found
    if (size, rank) != (group.size, group.rank):
        raise DataError(
            f"{describe(source)} has a {type(part).__name__} for process {rank} of {size}, and this is process "
            f"{group.rank} of {group.size}; expected {names[0]}={group.size} and {names[1]}={group.rank}, or leave it "
            "out: each process takes its rows by itself"
        )
    return True


NUMBERS = ("num_replicas", "rank"), ("num_processes", "process_index")
"""What torch's DistributedSampler and those that follow it call the number of processes and that of this one; and
those of accelerate."""


def _division(source: Any) -> tuple[Any, tuple[str, str], int, int] | None:
    """Return what of a source knows of processes, how it calls their numbers, how many there are and which this is."""
    batch_sampler = getattr(source, "batch_sampler", None)
    inner = getattr(batch_sampler, "sampler", None)
    for part in (batch_sampler, getattr(source, "sampler", None), inner, getattr(source, "dataset", None), source):
        for names in NUMBERS:
            size, rank = (getattr(part, name, None) for name in names)
            if isinstance(size, int) and isinstance(rank, int):
                return part, names, size, rank
    return None


def is_dealt_by_rows(source: Any) -> bool:
    """Return whether a divided source is dealt out row by row, so that only the rows of a whole batch count."""
    if isinstance(source, Combined):
        return all(map(is_dealt_by_rows, source.parts))
    if isinstance(source, TensorBatches):
        return True
    return is_loader(source) and deals_rows(_sampler(source)) and _division(source) is None


def _sampler(loader: DataLoader[Any]) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


# How many batches


_agreed: Notes[int] = Notes()
"""The largest length of data of which each process has batches of its own; -1 for none."""


def own_length(source: Any) -> int | None:
    """Return the number of batches that a source says it has here, None for none."""
    try:
        return len(source) if isinstance(source, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
        return None


def steps(source: Any, group: Group) -> int | None:
    """Return how many batches each process has of a source, spare ones too; None where nobody knows it."""
    if isinstance(source, Combined):
        return source.length([steps(part, group) for part in source.parts])
    if not is_divided(source, group):
        agreed = _agreed.get(source)
        return own_length(source) if agreed is None else agreed if agreed >= 0 else None
    if isinstance(source, TensorBatches):
        whole = source.batch_size * group.size
        return source.num_rows // whole if source.drop_last else ceil(source.num_rows / whole)
    if isinstance(source, (list, tuple)):
        return ceil(len(source) / group.size)
    try:
        return shared_length(_sampler(source), group.size)
    except TypeError:  # its sampler has no length
        return None


def agree_on_length(source: Any, group: Group) -> bool:
    """Have all processes take the largest length, where each has batches of its own; return whether all are the same.

    All processes call it at once.
    """
    if isinstance(source, Combined):
        return all([agree_on_length(part, group) for part in source.parts])
    if is_divided(source, group):
        return True
    length = own_length(source)
    number = -1 if length is None else length
    most, least = extremes(number, group)
    _agreed.put(source, -1 if least == -1 else most)
    return most == least


# A pass


def iterate_share(source: Any, numbers: Numbers, skip: int, share: Share) -> Iterator[Any]:
    """Iterate a process's share of a source from a batch on, as `iterate` does the whole.

    Where each process has batches of its own, these are all of its; `until_all_end` makes them end together.
    """
    if not is_divided(source, share.group):
        # or the n-th samples of all processes would draw the same numbers
        size, rank = share.size, share.rank
        return iterate(source, evolve(numbers, sample=lambda n: numbers.sample(n * size + rank)), skip)
    share.described = fingerprint(source)
    if isinstance(source, (list, tuple)):
        share.compare([len(source)])
        batches: Iterator[Any] = (source[place] for place in share.places(len(source), skip))
    else:
        _agree_on_generators(source, share.group)
        batches = iterate(source, numbers, skip, share)
    return share.marked(batches, skip)


def _agree_on_generators(source: Any, group: Group) -> None:
    """Have the generators of a loader and its samplers stand where those of the first process do."""
    generators = own_generators(source)
    if generators:
        states = group.broadcast([generator.get_state() for generator in generators])
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def until_all_end(source: Any, batches: Iterator[Any], share: Share) -> Iterator[Any]:
    """Make batches end when they have ended on all processes, where each has batches of its own."""
    if is_divided(source, share.group):
        return batches
    if agree_on_length(source, share.group) and is_loader(source):  # as many as it says, or an error says otherwise
        return batches
    return _seen_apart(source, share.until_all_end(batches), share)


_seen: Notes[bool] = Notes()
"""Sources whose first batch the processes have compared."""


def _seen_apart(source: Any, batches: Iterator[Any], share: Share) -> Iterator[Any]:
    """Warn, once for a source, where the first batch of several processes is the same."""
    for batch in batches:
        if _seen.get(source) is None:
            _seen.put(source, True)
            digests = share.group.gather_objects(None if share.is_spare else digest_of(batch))
            same = [rank for rank, digest in enumerate(digests) if digest is not None and digests.count(digest) > 1]
            if same and share.group.is_main:
                warn_user(
                    f"{share.label} gave processes {same} the same first batch: it is iterated by each process for "
                    "itself, so each trains on all of its rows. Expected each to give rows of its own, such as "
                    "islice(rows, accelerator.rank, None, accelerator.world_size); tensors, a Dataset, a DataLoader "
                    "over one, or a list of batches are divided without that"
                )
        yield batch
        break
    yield from batches


# Loops of the user's own


def fetched_apart(batches: Iterator[Any]) -> Iterator[Any]:
    """Fetch batches without moving the global generators of a loop around it."""
    while True:
        with preserved(numpy_too=False):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


class SharedLoader(Divided):
    """This process's share of a loader, for a loop of the user's own; each iteration is a new pass.

    `Group.spare` says of each batch whether it is a spare one, which weighs nothing.

    Args:
        source: Of batches.
        group: The processes that iterate it, all at once.
    """

    def __init__(self, source: Any, group: Group) -> None:
        self.source = source
        self.group = group

    def __len__(self) -> int:
        """Number of batches of each process.

        Raises:
            TypeError: Nobody knows it.
        """
        length = steps(self.source, self.group)
        if length is None:
            raise TypeError(f"{describe(self.source)} has no length")
        return length

    def __iter__(self) -> Iterator[Any]:
        order = self.group.broadcast(draw_seed())
        numbers = Numbers(order, Stream(order, "fetch").at, Stream(order, "sample").at)
        with preserved():
            batches = _begin(self.source, numbers, self.group)
        yield from fetched_apart(batches)

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(self.source, name)

    def __repr__(self) -> str:
        return f"SharedLoader({describe(self.source)}, process {self.group.rank} of {self.group.size})"


def _begin(source: Any, numbers: Numbers, group: Group) -> Iterator[Any]:
    """Begin a pass through a process's share of a source, outside of an epoch."""
    share = Share(group, describe(source))
    if isinstance(source, Combined):
        return share.told(source.begin(numbers, None, None, share))
    start_torch(numbers.order)
    return share.told(until_all_end(source, iterate_share(source, numbers, 0, share), share))


def shared(source: Any, group: Group | None) -> Any:
    """Return this process's share of a source of batches, to be iterated any number of times; alone, the source itself.

    Args:
        source: Tensors in batches, a loader, a list of batches, or another iterable of batches.
        group: The processes that iterate it, all at once; None for this one alone.
    """
    return source if group is None else SharedLoader(source, group)
