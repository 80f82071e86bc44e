"""Update metrics every step, publish them every epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import define, evolve
from torch import Tensor

from fluxloop.callback import Callback, NoConflict, on, resolve_conflict
from fluxloop.callbacks.recorder import Recorder
from fluxloop.errors import MetricError, annotate, describe, warn_user
from fluxloop.events import EpochBegin, EpochEnd, StepEnd
from fluxloop.history import MOST_PARTS, numbers_in
from fluxloop.metrics.base import Loss, Metric, SmoothLoss, Tracker
from fluxloop.metrics.expected import expected_of
from fluxloop.monitor import Expected, Mode
from fluxloop.nested import batch_size, map_tensors, weight_of
from fluxloop.order.view import behind
from fluxloop.persist.series import Series
from fluxloop.phase import AbstractTrainingPhase, Phase, ProbePhase
from fluxloop.state import Container, PhaseDict

if TYPE_CHECKING:
    from fluxloop.processes.group import Group

AnyMetric = Loss | SmoothLoss | Metric


class PhaseMetrics(Container):
    """The metrics of one phase: ``cbstate.metrics[TrainingPhase]``.

    Attributes:
        epochs: By metric, the (epoch from 1, value) of each epoch.
    """

    def __init__(self) -> None:
        self.epochs: dict[str, list[tuple[int, Any]]] = {}
        self._sources: dict[str, str] = {}
        self.trackers: list[tuple[AnyMetric, Tracker]] = []
        """The metrics of the running epoch, or of the last one."""
        self.started = False
        """Whether an epoch has begun whose values are not yet recorded."""
        self.group: Group | None = None
        """The processes over whose rows the epoch's values are computed; None for this one alone."""
        self.carried: list[list[Any]] = []
        """What processes had told of the running epoch where a checkpoint was written by another number of them."""

    @property
    def has_ended(self) -> bool:
        """Whether an epoch has ended in this process, so that its metrics are recorded."""
        return bool(self.trackers) and not self.started

    def running(self) -> dict[str, Any]:
        """Compute the values of the epoch so far by name, on their device; those of this process's rows.

        Raises:
            MetricError: Two metrics gave a value of one name.
        """
        return _named([(metric, _of(metric, tracker.compute)) for metric, tracker in self.trackers])

    def of_all(self) -> tuple[dict[str, Any], set[str]]:
        """Compute the values of the epoch, and name the metrics that saw a step: those of the rows of all processes.

        All processes call it, and tell each other once. Their values are the same.

        Raises:
            MetricError: Two metrics gave a value of one name.
        """
        if self.group is None and not self.carried:
            return self.running(), {metric.name for metric, tracker in self.trackers if tracker.started}
        own = [tracker.told() for _, tracker in self.trackers]
        told = [*self.carried, *([own] if self.group is None else self.group.gather_objects(own))]
        found, seen = [], set()
        for (metric, tracker), each in zip(self.trackers, zip(*told, strict=True), strict=True):
            of_processes = [one for one in each if one is not None]
            if of_processes:
                seen.add(metric.name)
                found.append((metric, _of(metric, partial(tracker.joined, of_processes))))
        return _named(found), seen

    def latest(self) -> dict[str, Tensor]:
        """Return the last step's values by name, on their device; stateful metrics have none."""
        return {name: value for _, tracker in self.trackers for name, value in tracker.latest().items()}

    def record(self, name: str, epoch: int, value: Any, source: str) -> None:
        """Record an epoch's value: a scalar as a number, another tensor on the CPU; a second one replaces the first.

        Args:
            name: Of the metric.
            epoch: From 1.
            value: A number, or a tensor on any device.
            source: Name of the callback that records it.

        Raises:
            MetricError: Another callback records that metric.
        """
        if self._sources.setdefault(name, source) != source:
            raise MetricError(
                f"{self._sources[name]} and {source} both record the metric {name!r}; give one another name: "
                "Metric(f, name='...')"
            )
        if isinstance(value, Tensor):
            value = value.item() if value.numel() == 1 else value.detach().cpu()
        elif getattr(value, "size", 0) == 1 and hasattr(value, "item"):  # of NumPy's
            value = value.item()
        series = self.epochs.setdefault(name, Series())
        if series and series[-1][0] == epoch:
            series.pop()
        series.append((epoch, value))

    def numbers_at(self, epoch: int) -> dict[str, float]:
        """Return the numbers that an epoch recorded last, by the names under which they are shown and logged.

        Args:
            epoch: From 1; of an earlier epoch than the last one there are none.
        """
        found: dict[str, float] = {}
        for name, series in self.epochs.items():
            if series and series[-1][0] == epoch:
                found |= numbers_in(name, series[-1][1])
        return found

    def last(self, name: str) -> tuple[int, Any]:
        """Return the newest (epoch, value) of a metric.

        Raises:
            MetricError: It has no value yet.
        """
        if not self.epochs.get(name):
            raise MetricError(f"no metric {name!r} was recorded; there are {sorted(self.epochs)}")
        return self.epochs[name][-1]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the epochs' values, and where the running epoch stands.

        In an epoch of several processes all of them call it, as they do where a checkpoint is written.
        """
        running = [tracker.state_dict() for _, tracker in self.trackers] if self.started else None
        state = {"epochs": self.epochs, "sources": self._sources, "running": running}
        state |= {"carried": self.carried} if self.carried else {}
        if running is not None and self.group is not None:
            on_host = map_tensors(lambda tensor: tensor.detach().cpu(), running)
            state |= {"running": None, "of_processes": self.group.gather_objects(on_host)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps.

        Raises:
            MetricError: It was written in the middle of an epoch that began with other metrics.
        """
        self.epochs, self._sources = state["epochs"], state["sources"]
        of_processes = [state["running"]] if state["running"] is not None else state.get("of_processes", [])
        self.started, self.carried = bool(of_processes), list(state.get("carried", ()))
        if not of_processes or not self.trackers:  # no epoch has begun yet: its state comes again when it has
            return
        if len(of_processes[0]) != len(self.trackers):
            raise MetricError(
                f"the epoch began with {len(of_processes[0])} metrics, and there are {len(self.trackers)} now; go on "
                "with the same ones"
            )
        size, rank = (1, 0) if self.group is None else (self.group.size, self.group.rank)
        if len(of_processes) == size:
            for (_, tracker), kept in zip(self.trackers, of_processes[rank], strict=True):
                tracker.load_state_dict(kept)
        else:
            self.carried += [self._told(running) for running in of_processes]

    def _told(self, running: list[Any]) -> list[Any]:
        """Return what a process had told of its metrics, of their states."""
        told = []
        for (metric, _), kept in zip(self.trackers, running, strict=True):
            tracker = metric.start()
            tracker.keep_apart()
            tracker.load_state_dict(kept)
            told.append(tracker.told())
        return told

    def __repr__(self) -> str:
        return f"PhaseMetrics({', '.join(f'{k}: {v[-1][1]}' for k, v in self.epochs.items())})"


def _named(found: Iterable[tuple[AnyMetric, dict[str, Any]]]) -> dict[str, Any]:
    """Return the values of several metrics by name.

    Raises:
        MetricError: Two gave a value of one name.
    """
    values: dict[str, Any] = {}
    for _, of_metric in found:
        for name, value in of_metric.items():
            if name in values:
                raise MetricError(f"two metrics are called {name!r}; give one another name: Metric(f, name='...')")
            values[name] = value
    return values


class Metrics(Callback):
    """Compute metrics over each epoch, on the device of their inputs.

    Each step has its weight in the means of an epoch: its number of rows, unless the phase says
    otherwise (`Phase.weight`). The loss always comes first. Numbers reach the host once per epoch.

    Where several processes train, an epoch's values are those of all rows, and the same in all processes, which tell
    each other once. A step's values, and those that a bar shows meanwhile, are those of the rows of one process. An
    object with ``update``, ``compute`` and ``reset`` that is none of torchmetrics' says by ``merge_state(others)`` how
    to take in what those of other processes have seen.

    Args:
        metrics: Functions ``(preds, ys) -> scalar``, `Metric`s, or objects with ``update``,
            ``compute`` and ``reset`` such as torchmetrics' metrics.
        name: Tells two of them apart.

    Raises:
        MetricError: Two metrics of one name, or something that is no metric.

    Reads: step, batch_size, cbstate.history
    Writes: cbstate.metrics
    Runs after: Recorder

    Example:
        >>> learner = testing.toy_learner(Recorder(), Metrics(mae, Metric(mse, name="error")))
        >>> history = learner.fit(2)
        >>> {name: len(values) for name, values in history.metrics[ValidationPhase].items()}
        {'loss': 2, 'mae': 2, 'error': 2}
    """

    reads = ("step", "batch_size", "cbstate.history")
    writes = ("cbstate.metrics",)
    run_after = (Recorder,)

    def __init__(self, *metrics: Any, name: str | None = None) -> None:
        super().__init__(name=name)
        given: list[AnyMetric] = [m if isinstance(m, (Loss, SmoothLoss, Metric)) else Metric(m) for m in metrics]
        if not any(isinstance(metric, Loss) for metric in given):
            given.insert(0, Loss())
        given.sort(key=lambda metric: not isinstance(metric, Loss))
        self.metrics = given
        self.found: set[str] = set()
        """Names of optional metrics whose inputs a step has had."""
        self.unseen: set[str] = set()
        """Names of metrics that no printer, plot or log shows, and of which it has warned."""
        names = [metric.name for metric in given]
        for metric_name in names:
            if names.count(metric_name) > 1:
                raise MetricError(
                    f"two metrics are called {metric_name!r}; give one another name: Metric(f, name='...')"
                )

    @property
    def draws(self) -> bool | None:  # type: ignore[override]  # depends on the metrics
        """False where all metrics are known not to draw; a user's function may."""
        return False if all(isinstance(m, (Loss, SmoothLoss)) or m.is_known for m in self.metrics) else None

    def records(self, phase: Phase | None) -> list[Expected]:
        """Return what its metrics are recorded as."""
        if isinstance(phase, ProbePhase):  # which has no epochs
            return []
        found = [expected for metric in self.metrics for expected in expected_of(metric, phase)]
        return found if phase is None else [evolve(each, name=seen_by(phase, each.name)) for each in found]

    def init(self, learner: Any) -> None:
        """Publish the metrics, once."""
        if "metrics" not in learner.cbstate:
            learner.cbstate.metrics = PhaseDict(PhaseMetrics)

    @on(EpochBegin)
    def start(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Begin this phase's metrics anew."""
        metrics = learner.cbstate.metrics[phase]
        metrics.started = True
        metrics.trackers = [(m, m.start()) for m in self.metrics if isinstance(phase, m.phase)]
        metrics.group, metrics.carried = learner.accelerator.group, []
        if metrics.group is not None:
            for _, tracker in metrics.trackers:
                tracker.keep_apart()

    @on(StepEnd)
    def update(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Update the metrics with a step."""
        running = behind(learner)
        metrics = running.cbstate.metrics[phase]
        group = metrics.group
        if group is not None and group.spare:  # of rows that count elsewhere
            return
        step, metric = running.step, None
        # A weight of the user's has to be checked each time
        weight = batch_size(vars(step)) if type(phase).weight is Phase.weight else checked_weight(phase, step)
        try:
            for each, tracker in metrics.trackers:
                metric = each
                tracker.update(step, weight)
        except Exception as error:
            if metric is not None:
                annotate(error, f"fluxloop: while updating the metric {metric.name!r}")
            raise

    @on(EpochEnd)
    def publish(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Record the epoch's values; a metric that saw no step has none."""
        metrics = learner.cbstate.metrics[phase]
        if not metrics.started:  # the epoch was cancelled when it began
            return
        metrics.started = False
        epoch = learner.cbstate.history[phase].epoch
        with torch.no_grad():
            values, seen = metrics.of_all()
            for name, value in values.items():
                metrics.record(seen_by(phase, name), epoch, value, "Metrics")
        self.found.update(
            m.name for m, _ in metrics.trackers if m.name in seen and isinstance(m, Metric) and m.optional
        )
        if learner.fit_phases:
            self._tell_unseen(metrics)
            if learner.cycle == learner.num_epochs and phase is learner.fit_phases[-1]:
                self._tell_absent()

    def _tell_absent(self) -> None:
        """Warn of optional metrics whose inputs no step of the fit had: the name may be misspelt."""
        for metric in self.metrics:
            if isinstance(metric, Metric) and metric.optional and metric.name not in self.found:
                self.found.add(metric.name)
                warn_user(
                    f"no step had the inputs {list(metric.inputs)} of the optional metric {metric.name!r}, so it has "
                    "no value; name entries that the phase stores: Metric(..., inputs=(...), optional=True)"
                )

    def _tell_unseen(self, metrics: Any) -> None:
        """Warn once of values that hold no numbers to print, plot or log, such as a confusion matrix."""
        last = {name: series[-1][1] for name, series in metrics.epochs.items() if series}
        unseen = {name: value for name, value in last.items() if not numbers_in(name, value)}
        if unseen.keys() - self.unseen:
            self.unseen |= unseen.keys()
            listed = ", ".join(f"{name!r} ({describe(value)})" for name, value in unseen.items())
            warn_user(
                f"the metrics {listed} are kept in the history, and what prints, plots and logs leaves them out; to "
                f"see them there record numbers, or vectors of up to {MOST_PARTS} of them"
            )

    def __repr__(self) -> str:
        return f"Metrics({', '.join(metric.name for metric in self.metrics)})"


def checked_weight(phase: Phase, step: Any) -> float | Tensor:
    """Return what a phase of the user's says that a step weighs.

    Raises:
        MetricError: It is no number from 0 on, and no tensor with one element.
    """
    with torch.no_grad():
        weight = weight_of(phase, step)
    if isinstance(weight, Tensor):
        scalar = weight.numel() == 1 and not weight.is_complex()
        if scalar and (not weight.is_cpu or 0 <= weight < float("inf")):  # nothing waits for another device
            return weight.detach().reshape(())
    elif isinstance(weight, (int, float, Real)) and 0 <= float(weight) < float("inf"):
        return weight if isinstance(weight, (int, float)) else float(weight)
    raise MetricError(
        f"{type(phase).__name__}.weight gave {describe(weight)}; expected what the step weighs in the means of an "
        "epoch: a number from 0 on, such as len(state.xs), or a tensor with one: (state.ys != -100).sum()"
    )


def _of(metric: AnyMetric, compute: Any) -> dict[str, Any]:
    """Compute a metric's values, naming it where that fails."""
    try:
        values: dict[str, Any] = compute()
        return values
    except Exception as error:
        annotate(error, f"fluxloop: while computing the metric {metric.name!r}")
        raise


def seen_by(phase: Phase, name: str) -> str:
    """Return a metric's name with the weights view that the phase runs: ``"loss@ema"``."""
    return f"{name}@{phase.model_view}" if phase.model_view and not name.endswith("*") else name


@define
class RecordsMetrics(Callback):
    """Base of callbacks that record metrics of their own, and say the metrics' names before they are recorded.

    A monitor of such a metric is checked when a fit begins, as one of a metric of `Metrics` is.
    """

    run_after = (Recorder, Metrics)

    recorded_as: ClassVar[type[Phase] | None] = None
    """The phase under which they are recorded; None for the one whose epoch ended."""
    higher_is_better: ClassVar[bool | None] = None
    """Which way they are better; None where that is not known."""
    rename_hint: ClassVar[str] = "keep one of them"
    """What to do about two that record one name, for the message; ``{}`` stands for the class."""

    @property
    def writes(self) -> tuple[str, ...]:  # type: ignore[override]  # computed: no message says to add one
        """The metrics."""
        return ("cbstate.metrics",)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics it records."""
        return ()

    def init(self, learner: Any) -> None:
        """Publish the metrics' container, once."""
        if "metrics" not in learner.cbstate:
            learner.cbstate.metrics = PhaseDict(PhaseMetrics)

    def records(self, phase: Phase | None) -> Sequence[Expected] | None:
        """Return the metrics that it records, where it says their names."""
        if phase is not None and not isinstance(phase, self.recorded_as or AbstractTrainingPhase):
            return ()
        mode: Mode | None = None if self.higher_is_better is None else "max" if self.higher_is_better else "min"
        return [Expected(name.lower(), mode) for name in self.metric_names] or None


@resolve_conflict.register(RecordsMetrics, RecordsMetrics)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _metrics_of_their_own(a: RecordsMetrics, b: RecordsMetrics) -> NoConflict:
    """Each records under names of its own.

    Raises:
        MetricError: Two record the same name.
    """
    for name in a.metric_names:
        if name in b.metric_names:
            raise MetricError(
                f"{type(a).__name__} and {type(b).__name__} both record the metric {name!r}; "
                f"{b.rename_hint.format(type(b).__name__)}"
            )
    return NoConflict()
