"""What a run has of its own: a fit; or an evaluation, a prediction, a check or a sweep beside it."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from types import NoneType
from typing import TYPE_CHECKING

from attrs import define, field, fields

from fluxloop.compute.host import HostQueue
from fluxloop.errors import CancelFittingException
from fluxloop.history import History
from fluxloop.order.runner import Callbacks
from fluxloop.randomness import Streams
from fluxloop.state import SharedState, StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner
    from fluxloop.loop import Scope
    from fluxloop.phase import Phase


@define(eq=False)
class Session:
    """What a run has of its own, and what another run beside it must not see or change.

    A learner shows each of these as an attribute of its own (``learner.step``), because a step asks
    for them a dozen times. So a session is not looked through but put into a learner, and taken out
    of it again: whoever adds something that belongs to a run adds it here, and nowhere else.

    Args:
        callbacks: Who listens.
        cbstate: What they share.
        history: Counts and metrics.
        streams: The random numbers of steps, data and callbacks.
        host_queue: Numbers on their way from the device.
        step: The entries of the running or last step.
        scope: The running step, epoch or fit.
        phases: The phases that have run, by class.
        fit_phases: What a cycle of the running fit runs.
        num_epochs: How many cycles the running fit comes to.
    """

    callbacks: Callbacks
    cbstate: SharedState
    history: History
    streams: Streams
    _host_queue: HostQueue = field(alias="_host_queue")
    step: StepState = field(factory=StepState)
    scope: Scope | None = None
    phases: dict[type[Phase], Phase] = field(factory=dict)
    fit_phases: tuple[Phase, ...] = ()
    num_epochs: int | None = None

    @classmethod
    def begin(cls, learner: RunLearner, owner: str = "") -> Session:
        """Make a new one for a learner.

        Args:
            learner: Whose run it will be.
            owner: What its random numbers are drawn for; left out, for the training.
        """
        cbstate = SharedState()
        return cls(
            callbacks=Callbacks(learner),
            cbstate=cbstate,
            history=History(cbstate, learner.seed),
            streams=Streams(learner.seed, prefix=f"{owner}/" if owner else ""),
            _host_queue=HostQueue(learner.accelerator.device),
        )

    @classmethod
    def of(cls, learner: RunLearner) -> Session:
        """Take the one that a learner has."""
        return cls(**{name: vars(learner)[name] for name in NAMES})

    def objects(self) -> list[object]:
        """List the objects that it holds; a copy of a learner for another run leaves them out."""
        held = (getattr(self, name) for name in NAMES)
        return [thing for thing in held if not isinstance(thing, (int, tuple, NoneType))]

    def put_into(self, learner: RunLearner) -> None:
        """Have a learner go on with this one."""
        vars(learner).update({name: getattr(self, name) for name in NAMES})  # past the checks of what users assign


NAMES = tuple(each.name for each in fields(Session))
"""The attributes of a learner that a session holds."""


@define(eq=False)
class Running:
    """What of a fit goes on while others run beside it, in an evaluation that a handler asks for.

    Args:
        fitting: Whether a fit is running.
        phase: The phase whose epoch `Learner.epoch` or `Learner.fit` runs; None in a loop of the user's own.
        stop_requested: Why the fit is to end before its next batch.
        safe_points: Called at each moment of the fit in which no step is under way.
        resume_from: Where the fit was to go on from, where there was nothing yet to go on from.
    """

    fitting: bool = False
    phase: Phase | None = None
    stop_requested: str | None = None
    safe_points: list[Callable[[], object]] = field(factory=list)
    resume_from: str | PathLike[str] | None = None

    def pass_safe_point(self, history: History) -> None:
        """Do what waits for a moment between two steps or epochs: checkpoints, and a stop that was asked for.

        Raises:
            CancelFittingException: The fit is to end.
        """
        if self.stop_requested:  # so that a checkpoint written now has it
            history.stop_reason = self.stop_requested
        for action in self.safe_points:
            action()
        if self.stop_requested:
            reason, self.stop_requested = self.stop_requested, None
            raise CancelFittingException(reason)
