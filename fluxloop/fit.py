"""What a learner does when it trains: fit, and run an epoch. Thin methods of `Learner` call these."""

from __future__ import annotations

import copy
import operator
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, finalize, ref

from fluxloop.checkpoint import apply, check_fits, check_same_run, meet_phases, take
from fluxloop.data import load, name_data
from fluxloop.errors import (
    CancelEpochException,
    CancelFittingException,
    CheckpointError,
    DataError,
    PhaseError,
    ReentrantFitError,
    annotate,
    describe,
    did_you_mean,
)
from fluxloop.events import CycleBegin, CycleEnd, FitBegin, FitEnd
from fluxloop.feed import Feed, untouched
from fluxloop.folder import find_state
from fluxloop.history import INTERRUPTED, History
from fluxloop.loop import Scope, check_view, runepoch, runstep
from fluxloop.persist import class_name, keep, put_back
from fluxloop.phase import FittingPhase, Phase, Stateful
from fluxloop.phases.supervised import TrainingPhase, ValidationPhase
from fluxloop.randomness import generator_states, preserved, put_generators
from fluxloop.state import State

if TYPE_CHECKING:
    from fluxloop.learner import Learner


class FitScope(Scope):
    """A running fit.

    Args:
        learner: Whose fit it is.
        phases: What a cycle runs.
        steps_per_epoch: How many batches an epoch has at most.
        state: Of the checkpoint it goes on from.

    Attributes:
        index: How many phases of the running cycle are complete.
        feed: The data of the running epoch, None between epochs.
        script: Where the global generators stood when the fit began.
        cut: Whether the fit has ended in the middle of an epoch.
        finished: Whether `FitEnd` was fired.
    """

    __slots__ = ("_again", "cut", "feed", "finished", "index", "phases", "script", "steps_per_epoch")

    def __init__(
        self, learner: Learner, phases: list[Phase], steps_per_epoch: int | None, state: dict[str, Any] | None
    ) -> None:
        super().__init__(learner, FittingPhase())
        self.script = generator_states()
        self.phases = phases
        self.steps_per_epoch = steps_per_epoch
        self.feed: Feed | None = None
        self.cut = self.finished = False
        self.index = 0
        self._again = state
        place = None if state is None else state["place"]
        if place is not None:
            self.script = put_back(place["script"])
            put_generators(self.script)
            self.index = place["index"]
            if place["feed"] is not None:
                self._begin_epoch_again(phases[self.index])

    def _begin_epoch_again(self, phase: Phase) -> None:
        """Have the epoch under way begin with the numbers it began with."""
        self._learner.streams[phase.epoch_stream].index -= 1
        self._order_again(phase)

    def _order_again(self, phase: Phase) -> None:
        self._learner.streams[f"{phase.owner}/data"].index -= 1

    @property
    def goes_on(self) -> bool:
        """Whether the fit goes on from a checkpoint, and has not yet come to where that was written."""
        return self._again is not None

    @property
    def resumed(self) -> bool:
        """Whether the epoch that begins in it goes on from a checkpoint."""
        return self.goes_on and self.feed is not None

    def put_again(self, inside: str) -> None:
        """Put the state in place again, once what was under way has begun again.

        Args:
            inside: Where the run has come to: ``"fit"``, ``"cycle"`` or ``"epoch"``.
        """
        if self._again is None:
            return
        place = self._again["place"]
        under_way = "fit"
        if place is not None and (place["index"] or place["feed"] is not None):
            under_way = "cycle" if place["feed"] is None else "epoch"
        if inside == under_way:
            apply(self._learner, self._again, begun=True)
            if under_way == "epoch":
                self._order_again(self.phases[self.index])
            self._again = None

    def take(self, feed: Feed) -> None:
        """Take the data of an epoch that is about to run."""
        self.feed = feed
        feed.limit = self.steps_per_epoch
        if self._again is not None:
            feed.go_on(self._again["place"]["feed"])

    def began(self) -> None:
        """Put the epoch's state in place where it goes on from a checkpoint."""
        if self.feed is not None:
            self.put_again("epoch")

    def ended(self) -> None:
        """Count a complete phase."""
        if self.feed is not None:
            self.feed = None
            self.index += 1

    def finish(self) -> None:
        """Let whoever waits for a moment without anything under way have the last one."""
        self.finished = True
        self._learner.stop_requested = None
        self._learner.safe_point()

    def place(self) -> dict[str, Any]:
        """Give where the fit stands, as plain data.

        Raises:
            CheckpointError: It is in an epoch that cannot be resumed in the middle.
        """
        place = None
        if self.cut:
            raise CheckpointError("the fit was cut in the middle of an epoch")
        if self.feed is not None:
            phase = self.phases[self.index]
            if not goes_on(phase):
                raise CheckpointError(
                    f"{type(phase).__name__} has an epoch() of its own, which cannot be resumed in the middle; "
                    "where it keeps nothing between steps but in attributes, say so in the class: resumable = True"
                )
            if self.feed.obstacle is not None:
                raise CheckpointError(self.feed.obstacle)
            place = self.feed.place()
            if place is None:
                raise CheckpointError("an epoch is just beginning; a state can be kept between two of its steps")
            place["global_generators"] = keep(generator_states(), "the random generators")
        names = [class_name(type(phase)) for phase in self.phases]
        script = keep(self.script, "the random generators")
        return {"phases": names, "index": self.index, "feed": place, "script": script}


def place_of(learner: Learner) -> dict[str, Any] | None:
    """Give where a learner's fit stands; None where it is not fitting.

    Raises:
        CheckpointError: It is in the middle of a step, or of an epoch that cannot be resumed in the middle.
    """
    scope = learner.scope
    if scope is None or (isinstance(scope, runepoch) and scope.parent is None):
        return None
    fitting = scope if isinstance(scope, FitScope) else scope.parent
    ends = isinstance(scope, runepoch) and isinstance(fitting, FitScope) and fitting.feed is None
    if isinstance(scope, runstep) or not isinstance(fitting, FitScope) or ends:
        raise CheckpointError(
            "the state of a learner was asked for while a step is under way or an epoch ends; expected between two "
            "steps: a Checkpointer "
            "waits for that, and so does learner.safe_points.append(function)"
        )
    return None if fitting.cut else fitting.place()


def goes_on(phase: Phase) -> bool:
    """Tell whether a phase's epoch keeps nothing but its state and its place in the data."""
    return type(phase).epoch is Phase.epoch or phase.resumable


def fit(
    learner: Learner,
    epochs: int,
    data: Any,
    phases: Iterable[Phase] | None,
    resume: Any,
    steps_per_epoch: int | None,
) -> History:
    """Run `epochs` cycles through `phases`; see `Learner.fit`."""
    epochs = _count(epochs)
    if steps_per_epoch is not None and (isinstance(steps_per_epoch, bool) or operator.index(steps_per_epoch) < 1):
        raise ValueError(f"fit(steps_per_epoch={steps_per_epoch!r}) was asked for; expected 1 or more, or None")
    if learner.fitting:
        raise ReentrantFitError(
            "fit was called while this learner is fitting; wait until it returns, or run learner.epoch(phase) "
            "for a further epoch inside"
        )
    kept = learner.data
    learner.data = kept if data is None else name_data(data)
    try:
        if isinstance(phases, (Phase, type)):
            name = phases.__name__ if isinstance(phases, type) else type(phases).__name__
            raise PhaseError(f"phases={describe(phases)} was given; expected a list of instances: phases=[{name}()]")
        chosen = list(phases) if phases is not None else _default_phases(learner.data)
        for phase in chosen:
            check_runs(learner, phase)
            feed(learner, phase).check()
        meet_phases(learner, chosen)
        state = None if resume is None else find_state(resume)
        if state is not None:
            _check_goes_on(learner, state, epochs, chosen)
            take(learner, state, begun=False)
        learner.fitting = True
        if state is not None and learner.history.stop_reason is not None:
            reason = learner.history.stop_reason
            warnings.warn(
                f"the run that was to go on had been stopped: {reason}. Nothing is trained; to train further: "
                "learner.load(file), then learner.fit(epochs)",
                stacklevel=3,
            )
            epochs = 0
        else:
            reason = None
        with preserved() if state is not None else nullcontext():
            scope = FitScope(learner, chosen, steps_per_epoch, state)
            return _run(learner, scope, epochs if resume is not None else learner.history.cycles + epochs, reason)
    finally:
        learner.data, learner.fitting, learner.stop_requested = kept, False, None
        learner.safe_points.clear()


def _check_goes_on(learner: Learner, state: dict[str, Any], epochs: int, phases: list[Phase]) -> None:
    """Raise where a fit is not the one that a checkpoint is of.

    Raises:
        CheckpointError: Says what differs.
    """
    check_fits(learner, state)
    check_same_run(learner, state)
    place, names = state["place"], [class_name(type(phase)) for phase in phases]
    if place is not None and place["phases"] != names and (place["index"] or place["feed"]):
        raise CheckpointError(f"the fit ran the phases {place['phases']}, and now {names}; expected the same")
    if place is not None and place["feed"] is not None:
        feed(learner, phases[place["index"]]).check_place(place["feed"])
    begun = state["history"]["cycles"] + bool(place is not None and (place["index"] or place["feed"]))
    if state["history"]["stop_reason"] is None and begun > epochs:
        raise CheckpointError(
            f"fit({epochs}, resume=...) was asked for, and {state['history']['cycles']} epochs are complete"
            f"{' and one is under way' if begun > state['history']['cycles'] else ''}; epochs are the total, those "
            f"before the checkpoint too: fit({begun}, resume=...) or more"
        )


def _run(learner: Learner, scope: FitScope, until: int, reason: str | None) -> History:
    """Run a fit that nothing speaks against, until so many cycles are complete."""
    history = learner.history
    history.stop_reason = reason
    error: BaseException | None = None
    scope.open()
    with interruptible(learner):
        try:
            scope.handle(FitBegin(scope.goes_on))
            scope.put_again("fit")
            history.stop_reason = reason
            learner.safe_point()
            while history.cycles < until:
                scope.handle(CycleBegin(scope.goes_on))
                scope.put_again("cycle")
                while scope.index < len(scope.phases):
                    run_epoch(learner, scope.phases[scope.index], scope=scope)
                    scope.ended()
                    learner.safe_point()
                scope.index = 0
                history.cycles += 1
                scope.handle(CycleEnd())
                learner.safe_point()
        except CancelFittingException as cancel:
            history.stop_reason = cancel.reason or "cancelled"
        except KeyboardInterrupt:
            history.stop_reason = INTERRUPTED
        except BaseException as failure:
            if learner.stop_requested and "DataLoader worker" in str(failure):
                history.stop_reason = INTERRUPTED  # Ctrl+C reached the workers too, and ended them
            else:
                error = failure
        error = _finish(scope, history, error)
    if error is not None:
        try:
            raise error
        finally:
            del error  # it holds this frame, and would live, with the loader's workers, until garbage is collected
    return history


def _finish(scope: FitScope, history: History, error: BaseException | None) -> BaseException | None:
    """Fire `FitEnd` and undo what was deferred; give the error that leaves the fit, if any."""
    scope.cut = scope.feed is not None
    try:
        scope.handle(FitEnd(history.stop_reason, error))
    except CancelFittingException as cancel:
        history.stop_reason = history.stop_reason or cancel.reason or "cancelled"
    except BaseException as failure:
        if error is None:
            error = failure
        else:
            annotate(error, f"fluxloop: a handler of FitEnd failed as well: {failure!r}")
    try:
        if error is None:
            scope.finish()
    except CancelFittingException:  # there is nothing left to end
        pass
    except BaseException as failure:
        error = failure
    try:
        scope.close(error)
    except BaseException as failure:
        error = failure
    return error


def _count(epochs: Any) -> int:
    try:
        count = operator.index(epochs)
    except TypeError:
        count = -1
    if count < 0 or isinstance(epochs, bool):
        raise ValueError(f"fit({epochs!r}) was asked for; expected a number of epochs, 0 or more, e.g. fit(10)")
    return count


def _default_phases(sources: State) -> list[Phase]:
    return [TrainingPhase(), ValidationPhase()] if "validation" in sources else [TrainingPhase()]


def check_phase(phase: object) -> None:
    """Raise `PhaseError` for something that is no phase, or a class."""
    if not isinstance(phase, Phase):
        name = phase.__name__ if isinstance(phase, type) else "TrainingPhase"
        raise PhaseError(f"{describe(phase)} was given as a phase; expected an instance: {name}()")
    if phase.data_key != type(phase).data_key:
        raise PhaseError(
            f"{phase!r} has a data_key of its own, {phase.data_key!r}; expected a class: "
            f"class MyPhase({type(phase).__name__}): data_key = {phase.data_key!r}"
        )


class _PerLearner:
    """The states of a phase by learner, and the one that a new learner begins with."""

    def __init__(self, phase: Stateful) -> None:
        self.first = copy.deepcopy(phase.state_dict())
        self.owner: ReferenceType[Learner] | None = None
        self.others: WeakKeyDictionary[Learner, Any] = WeakKeyDictionary()


_states: dict[int, _PerLearner] = {}
"""By the phase's id, as long as it lives: a phase may be unhashable."""


def bring_state(learner: Learner, phase: Stateful) -> None:
    """Have a phase that keeps something between steps go on from what it kept for this learner.

    In a second learner it begins as it did in the first.
    """
    kept = _states.get(id(phase))
    if kept is None:
        kept = _states[id(phase)] = _PerLearner(phase)
        finalize(phase, _states.pop, id(phase), None)
    elif kept.owner is not None and kept.owner() is not learner:
        former = kept.owner()
        if former is not None:
            kept.others[former] = copy.deepcopy(phase.state_dict())
        phase.load_state_dict(copy.deepcopy(kept.others.pop(learner, kept.first)))
    kept.owner = ref(learner)


def check_runs(learner: Learner, phase: Phase) -> None:
    """Raise what keeps a learner from running a phase, before anything is changed."""
    check_phase(phase)
    check_view(learner, phase)
    phase.check(learner)
    if isinstance(phase, Stateful):
        bring_state(learner, phase)


def run_epoch(learner: Learner, phase: Phase, data: Any = None, scope: FitScope | None = None) -> None:
    """Run one epoch of a phase, of a fit's cycle where there is one; see `Learner.epoch`."""
    check_runs(learner, phase)
    if not learner.fitting:
        meet_phases(learner, [phase])
    kept = learner.data, learner.num_batches
    if data is not None:
        learner.data = State({**vars(learner.data), phase.data_key: load(data, phase.data_key)})
    try:
        batches = feed(learner, phase, learner.stop_if_requested if scope is None else learner.safe_point)
        batches.check()
        if phase.gradients:
            learner.updates.check_owned()
        learner.phases[type(phase)] = phase
        if scope is not None:
            scope.take(batches)
            learner.begun_data.add(phase.data_key)
        learner.num_batches = batches.num_batches
        with preserved(), left_alone(learner, phase, batches.source):
            phase.epoch(learner, batches)
    except CancelEpochException:
        pass  # raised by a handler of EpochBegin, after EpochEnd was fired
    finally:
        learner.data, learner.num_batches = kept
    learner.stop_if_requested()


def left_alone(learner: Learner, phase: Phase, source: Any) -> AbstractContextManager[None]:
    """Keep a phase that only watches from moving a loader's own generators, and workers that others use."""
    if phase.gradients and not learner.streams.prefix:
        return nullcontext()
    others = [other for key, other in vars(learner.data).items() if key != phase.data_key]
    shared = bool(learner.streams.prefix) or any(other is source for other in others)
    return untouched(source, workers_too=shared or phase.data_key == "training")


def feed(learner: Learner, phase: Phase, before_batch: Callable[[], object] = lambda: None) -> Feed:
    """Find the data of a phase.

    Raises:
        DataError: The learner has none under the phase's key.
    """
    key = phase.data_key
    if not key:
        return Feed((), phase.owner, learner.streams)
    if key not in learner.data:
        known = sorted(vars(learner.data))
        raise DataError(
            f"{type(phase).__name__} runs on the {key!r} data, and there is {known or 'no data'}"
            f"{did_you_mean(key, known)}; give it to the learner, data={{{key!r}: ...}}, or to this call"
        )
    return Feed(vars(learner.data)[key], phase.owner, learner.streams, key, before_batch)


@contextmanager
def interruptible(learner: Learner) -> Iterator[None]:
    """Make the first Ctrl+C end the fit after its running step; the second interrupts at once.

    Only in the main thread, and only where nobody else handles the signal.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def request(number: int, frame: object) -> None:
        learner.stop_requested = INTERRUPTED
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
