"""Loops of a user's own: optimizers whose steps are of several batches, several processes, or scaled losses.

In such a loop nobody says whose a loss is, and gradients add up until somebody sets them to zero. So
``backward`` computes them as ever, times what the batch weighs; and all else happens when an
optimizer is stepped: its gradients are taken aside in a window that goes on, and in the last batch of one
they are added up over batches and processes, divided by what these weigh, and used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compute.averaging import Averager
from fluxloop.compute.gradients import are_finite, divide_gradients
from fluxloop.compute.optimizers import owned_parameters
from fluxloop.compute.precision import Casting, LossScale, in_single, power_next_to
from fluxloop.compute.reach import loss_error
from fluxloop.errors import OptimizerError
from fluxloop.nested import batch_size, map_tensors
from fluxloop.processes.group import Group


def rows_of(batch: Any) -> int:
    """Return how many rows a batch has: a tensor, or a tuple, list or mapping of what belongs together.

    >>> rows_of((torch.zeros(8, 3), torch.zeros(8)))
    8
    """
    if isinstance(batch, Mapping):
        entries = {str(name): item for name, item in batch.items()}
    elif isinstance(batch, tuple) or (isinstance(batch, list) and any(isinstance(item, Tensor) for item in batch)):
        entries = {str(place): item for place, item in enumerate(batch)}
    else:
        entries = {"xs": batch}
    return batch_size(entries)


class CastForward:
    """The forward of a model that computes in reduced precision, and returns float32.

    Args:
        module: The model.
        casting: Switches autocast.
        own: What stood in its place as an attribute of the model, if anything did.
    """

    def __init__(self, module: nn.Module, casting: Casting, own: Any = None) -> None:
        self.module, self.casting, self.own = module, casting, own

    @property
    def __wrapped__(self) -> Any:
        """The forward that it runs, by which the arguments are read that a model takes."""
        return self.module.__class__.forward.__get__(self.module) if self.own is None else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward in the precision."""
        with self.casting.on():
            made = self.__wrapped__(*args, **kwargs)
        return map_tensors(in_single, made)


@define(eq=False)
class RawSlot:
    """An optimizer of a loop of the user's own, and the batches whose gradients make one update.

    Args:
        optimizer: The optimizer.
        name: Its name in messages and in ``accumulate``; None for one without.
        size: How many batches an update has.
        inner: Its step, as it was.
        count: How many batches have been counted: by a step that changed nothing.
        weight: What these weigh together.
        sums: Their gradients.
        current: What the batch weighs whose gradients are being computed; None where none are.
        complete: Whether the gradients are those of all batches and processes, divided by their weight.
        finite: Whether they are finite, where that was looked at.
        opened_by: The loader whose batches they are.
    """

    optimizer: Optimizer
    name: str | None
    size: int
    inner: Callable[..., Any]
    count: int = 0
    weight: float = 0.0
    sums: dict[nn.Parameter, Tensor] = field(factory=dict)
    current: float | None = None
    complete: bool = False
    finite: bool = True
    opened_by: object = None

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return f"the {type(self.optimizer).__name__}" if self.name is None else f"optimizer {self.name!r}"

    @property
    def is_empty(self) -> bool:
        """Whether no gradients wait for it."""
        return not self.count and self.current is None

    def put_aside(self) -> None:
        """Count a batch, and take its gradients aside."""
        for parameter in owned_parameters(self.optimizer):
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                before = self.sums.get(parameter)
                self.sums[parameter] = gradient if before is None else before + gradient
        self.count, self.weight, self.current = self.count + 1, self.weight + (self.current or 0.0), None

    def begin_anew(self) -> None:
        """Begin the next update."""
        self.count, self.weight, self.current = 0, 0.0, None
        self.complete, self.finite, self.sums, self.opened_by = False, True, {}, None


class RawLoop:
    """The optimizers of loops of a user's own, with their windows.

    Args:
        group: The processes; None for one.
        precision: That of the accelerator.
    """

    def __init__(self, group: Group | None, precision: str) -> None:
        self.group = group
        self.slots: list[RawSlot] = []
        self.scale = LossScale() if precision == "fp16" else None
        self.averager = None if group is None else Averager(group)
        self.standing: tuple[float, object, object] = (1.0, None, None)
        """How many rows the batch has that a loader gave last, which loader that was, and what stands for that step."""
        self._scaled_by = 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> RawLoop:
        """Return the loop itself: its optimizers are the user's, whoever copies the accelerator."""
        return self

    @property
    def is_weighted(self) -> bool:
        """Whether batches are weighed against others."""
        return self.group is not None or any(slot.size > 1 for slot in self.slots)

    def add(self, optimizer: Optimizer, name: str | None, size: int) -> None:
        """Take charge of an optimizer's steps.

        Raises:
            OptimizerError: Somebody is in charge already.
        """
        if any(slot.optimizer is optimizer for slot in self.slots):
            return
        if isinstance(vars(optimizer).get("step"), MethodType) and hasattr(optimizer.step, "__in_raw_loop__"):
            raise OptimizerError(
                f"a {type(optimizer).__name__} was given to prepare of two accelerators; expected one for each"
            )
        slot = RawSlot(optimizer, name, size, optimizer.step)

        def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return loop.step(slot, closure)

        loop, wrapped = self, getattr(slot.inner, "__func__", slot.inner)
        update_wrapper(step, wrapped)  # torch's schedulers have left a mark there
        step.__in_raw_loop__ = True  # type: ignore[attr-defined]  # a mark
        # A method, as torch's schedulers want to wrap one
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]  # of this optimizer alone
        self.slots.append(slot)

    def begin_batch(self, batch: Any, loader: object) -> None:
        """Note what a loader gives."""
        self.standing = float(rows_of(batch)), loader, object()

    def end_loader(self, loader: object) -> None:
        """Close the windows whose batches a loader gave, as it has no more."""
        for slot in self.slots:
            if slot.count and slot.opened_by is loader:
                if slot.current is not None:  # computed after the last step, and never used
                    for parameter in owned_parameters(slot.optimizer):
                        parameter.grad = None
                    slot.current = None
                self.complete(slot)
                self._use(slot)

    # Gradients

    def weighed(self, loss: Tensor) -> Tensor:
        """Return a loss times what its batch weighs, and the scale; note that its gradients are computed.

        Raises:
            LossError: It is none that has a gradient.
            OptimizerError: Complete gradients wait for their update.
        """
        if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1 and not loss.is_complex()):
            raise loss_error(loss, "")
        for slot in self.slots:
            if slot.complete:
                raise OptimizerError(
                    f"accelerator.backward was called after accelerator.clip_grad_norm_ and before the step of "
                    f"{slot.label}; expected every backward of an update before its gradients are clipped"
                )
        if self.standing[1] is None and all(slot.is_empty for slot in self.slots):  # of a loader that was not prepared
            self.standing = 1.0, None, object()
        weight = self._weight()
        if self.scale is not None:
            if loss.dtype is torch.float16:
                self.scale.of_half_loss()
            if all(slot.is_empty for slot in self.slots):
                self._scaled_by = self.scale.value
        for slot in self.slots:
            slot.current = weight
            slot.opened_by = self.standing[1] if slot.opened_by is None else slot.opened_by
        factor = weight * self._scaled_by
        return loss if factor == 1.0 else in_single(loss) * factor

    def _weight(self) -> float:
        if not self.is_weighted:
            return 1.0
        rows = 0.0 if self.group is not None and self.group.spare else self.standing[0]
        if self.scale is None:
            return rows
        if self.scale.reference is None:
            self.scale.reference = power_next_to(rows, self.group)
        return rows / self.scale.reference

    def complete(self, slot: RawSlot) -> None:
        """Add up an optimizer's gradients over batches and processes, and divide them by what these weigh; once."""
        if slot.complete:
            return
        parameters = owned_parameters(slot.optimizer)
        for parameter in parameters:
            before = slot.sums.get(parameter)
            if before is not None:
                parameter.grad = before if parameter.grad is None else before + parameter.grad
        total = slot.weight + (slot.current or 0.0)
        if self.averager is None:
            divide_gradients([p.grad for p in parameters if p.grad is not None], total, self._scaled_by)
        else:
            self.averager.reduce([tuple(parameters)], [total], scales=[self._scaled_by])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        slot.complete, slot.sums = True, {}
        slot.finite = self.scale is None or are_finite(gradients)

    def closes(self, slot: RawSlot) -> bool:
        """Whether the batch whose gradients were computed is the last one of an update."""
        return slot.count + 1 >= slot.size

    # Updates

    def step(self, slot: RawSlot, closure: Callable[[], Any] | None = None) -> Any:
        """Do what ``optimizer.step()`` does: count a batch, and update with the last one of a window.

        Raises:
            OptimizerError: No gradient was computed by the accelerator, or a closure is given.
        """
        if closure is not None:
            raise OptimizerError(
                f"{slot.label} was stepped with a closure, which computes gradients of one batch, in one process and "
                "without a scale; expected an Accelerator with accumulate=1 and no precision='fp16', in one process"
            )
        if slot.current is None:
            raise OptimizerError(
                f"{slot.label} was stepped, and accelerator.backward has computed no gradient since its last step; "
                "expected accelerator.backward(loss) in place of loss.backward()"
            )
        if not self.closes(slot):
            slot.put_aside()
            return None
        self.complete(slot)
        return self._use(slot)

    def _use(self, slot: RawSlot) -> Any:
        finite = slot.finite
        slot.begin_anew()
        if not finite and self.scale is not None:
            self.scale.overflowed(self.standing[2], slot.label)
            return None
        done = slot.inner()
        if self.scale is not None:
            self.scale.stepped(self.standing[2])
        return done
