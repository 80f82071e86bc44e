"""What a probe's head is trained by and measured with: schedules of its optimizer, and metrics of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compute.modes import OptimizerMode
from fluxloop.compute.optimizers import form_of
from fluxloop.errors import CheckpointError, MetricError, OptimizerError, describe
from fluxloop.hyperparameters import (
    HyperParameter,
    LearningRate,
    OptimizerOption,
    as_hyperparameter,
    set_hyperparameter,
)
from fluxloop.metrics.base import Metric, accumulates
from fluxloop.schedules import check_schedule, written
from fluxloop.state import StepState


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
                "schedule={LearningRate: cosine(total=1000, start=0.1, end=0.0)}"
            )
        check_schedule(schedule, f"the probe's {parameter.label!r}")
        read[parameter] = schedule
    return read


def make_optimizer(whose: str, factory: Callable[..., Any], head: nn.Module) -> Optimizer:
    """Make the optimizer of a head, by a factory of any of the forms that a learner takes.

    Raises:
        OptimizerError: The head has nothing to train, or the factory makes something else than one optimizer that steps
            on gradients.
    """
    if not any(parameter.requires_grad for parameter in head.parameters()):
        raise OptimizerError(
            f"{whose} was given a head of which no parameter requires a gradient; expected one to train: nn.Linear"
        )
    made = factory(form_of(factory, head))
    if not isinstance(made, Optimizer):
        raise OptimizerError(
            f"{whose}: its optimizer's factory made {describe(made)}; expected one torch.optim.Optimizer: "
            "optimizer=partial(torch.optim.SGD, lr=0.1)"
        )
    if OptimizerMode.of(made) is not None:
        raise OptimizerError(
            f"{whose} was given {type(made).__name__}, whose weights differ between its train and eval mode; expected "
            "an optimizer without modes: optimizer=torch.optim.Adam"
        )
    closure = signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise OptimizerError(
            f"{whose} was given {type(made).__name__}, which computes gradients by itself; expected an optimizer that "
            "steps on those of each batch: optimizer=torch.optim.Adam"
        )
    return made


def as_texts(schedules: Mapping[HyperParameter, Any]) -> dict[str, str]:
    """Return schedules as texts, by the names of what they set."""
    return {parameter.label: written(schedule) for parameter, schedule in schedules.items()}


def check_schedules(whose: str, state: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Raise for other schedules than those that a checkpoint was made with.

    Raises:
        CheckpointError: Names both.
    """
    before = state.get("schedules", now)  # older checkpoints do not say
    for label in [*before, *now]:
        old, new = before.get(label, "nothing"), now.get(label, "nothing")
        if old != new:
            raise CheckpointError(
                f"{whose}: {label} was scheduled by {old}, and is now by {new}; go on with the old one, or begin a new "
                "run from the weights: learner.load_weights(file)"
            )


def restore(whose: str, head: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load what a checkpoint keeps of a head and its optimizer.

    Raises:
        CheckpointError: It is of another head or optimizer.
    """
    try:
        head.load_state_dict(state["probe"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{whose}: the checkpoint is of a run with another head or optimizer ({error}); go on with that one, or "
            "begin a new run from the weights: learner.load_weights(file)"
        ) from error


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
    step, found = StepState({"preds": outputs, "ys": ys}), {}
    for metric in metrics:
        tracker = metric.start()
        tracker.keep_apart()  # every process sees all of the rows
        tracker.update(step, len(ys))
        found.update(tracker.compute())
    return found
