"""Modules as plain data: what ``state_dict`` holds, what it leaves out, and lazy parts that have no shape yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from fluxloop.errors import CheckpointError
from fluxloop.persist.plain import MARK, to_plain

State = dict[str, Any]

UNINITIALIZED = {MARK: "uninitialized"}
"""Stands for a parameter or buffer of a lazy module, which has no shape before the first batch."""


def is_uninitialized(kept: Any) -> bool:
    """Return whether kept data stands for a tensor of a lazy module that had seen no batch."""
    return isinstance(kept, dict) and kept.get(MARK) == "uninitialized"


def uninitialize(module: nn.Module, names: set[str]) -> None:
    """Take the shape from tensors of lazy modules that have been given one since, though they have seen no batch.

    Raises:
        CheckpointError: A module has seen one: it is no longer lazy.
    """
    for name in names:
        part, _, own = name.rpartition(".")
        owner = module.get_submodule(part)
        tensor: Any = getattr(owner, own)
        if is_lazy(tensor):
            continue
        if not isinstance(owner, LazyModuleMixin):
            raise CheckpointError(
                f"{name!r} had seen no batch when its state was kept (a lazy module), and has a shape now; make the "
                "learner anew"
            )
        # torch materializes a lazy tensor by changing its class; this is the way back
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.__class__ = UninitializedParameter if own in owner._parameters else UninitializedBuffer


def unsaved_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield the buffers that ``state_dict`` leaves out: full name, owner, own name, tensor."""
    for path, part in module.named_modules():
        for name in sorted(part._non_persistent_buffers_set):
            tensor = part._buffers.get(name)
            if tensor is not None and not is_lazy(tensor):
                yield f"{path}.{name}".lstrip("."), part, name, tensor


def freeze(module: nn.Module, frozen: set[str]) -> None:
    """Freeze the parameters of these names, and no others."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad is (name in frozen):
            parameter.requires_grad = name not in frozen


def module_to_plain(module: nn.Module, where: str) -> State:
    """Write a module that is no part of a model: its state, and what that leaves out."""
    state = {name: value for name, value in module.state_dict().items() if not is_lazy(value)}
    buffers = {  # those that state_dict leaves out
        f"{path}.{name}".lstrip("."): to_plain(part._buffers[name], where)
        for path, part in module.named_modules()
        for name in sorted(part._non_persistent_buffers_set)
        if part._buffers.get(name) is not None
    }
    parameters = [(name, p) for name, p in module.named_parameters() if not is_lazy(p)]
    return {
        MARK: "module",
        "state": to_plain(state, f"{where}.state_dict()"),
        "buffers": buffers,
        "frozen": [name for name, parameter in parameters if not parameter.requires_grad],
        # A module beside the models may be stepped by hand: its gradients may wait for that
        "grads": {name: to_plain(p.grad, where) for name, p in parameters if p.grad is not None},
    }


def load_module(module: nn.Module, kept: State, again: Callable[[Any], Any]) -> None:
    """Have a module load what `module_to_plain` wrote; files from before fluxloop walked modules hold the state alone.

    Args:
        module: The module.
        kept: Its state.
        again: Makes of plain data what it was.
    """
    module.load_state_dict(again(kept["state"]))
    for name, written in kept.get("buffers", {}).items():
        path, _, own = name.rpartition(".")
        part = module.get_submodule(path)
        now = part._buffers.get(own)
        value = again(written)
        part._buffers[own] = value if now is None else value.to(now.device)
    if "frozen" not in kept:  # an older file
        return
    freeze(module, set(kept["frozen"]))
    for name, parameter in module.named_parameters():
        grad = kept["grads"].get(name)
        parameter.grad = None if grad is None else again(grad).to(parameter.device)
