"""Collect garbage every so many steps."""

from __future__ import annotations

import gc
from typing import Any

from attrs import define, field

from fluxloop.callback import Callback, on
from fluxloop.events import StepEnd
from fluxloop.guard.given import number
from fluxloop.phase import Phase


@define
class GarbageCollect(Callback):
    """Run Python's garbage collector every `every` steps, of any phase.

    It is for models whose Python objects refer to each other in cycles that hold tensors.

    Args:
        every: Steps between collections.

    Raises:
        ValueError: `every` is less than 1.

    Example:
        >>> history = testing.toy_learner(GarbageCollect(every=50)).fit(1)
    """

    every: int = field(default=100, validator=number(least=1, whole=True))
    _steps: int = field(default=0, init=False, repr=False)

    draws = False
    _begins_anywhere = True

    @on(StepEnd)
    def collect(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Collect when it is time."""
        self._steps += 1
        if self._steps % self.every == 0:
            gc.collect()
