"""What a learner does when it trains: fit, and run an epoch. Thin methods of `Learner` call these."""

from __future__ import annotations

import copy
import operator
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from fluxloop.data import load, name_data
from fluxloop.errors import (
    CancelEpochException,
    CancelFittingException,
    DataError,
    PhaseError,
    ReentrantFitError,
    annotate,
    describe,
    did_you_mean,
)
from fluxloop.events import CycleBegin, CycleEnd, FitBegin, FitEnd
from fluxloop.feed import Feed, untouched
from fluxloop.history import History
from fluxloop.loop import Scope, check_view
from fluxloop.phase import FittingPhase, Phase, Stateful
from fluxloop.phases.supervised import TrainingPhase, ValidationPhase
from fluxloop.randomness import preserved
from fluxloop.state import State

if TYPE_CHECKING:
    from fluxloop.learner import Learner

INTERRUPTED = "interrupted (Ctrl+C)"


class FitScope(Scope):
    """A running fit."""

    __slots__ = ()

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner, FittingPhase())


def fit(learner: Learner, epochs: int, data: Any, phases: Iterable[Phase] | None) -> History:
    """Run `epochs` cycles through `phases`; see `Learner.fit`."""
    epochs = _count(epochs)
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
        learner.fitting = True
        return _run(learner, epochs, chosen)
    finally:
        learner.data, learner.fitting, learner.stop_requested = kept, False, None


def _run(learner: Learner, epochs: int, phases: list[Phase]) -> History:
    """Run a fit that nothing speaks against."""
    scope = FitScope(learner)
    history = learner.history
    history.stop_reason = None
    error: BaseException | None = None
    scope.open()
    with interruptible(learner):
        try:
            scope.handle(FitBegin())
            for _ in range(epochs):
                scope.handle(CycleBegin())
                for phase in phases:
                    run_epoch(learner, phase)
                history.cycles += 1
                scope.handle(CycleEnd())
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
        raise error
    return history


def _finish(scope: FitScope, history: History, error: BaseException | None) -> BaseException | None:
    """Fire `FitEnd` and undo what was deferred; give the error that leaves the fit, if any."""
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


class _Kept:
    """The states of a phase by learner, and the one that a new learner begins with."""

    def __init__(self, phase: Stateful) -> None:
        self.first = copy.deepcopy(phase.state_dict())
        self.owner: ReferenceType[Learner] | None = None
        self.others: WeakKeyDictionary[Learner, Any] = WeakKeyDictionary()


_states: WeakKeyDictionary[Stateful, _Kept] = WeakKeyDictionary()


def bring_state(learner: Learner, phase: Stateful) -> None:
    """Have a phase that keeps something between steps go on from what it kept for this learner.

    In a second learner it begins as it did in the first.
    """
    kept = _states.get(phase)
    if kept is None:
        kept = _states[phase] = _Kept(phase)
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


def run_epoch(learner: Learner, phase: Phase, data: Any = None) -> None:
    """Run one epoch of a phase; see `Learner.epoch`."""
    check_runs(learner, phase)
    kept = learner.data, learner.num_batches
    if data is not None:
        learner.data = State({**vars(learner.data), phase.data_key: load(data, phase.data_key)})
    try:
        batches = feed(learner, phase)
        batches.check()
        if phase.gradients:
            learner.updates.check_owned()
        learner.num_batches = batches.num_batches
        learner.phases[type(phase)] = phase
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


def feed(learner: Learner, phase: Phase) -> Feed:
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
    return Feed(vars(learner.data)[key], phase.owner, learner.streams, key, learner.stop_if_requested)


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
