"""Declared access: paths into the learner, and the view that allows exactly what was declared.

A path is dotted (``"step.loss"``, ``"cbstate.history"``); a prefix covers what is below it, and
``"*"`` covers everything. Writing implies reading. Views are detection of mistakes, not a
sandbox: containers come out read-only where only reading was declared, but a tensor or a module
can still be changed in place.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from attrs import frozen

from fluxloop.errors import CallbackError, StateAccessError, did_you_mean
from fluxloop.state import Container

if TYPE_CHECKING:
    from fluxloop.learner import Learner

Path = tuple[str, ...]

EVERYTHING: Path = ()
"""The path ``"*"``."""

ROOTS = (
    "model",
    "params",
    "optimizer",
    "loss_fn",
    "data",
    "step",
    "cbstate",
    "history",
    "accelerator",
    "num_batches",
    "batch_size",
    "seed",
)
"""The attributes of a learner that a path may start with."""


def parse(path: str, callback: str) -> Path:
    """Split a dotted path and check its root.

    Raises:
        CallbackError: The path does not start with an attribute of the learner.
    """
    if path == "*":
        return EVERYTHING
    parts = tuple(path.split(".")) if isinstance(path, str) else ()
    if not parts or parts[0] not in ROOTS:
        raise CallbackError(
            f"{callback} declares the path {path!r}; expected one that starts with "
            f"{', '.join(ROOTS)}{did_you_mean(parts[0] if parts else '', ROOTS)}"
        )
    return parts


def dotted(path: Path) -> str:
    """Write a path as users do.

    >>> dotted(("step", "loss"))
    'step.loss'
    """
    return ".".join(path) or "*"


def covers(prefix: Path, path: Path) -> bool:
    """Tell whether `path` lies at or below `prefix`."""
    return path[: len(prefix)] == prefix


def overlap(a: Path, b: Path) -> bool:
    """Tell whether one of two paths lies at or below the other."""
    return covers(a, b) or covers(b, a)


@frozen
class Access:
    """What one callback declares.

    Args:
        callback: Id of the callback, for messages.
        reads: Paths it reads.
        writes: Paths it writes, and may read.
    """

    callback: str
    reads: tuple[Path, ...]
    writes: tuple[Path, ...]

    @classmethod
    def declared(cls, callback: str, reads: Iterable[str], writes: Iterable[str]) -> Access:
        """Parse what a callback declares.

        Raises:
            CallbackError: A bare string instead of a tuple, or a path with an unknown root.
        """
        for name, paths in (("reads", reads), ("writes", writes)):
            if isinstance(paths, str):
                raise CallbackError(
                    f"{callback} declares {name} = {paths!r}; expected a tuple of paths: {name} = ({paths!r},)"
                )
        return cls(
            callback,
            tuple(parse(path, callback) for path in reads),
            tuple(parse(path, callback) for path in writes),
        )

    @property
    def reads_everything(self) -> bool:
        """Whether ``"*"`` is among the reads."""
        return EVERYTHING in self.reads

    def allows(self, path: Path, mode: str) -> bool:
        """Tell whether `path` may be read or written."""
        allowed = self.writes if mode == "write" else (*self.writes, *self.reads)
        return any(covers(prefix, path) for prefix in allowed)

    def refuse(self, path: Path, mode: str) -> StateAccessError:
        """Make the error for an undeclared access."""
        declared = (map(dotted, self.reads), map(dotted, self.writes))
        return StateAccessError(self.callback, dotted(path), mode, declared)

    def children(self, path: Path) -> dict[str, Path]:
        """Names directly below `path` at or below which something is declared."""
        below = [p for p in (*self.reads, *self.writes) if len(p) > len(path) and covers(path, p)]
        return {p[len(path)]: p[: len(path) + 1] for p in below}


def guarded(value: Any, path: Path, access: Access) -> Any:
    """Give `value` as a reader may have it: containers read-only, anything else as it is."""
    if isinstance(value, Container):
        return ReadOnly(value, path, access)
    kind = type(value)
    if kind in (dict, OrderedDict, defaultdict):  # other dicts have attributes of their own, which a copy would lose
        return ReadOnlyDict(value, path, access)
    if kind is list:
        return ReadOnlyList(value, path, access)
    if kind is set:
        return ReadOnlySet(value, path, access)
    if isinstance(value, tuple):
        items = [guarded(item, path, access) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return kind(*items) if hasattr(kind, "_fields") else kind(items)
    return value


class ReadOnly:
    """A container seen by a callback that declared to read it: whatever it gives is read-only too."""

    __slots__ = ("_access", "_path", "_value")

    def __init__(self, value: Any, path: Path, access: Access) -> None:
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_access", access)

    def __getattr__(self, name: str) -> Any:
        return guarded(getattr(self._value, name), (*self._path, name), self._access)

    def __getitem__(self, key: Any) -> Any:
        return guarded(self._value[key], (*self._path, _name(key)), self._access)

    def get(self, key: Any, default: Any = None) -> Any:
        """Read an item, or `default`."""
        return self[key] if key in self._value else default

    def items(self) -> list[tuple[Any, Any]]:
        """Give the items, read-only."""
        return [(key, self[key]) for key in self._value]

    def values(self) -> list[Any]:
        """Give the values, read-only."""
        return [self[key] for key in self._value]

    def keys(self) -> list[Any]:
        """Give the keys."""
        return list(self._value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._access.refuse((*self._path, name), "write")

    def __delattr__(self, name: str) -> None:
        raise self._access.refuse((*self._path, name), "write")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise self._access.refuse((*self._path, _name(key)), "write")

    def __delitem__(self, key: Any) -> None:
        raise self._access.refuse((*self._path, _name(key)), "write")

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise self._access.refuse(self._path, "write")

    pop = popitem = clear = update = setdefault = _refuse

    def __contains__(self, name: object) -> bool:
        return name in self._value

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value)

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        return bool(self._value == (other._value if isinstance(other, ReadOnly) else other))

    __hash__ = None  # type: ignore[assignment]  # as unhashable as the containers it shows

    def __repr__(self) -> str:
        return f"ReadOnly({self._value!r})"


class ReadOnlyDict(dict[Any, Any]):
    """A copy of a dict that says so when it is written to: still a dict for whoever asks."""

    __stands_for__ = dict

    def __init__(self, value: dict[Any, Any], path: Path, access: Access) -> None:
        super().__init__((key, guarded(item, (*path, _name(key)), access)) for key, item in value.items())
        self._where = path, access
        self._fills_in = isinstance(value, defaultdict)

    def __missing__(self, key: Any) -> Any:
        if self._fills_in:  # reading it would have written it
            self._refuse()
        raise KeyError(key)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        path, access = self._where
        raise access.refuse(path, "write")

    __setitem__ = __delitem__ = __ior__ = pop = popitem = clear = update = setdefault = _refuse


class ReadOnlyList(list[Any]):
    """A copy of a list that says so when it is written to: still a list for whoever asks."""

    __stands_for__ = list

    def __init__(self, value: list[Any], path: Path, access: Access) -> None:
        super().__init__(guarded(item, path, access) for item in value)
        self._where = path, access

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        path, access = self._where
        raise access.refuse(path, "write")

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = extend = insert = pop = remove = clear = sort = reverse = _refuse


class ReadOnlySet(set[Any]):
    """A copy of a set that says so when it is written to: still a set for whoever asks."""

    def __init__(self, value: set[Any], path: Path, access: Access) -> None:
        super().__init__(value)
        self._where = path, access

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        path, access = self._where
        raise access.refuse(path, "write")

    __iand__ = __ior__ = __isub__ = __ixor__ = add = clear = discard = pop = remove = update = _refuse
    difference_update = intersection_update = symmetric_difference_update = _refuse


def _name(key: Any) -> str:
    return key.__name__ if isinstance(key, type) else str(key)


class View:
    """What a handler gets as ``learner``: the declared paths, and nothing else.

    Everybody may call the services: ``defer(undo)`` (undo something when the running step, epoch
    or fit ends) and ``host(tensor, then)`` (have a number on the host without waiting for the
    device).
    """

    __slots__ = ("_learner",)
    _learner: Learner

    def __init__(self, learner: Learner) -> None:
        object.__setattr__(self, "_learner", learner)

    def __deepcopy__(self, memo: dict[int, Any]) -> View:
        return type(self)(copy.deepcopy(self._learner, memo))


def make_view(access: Access, learner: Learner) -> Any:
    """Make the view of `learner` for one callback: a class generated once from its declaration."""
    return _generate(access, (), lambda learner: learner)(learner)


SERVICES = ("defer", "host")


def _generate(access: Access, path: Path, fetch: Callable[[Any], Any]) -> type[View]:
    """Generate the class of the view at `path`; `fetch` gets the viewed object from the learner."""
    body: dict[str, Any] = {"__slots__": ()}
    for name, child in access.children(path).items():
        body[name] = _property(access, child, fetch)
    if path == ():
        body |= {name: _service(name) for name in SERVICES}

    def missing(self: View, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        whole = (*path, name)
        if access.allows(whole, "read"):  # below a prefix: only "*" gets here
            return guarded(getattr(fetch(self._learner), name), whole, access)
        raise access.refuse(whole, "read")

    def assign(self: View, name: str, value: Any) -> None:
        whole = (*path, name)
        if not access.allows(whole, "write"):
            raise access.refuse(whole, "write")
        setattr(fetch(self._learner), name, value)

    def item(self: View, key: Any) -> Any:
        return getattr(self, _name(key))

    def assign_item(self: View, key: Any, value: Any) -> None:
        whole = (*path, _name(key))
        if not access.allows(whole, "write"):
            raise access.refuse(whole, "write")
        fetch(self._learner)[key] = value

    def delete(self: View, name: Any) -> None:
        raise access.refuse((*path, _name(name)), "write")

    def contains(self: View, name: object) -> bool:
        whole = (*path, str(name))
        if not access.allows(whole, "read"):
            raise access.refuse(whole, "read")
        return name in fetch(self._learner)

    def represent(self: View) -> str:
        return f"<{access.callback}'s view of {dotted(path) if path else 'the learner'}>"

    body |= {
        "__getattr__": missing,
        "__setattr__": assign,
        "__delattr__": delete,
        "__getitem__": item,
        "__setitem__": assign_item,
        "__delitem__": delete,
        "__contains__": contains,
        "__repr__": represent,
    }
    return type("View", (View,), body)


def _service(name: str) -> property:
    return property(lambda self: getattr(self._learner, name))


def _property(access: Access, path: Path, fetch: Callable[[Any], Any]) -> property:
    """Generate the property of a view that gives what lies at `path`."""
    name = path[-1]

    def get(learner: Any) -> Any:
        value = fetch(learner)
        try:
            return getattr(value, name)
        except AttributeError:
            if isinstance(value, dict) and name in value:
                return value[name]
            if isinstance(value, tuple) and name.isdigit() and int(name) < len(value):
                return value[int(name)]
            raise

    if access.allows(path, "write"):
        return property(lambda self: get(self._learner))
    if access.allows(path, "read") and not any(len(w) > len(path) and covers(path, w) for w in access.writes):
        return property(lambda self: guarded(get(self._learner), path, access))
    nested = _generate(access, path, get)
    return property(lambda self: nested(self._learner))
