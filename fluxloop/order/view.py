"""The view of the learner that a handler gets: what its callback declared, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

from fluxloop.order.access import SERVICES, Access, Path, covers, dotted
from fluxloop.order.readonly import guarded
from fluxloop.order.weights import DeclaredWeights

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


class View:
    """What a handler gets as ``learner``: the declared paths, and nothing else.

    Everybody may call the services: ``defer(undo)`` (undo something when the running step, epoch
    or fit ends), ``host(tensor, then)`` (have a number on the host without waiting for the device),
    ``request_stop(reason)`` (end the fit before its next batch), ``where()`` (phase, epoch and step in
    words), ``check(phases=...)`` (a step of each on the side), ``finite`` (stop a fit whose numbers are
    not finite) and, in a step that is being compiled, ``skip_update(when)``. Everybody may read where
    the running fit is: ``cycle`` of ``num_epochs``, ``fit_phases`` and ``trained_steps``. ``weights[name]``
    gives the weights at a declared path, ``"model.G@ema"`` as ``weights["G@ema"]``.
    """

    __slots__ = ("_learner",)
    _learner: RunLearner

    def __init__(self, learner: RunLearner) -> None:
        object.__setattr__(self, "_learner", learner)
        for name, nested in self._nested.items():
            object.__setattr__(self, name, nested(learner))

    _nested: ClassVar[dict[str, type[View]]] = {}
    """The views of what lies below, by name: made once, read as quickly as an attribute."""

    def __deepcopy__(self, memo: dict[int, Any]) -> View:
        return type(self)(copy.deepcopy(self._learner, memo))


class Undeclared:
    """Stands for a container of which nothing was declared, so that the refusal can name the entry."""

    __slots__ = ("_access", "_path")

    def __init__(self, access: Access, path: Path) -> None:
        object.__setattr__(self, "_access", access)
        object.__setattr__(self, "_path", path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._access.refuse((*self._path, name), "read")

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._access.refuse((*self._path, name), "write")

    def __getitem__(self, name: Any) -> Any:
        raise self._access.refuse((*self._path, str(name)), "read")

    def __setitem__(self, name: Any, value: Any) -> None:
        raise self._access.refuse((*self._path, str(name)), "write")

    def __delattr__(self, name: str) -> None:
        raise self._access.refuse((*self._path, name), "write")

    def __delitem__(self, name: Any) -> None:
        raise self._access.refuse((*self._path, str(name)), "write")

    def __contains__(self, name: object) -> bool:
        raise self._access.refuse((*self._path, str(name)), "read")

    def __iter__(self) -> Iterator[Any]:
        raise self._access.refuse(self._path, "read")


def make_view(access: Access, learner: RunLearner) -> Any:
    """Make the view of `learner` for one callback: a class generated once from its declaration."""
    return _generate(access, (), lambda learner: learner)(learner)


def look_up(value: Any, name: str) -> Any:
    """Get an attribute, or the item of a dict or tuple that a path calls `name`."""
    try:
        return getattr(value, name)
    except AttributeError:
        if isinstance(value, dict) and name in value:
            return value[name]
        if isinstance(value, tuple) and name.isdigit() and int(name) < len(value):
            return value[int(name)]
        raise


def live_models(learner: Any) -> Any:
    """Give what the path ``model`` is: the live models, also while a phase runs a view of them."""
    return learner.weights.given


FACTS = ("cycle", "fit_phases", "num_epochs", "trained_steps")
"""What everybody may read of the running fit: no callback writes it, so no declaration would order anything."""


def _generate(access: Access, path: Path, fetch: Callable[[Any], Any]) -> type[View]:
    """Generate the class of the view at `path`; `fetch` gets the viewed object from the learner."""
    nested: dict[str, type[View]] = {}
    body: dict[str, Any] = {}
    for name, child in access.children(path).items():
        made = _property(access, child, fetch)
        if isinstance(made, property):
            body[name] = made
        elif name.isidentifier() and not name.startswith("_"):
            nested[name] = made
        else:  # no name of an attribute that a class can have: "0" of a Sequential
            body[name] = property(partial(_below, made))
    if path == ():
        body |= {name: _service(name) for name in (*SERVICES, *FACTS)}
        body["weights"] = property(lambda self: DeclaredWeights(self._learner.weights, access))

    def missing(self: View, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        whole = (*path, name)
        if not access.allows(whole, "read"):
            if whole in (("step",), ("cbstate",)):
                return Undeclared(access, whole)
            raise access.refuse(whole, "read")
        value = live_models(self._learner) if whole == ("model",) else look_up(fetch(self._learner), name)
        return value if access.allows(whole, "write") else guarded(value, whole, access)

    def assign(self: View, name: str, value: Any) -> None:
        access.require((*path, name), "write")
        setattr(fetch(self._learner), name, value)

    def remove(self: View, name: str) -> None:
        access.require((*path, name), "write")
        delattr(fetch(self._learner), name)

    def item(self: View, key: Any) -> Any:
        return getattr(self, str(key))

    def assign_item(self: View, key: Any, value: Any) -> None:
        access.require((*path, str(key)), "write")
        fetch(self._learner)[key] = value

    def remove_item(self: View, key: Any) -> None:
        access.require((*path, str(key)), "write")
        del fetch(self._learner)[key]

    def names(self: View) -> Iterator[Any]:
        access.require(path, "read")
        return iter(fetch(self._learner))

    readable: dict[object, bool] = {}

    def contains(self: View, name: object) -> bool:
        if name not in readable:
            readable[name] = access.allows((*path, str(name)), "read")
        if not readable[name]:
            raise access.refuse((*path, str(name)), "read")
        value = fetch(self._learner)
        return hasattr(value, str(name)) if path == () else name in value

    def represent(self: View) -> str:
        return f"<{access.callback}'s view of {dotted(path) if path else 'the learner'}>"

    body |= {
        "__slots__": tuple(nested),
        "_nested": nested,
        "__getattr__": missing,
        "__setattr__": assign,
        "__delattr__": remove,
        "__getitem__": item,
        "__setitem__": assign_item,
        "__delitem__": remove_item,
        "__iter__": names,
        "__contains__": contains,
        "__repr__": represent,
    }
    return type("View", (View,), body)


def _service(name: str) -> property:
    return property(attrgetter(f"_learner.{name}"))  # no frame of Python: handlers ask in every step


def _below(view: type[View], of: View) -> View:
    return view(of._learner)


def _property(access: Access, path: Path, fetch: Callable[[Any], Any]) -> property | type[View]:
    """Generate the property of a view that gives what lies at `path`, or the view of what is below it."""
    name = path[-1]
    quick = attrgetter(".".join(("weights", "given", *path[1:]) if path[0] == "model" else path))

    def get(learner: Any) -> Any:
        try:
            return quick(learner)
        except AttributeError:  # an item of a mapping or tuple, or nothing, which is said there
            return look_up(fetch(learner), name)

    if access.allows(path, "write"):
        return property(lambda self: get(self._learner))
    if access.allows(path, "read") and not any(len(w) > len(path) and covers(path, w) for w in access.writes):
        return property(lambda self: guarded(get(self._learner), path, access))
    return _generate(access, path, get)
