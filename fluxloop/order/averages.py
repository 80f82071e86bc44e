"""An average of weights that is taken when a step has updated them: what a compiled step needs to take it itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from attrs import frozen

Buffers = Literal["copy", "average", "keep"]


@frozen(eq=False)
class StepAverage:
    """An average of weights that moves towards them at the end of each step that updated them.

    Args:
        live: Name of the weights.
        average: Name of the module that holds their average.
        weight: Returns how far its parameters move at the end of the running step, 0 to 1.
        buffers: What happens to its buffers: ``"copy"`` the live ones, ``"average"`` or ``"keep"`` them.
        note: Called with the phase after a graph has moved it.
    """

    live: str
    average: str
    weight: Callable[[], float]
    buffers: Buffers
    note: Callable[[Any], None]
