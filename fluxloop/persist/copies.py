"""What PyTorch leaves out where it copies parameters and optimizers: gradients, hooks, attributes of one's own."""

from __future__ import annotations

import copy
from typing import Any

from torch.nn.parameter import is_lazy
from torch.optim import Optimizer


def copy_gradient(tensor: Any, copied: Any, memo: dict[int, Any], waiting: bool = True) -> None:
    """Give the copy of a tensor its gradient, where that waits for an update, and its hooks."""
    if tensor is copied or is_lazy(tensor) or not tensor.is_leaf:
        return
    if waiting and tensor.grad is not None and copied.grad is None:
        copied.grad = tensor.grad.detach().clone()  # deepcopy of a parameter leaves it out
    for hook in (getattr(tensor, "_backward_hooks", None) or {}).values():
        copied.register_hook(copy.deepcopy(hook, memo))  # bound to copies where it is bound to what is copied
    for hook in (getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values():
        copied.register_post_accumulate_grad_hook(copy.deepcopy(hook, memo))


def copy_attributes(optimizer: Optimizer, copied: Optimizer, memo: dict[int, Any]) -> None:
    """Give the copy of an optimizer its hooks, and what else it holds beside its options and states."""
    if optimizer is copied:
        return
    for name, value in vars(optimizer).items():
        hooks = name.endswith("_hooks") and isinstance(value, dict)
        if (hooks and not getattr(copied, name, None)) or (name not in vars(copied) and not callable(value)):
            vars(copied)[name] = copy.deepcopy(value, memo)
