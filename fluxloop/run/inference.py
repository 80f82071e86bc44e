"""Evaluate and predict, on the side: what the training sees is as before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fluxloop.callback import Callback, on
from fluxloop.callbacks.metrics import Metrics
from fluxloop.callbacks.progress import bar_beside
from fluxloop.callbacks.recorder import Recorder
from fluxloop.compute.precision import in_single
from fluxloop.data.loaders import as_dataloader
from fluxloop.data.ordering import in_order
from fluxloop.errors import DataError, MetricError, PhaseError, describe, sentence
from fluxloop.events import StepEnd
from fluxloop.nested import concatenate, map_tensors
from fluxloop.phase import Phase
from fluxloop.phases.supervised import PredictionPhase, ValidationPhase
from fluxloop.run.epoch import run_epoch
from fluxloop.run.phases import check_phase
from fluxloop.run.session import beside

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner
    from fluxloop.processes.group import Group


def evaluate(learner: RunLearner, data: Any, metrics: Iterable[Any] | None, phase: Phase | None) -> dict[str, float]:
    """Compute metrics over one epoch of a validation phase; see `Learner.evaluate`."""
    phase = ValidationPhase() if phase is None else phase
    check_watches(phase)
    if metrics is not None and (isinstance(metrics, str) or not isinstance(metrics, Iterable)):
        raise MetricError(f"metrics={describe(metrics)} was given; expected a list: metrics=[accuracy]")
    own = learner.callbacks.get(Metrics)
    chosen = own.metrics if metrics is None and isinstance(own, Metrics) else list(metrics or ())
    with beside(learner, "evaluate", [Recorder(), Metrics(*chosen), *bar_beside(learner, "evaluate")]):
        run_epoch(learner, phase, None if data is None else as_dataloader(data))
        series = learner.history.metrics[phase]
    return {name: values[-1] for name, values in series.items()}


def check_watches(phase: Phase) -> None:
    """Raise for a phase that would train.

    Raises:
        PhaseError: It has gradients, or is no phase.
    """
    check_phase(phase)
    if phase.gradients:
        raise PhaseError(
            f"{phase!r} was given to evaluate or predict, and it trains; expected a validation phase, such as "
            "ValidationPhase()"
        )


class _Collect(Callback):
    """Collect the predictions of each step on the host."""

    reads = ("step.preds",)
    draws = False

    def __init__(self, group: Group | None) -> None:
        self._group = group
        self.parts: list[Any] = []

    @on(StepEnd)
    def collect(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        if self._group is not None and self._group.spare:  # of rows that other processes have
            self.parts.append(None)
        else:
            self.parts.append(map_tensors(lambda tensor: tensor.detach().cpu(), learner.step.preds))


def _of_all(parts: list[Any], group: Group) -> list[Any]:
    """Return the predictions of all processes, batch by batch, in the order of the data.

    Raises:
        PhaseError: The processes made different numbers of steps, so that there is no such order.
    """
    of_processes = group.gather_objects(parts)
    counts = list(map(len, of_processes))
    if len(set(counts)) > 1:
        raise PhaseError(
            f"predict ended {counts} steps on the processes 0 to {len(counts) - 1}, so that their predictions have no "
            "order; expected as many on each: is a step cancelled on some of them?"
        )
    return [part for step in zip(*of_processes, strict=True) for part in step if part is not None]


def predict(learner: RunLearner, data: Any, phase: Phase | None, stack: bool) -> Any:
    """Run a phase over data and join its predictions, where they are to be joined; see `Learner.predict`."""
    phase = PredictionPhase() if phase is None else phase
    check_watches(phase)
    group = learner.accelerator.group
    collect = _Collect(group)
    # Joined predictions are matched with the rows that were given: so those must not be shuffled
    source = in_order(as_dataloader(data)) if stack else as_dataloader(data)
    with beside(learner, "predict", [collect, Recorder(), *bar_beside(learner, "predict")]):
        run_epoch(learner, phase, source)
    parts = collect.parts if group is None else _of_all(collect.parts, group)
    if not parts:
        raise PhaseError(
            f"{phase!r} made no predictions: no step of it ended; expected a phase whose step runs runstep and "
            "stores state.preds"
        )
    if learner.accelerator.casting is not None:  # else the type is the model's own
        parts = [map_tensors(in_single, part) for part in parts]
    if not stack:
        return parts
    try:
        return concatenate(parts)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"the predictions of {len(parts)} batches cannot be joined along their first dimension: "
            f"{sentence(error)} "
            "For those of each batch by itself: predict(data, stack=False)"
        ) from error
