"""Updates of several batches, of several processes, and with scaled losses: what `Updates` does where one is asked for.

An optimizer has a *window*: the batches whose gradients make one update. Each is multiplied by what its
batch weighs, all are added up, over processes too, and divided by the summed weight once the window
closes. So ragged batches, and any number of processes, give the gradient of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import log2
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import Tensor, nn

from fluxloop.compute.averaging import Averager, Sums
from fluxloop.compute.gradients import are_finite, divide_gradients
from fluxloop.compute.optimizers import Optimizers
from fluxloop.compute.precision import Casting, LossScale, in_single, power_next_to
from fluxloop.compute.reach import unclear_owner
from fluxloop.compute.updates import Updates
from fluxloop.compute.window import Weight, WindowSlot
from fluxloop.errors import CancelStepException, OptimizerError, did_you_mean, warn_user
from fluxloop.nested import weight_of
from fluxloop.processes.sums import with_mean_loss
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import StepLearner


class WindowedUpdates(Updates):
    """Updates whose gradients are those of several batches or processes, or of scaled losses.

    Args:
        learner: The learner.
        names: The names of all parameters.
        optimizers: By name.

    Raises:
        OptimizerError: ``accumulate`` names an optimizer that there is not; or weights are in fp16 and losses scaled.
    """

    slot_type = WindowSlot
    is_windowed = True
    advice = (
        "The end of an epoch makes their update, unless an error or a stop cuts it short; in a loop of your own, call "
        "learner.update() as often as an update has batches"
    )
    slots: tuple[WindowSlot, ...]
    factor = 1.0
    """What losses are multiplied by in windows that begin."""

    def __init__(self, learner: StepLearner, names: dict[nn.Parameter, str], optimizers: Optimizers) -> None:
        super().__init__(learner, names, optimizers)
        self._told_twice = False
        accelerator = learner.accelerator
        for slot in self.slots:
            slot.window.size = _size(accelerator.accumulate, slot.name, [*optimizers])
        self.casting: Casting | None = accelerator.casting
        group, compiled = accelerator.group, accelerator.compile == "step"
        self.averager = None if group is None else Averager(group, self._name_of, collective=compiled)
        """Adds up gradients over processes, where there are several."""
        self.scale = LossScale() if accelerator.precision == "fp16" else None
        half = next((name for p, name in names.items() if p.dtype is torch.float16), None)
        if self.scale is not None and half is not None:
            raise OptimizerError(
                f"precision='fp16' was given, and the weights {half!r} are in float16 already, whose gradients cannot "
                "be scaled; expected float32, from which autocast makes float16 in a step: model.float()"
            )
        self.is_weighted = accelerator.world_size > 1 or any(slot.window.size > 1 for slot in self.slots)

    def _name_of(self, parameter: nn.Parameter) -> str | None:
        return self.names.get(parameter)

    def _uncast(self) -> AbstractContextManager[None]:
        """Return a context in which autocast is off: gradients and updates are computed in the weights' own type."""
        return nullcontext() if self.casting is None else self.casting.off()

    # Gradients

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Compute the gradients of a scalar loss; those of the last batch of a window complete it.

        Raises:
            LossError: As `Updates.backward` does.
        """
        scope, step = self._learner.scope, self._learner.step
        phase = "" if scope is None else scope.phase.name
        slots: Sequence[WindowSlot] = self.slots if self.block is None else (self.block.slot,)  # type: ignore[assignment]  # blocks have the slots of their learner
        if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1 and not loss.is_complex()):
            super().backward(loss, retain_graph)  # which says what is wrong with it
        for slot in slots:
            if slot.first_step is not None:
                self._meet_waiting(slot, phase)
        if self.block is None and len(slots) > 1:
            self._check_whose_next()
        self._begin(slots, step, loss)
        # Gradients that are complete are not added to: what they were divided by is not that of the new ones
        done = [(slot, slot.take()) for slot in slots if slot.window.complete]
        try:
            with self._uncast():
                self._reduced(slots, lambda: Updates.backward(self, self._weighted(loss, slots), retain_graph))
        except BaseException:
            for slot, gradients in done:
                slot.put(gradients)
            raise
        for slot, gradients in done:
            slot.add(gradients, step)

    def _begin(self, slots: Sequence[WindowSlot], step: StepState, loss: Tensor) -> None:
        """Note what the batch weighs whose gradients are about to be computed, and the scale of its loss.

        One loss has one weight and one scale, for all optimizers whose gradients it gives.
        """
        windows = [slot.window for slot in slots]
        for window in windows:
            window.begin_step(step)
        if self.scale is not None:
            if loss.dtype is torch.float16:
                self.scale.of_half_loss()
            self.factor = self.scale.value
        scale = next((slot.window.scale for slot in slots if slot.first_step is not None), self.factor)
        for slot in slots:
            if slot.first_step is None:
                slot.window.scale = scale
        # One that has computed gradients already, and has not been counted: they are added up to those of one batch
        current = next((window.current for window in windows if window.current is not None and window.size > 1), None)
        if current is None:
            current = self._weigh()
        for window in windows:
            window.current = current

    def _check_whose(self) -> None:
        """Leave what `_check_whose_next` has looked at: by now the windows hold the batch itself."""

    def _check_whose_next(self) -> None:
        """Raise for a loss that nobody knows the owner of; gradients of batches that were counted are no other loss's.

        Raises:
            LossError: The gradients of two losses would reach the same optimizers.
        """
        pending = [
            slot.first_step is not None and (slot.window.current is not None or not slot.window.count)
            for slot in self.slots
        ]
        second = self._explicit is self._learner.step and any(pending)
        self._explicit = self._learner.step
        if second or any(pending) != all(pending):
            raise unclear_owner([slot.name for slot in self.slots], second)

    def _weigh(self) -> Weight:
        """Return what the running batch weighs."""
        if not self.is_weighted:
            return 1.0
        learner, group = self._learner, self._learner.accelerator.group
        scope, step = learner.scope, learner.step
        weight: Weight = 0.0
        if group is None or not group.spare:  # else another process has these rows too
            weight = weight_of(None if scope is None else scope.phase, step)
            weight = weight.detach() if isinstance(weight, Tensor) else float(weight)
        if self.scale is None:
            return weight
        if self.scale.reference is None:
            self.scale.reference = power_next_to(float(weight), group)
        return weight / self.scale.reference

    def _weighted(self, loss: Tensor, slots: Sequence[WindowSlot]) -> Tensor:
        """Return the loss times what its batch weighs and the scale."""
        window = slots[0].window
        weight = window.scale if window.current is None else window.current * window.scale
        if not isinstance(weight, Tensor) and weight == 1.0:
            return loss
        return in_single(loss) * weight

    def _reduced(self, slots: Sequence[WindowSlot], compute: Callable[[], None]) -> None:
        """Compute gradients; where they are those of a window's last batch, complete them."""
        closing = [slot for slot in slots if slot.window.closes]
        if self.averager is None or not closing:
            compute()
            self._complete(closing)
        else:
            self._learner.accelerator.group.agreement.before(self._learner, closing)
            with self.averager.watching([slot.parameters for slot in closing]):
                compute()
            self._add_up(closing, self.averager.finish)

    def _complete_alone(self, slot: WindowSlot) -> None:
        """Complete gradients that no backward pass is about to add to."""
        if self.averager is None:
            self._complete([slot])
        else:
            self._learner.accelerator.group.agreement.before(self._learner, [slot])
            self._add_up([slot], partial(self.averager.reduce, [slot.parameters]))

    def _add_up(self, slots: Sequence[WindowSlot], send: Callable[..., Sums]) -> None:
        """Add up gradients of all processes, and act on what any of them wants."""
        learner, agreement = self._learner, self._learner.accelerator.group.agreement
        weights, scales = [slot.window.summed for slot in slots], [slot.window.scale for slot in slots]
        sums = send(weights, agreement.votes(learner), scales=scales)
        agreement.after(learner, sums.votes)
        self.balance(sums.weights)
        self._completed(slots)

    def balance(self, weights: Sequence[Weight]) -> None:
        """Scale the losses of later windows so that gradients need no division where they weigh as much as these."""
        weight = weights[-1]  # which all processes know; a power of two changes no bit of a quotient
        if self.scale is None and not isinstance(weight, Tensor) and weight > 0:
            self.factor = 2.0 ** -round(log2(weight))

    def _complete(self, slots: Sequence[WindowSlot]) -> None:
        """Divide the gradients of windows by their weight and scale."""
        for slot in slots:
            gradients = [p.grad for p in slot.parameters if p.grad is not None]
            divide_gradients(gradients, slot.window.summed, slot.window.scale)
        self._completed(slots)

    def _completed(self, slots: Sequence[WindowSlot]) -> None:
        """Note that the gradients of windows are complete, and look whether they are finite."""
        for slot in slots:
            slot.window.complete = True
            if self.scale is not None:
                slot.window.finite = slot.window.finite and self._is_finite(slot)

    def _is_finite(self, slot: WindowSlot) -> bool:
        """Return whether all gradients of an optimizer are finite: this waits for the device."""
        return are_finite([p.grad for p in slot.parameters if p.grad is not None])

    # Updates

    def update(self, name: str | int | None = None, closure: Callable[[], Any] | None = None) -> None:
        """Step one optimizer, the block's, or all, where the window of each closes with this batch.

        Raises:
            OptimizerError: As `Updates.update` does; or a closure is given and an update is one of several batches, or
                in fp16.
            PhaseError: As `Updates.update` does.
        """
        scope = self._learner.scope
        phase = None if scope is None else scope.phase
        if phase is not None and phase.data_key and not phase.gradients:
            super().update(name, closure)  # which says what is wrong
        slots: Sequence[Any] = self.slots if self.block is None else (self.block.slot,)
        if name is not None:
            slots = (self._find_to_step(name),)
        if closure is not None:
            self._check_closes(slots)
            closure = self._cast(closure)
            with self._uncast():
                super().update(name, with_mean_loss(closure, self._learner.accelerator.group, self._weigh))
            return
        phase_name = "" if phase is None else phase.name
        told, quiet = self._told_no_gradient, any(slot.has_gradients for slot in slots)
        self._told_no_gradient = told or quiet  # where one of several has gradients, another may have none
        try:
            for slot in slots:
                if slot.first_step is not None and slot.phase != phase_name:
                    self._drop(slot, f"{phase_name or 'a loop of your own'} updates it")
                self._close(slot)
        finally:
            if quiet:
                self._told_no_gradient = told

    def _cast(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Have a closure compute in the precision in which a step does that calls it, also where an optimizer does."""
        casting = self.casting
        if (
            casting is None
            or not callable(closure)
            or not torch.is_autocast_enabled(self._learner.accelerator.device.type)
        ):
            return closure

        def compute() -> Any:
            with casting.on():
                return closure()

        return compute

    def _close(self, slot: WindowSlot) -> None:
        """Count a batch whose update is asked for, and step the optimizer with the last one of its window."""
        window = slot.window
        if window.current is None and slot.first_step is None:
            self._take_by_hand(slot)
            self._step(slot)
            return
        if window.current is None:
            if not self._told_twice:
                self._told_twice = True
                warn_user(
                    f"learner.update was called twice for {slot.label}, and no gradient was computed in between; it "
                    f"counts once in its {window.size} batches"
                )
            return
        if not window.closes:
            self.take_given(slot)
            window.count, window.weight, window.current = window.count + 1, window.summed, None
            return
        self._use(slot)

    def _take_by_hand(self, slot: WindowSlot) -> None:
        """Take gradients that were computed without ``learner.backward``, if there are some, as those of this batch.

        Raises:
            OptimizerError: They would have to be weighed against those of other batches.
        """
        gradients = [p.grad for p in slot.parameters if p.grad is not None]
        if not gradients:
            return
        if slot.window.size > 1:
            raise OptimizerError(
                f"the gradients of {slot.label} were computed without learner.backward, and its updates are of "
                f"{slot.window.size} batches, whose gradients are weighed; expected learner.backward(loss) in place of "
                "loss.backward()"
            )
        weight = self._weigh()
        with torch.no_grad():
            for gradient in gradients:
                gradient.mul_(weight)
        slot.window.current = weight
        self._complete_alone(slot)

    def _use(self, slot: WindowSlot) -> None:
        """Step an optimizer with complete gradients, unless they are not finite in fp16."""
        window, step = slot.window, self._learner.step
        if self.scale is None:
            self._step(slot)
        elif window.finite:
            self._step(slot)
            self.scale.stepped(step)
        else:
            self.scale.overflowed(step, slot.label)
            slot.end_gradients()

    def _step(self, slot: WindowSlot) -> None:
        with self._uncast():
            super().update(None if self.block is not None else slot.name)

    def _check_closes(self, slots: Sequence[WindowSlot]) -> None:
        """Raise for a closure where gradients are not those of one call.

        Raises:
            OptimizerError: They are added up over batches, or scaled.
        """
        several = next((slot for slot in slots if slot.window.size > 1), None)
        if several is not None:
            raise OptimizerError(
                f"learner.update(closure=...) was called for {several.label}, whose updates are of "
                f"{several.window.size} batches: a closure computes gradients of one. Expected accumulate=1 for it, "
                f"such as Accelerator(accumulate={{{several.name or 'G'!r}: 1}})"
            )
        if self.scale is not None:
            raise OptimizerError(
                "learner.update(closure=...) was called in fp16, where gradients that are not finite are left out: an "
                "optimizer that computes them itself cannot. Expected Accelerator(precision='bf16')"
            )

    def end_step(self) -> None:
        """Close the windows in the last step of an epoch, where it is known to be that."""
        if self.is_open and self._is_last_step():
            self._close_all()

    def _is_last_step(self) -> bool:
        """Return whether the running step is known to be the last one of its epoch."""
        learner: Any = self._learner
        feed, scope = learner._running.feed, learner.scope
        return feed is not None and feed.is_at_end and scope is not None and learner._running.phase is scope.phase

    def end_epoch(self) -> None:
        """Close the windows that an epoch leaves open, where nobody knew which batch was its last one."""
        for slot in self.slots:
            slot.begin, slot.end = evolve(slot.begin, after_steps=True), evolve(slot.end, after_steps=True)
        was_open, phase = self.is_open, getattr(self._learner.scope, "phase", None)
        try:
            self._close_all()
        except CancelStepException:  # as of a step of one large batch: what it has computed is not used
            for slot in self.slots:
                if slot.window.count:
                    slot.end_gradients()
        else:
            follow = getattr(phase, "_follow_update", None)  # of a phase with a state of its own, such as a queue
            if follow is not None and was_open and not self.is_open:
                follow(self._learner)
        finally:
            for slot in self.slots:
                slot.begin, slot.end = evolve(slot.begin, after_steps=False), evolve(slot.end, after_steps=False)

    def _close_all(self) -> None:
        for slot in self.slots:
            window = slot.window
            waits = slot.first_step is not None or self.averager is not None  # whose batch may be cancelled here alone
            if waits and window.count and window.current is None:
                if not window.complete:  # it is where the update was cancelled in the last step
                    self._complete_alone(slot)
                self._use(slot)

    def scale_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the scale of losses."""
        return {} if self.scale is None else {"scale": self.scale.state()}

    def restore_scale(self, state: dict[str, Any] | None) -> None:
        """Go on from what a checkpoint kept; one of a run in another precision has no scale."""
        if self.scale is not None:
            self.scale.restore(LossScale().state() if state is None else state)

    @property
    def is_open(self) -> bool:
        """Whether batches have been counted whose update is yet to come."""
        return any(slot.window.count for slot in self.slots)

    def has_open(self, name: str | int | None) -> bool:
        """Return whether an optimizer, or any, has counted batches whose update comes after the running step."""
        slots: Sequence[Any] = self.slots if name is None else [self.find(name)]
        return any(slot.window.count for slot in slots) and not self._is_last_step()


def _size(accumulate: int | Mapping[str, int], name: str | None, names: Sequence[str | None]) -> int:
    """Return how many batches an update of an optimizer has.

    Raises:
        OptimizerError: A name is no optimizer's.
    """
    if not isinstance(accumulate, Mapping):
        return accumulate
    known = [str(each) for each in names if each is not None]
    for given in accumulate:
        if given not in known:
            raise OptimizerError(
                f"Accelerator(accumulate={{{given!r}: ...}}) was given; expected names of optimizers, "
                f"{known or 'of which a learner with a single one has none: accumulate=4'}{did_you_mean(given, known)}"
            )
    return accumulate.get(str(name), 1)
