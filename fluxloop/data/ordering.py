"""Sources whose rows come in the data set's order, all of them: what predictions are made over."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from fluxloop.data.combined import CombinedLoader
from fluxloop.data.kinds import is_loader
from fluxloop.data.loaders import TensorBatches
from fluxloop.errors import DataError, describe


def in_order(source: Any) -> Any:
    """Return a source of all rows in the data set's order; `source` itself where it is one.

    Loaders that shuffle, or leave out a last batch that is not full, are replaced by ones that do not.
    What has an order of its own (a list of batches, an iterable data set, a generator) keeps it.

    Raises:
        DataError: The order of the data set cannot be had.
    """
    if isinstance(source, TensorBatches):
        if not source.shuffle and not source.drop_last:
            return source
        return TensorBatches(source.data, batch_size=source.batch_size)
    if isinstance(source, CombinedLoader):
        return _combined_in_order(source)
    if not isinstance(source, DataLoader):
        return source
    if isinstance(source.dataset, IterableDataset):
        return _with(source, drop_last=False) if source.drop_last and _is_torchs(source) else source
    return _loader_in_order(source)


def _loader_in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    dataset: Any = loader.dataset
    batches: Any = loader.batch_sampler
    sampler: Any = loader.sampler
    size, drop_last = loader.batch_size, loader.drop_last
    if batches is not None:
        sampler, size, drop_last = batches, 1, False
        if type(batches) is BatchSampler:
            sampler, size, drop_last = batches.sampler, batches.batch_size, batches.drop_last
    # These two of torch's over the whole data set give each row once, so that another order loses nothing; what any
    # other sampler chooses (weighted, of a subset, by a process) only itself knows.
    whole = type(sampler) in (SequentialSampler, RandomSampler) and len(sampler.data_source) == len(dataset)
    if whole and type(sampler) is SequentialSampler and not drop_last:
        return loader
    if not whole:
        raise DataError(
            f"predict was given {describe(loader)} whose rows a {type(sampler).__name__} chooses, so they come neither "
            f"in the data set's order nor once each; expected a loader that shuffles at most. {_OTHERWISE}"
        )
    if not is_loader(loader):
        raise DataError(
            f"predict was given {describe(loader)}, which iterates in a way of its own, and shuffles or leaves out its "
            f"last rows; expected one with shuffle=False and drop_last=False. {_OTHERWISE}"
        )
    ordered = SequentialSampler(dataset)
    if batches is None:
        return _with(loader, sampler=ordered)
    return _with(loader, sampler=ordered, batch_sampler=BatchSampler(ordered, size or 1, False), drop_last=False)


_OTHERWISE = (
    "For these rows give a data set of them, such as torch.utils.data.Subset(dataset, indices); for the loader's own "
    "batches: predict(data, stack=False)"
)


def _is_torchs(loader: DataLoader[Any]) -> bool:
    return type(loader).__iter__ is DataLoader.__iter__


def _with(loader: DataLoader[Any], **changed: Any) -> DataLoader[Any]:
    """Copy a loader with other attributes; workers that stay are the original's."""
    other = copy.copy(loader)
    other._iterator = None
    vars(other).update(changed)
    return other


def _combined_in_order(source: CombinedLoader) -> CombinedLoader:
    parts = [in_order(part) for part in source.parts]
    lengths = {len(part) if hasattr(part, "__len__") else None for part in parts}
    if source.mode != "sequential" and (len(lengths) > 1 or None in lengths):
        raise DataError(
            f"predict was given a CombinedLoader with mode={source.mode!r} and loaders of different lengths, which has "
            "no order of rows; expected mode='sequential', or loaders of one length. For its batches as they are: "
            "predict(data, stack=False)"
        )
    return CombinedLoader(source.together(parts), source.mode)
