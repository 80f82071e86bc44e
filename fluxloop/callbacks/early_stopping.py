"""End a fit when a metric says so, or after a time."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic
from typing import Any

from attrs import define, field

from fluxloop.callback import Callback, on
from fluxloop.errors import CancelFittingException, CheckpointError, describe
from fluxloop.events import CycleEnd, EpochBegin, EpochEnd, FitBegin, StepEnd
from fluxloop.guard.given import is_number
from fluxloop.monitor import Mode, Monitor
from fluxloop.phase import FittingPhase, Phase
from fluxloop.stopping import Criterion, NoImprovement


@define
class EarlyStopping(Callback):
    """End the fit when a criterion says so about a metric's epoch values.

    The criterion gets each new value when its epoch ends. The fit ends with the running cycle,
    so that its other phases and what they record are complete; where a value comes in the middle
    of another epoch (a validation between two training steps), and outside of a fit, at once.
    ``history.stop_reason`` tells the metric, its value and epoch, the criterion and why.

    The criterion begins anew in each fit and goes on in a resumed one; the one that was given is
    not changed. Several `EarlyStopping` may watch side by side.

    Args:
        criterion: From `fluxloop.stopping`, such as ``Patience(3) | InvalidValue()``; a number n
            stands for ``NoImprovement(n, min_delta)``: n epochs without improvement on the best.
        monitor: The phase's data key, or its name where several phases run on the data, and the metric's name.
        mode: ``"min"`` where less is better, ``"max"`` where more is. Left out, what the metric says of itself:
            fluxloop's and torchmetrics' do, a loss is to be low, ``Metric(f, higher_is_better=True)`` says it.
        min_epochs: The fit does not end before the metric's epoch of this number, counted in each
            fit from 1; the criterion gets the values before it, too.
        min_delta: With a number as `criterion`: an improvement is by more than this.
        training: The training loss that criteria such as `PQ` need, where there are several.

    Raises:
        MetricError: When a fit begins: the metric will not be recorded in it, nobody knows which way it is better, or
            the criterion needs training losses and there are none. Later: it is no number.
        CancelFittingException: Outside of a fit, to the caller of ``learner.epoch``.
        TypeError: `criterion` is neither a number nor a criterion.
        ValueError: A number out of range, or another mode.

    Reads: cbstate.metrics

    Example:
        >>> patient = EarlyStopping(Patience(3) | InvalidValue(), monitor="validation/loss")
        >>> learner = testing.toy_learner(Recorder(), Metrics(), EarlyStopping(2, min_delta=1000.0), num_batches=1)
        >>> learner.fit(100).cycles  # the first epoch, and two without an improvement by 1000
        3
    """

    criterion: Criterion | int
    monitor: str = field(default="validation/loss", kw_only=True)
    mode: Mode | None = field(default=None, kw_only=True)
    min_epochs: int = field(default=0, kw_only=True)
    min_delta: float = field(default=0.0, kw_only=True)
    training: str = field(default="training/loss", kw_only=True, repr=False)
    _watched: Monitor = field(init=False, repr=False)
    _training: Monitor = field(init=False, repr=False)
    _template: Criterion = field(init=False, repr=False)
    """The criterion as it was given, or made of a number."""
    _running: Criterion = field(init=False, repr=False)
    """The criterion of the running fit, with what it has seen."""
    _seen: int = field(default=0, init=False, repr=False)
    """The epoch of the newest value that the criterion got."""
    _before: int = field(default=0, init=False, repr=False)
    """The epoch of the newest value when the fit began."""
    _training_losses: list[float] = field(factory=list, init=False, repr=False)
    """Training losses since the metric's last value."""
    _training_seen: int = field(default=0, init=False, repr=False)
    """The epoch of the newest of them."""
    _reason: str | None = field(default=None, init=False, repr=False)
    """Why the fit ends with the running cycle; None while it goes on."""
    _fitting: bool = field(default=False, init=False, repr=False)
    _open_epochs: int = field(default=0, init=False, repr=False)
    """How many epochs run at the moment, one inside another."""

    reads = ("cbstate.metrics",)
    draws = False

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.criterion, Criterion) and not is_number(self.criterion, whole=True):
            raise TypeError(
                f"EarlyStopping({describe(self.criterion)}) was given; expected a number of epochs, or a criterion: "
                "EarlyStopping(5), EarlyStopping(Patience(5) | InvalidValue())"
            )
        if isinstance(self.criterion, Criterion):
            if self.min_delta:
                raise ValueError(
                    f"EarlyStopping(..., min_delta={self.min_delta!r}) was given with a criterion; it belongs to that: "
                    f"NoImprovement(5, min_delta={self.min_delta!r})"
                )
            template: Criterion = self.criterion
        else:
            if self.criterion < 1:
                raise ValueError(
                    f"EarlyStopping({self.criterion}) was given; expected a number of epochs without improvement, "
                    "1 or more"
                )
            template = NoImprovement(self.criterion, self.min_delta)
        if not is_number(self.min_epochs, whole=True) or self.min_epochs < 0:
            raise ValueError(f"min_epochs={self.min_epochs!r} was given; expected a number of epochs, 0 or more")
        watched = Monitor(self.monitor, self.mode, compares=template.wants_mode())
        needs = f"{template!r} needs training losses: "
        self._watched = watched.after(getattr(self, "_watched", None))
        self._training = Monitor(self.training, "min", purpose=needs).after(getattr(self, "_training", None))
        if getattr(self, "_template", None) != template:  # else another option was assigned, and the criterion goes on
            self._running = template.start(self._watched.direction or "min")
        self._template = template

    @property
    def monitors(self) -> list[Monitor]:
        """The metric, and the training loss where the criterion needs it."""
        return [self._watched, self._training] if self._template.wants_training_losses() else [self._watched]

    def init(self, learner: Any) -> None:
        """Begin anew."""
        self._begin(0, 0)
        self._fitting, self._open_epochs = False, 0

    def _begin(self, seen: int, training_seen: int) -> None:
        self._running = self._template.start(self._watched.direction or "min")
        self._seen = self._before = seen
        self._training_seen, self._training_losses, self._reason = training_seen, [], None

    @on(FitBegin, FittingPhase)
    def start(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Begin anew, unless the fit is resumed."""
        self._fitting, self._open_epochs = True, 0
        learner.defer(self._leave_fit)
        if not event.resumed:
            metrics = learner.cbstate.metrics
            training = self._training.newest_epoch(metrics) if self._template.wants_training_losses() else 0
            self._begin(self._watched.newest_epoch(metrics), training)

    def _leave_fit(self) -> None:
        self._fitting = False

    @on(EpochBegin)
    def enter(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Note that an epoch runs."""
        self._open_epochs += 1
        learner.defer(self._leave)

    def _leave(self) -> None:
        self._open_epochs = max(self._open_epochs - 1, 0)

    @on(EpochEnd)
    def look(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Give the criterion a new value, if the epoch recorded one."""
        metrics = learner.cbstate.metrics
        if self._template.wants_training_losses():
            self._note_training_loss(metrics)
        new = self._watched.new(metrics, self._seen)
        if new is None:
            return
        self._seen, value = new
        direction = self._watched.require_direction(type(self).__name__)
        if self._running.mode != direction:  # the metric was added after this
            self._running = self._template.start(direction)
        why, group = self._running.update(value, tuple(self._training_losses)), learner.accelerator.group
        if group is not None:  # a criterion may go by the clock, and each process has its own
            why = group.broadcast(why)
        self._training_losses = []
        if why is None or self._seen - self._before < self.min_epochs:
            return
        self._reason = (
            f"{self._watched.metric} was {value:.6g} in epoch {self._seen}: {why} (EarlyStopping, {self._template!r})"
        )
        if not self._fitting or self._open_epochs > 1:
            raise CancelFittingException(self._reason)

    def _note_training_loss(self, metrics: Any) -> None:
        new = self._training.new(metrics, self._training_seen)
        if new is not None:
            self._training_seen = new[0]
            self._training_losses.append(new[1])

    @on(CycleEnd, FittingPhase)
    def stop(self, event: CycleEnd, phase: FittingPhase, learner: Any) -> None:
        """End the fit where the criterion said so; raise for a metric that nobody records."""
        for monitor in self.monitors:
            monitor.require(learner.cbstate.metrics)
        if self._reason is not None:
            raise CancelFittingException(self._reason)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the metric, what has been seen of it, and the criterion's state."""
        return {
            "monitor": self._watched.metric,
            "mode": self._watched.direction,
            "seen": self._seen,
            "before": self._before,
            "training_seen": self._training_seen,
            "training_losses": list(self._training_losses),
            "reason": self._reason,
            "criterion": self._running.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps.

        Raises:
            CheckpointError: It is of another metric, mode or criterion; nothing is changed.
        """
        for what, now in (("monitor", self._watched.metric), ("mode", self._watched.direction)):
            if state[what] != now and None not in (state[what], now):
                raise CheckpointError(
                    f"the kept state of EarlyStopping has {what}={state[what]!r}, and this one {what}={now!r}; go on "
                    "with the same, or begin anew in another folder"
                )
        running = self._template.start(self._watched.direction or state["mode"] or "min")
        running.load_state_dict(state["criterion"])
        self._running = running
        self._seen, self._before, self._training_seen = state["seen"], state["before"], state["training_seen"]
        self._training_losses, self._reason = list(state["training_losses"]), state["reason"]


def _seconds(given: Any) -> float | None:
    """Return a duration in seconds."""
    return given.total_seconds() if isinstance(given, timedelta) else given


@define
class Timer(Callback):
    """End the fit after a training time, summed over resumed runs.

    The clock runs from the begin of the fit, validation included, and is looked at after every
    step of every phase. The fit ends before the next batch, and a `Checkpointer` writes where it
    is. In epochs outside of a fit the clock runs during these epochs.

    Args:
        seconds: Or a ``datetime.timedelta``.
        minutes: Added to the seconds.
        hours: Added to both.

    Raises:
        CancelFittingException: Outside of a fit, to the caller of ``learner.epoch``.
        ValueError: The time is not above 0.

    Attributes:
        elapsed: Seconds so far.

    Example:
        >>> timer = Timer(hours=2, minutes=30)
        >>> history = testing.toy_learner(timer).fit(1)
        >>> 0 < timer.elapsed < 9000, history.stop_reason
        (True, None)
    """

    seconds: float | None = field(default=None, converter=_seconds)
    minutes: float | None = field(default=None, kw_only=True)
    hours: float | None = field(default=None, kw_only=True)
    elapsed: float = field(default=0.0, init=False, repr=False)
    _limit: float = field(default=0.0, init=False, repr=False)
    _since: float = field(default=0.0, init=False, repr=False)
    _fitting: bool = field(default=False, init=False, repr=False)

    transient = ("_since", "_fitting")
    draws = False

    def __attrs_post_init__(self) -> None:
        parts = ((self.seconds, 1), (self.minutes, 60), (self.hours, 3600))
        if any(isinstance(part, bool) or not isinstance(part, (int, float, type(None))) for part, _ in parts):
            raise ValueError(f"{self!r} was given; expected numbers, or a timedelta: Timer(hours=8)")
        self._limit = sum(float(part) * factor for part, factor in parts if part is not None)
        if not self._limit > 0:
            raise ValueError(f"{self!r} was given; expected a time above 0: Timer(hours=8)")

    def init(self, learner: Any) -> None:
        """Begin anew."""
        self.elapsed, self._fitting = 0.0, False

    @on(FitBegin, FittingPhase)
    def start(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Start the clock; anew, unless the fit is resumed."""
        if not event.resumed:
            self.elapsed = 0.0
        self._since, self._fitting = monotonic(), True
        learner.defer(self._leave_fit)

    def _leave_fit(self) -> None:
        self._fitting = False

    @on(EpochBegin)
    def start_epoch(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Start the clock of an epoch outside of a fit."""
        if not self._fitting:
            self._since = monotonic()

    @on(StepEnd)
    def look(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Look at the clock."""
        now = monotonic()
        self.elapsed, self._since = self.elapsed + now - self._since, now
        if self.elapsed >= self._limit:
            spent, limit = timedelta(seconds=round(self.elapsed)), timedelta(seconds=self._limit)
            learner.request_stop(f"{spent} of training, of {limit} allowed (Timer)")
