"""Restoring what a walk has reached from what a `Writer` wrote, into the same places."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxloop.errors import warn_user
from fluxloop.persist.modules import load_module
from fluxloop.persist.owners import Restoring
from fluxloop.persist.plain import MARK, NUMBERS, from_plain, is_simple, items_of, misplaced
from fluxloop.persist.reached import Reached
from fluxloop.persist.sameness import Opaque, opaque_in, same_bits
from fluxloop.persist.things import SLOTTED, Thing, kind_of, remove_slot, set_slot, slots_of
from fluxloop.persist.writing import PAIR, Writer

State = dict[str, Any]
THERE = "what was there in the run that wrote it"
_ENTRIES = ("changed", "slots", "object", "module", "fields")
_GONE = {MARK: "gone"}
_AS_IT_IS: Any = object()
"""Stands for what is not to be restored."""


class Reader:
    """Restores the things that a walk has reached. One is made for each time of restoring.

    Args:
        reached: The things.
        restoring: Who keeps what, and what has begun.
    """

    def __init__(self, reached: Reached, restoring: Restoring) -> None:
        self._reached = reached
        self._restoring = restoring
        self._writer = Writer(reached, restoring.owners)  # to compare what there is with what it is to be
        self._read: dict[str, Any] = {}
        """What was read, by the path under which it was written: a later reference finds it there."""

    def restore(self, states: Mapping[str, State]) -> None:
        """Restore what had changed, and what had not as it was at first.

        Args:
            states: What `Writer.states` returned, by root.

        Raises:
            CheckpointError: It cannot be restored.
        """
        # All of it before anything is changed: a state that names what is not there is refused as a whole
        entries = {id(met.thing): self._entry(met, states.get(met.root) or {}) for met in self._reached.things}
        for root, state in states.items():
            self._check_reached(root, state)
        for met in self._reached.things:
            if met.untouched is None and met.kind not in ("iterator", "resource"):
                self._restore(met, entries[id(met.thing)])
        # Then the pairs, the innermost first: one may look at attributes and at objects below it
        for met in reversed(self._reached.things):
            if met.kind in ("pair", "module") and met.untouched is None:
                self._load_own(met, entries[id(met.thing)])

    # What a state says

    def _entry(self, met: Thing, state: State) -> State:
        """Return what a root's state says about a thing."""
        if met.key == "":
            own = {PAIR: state[PAIR]} if PAIR in state else {}
            slots = {f".{name}": kept for name, kept in state.items() if name not in (MARK, PAIR)}
            slots = {n: k for n, k in slots.items() if not self._is_entry(met.root, n[1:], k)}
            return {**own, "slots": {**slots, **state.get(MARK, {}).get("", {}).get("slots", {})}}
        entry = state.get(MARK, {}).get(met.key)
        if entry is None and met.key != PAIR and self._is_entry(met.root, met.key, state.get(met.key)):
            entry = state[met.key]
        if entry is not None and entry.get(MARK) == "fields":  # as it was written before there was a walk
            entry = {"slots": {f".{name}": kept for name, kept in entry["items"].items()}}
        return entry or {}

    def _is_entry(self, root: str, key: str, kept: Any) -> bool:
        """Return whether an attribute's name has, in a state, the contents of the thing that was there at first."""
        if not isinstance(kept, dict) or kept.get(MARK) not in _ENTRIES:
            return False
        return (root, key) in self._reached.by_path or kept[MARK] in ("changed", "slots")

    def _check_reached(self, root: str, state: State) -> None:
        """Raise for contents of what is not there now.

        Raises:
            CheckpointError: Names it.
        """
        inner = [*state.get(MARK, {}), *(name for name, kept in state.items() if self._is_entry(root, name, kept))]
        for key in inner:
            if (root, key) not in self._reached.by_path:
                raise misplaced(self._reached.where(root, key), THERE, None)

    # Things that were there at first

    def _restore(self, met: Thing, entry: State) -> None:
        """Restore what a thing holds."""
        if met.kind in SLOTTED:
            self._restore_slots(met, entry.get("slots", {}))
        elif entry or not self._writer.is_as_first(met):
            kept = entry.get("to", entry) if entry else met.first
            where = self._reached.where(met.root, met.key)
            if kept is None:
                warn_user(f"{where} has changed, and is too large to be put back; the checkpoint has no state for it")
            elif entry or not self._restoring.running or self._can_be_kept(met):
                self._fill(met, kept, where)

    def _can_be_kept(self, met: Thing) -> bool:
        return next(opaque_in(self._writer.contents(met)), None) is None

    def _restore_slots(self, met: Thing, kept: State) -> None:
        now = slots_of(met)
        for label in dict.fromkeys((*met.first, *now, *kept)):
            if label == "":
                continue
            path = self._reached.where(met.root, f"{met.key}{label}".lstrip("."))
            written = kept.get(label, met.first.get(label, _GONE))
            if label in now and label not in kept:
                before = self._writer.write(now[label], path)
                made_again = self._restoring.running and next(opaque_in(before), None) is not None
                if made_again or same_bits(before, written):
                    continue
            if isinstance(written, dict) and written.get(MARK) == "gone":
                if label in now:
                    remove_slot(met, label)
                continue
            self._set(met, label, written, now, path)

    def _set(self, met: Thing, label: str, written: Any, now: dict[str, Any], path: str) -> None:
        value = self._value(written, now.get(label), path)
        if value is not _AS_IT_IS and (label not in now or now[label] is not value):
            set_slot(met, label, value)

    def _load_own(self, met: Thing, entry: State) -> None:
        """Have an object with the pair, or a module, load the state it returned."""
        where = self._reached.where(met.root, met.key)
        if met.kind == "module":
            state = entry.get(PAIR, entry)
            if state.get(MARK) not in ("module", "object"):
                state = met.first.get("")
            elif state[MARK] == "object":  # as it was written before there was a walk
                state = {MARK: "module", "state": state["state"]}
            if state is not None:
                self._load_module(met.thing, state, where)
            return
        given = entry[PAIR] if PAIR in entry else entry.get("state", _AS_IT_IS)
        if given is _AS_IT_IS:
            first = met.first.get("")
            if first is None or same_bits(self._writer.contents(met)["state"], first["state"]):
                return
            given = first["state"]
        met.thing.load_state_dict(self._from_plain(given, None, f"{where}.state_dict()"))

    def _load_module(self, module: Any, state: State, where: str) -> None:
        load_module(module, state, lambda written: self._from_plain(written, None, where))

    def _from_plain(self, kept: Any, live: Any, where: str) -> Any:
        how = self._restoring
        return from_plain(kept, live, phases=how.phases, device=how.device, where=where)

    def _fill(self, met: Thing, kept: Any, where: str) -> None:
        """Have a container, tensor, array or generator hold what was kept."""
        thing, kind = met.thing, met.kind
        if isinstance(kept, Opaque):  # objects: the very items are known
            _refill(thing, met.raw)
        elif kind == "tensor":
            set_tensor(thing, self._from_plain(kept["tensor"], None, where))
            grad = kept["grad"]
            if thing.is_leaf and thing.requires_grad:
                thing.grad = None if grad is None else self._from_plain(grad, None, where).to(thing.device)
        elif kind in ("generator", "phases"):
            self._from_plain(kept, thing, where)
        elif kind == "array":
            thing[...] = self._from_plain(kept, None, where)
        elif kind == "set":
            items = self._from_plain(kept, None, where)
            thing.clear()
            thing.update(items)
        elif kind == "dict":
            self._fill_dict(thing, kept, where)
        else:
            self._fill_list(thing, kept, where)

    # One value

    def _value(self, kept: Any, live: Any, path: str) -> Any:
        """Make of plain data what it was; return `_AS_IT_IS` where nothing is to be restored."""
        if type(kept) in NUMBERS:
            return kept
        if isinstance(kept, Opaque):
            return kept.value
        if isinstance(kept, tuple):
            return kept if is_simple(kept) else tuple(self._values(kept, path))
        mark = "list" if isinstance(kept, list) else kept.get(MARK, "dict") if isinstance(kept, dict) else ""
        if mark == "apart":
            return _AS_IT_IS
        if mark in _REFERENCES:
            return self._follow(kept, mark, path)
        if mark in ("list", "deque", "dict", "pairs"):
            return self._container(kept, mark, live, path)
        restore = self._restore_into if mark in _INTO else self._from_plain
        value = self._read[path] = restore(kept, live, path)
        return value

    def _values(self, kept: Any, path: str) -> list[Any]:
        return [self._value(value, None, f"{path}[{index}]") for index, value in enumerate(kept)]

    def _container(self, kept: Any, mark: str, live: Any, path: str) -> Any:
        """Make of a list, dict or deque what it was; one that is there now is filled, unless it was there at first.

        It is noted before it is filled: it may contain itself.
        """
        is_new = id(live) not in self._reached.by_id
        if mark == "list":
            fresh: Any = live if type(live) is list and is_new else []
        elif mark == "deque":
            fresh = live if isinstance(live, deque) and is_new else deque(maxlen=kept["maxlen"])
        else:
            fresh = live if isinstance(live, dict) and is_new else {}
        self._read[path] = fresh
        if mark in ("list", "deque"):
            return self._fill_list(fresh, kept["items"] if mark == "deque" else kept, path)
        return self._fill_dict(fresh, kept, path)

    def _follow(self, kept: State, mark: str, path: str) -> Any:
        """Return what a reference stands for."""
        if mark == "first":
            met = self._reached.by_path.get((kept["root"], kept["key"]))
            if met is None:
                raise misplaced(self._reached.where(kept["root"], kept["key"]), THERE, None)
            return met.thing
        if mark == "owned":
            return self._restoring.owners.find(kept["name"], path)
        if mark == "again":
            return self._read[kept["path"]]
        if mark == "path":
            return Path(kept["text"])
        if mark == "range":
            return range(*kept["ends"])
        kind = self._reached.classes.get(kept["class"])
        if kind is None:
            raise misplaced(path, f"a {kept['class']}", None)
        return kind[kept["name"]] if mark == "member" else kind(*self._values(kept["items"], path))

    def _restore_into(self, kept: State, live: Any, path: str) -> Any:
        """Restore an object that the script makes in each fit from its state: into the one that it has made."""
        mark, kind = kept[MARK], kind_of(live)
        if live is None and not self._restoring.begun:
            return _AS_IT_IS
        if mark in ("object", "fields", "phases"):
            return self._from_plain(kept, live, path)
        if mark == "module" and kind == "module":
            self._load_module(live, kept, path)
        elif mark != "made" or kind not in ("object", "pair"):
            raise misplaced(path, "the object that the script makes when a fit begins", live)
        made = Thing(live, kind, "", path, None)
        now = slots_of(made)
        for label, written in kept.get("slots", {}).items():
            self._set(made, label, written, now, f"{path}{label}")
        return live

    def _fill_list(self, live: Any, kept: list[Any], path: str) -> Any:
        now = list(live)
        items = (
            kept
            if is_simple(kept)
            else [self._value(v, now[i] if i < len(now) else None, f"{path}[{i}]") for i, v in enumerate(kept)]
        )
        live.clear()
        live.extend(items)
        return live

    def _fill_dict(self, live: Any, kept: State, path: str) -> Any:
        now = dict(live)
        entries = []
        for key, item in items_of(kept):
            real = from_plain(key)
            entries.append((real, self._value(item, now.get(real), f"{path}[{real!r}]")))
        live.clear()
        live.update(entries)
        return live


_REFERENCES = {"first", "owned", "again", "path", "range", "member", "named tuple"}
_INTO = {"made", "module", "object", "fields", "phases"}


def set_tensor(live: Tensor, value: Tensor) -> None:
    """Have a tensor hold other numbers; others that see its memory see them too, where the shape is the same."""
    with torch.no_grad():
        if live.shape == value.shape and live.dtype == value.dtype and not _overlaps(live):
            live.copy_(value)
        else:
            live.data = value.to(live.device)  # so that whoever holds the tensor still does


def _overlaps(tensor: Tensor) -> bool:
    """Return whether numbers of a tensor share memory, as in an expanded one, which refuses to be written into."""
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def _refill(live: Any, items: list[Any]) -> None:
    """Have a container hold again the items that `items_in` found in it."""
    live.clear()
    if isinstance(live, dict):
        half = len(items) // 2
        live.update(zip(items[:half], items[half:], strict=True))
    elif isinstance(live, set):
        live.update(items)
    else:
        live.extend(items)
