"""Run a phase's body on stand-ins for its tensors, and note what it does to them: one graph for a step.

``make_fx`` runs the body on fake tensors (shapes without numbers) and records every operation on
them, those of autograd and of the optimizer too. The graph that comes of it takes parameters,
buffers, the optimizer's state, learning rates and the batch, changes what a step changes in place,
and gives the entries that the body stored.
"""

from __future__ import annotations

import os
import random
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from fluxloop.errors import CompileError, annotate
from fluxloop.events import Event
from fluxloop.nested import map_tensors, tensors
from fluxloop.persist import look
from fluxloop.phase import Phase
from fluxloop.state import StepState
from fluxloop.updates import UpdateBlock, Updates
from fluxloop.view import make_view

if TYPE_CHECKING:
    from fluxloop.learner import Learner

MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"} | {"_flat_weights", "_flat_weight_refs"}
"""Attributes of modules that are no numbers of the user's: what torch keeps there, a recurrent layer's lists too."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StandIn:
    """What a body, and handlers that are part of the graph, get as learner while a step is traced.

    It has what a step may use: models, the loss function, backward, update and update blocks,
    on stand-ins for the parameters.

    Args:
        learner: For whom it stands.
        phase: The running phase.
        state: The step's entries, stand-ins too.
        leaves: The stand-in of each parameter.
        optimizers: Twins of the optimizers, over stand-ins, by name.
    """

    PASSED_ON = ("model", "models", "loss_fn", "seed", "optimizer_names", "scope", "weights", "data")

    def __init__(
        self,
        learner: Learner,
        phase: Phase,
        state: StepState,
        leaves: dict[nn.Parameter, Tensor],
        optimizers: dict[str | None, Optimizer],
    ) -> None:
        self._learner = learner
        self._phase = phase
        self.step = state
        self.optimizer = optimizers[None] if tuple(optimizers) == (None,) else optimizers
        self.accelerator = AcceleratorStandIn(learner.accelerator.device)
        names: Any = {leaves[parameter]: name for parameter, name in learner.updates.names.items()}
        self.updates = Updates(self, names, optimizers)  # type: ignore[arg-type]  # it stands for one
        self.backward, self.update = self.updates.backward, self.updates.update
        self.skip_update = self.accelerator.skip_update
        self.fired: list[Event] = []
        """Events, in order."""

    def __getattr__(self, name: str) -> Any:
        if name in StandIn.PASSED_ON:
            return getattr(self._learner, name)
        raise CompileError(
            f"the step of {self._phase!r} uses learner.{name}, which a step that is compiled whole cannot; it may use "
            f"model, loss_fn, backward, update and optimizing. Do it in the phase's finish(learner, state)"
        )

    def fire(self, event: Event) -> None:
        """Call the handlers that are part of the graph; note the event for the others."""
        self.fired.append(event)
        for node in self._learner.callbacks.graph.nodes:
            handler = node.callback.handler(type(event), type(self._phase))
            if handler is not None and node.callback.in_compiled_step == "inside":
                try:
                    handler(event, self._phase, make_view(node.access, self))  # type: ignore[arg-type]  # as above
                except Exception as error:
                    annotate(error, f"fluxloop: raised by {node.id} at {type(event).__name__}, while it was traced")
                    raise

    def optimizing(self, name: str | int | None = None, *, retain_graph: bool = False) -> UpdateBlock:
        """Open the block in which one optimizer's parameters may change."""
        return UpdateBlock(self, self.updates.find(name), retain_graph)  # type: ignore[arg-type]  # as above


class AcceleratorStandIn:
    """What computes gradients and steps optimizers while a step is traced.

    Args:
        device: Where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._skip: Tensor | None = None

    def backward(self, loss: Tensor, own: Any, *, alone: bool = False, retain_graph: bool = False) -> None:
        """Compute the gradients of a loss, as `Accelerator.backward` does."""
        torch.autograd.backward(loss, retain_graph=retain_graph, inputs=None if alone else own)

    def skip_update(self, when: Tensor) -> None:
        """Have parameters and optimizers' states stay as they are from here on where `when` is true."""
        self._skip = when if self._skip is None else self._skip | when

    def update(self, optimizer: Optimizer) -> None:
        """Step an optimizer."""
        changed = [leaf for group in optimizer.param_groups for leaf in group["params"] if leaf.grad is not None]
        changed += [value for leaf in changed for value in optimizer.state[leaf].values() if isinstance(value, Tensor)]
        before = [] if self._skip is None else [tensor.detach().clone() for tensor in changed]
        with torch.no_grad():
            decay_weights(optimizer)
            optimizer.step()
            for tensor, old in zip(changed, before, strict=False):
                tensor.copy_(torch.where(self._skip, old, tensor))  # type: ignore[arg-type]  # there if `before` is


class Traced:
    """A step as a graph, and where its inputs come from.

    Attributes:
        graph: Of the tensors in `fixed`, those of `options`, the tensors of the phases in `of_phases`, those in the
            step's entries, and `constants`, in this order.
        fixed: Parameters, buffers and the optimizers' state.
        options: Of the optimizers, those that may change from step to step: the group, the name, and a tensor of it.
        holders: The phase, and phases that it holds.
        of_phases: Tensors that those hold, as (number of the holder, attribute).
        reads: What the body read of them otherwise, as (number of the holder, attribute) and value.
        constants: Tensors from elsewhere, such as those that a loss function holds.
        stored: The entries that the body stored, each with stand-ins for its tensors.
        fired: The events that it fired.
        makes_state: Whether an optimizer makes its state in this step, so that it has to run as it is.

    Raises:
        CompileError: The step is no function of tensors.
    """

    def __init__(self, learner: Learner, phase: Phase, modules: list[nn.Module], state: StepState) -> None:
        self._learner, self._phase = learner, phase
        self._parts = [part for module in modules for part in module.modules()]
        self._slots = learner.updates.slots if phase.gradients else ()
        self.fixed = unique(
            [
                *(tensor for part in self._parts for tensor in (*part._parameters.values(), *part._buffers.values())),
                *(parameter for slot in self._slots for parameter in slot.parameters),
                *(v for slot in self._slots for p in slot.parameters for v in slot.optimizer.state.get(p, {}).values()),
            ]
        )
        self.options = [
            (group, name, as_tensor(group, name))
            for slot in self._slots
            for group in slot.optimizer.param_groups
            for name in ("lr", DECAY)
            if is_input(slot.optimizer, group, name)
        ]
        self.holders = holders_of(phase)
        self.of_phases = [
            (number, name)
            for number, holder in enumerate(self.holders)
            for name, value in vars(holder).items()
            if isinstance(value, Tensor)
        ]
        self.reads: dict[tuple[int, str], Any] = {}
        self.stored: dict[str, Any] = {}
        self.fired: list[Event] = []
        self.makes_state = False
        self._entries = dict(vars(state))
        self._check_hooks()
        given = [tensor for value in self._entries.values() for tensor in tensors(value)]
        held = [vars(self.holders[number])[name] for number, name in self.of_phases]
        self.example: list[Any] = [*self.fixed, *(option for _, _, option in self.options), *held, *given]
        self.graph = self._trace()
        self.constants = lift_constants(self.graph)
        self.example += self.constants

    def _check_hooks(self) -> None:
        hooked = [type(part).__name__ for part in self._parts if any(getattr(part, hooks) for hooks in HOOKS)]
        hooked += [n for p, n in self._learner.updates.names.items() if p._backward_hooks or getattr(p, POST, None)]
        if hooked:
            raise self._refusal(
                f"there are hooks on {', '.join(dict.fromkeys(hooked))}, and nobody can look into a graph while it "
                "runs; remove the hooks, or the callback that registers them"
            )
        for slot in self._slots:
            if any(getattr(slot.optimizer, f"_optimizer_step_{kind}_hooks", None) for kind in ("pre", "post")):
                raise self._refusal(f"{slot.label} has step hooks; remove them")

    def _refusal(self, why: str) -> CompileError:
        return CompileError(f"the step of {self._phase!r} cannot be one graph: {why}")

    # Tracing

    def _trace(self) -> GraphModule:
        from torch.fx.experimental.proxy_tensor import make_fx

        generators = drawn_from()
        with ExitStack() as undone:
            undone.enter_context(compiling())
            undone.enter_context(self._unchanged())
            undone.enter_context(torch.set_grad_enabled(self._phase.gradients))
            try:
                graph = make_fx(self._run, tracing_mode="fake", _allow_non_fake_inputs=True)(*self.example)
            except CompileError:
                raise
            except Exception as error:
                why = f"{first_line(error)}{where(error)}. A graph holds tensors alone{hint(error)}"
                raise self._refusal(why) from error
        if drawn_from() != generators:
            raise self._refusal(
                "it draws from Python's or NumPy's random numbers, which would be the same ones at every step; draw "
                "from torch, or before the step: in the data or at StepBegin"
            )
        return graph

    def _run(self, *flat: Any) -> list[Tensor]:
        """Run the body on stand-ins for all inputs; give the tensors that it stored."""
        inputs = iter(flat)
        stand_ins = {id(tensor): next(inputs) for tensor in self.fixed}
        options = {(id(group), name): next(inputs) for group, name, _ in self.options}
        for number, name in self.of_phases:
            object.__setattr__(self.holders[number], name, next(inputs))
        leaves: dict[Any, Tensor] = {}
        for part in self._parts:
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    leaf = leaves.get(parameter)
                    if leaf is None:
                        leaf = leaves[parameter] = stand_ins[id(parameter)].detach()
                        leaf.requires_grad_(parameter.requires_grad and self._phase.gradients)
                    part._parameters[name] = leaf  # type: ignore[assignment]  # as torch.func.functional_call does
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else stand_ins[id(buffer)]
        twins = {slot.name: twin_of(slot.optimizer, leaves, stand_ins, options) for slot in self._slots}
        entries = {name: map_tensors(lambda _: next(inputs), value) for name, value in self._entries.items()}
        state = StepState(dict(entries))
        learner = StandIn(self._learner, self._phase, state, leaves, twins)
        with self._reading():
            self._phase.body(learner, learner.fire, state)  # type: ignore[arg-type]  # it stands for one
        self.fired = learner.fired
        self._put_buffers_back(stand_ins)
        for slot in self._slots:
            self._put_state_back(slot.optimizer, twins[slot.name], leaves, stand_ins)
        vars(state).pop("grads", None)
        given = {id(tensor) for value in entries.values() for tensor in tensors(value)}
        for name, value in vars(state).items():
            if value is not entries.get(name) or any(id(tensor) not in given for tensor in tensors(value)):
                self.stored[name] = value
        return [tensor.detach() for value in self.stored.values() for tensor in tensors(value)]

    def _put_buffers_back(self, stand_ins: dict[int, Tensor]) -> None:
        """Have a buffer that the body replaced be changed in place."""
        for part, buffers in zip(self._parts, self._buffers, strict=True):
            for name, now in part._buffers.items():
                buffer = buffers.get(name)
                if buffer is None or now is None:
                    if buffer is not now:
                        raise self._refusal(f"{type(part).__name__} makes the buffer {name!r} in its forward")
                elif now is not stand_ins[id(buffer)]:
                    stand_ins[id(buffer)].copy_(now.detach())

    def _put_state_back(self, optimizer: Optimizer, twin: Any, leaves: Any, stand_ins: dict[int, Tensor]) -> None:
        """Have an optimizer's state that its step replaced be changed in place; see whether it made some."""
        for parameter, leaf in leaves.items():
            before, now = optimizer.state.get(parameter, {}), twin.state.get(leaf, {})
            for name, value in now.items():
                old = before.get(name)
                if isinstance(value, Tensor) and isinstance(old, Tensor):
                    if value is not stand_ins[id(old)]:
                        stand_ins[id(old)].copy_(value)
                elif isinstance(value, Tensor) or (name not in before and value is not None):
                    self.makes_state = True
                elif value != old:
                    raise self._refusal(
                        f"{type(optimizer).__name__} counts {name!r} in Python; expected an optimizer that keeps "
                        "tensors, as torch's do"
                    )

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Put modules and phases back as they were, and raise for attributes that a step changes."""
        own_tensors = [{name for n, name in self.of_phases if n == number} for number in range(len(self.holders))]
        things: list[tuple[Any, Any]] = [(part, MODULE_INTERNALS) for part in self._parts]
        things += zip(self.holders, own_tensors, strict=True)
        self._buffers = [dict(part._buffers) for part in self._parts]
        parameters = [dict(part._parameters) for part in self._parts]
        attributes = [dict(vars(thing)) for thing, _ in things]
        looked = [looks(thing, left_out) for thing, left_out in things]
        changed: dict[str, None] = {}
        try:
            yield
            for (thing, left_out), before in zip(things, looked, strict=True):
                now = looks(thing, left_out)
                names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
                changed.update({f"{type(thing).__name__}.{name}": None for name in names})
        finally:
            for (thing, _), held in zip(things, attributes, strict=True):
                put_dict_back(vars(thing), held)
            for part, own_parameters, own_buffers in zip(self._parts, parameters, self._buffers, strict=True):
                put_dict_back(part._parameters, own_parameters)
                put_dict_back(part._buffers, own_buffers)
        if changed:
            raise self._refusal(
                f"it changes {', '.join(changed)}, which Python would do once and not at every step; keep numbers that "
                "change in buffers, give what is computed back, or change it in the phase's finish(learner, state)"
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Note which attributes of the phases are read."""
        numbers = {id(holder): number for number, holder in enumerate(self.holders)}
        kinds = {type(holder) for holder in self.holders}
        tensor_names = set(self.of_phases)

        def noting(kind: type[Phase]) -> Callable[[Any, str], Any]:
            get: Callable[[Any, str], Any] = kind.__getattribute__

            def read(holder: Any, name: str) -> Any:
                value = get(holder, name)
                number = numbers.get(id(holder))
                if number is not None and (number, name) not in tensor_names and name in get(holder, "__dict__"):
                    self.reads.setdefault((number, name), value)
                return value

            return read

        own = {kind: vars(kind).get("__getattribute__") for kind in kinds}
        for kind in kinds:
            setattr(kind, "__getattribute__", noting(kind))  # noqa: B010 - mypy knows no other way
        try:
            yield
        finally:
            for kind, function in own.items():
                if function is None:
                    delattr(kind, "__getattribute__")
                else:
                    setattr(kind, "__getattribute__", function)  # noqa: B010 - as above


POST = "_post_accumulate_grad_hooks"
LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


def unique(found: list[Any]) -> list[Tensor]:
    """Give the tensors among some things, each once."""
    return list({id(thing): thing for thing in found if isinstance(thing, Tensor)}.values())


def holders_of(phase: Phase) -> list[Phase]:
    """List a phase and the phases that it holds, as the validation twin of one does."""
    return [phase, *(value for value in vars(phase).values() if isinstance(value, Phase))]


def as_tensor(group: dict[str, Any], name: str) -> Tensor:
    """Give a number of a parameter group as a tensor on its parameters' device; one that is a tensor is itself."""
    if isinstance(group[name], Tensor):
        number: Tensor = group[name]
        return number
    parameter = group["params"][0]
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.tensor(group[name], dtype=dtype, device=parameter.device)


DECAY = "weight_decay"


def is_input(optimizer: Optimizer, group: dict[str, Any], name: str) -> bool:
    """Tell whether an option of a group is an input of the graph; others, and no decay at all, are part of it.

    What a graph computes has to follow from the numbers of the step alone: a resumed run makes it anew.
    """
    if name == DECAY and not type(optimizer).__module__.startswith("torch.optim."):
        return False  # nobody knows what it does with it
    value = group.get(name)
    return bool(group["params"]) and isinstance(value, (float, int, Tensor)) and (name == "lr" or bool(value))


def twin_of(
    optimizer: Optimizer, leaves: Any, stand_ins: dict[int, Tensor], options: dict[tuple[int, str], Tensor]
) -> Optimizer:
    """Give an optimizer of the same kind and options over stand-ins, whose step is operations on tensors alone."""
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer))
    how = {"foreach": True, "fused": False, "capturable": True}
    twin.param_groups = []
    for group in optimizer.param_groups:
        given = {name: options[id(group), name] for name in group if (id(group), name) in options}
        as_tensors = {name: value for name, value in how.items() if name in group}
        parameters = [leaves[parameter] for parameter in group["params"]]
        twin.param_groups.append({**group, **as_tensors, **given, "params": parameters})
    twin.state = defaultdict(dict)
    for parameter, entries in optimizer.state.items():
        twin.state[leaves[parameter]] = {name: stand_ins.get(id(value), value) for name, value in entries.items()}
    return twin


def decay_weights(optimizer: Optimizer) -> None:
    """Decay weights by a tensor, as torch's optimizers do by a number, and leave an optimizer none to decay by."""
    for group in optimizer.param_groups:
        weight = group.get(DECAY)
        if not isinstance(weight, Tensor):
            continue
        for leaf in group["params"]:
            if leaf.grad is not None and group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
                leaf.mul_(1 - group["lr"] * weight)
            elif leaf.grad is not None:
                leaf.grad = leaf.grad + leaf * (-weight if group.get("maximize") else weight)
        group[DECAY] = 0.0


def lift_constants(graph: GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into inputs; give them in order."""
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    found: dict[int, tuple[Tensor, Any]] = {}
    for node in list(graph.graph.nodes):
        tensor = getattr(graph, node.target, None) if node.op == "get_attr" else None
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in found:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(node.target)
            last.meta = dict(node.meta)
            found[id(tensor)] = (tensor, last)
        node.replace_all_uses_with(found[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [tensor for tensor, _ in found.values()]


@contextmanager
def compiling() -> Iterator[None]:
    """Have torch, its optimizers above all, know that operations are recorded.

    Raises:
        CompileError: This torch has no such flag.
    """
    if not hasattr(torch.compiler, "_is_compiling_flag"):
        raise CompileError(
            f'Accelerator(compile="step") cannot be used with torch {torch.__version__}; expected 2.4 or newer, or '
            'compile="model"'
        )
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def looks(thing: Any, leave: Any) -> dict[str, Any]:
    """Describe the attributes of an object, apart from some."""
    return {name: look(value) for name, value in vars(thing).items() if name not in leave}


def put_dict_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    """Have a dict hold what it held."""
    held.clear()
    held.update(before)


def drawn_from() -> tuple[Any, ...]:
    """Tell where Python's and NumPy's global generators stand."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else repr(numpy.random.get_state())


def first_line(error: Exception) -> str:
    """Give the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(". ")


def where(error: Exception) -> str:
    """Tell in which line of the user's code an error was raised; "" where in none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(LIBRARIES)]
    return f" (in {frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def hint(error: Exception) -> str:
    """Say what is meant by an error that torch's tracing raises."""
    asked = any(
        word in f"{type(error).__name__}{error}" for word in ("DataDependent", "data-dependent", "DynamicOutput")
    )
    if asked:
        return (
            ": ask for no number in the middle of a step (.item(), float(), if tensor: ..., boolean masks that choose "
            "rows); torch.where chooses without asking"
        )
    return ""
