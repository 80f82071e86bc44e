"""Which attributes of an object its ``state_dict`` and ``load_state_dict`` (its pair) look after, and which are left.

A class that defines the pair knows what it has to keep. A subclass that adds attributes and inherits the pair is
common, and its pair knows nothing of them: a checkpoint keeps those beside what the pair returns.
"""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType
from typing import Any


@cache
def library(module: str) -> bool:
    """Return whether a module is a library's, whose classes share nothing that changes."""
    return module.partition(".")[0] in ("builtins", "fluxloop", "torch", "abc", "typing", "collections", "functools")


@cache
def has_more_than_its_pair(kind: Any) -> bool:
    """Return whether instances of a class may hold what its pair leaves out: it inherits the pair, or is fluxloop's."""
    return "state_dict" not in vars(kind) or kind.__module__.partition(".")[0] == "fluxloop"


@cache
def left_to_the_pair(kind: Any) -> frozenset[str]:
    """Return the attributes that the class with the pair looks after: those the pair names, and a library's own.

    The names are read from the pair's code, as nothing else says which attributes a ``state_dict`` is made of.
    """
    definer = _pair_of(kind)
    names: set[str] = set()
    for cls in kind.__mro__[kind.__mro__.index(definer) :]:
        for pair in ("state_dict", "load_state_dict"):
            function = getattr(vars(cls).get(pair), "__code__", None)
            names.update(function.co_names if function is not None else ())
    package = definer.__module__.partition(".")[0]
    for cls in kind.__mro__:
        if library(cls.__module__) and cls.__module__.partition(".")[0] == package:
            assigned = _assigned(cls)
            names.update(assigned if package != "fluxloop" else (n for n in assigned if n.startswith("_")))
    return frozenset(names)


def _pair_of(kind: type) -> type:
    """Return the class that defines an object's ``state_dict``."""
    return next(cls for cls in kind.__mro__ if "state_dict" in vars(cls))


def _assigned(cls: type) -> set[str]:
    """Return the names of the attributes that a class's functions assign."""
    codes = [code for value in vars(cls).values() if isinstance(code := _code_of(value), CodeType)]
    found = {
        instruction.argval  # also what a scheduler of torch, say, assigns outside of __init__
        for code in codes
        for instruction in dis.get_instructions(code)
        if instruction.opname == "STORE_ATTR"
    }
    return {*found, *vars(cls).get("__annotations__", ())}


def _code_of(value: Any) -> Any:
    # Of a property, of what stands around a function, or of a function itself
    inner = getattr(value, "fget", None) or getattr(value, "function", None) or value
    return getattr(inner, "__code__", None)
