"""What tells one source of data from another, cheaply: its numbers of rows and batches, its order, and some rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from ctypes import string_at
from hashlib import blake2b
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Subset, TensorDataset

from fluxloop.data.loaders import TensorBatches
from fluxloop.data.notes import Notes
from fluxloop.guard.given import as_python
from fluxloop.nested import tensors
from fluxloop.persist.attributes import attributes

ROWS = 8
"""How many rows are looked at, spread evenly."""
NUMBERS_PER_ROW = 4096
"""How many numbers of a row are looked at, at most."""

Fingerprint = dict[str, Any]


_known: Notes[Fingerprint] = Notes()
"""Of each source as it was first: training may change rows."""


def fingerprint(source: Any, processes: int = 1) -> Fingerprint:
    """Describe a source as plain data, as it was when it was first asked for, so that another one is told from it.

    Rows are looked at where that draws nothing and loads nothing: in tensors and arrays.

    Args:
        source: Of batches.
        processes: How many share it: a batch is that of all of them.
    """
    # Noted once: steps may change rows in place, and a run that does so is still a run on the same data.
    found = _known.get(source)
    if found is None:
        found = {what: as_python(value) for what, value in _of(source)}
        _known.put(source, found)
    if processes == 1:
        return found
    return {what: value * processes if _is_batch_size(what, value) else value for what, value in found.items()}


def _is_batch_size(what: str, value: Any) -> bool:
    return what.split(" of ")[0] == "batch_size" and isinstance(value, int)


def rows_per_step(found: Fingerprint) -> list[int]:
    """Return the batch sizes in a description."""
    return [value for what, value in found.items() if _is_batch_size(what, value)]


def _of(source: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(source, "named_parts"):  # several together
        for name, part in source.named_parts():
            yield from ((f"{what} of {name!r}", value) for what, value in fingerprint(part).items())
    elif isinstance(source, TensorBatches):
        yield "rows", source.num_rows
        yield "batch_size", source.batch_size
        yield "order", "shuffled" if source.shuffle else "as they are"
        yield "drop_last", source.drop_last
        yield "seed", source.seed
        yield "some values", _digest(list(tensors(source.data)))
    elif isinstance(source, DataLoader):
        yield from _of_loader(source)
    elif isinstance(source, (list, tuple)):
        yield "some values", _digest([t for place in _places(len(source)) for t in tensors(source[place])])


def _of_loader(loader: DataLoader[Any]) -> Iterator[tuple[str, Any]]:
    dataset: Any = loader.dataset
    rows = None
    with suppress(TypeError, NotImplementedError, AttributeError):  # it has no length
        rows = len(dataset)
    batches: Any = loader.batch_sampler
    sampler: Any = loader.sampler if batches is None else getattr(batches, "sampler", batches)
    yield "rows", rows
    yield "batch_size", loader.batch_size if batches is None else getattr(batches, "batch_size", loader.batch_size)
    yield "order", _name_order(sampler)
    if type(batches) not in (BatchSampler, type(None)):
        yield "batches", type(batches).__name__
    yield "drop_last", getattr(batches, "drop_last", loader.drop_last)
    if rows:
        yield "some values", _digest(list(_columns(dataset, rows)))


def _name_order(sampler: Any) -> str:
    names = {"RandomSampler": "shuffled", "SequentialSampler": "as they are"}
    name = type(sampler).__name__
    return names.get(name, name) if type(sampler).__module__ == BatchSampler.__module__ else name


def _columns(dataset: Any, rows: int) -> Iterator[Any]:
    """Yield the tensors and arrays of which a data set makes its rows, as far as they lie in its attributes."""
    if isinstance(dataset, Subset):
        yield torch.as_tensor([int(dataset.indices[place]) for place in _places(len(dataset))])
        with suppress(TypeError):
            yield from _columns(dataset.dataset, len(dataset.dataset))  # type: ignore[arg-type]  # it has a length
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _columns(part, len(part))  # type: ignore[arg-type]  # so have these
    elif isinstance(dataset, TensorDataset):
        yield from dataset.tensors
    else:
        for value in attributes(dataset).values():
            if _is_column(value) and len(value) == rows:
                yield value


def _is_column(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return bool(value.ndim) and not value.dtype.hasobject and value.dtype.names is None
    if type(value) is not Tensor or value.is_nested:
        return False
    return bool(value.ndim) and value.layout is torch.strided and not value.is_meta


def _places(rows: int) -> list[int]:
    count = min(rows, ROWS)
    return [place * (rows - 1) // max(count - 1, 1) for place in range(count)]


def _digest(columns: list[Any]) -> str | None:
    """Return a digest of some rows' numbers; None where there is nothing to look at."""
    columns = [column for column in columns if _is_column(column)]
    if not columns:
        return None
    digest = blake2b(digest_size=8)
    for column in columns:
        digest.update(f"{column.dtype}{tuple(column.shape[1:])}".encode())
        step, places = max(1, prod(column.shape[1:]) // NUMBERS_PER_ROW), _places(len(column))
        # Small rows of a tensor at once, in a few operations; of large ones no more is copied than is looked at.
        at_once = step == 1 and isinstance(column, Tensor)
        for rows in [column[places]] if at_once else [column[place] for place in places]:
            digest.update(_numbers(rows, step))
    return digest.hexdigest()


def digest_of(batch: Any) -> str | None:
    """Return a digest of some numbers of a batch's tensors; None where there are none."""
    return _digest(list(tensors(batch)))


def _numbers(rows: Any, step: int) -> bytes:
    """Return every so many-th of some rows' numbers as bytes."""
    if isinstance(rows, Tensor):
        flat = rows.detach().resolve_conj().resolve_neg().reshape(-1)[::step].cpu().contiguous()
        return string_at(flat.data_ptr(), flat.nbytes) if flat.numel() else b""
    return bytes(rows.reshape(-1)[::step].tobytes())


def differences(former: Fingerprint, now: Fingerprint) -> list[str]:
    """Say where two descriptions differ, with both values.

    What stands in only one of them is left out: it may be of an earlier version.
    """
    return [
        f"{what}: {former[what]!r} then, {now[what]!r} now"
        for what in former
        if what in now and former[what] != now[what] and None not in (former[what], now[what])
    ]
