"""A quick look that finds whether anything that a graph rests on may have changed since it was last compared.

`rests_on` and `states_of` describe modules, loss function and optimizers anew, which takes more than a
hundred calls for a small model. In a loop of the user's own that would be done at every step. A `Glance`
remembers the very objects that were described, and compares who is where: in C, without a call for each.
It may see a change where there is none, and then everything is described again; it never misses one.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fluxloop.compile.conditions import HOOKS, MODULE_INTERNALS, STEP_HOOKS, holders_of, modules_of
from fluxloop.persist.plain import WATCHED, attributes
from fluxloop.persist.seen import SCALARS, seen
from fluxloop.phase import Phase

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

GLOBAL_HOOKS = tuple(name for hooks in HOOKS if (name := f"_global{hooks}") in vars(nn.modules.module))
IS_ITSELF = (*SCALARS, float, Tensor, nn.Module, Optimizer, type, ModuleType)
"""Types of values that `seen` describes by what they say, or by who they are: the same object says the same."""
FORM = attrgetter("shape", "dtype", "device", "requires_grad")
PARTS_OF_A_PARTIAL = attrgetter("func", "args", "keywords")
HOOKS_OF_A_PARAMETER = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


class Glance:
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
        self._dicts: list[Any] = [learner.models]
        self._lists: list[list[Any]] = []
        self._partials: list[Any] = []
        self._tensors: list[Tensor] = []
        self._described: list[tuple[Any, int, Any]] = []
        self._holders: list[dict[str, Any]] = []
        for holder in holders_of(phase):
            self._holders.append(plain_attributes(holder))
        self._parts = list({part: None for module in modules_of(learner, phase) for part in module.modules()})
        for part in self._parts:
            self._add_module(part)
        self._add(learner.loss_fn, 4)
        self._optimizers: list[tuple[Any, ...]] = []
        self._groups: list[dict[str, Any]] = []
        self._parameters: list[nn.Parameter] = []
        for slot in learner.updates.slots if phase.gradients else ():
            self._add_optimizer(slot.optimizer)
            self._parameters += slot.parameters
        # once all objects are found, what stands in them
        self._kinds = [*map(type, self._parts)]
        self._hooks = [hooks for part in self._parts for hooks in map(vars(part).get, HOOKS) if hooks is not None]
        self._held = [value for own in self._holders for value in own.values() if isinstance(value, (nn.Module, Phase))]
        self._slot_parameters = [slot.parameters for slot in learner.updates.slots]
        self._lengths = [*map(len, self._dicts)]
        self._names = [*chain.from_iterable(self._dicts)]
        self._values = [*chain.from_iterable(map(dict.values, self._dicts))]
        self._list_lengths = [*map(len, self._lists)]
        self._items = [*chain.from_iterable(self._lists)]
        self._params = [*map(itemgetter("params"), self._groups)]
        self._parts_of_partials = [*chain.from_iterable(map(PARTS_OF_A_PARTIAL, self._partials))]
        self._forms = [*map(FORM, self._tensors)]
        self._strides = [*map(Tensor.stride, self._tensors)]
        if any(map(len, self._hooks)) or any(map(bool, map(HOOKS_OF_A_PARAMETER[0], self._parameters))):
            raise NotPlainError  # hooks are refused when the step is traced; until then all is described

    def _add_module(self, part: nn.Module) -> None:
        """Remember what a module holds; parts that joined it since are seen in ``_modules``."""
        own = vars(part)
        self._dicts += [own, part._parameters, part._buffers, part._modules]
        for name, value in own.items():
            if name not in MODULE_INTERNALS:
                self._add(value, 4)
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            self._add(tensor, 4)
        self._tensors += [
            value
            for value in (*own.values(), *part._parameters.values(), *part._buffers.values())
            if isinstance(value, Tensor)
        ]
        if any(map(is_lazy, part._parameters.values())) or any(map(is_lazy, part._buffers.values())):
            raise NotPlainError

    def _add_optimizer(self, optimizer: Any) -> None:
        """Remember the groups and the state of an optimizer."""
        if not isinstance(optimizer.state, dict):
            raise NotPlainError
        groups, state = optimizer.param_groups, optimizer.state
        self._optimizers.append((optimizer, groups, state, vars(optimizer).get("step")))
        self._groups += groups
        self._lists += [groups, *(group["params"] for group in groups)]
        self._dicts.append(state)
        for entries in state.values():
            if not isinstance(entries, dict):
                raise NotPlainError
            self._dicts.append(entries)
            self._tensors += [value for value in entries.values() if isinstance(value, Tensor)]

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

    def shows_no_change(self, phase: Phase) -> bool:
        """Return whether everything is where it was.

        One function without helpers, and loops in C: it runs at every step of a loop of the user's own.
        """
        learner = self._learner
        if (
            phase is not self._phase
            or phase.gradients is not self._gradients
            or phase.model_view
            or learner.models is not self._models
            or learner.loss_fn is not self._loss_fn
            or learner.updates.slots is not self._slots
        ):
            return False
        values = [*chain.from_iterable(map(dict.values, self._dicts))]
        items = [*chain.from_iterable(self._lists)]
        if [*map(len, self._dicts)] != self._lengths or [*map(len, self._lists)] != self._list_lengths:
            return False
        if not (
            all(map(is_, values, self._values))
            and all(map(is_, items, self._items))
            and all(map(is_, chain.from_iterable(self._dicts), self._names))
            and all(map(is_, map(type, self._parts), self._kinds))
            and all(map(is_, map(itemgetter("params"), self._groups), self._params))
            and all(map(is_, chain.from_iterable(map(PARTS_OF_A_PARTIAL, self._partials)), self._parts_of_partials))
        ):
            return False
        if [*map(FORM, self._tensors)] != self._forms or [*map(Tensor.stride, self._tensors)] != self._strides:
            return False
        if any(map(len, self._hooks)) or any(map(len, itemgetter(*GLOBAL_HOOKS)(vars(nn.modules.module)))):
            return False
        for hooks in HOOKS_OF_A_PARAMETER:
            if any(map(hooks, self._parameters)):
                return False
        for slot, parameters in zip(self._slots, self._slot_parameters, strict=True):
            if len(slot.parameters) != len(parameters) or not all(map(is_, slot.parameters, parameters)):
                return False
        for optimizer, groups, state, step in self._optimizers:
            if optimizer.param_groups is not groups or optimizer.state is not state:
                return False
            if vars(optimizer).get("step") is not step:
                return False
            for name in STEP_HOOKS:
                if getattr(optimizer, name, None):
                    return False
        number = 0
        for own in self._holders:
            for value in own.values():
                if isinstance(value, (nn.Module, Phase)):
                    if number == len(self._held) or self._held[number] is not value:
                        return False
                    number += 1
        if number != len(self._held):
            return False
        return not self._described or all(seen(value, depth) == before for value, depth, before in self._described)


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
