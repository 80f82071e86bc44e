"""What fluxloop's own layer costs: events, idle callbacks, and growth with what a learner holds.

    python benchmarks/event_overhead.py            # the tables
    python benchmarks/event_overhead.py --quick    # fewer rounds

The steps here compute nothing: all that is timed is fluxloop. "step µs" is the median of a whole
such step, "added µs" the median of the rounds' differences from the first row of the table, per
event or per callback as the column says. One thread; sides interleaved in one process.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from timing import Sides, arguments, interleave, print_added
from torch import nn
from workloads import SGD, TINY, make_learner

from fluxloop import (
    AbstractTrainingPhase,
    Accelerator,
    BackwardBegin,
    BackwardEnd,
    Callback,
    FitBegin,
    Learner,
    LossBegin,
    Metrics,
    ProgressBar,
    StepEnd,
    UpdateBegin,
    UpdateEnd,
    accuracy,
    on,
    runstep,
)

EVENTS = 100
"""Fired in a step whose events are measured."""
STEPS = 500
"""In an epoch."""
EVENT = LossBegin()
STANDARD = (EVENT, BackwardBegin(), BackwardEnd(), UpdateBegin(), UpdateEnd())


class Listener(Callback):
    """Does nothing at `LossBegin`, and says that it draws no random numbers."""

    draws = False

    @on(LossBegin)
    def hear(self, event: LossBegin, phase: Any, learner: Any) -> None:
        """Do nothing."""


class UndeclaredListener(Callback):
    """Does nothing at `LossBegin`; as it does not say whether it draws, torch's generators are put back after it."""

    @on(LossBegin)
    def hear(self, event: LossBegin, phase: Any, learner: Any) -> None:
        """Do nothing."""


class Idle(Callback):
    """Handles nothing that happens in a step."""

    draws = False

    @on(FitBegin)
    def hear(self, event: FitBegin, phase: Any, learner: Any) -> None:
        """Do nothing."""


class Reader(Callback):
    """Reads the loss at the end of each step, as most callbacks do something there."""

    reads = ("step.loss",)
    draws = False

    @on(StepEnd)
    def hear(self, event: StepEnd, phase: Any, learner: Any) -> None:
        """Read the loss."""
        _ = learner.step.loss


class UndeclaredReader(Callback):
    """Does the same, and does not say whether it draws."""

    reads = ("step.loss",)
    hear = Reader.hear


class Counting(AbstractTrainingPhase):
    """Goes through a loop in each step that fires nothing."""

    def step(self, learner: Any, batch: Any) -> None:
        """Count."""
        with runstep(learner, self):
            for _ in repeat(None, EVENTS):
                pass


class Firing(AbstractTrainingPhase):
    """Fires the same event many times in each step."""

    def step(self, learner: Any, batch: Any) -> None:
        """Fire."""
        with runstep(learner, self) as (handle, _):
            for _ in repeat(None, EVENTS):
                handle(EVENT)


class Standard(AbstractTrainingPhase):
    """Fires what a training step fires, around nothing."""

    preds, ys, loss = torch.randn(32, 4), torch.zeros(32, dtype=torch.long), torch.tensor(1.0)

    def step(self, learner: Any, batch: Any) -> None:
        """Fire each event of a training step."""
        with runstep(learner, self, ys=self.ys) as (handle, state):
            state.preds, state.loss = self.preds, self.loss
            for event in STANDARD:
                handle(event)


def learner_with(*callbacks: Callback, models: int = 1) -> Learner[Any]:
    """Make a learner with these callbacks alone, and so many models with an optimizer each."""
    return Learner(
        nn.Linear(1, 1) if models == 1 else {f"m{index}": nn.Linear(1, 1) for index in range(models)},
        data=([None] * STEPS,),
        optimizer=SGD,
        callbacks=callbacks,
        default_callbacks=False,
        accelerator=Accelerator("cpu"),
    )


def many(kind: Callable[..., Callback], count: int) -> list[Callback]:
    """Make so many callbacks of a kind."""
    return [kind(name=f"{kind.__name__}{index}") for index in range(count)]


def epoch(learner: Learner[Any], phase: AbstractTrainingPhase | None = None) -> Callable[[], None]:
    """Give what runs an epoch."""
    chosen = Standard() if phase is None else phase
    return lambda: learner.epoch(chosen)


def after_phases(count: int) -> Callable[[], None]:
    """Give what runs an epoch of a learner that has run so many other phases."""
    learner = learner_with()
    for index in range(count):
        learner.epoch(type(f"Phase{index}", (Standard,), {})())
    return epoch(learner)


def differences(what: str, sides: Sides, counts: Sequence[int], quick: bool) -> None:
    """Print what each side adds to a step of the first one, for each of so many things."""
    print(f"\n{what}\n")
    print_added("a step with", interleave(lambda: sides, units=STEPS, rounds=7 if quick else 60), counts)


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    torch.set_num_threads(1)
    loud = [(f"{EVENTS} events, {n} handlers", epoch(learner_with(*many(Listener, n)), Firing())) for n in (0, 1, 5)]
    fired = dict([("no event", epoch(learner_with(), Counting())), *loud])
    differences("Events: added per event, against the same loop without.", fired, [1, *[EVENTS] * 3], quick)

    careful = {
        "no handler": epoch(learner_with()),
        "one in the step, draws = False": epoch(learner_with(Listener())),
        "one in the step that may draw": epoch(learner_with(UndeclaredListener())),
        "one at StepEnd that may draw": epoch(learner_with(UndeclaredReader())),
    }
    differences("A handler that does not say whether it draws random numbers.", careful, [1] * 4, quick)

    for title, kind in (
        ("Idle callbacks, which handle nothing in a step", Idle),
        ("Callbacks that read the loss", Reader),
    ):
        counts = (0, 1, 10, 50)
        sides = {f"{n} callbacks": epoch(learner_with(*many(kind, n))) for n in counts}
        differences(f"{title}: added per callback.", sides, counts, quick)

    phases = {f"{n} other phases run before": after_phases(n) for n in (0, 1, 10)}
    differences("Phases: added per phase.", phases, (0, 1, 10), quick)
    models = {f"{n} models, an optimizer each": epoch(learner_with(models=n)) for n in (1, 2, 10)}
    differences("Optimizers, none of which steps: added per optimizer.", models, (0, 1, 9), quick)
    bar = ProgressBar(enabled=True, file=io.StringIO())
    tracked = {
        "no callbacks": epoch(learner_with()),
        "the default callbacks": epoch(default_learner()),
        "and accuracy": epoch(default_learner(Metrics(accuracy))),
        "and a bar": epoch(default_learner(Metrics(accuracy), bar)),
    }
    differences("The default callbacks, without a line per epoch.", tracked, [1] * 4, quick)


def default_learner(*callbacks: Callback) -> Learner[Any]:
    """Make a learner with the default callbacks, but for the line per epoch."""
    learner = make_learner(TINY.model(), [None] * STEPS, SGD, tracked=True)
    learner.replace_callback(ProgressBar(enabled=False))
    learner.replace_callback(Metrics())
    for callback in callbacks:
        learner.replace_callback(callback)
    return learner


if __name__ == "__main__":
    main()
