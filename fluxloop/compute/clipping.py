"""The norm of all gradients together, of sharded ones over all processes; gradients made no longer than a bound."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fluxloop.nested import local_part


def clip_norm(parameters: Sequence[nn.Parameter], largest: float, norm_type: float) -> Tensor:
    """Make gradients shorter, in place, where they are longer than a bound; return their norm before that.

    Args:
        parameters: Those whose gradients they are.
        largest: The bound.
        norm_type: Of the norm, as ``torch.nn.utils.clip_grad_norm_`` takes it.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if _are_alike(gradients):
        # What torch's own function computes, to the bit. It sorts gradients by device and type around that, four times
        # in contexts without gradients, which takes longer than the arithmetic where these are small.
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, norm_type)), norm_type)
        torch._foreach_mul_(gradients, torch.clamp(largest / (norm + 1e-6), max=1.0))
        return norm
    if not any(map(_is_sharded, gradients)):
        return clip_grad_norm_(parameters, largest, norm_type)
    norm = norm_of(gradients, norm_type)
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], factor.to(gradients[0].device))
    return norm


@torch.no_grad()
def norm_of(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    """Compute the norm of gradients together.

    Args:
        gradients: Whole ones, or sharded ones, of which this process has a part; all processes have to call this then.
        norm_type: Of the norm.
    """
    sharded = [gradient for gradient in gradients if _is_sharded(gradient)]
    norms = [torch.linalg.vector_norm(gradient, norm_type) for gradient in gradients if not _is_sharded(gradient)]
    if sharded:
        norms.append(_norm_over_processes(sharded, norm_type))
    return torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.tensor(0.0)


_form = attrgetter("dtype", "device.type", "device.index", "layout", "requires_grad")


def _are_alike(gradients: Sequence[Tensor]) -> bool:
    """Return whether gradients are plain, strided ones of one type on one device, without a graph of their own."""
    forms = {*map(_form, gradients)}
    if len(forms) != 1 or {*map(type, gradients)} != {Tensor}:
        return False
    dtype, device, _, layout, requires_grad = forms.pop()
    return dtype.is_floating_point and device in ("cpu", "cuda") and layout is torch.strided and not requires_grad


def _is_sharded(gradient: Any) -> bool:
    return hasattr(gradient, "to_local")


def _norm_over_processes(sharded: Sequence[Any], norm_type: float) -> Tensor:
    """Compute the norm of sharded gradients together, by one number of each process.

    Torch's own takes a message for each gradient, and has no largest element of a part that is empty.
    """
    parts = [part for gradient in sharded if (part := gradient.to_local()).numel()]
    first = sharded[0]
    own = (
        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part, norm_type) for part in parts]), norm_type)
        if parts
        else torch.zeros((), dtype=first.dtype, device=first.device)
    )
    if isinf(norm_type):
        own = own if parts or norm_type > 0 else torch.full_like(own, norm_type * -1)
        return _reduced(own, first, "MAX" if norm_type > 0 else "MIN")
    return _reduced(own**norm_type, first, "SUM") ** (1 / norm_type)


def _reduced(number: Tensor, sharded: Any, how: str) -> Tensor:
    """Put a number of each process together, over the processes that hold the parts of one copy."""
    import torch.distributed as dist

    mesh = sharded.device_mesh
    for dimension, placement in enumerate(sharded.placements):
        if placement.is_shard():
            dist.all_reduce(number, getattr(dist.ReduceOp, how), group=mesh.get_group(dimension))
    return number
