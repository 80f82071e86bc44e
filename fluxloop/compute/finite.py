"""A step whose loss, or whose gradients, are not finite makes no update, and the fit stops.

`StopOnNaNLoss` asks for it, at the events of a step. Where it does not, nothing here costs anything.
"""

from __future__ import annotations

import copy
from cmath import isfinite
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fluxloop.compute.fused import can_skip
from fluxloop.compute.gradients import elements
from fluxloop.errors import CancelFittingException, sentence, warn_user

if TYPE_CHECKING:
    from fluxloop.compute.slots import Slot
    from fluxloop.interfaces import RunLearner
    from fluxloop.state import StepState

HOW_TO = (
    "The weights stay as they were before this update. To have it be an error: warnings.filterwarnings('error', "
    "message='the fit stops')"
)
BEYOND = "The device had gone on by then: StopOnNaNLoss(wait=True) stops in the step itself, and waits for the device"


class Finite:
    """Look at losses and gradients of a learner's steps, and stop the fit at one that is not finite.

    On the CPU a number is looked at at once. On a device it is looked at when it has come to the
    host, a step or two later; from the bad step on, optimizers that can leave an update out on the
    device (fused ones) do so, and the models' buffers are saved as they were before it.

    Args:
        learner: Whose steps they are.
    """

    def __init__(self, learner: RunLearner) -> None:
        self._learner = learner
        self._buffers: list[SavedBuffers] = []
        self._epoch: object = None
        self._step: StepState | None = None
        self.looked = False
        """Whether the losses of the running step were looked at before their gradients were computed."""
        self.bad: Tensor | None = None
        """Of a device: 1 once a gradient was not finite, else 0; None where everything was looked at at once."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Finite:
        """Return a new one for a copied learner: the saved buffers are those of the original."""
        return type(self)(copy.deepcopy(self._learner, memo))

    def begin_step(self, wait: bool = False) -> None:
        """Save the buffers of the models, so that a step that is not finite leaves them as they were.

        Args:
            wait: Whether to wait for the device where gradients are looked at before `require_gradients` is called.
        """
        self.looked = False
        scope = self._learner.scope
        if scope is None or scope.parent is not self._epoch:
            self._begin_epoch(scope)
        if self._buffers:
            self._step = self._learner.step
            save(self._buffers, self.bad)

    def _begin_epoch(self, scope: Any) -> None:
        self._epoch = None if scope is None else scope.parent
        modules = list(self._learner.modules())
        if scope is not None:  # a teacher, or a head, of the phase's own
            modules += [value for value in vars(scope.phase).values() if isinstance(value, nn.Module)]
        before = {id(saved.place): saved for saved in self._buffers}
        every = (part for module in modules for part in module.modules())
        held = (part for part in every if any(tensor is not None for tensor in part._buffers.values()))
        parts = {id(part._buffers): part for part in held}  # many losses have a weight that is None
        self._buffers = [before.get(key) or SavedBuffers(part._buffers) for key, part in parts.items()]

    def require_losses(self, wait: bool) -> None:
        """Stop the fit unless the losses that the running step has stored are finite.

        Args:
            wait: Whether to wait for the device.

        Raises:
            CancelFittingException: One is NaN or infinite.
        """
        self.looked = True
        step = self._learner.step
        entries = vars(step)
        loss = entries.get("loss")
        if type(loss) is Tensor and loss.is_cpu and "losses" not in entries and loss.numel() == 1:  # as nearly always
            number = loss.item()
            if not isfinite(number):
                self._look("the loss", number)
            return
        each = entries.get("losses")
        if type(each) is dict and "loss" not in entries:  # as nearly always where there are several
            numbers = [loss.item() for loss in each.values() if type(loss) is Tensor and loss.is_cpu and not loss.ndim]
            if len(numbers) == len(each) and all(map(isfinite, numbers)):
                return
        for what, loss in stored_losses(step):
            if not isinstance(loss, Tensor):
                self._look(what, float(loss))
            elif loss.numel() == 1:  # a tensor with more elements is no loss: nothing is known of it
                if loss.is_cpu or wait:
                    self._look(what, loss.item())
                else:
                    self._learner.host(loss, partial(self._look_later, what, self._learner.where()))

    def _look(self, what: str, number: float) -> None:
        if not isfinite(number):
            self.stop(f"{what} became {number}")

    def _look_later(self, what: str, place: str, number: float) -> None:
        if not isfinite(number):
            self.stop(f"{what} became {number}", place, BEYOND)

    def require_gradients(self, name: str | None, wait: bool) -> None:
        """Stop the fit unless the gradients that an optimizer is about to use are finite.

        Their norm before they were clipped is looked at too, where somebody has computed it.

        Args:
            name: Of the optimizer.
            wait: Whether to wait for the device.

        Raises:
            CancelFittingException: One is NaN or infinite; names the first parameters.
        """
        updates, step = self._learner.updates, self._learner.step
        slot = updates.find(name)
        if vars(step).get("grads") is not updates.gradients:
            updates.take_given(slot)
        self._look_at_each(slot, slot.parameters, norm_before_clipping(step, name), wait)

    def require_clipped(self, name: str | None, wait: bool) -> None:
        """Do the same right after the gradients were clipped: where their norm was finite, all of them are.

        Args:
            name: Of the optimizer.
            wait: Whether to wait for the device.

        Raises:
            CancelFittingException: One is NaN or infinite; names the first parameters.
        """
        learner = self._learner
        norm = norm_before_clipping(learner.step, name)
        given = vars(learner.step).get("grads") is not learner.updates.gradients  # somebody's, which are not in use yet
        if given or norm is None or not norm.is_cpu or not isfinite(norm.item()):
            self.require_gradients(name, wait)

    def _look_at_each(self, slot: Slot, parameters: Sequence[nn.Parameter], norm: Tensor | None, wait: bool) -> None:
        """Stop the fit unless the gradients of some parameters are finite, and their norm, where there is one."""
        later: list[nn.Parameter] = []
        total: complex = 0.0
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_cpu or wait:
                if gradient.layout is not torch.strided:
                    gradient = elements(gradient)
                total += gradient.sum().item()
            else:
                later.append(parameter)
        norm_later: list[Tensor] = []
        if norm is not None:
            if norm.is_cpu or wait:
                total += norm.item()
            else:
                norm_later.append(norm)
        # One sum for all costs one pass and one number for each gradient; it is not finite if any of them is not. Only
        # then, as finite numbers may have an infinite sum, is each of them looked at.
        if not isfinite(total):
            reason = self._describe(slot, norm)
            if reason:
                self.stop(reason, advice=self._advice())
        if later or norm_later:
            self._require_later(slot, later, norm_later)

    def _advice(self) -> str:
        """Say what became of the weights, and what can be done, where a gradient was looked at before it was used."""
        return HOW_TO

    def _describe(self, slot: Slot, norm: Tensor | None) -> str:
        """Say which gradients are not finite; nothing where all are."""
        names = self._learner.updates.names
        bad = [
            names[parameter]
            for parameter in slot.parameters
            if parameter.grad is not None and not elements(parameter.grad).isfinite().all()
        ]
        of_norm = norm is not None and not isfinite(norm.item())
        return bad_gradients(slot, bad) if bad or of_norm else ""

    def _require_later(self, slot: Slot, parameters: list[nn.Parameter], norm: list[Tensor]) -> None:
        """Note on the device whether gradients are finite, and look at that when it has come to the host."""
        device = self._learner.accelerator.device
        gradients = [elements(parameter.grad) for parameter in parameters if parameter.grad is not None]
        largest = [*torch._foreach_norm(gradients, float("inf")), *norm]
        each = torch.stack([norm.to(device) for norm in largest]).isfinite()
        found = (~each.all()).float()
        self.bad = found if self.bad is None else torch.maximum(self.bad, found)
        self._learner.host(found, partial(self._look_at_gradients, slot, parameters, each, self._learner.where()))

    def _look_at_gradients(
        self, slot: Slot, parameters: list[nn.Parameter], each: Tensor, place: str, found: float
    ) -> None:
        if found:
            self.stop(self._bad_of(slot, parameters, each), place, HOW_TO if can_skip(slot.optimizer) else BEYOND)

    def _bad_of(self, slot: Slot, parameters: list[nn.Parameter], each: Tensor) -> str:
        """Say which gradients are not finite, once what was noted of each has come to the host."""
        names = self._learner.updates.names
        bad = [names[parameter] for parameter, fine in zip(parameters, each.tolist(), strict=False) if not fine]
        return bad_gradients(slot, bad)

    def stop(self, what: str, place: str = "", advice: str = HOW_TO) -> NoReturn:
        """Set the models' buffers again, warn, and end the fit.

        Raises:
            CancelFittingException: Says what became what, and where.
        """
        self.put_back_buffers()
        reason = f"{what} in {place or self._learner.where()}"
        warn_user(f"the fit stops: {sentence(reason)} {advice}")
        raise NotFinite(reason)

    def put_back_buffers(self) -> None:
        """Set the models' buffers to what they were before a step that was not finite."""
        if self.bad is not None or self._step is self._learner.step:  # not saved in an earlier step alone
            set_again(self._buffers)
        self.bad = None


class NotFinite(CancelFittingException):
    """Ends a fit whose numbers are not finite."""

    is_not_finite = True


def stored_losses(step: StepState) -> Iterable[tuple[str, Any]]:
    """Return the losses that a step has stored, each with what messages call it."""
    entries = vars(step)
    each = entries.get("losses")
    losses = [("the loss", entries["loss"])] if "loss" in entries else []
    if isinstance(each, Mapping):
        losses[:0] = [(f"the loss of {name!r}", loss) for name, loss in each.items()]
    return losses


def norm_before_clipping(step: StepState, name: str | None) -> Tensor | None:
    """Return the norm of an optimizer's gradients, where `GradientClip` has stored it in the step."""
    entries = vars(step)
    if name is None:
        norm = entries.get("grad_norm")
    else:
        norms = entries.get("grad_norms")
        norm = None if norms is None or not isinstance(norms, Mapping) else norms.get(name)
    return norm if isinstance(norm, Tensor) and norm.numel() == 1 else None


def bad_gradients(slot: Slot, names: Sequence[str]) -> str:
    """Say of which parameters of an optimizer the gradients are not finite; of none, their norm alone is not."""
    if not names:
        return f"the norm of the gradients of {slot.label}, before they were clipped, became nan or infinite"
    return f"gradients of {slot.label} became nan or infinite ({first_names(names)})"


def first_names(names: Sequence[str]) -> str:
    """List the first three names, and say how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@define(eq=False)
class SavedBuffers:
    """A module's buffers as they were when a step began.

    Args:
        place: Where the module holds them.
        tensors: Those that were there, by name.
        versions: How often each had been changed.
        copies: Their numbers.
    """

    place: dict[str, Tensor | None]
    tensors: dict[str, Tensor] = field(factory=dict)
    versions: list[int] = field(factory=list)
    copies: list[Tensor] = field(factory=list)

    def has_changed(self) -> bool:
        """Return whether they may differ from what was saved; torch does not count changes of running statistics."""
        now = {name: tensor for name, tensor in self.place.items() if tensor is not None and not is_lazy(tensor)}
        if now.keys() != self.tensors.keys() or any(now[name] is not old for name, old in self.tensors.items()):
            self.tensors, self.copies = now, [tensor.detach().clone() for tensor in now.values()]
            self.versions = [*map(version, now.values())]
            return False
        versions = [*map(version, now.values())]
        changed = versions != self.versions or "running_mean" in now
        self.versions = versions
        return changed


def version(tensor: Tensor) -> int:
    """Return how often a tensor has been changed in place; torch does not count that for one of inference mode."""
    return -1 if tensor.is_inference() else tensor._version


def save(buffers: Iterable[SavedBuffers], bad: Tensor | None) -> None:
    """Save the buffers that have changed, unless `bad`, on a device, says that a step was not finite."""
    tensors: list[Tensor] = []
    copies: list[Tensor] = []
    for saved in buffers:
        if saved.has_changed():
            tensors += saved.tensors.values()
            copies += saved.copies
    with torch.no_grad():
        if tensors and bad is None:
            torch._foreach_copy_(copies, tensors)
        elif tensors and bad is not None:
            for copied, tensor in zip(copies, tensors, strict=True):
                torch.where(bad.bool(), copied, tensor, out=copied)


def set_again(buffers: Iterable[SavedBuffers]) -> None:
    """Set buffers to what was saved."""
    with torch.no_grad():
        for saved in buffers:
            for (name, tensor), copied in zip(saved.tensors.items(), saved.copies, strict=True):
                tensor.copy_(copied)
                saved.place[name] = tensor


def not_finite(tensors: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Yield the names of the tensors in which a number is NaN or infinite."""
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor) or is_lazy(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        held = elements(tensor) if tensor.element_size() > 1 else tensor.float()  # torch adds up no numbers of 8 bits
        if not isfinite(held.sum().item()) and not held.isfinite().all():
            yield name


def state_tensors(learner: RunLearner) -> Iterator[tuple[str, Any]]:
    """Yield weights, buffers, the optimizers' states, and gradients that wait for an update, each with a name."""
    for name, model in [*learner.models.items(), ("loss_fn", learner.loss_fn)]:
        if isinstance(model, nn.Module):
            prefix = "" if name is None else f"{name}."
            yield from ((f"{prefix}{n}", tensor) for n, tensor in (*model.named_parameters(), *model.named_buffers()))
    names: dict[Any, str] = dict(learner.updates.names)
    for slot in learner.updates.slots:
        yield from ((f"the gradient of {names.get(p)}", p.grad) for p in slot.waiting)
        for parameter, entries in slot.optimizer.state.items():  # by parameter, or by a name of the optimizer's own
            if isinstance(entries, dict):
                name = names.get(parameter, "itself")
                yield from ((f"{slot.label}: {key} of {name}", value) for key, value in entries.items())
