"""Windows of several batches in compiled steps: what a step finds of them, what it does to them, and what it leaves.

How many batches a window has counted is known in Python, and whether it closes chooses the graph. What
its batches weigh is a tensor, which goes into the graph with the gradients that wait, and comes out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compute.precision import in_single
from fluxloop.compute.slots import Slot
from fluxloop.compute.updates import Updates
from fluxloop.compute.window import Weight, Window, WindowSlot
from fluxloop.compute.windows import WindowedUpdates
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import StepLearner

WEIGHTS = ("weight", "current")
"""What of a window are weights: of the batches that it has counted, and of the one that computes gradients now."""


# Outside of the graph


@define(eq=False)
class Carried:
    """A weight of an open window, which goes into the graph.

    Args:
        slot: The optimizer whose window it is.
        name: Which of its `WEIGHTS`.
        tensor: Where it is put if it is no tensor.
        last: The number that was put there last.
    """

    slot: WindowSlot
    name: str
    tensor: Tensor
    last: Weight | None = None

    @property
    def place(self) -> tuple[str | None, str]:
        """The names of the optimizer and of the weight."""
        return self.slot.name, self.name

    def now(self) -> Tensor:
        """Return the weight as a tensor."""
        weight = getattr(self.slot.window, self.name)
        if isinstance(weight, Tensor):
            return weight.to(self.tensor).reshape(())
        if weight != self.last:
            self.last = weight
            self.tensor.fill_(weight)
        return self.tensor


def carried(slots: Sequence[Slot], device: torch.device) -> list[Carried]:
    """List the weights of open windows that a step may use: those of several batches."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # a Mac's GPU knows no longer ones
    return [
        Carried(slot, name, torch.zeros((), dtype=dtype, device=device))
        for slot in slots
        if isinstance(slot, WindowSlot) and slot.first_step is not None and slot.window.size > 1
        for name in WEIGHTS
        if getattr(slot.window, name) is not None
    ]


def form_of_window(slot: Slot) -> Any:
    """Return what of an open window makes another graph: whether it closes with this batch, and what it waits for."""
    if not isinstance(slot, WindowSlot):
        return None
    window = slot.window
    return min(window.size - window.count, 2), window.complete, window.current is None


@define(frozen=True)
class WaitingGradients:
    """What becomes of one optimizer's gradients that wait for an update.

    Args:
        slot: The optimizer.
        parameters: Those whose gradients wait after the step, in the order of the graph's outputs.
        waits: Whether they wait for a later step.
        begun: Whether the first of them was computed in this step.
        in_block: Whether the first of them was computed in the optimizer's own block.
        counted: How many batches of its window were counted since it began, or since the step began.
        changed: What else of its window is set: stand-ins for what follows the gradients in the graph's outputs.
    """

    slot: Slot
    parameters: list[nn.Parameter]
    waits: bool
    begun: bool
    in_block: bool
    counted: int
    changed: dict[str, Any]

    def store(self, state: StepState, phase: str, outputs: Iterator[Tensor]) -> None:
        """Store the gradients that the graph returned, and reopen or close the window."""
        slot = self.slot
        if not self.waits or self.begun:
            slot.end_gradients()
        if self.waits and isinstance(slot, WindowSlot):
            slot.window.begin_step(state)
        if self.waits:
            slot.begin_gradients(state, self.in_block, phase)
        slot.release()
        for parameter in self.parameters:
            parameter.grad = next(outputs)
        if isinstance(slot, WindowSlot):
            slot.window.count += self.counted
            for name, value in self.changed.items():
                setattr(slot.window, name, next(outputs) if isinstance(value, Tensor) else value)


@define(eq=False)
class Fit:
    """For which counts of a window a graph was traced.

    Args:
        slot: The optimizer.
        count: How many batches had been counted.
        farthest: How many of the step's own had been at most, when the step asked whether the window closes.
        closed: Whether it ever does in the step.
    """

    slot: WindowSlot
    count: int
    farthest: int
    closed: bool

    def misfit(self) -> str | None:
        """Return why the graph is none for the window as it is now."""
        window = self.slot.window
        if window.count == self.count or (not self.closed and window.count + self.farthest + 1 < window.size):
            return None
        return f"batch {window.count + 1} of {window.size} of {self.slot.label}"


# Inside of the graph


@define(eq=False)
class TracedWindow(Window):
    """A window in a step that is traced; notes what the step asked of it.

    Args:
        began: How many batches had been counted when the step began.
        found: The weights that it had then.
        farthest: As that of `Fit`.
        closed: As that of `Fit`.
    """

    began: int = 0
    found: dict[str, Weight | None] = field(factory=dict)
    farthest: int = 0
    closed: bool = False

    @property
    def closes(self) -> bool:
        """Whether the batch that computes gradients now is its last one."""
        found = super().closes
        self.closed = self.closed or found
        self.farthest = max(self.farthest, self.count - self.began)
        return found


class TracedWindows(WindowedUpdates):
    """What `WindowedUpdates` does, while a step is traced: no gradient is changed in place, as it may be an input.

    Args:
        learner: The learner's stand-in.
        names: The names of all parameters' stand-ins.
        optimizers: The optimizers' stand-ins by name.
        of: For which it stands.
        weights: The stand-ins of the weights that go into the graph, by optimizer and name.
    """

    def __init__(
        self,
        learner: StepLearner,
        names: Any,
        optimizers: dict[str | None, Optimizer],
        of: WindowedUpdates,
        weights: dict[tuple[str | None, str], Tensor],
    ) -> None:
        Updates.__init__(self, learner, names, optimizers)
        self.casting, self.averager, self.scale, self.is_weighted = of.casting, None, None, of.is_weighted
        self.factor, self._told_twice = 1.0, False
        for slot in self.slots:
            window = of.find(slot.name).window  # type: ignore[attr-defined]  # `find` finds one of its slots
            found = {name: weights.get((slot.name, name), getattr(window, name)) for name in WEIGHTS}
            slot.window = TracedWindow(
                window.size, window.count, **found, complete=window.complete, began=window.count, found=found
            )

    def _weighted(self, loss: Tensor, slots: Sequence[WindowSlot]) -> Tensor:
        weight = slots[0].window.current
        if isinstance(weight, Tensor):
            return in_single(loss) * weight.to(in_single(loss))
        return loss if weight in (None, 1.0) else in_single(loss) * weight

    def _complete(self, slots: Sequence[WindowSlot]) -> None:
        for slot in slots:
            weight = slot.window.summed
            if isinstance(weight, Tensor):
                weight = weight.clamp(min=torch.finfo(torch.float32).tiny)
            elif weight in (0.0, 1.0):
                continue
            for parameter in slot.parameters:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.detach() / weight
        self._completed(slots)


def window_after(slot: Slot, begun: bool, carry: Callable[[Any, Weight], Weight]) -> tuple[int, dict[str, Any]]:
    """Return what a step leaves of an open window: how many batches it counted, and what else has changed.

    Args:
        slot: The optimizer's stand-in.
        begun: Whether the window was begun in the step.
        carry: Returns what a weight is after the step, of what it was before and is now.
    """
    window = getattr(slot, "window", None)
    if not isinstance(window, TracedWindow):
        return 0, {}
    before = dict.fromkeys(WEIGHTS) if begun else window.found
    changed: dict[str, Any] = {"complete": window.complete}
    for name in WEIGHTS:
        now = getattr(window, name)
        if now is None:
            changed[name] = None
        elif begun or now is not before[name]:
            changed[name] = carry(before[name], now)
    return window.count - (0 if begun else window.began), changed


def fits(slots: Sequence[Slot], stand_ins: Sequence[Slot]) -> list[Fit]:
    """List for which counts of its windows a graph was traced, where its key does not say it."""
    return [
        Fit(slot, window.began, window.farthest, window.closed)
        for slot, now in zip(slots, stand_ins, strict=True)
        if isinstance(slot, WindowSlot)
        and isinstance(window := getattr(now, "window", None), TracedWindow)
        and slot.window.size > 2
    ]
