"""Whether a graph can be called: what a step read of phases, callbacks and optimizers is as it was.

This is looked at in each step. What is the same object as before, as nearly everything is, is found by a few calls
of C; only where something is another object is it described.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor

from fluxloop.callback import Callback
from fluxloop.compile.conditions import form_of
from fluxloop.compile.glance import Remembered
from fluxloop.compile.optimizer_stand_in import MOMENTUM
from fluxloop.compute.slots import Slot
from fluxloop.persist.seen import seen
from fluxloop.phase import Phase

SCALARS = frozenset((type(None), bool, int, float, str))
"""Types whose values are as they were where they are the same object."""


class Holders:
    """What a graph may have read from: the running phase, phases that it holds, and callbacks.

    Args:
        callbacks: Those with handlers that are part of the graph.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)
        self._types: list[type] = []
        self._phases: list[int] = []

    def of(self, phase: Phase) -> list[Any]:
        """List them for a phase, as `holders_of` does."""
        values = [*vars(phase).values()]
        types = [*map(type, values)]
        if types != self._types:  # which of them are phases is asked once for the types
            self._types, self._phases = types, [n for n, value in enumerate(values) if isinstance(value, Phase)]
        return [phase, *[values[number] for number in self._phases], *self._callbacks]


class Reads:
    """What a step read of the holders.

    Args:
        reads: The values, apart from tensors, by (number of the holder, attribute).
        held: Tensors, by the same.
        holders: The holders.
    """

    def __init__(self, reads: Mapping[tuple[int, str], Any], held: Sequence[tuple[int, str]], holders: Any) -> None:
        self._each = [(number, name, value, seen(value)) for (number, name), value in reads.items()]
        self._held = list(held)
        self._forms = [form_of(getattr(holders[number], name)) for number, name in held]
        self._inside = Remembered(reads.values())
        names: dict[int, list[str]] = {}
        for number, name in reads:
            names.setdefault(number, []).append(name)
        self._by_holder = [
            (number, attrgetter(*own, own[0]), (*(reads[number, name] for name in own), reads[number, own[0]]))
            for number, own in names.items()  # one name too many, since a single one would not give a tuple
        ]
        self.is_empty = not reads and not held
        self.calls = any(map(callable, reads.values()))
        """Whether there are functions or objects that are called among them: see `calls_the_same`."""

    def calls_the_same(self, holders: Sequence[Any]) -> bool:
        """Return whether the functions and objects that a step calls, such as what makes views, are as they were."""
        return all(
            seen(getattr(holders[number], name, None)) == as_seen
            for number, name, before, as_seen in self._each
            if callable(before)
        )

    def misfit(self, holders: Sequence[Any]) -> str | None:
        """Return what is not as it was."""
        if not self._are_the_same(holders):
            for number, name, before, as_seen in self._each:
                now = getattr(holders[number], name, None)
                if now is before and (type(now) in SCALARS or callable(now)):  # what is called: see calls_the_same
                    continue
                if seen(now) != as_seen:
                    return f"{type(holders[number]).__name__}.{name} = {now!r}, which was {before!r}"
        for (number, name), expected in zip(self._held, self._forms, strict=True):
            tensor = getattr(holders[number], name, None)
            if not isinstance(tensor, Tensor) or form_of(tensor) != expected:
                return f"the shape of {type(holders[number]).__name__}.{name}"
        return None

    def _are_the_same(self, holders: Sequence[Any]) -> bool:
        """Return whether all are the same objects, with the same objects in them."""
        try:
            for number, get, before in self._by_holder:
                if not all(map(is_, get(holders[number]), before)):
                    return False
        except AttributeError:  # one is gone
            return False
        return self._inside.is_as_it_was()


class Options:
    """The options of optimizers that are part of a graph.

    Args:
        slots: The optimizers.
        changing: Options that are inputs of the graph instead, by id of the group and name.
    """

    def __init__(self, slots: Iterable[Slot], changing: set[tuple[int, str]]) -> None:
        self._each = []
        for slot in slots:
            for number, group in enumerate(slot.optimizer.param_groups):
                names = [name for name in group if name != "params" and (id(group), name) not in changing]
                get = itemgetter(*names, *names[:1]) if names else tuple  # as in `Reads`
                steers = (id(group), MOMENTUM) in changing
                self._each.append((slot, number, group, names, get, as_now(get(group)), len(group), steers))

    def misfit(self) -> str | None:
        """Return what is not as it was."""
        for slot, number, group, names, get, values, size, steers in self._each:
            if slot.optimizer.param_groups[number] is not group:
                return f"the groups of {slot.label}"
            if steers and not group.get(MOMENTUM):  # without any, SGD leaves its buffers as they are
                return f"{slot.label}: {MOMENTUM} = {group.get(MOMENTUM)!r}"
            try:
                if get(group) == values and len(group) == size:
                    continue
            except KeyError:  # one is gone
                pass
            changed = [f"{n} = {group.get(n)!r}" for n, old in zip(names, values, strict=False) if group.get(n) != old]
            return f"{slot.label}: {', '.join(changed)}"
        return None


def as_now(value: Any) -> Any:
    """Return a value as it is now: lists in it are copied, as somebody may write to them."""
    if isinstance(value, list):
        return [*value]
    return tuple(map(as_now, value)) if type(value) is tuple else value
