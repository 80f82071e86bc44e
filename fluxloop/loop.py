"""The two context managers that alone fire Begin and End: `runepoch` and `runstep`.

Scopes nest: a fit holds epochs, an epoch holds steps. What is changed for a scope's duration
(modes, gradient mode, generators, whatever a callback defers) is undone in reverse on every way out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.compute.memory import release_step
from fluxloop.compute.modes import is_held_in_eval, switch_modes, switch_optimizers
from fluxloop.errors import (
    BatchError,
    CancelEpochException,
    CancelSignal,
    CancelStepException,
    PhaseError,
    annotate,
    describe,
)
from fluxloop.events import EpochBegin, EpochEnd, Event, StepBegin, StepEnd
from fluxloop.guard.assign import put
from fluxloop.processes.agree import together
from fluxloop.randomness import forget_normal, preserved, start_generators, start_step
from fluxloop.state import StepState

if TYPE_CHECKING:
    from typing import Literal

    from fluxloop.interfaces import RunLearner, RunPhase

Handle = Callable[[Event], None]

EPOCH_BEGIN, EPOCH_END, STEP_BEGIN, STEP_END = EpochBegin(), EpochEnd(), StepBegin(), StepEnd()


class Scope:
    """A part of the training with a beginning and an end: a fit, an epoch or a step.

    Attributes:
        phase: The phase whose events are fired in it.
        parent: The scope around it, None for the outermost.
        handle: Fires events for the phase.
        stream: Where the phase's steps get their random numbers.
    """

    __slots__ = ("_early", "_learner", "_undo", "handle", "parent", "phase", "stream")

    def __init__(self, learner: RunLearner, phase: RunPhase) -> None:
        self._learner = learner
        self.phase = phase
        self.parent: Scope | None = None
        self._undo: list[Callable[[], object]] | None = None
        self._early: list[Callable[[], object]] | None = None
        self._look_up()

    def _look_up(self) -> None:
        """Find the phase's handlers and stream.

        Raises:
            PhaseError: It is no phase.
        """
        phase = self.phase
        if not hasattr(phase, "step_stream") or isinstance(phase, type):
            raise PhaseError(f"{describe(phase)} was given as a phase; expected an instance, e.g. TrainingPhase()")
        self.handle: Handle = self._learner.callbacks.handle(self._learner, phase)
        self.stream = self._learner.streams[phase.step_stream]

    def defer(self, undo: Callable[[], object], early: bool = False) -> None:
        """Call `undo` when this scope ends, whatever way or early alone; the last deferred goes first."""
        if early:
            self._early = [*(self._early or ()), undo]
            return
        if self._undo is None:
            self._undo = []
        self._undo.append(undo)

    def began(self) -> None:
        """Called after an epoch directly inside this scope has begun."""

    def ended(self) -> None:
        """Called before an epoch directly inside this scope fires its `EpochEnd`."""

    @property
    def resumed(self) -> bool:
        """Whether an epoch that begins in it is resumed from a checkpoint."""
        return False

    @property
    def batches_used(self) -> int:
        """How many batches of that epoch were used before the checkpoint."""
        return 0

    def open(self) -> None:
        """Become the learner's running scope."""
        self.parent = self._learner.scope
        self._learner.scope = self

    def close(self, error: BaseException | None) -> None:
        """Undo what was deferred, in reverse, and give the learner its outer scope back.

        A failing undo does not keep the others from running: it becomes a note on `error`, or is
        raised at the end where there is none.
        """
        self._learner.scope = self.parent  # first, so that what is undone sees the learner as it is outside
        first = None if isinstance(error, CancelSignal) else error
        todo = self._undo or []
        if error is not None and self._early:
            todo += self._early
        # In reverse: a change that was made on top of another one can only be undone while that one is in place. Two
        # swaps of the same weights, undone in the order in which they were made, would leave the first swap's in place.
        while todo:
            try:
                todo.pop()()
            except BaseException as failure:
                if first is None:
                    first = failure
                else:
                    annotate(first, f"fluxloop: undoing a change failed as well: {failure!r}")
        if first is not None and first is not error:
            raise first

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.phase!r})"


def runstep(learner: RunLearner, phase: RunPhase, /, **entries: Any) -> StepScope:
    """Run one step: fire `StepBegin`, yield ``(handle, state)``, fire `StepEnd`.

    The tensors in `entries` are moved to the accelerator's device, gradients are on or off as the phase says, gradients
    consumed by the last update are released, and torch's random numbers start from ``(seed, "<data_key>/step", number
    of the step)``. ``state`` is ``learner.step`` from then on, and stays readable after the step.

    A `CancelStepException` ends the step without `StepEnd` and goes no further. Raised in a handler of `StepBegin`, it
    leaves the ``with`` statement (whose body it cannot skip) and is taken by the `Phase.step` around it.

    Enter what it returns at once, and once; an epoch uses the object again for its next step.

    Args:
        learner: Whose step it is.
        phase: The running phase.
        entries: Stored in ``state`` under their names.

    >>> with runstep(testing.toy_learner(), TrainingPhase(), xs=torch.ones(2, 1)) as (handle, state):
    ...     state.preds = 2 * state.xs
    """
    epoch = learner.scope
    # A scope that has ended is used again: 0.9 µs, against 1.2 µs for a new one, in each step. It is taken out of the
    # epoch while its step runs, so that a step inside that step gets another one.
    if type(epoch) is runepoch and epoch.idle_step is not None and epoch.idle_step.phase is phase:
        step, epoch.idle_step = epoch.idle_step, None
    else:
        kind = WindowedStepScope if learner.updates.is_windowed else StepScope
        step = (kind if learner.accelerator.group is None else together(kind))(learner, phase)
    step.state = StepState(entries)
    return step


class StepScope(Scope):
    """One step: what `runstep` returns. An epoch uses one that has ended without error or cancel for its next step.

    Attributes:
        state: The entries of the step.
    """

    __slots__ = ("_apart", "_grad_enabled", "state")

    def __init__(self, learner: RunLearner, phase: RunPhase) -> None:
        self._learner = learner
        self.phase = phase
        self.state: StepState
        self._apart: ExitStack | None = None

    def __enter__(self) -> tuple[Handle, StepState]:
        learner, phase, state = self._learner, self.phase, self.state
        self.parent = outer = learner.scope
        self._undo = self._early = None
        of_outer = outer is not None and (outer.phase is phase or same_phase(outer.phase, phase))
        if outer is not None and of_outer:  # the epoch has looked these up
            self.handle, self.stream = outer.handle, outer.stream
        else:
            self._look_up()
        if outer is not None and (not of_outer or isinstance(outer, StepScope)):
            self._set_apart()
        gradients = phase.gradients
        self._grad_enabled = torch.is_grad_enabled()
        try:
            put(learner, "scope", self)
            if not of_outer:
                show_weights(self, learner, phase)
            if self._grad_enabled is not gradients:
                torch.set_grad_enabled(gradients)
            learner.accelerator.place(state.__dict__)
            for first in state.__dict__.values():
                if isinstance(first, Tensor) and first.ndim and not first.size(0):
                    raise BatchError(
                        f"{phase!r} was given a batch without rows: {describe(first)}; expected one or more"
                    )
                break
            if gradients:
                learner.updates.begin_step(state)
            put(learner, "step", state)
            number = self.stream.next()
            self.handle(STEP_BEGIN)
            start_step(number)
        except BaseException as error:
            self._leave(error)
            raise
        return self.handle, state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        forget_normal()
        if error is None:
            learner = self._learner
            try:
                self.handle(STEP_END)
                if learner._host_queue.busy:
                    learner._host_queue.send()
            except CancelStepException:
                pass
            except BaseException as failure:
                self._leave(failure)
                raise
            if self._undo is None and self._apart is None and self._grad_enabled is self.phase.gradients:
                # The common way out, without `close`: nothing is to be undone.
                outer = self.parent
                put(learner, "scope", outer)
                if type(outer) is runepoch:  # its phase is this one: the step of another would be set apart
                    outer.idle_step = self
            else:
                self._leave(None)
            return False
        self._leave(error)
        return isinstance(error, CancelStepException)

    def _leave(self, error: BaseException | None) -> None:
        if self._grad_enabled is not self.phase.gradients:
            torch.set_grad_enabled(self._grad_enabled)
        if error is not None:
            self._learner.updates.abandon_step(self.state)
            if not isinstance(error, CancelSignal):
                locate(error, self._learner, self.phase)
                release_step(error, self._learner, self.state, self.phase.gradients)
        with preserved() if self._undo or self._early else nullcontext():  # what is undone may draw
            self.close(error)
        if self._apart is not None:
            self._apart.close()

    def _set_apart(self) -> None:
        """Undo, when this step ends, what it does to an epoch of another phase, or to a step, that it runs inside."""
        learner = self._learner
        self._apart = ExitStack()
        self._apart.enter_context(preserved())
        self._apart.callback(setattr, learner, "step", learner.step)
        self._apart.callback(set_modes(learner, self.phase))


class WindowedStepScope(StepScope):
    """One step of a learner whose updates may be of several batches, or in reduced precision.

    Autocast is on while its body runs, and off in handlers. The last step of an epoch makes the updates that wait.
    """

    __slots__ = ("_fire", "_plain", "_was")

    def __init__(self, learner: RunLearner, phase: RunPhase) -> None:
        super().__init__(learner, phase)
        self._plain: Handle | None = None
        self._fire: Handle | None = None
        self._was: Any = None

    def __enter__(self) -> tuple[Handle, StepState]:
        handle, state = super().__enter__()
        casting = self._learner.accelerator.casting
        if casting is None:
            return handle, state
        if self._fire is None or self._plain is not handle:
            self._plain, self._fire = handle, casting.outside(self._learner, handle)
        self.handle = self._fire
        self._was = casting.begin()
        return self._fire, state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self._was is not None:
            self._learner.accelerator.casting.end(self._was)
            self._was = None
            assert self._plain is not None  # for type checkers: set where autocast was switched on
            self.handle = self._plain
        if error is None and self.phase.gradients:
            try:
                self._learner.updates.end_step()
            except BaseException as failure:
                if super().__exit__(type(failure), failure, failure.__traceback__):
                    return False
                raise
        return super().__exit__(kind, error, traceback)


class runepoch(Scope):  # noqa: N801 - used like a function
    """Run one epoch: fire `EpochBegin`, give ``handle``, fire `EpochEnd`.

    Every submodule of every model is put into the phase's mode (train or eval) and back into its own afterwards;
    gradients are on or off as the phase says; the global generators start from ``(seed, "<data_key>/epoch", number of
    the epoch)`` and are put back afterwards.

    A `CancelEpochException` ends the epoch; `EpochEnd` still fires, once. Raised in a handler of `EpochBegin`, it
    leaves the ``with`` statement after that, for ``learner.epoch`` to take. An error, or a cancelled fit, fires none.

    Args:
        learner: Whose epoch it is.
        phase: The running phase.

    >>> learner, phase = testing.toy_learner(), TrainingPhase()
    >>> with runepoch(learner, phase) as handle:
    ...     states = [phase.step(learner, batch) for batch in learner.data.training]
    """

    __slots__ = ("idle_step",)

    def __init__(self, learner: RunLearner, phase: RunPhase) -> None:
        super().__init__(learner, phase)
        self.idle_step: StepScope | None = None
        """The scope of a step that has ended, for the next one."""

    def __enter__(self) -> Handle:
        self.open()
        try:
            self._set_up()
            number = self._learner.streams[self.phase.epoch_stream].next()
            outer = self.parent
            goes_on = outer is not None and outer.resumed
            group = self._learner.accelerator.group
            with nullcontext() if group is None else group.agreement.beginning(self._learner, self.phase):
                self.handle(EpochBegin(resumed=True, batches=outer.batches_used) if outer and goes_on else EPOCH_BEGIN)
            start_generators(number)
            if outer is not None:
                outer.began()
        except BaseException as error:
            self._leave(error, ends=isinstance(error, CancelEpochException))
            raise
        return self.handle

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False] | bool:
        cancelled = isinstance(error, CancelEpochException)
        self._leave(error, ends=error is None or cancelled)
        return cancelled

    def _set_up(self) -> None:
        # Undone in reverse. The generators are preserved before what may draw is changed, and so put back after that is
        # undone. Modes of optimizers are set before the weights view is shown: they move the live weights.
        learner = self._learner
        if self.phase.gradients:
            learner.meet_parameters()
        if isinstance(self.parent, StepScope):
            step = learner.step
            self.defer(lambda: setattr(learner, "step", step))
        generators = preserved()
        generators.__enter__()
        self.defer(lambda: generators.__exit__(None, None, None))
        if self.phase.gradients and not trains(self.parent):
            self.defer(learner.updates.rest)
        self.defer(set_modes(learner, self.phase))
        enabled = torch.is_grad_enabled()
        self.defer(lambda: torch.set_grad_enabled(enabled))
        torch.set_grad_enabled(self.phase.gradients)
        show_weights(self, learner, self.phase)

    def _leave(self, error: BaseException | None, ends: bool) -> None:
        learner = self._learner
        try:
            if ends:
                try:
                    if self.phase.gradients:
                        learner.updates.end_epoch()
                    learner._host_queue.flush()
                except CancelEpochException:
                    pass  # the epoch ends here anyway
                if self.parent is not None:
                    self.parent.ended()
                self.handle(EPOCH_END)
        except CancelEpochException:
            pass
        except BaseException as failure:
            error = failure
            raise
        finally:
            learner.step.drop_graphs()
            if not ends:
                learner.updates.abandon_step(learner.step)
                if not isinstance(self.parent, StepScope):
                    learner._host_queue.drop()
                if error is not None and not isinstance(error, CancelSignal):
                    locate(error, learner, self.phase)
            self.close(error)


def same_phase(a: RunPhase, b: RunPhase) -> bool:
    """Return whether two phases are the same: one instance, or two of one class that have nothing of their own."""
    if a is b:
        return True
    both_plain = type(a) is type(b) and not vars(a) and not vars(b)
    return both_plain and (not hasattr(type(a), "__attrs_attrs__") or a == b)  # slots are not among vars()


def check_view(learner: RunLearner, phase: RunPhase) -> None:
    """Raise for a phase that trains a weights view, or runs one that does not exist.

    Raises:
        PhaseError: No model has that view, or the phase has gradients.
    """
    if phase.model_view:
        if phase.gradients:
            raise PhaseError(
                f"{phase!r} has gradients and runs the weights '@{phase.model_view}'; a view is not trained"
            )
        learner.weights.view(phase.model_view)


def show_weights(scope: Scope, learner: RunLearner, phase: RunPhase) -> None:
    """Let ``learner.model`` be the weights view that a phase runs, until the scope ends.

    These are the live weights, unless the phase says otherwise; neither are changed.

    Raises:
        PhaseError: No model has that view, or the phase has gradients.
    """
    before = learner.model
    if phase.model_view:
        check_view(learner, phase)
        scope.defer(lambda: put(learner, "model", before))
        scope.defer(switch_modes(list(learner.weights.copies(phase.model_view).values()), phase.train_mode))
        put(learner, "model", learner.weights.view(phase.model_view))
    elif runs_a_view(scope.parent):
        scope.defer(lambda: put(learner, "model", before))
        put(learner, "model", learner.weights.given)


def set_modes(learner: RunLearner, phase: RunPhase) -> Callable[[], None]:
    """Put models, loss function and optimizers into the modes of a phase; return what puts them back.

    A model that is frozen and in eval mode stays in it where others are trained. Optimizers with
    modes are in train mode where there are gradients.
    """
    modules = learner.modules()
    if phase.gradients and phase.train_mode:
        modules = [module for module in modules if not is_held_in_eval(module)]
    undone = switch_modes(modules, phase.train_mode), switch_optimizers(learner.updates.modes, phase.gradients)

    def put_back() -> None:
        for undo in undone:
            undo()

    return put_back


def trains(scope: Scope | None) -> bool:
    """Return whether a scope, or one around it, belongs to a phase that trains."""
    while scope is not None:
        if scope.phase.gradients:
            return True
        scope = scope.parent
    return False


def runs_a_view(scope: Scope | None) -> bool:
    """Return whether a scope, or one around it, belongs to a phase that runs a weights view."""
    while scope is not None:
        if scope.phase.model_view:
            return True
        scope = scope.parent
    return False


def locate(error: BaseException, learner: RunLearner, phase: RunPhase) -> None:
    """Note on an exception in which phase, epoch and step it was raised, once."""
    if any(note.startswith("fluxloop: in ") for note in getattr(error, "__notes__", ())):
        return
    counted = " (both counted from 1)" if phase.data_key and learner.streams[phase.step_stream].index else ""
    annotate(error, f"fluxloop: in {place_in_words(learner, phase)}{counted}")


def place_in_words(learner: RunLearner, phase: RunPhase) -> str:
    """Say where a phase stands: ``"TrainingPhase(), epoch 2, step 16 of the run"``, both counted from 1."""
    if not phase.data_key:
        return f"{phase!r}, after {learner.history.cycles} complete cycles"
    epoch, step = learner.streams[phase.epoch_stream].index, learner.streams[phase.step_stream].index
    return f"{phase!r}, epoch {epoch}, {f'step {step} of the run' if step else 'before the first step'}"
