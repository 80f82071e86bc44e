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


@frozen
class Event:
    """Base of all events. Subclass it for your own: an ``attrs.frozen`` class, or a plain one without fields."""

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
    """

    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False
    resumed: bool = False


class CycleEnd(Event):
    """One pass through the phases of a fit is complete."""

    ends_scope: ClassVar[bool] = True
    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False


@frozen
class EpochBegin(Event):
    """One epoch of one phase starts. Fired by ``runepoch``.

    Args:
        resumed: Whether it began before and goes on from a checkpoint.
        batches: How many of its batches were used before that.
    """

    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False
    resumed: bool = False
    batches: int = 0


class EpochEnd(Event):
    """One epoch of one phase ends, also when it was cancelled. Fired by ``runepoch``."""

    ends_scope: ClassVar[bool] = True
    inside_step: ClassVar[bool] = False
    inside_epoch: ClassVar[bool] = False


class StepBegin(Event):
    """One step starts; the batch is on the device. Fired by ``runstep``."""

    inside_step: ClassVar[bool] = False


class StepEnd(Event):
    """One step is complete. Fired by ``runstep``, unless the step was cancelled or failed."""

    ends_scope: ClassVar[bool] = True
    inside_step: ClassVar[bool] = False


class LossBegin(Event):
    """The forward pass is done, the loss is not yet computed. Fired by the phase."""


class BackwardBegin(Event):
    """The loss is computed, its gradients are not. Fired by the phase or its update block."""


class BackwardEnd(Event):
    """The gradients are computed. Fired by the phase or its update block."""

    ends_scope: ClassVar[bool] = True


@frozen
class UpdateBegin(Event):
    """The optimizer is about to step; gradients are complete. Fired by ``learner.update``.

    Args:
        name: Name of the optimizer, None for a learner with a single unnamed one.
        after_steps: Whether it is the update of the last batches of an epoch, made after its last step: where
            ``Accelerator(accumulate=k)`` waited for more batches of data that does not say how many it has.
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
