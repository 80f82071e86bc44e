"""A compiled step beside the same operations without a compiler: compilers have faults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fluxloop.compile.fx import draws
from fluxloop.errors import warn_user
from fluxloop.nested import tensors

if TYPE_CHECKING:
    from fluxloop.compile.tracing import Traced

TOO_FAR = 1e-2
"""Above this share of what a step computes or changes a difference is no rounding: kernels round at their ends."""
DIGITS = 16
"""By how many of their last digits numbers are moved, to see what roundings make of it: sums add up many."""


class Comparison:
    """Runs the operations of a step as they were traced, on copies, and compares what a compiled step made of them.

    Args:
        traced: The step.
        whose: The phase, in words.
    """

    def __init__(self, traced: Traced, whose: str) -> None:
        self._graph, self._whose = traced.graph, whose
        inputs = traced.inputs
        known = {id(parameter): name for parameter, name in inputs.learner.updates.names.items()}
        for _, name, tensor in inputs.places:
            known.setdefault(id(tensor), name)
        for slot in inputs.slots:
            for parameter, state in slot.optimizer.state.items():
                known.update({id(value): f"{name} of {known[id(parameter)]}" for name, value in state.items()})
        self._names = [known.get(id(tensor), f"an input of shape {tuple(tensor.shape)}") for tensor in inputs.tensors()]
        stored = [f"state.{name}" for name, value in traced.stored.items() for _ in tensors(value)]
        num_looks = len(traced.looks) + bool(traced.looks) + bool(traced.messages) + traced.asks
        self._outputs = [*["a look at numbers"] * num_looks, *stored]
        self._obstacle = ""
        if any(draws(node) for node in traced.graph.graph.nodes):
            self._obstacle = "it draws random numbers, of which a compiled step draws others"
        elif traced.messages:
            self._obstacle = "several processes would have to send the same messages twice"
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._returned: list[Tensor] = []

    def run(self, inputs: Sequence[Tensor]) -> None:
        """Run the operations on copies of the inputs, before the compiled step changes these."""
        if self._obstacle:
            return
        self._before = [tensor.detach().clone() for tensor in inputs]
        self._after = [tensor.detach().clone() for tensor in inputs]
        self._returned = self._run(self._after)

    def _run(self, inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(self._graph(*inputs))

    def tell(self, inputs: Sequence[Tensor], outputs: list[Tensor]) -> None:
        """Warn with the largest difference between what both have returned and changed."""
        if self._obstacle:
            warn_user(f"the compiled step of {self._whose} was not compared with eager operations: {self._obstacle}")
            return
        now = [tensor.detach() for tensor in inputs]
        found = self._shares(outputs, now)
        worst, name = max(found, key=lambda each: each[0])
        why = "which is rounding"
        if worst > TOO_FAR:
            # what is nearly zero, such as the gradient of a bias before batch norm, is rounding through and through
            noise = [share for share, _ in self._shares(*self._rounded())]
            left = [each for each, least in zip(found, noise, strict=True) if each[0] > max(TOO_FAR, 10 * least)]
            if left:
                worst, name = max(left, key=lambda each: each[0])
                why = "which is no rounding. Is it a fault of the compiler? Use compile=False, or leave out what has it"
            else:
                why = "which is rounding: inputs that differ by their last digits make as much of a difference there"
        warn_user(
            f"the compiled step of {self._whose} was compared with the same operations run eagerly: the largest "
            f"difference is {worst:.1e} of what the step computes or changes, in {name}, {why}"
        )

    def _shares(self, outputs: list[Tensor], after: list[Tensor]) -> list[tuple[float, str]]:
        """Return how far outputs and changed inputs lie from those of the eager operations, with their names."""
        found = []
        for number, (ours, theirs) in enumerate(zip(outputs, self._returned, strict=True)):
            name = self._outputs[number] if number < len(self._outputs) else "a gradient that waits"
            found.append((apart(ours, theirs, torch.zeros_like(theirs)), name))
        for number, (now, theirs, before) in enumerate(zip(after, self._after, self._before, strict=True)):
            name = self._names[number] if number < len(self._names) else "a tensor from elsewhere"
            found.append((apart(now, theirs, before), name))
        return found

    def _rounded(self) -> tuple[list[Tensor], list[Tensor]]:
        """Run the operations on inputs whose last digits are others; return outputs, and the inputs after it."""
        values = (node.meta.get("val") for node in self._graph.graph.nodes)
        kinds = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
        step = max((torch.finfo(kind).eps for kind in kinds & {torch.bfloat16, torch.float16}), default=0.0)
        after = [moved(tensor, step) for tensor in self._before]
        return self._run(after), after


def moved(tensor: Tensor, step: float) -> Tensor:
    """Return a copy whose numbers differ by their last digit, up or down; whole numbers, and single ones, do not.

    Args:
        tensor: Any.
        step: The last digit's share, at least.
    """
    if not tensor.is_floating_point() or tensor.dim() == 0:
        return tensor.clone()
    places = torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float32).reshape(tensor.shape)
    signs = torch.where((places * 0.618).frac() < 0.5, 1.0, -1.0)
    return (tensor.double() * (1 + signs * DIGITS * max(step, torch.finfo(tensor.dtype).eps))).to(tensor.dtype)


def apart(ours: Tensor, theirs: Tensor, before: Tensor) -> float:
    """Return how far two tensors lie apart, as a share of the way from what was there before.

    Infinite where one is not finite and the other is, or where only one has moved.
    """
    if not theirs.numel():
        return 0.0
    a, b, start = (
        tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) for tensor in (ours, theirs, before)
    )
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).norm().item()
    moved = torch.where(b.isfinite(), b - start, 0.0).norm().item()
    if difference == 0:
        return 0.0
    return difference / moved if difference == difference and moved else float("inf")
