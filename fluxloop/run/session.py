"""What a run has of its own: a fit; or an evaluation, a prediction, a check or a sweep beside it.

Runs beside a training leave no trace in it. There are two ways: on the learner itself (`beside`),
and on a copy of it (`copy_for`). Both are here, so that what a run has of its own is listed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import define, field, fields

from fluxloop.checkpoint.restoring import complete_copy
from fluxloop.compute.host import HostQueue
from fluxloop.compute.models import not_copied
from fluxloop.errors import CancelFittingException
from fluxloop.history import History
from fluxloop.interfaces import RunLearner
from fluxloop.loop import Scope, runs_a_view
from fluxloop.order.runner import Callbacks
from fluxloop.randomness import Streams
from fluxloop.state import SharedState, State, StepState

if TYPE_CHECKING:
    from fluxloop.callback import Callback
    from fluxloop.data.feed import Feed
    from fluxloop.phase import Phase

L = TypeVar("L", bound=RunLearner)


@define(eq=False)
class Session:
    """What a run has of its own, and what another run beside it must not see or change.

    A learner has each of these as an attribute (``learner.step``), because a step asks for them a
    dozen times. So a session is put into a learner, and later another is put in its place: whoever
    adds something that belongs to a run adds it here, and nowhere else.

    Args:
        callbacks: The callbacks that listen.
        cbstate: What they share.
        history: Counts and metrics.
        streams: The random numbers of steps, data and callbacks.
        host_queue: Numbers on their way from the device.
        step: The entries of the running or last step.
        phases: The phases that have run, by class.
        scope: The running step, epoch or fit.
        num_batches: How many batches the running epoch has.
        fit_phases: What a cycle of the running fit runs.
        num_epochs: How many cycles the running fit comes to.
    """

    callbacks: Callbacks
    cbstate: SharedState
    history: History
    streams: Streams
    _host_queue: HostQueue = field(alias="_host_queue")
    step: StepState = field(factory=StepState)
    phases: dict[type[Phase], Phase] = field(factory=dict)
    scope: Scope | None = None
    num_batches: int | None = None
    fit_phases: tuple[Phase, ...] = ()
    num_epochs: int | None = None

    @classmethod
    def begin(cls, learner: RunLearner, owner: str = "") -> Session:
        """Return a new session for a learner.

        Args:
            learner: The learner that will run.
            owner: Whose random numbers it draws, such as ``"evaluate"``; left out, those of the training.
        """
        cbstate = SharedState()
        return cls(
            callbacks=Callbacks(learner),
            cbstate=cbstate,
            history=History(cbstate, learner.seed),
            streams=Streams(
                learner.seed,
                prefix=f"{owner}/" if owner else "",
                process=learner.accelerator.rank if learner.accelerator.seed_per_process else 0,
            ),
            _host_queue=HostQueue(learner.accelerator.device),
        )

    @classmethod
    def of(cls, learner: RunLearner) -> Session:
        """Return the session that a learner has."""
        return cls(**{name: vars(learner)[name] for name in NAMES})

    def put_into(self, learner: RunLearner) -> None:
        """Set a learner's attributes to those of this session."""
        vars(learner).update({name: getattr(self, name) for name in NAMES})  # past the checks of what users assign

    def stop(self) -> None:
        """Set everything as it is while nothing runs."""
        self.scope = self.num_batches = self.num_epochs = None
        self.fit_phases = ()


NAMES = tuple(each.name for each in fields(Session))
"""The attributes of a learner that a session holds."""


@define(eq=False)
class Running:
    """What of a learner's fit goes on while another session is in the learner, as in an evaluation by a handler.

    A stop that is requested there ends the fit, and a fit cannot be begun there.

    Args:
        fitting: Whether a fit is running.
        phase: The phase whose epoch `Learner.epoch` or `Learner.fit` runs; None in a loop of the user's own.
        feed: The data of that epoch.
        stop_requested: Why the fit is to end before its next batch.
        wish: Why this process wants the fit to end, where others have to be asked first.
        agrees: Whether they have.
        safe_points: Called at each moment of the fit in which no step is under way.
        resume_from: The folder from which the fit was to be resumed, if that holds no checkpoint yet.
    """

    fitting: bool = False
    phase: Phase | None = None
    feed: Feed | None = None
    stop_requested: str | None = None
    wish: str | None = None
    agrees: bool = False
    safe_points: list[Callable[[], object]] = field(factory=list)
    resume_from: str | PathLike[str] | None = None

    def ask_to_stop(self, reason: str) -> None:
        """Have the fit end before its next batch, once all processes know of it."""
        if self.agrees:
            self.wish = reason
        else:
            self.stop_requested = reason

    def pass_safe_point(self, history: History) -> None:
        """Do what waits for a moment between two steps or epochs: write checkpoints, and stop where that was requested.

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


@contextmanager
def beside(learner: RunLearner, owner: str, callbacks: list[Callback]) -> Iterator[None]:
    """Run something inside with a session of its own; after it, the learner is as it was.

    Weights, optimizers and data stay the learner's: `check`, which trains, puts those back itself.

    Args:
        learner: The learner.
        owner: Whose random numbers are drawn inside.
        callbacks: The callbacks that listen inside.
    """
    outer, ledger, updates = Session.of(learner), learner._ledger, learner.updates
    model, block = learner.model, updates.block
    phases, waiting = ledger.phases, {key: list(states) for key, states in ledger.waiting.items()}
    inner = Session.begin(learner, owner)
    inner.phases = dict(outer.phases)
    try:
        if runs_a_view(outer.scope):
            vars(learner)["model"] = learner.weights.given  # past the checks of what users assign
        updates.block = None
        inner.put_into(learner)
        learner.callbacks.set(callbacks)  # only now: what their `init` publishes belongs into the inner session
        yield
    finally:
        outer.put_into(learner)
        vars(learner)["model"] = model
        updates.block = block
        ledger.phases, ledger.waiting = phases, waiting  # an instance that was only evaluated replaces no other


def copy_at_rest(learner: L, memo: dict[int, Any]) -> L:
    """Copy a learner; in the copy nothing is running, also where a fit of the original is.

    Raises:
        ModelError: A module keeps a tensor that torch does not copy.
    """
    copied: L = object.__new__(type(learner))
    # A running fit is not copied: in its place the copy gets what a learner at rest has
    memo |= {
        id(learner): copied,
        id(learner._running): Running(agrees=learner._running.agrees),
        id(learner.scope): None,
    }
    try:
        for name, value in vars(learner).items():
            vars(copied)[name] = copy.deepcopy(value, memo)
    except RuntimeError as error:
        if "deepcopy protocol" in str(error):
            raise not_copied("copy.deepcopy(learner)", error) from error
        raise
    session = Session.of(copied)
    session.stop()
    session.put_into(copied)
    complete_copy(learner, copied, memo)
    return copied


def copy_for(owner: str, learner: L, *used: Any) -> tuple[L, Any]:
    """Copy a learner for a run beside it, without its callbacks, what they share, and its data.

    Args:
        owner: Whose random numbers the copy draws.
        learner: The learner.
        used: What runs in the copy: copied with it, so that it uses the copy's models where it used the learner's.

    Returns:
        The copy, with a session of its own, and the copies of `used`.
    """
    held = (getattr(Session.of(learner), name) for name in NAMES)
    # deepcopy takes what the memo has in place of a copy. Numbers, None and empty tuples are objects that all of Python
    # shares: a stand-in for one of them would be put in its place all over the copy.
    memo: dict[int, Any] = {id(thing): State() for thing in held if not isinstance(thing, (int, tuple, NoneType))}
    # The sources themselves are used, not copies of them
    memo[id(learner.data)] = State(dict(vars(learner.data)))
    memo |= {id(learner.weights.views): {}, id(learner.weights.followers): {}}  # callbacks keep them
    copied, *others = copy.deepcopy((learner, *used), memo)
    session = Session.begin(copied, owner)
    session.history.cycles = learner.history.cycles
    session.put_into(copied)
    for slot in copied.updates.slots:
        slot.end_gradients()  # those that wait are the learner's to use
    return copied, others
