"""Find a learning rate: a sweep from tiny to too large on a copy of the learner."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING

from attrs import frozen
from torch import Tensor

from fluxloop.callback import Callback, UnsafeCallback, on
from fluxloop.callbacks.progress import showing_as
from fluxloop.data.passes import untouched
from fluxloop.errors import CancelFittingException, DataError, LossError, OptimizerError, PhaseError
from fluxloop.events import EpochEnd, StepBegin, StepEnd
from fluxloop.guard.given import check_number, is_number
from fluxloop.hyperparameters import put
from fluxloop.nested import weight_of
from fluxloop.phase import AbstractTrainingPhase, Phase
from fluxloop.phases.supervised import TrainingPhase
from fluxloop.processes.sums import mean_of
from fluxloop.randomness import preserved
from fluxloop.run.epoch import feed
from fluxloop.run.phases import check_runs
from fluxloop.run.session import copy_for
from fluxloop.schedules import exponential
from fluxloop.screen.bars import Bar, bar
from fluxloop.signals import INTERRUPTED
from fluxloop.state import StepState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fluxloop.interfaces import RunLearner
    from fluxloop.processes.group import Group

DIVERGED = 4.0
"""A smoothed loss above this many times the lowest has diverged."""


@frozen(repr=False)
class LRSweep:
    """What `find_lr` found: losses by learning rate, and what to make of them.

    Args:
        learning_rates: One per step, rising.
        losses: The loss of each step, before its update.
        smoothed: Their moving averages.
        stop_reason: Why the sweep ended early, or None.

    Example:
        >>> sweep = find_lr(testing.toy_learner())
        >>> len(sweep.learning_rates) == len(sweep.losses)
        True
        >>> sweep.learning_rates[0] < sweep.suggestion < sweep.learning_rates[-1]
        True
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    stop_reason: str | None

    @property
    def suggestion(self) -> float | None:
        """The learning rate to begin with: `valley`."""
        return self.valley

    @property
    def valley(self) -> float | None:
        """The middle of the longest fall of the smoothed loss; None where it never falls.

        The fall is the longest falling subsequence, so that a bump does not end it.
        """
        fall = _longest_fall(self.smoothed)
        return self.learning_rates[fall[len(fall) // 2]] if len(fall) > 1 else None

    @property
    def steepest(self) -> float | None:
        """Where the smoothed loss falls fastest, per factor of the learning rate; None where it never falls.

        Slopes are taken over a tenth of the sweep, so that noise does not decide, within the longest fall.
        """
        fall, half = _longest_fall(self.smoothed), max(1, len(self.smoothed) // 20)
        slopes = [
            (self.smoothed[i + half] - self.smoothed[i - half], self.learning_rates[i])
            for i in range(max(half, fall[0]), min(fall[-1] + 1, len(self.smoothed) - half))
        ]
        slope, rate = min(slopes, default=(0.0, 0.0))
        return rate if slope < 0 else None

    def plot(self) -> Figure:
        """Draw the losses over the learning rates, and the suggestions.

        Returns:
            A matplotlib figure: a picture in a notebook; ``figure.savefig("learning_rates.png")`` keeps it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from fluxloop.screen.figures import new_figure

        figure = new_figure("find_lr(...).plot()", figsize=(5, 3.5))
        axes = figure.subplots()
        axes.plot(self.learning_rates, self.losses, alpha=0.3, label="loss")
        axes.plot(self.learning_rates, self.smoothed, label="smoothed")
        for name, rate in (("valley", self.valley), ("steepest", self.steepest)):
            if rate is not None:
                value = self.smoothed[self.learning_rates.index(rate)]
                axes.plot([rate], [value], "o", label=f"{name}: {rate:.2g}")
        first, least = self.smoothed[0], min(self.smoothed)
        fall = max(first - least, 0.1 * abs(first))
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        if fall > 0:  # not up to where it diverged
            axes.set_ylim(least - 0.2 * fall, first + 0.6 * fall)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def __repr__(self) -> str:
        def show(rate: float | None) -> str:
            return "none" if rate is None else f"{rate:.2g}"

        stopped = f", stopped: {self.stop_reason}" if self.stop_reason else ""
        return (
            f"LRSweep(suggestion {show(self.suggestion)}; valley {show(self.valley)}, steepest {show(self.steepest)}; "
            f"{len(self.losses)} steps from {show(self.learning_rates[0])} to {show(self.learning_rates[-1])}{stopped})"
        )


def _longest_fall(values: tuple[float, ...]) -> list[int]:
    """Return the places of the longest falling subsequence; of several, of the one that ends first."""
    length, before = [1] * len(values), [-1] * len(values)
    for i, value in enumerate(values):  # quadratic, of a hundred steps or so
        for j in range(i):
            if values[j] > value and length[j] >= length[i]:
                length[i], before[i] = length[j] + 1, j
    place = length.index(max(length))
    places: list[int] = []
    while place >= 0:
        places.append(place)
        place = before[place]
    return places[::-1]


def find_lr(
    learner: RunLearner,
    *,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    phase: Phase | None = None,
    optimizer: str | None = None,
    callbacks: Iterable[Callback] = (),
    smoothing: float = 0.9,
) -> LRSweep:
    """Train a copy of the learner for some steps while the learning rate rises; return what the loss did.

    The range test of Smith (2017). The rate rises by the same factor at every step; it is that of
    the parameter group with the largest one, and the others keep their ratio to it. The data is
    begun again as often as needed. The sweep ends early when the loss is no longer finite, or its
    moving average is more than four times its lowest. Where a step has the losses of several
    optimizers, it is the chosen one's, or their sum. Where an update is of several batches, they are one step.

    The learner, its data's order and the global random numbers are as before. The copy takes the
    memory of a second model and optimizer, and has no callbacks but those given here.

    Args:
        learner: The learner.
        start: First learning rate, above 0.
        end: Last learning rate, above `start`.
        steps: How many steps, 2 or more.
        phase: A training phase. Left out: `TrainingPhase`.
        optimizer: Name of the optimizer whose rate is swept; left out, all of them.
        callbacks: What the phase needs, such as an `EMA` for a teacher.
        smoothing: Weight of the past in the moving average, 0 to below 1.

    Raises:
        ValueError: A number is out of range.
        PhaseError: The phase does not train, or the learner is running.
        DataError: The data can be iterated once only.
        LossError: A step stores no loss, or the first one is not finite.
        OptimizerError: There is no such optimizer, or all of its learning rates are 0.

    Example:
        >>> from fluxloop.testing import toy_learner
        >>> sweep = find_lr(toy_learner())
        >>> 1e-5 < sweep.suggestion < 1e-1
        True
    """
    for name, bound in (("start", start), ("end", end), ("smoothing", smoothing)):
        check_number("find_lr", name, bound)
    if not (0 < start < end < float("inf")):
        raise ValueError(f"find_lr(start={start!r}, end={end!r}) was given; expected 0 < start < end")
    if not is_number(steps, whole=True) or steps < 2:
        raise ValueError(f"find_lr(steps={steps!r}) was given; expected a whole number, 2 or more")
    if not 0 <= smoothing < 1:
        raise ValueError(f"find_lr(smoothing={smoothing!r}) was given; expected 0 or more, and less than 1")
    if learner.scope is not None:
        raise PhaseError("find_lr was called while the learner is running; call it before the fit")
    phase = TrainingPhase() if phase is None else phase
    check_runs(learner, phase)
    if not phase.gradients:
        raise PhaseError(f"{phase!r} was given to find_lr, and it does not train; expected such as TrainingPhase()")
    source = feed(learner, phase).source
    if hasattr(source, "__next__"):
        raise DataError(
            f"the {phase.data_key!r} data can be iterated once only, and find_lr would use it up; give data that can "
            "be iterated again, such as a DataLoader or a list of batches"
        )
    chosen = range(len(learner.updates.slots))
    if optimizer is not None:
        chosen = [learner.updates.slots.index(learner.updates.find(optimizer))]  # type: ignore[assignment]  # as a list
    with preserved(), untouched(source), showing_as(learner), bar("find_lr", steps, unit="step") as shown:
        trial, (phase, given) = copy_for("find_lr", learner, phase, list(callbacks))
        sweep = _Sweep(trial, list(chosen), exponential(steps - 1, start, end), steps, smoothing, shown)
        trial.callbacks.set([*given, sweep])
        stopped = trial.fit(steps, phases=[phase]).stop_reason
    if stopped == INTERRUPTED:  # the fit of the copy took Ctrl+C for itself; it was meant for whoever called
        raise KeyboardInterrupt
    if not sweep.losses:
        raise LossError(f"find_lr saw no finite loss: {stopped or 'every step was cancelled'}")
    reason = None if len(sweep.losses) == steps else stopped
    return LRSweep(tuple(sweep.rates), tuple(sweep.losses), tuple(sweep.smoothed), reason)


class _Sweep(UnsafeCallback):
    """Raises the learning rate at every step, and keeps the losses."""

    reads = ("*",)  # so it runs after every callback that writes something
    draws = False

    def __init__(
        self, learner: RunLearner, chosen: list[int], schedule: exponential, steps: int, smoothing: float, shown: Bar
    ) -> None:
        groups = [group for index in chosen for group in learner.updates.slots[index].optimizer.param_groups]
        largest = max(float(group["lr"]) for group in groups)
        if not largest > 0:
            raise OptimizerError(
                "find_lr keeps the ratios of the learning rates, and all of them are 0; give one above 0"
            )
        self.groups = [(group, float(group["lr"]) / largest) for group in groups]
        self.names = [learner.updates.slots[index].name for index in chosen]
        self.schedule, self.steps, self.smoothing = schedule, steps, smoothing
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.average = 0.0
        self.rate = 0.0
        self.shown = shown
        self.window: list[tuple[float, float]] = []
        """Loss and weight of the batches whose update is yet to come."""

    @on(StepBegin, AbstractTrainingPhase)
    def set_rate(self, event: StepBegin, phase: AbstractTrainingPhase, learner: RunLearner) -> None:
        self.rate = self.schedule(len(self.losses))
        for group, ratio in self.groups:
            put(group, "lr", self.rate * ratio)

    @on(StepEnd, AbstractTrainingPhase)
    def keep_loss(self, event: StepEnd, phase: AbstractTrainingPhase, learner: RunLearner) -> None:
        group = learner.accelerator.group
        weight = 0.0 if group is not None and group.spare else float(weight_of(phase, learner.step))
        self.window.append((self._loss(learner.step, phase), weight))
        if not learner.updates.is_open:
            self._keep(group)

    @on(EpochEnd, AbstractTrainingPhase)
    def keep_last(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: RunLearner) -> None:
        if self.window and not learner.updates.is_open:  # their update was made after the last step
            self._keep(learner.accelerator.group)

    def _keep(self, group: Group | None) -> None:
        """Keep the mean loss of the batches that an update was made of."""
        rate, total = self.rate, sum(weight for _, weight in self.window)
        loss = self.window[0][0]
        if len(self.window) > 1 and total:
            loss = sum(loss * weight for loss, weight in self.window) / total
        self.window.clear()
        if group is not None:  # so that all end the sweep at the same step
            loss = float(mean_of(group, loss, total))
        if not isfinite(loss):
            raise CancelFittingException(f"the loss became {loss} at a learning rate of {rate:.2g}")
        self.shown.advance()
        self.rates.append(rate)
        self.losses.append(loss)
        self.average = self.smoothing * self.average + (1 - self.smoothing) * loss
        # The average begins at 0: this takes out how much that still counts
        smoothed = self.average / (1 - self.smoothing ** len(self.losses))
        self.smoothed.append(smoothed)
        lowest = min(self.smoothed)
        if smoothed - lowest > (DIVERGED - 1) * abs(lowest):  # losses may be negative
            raise CancelFittingException(f"the loss diverged at a learning rate of {rate:.2g}")
        if len(self.losses) == self.steps:
            raise CancelFittingException("the sweep is complete")

    def _loss(self, step: StepState, phase: Phase) -> float:
        losses = vars(step).get("losses")
        if losses:
            found = [loss for name, loss in losses.items() if name in self.names]
        else:
            found = [step.loss] if "loss" in step else []
        if not found:
            raise LossError(f"{phase!r} stores no loss in its step; find_lr needs state.loss or the loss of a block")
        return sum(float(loss.detach()) if isinstance(loss, Tensor) else float(loss) for loss in found)
