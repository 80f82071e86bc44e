"""Log metrics, hyperparameters and traces to backends."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

from fluxloop.callback import Callback, on
from fluxloop.callbacks.metrics import Metrics, seen_by
from fluxloop.callbacks.recorder import Recorder
from fluxloop.errors import CallbackTypeError, describe
from fluxloop.events import EpochBegin, EpochEnd, FitBegin, StepEnd
from fluxloop.guard.given import as_plain, check_number
from fluxloop.logging.backend import Backend, log_to
from fluxloop.logging.loggables import HyperParameters, Loggable, Scalar, loggable
from fluxloop.phase import AbstractTrainingPhase, Phase, ProbePhase, check_phase_type
from fluxloop.state import name_of


class LogCallback(Callback):
    """Base of the callbacks that log: what they log to is flushed when an epoch ends, closed when a fit does.

    A subclass handles what it likes and calls ``self.log(...)``. Backends may be shared by several. Where several
    processes train, the first one alone logs.

    Args:
        backends: What to log to: one or more, or lists of them.
        name: Tells two of them apart.

    Raises:
        CallbackTypeError: There is none, or something that is no backend.
        LogExistsError: When a fit begins that is not resumed, and another run's log is there.

    Reads: cbstate.history
    Runs after: Recorder
    """

    reads: ClassVar[Sequence[str]] = ("cbstate.history",)
    run_after: ClassVar[Sequence[type[Callback]]] = (Recorder,)
    draws: ClassVar[bool | None] = False
    main_only: ClassVar[bool] = True
    _begins_anywhere: ClassVar[bool] = True
    _steps = 0  # training steps ended, counted here: asking for them takes longer than many a step may

    def __init__(self, *backends: Backend | Sequence[Backend], name: str | None = None) -> None:
        super().__init__(name=name)
        groups = [given if isinstance(given, (tuple, list)) else (given,) for given in map(as_plain, backends)]
        self.backends: list[Backend] = [backend for group in groups for backend in group]
        wrong = [backend for backend in self.backends if not isinstance(backend, Backend)]
        if wrong or not self.backends:
            raise CallbackTypeError(
                f"{type(self).__name__} was given {describe(wrong[0]) if wrong else 'nothing'} to log to; expected a "
                f"backend: {type(self).__name__}(..., CSV('metrics.csv')) or TensorBoard('runs/1')"
            )

    def log(self, thing: Loggable, name: str, step: int, group: tuple[str, ...]) -> None:
        """Log something to every backend."""
        log_to(self.backends, thing, name, step, group)

    def log_number(self, name: str, step: int, group: tuple[str, ...], number: float) -> None:
        """Log a number that has reached the host."""
        self.log(Scalar(number), name, step, group)

    @on(FitBegin)
    def begin(self, event: FitBegin, phase: Phase, learner: Any) -> None:
        """Refuse to write into another run's log; close what is opened when the fit ends."""
        for backend in self.backends:
            backend.begin(event.resumed)
            learner.defer(backend.close)

    @on(EpochBegin, AbstractTrainingPhase)
    def count(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """See how many training steps have ended."""
        self._steps = learner.trained_steps

    @on(EpochEnd)
    def flush(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Write what waits."""
        for backend in self.backends:
            backend.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how far the backends have written."""
        return {"backends": [backend.state_dict() for backend in self.backends]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        for backend, kept in zip(self.backends, state["backends"], strict=True):
            backend.load_state_dict(kept)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.backends))})"


class LogMetrics(LogCallback):
    """Log the metrics: each step's values, and those of each epoch.

    A step's are in the group ``("step", "training")``, over training steps; an epoch's in
    ``("epoch", "training")`` and ``("epoch", "validation")``, over epochs, with what probes found.
    Numbers reach the host without waiting for the device.

    Args:
        backends: What to log to: one or more, or lists of them.
        every: Log the values of every so many steps.
        phase: The phases whose steps are logged; `Phase` logs those of validation too, over steps of their own.
        name: Tells two of them apart.

    Raises:
        CallbackTypeError: There is no backend, or something that is none.
        ValueError: `every` is less than 1.
        LogExistsError: When a fit begins that is not resumed, and another run's log is there.

    Reads: cbstate.history, cbstate.metrics
    Runs after: Recorder, Metrics

    Example:
        >>> from fluxloop.logging import Memory
        >>> memory = Memory()
        >>> history = testing.toy_learner(Recorder(), Metrics(), LogMetrics(memory, every=16)).fit(1)
        >>> [(record.step, *record.group, record.name) for record in memory.records]
        [(16, 'step', 'training', 'loss'), (1, 'epoch', 'training', 'loss'), (1, 'epoch', 'validation', 'loss')]
    """

    reads = ("cbstate.history", "cbstate.metrics")
    run_after = (Recorder, Metrics)

    def __init__(
        self,
        *backends: Backend | Sequence[Backend],
        every: int = 1,
        phase: type[Phase] = AbstractTrainingPhase,
        name: str | None = None,
    ) -> None:
        super().__init__(*backends, name=name)
        check_number(type(self).__name__, "every", every, least=1, whole=True)
        self.every = int(every)
        check_phase_type("LogMetrics", phase)
        self.phase = phase

    @on(StepEnd)
    def log_step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Log the values of a step."""
        if phase.gradients:
            self._steps += 1
        if (phase.gradients and self._steps % self.every) or not isinstance(phase, self.phase):
            return
        counts = learner.cbstate.history[phase]
        step = learner.trained_steps if phase.gradients else counts.steps
        if phase.gradients or step % self.every == 0:
            group = ("step", counts.label or phase.data_key)
            for name, value in learner.cbstate.metrics[phase].latest().items():
                learner.host(value, partial(self.log_number, seen_by(phase, name), step, group))

    @on(EpochEnd)
    def log_epoch(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Log the values of an epoch."""
        counts = learner.cbstate.history[phase]
        epoch = counts.epoch
        sources: list[tuple[Any, str]] = [(phase, counts.label)]
        if phase.gradients:
            sources.append((ProbePhase, ProbePhase.data_key))
        for source, label in sources:
            for name, number in learner.cbstate.metrics[source].numbers_at(epoch).items():
                self.log(Scalar(number), name, epoch, ("epoch", label))
        self.flush(event, phase, learner)


class LogHyperParams(LogCallback):
    """Log hyperparameters: given ones when the first fit begins, scheduled ones in each training step that sets one.

    Scheduled are those in ``cbstate.hyperparameters``; they are in the group
    ``("step", "hyperparameters")``, over training steps.

    Args:
        backends: What to log to: one or more, or lists of them.
        params: By name; nested mappings become dotted names. Or an object whose fields they are: a dataclass, a
            model of pydantic, what argparse gives.
        name: Tells two of them apart.

    Raises:
        CallbackTypeError: There is no backend, or something that is none.
        LogExistsError: When a fit begins that is not resumed, and another run's log is there.

    Reads: cbstate
    Runs after: Recorder

    Example:
        >>> from fluxloop.logging import Memory
        >>> memory = Memory()
        >>> learner = testing.toy_learner(Recorder(), LogHyperParams(memory, params={"optimizer": {"lr": 0.001}}))
        >>> history = learner.fit(1)
        >>> memory.records[0].loggable
        HyperParameters(values={'optimizer.lr': 0.001})
    """

    reads = ("cbstate",)  # the whole of it: nobody need write the entry

    def __init__(
        self,
        *backends: Backend | Sequence[Backend],
        params: Mapping[str, Any] | Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(*backends, name=name)
        self.params = HyperParameters({} if params is None else params)
        self._logged = False
        self._newest: dict[str, Any] = {}

    def init(self, learner: Any) -> None:
        """Begin anew."""
        self._logged, self._newest = False, {}

    @on(FitBegin)
    def log_given(self, event: FitBegin, phase: Phase, learner: Any) -> None:
        """Log the given hyperparameters, once."""
        self.begin(event, phase, learner)
        if self.params.values and not self._logged:
            self.log(self.params, "hyperparameters", 0, ())
        self._logged = True

    @on(StepEnd, AbstractTrainingPhase)
    def log_scheduled(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Log the scheduled hyperparameters that have a new value."""
        cbstate = learner.cbstate
        if "hyperparameters" in cbstate:
            for name, step, value in _new_entries(cbstate.hyperparameters, self._newest):
                if isinstance(value, Real):
                    self.log(Scalar(float(value)), name, step, ("step", "hyperparameters"))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how far the backends have written, and what was logged last."""
        return {**super().state_dict(), "logged": self._logged, "newest": dict(self._newest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        super().load_state_dict(state)
        self._logged, self._newest = state["logged"], dict(state["newest"])


class LogTraces(LogCallback):
    """Log what `Traces` recorded in each step: numbers, and anything loggable.

    Those of training steps are in the group ``("step", "traces")``, over training steps; those of other
    phases, and of a second training phase, in ``("step", "traces", "validation")``, named as the phase's
    metrics are, a phase that only watches over steps of its own. Tensors of more than one element, which
    `Traces` records as they are, need a function that makes a loggable of them, such as ``Histogram``.

    Args:
        backends: What to log to: one or more, or lists of them.
        name: Tells two of them apart.

    Raises:
        CallbackTypeError: There is no backend, or something that is none.
        LogExistsError: When a fit begins that is not resumed, and another run's log is there.

    Reads: cbstate.history, cbstate.traces
    Runs after: Recorder

    Example:
        >>> from fluxloop.logging import Memory
        >>> memory = Memory()
        >>> traces = Traces({"rows": lambda learner: len(learner.step.xs)}, phase=TrainingPhase)
        >>> history = testing.toy_learner(Recorder(), traces, LogTraces(memory), num_batches=2).fit(1)
        >>> [(record.step, record.name, record.loggable.value) for record in memory.records]
        [(1, 'rows', 8.0), (2, 'rows', 8.0)]
    """

    reads = ("cbstate.history", "cbstate.traces")

    def init(self, learner: Any) -> None:
        """Begin anew."""
        self._newest: dict[str, dict[str, Any]] = {}

    @on(StepEnd)
    def log_traced(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Log the step's traces."""
        traces = learner.cbstate.traces[phase]
        if not traces:
            return
        counts = learner.cbstate.history[phase]
        label = counts.label or phase.data_key
        group = ("step", "traces") if label == AbstractTrainingPhase.data_key else ("step", "traces", label)
        step = learner.trained_steps if phase.gradients else counts.steps
        newest = self._newest.setdefault(name_of(phase), {})
        for name, _, value in _new_entries(traces, newest):
            if isinstance(value, Tensor) and value.numel() == 1:
                learner.host(value.reshape(()), partial(self.log_number, name, step, group))
            elif isinstance(value, (Real, Loggable)):
                self.log(loggable(value), name, step, group)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how far the backends have written, and what was logged last."""
        return {**super().state_dict(), "newest": copy.deepcopy(self._newest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        super().load_state_dict(state)
        self._newest = copy.deepcopy(state["newest"])


def _new_entries(table: Any, newest: dict[str, Any]) -> Iterator[tuple[str, int, Any]]:
    """Yield the name, step and value of each series that has a new entry since the last time."""
    own = dict.items(table) if isinstance(table, dict) else table.items()
    for name, series in own:  # not those of a read-only view, which would copy the whole series each step
        if series and newest.get(name) != series[-1][0]:
            newest[name], value = series[-1]
            yield name, newest[name], value
