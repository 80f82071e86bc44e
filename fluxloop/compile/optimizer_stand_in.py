"""An optimizer's stand-in, whose step is operations on tensors alone, so that a graph can hold it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fluxloop.nested import tensors
from fluxloop.persist.seen import seen

DECAY = "weight_decay"


def is_input(optimizer: Optimizer, group: dict[str, Any], name: str) -> bool:
    """Return whether an option of a group is an input of the graph; others, and no decay at all, are part of it.

    What a graph computes has to follow from the numbers of the step alone: a resumed run makes it anew.
    """
    if name == DECAY and not type(optimizer).__module__.startswith("torch.optim."):
        return False  # nobody knows what it does with it
    value = group.get(name)
    return bool(group["params"]) and isinstance(value, (float, int, Tensor)) and (name == "lr" or bool(value))


def as_tensor(group: dict[str, Any], name: str) -> Tensor:
    """Return a number of a parameter group as a tensor of its own on its parameters' device."""
    parameter = group["params"][0]
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.as_tensor(group[name], dtype=dtype).detach().reshape(()).to(parameter.device, copy=True)


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
        given = {name: options[id(group), name] for name in group if (id(group), name) in options}
        as_tensors = {name: value for name, value in ways.items() if name in group}
        parameters = [leaves[parameter] for parameter in group["params"]]
        made.param_groups.append({**group, **as_tensors, **given, "params": parameters})
    made.state = defaultdict(dict)
    for parameter, entries in optimizer.state.items():
        made.state[leaves[parameter]] = {name: stand_ins.get(id(value), value) for name, value in entries.items()}
    return made


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
        result = own(*args, **kwargs)
        changed.update(dict.fromkeys(differing(before, seen_of(optimizer))))
        return result

    optimizer.step = step  # type: ignore[method-assign]  # of this one alone


@contextmanager
def decayed(optimizer: Optimizer) -> Iterator[None]:
    """Decay weights by a tensor, as torch's optimizers do by a number, and leave an optimizer none to decay by.

    torch's optimizers ask whether the decay is zero, which no graph can, and pass it on as a number (``alpha=``).
    Done here, a decay that a schedule changes stays an input and costs no new graph.
    """
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
