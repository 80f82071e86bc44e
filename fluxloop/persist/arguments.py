"""What functions were made with, as plain data: so that a run that is resumed with other arguments is noticed.

A function's code cannot be compared, but what it was given often can: the arguments of a
``functools.partial``, what a function closes over or has as defaults, and the attributes of an
object that is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fluxloop.persist.attributes import attributes

Found = dict[str, Any]
PLAIN = (bool, int, float, str, type(None))
DEEPEST = 6
"""How many functions inside functions are looked into."""
LONGEST = 100
"""How long a list or dict is looked into."""


def arguments_of(value: Any, where: str) -> Found:
    """Return the numbers and texts that a function was made with, by where they were found.

    >>> from functools import partial
    >>> def rate(step, total, floor=0.1): ...
    >>> arguments_of(partial(rate, total=8), "lr_lambda")
    {'lr_lambda': 'rate', 'lr_lambda.floor': 0.1, 'lr_lambda.total': 8}

    Args:
        value: A function, a ``partial``, an object with ``__call__``, or containers of them.
        where: What it is called.
    """
    return dict(_found(value, where, DEEPEST, set()))


def _found(value: Any, where: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a number of NumPy's, a tensor of one
        value = value.item()
    if isinstance(value, PLAIN):
        yield where, value
        return
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    for name, inner in _inside(value):
        if name == "":
            yield where, inner
        else:
            yield from _found(inner, f"{where}{name}", depth - 1, seen)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a function or a container holds, by how it is reached; under "" its own name."""
    if isinstance(value, partial):
        names = _parameters(value.func)
        for index, item in enumerate(value.args):
            yield f".{names[index] if index < len(names) else index}", item
        given = {*(f".{name}" for name in names[: len(value.args)]), *(f".{name}" for name in value.keywords)}
        yield from ((name, item) for name, item in _inside(value.func) if name not in given)
        yield from ((f".{name}", item) for name, item in value.keywords.items())
    elif isinstance(value, MethodType):  # whose object may hold anything, a time or a folder too
        yield from _inside(value.__func__)
    elif isinstance(value, FunctionType):
        yield "", value.__qualname__.rpartition(".")[2]
        names = _parameters(value)
        defaults = value.__defaults__ or ()
        yield from ((f".{n}", item) for n, item in zip(names[len(names) - len(defaults) :], defaults, strict=True))
        yield from ((f".{name}", item) for name, item in (value.__kwdefaults__ or {}).items())
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            # A cell is empty until its name is assigned: to read it then would raise an error
            if cell != CellType() and not isinstance(cell.cell_contents, str):
                yield f".{name}", cell.cell_contents
    elif isinstance(value, (list, tuple)) and len(value) <= LONGEST:
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, dict) and len(value) <= LONGEST:
        yield from ((f"[{key!r}]", item) for key, item in value.items() if isinstance(key, PLAIN))
    elif isinstance(value, type):
        yield "", value.__name__
    elif callable(value) and not isinstance(value, (nn.Module, Optimizer)):
        yield "", type(value).__name__
        yield from ((f".{name}", item) for name, item in attributes(value).items())


def _parameters(function: Any) -> list[str]:
    """Return the names of a function's parameters that can be given by place."""
    while isinstance(function, partial):
        function = function.func
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return [] if code is None else list(code.co_varnames[: code.co_argcount])


def changed(before: Found, now: Found) -> list[str]:
    """List the arguments that both have and that differ, and functions that others have replaced."""
    return [
        f"{where}={before[where]!r}, now {where}={now[where]!r}"
        for where in before
        if where in now and repr(before[where]) != repr(now[where])
    ]
