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
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from fluxloop.callback import Callback
from fluxloop.compile.tracing import (
    HOOKS,
    MODULE_INTERNALS,
    Look,
    Traced,
    describe,
    first_line,
    has_hooks,
    holders_of,
    require_torch,
)
from fluxloop.compute.finite import bad_gradients
from fluxloop.compute.fused import count_changes
from fluxloop.errors import CompileError, warn_user
from fluxloop.events import Event, StepBegin, StepEnd, UpdateEnd
from fluxloop.nested import map_tensors, tensors
from fluxloop.order.explain import fired_with
from fluxloop.order.runner import Bound, deliver
from fluxloop.persist.plain import attributes
from fluxloop.persist.seen import Same, seen
from fluxloop.phase import Phase
from fluxloop.randomness import generator_states, preserved, put_generators
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner
    from fluxloop.loop import Handle, Scope

Compiled = Callable[..., Any]

WAYS_OUT = (
    "Have steps of this phase run as they are, compiled = False in its class, or have torch compile the model alone, "
    'Accelerator(compile="model")'
)

MANY = 8
"""After so many graphs of one phase it is said that each takes its time to compile."""


def lower(graph: GraphModule, inputs: list[Any], device: torch.device) -> Compiled:
    """Compile a graph of tensor operations into a function of the same inputs.

    On the CPU with inductor's wrapper in C++, which calls its kernels without Python in between.
    """
    import torch._inductor

    is_complex = any(tensor.is_complex() for tensor in inputs)  # the wrapper in C++ knows no such operations
    options = {"cpp_wrapper": True} if device.type == "cpu" and not is_complex else {}
    with torch.no_grad(), warnings.catch_warnings():
        for torchs_own in (DeprecationWarning, FutureWarning):  # about how torch uses torch
            warnings.simplefilter("ignore", torchs_own)
        compiled: Compiled = torch._inductor.compile(graph, inputs, options)
    inner: Compiled = getattr(compiled, "_torchdynamo_orig_callable", compiled)  # without a wrapper for torch.compile
    return inner


def require(learner: RunLearner, phases: Iterable[type[Phase]]) -> None:
    """Raise for phases whose steps cannot be one graph.

    Raises:
        CompileError: Names who stands in the way: a callback, its event and path; the phase's own step; or an
            accelerator that computes gradients or updates in ways of its own.
    """
    kind = type(learner.accelerator)
    if any(not method.__module__.startswith("fluxloop.") for method in (kind.backward, kind.update)):
        raise CompileError(f"{kind.__name__} has a backward or update of its own; use it with compile=False")
    for phase in phases:
        obstacles = learner.callbacks.obstacles(phase) if phase.data_key and phase.compiled else []
        if obstacles:
            found = "\n".join(f"  {obstacle}" for obstacle in obstacles)
            raise CompileError(
                f'Accelerator(compile="step") makes one graph of a step of {phase.__name__}, and this stands in '
                f"the way:\n{found}\nHandle StepBegin or StepEnd instead, leave the callback out, or have steps "
                'run as they are: Accelerator(compile=False) or compile="model" for a learner, compiled = False '
                "in a phase's class"
            )


class CompiledSteps:
    """The compiled steps of a learner, by phase class: ``learner._compiled``.

    Args:
        learner: Whose steps they are.

    Raises:
        CompileError: This torch cannot trace steps.
    """

    def __init__(self, learner: RunLearner) -> None:
        require_torch()
        self._learner = learner
        self._plans: dict[type[Phase], Plan] = {}

    def require(self, phases: Iterable[type[Phase]]) -> None:
        """Raise for phases whose steps cannot be one graph; see `require`."""
        require(self._learner, phases)

    def run(self, phase: Phase, handle: Handle, state: StepState) -> None:
        """Do what a phase's body does, in one graph unless the phase says otherwise.

        Raises:
            CompileError: The step cannot be compiled.
        """
        learner = self._learner
        graph = None
        if phase.compiled and learner.updates.findings is None:
            if phase.gradients:
                learner.updates.drop_waiting(f"{phase.name} begins", phase.name)
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

    def __init__(self, learner: RunLearner) -> None:
        self._learner = learner
        self._graphs: dict[Any, list[Graph]] = {}
        self._epoch: Scope | None = None
        self._callbacks = -1
        self._is_watched = False
        self._inside: list[Callback] = []
        self._rests_on: dict[str, Any] = {}
        self._states: dict[str, Any] = {}
        self._count = 0
        self._last_key: Any = None
        self._why = ""

    def graph(self, phase: Phase, state: StepState) -> Graph | None:
        """Give the graph for a step, compiled now if there is none; None where this step has to run as it is.

        Raises:
            CompileError: The step cannot be compiled.
        """
        learner = self._learner
        if learner.callbacks.version != self._callbacks:
            require(learner, [type(phase)])
            self._callbacks = learner.callbacks.version
            self._is_watched = changes_between_steps(learner, type(phase))
            self._inside = inside(learner, type(phase))
        epoch = None if learner.scope is None else learner.scope.parent
        # nobody's code runs between the steps then
        ours = learner._running.phase is phase and type(phase).epoch is Phase.epoch
        if self._is_watched or not ours or epoch is not self._epoch:
            self._compare(phase)
            self._epoch = epoch
        key = (*map(Same, self._inside), *shape(state, learner.accelerator.device))
        if phase.gradients:
            for number, slot in enumerate(learner.updates.slots):
                if slot.first_step is not None:
                    key = (*key, (number, slot.in_block, *map(describe_gradient, slot.parameters)))
        for graph in self._graphs.get(key, ()):
            if graph.misfit(phase) is None:
                return graph
        made = self._make(key, phase, state)
        if made is None:
            self._epoch = None  # what this step makes is looked at before the next
        return made

    def _compare(self, phase: Phase) -> None:
        """Drop the graphs where something that they rest on has changed."""
        before, now = self._rests_on, rests_on(self._learner, phase)
        states = states_of(self._learner) if phase.gradients else {}
        changed = [] if now == before else [n for n in {**before, **now} if before.get(n) != now.get(n)]
        # a state that was not there yet changes nothing: no graph steps its parameter, or the optimizer keeps none
        changed += [name for name, state in self._states.items() if states.get(name) != state]
        if changed:
            self._why = ", ".join(changed[:3]) if before else ""
            self._graphs.clear()
        self._rests_on, self._states = now, states
        for alike in self._graphs.values():
            alike[:] = [graph for graph in alike if graph.calls_the_same(phase)]

    def _make(self, key: Any, phase: Phase, state: StepState) -> Graph | None:
        learner = self._learner
        modules = modules_of(learner, phase)
        if phase.gradients:
            lazy = any(is_lazy(parameter) for module in modules for parameter in module.parameters())
            if lazy or learner.streams[phase.step_stream].index == 1:
                return None  # the first step makes what the others find: optimizers' states, a phase's queue
        alike = self._graphs.setdefault(key, [])
        self._why = next((why for graph in alike if (why := graph.misfit(phase))), self._why)
        if not self._why and self._last_key is not None:
            self._why = ", ".join(f"the entry {name!r}" for name in differing(self._last_key, key))
        with preserved():
            traced = Traced(learner, phase, modules, self._inside, state)
            if traced.makes_state:  # an optimizer's, of parameters that were frozen, or wait for their first update
                return None
            graph = Graph(learner, phase, self._inside, traced)
        self._last_key = key
        alike.append(graph)
        del alike[:-MANY]  # numbers that change at every step do not fill the memory
        self._count += 1
        if self._count == MANY:
            warn_user(
                f"the step of {type(phase).__name__} has been compiled {MANY} times, which takes seconds each, the "
                f"last time for {self._why or 'another batch'}; expected batches of few shapes (drop_last=True, "
                "padding), and numbers and texts that stay, or compile=False"
            )
        self._why = ""
        return graph


class Graph:
    """One compiled step: for one shape of batch, and one state of what it rests on.

    Args:
        learner: Whose step it is.
        phase: The phase it was made of.
        callbacks: Those with handlers that are part of it.
        traced: What was made of the phase's body.

    Raises:
        CompileError: It cannot be compiled.
    """

    def __init__(self, learner: RunLearner, phase: Phase, callbacks: list[Callback], traced: Traced) -> None:
        self._learner = learner
        self._whose = repr(phase)
        self._inside = callbacks
        self._fixed = traced.fixed
        self._constants = traced.constants
        self._options = [(group, name, option, Last(group[name])) for group, name, option in traced.options]
        self._held = traced.held
        self._shapes = [describe(getattr(traced.holders[number], name)) for number, name in traced.held]
        self._reads = [(n, name, value, seen(value)) for (n, name), value in traced.reads.items()]
        self._slots = learner.updates.slots if phase.gradients else ()
        self._groups = [(s, n, group) for s in self._slots for n, group in enumerate(s.optimizer.param_groups)]
        inputs = {(id(group), name) for group, name, _ in traced.options}
        self._names = [[n for n in g if n != "params" and (id(g), n) not in inputs] for *_, g in self._groups]
        self._values = [
            self._options_of(group, names) for (*_, group), names in zip(self._groups, self._names, strict=True)
        ]
        self._stored = list(traced.stored.items())
        self._removed = traced.removed
        self._waiting, self._left = traced.waiting, traced.left
        self._consumed = traced.consumed
        self._looks = traced.looks
        self._events = traced.fired
        ends = [event.name for event in traced.fired if isinstance(event, UpdateEnd)]
        self._num_updates = len(ends)
        self._updated = [p for slot in self._slots if slot.name in ends for p in slot.parameters if p.requires_grad]
        self._callbacks = -1
        self._after: list[tuple[tuple[Bound, ...], Event]] = []
        try:
            self._compiled = lower(traced.graph, traced.example, learner.accelerator.device)
        except Exception as error:
            raise CompileError(
                f"the step of {phase!r} was traced, but could not be compiled: {first_line(error)}. Compiling needs a "
                "C++ compiler (g++ or clang++) on the CPU, Triton on CUDA; where there is one, an operation of the "
                f"step stands in the way. {WAYS_OUT}"
            ) from error
        if can_replay(traced.example):
            self._compiled = Replayed(self._compiled, len(traced.fixed), traced.changed)
        self._call: Compiled = self._call_first

    def calls_the_same(self, phase: Phase) -> bool:
        """Tell whether the functions and objects that a step calls, such as what makes views, are as they were."""
        holders = [*holders_of(phase), *self._inside]
        return all(
            seen(getattr(holders[number], name, None)) == as_seen
            for number, name, before, as_seen in self._reads
            if callable(before)
        )

    def misfit(self, phase: Phase) -> str | None:
        """Say what of a phase, or of the optimizers' options, is not as it was when the step was traced."""
        if self._reads or self._held:
            holders = [*holders_of(phase), *self._inside]
            for number, name, before, as_seen in self._reads:
                now = getattr(holders[number], name, None)
                if now is before and (type(now) in SCALARS or callable(now)):  # what is called: see calls_the_same
                    continue
                if seen(now) != as_seen:
                    return f"{type(holders[number]).__name__}.{name} = {now!r}, which was {before!r}"
            for (number, name), expected in zip(self._held, self._shapes, strict=True):
                tensor = getattr(holders[number], name, None)
                if not isinstance(tensor, Tensor) or describe(tensor) != expected:
                    return f"the shape of {type(holders[number]).__name__}.{name}"
        for (slot, number, group), names, values in zip(self._groups, self._names, self._values, strict=True):
            if slot.optimizer.param_groups[number] is not group:
                return f"the groups of {slot.label}"
            if self._options_of(group, names) != values:
                changed = [name for name, value in zip(names, values[1:], strict=True) if group.get(name) != value]
                return f"{slot.label}: {', '.join(f'{name} = {group.get(name)!r}' for name in changed)}"
        return None

    @staticmethod
    def _options_of(group: dict[str, Any], names: list[str]) -> list[Any]:
        """Give how many options a group has, and those that are part of the graph."""
        return [len(group), *map(group.get, names)]

    def run(self, phase: Phase, state: StepState) -> None:
        """Run the step: change what it changes, and store its entries."""
        learner, entries = self._learner, vars(state)
        moving: list[Any] = []
        for group, name, option, last in self._options:
            value = group[name]
            if isinstance(value, Tensor):
                option.copy_(value.reshape(()))
            elif value != last.value:
                last.value = value
                option.fill_(value)
            moving.append(option)
        if self._held:
            holders = [*holders_of(phase), *self._inside]
            moving += [getattr(holders[number], name) for number, name in self._held]
        for value in entries.values():
            if type(value) is Tensor:
                moving.append(value)
            else:
                moving.extend(tensors(value))
        moving += [parameter.grad for parameter in self._waiting]
        given = iter(self._call(*self._fixed, *moving, *self._constants))
        for slot in self._slots:
            if "step" in vars(slot.optimizer):  # wrapped by a scheduler of torch's, which notes that there was one
                slot.optimizer._opt_called = True  # where torch looks
        bad = next(given) if self._looks else None
        found = [next(given) for _ in self._looks]
        for name, value in self._stored:
            entries[name] = next(given) if isinstance(value, Tensor) else map_tensors(lambda _: next(given), value)
        for name in self._removed:
            del entries[name]
        if bad is not None and bad.is_cpu and bad.item():
            self._end_early(phase, found)
            self._stop(found, learner.where(), True)
        elif bad is not None and not bad.is_cpu:
            learner.host(bad, partial(self._stop, found, learner.where()))
        for left in self._left:
            left.put(state, phase.name, given)
        for slot in self._consumed:
            slot.consumed = True
        if self._updated:
            learner.updates.count += self._num_updates
            count_changes(self._updated)
        if self._callbacks != learner.callbacks.version:
            self._callbacks, self._after = learner.callbacks.version, listeners(learner, phase, self._events)
        for bound, event in self._after:
            deliver(bound, event, phase, learner)

    def _call_first(self, *inputs: Tensor) -> list[Tensor]:
        """Run the graph for the first time; where it cannot run, everything is put back as it was.

        For this one call what it is given is copied, on the host: a graph does not tell all that it changes.

        Raises:
            CompileError: An operation in it cannot be run as it was compiled.
        """
        before = [tensor.detach().to("cpu", copy=True) for tensor in inputs]
        generators = generator_states()
        try:
            outputs = list(self._compiled(*inputs))
        except Exception as error:
            with torch.no_grad():
                for tensor, old in zip(inputs, before, strict=True):
                    if not torch.equal(tensor, old.to(tensor.device)):  # what overlaps itself cannot be copied to
                        tensor.copy_(old)
            put_generators(generators)
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise  # the graph can run, and callers know what this is
            raise CompileError(
                f"the step of {self._whose} was compiled, but cannot be run: {first_line(error)}. Nothing was changed. "
                f"{WAYS_OUT}"
            ) from error
        self._call = self._compiled
        return outputs

    def _stop(self, found: list[Tensor], where: str, bad: float) -> None:
        """End the fit if a step has found something not to be finite.

        Raises:
            CancelFittingException: Says what became what, and where.
        """
        if not bad:
            return
        look, numbers = self._first_bad(found)
        if not look.names:
            what = f"{look.what} became {numbers[0]}"
        else:
            slot = self._learner.updates.find(look.what)
            named = [name for name, number in zip(look.names, numbers, strict=False) if not isfinite(number)]
            what = bad_gradients(slot, named)
        self._learner.finite.stop(what, where)

    def _first_bad(self, found: list[Tensor]) -> tuple[Look, list[float]]:
        looks = zip(self._looks, found, strict=True)
        return next((look, numbers.tolist()) for look, numbers in looks if not numbers.isfinite().all())

    def _end_early(self, phase: Phase, found: list[Tensor]) -> None:
        """Have a step that ends at what it found be the step up to there: updates before it have been made."""
        events = self._events[: self._first_bad(found)[0].num_events]
        for slot in self._slots:
            if slot.end in events:
                slot.end_gradients()
        for bound, event in listeners(self._learner, phase, events):
            deliver(bound, event, phase, self._learner)


SCALARS = frozenset((type(None), bool, int, float, str))


class Last:
    """The number that a tensor was last filled with."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def can_replay(inputs: list[Any]) -> bool:
    """Tell whether a step can be replayed as a CUDA graph: what it does on the host would happen once."""
    return all(tensor.is_cuda for tensor in inputs)


class Replayed:
    """A compiled step on a GPU, replayed as a CUDA graph: one launch for all kernels.

    Parameters, buffers and optimizers' states are at fixed places; what else a step is given is
    copied to where the graph expects it. The first calls run as they are.

    Args:
        compiled: The step.
        num_fixed: How many of its inputs, the first ones, are at fixed places.
        changed: Which of the others it changes in place, by number.
    """

    WARM_UP = 3

    def __init__(self, compiled: Compiled, num_fixed: int, changed: Iterable[int]) -> None:
        self._compiled = compiled
        self._num_fixed = num_fixed
        self._changed = [num_fixed + number for number in changed]
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._graph: Any = None

    @torch.no_grad()
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
        for number in self._changed:
            inputs[number].copy_(self._inputs[number], non_blocking=True)
        return [output.clone() for output in self._outputs]


# What a graph rests on


def shape(state: StepState, device: torch.device) -> Any:
    """Describe the entries of a step and what autocast does, so that steps of equal descriptions share a graph.

    Raises:
        CompileError: An entry holds what no graph can take.
    """
    entries = vars(state)
    found: list[Any] = []
    for name, value in entries.items():
        if type(value) is Tensor:  # as `describe` does, without a call
            found.append((name, value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
        else:
            found.append((name, describe(value, f"the entry {name!r}")))
    if len({*map(id, entries.values())}) < len(entries):
        values = list(entries.values())
        found.append(tuple([i for i, value in enumerate(values) if any(other is value for other in values[:i])]))
    if torch.is_autocast_enabled(device.type):
        found.append(torch.get_autocast_dtype(device.type))
    return tuple(found)


def describe_gradient(parameter: nn.Parameter) -> Any:
    """Describe the gradient of a parameter: whether there is one, and how it lies in memory."""
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided:
        return gradient is None
    return gradient.shape, gradient.stride(), gradient.dtype


def differing(before: tuple[Any, ...], now: tuple[Any, ...]) -> list[str]:
    """Name the entries whose descriptions differ."""
    old = {part[0]: part for part in before if isinstance(part, tuple) and part and isinstance(part[0], str)}
    new = {part[0]: part for part in now if isinstance(part, tuple) and part and isinstance(part[0], str)}
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def modules_of(learner: RunLearner, phase: Phase) -> list[nn.Module]:
    """List the models, the loss function where it is a module, a phase's own, and the view of weights that it runs."""
    views = learner.weights.copies(phase.model_view).values() if phase.model_view else ()
    own = [value for holder in holders_of(phase) for value in attributes(holder).values()]
    return [*learner.modules(), *views, *(value for value in own if isinstance(value, nn.Module))]


def rests_on(learner: RunLearner, phase: Phase) -> dict[str, Any]:
    """Describe what Python sees of models, loss function and optimizers while a step is traced, by name."""
    found: dict[str, Any] = {}
    for number, module in enumerate(modules_of(learner, phase)):
        for path, part in module.named_modules():
            name = f"{number}.{path}".rstrip(".")
            found[f"the module {name}"] = Same(part), type(part)
            for attribute, value in vars(part).items():
                if attribute not in MODULE_INTERNALS:
                    found[f"{name}.{attribute}"] = as_tensor_or_seen(value)
            for attribute, tensor in (*part._parameters.items(), *part._buffers.items()):
                found[f"{name}.{attribute}"] = as_tensor_or_seen(tensor)
            found[f"the hooks of {name}"] = [len(getattr(part, hooks)) for hooks in HOOKS]
    found["hooks of all modules"] = [len(getattr(nn.modules.module, f"_global{hooks}", ())) for hooks in HOOKS]
    found["loss_fn"] = Same(learner.loss_fn), seen(learner.loss_fn)
    for slot in learner.updates.slots if phase.gradients else ():
        found[f"the groups of {slot.label}"] = [
            (Same(group), [Same(parameter) for parameter in group["params"]]) for group in slot.optimizer.param_groups
        ]
        found[f"the step and hooks of {slot.label}"] = (
            has_hooks(slot.optimizer),
            Same(vars(slot.optimizer).get("step")),
            *map(has_hooks, slot.parameters),
        )
    return found


def states_of(learner: RunLearner) -> dict[str, Any]:
    """Describe the tensors that optimizers keep for parameters, those that have some."""
    found: dict[str, Any] = {}
    for slot in learner.updates.slots:
        for index, parameter in enumerate(slot.parameters):
            entries = slot.optimizer.state.get(parameter, {})
            kept = [(name, as_tensor_or_seen(value)) for name, value in entries.items() if isinstance(value, Tensor)]
            if kept:
                found[f"{slot.label}, state {index}"] = kept
    return found


def as_tensor_or_seen(value: Any) -> Any:
    """Describe a tensor by which it is and how it lies in memory, anything else by what Python sees of it."""
    if not isinstance(value, Tensor) or is_lazy(value):
        return seen(value)
    return Same(value), describe(value)


def changes_between_steps(learner: RunLearner, phase: type[Phase]) -> bool:
    """Tell whether somebody may change between two steps what a graph rests on: modes, attributes, hooks.

    That is a user's own `finish`, and callbacks that write to models or loss function, or read them when a step begins.
    """
    if not phase.finish.__module__.startswith("fluxloop."):
        return True
    roots = {"model", "params", "loss_fn", "weights"}
    for node in learner.callbacks.graph.nodes:
        if node.callback.in_compiled_step == "watched":
            return True
        if node.callback.in_compiled_step is not None:
            continue
        begins, ends = (node.callback.handler(event, phase) is not None for event in (StepBegin, StepEnd))
        writes = not node.is_safe or any(path[0] in roots for path in node.access.writes)
        reads = any(not path or path[0] in roots for path in node.access.reads)  # and may register hooks
        if (begins and (reads or writes)) or (ends and writes):
            return True
    return False


def inside(learner: RunLearner, phase: type[Phase]) -> list[Callback]:
    """List the callbacks that have handlers that are part of a phase's graphs."""
    events = [event for event in fired_with(phase) if event.inside_step]
    return [
        node.callback
        for node in learner.callbacks.graph.nodes
        if node.callback.in_compiled_step == "inside" and any(node.callback.handler(e, phase) for e in events)
    ]


def listeners(learner: RunLearner, phase: Phase, events: list[Event]) -> list[tuple[tuple[Bound, ...], Event]]:
    """Give who takes note of the events of a step once its graph has run, with the events, in order."""
    noting = {node.id for node in learner.callbacks.graph.nodes if node.callback.in_compiled_step == "after"}
    table = learner.callbacks.table(type(phase))
    found = [(tuple(bound for bound in table[type(event)] if bound[2] in noting), event) for event in events]
    return [(bound, event) for bound, event in found if bound]
