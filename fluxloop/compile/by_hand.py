"""Gradients that steps leave which differentiate by hand (``loss.backward()``): no window waits for them.

An eager step finds those of the step before it, and most drop them as they begin. A graph gets none of them: so it is
made only of steps that drop them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fluxloop.compile.refusals import refusal
from fluxloop.compute.slots import Slot
from fluxloop.phase import Phase


def left_by_hand(slots: Iterable[Slot]) -> list[Tensor]:
    """Return the parameters with gradients that no window waits for, and no update has used."""
    idle = [slot for slot in slots if slot.first_step is None and not slot.consumed]
    return [parameter for slot in idle for parameter in slot.parameters if parameter.grad is not None]


class Left:
    """Gradients as they are before a step.

    Args:
        parameters: Whose gradients.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._each = [(p, p.grad, p.grad._version) for p in parameters if p.grad is not None]

    def added_to(self) -> list[Tensor]:
        """Return the parameters whose gradients a step has added to, or left where they were."""
        return [each[0] for each in self._each if not was_dropped(*each)]


def was_dropped(parameter: Tensor, gradient: Tensor, version: int) -> bool:
    """Return whether a step left a gradient alone that was there as it began, of that version, and made its own."""
    kept = parameter.grad is gradient or gradient._version != version
    return not kept and (parameter.grad is None or not parameter.grad.requires_grad)  # else it may be a sum


@contextmanager
def dropping(phase: Phase, slots: Iterable[Slot], leaves: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Have a phase's body find gradients where steps before it left some.

    Args:
        phase: The running phase.
        slots: The optimizers that it may step.
        leaves: What stands for each parameter.

    Raises:
        CompileError: The body does not drop them.
    """
    found = [leaves[parameter] for parameter in left_by_hand(slots)]
    for leaf in found:
        leaf.grad = torch.zeros_like(leaf)
    left = Left(found)
    yield
    if left.added_to():
        raise refusal(
            phase,
            "it adds to gradients that a step before it computed by hand; drop them first (zero_grad), or call "
            "learner.backward(loss) instead of loss.backward()",
        )
