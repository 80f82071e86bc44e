"""The view of the learner that a handler gets: what its callback declared, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field, frozen

from fluxloop.order.access import SERVICES, Access, Path, covers, dotted
from fluxloop.order.readonly import guarded
from fluxloop.order.weights import DeclaredWeights

if TYPE_CHECKING:
    from fluxloop.interfaces import StepLearner


@frozen(eq=False)
class Place:
    """What a view shows: one place in the learner, as a callback declared it.

    Args:
        access: What the callback declared.
        path: Where it lies; () is the learner itself.
        fetch: Returns what lies there, of a learner.
        readable: For each name that was asked for with ``in``: whether it may be read. Handlers ask so in every step.
    """

    access: Access
    path: Path
    fetch: Callable[[Any], Any]
    readable: dict[object, bool] = field(factory=dict)


class LearnerView:
    """What a handler gets as ``learner``: the declared paths, and nothing else.

    Every callback may call the services: ``defer(undo)`` (undo something when the running step, epoch
    or fit ends), ``host(tensor, then)`` (call ``then`` with the number once it has been copied to the
    host, without waiting for the device), ``request_stop(reason)`` (end the fit before its next batch),
    ``where()`` (phase, epoch and step in words), ``check(phases=...)`` (run a step of each on the side),
    ``finite`` (stop a fit whose numbers are not finite) and, in a step that is being compiled,
    ``skip_update(when)``. Every callback may read where the running fit is, ``cycle`` of ``num_epochs``,
    ``fit_phases`` and ``trained_steps``, the ``accelerator``, such as ``accelerator.is_main``, and whether it is to be
    ``quiet``.
    ``weights[name]`` returns the weights at a declared path, ``"model.G@ema"`` as ``weights["G@ema"]``.
    """

    # A class is generated for each view, with a property for each declared path: reading one costs no more than
    # that. What follows is for the names that are left.

    __slots__ = ("_learner",)
    _learner: StepLearner
    __place__: ClassVar[Place]
    _nested: ClassVar[dict[str, type[LearnerView]]] = {}
    """The views of what lies below, by name: made once, read as quickly as an attribute."""

    def __init__(self, learner: StepLearner) -> None:
        object.__setattr__(self, "_learner", learner)
        for name, nested in self._nested.items():
            object.__setattr__(self, name, nested(learner))

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnerView:
        return type(self)(copy.deepcopy(self._learner, memo))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        place = self.__place__
        access, path = place.access, (*place.path, name)
        if not access.allows(path, "read"):
            if path in (("step",), ("cbstate",)):
                return Undeclared(access, path)
            raise access.refuse(path, "read")
        value = live_models(self._learner) if path == ("model",) else look_up(place.fetch(self._learner), name)
        return value if access.allows(path, "write") else guarded(value, path, access)

    def __setattr__(self, name: str, value: Any) -> None:
        place = self.__place__
        place.access.require((*place.path, name), "write")
        setattr(place.fetch(self._learner), name, value)

    def __delattr__(self, name: str) -> None:
        place = self.__place__
        place.access.require((*place.path, name), "write")
        delattr(place.fetch(self._learner), name)

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, str(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        place = self.__place__
        place.access.require((*place.path, str(key)), "write")
        place.fetch(self._learner)[key] = value

    def __delitem__(self, key: Any) -> None:
        place = self.__place__
        place.access.require((*place.path, str(key)), "write")
        del place.fetch(self._learner)[key]

    def __iter__(self) -> Iterator[Any]:
        place = self.__place__
        place.access.require(place.path, "read")
        return iter(place.fetch(self._learner))

    def __contains__(self, name: object) -> bool:
        place = self.__place__
        if name not in place.readable:
            place.readable[name] = place.access.allows((*place.path, str(name)), "read")
        if not place.readable[name]:
            raise place.access.refuse((*place.path, str(name)), "read")
        value = place.fetch(self._learner)
        return hasattr(value, str(name)) if place.path == () else name in value

    def __repr__(self) -> str:
        place = self.__place__
        return f"<{place.access.callback}'s view of {dotted(place.path) if place.path else 'the learner'}>"


def behind(learner: Any) -> Any:
    """Return the learner that a view shows, for handlers of fluxloop's own that run in each step of nearly every fit.

    They declare what they touch as all do, and tests see what that is; through the view each look takes half a µs.
    """
    return learner._learner if isinstance(learner, LearnerView) else learner


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


def make_view(access: Access, learner: StepLearner) -> Any:
    """Make the view of `learner` for one callback, of a class that is generated from its declaration."""
    return _generate(access, (), lambda learner: learner)(learner)


def look_up(value: Any, name: str) -> Any:
    """Return an attribute, or the item of a dict or tuple that a path calls `name`."""
    try:
        return getattr(value, name)
    except AttributeError:
        if isinstance(value, dict) and name in value:
            return value[name]
        if isinstance(value, tuple) and name.isdigit() and int(name) < len(value):
            return value[int(name)]
        raise


def live_models(learner: Any) -> Any:
    """Return what the path ``model`` stands for: the live models, also while a phase runs averaged ones."""
    return learner.weights.given


FACTS = ("accelerator", "cycle", "fit_phases", "num_epochs", "quiet", "trained_steps")
"""What everybody may read: no callback writes it, so no declaration would order anything."""


def _generate(access: Access, path: Path, fetch: Callable[[Any], Any]) -> type[LearnerView]:
    """Generate the class of the view at `path`; `fetch` gets the viewed object from the learner."""
    nested: dict[str, type[LearnerView]] = {}
    body: dict[str, Any] = {}
    for name, child in access.children(path).items():
        made = _property(access, child, fetch)
        if isinstance(made, property):
            body[name] = made
        elif name.isidentifier() and not name.startswith("_"):
            nested[name] = made
        else:  # a class can have no attribute of that name: "0" of a Sequential
            body[name] = property(partial(_below, made))
    if path == ():
        body |= {name: _service(name) for name in (*SERVICES, *FACTS) if name not in nested}
        body["weights"] = property(lambda self: DeclaredWeights(self._learner.weights, access))
    body |= {"__slots__": tuple(nested), "_nested": nested, "__place__": Place(access, path, fetch)}
    return type("LearnerView", (LearnerView,), body)


def _service(name: str) -> property:
    """Return a property for a method or a fact of the learner's."""
    return property(attrgetter(f"_learner.{name}"))  # no frame of Python: handlers ask in every step


def _below(view: type[LearnerView], of: LearnerView) -> LearnerView:
    """Return the view of something below another."""
    return view(of._learner)


def _property(access: Access, path: Path, fetch: Callable[[Any], Any]) -> property | type[LearnerView]:
    """Generate the property that returns what lies at `path`, or the class of the view of what lies below it."""
    name = path[-1]
    quick_path = ".".join(("weights", "given", *path[1:]) if path[0] == "model" else path)
    quick = attrgetter(quick_path)

    def get(learner: Any) -> Any:
        try:
            return quick(learner)
        except AttributeError:  # an item of a mapping or tuple, or nothing, which is said there
            return look_up(fetch(learner), name)

    # In C, as handlers ask in every step; where an attribute is not there, the view's `__getattr__` is asked
    read = attrgetter(f"_learner.{quick_path}")
    if access.allows(path, "write"):
        return property(read)
    # Where something below may be written the reader gets a view, which lets that through; a read-only copy would not
    if access.allows(path, "read") and not any(len(w) > len(path) and covers(path, w) for w in access.writes):
        return property(lambda self: guarded(read(self), path, access))
    return _generate(access, path, get)
