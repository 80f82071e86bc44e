"""What a step's functions reach by name beside the learner: global variables, closures, attributes of classes.

A graph holds what they said while it was traced, and what their code was. What has changed when another epoch begins
has the step traced anew, and what a step changes of them is refused, as Python would do it once, and leave stand-ins
there.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from attrs import define
from torch import Tensor, nn

from fluxloop.nested import tensors
from fluxloop.persist.attributes import attributes
from fluxloop.persist.seen import Same, seen

CONTAINERS = (list, dict, set, deque)
SCALARS = (type(None), bool, int, float, complex, str, bytes)
FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "fluxloop", "numpy", "sympy", "attr", "attrs", "builtins"}
"""Packages whose functions and classes are not looked into."""
NAMESPACES = ("Namespace", "SimpleNamespace")
"""Python's own classes for attributes of the user's."""
MANY = 64
"""How many items of a container are compared."""
MISSING = object()


def is_users(thing: Any) -> bool:
    """Return whether a function, a class or a module is one of the user's, or of a library that is not known."""
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None) or "builtins"
    top = str(name).partition(".")[0]
    return top not in FOREIGN or top == "__main__"


def names_in(code: CodeType) -> set[str]:
    """Return the names of global variables and attributes in a function's code, and in functions inside it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


@define(eq=False)
class Place:
    """Where something is held that functions reach by name.

    Args:
        holder: Whose: a dict of global variables, a cell of a closure, a class, a module or an object.
        name: Its name there.
        whose: What the holder is called.
    """

    holder: Any
    name: str
    whose: str

    def get(self) -> Any:
        """Return what is there now; `MISSING` where nothing is."""
        if isinstance(self.holder, dict):
            return self.holder.get(self.name, MISSING)
        if type(self.holder).__name__ == "cell":
            return getattr(self.holder, "cell_contents", MISSING)
        return vars(self.holder).get(self.name, MISSING)

    def put(self, value: Any) -> None:
        """Put something there, or nothing."""
        if isinstance(self.holder, dict):
            self.holder.update({self.name: value})
            if value is MISSING:
                del self.holder[self.name]
        elif type(self.holder).__name__ == "cell":
            self.holder.cell_contents = value
        elif value is MISSING:
            (type if isinstance(self.holder, type) else object).__delattr__(self.holder, self.name)
        else:  # past what a frozen class says
            (type if isinstance(self.holder, type) else object).__setattr__(self.holder, self.name, value)

    def __str__(self) -> str:
        return f"{self.whose}.{self.name}" if self.whose else self.name


class Reach:
    """Finds what functions reach by name.

    Args:
        functions: That run; others are left out.
        kinds: Classes of the objects that run; what is reached of them by name is looked at.
    """

    def __init__(self, functions: Iterable[Any], kinds: Iterable[type]) -> None:
        self._names: set[str] = set()
        self._functions: dict[Any, FunctionType] = {}
        self._holders: dict[int, tuple[Any, str]] = {}
        self._cells: dict[int, Place] = {}
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for kind in kinds:
            self._hold(kind, kind.__name__)
        for function in functions:
            self._follow(function)
        count = -1
        while count != (count := len(self._functions) + len(self._holders) + len(self._names)):
            for place in self.places():
                self._look(place.get(), place.name)

    def _follow(self, function: Any) -> None:
        """Take note of a function, of the one that it is wrapped around, and of the names in them."""
        function = getattr(function, "__func__", function)
        self._follow_one(inspect.unwrap(function, stop=self._follow_one))  # which is given each on the way

    def _follow_one(self, function: Any) -> None:
        if not isinstance(function, FunctionType) or not is_users(function):
            return
        if str(function.__globals__.get("__name__")).partition(".")[0] in FOREIGN:  # a decorator's of torch or Python
            return
        known = function.__code__, *map(id, function.__closure__ or ())  # the same code may close over other things
        if known in self._functions:
            return
        self._functions[known] = function
        names = names_in(function.__code__)
        self._names |= names
        self._globals.setdefault(id(function.__globals__), (function.__globals__, set()))[1].update(names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._cells[id(cell)] = Place(cell, name, "")

    def _hold(self, thing: Any, whose: str) -> None:
        self._holders.setdefault(id(thing), (thing, whose))

    def _look(self, value: Any, name: str, depth: int = 4) -> None:
        """Look at what is held under a name: functions to follow, and objects that hold more, in containers too."""
        if isinstance(value, (list, tuple, dict)):
            for _, item in pairs(value) if depth and size(value) <= MANY else ():
                self._look(item, name, depth - 1)
        if isinstance(value, (FunctionType, staticmethod, classmethod)) or inspect.ismethod(value):
            self._follow(value)
        elif isinstance(value, property) and value.fget is not None:
            self._follow(value.fget)
        elif isinstance(value, (type, ModuleType)):
            if is_users(value):
                self._hold(value, value.__name__.rpartition(".")[2])
        elif not isinstance(value, (*SCALARS, *CONTAINERS, tuple, Tensor, nn.Module)) and (
            is_users(type(value)) or type(value).__name__ in NAMESPACES
        ):
            if isinstance(getattr(value, "__dict__", None), dict):
                self._hold(value, name)
            if is_users(type(value)):
                self._hold(type(value), type(value).__name__)

    def places(self) -> Iterator[Place]:
        """Go through what is reached."""
        yield from tuple(self._cells.values())
        for variables, names in tuple(self._globals.values()):
            yield from (Place(variables, name, "") for name in sorted(names & variables.keys()))
        for holder, whose in tuple(self._holders.values()):
            yield from (Place(holder, name, whose) for name in sorted(self._names & vars(holder).keys()))

    def said(self) -> dict[str, Any]:
        """Return what is reached, and what the functions say that reach it, by name: see `told`."""
        found = {f"{place} ({id(place.holder)})": told(place.get()) for place in self.places()}
        count: Counter[str] = Counter()
        for function in self._functions.values():
            name = function.__qualname__.replace(".<locals>", "")
            count[name] += 1
            found[f"{name} (the code, {count[name]})"] = told(function)
        return found

    @contextmanager
    def unchanged(self) -> Iterator[list[str]]:
        """Note what changes meanwhile of what is reached, and set it as it was; the list is complete at the end."""
        noted: list[str] = []
        held = [(place, place.get()) for place in self.places()]
        known = {(id(place.holder), place.name) for place, _ in held}
        inner = [Contents(value) for _, value in held if isinstance(value, CONTAINERS)]
        of_containers = [place for place, value in held if isinstance(value, CONTAINERS)]
        try:
            yield noted
        finally:
            for place, value in held:
                if place.get() is not value:
                    noted.append(str(place))
                    place.put(value)
            for place in self.places():
                if (id(place.holder), place.name) not in known:
                    noted.append(str(place))
                    place.put(MISSING)
            noted += [str(place) for place, old in zip(of_containers, inner, strict=True) if old.restore()]


def told(value: Any, depth: int = 4) -> Any:
    """Describe what is reached: numbers and texts by what they say, functions by their code, others by who they are.

    Objects of the user's are not described: what is reached of them by name has places of its own.

    Args:
        value: Anything.
        depth: How far to go into containers, of up to `MANY` items.
    """
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, FunctionType) and is_users(value):
        return value.__code__, told(value.__defaults__, depth - 1), told(value.__kwdefaults__, depth - 1)
    if isinstance(value, partial):
        return partial, [told(part, depth - 1) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, (list, tuple, dict)):
        if not depth or size(value) > MANY:
            return type(value)
        return type(value), [(key, told(item, depth - 1)) for key, item in pairs(value)]
    numpy = sys.modules.get("numpy")
    if isinstance(value, SCALARS) or (numpy is not None and isinstance(value, numpy.ndarray)):
        return seen(value)
    if isinstance(value, (Tensor, nn.Module, type, FunctionType, BuiltinFunctionType, ModuleType)):
        return Same(value)
    return None


class Contents:
    """What is in lists, dicts, sets and deques, and in those inside of them.

    Args:
        value: A container, or anything else.
    """

    def __init__(self, value: Any) -> None:
        self._saved: list[tuple[Any, Any]] = []
        self._save(value, 4)

    def _save(self, value: Any, depth: int) -> None:
        if depth and type(value) in CONTAINERS:
            self._saved.append((value, value.copy()))
        if depth and isinstance(value, (*CONTAINERS, tuple)) and size(value) <= 1000:
            for _, item in pairs(value):
                self._save(item, depth - 1)

    def restore(self) -> bool:
        """Set all as it was; return whether something was not. What a dict has more of without tensors is a cache."""
        found = False
        for value, old in self._saved:
            if isinstance(value, dict) and is_cache(value, old):
                continue
            if len(value) != len(old) or not all(map(same_items, pairs(value), pairs(old))):
                found = True
                value.clear()
                value.extend(old) if hasattr(value, "extend") else value.update(old)
        return found


def is_cache(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Return whether a dict has all that it had, and more that holds no tensor."""
    kept = all(key in now and now[key] is value for key, value in before.items())
    return kept and not any(True for key, value in now.items() if key not in before for _ in tensors(value))


def pairs(value: Any) -> Iterable[Any]:
    """Return the items that lie in a container, with their keys where it has some.

    What a class of its own says instead is not asked: there are dicts that load what they list, such as all models of a
    library.
    """
    if isinstance(value, dict):
        return dict.items(value)
    return ((None, item) for item in kind_of(value).__iter__(value))


def size(value: Any) -> int:
    """Return how many items lie in a container."""
    count: int = kind_of(value).__len__(value)
    return count


def kind_of(value: Any) -> Any:
    """Return which of Python's containers a container is, also where its class is one of its own."""
    return next(kind for kind in (*CONTAINERS, tuple) if isinstance(value, kind))


def same_items(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Return whether two items are one object under one key, or numbers that are equal."""
    return a[1] is b[1] and (a[0] is b[0] or a[0] == b[0])


OUTSIDE = frozenset(
    {"finish", "entries", "step", "epoch", "check", "__init__", "state_dict", "load_state_dict", "init", "predicted"}
)
"""Methods of phases, callbacks and modules that no graph holds."""


def reach_of(holders: list[Any], parts: Iterable[nn.Module], loss_fn: Any) -> Reach:
    """Return what the users' functions reach that a step may run.

    Args:
        holders: The phase, phases that it holds, and callbacks that are part of the graph.
        parts: Modules, inner ones too.
        loss_fn: The loss function.
    """
    things = [*holders, *parts]
    kinds = {kind: None for thing in (*things, loss_fn) for kind in type(thing).__mro__ if is_users(kind)}
    own = [value for kind in kinds for name, value in vars(kind).items() if name not in OUTSIDE]
    held = [value for thing in things for value in attributes(thing).values() if callable(value)]
    called = [getattr(value, "func", value) for value in held]  # of a partial
    return Reach([loss_fn, getattr(loss_fn, "func", None), *called, *own], kinds)
