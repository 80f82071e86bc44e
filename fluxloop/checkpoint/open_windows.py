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
    for slot in learner.updates.slots:
        window = kept["slots"][slot.name or ""]["window"]
        if slot.first_step is None or window["complete"]:
            continue
        said = torch.tensor([window["weight"], window["current"] or 0.0], dtype=torch.float64, device=group.device)
        weight, current = group.all_reduce(said).tolist()
        window["weight"], window["current"] = weight, None if window["current"] is None else current
        if learner.accelerator.sharding is not None:  # torch has added up the gradients
            continue
        names = {learner.updates.names[parameter]: parameter for parameter in slot.parameters}
        used = set().union(*group.gather_objects([name for name, p in names.items() if p.grad is not None]))
        for name, parameter in names.items():
            if name in used:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
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
