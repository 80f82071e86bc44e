"""Run a phase's body on stand-ins for its tensors, and note what it does to them: one graph for a step.

``make_fx`` runs the body on fake tensors (shapes without numbers) and records every operation on
them, those of autograd and of the optimizer too. The graph that comes of it takes parameters,
buffers, the optimizer's state, learning rates, the batch and gradients that wait for an update,
changes what a step changes in place, and gives the entries that the body stored, and gradients that
it leaves for a later step.
"""

from __future__ import annotations

import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch._dispatch.python
from attrs import define
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from fluxloop.callback import Callback
from fluxloop.compile.forbidden import AsTried, noting_containers, noting_draws
from fluxloop.compute.blocks import UpdateBlock
from fluxloop.compute.finite import norm_before_clipping, stored_losses
from fluxloop.compute.slots import Slot
from fluxloop.compute.updates import Updates
from fluxloop.data.generators import generators_of
from fluxloop.errors import PACKAGE, CancelSignal, CompileError, LossError, OptimizerError, PhaseError, annotate
from fluxloop.errors import describe as describe_briefly
from fluxloop.events import Event
from fluxloop.nested import init_fields, map_tensors, tensors
from fluxloop.order.view import make_view
from fluxloop.persist.plain import attributes
from fluxloop.persist.seen import seen
from fluxloop.phase import Phase
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

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

    PASSED_ON = ("model", "models", "loss_fn", "seed", "optimizer_names", "weights", "data")

    def __init__(
        self,
        learner: RunLearner,
        phase: Phase,
        state: StepState,
        leaves: dict[nn.Parameter, Tensor],
        optimizers: dict[str | None, Optimizer],
    ) -> None:
        self._learner = learner
        self._phase = phase
        self.step = state
        self.scope = SimpleNamespace(phase=phase, handle=self.fire)
        self.optimizer = optimizers[None] if tuple(optimizers) == (None,) else optimizers
        self.accelerator = AcceleratorStandIn(learner.accelerator.device)
        names: Any = {leaves[parameter]: name for parameter, name in learner.updates.names.items()}
        self.updates = Updates(self, names, optimizers)
        for slot in self.updates.slots:  # none in a phase without gradients
            theirs = learner.updates.find(slot.name)
            slot.consumed, slot.in_block = False, theirs.in_block
            slot.first_step, slot.phase = None if theirs.first_step is None else StepState(), phase.name
        self.backward = self.updates.backward
        self.skip_update = self.accelerator.skip_update
        self.fired: list[Event] = []
        """Events, in order."""
        self.finite = FiniteStandIn(self)

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
                    handler(event, self._phase, make_view(node.access, self))
                except Exception as error:
                    annotate(error, f"fluxloop: raised by {node.id} at {type(event).__name__}, while it was traced")
                    raise

    def update(self, name: str | int | None = None, *, closure: Callable[[], Any] | None = None) -> None:
        """Step one optimizer, the block's, or all.

        Raises:
            CompileError: An optimizer asks for gradients as often as it likes, which no graph can follow.
        """
        if closure is not None:
            raise CompileError(
                f"the step of {self._phase!r} calls learner.update(closure=...), whose optimizer decides how often "
                "gradients are computed, so that it cannot be one graph; say compiled = False in the phase's class"
            )
        self.updates.update(name)

    def optimizing(
        self, name: str | int | None = None, *, loss: str | None = None, retain_graph: bool = False
    ) -> UpdateBlock:
        """Open the block in which one optimizer's parameters may change."""
        return UpdateBlock(self, self.updates.find(name), retain_graph, loss)


class AcceleratorStandIn:
    """What computes gradients and steps optimizers while a step is traced.

    Args:
        device: Where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._skip: Tensor | None = None

    def backward(self, loss: Tensor, own: Any, *, alone: bool = False, retain_graph: bool = False) -> None:
        """Add the gradients of a loss, as `Accelerator.backward` does, in new tensors: old ones may be inputs."""
        before = {leaf: leaf.grad for leaf in own if leaf.grad is not None}
        for leaf in before:
            leaf.grad = None
        torch.autograd.backward(loss, retain_graph=retain_graph, inputs=None if alone else own)
        if any(leaf.grad is not None and leaf.grad.layout is not torch.strided for leaf in own):
            raise CompileError(
                "gradients are sparse, which a step that is compiled whole cannot compute; expected "
                "Embedding(sparse=False), or compiled = False in the phase's class"
            )
        for leaf, old in before.items():
            leaf.grad = old if leaf.grad is None else old + leaf.grad

    def left(self, before: Tensor | None, now: Tensor) -> Tensor:
        """Give a gradient that is left for a later step: what it was before, where updates are skipped."""
        if self._skip is None:
            return now
        return torch.where(self._skip, torch.zeros_like(now) if before is None else before, now)

    def skip_update(self, when: Tensor) -> None:
        """Have parameters, optimizers' states, and gradients left for later stay as they are from here on, if `when`.

        Gradients that waited for the update that is left out are dropped.
        """
        self._skip = when if self._skip is None else self._skip | when

    def restore(self, buffers: list[Tensor], copies: list[Tensor], versions: list[int]) -> None:
        """Put a module's buffers back where updates are skipped, if the step changes one of them."""
        if self._skip is not None and [buffer._version for buffer in buffers] != versions:
            for buffer, copied in zip(buffers, copies, strict=True):
                buffer.copy_(torch.where(self._skip, copied, buffer))

    def update(self, optimizer: Optimizer) -> None:
        """Step an optimizer."""
        changed = [leaf for group in optimizer.param_groups for leaf in group["params"] if leaf.grad is not None]
        changed += [value for leaf in changed for value in optimizer.state[leaf].values() if isinstance(value, Tensor)]
        before = [] if self._skip is None else [tensor.detach().clone() for tensor in changed]
        with torch.no_grad():
            with decayed(optimizer):
                optimizer.step()
            for tensor, old in zip(changed, before, strict=False):
                tensor.copy_(torch.where(self._skip, old, tensor))  # type: ignore[arg-type]  # there if `before` is


@define(frozen=True)
class Look:
    """A loss or gradients that a step looks at while it runs.

    Args:
        numbers: A stand-in for the numbers that have to be finite: a loss, or one for each parameter.
        what: What a loss is called; of gradients the name of the optimizer.
        names: Of the parameters; none for a loss.
        num_events: How many events the step had fired before.
    """

    numbers: Tensor
    what: str | None
    names: list[str]
    num_events: int


class FiniteStandIn:
    """What looks at losses and gradients while a step is traced: it leaves out the updates that follow a bad one.

    Args:
        learner: What stands for the learner.
    """

    bad = None
    looked = False  # the losses are looked at once more when the step ends: a phase may store one after its backward

    def __init__(self, learner: StandIn) -> None:
        self._learner = learner
        self.looks: list[Look] = []

    def require_losses(self, wait: bool) -> None:
        """Have the updates that follow be left out unless the step's losses are finite."""
        for what, loss in stored_losses(self._learner.step):
            if isinstance(loss, Tensor) and loss.numel() == 1:
                self._look(loss.detach().reshape(1), what, [])

    def require_gradients(self, name: str | None, wait: bool) -> None:
        """Have an optimizer's update, and those that follow, be left out unless its gradients are finite."""
        updates = self._learner.updates
        updates.take_given(updates.find(name))
        leaves = [leaf for leaf in updates.find(name).parameters if leaf.grad is not None]
        numbers = [leaf.grad.detach() for leaf in leaves if leaf.grad is not None]
        norm = norm_before_clipping(self._learner.step, name)
        numbers += [norm.detach()] if norm is not None else []
        if numbers:
            fine = torch.stack([number.isfinite().all() for number in numbers])
            self._look(torch.where(fine, 0.0, float("nan")), name, [updates.names[leaf] for leaf in leaves])

    def _look(self, numbers: Tensor, what: str | None, names: list[str]) -> None:
        self.looks.append(Look(numbers, what, names, len(self._learner.fired) - 1))
        self._learner.skip_update(~numbers.isfinite().all())

    def found(self) -> list[Tensor]:
        """Give whether anything was not finite, and the numbers of each look; nothing where there was none."""
        if not self.looks:
            return []
        bad = torch.stack([~look.numbers.isfinite().all() for look in self.looks])
        return [bad.any(), *(look.numbers for look in self.looks)]


@define(frozen=True)
class Left:
    """What a step does to the gradients of one optimizer that wait for an update.

    Args:
        slot: The optimizer.
        parameters: Those whose gradients it leaves for a later step, in the order of the graph's outputs.
        waits: Whether their window is still open.
        begun: Whether the first of them was computed in this step.
        in_block: Whether the first of them was computed in the optimizer's own block.
    """

    slot: Slot
    parameters: list[nn.Parameter]
    waits: bool
    begun: bool
    in_block: bool

    def put(self, state: StepState, phase: str, gradients: Iterator[Tensor]) -> None:
        """Have the optimizer's gradients be what a step has left."""
        slot = self.slot
        if not self.waits or self.begun:
            slot.end_gradients()
        if self.waits:
            slot.begin_gradients(state, self.in_block, phase)
        slot.release()
        for parameter in self.parameters:
            parameter.grad = next(gradients)


class Traced:
    """A step as a graph, and where its inputs come from.

    Attributes:
        looks: At losses and gradients, that the graph takes: its first outputs are what they found.
        graph: Of the tensors in `fixed`, those of `options`, those that holders hold, those in the step's entries,
            gradients that wait, and `constants`, in this order.
        fixed: Parameters, buffers and other tensors of modules, and the optimizers' state.
        options: Of the optimizers, those that may change from step to step: the group, the name, and a tensor of it.
        holders: The phase, phases that it holds, and the callbacks with handlers that are part of the graph.
        held: Tensors that the holders hold, as (number of the holder, attribute).
        reads: What else was read of the holders, as (number of the holder, attribute) and value.
        waiting: Parameters whose gradients wait for an update when it begins.
        constants: Tensors from elsewhere, such as those that a function closes over.
        changed: Which of the inputs after `fixed` it changes in place, by number.
        stored: The entries that the body stored, each with stand-ins for its tensors.
        left: What becomes of gradients that wait, for each optimizer that has some before the step or after it.
        consumed: The optimizers whose last gradients an update has used.
        removed: Names of the entries that it removed.
        fired: The events that it fired.
        makes_state: Whether an optimizer makes its state in this step, so that it has to run as it is.

    Raises:
        CompileError: The step is no function of tensors.
    """

    def __init__(
        self, learner: RunLearner, phase: Phase, modules: list[nn.Module], callbacks: list[Callback], state: StepState
    ) -> None:
        self._learner, self._phase = learner, phase
        self._parts = [part for module in modules for part in module.modules()]
        self._slots = learner.updates.slots if phase.gradients else ()
        self._places: list[tuple[dict[str, Any], str, Tensor]] = [
            (where, name, tensor)
            for part in self._parts
            for where in (part._parameters, part._buffers, vars(part))
            for name, tensor in where.items()
            if isinstance(tensor, Tensor)
        ]
        owned = [parameter for slot in self._slots for parameter in slot.parameters]
        states = [entries for slot in self._slots for entries in slot.optimizer.state.values()]
        self.fixed = unique(
            [
                *(tensor for *_, tensor in self._places),
                *owned,
                *(value for entries in states if isinstance(entries, dict) for value in entries.values()),
            ]
        )
        self.options = [
            (group, name, as_tensor(group, name))
            for slot in self._slots
            for group in slot.optimizer.param_groups
            for name in ("lr", DECAY)
            if is_input(slot.optimizer, group, name)
        ]
        self.holders: list[Any] = [*holders_of(phase), *callbacks]
        self.held = [
            (number, name)
            for number, holder in enumerate(self.holders)
            for name, value in attributes(holder).items()
            if isinstance(value, Tensor)
        ]
        self.reads: dict[tuple[int, str], Any] = {}
        self.stored: dict[str, Any] = {}
        self.removed: list[str] = []
        self.fired: list[Event] = []
        self.left: list[Left] = []
        self.consumed: list[Slot] = []
        self.looks: list[Look] = []
        self.changed: list[int] = []
        self.makes_state = False
        self._entries = dict(vars(state))
        self.waiting = [parameter for slot in self._slots for parameter in slot.waiting]
        waiting = [parameter.grad for parameter in self.waiting]
        if any(gradient.layout is not torch.strided for gradient in waiting if gradient is not None):  # each has one
            raise self._refusal("sparse gradients wait for an update, which a graph cannot add to")
        self._check_inputs()
        given = [tensor for value in self._entries.values() for tensor in tensors(value)]
        held = [getattr(self.holders[number], name) for number, name in self.held]
        options = [option for *_, option in self.options]
        self.example: list[Any] = [*self.fixed, *options, *held, *given, *waiting]
        self.graph = self._trace()
        self.constants = lift_constants(self.graph)
        self.example += self.constants

    def _refusal(self, why: str) -> CompileError:
        return CompileError(f"the step of {self._phase!r} cannot be one graph: {why}")

    def _check_inputs(self) -> None:
        """Raise for hooks, for optimizers that are not stepped as torch's are, and for tensors that share memory."""
        hooked = [type(part).__name__ for part in self._parts if any(getattr(part, hooks) for hooks in HOOKS)]
        hooked += [n for p, n in self._learner.updates.names.items() if has_hooks(p)]
        hooked += [slot.label for slot in self._slots if has_hooks(slot.optimizer)]
        if hooked:
            raise self._refusal(
                f"there are hooks on {', '.join(dict.fromkeys(hooked))}, and nobody can look into a graph while it "
                "runs; remove the hooks, or the callback that registers them"
            )
        if any(getattr(nn.modules.module, f"_global{hooks}", None) for hooks in HOOKS):
            raise self._refusal("there are hooks on all modules (register_module_forward_hook, …); remove them")
        for slot in self._slots:
            step = vars(slot.optimizer).get("step")
            if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):  # torch's schedulers count there
                raise self._refusal(f"the step of {slot.label} was replaced by {step!r}; put the optimizer's own back")
            entries = [e for p, e in slot.optimizer.state.items() if isinstance(p, Tensor) and isinstance(e, dict)]
            odd = [v for each in entries for v in each.values() if not isinstance(v, (Tensor, *NUMBERS))]
            if odd or len(entries) != len(slot.optimizer.state):
                raise self._refusal(
                    f"{slot.label}, a {type(slot.optimizer).__name__}, keeps more than tensors and numbers for each "
                    "parameter"
                )
        computed = [
            f"{type(part).__name__}.{name}"
            for part in self._parts
            for name, value in vars(part).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        if computed:  # by the step before
            raise self._changes(computed)
        shared = overlapping(self.fixed)
        if shared:
            raise self._refusal(f"tensors of shapes {shared} share memory; give each its own (.clone())")

    # Tracing

    def _trace(self) -> GraphModule:
        from torch.fx.experimental.proxy_tensor import make_fx

        with ExitStack() as undone:
            drawn = undone.enter_context(
                noting_draws(generators_of([*self.holders, *self._parts, self._learner.loss_fn]))
            )
            appended = undone.enter_context(noting_containers(self._functions()))
            undone.enter_context(as_compilers_trace(self._phase.gradients))
            undone.enter_context(AsTried(self._refusal))
            undone.enter_context(self._unchanged())
            undone.enter_context(self._own_options_unchanged())
            undone.enter_context(torch.set_grad_enabled(self._phase.gradients))
            sets_seed = undone.enter_context(noting_seeds())
            try:
                graph = make_fx(self._run, tracing_mode="fake", _allow_non_fake_inputs=True)(*self.example)
            except (CompileError, LossError, OptimizerError, PhaseError):
                raise  # they say what to do
            except CancelSignal as signal:
                raise self._refusal(
                    f"it raises {type(signal).__name__}; raise it in finish(learner, state), or in a handler of "
                    "StepBegin"
                ) from signal
            except Exception as error:
                why = f"{first_line(error)}{where(error)}. A graph holds tensors alone{hint(error)}"
                raise self._refusal(why) from error
        if appended:
            raise self._changes(f"{name}, a variable of a function or of its module" for name in appended)
        if drawn:
            raise self._refusal(
                f"it draws from Python's or NumPy's random numbers ({', '.join(dict.fromkeys(drawn))}), which would be "
                "the same ones at every step; draw from torch, or before the step: in the data or at StepBegin"
            )
        if any(asks_for_a_float(node) for node in graph.graph.nodes):
            raise self._refusal(
                "it asks for a number in the middle (.item(), float(), or a tensor as alpha= or value=), which a "
                "graph may compute otherwise; multiply by the tensor"
            )
        if sets_seed and any(draws(node) for node in graph.graph.nodes):
            raise self._refusal(
                "it draws random numbers and sets where they start (torch.manual_seed, set_rng_state, fork_rng, or a "
                "checkpoint that draws them again), which a graph does not do"
            )
        return graph

    def _functions(self) -> list[Any]:
        """Return the users' functions that a step may run, as far as they are found by name."""
        kinds = {kind for thing in (*self.holders, *self._parts, self._learner.loss_fn) for kind in type(thing).__mro__}
        own = [kind for kind in kinds if not kind.__module__.startswith(("torch.", "fluxloop.", "builtins"))]
        held = [value for thing in (*self.holders, *self._parts) for value in attributes(thing).values()]
        return [self._learner.loss_fn, *held, *(value for kind in own for value in vars(kind).values())]

    def _run(self, *flat: Any) -> list[Tensor]:
        """Run the body on stand-ins for all inputs; give the tensors that it stored, and gradients that it leaves."""
        inputs = iter(flat)
        moving = flat[len(self.fixed) :]
        versions = [tensor._version for tensor in moving]
        stand_ins = {id(tensor): next(inputs) for tensor in self.fixed}
        options = {(id(group), name): next(inputs) for group, name, _ in self.options}
        held = [next(inputs) for _ in self.held]
        for (number, name), stand_in in zip(self.held, held, strict=True):
            object.__setattr__(self.holders[number], name, stand_in)
        leaves: dict[Any, Tensor] = {}
        for part in self._parts:
            for parameter in part._parameters.values():
                if parameter is not None and parameter not in leaves:
                    leaf = leaves[parameter] = stand_ins[id(parameter)].detach()
                    leaf.requires_grad_(parameter.requires_grad and self._phase.gradients)
        memory = {leaf: leaf.untyped_storage()._cdata for leaf in leaves.values()}
        put = [leaves[t] if isinstance(t, nn.Parameter) else stand_ins[id(t)] for *_, t in self._places]
        for (place, name, _), stand_in in zip(self._places, put, strict=True):
            place[name] = stand_in
        twins = {slot.name: twin_of(slot.optimizer, leaves, stand_ins, options) for slot in self._slots}
        stepped: dict[str | None, dict[str, None]] = {}
        for optimizer_name, twin in twins.items():
            note_steps(optimizer_name, twin, stepped)
        made = {name: of_optimizer(twin) for name, twin in twins.items()}
        entries = {name: map_tensors(lambda _: next(inputs), value) for name, value in self._entries.items()}
        waiting = {leaves[parameter]: next(inputs) for parameter in self.waiting}
        for leaf, gradient in waiting.items():
            leaf.grad = gradient
        state = StepState(dict(entries))
        buffers = self._copied() if self._phase.gradients else []
        learner = StandIn(self._learner, self._phase, state, leaves, twins)
        with self._reading():
            self._phase.body(learner, learner.fire, state)
        self.fired = learner.fired
        self._note_gradients(learner, waiting, stepped)
        if any(leaf.untyped_storage()._cdata != before for leaf, before in memory.items()):
            raise self._refusal("it assigns .data of a parameter; change it in place under torch.no_grad(): p.copy_(…)")
        self._put_back(put, held)
        for slot in self._slots:
            self._put_state_back(slot.optimizer, twins[slot.name], leaves, stand_ins)
            if stepped.get(slot.name):
                changed = ", ".join(stepped[slot.name])
                raise self._refusal(f"{slot.label} changes {changed} in Python; expected it to keep tensors")
            written = differing(made[slot.name], of_optimizer(twins[slot.name]))
            if written:
                raise self._writes(slot, written)
        self.changed = [n for n, (t, before) in enumerate(zip(moving, versions, strict=True)) if t._version != before]
        self._note_entries(entries, state, {id(moving[number]) for number in self.changed})
        for each in buffers:
            learner.accelerator.restore(*each)
        self.looks = learner.finite.looks
        found = learner.finite.found()
        stored = [tensor for value in self.stored.values() for tensor in tensors(value)]
        gradients = [
            learner.accelerator.left(None if left.begun else waiting.get(leaf), leaf.grad)
            for left in self.left
            for leaf in (leaves[parameter] for parameter in left.parameters)
            if leaf.grad is not None  # each has one
        ]
        return [tensor.detach() for tensor in (*found, *stored, *apart(gradients, [*flat, *found, *stored]))]

    def _copied(self) -> list[tuple[list[Tensor], list[Tensor], list[int]]]:
        """Copy the buffers of each module, to be put back where an update is skipped; give them with their versions."""
        places = [[b for b in part._buffers.values() if b is not None] for part in self._parts if part._buffers]
        return [(held, [b.clone() for b in held], [b._version for b in held]) for held in places]

    def _writes(self, slot: Slot, names: Iterable[str]) -> CompileError:
        return self._refusal(
            f"it writes {', '.join(names)} of {slot.label}, which the optimizer, records and checkpoints would know "
            "nothing of; set options in the phase's finish(learner, state), or by a callback: "
            "Scheduler({LearningRate: ...})"
        )

    def _note_gradients(self, learner: StandIn, before: dict[Tensor, Tensor], stepped: Iterable[str | None]) -> None:
        """Note what becomes of gradients that wait, and which an update has used.

        Raises:
            CompileError: Some that were computed by hand would be lost.
        """
        for slot, now in zip(self._slots, learner.updates.slots, strict=True):
            if now.consumed:
                self.consumed.append(slot)
            waits, begun = now.first_step is not None, now.first_step is learner.step
            leaves = [leaf for leaf in now.parameters if leaf.grad is not None]
            if slot.first_step is None and not waits:
                if leaves and slot.name not in stepped:
                    raise self._refusal(
                        "it computes gradients by hand, and leaves them for a later step; call "
                        "learner.backward(loss) instead of loss.backward()"
                    )
            elif begun or not waits or any(leaf.grad is not before.get(leaf) for leaf in now.parameters):
                names = dict(zip(now.parameters, slot.parameters, strict=True))
                left = [names[leaf] for leaf in leaves] if waits else []
                self.left.append(Left(slot, left, waits, begun, now.in_block))

    def _note_entries(self, entries: dict[str, Any], state: StepState, changed: set[int]) -> None:
        """Note which entries the body stored and removed; some were changed in place."""
        vars(state).pop("grads", None)
        given = {id(tensor) for value in entries.values() for tensor in tensors(value)}
        for name, value in vars(state).items():
            if value is not entries.get(name) or any(id(tensor) not in given for tensor in tensors(value)):
                describe(value, f"the entry {name!r} that it stores")
                self.stored[name] = value
        self.removed = [name for name in entries if name not in vars(state)]
        together = [tensor for value in entries.values() for tensor in tensors(value)]
        originals = [tensor for value in self._entries.values() for tensor in tensors(value)]
        if any(id(new) in changed and not old.is_contiguous() for new, old in zip(together, originals, strict=True)):
            raise self._refusal("it changes an entry in place whose rows have gaps in memory; give it .contiguous()")
        memory = [tensor.untyped_storage()._cdata for tensor in originals]
        if any(id(new) in changed and memory.count(where) > 1 for new, where in zip(together, memory, strict=True)):
            raise self._refusal(
                "it changes an entry in place that is another entry too, or shares memory with one; give it a copy "
                "(.clone())"
            )

    def _put_back(self, put: list[Tensor], held: list[Tensor]) -> None:
        """Have buffers, and tensors of the holders, that the body replaced be changed in place."""
        buffers = {id(part._buffers) for part in self._parts}
        for (place, name, _), stand_in in zip(self._places, put, strict=True):
            now = place.get(name)
            if now is not stand_in and not (id(place) in buffers and replaces(now, stand_in)):
                raise self._refusal(
                    f"it puts something else in the place of the tensor {name!r} of a module; change it in place, or "
                    "register it as a buffer"
                )
        for (number, name), stand_in in zip(self.held, held, strict=True):
            now = getattr(self.holders[number], name, None)
            if now is not stand_in and not replaces(now, stand_in):
                raise self._refusal(f"it changes the shape of {type(self.holders[number]).__name__}.{name}")

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
    def _own_options_unchanged(self) -> Iterator[None]:
        """Put the options of the learner's own optimizers back; raise for those that a step writes past its learner."""
        kept = [(slot, group, dict(group)) for slot in self._slots for group in slot.optimizer.param_groups]
        before = [of_optimizer(slot.optimizer) for slot in self._slots]
        now = before
        try:
            yield
            now = [of_optimizer(slot.optimizer) for slot in self._slots]
        finally:
            for _, group, own in kept:
                group.clear()
                group.update(own)
        for slot, old, new in zip(self._slots, before, now, strict=True):
            if old != new:
                raise self._writes(slot, differing(old, new))

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Put modules, holders and the loss function back as they were; raise for attributes that a step changes."""
        in_place = [{name for where, name, _ in self._places if where is vars(part)} for part in self._parts]
        held = [
            {name for n, name in self.held if n == number}
            | {name for name, value in attributes(holder).items() if isinstance(value, Phase)}
            for number, holder in enumerate(self.holders)
        ]
        things: list[tuple[Any, Any]] = [
            (p, MODULE_INTERNALS | names) for p, names in zip(self._parts, in_place, strict=True)
        ]
        things += zip(self.holders, held, strict=True)
        things += [(self._learner.loss_fn, ())] if hasattr(self._learner.loss_fn, "__dict__") else []
        buffers = [set(part._buffers) for part in self._parts]
        tensors_of: list[tuple[Any, Any]] = [
            (where, dict(where)) for part in self._parts for where in (part._parameters, part._buffers)
        ]
        kept = [attributes(thing) for thing, _ in things]
        before = [looks(thing, left_out) for thing, left_out in things]
        changed: dict[str, None] = {}
        try:
            yield
            for (thing, left_out), old in zip(things, before, strict=True):
                now = looks(thing, left_out)
                names = [name for name in {**old, **now} if old.get(name) != now.get(name)]
                changed.update({f"{type(thing).__name__}.{name}": None for name in names})
            for part, names_before in zip(self._parts, buffers, strict=True):
                changed.update({f"{type(part).__name__}.{name}": None for name in names_before ^ set(part._buffers)})
        finally:
            for (thing, _), own in zip(things, kept, strict=True):
                for name in attributes(thing).keys() - own.keys():
                    object.__delattr__(thing, name)
                for name, value in own.items():
                    object.__setattr__(thing, name, value)
            for where, own in tensors_of:
                where.clear()
                where.update(own)
        if changed:
            raise self._changes(changed)

    def _changes(self, names: Iterable[str]) -> CompileError:
        return self._refusal(
            f"it changes {', '.join(names)}, which Python would do once and not at every step; keep numbers that "
            "change in buffers, make what is kept before, or change it in the phase's finish(learner, state)"
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Note which attributes of the holders are read, but tensors and methods."""
        numbers = {id(holder): number for number, holder in enumerate(self.holders)}
        own = [attributes(holder).keys() for holder in self.holders]
        kinds = {type(holder) for holder in self.holders}

        def noting(kind: type) -> Callable[[Any, str], Any]:
            get: Callable[[Any, str], Any] = kind.__getattribute__  # type: ignore[assignment]  # of instances

            def read(holder: Any, name: str) -> Any:
                value = get(holder, name)
                number = numbers.get(id(holder))
                if number is None or name.startswith("__") or isinstance(value, (Tensor, Phase)):
                    return value
                declared = callable(value) or hasattr(Phase, name)  # methods, and what every phase class says
                if name in own[number] or not declared:
                    self.reads.setdefault((number, name), value)
                return value

            return read

        overridden = {kind: vars(kind).get("__getattribute__") for kind in kinds}
        for kind in kinds:
            setattr(kind, "__getattribute__", noting(kind))  # noqa: B010 - mypy knows no other way
        try:
            yield
        finally:
            for kind, function in overridden.items():
                if function is None:
                    delattr(kind, "__getattribute__")
                else:
                    setattr(kind, "__getattribute__", function)  # noqa: B010 - as above


LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, PACKAGE))
NUMBERS = (type(None), bool, int, float, str)


def unique(found: list[Any]) -> list[Tensor]:
    """Give the tensors among some things, each once."""
    return list({id(thing): thing for thing in found if isinstance(thing, Tensor)}.values())


def has_hooks(thing: Any) -> bool:
    """Tell whether a parameter or an optimizer has hooks."""
    names = (
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
    )
    return any(getattr(thing, name, None) for name in names)


def overlapping(found: list[Tensor]) -> list[tuple[int, ...]]:
    """Give the shapes of two tensors that share memory; none where each has its own."""
    spans = []
    for tensor in found:
        if tensor.layout is torch.strided and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), tensor.shape))
    spans.sort()
    pairs = ([tuple(a[2]), tuple(b[2])] for a, b in pairwise(spans) if b[0] < a[1])
    return next(pairs, [])


def apart(found: list[Any], others: list[Any]) -> list[Tensor]:
    """Give tensors that share memory neither with each other nor with others: copies of those that do."""
    known = {other.untyped_storage()._cdata for other in others}
    given = []
    for tensor in found:
        memory = tensor.untyped_storage()._cdata
        given.append(tensor.clone() if memory in known else tensor)
        known.add(memory)
    return given


def replaces(now: Any, stand_in: Tensor) -> bool:
    """Change a stand-in in place to the tensor that was put there instead; tell whether that can be done."""
    if not isinstance(now, Tensor) or (now.shape, now.dtype) != (stand_in.shape, stand_in.dtype):
        return False
    stand_in.copy_(now.detach())
    return True


def holders_of(phase: Phase) -> list[Phase]:
    """List a phase and the phases that it holds, as the validation twin of one does."""
    return [phase, *(value for value in vars(phase).values() if isinstance(value, Phase))]


def describe(value: Any, whose: str = "it") -> Any:
    """Describe a value by the shapes of the tensors in it, and by what everything else in it says.

    Raises:
        CompileError: There is something else in it than tensors, numbers, texts and containers of them.
    """
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, float):
        return float, repr(value)  # NaN is NaN
    if value is None or isinstance(value, (bool, int, str, bytes, torch.dtype, torch.device)):
        return type(value), value
    fields = init_fields(value)
    if isinstance(value, Mapping):
        return type(value), tuple([(key, describe(item, whose)) for key, item in value.items()])
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        return type(value), tuple([describe(item, whose) for item in value])
    if fields is not None:
        return type(value), tuple([(name, describe(getattr(value, name), whose)) for name in fields])
    raise CompileError(
        f"{whose} holds {describe_briefly(value)}, which a compiled step cannot take; expected tensors, numbers and "
        "texts, in tuples, lists, dicts or dataclasses"
    )


DECAY = "weight_decay"


def is_input(optimizer: Optimizer, group: dict[str, Any], name: str) -> bool:
    """Tell whether an option of a group is an input of the graph; others, and no decay at all, are part of it.

    What a graph computes has to follow from the numbers of the step alone: a resumed run makes it anew.
    """
    if name == DECAY and not type(optimizer).__module__.startswith("torch.optim."):
        return False  # nobody knows what it does with it
    value = group.get(name)
    return bool(group["params"]) and isinstance(value, (float, int, Tensor)) and (name == "lr" or bool(value))


def as_tensor(group: dict[str, Any], name: str) -> Tensor:
    """Give a number of a parameter group as a tensor of its own on its parameters' device."""
    parameter = group["params"][0]
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.as_tensor(group[name], dtype=dtype).detach().reshape(()).to(parameter.device, copy=True)


def of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Describe what an optimizer keeps besides its state and its parameters; tensors by how often they were changed."""
    left_out = {"state", "param_groups", "_opt_called"}
    found = {name: seen(value) for name, value in vars(optimizer).items() if name not in left_out}
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name != "params":
                changes = [tensor._version for tensor in tensors(value)]
                found[f"{name!r} in param_groups[{number}]"] = seen(value), changes
    return found


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names whose values differ."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def twin_of(
    optimizer: Optimizer, leaves: Any, stand_ins: dict[int, Tensor], options: dict[tuple[int, str], Tensor]
) -> Optimizer:
    """Give an optimizer of the same kind and options over stand-ins, whose step is operations on tensors alone."""
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    how = {"foreach": True, "fused": False, "capturable": True}  # see `AsTried` for lists of tensors
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


def note_steps(name: str | None, optimizer: Optimizer, stepped: dict[str | None, dict[str, None]]) -> None:
    """Have an optimizer note, by its name, that it steps, and what of itself its steps change in Python."""
    own = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        changed = stepped.setdefault(name, {})
        before = of_optimizer(optimizer)
        result = own(*args, **kwargs)
        changed.update(dict.fromkeys(differing(before, of_optimizer(optimizer))))
        return result

    optimizer.step = step  # type: ignore[method-assign]  # of this one alone


@contextmanager
def decayed(optimizer: Optimizer) -> Iterator[None]:
    """Decay weights by a tensor, as torch's optimizers do by a number, and leave an optimizer none to decay by."""
    weights = [(group, group[DECAY]) for group in optimizer.param_groups if isinstance(group.get(DECAY), Tensor)]
    for group, weight in weights:
        for leaf in group["params"]:
            if leaf.grad is not None and group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
                leaf.mul_(1 - group["lr"] * weight)
            elif leaf.grad is not None:
                leaf.grad = leaf.grad + leaf * (-weight if group.get("maximize") else weight)
        group[DECAY] = 0.0
    yield
    for group, weight in weights:
        group[DECAY] = weight


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
def as_compilers_trace(gradients: bool) -> Iterator[None]:
    """Have operations be recorded as ``torch.compile`` records them.

    Optimizers know of it by a flag. Operations are decomposed before their gradients are taken, since
    the compiler knows some backward operations only by what they are made of. Of a recurrent layer that
    is done only where oneDNN is off, whose layer the compiler has no backward for.

    Args:
        gradients: Whether gradients are computed.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    (onednn, *_) = torch.backends.mkldnn.set_flags(False) if gradients else (None,)  # type: ignore[no-untyped-call]  # torch's
    try:
        with torch._dispatch.python.enable_python_dispatcher():
            yield
    finally:
        torch.compiler._is_compiling_flag = before
        if gradients:
            torch.backends.mkldnn.set_flags(onednn)  # type: ignore[no-untyped-call]  # as above


def require_torch() -> None:
    """Raise where torch has not what steps are traced with.

    Raises:
        CompileError: It is too old, or too new.
    """
    try:
        attrgetter("compiler._is_compiling_flag", "_C._functorch.get_interpreter_stack")(torch)
    except AttributeError as error:
        raise CompileError(
            f'Accelerator(compile="step") cannot be used with torch {torch.__version__}; expected 2.4 or newer, or '
            'compile="model"'
        ) from error


def looks(thing: Any, left_out: Any) -> dict[str, Any]:
    """Describe the attributes of an object, apart from some."""
    return {name: seen(value) for name, value in attributes(thing).items() if name not in left_out}


@contextmanager
def noting_seeds() -> Iterator[list[str]]:
    """Note who sets the state of torch's random numbers."""
    noted: list[str] = []
    module: Any = torch.random
    own = module.default_generator

    class Noting:
        def __getattr__(self, name: str) -> Any:
            if name in ("set_state", "manual_seed", "seed"):
                noted.append(name)
            return getattr(own, name)

    module.default_generator = Noting()
    try:
        yield noted
    finally:
        module.default_generator = own


def asks_for_a_float(node: Any) -> bool:
    """Return whether an operation gives Python a number that is no whole one, which is a symbol in the graph."""
    return node.target is torch.ops.aten._local_scalar_dense.default and isinstance(
        node.meta.get("val"), (float, torch.SymFloat)
    )


def draws(node: Any) -> bool:
    """Tell whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def first_line(error: Exception) -> str:
    """Give the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(". ")


def where(error: Exception) -> str:
    """Tell in which line of the user's code an error was raised, or of torch's where the user has none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.exists(f.filename)]
    users = [f for f in frames if not f.filename.startswith(LIBRARIES)]
    modules = [f for f in frames if f"{os.sep}nn{os.sep}modules{os.sep}" in f.filename]
    last = (users or modules)[-1:]
    return "".join(f" (in {f.filename}, line {f.lineno}: {f.line})" for f in last)


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
