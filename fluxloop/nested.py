"""Nested data: tensors inside tuples, lists, dicts, named tuples, dataclasses and attrs classes."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from operator import is_
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fluxloop.guard.given import is_number


def init_fields(value: Any) -> dict[str, str] | None:
    """Name the init fields of a dataclass or attrs instance and their arguments; None for anything else."""
    if isinstance(value, type):
        return None
    if attrs.has(type(value)):
        return {field.name: field.alias or field.name for field in attrs.fields(type(value)) if field.init}
    if dataclasses.is_dataclass(value):
        return {field.name: field.name for field in dataclasses.fields(value) if field.init}
    return None


def _with_fields(value: Any, new: dict[str, Any]) -> Any:
    """Copy a dataclass or attrs instance with other values for its fields."""
    return attrs.evolve(value, **new) if attrs.has(type(value)) else dataclasses.replace(value, **new)


def _with_items(value: Any, items: Any) -> Any:
    """Copy a tuple, list or mapping with other items; a read-only copy becomes what it stands for.

    Raises:
        TypeError: Its class gives no copy with other items.
    """
    kind = getattr(value, "__stands_for__", type(value))
    if kind in (list, tuple, dict):
        return kind(items)
    try:
        return _copied(value, kind, items)
    except Exception:  # it may refuse in any way
        try:
            return kind(items)
        except Exception as error:
            raise TypeError(
                f"a {kind.__name__} gives no copy with other tensors in it ({type(error).__name__}: {error}); expected "
                "a dict, list or tuple of the tensors, or a class that can be copied and changed item by item"
            ) from error


def _copied(value: Any, kind: Any, items: Any) -> Any:
    """Copy a container of a class of its own; attributes beside its items stay."""
    if isinstance(value, Mapping):
        if not isinstance(value, (dict, UserDict)):  # a plain copy may share its items with the original
            # a TensorDict made of its items alone has no rows
            return kind(items, batch_size=value.batch_size) if hasattr(value, "batch_size") else kind(items)
        changed = copy.copy(value)
        for key, item in items.items():  # some refuse update()
            changed[key] = item
        return changed
    if hasattr(kind, "_make"):
        return kind._make(items)
    if isinstance(value, list):
        new = copy.copy(value)
        new[:] = items
        return new
    if not hasattr(value, "__dict__"):  # such as the tuples that torch's functions return
        return kind(items)
    made = tuple.__new__(kind, items)
    vars(made).update(vars(value))
    return made


def map_tensors(change: Callable[[Tensor], Tensor], value: Any, others: Callable[[Any], Any] | None = None) -> Any:
    """Rebuild `value` with every tensor in it replaced by ``change(tensor)``.

    Containers keep their type; one in which nothing changed is returned as it is, and so is
    anything else that is no tensor.

    Args:
        change: Gives what stands in place of a tensor.
        value: Anything.
        others: Gives what stands in place of what is neither a tensor nor a tuple, list or mapping; left out, such
            a thing stays, and dataclasses and attrs classes are rebuilt.

    Raises:
        TypeError: A container of a class of its own gives no copy with other items.

    >>> map_tensors(lambda t: t + 1, {"x": torch.zeros(2), "name": "a"})
    {'x': tensor([1., 1.]), 'name': 'a'}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):  # its batch sizes stay on the CPU
        orders = (value.sorted_indices, value.unsorted_indices)
        return PackedSequence(change(value.data), value.batch_sizes, *(map_tensors(change, order) for order in orders))
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item, others) for item in value]
        return value if all(map(is_, items, value)) else _with_items(value, items)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(change, item, others) for key, item in value.items()}
        return value if all(changed[key] is value[key] for key in changed) else _with_items(value, changed)
    if others is not None and (other := others(value)) is not value:
        return other
    fields = init_fields(value)
    if fields is not None:
        new = {name: map_tensors(change, getattr(value, name), others) for name in fields}
        if any(new[name] is not getattr(value, name) for name in fields):
            return _with_fields(value, {argument: new[name] for name, argument in fields.items()})
    return value


def move_object(value: Any, device: torch.device) -> Any:
    """Move an object with a ``to(device)`` of its own; return anything else as it is.

    Batches of graphs and of one's own have one; modules, which are placed once, are left alone.
    """
    if isinstance(value, (nn.Module, type)) or not callable(getattr(type(value), "to", None)):
        return value
    moved = value.to(device)
    return value if moved is None else moved  # some move in place


def contents(value: Any) -> Any:
    """Return what is in a value, to compare it with what is in it later: which tensors, and the values of all else.

    >>> held = {"x": torch.zeros(2), "name": "a"}
    >>> before = contents(held)
    >>> held["x"] = held["x"] + 1
    >>> contents(held) == before
    False
    """
    if isinstance(value, Tensor):
        return Tensor, id(value)
    if isinstance(value, Mapping):
        return type(value), tuple((key, contents(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(contents(item) for item in value)
    fields = init_fields(value)
    if fields is not None:
        return type(value), tuple(contents(getattr(value, name)) for name in fields)
    return type(value), value


def tensors(value: Any) -> Iterator[Tensor]:
    """Return the tensors inside `value`, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    else:
        for name in init_fields(value) or ():
            yield from tensors(getattr(value, name))


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is sharded as a whole, in all processes, which have to call this together; others stay."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(value: Tensor, like: Any) -> Tensor:
    """Return this process's part of a whole tensor as a tensor that is sharded as another one is.

    Args:
        value: The whole tensor; one that is sharded, or of another shape, stays as it is.
        like: The other one; where that is whole, the tensor stays too.
    """
    if not hasattr(like, "to_local") or hasattr(value, "to_local") or value.shape != like.shape:
        return value
    part, mesh = value.detach(), like.device_mesh
    for place, placement, number in zip(mesh.get_coordinate(), like.placements, mesh.shape, strict=True):
        if placement.is_shard():
            length = -(-like.shape[placement.dim] // number)
            begin = min(place * length, like.shape[placement.dim])
            part = part.narrow(placement.dim, begin, min(length, like.shape[placement.dim] - begin))
    made: Tensor = type(like.data).from_local(
        part.to(like.device, copy=True), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


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
        return _with_items(first, [concatenate(list(column)) for column in zip(*parts, strict=True)])
    if isinstance(first, Mapping):
        return _with_items(first, {key: concatenate([part[key] for part in parts]) for key in first})
    fields = init_fields(first)
    if fields is not None:
        return _with_fields(
            first, {arg: concatenate([getattr(part, name) for part in parts]) for name, arg in fields.items()}
        )
    return parts


def as_written(model: Any) -> Any:
    """Return the module that ``torch.compile(model)`` wraps, whose class and ``forward`` say more; else what was given.

    The wrapper's own ``forward`` says that it takes anything, and its class has none.
    """
    while isinstance(model, nn.Module) and "dynamo_ctx" in vars(model):  # private names, of copies too
        model = model._modules["_orig_mod"]
    return model


def call_with(function: Any, xs: Any) -> Any:
    """Call a model, or a function of one, with inputs; a dict is given by name where its names are arguments.

    Args:
        function: What is called.
        xs: Its input.
    """
    return function(**xs) if fits_by_name(function, xs) else function(xs)


def fits_by_name(function: Any, xs: Any) -> bool:
    """Return whether inputs are a dict whose names are arguments of a model's ``forward``, or of a function."""
    if not isinstance(xs, Mapping) or not all(isinstance(name, str) for name in xs):
        return False
    written = as_written(function)
    try:
        signature(getattr(written, "forward", written)).bind(**xs)
    except (TypeError, ValueError):  # it takes other names, or says none
        return False
    return True


def arguments_among(function: Any, xs: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what in a dict of inputs has the name of an argument of a model's ``forward``, or of a function."""
    written = as_written(function)
    try:
        known = signature(getattr(written, "forward", written)).parameters
    except (TypeError, ValueError):  # it says none
        return {}
    return {name: value for name, value in xs.items() if name in known}


def weight_of(phase: Any, state: Any) -> Any:
    """Return what a phase says that a step weighs; where it says nothing, the number of the step's rows.

    An attribute `weight` that is a number says nothing of steps. Without a phase it is the rows too.
    """
    weigh = getattr(type(phase), "weight", None)
    return weigh(phase, state) if callable(weigh) else batch_size(vars(state))


def batch_size(entries: Mapping[str, Any]) -> int:
    """Return the number of rows of a step, as its first entry that has rows tells it.

    A tensor has as many rows as its first dimension is long. A list holds a row per item: the
    images of a batch that differ in size. Where another entry has as many rows as each tensor in
    the list, the list holds several views of these rows instead, as a tuple of tensors does. Of
    the items of a mapping, or the fields of a dataclass, the number that most of them have counts.
    An object of another class, such as a batch of graphs, says its rows by an attribute ``batch_size``.

    Returns 1 where no entry has rows.

    >>> batch_size({"xs": torch.zeros(32, 4), "ys": torch.zeros(32)})
    32
    >>> batch_size({"images": [torch.zeros(3, 8, 9), torch.zeros(3, 9, 9)], "ys": torch.zeros(2)})
    2
    """
    for name, entry in entries.items():
        if type(entry) is Tensor and entry.ndim:
            return entry.size(0)
        rows = _rows(entry)
        if rows is None:
            continue
        if isinstance(entry, list):
            inside = {len(item) for item in entry if isinstance(item, Tensor) and item.ndim}
            others = (_rows(other) for key, other in entries.items() if key != name)
            if len(inside) == 1 and next((number for number in others if number is not None), rows) in inside:
                return inside.pop()
        return rows
    return 1


def _rows(value: Any) -> int | None:
    """Return how many rows a value has; None where it has none."""
    if isinstance(value, Tensor):
        return value.size(0) if value.ndim else None
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, list):
        return len(value) or None
    if isinstance(value, tuple):
        for item in value:
            rows = _rows(item)
            if rows is not None:
                return rows
        return None
    names = () if isinstance(value, Mapping) else init_fields(value)
    if names is None:
        said = None if isinstance(value, (nn.Module, type)) else getattr(value, "batch_size", None)
        number: Any = said if is_number(said, whole=True) else 0
        return int(number) if number > 0 else None
    parts = value.values() if isinstance(value, Mapping) else (getattr(value, name) for name in names)
    numbers = [rows for part in parts if (rows := _rows(part)) is not None]
    return max(numbers, key=numbers.count) if numbers else None
