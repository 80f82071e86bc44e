"""Who owns which gradient: the update block, and the explicit backward and update under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from attrs import define
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compute.modes import OptimizerMode
from fluxloop.compute.optimizers import (
    Optimizers,
    check_owned,
    keep_state,
    owned_parameters,
    separate_options,
    skipping,
)
from fluxloop.errors import LossError, OptimizerError, PhaseError, describe, did_you_mean, warn_user
from fluxloop.events import BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd
from fluxloop.state import Gradients, LossName, StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

GONE = " (no longer in the model)"
"""Follows the name of a parameter that an optimizer holds and no model has any more."""

BACKWARD_BEGIN, BACKWARD_END = BackwardBegin(), BackwardEnd()


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
        window: The step in which the first gradient since the last update was computed.
        in_block: Whether that was in the optimizer's own block.
        told_resting: Whether it was said that all of its parameters are frozen.
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
    window: StepState | None = None
    in_block: bool = False
    told_resting: bool = False
    mode: OptimizerMode | None = None
    phase: str | None = ""
    num_batches: int = 0
    step: StepState | None = None
    before: list[Tensor | None] | None = None

    def release(self) -> None:
        """Drop the gradients; memory is freed rather than set to zero."""
        for parameter in self.parameters:
            parameter.grad = None
        self.consumed = False

    def begin_gradients(self, state: StepState, in_block: bool, phase: str) -> bool:
        """Note that a step computes gradients, and keep those that wait for the case that it is cancelled.

        Returns:
            Whether some wait that it adds to for the first time.
        """
        if self.window is None:
            self.window, self.in_block, self.num_batches, self.before = state, in_block, 1, None
        elif self.step is not state and self.window is not state:
            self.num_batches += 1
            self.before = [parameter.grad for parameter in self.parameters]
            self.step = state
            return True
        self.step, self.phase = state, phase
        return False

    def end_gradients(self) -> None:
        """Note that an update has used the gradients, or that they are not to be used."""
        self.window, self.consumed, self.num_batches, self.before = None, True, 0, None

    def put_back(self, state: StepState) -> None:
        """Have a step that was cancelled have computed no gradient."""
        if self.window is state:
            self.end_gradients()
        elif self.before is not None and self.step is state:
            for parameter, gradient in zip(self.parameters, self.before, strict=True):
                parameter.grad = gradient
            self.before = None
            self.num_batches -= 1

    @property
    def waiting(self) -> list[nn.Parameter]:
        """Its parameters whose gradients wait for an update."""
        return [] if self.window is None else [parameter for parameter in self.parameters if parameter.grad is not None]

    @property
    def has_gradients(self) -> bool:
        """Whether an update has gradients to use; where all parameters are frozen, none are missed."""
        return (
            self.window is not None
            or any(parameter.grad is not None for parameter in self.parameters)
            or not any(parameter.requires_grad for parameter in self.parameters)
        )

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return "the optimizer" if self.name is None else f"optimizer {self.name!r}"


class Updates:
    """The optimizers of a learner and the gradients they own.

    Args:
        learner: The learner.
        names: The names of all parameters.
        optimizers: By name; checked to own each trainable parameter once.
    """

    def __init__(self, learner: RunLearner, names: dict[nn.Parameter, str], optimizers: Optimizers) -> None:
        self._learner = learner
        self.names = names
        self.gradients = Gradients((name, parameter) for parameter, name in self.names.items())
        self.slots = tuple(
            Slot(
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
        """Names of the phases of which it was said that they step optimizers by hand."""
        self._told_no_gradient = False
        self.findings: list[str] | None = None
        """Where `check` collects what it finds while it runs a step."""

    def rest(self) -> None:
        """Put optimizers with modes into eval mode, as they are while nothing is trained."""
        for mode in self.modes:
            if mode.is_train:
                mode.set(False)

    def find(self, name: str | int | None) -> Slot:
        """Give the optimizer of a name; None stands for the only one.

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
        raise OptimizerError(
            f"there is no optimizer {name!r}; the learner has "
            f"{names or 'a single one without a name: learner.optimizing()'}{did_you_mean(str(name), names)}"
        )

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
        """Take the names of all parameters anew, as some may have joined; tell whether any has changed.

        Raises:
            OptimizerError: A trainable one is in no optimizer; nothing is changed.
        """
        self._read_parameters()
        owned = set(self.parameters)
        check_owned(names, owned)
        gone = {p: name for p, name in self.names.items() if p in owned and p not in names}
        if self.names == {**names, **gone}:
            return False
        self.names = {**names, **{p: f"{name.removesuffix(GONE)}{GONE}" for p, name in gone.items()}}
        self.gradients = Gradients((name, parameter) for parameter, name in self.names.items())
        return True

    def begin_step(self, state: StepState) -> None:
        """Release what the last update consumed."""
        for slot in self.slots:
            if slot.num_groups != len(slot.optimizer.param_groups):
                self._read_parameters()
            if slot.consumed:
                slot.release()
            slot.before = None

    def abandon_step(self, state: StepState) -> None:
        """Have a step that ended early have computed no gradients; those of earlier steps wait as they did."""
        for slot in self.slots:
            slot.put_back(state)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Compute the gradients of a scalar loss.

        Inside an update block they are those of the block's optimizer alone; outside of one, of
        every parameter that the loss reaches.

        Raises:
            LossError: Not a scalar tensor, or no gradient can be computed from it, or it reaches
                none of the parameters, or (outside a block, with several optimizers) gradients of
                another loss wait, so that nobody knows whose it is.
        """
        learner, block = self._learner, self.block
        _check_loss(loss, "" if block is None or block.slot.name is None else f" of {block.slot.label}")
        if block is None:
            slots = self.slots
            self._check_owner()
        else:
            slots = (block.slot,)
        own: Sequence[nn.Parameter] = self.parameters
        if block is not None:
            own = [parameter for parameter in block.slot.parameters if parameter.requires_grad]
            if not own:
                raise LossError(f"{slots[0].label} has nothing to train: all of its parameters are frozen")
        fresh, adds, phase = True, False, self._phase_name()
        for slot in slots:
            if slot.window is not None and slot.phase not in (None, phase):  # None: an older checkpoint does not say
                self._drop(slot, f"{phase or 'a loop of your own'} computes its own")
            if block is not None and slot.window is not None and not slot.in_block:
                raise LossError(
                    f"the block of {slot.label} would add to gradients that learner.backward computed outside of a "
                    "block, and those may be of another loss; give each loss a block of its own"
                )
            if slot.consumed or (block is not None and slot.window is None):
                slot.release()  # a block starts from no gradient, whoever left one there
            fresh = fresh and slot.window is None
            adds = slot.begin_gradients(learner.step, block is not None, phase) or adds
        alone = block is None or len(self.slots) == 1  # nobody else's to leave out
        if adds:
            with apart(slots):
                learner.accelerator.backward(loss, own, alone=alone, retain_graph=retain_graph)
        else:
            learner.accelerator.backward(loss, own, alone=alone, retain_graph=retain_graph)
        if fresh and all(p.grad is None for slot in slots for p in slot.parameters) and not self._reach(loss, slots):
            whose = f"of {slots[0].label} " if len(slots) == 1 else ""
            raise LossError(
                f"the loss {whose}reaches none of its own parameters ({self.names.get(slots[0].parameters[0])}, …); "
                "was their output detached, computed by another model, or by a checkpoint with use_reentrant=True?"
            )
        learner.step.grads = self.gradients

    def _phase_name(self) -> str:
        scope = self._learner.scope
        return "" if scope is None else scope.phase.name

    def _drop(self, slot: Slot, why: str) -> None:
        """Drop gradients that wait for an update which will not come, and say so."""
        batches = f"{slot.num_batches or 'some'} batch{'' if slot.num_batches == 1 else 'es'}"
        warn_user(
            f"gradients of {batches} of {slot.phase or 'a loop of your own'} still wait for an update of {slot.label}, "
            f"and {why}: they are dropped. To use them, call learner.update() before the last epoch ends"
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
            if slot.window is not None and slot.phase not in (None, phase):  # None: an older checkpoint does not say
                self._drop(slot, why)

    def _reach(self, loss: Tensor, slots: tuple[Slot, ...]) -> bool:
        """Tell whether a loss reaches parameters whose gradients a hook has taken away."""
        return not _reached(loss).isdisjoint(p for slot in slots for p in slot.parameters)

    def _check_owner(self) -> None:
        """Raise for a loss that nobody knows the owner of: several optimizers, and another loss before it.

        Raises:
            LossError: The gradients of two losses would reach the same optimizers.
        """
        pending = [slot.window is not None for slot in self.slots]
        second = self._explicit is self._learner.step and any(pending)
        self._explicit = self._learner.step
        if len(self.slots) > 1 and (second or any(pending) != all(pending)):
            names = [slot.name for slot in self.slots]
            what = "called twice in one step" if second else "called while gradients of another loss wait"
            raise LossError(
                f"learner.backward was {what}, and the learner has the optimizers {names}: both losses would reach "
                "all of them. Say whose loss it is:\n"
                f"    with learner.optimizing({names[0]!r}) as block:\n"
                "        block.loss = ..."
            )

    def update(self, name: str | int | None = None, closure: Callable[[], Any] | None = None) -> None:
        """Step one optimizer, the block's, or all of them in order, between its events; see `Learner.update`.

        Raises:
            OptimizerError: There is no optimizer of that name, or it is not the block's; or there are several to
                step with one closure.
            PhaseError: The running phase has no gradients, or nothing is running and there are none.
            LossError: ``step.grads`` was replaced by something that does not say each gradient.
        """
        learner, block = self._learner, self.block
        phase = None if learner.scope is None else learner.scope.phase
        if phase is not None and phase.data_key and not phase.gradients:
            raise PhaseError(f"learner.update was called in {phase!r}; a validation phase changes no weights")
        if block is not None:
            if name is not None and block.slot.name != str(name):
                raise OptimizerError(
                    f"learner.update({name!r}) was called inside the block of {block.slot.label}; "
                    f"open a block of its own: learner.optimizing({name!r})"
                )
            slots: tuple[Slot, ...] = (block.slot,)
        else:
            slots = self.slots if name is None else (self.find(name),)
        if phase is None and closure is None and all(slot.consumed for slot in slots):
            raise PhaseError(
                "learner.update was called outside of a step, and no gradient has been computed since the last update; "
                "expected it in a step, after learner.backward(loss):\n"
                "    with runstep(learner, phase, xs=xs, ys=ys) as (handle, state):\n"
                "        ...\n"
                "        learner.backward(loss)\n"
                "        learner.update()"
            )
        if closure is not None:
            self._check_closure(closure)
        found = False
        for slot in slots:
            if slot.window is not None and slot.phase != self._phase_name():
                self._drop(slot, f"{self._phase_name() or 'a loop of your own'} updates it")
            if closure is None:
                self._announce(slot)
                found = found or slot.has_gradients
                self._step(slot)
            else:
                self._step_with(slot, closure)
            slot.end_gradients()
            self.count += 1
            learner.fire(slot.end)
        if closure is None and not found:
            self._tell_no_gradient(
                f"learner.update was called, and no parameter of {', '.join(slot.label for slot in slots)} has a "
                "gradient, so nothing changes; call learner.backward(loss) first"
            )

    def _tell_no_gradient(self, message: str) -> None:
        """Warn of an update that changes nothing, once."""
        if not self._told_no_gradient:
            self._told_no_gradient = True
            warn_user(message)

    def _announce(self, slot: Slot) -> None:
        """Fire `UpdateBegin` for gradients that are complete, and take those that somebody has replaced."""
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
        if slot.window is not None:  # computed before, as those of sharpness-aware minimization are
            self._announce(slot)

        def evaluate() -> Any:
            slot.release()
            slot.window = None
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

        put_back = keep_state(slot.optimizer)
        try:
            self._learner.accelerator.update(slot.optimizer, evaluate)
        except BaseException:
            put_back()
            raise

    def standing(self) -> tuple[int, int]:
        """Give how many updates have been made, and a number that a step of an optimizer, made by whomever, raises."""
        states = [
            value for slot in self.slots for entries in slot.optimizer.state.values() for value in entries.values()
        ]
        tensors = [tensor for tensor in (*self.parameters, *states) if isinstance(tensor, Tensor)]
        return self.count, sum(tensor._version for tensor in tensors)

    def resting(self, slot: Slot) -> bool:
        """Tell whether an optimizer has nothing to train while another has, as one of a frozen network; warn once.

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
        if given is self.gradients or slot.window is None:
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

    def _step(self, slot: Slot) -> None:
        learner = self._learner
        try:
            if learner.finite.bad is None:
                learner.accelerator.update(slot.optimizer)
            else:
                with skipping(slot.optimizer, learner.finite.bad):
                    learner.accelerator.update(slot.optimizer)
        except TypeError as error:
            if "closure" in str(error):
                raise OptimizerError(
                    f"{type(slot.optimizer).__name__} needs a closure that computes the loss and its gradients:\n"
                    "    def closure():\n"
                    "        loss = ...\n"
                    "        learner.backward(loss)\n"
                    "        return loss\n"
                    "    learner.update(closure=closure)"
                ) from error
            raise

    def explain(self, path: tuple[str, ...]) -> Iterator[str]:
        """Tell which optimizers write a path below ``model``, ``params`` or ``optimizer``."""
        for slot in self.slots:
            name = slot.name or ""
            below = ".".join(path[1:])
            inside = any(not below or f"{self.names[p]}.".startswith(f"{below}.") for p in slot.parameters)
            if path[:1] == ("optimizer",) and path[1:] in ((), (name,)):
                yield f"{slot.label} writes its own state between UpdateBegin and UpdateEnd"
            if path[:1] in (("model",), ("params",)) and inside:
                yield f"{slot.label} writes its parameters between UpdateBegin and UpdateEnd"


@contextmanager
def apart(slots: Sequence[Slot]) -> Iterator[None]:
    """Have gradients be computed apart from those that wait, which stay as they are, and be added up afterwards.

    Then the ones that waited can be put back to the bit. The sum has the bits that torch's own has, which adds in
    place. A hook that is called when a gradient has been added to those before gets what it expects: there copies wait.
    """
    waiting = [
        (parameter, gradient)
        for slot in slots
        for parameter, gradient in zip(slot.parameters, slot.before or (), strict=False)
        if gradient is not None and parameter.grad is gradient
    ]
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter, _ in waiting):
        for parameter, gradient in waiting:
            parameter.grad = gradient.clone()
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
            else:
                parameter.grad = new + gradient if gradient.is_sparse else gradient + new


class UpdateBlock:
    """``with learner.optimizing(name) as block:`` says whose parameters may change.

    Set ``block.loss``; on leaving, the gradients of this optimizer's parameters are computed and
    it steps. Inside, the other optimizers' parameters require no gradient.

    Attributes:
        loss: The scalar loss of this optimizer; None makes no update.
    """

    __slots__ = ("_frozen", "_name", "_retain_graph", "_updates", "learner", "loss", "slot")

    def __init__(self, learner: RunLearner, slot: Slot, retain_graph: bool = False, name: str | None = None) -> None:
        if name is not None and (not isinstance(name, str) or not name or "/" in name):
            raise LossError(
                f"optimizing(loss={name!r}) was given; expected the name under which the block's loss is recorded, "
                "without a slash: loss='r1'"
            )
        self._name = None if name is None else LossName(name)
        self._retain_graph = retain_graph
        self.learner = learner
        self._updates = learner.updates
        self.slot = slot
        self.loss: Tensor | None = None

    def __enter__(self) -> UpdateBlock:
        outer = self._updates.block
        if outer is not None:
            raise OptimizerError(
                f"the block of {self.slot.label} was opened inside that of {outer.slot.label}; "
                "close one before the next"
            )
        self._updates.block = self
        self._frozen = [parameter for parameter in self.slot.others if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for parameter in self._frozen:  # the loss is computed: its graph holds none of them
            parameter.requires_grad = True
        try:
            if error is None and self.loss is not None:
                self._finish()
        except BaseException:
            self._updates.abandon_step(self.learner.step)
            raise
        finally:
            if error is not None:
                self._updates.abandon_step(self.learner.step)
            self._updates.block = None

    def _finish(self) -> None:
        """Keep the loss, compute its gradients, step; callbacks may replace the loss in between."""
        learner, name = self.learner, self._name or self.slot.name
        state = learner.step
        losses = vars(state) if name is None else vars(state).setdefault("losses", {})
        key = "loss" if name is None else name
        losses.pop(key, None)  # so that the newest comes last
        losses[key] = self.loss
        if isinstance(self.loss, Tensor) and self._updates.resting(self.slot):
            losses[key] = self.loss.detach()
            return
        learner.fire(BACKWARD_BEGIN)
        loss = losses[key]
        if self._updates.findings is not None:
            self._updates.findings.extend(leaks(self._updates, self.slot, loss, state))
        self._updates.backward(loss, self._retain_graph)
        losses[key] = loss.detach()
        learner.fire(BACKWARD_END)
        self._updates.update()


def _check_loss(loss: object, whose: str) -> None:
    """Raise `LossError` for a loss that has no gradient or is no scalar."""
    if not isinstance(loss, Tensor):
        raise LossError(f"the loss{whose} is {describe(loss)}; expected a tensor with one element")
    if loss.numel() != 1:
        raise LossError(
            f"the loss{whose} has shape {tuple(loss.shape)}; expected a scalar: reduce it with .mean() or .sum(), "
            "or give the loss function reduction='mean'"
        )
    if loss.is_complex():
        raise LossError(f"the loss{whose} is complex ({loss.dtype}); expected a real number: loss.abs() or loss.real")
    if not loss.requires_grad:
        why = (
            "gradients are off here: is this a validation phase, or a torch.no_grad() block?"
            if not torch.is_grad_enabled()
            else "it was detached, computed from constants, or everything it depends on is frozen"
        )
        raise LossError(f"no gradient can be computed from the loss{whose}: {why}")


def leaks(updates: Updates, slot: Slot, loss: Tensor, state: StepState) -> list[str]:
    """Tell where a block's loss reaches the parameters of other optimizers.

    Inside the block those are frozen, so it can only be through what was computed before it: an
    entry that should have been detached.
    """
    own, reached = set(slot.parameters), _reached(loss)
    foreign = [p for p in updates.names if p in reached and p not in own]
    if not foreign:
        return []
    owner = {p: other.label for other in updates.slots for p in other.parameters}
    nodes = _nodes(loss)
    through = [
        f"step.{name}"
        for name, value in vars(state).items()
        if isinstance(value, Tensor)
        and value is not loss
        and value.grad_fn in nodes
        and not _reached(value).isdisjoint(foreign)
    ]
    where = f" through {', '.join(through)}; write .detach() there" if through else "; detach it"
    return [
        f"the loss of {slot.label} also reaches {len(foreign)} parameters of {owner.get(foreign[0], 'no optimizer')} "
        f"({updates.names[foreign[0]]}, …){where}: the extra gradients are not used, but cost a backward pass"
    ]


def _nodes(tensor: Tensor) -> set[object]:
    """Collect the nodes of a tensor's autograd graph."""
    todo: list[Any] = [tensor.grad_fn]
    seen: set[object] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(next_node for next_node, _ in node.next_functions)
    return seen


def _reached(tensor: Tensor) -> set[Tensor]:
    """Collect the leaves that a tensor's gradient reaches."""
    return {leaf for node in _nodes(tensor) if (leaf := getattr(node, "variable", None)) is not None}
