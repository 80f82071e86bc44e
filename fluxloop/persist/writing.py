"""Writing what a walk has reached as plain data, as far as it has changed."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from fluxloop.errors import CheckpointError
from fluxloop.persist.modules import module_to_plain
from fluxloop.persist.plain import MARK, NUMBERS, class_name, is_simple, of_entries, to_plain
from fluxloop.persist.reached import Owner, Reached
from fluxloop.persist.sameness import Opaque, digest, identical, opaque_in, same_bits
from fluxloop.persist.things import SETTABLE, SLOTTED, VALUES, Thing, items_in, kind_of, slots_of

State = dict[str, Any]
PAIR = "pair"
"""The entry of a root's state that holds what its pair returned; an attribute of this name is kept elsewhere."""
APART = {MARK: "apart"}
"""Stands for a generator of a data set, which is kept apart from what else the data set holds."""


class LostError(Exception):
    """A value cannot be kept; its path is the argument."""


class Writer:
    """Writes what has changed of the things that a walk has reached. One is made for each time of writing.

    Args:
        reached: The things.
        owner: Returns the name of what somebody else keeps.
        noted: Where to note the paths of new objects; None where they are to be written.
    """

    def __init__(self, reached: Reached, owner: Owner, noted: set[str] | None = None) -> None:
        self._reached = reached
        self._owner = owner
        self._noted = noted
        self._paths: dict[int, str] = {}
        """Where each new value was written first: it is written once, and then as a reference to that path."""
        self._alive: list[Any] = []  # so that no other value gets the id of one that was written
        self._stands_for: dict[int, Any] = {}
        self._referred: set[tuple[str, str]] = set()

    def states(self) -> tuple[dict[str, State], list[str]]:
        """Return what has changed as plain data, by root, and the paths of what is lost.

        Raises:
            CheckpointError: What the pair of a root returns is no plain data.
        """
        states: dict[str, State] = {root: {} for root in self._reached.roots}
        lost: dict[str, None] = {}
        for met in self._reached.things:
            try:
                if met.untouched is None and met.kind not in ("iterator", "resource"):
                    self._add(met, states[met.root], lost)
                elif met.kind == "iterator" or (met.kind != "resource" and not identical(items_in(met), met.raw)):
                    lost[met.untouched or self._reached.where(met.root, met.key)] = None
            except LostError as error:
                lost[error.args[0]] = None
            except (CheckpointError, RecursionError) as error:
                if met.key == "" and isinstance(error, CheckpointError):
                    raise
                lost[self._reached.where(met.root, met.key)] = None
        for root, state in states.items():
            self._drop_replaced(root, state)
        return {root: state for root, state in states.items() if state}, list(lost)

    def _drop_replaced(self, root: str, state: State) -> None:
        """Drop the contents of attributes' first values that nobody holds any longer: the attributes hold others."""
        inner = state.get(MARK, {})
        for key in [key for key in inner if key and is_attribute(key) and (root, key) not in self._referred]:
            del inner[key]
        if MARK in state and not inner:
            del state[MARK]

    def _add(self, met: Thing, state: State, lost: dict[str, None]) -> None:
        """Add what has changed of a thing to its root's state."""
        if met.kind in SLOTTED:
            slots = self._changed_slots(met, lost)
            own = self.contents(met) if met.kind in ("pair", "module") else None
            if own is not None and not is_attribute(met.key) and same_bits(own, met.first.get("")):
                own = None  # an attribute's is kept in any case: it may have begun with other random numbers
            if met.key == "":
                if f".{PAIR}" in slots:
                    state[MARK] = {"": {MARK: "slots", "slots": {f".{PAIR}": slots.pop(f".{PAIR}")}}}
                state.update({label[1:]: kept for label, kept in slots.items()})
                if own is not None:
                    state[PAIR] = own["state"] if met.kind == "pair" else own
                return
            entry = {**(own or {MARK: "slots"}), **({"slots": slots} if slots else {})}
            if own is None and not slots:
                return
        else:
            kept = self.changed(met)
            if kept is None:
                return
            # a generator's state is marked as an object's already
            entry = kept[0] if met.kind == "generator" else {MARK: "changed", "to": kept[0]}
        root = self._reached.by_id[id(self._reached.roots[met.root])]
        is_held = is_attribute(met.key) and slots_of(root).get(f".{met.key}") is met.thing
        if is_held and met.key not in state and met.key != PAIR:
            state[met.key] = entry
        else:
            state.setdefault(MARK, {})[met.key] = entry
            if is_held:  # so that it is not dropped as one that was replaced
                self._referred.add((met.root, met.key))

    def _changed_slots(self, met: Thing, lost: dict[str, None]) -> State:
        """Return the slots that hold something else than at first; those that cannot be kept are noted as lost."""
        now, kept = slots_of(met), State()
        if identical([*now, *now.values()], met.raw):
            return kept
        for label in met.first:
            if label and label not in now:
                kept[label] = {MARK: "gone"}
        for label, value in now.items():
            path = self._reached.where(met.root, f"{met.key}{label}".lstrip("."))
            written = self.write(value, path)
            if label in met.first and (
                same_bits(written, met.first[label]) or self._is_equal(value, written, met.first[label])
            ):
                continue
            opaque = next(opaque_in(written), None)
            if opaque is not None or met.kind not in SETTABLE:
                if opaque is None or opaque.path:
                    lost[opaque.path if opaque is not None else path] = None
                continue
            kept[label] = written
        return kept

    def _is_equal(self, value: Any, written: Any, first: Any) -> bool:
        """Return whether a new container or tensor holds what the first one held: then it stands for that one.

        So ``self.items = list(self.items)`` is no change, and whatever else shares the first list still shares it.
        """
        known = self._reached.by_path.get((first["root"], first["key"])) if _is_reference(first) else None
        if known is None or type(known.thing) is not type(value) or known.kind not in VALUES:
            return False
        before = known.first["tensor"] if known.kind == "tensor" and known.first is not None else known.first
        now = written["items"] if known.kind == "deque" else written
        if known.first is None or not same_bits(now, before) or not self.is_as_first(known):
            return False
        self._stands_for[id(value)] = first
        return True

    def is_as_first(self, met: Thing) -> bool:
        """Return whether a container, tensor, array or generator holds what it held at first."""
        try:
            return self.changed(met) is None
        except LostError:
            return False

    def changed(self, met: Thing) -> tuple[Any] | None:
        """Return in a tuple what a container, tensor, array or generator holds; None where it is what it held at first.

        Raises:
            LostError: It cannot be kept.
        """
        if met.kind in ("tensor", "array"):
            return self._changed_numbers(met)
        if met.kind not in ("generator", "phases") and identical(items_in(met), met.raw):
            return None
        written = self.contents(met)
        if not isinstance(written, Opaque) and same_bits(written, met.first):  # one says nothing of what is in it
            return None
        for opaque in opaque_in(written):
            raise LostError(opaque.path or self._reached.where(met.root, met.key))
        return (written,)

    def _changed_numbers(self, met: Thing) -> tuple[Any] | None:
        value, data = met.thing, self._reached.data
        if isinstance(value, Tensor) and is_lazy(value):
            return None
        if data and isinstance(value, Tensor) and not value.is_cpu and value._version == met.changes:
            return None  # nobody waits for the device in each epoch
        if met.first is None:  # it was too large to be copied
            same = value._version == met.changes if isinstance(value, Tensor) else met.raw == digest(value)
            return None if data and same else (self.contents(met),)
        written = self.contents(met)
        return None if same_bits(written, met.first) else (written,)

    def contents(self, met: Thing) -> Any:
        """Write what a thing holds as plain data."""
        thing, kind = met.thing, met.kind
        where = self._reached.where(met.root, met.key)
        if kind in ("list", "deque"):
            return list(thing) if is_simple(thing) else self._items(thing, where)
        if kind == "dict":
            return self._entries(thing, where)
        if kind == "tensor":
            grad = thing.grad if thing.is_leaf and thing.requires_grad else None
            return {"tensor": to_plain(thing, where), "grad": None if grad is None else to_plain(grad, where)}
        if kind == "module":
            return module_to_plain(thing, where)
        if kind == "pair":
            return {MARK: "object", "state": to_plain(thing.state_dict(), f"{where}.state_dict()")}
        return to_plain(thing, where) if kind != "set" else _plain_or_opaque(thing, where)

    # One value

    def write(self, value: Any, path: str) -> Any:
        """Write a value as plain data: what was there at first as a reference, what cannot be kept as an `Opaque`."""
        if type(value) in NUMBERS:
            return value
        known = self._known(value, path)
        if known is not None:
            return known
        kind = kind_of(value)
        if kind == "generator" and self._reached.data:
            return APART
        if kind == "":
            return self._constant(value, path)
        if kind == "tuple":
            return self._tuple(value, path)
        if id(value) in self._paths:
            return {MARK: "again", "path": self._paths[id(value)]}
        self._paths[id(value)] = path
        self._alive.append(value)
        return self._new(value, kind, path)

    def _known(self, value: Any, path: str) -> Any:
        """Write a value that was there at first, or that somebody else keeps; None for others."""
        met = self._reached.by_id.get(id(value))
        if met is not None:
            self._referred.add((met.root, met.key))
            return {MARK: "first", "root": met.root, "key": met.key}
        if id(value) in self._reached.beyond:
            return Opaque(value, path)
        if id(value) in self._stands_for:
            return self._stands_for[id(value)]
        name = self._owner(value)
        if name is None:
            return None
        return {MARK: "owned", "name": name} if name else Opaque(value, "")

    def _constant(self, value: Any, path: str) -> Any:
        if isinstance(value, Enum):
            name = class_name(type(value))
            if self._reached.classes.get(name) is type(value):
                return {MARK: "member", "class": name, "name": value.name}
        if isinstance(value, PurePath):
            return {MARK: "path", "text": str(value)}
        if type(value) is range:
            return {MARK: "range", "ends": (value.start, value.stop, value.step)}
        return _plain_or_opaque(value, path)

    def _tuple(self, value: Any, path: str) -> Any:
        """Write a tuple item by item; a named one with the name of its class."""
        items = tuple(value) if is_simple(value) else tuple(self._items(value, path))
        if type(value) is tuple:
            return value if is_simple(value) else items
        name = class_name(type(value))
        known = self._reached.classes.get(name) is type(value) and hasattr(value, "_fields")
        return {MARK: "named tuple", "class": name, "items": items} if known else Opaque(value, path)

    def _new(self, value: Any, kind: str, path: str) -> Any:
        """Write out what has come since the walk began; of an object that the script makes in each fit, its slots."""
        if kind == "list" and type(value) is list:
            return list(value) if is_simple(value) else self._items(value, path)
        if kind == "deque":
            return {MARK: "deque", "items": self._items(value, path), "maxlen": value.maxlen}
        if kind == "dict":
            return self._entries(value, path)
        if kind in ("tensor", "array", "set"):
            return Opaque(value, path) if kind == "tensor" and is_lazy(value) else _plain_or_opaque(value, path)
        if self._noted is not None:
            self._noted.add(path)
            return Opaque(value, path) if kind in ("pair", "generator") else self._made(value, kind, path)
        if kind == "generator" or (path in self._reached.made and kind in ("pair", "module", "object")):
            return self._made(value, kind, path)
        return Opaque(value, path)  # nothing in a checkpoint names a class to make one of

    def _made(self, value: Any, kind: str, path: str) -> Any:
        """Write an object that the script makes in each fit: its state, to be put into the one that is there then."""
        made = Thing(value, kind, "", path, None)
        if kind in ("generator", "pair"):
            return _plain_or_opaque(value, path)
        try:
            written: State = module_to_plain(value, path) if kind == "module" else {MARK: "made"}
        except CheckpointError:
            return Opaque(value, path)
        slots = slots_of(made)
        if any(kind_of(item) == "resource" for item in slots.values()):
            return Opaque(value, path)
        written["slots"] = {label: self.write(item, f"{path}{label}") for label, item in slots.items()}
        return written

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self.write(value, f"{path}[{index}]") for index, value in enumerate(values)]

    def _entries(self, value: Mapping[Any, Any], path: str) -> Any:
        try:
            return of_entries(((k, self.write(v, f"{path}[{k!r}]")) for k, v in value.items()), path)
        except CheckpointError:
            return Opaque(value, path)


def is_attribute(key: str) -> bool:
    """Return whether a key is that of an attribute of the root, or of the root itself."""
    return "." not in key and "[" not in key


def _is_reference(written: Any) -> bool:
    return isinstance(written, dict) and written.get(MARK) == "first"


def _plain_or_opaque(value: Any, path: str) -> Any:
    try:
        return to_plain(value, path)
    except CheckpointError:
        return Opaque(value, path)
