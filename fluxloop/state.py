"""Containers: the state of one step, what callbacks share, what is kept per phase, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from attrs import frozen
from torch import Tensor, nn

from fluxloop.errors import MissingEntryError, PhaseError, describe, did_you_mean, sentence
from fluxloop.nested import map_tensors

V = TypeVar("V")


class Container:
    """Base of what a callback that only declared reading gets to see read-only."""


class State(Container):
    """A container of named entries: any attribute may be stored, and read from then on.

    ``"loss" in state`` tells whether an entry is there, ``vars(state)`` gives all of them.

    >>> state = State({"xs": 1})
    >>> state.preds = 2
    >>> sorted(vars(state)), "loss" in state
    (['preds', 'xs'], False)
    """

    __kind__ = "The container"
    __hint__ = ""

    def __init__(self, entries: dict[str, Any] | None = None) -> None:
        if entries is not None:
            self.__dict__ = entries

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        entries = ", ".join(sorted(vars(self))) or "nothing"
        said = f"{self.__kind__} has no entry {name!r}; it has: {entries}{did_you_mean(name, vars(self))}"
        raise MissingEntryError(f"{sentence(said)}{self.__hint__}", name=name)

    if TYPE_CHECKING:  # any attribute may be stored; at run time object's own __setattr__ does it

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.__dict__)})"


def _without_graph(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_leaf else tensor.detach()


class StepState(State):
    """The entries of one step, as the phase stores them, such as ``xs``, ``preds`` and ``loss``."""

    def drop_graphs(self) -> None:
        """Keep the entries without the graphs that made them: memory that nothing needs after an epoch."""
        for name, entry in vars(self).items():
            with suppress(TypeError):  # a container that gives no copy keeps its graph until the next step
                vars(self)[name] = map_tensors(_without_graph, entry)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepState:
        entries = {name: map_tensors(_without_graph, entry) for name, entry in vars(self).items()}
        copied = memo[id(self)] = StepState(copy.deepcopy(entries, memo))  # torch copies leaves alone
        return copied

    __kind__ = "The step"
    __hint__ = " A phase stores an entry with 'state.NAME = ...' or runstep(learner, self, NAME=...)."


class LossName(str):
    """A name that an update block gave to its loss: ``learner.optimizing("D", loss="r1")``.

    A key of ``step.losses`` as the optimizers' names are; the loss is recorded under it as it is.
    """

    __slots__ = ()


class SharedState(State):
    """What callbacks publish for other callbacks: ``learner.cbstate``."""

    __kind__ = "cbstate"
    __hint__ = " A callback publishes one in init(), with writes = ('cbstate.NAME',)."


def name_of(phase: Any) -> str:
    """Return the name of a phase or of a phase class: its own where it has one, else that of the class.

    >>> class Noisy:
    ...     name = "noise of 3"
    >>> name_of(Noisy), name_of(Noisy())
    ('noise of 3', 'noise of 3')
    """
    name = getattr(phase, "name", None)
    if isinstance(name, str):
        return name
    return (phase if isinstance(phase, type) else type(phase)).__name__


@frozen
class NamedPhase:
    """Stands for the phases of one class that have a name of their own, where a `PhaseDict` lists its keys.

    What the class says can be read from it: ``data_key``, ``gradients``, ``model_view``.

    Args:
        cls: The class.
        name: The phases' name.
    """

    cls: type
    name: str

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "__name__":
            return self.name
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self.cls, attribute)


class PhaseDict(Container, MutableMapping[Any, V], Generic[V]):
    """A mapping keyed by the phase's name; the phase and its class find the same entry.

    Iterating gives the class of each phase or, where the phase has a name of its own, a `NamedPhase`.
    A class whose phases all have such names finds the entry of the only one.

    Args:
        default: Makes the entry of a phase that has none yet.
    """

    def __init__(self, default: Callable[[], V]) -> None:
        self._default = default
        self._entries: dict[str, V] = {}
        self._classes: dict[str, type] = {}

    @staticmethod
    def _split(phase: Any) -> tuple[str, type]:
        """Return the name and the class of a phase.

        Raises:
            PhaseError: It is none.
        """
        cls = phase.cls if isinstance(phase, NamedPhase) else phase if isinstance(phase, type) else type(phase)
        if not hasattr(cls, "data_key"):
            raise PhaseError(
                f"{describe(phase)} was used as a key; expected a phase or its class, e.g. [TrainingPhase]"
            )
        return name_of(phase), cls

    def _find(self, phase: Any) -> tuple[str, type]:
        """Return the name and the class of a phase; of a class that has no entry, those of its only phase.

        Raises:
            PhaseError: It is none, or several phases of the class have names of their own.
        """
        name, cls = self._split(phase)
        if isinstance(phase, type) and name not in self._entries:
            names = [each for each, known in self._classes.items() if known is cls]
            if len(names) > 1:
                raise PhaseError(
                    f"{cls.__name__} was used as a key, and there are phases of it called {sorted(names)}; expected "
                    f"one of those phases, or its name: history[{names[0]!r}]"
                )
            name = names[0] if names else name
        return name, cls

    def __getitem__(self, phase: Any) -> V:
        try:
            return self._entries[phase.name]  # at every step: a phase that has an entry
        except (KeyError, AttributeError, TypeError):
            pass
        name, cls = self._find(phase)
        if name not in self._entries:
            self._entries[name], self._classes[name] = self._default(), cls
        return self._entries[name]

    def peek(self, phase: Any) -> V:
        """Return the entry of a phase, or a new one that is not kept."""
        try:
            return self._entries[phase.name]
        except (KeyError, AttributeError, TypeError):
            pass
        name, _ = self._find(phase)
        return self._entries[name] if name in self._entries else self._default()

    def key(self, name: str) -> Any:
        """Return what iterating gives for the phase of a name, or None where it has no entry."""
        cls = self._classes.get(name)
        return cls if cls is None or name_of(cls) == name else NamedPhase(cls, name)

    def __setitem__(self, phase: Any, value: V) -> None:
        name, cls = self._split(phase)
        self._entries[name], self._classes[name] = value, cls

    def __delitem__(self, phase: Any) -> None:
        name, _ = self._split(phase)
        del self._entries[name], self._classes[name]

    def __contains__(self, phase: object) -> bool:
        return self._find(phase)[0] in self._entries

    def __iter__(self) -> Iterator[Any]:
        return map(self.key, self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {value!r}" for name, value in self._entries.items())
        return f"{{{inside}}}"


class Gradients(Container, Mapping[str, Tensor | None]):
    """The gradients of a learner's parameters by the parameters' names; read when asked for.

    ``step.grads["0.weight"]`` is the parameter's ``grad``: a tensor of the parameter's shape, or
    None where the last backward did not reach it. Assigning replaces it for the update.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._parameters = dict(parameters)

    def __getitem__(self, name: str) -> Tensor | None:
        return self._parameters[name].grad

    def __setitem__(self, name: str, gradient: Tensor | None) -> None:
        self._parameters[name].grad = gradient

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __repr__(self) -> str:
        return f"Gradients({', '.join(self._parameters)})"
