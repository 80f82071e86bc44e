"""Notes on objects, by identity, as long as they live."""

from __future__ import annotations

from contextlib import suppress
from typing import Generic, TypeVar
from weakref import finalize

V = TypeVar("V")


class Notes(Generic[V]):
    """What is noted of objects, hashable or not; nothing of those that cannot be referred to weakly, such as lists."""

    def __init__(self) -> None:
        self._notes: dict[int, V | None] = {}

    def get(self, thing: object) -> V | None:
        """Return what is noted of an object, None for nothing."""
        return self._notes.get(id(thing))

    def put(self, thing: object, note: V | None) -> None:
        """Note something of an object; None forgets what was noted."""
        # By identity and not in a WeakKeyDictionary: data sets may compare equal, or have no hash.
        with suppress(TypeError):
            if id(thing) not in self._notes:
                finalize(thing, self._notes.pop, id(thing), None).atexit = False
            self._notes[id(thing)] = note
