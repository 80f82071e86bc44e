"""Count epochs, steps and updates per phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import define, field

from fluxloop.callback import Callback, on
from fluxloop.events import CycleBegin, EpochBegin, EpochEnd, FitEnd, StepEnd, UpdateEnd
from fluxloop.history import Counts, trained_epochs
from fluxloop.phase import Phase
from fluxloop.state import PhaseDict, name_of


@define
class Recorder(Callback):
    """Keep `Counts` per phase: ``cbstate.history[TrainingPhase].epochs``, ``.steps``, ``.updates``.

    Steps are counted when they end, so a cancelled step is not counted.

    Reads: fit_phases
    Writes: cbstate.history
    """

    _cycle: int | None = field(default=None, init=False, repr=False)
    """The epoch that the running cycle is."""

    reads = ("fit_phases",)
    writes = ("cbstate.history",)
    draws = False
    in_compiled_step = "after"

    def init(self, learner: Any) -> None:
        """Publish the counts, once."""
        if "history" not in learner.cbstate:
            learner.cbstate.history = PhaseDict(Counts)

    @on(CycleBegin)
    def start_cycle(self, event: CycleBegin, phase: Phase, learner: Any) -> None:
        """Note which epoch it is: the next one where something is trained in it."""
        trains = any(each.gradients for each in learner.fit_phases)
        self._cycle = trained_epochs(learner.cbstate.history) + trains

    @on(FitEnd)
    def leave_fit(self, event: FitEnd, phase: Phase, learner: Any) -> None:
        """Forget the cycle."""
        self._cycle = None

    @on(EpochBegin)
    def start_epoch(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Count the epoch's steps from 0."""
        history = learner.cbstate.history
        counts = history[phase]
        counts.steps_epoch = 0
        if not counts.label:
            counts.label = _label(phase, learner.fit_phases, history)

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
        """Count an epoch, and note where its values stand."""
        history = learner.cbstate.history
        counts = history[phase]
        counts.epochs += 1
        place = self._cycle
        if place is None or not learner.fit_phases:
            place = 0 if phase.gradients else trained_epochs(history)
        counts.epoch = max(counts.epoch + 1, counts.epochs, place)


def _label(phase: Phase, among: tuple[Phase, ...], history: Mapping[Any, Counts]) -> str:
    """Return what logs call a phase; it stays, so that no series changes its name or takes another's.

    Args:
        phase: The phase.
        among: What else the fit runs.
        history: The counts of phases that have run, with their labels.
    """
    key, kind = phase.data_key, (phase.data_key, phase.model_view)
    called_by_key = [other for other in history if history[other].label == key]
    rivals = {name_of(other) for other in (*among, *called_by_key) if (other.data_key, other.model_view) == kind}
    return key if key and rivals <= {name_of(phase)} else name_of(phase)
