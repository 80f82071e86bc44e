"""A whole step as one graph: forward, loss, backward and update, compiled for each shape of batch.

`Traced` makes a graph of what a phase's `body` does; TorchInductor compiles it into one function,
which is called instead of the body from then on. Nobody can look in between, so this is done only
where the callbacks' declarations say that nobody needs to.

A compiled step is a function of tensors. What Python saw while it was traced is part of it: models'
attributes and modes, frozen parameters and the optimizers' options are compared, and the step is
traced anew where they have changed; what a body reads of its phase is compared at every step. What
cannot be seen (global variables, what functions close over) is what it was.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from fluxloop.errors import CompileError, LossError, warn_user
from fluxloop.events import Event, StepBegin, StepEnd, event_types
from fluxloop.nested import map_tensors, tensors
from fluxloop.persist import attributes, look
from fluxloop.phase import Phase
from fluxloop.randomness import preserved
from fluxloop.runner import Bound, deliver
from fluxloop.state import StepState
from fluxloop.tracing import HOOKS, MODULE_INTERNALS, Traced, first_line, holders_of

if TYPE_CHECKING:
    from fluxloop.learner import Learner
    from fluxloop.loop import Handle, Scope
    from fluxloop.updates import Slot

Compiled = Callable[..., Any]

MANY = 8
"""After so many graphs of one phase it is said that each takes its time to compile."""


def lower(graph: GraphModule, inputs: list[Any], device: torch.device) -> Compiled:
    """Compile a graph of tensor operations into a function of the same inputs.

    On the CPU with inductor's wrapper in C++, which calls its kernels without Python in between.
    """
    import torch._inductor

    options = {"cpp_wrapper": True} if device.type == "cpu" else {}
    with torch.no_grad(), warnings.catch_warnings():
        for torchs_own in (DeprecationWarning, FutureWarning):  # about how torch uses torch
            warnings.simplefilter("ignore", torchs_own)
        compiled: Compiled = torch._inductor.compile(graph, inputs, options)
    return compiled


class CompiledSteps:
    """The compiled steps of a learner, by phase class: ``learner.compiled``.

    Args:
        learner: Whose steps they are.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._plans: dict[type[Phase], Plan] = {}

    def require(self, phases: Iterable[type[Phase]]) -> None:
        """Raise for phases whose steps cannot be one graph.

        Raises:
            CompileError: Names who stands in the way: a callback, its event and path; or the phase's own step.
        """
        for phase in phases:
            obstacles = self._learner.callbacks.obstacles(phase) if phase.data_key and phase.compiled else []
            if obstacles:
                found = "\n".join(f"  {obstacle}" for obstacle in obstacles)
                raise CompileError(
                    f'Accelerator(compile="step") makes one graph of a step of {phase.__name__}, and this stands in '
                    f"the way:\n{found}\nHandle StepBegin or StepEnd instead, leave the callback out, or have steps "
                    'run as they are: Accelerator(compile=False) or compile="model" for a learner, compiled = False '
                    "in a phase's class"
                )

    def run(self, phase: Phase, handle: Handle, state: StepState) -> None:
        """Do what a phase's body does, in one graph unless the phase says otherwise.

        Raises:
            CompileError: The step cannot be compiled.
        """
        learner = self._learner
        graph = None
        if phase.compiled and learner.updates.findings is None:
            plan = self._plans.get(type(phase))
            if plan is None:
                plan = self._plans[type(phase)] = Plan(learner)
            graph = plan.graph(phase, state)
        if graph is None:
            phase.body(learner, handle, state)
        else:
            graph.run(phase, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledSteps:
        """Give a copied learner none: graphs are bound to the tensors of the original."""
        return CompiledSteps(copy.deepcopy(self._learner, memo))


class Plan:
    """The graphs of one phase class, and what they rest on."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._graphs: dict[Any, list[Graph]] = {}
        self._epoch: Scope | None = None
        self._callbacks = -1
        self._is_watched = False
        self._inside: tuple[Same, ...] = ()
        self._rests_on: dict[str, Any] = {}
        self._count = 0
        self._why = ""

    def graph(self, phase: Phase, state: StepState) -> Graph | None:
        """Give the graph for a step, compiled now if there is none; None where this step has to run as it is.

        Raises:
            CompileError: The step cannot be compiled.
        """
        learner = self._learner
        if learner.callbacks.version != self._callbacks:
            CompiledSteps(learner).require([type(phase)])
            self._callbacks = learner.callbacks.version
            self._is_watched = changes_between_steps(learner, type(phase))
            self._inside = inside(learner, type(phase))
        epoch = None if learner.scope is None else learner.scope.parent
        if self._is_watched or epoch is None or epoch is not self._epoch:
            self._compare(phase)
            self._epoch = epoch
        key = (self._inside, shape(vars(state)))
        for graph in self._graphs.get(key, ()):
            if graph.misfit(phase) is None:
                return graph
        return self._make(key, phase, state)

    def _compare(self, phase: Phase) -> None:
        """Drop the graphs where something that they rest on has changed."""
        now = rests_on(self._learner, phase)
        if now != self._rests_on:
            changed = [name for name in {**self._rests_on, **now} if self._rests_on.get(name) != now.get(name)]
            self._why = ", ".join(changed[:3]) if self._rests_on else ""
            self._graphs.clear()
            self._rests_on = now

    def _make(self, key: Any, phase: Phase, state: StepState) -> Graph | None:
        learner = self._learner
        modules = modules_of(learner, phase)
        if phase.gradients:
            lazy = any(is_lazy(parameter) for module in modules for parameter in module.parameters())
            if lazy or learner.streams[phase.step_stream].index == 1:
                return None  # the first step makes what the others find: optimizers' states, a phase's queue
        alike = self._graphs.setdefault(key, [])
        self._why = next((why for graph in alike if (why := graph.misfit(phase))), self._why)
        with preserved():
            traced = Traced(learner, phase, modules, state)
            if traced.makes_state:  # an optimizer's, of parameters that were frozen
                return None
            graph = Graph(learner, phase, traced)
        alike.append(graph)
        del alike[:-MANY]  # numbers that change at every step do not fill the memory
        self._count += 1
        if self._count == MANY:
            warn_user(
                f"the step of {type(phase).__name__} has been compiled {MANY} times, which takes seconds each, the "
                f"last time for {self._why or 'a batch of another shape'}; expected batches of few shapes "
                "(drop_last=True, padding) and numbers that stay, or compile=False"
            )
        self._why = ""
        return graph


class Graph:
    """One compiled step: for one shape of batch, and one state of what it rests on.

    Args:
        learner: Whose step it is.
        phase: The phase it was made of.
        traced: What was made of it.

    Raises:
        CompileError: It cannot be compiled.
    """

    def __init__(self, learner: Learner, phase: Phase, traced: Traced) -> None:
        self._learner = learner
        self._fixed = traced.fixed
        self._constants = traced.constants
        self._options = [option for *_, option in traced.options]
        self._numbers = [
            (group, name, option, Last(group[name]))
            for group, name, option in traced.options
            if group[name] is not option
        ]
        self._of_phases = traced.of_phases
        self._shapes = [describe(vars(traced.holders[number])[name]) for number, name in traced.of_phases]
        self._reads = list(traced.reads.items())
        self._inputs = {
            id(group): {"params"} for slot in learner.updates.slots for group in slot.optimizer.param_groups
        }
        for group, name, _ in traced.options:
            self._inputs[id(group)].add(name)
        self._optimizers = [(slot, self._options_of(slot)) for slot in learner.updates.slots if phase.gradients]
        self._stored = list(traced.stored.items())
        self._events = traced.fired
        self._callbacks = -1
        self._after: list[tuple[tuple[Bound, ...], Event]] = []
        try:
            self._call = lower(traced.graph, traced.example, learner.accelerator.device)
        except Exception as error:
            raise CompileError(
                f"the step of {phase!r} was traced, but could not be compiled: {first_line(error)}. On the CPU this "
                "needs a C++ compiler (g++ or clang++), on CUDA Triton; or use compile=False"
            ) from error
        if all(tensor.is_cuda for tensor in traced.example):  # what happens on the host would happen once
            self._call = Replayed(self._call, len(traced.fixed))

    def misfit(self, phase: Phase) -> str | None:
        """Say what of a phase, or of the optimizers' options, is not as it was when the step was traced."""
        if self._reads or self._of_phases:
            holders = [vars(holder) for holder in holders_of(phase)]
            for (number, name), value in self._reads:
                now = holders[number].get(name)
                if now is not value and (type(now) is not type(value) or now != value):
                    return f"{type(phase).__name__}.{name} = {now!r}, which was {value!r}"
            for (number, name), expected in zip(self._of_phases, self._shapes, strict=True):
                if describe(holders[number].get(name)) != expected:
                    return f"the shape of {type(phase).__name__}.{name}"
        for slot, options in self._optimizers:
            for now, before in zip(self._options_of(slot), options, strict=True):
                if now != before:
                    changed = [f"{name} = {value!r}" for name, value in now.items() if value != before.get(name)]
                    return f"{slot.label}: {', '.join(changed)}"
        return None

    def _options_of(self, slot: Slot) -> list[dict[str, Any]]:
        """Give the options of an optimizer's groups that are part of the graph, and no inputs of it."""
        groups = slot.optimizer.param_groups
        return [{name: group[name] for name in group if name not in self._inputs[id(group)]} for group in groups]

    def run(self, phase: Phase, state: StepState) -> None:
        """Run the step: change what it changes, and store its entries.

        Raises:
            LossError: Gradients of another loss wait for an update.
        """
        learner, entries = self._learner, vars(state)
        for slot, _ in self._optimizers:
            if slot.window is not None:
                raise LossError(
                    f"gradients of another loss wait for an update of {slot.label}, and a compiled step has its own; "
                    "call learner.update() first"
                )
        for group, name, option, last in self._numbers:
            if group[name] != last.value:
                last.value = group[name]
                option.fill_(last.value)
        moving: list[Any] = list(self._options)
        if self._of_phases:
            holders = [vars(holder) for holder in holders_of(phase)]
            moving += [holders[number][name] for number, name in self._of_phases]
        for value in entries.values():
            if type(value) is Tensor:
                moving.append(value)
            else:
                moving.extend(tensors(value))
        given = iter(self._call(*self._fixed, *moving, *self._constants))
        for name, value in self._stored:
            entries[name] = next(given) if isinstance(value, Tensor) else map_tensors(lambda _: next(given), value)
        if self._callbacks != learner.callbacks.version:
            self._callbacks, self._after = learner.callbacks.version, listeners(learner, phase, self._events)
        for bound, event in self._after:
            deliver(bound, event, phase, learner)


class Last:
    """The number that a tensor holds now."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


class Replayed:
    """A compiled step on a GPU, replayed as a CUDA graph: one launch for all kernels.

    Parameters, buffers and optimizers' states are at fixed places; what else a step is given is
    copied to where the graph expects it. The first calls run as they are.

    Args:
        compiled: The step.
        num_fixed: How many of its inputs, the first ones, are at fixed places.
    """

    WARM_UP = 3

    def __init__(self, compiled: Compiled, num_fixed: int) -> None:
        self._compiled = compiled
        self._num_fixed = num_fixed
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._graph: Any = None

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run the step; its outputs are the caller's to keep."""
        self._calls += 1
        if self._calls <= self.WARM_UP:
            return list(self._compiled(*inputs))
        if self._graph is None:
            fixed, moving = inputs[: self._num_fixed], inputs[self._num_fixed :]
            self._inputs = [*fixed, *(given.clone() for given in moving)]
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and runs nothing
                self._outputs = list(self._compiled(*self._inputs))
        for place, given in zip(self._inputs[self._num_fixed :], inputs[self._num_fixed :], strict=True):
            place.copy_(given, non_blocking=True)
        self._graph.replay()
        return [output.clone() for output in self._outputs]


# What a graph rests on


def describe(value: Any) -> tuple[Any, ...]:
    """Describe a value by the shapes of the tensors in it, and by what everything else says."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    return repr(map_tensors(lambda _: NOTHING, value)), type(value), *map(describe, tensors(value))


NOTHING = torch.empty(0)


def shape(entries: dict[str, Any]) -> Any:
    """Describe the entries of a step, so that those of equal descriptions share a graph."""
    return tuple([(name, *describe(value)) for name, value in entries.items()])


def modules_of(learner: Learner, phase: Phase) -> list[nn.Module]:
    """List the models, the loss function where it is a module, and the view of the weights that a phase runs."""
    views = learner.weights.copies(phase.model_view).values() if phase.model_view else ()
    return [*learner.modules(), *views]


def rests_on(learner: Learner, phase: Phase) -> dict[str, Any]:
    """Describe what Python sees of models, loss function and optimizers while a step is traced, by name."""
    found: dict[str, Any] = {}
    for number, module in enumerate(modules_of(learner, phase)):
        for path, part in module.named_modules():
            name = f"{number}.{path}".rstrip(".")
            for attribute, value in vars(part).items():
                if attribute not in MODULE_INTERNALS:
                    found[f"{name}.{attribute}"] = as_seen(value)
            for attribute, parameter in part._parameters.items():
                found[f"{name}.{attribute}"] = Same(parameter), parameter is not None and parameter.requires_grad
            for attribute, buffer in part._buffers.items():
                found[f"{name}.{attribute}"] = Same(buffer)
            found[f"the hooks of {name}"] = [len(getattr(part, hooks)) for hooks in HOOKS]
    if not isinstance(learner.loss_fn, nn.Module):
        found |= {f"loss_fn.{name}": as_seen(value) for name, value in attributes(learner.loss_fn).items()}
    for slot in learner.updates.slots if phase.gradients else ():
        for index, parameter in enumerate(slot.parameters):
            entries = slot.optimizer.state.get(parameter, {})
            found[f"{slot.label}, state {index}"] = [
                (name, Same(value)) for name, value in entries.items() if isinstance(value, Tensor)
            ]
        found[f"the groups of {slot.label}"] = [Same(group) for group in slot.optimizer.param_groups]
    return found


def as_seen(value: Any) -> Any:
    """Describe an attribute: a number, a text or a container by what it says, anything else by which it is."""
    plain = value is None or isinstance(value, (bool, int, float, str, list, tuple, dict, set))
    return look(value) if plain else Same(value)


class Same:
    """Equal to another one of the same object; holds it, so that no other object takes its place."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def changes_between_steps(learner: Learner, phase: type[Phase]) -> bool:
    """Tell whether a callback may change between two steps what a graph rests on: modes, attributes, hooks."""
    roots = {"model", "params", "loss_fn", "weights"}
    for node in learner.callbacks.graph.nodes:
        if node.callback.in_compiled_step is not None:
            continue
        begins, ends = (node.callback.handler(event, phase) is not None for event in (StepBegin, StepEnd))
        writes = not node.is_safe or any(path[0] in roots for path in node.access.writes)
        reads = any(not path or path[0] in roots for path in node.access.reads)  # and may register hooks
        if (begins and (reads or writes)) or (ends and writes):
            return True
    return False


def inside(learner: Learner, phase: type[Phase]) -> tuple[Same, ...]:
    """Tell which callbacks have handlers that are part of a phase's graphs."""
    nodes = learner.callbacks.graph.nodes
    events = [event for event in event_types() if event.inside_step]
    return tuple(
        Same(node.callback)
        for node in nodes
        if node.callback.in_compiled_step == "inside" and any(node.callback.handler(e, phase) for e in events)
    )


def listeners(learner: Learner, phase: Phase, events: list[Event]) -> list[tuple[tuple[Bound, ...], Event]]:
    """Give who takes note of the events of a step once its graph has run, with the events, in order."""
    noting = {node.id for node in learner.callbacks.graph.nodes if node.callback.in_compiled_step == "after"}
    table = learner.callbacks.table(type(phase))
    found = [(tuple(bound for bound in table[type(event)] if bound[2] in noting), event) for event in events]
    return [(bound, event) for bound, event in found if bound]
