"""Who needs gradients that are used and dropped in the backward pass: callbacks that cannot be had with that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fluxloop.errors import CallbackError
from fluxloop.events import BackwardEnd, UpdateBegin
from fluxloop.order.access import dotted
from fluxloop.order.explain import fired_with
from fluxloop.order.graph import CallbackGraph, Node
from fluxloop.phase import Phase

TOO_LATE = (BackwardEnd, UpdateBegin)
"""Events between the gradients and their use, which have the use behind them then."""


def require_in_backward(graph: CallbackGraph, phases: Iterable[type[Phase]]) -> None:
    """Raise for callbacks that need gradients which a backward pass has used.

    Args:
        graph: The callbacks.
        phases: The phases that are to run.

    Raises:
        CallbackError: Names them, with event and path.
    """
    for phase in phases:
        if not (phase.data_key and phase.gradients):
            continue
        found = [said for node in graph.nodes for said in _needs(node, phase)]
        if found:
            needs = "\n".join(f"  {said}" for said in found)
            raise CallbackError(
                "Accelerator(optimizer_in_backward=True) uses each gradient as soon as it is complete, and drops it; "
                f"this comes too late for it:\n{needs}\nHandle UpdateEnd or StepEnd instead, leave the callback out, "
                "use optimizer_in_backward=False, or where its handler only takes note of the event, say so in its "
                'class: in_compiled_step = "after"'
            )


def _needs(node: Node, phase: type[Phase]) -> Iterator[str]:
    """Say what a callback needs of the gradients of a phase."""
    callback = node.callback
    if getattr(callback.unwrapped, "_looks_before_use", False):
        return
    paths = [f"reads '{dotted(path)}'" for path in node.access.reads]
    paths += [f"writes '{dotted(path)}'" for path in node.access.writes]
    handled = [event.__name__ for event in fired_with(phase) if callback.handler(event, phase) is not None]
    late = [event.__name__ for event in TOO_LATE if event.__name__ in handled]
    of_gradients = [path for path in (*node.access.reads, *node.access.writes) if path[:2] == ("step", "grads")]
    if late and callback.in_compiled_step != "after":
        touching = f" ({', '.join(paths)})" if paths else ""
        yield f"{node.id} handles {', '.join(late)} of {phase.__name__}{touching}"
    elif handled and of_gradients:
        yield f"{node.id} reads 'step.grads' at {', '.join(handled)} of {phase.__name__}"
