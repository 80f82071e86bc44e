"""Use the schedulers of ``torch.optim.lr_scheduler``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from attrs import define, field
from torch import Tensor
from torch.optim import Optimizer

from fluxloop.callback import Callback, NoConflict, RunFirst, on, resolve_conflict
from fluxloop.callbacks.scheduler import Scheduler, Unit, check_unit, record
from fluxloop.callbacks.torch_schedulers import (
    advance,
    check_same,
    functions_of,
    mentioned,
    says_mode,
    state_of,
    state_when_made,
    takes_metrics,
    wants_count,
    with_counters,
)
from fluxloop.compute.saved import save_options
from fluxloop.errors import CallbackConflictError, CheckpointError, MetricError, describe
from fluxloop.events import CycleEnd, EpochBegin, EpochEnd, FitBegin, StepBegin, StepEnd, UpdateEnd
from fluxloop.hyperparameters import LearningRate, Momentum, OptimizerOption
from fluxloop.monitor import Monitor
from fluxloop.order.access import overlap, parse
from fluxloop.phase import AbstractTrainingPhase, FittingPhase, Phase

Factory = Callable[[Optimizer], Any]
HYPERPARAMETERS, METRICS = ("cbstate", "hyperparameters"), ("cbstate", "metrics")


@define
class LRScheduler(Callback):
    """Use any scheduler of ``torch.optim.lr_scheduler``: ``LRScheduler(partial(StepLR, step_size=10))``.

    Each optimizer gets a scheduler of its own, made once, when the learner is made. It is stepped

    - per epoch, when an epoch of a training phase ends;
    - per step, when a training step ends, one batch: what ``Scheduler(unit="step")`` counts;
    - per update, as often as its optimizer was updated (`UpdateEnd`): what ``Scheduler(unit="update")``
      counts. Those are fewer than steps where gradients of several batches add up;
    - a `ReduceLROnPlateau`, or another whose ``step`` takes ``metrics``, when the epoch ends that
      gave the monitored metric a new value. NaN is a value that is no improvement.

    ``cbstate.hyperparameters["learning_rate"]`` is the list of (training step from 1, rate), with
    an entry per step or epoch; ``"learning_rate/G"`` for a named optimizer, and
    ``"learning_rate/0"``, ``"learning_rate/1"``, … where it has several parameter groups.

    A checkpoint keeps the scheduler's state, and what it was made with: resuming with another
    `gamma` or `T_max` is an error, not a silent return to the old one. So are other arguments of
    the functions in it, such as those of a `LambdaLR`: of a ``partial``, and numbers they close over.

    Args:
        factory: ``(optimizer) -> scheduler``: a ``functools.partial`` of a class, or a function.
        unit: ``"step"``, ``"update"`` or ``"epoch"``.
        optimizer: Name of the optimizer; left out, all of them.
        monitor: What a plateau's scheduler watches; left out, ``"validation/loss"``.

    Raises:
        TypeError: The factory is no function, or makes no scheduler.
        ValueError: No such unit, or a monitor for a scheduler that takes none.
        OptimizerError: When the learner is made: it has no such optimizer.
        MetricError: When a fit begins: it will not record the monitored metric; or a plateau's scheduler was given no
            `mode`, and what its default calls better, the metric calls worse.
        CheckpointError: When a checkpoint is loaded: it is of a scheduler with other arguments.

    Attributes:
        schedulers: The torch schedulers by the optimizer's name, None for a single one.

    Reads: (cbstate.metrics for a plateau)
    Writes: cbstate.hyperparameters, optimizer (only the one that is named)

    Example:
        >>> from torch.optim.lr_scheduler import StepLR
        >>> halve = LRScheduler(partial(StepLR, step_size=1, gamma=0.5))
        >>> learner = testing.toy_learner(Recorder(), halve, num_batches=1)
        >>> history = learner.fit(3)
        >>> learner.optimizer.param_groups[0]["lr"]  # 0.001, halved three times
        0.000125
    """

    factory: Factory
    unit: Unit = field(default="epoch", kw_only=True)
    optimizer: str | None = field(default=None, kw_only=True)
    monitor: str | None = field(default=None, kw_only=True)
    schedulers: dict[str | None, Any] = field(factory=dict, init=False, repr=False)
    _made: dict[str | None, dict[str, Any]] = field(factory=dict, init=False, repr=False)
    """By optimizer, the state that a scheduler had when it was made: what it was made with."""
    _functions: dict[str | None, dict[str, Any]] = field(factory=dict, init=False, repr=False)
    """By optimizer, what the functions in a scheduler were made with."""
    _watched: Monitor | None = field(default=None, init=False, repr=False)
    """The metric that a plateau's scheduler watches; None for other schedulers."""
    _target: LearningRate = field(init=False, repr=False)
    """The hyperparameter that is set, for conflicts."""
    _updated: Counter[str | None] = field(factory=Counter, init=False, repr=False)
    """Updates in the running step, by optimizer."""
    _ended: int = field(default=0, init=False, repr=False)
    """Training steps of the learner, also those before this callback was added."""
    _counted: Counter[str | None] = field(factory=Counter, init=False, repr=False)
    """How often each scheduler was stepped."""
    _seen: int = field(default=0, init=False, repr=False)
    """The epoch of the newest value of the metric that was used."""
    _waiting: bool = field(default=False, init=False, repr=False)
    """Whether a step of several batches has begun and not ended."""

    draws = False
    _fixed = ("factory", "unit", "optimizer", "monitor")
    in_compiled_step = "after"  # at UpdateEnd it only counts

    def __attrs_post_init__(self) -> None:
        if not callable(self.factory):
            raise TypeError(
                f"LRScheduler({describe(self.factory)}) was given; expected a function of the optimizer: "
                "LRScheduler(lambda optimizer: StepLR(optimizer, step_size=10))"
            )
        check_unit("LRScheduler", self.unit)
        self._target = LearningRate(self.optimizer)
        if self.monitor is not None:
            self._watched = Monitor(self.monitor)
        elif "ReduceLROnPlateau" in mentioned(self.factory):
            self._watched = Monitor()

    @property
    def monitors(self) -> list[Monitor]:
        """The metric that a plateau's scheduler watches."""
        return [] if self._watched is None else [self._watched]

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the scheduler
        """The metrics, where one is watched."""
        return () if self._watched is None else ("cbstate.metrics",)

    @property
    def writes(self) -> tuple[str, ...]:  # type: ignore[override]  # the optimizer's
        """The records, and the optimizer."""
        return ("cbstate.hyperparameters", *self._target.writes)

    def init(self, learner: Any) -> None:
        """Make the schedulers, once for an optimizer; begin counting."""
        optimizers = dict(self._target.optimizers(learner))
        if "hyperparameters" not in learner.cbstate:
            learner.cbstate.hyperparameters = {}
        held = {name: scheduler.optimizer for name, scheduler in self.schedulers.items()}
        if held.keys() == optimizers.keys() and all(held[name] is optimizers[name] for name in held):
            return
        undo = [save_options(optimizer) for optimizer in optimizers.values()]
        try:
            schedulers = {name: self._make(optimizer) for name, optimizer in optimizers.items()}
        except BaseException:
            for restore in undo:
                restore()
            raise
        self.schedulers = schedulers
        self._made = {name: state_when_made(scheduler) for name, scheduler in schedulers.items()}
        self._functions = {name: functions_of(scheduler) for name, scheduler in schedulers.items()}
        self._updated, self._ended, self._seen = Counter(), learner.trained_steps, 0
        self._counted = Counter()
        if self._watched is not None:
            modes = [scheduler.mode for scheduler in schedulers.values() if hasattr(scheduler, "mode")]
            self._watched.mode = modes[0] if modes and modes[0] in ("min", "max") else "min"
            self._seen = self._watched.newest_epoch(learner.cbstate.metrics)

    def _make(self, optimizer: Optimizer) -> Any:
        """Make the scheduler of an optimizer.

        Raises:
            TypeError: The factory makes something else.
            ValueError: It is none for this optimizer, unit or monitor.
        """
        wrapped = "step" in vars(optimizer)
        try:
            scheduler = self.factory(optimizer)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            name = getattr(self.factory, "__name__", "factory")
            raise TypeError(
                f"LRScheduler({name}) could not make a scheduler of the optimizer alone: "
                f"{str(error).removesuffix('.')}; expected a function "
                f"of the optimizer: LRScheduler(partial({name}, ...)), with the scheduler's arguments in it"
            ) from error
        if not wrapped:  # torch's wrapper only notes that there was a step; `advance` vouches for that
            vars(optimizer).pop("step", None)
        if not all(hasattr(scheduler, name) for name in ("step", "state_dict", "load_state_dict", "optimizer")):
            raise TypeError(
                f"the factory of LRScheduler made {describe(scheduler)}; expected a torch.optim.lr_scheduler"
            )
        if scheduler.optimizer is not optimizer:
            raise ValueError(
                "the factory of LRScheduler made a scheduler of another optimizer; expected one of the optimizer that "
                "it is given: lambda optimizer: StepLR(optimizer, step_size=10)"
            )
        name = type(scheduler).__name__
        if wants_count(scheduler) and self.unit != "epoch" and not hasattr(scheduler, "step_update"):
            raise ValueError(f"{name} needs the number of epochs; expected LRScheduler(..., unit='epoch')")
        if takes_metrics(scheduler) and self._watched is None:
            raise ValueError(f"{name} watches a metric; say which: LRScheduler(..., monitor='validation/loss')")
        if takes_metrics(scheduler) and self.unit != "epoch":
            raise ValueError(f"{name} watches a metric of each epoch; expected LRScheduler(..., unit='epoch')")
        if self._watched is not None and not takes_metrics(scheduler):
            raise ValueError(
                f"monitor={self._watched.metric!r} was given for {name}, which watches nothing; leave it out"
            )
        return scheduler

    @on(FitBegin, FittingPhase)
    def begin(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Raise for a plateau's scheduler that was given no mode, and whose default is the wrong one.

        Raises:
            MetricError: Says what to type.
        """
        watched = self._watched
        if watched is None or watched.known in (None, watched.mode) or says_mode(self.factory):
            return
        name, metric = type(next(iter(self.schedulers.values()))).__name__, watched.metric
        raise MetricError(
            f"{name} watches {metric!r} with mode={watched.mode!r}, its default, and {watched.known!r} is better; say "
            f"which: LRScheduler(partial({name}, mode={watched.known!r}), monitor={metric!r})"
        )

    @on(EpochBegin, AbstractTrainingPhase)
    def begin_epoch(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Record the rates of an epoch."""
        self._ended = learner.trained_steps or self._ended
        if self.unit == "epoch":
            self._record(learner)

    @on(StepBegin, AbstractTrainingPhase)
    def begin_step(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Record the rates of a step."""
        if self.unit != "epoch":
            self._record(learner)

    @on(UpdateEnd, AbstractTrainingPhase)
    def note_update(self, event: UpdateEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Note that an optimizer was updated."""
        if event.name in self.schedulers:
            self._updated[event.name] += 1

    @on(StepEnd, AbstractTrainingPhase)
    def end_step(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Step the schedulers that count steps, or the updates that there were in this one."""
        self._ended += 1
        self._waiting = learner.is_accumulating
        self._advance(not self._waiting)

    def _advance(self, step_ended: bool) -> None:
        """Step the schedulers that count steps, where one has ended, or those that count updates."""
        for name, scheduler in self.schedulers.items() if self.unit != "epoch" else ():
            for _ in range(self._updated[name] if self.unit == "update" else step_ended):
                self._counted[name] += 1
                advance(scheduler, count=self._counted[name], updates=True)
        self._updated.clear()

    @on(EpochEnd)
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Step the schedulers that count epochs, or watch a metric that has a new value."""
        if self._waiting and not learner.is_accumulating:  # its last update was made at the end of the epoch
            self._waiting = False
            self._advance(step_ended=True)
        if self._watched is not None:
            new = self._watched.new(learner.cbstate.metrics, self._seen)
            if new is not None:
                self._seen = new[0]
                for scheduler in self.schedulers.values():
                    advance(scheduler, new[1])
        elif self.unit == "epoch" and isinstance(phase, AbstractTrainingPhase):
            for name, scheduler in self.schedulers.items():
                self._counted[name] += 1
                advance(scheduler, count=self._counted[name])

    @on(CycleEnd, FittingPhase)
    def end_cycle(self, event: CycleEnd, phase: FittingPhase, learner: Any) -> None:
        """Raise where nobody has recorded the metric that is watched."""
        if self._watched is not None:
            self._watched.require(learner.cbstate.metrics)

    def _record(self, learner: Any) -> None:
        table = learner.cbstate.hyperparameters
        for name, scheduler in self.schedulers.items():
            groups = scheduler.optimizer.param_groups
            for index, group in enumerate(groups):
                label = _label(name, None if len(groups) == 1 else index)
                if isinstance(group["lr"], Tensor):
                    learner.host(group["lr"].detach().clone(), partial(record, table, label, self._ended + 1))
                else:
                    record(table, label, self._ended + 1, group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: each scheduler's state, and the one that it had when it was made."""
        schedulers = [
            {
                "optimizer": name,
                "class": type(scheduler).__name__,
                "made": self._made[name],
                "functions": self._functions[name],
                "now": state_of(scheduler),
            }
            for name, scheduler in self.schedulers.items()
        ]
        updated = list(self._updated.elements())
        counted = [[name, count] for name, count in self._counted.items()]
        return {
            "schedulers": schedulers,
            "updated": updated,
            "counted": counted,
            "steps": self._ended,
            "seen": self._seen,
            "waiting": self._waiting,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps; the optimizer stays as it is.

        Raises:
            CheckpointError: It is the state of another scheduler, or of one with other arguments.
        """
        kept = {entry["optimizer"]: entry for entry in state["schedulers"]}
        if kept.keys() != self.schedulers.keys():
            raise CheckpointError(
                f"the checkpoint's LRScheduler has schedulers for the optimizers {list(kept)}, this one for "
                f"{list(self.schedulers)}; make it as it was"
            )
        for name, scheduler in self.schedulers.items():
            check_same(scheduler, self._made[name], self._functions[name], kept[name])
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(with_counters(kept[name]["now"], scheduler.state_dict()))
        self._updated, self._ended, self._seen = Counter(state["updated"]), state["steps"], state["seen"]
        self._counted = Counter({name: count for name, count in state.get("counted", ())})
        self._waiting = state.get("waiting", False)


@cache
def _label(optimizer: str | None, group: int | None) -> str:
    return LearningRate(optimizer, group).label


@resolve_conflict.register(LRScheduler, LRScheduler)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _one_each(a: LRScheduler, b: LRScheduler) -> NoConflict:
    """Two of them may schedule different optimizers.

    Raises:
        CallbackConflictError: They schedule the same one.
    """
    if a._target.overlaps(b._target):
        raise CallbackConflictError(
            f"{a!r} and {b!r} schedule the same optimizer; name another one in each, LRScheduler(..., optimizer='G'), "
            "or make one of both with torch's ChainedScheduler or SequentialLR"
        )
    return NoConflict()


@resolve_conflict.register(Scheduler, LRScheduler)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _not_the_same_rate(a: Scheduler, b: LRScheduler) -> NoConflict:
    """A Scheduler may set what this one does not.

    Raises:
        CallbackConflictError: Both set the learning rate, or the momentum, of one optimizer.
    """
    set_by_torch: list[OptimizerOption] = [b._target]
    if not {"OneCycleLR", "CyclicLR"}.isdisjoint(mentioned(b.factory)):
        set_by_torch.append(Momentum(b.optimizer))
    for parameter in a.schedules:
        for other in set_by_torch:
            if parameter.overlaps(other):
                raise CallbackConflictError(
                    f"{parameter!r} of a Scheduler is set by {b!r} as well; keep one of them, or name the "
                    "optimizer of each"
                )
    return NoConflict()


@resolve_conflict.register(LRScheduler, Callback)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _around_a_plateau(a: LRScheduler, b: Callback) -> RunFirst | NoConflict | None:
    """A plateau's scheduler follows what records metrics, also where that reads the optimizer that it will change."""
    paths = {mode: [parse(path, "LRScheduler") for path in getattr(b, mode)] for mode in ("reads", "writes")}
    if a._watched is None or any(overlap(path, HYPERPARAMETERS) for path in (*paths["reads"], *paths["writes"])):
        return None
    return RunFirst(b) if any(overlap(path, METRICS) for path in paths["writes"]) else NoConflict()
