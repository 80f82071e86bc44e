"""The event types, in the order in which a fit fires them.

An event is a typed moment. Callbacks handle it with ``@on(EventType, PhaseType)``; a phase may
define events of its own, with fields if it likes, and fire them with ``handle(MyEvent(...))``::

    FitBegin
      CycleBegin                          one pass through the phases of a fit
        EpochBegin                        once per phase
          StepBegin
            LossBegin                     forward done, loss not yet
            BackwardBegin, BackwardEnd    around the gradient computation
            UpdateBegin, UpdateEnd        around the optimizer's step
          StepEnd
        EpochEnd
      CycleEnd
    FitEnd                                always, also after an error
"""

from __future__ import annotations

from typing import ClassVar

from attrs import field, frozen


@frozen(weakref_slot=False)  # else Python 3.10 refuses a class of two plain events: their instances are laid out apart
class Event:
    """Base of all events. Subclass it for your own: an ``attrs.frozen`` class, or a plain one without fields.

    Example:
        >>> from attrs import frozen
        >>> @frozen
        ... class LargeLoss(Event):
        ...     value: float
        >>> LargeLoss(3.5)
        LargeLoss(value=3.5)
    """

    ends_scope: ClassVar[bool] = False
    """A cancel raised by a handler of such an event waits until the other handlers have run."""

    inside_step: ClassVar[bool] = True
    """Whether it is fired in the middle of a step, where a handler's draws are put back to the last bit."""

    inside_epoch: ClassVar[bool] = True
    """Whether it is fired between the epoch's begin and end, where a handler's draws are put back."""


@frozen
class FitBegin(Event):
    """A fit starts. Fired once by ``fit``, with `FittingPhase`.

    Args:
        resumed: Whether it began before and goes on from a checkpoint.

    Example:
        >>> from fluxloop.testing import toy_learner
        >>> hello = CustomCallback(lambda learner: print("seed", learner.seed), FitBegin)
        >>> history = toy_learner(hello, seed=3).fit(2)
        seed 3
    """

    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False
    resumed: bool = False


@frozen
class FitEnd(Event):
    """A fit ends. Fired once by ``fit`` in every outcome, with `FittingPhase`.

    Every handler runs, whatever the others raise.

    Args:
        reason: Why the fit stopped early, or None.
        error: The exception that ends it, or None.

    Example:
        >>> class Report(Callback):
        ...     @on(FitEnd)
        ...     def report(self, event, phase, learner):
        ...         print(type(event.error).__name__, event.reason)
        >>> history = testing.toy_learner(Report()).fit(1)
        NoneType None
    """

    ends_scope: ClassVar[bool] = True
    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False
    reason: str | None = None
    error: BaseException | None = None


@frozen
class CycleBegin(Event):
    """One pass through the phases of a fit (train, then validate) starts.

    Args:
        resumed: Whether it began before and goes on from a checkpoint.

    Example:
        >>> count = CustomCallback(lambda learner: print("of", learner.num_epochs), CycleBegin)
        >>> history = testing.toy_learner(count).fit(2)
        of 2
        of 2
    """

    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False
    resumed: bool = False


class CycleEnd(Event):
    """One pass through the phases of a fit is complete.

    Example:
        >>> done = CustomCallback(lambda learner: print("trained and validated"), CycleEnd)
        >>> history = testing.toy_learner(done).fit(1)
        trained and validated
    """

    ends_scope: ClassVar[bool] = True
    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False


@frozen
class EpochBegin(Event):
    """One epoch of one phase starts. Fired by ``runepoch``.

    Args:
        resumed: Whether it began before and goes on from a checkpoint.
        batches: How many of its batches were used before that.

    Example:
        >>> batches = CustomCallback(lambda learner: print(learner.num_batches, "batches"), EpochBegin, ValidationPhase)
        >>> history = testing.toy_learner(batches, num_batches=4).fit(1)
        4 batches
    """

    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False
    resumed: bool = False
    batches: int = 0


class EpochEnd(Event):
    """One epoch of one phase ends, also when it was cancelled. Fired by ``runepoch``.

    Example:
        >>> names = CustomCallback(lambda learner: print(learner.scope.phase.name), EpochEnd)
        >>> history = testing.toy_learner(names).fit(1)
        TrainingPhase
        ValidationPhase
    """

    ends_scope: ClassVar[bool] = True
    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False


class StepBegin(Event):
    """One step starts; the batch is on the device. Fired by ``runstep``.

    Example:
        >>> rows = CustomCallback(lambda learner: print(len(learner.step.xs), "rows"), StepBegin, TrainingPhase)
        >>> history = testing.toy_learner(rows, num_batches=2, batch_size=8).fit(1)
        8 rows
        8 rows
    """

    inside_step: ClassVar[bool] = False


class StepEnd(Event):
    """One step is complete. Fired by ``runstep``, unless the step was cancelled or failed.

    Example:
        >>> entries = CustomCallback(lambda learner: print(sorted(vars(learner.step))), StepEnd, ValidationPhase)
        >>> history = testing.toy_learner(entries, num_batches=1).fit(1)
        ['loss', 'preds', 'xs', 'ys']
    """

    ends_scope: ClassVar[bool] = True
    inside_step: ClassVar[bool] = False


class LossBegin(Event):
    """The forward pass is done, the loss is not yet computed. Fired by the phase.

    Example:
        >>> def look(learner): print("preds" in vars(learner.step), "loss" in vars(learner.step))
        >>> history = testing.toy_learner(CustomCallback(look, LossBegin, TrainingPhase), num_batches=1).fit(1)
        True False
    """


class BackwardBegin(Event):
    """The loss is computed, its gradients are not. Fired by the phase or its update block.

    Example:
        >>> def look(learner): print("loss" in vars(learner.step), learner.model.value.grad)
        >>> history = testing.toy_learner(CustomCallback(look, BackwardBegin), num_batches=1).fit(1)
        True None
    """


class BackwardEnd(Event):
    """The gradients are computed. Fired by the phase or its update block.

    Example:
        >>> def look(learner): print(list(learner.step.grads), learner.step.grads["value"].shape)
        >>> history = testing.toy_learner(CustomCallback(look, BackwardEnd), num_batches=1).fit(1)
        ['value'] torch.Size([1])
    """

    ends_scope: ClassVar[bool] = True


@frozen
class UpdateBegin(Event):
    """The optimizer is about to step; gradients are complete. Fired by ``learner.update``.

    Args:
        name: Name of the optimizer, None for a learner with a single unnamed one.
        after_steps: Whether it is the update of the last batches of an epoch, made after its last step: where
            ``Accelerator(accumulate=k)`` waited for more batches of data that does not say how many it has.

    Example:
        >>> count = testing.EventRecorder()
        >>> history = testing.toy_learner(count, num_batches=6, accelerator=Accelerator("cpu", accumulate=3)).fit(1)
        >>> count.events.count("StepBegin"), count.events.count("UpdateBegin")  # 6 of training, 6 of validation
        (12, 2)
    """

    name: str | None = None
    after_steps: bool = field(default=False, kw_only=True, repr=False)


@frozen
class UpdateEnd(Event):
    """The optimizer has stepped. Fired by ``learner.update``.

    Args:
        name: Name of the optimizer, None for a learner with a single unnamed one.
        after_steps: Whether it is the update of the last batches of an epoch, made after its last step: where
            ``Accelerator(accumulate=k)`` waited for more batches of data that does not say how many it has.

    Example:
        >>> def look(learner): print(learner.model.value.item() > 0)  # it began with 0
        >>> history = testing.toy_learner(CustomCallback(look, UpdateEnd), num_batches=1).fit(1)
        True
    """

    ends_scope: ClassVar[bool] = True
    name: str | None = None
    after_steps: bool = field(default=False, kw_only=True, repr=False)


STANDARD_EVENTS: tuple[type[Event], ...] = (
    FitBegin,
    CycleBegin,
    EpochBegin,
    StepBegin,
    LossBegin,
    BackwardBegin,
    BackwardEnd,
    UpdateBegin,
    UpdateEnd,
    StepEnd,
    EpochEnd,
    CycleEnd,
    FitEnd,
)
"""The events fluxloop fires itself, in firing order."""

FIT_EVENTS: tuple[type[Event], ...] = (FitBegin, CycleBegin, CycleEnd, FitEnd)
"""Those fired with `FittingPhase`."""

GRADIENT_EVENTS: tuple[type[Event], ...] = (BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd)
"""Those fired in phases with gradients alone."""


def event_types() -> list[type[Event]]:
    """List the event types that exist: the standard ones in firing order, then users' own by name.

    Of several with one name in one module the newest counts: attrs makes a class with slots anew, and the first one
    lives until garbage is collected; a cell of a notebook that is run again makes another one, too.
    """
    found: list[type[Event]] = [Event]
    for cls in found:  # which grows meanwhile
        found.extend(cls.__subclasses__())
    newest = {(cls.__module__, cls.__qualname__): cls for cls in found}
    own = [cls for cls in newest.values() if cls not in (Event, *STANDARD_EVENTS)]
    return [*STANDARD_EVENTS, *sorted(own, key=lambda cls: (cls.__name__, cls.__module__))]
