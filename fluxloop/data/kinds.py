"""Kinds of sources: what can be gone on with from any batch, what keeps its place itself, what is made of others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from fluxloop.data.copies import EARLY
from fluxloop.data.generators import private_generators
from fluxloop.data.indices import Numbers
from fluxloop.data.loaders import TensorBatches
from fluxloop.persist.plain import is_stateful

if TYPE_CHECKING:
    from fluxloop.data.share import Share


class Combined(ABC):
    """Base of sources that are made of others.

    Attributes:
        parts: The others.
    """

    parts: list[Any]

    @abstractmethod
    def named_parts(self) -> list[tuple[str, Any]]:
        """List the parts with their names."""

    @abstractmethod
    def begin(self, numbers: Numbers, epoch: int | None, running: Any, share: Share | None = None) -> Iterator[Any]:
        """Begin a pass, or go on with one from what its ``place(name)`` returned; `share`: a process's part of it."""

    @abstractmethod
    def length(self, lengths: list[int | None]) -> int | None:
        """Return the number of batches from those of the parts; None where nobody knows it."""


def parts_of(source: Any) -> list[Any]:
    """List the parts of a source that is made of others; none of any other."""
    return source.parts if isinstance(source, Combined) else []


def is_loader(source: Any) -> bool:
    """Return whether a source is a ``DataLoader`` over map-style data that iterates as torch's do."""
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
        return False
    # By the module of its __iter__: a subclass with one of its own may give other batches than its samplers say. A
    # loader of torchdata whose data set has a state keeps its place by that state.
    module = str(getattr(type(source).__iter__, "__module__", "")).split(".")[0]
    return module in ("torch", "torchdata") and not (module == "torchdata" and is_stateful(source.dataset))


def can_skip(source: Any) -> bool:
    """Return whether a source can be iterated from any batch on."""
    return isinstance(source, (TensorBatches, list, tuple)) or (is_loader(source) and not draws_in_workers(source))


def draws_in_workers(source: DataLoader[Any]) -> bool:
    """Return whether a dataset draws, in workers, from generators of its own; workers alone know where they stand."""
    return bool(source.num_workers and private_generators(source, samplers_too=False))


def keeps_place(source: Any) -> bool:
    """Return whether a source keeps its place itself, and says it in ``state_dict()``."""
    return not can_skip(source) and is_stateful(source) and not draws_order_anew(source)


def drop_early_iterator(source: Any) -> bool:
    """Drop the iterator that a loader whose order is in no state has made before a pass, so that all begin alike.

    One of torchdata's makes it before the first pass, to have something to say in ``state_dict()``, and accelerate's
    ask for that when they are made. It has drawn by then what others draw as they begin. The first pass of a run that
    goes on after an epoch is to have the order that it has in a run that was never ended.

    Returns:
        Whether passes begin alike now. With workers, which draw too, the iterator is left as it is.
    """
    loader = getattr(source, "base_dataloader", source)
    is_early = getattr(loader, EARLY, False)
    if loader.num_workers:
        return not (is_early or loader.persistent_workers)
    if is_early and not getattr(loader._iterator, "_num_yielded", 0):
        loader._iterator = None
        setattr(loader, EARLY, False)
    return True


def draws_order_anew(source: Any) -> bool:
    """Return whether a loader with a ``state_dict`` would go on with other rows: its order is in no state.

    So it is with a ``RandomSampler`` of torch's in a ``StatefulDataLoader``, which is what accelerate makes of a
    shuffled loader: torchdata counts what was drawn, and draws a new order from the global generator.
    """
    loader = getattr(source, "base_dataloader", source)  # accelerate keeps the loader there
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return type(sampler) is RandomSampler and sampler.generator is None and is_stateful(loader)
