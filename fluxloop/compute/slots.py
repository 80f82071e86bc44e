"""One optimizer with the gradients that it owns: which step computed them, and whether they wait or were used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import define
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compute.modes import OptimizerMode
from fluxloop.events import UpdateBegin, UpdateEnd
from fluxloop.state import StepState


@define(eq=False)
class Slot:
    """One optimizer, its parameters, and where its gradients stand.

    Args:
        name: Its name, None for the only optimizer of a learner with one.
        optimizer: The optimizer.
        parameters: Those in its groups, frozen ones too.
        others: Those of the other optimizers.
        begin: The event fired before it steps.
        end: The event fired after.
        num_groups: How many parameter groups the optimizer had when `parameters` was read.
        consumed: Whether the gradients have been used by an update, and may be released.
        first_step: The step that computed the first gradient since the last update; None where no gradient waits.
        in_block: Whether it did so in the optimizer's own block.
        told_resting: Whether a warning has said that all of its parameters are frozen.
        mode: Of an optimizer that has ``train()`` and ``eval()``.
        phase: Name of the phase that computed gradients last; None where a checkpoint does not say.
        num_batches: How many steps have computed gradients since the last update, 0 where nobody knows.
        step: The last of them.
        before: The gradients that waited when that step computed its own, to be put back where it is cancelled.
    """

    name: str | None
    optimizer: Optimizer
    parameters: tuple[nn.Parameter, ...]
    others: tuple[nn.Parameter, ...]
    begin: UpdateBegin
    end: UpdateEnd
    num_groups: int
    consumed: bool = True
    first_step: StepState | None = None
    in_block: bool = False
    told_resting: bool = False
    mode: OptimizerMode | None = None
    phase: str | None = ""
    num_batches: int = 0
    step: StepState | None = None
    before: list[Tensor | None] | None = None

    def release(self) -> None:
        """Drop the gradients."""
        # Not set to zero: that would keep their memory through the next forward, and cost a pass through it. And an
        # optimizer leaves a parameter alone whose gradient is None, where one of zeros would still be moved by its
        # momentum and its weight decay.
        for parameter in self.parameters:
            parameter.grad = None
        self.consumed = False

    def begin_gradients(self, state: StepState, in_block: bool, phase: str) -> bool:
        """Note that a step computes gradients, and put those that wait aside in case it is cancelled.

        Returns:
            Whether some wait that it adds to for the first time.
        """
        if self.first_step is None:
            self.first_step, self.in_block, self.num_batches, self.before = state, in_block, 1, None
        elif self.step is not state and self.first_step is not state:
            self.num_batches += 1
            self.before = [parameter.grad for parameter in self.parameters]
            self.step = state
            return True
        self.step, self.phase = state, phase
        return False

    def end_gradients(self) -> None:
        """Note that an update has used the gradients, or that none is to use them."""
        self.first_step, self.consumed, self.num_batches, self.before = None, True, 0, None

    def abandon(self, state: StepState) -> None:
        """Undo what a step that was cancelled has done to the gradients."""
        if self.first_step is state:
            self.end_gradients()
        elif self.before is not None and self.step is state:
            for parameter, gradient in zip(self.parameters, self.before, strict=True):
                parameter.grad = gradient
            self.before = None
            self.num_batches -= 1

    @property
    def batches_per_update(self) -> int:
        """How many batches the accelerator makes one update of."""
        return 1

    def window_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the batches that make an update: nothing, where it is one."""
        return {}

    def restore_window(self, state: dict[str, Any] | None) -> None:
        """Go on from what a checkpoint kept."""

    @property
    def waiting(self) -> list[nn.Parameter]:
        """Its parameters whose gradients wait for an update."""
        if self.first_step is None:
            return []
        return [parameter for parameter in self.parameters if parameter.grad is not None]

    @property
    def has_gradients(self) -> bool:
        """Whether an update has gradients to use; where all parameters are frozen, none are missed."""
        return (
            self.first_step is not None
            or any(parameter.grad is not None for parameter in self.parameters)
            or not any(parameter.requires_grad for parameter in self.parameters)
        )

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return "the optimizer" if self.name is None else f"optimizer {self.name!r}"


@contextmanager
def set_apart(slots: Sequence[Slot]) -> Iterator[None]:
    """Compute gradients apart from those that wait, and add them up afterwards.

    Those that waited stay as they are, so that they can be put back to the bit. The sum has the bits of
    torch's own, which adds in place. Hooks that are called once a gradient has been added to those
    before get what they expect: where there are some, copies of the waiting gradients are put aside.
    """
    waiting = [
        (parameter, gradient)
        for slot in slots
        for parameter, gradient in zip(slot.parameters, slot.before or (), strict=False)
        if gradient is not None and parameter.grad is gradient
    ]
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter, _ in waiting):
        for parameter, gradient in waiting:
            parameter.grad = gradient.clone()  # torch adds to the clone; `slot.before` has the gradient itself
        waiting = []
    for parameter, _ in waiting:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in waiting:
            new = parameter.grad
            if new is None:
                parameter.grad = gradient
            else:  # in the order in which torch adds them
                parameter.grad = new + gradient if gradient.is_sparse else gradient + new
