"""Windows of several batches in compiled steps: what a step finds of them, what it does to them, and what it leaves.

How many batches a window has counted is known in Python, and whether it closes chooses the graph. What
its batches weigh is a tensor, which goes into the graph with the gradients that wait, and comes out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compile.averaging import Agreed, TracedAverager
from fluxloop.compute.gradients import divisor
from fluxloop.compute.precision import in_single
from fluxloop.compute.slots import Slot
from fluxloop.compute.updates import Updates
from fluxloop.compute.window import Weight, Window, WindowSlot
from fluxloop.compute.windows import WindowedUpdates
from fluxloop.nested import weight_of
from fluxloop.processes.agree import CANCEL, STOP
from fluxloop.state import StepState

WEIGHTS = ("weight", "current")
"""What of a window are weights: of the batches that it has counted, and of the one that computes gradients now."""

Place = tuple[str | None, str]

SHARE, OPEN, FRESH = (None, "share"), (None, "scale of open windows"), (None, "scale of windows that begin")
"""Numbers of no optimizer: 0 for a batch that repeats rows, else 1; and what losses are multiplied by."""

STOPS, CANCELS = (None, "stops"), (None, "cancels")
"""What this process votes for, as numbers too."""


# Outside of the graph


@define(eq=False)
class Number:
    """A number that goes into the graph, as a tensor.

    Args:
        place: Of what it is the number: the optimizer's name, and what it is called.
        get: Returns it.
        tensor: Where it is put if it is no tensor.
        last: What was put there last.
    """

    place: Place
    get: Callable[[], Any]
    tensor: Tensor
    last: Any = None

    def now(self) -> Tensor:
        """Return it as a tensor."""
        number = self.get()
        if isinstance(number, Tensor):
            return number.to(self.tensor).reshape(())
        if number != self.last:
            self.last = number
            self.tensor.fill_(number)
        return self.tensor


def carried(learner: Any) -> list[Number]:
    """List the numbers that a step of several batches, or processes, may use.

    Those are the weights of open windows; with several processes also whether this one's batch counts, and what losses
    are multiplied by, in windows that are open and in those that begin.
    """
    updates, device = learner.updates, learner.accelerator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # a Mac's GPU knows no longer ones
    found: dict[Place, Callable[[], Any]] = {}
    for slot in updates.slots if isinstance(updates, WindowedUpdates) else ():
        if slot.first_step is not None and slot.window.size > 1:
            found |= {
                (slot.name, name): partial(getattr, slot.window, name)
                for name in WEIGHTS
                if getattr(slot.window, name) is not None
            }
    if isinstance(updates, WindowedUpdates) and updates.averager is not None:
        group = updates.averager.group
        found[SHARE] = lambda: float(not group.spare)
        found[OPEN] = lambda: next((s.window.scale for s in updates.slots if s.first_step is not None), updates.factor)
        found[FRESH] = lambda: updates.factor
        found[STOPS], found[CANCELS] = (partial(vote, learner, place) for place in (STOP, CANCEL))
    return [Number(place, get, torch.zeros((), dtype=dtype, device=device)) for place, get in found.items()]


def vote(learner: Any, place: int) -> float:
    """Return a vote of this process, for the messages of the step that is about to run."""
    found: float = learner.accelerator.group.agreement.votes(learner)[place]
    return found


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
                if isinstance(value, Tensor):
                    value = next(outputs)
                setattr(slot.window, name, value.last if isinstance(value, Number) else value)


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
        leaves: The stand-in of each parameter.
        numbers: The stand-ins of the numbers that go into the graph, by place.
    """

    def __init__(
        self,
        learner: Any,
        names: Any,
        optimizers: dict[str | None, Optimizer],
        of: WindowedUpdates,
        leaves: dict[Any, Tensor],
        numbers: dict[Place, Tensor],
    ) -> None:
        Updates.__init__(self, learner, names, optimizers)
        self.casting, self.scale, self.is_weighted, self._told_twice = of.casting, None, of.is_weighted, False
        # what stands for the averager, and for the factor, does what they do with tensors
        self.averager: Any = None if of.averager is None else TracedAverager(of.averager, leaves, numbers, learner)
        self.factor: Any = numbers.get(FRESH, 1.0)
        self._share = numbers.get(SHARE)
        for slot in self.slots:
            of_learner: Any = of.find(slot.name)
            window = of_learner.window
            found = {name: numbers.get((slot.name, name), getattr(window, name)) for name in WEIGHTS}
            scale: Any = 1.0 if of_learner.first_step is None else numbers.get(OPEN, window.scale)
            slot.window = TracedWindow(
                window.size,
                window.count,
                **found,
                scale=scale,
                complete=window.complete,
                began=window.count,
                found=found,
            )

    @property
    def lacks_agreement(self) -> bool:
        """Whether gradients were to be sent of which the processes have not agreed how."""
        return self.averager is not None and bool(self.averager.is_missing)

    def _weigh(self) -> Weight:
        if not self.is_weighted:
            return 1.0
        learner = self._learner
        weight = weight_of(learner.scope.phase, learner.step)
        weight = weight.detach() if isinstance(weight, Tensor) else float(weight)
        return weight if self._share is None else self._share * weight

    def _weighted(self, loss: Tensor, slots: Sequence[WindowSlot]) -> Tensor:
        window = slots[0].window
        weight = window.scale if window.current is None else window.current * window.scale
        if isinstance(weight, Tensor):
            return in_single(loss) * weight.to(in_single(loss))
        return loss if weight == 1.0 else in_single(loss) * weight

    def _reduced(self, slots: Sequence[WindowSlot], compute: Callable[[], None]) -> None:
        closing = [slot for slot in slots if slot.window.closes]
        compute()
        if closing:
            self._complete_all(closing)

    def _complete_alone(self, slot: WindowSlot) -> None:
        self._complete_all([slot])

    def _complete_all(self, slots: Sequence[WindowSlot]) -> None:
        """Complete the gradients of windows, over processes too."""
        if self.averager is not None:
            self.averager.add_up([(self.slots.index(slot), slot) for slot in slots])
        for slot in slots:
            by = divisor(slot.window.summed, slot.window.scale) if self.averager is None else None
            for parameter in slot.parameters:
                if parameter.grad is not None and by is not None:
                    parameter.grad = parameter.grad.detach() / by
        self._completed(slots)


def window_after(
    slot: Slot, begun: bool, carry: Callable[[Any, Weight], Weight], numbers: dict[Tensor, Number]
) -> tuple[int, dict[str, Any]]:
    """Return what a step leaves of an open window: how many batches it counted, and what else has changed.

    Args:
        slot: The optimizer's stand-in.
        begun: Whether the window was begun in the step.
        carry: Returns what a weight is after the step, of what it was before and is now.
        numbers: The numbers that went into the graph, by stand-in.
    """
    window = getattr(slot, "window", None)
    if not isinstance(window, TracedWindow):
        return 0, {}
    before = dict.fromkeys(WEIGHTS) if begun else window.found
    scale: Any = window.scale
    changed: dict[str, Any] = {"complete": window.complete}
    if begun:
        changed["scale"] = numbers[scale] if isinstance(scale, Tensor) else scale
    for name in WEIGHTS:
        now = getattr(window, name)
        if now is None:
            changed[name] = None
        elif begun or now is not before[name]:
            changed[name] = carry(before[name], now)
    return window.count - (0 if begun else window.began), changed


def fits(slots: Sequence[Slot], updates: Any) -> list[Fit | Agreed]:
    """List for which counts of its windows a graph was traced, where its key does not say it, and its messages.

    Args:
        slots: The learner's.
        updates: What stood for its updates.
    """
    if not isinstance(updates, TracedWindows):
        return []
    counted: list[Fit | Agreed] = [
        Fit(slot, window.began, window.farthest, window.closed)
        for slot, now in zip(slots, updates.slots, strict=True)
        if isinstance(slot, WindowSlot) and isinstance(window := now.window, TracedWindow) and slot.window.size > 2
    ]
    return counted if updates.averager is None else [*counted, *updates.averager.agreed]
