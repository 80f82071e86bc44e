"""Who owns which gradient: backward and update, called by a step or by an update block for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fluxloop.compute.blocks import requires_grad
from fluxloop.compute.finite import Finite
from fluxloop.compute.fused import skipping
from fluxloop.compute.modes import OptimizerMode
from fluxloop.compute.optimizers import (
    Optimizers,
    check_owned,
    no_such_optimizer,
    owned_parameters,
    say_that_a_closure_is_needed,
    separate_options,
)
from fluxloop.compute.reach import loss_error, reached_by, unclear_owner
from fluxloop.compute.saved import save_with_weights
from fluxloop.compute.slots import Slot, set_apart
from fluxloop.errors import LossError, OptimizerError, PhaseError, describe, did_you_mean, warn_user
from fluxloop.events import Event, UpdateBegin, UpdateEnd
from fluxloop.state import Gradients, StepState

if TYPE_CHECKING:
    from fluxloop.compute.blocks import UpdateBlock
    from fluxloop.interfaces import StepLearner

GONE = " (no longer in the model)"
"""Follows the name of a parameter that an optimizer holds and no model has any more."""


class Updates:
    """The optimizers of a learner and the gradients they own.

    Args:
        learner: The learner.
        names: The names of all parameters.
        optimizers: By name; checked to own each trainable parameter once.
    """

    slot_type = Slot
    finite_type = Finite
    """What looks at losses and gradients of the learner's steps."""
    is_windowed = False
    """Whether an update may be of several batches or processes, or of scaled losses."""
    advice = "To use them, call learner.update() before the last epoch ends"
    """Follows the news that gradients are dropped."""

    def __init__(self, learner: StepLearner, names: dict[nn.Parameter, str], optimizers: Optimizers) -> None:
        self._learner = learner
        self.names = names
        self.gradients = Gradients((name, parameter) for parameter, name in self.names.items())
        self.slots: tuple[Slot, ...] = tuple(
            self.slot_type(
                *(name, optimizer, (), (), UpdateBegin(name), UpdateEnd(name)),
                num_groups=0,
                mode=OptimizerMode.of(optimizer),
            )
            for name, optimizer in optimizers.items()
        )
        self.modes = tuple(slot.mode for slot in self.slots if slot.mode is not None)
        """Of optimizers that have ``train()`` and ``eval()``."""
        self.parameters: tuple[nn.Parameter, ...] = ()
        """Those of all optimizers."""
        self._read_parameters()
        self.block: UpdateBlock | None = None
        self._explicit: StepState | None = None
        """The last step in which `backward` was called outside of a block."""
        self.count = 0
        """How many updates have been made."""
        self.told_by_hand: set[str] = set()
        """Names of the phases that a warning has said to step optimizers by hand."""
        self.told_unused: set[str | None] = set()
        """Names of the optimizers whose parameters without gradients have been looked for, and told."""
        self._told_no_gradient = False
        self.findings: list[str] | None = None
        """Where `check` collects what it finds while it runs a step."""

    def rest(self) -> None:
        """Put optimizers with modes into eval mode, as they are while nothing is trained."""
        for mode in self.modes:
            if mode.is_train:
                mode.set(False)

    def find(self, name: str | int | None) -> Slot:
        """Find the optimizer of a name; None stands for the only one.

        Raises:
            OptimizerError: There is no such optimizer, or no name was given and there are several.
        """
        if name is None and len(self.slots) == 1:
            return self.slots[0]
        for slot in self.slots:
            if name is not None and slot.name == str(name):
                return slot
        names = [str(slot.name) for slot in self.slots if slot.name is not None]
        if name is None:
            raise OptimizerError(f"which of the optimizers {names}? Give its name: learner.optimizing({names[0]!r})")
        raise no_such_optimizer(name, names)

    def _read_parameters(self) -> None:
        """Read which parameters the optimizers own; a group may be added while training."""
        if any(slot.num_groups not in (0, len(slot.optimizer.param_groups)) for slot in self.slots):
            separate_options(slot.optimizer for slot in self.slots)  # a new group takes its options from the defaults
        for slot in self.slots:
            slot.parameters = tuple(owned_parameters(slot.optimizer))
            slot.num_groups = len(slot.optimizer.param_groups)
        self.parameters = tuple(parameter for slot in self.slots for parameter in slot.parameters)
        for slot in self.slots:
            slot.others = tuple(p for other in self.slots if other is not slot for p in other.parameters)

    def rename(self, names: dict[nn.Parameter, str]) -> bool:
        """Use new names of all parameters, as some may have joined; return whether any has changed.

        Raises:
            OptimizerError: A trainable one is in no optimizer; nothing is changed.
        """
        self._read_parameters()
        owned = set(self.parameters)
        check_owned(names, owned, str(self.slots[0].name) if len(self.slots) > 1 else None)
        # Parameters that an optimizer still holds stay named, so that messages and `step.grads` can tell of them.
        gone = {p: name for p, name in self.names.items() if p in owned and p not in names}
        if self.names == {**names, **gone}:
            return False
        self.names = {**names, **{p: f"{name.removesuffix(GONE)}{GONE}" for p, name in gone.items()}}
        self.gradients = Gradients((name, parameter) for parameter, name in self.names.items())
        return True

    def begin_step(self, state: StepState) -> None:
        """Release what the last update consumed."""
        for slot in self.slots:
            if slot.num_groups != len(slot.optimizer.param_groups):  # cheaper than to read the parameters in each step
                self._read_parameters()
            if slot.consumed:  # what `slot.release()` does, without a call in each step
                for parameter in slot.parameters:
                    parameter.grad = None
                slot.consumed = False
            slot.before = None

    def abandon_step(self, state: StepState) -> None:
        """Undo what a step that ended early has done to gradients; those of earlier steps wait as they did."""
        for slot in self.slots:
            slot.abandon(state)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Compute the gradients of a scalar loss.

        Inside an update block they are those of the block's optimizer alone; outside of one, of
        every parameter that the loss reaches.

        Raises:
            LossError: Not a scalar tensor, or no gradient can be computed from it, or it reaches
                none of the parameters, or (outside a block, with several optimizers) gradients of
                another loss wait, so that nobody knows whose it is.
        """
        # Each step comes through here and through `update`. What is rare is a method of its own, called where a cheap
        # test says so; what is common calls no function of Python that it can do without (0.1 µs and more for each).
        learner, block, scope = self._learner, self.block, self._learner.scope
        if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1 and not loss.is_complex()):
            raise loss_error(loss, "" if block is None or block.slot.name is None else f" of {block.slot.label}")
        own: Sequence[nn.Parameter]
        if block is None:
            slots, own = self.slots, self.parameters
            if len(slots) > 1:
                self._check_whose()
        else:
            slots, own = (block.slot,), [*filter(requires_grad, block.slot.parameters)]
            if not own:
                raise LossError(f"{block.slot.label} has nothing to train: all of its parameters are frozen")
        fresh, adds, phase = True, False, "" if scope is None else scope.phase.name
        for slot in slots:
            if slot.first_step is not None:
                self._meet_waiting(slot, phase)
            if slot.consumed or (block is not None and slot.first_step is None):
                slot.release()  # a block starts from no gradient, whoever left one there
            fresh = fresh and slot.first_step is None
            adds = slot.begin_gradients(learner.step, block is not None, phase) or adds
        alone = block is None or len(self.slots) == 1  # nobody else's to leave out
        if adds:
            with set_apart(slots):
                learner.accelerator.backward(loss, own, alone=alone, retain_graph=retain_graph)
        else:
            learner.accelerator.backward(loss, own, alone=alone, retain_graph=retain_graph)
        if fresh and (not own or own[0].grad is None):
            self._check_reached(loss, slots)
        learner.step.grads = self.gradients

    def _check_whose(self) -> None:
        """Raise for a loss that nobody knows the owner of: there are several optimizers, and another loss before it.

        Raises:
            LossError: The gradients of two losses would reach the same optimizers.
        """
        pending = [slot.first_step is not None for slot in self.slots]
        second = self._explicit is self._learner.step and any(pending)
        self._explicit = self._learner.step
        if second or any(pending) != all(pending):
            raise unclear_owner([slot.name for slot in self.slots], second)

    def _meet_waiting(self, slot: Slot, phase: str) -> None:
        """Drop gradients that wait where another phase computed them, before new ones are added to them.

        Raises:
            LossError: They were computed outside of a block, and new ones are about to be in one.
        """
        if slot.phase not in (None, phase):  # None: an older checkpoint does not say
            self._drop(slot, f"{phase or 'a loop of your own'} computes its own")
        elif self.block is not None and not slot.in_block:
            raise LossError(
                f"the block of {slot.label} would add to gradients that learner.backward computed outside of a "
                "block, and those may be of another loss; give each loss a block of its own"
            )

    def _check_reached(self, loss: Tensor, slots: tuple[Slot, ...]) -> None:
        """Raise for a loss that gave no gradient, unless a hook has taken them away.

        Raises:
            LossError: It reaches none of the parameters.
        """
        parameters = [parameter for slot in slots for parameter in slot.parameters]
        if any(parameter.grad is not None for parameter in parameters) or not reached_by(loss).isdisjoint(parameters):
            return
        whose = f"of {slots[0].label} " if len(slots) == 1 else ""
        raise LossError(
            f"the loss {whose}reaches none of its own parameters ({self.names.get(slots[0].parameters[0])}, …); "
            "was their output detached, computed by another model, or by a checkpoint with use_reentrant=True?"
        )

    def _drop(self, slot: Slot, why: str) -> None:
        """Drop gradients that wait for an update which will not come, and say so."""
        batches = f"{slot.num_batches or 'some'} batch{'' if slot.num_batches == 1 else 'es'}"
        warn_user(
            f"gradients of {batches} of {slot.phase or 'a loop of your own'} still wait for an update of {slot.label}, "
            f"and {why}: they are dropped. {self.advice}"
        )
        slot.end_gradients()
        slot.release()

    def drop_waiting(self, why: str, phase: str | None = None) -> None:
        """Drop gradients that wait for an update, and say so.

        Args:
            why: What begins.
            phase: Name of the phase whose gradients go on waiting.
        """
        for slot in self.slots:
            known = slot.phase not in (None, phase)  # None: an older checkpoint does not say
            if slot.first_step is not None and known:
                self._drop(slot, why)

    def update(self, name: str | int | None = None, closure: Callable[[], Any] | None = None) -> None:
        """Step one optimizer, the block's, or all of them in order, between its events; see `Learner.update`.

        Raises:
            OptimizerError: There is no optimizer of that name, or it is not the block's; or there are several to
                step with one closure.
            PhaseError: The running phase has no gradients, or nothing is running and there are none.
            LossError: ``step.grads`` was replaced by something that does not say each gradient.
        """
        learner, scope = self._learner, self._learner.scope
        phase = None if scope is None else scope.phase
        if phase is not None and phase.data_key and not phase.gradients:
            raise PhaseError(f"learner.update was called in {phase!r}; a validation phase changes no weights")
        if name is not None:
            slots: tuple[Slot, ...] = (self._find_to_step(name),)
        else:
            slots = self.slots if self.block is None else (self.block.slot,)
        if phase is None and closure is None:
            self._check_computed(slots)
        if closure is not None:
            self._check_closure(closure)
        found, phase_name = False, "" if phase is None else phase.name
        handle = _ignore if scope is None else scope.handle
        entries = vars(learner.step)
        for slot in slots:
            if slot.first_step is not None and slot.phase != phase_name:
                self._drop(slot, f"{phase_name or 'a loop of your own'} updates it")
            if closure is not None:
                self._step_with(slot, closure)
            else:
                if entries.get("grads") is not self.gradients:  # as in `_announce`, without a call in each step
                    self.take_given(slot)
                handle(slot.begin)
                if entries.get("grads") is not self.gradients:
                    self.take_given(slot)
                found = found or slot.first_step is not None or slot.has_gradients
                try:
                    if learner.finite.bad is None:
                        learner.accelerator.update(slot.optimizer)
                    else:
                        with skipping(slot.optimizer, learner.finite.bad):
                            learner.accelerator.update(slot.optimizer)
                except TypeError as error:
                    say_that_a_closure_is_needed(slot.optimizer, error)
                    raise
            slot.end_gradients()
            self.count += 1
            handle(slot.end)
        if closure is None and not found:
            self._tell_no_gradient(
                f"learner.update was called, and no parameter of {', '.join(slot.label for slot in slots)} has a "
                "gradient, so nothing changes; call learner.backward(loss) first"
            )

    def _find_to_step(self, name: str | int) -> Slot:
        """Find the optimizer of a name that an update is to step.

        Raises:
            OptimizerError: There is no optimizer of that name, or it is not the block's.
        """
        block = self.block
        if block is None:
            return self.find(name)
        if block.slot.name != str(name):
            raise OptimizerError(
                f"learner.update({name!r}) was called inside the block of {block.slot.label}; "
                f"open a block of its own: learner.optimizing({name!r})"
            )
        return block.slot

    def _check_computed(self, slots: tuple[Slot, ...]) -> None:
        """Raise for an update outside of a step, to which no gradient belongs.

        Raises:
            PhaseError: None has been computed since the last update.
        """
        if all(slot.consumed for slot in slots):
            raise PhaseError(
                "learner.update was called outside of a step, and no gradient has been computed since the last update; "
                "expected it in a step, after learner.backward(loss):\n"
                "    with runstep(learner, phase, xs=xs, ys=ys) as (handle, state):\n"
                "        ...\n"
                "        learner.backward(loss)\n"
                "        learner.update()"
            )

    def _tell_no_gradient(self, message: str) -> None:
        """Warn of an update that changes nothing, once."""
        if not self._told_no_gradient:
            self._told_no_gradient = True
            warn_user(message)

    def _announce(self, slot: Slot) -> None:
        """Fire `UpdateBegin` for gradients that are complete, and use those that somebody has put in their place."""
        self.take_given(slot)
        self._learner.fire(slot.begin)
        self.take_given(slot)

    def _check_closure(self, closure: object) -> None:
        if not callable(closure):
            raise OptimizerError(
                f"learner.update(closure={describe(closure)}) was given; expected a function that computes the loss, "
                "calls learner.backward(loss), and returns it"
            )
        if self.block is None and len(self.slots) > 1:
            raise OptimizerError(
                "learner.update(closure=...) was called outside of a block, and the learner has several optimizers, "
                "whose gradients the closure would compute as well. Open the block of the one that steps:\n"
                f"    with learner.optimizing({str(self.slots[0].name)!r}):\n"
                "        learner.update(closure=closure)"
            )

    def _step_with(self, slot: Slot, closure: Callable[[], Any]) -> None:
        """Step an optimizer that computes gradients itself; where that fails or is cancelled, nothing has changed."""
        if slot.first_step is not None:  # computed before, as those of sharpness-aware minimization are
            self._announce(slot)

        def evaluate() -> Any:
            slot.release()
            slot.first_step = None
            with torch.enable_grad():
                loss = closure()
            if loss is None:
                raise LossError(
                    "the closure given to learner.update returned None; expected the loss: end it with 'return loss'"
                )
            if not slot.has_gradients:
                self._tell_no_gradient(
                    "learner.update was given a closure that computed no gradient, so nothing changes: call "
                    "learner.backward(loss) in it"
                )
            self._announce(slot)
            return loss

        put_back = save_with_weights(slot.optimizer)
        try:
            self._learner.accelerator.update(slot.optimizer, evaluate)
        except BaseException:
            put_back()
            raise

    def end_step(self) -> None:
        """Make the updates that the end of an epoch's last step brings: none, where an update is of one batch."""

    def end_epoch(self) -> None:
        """Make the updates that the end of an epoch brings: none, where an update is of one batch."""

    @property
    def is_open(self) -> bool:
        """Whether batches have been counted whose update is yet to come: never, where an update is of one batch."""
        return False

    def has_open(self, name: str | int | None) -> bool:
        """Return the same of one optimizer, or of any, once the running step has ended."""
        return False

    def scale_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the scale of losses: nothing, where there is none."""
        return {}

    def restore_scale(self, state: dict[str, Any] | None) -> None:
        """Go on from what a checkpoint kept."""

    def standing(self) -> tuple[int, int]:
        """Return how many updates were made, and a number that rises with each step of an optimizer, by hand too."""
        states = [
            value for slot in self.slots for entries in slot.optimizer.state.values() for value in entries.values()
        ]
        tensors = [tensor for tensor in (*self.parameters, *states) if isinstance(tensor, Tensor)]
        return self.count, sum(tensor._version for tensor in tensors)

    def rests(self, slot: Slot) -> bool:
        """Return whether an optimizer has nothing to train while another has, as one of a frozen network; warn once.

        Its block makes no update then, so that one network can be trained alone first.
        """
        if any(parameter.requires_grad for parameter in slot.parameters):
            return False
        if not any(parameter.requires_grad for parameter in slot.others):
            return False
        if not slot.told_resting:
            slot.told_resting = True
            warn_user(
                f"all parameters of {slot.label} are frozen: its update blocks compute their loss and change nothing, "
                "until some are unfrozen"
            )
        return True

    def take_given(self, slot: Slot) -> None:
        """Use the gradients of a mapping that somebody has put in the place of ``step.grads``.

        Raises:
            LossError: It does not say each gradient of the optimizer; nothing is changed.
        """
        step = self._learner.step
        given = vars(step).get("grads", self.gradients)
        if given is self.gradients or slot.first_step is None:
            return
        if not isinstance(given, Mapping):
            raise LossError(
                f"step.grads was replaced by {describe(given)}; expected gradients by name, {{'0.weight': tensor, ...}}"
                ", or another name for an entry of your own"
            )
        parameters = {name: parameter for parameter, name in self.names.items()}
        missing = [self.names[p] for p in slot.waiting if self.names[p] not in given]
        unknown = [str(name) for name in given if name not in parameters]
        if missing or unknown:
            hint = "" if missing else did_you_mean(unknown[0], parameters)
            what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which is no parameter{hint}"
            raise LossError(
                f"step.grads was replaced by a mapping that {what}\n"
                "  expected the gradient of each parameter, None for none; to replace one of them:\n"
                f"    learner.step.grads[{next(iter(parameters))!r}] = tensor"
            )
        for name, gradient in given.items():
            shape = parameters[name].shape
            if gradient is not None and (not isinstance(gradient, Tensor) or gradient.shape != shape):
                raise LossError(
                    f"step.grads[{name!r}] is {describe(gradient)}; expected a tensor of shape {tuple(shape)}"
                )
        for name, gradient in given.items():
            parameter = parameters[name]
            parameter.grad = None if gradient is None else gradient.detach().to(parameter)
        step.grads = self.gradients

    def explain(self, path: tuple[str, ...]) -> Iterator[str]:
        """Say which optimizers write a path below ``model``, ``params`` or ``optimizer``."""
        for slot in self.slots:
            name = slot.name or ""
            below = ".".join(path[1:])
            inside = any(not below or f"{self.names[p]}.".startswith(f"{below}.") for p in slot.parameters)
            if path[:1] == ("optimizer",) and path[1:] in ((), (name,)):
                yield f"{slot.label} writes its own state between UpdateBegin and UpdateEnd"
            if path[:1] in (("model",), ("params",)) and inside:
                yield f"{slot.label} writes its parameters between UpdateBegin and UpdateEnd"


def _ignore(event: Event) -> None:
    """Stand for the handlers of an event outside of a scope, where nobody hears it."""
