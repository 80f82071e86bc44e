"""What can be reached from some roots: each object, container, tensor and generator once, with its path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from fluxloop.persist.plain import NUMBERS, class_name, is_simple
from fluxloop.persist.things import LONG, Thing, kind_of, slots_of

Owner = Callable[[Any], str | None]
"""Returns the name of a value that somebody else keeps, "" where it has no name, None for others."""

MOST = 100_000
"""How many things a walk goes into."""
MOST_OF_DATA = 5_000
"""The same for data sets."""


class Reached:
    """The things that can be reached from roots, in the order in which a walk came to them.

    Args:
        name: What the roots are called in messages.
        data: Whether they are a data set, of which generators are kept apart.
        parts: Whether they are the parts of a model, of which the tensors are kept by others.

    Attributes:
        roots: By name.
        things: In the order in which they were reached.
        by_id: The same, by ``id`` of the thing.
        by_path: The same, by root and key.
        classes: Enumerations and named tuples that were met, by name: a checkpoint names a class, and only one of
            these is made again.
        beyond: What was reached after so many things that the walk does not go into it.
        made: Paths of the objects that the script makes at the beginning of each fit.
    """

    def __init__(self, name: str, data: bool, parts: bool) -> None:
        self.name, self.data, self.parts = name, data, parts
        self.roots: dict[str, Any] = {}
        self.things: list[Thing] = []
        self.by_id: dict[int, Thing] = {}
        self.by_path: dict[tuple[str, str], Thing] = {}
        self.classes: dict[str, Any] = {}
        self.beyond: dict[int, Any] = {}
        self.made: set[str] = set()
        self._most = MOST_OF_DATA if data else MOST

    def __deepcopy__(self, memo: dict[int, Any]) -> Reached:
        copied = copy.copy(self)
        memo[id(self)] = copied
        for name in ("roots", "things", "made"):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        copied._index()
        beyond = copy.deepcopy(list(self.beyond.values()), memo)
        copied.beyond = {id(value): value for value in beyond}
        return copied

    def _index(self) -> None:
        self.by_id = {id(met.thing): met for met in self.things}
        self.by_path = {(met.root, met.key): met for met in self.things}

    def where(self, root: str, key: str) -> str:
        """Return the path of a thing, as messages name it."""
        return ".".join(filter(None, (self.name, root, key))).replace(".[", "[")

    def add(self, roots: Mapping[str, Any], owner: Owner) -> list[Thing]:
        """Reach everything below new roots, and return what was not reached before.

        Args:
            roots: By name; those that are known are left as they are.
            owner: Returns the name of what somebody else keeps: the walk does not go there.
        """
        first = len(self.things)
        self.roots |= {name: thing for name, thing in roots.items() if self.roots.get(name) is not thing}
        for root, thing in self.roots.items():
            self._meet(thing, root, "", None, owner)
        for met in self.things:  # breadth first: the list grows while it is gone through, and no stack overflows
            slots = slots_of(met)
            if met.key and met.untouched is None and any(kind_of(value) == "resource" for value in slots.values()):
                met.untouched = self.where(met.root, met.key)
            for label, value in slots.items():
                key, untouched = f"{met.key}{label}".lstrip("."), met.untouched
                if met.kind == "function" and kind_of(value) in ("list", "dict", "set", "deque", "tuple"):
                    # it is the script's too: it is left as it is, and named where it has changed
                    untouched = untouched or self.where(met.root, key)
                self._meet(value, met.root, key, untouched, owner)
        self._index()
        return self.things[first:]

    def _meet(self, value: Any, root: str, key: str, untouched: str | None, owner: Owner) -> None:
        """Note a value, and what a tuple holds; what other values hold the walk comes to later."""
        kind = kind_of(value) if type(value) not in NUMBERS else ""
        if kind == "" or (kind == "generator" and self.data):  # of data they are kept apart
            if isinstance(value, Enum):
                self.classes[class_name(type(value))] = type(value)
            return
        # A root is gone into in any case: it is what the walk is about, though its owner has a name for it
        if id(value) in self.by_id or (key and owner(value) is not None):
            return
        if kind == "tuple":  # it is written out where it stands: a new one may be equal to it
            if hasattr(value, "_fields"):
                self.classes[class_name(type(value))] = type(value)
            if len(value) <= LONG and not is_simple(value):
                for index, item in enumerate(value):
                    self._meet(item, root, f"{key}[{index}]", untouched, owner)
        elif len(self.things) >= self._most:
            self.beyond[id(value)] = value
        else:
            kind = "part" if kind == "module" and key == "" and self.parts else kind
            met = self.by_id[id(value)] = Thing(value, kind, root, key, untouched)
            self.things.append(met)
