"""A quick look that finds whether anything that a graph rests on may have changed since it was last compared.

`rests_on` and `states_of` describe modules, loss function and optimizers anew, which takes more than a
hundred calls for a small model. In a loop of the user's own that would be done at every step. A `Glance`
remembers the very objects that were described, and compares who is where: in C, without a call for each.
It may see a change where there is none, and then everything is described again; it never misses one.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fluxloop.compile.conditions import HOOKS, MODULE_INTERNALS, STEP_HOOKS, holders_of, modules_of
from fluxloop.persist.attributes import WATCHED, attributes
from fluxloop.persist.seen import CONSTANTS, seen
from fluxloop.phase import Phase

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

IS_ITSELF = (*CONSTANTS, float, Tensor, nn.Module, Optimizer, type, ModuleType)
"""Types of values that `seen` describes by what they say, or by who they are: the same object says the same."""
MODULES = (nn.Module, Phase)
"""Types of what a phase holds and a step may run."""
HOOKS_OF_ALL = itemgetter(*(name for hooks in HOOKS if (name := f"_global{hooks}") in vars(nn.modules.module)))
FORM = attrgetter("shape", "dtype", "device", "requires_grad")
PARTS_OF_A_PARTIAL = attrgetter("func", "args", "keywords")
PARAMETERS, GROUPS, STATE = attrgetter("parameters"), attrgetter("param_groups"), attrgetter("state")
PARAMS = itemgetter("params")


class Remembered:
    """What stands in values, as deep as `seen` describes them.

    Args:
        values: What to remember.
    """

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self._dicts: list[Any] = []
        self._lists: list[list[Any]] = []
        self._partials: list[Any] = []
        self._described: list[tuple[Any, int, Any]] = []
        for value in values:
            self._add(value, 4)
        self._take_note()

    def _add(self, value: Any, depth: int) -> None:
        """Remember what a value holds, as deep as `seen` describes it."""
        if depth == 0 or isinstance(value, IS_ITSELF):
            return
        inner: Any = ()
        if type(value) in (dict, OrderedDict, defaultdict):
            self._dicts.append(value)
            inner = value.values()
        elif type(value) is list:
            self._lists.append(value)
            inner = value
        elif isinstance(value, tuple):
            inner = value
        elif isinstance(value, partial):
            self._partials.append(value)
            inner = PARTS_OF_A_PARTIAL(value)
        elif isinstance(value, MethodType):
            inner = (value.__self__,)
        elif isinstance(value, (Mapping, list, set, frozenset)) or hasattr(type(value), "tobytes"):
            self._described.append((value, depth, seen(value, depth)))
        elif attributes(value):
            try:
                own = plain_attributes(value)
            except NotPlainError:
                self._described.append((value, depth, seen(value, depth)))
            else:
                self._dicts.append(own)
                inner = own.values()
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._dicts.append(vars(value))  # empty, as a function's is
        for item in inner:
            self._add(item, depth - 1)

    def _take_note(self) -> None:
        """Note what stands now in everything that was added."""
        self._lengths = [*map(len, self._dicts)]
        self._names = [*chain.from_iterable(self._dicts)]
        self._values = [*chain.from_iterable(map(dict.values, self._dicts))]
        self._list_lengths = [*map(len, self._lists)]
        self._items = [*chain.from_iterable(self._lists)]
        self._parts_of_partials = [*chain.from_iterable(map(PARTS_OF_A_PARTIAL, self._partials))]
        self._is_empty = not (self._dicts or self._lists or self._partials or self._described)

    def is_as_it_was(self) -> bool:
        """Return whether the same objects stand in dicts, lists and partials, and under the same names.

        Lengths are compared first, since `map` ends with the shorter one.
        """
        return self._is_empty or (
            [*map(len, self._dicts)] == self._lengths
            and [*map(len, self._lists)] == self._list_lengths
            and all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._values))
            and all(map(is_, chain.from_iterable(self._dicts), self._names))
            and all(map(is_, chain.from_iterable(self._lists), self._items))
            and all(map(is_, chain.from_iterable(map(PARTS_OF_A_PARTIAL, self._partials)), self._parts_of_partials))
            # what only a description shows
            and (not self._described or all(seen(value, depth) == old for value, depth, old in self._described))
        )


class Glance(Remembered):
    """Who stood where when a phase's step was last compared.

    Args:
        learner: Whose step it is.
        phase: The running phase.

    Raises:
        NotPlainError: Something is held in a way that only a description shows.
    """

    def __init__(self, learner: RunLearner, phase: Phase) -> None:
        if phase.model_view:  # copies of weights are looked up by name
            raise NotPlainError
        self._learner, self._phase, self._gradients = learner, phase, phase.gradients
        self._models, self._loss_fn, self._slots = learner.models, learner.loss_fn, learner.updates.slots
        super().__init__()
        self._dicts += [learner.models, learner.weights.views]
        self._tensors: list[Tensor] = []
        self._holders = [plain_attributes(holder) for holder in holders_of(phase)]
        self._parts = list({part: None for module in modules_of(learner, phase) for part in module.modules()})
        for part in self._parts:
            self._add_module(part)
        self._add(learner.loss_fn, 4)
        self._optimizers: list[Any] = []
        self._groups: list[dict[str, Any]] = []
        for slot in self._slots if phase.gradients else ():
            self._add_optimizer(slot.optimizer)
        # all objects are found: what stands in them now
        self._take_note()
        self._kinds = [*map(type, self._parts)]
        self._hooks = [hooks for part in self._parts for hooks in map(vars(part).get, HOOKS) if hooks is not None]
        self._held = [value for own in self._holders for value in own.values() if isinstance(value, MODULES)]
        self._forms = [*map(FORM, self._tensors)]
        self._strides = [*map(Tensor.stride, self._tensors)]
        self._slot_lengths = [*map(len, map(PARAMETERS, self._slots))]
        self._slot_parameters = [*chain.from_iterable(map(PARAMETERS, self._slots))]
        self._group_lists, self._states = [*map(GROUPS, self._optimizers)], [*map(STATE, self._optimizers)]
        self._optimizers_own = [vars(optimizer) for optimizer in self._optimizers]
        self._steps = [own.get("step") for own in self._optimizers_own]
        self._params = [*map(PARAMS, self._groups)]
        stepped = [*self._optimizers, *(self._slot_parameters if phase.gradients else ())]
        self._stepped = [thing for thing in stepped for _ in STEP_HOOKS]
        self._hook_names = [name for _ in stepped for name in STEP_HOOKS]
        if not self.shows_no_change(phase):  # there are hooks, which a trace refuses
            raise NotPlainError

    def _add_module(self, part: nn.Module) -> None:
        """Remember what a module holds; parts that joined it since are seen in ``_modules``."""
        own = vars(part)
        self._dicts += [own, part._parameters, part._buffers, part._modules]
        for name, value in own.items():
            if name not in MODULE_INTERNALS:
                self._add(value, 4)
        places = (*own.values(), *part._parameters.values(), *part._buffers.values())
        tensors = [value for value in places if isinstance(value, Tensor)]
        if any(map(is_lazy, tensors)):  # they have no shape yet
            raise NotPlainError
        self._tensors += tensors

    def _add_optimizer(self, optimizer: Any) -> None:
        """Remember the groups and the state of an optimizer."""
        if not isinstance(optimizer.state, dict):
            raise NotPlainError
        groups, state = optimizer.param_groups, optimizer.state
        self._optimizers.append(optimizer)
        self._groups += groups
        self._lists += [groups, *(group["params"] for group in groups)]
        self._dicts.append(state)
        for entries in state.values():
            if not isinstance(entries, dict):
                raise NotPlainError
            self._dicts.append(entries)
            self._tensors += [value for value in entries.values() if isinstance(value, Tensor)]

    def shows_no_change(self, phase: Phase) -> bool:
        """Return whether everything is where it was.

        Expressions whose loops run in C: they are evaluated at every step of a loop of the user's own. Measured, they
        take 20 us where a description takes 51 (an MLP of two layers, Adam), and 92 where it takes 264 (thirteen
        layers). Lengths are compared first, since `map` ends with the shorter one.
        """
        learner, slots = self._learner, self._slots
        return (
            phase is self._phase
            and phase.gradients is self._gradients
            and not phase.model_view
            and learner.models is self._models
            and learner.loss_fn is self._loss_fn
            and learner.updates.slots is slots
            and self.is_as_it_was()
            and len(held := [v for own in self._holders for v in own.values() if isinstance(v, MODULES)])
            == len(self._held)
            and all(map(is_, held, self._held))
            # modules and their hooks
            and all(map(is_, map(type, self._parts), self._kinds))
            and not any(map(len, self._hooks))
            and not any(map(len, HOOKS_OF_ALL(vars(nn.modules.module))))
            # tensors
            and [*map(FORM, self._tensors)] == self._forms
            and [*map(Tensor.stride, self._tensors)] == self._strides
            # optimizers
            and [*map(len, map(PARAMETERS, slots))] == self._slot_lengths
            and all(map(is_, chain.from_iterable(map(PARAMETERS, slots)), self._slot_parameters))
            and all(map(is_, map(GROUPS, self._optimizers), self._group_lists))
            and all(map(is_, map(STATE, self._optimizers), self._states))
            and all(map(is_, map(dict.get, self._optimizers_own, repeat("step")), self._steps))
            and all(map(is_, map(PARAMS, self._groups), self._params))
            and not any(map(getattr, self._stepped, self._hook_names, repeat(None)))
        )


class NotPlainError(Exception):
    """Something is held where only a full description finds it."""


def plain_attributes(thing: Any) -> dict[str, Any]:
    """Return the dict of an object that holds all of its attributes.

    Raises:
        NotPlainError: It has others, in slots.
    """
    own = getattr(thing, "__dict__", None)
    if type(own) is not dict or attributes(thing).keys() != own.keys() - {WATCHED}:
        raise NotPlainError
    return own
