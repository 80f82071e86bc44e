"""Nested data: tensors inside tuples, lists, dicts, named tuples, dataclasses and attrs classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor


def _fields(value: Any) -> list[str] | None:
    """Names of the init fields of a dataclass or attrs instance; None for anything else."""
    if isinstance(value, type):
        return None
    if attrs.has(type(value)):
        return [field.name for field in attrs.fields(type(value)) if field.init]
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if field.init]
    return None


def _kind(value: Any) -> Any:
    """Give the type that a changed copy of a container has: its own, or the one a read-only copy stands for."""
    return getattr(value, "__stands_for__", type(value))


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Rebuild `value` with every tensor in it replaced by ``change(tensor)``.

    Containers keep their type; one in which nothing changed is returned as it is, and so is
    anything else that is no tensor.

    >>> map_tensors(lambda t: t + 1, {"x": torch.zeros(2), "name": "a"})
    {'x': tensor([1., 1.]), 'name': 'a'}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return _kind(value)(items)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(change, item) for key, item in value.items()}
        if all(changed[key] is value[key] for key in changed):
            return value
        return _kind(value)(changed)
    names = _fields(value)
    if names is not None:
        new = {name: map_tensors(change, getattr(value, name)) for name in names}
        if all(new[name] is getattr(value, name) for name in names):
            return value
        if attrs.has(type(value)):
            return attrs.evolve(value, **{name.lstrip("_"): item for name, item in new.items()})
        return dataclasses.replace(value, **new)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Give the tensors inside `value`, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    else:
        for name in _fields(value) or ():
            yield from tensors(getattr(value, name))


def concatenate(parts: list[Any]) -> Any:
    """Join batches along their first dimension, leaf by leaf.

    All parts have the same structure. Tensors are concatenated (scalars stacked); leaves that
    are no tensors are collected in a list.

    >>> concatenate([(torch.zeros(2), "a"), (torch.ones(1), "b")])
    (tensor([0., 0., 1.]), ['a', 'b'])
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.stack(parts) if first.ndim == 0 else torch.cat(parts)
    if isinstance(first, (tuple, list)):
        items = [concatenate(list(column)) for column in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else _kind(first)(items)
    if isinstance(first, Mapping):
        return _kind(first)({key: concatenate([part[key] for part in parts]) for key in first})
    names = _fields(first)
    if names is not None:
        new = {name: concatenate([getattr(part, name) for part in parts]) for name in names}
        if attrs.has(type(first)):
            return attrs.evolve(first, **{name.lstrip("_"): item for name, item in new.items()})
        return dataclasses.replace(first, **new)
    return parts


def batch_size(entries: Mapping[str, Any]) -> int:
    """Number of rows of a step: the length of the first tensor found in its entries.

    Returns 1 where no entry holds a tensor with a first dimension.

    >>> batch_size({"xs": torch.zeros(32, 4), "ys": torch.zeros(32)})
    32
    """
    for entry in entries.values():
        for tensor in (entry,) if isinstance(entry, Tensor) else tensors(entry):
            if tensor.ndim:
                return tensor.shape[0]
    return 1
