"""Parameters that no gradient reaches: those that an optimizer has left unchanged while it changed others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy

from fluxloop.errors import warn_user

if TYPE_CHECKING:
    from fluxloop.compute.slots import Slot
    from fluxloop.compute.updates import Updates

SHOWN = 5
"""How many names a message has."""


def versions(slots: Iterable[Slot]) -> dict[nn.Parameter, int]:
    """Return how often each trainable parameter of optimizers has been changed in place."""
    return {
        parameter: parameter._version
        for slot in slots
        for parameter in slot.parameters
        if parameter.requires_grad and not is_lazy(parameter) and parameter.numel()
    }


def left_alone(slot: Slot, before: Mapping[nn.Parameter, int]) -> list[nn.Parameter] | None:
    """Return the parameters that an optimizer has never stepped, though it has stepped others; None where it has none.

    An optimizer leaves a parameter alone whose gradient is None. To ask what it has changed costs a step nothing, and
    sees updates made by hand. One that has had no turn has changed nothing.

    Args:
        slot: The optimizer.
        before: `versions` before the steps; a parameter that is not there is not judged.
    """
    own = [parameter for parameter in slot.parameters if parameter in before and parameter.requires_grad]
    if all(parameter._version == before[parameter] for parameter in own):
        return None
    state = slot.optimizer.state
    return [
        parameter
        for parameter in own
        if parameter._version == before[parameter] and parameter.grad is None and not state.get(parameter)
    ]


class UnusedParameters:
    """Tells which parameters got no gradient, once for each optimizer, after the first cycle of a fit that shows it.

    Such a cycle is a whole one, not one that goes on in the middle; the optimizer has stepped in it; and each phase
    that trains has run, as one may train what another leaves alone.

    Args:
        updates: Of the learner.
        phases: Names of the phases that train.
    """

    def __init__(self, updates: Updates, phases: Iterable[str]) -> None:
        self._updates, self._phases = updates, set(phases)
        self._awaited: set[str] = set()
        self._before: dict[nn.Parameter, int] | None = None

    def begin_cycle(self) -> None:
        """Note how the parameters are before a cycle."""
        slots = [slot for slot in self._updates.slots if slot.name not in self._updates.told_unused]
        if slots and not self._awaited:
            self._before, self._awaited = versions(slots), set(self._phases)

    def end_epoch(self, phase: str) -> None:
        """Note that a phase has run."""
        self._awaited.discard(phase)

    def end_cycle(self, tell: bool) -> None:
        """Warn of parameters that got no gradient, where that can be known by now.

        Args:
            tell: Whether this process is the one that speaks.
        """
        if self._before is None or self._awaited:
            return
        unused: list[nn.Parameter] = []
        for slot in self._updates.slots:
            found = None if slot.name in self._updates.told_unused else left_alone(slot, self._before)
            if found is not None:
                self._updates.told_unused.add(slot.name)
                unused += found
        self._before = None
        if unused and tell:
            warn_user(_message([self._updates.names.get(each, "one without a name") for each in unused]))


def _message(names: list[str]) -> str:
    one = len(names) == 1
    what = "a parameter that is to be trained" if one else f"{len(names)} parameters that are to be trained"
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    it = "it" if one else "them"
    return (
        f"{what} got no gradient in a whole epoch, so the optimizer left {it} alone: {shown}. Use {it} in the loss; "
        "or, where this is meant, say so: parameter.requires_grad_(False), or, for a part that is trained later, the "
        "callback Unfreeze({pattern: epoch})"
    )
