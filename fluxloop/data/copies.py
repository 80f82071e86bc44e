"""The copy of a loader that is run in its place, so that the user's loader stays as it is."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader, default_collate

from fluxloop.data.indices import LoaderIndices
from fluxloop.data.rows import SeededRows, WholeBatches, collates_as_torch, never_draws, return_batch

EARLY = "_initial_iter_for_state_dict"
"""Where a loader of torchdata notes that it made its iterator before a pass, to have something to say in its state."""

_copies: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()
"""The copy through which each loader was run last. A copy refers to nothing that would keep its loader alive."""


def copy_of(source: Any) -> DataLoader[Any] | None:
    """Return the copy through which a loader was run last, if any."""
    return _copies.get(source) if isinstance(source, DataLoader) else None


def use_copy_again(source: Any, former: DataLoader[Any] | None) -> None:
    """Have a loader be run through a former copy again, whose workers may wait."""
    if former is not None:
        _copies[source] = former


def copy_loader(loader: DataLoader[Any]) -> tuple[DataLoader[Any], LoaderIndices]:
    """Copy a loader, and return the copy with its indices; a copy whose workers stay is used again."""
    # A copy and not the loader itself: it may be the user's in another loop at the same time, and what it gives there
    # has to be what torch says. Not a new loader made from its options either: torch keeps not all of them as
    # attributes (what was left to it to choose looks like a choice), and subclasses have options of their own.
    copied = _copies.get(loader)
    place = "sampler" if loader.batch_sampler is None else "batch_sampler"
    if copied is None or copied._iterator is None or not copied.persistent_workers:
        copied = copy.copy(loader)
        draws = not (never_draws(loader.dataset) and loader.collate_fn is default_collate)
        copied._iterator = None  # the workers of the loader, if they stay, are its own
        if EARLY in vars(copied):
            setattr(copied, EARLY, False)
        # Through vars(), as DataLoader.__setattr__ raises for these attributes once the loader is made: changed later
        # they would not reach workers that run already. The copy has none yet.
        vars(copied)[place] = LoaderIndices(loader, draws)
        if draws:
            vars(copied)["dataset"] = SeededRows(loader.dataset)
        elif loader.batch_sampler is not None and collates_as_torch():
            vars(copied).update(dataset=WholeBatches(loader.dataset), collate_fn=return_batch)
        _copies[loader] = copied
    return copied, vars(copied)[place]
