"""Compute gradients: torch's engine, called without the checks of arguments that are known to be right; divide them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

_backward = torch.autograd.backward

_engine: Callable[..., Any] | None
_transforming: Callable[[], bool]
try:  # private names: without them gradients are computed as everybody computes them
    from torch.autograd.graph import _engine_run_backward as _engine

    _transforming = torch._C._are_functorch_transforms_active
except (ImportError, AttributeError):  # pragma: no cover - a torch that has renamed them
    _engine = None


def add_gradients(loss: Tensor, parameters: Sequence[nn.Parameter] | None, retain_graph: bool = False) -> None:
    """Add the gradients of a scalar loss to ``grad`` of `parameters`.

    ``torch.autograd.backward`` costs up to a tenth of a small step before its engine runs. The
    engine is called as it calls it, with the gradient 1, where nobody asks to be asked: no tensor
    subclass, torch function mode or transform, and nobody's function in place of torch's.

    Args:
        loss: One that has a gradient, of one element.
        parameters: Left out, all that the loss reaches.
        retain_graph: Whether another loss needs the same graph.
    """
    inputs = () if parameters is None else tuple(parameters)
    if (
        _engine is not None
        and torch.autograd.backward is _backward
        and not has_torch_function((loss, *inputs))
        and not _transforming()
        and not loss.is_complex()
        and (inputs or parameters is None)
    ):
        _engine(
            (loss,), (torch.ones_like(loss),), retain_graph, False, inputs, allow_unreachable=True, accumulate_grad=True
        )
    else:
        torch.autograd.backward(loss, retain_graph=retain_graph, inputs=parameters)


def divisor(weight: float | Tensor, scale: float) -> float | Tensor | None:
    """Return what sums of weighed gradients are divided by; None for 1. Where nothing has any weight, they become 0.

    Args:
        weight: What their batches weigh together.
        scale: What the losses were multiplied by.
    """
    if isinstance(weight, Tensor):
        return weight.clamp(min=torch.finfo(torch.float32).tiny) * scale
    by = (weight or 1.0) * scale
    return None if by == 1.0 else by


def elements(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor that its memory holds: those of a sparse one that are stored."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    return tensor if tensor.layout is torch.strided else tensor.values()


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether all gradients are finite, sparse ones too: this waits for the device, once."""
    return not gradients or bool(torch.stack([elements(gradient).isfinite().all() for gradient in gradients]).all())


def divide_gradients(gradients: Sequence[Tensor], weight: float | Tensor, scale: float) -> None:
    """Divide sums of weighed gradients in place."""
    by = divisor(weight, scale)
    if by is None:
        return
    dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    with torch.no_grad():
        if dense:
            torch._foreach_div_(dense, by)
        for gradient in gradients:
            if gradient.layout is not torch.strided:
                gradient.div_(by)
