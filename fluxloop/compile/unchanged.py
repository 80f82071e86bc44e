"""Notice what a step changes in Python while it is traced, and set it as it was: a graph would do it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fluxloop.compile.conditions import MODULE_INTERNALS
from fluxloop.compile.inputs import Inputs
from fluxloop.compile.optimizer_stand_in import differing, seen_of
from fluxloop.compile.reach import CONTAINERS, Contents
from fluxloop.compile.refusals import changes_python, writes_options
from fluxloop.persist.attributes import attributes
from fluxloop.persist.seen import seen
from fluxloop.phase import Phase


@contextmanager
def attributes_unchanged(inputs: Inputs) -> Iterator[None]:
    """Set modules, holders and the loss function as they were; raise for attributes that a step changes.

    Raises:
        CompileError: Names them.
    """
    things = compared(inputs)
    saved = [attributes(thing) for thing, _ in things]
    before = [attributes_seen(thing, left_out) for thing, left_out in things]
    buffers = [set(part._buffers) for part in inputs.parts]
    saved_tensors: list[tuple[Any, Any]] = [
        (where, dict(where)) for part in inputs.parts for where in (part._parameters, part._buffers)
    ]
    contents = [Contents(value) for own in saved for value in own.values() if isinstance(value, CONTAINERS)]
    changed: dict[str, None] = {}
    try:
        yield
        for (thing, left_out), old in zip(things, before, strict=True):
            names = differing(old, attributes_seen(thing, left_out))
            changed.update({f"{type(thing).__name__}.{name}": None for name in names})
        for part, names_before in zip(inputs.parts, buffers, strict=True):
            changed.update({f"{type(part).__name__}.{name}": None for name in names_before ^ set(part._buffers)})
    finally:
        # also where the body fails: stand-ins that stayed in the user's model would break whatever comes next
        for (thing, _), own in zip(things, saved, strict=True):
            for name in attributes(thing).keys() - own.keys():
                object.__delattr__(thing, name)
            for name, value in own.items():
                object.__setattr__(thing, name, value)
        for where, tensors_before in saved_tensors:
            where.clear()
            where.update(tensors_before)
        for held in contents:
            held.restore()
    if changed:
        raise changes_python(inputs.phase, changed)


def compared(inputs: Inputs) -> list[tuple[Any, Any]]:
    """List the objects whose attributes may not change, each with the names of those that may.

    Those are torch's own, and tensors: what a body puts in their place is copied into them.
    """
    in_place = [{name for where, name, _ in inputs.places if where is vars(part)} for part in inputs.parts]
    held = [
        {name for n, name in inputs.held if n == number}
        | {name for name, value in attributes(holder).items() if isinstance(value, Phase)}
        for number, holder in enumerate(inputs.holders)
    ]
    things: list[tuple[Any, Any]] = [
        (part, MODULE_INTERNALS | names) for part, names in zip(inputs.parts, in_place, strict=True)
    ]
    things += zip(inputs.holders, held, strict=True)
    loss_fn = inputs.learner.loss_fn
    return [*things, (loss_fn, ())] if hasattr(loss_fn, "__dict__") else things


def attributes_seen(thing: Any, left_out: Any) -> dict[str, Any]:
    """Describe the attributes of an object, apart from some."""
    return {name: seen(value) for name, value in attributes(thing).items() if name not in left_out}


@contextmanager
def options_unchanged(inputs: Inputs) -> Iterator[None]:
    """Set the options of the learner's own optimizers as they were; raise for those that a step writes to.

    The stand-in of the learner has optimizers of its own, so that a step has to go past it to write there.

    Raises:
        CompileError: Names the options.
    """
    saved = [(group, dict(group)) for slot in inputs.slots for group in slot.optimizer.param_groups]
    before = [seen_of(slot.optimizer) for slot in inputs.slots]
    now = before
    try:
        yield
        now = [seen_of(slot.optimizer) for slot in inputs.slots]
    finally:
        for group, own in saved:
            group.clear()
            group.update(own)
    for slot, old, new in zip(inputs.slots, before, now, strict=True):
        if old != new:
            raise writes_options(inputs.phase, slot, differing(old, new))


@contextmanager
def noting_reads(holders: list[Any]) -> Iterator[dict[tuple[int, str], Any]]:
    """Note the attributes of phases and callbacks that are read, apart from tensors, phases and methods.

    What a body reads of its phase is part of the graph, and has to be compared at each step. Only what is read
    is: a phase that counts its batches would be traced anew at each step otherwise. Classes are asked rather than
    objects, since Python looks ``__getattribute__`` up there alone.

    Args:
        holders: The objects to watch.

    Yields:
        What was read by (number of the holder, attribute).
    """
    reads: dict[tuple[int, str], Any] = {}
    numbers = {id(holder): number for number, holder in enumerate(holders)}
    own = [attributes(holder).keys() for holder in holders]
    kinds = {type(holder) for holder in holders}

    def noting(kind: type) -> Callable[[Any, str], Any]:
        get: Callable[[Any, str], Any] = kind.__getattribute__  # type: ignore[assignment]  # of instances

        def read(holder: Any, name: str) -> Any:
            value = get(holder, name)
            number = numbers.get(id(holder))
            if number is None or name.startswith("__") or isinstance(value, (Tensor, Phase)):
                return value
            # an instance may hold a function, or override what its class says: then it may change, and is noted
            declared = callable(value) or hasattr(Phase, name)  # methods, and what every phase class says
            if name in own[number] or not declared:
                reads.setdefault((number, name), value)
            return value

        return read

    overridden = {kind: vars(kind).get("__getattribute__") for kind in kinds}
    for kind in kinds:
        setattr(kind, "__getattribute__", noting(kind))  # noqa: B010 - mypy knows no other way
    try:
        yield reads
    finally:
        for kind, function in overridden.items():
            if function is None:
                delattr(kind, "__getattribute__")
            else:
                setattr(kind, "__getattribute__", function)  # noqa: B010 - as above
