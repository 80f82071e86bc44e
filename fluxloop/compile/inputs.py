"""Where the inputs of a step's graph come from, and whether a graph can have them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from attrs import define
from torch import Tensor, nn

from fluxloop.callback import Callback
from fluxloop.compile.conditions import holders_of
from fluxloop.compile.hooks import places, why_not
from fluxloop.compile.optimizer_stand_in import OPTIONS, as_tensor, is_input
from fluxloop.compile.refusals import changes_python, refusal
from fluxloop.compile.step_averages import averages_of, numbers_of
from fluxloop.compile.windows import Number, carried
from fluxloop.compute.recompute import recomputed_parts
from fluxloop.compute.slots import Slot
from fluxloop.nested import tensors
from fluxloop.order.averages import StepAverage
from fluxloop.persist.attributes import attributes
from fluxloop.phase import Phase
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

NUMBERS = (type(None), bool, int, float, str)
"""Types that an optimizer's state may have besides tensors."""


@define(eq=False)
class Inputs:
    """Where the inputs of a step's graph come from.

    Args:
        learner: Whose step it is.
        phase: The running phase.
        parts: Every module that the step may run, inner ones too.
        slots: The optimizers that it may step; none in a phase without gradients.
        places: Where the modules hold tensors: the dict, the name in it, and the tensor.
        fixed: Parameters, buffers and other tensors of modules, and the optimizers' state.
        options: Of the optimizers, those that may change from step to step: the group, the name, and a tensor of it.
        holders: The phase, phases that it holds, and the callbacks with handlers that are part of the graph.
        held: Tensors that the holders hold, as (number of the holder, attribute).
        entries: Of the step, before its body runs.
        waiting: Parameters whose gradients wait for an update when the step begins.
        numbers: That the updates of several batches or processes rest on, and averages of weights.
        averages: That the graph moves.
    """

    learner: RunLearner
    phase: Phase
    parts: list[nn.Module]
    slots: tuple[Slot, ...]
    places: list[tuple[dict[str, Any], str, Tensor]]
    fixed: list[Tensor]
    options: list[tuple[dict[str, Any], str, Tensor]]
    holders: list[Any]
    held: list[tuple[int, str]]
    entries: dict[str, Any]
    waiting: list[nn.Parameter]
    numbers: list[Number]
    averages: list[StepAverage]

    def tensors(self) -> list[Any]:
        """Return the inputs in the order of the graph: fixed ones first, then what changes from step to step."""
        return [
            *self.fixed,
            *(option for *_, option in self.options),
            *(getattr(self.holders[number], name) for number, name in self.held),
            *(tensor for value in self.entries.values() for tensor in tensors(value)),
            *(parameter.grad for parameter in self.waiting),
            *(number.now() for number in self.numbers),
        ]


def inputs_of(
    learner: RunLearner, phase: Phase, modules: list[nn.Module], callbacks: list[Callback], state: StepState
) -> Inputs:
    """Find the inputs of a step's graph.

    Raises:
        CompileError: There is something that no graph can have as an input.
    """
    parts = [part for module in modules for part in module.modules()]
    slots = learner.updates.slots if phase.gradients else ()
    # a module may hold tensors as plain attributes too: a mask, or statistics that it counts by itself
    places = [
        (where, name, tensor)
        for part in parts
        for where in (part._parameters, part._buffers, vars(part))
        for name, tensor in where.items()
        if isinstance(tensor, Tensor)
    ]
    states = [entries for slot in slots for entries in slot.optimizer.state.values()]
    holders: list[Any] = [*holders_of(phase), *callbacks]
    averages = list(averages_of(learner, type(phase)).values())
    inputs = Inputs(
        learner=learner,
        phase=phase,
        parts=parts,
        slots=slots,
        places=places,
        fixed=unique(  # a tensor in two places, such as a shared weight, is one input
            [
                *(tensor for *_, tensor in places),
                *(parameter for slot in slots for parameter in slot.parameters),
                *(value for entries in states if isinstance(entries, dict) for value in entries.values()),
            ]
        ),
        options=[
            (group, name, as_tensor(group, name))
            for slot in slots
            for group in slot.optimizer.param_groups
            for name in OPTIONS
            if is_input(slot.optimizer, group, name)
        ],
        holders=holders,
        held=[
            (number, name)
            for number, holder in enumerate(holders)
            for name, value in attributes(holder).items()
            if isinstance(value, Tensor)
        ],
        entries=dict(vars(state)),
        waiting=[parameter for slot in slots for parameter in slot.waiting],
        numbers=[*carried(learner), *numbers_of(averages, learner.accelerator.device)] if phase.gradients else [],
        averages=averages,
    )
    check(inputs)
    return inputs


def check(inputs: Inputs) -> None:
    """Raise for inputs that no graph can have.

    Raises:
        CompileError: Sparse gradients wait, somebody hooks into the step, an optimizer is not stepped as torch's are,
            or tensors share memory.
    """
    waiting = [parameter.grad for parameter in inputs.waiting]
    if any(gradient.layout is not torch.strided for gradient in waiting if gradient is not None):  # each has one
        raise refusal(inputs.phase, "sparse gradients wait for an update, which a graph cannot add to")
    check_hooks(inputs)
    again = [type(part).__name__ for part in recomputed_parts(*inputs.parts)]
    if again:
        raise refusal(
            inputs.phase,
            f"recompute_activations was called for {', '.join(dict.fromkeys(again))}, and a graph holds forward and "
            "backward as one; leave that call out, or compile='step' (compile='model' works with it)",
        )
    check_optimizers(inputs)
    computed = [
        f"{type(part).__name__}.{name}"
        for part in inputs.parts
        for name, value in vars(part).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    if computed:  # by the step before
        raise changes_python(inputs.phase, computed)
    shared = overlapping(inputs.fixed)
    if shared:
        raise refusal(inputs.phase, f"tensors of shapes {shared} share memory; give each its own (.clone())")


def check_hooks(inputs: Inputs) -> None:
    """Raise for hooks, which a graph would call while it is traced and never again.

    Raises:
        CompileError: Names what they are on, and the hooks.
    """
    why = why_not(places(inputs.parts, inputs.learner.updates.names, inputs.slots))
    if why is not None:
        raise refusal(inputs.phase, why)


def check_optimizers(inputs: Inputs) -> None:
    """Raise for optimizers that are not stepped as torch's are.

    Raises:
        CompileError: Somebody replaced the step of one, or its state is more than tensors and numbers.
    """
    for slot in inputs.slots:
        step = vars(slot.optimizer).get("step")
        if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):  # torch's schedulers count there
            raise refusal(
                inputs.phase, f"the step of {slot.label} was replaced by {step!r}; put the optimizer's own back"
            )
        entries = [e for p, e in slot.optimizer.state.items() if isinstance(p, Tensor) and isinstance(e, dict)]
        odd = [v for each in entries for v in each.values() if not isinstance(v, (Tensor, *NUMBERS))]
        if odd or len(entries) != len(slot.optimizer.state):
            raise refusal(
                inputs.phase,
                f"{slot.label}, a {type(slot.optimizer).__name__}, keeps more than tensors and numbers for each "
                "parameter",
            )


def unique(found: list[Any]) -> list[Tensor]:
    """Return the tensors among some things, each once."""
    return list({id(thing): thing for thing in found if isinstance(thing, Tensor)}.values())


def overlapping(found: list[Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes of two tensors that share memory; none where each has its own."""
    spans = []
    for tensor in found:
        if tensor.layout is torch.strided and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), tensor.shape))
    spans.sort()
    pairs = ([tuple(a[2]), tuple(b[2])] for a, b in pairwise(spans) if b[0] < a[1])
    return next(pairs, [])
