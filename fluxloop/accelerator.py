"""Where tensors are computed: the device, and the three places of a step that know about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxloop.gradients import add_gradients
from fluxloop.nested import map_tensors
from fluxloop.optimizers import step_optimizer


class Accelerator:
    """Places models and batches on a device; computes gradients and steps optimizers there.

    ``runstep`` places a step's entries, ``learner.backward`` computes gradients and
    ``learner.update`` steps an optimizer through it: the three doors for what is to come.

    Args:
        device: ``"auto"`` (CUDA, else MPS, else the CPU), or anything ``torch.device`` takes.

    Raises:
        ValueError: The device is not available on this machine.
    """

    def __init__(self, device: str | torch.device = "auto") -> None:
        self.device = _choose(device)

    def place_model(self, model: nn.Module) -> None:
        """Move a module's parameters and buffers to the device, in place."""
        model.to(self.device)

    def place(self, entries: dict[str, Any]) -> None:
        """Move every tensor in a step's entries to the device, in nested containers too."""
        device = self.device
        for name, value in entries.items():
            if type(value) is Tensor:
                if value.device != device:
                    entries[name] = value.to(device, non_blocking=True)
            else:
                entries[name] = map_tensors(self._move, value)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device == self.device else tensor.to(self.device, non_blocking=True)

    def backward(
        self, loss: Tensor, parameters: Sequence[nn.Parameter], *, alone: bool = False, retain_graph: bool = False
    ) -> None:
        """Add the gradients of a scalar loss to ``grad`` of `parameters`.

        Args:
            loss: The loss.
            parameters: Those of the optimizers whose loss it is.
            alone: Whether the loss may be differentiated for all it reaches, because nobody else's
                parameters are to be left out; then some of `parameters` may be frozen.
            retain_graph: Whether another loss needs the same graph.
        """
        add_gradients(loss, None if alone else parameters, retain_graph)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step an optimizer."""
        step_optimizer(optimizer)

    def __repr__(self) -> str:
        return f"Accelerator(device={str(self.device)!r})"


def _choose(device: str | torch.device) -> torch.device:
    """Resolve ``"auto"``, and give a CUDA device its index, so that it equals that of its tensors."""
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
        else:
            device = "cpu"
    expected = "expected 'auto' or 'cpu', or a device that this machine has"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} was given; {expected}") from error
    available: dict[str, Callable[[], bool]]
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "xpu": torch.xpu.is_available}
    if chosen.type in available and not available[chosen.type]():
        raise ValueError(f"device={str(device)!r} was given, but {chosen.type.upper()} is not available; {expected}")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r} was given, and there are {torch.cuda.device_count()} GPUs; {expected}"
        )
    if chosen.index is None and chosen.type in ("cuda", "mps"):
        chosen = torch.device(chosen.type, torch.cuda.current_device() if chosen.type == "cuda" else 0)
    return chosen
