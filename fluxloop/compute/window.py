"""A window: the batches whose gradients make one update of an optimizer, and the optimizer that has one."""

from __future__ import annotations

from typing import Any

from attrs import define, field
from torch import Tensor

from fluxloop.compute.slots import Slot
from fluxloop.state import StepState

Weight = float | Tensor


@define(eq=False)
class Window:
    """The batches whose gradients make one update of an optimizer.

    A batch is counted when its update is asked for: by ``learner.update()``, or by the end of an update block.

    Args:
        size: How many batches it has.
        count: How many have been counted.
        weight: What these weigh together, of all processes once it is `complete`.
        current: What the batch weighs that computes gradients now; None where none does.
        scale: What the losses in it are multiplied by.
        complete: Whether the gradients are those of all batches and processes, divided by their weight.
        finite: Whether they are finite, where that was looked at.
        saved: The step that computed gradients last, and what the five above (`count` to `finite`, without `scale`)
            were before it.
    """

    size: int
    count: int = 0
    weight: Weight = 0.0
    current: Weight | None = None
    scale: float = 1.0
    complete: bool = False
    finite: bool = True
    saved: tuple[StepState, int, Weight, Weight | None, bool, bool] | None = None

    def begin_step(self, step: StepState) -> None:
        """Save what to go back to where a step is cancelled, once in each step."""
        if self.saved is None or self.saved[0] is not step:
            self.saved = (step, self.count, self.weight, self.current, self.complete, self.finite)

    def abandon(self, step: StepState) -> None:
        """Go back to what was before a step that is cancelled."""
        if self.saved is not None and self.saved[0] is step:
            _, self.count, self.weight, self.current, self.complete, self.finite = self.saved

    def reset(self) -> None:
        """Begin anew."""
        self.count, self.weight, self.current = 0, 0.0, None
        self.complete, self.finite, self.saved = False, True, None

    @property
    def closes(self) -> bool:
        """Whether the batch that computes gradients now is its last one."""
        return self.count + 1 >= self.size

    @property
    def summed(self) -> Weight:
        """What its batches weigh together, the one that computes gradients now too."""
        return self.weight if self.current is None else self.weight + self.current


@define(eq=False)
class WindowSlot(Slot):
    """An optimizer with its window."""

    window: Window = field(factory=lambda: Window(1))

    def end_gradients(self) -> None:
        """Note that an update has used the gradients, or that none is to use them."""
        super().end_gradients()
        self.window.reset()

    def abandon(self, state: StepState) -> None:
        """Undo what a step that was cancelled has done to the gradients."""
        saved = self.window.saved
        super().abandon(state)
        self.window.saved = saved  # batches may be counted of which this process has no gradients, as others alone have
        self.window.abandon(state)

    @property
    def batches_per_update(self) -> int:
        """How many batches the accelerator makes one update of."""
        return self.window.size

    def window_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the batches that make an update."""
        window = self.window
        return {
            "window": {
                "size": window.size,
                "count": window.count,
                "weight": float(window.weight),
                "current": None if window.current is None else float(window.current),
                "scale": window.scale,
                "complete": window.complete,
                "finite": window.finite,
            }
        }

    def restore_window(self, state: dict[str, Any] | None) -> None:
        """Go on from what a checkpoint kept; one of a run without windows has gradients of one batch at most."""
        self.window.reset()
        if state is None:
            state = {"complete": self.first_step is not None}
        for name in state.keys() - {"size"}:
            setattr(self.window, name, state[name])

    def take(self) -> list[Tensor | None]:
        """Take the gradients out of the parameters, so that new ones are computed beside them."""
        taken = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return taken

    def put(self, taken: list[Tensor | None]) -> None:
        """Put gradients back that were taken out."""
        for parameter, gradient in zip(self.parameters, taken, strict=True):
            parameter.grad = gradient

    def add(self, taken: list[Tensor | None], step: StepState) -> None:
        """Add gradients that were taken out to those that a step has computed since; where it is cancelled, they stay.

        They are not changed themselves: `before` holds them.
        """
        for parameter, gradient in zip(self.parameters, taken, strict=True):
            new = parameter.grad
            if gradient is not None:
                parameter.grad = gradient if new is None else gradient + new
        if self.before is not None and self.step is step:
            self.before = taken
