"""The walk over everything that a callback, a phase, a module, a loss function or a data set reaches.

`Walk` notes each object, container, tensor and random generator it reaches from its roots, by path, and
what it held at first. Later it gives what has changed, as plain data, and puts it back into the same
places: also of another learner, made by the same script. What it cannot keep it names by path.

A thing that was there at first is written as a reference to its path, so that what was shared is
shared again; one that has come since is written out where it is plain data. An object that has come
since has to be made by the script again, at the beginning of a fit: nothing in a checkpoint names a class.
"""

from __future__ import annotations

import copy
import dis
import io
import logging
import random
import socket
import subprocess
import threading
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from enum import Enum
from functools import cache, partial
from operator import is_
from pathlib import Path, PurePath
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fluxloop.errors import CheckpointError, warn_user
from fluxloop.persist.plain import (
    MARK,
    NUMBERS,
    SCALARS,
    attributes,
    class_name,
    from_plain,
    is_numpy_generator,
    is_simple,
    is_stateful,
    items_of,
    misplaced,
    of_entries,
    size,
    snapshot,
    to_plain,
)
from fluxloop.state import PhaseDict

State = dict[str, Any]

COPIED = 2**28
"""Up to how many bytes of tensors and arrays a walk copies, to put them back as they were at first."""
FEW = 2**20
"""The same for data sets, which may be large and seldom change."""
MOST = 100_000
"""How many things a walk goes into."""
MOST_OF_DATA = 5_000
"""The same for data sets."""
LONG = 1_000
"""From how many items on those of a container that are no plain data are compared by identity alone."""

_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.Event, threading.Condition)
RESOURCES = (*_LOCKS, threading.Semaphore, io.IOBase, socket.socket, subprocess.Popen)
"""What belongs to a process: an object that has one is left as it is."""
_CONSTANT = (type, ModuleType, logging.Logger, logging.Handler, logging.Filterer, weakref.ref, torch.Stream, Enum)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NO_SLOTS = {"tensor", "array", "generator", "set", "phases"}


class Is:
    """Stands for a value that is no plain data: equal to one of the same value."""

    __slots__ = ("path", "value")

    def __init__(self, value: Any, path: str) -> None:
        self.value = value
        self.path = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Is) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]  # compared only


def kind_of(value: Any) -> str:
    """Tell how a value is walked: "" where it is a constant, or nothing that can be gone into."""
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
    if isinstance(value, RESOURCES) or kind.__module__.partition(".")[0] in ("multiprocessing", "_thread"):
        return "resource"
    if isinstance(value, nn.Module):
        return "module"
    if is_stateful(value):
        return "pair"
    if callable(getattr(kind, "__next__", None)):
        return "iterator"
    return "object" if hasattr(value, "__dict__") or next(_slot_names(kind), None) is not None else ""


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


def _slot_names(kind: type) -> Iterator[str]:
    return (name for cls in kind.__mro__ for name in cls.__dict__.get("__slots__", ()) if name != "__weakref__")


class Thing:
    """Something that a walk has reached, and what it was at first.

    Attributes:
        thing: The object, container, tensor or generator.
        kind: How it is walked.
        root: The root from which it was reached first.
        key: Its path below the root.
        first: What it held, as plain data; for what has slots, slot by slot.
        raw: The very items it held: where they are the same, nothing has changed.
        untouched: The path of an object that is left as it is, where it was reached through one.
    """

    __slots__ = ("changes", "first", "key", "kind", "raw", "root", "thing", "untouched")

    def __init__(self, thing: Any, kind: str, root: str, key: str, untouched: str | None) -> None:
        self.thing, self.kind, self.root, self.key, self.untouched = thing, kind, root, key, untouched
        self.changes = thing._version if kind == "tensor" else 0
        self.first: Any = None
        self.raw: Any = None


class LostError(Exception):
    """A value cannot be kept; its path is the argument."""


class Walk:
    """What is reachable from roots, as it was when the walk was made.

    Args:
        roots: By the names under which they are kept.
        name: What they are called in messages.
        owner: Gives the name of a value that somebody else keeps (a model, an optimizer), None for others; the empty
            text where it has no name.
        data: Whether it is a data set, which is copied and gone into to a smaller extent.
        parts: Whether the roots are the parts of a model, of which the tensors are kept by others.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        name: str,
        owner: Callable[[Any], str | None] | None = None,
        data: bool = False,
        parts: bool = False,
    ) -> None:
        self.parts = parts
        self.name = name
        self._data = data
        self._left = FEW if data else COPIED
        self._most = MOST_OF_DATA if data else MOST
        self._things: list[Thing] = []
        self._by_id: dict[int, Thing] = {}
        self._beyond: dict[int, Any] = {}
        self._made: set[str] = set()
        self._noted: set[str] | None = None
        self._classes: dict[str, Any] = {}
        self._owner: Callable[[Any], str | None] = nobody
        self._memo: dict[int, str] = {}
        self._alive: list[Any] = []
        self._stands_for: dict[int, Any] = {}
        self._referred: set[tuple[str, str]] = set()
        self.roots: dict[str, Any] = {}
        self.join(roots, nobody if owner is None else owner)

    def join(self, roots: Mapping[str, Any], owner: Callable[[Any], str | None]) -> None:
        """Look at roots that are new, and at what they reach.

        Args:
            roots: By name; those that are known are left as they are.
            owner: As when the walk was made.
        """
        self._owner, first = owner, len(self._things)
        self.roots |= {name: thing for name, thing in roots.items() if self.roots.get(name) is not thing}
        for root, thing in self.roots.items():
            self._meet(thing, root, "", None)
        for met in self._things:  # grows while it is gone through
            slots = self._slots(met)
            if met.key and met.untouched is None and any(kind_of(value) == "resource" for value in slots.values()):
                met.untouched = self._where(met.root, met.key)
            for label, value in slots.items():
                untouched = met.untouched
                if met.kind == "function" and kind_of(value) in ("list", "dict", "set", "deque", "tuple"):
                    untouched = untouched or self._where(met.root, f"{met.key}{label}".lstrip("."))
                self._meet(value, met.root, f"{met.key}{label}".lstrip("."), untouched)
        self._paths = {(met.root, met.key): met for met in self._things}
        for met in self._things[first:]:
            self._look(met)
        self._owner = nobody

    def __deepcopy__(self, memo: dict[int, Any]) -> Walk:
        copied = copy.copy(self)
        memo[id(self)] = copied
        for name in ("roots", "_things", "_made"):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        copied._by_id = {id(met.thing): met for met in copied._things}
        copied._paths = {(met.root, met.key): met for met in copied._things}
        beyond = copy.deepcopy(list(self._beyond.values()), memo)
        copied._beyond = {id(value): value for value in beyond}
        return copied

    def complete_copy(self, copied: Walk, memo: dict[int, Any]) -> None:
        """Give what a copy of this walk has reached the gradients and hooks that PyTorch leaves out where it copies."""
        for met, twin in zip(self._things, copied._things, strict=True):
            if isinstance(met.thing, Optimizer):
                copy_attributes(met.thing, twin.thing, memo)
            elif isinstance(met.thing, Tensor):
                copy_gradient(met.thing, twin.thing, memo)
            elif isinstance(met.thing, nn.Module) and met.kind == "module":
                for parameter, other in zip(met.thing.parameters(), twin.thing.parameters(), strict=True):
                    copy_gradient(parameter, other, memo)

    # What there is

    def _meet(self, value: Any, root: str, key: str, untouched: str | None) -> None:
        """Note a value, and what a tuple holds; what it holds itself is gone into later."""
        kind = kind_of(value) if type(value) not in NUMBERS else ""
        if kind == "" or (kind == "generator" and self._data):  # of data they are kept apart
            if isinstance(value, Enum):
                self._classes[class_name(type(value))] = type(value)
            return
        if id(value) in self._by_id or (key and self._owner(value) is not None):
            return
        if kind == "tuple":
            if hasattr(value, "_fields"):
                self._classes[class_name(type(value))] = type(value)
            if len(value) <= LONG and not is_simple(value):
                for index, item in enumerate(value):
                    self._meet(item, root, f"{key}[{index}]", untouched)
        elif len(self._things) >= self._most:
            self._beyond[id(value)] = value
        else:
            met = Thing(value, "part" if kind == "module" and key == "" and self.parts else kind, root, key, untouched)
            self._things.append(met)
            self._by_id[id(value)] = met

    def _where(self, root: str, key: str) -> str:
        return ".".join(filter(None, (self.name, root, key))).replace(".[", "[")

    def _slots(self, met: Thing) -> dict[str, Any]:
        """Give what a thing holds, by what is typed to get it: ``".name"``, ``"[0]"``."""
        thing, kind = met.thing, met.kind
        if kind in ("list", "tuple", "deque"):
            return {} if _is_long(thing) else {f"[{index}]": item for index, item in enumerate(thing)}
        if kind == "dict":
            return {} if _is_long(thing) else {f"[{key!r}]": item for key, item in thing.items()}
        if kind in _NO_SLOTS or kind in ("iterator", "resource"):
            return {}
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
        return self._attributes(met)

    def _attributes(self, met: Thing) -> dict[str, Any]:
        """Give the attributes of an object that count, those of its class that may change too."""
        thing, kind = met.thing, met.kind
        given = getattr(type(thing), "transient", ())
        left_out = {*given} if isinstance(given, (tuple, list, set, frozenset)) else set()
        if kind in ("part", "module"):
            left_out |= {"_initialize_hook", "_load_hook"}  # of a lazy module, until it knows its shapes
            left_out |= _OF_EVERY_MODULE - ({"training"} if kind == "module" else set())
        if kind == "pair":
            cls: Any = type(thing)
            if not _has_more_than_its_pair(cls):
                return {}
            left_out |= _left_to_the_pair(cls)
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

    def _look(self, met: Thing) -> None:
        """Note what a thing holds at first."""
        kind = met.kind
        met.raw = self._items(met) if kind != "array" or met.thing.nbytes <= self._left else _digest(met.thing)
        if met.untouched is not None or kind in ("resource", "iterator"):
            return
        if kind in _SLOTTED:
            met.first = {label: self._write(item, "") for label, item in self._slots(met).items()}
            if kind in ("pair", "module") and (state := self._state_at_first(met)) is not None:
                met.first[""] = state
        elif kind in ("list", "dict", "deque") and _is_long(met.thing) and not _all_plain(met.thing):
            met.first = Is(met.thing, "")
        elif kind in ("tensor", "array"):
            met.first = self._copied(met.thing, lambda: self._contents(met))
        else:
            met.first = snapshot(self._contents(met))

    def _items(self, met: Thing) -> Any:
        """Give the very items that a thing holds, to compare them by identity."""
        if met.kind in ("list", "deque"):
            return list(met.thing)
        if met.kind == "dict":
            return [*met.thing, *met.thing.values()]
        if met.kind == "set":
            return set(met.thing)
        slots = self._slots(met)
        return [*slots, *slots.values()]

    def _copied(self, value: Any, contents: Callable[[], Any]) -> Any:
        """Copy the contents of a tensor or array as they are at first; None where they are too large."""
        if isinstance(value, Tensor) and is_lazy(value):
            return None
        if value.nbytes > self._left:
            if not isinstance(value, Tensor) or self._data or not _is_of_one_number(value):
                return None
            one = value.detach().reshape(-1)[:1].to("cpu", copy=True)
            return {"tensor": one.expand(value.shape), "grad": None}
        self._left -= value.nbytes
        return snapshot(contents())

    def _state_at_first(self, met: Thing) -> Any:
        """Give the state of an object at first; None where it has none yet, or a large one."""
        try:
            state = self._contents(met)
        except Exception:  # before a fit not every object can tell its state; then it is not put back without one
            return None
        taken = size(state)
        if taken > self._left:
            return None
        self._left -= taken
        return snapshot(state)

    # What has changed

    def new_objects(self, owner: Callable[[Any], str | None]) -> set[str]:
        """Give the paths of the objects that have come since the walk was made.

        Args:
            owner: As when the walk was made.
        """
        found: set[str] = set()
        self._owner, self._memo, self._alive, self._noted = owner, {}, [], found
        for met in self._things:
            if met.kind in _SLOTTED and met.untouched is None:
                slots = self._slots(met)
                if not _identical([*slots, *slots.values()], met.raw):
                    for label, value in slots.items():
                        self._write(value, self._where(met.root, f"{met.key}{label}".lstrip(".")))
        self._owner, self._memo, self._alive, self._noted = nobody, {}, [], None
        return found

    def note_made(self, paths: Set[str]) -> None:
        """Note new objects that the script makes at the beginning of each fit: their states are kept."""
        self._made |= paths

    def state(self, owner: Callable[[Any], str | None]) -> tuple[dict[str, State], list[str]]:
        """Give what has changed as plain data, by root, and the paths of what is lost.

        Args:
            owner: As when the walk was made.
        """
        self._owner, self._memo, self._alive, self._stands_for = owner, {}, [], {}
        self._referred = set()
        states: dict[str, State] = {root: {} for root in self.roots}
        lost: dict[str, None] = {}
        for met in self._things:
            if met.untouched is not None or met.kind in ("iterator", "resource"):
                if met.kind == "iterator" or (met.kind != "resource" and not _identical(self._items(met), met.raw)):
                    lost[met.untouched or self._where(met.root, met.key)] = None
                continue
            try:
                self._add(met, states[met.root], lost)
            except CheckpointError:
                if met.key == "":
                    raise
                lost[self._where(met.root, met.key)] = None
            except LostError as error:
                lost[error.args[0]] = None
            except RecursionError:
                lost[self._where(met.root, met.key)] = None
        self._owner, self._memo, self._alive, self._stands_for = nobody, {}, [], {}
        for root, state in states.items():
            inner = state.get(MARK, {})
            for key in [
                key for key in inner if "." not in key and "[" not in key and (root, key) not in self._referred
            ]:
                del inner[key]  # an attribute holds another one now, and nobody this one
            if MARK in state and not inner:
                del state[MARK]
        return {root: state for root, state in states.items() if state}, list(lost)

    def _add(self, met: Thing, state: State, lost: dict[str, None]) -> None:
        """Add what has changed of a thing to its root's state."""
        if met.kind in _SLOTTED:
            slots = self._changed_slots(met, lost)
            own = self._contents(met) if met.kind in ("pair", "module") else None
            if own is not None and ("." in met.key or "[" in met.key) and alike(own, met.first.get("")):
                own = None  # of an attribute it is kept in any case: it may have begun with other random numbers
            if met.key == "":
                state.update({label[1:]: kept for label, kept in slots.items()})
                if own is not None:
                    state["pair"] = own["state"] if met.kind == "pair" else own
                return
            entry = {**(own or {MARK: "slots"}), **({"slots": slots} if slots else {})}
            if own is None and not slots:
                return
        else:
            kept = self._changed(met)
            if kept is None:
                return
            entry = kept[0] if met.kind == "generator" else {MARK: "changed", "to": kept[0]}
        direct = "." not in met.key and "[" not in met.key and met.key not in state
        if direct and self._slots(self._by_id[id(self.roots[met.root])]).get(f".{met.key}") is met.thing:
            state[met.key] = entry
        else:
            state.setdefault(MARK, {})[met.key] = entry

    def _changed_slots(self, met: Thing, lost: dict[str, None]) -> State:
        now, kept = self._slots(met), State()
        if _identical([*now, *now.values()], met.raw):
            return kept
        for label in met.first:
            if label and label not in now:
                kept[label] = {MARK: "gone"}
        for label, value in now.items():
            path = self._where(met.root, f"{met.key}{label}".lstrip("."))
            written = self._write(value, path)
            if label in met.first and (
                alike(written, met.first[label]) or self._is_equal(value, written, met.first[label])
            ):
                continue
            unkept = next(_unkept(written), None)
            if unkept is not None or met.kind not in _SETTABLE:
                if unkept is None or unkept.path:
                    lost[unkept.path if unkept is not None else path] = None
                continue
            kept[label] = written
        return kept

    def _is_equal(self, value: Any, written: Any, first: Any) -> bool:
        """Tell whether a new container or tensor says what the first one said: then it stands for that one."""
        known = self._paths.get((first["root"], first["key"])) if _is_reference(first) else None
        if known is None or type(known.thing) is not type(value) or known.kind not in _VALUES:
            return False
        before = known.first["tensor"] if known.kind == "tensor" and known.first is not None else known.first
        now = written["items"] if known.kind == "deque" else written
        if known.first is None or not alike(now, before) or not self._is_as_first(known):
            return False
        self._stands_for[id(value)] = first
        return True

    def _changed(self, met: Thing) -> tuple[Any] | None:
        """Give what a container, tensor, array or generator holds, where that is not what it held at first."""
        if met.kind in ("tensor", "array"):
            return self._changed_numbers(met)
        if met.kind not in ("generator", "phases") and _identical(self._items(met), met.raw):
            return None
        written = self._contents(met)
        if alike(written, met.first):
            return None
        for unkept in _unkept(written):
            raise LostError(unkept.path or self._where(met.root, met.key))
        return (written,)

    def _changed_numbers(self, met: Thing) -> tuple[Any] | None:
        value = met.thing
        if isinstance(value, Tensor) and is_lazy(value):
            return None
        if self._data and isinstance(value, Tensor) and not value.is_cpu and value._version == met.changes:
            return None  # nobody waits for the device in each epoch
        if met.first is None:
            same = value._version == met.changes if isinstance(value, Tensor) else met.raw == _digest(value)
            return None if self._data and same else (self._contents(met),)
        written = self._contents(met)
        return None if alike(written, met.first) else (written,)

    def _contents(self, met: Thing) -> Any:
        """Write what a thing holds as plain data."""
        thing, kind = met.thing, met.kind
        where = self._where(met.root, met.key)
        if kind in ("list", "deque"):
            if _all_plain(thing):
                return list(thing)
            return [self._write(item, f"{where}[{index}]") for index, item in enumerate(thing)]
        if kind == "dict":
            return self._entries(thing, where)
        if kind == "tensor":
            grad = thing.grad if thing.is_leaf and thing.requires_grad else None
            return {"tensor": to_plain(thing, where), "grad": None if grad is None else to_plain(grad, where)}
        if kind == "module":
            return _module_state(thing, where)
        if kind == "pair":
            return {MARK: "object", "state": to_plain(thing.state_dict(), f"{where}.state_dict()")}
        if kind != "set":
            return to_plain(thing, where)
        try:
            return to_plain(thing, where)
        except CheckpointError:
            return Is(thing, where)

    def _write(self, value: Any, path: str) -> Any:
        """Write a value as plain data: what was there at first as a reference, what cannot be kept as an `Is`."""
        kind = type(value)
        if kind in NUMBERS:
            return value
        met = self._by_id.get(id(value))
        if met is not None:
            self._referred.add((met.root, met.key))
            return {MARK: "first", "root": met.root, "key": met.key}
        if id(value) in self._beyond:
            return Is(value, path)
        if id(value) in self._stands_for:
            return self._stands_for[id(value)]
        name = self._owner(value)
        if name is not None:
            return {MARK: "owned", "name": name} if name else Is(value, "")
        what = kind_of(value)
        if what == "generator" and self._data:
            return {MARK: "apart"}
        if what == "":
            return self._write_constant(value, path)
        if what == "tuple":
            if is_simple(value):
                return value if kind is tuple else self._named(value, value, path)
            return self._named(value, tuple(self._write(v, f"{path}[{i}]") for i, v in enumerate(value)), path)
        if id(value) in self._memo:
            return {MARK: "again", "path": self._memo[id(value)]}
        self._memo[id(value)] = path
        self._alive.append(value)
        return self._write_new(value, what, path)

    def _write_new(self, value: Any, what: str, path: str) -> Any:
        """Write out what has come since the walk was made, and an object that the script makes in each fit."""
        if what == "list" and type(value) is list:
            return list(value) if _all_plain(value) else [self._write(v, f"{path}[{i}]") for i, v in enumerate(value)]
        if what == "deque":
            return {
                MARK: "deque",
                "items": [self._write(v, f"{path}[{i}]") for i, v in enumerate(value)],
                "maxlen": value.maxlen,
            }
        if what == "dict":
            return self._entries(value, path)
        if what in ("tensor", "array", "set"):
            try:
                return Is(value, path) if what == "tensor" and is_lazy(value) else to_plain(value, path)
            except CheckpointError:
                return Is(value, path)
        if self._noted is not None:
            self._noted.add(path)
            return Is(value, path) if what in ("pair", "generator") else self._write_made(value, what, path)
        if what != "generator" and (path not in self._made or what not in ("pair", "module", "object")):
            return Is(value, path)
        return self._write_made(value, what, path)

    def _write_made(self, value: Any, what: str, path: str) -> Any:
        made = Thing(value, what, "", path, None)
        try:
            if what in ("generator", "pair", "module"):
                written = _module_state(value, path) if what == "module" else to_plain(value, path)
                if what != "module":
                    return written
            else:
                written = {MARK: "made"}
        except CheckpointError:
            return Is(value, path)
        slots = self._slots(made)
        if any(kind_of(item) == "resource" for item in slots.values()):
            return Is(value, path)
        written["slots"] = {label: self._write(item, f"{path}{label}") for label, item in slots.items()}
        return written

    def _entries(self, value: Mapping[Any, Any], path: str) -> Any:
        try:
            return of_entries(((k, self._write(v, f"{path}[{k!r}]")) for k, v in value.items()), path)
        except CheckpointError:
            return Is(value, path)

    def _named(self, value: Any, items: tuple[Any, ...], path: str) -> Any:
        if type(value) is tuple:
            return items
        name = class_name(type(value))
        known = self._classes.get(name) is type(value) and hasattr(value, "_fields")
        return {MARK: "named tuple", "class": name, "items": tuple(items)} if known else Is(value, path)

    def _write_constant(self, value: Any, path: str) -> Any:
        if isinstance(value, Enum):
            name = class_name(type(value))
            if self._classes.get(name) is type(value):
                return {MARK: "member", "class": name, "name": value.name}
        if isinstance(value, PurePath):
            return {MARK: "path", "text": str(value)}
        if type(value) is range:
            return {MARK: "range", "ends": (value.start, value.stop, value.step)}
        try:
            return to_plain(value, path)
        except CheckpointError:
            return Is(value, path)

    # Putting back

    def load(
        self,
        states: Mapping[str, State],
        owners: Owners,
        *,
        begun: bool = True,
        running: bool = False,
        phases: Iterable[type] = (),
        device: torch.device | None = None,
    ) -> None:
        """Put back what had changed, and what had not as it was first.

        Args:
            states: What `state` gave, by root.
            owners: Find what somebody else keeps.
            begun: Whether what begins with a fit has begun: before, an object that holds a state need not be there.
            running: Whether it was just made again by a fit that goes on: what no checkpoint holds is left as it is.
            phases: The phase types that there are.
            device: Where tensors belong that were on a device.

        Raises:
            CheckpointError: It cannot be put back.
        """
        self._owner, self._owners, self._memo, self._alive = owners, owners, {}, []
        self._begun, self._running = begun, running
        self._how: dict[str, Any] = {"phases": list(phases), "device": device}
        self._read: dict[str, Any] = {}
        entries = {id(met.thing): self._entry(met, states.get(met.root) or {}) for met in self._things}
        for root, state in states.items():
            self._check_reached(root, state)
        try:
            for met in self._things:
                if met.untouched is None and met.kind not in ("iterator", "resource"):
                    self._put(met, entries[id(met.thing)])
            for met in reversed(self._things):
                if met.kind in ("pair", "module") and met.untouched is None:
                    self._put_own(met, entries[id(met.thing)])
        finally:
            self._owner = self._owners = nobody
            self._read, self._alive = {}, []

    def _entry(self, met: Thing, state: State) -> State:
        """Give what a root's state says about a thing."""
        if met.key == "":
            own = {"pair": state["pair"]} if "pair" in state else {}
            slots = {f".{name}": kept for name, kept in state.items() if name not in (MARK, "pair")}
            return {**own, "slots": {n: k for n, k in slots.items() if not self._is_entry(met.root, n[1:], k)}}
        entry = state.get(MARK, {}).get(met.key)
        if entry is None and self._is_entry(met.root, met.key, state.get(met.key)):
            entry = state[met.key]
        if entry is not None and entry.get(MARK) == "fields":  # as it was written before there was a walk
            entry = {"slots": {f".{name}": kept for name, kept in entry["items"].items()}}
        return entry or {}

    def _is_entry(self, root: str, key: str, kept: Any) -> bool:
        """Tell whether what is kept under an attribute's name are the contents of the thing that was there at first."""
        if not isinstance(kept, dict) or kept.get(MARK) not in ("changed", "slots", "object", "module", "fields"):
            return False
        return (root, key) in self._paths or kept[MARK] in ("changed", "slots")

    def _check_reached(self, root: str, state: State) -> None:
        """Raise for contents of what is not there now.

        Raises:
            CheckpointError: Names it.
        """
        paths = self._paths
        inner = [*state.get(MARK, {}), *(name for name, kept in state.items() if self._is_entry(root, name, kept))]
        for key in inner:
            if (root, key) not in paths:
                raise misplaced(self._where(root, key), "what was there in the run that wrote it", None)

    def _put(self, met: Thing, entry: State) -> None:
        """Put back what a thing holds."""
        if met.kind in _SLOTTED:
            self._put_slots(met, entry.get("slots", {}))
        elif entry or not self._is_as_first(met):
            kept = entry.get("to", entry) if entry else met.first
            where = self._where(met.root, met.key)
            if kept is None:
                warn_user(f"{where} has changed, and is too large to be put back; the checkpoint has no state for it")
            elif entry or not self._running or self._is_kept(met):
                self._put_contents(met, kept, where)

    def _is_as_first(self, met: Thing) -> bool:
        try:
            return self._changed(met) is None
        except LostError:
            return False

    def _is_kept(self, met: Thing) -> bool:
        return next(_unkept(self._contents(met)), None) is None

    def _put_slots(self, met: Thing, kept: State) -> None:
        now = self._slots(met)
        for label in dict.fromkeys((*met.first, *now, *kept)):
            if label == "":
                continue
            path = self._where(met.root, f"{met.key}{label}".lstrip("."))
            written = kept.get(label, met.first.get(label, _GONE))
            if label in now and label not in kept:
                before = self._write(now[label], path)
                if alike(before, written) or (self._running and next(_unkept(before), None) is not None):
                    continue
            if isinstance(written, dict) and written.get(MARK) == "gone":
                if label in now:
                    _take_away(met, label)
                continue
            value = self._restore(written, now.get(label), path)
            if value is not _LEFT and (label not in now or now[label] is not value):
                _set_slot(met, label, value)

    def _put_own(self, met: Thing, entry: State) -> None:
        """Have an object load the state it gave."""
        where = self._where(met.root, met.key)
        if met.kind == "module":
            state = entry.get("pair", entry)
            if state.get(MARK) not in ("module", "object"):
                state = met.first.get("")
            elif state[MARK] == "object":  # as it was written before there was a walk
                state = {MARK: "module", "state": state["state"]}
            if state is not None:
                _load_module(met.thing, state, self._how, where)
            return
        given = entry["pair"] if "pair" in entry else entry.get("state", _LEFT)
        if given is _LEFT:
            first = met.first.get("")
            if first is None or alike(self._contents(met)["state"], first["state"]):
                return
            given = first["state"]
        met.thing.load_state_dict(from_plain(given, where=f"{where}.state_dict()", **self._how))

    def _put_contents(self, met: Thing, kept: Any, where: str) -> None:
        thing, kind = met.thing, met.kind
        if isinstance(kept, Is):  # a long container of objects
            kept, items = None, met.raw
        if kind == "tensor":
            _put_tensor(thing, from_plain(kept["tensor"], **self._how))
            grad = kept["grad"]
            if thing.is_leaf and thing.requires_grad:
                thing.grad = None if grad is None else from_plain(grad, **self._how).to(thing.device)
        elif kind in ("generator", "phases"):
            from_plain(kept, thing, where=where, **self._how)
        elif kind == "array":
            thing[...] = from_plain(kept, **self._how)
        elif kind == "set":
            items = from_plain(kept, **self._how)
            thing.clear()
            thing.update(items)
        elif kind == "dict":
            self._fill_dict(thing, kept, where) if kept is not None else _refill(thing, items)
        elif kept is None:
            thing.clear()
            thing.extend(items)
        else:
            self._fill_list(thing, kept, where)

    def _restore(self, kept: Any, live: Any, path: str) -> Any:
        """Make of plain data what it was; `_LEFT` where it is to stay as it is."""
        if type(kept) in NUMBERS:
            return kept
        if isinstance(kept, Is):
            return kept.value
        if isinstance(kept, tuple):
            if is_simple(kept):
                return kept
            return tuple(self._restore(v, None, f"{path}[{i}]") for i, v in enumerate(kept))
        if isinstance(kept, list):
            fresh: Any = live if type(live) is list and id(live) not in self._by_id else []
            return self._fill_list(self._remember(path, fresh), kept, path)
        if not isinstance(kept, dict):
            return self._remember(path, from_plain(kept, live, where=path, **self._how))
        mark = kept.get(MARK)
        if mark in (None, "pairs", "dict"):
            fresh = live if isinstance(live, dict) and id(live) not in self._by_id else {}
            return self._fill_dict(self._remember(path, fresh), kept, path)
        if mark == "deque":
            fresh = live if isinstance(live, deque) and id(live) not in self._by_id else deque(maxlen=kept["maxlen"])
            return self._fill_list(self._remember(path, fresh), kept["items"], path)
        if mark == "apart":
            return _LEFT
        if mark in _REFERENCES:
            return self._follow(kept, mark, path)
        if mark in ("made", "module", "object", "fields", "phases"):
            return self._remember(path, self._put_into(kept, live, path))
        return self._remember(path, from_plain(kept, live, where=path, **self._how))

    def _follow(self, kept: State, mark: str, path: str) -> Any:
        """Give what a reference stands for."""
        if mark == "first":
            met = self._paths.get((kept["root"], kept["key"]))
            if met is None:
                raise misplaced(self._where(kept["root"], kept["key"]), "what was there in the run that wrote it", None)
            return met.thing
        if mark == "owned":
            return self._owners.find(kept["name"], path)
        if mark == "again":
            return self._read[kept["path"]]
        if mark == "path":
            return Path(kept["text"])
        if mark == "range":
            return range(*kept["ends"])
        kind = self._classes.get(kept["class"])
        if kind is None:
            raise misplaced(path, f"a {kept['class']}", None)
        if mark == "member":
            return kind[kept["name"]]
        return kind(*(self._restore(v, None, f"{path}[{i}]") for i, v in enumerate(kept["items"])))

    def _put_into(self, kept: State, live: Any, path: str) -> Any:
        """Put the state of an object that the script makes in each fit into the one that it made."""
        mark, what = kept[MARK], kind_of(live)
        if live is None and not self._begun:
            return _LEFT
        if mark == "module" and what == "module":
            _load_module(live, kept, self._how, path)
        elif mark == "made" and what in ("object", "pair"):
            pass
        elif mark in ("object", "fields", "phases"):
            return from_plain(kept, live, where=path, **self._how)
        else:
            raise misplaced(path, "the object that the script makes when a fit begins", live)
        made = Thing(live, what, "", path, None)
        now = self._slots(made)
        for label, written in kept.get("slots", {}).items():
            value = self._restore(written, now.get(label), f"{path}{label}")
            if value is not _LEFT and (label not in now or now[label] is not value):
                _set_slot(made, label, value)
        return live

    def _remember(self, path: str, value: Any) -> Any:
        self._read[path] = value
        return value

    def _fill_list(self, live: Any, kept: list[Any], path: str) -> Any:
        now = list(live)
        items = (
            kept
            if is_simple(kept)
            else [self._restore(v, now[i] if i < len(now) else None, f"{path}[{i}]") for i, v in enumerate(kept)]
        )
        live.clear()
        live.extend(items)
        return live

    def _fill_dict(self, live: Any, kept: State, path: str) -> Any:
        now = dict(live)
        entries = []
        for key, item in items_of(kept):
            real = from_plain(key)
            entries.append((real, self._restore(item, now.get(real), f"{path}[{real!r}]")))
        live.clear()
        live.update(entries)
        return live


_SLOTTED = {"object", "part", "module", "pair", "partial", "method", "function", "loader"}
_SETTABLE = {"object", "part", "module", "pair", "partial"}
_VALUES = {"list", "dict", "deque", "set", "tensor", "array"}
_REFERENCES = {"first", "owned", "again", "path", "range", "member", "named tuple"}
_GONE = {MARK: "gone"}
_LEFT: Any = object()


class Owners:
    """Tells what somebody else keeps: models and their parts, optimizers, callbacks, phases, data.

    Args:
        names: What belongs to somebody, by its name; "" where it has none.
        places: Where the memory of models' tensors begins: any tensor there is theirs.
        kinds: Types of which everything belongs to somebody.
    """

    def __init__(
        self, named: Iterable[tuple[str, Any]] = (), places: Iterable[int] = (), kinds: tuple[type, ...] = ()
    ) -> None:
        self._kinds = kinds
        self._named = list(named)
        self._names = {id(value): name for name, value in reversed(self._named)}
        self._places = frozenset(places)

    def __call__(self, value: Any) -> str | None:
        """Give the name of a value that somebody else keeps, "" where it has none, None for others."""
        name = self._names.get(id(value))
        if name is None and self._places and isinstance(value, Tensor) and value.layout is torch.strided:
            theirs = not is_lazy(value) and value.numel() and value.untyped_storage().data_ptr() in self._places
            return "" if theirs else None
        return "" if name is None and isinstance(value, self._kinds) else name

    def find(self, name: str, path: str) -> Any:
        """Give what has a name.

        Raises:
            CheckpointError: Nothing has it now.
        """
        for known, value in self._named:
            if known == name:
                return value
        raise CheckpointError(f"the checkpoint has {name} as {path}, and there is no {name} now; make it as it was")


nobody = Owners()
"""Where everything belongs to what is walked."""

of_learners: WeakSet[nn.Module] = WeakSet()
"""The parts of all models, which data sets may use."""


class ModelsApart(Owners):
    """Tells that the models of learners are kept by them."""

    def __call__(self, value: Any) -> str | None:
        """Give the empty text for a part of a learner's model."""
        return "" if isinstance(value, nn.Module) and value in of_learners else None


models_apart = ModelsApart()


def _is_reference(written: Any) -> bool:
    return isinstance(written, dict) and written.get(MARK) == "first"


def _is_long(thing: Any) -> bool:
    return len(thing) > LONG


def _all_plain(items: Any) -> bool:
    return is_simple(items)


def _identical(items: Any, raw: Any) -> bool:
    """Tell whether two series hold the very same items; sets: equal ones."""
    if isinstance(items, set):
        return bool(items == raw)
    return len(items) == len(raw) and all(map(is_, items, raw))


def alike(a: Any, b: Any) -> bool:
    """Tell whether plain data is the same: of the same types, to the bit."""
    if a is b:
        return True
    if type(a) is not type(b) and not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_on_host(a), _on_host(b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            alike(k, m) and alike(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return False
        if is_simple(a):
            return a == b and (all(map(is_, a, b)) or repr(a) == repr(b))
        return all(map(alike, a, b))
    if isinstance(a, (int, float)):
        return repr(a) == repr(b)
    return bool(a == b)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.is_cpu else tensor.detach().cpu()


def _unkept(written: Any) -> Iterator[Is]:
    """Give what of a written value is no plain data."""
    if isinstance(written, Is):
        yield written
    elif isinstance(written, dict):
        for item in written.values():
            yield from _unkept(item)
    elif isinstance(written, (list, tuple)) and not is_simple(written):
        for item in written:
            yield from _unkept(item)


def _is_of_one_number(tensor: Tensor) -> bool:
    if tensor.is_complex() or not tensor.numel() or tensor.layout is not torch.strided:
        return False
    low, high = torch.aminmax(tensor.detach())
    return bool(low == high)


def _digest(array: Any) -> Any:
    """Give a checksum of an array of NumPy's; of one that lies in a file, of some rows."""
    rows = array if type(array).__name__ != "memmap" else array[:: max(len(array) // 1000, 1)]
    return array.shape, str(array.dtype), zlib.crc32(rows.tobytes())


def _module_state(module: nn.Module, where: str) -> State:
    """Write a module that is no part of a model: its state, and what that leaves out."""
    state = {name: value for name, value in module.state_dict().items() if not is_lazy(value)}
    buffers = {
        f"{path}.{name}".lstrip("."): to_plain(part._buffers[name], where)
        for path, part in module.named_modules()
        for name in sorted(part._non_persistent_buffers_set)
        if part._buffers.get(name) is not None
    }
    parameters = [(name, p) for name, p in module.named_parameters() if not is_lazy(p)]
    return {
        MARK: "module",
        "state": to_plain(state, f"{where}.state_dict()"),
        "buffers": buffers,
        "frozen": [name for name, parameter in parameters if not parameter.requires_grad],
        "grads": {name: to_plain(p.grad, where) for name, p in parameters if p.grad is not None},
    }


def _load_module(module: nn.Module, kept: State, how: dict[str, Any], where: str) -> None:
    """Put back what `_module_state` wrote."""

    def again(written: Any) -> Any:
        return from_plain(written, where=where, **how)

    module.load_state_dict(again(kept["state"]))
    for name, written in kept.get("buffers", {}).items():
        path, _, own = name.rpartition(".")
        part = module.get_submodule(path)
        now = part._buffers.get(own)
        value = again(written)
        part._buffers[own] = value if now is None else value.to(now.device)
    if "frozen" not in kept:
        return
    for name, parameter in module.named_parameters():
        if parameter.requires_grad is (name in kept["frozen"]):
            parameter.requires_grad = name not in kept["frozen"]
        grad = kept["grads"].get(name)
        parameter.grad = None if grad is None else again(grad).to(parameter.device)


def _put_tensor(live: Tensor, value: Tensor) -> None:
    """Have a tensor hold other numbers; others that see its memory see them too, where the shape is the same."""
    with torch.no_grad():
        if live.shape == value.shape and live.dtype == value.dtype and not _overlaps(live):
            live.copy_(value)
        else:
            live.data = value.to(live.device)


def _overlaps(tensor: Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def _refill(live: dict[Any, Any], items: list[Any]) -> None:
    half = len(items) // 2
    live.clear()
    live.update(zip(items[:half], items[half:], strict=True))


def _set_slot(met: Thing, label: str, value: Any) -> None:
    thing, name = met.thing, label.rpartition(".")[2]
    if met.kind == "partial":
        parts = {".func": thing.func, ".args": thing.args, ".keywords": thing.keywords, label: value}
        thing.__setstate__((parts[".func"], parts[".args"], parts[".keywords"], vars(thing)))
    elif label.startswith(".__class__."):
        owner = next(cls for cls in type(thing).__mro__ if name in vars(cls))
        setattr(owner, name, value)
    elif met.kind in _SETTABLE:
        object.__setattr__(thing, name, value)


def _take_away(met: Thing, label: str) -> None:
    """Remove an attribute that was not there at first."""
    if met.kind in _SETTABLE and not label.startswith(".__class__."):
        object.__delattr__(met.thing, label.rpartition(".")[2])


# What PyTorch leaves out where it copies


def copy_gradient(tensor: Any, twin: Any, memo: dict[int, Any], waiting: bool = True) -> None:
    """Give the copy of a tensor its gradient, where that waits for an update, and its hooks."""
    if tensor is twin or is_lazy(tensor) or not tensor.is_leaf:
        return
    if waiting and tensor.grad is not None and twin.grad is None:
        twin.grad = tensor.grad.detach().clone()
    for hook in (getattr(tensor, "_backward_hooks", None) or {}).values():
        twin.register_hook(copy.deepcopy(hook, memo))
    for hook in (getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values():
        twin.register_post_accumulate_grad_hook(copy.deepcopy(hook, memo))


def copy_attributes(optimizer: Optimizer, twin: Optimizer, memo: dict[int, Any]) -> None:
    """Give the copy of an optimizer its hooks, and what else it holds beside its options and states."""
    if optimizer is twin:
        return
    for name, value in vars(optimizer).items():
        hooks = name.endswith("_hooks") and isinstance(value, dict)
        if (hooks and not getattr(twin, name, None)) or (name not in vars(twin) and not callable(value)):
            vars(twin)[name] = copy.deepcopy(value, memo)


# What belongs to a class


@cache
def _library(module: str) -> bool:
    return module.partition(".")[0] in ("builtins", "fluxloop", "torch", "abc", "typing", "collections", "functools")


_MOVING = {"tensor", "array", "list", "dict", "set", "deque", "generator"}


def _of_class(kind: type) -> dict[str, Any]:
    """Give what classes of the user's share between their instances and may change: numbers and containers."""
    found: dict[str, Any] = {}
    for cls in kind.__mro__:
        if not _library(cls.__module__):
            for name, value in vars(cls).items():
                if not name.startswith("__") and (type(value) in NUMBERS or kind_of(value) in _MOVING):
                    found.setdefault(name, value)
    return found


def _pair_of(kind: type) -> type:
    """Give the class that says an object's state."""
    return next(cls for cls in kind.__mro__ if "state_dict" in vars(cls))


@cache
def _has_more_than_its_pair(kind: Any) -> bool:
    """Tell whether an object may keep things that its pair leaves out: it is inherited, and knows nothing of them."""
    return "state_dict" not in vars(kind) or kind.__module__.partition(".")[0] == "fluxloop"


@cache
def _left_to_the_pair(kind: Any) -> frozenset[str]:
    """Give the attributes that the class with the pair looks after: those the pair names, and a library's own."""
    definer = _pair_of(kind)
    names: set[str] = set()
    for cls in kind.__mro__[kind.__mro__.index(definer) :]:
        for pair in ("state_dict", "load_state_dict"):
            function = getattr(vars(cls).get(pair), "__code__", None)
            names.update(function.co_names if function is not None else ())
    package = definer.__module__.partition(".")[0]
    for cls in kind.__mro__:
        if _library(cls.__module__) and cls.__module__.partition(".")[0] == package:
            assigned = _assigned(cls)
            names.update(assigned if package != "fluxloop" else (n for n in assigned if n.startswith("_")))
    return frozenset(names)


def _assigned(cls: type) -> set[str]:
    """List the attributes that a class's functions assign."""
    codes = [code for value in vars(cls).values() if isinstance(code := _code_of(value), CodeType)]
    found = {
        instruction.argval
        for code in codes
        for instruction in dis.get_instructions(code)
        if instruction.opname == "STORE_ATTR"
    }
    return {*found, *vars(cls).get("__annotations__", ())}


def _code_of(value: Any) -> Any:
    inner = getattr(value, "fget", None) or getattr(value, "function", None) or value
    return getattr(inner, "__code__", None)


# What is kept of callbacks, phases, loss functions and models


def plain_entries(state: State) -> State:
    """Give those of the attributes in a state that are plain data, by name."""
    entries = {
        name: kept["to"] if isinstance(kept, dict) and kept.get(MARK) == "changed" else kept
        for name, kept in state.items()
        if name != MARK
    }
    return {name: kept for name, kept in entries.items() if not (isinstance(kept, dict) and MARK in kept)}


class Watched:
    """What is kept of one object, such as a callback or a phase.

    Args:
        thing: It, set up and not yet used.
        name: What it is called in messages.
        owner: Gives the name of what somebody else keeps.
    """

    def __init__(self, thing: Any, name: str, owner: Callable[[Any], str | None] | None = None) -> None:
        self.thing = thing
        self.name = name
        self.walk = Walk({"": thing}, name, owner)

    def state(self, owner: Callable[[Any], str | None]) -> tuple[State, list[str]]:
        """Give the state as plain data, empty where nothing has changed, and the paths of what is lost.

        Raises:
            CheckpointError: What its pair gives is no plain data.
        """
        states, lost = self.walk.state(owner)
        return states.get("", {}), lost

    def load(self, state: State, owners: Owners, **how: Any) -> None:
        """Go on from a state; see `Walk.load`.

        Raises:
            CheckpointError: It cannot be put back.
        """
        self.walk.load({"": state}, owners, **how)
