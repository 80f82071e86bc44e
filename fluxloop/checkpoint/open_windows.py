"""What several processes have of an update whose batches are not all counted: what each has, as parts of one state.

A run that goes on in as many processes gives each of them its own again, so that sums are made in the same order. Any
other number goes on from the sum, which the first process holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.nested import local_part

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner
    from fluxloop.processes.group import Group

State = dict[str, Any]

OPEN = "open windows"
"""The entry of a state of updates that holds the windows of each process, and gradients stacked by process."""


def take_apart(learner: RunLearner, kept: State) -> None:
    """Keep what each process has of windows that are open; all processes have to call this together.

    Args:
        learner: The learner.
        kept: What a checkpoint keeps of its updates; is changed.
    """
    group = learner.accelerator.group
    if group is None:
        return
    slots = kept["slots"]
    own = {slot.name or "": slot for slot in learner.updates.slots}
    # One that has cancelled the batches of a window has no gradients there, and takes part all the same
    of_processes = group.gather_objects((slots, sorted(kept["gradients"])))
    used = set().union(*(names for _, names in of_processes))
    windows: dict[str, list[State]] = {}
    stacked: dict[str, Tensor] = {}
    for name, slot in own.items():
        told = [of_process[name] for of_process, _ in of_processes]
        waits = next((each for each in told if each["waiting"]), None)
        if waits is None or waits["window"]["complete"]:
            continue
        windows[name] = [each["window"] for each in told]
        slots[name] = {**waits, "window": _summed(waits["window"], windows[name])}
        if learner.accelerator.sharding is not None:  # torch has added up the gradients
            continue
        for parameter in slot.parameters:
            gradient = learner.updates.names[parameter]
            if gradient in used and gradient not in stacked:  # two optimizers may have one parameter
                held = kept["gradients"].pop(gradient, None)
                stacked[gradient] = _stack(torch.zeros_like(parameter) if held is None else held, group)
    if windows:
        kept[OPEN] = {"windows": windows, "gradients": stacked}


def _summed(waits: State, windows: list[State]) -> State:
    """Return what all processes together have of a window; `waits` is that of one that has gradients."""
    summed = {**waits, "weight": sum(window["weight"] for window in windows)}
    if any(window["current"] is not None for window in windows):
        summed["current"] = sum(window["current"] or 0.0 for window in windows)
    return summed


def _stack(own: Tensor, group: Group) -> Tensor:
    """Return tensors of all processes as a sharded one, of which row i is that of process i."""
    from torch.distributed.tensor import DTensor, Shard  # takes a while, and most checkpoints need none of it

    stacked: Tensor = DTensor.from_local(own.detach()[None], group.mesh, [Shard(0)], run_check=False)
    return stacked


def gradients_here(learner: RunLearner, kept: State) -> dict[str, Tensor]:
    """Return the gradients of a state that this process goes on with, by the parameters' names.

    Args:
        learner: The learner.
        kept: What a checkpoint has of the updates.
    """
    stacked: dict[str, Any] = kept.get(OPEN, {}).get("gradients", {})
    if not stacked:
        return dict(kept["gradients"])
    group = learner.accelerator.group
    own = None if group is None or learner.accelerator.sharding is not None else group.rank
    here = dict(kept["gradients"])
    for name, rows in stacked.items():
        if hasattr(rows, "to_local"):  # of this very run
            here[name] = local_part(rows)[0]
        else:
            here[name] = rows[own] if own is not None and _as_many(learner, kept) else rows.sum(0)
    return here


def gradients_of(kept: State) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradients of a state as they are without other processes, with the parameters' names."""
    yield from kept["gradients"].items()
    for name, rows in kept.get(OPEN, {}).get("gradients", {}).items():
        yield from ((name, row) for row in local_part(rows))


def put_together(learner: RunLearner, kept: State) -> None:
    """Give each process its own part of the windows that are open; of other processes, all to the first one.

    Args:
        learner: The learner; its gradients and windows are those of the state.
        kept: What a checkpoint has of the updates.
    """
    group = learner.accelerator.group
    if group is None:
        return
    opened, again = kept.get(OPEN, {"windows": {}, "gradients": {}}), _as_many(learner, kept)
    for slot in learner.updates.slots:
        window: Any = slot.window
        if slot.first_step is None or window.complete:
            continue
        windows = opened["windows"].get(slot.name or "")
        if again and windows:
            window.weight, window.current = windows[group.rank]["weight"], windows[group.rank]["current"]
        elif not group.is_main:
            window.weight, window.current = 0.0, None if window.current is None else 0.0
        if group.is_main or learner.accelerator.sharding is not None:
            continue
        for parameter in slot.parameters:
            if not (again and learner.updates.names[parameter] in opened["gradients"]):
                parameter.grad = None


def _as_many(learner: RunLearner, kept: State) -> bool:
    """Return whether as many processes go on with open windows as have kept them."""
    group, windows = learner.accelerator.group, kept.get(OPEN, {}).get("windows", {})
    return group is not None and all(len(each) == group.size for each in windows.values()) and bool(windows)
