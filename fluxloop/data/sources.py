"""Sources of batches: samples with random numbers of their own, and going on in the middle of an epoch.

A ``DataLoader`` over map-style data is run through a copy: the same loader, with the same order,
whose indices carry the number that the sample's random numbers start from. So what an
augmentation draws depends on the epoch and on the sample's place in it, neither on the number of
workers nor on who loads it; and an epoch that is resumed begins behind the indices already
used, without loading them. Where the data is torch's own tensors, which draw nothing, the copy
fetches whole batches: the same, in a fraction of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from fluxloop.data.changes import watch
from fluxloop.data.copies import copy_loader
from fluxloop.data.indices import Numbers
from fluxloop.data.kinds import is_loader
from fluxloop.data.loaders import TensorBatches
from fluxloop.data.loading import Endless, begin, watched
from fluxloop.data.rows import EndlessRows
from fluxloop.errors import describe
from fluxloop.randomness import NumPyAndPythonPreserved

if TYPE_CHECKING:
    from fluxloop.data.share import Share


def iterate(source: Any, numbers: Numbers, skip: int = 0, share: Share | None = None) -> Iterator[Any]:
    """Iterate a source from a batch on.

    Args:
        source: Of batches.
        numbers: What its random numbers start from.
        skip: How many batches were used before; more than 0 only where `can_skip`.
        share: Whose part of it is wanted; only for `TensorBatches` and loaders over map-style data.
    """
    if isinstance(source, TensorBatches):
        return source.from_batch(skip, share)
    if isinstance(source, DataLoader) and not is_loader(source):
        return watched(_begin_iterable(source), lambda given: True, describe(source), skip)
    if not is_loader(source):
        return islice(iter(source), skip, None) if skip else iter(source)
    watch(source)  # before a row is loaded, which may change what the data set keeps
    copied, indices = copy_loader(source)
    indices.prepare(numbers, skip, share)
    batches = begin(copied)
    if indices.current is not None:
        indices.current.begin()
    loaded = watched(batches, indices.ended_after, f"{describe(source)} of {_count(source)} batches", skip)
    return _apart(loaded) if indices.draws and not copied.num_workers else loaded


def complete(source: Any) -> Iterator[Any]:
    """Iterate a source outside of an epoch, as it is; raise where it ends before its end, or where a worker dies."""
    if not isinstance(source, DataLoader):
        return iter(source)
    if not is_loader(source):
        return watched(_begin_iterable(source), lambda given: True, describe(source))
    copied = copy.copy(source)
    vars(copied).update(dataset=EndlessRows(source.dataset), collate_fn=Endless(source.collate_fn))
    return watched(begin(copied), lambda given: True, describe(source))


def _count(loader: DataLoader[Any]) -> int | str:
    try:
        return len(loader)
    except TypeError:  # its sampler has no length
        return "unknown"


def _begin_iterable(loader: DataLoader[Any]) -> Iterator[Any]:
    """Begin an iteration of a loader that is run as it is; a ``StopIteration`` in its ``collate_fn`` is an error."""
    collate = loader.collate_fn
    loader.collate_fn = Endless(collate)  # its iteration reads the function as it begins, and not again
    try:
        return begin(loader)
    finally:
        loader.collate_fn = collate


def _apart(batches: Iterator[Any]) -> Iterator[Any]:
    """Load samples in this process without moving the training's NumPy and Python generators."""
    others = NumPyAndPythonPreserved()
    while True:
        with others:
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch
