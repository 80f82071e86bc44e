"""One compiled step: the graph of a phase's body, called instead of the body."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fluxloop.callback import Callback
from fluxloop.compile import kept
from fluxloop.compile.averaging import check_told
from fluxloop.compile.comparison import Comparison
from fluxloop.compile.direct import Call, Compiled
from fluxloop.compile.fx import draws_normal, write_out_factors
from fluxloop.compile.misfit import Holders, Options, Reads, as_now
from fluxloop.compile.places import PLACE, STORAGE, Memory
from fluxloop.compile.refusals import WAYS_OUT, first_line, refusal
from fluxloop.compile.replay import Replayed, can_replay
from fluxloop.compile.stand_ins import Look
from fluxloop.compile.step_averages import averages_of
from fluxloop.compile.tracing import Traced
from fluxloop.compute.finite import bad_gradients
from fluxloop.errors import CancelSignal, CompileError
from fluxloop.events import Event, UpdateBegin, UpdateEnd
from fluxloop.nested import map_tensors, tensors
from fluxloop.order.runner import Bound, deliver
from fluxloop.phase import Phase
from fluxloop.processes.agree import CANCEL
from fluxloop.randomness import generator_states, put_generators
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


ORDERED: dict[str, Any] = {} if torch.__version__ >= "2.12" else {"max_fusion_size": 1}
"""Options for the CPU. Before 2.12, TorchInductor forgets in fused loops which operations have to come before a tensor
is changed in place: gradients, and the loss, were computed from weights that the step had changed already."""


def lower(graph: GraphModule, inputs: list[Any], device: torch.device) -> Compiled:
    """Compile a graph of tensor operations into a function of the same inputs, or find what was compiled before.

    On the CPU with inductor's wrapper in C++, which calls its kernels without Python in between.
    """
    write_out_factors(graph)
    if device.type != "cpu":
        return by_torch(graph, inputs, {})
    if any(tensor.is_complex() for tensor in inputs):  # the wrapper in C++ knows no such operations
        return by_torch(graph, inputs, {**ORDERED, **layout_options()})
    options = {"cpp_wrapper": True, **ORDERED}
    if any(map(draws_normal, graph.graph.nodes)):
        # by torch's own kernels, which take a fifth of the time; uniform ones are drawn quicker by the compiler's
        options["fallback_random"] = True
    name = kept.name_of(graph, inputs, (*options, "layouts"))
    found = None if name is None else kept.find(name)
    if found is not None:
        return found
    before = kept.modules_made()
    compiled = by_torch(graph, inputs, {**options, **layout_options()})
    return compiled if name is None else kept.fresh(compiled, name, before)


def layout_options() -> dict[str, Any]:
    """Return the options for layouts: see `layouts`, which imports the compiler."""
    from fluxloop.compile.layouts import layout_options

    return layout_options()


def by_torch(graph: GraphModule, inputs: list[Any], options: dict[str, Any]) -> Compiled:
    """Have torch compile a graph, or find it among what it keeps on disk."""
    import torch._inductor

    with ExitStack() as around:
        around.enter_context(torch.no_grad())
        for kind in {tensor.device.type for tensor in inputs}:  # the graph has the casts of the step, and no others
            around.enter_context(torch.autocast(kind, enabled=False))
        around.enter_context(warnings.catch_warnings())
        for torchs_own in (DeprecationWarning, FutureWarning):  # about how torch uses torch
            warnings.simplefilter("ignore", torchs_own)
        compiled: Compiled = torch._inductor.compile(graph, inputs, options)
    inner: Compiled = getattr(compiled, "_torchdynamo_orig_callable", compiled)  # without a wrapper for torch.compile
    return inner


class Last:
    """The number that a tensor was last filled with."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Graph:
    """One compiled step: for one form of its entries, and one state of what it rests on.

    Args:
        learner: Whose step it is.
        phase: The phase it was made of.
        callbacks: Those with handlers that are part of it.
        traced: What was made of the phase's body.

    Raises:
        CompileError: It cannot be compiled.
    """

    def __init__(self, learner: RunLearner, phase: Phase, callbacks: list[Callback], traced: Traced) -> None:
        inputs = traced.inputs
        self._learner = learner
        self._whose = repr(phase)
        self._holders = Holders(callbacks)
        self._fixed = inputs.fixed
        self._constants = traced.constants
        self._options = [(group, name, option, Last(as_now(group[name]))) for group, name, option in inputs.options]
        self._held = inputs.held
        self._reads = Reads(traced.reads, inputs.held, inputs.holders)
        self.calls = self._reads.calls
        self._slots = learner.updates.slots if phase.gradients else ()
        self._settings = Options(self._slots, {(id(group), name) for group, name, _ in inputs.options})
        self._stored = [(name, value, plain_keys(value)) for name, value in traced.stored.items()]
        self._removed = traced.removed
        self._waiting, self._waiting_after = inputs.waiting, traced.waiting_after
        self._numbers, self._fits = inputs.numbers, traced.fits
        self._messages = traced.messages
        self._consumed = traced.consumed
        self._looks = traced.looks
        self._events = traced.fired
        self._moved, self._asks = traced.moved, traced.asks
        self._num_updates = sum(isinstance(event, UpdateEnd) for event in traced.fired)
        self._changes = bool(changed := self._changed_by(traced))
        self._callbacks = -1
        self._after: list[tuple[int, tuple[Bound, ...], Event]] = []
        self._memory = Memory(traced)
        self._compiled = Call(self._lower(traced), changed)
        self._comparison = Comparison(traced, self._whose) if learner.accelerator.check_compiled else None
        self._call: Callable[[list[Tensor]], Sequence[Tensor]] = self._call_first

    def _changed_by(self, traced: Traced) -> list[Tensor]:
        """List the weights and averages that the graph changes."""
        ends = [event.name for event in traced.fired if isinstance(event, UpdateEnd)]
        owned = [p for slot in self._slots if slot.name in ends for p in slot.parameters if p.requires_grad]
        weights = [p for p in owned if p in traced.changed_weights]
        return [*weights, *(tensor for moved in traced.moved for tensor in moved.tensors(self._learner))]

    def _lower(self, traced: Traced) -> Compiled:
        """Compile a step.

        Raises:
            CompileError: It cannot be compiled.
        """
        try:
            compiled = lower(traced.graph, traced.example, self._learner.accelerator.device)
        except Exception as error:
            raise CompileError(
                f"the step of {self._whose} was traced, but could not be compiled: {first_line(error)}. Compiling "
                "needs a C++ compiler (g++ or clang++) on the CPU, Triton on CUDA; where there is one, an operation "
                f"of the step stands in the way. {WAYS_OUT}"
            ) from error
        if can_replay(traced.example):
            return Replayed(compiled, len(traced.inputs.fixed), traced.changed)
        return compiled

    def calls_the_same(self, phase: Phase) -> bool:
        """Return whether the functions and objects that a step calls, such as what makes views, are as they were."""
        return self._reads.calls_the_same(self._holders.of(phase))

    def misfit(self, phase: Phase) -> str | None:
        """Return what of a phase, or of the optimizers' options, is not as it was when the step was traced."""
        why = None if self._reads.is_empty else self._reads.misfit(self._holders.of(phase))
        why = why or self._settings.misfit()
        if why is None and self._fits:
            why = next((why for fit in self._fits if (why := fit.misfit())), None)
        return why

    def _inputs(self, phase: Phase, entries: dict[str, Any]) -> list[Any]:
        """Return the inputs for a step."""
        inputs: list[Any] = [*self._fixed]
        for group, name, option, last in self._options:
            value = group[name]
            if isinstance(value, Tensor) or value != last.value:
                last.value = as_now(value)
                put(option, value)
            inputs.append(option)
        if self._held:
            holders = self._holders.of(phase)
            inputs += [getattr(holders[number], name) for number, name in self._held]
        for value in entries.values():
            if type(value) is Tensor:
                inputs.append(value)
            else:
                inputs.extend(tensors(value))
        if self._waiting:
            inputs += [parameter.grad for parameter in self._waiting]
        if self._numbers:
            inputs += [number.now() for number in self._numbers]
        inputs += self._constants
        return inputs

    def run(self, phase: Phase, state: StepState) -> None:
        """Run the step: change what it changes, and store its entries."""
        learner, entries = self._learner, vars(state)
        inputs = self._inputs(phase, entries)
        memory = self._memory
        if memory.is_particular or not memory.places.isdisjoint(map(PLACE, map(STORAGE, inputs[memory.given]))):
            why = memory.misfit(inputs)
            if why is not None:
                raise refusal(phase, why)
        if self._messages:
            learner.accelerator.group.agreement.before_graph(learner, [message.places for message in self._messages])
        given = iter(self._call(inputs))
        for slot in self._slots:
            if "step" in vars(slot.optimizer):  # wrapped by a scheduler of torch's, which notes that there was one
                slot.optimizer._opt_called = True  # where torch looks
        bad = next(given) if self._looks else None
        found = [next(given) for _ in self._looks]
        if self._messages:
            self._hear(phase, next(given).tolist(), bad, found)
        left_out = self._left_out(next(given).tolist()) if self._asks else frozenset()
        for name, value, keys in self._stored:
            if isinstance(value, Tensor):
                entries[name] = next(given)
            elif keys is not None:
                entries[name] = {key: next(given) for key in keys}
            else:
                entries[name] = map_tensors(lambda _: next(given), value)
        for name in self._removed:
            del entries[name]
        if bad is not None and bad.is_cpu and bad.item():
            self._end_early(phase, found)
            self._stop(found, learner.where(), True)
        elif bad is not None and not bad.is_cpu:
            learner.host(bad, partial(self._stop, found, learner.where()))
        for waiting in self._waiting_after:
            waiting.store(state, phase.name, given)
        for slot in self._consumed:
            slot.consumed = True
        self._note_changes(phase, left_out)
        if self._callbacks != learner.callbacks.version:
            self._callbacks, self._after = learner.callbacks.version, listeners(learner, phase, self._events)
        for number, bound, event in self._after:
            if number not in left_out:
                deliver(bound, event, phase, learner)

    def _left_out(self, by_event: list[bool]) -> frozenset[int]:
        """Return the numbers of the events of updates that a handler has left out, of what was told of each event."""
        found: set[int] = set()
        begun: dict[str | None, int] = {}
        for number, event in enumerate(self._events):
            if isinstance(event, UpdateBegin):
                begun[event.name] = number
            elif isinstance(event, UpdateEnd) and by_event[number]:
                found |= {number, begun.get(event.name, number)}
        return frozenset(found)

    def _note_changes(self, phase: Phase, left_out: frozenset[int]) -> None:
        """Note which weights and averages the graph has changed; an update that is left out is none."""
        if self._changes:
            num_left_out = sum(isinstance(self._events[number], UpdateEnd) for number in left_out)
            self._learner.updates.count += self._num_updates - num_left_out
        for moved in self._moved:
            if moved.num_events not in left_out:
                moved.of.note(phase)

    def _call_first(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run the graph for the first time; where it cannot run, set everything as it was.

        Its inputs are copied to the host for this one call: a graph does not tell all that it changes.

        Raises:
            CompileError: An operation in it cannot be run as it was compiled.
            UserWarning: It was compared with eager operations, and warnings are errors.
        """
        before = [tensor.detach().to("cpu", copy=True) for tensor in inputs]
        generators = generator_states()
        if self._comparison is not None:
            self._comparison.run(inputs)
        try:
            outputs = self._compiled.first(inputs, len(self._fixed))
            if self._comparison is not None:
                self._comparison.tell(inputs, outputs)
        except Exception as error:
            with torch.no_grad():
                for tensor, old in zip(inputs, before, strict=True):
                    if not torch.equal(tensor, old.to(tensor.device)):  # what overlaps itself cannot be copied to
                        tensor.copy_(old)
            put_generators(generators)
            if isinstance(error, (torch.cuda.OutOfMemoryError, Warning)):
                raise  # the graph can run, and callers know what this is, or have warnings be errors
            raise CompileError(
                f"the step of {self._whose} was compiled, but cannot be run: {first_line(error)}. Nothing was changed. "
                f"{WAYS_OUT}"
            ) from error
        self._call, self._comparison = self._compiled, None  # which holds copies of the inputs
        return outputs

    def _hear(self, phase: Phase, told: list[list[float]], bad: Tensor | None, found: list[Tensor]) -> None:
        """Take note of what the processes have told each other in the graph.

        Raises:
            OptimizerError: They update other parameters than one another.
            CancelSignal: One of them leaves the step out, or ends the epoch or the fit.
        """
        learner, signal = self._learner, None
        votes = [numbers[2:] for numbers in told]
        for message, (fine, weight, *wanted) in zip(self._messages, told, strict=True):
            check_told(fine, self._whose)
            if wanted[CANCEL] > 0:
                learner.updates.count += self._end_at(phase, message.num_events)
                if bad is not None and bad.item():
                    try:
                        self._stop(found, learner.where(), True)
                    except CancelSignal as mine:
                        signal = mine
                break
            learner.updates.balance([weight])
        learner.accelerator.group.agreement.after_graph(learner, votes, signal)

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
        """Note what a step did before it found something not to be finite: the updates before that have been made."""
        self._end_at(phase, self._first_bad(found)[0].num_events)

    def _end_at(self, phase: Phase, num_events: int) -> int:
        """Note what a step did until it had fired so many events; return how many updates that were."""
        events = self._events[:num_events]
        ended = [slot for slot in self._slots if slot.end in events]
        for slot in ended:
            slot.end_gradients()
        for moved in self._moved:
            if moved.num_events < num_events:
                moved.of.note(phase)
        for _, bound, event in listeners(self._learner, phase, events):
            deliver(bound, event, phase, self._learner)
        return len(ended)


def put(option: Tensor, value: Any) -> None:
    """Put the value of an option, a number, a tensor or two betas, into the graph's input."""
    if isinstance(value, Tensor):
        option.copy_(value.reshape(()))
    elif isinstance(value, (tuple, list)):
        option.copy_(torch.tensor(value, dtype=option.dtype))
    else:
        option.fill_(value)


def plain_keys(value: Any) -> list[Any] | None:
    """Return the keys of a dict of tensors, as the losses of several optimizers are; None for anything else."""
    return list(value) if type(value) is dict and all(isinstance(item, Tensor) for item in value.values()) else None


def listeners(learner: RunLearner, phase: Phase, events: list[Event]) -> list[tuple[int, tuple[Bound, ...], Event]]:
    """Return the handlers that are called once a step's graph has run, with their events and the numbers of these."""
    noting = {node.id for node in learner.callbacks.graph.nodes if node.callback.in_compiled_step == "after"}
    noting -= averages_of(learner, type(phase)).keys()  # they are told what the graph has done
    table = learner.callbacks.table(type(phase))
    found = [
        (number, tuple(bound for bound in table[type(event)] if bound[2] in noting), event)
        for number, event in enumerate(events)
    ]
    return [(number, bound, event) for number, bound, event in found if bound]
