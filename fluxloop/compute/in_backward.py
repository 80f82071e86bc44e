"""Updates inside of the backward pass: each parameter is stepped once its gradient is complete, and that is dropped.

So the gradients of a model are never all there at once. What reads all of them, or adds them to those of
another backward pass, cannot be had with it, and is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compute.apart import Apart, require_apart
from fluxloop.compute.finite import HOW_TO, Finite, NotFinite
from fluxloop.compute.fused import skipping
from fluxloop.compute.memory import IN_PART
from fluxloop.compute.optimizers import Optimizers
from fluxloop.compute.slots import Slot
from fluxloop.compute.updates import Updates
from fluxloop.errors import CancelSignal, LossError, OptimizerError, PhaseError, annotate, counted, warn_user
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import StepLearner

TOGETHER = 2**20
"""Gradients that have so many bytes together are used at once: a step for each small one would take longer."""

GO_BACK = "To go back, load a checkpoint: learner.load(file), or learner.fit(epochs, resume=folder)"


class Pass:
    """One backward pass that steps an optimizer.

    Args:
        slot: The optimizer.
        use: Steps the parameters that wait in a pass.
    """

    def __init__(self, slot: Slot, use: Callable[[Pass], None]) -> None:
        self.slot = slot
        self.apart = Apart(slot.optimizer)
        self.collected: dict[int, list[nn.Parameter]] = {}
        """Parameters whose gradients are complete and wait to be used, by the number of their group."""
        self.stepped = 0
        """How many parameters have been stepped, or were about to be."""
        self.task = -1
        """By what torch tells this pass from one that runs inside of it."""
        self._use = use
        self._bytes = 0
        self._lock = RLock()  # for models on several devices, each of which has a thread of torch's engine

    def hooks(self) -> Iterator[Any]:
        """Hook the parameters; yield what takes each hook away."""
        for number, group in enumerate(self.apart.groups):
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield parameter.register_post_accumulate_grad_hook(partial(self.take, number))

    def take(self, number: int, parameter: nn.Parameter) -> None:
        """Take a parameter whose gradient is complete; step those that wait once they are large enough.

        Args:
            number: Of its group.
            parameter: The parameter.
        """
        # In a pass inside of this one (a checkpoint with use_reentrant=True) others may follow that add to the
        # gradient. Such a parameter is stepped when this pass ends.
        if torch._C._current_graph_task_id() != self.task or parameter.grad is None:
            return
        with self._lock:
            self.collected.setdefault(number, []).append(parameter)
            self._bytes += parameter.nbytes
            if self._bytes >= TOGETHER:
                self._flush()

    def _flush(self) -> None:
        self._use(self)
        self.collected, self._bytes = {}, 0

    def finish(self) -> None:
        """Step the parameters that still have gradients: small ones, and those of passes inside of this one."""
        self.collected = {}
        for number, group in enumerate(self.apart.groups):
            left = [parameter for parameter in group["params"] if parameter.grad is not None]
            if left:
                self.collected[number] = left
        if self.collected:
            self._flush()

    @property
    def waiting(self) -> list[nn.Parameter]:
        """The parameters that are stepped next."""
        return [parameter for params in self.collected.values() for parameter in params]


class FiniteInBackward(Finite):
    """Looks at gradients right before they are used, a few at a time; at the end of the pass there are none."""

    _asked: StepState | None = None
    """The step in which somebody wants gradients to be looked at."""
    _wait = False
    _stepped = 0
    """How many parameters were stepped before those that are looked at."""

    def begin_step(self, wait: bool = False) -> None:
        """Begin a step whose gradients are to be looked at."""
        super().begin_step(wait)
        self._asked, self._wait = self._learner.step, wait

    def require_each(self, made: Pass) -> None:
        """Stop the fit unless the gradients that are used next are finite, where somebody wants that.

        Raises:
            CancelFittingException: One is NaN or infinite; says how many parameters were stepped before.
        """
        if self._asked is self._learner.step:
            self._stepped = made.stepped
            self._look_at_each(made.slot, made.waiting, None, self._wait)

    def require_gradients(self, name: str | None, wait: bool) -> None:
        """Look at gradients that no pass of the learner's has used, as those that a phase computes by hand.

        Raises:
            CancelFittingException: One is NaN or infinite.
            PhaseError: Some were used before anybody asked for this look.
        """
        updates = self._learner.updates
        slot = updates.find(name)
        if slot in updates.used and self._asked is not self._learner.step:
            raise PhaseError(
                f"gradients of {slot.label} were used in the backward pass, and StopOnNaNLoss had not asked for a look "
                "at them: it does so at the StepBegin of an AbstractTrainingPhase, and heard of none. Expected such a "
                "phase, one that hears of each step (no throttle), or a learner without it: default_callbacks=False"
            )
        self._stepped = 0
        super().require_gradients(name, wait)

    def _describe(self, slot: Slot, norm: Tensor | None) -> str:
        reason = super()._describe(slot, norm)
        if reason and self._stepped:
            reason += f", when {self._stepped} of its {len(slot.parameters)} parameters had been stepped"
        return reason

    def _advice(self) -> str:
        return GO_BACK if self._stepped else HOW_TO

    def _look_at_gradients(
        self, slot: Slot, parameters: list[nn.Parameter], each: Tensor, place: str, found: float
    ) -> None:
        if found:
            reason = f"{self._bad_of(slot, parameters, each)}, when others of its parameters had been stepped"
            self.stop(reason, place, GO_BACK)


class UpdatesInBackward(Updates):
    """Updates that a backward pass makes: it steps each parameter, and drops its gradient.

    ``learner.update`` fires the events of an update that has been made by then, and counts it.

    Args:
        learner: The learner.
        names: The names of all parameters.
        optimizers: By name.

    Raises:
        OptimizerError: One cannot step its parameters one after another; or the accelerator has a backward or an
            update of its own.
    """

    finite_type = FiniteInBackward
    is_windowed = True  # for autocast, and for the look at the end of a step

    def __init__(self, learner: StepLearner, names: dict[nn.Parameter, str], optimizers: Optimizers) -> None:
        super().__init__(learner, names, optimizers)
        kind = type(learner.accelerator)
        if any(not method.__module__.startswith("fluxloop.") for method in (kind.backward, kind.update)):
            raise OptimizerError(
                f"{kind.__name__} has a backward or update of its own, which knows nothing of parameters that are "
                "stepped one after another; use it with optimizer_in_backward=False"
            )
        for slot in self.slots:
            require_apart(slot.optimizer, slot.label)
        self.used: set[Slot] = set()
        """Optimizers that a pass has stepped, and whose update has not been asked for yet."""
        self._running: tuple[Pass, ...] = ()
        self._allowed: tuple[int, type] | None = None

    def _uncast(self) -> AbstractContextManager[None]:
        casting = self._learner.accelerator.casting
        off: AbstractContextManager[None] = nullcontext() if casting is None else casting.off()
        return off

    # Gradients

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Compute the gradients of a scalar loss, and step each parameter once its own is complete.

        Raises:
            LossError: As `Updates.backward` does; or an update has to be asked for first.
            OptimizerError: An optimizer has got hooks of its step.
            CallbackError: A callback needs gradients that are gone by then.
        """
        slots = self.slots if self.block is None else (self.block.slot,)
        if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1 and not loss.is_complex()):
            super().backward(loss, retain_graph)  # which says what is wrong with it
        self._check(slots)
        passes = tuple(Pass(slot, self._use) for slot in slots)
        with self._uncast(), self._stepping(loss, passes):
            super().backward(loss, retain_graph)
            for made in passes:
                made.finish()
                made.apart.end(self._step)
        self.used.update(slots)
        vars(self._learner.step).pop("grads", None)  # of which nothing is left to be read

    def _check(self, slots: Iterable[Slot]) -> None:
        """Raise where a pass would use gradients that others need, before it begins.

        Raises:
            LossError: They would have to be added to those of the pass before.
            OptimizerError: An optimizer has hooks of its step.
            CallbackError: A callback needs them.
        """
        learner: Any = self._learner
        for slot in slots:
            if slot in self.used:
                raise LossError(
                    f"learner.backward was called again before learner.update, and Accelerator("
                    f"optimizer_in_backward=True) has used and dropped the gradients of {slot.label} in the first "
                    "call, so that others cannot be added to them; expected one learner.backward(loss1 + loss2), an "
                    "update after each, or optimizer_in_backward=False"
                )
            optimizer = slot.optimizer
            if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
                raise OptimizerError(
                    f"{slot.label} has hooks of its step, and Accelerator(optimizer_in_backward=True) steps its "
                    "parameters one after another; expected a callback that handles UpdateEnd, or "
                    "optimizer_in_backward=False"
                )
        if learner.scope is not None:
            key = (learner.callbacks.version, type(learner.scope.phase))
            if key != self._allowed:
                learner.callbacks.require_in_backward([key[1]])
                self._allowed = key

    @contextmanager
    def _stepping(self, loss: Tensor, passes: tuple[Pass, ...]) -> Iterator[None]:
        """Have parameters be stepped in the backward pass that runs inside."""

        def begin(gradient: Tensor) -> None:
            for made in passes:
                made.task = torch._C._current_graph_task_id()

        hooks = [loss.register_hook(begin)]  # type: ignore[no-untyped-call]  # torch has no types there
        self._running = passes
        try:
            for made in passes:
                hooks += made.hooks()
            yield
        except BaseException as error:
            self._tell_in_part(error, passes)
            raise
        finally:
            self._running = ()
            for hook in hooks:
                hook.remove()

    def _use(self, made: Pass) -> None:
        """Step the parameters that wait in a pass, and drop their gradients."""
        waiting = made.waiting
        self._learner.finite.require_each(made)
        made.stepped += len(waiting)
        made.apart.step(made.collected, self._step)
        for parameter in waiting:
            parameter.grad = None

    def _step(self, optimizer: Optimizer) -> None:
        learner = self._learner
        if learner.finite.bad is None:
            learner.accelerator.update(optimizer)
        else:
            with skipping(optimizer, learner.finite.bad):
                learner.accelerator.update(optimizer)

    def _check_reached(self, loss: Tensor, slots: tuple[Slot, ...]) -> None:
        """Raise for a loss that gave no gradient; what has been stepped had one."""
        if not any(made.stepped for made in self._running):
            super()._check_reached(loss, slots)

    def _tell_in_part(self, error: BaseException, passes: tuple[Pass, ...]) -> None:
        """Say of an error, or of a cancel, that a part of the parameters has been stepped, where that is so."""
        stepped = sum(made.stepped for made in passes)
        if not stepped:
            return  # whoever abandons the step drops what there is
        for made in passes:
            made.slot.release()
            made.slot.end_gradients()
        said = (
            f"{stepped} of {counted(sum(len(made.slot.parameters) for made in passes), 'parameter')} had been stepped "
            f"in the backward pass when it was left, so that the weights are those of no step. {GO_BACK}"
        )
        self._tell(error, said)

    def _tell(self, error: BaseException | None, said: str) -> None:
        """Say what became of the weights: in a note on an error, or in a warning, as nobody sees a cancel."""
        if isinstance(error, NotFinite):  # which says so itself
            return
        if error is None or isinstance(error, CancelSignal):
            warn_user(said)
        else:
            annotate(error, f"{IN_PART}: {said}")

    # Updates

    def update(self, name: str | int | None = None, closure: Callable[[], Any] | None = None) -> None:
        """Fire the events of updates that a pass has made, and count them; others are made as ever.

        Raises:
            OptimizerError: As `Updates.update` does; or a closure is given.
            PhaseError: As `Updates.update` does.
            LossError: There are gradients that were to be used with those of the pass.
        """
        learner, scope = self._learner, self._learner.scope
        if closure is not None:
            raise OptimizerError(
                "learner.update(closure=...) was called with Accelerator(optimizer_in_backward=True), whose backward "
                "passes step the optimizer themselves; expected optimizer_in_backward=False"
            )
        if scope is not None and scope.phase.data_key and not scope.phase.gradients:
            super().update(name)  # which says what is wrong
        slots = self.slots if self.block is None else (self.block.slot,)
        if name is not None:
            slots = (self._find_to_step(name),)
        for slot in slots:
            if slot not in self.used:
                with self._uncast():
                    super().update(None if self.block is not None else slot.name)
                continue
            self._check_used(slot)
            learner.fire(slot.begin)
            self.used.discard(slot)
            slot.end_gradients()
            self.count += 1
            learner.fire(slot.end)

    def _check_used(self, slot: Slot) -> None:
        """Raise for gradients that came after those of the pass, and wait for an update that has been made.

        Raises:
            LossError: Says what they are.
        """
        given = "grads" in self._learner.step
        late = next((self.names[p] for p in slot.parameters if p.grad is not None), None)
        if given or late is not None:
            self._let_go([slot])
            raise LossError(
                f"{'step.grads was given' if given else f'{late} has a gradient'} after learner.backward, and "
                f"Accelerator(optimizer_in_backward=True) had made the update of {slot.label} by then; expected one "
                "learner.backward(loss) that computes all gradients of the update, or optimizer_in_backward=False"
            )

    def _let_go(self, slots: Iterable[Slot]) -> None:
        """Forget what passes have used, and what they have not."""
        for slot in slots:
            self.used.discard(slot)
            slot.end_gradients()

    def end_step(self) -> None:
        """Raise for an optimizer that was stepped and whose update nobody has asked for.

        Raises:
            LossError: Names it.
        """
        left = [slot for slot in self.slots if slot in self.used]
        if left:
            self._let_go(left)
            name = "" if left[0].name is None else repr(left[0].name)
            raise LossError(
                f"a step computed gradients of {', '.join(slot.label for slot in left)} and ended without "
                f"learner.update({name}), and Accelerator(optimizer_in_backward=True) has used and dropped them; "
                "expected an update in each step that calls learner.backward (with several optimizers, a block for "
                f"each: learner.optimizing({name})), or optimizer_in_backward=False"
            )

    def abandon_step(self, state: StepState) -> None:
        """Say that the update of a step stays which ended early between its backward pass and its update."""
        left = [slot for slot in self.slots if slot in self.used]
        if left:
            self._let_go(left)
            self._tell(
                sys.exc_info()[1],
                f"the step was left after learner.backward and before learner.update; {left[0].label} had been stepped "
                f"in the backward pass, and the weights stay as they are now. {GO_BACK}",
            )
        super().abandon_step(state)
