"""The things that a walk reaches: which kinds there are, and what each of them holds.

A thing holds values in *slots*, each named by what is typed after the thing to get the value: ``".name"`` is an
attribute, ``"[0]"`` an item, ``".__class__.name"`` an attribute of the class.
"""

from __future__ import annotations

import io
import logging
import random
import socket
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fluxloop.persist.attributes import OF_EVERY_MODULE, attributes
from fluxloop.persist.plain import NUMBERS, SCALARS, is_numpy_generator, is_stateful
from fluxloop.persist.shares import has_more_than_its_pair, left_to_the_pair, library
from fluxloop.state import PhaseDict

LONG = 1_000
"""From how many items on a walk does not go into a container; items that are no plain data are compared by identity."""

_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.Event, threading.Condition)
RESOURCES = (*_LOCKS, threading.Semaphore, io.IOBase, socket.socket, subprocess.Popen)
"""Types of what belongs to a process: a walk leaves an object that holds one as it is."""
_CONSTANT = (type, ModuleType, logging.Logger, logging.Handler, logging.Filterer, weakref.ref, torch.Stream, Enum)
_CHANGEABLE = {"tensor", "array", "list", "dict", "set", "deque", "generator"}
_NO_SLOTS = {"tensor", "array", "generator", "set", "phases", "iterator", "resource"}
SLOTTED = {"object", "part", "module", "pair", "partial", "method", "function", "loader"}
"""Kinds that are compared slot by slot."""
SETTABLE = {"object", "part", "module", "pair", "partial"}
"""Kinds whose slots can be set."""
VALUES = {"list", "dict", "deque", "set", "tensor", "array"}
"""Kinds that are what they hold: another one that holds the same may take their place."""


def kind_of(value: Any) -> str:
    """Return how a walk treats a value: "" for a constant, and for what cannot be gone into."""
    kind = type(value)
    if kind in NUMBERS or isinstance(value, (*SCALARS, *_CONSTANT, PurePath, range)):
        return ""
    for types, name in _KINDS:
        if isinstance(value, types):
            return name
    if kind.__module__.partition(".")[0] == "numpy":
        return "generator" if is_numpy_generator(value) else "array" if hasattr(value, "tobytes") and value.ndim else ""
    if isinstance(value, FunctionType):
        return "function" if value.__closure__ else ""
    for is_kind, name in _OBJECTS:  # in this order: a module has the pair too, a file is an iterator too
        if is_kind(value):
            return name
    return ""


_KINDS: tuple[tuple[Any, str], ...] = (
    (Tensor, "tensor"),
    (list, "list"),
    (tuple, "tuple"),
    (dict, "dict"),
    (PhaseDict, "phases"),
    (set, "set"),
    (frozenset, ""),
    (deque, "deque"),
    ((torch.Generator, random.Random), "generator"),
    (partial, "partial"),
    (MethodType, "method"),
    (DataLoader, "loader"),
)


def _is_resource(value: Any) -> bool:
    return isinstance(value, RESOURCES) or type(value).__module__.partition(".")[0] in ("multiprocessing", "_thread")


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") or next(_slot_names(type(value)), None) is not None


def _slot_names(kind: type) -> Iterator[str]:
    return (name for cls in kind.__mro__ for name in cls.__dict__.get("__slots__", ()) if name != "__weakref__")


_OBJECTS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (_is_resource, "resource"),
    (lambda value: isinstance(value, nn.Module), "module"),
    (is_stateful, "pair"),
    (lambda value: callable(getattr(type(value), "__next__", None)), "iterator"),
    (_has_attributes, "object"),
)


class Thing:
    """Something that a walk has reached, and what it was at first.

    Attributes:
        thing: The object, container, tensor or generator.
        kind: How a walk treats it: see `kind_of`; ``"part"`` is a part of a model.
        root: The root from which the walk reached it first.
        key: Its path below the root.
        first: What it held, as plain data; for what has slots, slot by slot, and under "" the state of its pair.
        raw: The very items it held: where they are the same, nothing has changed.
        changes: The number of in-place changes to a tensor that PyTorch had counted.
        untouched: The path of an object that is left as it is, where the walk came through one; else None.
    """

    __slots__ = ("changes", "first", "key", "kind", "raw", "root", "thing", "untouched")

    def __init__(self, thing: Any, kind: str, root: str, key: str, untouched: str | None) -> None:
        self.thing, self.kind, self.root, self.key, self.untouched = thing, kind, root, key, untouched
        self.changes = thing._version if kind == "tensor" else 0
        self.first: Any = None
        self.raw: Any = None


# What a thing holds


def slots_of(met: Thing) -> dict[str, Any]:
    """Return what a thing holds, by slot."""
    thing, kind = met.thing, met.kind
    if kind in _NO_SLOTS:
        return {}
    if kind in ("list", "tuple", "deque"):
        return {} if is_long(thing) else {f"[{index}]": item for index, item in enumerate(thing)}
    if kind == "dict":
        return {} if is_long(thing) else {f"[{key!r}]": item for key, item in thing.items()}
    if kind == "partial":
        return {".func": thing.func, ".args": thing.args, ".keywords": thing.keywords}
    if kind == "method":
        return {".__self__": thing.__self__}
    if kind == "function":
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=False)
        return {f".__closure__.{name}": cell.cell_contents for name, cell in cells if cell != CellType()}
    if kind == "loader":
        names = ("dataset", "collate_fn", "sampler", "batch_sampler", "generator")
        return {f".{name}": getattr(thing, name, None) for name in names}
    return _attributes_of(met)


def is_long(thing: Any) -> bool:
    """Return whether a container has so many items that a walk does not go into it."""
    return len(thing) > LONG


def _attributes_of(met: Thing) -> dict[str, Any]:
    """Return the attributes of an object that a checkpoint is to keep, with those of its class that may change."""
    thing, kind = met.thing, met.kind
    given = getattr(type(thing), "transient", ())
    left_out = {*given} if isinstance(given, (tuple, list, set, frozenset)) else set()
    if kind in ("part", "module"):
        left_out |= {"_initialize_hook", "_load_hook"}  # of a lazy module, until it knows its shapes
        left_out |= OF_EVERY_MODULE - ({"training"} if kind == "module" else set())
    if kind == "pair":
        cls: Any = type(thing)
        if not has_more_than_its_pair(cls):
            return {}
        left_out |= left_to_the_pair(cls)
    found = {
        f".{name}": value
        for name, value in attributes(thing).items()
        if name not in left_out and not name.startswith("__")
    }
    if kind == "module":
        found.update((f".{name}", part) for name, part in thing._modules.items() if part is not None)
    if kind == "pair":
        return {label: value for label, value in found.items() if kind_of(value) not in ("function", "method")}
    if kind == "object":
        found.update((f".__class__.{n}", v) for n, v in _of_class(type(thing)).items() if n not in left_out)
    return found


def _of_class(kind: type) -> dict[str, Any]:
    """Return what a user's classes share between their instances and may change: numbers and containers."""
    found: dict[str, Any] = {}
    for cls in kind.__mro__:
        if not library(cls.__module__):
            for name, value in vars(cls).items():
                if not name.startswith("__") and (type(value) in NUMBERS or kind_of(value) in _CHANGEABLE):
                    found.setdefault(name, value)
    return found


def items_in(met: Thing) -> Any:
    """Return the very items that a thing holds, to compare them by identity."""
    if met.kind in ("list", "deque"):
        return list(met.thing)
    if met.kind == "dict":
        return [*met.thing, *met.thing.values()]
    if met.kind == "set":
        return set(met.thing)
    slots = slots_of(met)
    return [*slots, *slots.values()]


def set_slot(met: Thing, label: str, value: Any) -> None:
    """Have a thing hold a value in a slot, where it can."""
    thing, name = met.thing, label.rpartition(".")[2]
    if met.kind == "partial":
        parts = {".func": thing.func, ".args": thing.args, ".keywords": thing.keywords, label: value}
        # Its attributes are read-only; this is how unpickling sets them, in place: others may hold the same partial
        thing.__setstate__((parts[".func"], parts[".args"], parts[".keywords"], vars(thing)))
    elif label.startswith(".__class__."):
        owner = next(cls for cls in type(thing).__mro__ if name in vars(cls))
        setattr(owner, name, value)
    elif met.kind in SETTABLE:
        object.__setattr__(thing, name, value)  # also of a frozen class, and past a __setattr__ that does more


def remove_slot(met: Thing, label: str) -> None:
    """Remove an attribute that was not there at first."""
    if met.kind in SETTABLE and not label.startswith(".__class__."):
        object.__delattr__(met.thing, label.rpartition(".")[2])
