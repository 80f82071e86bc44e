"""The walk over everything that a callback, a phase, a module, a loss function or a data set reaches.

`Walk` notes each object, container, tensor and random generator it reaches from its roots, by path, and
what it held at first. Later it returns what has changed, as plain data, and restores it in the same
places: also in another learner, made by the same script. What it cannot keep it names by path.

A thing that was there at first is written as a reference to its path, so that what was shared is
shared again; one that has come since is written out where it is plain data. An object that has come
since has to be made by the script again, at the beginning of a fit: nothing in a checkpoint names a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fluxloop.persist.copies import copy_attributes, copy_gradient
from fluxloop.persist.owners import Restoring, nobody
from fluxloop.persist.plain import is_simple, size, snapshot
from fluxloop.persist.reached import Owner, Reached
from fluxloop.persist.reading import Reader
from fluxloop.persist.sameness import Opaque, digest, identical, is_of_one_number
from fluxloop.persist.things import SLOTTED, Thing, is_long, items_in, slots_of
from fluxloop.persist.writing import Writer

State = dict[str, Any]

COPIED = 2**28
"""How many bytes of tensors and arrays a walk copies at most, to restore them as they were at first."""
FEW = 2**20
"""The same for data sets, which may be large and seldom change."""


class Walk:
    """What can be reached from roots, as it was when the walk was made.

    Args:
        roots: By the names under which they are kept.
        name: What they are called in messages.
        owner: Returns the name of a value that somebody else keeps (a model, an optimizer), None for others; the empty
            text where it has no name.
        data: Whether it is a data set, which is copied and gone into to a smaller extent.
        parts: Whether the roots are the parts of a model, of which the tensors are kept by others.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        name: str,
        owner: Owner | None = None,
        data: bool = False,
        parts: bool = False,
    ) -> None:
        self._reached = Reached(name, data, parts)
        self._budget = FEW if data else COPIED  # how many bytes may still be copied
        self.join(roots, nobody if owner is None else owner)

    @property
    def name(self) -> str:
        """What the roots are called in messages."""
        return self._reached.name

    def join(self, roots: Mapping[str, Any], owner: Owner) -> None:
        """Look at roots that are new, and at what they reach.

        Args:
            roots: By name; those that are known are left as they are.
            owner: As when the walk was made.
        """
        new = self._reached.add(roots, owner)
        writer = Writer(self._reached, owner)
        for met in new:  # only now: what is written refers to all that was reached
            self._look(met, writer)

    # What there was at first

    def _look(self, met: Thing, writer: Writer) -> None:
        """Note what a thing holds at first."""
        kind = met.kind
        met.raw = items_in(met) if kind != "array" or met.thing.nbytes <= self._budget else digest(met.thing)
        if met.untouched is not None or kind in ("resource", "iterator"):
            return
        if kind in SLOTTED:
            met.first = {label: writer.write(item, "") for label, item in slots_of(met).items()}
            if kind in ("pair", "module") and (state := self._state_of(met, writer)) is not None:
                met.first[""] = state
        elif kind in ("list", "dict", "deque") and is_long(met.thing) and not is_simple(met.thing):
            met.first = Opaque(met.thing, "")
        elif kind in ("tensor", "array"):
            met.first = self._copied(met.thing, lambda: writer.contents(met))
        else:
            met.first = snapshot(writer.contents(met))

    def _copied(self, value: Any, contents: Callable[[], Any]) -> Any:
        """Copy the contents of a tensor or array as they are at first; None where they are too large."""
        if isinstance(value, Tensor) and is_lazy(value):
            return None
        if value.nbytes > self._budget:
            if not isinstance(value, Tensor) or self._reached.data or not is_of_one_number(value):
                return None
            one = value.detach().reshape(-1)[:1].to("cpu", copy=True)  # a bank of zeros, as many begin
            return {"tensor": one.expand(value.shape), "grad": None}
        self._budget -= value.nbytes
        return snapshot(contents())

    def _state_of(self, met: Thing, writer: Writer) -> Any:
        """Return the state of an object at first; None where it has none yet, or a large one."""
        try:
            state = writer.contents(met)
        except Exception:  # before a fit not every object can tell its state; then it is not restored without one
            return None
        taken = size(state)
        if taken > self._budget:
            return None
        self._budget -= taken
        return snapshot(state)

    # What has changed

    def new_objects(self, owner: Owner) -> set[str]:
        """Return the paths of the objects that have come since the walk was made.

        Args:
            owner: As when the walk was made.
        """
        found: set[str] = set()
        writer = Writer(self._reached, owner, found)
        for met in self._reached.things:
            if met.kind in SLOTTED and met.untouched is None:
                slots = slots_of(met)
                if not identical([*slots, *slots.values()], met.raw):
                    for label, value in slots.items():
                        writer.write(value, self._reached.where(met.root, f"{met.key}{label}".lstrip(".")))
        return found

    def note_made(self, paths: Set[str]) -> None:
        """Note new objects that the script makes at the beginning of each fit: their states are kept."""
        self._reached.made |= paths

    def state(self, owner: Owner) -> tuple[dict[str, State], list[str]]:
        """Return what has changed as plain data, by root, and the paths of what is lost.

        Args:
            owner: As when the walk was made.
        """
        return Writer(self._reached, owner).states()

    def restore(self, states: Mapping[str, State], restoring: Restoring) -> None:
        """Restore what had changed, and what had not as it was at first.

        Args:
            states: What `state` returned, by root.
            restoring: Who keeps what, and what has begun.

        Raises:
            CheckpointError: It cannot be restored.
        """
        Reader(self._reached, restoring).restore(states)

    def complete_copy(self, copied: Walk, memo: dict[int, Any]) -> None:
        """Give what a copy of this walk has reached the gradients and hooks that PyTorch leaves out where it copies."""
        for met, other in zip(self._reached.things, copied._reached.things, strict=True):
            if isinstance(met.thing, Optimizer):
                copy_attributes(met.thing, other.thing, memo)
            elif isinstance(met.thing, Tensor):
                copy_gradient(met.thing, other.thing, memo)
            elif isinstance(met.thing, nn.Module) and met.kind == "module":
                for parameter, its_copy in zip(met.thing.parameters(), other.thing.parameters(), strict=True):
                    copy_gradient(parameter, its_copy, memo)
