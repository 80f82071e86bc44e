"""Run a phase's body on stand-ins for its tensors, and note what it does to them: one graph for a step.

``make_fx`` runs the body on fake tensors (shapes without numbers) and records every operation on
them, those of autograd and of the optimizer too. The resulting graph takes parameters, buffers, the
optimizer's state, learning rates, the batch and gradients that wait for an update. It changes in place
what a step changes, and returns the entries that the body stored, and the gradients that wait for a
later step.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import define
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from fluxloop.callback import Callback
from fluxloop.compile.averaging import Agreed, Message
from fluxloop.compile.by_hand import dropping
from fluxloop.compile.conditions import form_of
from fluxloop.compile.forbidden import AsTried, noting_draws
from fluxloop.compile.fx import as_compilers_trace, asks_for_a_float, draws, lift_constants, noting_seeds
from fluxloop.compile.inputs import Inputs, inputs_of
from fluxloop.compile.optimizer_stand_in import differing, note_steps, seen_of, stand_in_of
from fluxloop.compile.reach import reach_of
from fluxloop.compile.refusals import changes_python, first_line, hint, refusal, where, writes_options
from fluxloop.compile.stand_ins import Look, StandIn
from fluxloop.compile.step_averages import Moved, move
from fluxloop.compile.unchanged import attributes_unchanged, noting_reads, options_unchanged
from fluxloop.compile.windows import Fit, Place, WaitingGradients, fits, window_after
from fluxloop.compute.slots import Slot
from fluxloop.data.generators import generators_of
from fluxloop.errors import CancelSignal, CompileError, LossError, OptimizerError, PhaseError
from fluxloop.events import Event
from fluxloop.nested import contents, map_tensors, tensors
from fluxloop.phase import Phase
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


ASSIGNS_DATA = "it assigns .data of a parameter; change it in place under torch.no_grad(): p.copy_(…)"


@define(eq=False)
class Traced:
    """A step as a graph, and where its inputs come from.

    Args:
        inputs: Where the graph's inputs come from, but the constants.
        graph: Of the inputs' tensors, then the constants. It returns what was found by `looks`, the tensors of
            the entries in `stored`, and the gradients in `waiting_after`, in this order.
        constants: Tensors from elsewhere, such as those that a function closes over.
        example: All inputs of the graph as they were when it was traced.
        looks: At losses and gradients; the graph's first outputs are what they found.
        reads: What was read of the holders besides tensors, by (number of the holder, attribute).
        changed: Which of the inputs after the fixed ones it changes in place, by number.
        changed_weights: Which parameters it changes; an optimizer leaves those alone that get no gradient.
        stored: The entries that the body stored, each with stand-ins for its tensors.
        waiting_after: What becomes of gradients that wait, for each optimizer that has some before or after the step.
        fits: For which counts of the batches of an update it was traced, and the messages between processes.
        messages: What is sent to other processes; of what comes back the next output tells.
        consumed: The optimizers whose last gradients an update has used.
        removed: Names of the entries that it removed.
        fired: The events that it fired.
        moved: The averages of weights that it moves.
        asks: Whether a handler asks to leave updates out; the output after the messages' tells by which events it did.
        makes_state: Whether an optimizer makes its state in this step, or processes agree on what they send, so that it
            has to run as it is.
    """

    inputs: Inputs
    graph: GraphModule
    constants: list[Tensor]
    example: list[Any]
    looks: list[Look]
    reads: dict[tuple[int, str], Any]
    changed: list[int]
    changed_weights: set[Tensor]
    stored: dict[str, Any]
    waiting_after: list[WaitingGradients]
    fits: list[Fit | Agreed]
    messages: list[Message]
    consumed: list[Slot]
    removed: list[str]
    fired: list[Event]
    moved: list[Moved]
    asks: bool
    makes_state: bool


def trace(
    learner: RunLearner, phase: Phase, modules: list[nn.Module], callbacks: list[Callback], state: StepState
) -> Traced:
    """Make a graph of a phase's body.

    Args:
        learner: Whose step it is.
        phase: The running phase.
        modules: Those that the body may run.
        callbacks: Those with handlers that are part of the graph.
        state: The entries of a step; only their shapes matter.

    Raises:
        CompileError: The step is no function of tensors.
    """
    inputs = inputs_of(learner, phase, modules, callbacks, state)
    example = inputs.tensors()
    run = Run(inputs)
    graph = record(run, example)
    constants = lift_constants(graph)
    return Traced(
        inputs=inputs,
        graph=graph,
        constants=constants,
        example=[*example, *constants],
        looks=run.looks,
        reads=run.reads,
        changed=run.changed,
        changed_weights=run.changed_weights,
        stored=run.stored,
        waiting_after=run.waiting_after,
        fits=run.fits,
        messages=run.messages,
        consumed=run.consumed,
        removed=run.removed,
        fired=run.fired,
        moved=run.moved,
        asks=run.asks,
        makes_state=run.makes_state,
    )


def record(run: Run, example: list[Any]) -> GraphModule:
    """Record the operations of a run; raise for what it does that a graph would do once, or otherwise.

    Args:
        run: Of the body.
        example: Tensors like its inputs.

    Raises:
        CompileError: The step is no function of tensors.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs, phase = run.inputs, run.inputs.phase
    with ExitStack() as undone:
        # what is entered first is left last: generators and containers are compared once all else is as it was
        known = generators_of([*inputs.holders, *inputs.parts, inputs.learner.loss_fn])
        drawn = undone.enter_context(noting_draws(known))
        around = reach_of(inputs.holders, inputs.parts, inputs.learner.loss_fn)
        changed = undone.enter_context(around.unchanged())
        undone.enter_context(as_compilers_trace(phase.gradients))
        undone.enter_context(AsTried(partial(refusal, phase)))
        undone.enter_context(attributes_unchanged(inputs))
        undone.enter_context(options_unchanged(inputs))
        undone.enter_context(torch.set_grad_enabled(phase.gradients))
        undone.enter_context(inputs.learner.accelerator.autocast())  # puts back what the run sets
        sets_seed = undone.enter_context(noting_seeds())
        try:
            graph = make_fx(run.body, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
        except (CompileError, LossError, OptimizerError, PhaseError):
            raise  # they say what to do
        except CancelSignal as signal:
            raise refusal(
                phase,
                f"it raises {type(signal).__name__}; raise it in finish(learner, state), or in a handler of StepBegin",
            ) from signal
        except Exception as error:
            why = f"{first_line(error)}{where(error)}. A graph holds tensors alone{hint(error)}"
            raise refusal(phase, why) from error
    if changed:
        raise changes_python(phase, (f"{name} (reached by name)" for name in dict.fromkeys(changed)))
    if drawn:
        raise refusal(
            phase,
            f"it draws from Python's or NumPy's random numbers ({', '.join(dict.fromkeys(drawn))}), which would be "
            "the same ones at every step; draw from torch, or before the step: in the data or at StepBegin",
        )
    check_graph(graph, phase, sets_seed)
    return graph


def check_graph(graph: GraphModule, phase: Phase, sets_seed: list[str]) -> None:
    """Raise for a graph that would not compute what the step computes.

    Raises:
        CompileError: It asks for a number, or draws random numbers whose start the step has set.
    """
    if any(asks_for_a_float(node) for node in graph.graph.nodes):
        raise refusal(
            phase,
            "it asks for a number in the middle (.item(), float(), or a tensor as alpha= or value=), which a "
            "graph may compute otherwise; multiply by the tensor",
        )
    if sets_seed and any(draws(node) for node in graph.graph.nodes):
        raise refusal(
            phase,
            "it draws random numbers and sets where they start (torch.manual_seed, set_rng_state, fork_rng, or a "
            "checkpoint that draws them again), which a graph does not do",
        )


@define(eq=False)
class Placed:
    """The stand-ins of one run, once they are in the places of what they stand for.

    Args:
        by_id: Those of the fixed tensors, by id of what they stand for.
        of_places: Those in modules, in the order of the inputs' places.
        held: Those that the holders hold, in the order of the inputs.
        leaves: Those of the parameters: detached, so that gradients are computed for them.
        optimizers: Of the optimizers, by name.
        entries: Of the step.
        waiting: The gradients that wait, by leaf.
        numbers: Those of the numbers of the inputs, by place.
    """

    by_id: dict[int, Tensor]
    of_places: list[Tensor]
    held: list[Tensor]
    leaves: dict[Any, Tensor]
    optimizers: dict[str | None, Optimizer]
    entries: dict[str, Any]
    waiting: dict[Tensor, Tensor]
    numbers: dict[Place, Tensor]


class Run:
    """One run of a phase's body on stand-ins, and what was noted of it.

    Args:
        inputs: Of the step's graph.

    Attributes:
        looks: See `Traced`; likewise the others.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.looks: list[Look] = []
        self.reads: dict[tuple[int, str], Any] = {}
        self.changed: list[int] = []
        self.changed_weights: set[Tensor] = set()
        self.stored: dict[str, Any] = {}
        self.waiting_after: list[WaitingGradients] = []
        self.fits: list[Fit | Agreed] = []
        self.messages: list[Message] = []
        self.consumed: list[Slot] = []
        self.removed: list[str] = []
        self.fired: list[Event] = []
        self.moved: list[Moved] = []
        self.asks = False
        self.makes_state = False

    def body(self, *flat: Any) -> list[Tensor]:
        """Run the body on stand-ins for all inputs; return the graph's outputs, as `Traced` tells them.

        What is done here to stand-ins is recorded too, in this order: first the body, then the copies that
        turn what the body has replaced into changes in place, then those that undo a skipped update.
        """
        inputs = self.inputs
        changing = flat[len(inputs.fixed) :]
        versions = [tensor._version for tensor in changing]
        placed = self._place(flat)
        weights = [(leaf, leaf.untyped_storage()._cdata, leaf._version) for leaf in placed.leaves.values()]
        stepped: dict[str | None, dict[str, None]] = {}
        for name, optimizer in placed.optimizers.items():
            note_steps(name, optimizer, stepped)
        options_before = {name: seen_of(optimizer) for name, optimizer in placed.optimizers.items()}
        for leaf, gradient in placed.waiting.items():
            leaf.grad = gradient
        state, given = StepState(dict(placed.entries)), {name: contents(each) for name, each in placed.entries.items()}
        stand_ins = list(tensors(placed.entries))
        buffers = self._copied() if inputs.phase.gradients else []
        learner = StandIn(inputs.learner, inputs.phase, state, placed.leaves, placed.optimizers, placed.numbers)
        with noting_reads(inputs.holders) as self.reads, dropping(inputs.phase, inputs.slots, placed.leaves):
            inputs.phase.body(learner, learner.scope.handle, state)
        learner.accelerator.end_casting()
        self.moved = move(learner, inputs.averages, placed.numbers)
        self.fired, self.fits = learner.fired, fits(inputs.slots, learner.updates)
        self._note_gradients(learner, placed, stepped)
        # assigning .data leaves the tensor and its version as they are; its memory is another one
        if any(leaf.untyped_storage()._cdata != memory for leaf, memory, _ in weights):
            raise refusal(inputs.phase, ASSIGNS_DATA)
        self.makes_state = getattr(learner.updates, "lacks_agreement", False)
        self._copy_replaced(placed)
        for slot in inputs.slots:
            optimizer = placed.optimizers[slot.name]
            self._copy_replaced_state(slot.optimizer, optimizer, placed)
            self._check_options(slot, stepped, differing(options_before[slot.name], seen_of(optimizer)))
        self.changed = [n for n, (t, before) in enumerate(zip(changing, versions, strict=True)) if t._version != before]
        self.changed_weights = {p for p, (leaf, _, n) in zip(placed.leaves, weights, strict=True) if leaf._version != n}
        self._note_entries(given, stand_ins, state, {id(changing[number]) for number in self.changed})
        for each in buffers:
            learner.accelerator.restore(*each)
        self.looks = learner.finite.looks
        left_out = learner.left_out()
        self.asks = bool(left_out)
        found = [*learner.finite.found(), *learner.told(), *left_out]
        self.messages = learner.messages()
        stored = [tensor for value in self.stored.values() for tensor in tensors(value)]
        waiting = self._waiting(learner, placed)
        outputs = (*found, *stored, *apart(waiting, [*flat, *found, *stored]))
        return [tensor.detach() for tensor in outputs]

    def _place(self, flat: tuple[Any, ...]) -> Placed:
        """Put stand-ins into the places of all inputs; `attributes_unchanged` undoes it."""
        inputs = self.inputs
        each = iter(flat)
        by_id = {id(tensor): next(each) for tensor in inputs.fixed}
        options = {(id(group), name): next(each) for group, name, _ in inputs.options}
        held = [next(each) for _ in inputs.held]
        for (number, name), stand_in in zip(inputs.held, held, strict=True):
            object.__setattr__(inputs.holders[number], name, stand_in)
        leaves: dict[Any, Tensor] = {}
        for part in inputs.parts:
            for parameter in part._parameters.values():
                if parameter is not None and parameter not in leaves:
                    leaf = leaves[parameter] = by_id[id(parameter)].detach()
                    # whoever changes the detached one in place changes the input, whose memory it shares
                    leaf.requires_grad_(parameter.requires_grad and inputs.phase.gradients)
        of_places = [leaves[t] if isinstance(t, nn.Parameter) else by_id[id(t)] for *_, t in inputs.places]
        for (place, name, _), stand_in in zip(inputs.places, of_places, strict=True):
            place[name] = stand_in
        return Placed(
            by_id=by_id,
            of_places=of_places,
            held=held,
            leaves=leaves,
            optimizers={slot.name: stand_in_of(slot.optimizer, leaves, by_id, options) for slot in inputs.slots},
            entries={name: map_tensors(lambda _: next(each), value) for name, value in inputs.entries.items()},
            waiting={leaves[parameter]: next(each) for parameter in inputs.waiting},
            numbers={number.place: next(each) for number in inputs.numbers},
        )

    def _waiting(self, learner: StandIn, placed: Placed) -> list[Tensor]:
        """Return the gradients that wait after the step, those of each optimizer followed by what its batches weigh."""
        found: list[Tensor] = []
        for after in self.waiting_after:
            for leaf in (placed.leaves[parameter] for parameter in after.parameters):
                if leaf.grad is not None:  # each has one
                    before = None if after.begun else placed.waiting.get(leaf)
                    found.append(learner.accelerator.unless_skipped(before, leaf.grad))
            found += [value for value in after.changed.values() if isinstance(value, Tensor)]
        return found

    def _copied(self) -> list[tuple[list[Tensor], list[Tensor], list[int]]]:
        """Copy the buffers of each module, to restore them where an update is skipped; return versions too."""
        places = [[b for b in part._buffers.values() if b is not None] for part in self.inputs.parts if part._buffers]
        return [(held, [b.clone() for b in held], [b._version for b in held]) for held in places]

    def _note_gradients(self, learner: StandIn, placed: Placed, stepped: Iterable[str | None]) -> None:
        """Note what becomes of gradients that wait, and which an update has used.

        Raises:
            CompileError: Some that were computed by hand would be lost.
        """
        before = placed.waiting
        numbers = {placed.numbers[number.place]: number for number in self.inputs.numbers}
        for slot, now in zip(self.inputs.slots, learner.updates.slots, strict=True):
            if now.consumed:
                self.consumed.append(slot)
            waits, begun = now.first_step is not None, now.first_step is learner.step
            leaves = [leaf for leaf in now.parameters if leaf.grad is not None]
            # learner.backward opens a window; gradients without one come from a loss.backward() of the user's
            if slot.first_step is None and not waits:
                if leaves and slot.name not in stepped:
                    raise refusal(
                        self.inputs.phase,
                        "it computes gradients by hand, and leaves them for a later step; call "
                        "learner.backward(loss) instead of loss.backward()",
                    )
                continue
            counted, changed = window_after(now, begun, learner.accelerator.carried, numbers) if waits else (0, {})
            if begun or not waits or counted or any(leaf.grad is not before.get(leaf) for leaf in now.parameters):
                own = dict(zip(now.parameters, slot.parameters, strict=True))
                parameters = [own[leaf] for leaf in leaves] if waits else []
                after = WaitingGradients(slot, parameters, waits, begun, now.in_block, counted, changed)
                self.waiting_after.append(after)

    def _note_entries(
        self, given: dict[str, Any], stand_ins: list[Tensor], state: StepState, changed: set[int]
    ) -> None:
        """Note which entries the body stored and removed, of those before it; some were changed in place.

        Raises:
            CompileError: No graph can store one, or change it in place.
        """
        vars(state).pop("grads", None)  # a view of the gradients, which are gone when the graph has run
        for name, value in vars(state).items():
            if name not in given or contents(value) != given[name]:  # a dict may be the one given, with others in it
                form_of(value, f"the entry {name!r} that it stores")
                self.stored[name] = value
        self.removed = [name for name in given if name not in vars(state)]
        originals = [tensor for value in self.inputs.entries.values() for tensor in tensors(value)]
        if any(id(new) in changed and not old.is_contiguous() for new, old in zip(stand_ins, originals, strict=True)):
            raise refusal(
                self.inputs.phase,
                "it changes an entry in place whose rows have gaps in memory; give it .contiguous()",
            )
        memory = [tensor.untyped_storage()._cdata for tensor in originals]
        if any(id(new) in changed and memory.count(place) > 1 for new, place in zip(stand_ins, memory, strict=True)):
            raise refusal(
                self.inputs.phase,
                "it changes an entry in place that is another entry too, or shares memory with one; give it a copy "
                "(.clone())",
            )

    def _copy_replaced(self, placed: Placed) -> None:
        """Copy what the body put in the place of buffers, and of tensors of the holders, into these.

        Raises:
            CompileError: It replaced a tensor that has to stay, or by one of another shape.
        """
        inputs = self.inputs
        buffers = {id(part._buffers) for part in inputs.parts}
        for (place, name, _), stand_in in zip(inputs.places, placed.of_places, strict=True):
            # a buffer that forward computes anew (`self.count = self.count + 1`) is common; parameters have to stay
            now = place.get(name)
            if now is not stand_in and not (id(place) in buffers and replaces(now, stand_in)):
                raise refusal(
                    inputs.phase,
                    f"it puts something else in the place of the tensor {name!r} of a module; change it in place, or "
                    "register it as a buffer",
                )
        for (number, name), stand_in in zip(inputs.held, placed.held, strict=True):
            now = getattr(inputs.holders[number], name, None)
            if now is not stand_in and not replaces(now, stand_in):
                raise refusal(inputs.phase, f"it changes the shape of {type(inputs.holders[number]).__name__}.{name}")

    def _copy_replaced_state(self, optimizer: Optimizer, stand_in: Optimizer, placed: Placed) -> None:
        """Copy state that an optimizer's step replaced into what was there before; note where it made some.

        Raises:
            CompileError: It counts in Python.
        """
        for parameter, leaf in placed.leaves.items():
            before, now = optimizer.state.get(parameter, {}), stand_in.state.get(leaf, {})
            for name, value in now.items():
                old = before.get(name)
                if isinstance(value, Tensor) and isinstance(old, Tensor):
                    if value is not placed.by_id[id(old)]:
                        placed.by_id[id(old)].copy_(value)
                # a state that a graph made would be lost: its outputs are entries and gradients alone
                elif isinstance(value, Tensor) or (name not in before and value is not None):
                    self.makes_state = True
                elif value != old:
                    raise refusal(
                        self.inputs.phase,
                        f"{type(optimizer).__name__} counts {name!r} in Python; expected an optimizer that keeps "
                        "tensors, as torch's do",
                    )

    def _check_options(self, slot: Slot, stepped: dict[str | None, dict[str, None]], written: list[str]) -> None:
        """Raise for what a step changes of an optimizer in Python.

        Args:
            slot: The optimizer.
            stepped: What the steps of each optimizer changed, by its name.
            written: What has changed of this one, by its own step or otherwise.

        Raises:
            CompileError: Names what was changed, and by whom.
        """
        if stepped.get(slot.name):
            changed = ", ".join(stepped[slot.name])
            raise refusal(self.inputs.phase, f"{slot.label} changes {changed} in Python; expected it to keep tensors")
        if written:
            raise writes_options(self.inputs.phase, slot, written)


def apart(found: list[Any], others: list[Any]) -> list[Tensor]:
    """Return tensors that share memory neither with each other nor with others: copies of those that do."""
    known = {other.untyped_storage()._cdata for other in others}
    given = []
    for tensor in found:
        memory = tensor.untyped_storage()._cdata
        given.append(tensor.clone() if memory in known else tensor)
        known.add(memory)
    return given


def replaces(now: Any, stand_in: Tensor) -> bool:
    """Copy into a stand-in what was put in its place; return whether that can be done."""
    if not isinstance(now, Tensor) or (now.shape, now.dtype) != (stand_in.shape, stand_in.dtype):
        return False
    stand_in.copy_(now.detach())
    return True
