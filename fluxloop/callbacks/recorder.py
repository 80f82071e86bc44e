"""Count epochs, steps and updates per phase."""

from __future__ import annotations

from typing import Any

from attrs import define

from fluxloop.callback import Callback, on
from fluxloop.events import EpochBegin, EpochEnd, StepEnd, UpdateEnd
from fluxloop.history import Counts
from fluxloop.phase import Phase
from fluxloop.state import PhaseDict


@define
class Recorder(Callback):
    """Keep `Counts` per phase: ``cbstate.history[TrainingPhase].epochs``, ``.steps``, ``.updates``.

    Steps are counted when they end, so a cancelled step is not counted.

    Writes: cbstate.history
    """

    writes = ("cbstate.history",)
    draws = False
    in_compiled_step = "after"

    def init(self, learner: Any) -> None:
        """Publish the counts, once."""
        if "history" not in learner.cbstate:
            learner.cbstate.history = PhaseDict(Counts)

    @on(EpochBegin)
    def start_epoch(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Count the epoch's steps from 0."""
        learner.cbstate.history[phase].steps_epoch = 0

    @on(StepEnd)
    def count_step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Count a step."""
        counts = learner.cbstate.history[phase]
        counts.steps += 1
        counts.steps_epoch += 1

    @on(UpdateEnd)
    def count_update(self, event: UpdateEnd, phase: Phase, learner: Any) -> None:
        """Count an optimizer's step under its name."""
        updates = learner.cbstate.history[phase].updates
        updates[event.name] = updates.get(event.name, 0) + 1

    @on(EpochEnd)
    def count_epoch(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Count an epoch."""
        learner.cbstate.history[phase].epochs += 1
