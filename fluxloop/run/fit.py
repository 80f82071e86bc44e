"""What a learner does when it trains: fit, and run an epoch. Thin methods of `Learner` call these."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, finalize, ref

import torch
from torch.nn.parameter import is_lazy

from fluxloop.checkpoint.checkpoint import meet_phases, take
from fluxloop.checkpoint.folder import find_state
from fluxloop.data.feed import Feed
from fluxloop.data.loaders import load, name_data
from fluxloop.data.loading import is_workers_death, worker_died
from fluxloop.data.passes import untouched
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
    sentence,
    warn_user,
)
from fluxloop.events import CycleBegin, CycleEnd, FitBegin, FitEnd, UpdateBegin, UpdateEnd
from fluxloop.guard.assign import put
from fluxloop.guard.given import as_path
from fluxloop.history import History
from fluxloop.interfaces import Stateful
from fluxloop.loop import check_view
from fluxloop.order.outlook import check_monitors, warn_unseen
from fluxloop.persist.plain import attributes, phase_id
from fluxloop.phase import AbstractValidationPhase, Phase, check_every, check_methods, check_name, is_due
from fluxloop.phases.supervised import TrainingPhase, ValidationPhase
from fluxloop.randomness import preserved
from fluxloop.run.resume import FitScope, check_resumes, nothing
from fluxloop.signals import EXIT_CODE, INTERRUPTED, heeding_signals
from fluxloop.state import State, name_of

if TYPE_CHECKING:
    from fluxloop.callback import Callback
    from fluxloop.interfaces import RunLearner


UPDATE_EVENTS = (UpdateBegin, UpdateEnd)


def fit(
    learner: RunLearner,
    epochs: int,
    data: Any,
    phases: Iterable[Phase] | None,
    resume: Any,
    steps_per_epoch: int | None,
) -> History:
    """Run `epochs` cycles through `phases`; see `Learner.fit`."""
    epochs = _count(epochs)
    if steps_per_epoch is not None and (type(steps_per_epoch) is not int or steps_per_epoch < 1):
        raise ValueError(f"fit(steps_per_epoch={steps_per_epoch!r}) was asked for; expected 1 or more, or None")
    if learner._running.fitting:
        raise ReentrantFitError(
            "fit was called while this learner is fitting; wait until it returns, or run learner.epoch(phase) "
            "for a further epoch inside"
        )
    kept, undo = learner.data, nothing
    put(learner, "data", kept if data is None else name_data(data))
    try:
        if isinstance(phases, (Phase, type)):
            name = phases.__name__ if isinstance(phases, type) else type(phases).__name__
            raise PhaseError(f"phases={describe(phases)} was given; expected a list of instances: phases=[{name}()]")
        if phases is not None and not isinstance(phases, Iterable):
            raise PhaseError(f"phases={describe(phases)} was given; expected a list of instances: [TrainingPhase()]")
        chosen = list(phases) if phases is not None else default_phases(learner.data)
        for phase in chosen:
            check_phase(phase)
        check_names(learner, chosen)
        for phase in chosen:
            check_runs(learner, phase)
            feed(learner, phase).check()
            if phase.gradients:
                learner.meet_parameters()
        check_monitors(learner, chosen)
        folder = None if resume is None else as_path("fit", "resume", resume, CheckpointError)
        state = None if folder is None else find_state(folder)
        if state is not None:
            feeds = [feed(learner, phase) for phase in chosen]
            check_resumes(learner, state, epochs, chosen, feeds, steps_per_epoch)
            undo = _take_up(learner, state, chosen)
        else:
            meet_phases(learner, chosen)
        until = epochs if resume is not None else learner.history.cycles + epochs
        reason = None if state is None else learner.history.stop_reason
        if reason is not None:
            until = 0
            warn_user(
                f"this run has already stopped: "
                f"{sentence(reason)} Nothing is trained. To train further: learner.load(file), "
                "then learner.fit(epochs), in a folder and with logs of its own"
            )
        if state is None:
            learner.updates.drop_waiting("a fit begins")
        _tell_bad_weights(learner)
        learner._running.fitting, learner.fit_phases, learner.num_epochs = True, tuple(chosen), until
        learner._running.resume_from = resume if state is None else None
        with preserved() if state is not None else nullcontext():
            scope = FitScope(learner, chosen, steps_per_epoch, state, undo)
            state, undo = None, nothing  # the scope has them, until it has come to where the state was written
            with _alone_in_process():
                return _run(learner, scope, until, reason)
    finally:
        if learner._running.fitting:
            learner._running.safe_points.clear()
        learner._running.fitting, learner._running.stop_requested = False, None
        learner.fit_phases, learner.num_epochs, learner._running.resume_from = (), None, None
        put(learner, "data", kept)


def _take_up(learner: RunLearner, state: dict[str, Any], phases: list[Phase]) -> Callable[[], None]:
    """Put the state of a checkpoint in place for phases that are about to run; return what undoes it."""
    known = learner._ledger.phases
    meet_phases(learner, phases)
    try:
        return take(learner, state, begun=False)
    except BaseException:
        learner._ledger.phases = known
        raise


_threads: list[int] = []
"""The threads in which fits are running, by their numbers."""


@contextmanager
def _alone_in_process() -> Iterator[None]:
    """Warn where a fit runs in another thread: the random generators are the process's."""
    thread = threading.get_ident()
    if any(other != thread for other in _threads):
        warn_user(
            "a fit is running in another thread of this process. All threads share the global random generators, "
            "so that neither run is reproducible from its seed, nor resumes to the bit; expected one fit at a time, or "
            "a process for each"
        )
    _threads.append(thread)
    try:
        yield
    finally:
        _threads.remove(thread)


def _tell_bad_weights(learner: RunLearner) -> None:
    """Warn of weights that are not finite before anything is trained: their losses would not be either."""
    names = [
        (name, parameter)
        for parameter, name in learner.updates.names.items()
        if not is_lazy(parameter) and (parameter.is_floating_point() or parameter.is_complex())
    ]
    if not names:
        return
    fine = [parameter.detach().isfinite().all() for _, parameter in names]
    if not torch.stack([each.to(fine[0].device) for each in fine]).all().item():
        bad = [name for (name, _), good in zip(names, fine, strict=True) if not good]
        warn_user(
            f"weights are not finite before the first step: {', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}; was "
            "the model initialised, and were its weights read from a good file?"
        )


def _run(learner: RunLearner, scope: FitScope, until: int, reason: str | None) -> History:
    """Run a fit that nothing speaks against, until so many cycles are complete."""
    history = learner.history
    began, history.stop_reason = history.cycles, reason
    error: BaseException | None = None
    scope.open()
    with heeding_signals(learner) as terminates:
        try:
            with scope.noting("fit"):
                scope.handle(FitBegin(scope.goes_on))
            if learner._running.resume_from is not None:
                _tell_unkept(learner._running.resume_from)
            scope.put_again("fit" if history.cycles < until else "end")
            history.stop_reason = reason
            scope.pass_safe_point()
            while history.cycles < until:
                with scope.noting("cycle"):
                    scope.handle(CycleBegin(scope.goes_on))
                scope.put_again("cycle")
                while scope.index < len(scope.phases):
                    phase = scope.phases[scope.index]
                    if scope.is_under_way or is_due(phase, history.cycles + 1, until):
                        run_epoch(learner, phase, scope=scope)
                        scope.ended()
                        scope.pass_safe_point()
                    else:
                        scope.index += 1
                scope.index = 0
                history.cycles += 1
                scope.handle(CycleEnd())
                scope.pass_safe_point()
        except CancelFittingException as cancel:
            history.stop_reason = cancel.reason or "cancelled"
        except KeyboardInterrupt:
            history.stop_reason = INTERRUPTED
        except BaseException as failure:
            if learner._running.stop_requested and "DataLoader worker" in str(failure):
                # the signal reached the workers too, and ended them
                history.stop_reason = learner._running.stop_requested
            else:
                error = failure
        error = _finish(scope, history, error)
    if error is not None:
        try:
            raise error
        finally:
            del error  # it holds this frame, and would live, with the loader's workers, until garbage is collected
    if terminates.came:
        raise SystemExit(EXIT_CODE)
    if history.cycles > began and history.stop_reason is None:
        warn_unseen(learner)
    return history


def _tell_unkept(given: Any) -> None:
    """Warn of a run that begins where it was to be resumed, and that nobody keeps there."""
    warn_user(
        f"resume={str(given)!r} was given, but no Checkpointer is among the callbacks: nothing is written there; add "
        f"Checkpointer({str(given)!r})"
    )


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


def default_phases(sources: State) -> list[Phase]:
    """Return the phases of a plain fit: training, and validation where there is data for it."""
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
    check_name(phase)
    check_methods(type(phase))
    if isinstance(phase, AbstractValidationPhase):
        check_every(phase)


def check_names(learner: RunLearner, phases: Iterable[Phase]) -> None:
    """Raise for phases whose numbers could not be told apart, from each other's and from those that have run.

    Two phases of one name are the same phase: of one class, and one instance where they have something of their own
    and only watch. Two that have nothing of their own may both stand in a cycle, as one instance given twice may.

    Raises:
        PhaseError: Says which, and where to name them.
    """
    counts = vars(learner.cbstate).get("history")
    seen: dict[str, Phase] = {}
    for phase in phases:
        name = name_of(phase)
        if name in learner.data and name != phase.data_key:
            raise PhaseError(
                f"{phase!r} is called {name!r}, as some data of the learner is, on which it does not run; expected "
                "another name, so that 'validation/loss' is that of the data"
            )
        other = seen.setdefault(name, phase)
        former: Any = other if other is not phase else None if counts is None else counts.key(name)
        if former is None:
            continue
        if phase_id(former) != phase_id(phase):
            raise PhaseError(
                f"two phases are called {name!r}: {phase_id(former)} and {phase_id(phase)}; their numbers would be one "
                f"series. Give one a name of its own, in the class or when it is made: name = '{name.lower()}2'"
            )
        if other is not phase and not phase.gradients and (attributes(phase) or attributes(other)):
            raise PhaseError(
                f"a cycle has two phases that are called {name!r}, {other!r} and {phase!r}, whose numbers would be one "
                f"series. Give each a name of its own before the fit, phase.name = '{name.lower()}2', or "
                "give one of them twice where one series is meant"
            )


class _PerLearner:
    """The states of a phase by learner, and the one that a new learner begins with."""

    def __init__(self, phase: Stateful) -> None:
        self.first = copy.deepcopy(phase.state_dict())
        self.owner: ReferenceType[RunLearner] | None = None
        self.others: WeakKeyDictionary[RunLearner, Any] = WeakKeyDictionary()


_states: dict[int, _PerLearner] = {}
"""By the phase's id, as long as it lives: a phase may be unhashable."""


def bring_state(learner: RunLearner, phase: Stateful) -> None:
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


def check_runs(learner: RunLearner, phase: Phase) -> None:
    """Raise what keeps a learner from running a phase, before anything is changed."""
    check_phase(phase)
    check_view(learner, phase)
    phase.check(learner)
    if learner._compiled is not None:
        learner._compiled.require([type(phase)])
    if isinstance(phase, Stateful):
        bring_state(learner, phase)


def run_epoch(learner: RunLearner, phase: Phase, data: Any = None, scope: FitScope | None = None) -> None:
    """Run one epoch of a phase, of a fit's cycle where there is one; see `Learner.epoch`."""
    check_runs(learner, phase)
    check_names(learner, [phase])
    if not learner._running.fitting:
        meet_phases(learner, [phase])
    kept, outer = learner.data, (learner.num_batches, learner._running.phase)
    learner._running.phase = phase
    if data is not None:
        key = phase.data_key or ("training" if phase.gradients else "")  # shuffled where it trains
        put(learner, "data", State({**vars(learner.data), phase.data_key: load(data, key)}))
    try:
        # an epoch inside another one does not end for a stop that was asked for: the outer one does, after it
        batches = feed(learner, phase, scope.pass_safe_point if scope is not None else lambda: None)
        if data is not None:
            batches.name = "given"
        batches.check()
        if phase.gradients:
            learner.meet_parameters()
        learner.phases[type(phase)] = phase
        if scope is not None:
            scope.take(batches)
            learner._ledger.begun_data.add(phase.data_key)
        learner.num_batches = batches.num_batches
        goes_on = scope is not None and scope.goes_on
        stood = learner.updates.standing() if phase.gradients and not goes_on else None
        steps = None if goes_on else learner.streams[phase.step_stream].index
        with preserved(), left_alone(learner, phase, batches.source):
            phase.epoch(learner, batches)
        if stood is not None:
            tell_of_updates_by_hand(learner, phase, stood)
        if batches.count and steps == learner.streams[phase.step_stream].index and not learner.streams.prefix:
            _tell_of_no_step(learner, phase, batches.count, stood)
    except CancelEpochException:
        pass  # raised by a handler of EpochBegin, after EpochEnd was fired
    except RuntimeError as error:
        if not is_workers_death(error):
            raise
        raise worker_died(error) from error
    finally:
        put(learner, "data", kept)
        learner.num_batches, learner._running.phase = outer


def _tell_of_no_step(learner: RunLearner, phase: Phase, batches: int, stood: tuple[int, int] | None) -> None:
    """Warn where the steps of a phase fired no event and trained nothing."""
    if type(phase).epoch is Phase.epoch and (stood is None or learner.updates.standing() == stood):
        warn_user(
            f"{phase!r} was given {batches} batches and did no step with them: no event was fired, and nothing was "
            "counted or recorded. Expected runstep in its step:\n"
            "    with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):\n"
            "        ..."
        )


def tell_of_updates_by_hand(learner: RunLearner, phase: Phase, stood: tuple[int, int]) -> None:
    """Warn once where a phase steps its optimizers by hand, and callbacks wait for updates that nobody tells them of.

    Args:
        learner: The learner.
        phase: The phase, after an epoch.
        stood: Where the updates stood before it.
    """
    count, changes = learner.updates.standing()
    if count != stood[0] or changes == stood[1] or phase.name in learner.updates.told_by_hand:
        return
    heard = {id for event in UPDATE_EVENTS for *_, id in learner.callbacks.table(type(phase))[event]}
    deaf = [node.id for node in learner.callbacks.graph.nodes if node.id in heard and needs_updates(node.callback)]
    if deaf:
        learner.updates.told_by_hand.add(phase.name)
        warn_user(
            f"{phase!r} changed weights and made no update through the learner, so {', '.join(deaf)} heard of none: "
            "what acts at UpdateBegin and UpdateEnd hears of learner.update() alone. Call it instead of "
            "optimizer.step(), and learner.update(closure=closure) instead of optimizer.step(closure)"
        )


def needs_updates(callback: Callback) -> bool:
    """Tell whether a callback acts at updates in particular.

    The default ones only count them, or look at gradients; `EMA` sees those made by hand from the weights.
    """
    inner = callback.unwrapped
    others = {"Recorder", "StopOnNaNLoss", "EMA"} & {cls.__name__ for cls in type(inner).__mro__}
    named = any(event in UPDATE_EVENTS for event, _ in callback.handles())
    return named and not others and getattr(inner, "unit", "step") != "epoch"


def left_alone(learner: RunLearner, phase: Phase, source: Any) -> AbstractContextManager[None]:
    """Keep a phase that only watches from moving a loader's own generators, and workers that others use."""
    if phase.gradients and not learner.streams.prefix:
        return nullcontext()
    others = [other for key, other in vars(learner.data).items() if key != phase.data_key]
    shared = bool(learner.streams.prefix) or any(other is source for other in others)
    return untouched(source, workers_too=shared or phase.data_key == "training")


OTHER_NAMES = {"training": ("train",), "validation": ("valid", "val", "dev", "eval")}
"""What data sets elsewhere call the data of a phase."""


def _where_it_is(key: str, known: list[str]) -> str:
    """Say which of the data may be what a phase runs on, where one's name is near or usual elsewhere."""
    near = did_you_mean(key, known)
    other = next((name for name in OTHER_NAMES.get(key, ()) if name in known), None)
    if other is None or key in near:
        return near
    return f"; did you mean {other!r}? Then say so: data={{{key!r}: data[{other!r}]}}"


def feed(learner: RunLearner, phase: Phase, before_batch: Callable[[], object] = lambda: None) -> Feed:
    """Find the data of a phase; one that names none gets what was given to its epoch, or the only data there is.

    Raises:
        DataError: The learner has none under the phase's key.
    """
    key = phase.data_key
    if not key:
        keys = list(vars(learner.data))
        if "" not in keys and len(keys) != 1:
            if type(phase).epoch is not Phase.epoch:
                return Feed((), phase.owner, learner.streams)
            raise DataError(
                f"{type(phase).__name__} does not say which data it runs on, and there is {sorted(keys) or 'no data'}; "
                f"say so in the class: data_key = {(keys or ['training'])[0]!r}, or give it data: "
                "learner.epoch(phase, data)"
            )
        key = "" if "" in keys else keys[0]
        return Feed(
            vars(learner.data)[key],
            phase.owner,
            learner.streams,
            key or "given",
            before_batch,
            learner._ledger.told_lengths,
        )
    if key not in learner.data:
        known = sorted(vars(learner.data))
        raise DataError(
            f"{type(phase).__name__} runs on the {key!r} data, and there is {known or 'no data'}; "
            f"give it to the learner, data={{{key!r}: ...}}, or to this call{_where_it_is(key, known)}"
        )
    return Feed(vars(learner.data)[key], phase.owner, learner.streams, key, before_batch, learner._ledger.told_lengths)
