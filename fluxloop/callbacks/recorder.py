"""Count epochs, steps and updates per phase."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from attrs import define, field

from fluxloop.callback import Callback, on
from fluxloop.events import EpochBegin, EpochEnd, StepEnd, UpdateEnd
from fluxloop.history import Counts, trained_epochs
from fluxloop.order.view import behind
from fluxloop.phase import Phase
from fluxloop.state import PhaseDict, name_of


@define
class Recorder(Callback):
    """Count epochs, steps and updates of each phase: ``cbstate.history[TrainingPhase]`` has its `Counts`.

    Steps are counted when they end, so a cancelled step is not counted.

    Writes: cbstate.history

    Example:
        >>> learner = testing.toy_learner(Recorder(), num_batches=16)
        >>> counts = learner.fit(2)[TrainingPhase]
        >>> counts.epochs, counts.steps, counts.updates
        (2, 32, {None: 32})
    """

    _cycle: tuple[Any, int | None] = field(default=(None, None), init=False, repr=False)
    """The fit, by its phases, and the number of its running cycle."""
    _place: int = field(default=0, init=False, repr=False)
    """The epoch that the running cycle is: the next one where something is trained in it."""

    writes = ("cbstate.history",)
    transient = ("_cycle", "_place")
    draws = False
    in_compiled_step = "after"

    def init(self, learner: Any) -> None:
        """Publish the counts, once."""
        if "history" not in learner.cbstate:
            learner.cbstate.history = PhaseDict(Counts)

    @on(EpochBegin)
    def start_epoch(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Count the epoch's steps from 0."""
        history = learner.cbstate.history
        phases = learner.fit_phases
        if phases and (self._cycle[0] is not phases or self._cycle[1] != learner.cycle):
            before = takewhile(lambda each: each is not phase, phases)  # those of a cycle that goes on have run
            is_next = any(each.gradients for each in phases) and not any(each.gradients for each in before)
            self._cycle, self._place = (phases, learner.cycle), trained_epochs(history) + is_next
        counts = history[phase]
        counts.steps_epoch = 0
        if not counts.label:
            counts.label = _label(phase, phases, history)

    @on(StepEnd)
    def count_step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Count a step."""
        counts = behind(learner).cbstate.history[phase]
        counts.steps += 1
        counts.steps_epoch += 1

    @on(UpdateEnd)
    def count_update(self, event: UpdateEnd, phase: Phase, learner: Any) -> None:
        """Count an optimizer's step under its name."""
        updates = behind(learner).cbstate.history[phase].updates
        updates[event.name] = updates.get(event.name, 0) + 1

    @on(EpochEnd)
    def count_epoch(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Count an epoch, and note where its values stand."""
        history = learner.cbstate.history
        counts = history[phase]
        counts.epochs += 1
        place = 0 if phase.gradients else trained_epochs(history)
        counts.epoch = max(counts.epoch + 1, counts.epochs, place if learner.cycle is None else self._place)


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
