"""What a graph rests on: what Python saw of models, phase and optimizers while the step was traced.

A graph is called only where all of that is as it was; else the step is traced anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from fluxloop.compile.step_averages import averaged_modules
from fluxloop.errors import CompileError, describe
from fluxloop.events import StepBegin, StepEnd
from fluxloop.nested import init_fields
from fluxloop.persist.attributes import OF_EVERY_MODULE, attributes
from fluxloop.persist.seen import Same, seen
from fluxloop.phase import Phase
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

MODULE_INTERNALS = OF_EVERY_MODULE - {"training"} | {"_flat_weights", "_flat_weight_refs"}
"""Attributes of modules that are no numbers of the user's, but torch's; a recurrent layer's lists too."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of modules that hold hooks; those of all modules have the same names after ``_global``."""

STEP_HOOKS = (
    "_backward_hooks",
    "_post_accumulate_grad_hooks",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
)
"""Attributes of parameters and optimizers that hold hooks."""


# The form of a step: what makes it another graph


def form_of(value: Any, whose: str = "it") -> Any:
    """Return the form of a value: the shapes of the tensors in it, and what everything else in it says.

    Raises:
        CompileError: There is something else in it than tensors, numbers, texts and containers of them.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            raise CompileError(
                f"{whose} holds a {'nested' if value.is_nested else 'sparse'} tensor, which a compiled step cannot "
                "take; expected a dense one (.to_dense(), or padded), or compiled = False in the phase's class"
            )
        if value.is_neg() or value.is_conj():  # a compiled step reads memory, where the sign is another one
            raise CompileError(
                f"{whose} holds a view of conjugated numbers, which a compiled step would read without their sign; "
                "expected numbers of its own (.resolve_conj().resolve_neg())"
            )
        form = value.shape, value.stride(), value.dtype, value.device, value.requires_grad
        kind = type(value)
        if kind in (Tensor, nn.Parameter):
            return form
        if computes_otherwise(kind):
            raise CompileError(
                f"{whose} holds a {kind.__name__}, which says by __torch_function__ what functions of torch's compute, "
                "and a compiled step would not ask it; expected a plain tensor (.as_subclass(torch.Tensor)), or "
                "compiled = False in the phase's class"
            )
        return *form, kind
    if isinstance(value, float):
        return float, repr(value)  # NaN is NaN
    if value is None or isinstance(value, (bool, int, str, bytes, torch.dtype, torch.device)):
        return type(value), value
    fields = init_fields(value)
    if isinstance(value, Mapping):
        return type(value), tuple([(key, form_of(item, whose)) for key, item in value.items()])
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        return type(value), tuple([form_of(item, whose) for item in value])
    if fields is not None:
        return type(value), tuple([(name, form_of(getattr(value, name), whose)) for name in fields])
    raise CompileError(
        f"{whose} holds {describe(value)}, which a compiled step cannot take; expected tensors, numbers and "
        "texts, in tuples, lists, dicts or dataclasses"
    )


def computes_otherwise(kind: type[Tensor]) -> bool:
    """Return whether a subclass of tensors has a word in what functions of torch's compute with it."""
    own = kind.__mro__[: kind.__mro__.index(Tensor)]
    says = [vars(each)["__torch_function__"] for each in own if "__torch_function__" in vars(each)]
    return bool(says) and says[0] is not torch._C._disabled_torch_function_impl


def form_of_entries(state: StepState, device: torch.device) -> Any:
    """Return the form of a step's entries and of what autocast does; steps of equal forms share a graph.

    Raises:
        CompileError: An entry holds what no graph can take.
    """
    entries = vars(state)
    found: list[Any] = []
    for name, value in entries.items():
        if (
            type(value) is Tensor
            and value.layout is torch.strided
            and not (value.is_nested or value.is_neg() or value.is_conj())
        ):  # as `form_of` does, without a call: this runs at every step
            found.append((name, value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
        else:
            found.append((name, form_of(value, f"the entry {name!r}")))
    if len({*map(id, entries.values())}) < len(entries):  # entries that are one tensor are so in the graph too
        values = list(entries.values())
        found.append(tuple([i for i, value in enumerate(values) if any(other is value for other in values[:i])]))
    if torch.is_autocast_enabled(device.type):
        found.append(torch.get_autocast_dtype(device.type))
    return tuple(found)


def has_form(entries: dict[str, Any], form: Any, device: torch.device) -> bool:
    """Return whether a step's entries have a form that `form_of_entries` gave.

    It is asked at every step, so it calls nothing, and finds it out for tensors, and tuples of them, alone; of anything
    else, and of tensors that `form_of` refuses, it says False.
    """
    if len(entries) != len(form) or torch.is_autocast_enabled(device.type):
        return False
    for (name, value), expected in zip(entries.items(), form, strict=True):
        if type(value) is Tensor:
            if value.layout is not torch.strided or value.is_nested or value.is_neg() or value.is_conj():
                return False
            now: Any = name, value.shape, value.stride(), value.dtype, value.device, value.requires_grad
        elif type(value) is tuple:
            parts: list[Any] = []
            for item in value:
                if type(item) is not Tensor or item.layout is not torch.strided or item.is_nested:
                    return False
                if item.is_neg() or item.is_conj():
                    return False
                parts.append((item.shape, item.stride(), item.dtype, item.device, item.requires_grad))
            now = name, (tuple, tuple(parts))
        else:
            return False
        if expected != now:
            return False
    return len({*map(id, entries.values())}) == len(entries)  # two that are one tensor are another form


def form_of_gradient(parameter: nn.Parameter) -> Any:
    """Return the form of a parameter's gradient: whether there is one, and how it lies in memory."""
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided:
        return gradient is None
    return gradient.shape, gradient.stride(), gradient.dtype


def entries_of_other_form(before: tuple[Any, ...], now: tuple[Any, ...]) -> list[str]:
    """Return the names of the entries whose forms differ."""
    old = {part[0]: part for part in before if isinstance(part, tuple) and part and isinstance(part[0], str)}
    new = {part[0]: part for part in now if isinstance(part, tuple) and part and isinstance(part[0], str)}
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


# Objects that a step may use


def holders_of(phase: Phase) -> list[Phase]:
    """List a phase and the phases that it holds, as the validation twin of one does."""
    return [phase, *(value for value in vars(phase).values() if isinstance(value, Phase))]


def modules_of(learner: RunLearner, phase: Phase) -> list[nn.Module]:
    """List the models, the loss function where it is a module, a phase's own, and copies that it runs or moves."""
    copies = learner.weights.copies(phase.model_view).values() if phase.model_view else ()
    own = [value for holder in holders_of(phase) for value in attributes(holder).values()]
    held = (value for value in own if isinstance(value, nn.Module))
    return [*learner.modules(), *copies, *held, *averaged_modules(learner, phase)]


def has_hooks(thing: Any) -> bool:
    """Return whether a parameter or an optimizer has hooks."""
    return any(getattr(thing, name, None) for name in STEP_HOOKS)


# What is compared


def rests_on(learner: RunLearner, phase: Phase) -> dict[str, Any]:
    """Describe what Python sees of models, loss function and optimizers while a step is traced, by name."""
    found: dict[str, Any] = {}
    for number, module in enumerate(modules_of(learner, phase)):
        for path, part in module.named_modules():
            name = f"{number}.{path}".rstrip(".")
            found[f"the module {name}"] = Same(part), type(part)
            for attribute, value in vars(part).items():
                if attribute not in MODULE_INTERNALS:
                    found[f"{name}.{attribute}"] = tensor_or_seen(value)
            for attribute, tensor in (*part._parameters.items(), *part._buffers.items()):
                found[f"{name}.{attribute}"] = tensor_or_seen(tensor)
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
    """Describe the tensors in the optimizers' states by parameter; those without any are left out."""
    found: dict[str, Any] = {}
    for slot in learner.updates.slots:
        # by which tensor it is too: a loaded state has others, and the graph would go on with the old ones
        for index, parameter in enumerate(slot.parameters):
            entries = slot.optimizer.state.get(parameter, {})
            state = [(name, tensor_or_seen(value)) for name, value in entries.items() if isinstance(value, Tensor)]
            if state:
                found[f"{slot.label}, state {index}"] = state
    return found


def tensor_or_seen(value: Any) -> Any:
    """Describe a tensor by which it is and its form, anything else by what Python sees of it."""
    if not isinstance(value, Tensor) or is_lazy(value):
        return seen(value)
    return Same(value), form_of(value)


def changes_between_steps(learner: RunLearner, phase: type[Phase]) -> bool:
    """Return whether somebody may change between two steps what a graph rests on: modes, attributes, hooks.

    That is a user's own `finish`, and callbacks that write to models, loss function or, in a class of the user's,
    optimizers, or read models when a step begins.
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
        kind = type(node.callback)
        written = roots if kind.__module__.startswith("fluxloop.") else {*roots, "optimizer"}
        writes = not node.is_safe or any(not path or path[0] in written for path in node.access.writes)
        reads = any(not path or path[0] in roots for path in node.access.reads)  # and may register hooks
        if (begins and (reads or writes)) or (ends and writes):
            return True
    return False
