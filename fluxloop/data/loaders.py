"""Make loaders from tensors, arrays, datasets or loaders; split off validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import chain, islice
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from fluxloop.data.columns import as_tensors, count_rows
from fluxloop.errors import DataError, annotate, describe
from fluxloop.guard.given import as_plain, check_number, is_number
from fluxloop.nested import map_tensors, tensors
from fluxloop.randomness import preserved, stream_seed
from fluxloop.state import State

if TYPE_CHECKING:
    from fluxloop.data.share import Share


# Measured per batch against gathering each on its own: 0.4 of the time with batches of 2 KB and 0.9 with 200 KB, all
# together at most 256 KiB. All batches of an epoch gathered at once cost 4 times as much with 400 KB, all of it memory
# traffic. On other devices than the CPU nothing was measured.
AHEAD = 256 * 1024
"""How many bytes of shuffled rows are gathered at once on the CPU."""
AHEAD_ELSEWHERE = 16 * 1024 * 1024
"""The same on other devices, where each gather is a launch."""
ALIGNMENT = 64
"""Bytes that a tensor of its own is aligned to: the last bits of a product may depend on it."""
AT_ONCE = 64
"""How many batches are made at once, at most."""


def is_plain(tensor: Tensor) -> bool:
    """Return whether ``index_select`` copies a tensor's rows as stacking them does, only faster."""
    return (
        type(tensor) is Tensor
        and not tensor.requires_grad
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.is_contiguous()
    )


def _is_packed(tensor: Tensor) -> bool:
    """Return whether a tensor is plain and has the strides of a new one, which channels last has not."""
    return is_plain(tensor) and tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _gather(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that copies rows of a tensor, into pinned memory where it is pinned."""
    if not _is_packed(tensor):
        return tensor.__getitem__
    if tensor.is_pinned():
        return partial(_gather_pinned, tensor)
    return partial(tensor.index_select, 0)


def _gather_pinned(tensor: Tensor, rows: Tensor) -> Tensor:
    out = tensor.new_empty((len(rows), *tensor.shape[1:]), pin_memory=True)
    return torch.index_select(tensor, 0, rows, out=out)


def _rebuild(source: Any, leaves: Iterator[Tensor]) -> Any:
    """Put tensors into the structure of `source`, which `as_tensors` made."""
    if isinstance(source, Tensor):
        return next(leaves)
    if isinstance(source, dict):
        return {key: _rebuild(value, leaves) for key, value in source.items()}
    items = [_rebuild(value, leaves) for value in source]
    return type(source)(*items) if hasattr(source, "_fields") else tuple(items)


class TensorBatches:
    """Loads batches from tensors in memory by slicing whole batches: no per-sample work.

    A batch has the structure of what was given: a tensor for one tensor, a tuple for several, a
    dict for a dict. Without shuffling, batches are views of the tensors (do not change them in
    place); with it, copies, which may be changed. May be iterated any number of times; the tensors may
    lie on any device: the order is drawn on the CPU, the same for all, and moved there once per iteration.

    Shuffled batches are views of a larger gather of at most 256 KiB (16 MiB on other devices than the CPU);
    do not rely on their memory. Rows that are changed while an iteration runs may be seen some batches
    later. What is gathered from pinned memory is pinned.

    Args:
        tensors: Tensors or arrays (or dicts of them) of shape (rows, …), with equal numbers of rows.
        batch_size: Rows per batch.
        shuffle: Whether each iteration takes the rows in a new random order.
        drop_last: Whether to leave out a last batch that is not full.
        seed: Decides the orders: iteration ``epoch`` depends on ``(seed, epoch)`` alone. Without
            one they are drawn from torch's global generator (which a `Learner` starts from its own
            seed at each epoch).

    Raises:
        DataError: No rows, differing numbers of rows, or no full batch with `drop_last`.

    Example:
        >>> loader = TensorBatches(torch.arange(5), batch_size=2)
        >>> [batch.tolist() for batch in loader], len(loader)
        ([[0, 1], [2, 3], [4]], 3)
    """

    draws_at_fetch = False
    """Its fetches draw no random numbers: only starting an iteration does."""

    def __init__(
        self,
        *tensors: Any,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        tensors = tuple(map(as_plain, tensors))
        if not tensors:
            raise DataError("no tensor was given; expected TensorBatches(xs, ys, batch_size=32)")
        if not is_number(batch_size, whole=True) or batch_size < 1:
            raise DataError(f"batch_size={batch_size!r} was given; expected a number of rows, 1 or more")
        if seed is not None:
            check_number("TensorBatches", "seed", seed, least=0, whole=True, error=DataError)
        self.data = as_tensors(tensors[0] if len(tensors) == 1 else tensors)
        self.num_rows = count_rows(self.data)
        self.batch_size = int(batch_size)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.epoch = 0
        """Number of the next iteration: with a seed it decides the order."""
        if self.num_rows == 0:
            raise DataError("the tensors have no rows; expected at least one")
        if len(self) == 0:
            raise DataError(
                f"{self.num_rows} rows make no full batch of {batch_size}; expected a smaller "
                "batch_size, or drop_last=False"
            )

    def set_epoch(self, epoch: int) -> None:
        """Say which iteration comes next, as ``DistributedSampler.set_epoch`` does."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches."""
        full, rest = divmod(self.num_rows, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[Any]:
        return self.from_batch(0)

    def from_batch(self, first: int, share: Share | None = None) -> Iterator[Any]:
        """Begin an iteration at a batch, from 0: the order is that of a whole one, or a process's share of it."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        data, leaves = self.data, list(tensors(self.data))
        start, stop = first * self.batch_size, len(self) * self.batch_size if self.drop_last else self.num_rows
        # each chunk has the same batches of every leaf; between chunks no Python runs for a tensor or a flat tuple
        if share is not None:
            chunks = self._shared(leaves, epoch, first, share)
        elif self.shuffle:
            chunks = self._gathered(leaves, self._order(epoch)[start:stop])
        else:
            chunks = self._views(leaves, start, stop)
        if isinstance(data, Tensor):
            return chain.from_iterable(batches for (batches,) in chunks)
        rows = chain.from_iterable(zip(*chunk, strict=True) for chunk in chunks)
        if type(data) is tuple and len(data) == len(leaves):
            return rows
        return (_rebuild(data, iter(row)) for row in rows)

    def _shared(self, leaves: list[Tensor], epoch: int, first: int, share: Share) -> Iterator[list[Sequence[Tensor]]]:
        order = self._order(epoch) if self.shuffle else None
        share.compare([] if order is None else order[: self.batch_size].tolist())
        ranges = share.ranges(self.num_rows, self.batch_size, self.drop_last)[first:]
        if order is None:
            return ([(leaf[rows],) for leaf in leaves] for rows in ranges)
        # All but the last have batch_size rows, so that they can be cut again where they are gathered
        return self._gathered(leaves, torch.cat([order[rows] for rows in ranges]) if ranges else order[:0])

    def _views(self, leaves: list[Tensor], start: int, stop: int) -> Iterator[list[Sequence[Tensor]]]:
        size = self.batch_size
        at_once = AT_ONCE if all(map(_is_packed, leaves)) else 1
        for first in range(start, stop, at_once * size):
            rows = slice(first, min(first + at_once * size, stop))
            if at_once == 1:
                yield [(leaf[rows],) for leaf in leaves]
            else:
                yield [leaf[rows].split(size) for leaf in leaves]  # type: ignore[no-untyped-call]  # torch has no types there

    def _gathered(self, leaves: list[Tensor], order: Tensor) -> Iterator[list[Sequence[Tensor]]]:
        size, at_once = self.batch_size, self._at_once(leaves)
        gathers = [_gather(leaf) for leaf in leaves]
        for first in range(0, len(order), size * at_once):
            rows = order[first : first + size * at_once]
            if at_once == 1:
                yield [(gather(rows),) for gather in gathers]
            else:
                with torch.inference_mode(False):  # some of the batches may be asked for outside it
                    gathered = [gather(rows) for gather in gathers]
                yield [chunk.unsafe_split(size) for chunk in gathered]  # each may be changed, whatever the others do

    def _at_once(self, leaves: list[Tensor]) -> int:
        """Return how many batches are gathered at once."""
        # One by one where a tensor requires a gradient, is of a subclass, or has other strides than a new one; and
        # where a batch would not begin at a multiple of 64 bytes, as a tensor of its own does: the last bits of a
        # product of matrices may depend on it.
        if not all(map(_is_packed, leaves)):
            return 1
        sizes = [self.batch_size * leaf[:1].nbytes for leaf in leaves]
        if any(size % ALIGNMENT for size in sizes):
            return 1
        ahead = AHEAD if leaves[0].device.type == "cpu" else AHEAD_ELSEWHERE
        return max(1, min(AT_ONCE, ahead // max(1, sum(sizes))))

    def _order(self, epoch: int) -> Tensor:
        generator = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "TensorBatches", epoch))
        order = torch.randperm(self.num_rows, generator=generator, device="cpu")
        return order.to(next(tensors(self.data)).device)

    def __repr__(self) -> str:
        return (
            f"TensorBatches({self.num_rows} rows, batch_size={self.batch_size}, shuffle={self.shuffle}, "
            f"drop_last={self.drop_last}, seed={self.seed})"
        )


class Divided:
    """Base of what is a process's share of a source, in a loop of the user's own.

    Attributes:
        source: The source.
    """

    source: Iterable[Any]


def as_dataloader(data: Any, batch_size: int = 32, shuffle: bool = False, **options: Any) -> Iterable[Any]:
    """Make an iterable of batches from nearly anything.

    Tensors and arrays, tuples and dicts of them become `TensorBatches`; a ``Dataset`` becomes a
    ``DataLoader``, and so does what only behaves like one (rows by number); an iterable of batches
    (a ``DataLoader``, a list of batches, a generator, a pipeline of webdataset with ``batched``) is
    returned as it is, or run without batching it again.

    Args:
        data: What to load. In a tuple or dict all leaves have the same number of rows.
        batch_size: Rows per batch.
        shuffle: Whether each epoch takes the rows in a new order.
        options: ``drop_last`` and ``seed`` for tensors; any option of ``DataLoader`` for datasets.

    Raises:
        DataError: The data cannot be loaded, or an option does not apply to it.

    Example:
        >>> xs, ys = torch.zeros(100, 4), torch.zeros(100)
        >>> len(as_dataloader((xs, ys))), len(as_dataloader((xs, ys), batch_size=10))
        (4, 10)
    """
    if isinstance(data, Divided):  # a learner divides it itself
        return data.source
    if not isinstance(shuffle, bool):
        raise DataError(f"as_dataloader(shuffle={shuffle!r}) was given; expected True or False")
    if isinstance(data, IterableDataset):
        if shuffle:
            raise DataError(
                "shuffle=True was given for an IterableDataset; its order is its own: shuffle inside it, "
                "and leave shuffle out"
            )
        made_by = _batches_itself(data)
        if made_by and batch_size != 32:
            raise DataError(
                f"batch_size={batch_size} was given for {describe(data)}, whose {made_by} makes batches already; "
                "expected the size there, or rows here"
            )
        if made_by == "DataLoader" and not options:
            return data
        return _loader(data, batch_size=None if made_by else batch_size, **options)
    if isinstance(data, Dataset):
        return _loader(data, batch_size=batch_size, shuffle=shuffle, **options)
    if isinstance(data, (Tensor, Mapping, tuple)) or hasattr(data, "__array__"):
        unknown = sorted(set(options) - {"drop_last", "seed"})
        if unknown:
            raise DataError(
                f"{unknown} were given for tensors in memory, which take drop_last and seed; for "
                "DataLoader's options give a Dataset, e.g. torch.utils.data.TensorDataset(xs, ys)"
            )
        return TensorBatches(data, batch_size=batch_size, shuffle=shuffle, **options)
    if _is_map_style(data):
        return _loader(data, batch_size=batch_size, shuffle=shuffle, **options)
    if options or shuffle or batch_size != 32:
        raise DataError(
            f"options were given for {describe(data)}, which already makes batches; expected them "
            "where it is made, or tensors or a Dataset here"
        )
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return data
    raise DataError(
        f"{describe(data)} was given as data; expected tensors or arrays, a tuple or dict of them, "
        "a Dataset, or an iterable of batches such as a DataLoader"
    )


def _is_whole(data: Any) -> bool:
    """Return whether something is data by itself, and no batch: a loader, one made of others, or a data set."""
    return isinstance(data, (Dataset, DataLoader, TensorBatches)) or hasattr(data, "named_parts") or _is_map_style(data)


def _is_map_style(data: Any) -> bool:
    """Return whether something that is no ``Dataset`` is a map-style one: rows by number, several at once perhaps."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return False
    return not hasattr(data, "__iter__") or callable(getattr(data, "__getitems__", None))


def _batches_itself(data: Any) -> str | None:
    """Name what in a data set's pipeline, as webdataset's have, makes batches of its rows; None where nothing does."""
    made_by = None
    for stage in getattr(data, "pipeline", None) or ():
        name = getattr(getattr(stage, "f", stage), "__name__", "").lstrip("_")
        if isinstance(stage, DataLoader):
            made_by = "DataLoader"
        elif name in ("batched", "unbatched"):
            made_by = "batched" if name == "batched" else None
    return made_by


def _loader(data: Any, **options: Any) -> Iterable[Any]:
    """Make a DataLoader; raise for options that it does not know."""
    try:
        return DataLoader(data, **options)
    except TypeError as error:
        raise DataError(f"{describe(data)} was given with options that DataLoader does not take: {error}") from error


def split(data: Any, fraction: float, seed: int | None = None) -> tuple[Any, Any]:
    """Split rows at random into two parts, without replacement.

    Args:
        data: Tensors or arrays of shape (rows, …), a tuple or dict of them, or a map-style Dataset.
        fraction: Share of the rows in the second part, above 0 and below 1; at least one row goes
            to each part.
        seed: Decides the split; without one it is drawn from torch's global generator.

    Returns:
        ``(rest, part)``, in the structure of `data` (``Subset``s for a Dataset); rows keep their
        order within each part.

    Raises:
        DataError: The fraction leaves one part empty, or `data` cannot be split.

    Example:
        >>> train, valid = split((torch.zeros(10, 2), torch.arange(10)), 0.2, seed=0)
        >>> len(train[0]), len(valid[1])
        (8, 2)
    """
    if not is_number(fraction) or not 0 < fraction < 1:
        raise DataError(f"fraction={fraction!r} was given; expected a share above 0 and below 1, e.g. 0.2")
    if seed is not None:
        check_number("split", "seed", seed, least=0, whole=True, error=DataError)
    dataset = (
        isinstance(data, Dataset)
        and not isinstance(data, IterableDataset)
        and hasattr(data, "__getitem__")
        and isinstance(data, Sized)
    )
    if not dataset and (isinstance(data, (DataLoader, TensorBatches, Dataset)) or not _splittable(data)):
        raise DataError(
            f"{describe(data)} cannot be split by rows; expected tensors, arrays, a tuple or dict of "
            "them, or a Dataset with a length: split it before making a loader"
        )
    rows = len(data) if dataset else count_rows(data := as_tensors(data))
    if rows < 2:
        raise DataError(f"{rows} rows cannot be split; expected 2 or more")
    generator = None if seed is None else torch.Generator().manual_seed(stream_seed(seed, "split"))
    order = torch.randperm(rows, generator=generator)
    size = min(max(round(rows * fraction), 1), rows - 1)
    part, rest = order[:size].sort().values, order[size:].sort().values
    if dataset:
        return Subset(data, rest.tolist()), Subset(data, part.tolist())
    first, second = (map_tensors(lambda t, rows=chosen: t[rows], data) for chosen in (rest, part))  # type: ignore[misc]  # mypy: default in lambda
    return first, second


def overfit(data: Any, batches: int = 1) -> list[Any]:
    """Take the first batches of data, to train on nothing else: what cannot learn them has a mistake.

    They are read once, so every epoch has the same rows in the same order: ``data=(overfit(train),)``.
    The global random generators are put back.

    Args:
        data: Anything `as_dataloader` takes.
        batches: How many; where there are fewer, all.

    Raises:
        ValueError: `batches` is less than 1.
        DataError: There is no batch.

    Example:
        >>> batches = overfit((torch.zeros(100, 4), torch.zeros(100)), batches=2)
        >>> len(batches), [tuple(part.shape) for part in batches[0]]
        (2, [(32, 4), (32,)])
    """
    if batches < 1:
        raise ValueError(f"overfit(batches={batches!r}) was given; expected 1 or more")
    with preserved():
        taken = list(islice(as_dataloader(data), batches))
    if not taken:
        raise DataError(f"overfit was given {describe(data)}, which gave no batch; expected at least one")
    return taken


def _splittable(data: Any) -> bool:
    return isinstance(data, (Tensor, Mapping, tuple)) or hasattr(data, "__array__")


def name_data(data: Any) -> State:
    """Name what was given as data: ``(train,)``, ``(train, valid)``, a mapping, or training data alone.

    A list of loaders or data sets is read as a tuple of them (configurations know no tuples); any other is one of
    batches. What holds rows becomes a loader with batches of 32, shuffled for ``"training"``.

    Raises:
        DataError: A tuple of another length, or something that cannot be loaded.
    """
    data = as_plain(data)
    if isinstance(data, list) and data and all(map(_is_whole, data)):
        data = tuple(data)
    if isinstance(data, dict):
        named = dict(data)
    elif isinstance(data, tuple):
        if len(data) > 2:
            raise DataError(
                f"data is a tuple of {len(data)}; expected (train,), (train, valid), or a mapping of names to "
                "data. For two tensors per row write data=((xs, ys), (valid_xs, valid_ys))"
            )
        named = dict(zip(("training", "validation"), data, strict=False))
    else:
        named = {"training": data}
    for key, source in named.items():
        if not isinstance(key, str) or not key.isidentifier() or iskeyword(key):
            raise DataError(
                f"data has the key {key!r}; expected a name such as 'training', to stand behind 'learner.data.'"
            )
        try:
            named[key] = load(source, key)
        except DataError as error:
            annotate(error, f"fluxloop: while loading data[{key!r}]")
            raise
    return State(named)


def load(source: Any, key: str) -> Iterable[Any]:
    """Make a loader of the data for a phase's key: rows are shuffled for ``"training"`` alone."""
    return as_dataloader(source, shuffle=key == "training" and holds_rows(source))


def holds_rows(source: Any) -> bool:
    """Return whether `source` holds rows in a known order, to be cut into batches and shuffled."""
    if isinstance(source, Dataset):
        return not isinstance(source, IterableDataset)
    return isinstance(source, (tuple, dict)) or hasattr(source, "__array__") or _is_map_style(source)
