"""The attributes of objects: all of them, those in slots too, or those that are plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fluxloop.errors import CheckpointError
from fluxloop.persist.plain import is_held, to_plain

WATCHED = "__watched__"
"""The attribute in which a phase holds its `Watched`."""


def attributes(thing: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too."""
    slots = [name for cls in type(thing).__mro__ for name in _slots(cls)]
    found = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
    own = {name: value for name, value in getattr(thing, "__dict__", {}).items() if name != WATCHED}
    return {**found, **own}


def _slots(cls: type) -> Iterator[str]:
    names = cls.__dict__.get("__slots__", ())
    for name in (names,) if isinstance(names, str) else names:
        if name not in ("__weakref__", "__dict__"):
            # a private name is mangled with that of its class
            yield f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name


OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Names of the attributes that torch gives to every module."""


def plain_attributes(thing: Any) -> dict[str, Any]:
    """Return the attributes of an object that are plain data; of a module, its own and its buffers."""
    found = {name: value for name, value in attributes(thing).items() if name not in OF_EVERY_MODULE}
    if isinstance(thing, nn.Module):
        found.update(thing._buffers)
    plain: dict[str, Any] = {}
    for name, value in found.items():
        try:
            kept = to_plain(value, name)
        except CheckpointError:
            continue
        if not is_held(kept):
            plain[name] = value
    return plain
