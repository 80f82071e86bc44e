"""What several processes have of an update whose batches are not all counted: added up in a state, divided on loading.

So a state is the same in all processes, and any number of them goes on from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

State = dict[str, Any]


def add_up(learner: RunLearner, kept: State) -> None:
    """Add up, over processes, the gradients and weights of windows that are open; all have to call this together.

    Args:
        learner: The learner.
        kept: What a checkpoint keeps of its updates; is changed.
    """
    group = learner.accelerator.group
    if group is None:
        return
    slots = kept["slots"]
    # One that has cancelled the batches of a window has no gradients there, and takes part all the same
    of_processes = group.gather_objects([slots[slot.name or ""] for slot in learner.updates.slots])
    for slot, told in zip(learner.updates.slots, zip(*of_processes, strict=True), strict=True):
        waits = next((each for each in told if each["waiting"]), None)
        if waits is None or waits["window"]["complete"]:
            continue
        windows = [each["window"] for each in told]
        window = {**waits["window"], "weight": sum(each["weight"] for each in windows)}
        if window["current"] is not None:
            window["current"] = sum(each["current"] or 0.0 for each in windows)
        slots[slot.name or ""] = {**waits, "window": window}
        if learner.accelerator.sharding is not None:  # torch has added up the gradients
            continue
        names = {learner.updates.names[parameter]: parameter for parameter in slot.parameters}
        used = set().union(
            *group.gather_objects([n for n, p in names.items() if p.grad is not None and not slot.consumed])
        )
        for name, parameter in names.items():
            if name in used:
                none = parameter.grad is None or slot.consumed
                own = torch.zeros_like(parameter) if none else parameter.grad.detach().clone()
                kept["gradients"][name] = group.all_reduce(own)


def divide(learner: RunLearner) -> None:
    """Leave what open windows hold, once a state is loaded, to the first process: the sum is what it was."""
    group = learner.accelerator.group
    if group is None or group.is_main:
        return
    for slot in learner.updates.slots:
        window: Any = slot.window
        if slot.first_step is None or window.complete:
            continue
        window.weight, window.current = 0.0, None if window.current is None else 0.0
        if learner.accelerator.sharding is None:
            gradients: list[Tensor | None] = [None] * len(slot.parameters)
            slot.put(gradients)
