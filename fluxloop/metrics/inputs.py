"""What a metric is given of a step: entries by their names, without graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from fluxloop.errors import annotate


def reader(names: tuple[str, ...]) -> Callable[[Any], Sequence[Any]]:
    """Return what reads entries of a step, where it can be in C: in every step."""
    if len(names) > 1 and not any("." in name for name in names):
        return attrgetter(*names)
    return lambda step: [getattr(step, name) for name in names]


def named_entries(step: Any, names: tuple[str, ...], metric: str) -> list[Any]:
    """Read a metric's inputs from a step.

    Args:
        step: The step's entries.
        names: Of the inputs.
        metric: The metric's name, for the message.

    Raises:
        MissingEntryError: The phase does not store one of them.
    """
    try:
        return [getattr(step, name) for name in names]
    except AttributeError as error:
        annotate(
            error,
            f"fluxloop: the metric {metric!r} has inputs={names!r}; restrict it with "
            "Metric(..., phase=...), name entries that the phase stores with Metric(..., inputs=(...)), or leave out "
            "the steps without them: Metric(..., optional=True)",
        )
        raise


def without_graph(values: Iterable[Any]) -> list[Any]:
    """Detach the tensors among a metric's inputs."""
    return [value.detach() if isinstance(value, Tensor) and value.requires_grad else value for value in values]
