"""An optimizer's stand-in, whose step is operations on tensors alone, so that a graph can hold it."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from fluxloop.guard.given import as_python, is_number
from fluxloop.nested import tensors
from fluxloop.persist.seen import seen

DECAY, MOMENTUM, BETAS = "weight_decay", "momentum", "betas"
OPTIONS = ("lr", DECAY, MOMENTUM, BETAS)
"""Options of a group that may be inputs of a graph: those that schedules change."""


def is_input(optimizer: Optimizer, group: dict[str, Any], name: str) -> bool:
    """Return whether an option of a group is an input of the graph; others, and no decay at all, are part of it.

    What a graph computes has to follow from the numbers of the step alone: a resumed run makes it anew.
    """
    value = group.get(name)
    if not group["params"]:
        return False
    if name == MOMENTUM:
        return type(optimizer) is torch.optim.SGD and is_number(value) and bool(value)
    if name == BETAS:
        return takes_betas(optimizer) and all(isinstance(as_python(beta), float) for beta in value or (None,))
    if name == DECAY and not type(optimizer).__module__.startswith("torch.optim."):
        return False  # nobody knows what it does with it
    return (is_number(value) or isinstance(value, Tensor)) and (name == "lr" or bool(value))


def takes_betas(optimizer: Optimizer) -> bool:
    """Return whether an optimizer of torch's computes with betas that are tensors; in older ones none does."""
    takes = inspect.signature(adam).parameters["beta1"].annotation
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and (
        isinstance(optimizer, torch.optim.Adam) and "Tensor" in str(takes)
    )


def as_tensor(group: dict[str, Any], name: str) -> Tensor:
    """Return a number of a parameter group, or two, as a tensor of its own on its parameters' device."""
    parameter = group["params"][0]
    # what is left of 1 when a beta is taken away would have three digits in float32
    is_double = parameter.dtype == torch.float64 or (name == BETAS and parameter.device.type != "mps")
    made = torch.as_tensor(group[name], dtype=torch.float64 if is_double else torch.float32).detach()
    return made.reshape((2,) if name == BETAS else ()).to(parameter.device, copy=True)


def stand_in_of(
    optimizer: Optimizer, leaves: Any, stand_ins: dict[int, Tensor], options: dict[tuple[int, str], Tensor]
) -> Optimizer:
    """Return an optimizer of the same kind and options over stand-ins, whose step is operations on tensors alone.

    Args:
        optimizer: For which it stands.
        leaves: The stand-in of each parameter.
        stand_ins: Those of the tensors in its state, by id.
        options: Those of options that are inputs of the graph, by id of the group and name.
    """
    # without its constructor, which would check and copy the options, and may take other arguments in a subclass
    made: Optimizer = object.__new__(type(optimizer))
    made.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    # `capturable` keeps the counts of steps in tensors; the others choose the one way of stepping that compiles:
    # lists of tensors, which `AsTried` changes one by one
    ways = {"foreach": True, "fused": False, "capturable": True}
    made.param_groups = []
    for group in optimizer.param_groups:
        given: dict[str, Any] = {name: options[id(group), name] for name in group if (id(group), name) in options}
        if BETAS in given:
            given[BETAS] = tuple(given[BETAS].unbind())
        as_tensors = {name: value for name, value in ways.items() if name in group}
        parameters = [leaves[parameter] for parameter in group["params"]]
        made.param_groups.append({**group, **as_tensors, **given, "params": parameters})
    made.state = defaultdict(dict)
    for parameter, entries in optimizer.state.items():
        made.state[leaves[parameter]] = {name: stand_ins.get(id(value), value) for name, value in entries.items()}
    return made


def count_in_double(optimizer: Optimizer) -> None:
    """Have an optimizer of torch's count its steps in float64: corrections follow from it, in eager steps a float."""
    if type(optimizer).__module__.startswith("torch.optim."):
        for entries in optimizer.state.values():
            step = entries.get("step")
            if isinstance(step, Tensor) and step.is_floating_point() and step.device.type != "mps":
                entries["step"] = step.double()


def seen_of(optimizer: Optimizer) -> dict[str, Any]:
    """Describe what an optimizer holds besides state and parameters, by name; tensors by how often they were changed.

    Equal descriptions mean that nothing has changed in between.
    """
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


def note_steps(name: str | None, optimizer: Optimizer, stepped: dict[str | None, dict[str, None]]) -> None:
    """Have an optimizer note, by its name, that it steps, and what of itself its steps change in Python."""
    own = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        changed = stepped.setdefault(name, {})
        before = seen_of(optimizer)
        count_in_double(optimizer)
        with decayed(optimizer):
            result = own(*args, **kwargs)
        changed.update(dict.fromkeys(differing(before, seen_of(optimizer))))
        return result

    optimizer.step = step  # type: ignore[method-assign]  # of this one alone


@contextmanager
@torch.no_grad()
def decayed(optimizer: Optimizer) -> Iterator[None]:
    """Decay weights by a tensor, as torch's optimizers do by a number, and leave an optimizer none to decay by.

    torch's optimizers ask whether the decay is zero, which no graph can, and pass it on as a number (``alpha=``).
    Done here, a decay that a schedule changes stays an input and costs no new graph. So it is with a momentum.
    """
    weights = [(group, group[DECAY]) for group in optimizer.param_groups if isinstance(group.get(DECAY), Tensor)]
    momenta = [(group, group[MOMENTUM]) for group in optimizer.param_groups if isinstance(group.get(MOMENTUM), Tensor)]
    gradients = [(leaf, leaf.grad) for group, _ in (*weights, *momenta) for leaf in group["params"]]
    for group, weight in weights:
        for leaf in group["params"]:
            if leaf.grad is not None and group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
                leaf.mul_(1 - group["lr"] * weight)
            elif leaf.grad is not None:
                leaf.grad = leaf.grad + leaf * (-weight if group.get("maximize") else weight)
        group[DECAY] = 0.0
    for group, momentum in momenta:
        for leaf in group["params"]:
            if leaf.grad is not None:
                leaf.grad = gathered(optimizer.state[leaf], leaf.grad, momentum, group)
        group[MOMENTUM] = 0.0
    yield
    for leaf, gradient in gradients:
        leaf.grad = gradient  # which whoever steps by hand may leave
    for group, weight in weights:
        group[DECAY] = weight
    for group, momentum in momenta:
        group[MOMENTUM] = momentum


def gathered(state: dict[str, Any], gradient: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """Return what SGD steps by, and move a parameter's buffer, as it does with a momentum that is a number.

    Args:
        state: The parameter's.
        gradient: Its gradient.
        momentum: The momentum.
        group: The options of its group.
    """
    sign = -1 if group["maximize"] else 1  # turned before it enters the buffer, and by the optimizer once more
    buffer = state.get("momentum_buffer")
    if buffer is None:
        state["momentum_buffer"] = buffer = sign * gradient.clone()
    else:
        buffer.mul_(momentum).add_(gradient, alpha=sign * (1 - group["dampening"]))
    return gradient + sign * momentum * buffer if group["nesterov"] else sign * buffer
