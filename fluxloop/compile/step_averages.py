"""Averages of weights inside of a graph: they move right after the update that they follow, and with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor, nn

from fluxloop.compile.windows import Number, Place
from fluxloop.compute.models import move_towards
from fluxloop.events import Event, StepEnd, UpdateEnd
from fluxloop.order.access import Path, overlap, parse, weights_path
from fluxloop.order.averages import StepAverage
from fluxloop.order.explain import fired_with
from fluxloop.order.graph import Node
from fluxloop.phase import Phase

if TYPE_CHECKING:
    from fluxloop.compile.stand_ins import StandIn
    from fluxloop.interfaces import RunLearner


@frozen(eq=False)
class Moved:
    """An average that a graph moves.

    Args:
        of: What it is.
        num_events: How many events the step had fired before the end of the first update that it follows.
    """

    of: StepAverage
    num_events: int

    def tensors(self, learner: RunLearner | StandIn) -> list[Tensor]:
        """List the tensors that it changes."""
        module = learner.weights[self.of.average]
        return [*module.parameters(), *(module.buffers() if self.of.buffers != "keep" else ())]


def averages_of(learner: RunLearner, phase: type[Phase]) -> dict[str, StepAverage]:
    """Return the averages that graphs of a phase move, by the id of the callback that keeps them.

    An average is moved by its callback, after the graph, where somebody may change the weights between the end of the
    body and the moment at which the callback would move it, or may read the average before that moment.
    """
    if not phase.gradients or not phase.finish.__module__.startswith("fluxloop."):
        return {}
    nodes = learner.callbacks.graph.nodes
    kept = [(number, node, node.callback._step_average()) for number, node in enumerate(nodes)]
    return {
        node.id: average
        for number, node, average in kept
        if average is not None
        and node.callback.handler(UpdateEnd, phase) is not None
        and not any(comes_between(nodes[:number], other, average, phase) for other in nodes if other is not node)
    }


def comes_between(before: list[Node], node: Node, average: StepAverage, phase: type[Phase]) -> bool:
    """Return whether a callback may notice whether an average moves with the body or at the end of the step.

    Args:
        before: Those that run before the one that keeps the average.
        node: The callback.
        average: The average.
        phase: Whose steps they are.
    """
    events: list[type[Event]] = [StepEnd]
    if node.callback.in_compiled_step == "after":
        events += [event for event in fired_with(phase) if event.inside_step]
    if all(node.callback.handler(event, phase) is None for event in events):
        return False
    own, live = (parse(weights_path(name), node.id) for name in (average.average, average.live))
    writes = any(touches(path, own) or touches(path, live) for path in node.access.writes)
    reads = node in before and any(touches(path, own) for path in node.access.reads)
    return not node.is_safe or writes or reads


def touches(path: Path, weights: Path) -> bool:
    """Return whether a declared path shows some weights."""
    return not path or path[0] == "weights" or overlap(path, weights)


def averaged_modules(learner: RunLearner, phase: Phase) -> list[nn.Module]:
    """List the modules that hold averages which graphs of a phase move, but the learner's models."""
    models = {part for module in learner.modules() for part in module.modules()}
    found = (learner.weights[average.average] for average in averages_of(learner, type(phase)).values())
    return [module for module in found if module not in models]


def numbers_of(averages: Iterable[StepAverage], device: torch.device) -> list[Number]:
    """List the numbers that say how far averages move, as inputs of a graph."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # a Mac's GPU knows no longer ones
    return [Number(place_of(each), each.weight, torch.zeros((), dtype=dtype, device=device)) for each in averages]


def place_of(average: StepAverage) -> Place:
    """Return the place of the number that says how far an average moves."""
    return average.average, "average"


@torch.no_grad()
def move(learner: StandIn, averages: Iterable[StepAverage], numbers: Mapping[Place, Tensor]) -> list[Moved]:
    """Move the averages of weights that a step has updated, while it is traced.

    An average whose update is left out stays as it is.

    Args:
        learner: The learner's stand-in, after the body.
        averages: Those that graphs of the phase move.
        numbers: The stand-ins of the graph's numbers, by place.
    """
    found = []
    for each in averages:
        live = learner.weights[each.live]
        update = first_update(learner, live)
        if update is None:
            continue
        moved, skip = Moved(each, update), learner.skips[update]
        changed = moved.tensors(learner)
        before = [] if skip is None else [tensor.clone() for tensor in changed]
        weight = numbers[place_of(each)]
        ways: dict[str, float | Tensor] = {"copy": 1.0, "average": weight, "keep": 0.0}
        move_towards(learner.weights[each.average], live, weight, ways[each.buffers], each.average)
        for tensor, old in zip(changed, before, strict=False):
            tensor.copy_(torch.where(skip, old, tensor))  # type: ignore[arg-type]  # there if `before` is
        found.append(moved)
    return found


def first_update(learner: StandIn, live: nn.Module) -> int | None:
    """Return which event of a step was the end of the first update of some weights; None where they have none."""
    own = set(live.parameters())
    for number, event in enumerate(learner.fired):
        if isinstance(event, UpdateEnd):
            slot = learner.updates.find(event.name)
            if not own.isdisjoint(slot.parameters):
                return number
    return None
