"""End epochs early."""

from __future__ import annotations

import operator
from typing import Any

from attrs import define, field

from fluxloop.callback import Callback, on
from fluxloop.errors import CancelEpochException
from fluxloop.events import EpochBegin, EpochEnd, StepEnd
from fluxloop.phase import Phase, check_phase_type
from fluxloop.state import PhaseDict


def _whole(limit: Any) -> int:
    try:
        return operator.index(limit)
    except TypeError as error:
        raise TypeError(f"BatchLimit({limit!r}) was given; expected a number of steps, 1 or more") from error


def _counted() -> PhaseDict[int]:
    return PhaseDict(int)


@define
class BatchLimit(Callback):
    """End every epoch of a phase after some steps; its metrics are those of the steps that were run.

    For one fit, ``learner.fit(..., steps_per_epoch=n)`` is shorter; this callback stays with the
    learner, and may hold for some phases alone. A cancelled step is not counted.

    Args:
        limit: How many steps an epoch has at most.
        phase: The phase type whose epochs are shortened.

    Raises:
        TypeError: `limit` is no whole number.
        ValueError: `limit` is less than 1.
        PhaseError: `phase` is no phase type.

    Example:
        >>> limit = BatchLimit(100, phase=ValidationPhase)
    """

    limit: int = field(converter=_whole)
    phase: type[Phase] = field(default=Phase, kw_only=True)
    _steps: PhaseDict[int] = field(factory=_counted, init=False, repr=False)

    draws = False

    @limit.validator
    def _check_limit(self, attribute: object, value: int) -> None:
        if value < 1:
            raise ValueError(f"BatchLimit({value!r}) was given; expected a number of steps, 1 or more")

    @phase.validator
    def _check_phase(self, attribute: object, value: object) -> None:
        check_phase_type("BatchLimit", value)

    @on(EpochBegin)
    def start(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Count the epoch's steps from 0."""
        if isinstance(phase, self.phase):
            self._steps[phase] = 0

    @on(StepEnd)
    def count(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """End the epoch after its last step.

        Raises:
            CancelEpochException: It was the last.
        """
        if phase in self._steps:  # a step outside of an epoch has none to end
            self._steps[phase] += 1
            if self._steps[phase] >= self.limit:
                raise CancelEpochException

    @on(EpochEnd)
    def stop(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Count no steps outside of an epoch."""
        if phase in self._steps:
            del self._steps[phase]
