"""Set hyperparameters by schedules while training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal

from attrs import define, field

from fluxloop.callback import Callback, NoConflict, on, resolve_conflict
from fluxloop.compute.models import by_name
from fluxloop.errors import CallbackConflictError, CheckpointError, OptimizerError, describe, did_you_mean
from fluxloop.events import EpochBegin, EpochEnd, StepBegin, StepEnd
from fluxloop.guard.given import as_python
from fluxloop.hyperparameters import (
    Attribute,
    HyperParameter,
    OptimizerOption,
    as_hyperparameter,
    check_option,
    get_hyperparameter,
    put,
    set_hyperparameter,
)
from fluxloop.persist.arguments import arguments_of, changed
from fluxloop.persist.series import Series
from fluxloop.phase import AbstractTrainingPhase
from fluxloop.schedules import Schedule, check_schedule, value_at, written

Unit = Literal["step", "update", "epoch"]
UNITS = ("step", "update", "epoch")


def check_unit(callback: str, unit: object) -> None:
    """Raise for a unit that is none.

    Raises:
        ValueError: Names the one that was probably meant.
    """
    if unit not in UNITS:
        raise ValueError(
            f"{callback}(unit={unit!r}) was given; expected 'step' or 'epoch', or 'update'"
            f"{did_you_mean(str(unit), UNITS)}"
        )


def record(table: dict[str, list[tuple[int, Any]]], label: str, step: int, value: Any) -> None:
    """Record the value that a training step has; a second one replaces the first.

    Args:
        table: ``cbstate.hyperparameters``.
        label: The hyperparameter's.
        step: From 1.
        value: Its value.
    """
    series = table.setdefault(label, Series())
    if series and series[-1][0] == step:
        series.pop()
    series.append((step, value))


def _read(schedules: Any) -> dict[HyperParameter, float | Schedule]:
    """Read the schedules by hyperparameter.

    Raises:
        TypeError: No mapping, or something in it is no hyperparameter.
        ValueError: Something is no schedule, or two of them would set the same thing.
    """
    if not isinstance(schedules, Mapping):
        raise TypeError(
            f"Scheduler({describe(schedules)}) was given; expected schedules by hyperparameter: "
            "Scheduler({LearningRate: one_cycle(1000, 0.1)})"
        )
    if not schedules:
        raise ValueError("Scheduler({}) was given; expected at least one schedule: Scheduler({LearningRate: 0.1})")
    read: dict[HyperParameter, float | Schedule] = {}
    for given, schedule in schedules.items():
        parameter = as_hyperparameter(given)
        check_schedule(schedule, f"the hyperparameter {parameter.label!r}")
        if parameter in read:
            raise ValueError(f"Scheduler was given {parameter!r} twice; expected one schedule for each")
        read[parameter] = schedule
    for first, second in combinations(read, 2):
        if first.overlaps(second) or second.overlaps(first):
            raise ValueError(
                f"Scheduler was given {first!r} and {second!r}, which set the same thing; keep one of them"
            )
        if first.label == second.label:
            raise ValueError(
                f"Scheduler was given {first!r} and {second!r}, both recorded as {first.label!r}; give one a label of "
                f"its own: Attribute(..., label={first.label + '2'!r})"
            )
    return read


def _check_value(parameter: HyperParameter, label: str, schedule: Any, t: int, value: Any) -> None:
    """Raise for a value of a schedule that is no number, not finite, or negative where an optimizer takes none.

    Raises:
        ValueError: Names the schedule and its step.
    """
    which = f"the schedule of {label} ({written(schedule)}), asked for its value at {t},"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{which} gave {value!r}; expected a finite number")
    if isinstance(parameter, OptimizerOption):
        for option in parameter.options:
            check_option(which, option, value)


@define
class Scheduler(Callback):
    """Set hyperparameters by schedules: ``Scheduler({LearningRate: one_cycle(1000, 0.1)})``.

    At the begin of each training step (or epoch) every hyperparameter is set to ``schedule(t)``.
    `t` counts from 0, over all training phases together, what has ended: training steps
    (each batch is one), updates of an optimizer (fewer, where gradients of several batches add
    up), or epochs. Where ``Accelerator(accumulate=k)`` makes one update of k batches, they are one
    training step here, as one large batch would be. A step that was cancelled does not count: the
    next one gets the same value. In other phases nothing is set and nothing counted.

    Learning rates and weight decays of several parameter groups stay in the ratios that they were
    given: the group with the largest gets the schedule's value, the others their share of it, so a
    group without weight decay stays without. (``find_lr`` does the same, and a group's
    ``lr_scale``, as timm makes it, is a further factor.) A group that is named,
    ``LearningRate("G", group=1)``, gets the value itself.

    ``cbstate.hyperparameters["learning_rate"]`` is the list of (training step from 1, value), with
    one entry for each time it was set. Schedules must not draw random numbers.

    A resumed run goes on with the schedules that it began with; others are an error. Functions
    are compared by their names and by what they were made with: the arguments of a ``partial``, and
    numbers that they close over.

    Args:
        schedules: Schedules or numbers by hyperparameter: `LearningRate` (every optimizer and
            parameter group), ``LearningRate("G", group=1)``, `WeightDecay`, `Momentum`,
            ``Attribute(ema, "decay")``, or one of your own.
        unit: What `t` counts: ``"step"``, ``"update"`` (of the optimizer that a hyperparameter names,
            or the only one) or ``"epoch"``.

    Raises:
        TypeError: Something is no hyperparameter.
        ValueError: Something is no schedule, two set the same thing, or there is no such unit.
        OptimizerError: When the learner is made: it has no such optimizer, group or option; groups
            differ in an option other than these two; or it is unclear whose updates count.
        CheckpointError: When a checkpoint is loaded: it is of a run with other schedules.

    Reads: (cbstate.history and optimizer for ``unit="update"``)
    Writes: cbstate.hyperparameters, optimizer (or what its hyperparameters say)

    Example:
        >>> learner = testing.toy_learner(Scheduler({LearningRate: linear(total=4, start=1.0, end=0.0)}), num_batches=4)
        >>> history = learner.fit(1)
        >>> learner.cbstate.hyperparameters["learning_rate"]
        [(1, 1.0), (2, 0.75), (3, 0.5), (4, 0.25)]
    """

    schedules: dict[HyperParameter, float | Schedule] = field(converter=_read)
    unit: Unit = field(default="step")
    _labels: tuple[str, ...] = field(init=False, repr=False)
    _functions: dict[str, Any] = field(init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)
    _ended: int = field(default=0, init=False, repr=False)
    """Training steps of the learner, also those before this one was added."""
    _epochs: int = field(default=0, init=False, repr=False)
    _waiting: bool = field(default=False, init=False, repr=False)
    """Whether a step of several batches has begun and not ended."""
    _given: dict[str, dict[str, Any]] = field(factory=dict, init=False, repr=False)
    """By label, what each parameter group had when the learner was made, where their ratios are to stay."""
    _before: dict[str | None, int] = field(factory=dict, init=False, repr=False)
    """By optimizer, its updates before the learner had this callback."""

    draws = False
    _fixed = ("schedules", "unit")

    @_labels.default
    def _read_labels(self) -> tuple[str, ...]:
        return tuple(parameter.label for parameter in self.schedules)

    @_functions.default
    def _read_functions(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for parameter, schedule in self.schedules.items():
            if "a function" in written(schedule):
                found |= arguments_of(schedule, parameter.label)
        return found

    @unit.validator
    def _check_unit(self, attribute: object, unit: object) -> None:
        check_unit("Scheduler", unit)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the unit
        """The counts of updates, where it counts these."""
        return ("cbstate.history", "optimizer") if self.unit == "update" else ()

    @property
    def writes(self) -> tuple[str, ...]:  # type: ignore[override]  # its hyperparameters'
        """The records, and what the hyperparameters change."""
        changed = dict.fromkeys(path for parameter in self.schedules for path in parameter.writes)
        return ("cbstate.hyperparameters", *changed)

    @property
    def in_compiled_step(self) -> Literal["watched"] | None:  # type: ignore[override]  # depends on what it sets
        """Whether models have to be compared at every step, to see the attributes that it sets."""
        return "watched" if any(isinstance(parameter, Attribute) for parameter in self.schedules) else None

    def init(self, learner: Any) -> None:
        """Check that every hyperparameter is there, and begin counting; nothing is set yet."""
        given = {}
        for parameter, label in zip(self.schedules, self._labels, strict=True):
            get_hyperparameter(learner, parameter)
            if isinstance(parameter, OptimizerOption) and parameter.group is None:
                given[label] = _ratios_of(parameter, learner)
            if self.unit == "update":
                _optimizer_of(parameter, learner)
        self._given = {label: values for label, values in given.items() if values}
        self._steps = self._epochs = 0
        self._ended = learner.trained_steps
        self._before = _updates(learner) if self.unit == "update" else {}
        if "hyperparameters" not in learner.cbstate:
            learner.cbstate.hyperparameters = {}

    @on(EpochBegin, AbstractTrainingPhase)
    def begin_epoch(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Set the hyperparameters of an epoch."""
        self._ended = learner.trained_steps or self._ended
        if self.unit == "epoch":
            self._set(learner, self._epochs)

    @on(StepBegin, AbstractTrainingPhase)
    def begin_step(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Set the hyperparameters of a step."""
        if self.unit != "epoch":
            self._set(learner, self._steps)

    @on(StepEnd, AbstractTrainingPhase)
    def count_step(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Count a step, with the last of the batches that make an update."""
        self._waiting = learner.is_accumulating
        if not self._waiting:
            self._steps += 1
        self._ended += 1

    @on(EpochEnd, AbstractTrainingPhase)
    def count_epoch(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Count an epoch, and the step whose last batches are fewer."""
        self._epochs += 1
        if self._waiting and not learner.is_accumulating:
            self._waiting = False
            self._steps += 1

    def _written(self) -> dict[str, str]:
        schedules = zip(self._labels, self.schedules.values(), strict=True)
        return {label: f"{written(schedule)} per {self.unit}" for label, schedule in schedules}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the schedules as texts, and where they are."""
        return {
            "schedules": self._written(),
            "functions": self._functions,
            "steps": self._steps,
            "ended": self._ended,
            "epochs": self._epochs,
            "given": self._given,
            "before": self._before,
            "waiting": self._waiting,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps.

        Raises:
            CheckpointError: It is of a run with other schedules; nothing is changed.
        """
        before, now = state["schedules"], self._written()
        for label in [*before, *now]:
            old, new = before.get(label, "nothing"), now.get(label, "nothing")
            if old != new:
                raise CheckpointError(
                    f"{label} was scheduled by {old}, and is now by {new}; go on with the old one, or begin a new "
                    "run from the weights: learner.load_weights(file)"
                )
        other = changed(state.get("functions", {}), self._functions)
        if other:
            raise CheckpointError(
                f"the functions of a Scheduler were made with {'; '.join(other[:3])}; go on with the old ones, or "
                "begin a new run from the weights: learner.load_weights(file)"
            )
        self._steps, self._epochs = state["steps"], state["epochs"]
        self._ended = state.get("ended", state["steps"])
        self._given = state.get("given", self._given)  # older checkpoints have neither
        self._before = state.get("before", self._before)
        self._waiting = state.get("waiting", False)

    def _set(self, learner: Any, t: int) -> None:
        table = learner.cbstate.hyperparameters
        updates = _updates(learner) if self.unit == "update" else {}
        for (parameter, schedule), label in zip(self.schedules.items(), self._labels, strict=True):
            if self.unit == "update":
                name = _optimizer_of(parameter, learner)
                t = updates.get(name, 0) - self._before.get(name, 0)
            value = as_python(value_at(schedule, t))
            _check_value(parameter, label, schedule, t, value)
            given = self._given.get(label)
            if given and isinstance(parameter, OptimizerOption):
                largest = max(given.values())
                for place, group, option in parameter.places(learner):
                    share = given.setdefault(place, _given_to(group, option))  # a group may join while training
                    put(group, option, value * (share / largest))
            else:
                set_hyperparameter(learner, parameter, value)
            record(table, label, self._ended + 1, value)


def _given_to(group: Mapping[str, Any], option: str) -> float:
    """Return what a parameter group was given, times its ``lr_scale`` where it has one."""
    return float(group[option]) * (float(group.get("lr_scale", 1.0)) if option == "lr" else 1.0)


def _ratios_of(parameter: OptimizerOption, learner: Any) -> dict[str, float]:
    """Return what each parameter group was given, where they differ and stay in their ratios; else nothing.

    Raises:
        OptimizerError: They differ in an option whose ratios mean nothing.
    """
    if parameter.scales:
        given = {place: _given_to(group, option) for place, group, option in parameter.places(learner)}
        if not any(given.values()):  # a former schedule has ended at 0, where no ratio can be read
            given = {place: _given_to(group, option) for place, group, option in parameter.places_given(learner)}
        return given if len(set(given.values())) > 1 else {}
    values = parameter.given(learner)
    if any(value != next(iter(values.values())) for value in values.values()):
        names = [name for name, _ in by_name(learner.optimizer)] if parameter.optimizer is None else []
        meant = repr(names[0]) if len(names) > 1 else "group=0"
        raise OptimizerError(
            f"a schedule of {parameter!r} would set all parameter groups alike, and they were given {values} (by "
            f"optimizer and group); name the one that is meant: {type(parameter).__name__}({meant})"
        )
    return {}


def _optimizer_of(parameter: HyperParameter, learner: Any) -> str | None:
    """Return the name of the optimizer whose updates a schedule counts.

    Raises:
        OptimizerError: There are several, and the hyperparameter names none.
    """
    if isinstance(parameter, OptimizerOption) and parameter.optimizer is not None:
        return parameter.optimizer
    names = [name for name, _ in by_name(learner.optimizer)]
    if len(names) == 1:
        return names[0]
    raise OptimizerError(
        f"Scheduler(unit='update') counts the updates of one optimizer, and the learner has {names}; name it, such as "
        f"LearningRate({names[0]!r}), or count training steps: unit='step' (given: {parameter!r})"
    )


def _updates(learner: Any) -> dict[str | None, int]:
    """Return the updates of each optimizer so far, over all phases."""
    total: Counter[str | None] = Counter()
    for counts in learner.cbstate.history.values():
        total.update(dict(counts.updates))
    return dict(total)


@resolve_conflict.register(Scheduler, Scheduler)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _different_things(a: Scheduler, b: Scheduler) -> NoConflict:
    """Two schedulers of different hyperparameters may run in either order.

    Raises:
        CallbackConflictError: They set the same one.
    """
    for first in a.schedules:
        for second in b.schedules:
            if first.overlaps(second) or second.overlaps(first) or first.label == second.label:
                raise CallbackConflictError(
                    f"two Schedulers set the same thing, {first!r} and {second!r}; keep one of them, or name the "
                    "optimizer or parameter group of each"
                )
    return NoConflict()
