"""Values as plain data, and made from it again.

Plain data is what ``torch.load(weights_only=True)`` reads: numbers, texts, tensors, and lists,
tuples, dicts and sets of them. Other containers are written as a marked dict. An object with an
identity (a random generator, something with ``state_dict`` and ``load_state_dict``, an instance
of a class with fields) is written as its state, and restored into the live one. Nothing in a
checkpoint names a class to import or a function to call.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from itertools import chain
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fluxloop.errors import CheckpointError, describe, warn_user
from fluxloop.persist.series import Series
from fluxloop.state import Container, NamedPhase, PhaseDict, name_of

MARK = "__kept__"
"""The key under which a dict of plain data says what it stands for."""
SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def class_name(cls: type) -> str:
    """Name a class with its module, as a checkpoint does."""
    return f"{cls.__module__}.{cls.__qualname__}"


def phase_id(phase: Any) -> str:
    """Name a phase as a checkpoint does: by its class and, where it has one, its own name in brackets."""
    cls = phase.cls if isinstance(phase, NamedPhase) else phase if isinstance(phase, type) else type(phase)
    name = name_of(phase)
    return class_name(cls) if name == name_of(cls) else f"{class_name(cls)}[{name}]"


def phase_of(id: str, phases: Iterable[type]) -> NamedPhase | None:
    """Return the phase that `phase_id` named, or None where there is no such class.

    Args:
        id: What a checkpoint calls it.
        phases: The phase types that there are.
    """
    name, _, own = id.partition("[")
    cls = next((cls for cls in phases if class_name(cls) == name), None)
    return None if cls is None else NamedPhase(cls, own[:-1] or name_of(cls))


# Writing


def to_plain(value: Any, where: str) -> Any:
    """Turn a value into plain data; see `_to_plain`."""
    try:
        return _to_plain(value, where)
    except RecursionError:
        raise CheckpointError(
            f"{where} is a {type(value).__name__} that contains itself, which cannot be kept in a checkpoint"
        ) from None


def _to_plain(value: Any, where: str) -> Any:
    """Turn a value into plain data.

    Args:
        value: Anything.
        where: What it is called in a message.

    Raises:
        CheckpointError: It, or something in it, is none of what can be kept.
    """
    kind = type(value)
    if kind in NUMBERS:  # by type alone, which is quick: most values are these
        return value
    if isinstance(value, Tensor):
        return _tensor_to_plain(value)
    if kind in (list, tuple) and is_simple(value):
        return kind(value)
    if kind.__module__.partition(".")[0] == "numpy":
        return _numpy_to_plain(value, where)
    if isinstance(value, SCALARS):
        return _plain_scalar(value, where)
    plain = _container_to_plain(value, where)
    return _object_to_plain(value, where) if plain is None else plain


def _tensor_to_plain(value: Tensor) -> Any:
    value = value.detach()
    if value.untyped_storage().nbytes() > value.nbytes:  # a view, of a data set perhaps: a file holds all of its memory
        value = value.clone()
    return value if value.is_cpu else {MARK: "on the device", "tensor": value}


def _container_to_plain(value: Any, where: str) -> Any:
    """Turn a container into plain data; return None for anything else."""
    kind = type(value)
    if kind is Series:
        return _series_to_plain(value, where)
    if isinstance(value, PhaseDict):
        items = {phase_id(phase): _to_plain(item, f"{where}[{phase.__name__}]") for phase, item in value.items()}
        return {MARK: "phases", "items": items}
    if kind in (list, tuple):
        return kind(_item_to_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict):
        return of_entries(((key, _item_to_plain(item, f"{where}[{key!r}]")) for key, item in value.items()), where)
    if isinstance(value, (set, frozenset)):
        ordered = sorted(value, key=repr)  # the same set is the same file
        return {MARK: kind.__name__, "items": [_item_to_plain(item, where) for item in ordered]}
    if isinstance(value, deque):
        return {MARK: "deque", "items": [_item_to_plain(item, where) for item in value], "maxlen": value.maxlen}
    return None


def _object_to_plain(value: Any, where: str) -> dict[str, Any]:
    """Turn a generator, or an object with the pair or with fields, into its state.

    Raises:
        CheckpointError: It is none of them.
    """
    if isinstance(value, torch.Generator):
        return {MARK: "object", "state": value.get_state()}
    if isinstance(value, random.Random):
        return {MARK: "object", "state": value.getstate()}
    if is_stateful(value):
        return {MARK: "object", "state": _to_plain(value.state_dict(), where)}
    fields = _fields(value)
    if fields is not None:
        return {MARK: "fields", "items": {name: _to_plain(item, f"{where}.{name}") for name, item in fields.items()}}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which cannot be kept in a checkpoint; expected numbers, texts, tensors, "
        "containers of them, or an object with state_dict() and load_state_dict(state)"
    )


def _series_to_plain(series: Series, where: str) -> Any:
    """Turn a series into arrays, or into a list where it holds other things."""
    arrays = series.arrays()
    if arrays is None:
        return _to_plain(list(series), where)
    steps, values = arrays
    tensors = type(series[0][1]) is Tensor
    return {MARK: "series", "steps": steps, "values": _to_plain(values, where), "tensors": tensors}


NUMBERS = frozenset((type(None), bool, int, float, str))
NUMBERS_AND_TUPLES = NUMBERS | {tuple}


def is_simple(items: list[Any] | tuple[Any, ...]) -> bool:
    """Return whether a list, perhaps a long series, holds numbers, texts, and tuples of them alone."""
    kinds = set(map(type, items))
    if kinds <= NUMBERS:
        return True
    if not kinds <= NUMBERS_AND_TUPLES:
        return False
    rows = items if len(kinds) == 1 else [item for item in items if type(item) is tuple]
    return set(map(type, chain.from_iterable(rows))) <= NUMBERS


def _item_to_plain(value: Any, where: str) -> Any:
    """Turn an item of a container into plain data: there is no live one to restore an object's state into."""
    numpys = type(value).__module__.partition(".")[0] == "numpy"
    if isinstance(value, (PhaseDict, torch.Generator, random.Random)) or (
        not isinstance(value, (Tensor, *SCALARS, dict, list, tuple, set, frozenset, deque))
        and (_numpy_state(value) is not None if numpys else is_stateful(value) or _fields(value) is not None)
    ):
        raise CheckpointError(
            f"{where} is a {type(value).__name__} inside a container, which cannot be kept in a checkpoint; keep its "
            "numbers, texts and tensors there instead, or give what holds it state_dict() and load_state_dict(state)"
        )
    return _to_plain(value, where)


def _plain_scalar(value: Any, where: str) -> Any:
    """Turn a number or text of a class of its own into the number or text it is.

    Raises:
        CheckpointError: It is a member of an enumeration that is neither.
    """
    if isinstance(value, Enum):
        if not isinstance(value, (int, float, str, bytes)):
            raise CheckpointError(f"{where} is {value!r}, which cannot be kept in a checkpoint; keep its name or value")
        return value.value
    if isinstance(value, bytes):  # PyTorch before 2.5 reads neither these nor complex numbers
        raw = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
        return {MARK: "bytes", "bytes": raw}
    if isinstance(value, complex):
        return {MARK: "complex", "parts": (value.real, value.imag)}
    bases: tuple[Any, ...] = (int, float, str)
    for base in bases:
        if isinstance(value, base) and type(value) not in NUMBERS:
            return base(value)
    return value


def of_entries(pairs: Iterable[tuple[Any, Any]], where: str = "") -> dict[Any, Any]:
    """Turn a dict's keys and kept items into a dict of plain data."""
    entries = [(key if type(key) in NUMBERS else _plain_key(key, where), item) for key, item in pairs]
    # A dict is no key of a dict; and one with the mark among its keys would be read as what the mark says
    if any(isinstance(key, dict) or key == MARK for key, _ in entries):
        return {MARK: "pairs", "items": entries}
    return dict(entries)


def _plain_key(key: Any, where: str) -> Any:
    """Turn a key of a dict into plain data; a marked dict where it is no number or text."""
    if type(key).__module__.partition(".")[0] == "numpy" and hasattr(key, "item"):
        key = key.item()
    if isinstance(key, SCALARS):
        return _plain_scalar(key, where)
    if isinstance(key, tuple):
        parts = tuple(_plain_key(part, where) for part in key)
        return {MARK: "key", "parts": parts} if any(isinstance(part, dict) for part in parts) else parts
    raise CheckpointError(
        f"{where} has the key {key!r}, which cannot be kept in a checkpoint; expected numbers or texts as keys"
    )


def _numpy_to_plain(value: Any, where: str) -> Any:
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.ndarray) and value.dtype.names is None and not value.dtype.hasobject:
        raw = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.size else torch.empty(0)
        return {MARK: "array", "dtype": value.dtype.str, "shape": tuple(value.shape), "bytes": raw}
    if isinstance(value, numpy.generic) and value.dtype.names is None and not value.dtype.hasobject:
        return {MARK: "numpy scalar", "dtype": value.dtype.str, "value": value.item()}
    state = _numpy_state(value)
    if state is not None:
        return {MARK: "object", "state": _to_plain(state, where)}
    raise CheckpointError(f"{where} is a {type(value).__name__} of NumPy's, which cannot be kept in a checkpoint")


def _numpy_state(value: Any) -> Any:
    """Return the state of a random generator of NumPy's, None for anything else."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return value.bit_generator.state
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.get_state(legacy=False)
    return None


def is_stateful(value: Any) -> bool:
    """Return whether an object has ``state_dict`` and ``load_state_dict``."""
    names = ("state_dict", "load_state_dict")
    return not isinstance(value, type) and all(callable(getattr(type(value), name, None)) for name in names)


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of an instance of a class that names them; None for anything else."""
    if isinstance(value, type) or callable(value):
        return None
    if attrs.has(type(value)) or dataclasses.is_dataclass(value):
        fields = attrs.fields(type(value)) if attrs.has(type(value)) else dataclasses.fields(value)
        return {field.name: getattr(value, field.name) for field in fields}
    return dict(vars(value)) if isinstance(value, Container) and hasattr(value, "__dict__") else None


# Reading

Again = Callable[..., Any]
"""Makes of an item of plain data what it was; also takes what is there now, and what to add to the name."""


def is_held(kept: Any) -> bool:
    """Return whether what was kept is the state of an object, which has to be there."""
    return isinstance(kept, dict) and kept.get(MARK) in ("object", "fields", "phases")


def from_plain(  # noqa: PLR0911  # one per kind of value
    kept: Any,
    live: Any = None,
    *,
    phases: Iterable[type] = (),
    device: torch.device | None = None,
    where: str = "it",
) -> Any:
    """Make of plain data what it was; an object's state is restored into the live one, which is returned.

    Args:
        kept: What `to_plain` returned.
        live: What is there now.
        phases: The phase types that there are.
        device: Where tensors belong that were on a device.
        where: What it is called in a message.

    Raises:
        CheckpointError: The live object is missing, or of another kind.
    """

    def again(item: Any, now: Any = None, name: str = "") -> Any:
        return from_plain(item, now, phases=phases, device=device, where=where + name)

    if isinstance(kept, Tensor):
        return _tensor_from_plain(kept, live)
    if type(kept) is tuple:
        return kept if is_simple(kept) else tuple(again(item) for item in kept)
    if isinstance(kept, list):
        return _fill(live, list(kept) if is_simple(kept) else [again(item) for item in kept])
    if not isinstance(kept, dict):
        return kept
    mark = kept.get(MARK, "dict")
    if mark == "on the device":
        return kept["tensor"].to(device, copy=True)
    if mark == "phases":
        return _phases_from_plain(kept, live, again, where, phases)
    if mark in ("dict", "pairs"):
        return _dict_from_plain(kept, live, again)
    if mark == "series":
        return _fill(live, _series_from_plain(kept, again))
    return _VALUES[mark](kept, again) if mark in _VALUES else _into(kept, live, again, where)


def _tensor_from_plain(kept: Tensor, live: Any) -> Tensor:
    if isinstance(live, Tensor) and live.is_leaf and live.requires_grad and live.shape == kept.shape:
        with torch.no_grad():  # an optimizer may hold it
            return live.copy_(kept)
    return kept.clone()


def _fill(live: Any, items: list[Any]) -> Any:
    """Return a list with these items: the live one where there is one, as others may hold it too."""
    if type(live) not in (list, Series) and not (isinstance(items, Series) and isinstance(live, list)):
        return items
    live[:] = items
    return live


def _dict_from_plain(kept: dict[str, Any], live: Any, again: Again) -> Any:
    entries = {again(key): again(item) for key, item in items_of(kept)}
    if not isinstance(live, dict):
        return entries
    live.clear()  # it may be of a type of its own, and others may hold it too
    live.update(entries)
    return live


def _series_from_plain(kept: dict[str, Any], again: Again) -> Series:
    values = again(kept["values"])
    rows = values.unbind() if kept["tensors"] else values.tolist()
    return Series(zip(kept["steps"].tolist(), rows, strict=True))


def _phases_from_plain(kept: dict[str, Any], live: Any, again: Again, where: str, phases: Iterable[type]) -> Any:
    """Restore values by phase, into the live ones: a value may be an object."""
    if not isinstance(live, PhaseDict):
        raise misplaced(where, "a PhaseDict", live)
    found = {id: phase_of(id, phases) for id in kept["items"]}
    missing = sorted(id for id, phase in found.items() if phase is None)
    if missing:
        warn_user(f"{where} was kept for the phases {missing}, which nobody has defined now")
    for phase in [phase for phase in live if phase_id(phase) not in kept["items"]]:
        del live[phase]
    for id, named in found.items():
        if named is not None:
            live[named] = again(kept["items"][id], live[named], f"[{named.name}]")
    return live


def _bytes_from_plain(kept: dict[str, Any], again: Again) -> bytes:
    return bytes(kept["bytes"].tolist()) if "bytes" in kept else b""


def _numpy_from_plain(kept: dict[str, Any], again: Again) -> Any:
    import numpy

    if kept[MARK] == "numpy scalar":
        return numpy.dtype(kept["dtype"]).type(kept["value"])
    raw = kept["bytes"].to(torch.uint8).numpy().tobytes()
    return numpy.frombuffer(raw, dtype=kept["dtype"]).reshape(kept["shape"]).copy()


_VALUES: dict[str, Callable[[dict[str, Any], Again], Any]] = {
    "bytes": _bytes_from_plain,
    "no bytes": _bytes_from_plain,  # as an earlier version wrote them
    "complex": lambda kept, again: complex(*kept["parts"]),
    "key": lambda kept, again: again(kept["parts"]),
    "set": lambda kept, again: set(map(again, kept["items"])),
    "frozenset": lambda kept, again: frozenset(map(again, kept["items"])),
    "deque": lambda kept, again: deque(map(again, kept["items"]), kept["maxlen"]),
    "array": _numpy_from_plain,
    "numpy scalar": _numpy_from_plain,
}
"""How values are made that need nothing live, by mark."""


def items_of(kept: dict[str, Any]) -> Iterable[tuple[Any, Any]]:
    """Return the keys and items of what `to_plain` made of a dict."""
    if kept.get(MARK) == "pairs":
        return list(kept["items"])
    return (kept["items"] if MARK in kept else kept).items()


def _into(kept: dict[str, Any], live: Any, again: Again, where: str) -> Any:
    """Restore an object's state into the live one."""
    if kept[MARK] == "fields":
        fields = _fields(live)
        if fields is None:
            raise misplaced(where, "an object with fields", live)
        for name, item in kept["items"].items():
            # also of a frozen class, which refuses an assignment
            object.__setattr__(live, name, again(item, fields.get(name), f".{name}"))
    elif isinstance(live, torch.Generator):
        live.set_state(kept["state"])
    elif isinstance(live, random.Random):
        live.setstate(kept["state"])
    elif _numpy_state(live) is not None:
        _set_numpy_state(live, again(kept["state"]))
    elif is_stateful(live):
        live.load_state_dict(again(kept["state"]))
    else:
        raise misplaced(where, "an object with load_state_dict(state), or a random generator", live)
    return live


def is_numpy_generator(value: Any) -> bool:
    """Return whether a value is a random generator of NumPy's."""
    return _numpy_state(value) is not None


def _set_numpy_state(live: Any, state: Any) -> None:
    if hasattr(live, "bit_generator"):
        live.bit_generator.state = state
    else:
        live.set_state(state)


def misplaced(where: str, expected: str, live: Any) -> CheckpointError:
    """Return the error for a state whose object is not there."""
    return CheckpointError(
        f"the checkpoint has a state for {where}, which is {describe(live)} now; expected {expected}, made as in the "
        "run that wrote it"
    )


# Sizes and copies


def size(kept: Any) -> int:
    """Return roughly how many bytes plain data takes in memory."""
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
        return kept if is_lazy(kept) else kept.detach().to("cpu", copy=True)
    if isinstance(kept, dict):
        return {key: snapshot(item) for key, item in kept.items()}
    if type(kept) is list and is_simple(kept):
        return list(kept)
    if type(kept) is tuple and is_simple(kept):
        return kept
    if type(kept) in (list, tuple):
        return type(kept)(snapshot(item) for item in kept)
    return kept
