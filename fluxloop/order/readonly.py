"""Containers as a reader may have them: whoever declared to read one cannot change it.

This finds mistakes; it is no sandbox. A tensor or a module can still be changed in place.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fluxloop.order.access import Access, Path
from fluxloop.persist.series import Series
from fluxloop.state import Container, PhaseDict, State, StepState


def guarded(value: Any, path: Path, access: Access) -> Any:  # noqa: PLR0911  # one per kind of value
    """Return `value` as a reader may have it: containers read-only, anything else as it is.

    Args:
        value: What lies at `path`.
        path: Where it lies, for the message of a refused write.
        access: What the reader declared.
    """
    kind = type(value)
    if kind is Tensor or kind is int:  # these three first: they are read at every step
        return value
    if kind is StepState:
        return ReadOnly(value, path, access)
    if len(path) > 1 and path[0] == "data":
        return value  # the user's own batches: no copies of those
    if isinstance(value, Container):
        return (ReadOnlyMapping if isinstance(value, Mapping) else ReadOnly)(value, path, access)
    if kind in (dict, OrderedDict, defaultdict):  # other dicts have attributes of their own, which a copy would lose
        return ReadOnlyDict(value, path, access)
    if kind is list or kind is Series:
        return ReadOnlyList(value, path, access)
    if kind is set:
        return ReadOnlySet(value, path, access)
    if isinstance(value, tuple):
        items = [guarded(item, path, access) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return kind(*items) if hasattr(kind, "_fields") else kind(items)
    return value


class ReadOnly:
    """A container seen by a reader: whatever is read from it is read-only too. A copy of it is a snapshot."""

    __slots__ = ("_access", "_path", "_value")

    def __init__(self, value: Any, path: Path, access: Access) -> None:
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_access", access)

    @property
    def __dict__(self) -> Any:  # type: ignore[override]  # for vars()
        return guarded(dict(vars(self._value)), self._path, self._access)

    def _below(self, key: Any) -> Path:
        """Return where an entry lies: entries of a state have paths of their own, those of others their container's."""
        return (*self._path, str(key)) if isinstance(self._value, State) else self._path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._value, name)
        return value if type(value) is Tensor else guarded(value, self._below(name), self._access)

    def __getitem__(self, key: Any) -> Any:
        value = self._value.peek(key) if isinstance(self._value, PhaseDict) else self._value[key]
        return guarded(value, self._below(key), self._access)

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._access.refuse(self._below(name), "write")

    def __delattr__(self, name: str) -> None:
        raise self._access.refuse(self._below(name), "write")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise self._access.refuse(self._below(key), "write")

    def __delitem__(self, key: Any) -> None:
        raise self._access.refuse(self._below(key), "write")

    def __contains__(self, name: object) -> bool:
        return name in self._value

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value)

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        return bool(self._value == (other._value if isinstance(other, ReadOnly) else other))

    __hash__ = None  # type: ignore[assignment]  # as unhashable as the containers it shows

    def __copy__(self) -> Any:
        return copy.copy(self._value)

    def __reduce_ex__(self, protocol: object) -> Any:  # for deepcopy and pickle
        return _itself, (self._value,)

    def __repr__(self) -> str:
        return f"ReadOnly({self._value!r})"


def _itself(value: Any) -> Any:
    return value


class ReadOnlyMapping(ReadOnly):
    """A mapping, such as what is kept per phase, seen by a reader."""

    __slots__ = ()

    def get(self, key: Any, default: Any = None) -> Any:
        """Read an item, or `default`."""
        return self[key] if key in self._value else default

    def items(self) -> list[tuple[Any, Any]]:
        """Return the items, read-only."""
        return [(key, self[key]) for key in self._value]

    def values(self) -> list[Any]:
        """Return the values, read-only."""
        return [self[key] for key in self._value]

    def keys(self) -> list[Any]:
        """Return the keys."""
        return list(self._value)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise self._access.refuse(self._path, "write")

    clear = pop = popitem = setdefault = update = _refuse


class _Copied:
    """What the read-only copies of plain containers have in common."""

    _where: tuple[Path, Access]

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        path, access = self._where
        raise access.refuse(path, "write")


class ReadOnlyDict(_Copied, dict[Any, Any]):
    """A copy of a dict that says so when it is written to: still a dict for whoever asks."""

    __stands_for__ = dict

    def __init__(self, value: dict[Any, Any], path: Path, access: Access) -> None:
        super().__init__(value)
        self._where = path, access
        self._fills_in = isinstance(value, defaultdict)

    def __getitem__(self, key: Any) -> Any:
        path, access = self._where
        return guarded(super().__getitem__(key), (*path, str(key)), access)

    def __missing__(self, key: Any) -> Any:
        if self._fills_in:  # reading it would have written it
            self._refuse()
        raise KeyError(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Read an item, or `default`."""
        return self[key] if key in self else default  # noqa: SIM401 - this is get

    def values(self) -> Any:
        """Return the values, read-only."""
        return [self[key] for key in self]

    def items(self) -> Any:
        """Return the items, read-only."""
        return [(key, self[key]) for key in self]

    def __reduce_ex__(self, protocol: object) -> Any:
        return dict, (list(dict.items(self)),)

    __setitem__ = __delitem__ = __ior__ = _Copied._refuse
    clear = pop = popitem = setdefault = update = _Copied._refuse


class ReadOnlyList(_Copied, list[Any]):
    """A copy of a list that says so when it is written to: still a list for whoever asks."""

    __stands_for__ = list

    def __init__(self, value: list[Any], path: Path, access: Access) -> None:
        super().__init__(value)
        self._where = path, access

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        path, access = self._where
        return guarded(super().__getitem__(index), path, access)

    def __iter__(self) -> Iterator[Any]:
        path, access = self._where
        return (guarded(item, path, access) for item in super().__iter__())

    def __reduce_ex__(self, protocol: object) -> Any:
        return list, (tuple(list.__iter__(self)),)

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _Copied._refuse
    append = clear = extend = insert = pop = remove = reverse = sort = _Copied._refuse


class ReadOnlySet(_Copied, set[Any]):
    """A copy of a set that says so when it is written to: still a set for whoever asks."""

    def __init__(self, value: set[Any], path: Path, access: Access) -> None:
        super().__init__(value)
        self._where = path, access

    def __reduce_ex__(self, protocol: object) -> Any:
        return set, (tuple(self),)

    __iand__ = __ior__ = __isub__ = __ixor__ = _Copied._refuse
    add = clear = discard = pop = remove = update = _Copied._refuse
    difference_update = intersection_update = symmetric_difference_update = _Copied._refuse
