"""Save what an optimizer holds while something is tried out with it, and set it again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fluxloop.compute.models import copied_values


def save_options(optimizer: Optimizer) -> Callable[[], None]:
    """Save an optimizer's options; return a function that sets them again, bit for bit.

    Tensors among the options, such as a learning rate in a compiled step, stay the same objects: others hold them.
    """
    groups = [
        (group, {name: value if name == "params" else _saved(value) for name, value in group.items()})
        for group in optimizer.param_groups
    ]
    tensors = [(value, value.clone()) for _, saved in groups for value in saved.values() if isinstance(value, Tensor)]
    step = vars(optimizer).get("step")  # a scheduler of torch's puts a wrapper there

    def restore() -> None:
        for group, saved in groups:
            group.clear()  # what was added since goes, too
            group.update(saved)
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
        vars(optimizer).pop("step", None)
        if step is not None:
            vars(optimizer)["step"] = step

    return restore


def save_optimizer(optimizer: Optimizer, on_host: bool = False) -> Callable[[], None]:
    """Save an optimizer's state and options; return a function that sets them again, bit for bit.

    Args:
        optimizer: The optimizer.
        on_host: Whether tensors of its state are kept in the host's memory.
    """

    def copied(value: Any) -> Any:
        return copied_values(value, on_host) if on_host and isinstance(value, Tensor) else copy.deepcopy(value)

    state = {
        parameter: {name: (value, copied(value)) for name, value in entries.items()}
        for parameter, entries in optimizer.state.items()
    }
    restore_options = save_options(optimizer)

    def restore() -> None:
        optimizer.state.clear()
        for parameter, entries in state.items():
            for name, (value, saved) in entries.items():
                if isinstance(value, Tensor):
                    with torch.no_grad():
                        value.copy_(saved)
                optimizer.state[parameter][name] = value if isinstance(value, Tensor) else saved
        restore_options()

    return restore


def save_with_weights(optimizer: Optimizer) -> Callable[[], None]:
    """Save an optimizer's parameters, state and options; return a function that sets them again, bit for bit."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    memo: dict[int, Any] = {id(parameter): parameter for parameter in parameters}
    weights = [(parameter, parameter.detach().clone()) for parameter in parameters]
    if isinstance(optimizer, torch.optim.LBFGS):  # the tensors of its long lists are never changed in place
        lists = (value for entries in optimizer.state.values() for value in entries.values() if type(value) is list)
        memo |= {id(tensor): tensor for tensors in lists for tensor in tensors}
    states = [(key, copy.deepcopy(entries, memo)) for key, entries in optimizer.state.items()]
    options = [{k: copy.deepcopy(v, memo) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    def restore() -> None:
        with torch.no_grad():
            for parameter, saved in weights:
                parameter.copy_(saved)
        optimizer.state.clear()
        optimizer.state.update(states)
        for group, saved_options in zip(optimizer.param_groups, options, strict=True):
            for name in group.keys() - saved_options.keys() - {"params"}:
                del group[name]
            group.update(saved_options)

    return restore


def _saved(value: object) -> object:
    return value if isinstance(value, Tensor) else copy.deepcopy(value)
