"""The names under which a metric will be recorded, and which way is better, before it has been computed."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from fluxloop.metrics.base import Averaged, Loss, Metric, SmoothLoss, accumulates
from fluxloop.metrics.classification import HITS
from fluxloop.monitor import Expected, Mode
from fluxloop.phase import Phase


def expected_of(metric: Loss | SmoothLoss | Metric, phase: Phase | None) -> list[Expected]:
    """Return the names under which a metric is going to be recorded in a phase.

    Args:
        metric: The metric.
        phase: The phase; None for any.
    """
    if phase is not None and not isinstance(phase, metric.phase):
        return []
    if isinstance(metric, Metric):
        return _of_metric(metric)
    origin = "" if phase is None else loss_origin(phase)
    found = [Expected(metric.name, "min", bool(origin)), Expected(f"{metric.name}_*", "min", False)]
    if phase is not None and phase.gradients and origin != "built in":  # update blocks name their losses as they like
        found.append(Expected("*", None, False))
    return found


def loss_origin(phase: Phase) -> str:
    """Return which step stores ``loss`` in a phase: a "built in" or an "inherited" one; "" where none may do so."""
    origin = "built in"
    for cls in type(phase).__mro__:
        if "stores_loss" in vars(cls):
            return origin if vars(cls)["stores_loss"] else ""
        for name in ("step", "body", "epoch"):
            own = vars(cls).get(name)
            function = getattr(own, "function", own)  # of a step, which is wrapped
            if function is not None:
                origin = "inherited"
                if "__class__" not in getattr(getattr(function, "__code__", None), "co_freevars", ()):  # no super()
                    return ""
    return ""


def _of_metric(metric: Metric) -> list[Expected]:
    inner = dict(metric.fn.items()) if accumulates(metric.fn) and hasattr(metric.fn, "items") else None
    if inner is not None:  # torchmetrics' MetricCollection
        return [Expected(str(name).lower(), direction_of(each)) for name, each in inner.items()]
    said = metric.higher_is_better
    mode: Mode | None = direction_of(metric.fn) if said is None else "max" if said else "min"
    if not accumulates(metric.fn) or _gives_one(metric.fn):
        return [Expected(metric.name, mode, not metric.optional, metric.optional)]
    return [Expected(metric.name, mode, False), Expected("*", None, False)]


def _gives_one(metric: Any) -> bool:
    """Return whether an object's ``compute`` is annotated to return one value, not a mapping of them."""
    gives = getattr(type(metric).compute, "__annotations__", {}).get("return")
    return gives is not None and getattr(gives, "__name__", str(gives)).rpartition(".")[2] in ("Tensor", "float", "int")


def direction_of(metric: Any) -> Mode | None:
    """Return which way a function or object that is used as a metric is better; None where it does not say."""
    while isinstance(metric, partial):
        metric = metric.func
    if isinstance(metric, Averaged):
        return direction_of(metric.mean)
    if isinstance(metric, Metric):
        metric = metric.fn
    higher = getattr(metric, "higher_is_better", None)
    if isinstance(higher, bool):
        return "max" if higher else "min"
    if not accumulates(metric) and callable(metric) and getattr(metric, "__hash__", None) and metric in HITS:
        return "max"
    of_torch = str(getattr(metric, "__module__", "")).startswith("torch.nn.")
    name = getattr(metric, "__name__", "")
    if isinstance(metric, nn.modules.loss._Loss) or (of_torch and (name.endswith("_loss") or "cross_entropy" in name)):
        return "min"
    return None
