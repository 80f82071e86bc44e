"""What a probe's head is trained by and measured with: schedules of its optimizer, and metrics of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fluxloop.errors import MetricError, describe
from fluxloop.hyperparameters import (
    HyperParameter,
    LearningRate,
    OptimizerOption,
    as_hyperparameter,
    set_hyperparameter,
)
from fluxloop.metrics.base import Metric, accumulates
from fluxloop.schedules import check_schedule


def as_schedules(given: Any) -> dict[HyperParameter, Any]:
    """Return schedules by hyperparameter; one that is given alone is the learning rate's.

    Raises:
        TypeError: Something is no option of an optimizer.
        ValueError: Something is no schedule.
    """
    if given is None:
        return {}
    read: dict[HyperParameter, Any] = {}
    for key, schedule in given.items() if isinstance(given, Mapping) else [(LearningRate, given)]:
        parameter = as_hyperparameter(key)
        if not isinstance(parameter, OptimizerOption):
            raise TypeError(
                f"LinearProbe(schedule={{{parameter!r}: ...}}) was given; expected options of the probe's optimizer: "
                "schedule={LearningRate: cosine(total=1000, start=0.1)}"
            )
        check_schedule(schedule, f"the probe's {parameter.label!r}")
        read[parameter] = schedule
    return read


def set_by_schedules(schedules: Mapping[HyperParameter, Any], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set options of an optimizer to what their schedules say for a step, from 0."""
    if schedules:
        holder = SimpleNamespace(optimizer=optimizer)
        for parameter, schedule in schedules.items():
            set_hyperparameter(holder, parameter, schedule(step) if callable(schedule) else schedule)


def as_metrics(whose: str, given: Any) -> tuple[Metric, ...]:
    """Return metrics of a list, of functions or objects by name, or of a single one.

    Raises:
        MetricError: One is no metric, or two have one name.
    """
    if given is None or given == ():
        return ()
    if isinstance(given, Mapping) and not accumulates(given):  # torchmetrics' collection is one metric
        found = [Metric(each, name=name) for name, each in given.items()]
    else:
        several = given if isinstance(given, (tuple, list)) else (given,)
        found = [each if isinstance(each, Metric) else Metric(each) for each in several]
    names = [each.name for each in found]
    if not found or len(set(names)) < len(names):
        raise MetricError(
            f"{whose}(metrics={describe(given)}) was given, with the names {names}; expected one or more, each with a "
            "name of its own: metrics={'top5': f, 'f1': g}"
        )
    return tuple(found)


def measured(metrics: tuple[Metric, ...], outputs: Tensor, ys: Tensor) -> dict[str, Any]:
    """Compute metrics of outputs and labels of all rows at once, by name."""
    step, found = SimpleNamespace(preds=outputs, ys=ys), {}
    for metric in metrics:
        tracker = metric.start()
        tracker.keep_apart()  # every process sees all of the rows
        tracker.update(step, len(ys))
        found.update(tracker.compute())
    return found
