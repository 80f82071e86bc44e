"""What of an object is kept in a checkpoint, as plain data, and how it is put back.

Plain data is what ``torch.load(weights_only=True)`` reads: numbers, texts, tensors, and lists,
tuples, dicts and sets of them. Other containers are written as a marked dict. An object with an
identity (a random generator, something with ``state_dict`` and ``load_state_dict``, an instance
of a class with fields) is written as its state, and put back into the live one. Nothing in a
checkpoint names a class to import or a function to call.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.errors import CheckpointError, describe
from fluxloop.state import Container, PhaseDict

MARK = "__kept__"
SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def class_name(cls: type) -> str:
    """Name a class with its module, as a checkpoint does."""
    return f"{cls.__module__}.{cls.__qualname__}"


# Writing


def keep(value: Any, where: str) -> Any:
    """Turn a value into plain data.

    Args:
        value: Anything.
        where: What it is called in a message.

    Raises:
        CheckpointError: It, or something in it, is none of what can be kept.
    """
    if isinstance(value, Tensor):
        return value.detach() if value.is_cpu else {MARK: "on the device", "tensor": value.detach()}
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, PhaseDict):
        return {MARK: "phases", "items": {class_name(k): keep(v, f"{where}[{k.__name__}]") for k, v in value.items()}}
    if type(value) in (list, tuple):
        return type(value)(_keep_item(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict):
        items = {_plain_key(key, where): _keep_item(item, f"{where}[{key!r}]") for key, item in value.items()}
        return {MARK: "dict", "items": items} if MARK in items else items
    if isinstance(value, (set, frozenset)):
        return {MARK: type(value).__name__, "items": [_keep_item(item, where) for item in value]}
    if isinstance(value, deque):
        return {MARK: "deque", "items": [_keep_item(item, where) for item in value], "maxlen": value.maxlen}
    if type(value).__module__ == "numpy":
        return _keep_numpy(value, where)
    if isinstance(value, torch.Generator):
        return {MARK: "object", "state": value.get_state()}
    if isinstance(value, random.Random):
        return {MARK: "object", "state": value.getstate()}
    if is_stateful(value):
        return {MARK: "object", "state": keep(value.state_dict(), where)}
    fields = _fields(value)
    if fields is not None:
        return {MARK: "fields", "items": {name: keep(item, f"{where}.{name}") for name, item in fields.items()}}
    raise CheckpointError(
        f"{where} is {describe(value)}, which cannot be kept in a checkpoint; expected numbers, texts, tensors, "
        "containers of them, or an object with state_dict() and load_state_dict(state)"
    )


def _keep_item(value: Any, where: str) -> Any:
    """Keep an item of a container: there is no live one to put an object's state into."""
    kept = keep(value, where)
    if isinstance(kept, dict) and kept.get(MARK) in ("object", "fields", "phases"):
        raise CheckpointError(
            f"{where} is {describe(value)} inside a container, which cannot be kept in a checkpoint; keep its numbers, "
            "texts and tensors there instead, or give what holds it state_dict() and load_state_dict(state)"
        )
    return kept


def _plain_key(key: Any, where: str) -> Any:
    if isinstance(key, SCALARS) or (isinstance(key, tuple) and all(isinstance(part, SCALARS) for part in key)):
        return key
    raise CheckpointError(
        f"{where} has the key {key!r}, which cannot be kept in a checkpoint; expected numbers or texts as keys"
    )


def _keep_numpy(value: Any, where: str) -> Any:
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.ndarray) and value.dtype != object:
        raw = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.size else torch.empty(0)
        return {MARK: "array", "dtype": value.dtype.str, "shape": tuple(value.shape), "bytes": raw}
    if isinstance(value, numpy.generic):
        return {MARK: "numpy scalar", "dtype": value.dtype.str, "value": value.item()}
    raise CheckpointError(f"{where} is {describe(value)} of NumPy's, which cannot be kept in a checkpoint")


def is_stateful(value: Any) -> bool:
    """Tell whether an object has ``state_dict`` and ``load_state_dict``."""
    names = ("state_dict", "load_state_dict")
    return not isinstance(value, type) and all(callable(getattr(type(value), name, None)) for name in names)


def _fields(value: Any) -> dict[str, Any] | None:
    """Give the fields of an instance of a class that names them; None for anything else."""
    if isinstance(value, type) or callable(value):
        return None
    if attrs.has(type(value)) or dataclasses.is_dataclass(value):
        fields = attrs.fields(type(value)) if attrs.has(type(value)) else dataclasses.fields(value)
        return {field.name: getattr(value, field.name) for field in fields}
    return dict(vars(value)) if isinstance(value, Container) and hasattr(value, "__dict__") else None


# Reading


def put_back(
    kept: Any, live: Any = None, *, phases: Iterable[type] = (), device: torch.device | None = None, where: str = "it"
) -> Any:
    """Make of plain data what it was; an object's state is put into the live one, which is returned.

    Args:
        kept: What `keep` gave.
        live: What is there now.
        phases: The phase types that there are.
        device: Where tensors belong that were on a device.
        where: What it is called in a message.

    Raises:
        CheckpointError: The live object is missing, or of another kind.
    """

    def again(item: Any, now: Any = None, name: str = "") -> Any:
        return put_back(item, now, phases=phases, device=device, where=where + name)

    if isinstance(kept, Tensor):
        return kept.clone()
    if type(kept) is tuple:
        return tuple(again(item) for item in kept)
    if isinstance(kept, list):
        items = [again(item) for item in kept]
        if type(live) is list:  # others may hold it too
            live[:] = items
            return live
        return items
    if not isinstance(kept, dict):
        return kept
    kind = kept.get(MARK)
    if kind is None or kind == "dict":
        entries = {key: again(item) for key, item in (kept["items"] if kind else kept).items()}
        if isinstance(live, dict):  # perhaps of a type of its own
            live.clear()
            live.update(entries)
            return live
        return entries
    if kind == "on the device":
        return kept["tensor"].to(device, copy=True)
    if kind in ("set", "frozenset"):
        return (set if kind == "set" else frozenset)(again(item) for item in kept["items"])
    if kind == "deque":
        return deque((again(item) for item in kept["items"]), kept["maxlen"])
    if kind in ("array", "numpy scalar"):
        return _put_back_numpy(kept)
    if kind == "phases":
        if not isinstance(live, PhaseDict):
            raise _misplaced(where, "a PhaseDict", live)
        known = {class_name(cls): cls for cls in phases}
        missing = sorted(kept["items"].keys() - known)
        if missing:
            warnings.warn(f"{where} was kept for the phases {missing}, which nobody has defined now", stacklevel=2)
        for cls in [cls for cls in live if class_name(cls) not in kept["items"]]:
            del live[cls]
        for name in [name for name in kept["items"] if name in known]:
            item = kept["items"][name]
            live[known[name]] = again(item, live[known[name]], f"[{known[name].__name__}]")
        return live
    return _into(kept, live, again, where)


def _into(kept: dict[str, Any], live: Any, again: Callable[..., Any], where: str) -> Any:
    """Put an object's state into the live one."""
    if kept[MARK] == "fields":
        fields = _fields(live)
        if fields is None:
            raise _misplaced(where, "an object with fields", live)
        for name, item in kept["items"].items():
            object.__setattr__(live, name, again(item, fields.get(name), f".{name}"))
    elif isinstance(live, torch.Generator):
        live.set_state(kept["state"])
    elif isinstance(live, random.Random):
        live.setstate(kept["state"])
    elif is_stateful(live):
        live.load_state_dict(again(kept["state"]))
    else:
        raise _misplaced(where, "an object with load_state_dict(state), or a random generator", live)
    return live


def _put_back_numpy(kept: dict[str, Any]) -> Any:
    import numpy

    if kept[MARK] == "numpy scalar":
        return numpy.dtype(kept["dtype"]).type(kept["value"])
    raw = kept["bytes"].to(torch.uint8).numpy().tobytes()
    return numpy.frombuffer(raw, dtype=kept["dtype"]).reshape(kept["shape"]).copy()


def _misplaced(where: str, expected: str, live: Any) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint has a state for {where}, which is {describe(live)} now; expected {expected}, made as in the "
        "run that wrote it"
    )


# Attributes


class _Seen:
    """One tensor or object as it was: the same one, changed in place no more often."""

    __slots__ = ("changes", "thing")

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.changes = thing._version if isinstance(thing, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seen) and self.thing is other.thing and self.changes == other.changes

    __hash__ = None  # type: ignore[assignment]  # compared only


def _look(value: Any) -> Any:
    """Describe a value so that a later description is equal where nothing has changed."""
    if isinstance(value, SCALARS):
        return type(value), repr(value)
    if isinstance(value, Mapping):
        return type(value), [(_look(key), _look(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return type(value), [_look(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, value))
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    fields = None if is_stateful(value) else _fields(value)
    return (type(value), _look(fields)) if fields is not None else _Seen(value)


def attributes(thing: Any) -> dict[str, Any]:
    """Give the attributes of an object, those in slots too."""
    slots = [name for cls in type(thing).__mro__ for name in _slots(cls)]
    found = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
    return {**found, **getattr(thing, "__dict__", {})}


def _slots(cls: type) -> Iterator[str]:
    names = cls.__dict__.get("__slots__", ())
    for name in (names,) if isinstance(names, str) else names:
        if name not in ("__weakref__", "__dict__"):
            yield f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def plain_attributes(thing: Any) -> dict[str, Any]:
    """Give the attributes of an object that are plain data; of a module, its own and its buffers."""
    found = {name: value for name, value in attributes(thing).items() if name not in _OF_EVERY_MODULE}
    if isinstance(thing, nn.Module):
        found.update(thing._buffers)
    plain: dict[str, Any] = {}
    for name, value in found.items():
        try:
            kept = keep(value, name)
        except CheckpointError:
            continue
        if not (isinstance(kept, dict) and kept.get(MARK) in ("object", "fields", "phases")):
            plain[name] = value
    return plain


class Kept:
    """What of a callback or a phase is kept: what its pair gives, or the attributes that have changed.

    Args:
        thing: The callback or phase, set up and not yet used.
        name: What it is called in messages.
    """

    def __init__(self, thing: Any, name: str) -> None:
        self.thing = thing
        self.name = name
        self.transient = tuple(getattr(thing, "transient", ()))
        self._first = {} if is_stateful(thing) else {key: _look(value) for key, value in self._own().items()}

    def _own(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in attributes(self.thing).items()
            if name not in self.transient and not name.startswith("__")
        }

    def state(self, borrowed: Callable[[Any], bool]) -> tuple[Any, list[str]]:
        """Give the state as plain data (None where there is nothing to keep), and what of it is lost.

        Args:
            borrowed: Tells whether an object belongs to somebody else, who keeps it.

        Raises:
            CheckpointError: What the pair gives is no plain data.
        """
        if is_stateful(self.thing):
            state = self.thing.state_dict()
            return (None if not state else keep(state, f"{self.name}.state_dict()")), []
        kept: dict[str, Any] = {}
        lost: list[str] = []
        for name, value in self._own().items():
            owns = isinstance(value, (nn.Module, Optimizer)) or is_stateful(value)
            if borrowed(value) or not (owns or name not in self._first or self._first[name] != _look(value)):
                continue
            try:
                kept[name] = keep(value, f"{self.name}.{name}")
            except CheckpointError:
                lost.append(f"{self.name}.{name}")
        return kept or None, lost

    def load(self, state: Any, phases: Iterable[type], device: torch.device) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: It cannot be put back.
        """
        if is_stateful(self.thing):
            restored = put_back(state, phases=phases, device=device, where=f"{self.name}.state_dict()")
            self.thing.load_state_dict(restored)
            return
        own = attributes(self.thing)
        for name, kept in (state or {}).items():
            where = f"{self.name}.{name}"
            value = put_back(kept, own.get(name), phases=phases, device=device, where=where)
            if own.get(name) is not value:
                object.__setattr__(self.thing, name, value)


def size(kept: Any) -> int:
    """Give the size of plain data in bytes, as it is in memory, roughly."""
    if isinstance(kept, Tensor):
        return kept.numel() * kept.element_size()
    if isinstance(kept, Mapping):
        return sum(size(key) + size(item) for key, item in kept.items())
    if isinstance(kept, (list, tuple, set)):
        return sum(map(size, kept))
    return len(kept) if isinstance(kept, (str, bytes)) else 8


def snapshot(kept: Any) -> Any:
    """Copy plain data, so that what happens next does not change it; tensors come to the CPU."""
    if isinstance(kept, Tensor):
        return kept.detach().to("cpu", copy=True)
    if isinstance(kept, OrderedDict):
        return OrderedDict((key, snapshot(item)) for key, item in kept.items())
    if isinstance(kept, dict):
        return {key: snapshot(item) for key, item in kept.items()}
    if type(kept) in (list, tuple):
        return type(kept)(snapshot(item) for item in kept)
    return kept
