"""Containers: the state of one step, what callbacks share, what is kept per phase, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from fluxloop.errors import MissingEntryError, PhaseError, describe, did_you_mean
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
        raise MissingEntryError(
            f"{self.__kind__} has no entry {name!r}; it has: {entries}{did_you_mean(name, vars(self))}.{self.__hint__}"
        )

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
            vars(self)[name] = map_tensors(_without_graph, entry)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepState:
        entries = {name: map_tensors(_without_graph, entry) for name, entry in vars(self).items()}
        copied = memo[id(self)] = StepState(copy.deepcopy(entries, memo))  # torch copies leaves alone
        return copied

    __kind__ = "The step"
    __hint__ = " A phase stores an entry with 'state.NAME = ...' or runstep(learner, self, NAME=...)."


class SharedState(State):
    """What callbacks publish for other callbacks: ``learner.cbstate``."""

    __kind__ = "cbstate"
    __hint__ = " A callback publishes one in init(), with writes = ('cbstate.NAME',)."


class PhaseDict(Container, MutableMapping[Any, V], Generic[V]):
    """A mapping keyed by the phase's class; an instance of it finds the same entry.

    Args:
        default: Makes the entry of a phase that has none yet.
    """

    def __init__(self, default: Callable[[], V]) -> None:
        self._default = default
        self._entries: dict[type, V] = {}

    @staticmethod
    def _key(phase: Any) -> type:
        cls = phase if isinstance(phase, type) else type(phase)
        if not hasattr(cls, "data_key"):
            raise PhaseError(
                f"{describe(phase)} was used as a key; expected a phase or its class, e.g. [TrainingPhase]"
            )
        return cls

    def __getitem__(self, phase: Any) -> V:
        found = self._entries.get(type(phase))  # at every step: an instance that has an entry
        if found is not None:
            return found
        cls = self._key(phase)
        if cls not in self._entries:
            self._entries[cls] = self._default()
        return self._entries[cls]

    def peek(self, phase: Any) -> V:
        """Give the entry of a phase, or a new one that is not kept."""
        cls = self._key(phase)
        return self._entries[cls] if cls in self._entries else self._default()

    def __setitem__(self, phase: Any, value: V) -> None:
        self._entries[self._key(phase)] = value

    def __delitem__(self, phase: Any) -> None:
        del self._entries[self._key(phase)]

    def __contains__(self, phase: object) -> bool:
        return self._key(phase) in self._entries

    def __iter__(self) -> Iterator[type]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        inside = ", ".join(f"{cls.__name__}: {value!r}" for cls, value in self._entries.items())
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
