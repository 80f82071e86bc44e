"""A fit: cycles through phases, until it is complete, cancelled, interrupted or fails."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fluxloop.checkpoint.folder import find_state
from fluxloop.checkpoint.restoring import meet_phases, restore
from fluxloop.compute.models import state_of_models
from fluxloop.compute.unused import UnusedParameters
from fluxloop.data.loaders import name_data
from fluxloop.errors import (
    CancelFittingException,
    CheckpointError,
    PhaseError,
    ReentrantFitError,
    annotate,
    counted,
    describe,
    sentence,
    warn_user,
)
from fluxloop.events import CycleBegin, CycleEnd, FitBegin, FitEnd
from fluxloop.guard.assign import put
from fluxloop.guard.given import as_path, is_number
from fluxloop.history import History
from fluxloop.order.outlook import check_monitors, warn_unseen
from fluxloop.phase import Phase, is_due
from fluxloop.processes.replicas import check_alike, check_asked_alike, send, whole
from fluxloop.randomness import preserved
from fluxloop.run.epoch import feed, run_epoch, watching
from fluxloop.run.phases import check_names, check_phase, check_runs, default_phases
from fluxloop.run.scope import FitScope, nothing
from fluxloop.screen.bars import tell
from fluxloop.signals import EXIT_CODE, INTERRUPTED, heeding_signals
from fluxloop.state import name_of

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


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
    if steps_per_epoch is not None and (not is_number(steps_per_epoch, whole=True) or steps_per_epoch < 1):
        raise ValueError(f"fit(steps_per_epoch={steps_per_epoch!r}) was asked for; expected 1 or more, or None")
    if learner._running.fitting:
        raise ReentrantFitError(
            "fit was called while this learner is fitting; wait until it returns, or run learner.epoch(phase) "
            "for a further epoch inside"
        )
    saved, undo = learner.data, nothing
    put(learner, "data", saved if data is None else name_data(data))
    try:
        chosen = _checked(learner, phases)
        folder = None if resume is None else as_path("fit", "resume", resume, CheckpointError)
        state = None if folder is None else find_state(folder)
        if folder is not None:
            learner.accelerator.wait()  # before the first process writes there: all have to have found the same
        if state is not None:
            undo = _restore(learner, state, epochs, chosen, steps_per_epoch)
        else:
            meet_phases(learner, chosen)
        # With resume= epochs count from the beginning of the run: the same command, given again, trains nothing more
        until = epochs if resume is not None else learner.history.cycles + epochs
        reason = None if state is None else learner.history.stop_reason
        if reason is not None:
            until = 0
            _warn_of_stopped(reason)
        if state is None:  # else the gradients that wait are those of the run that goes on
            learner.updates.drop_waiting("a fit begins")
        _warn_of_bad_weights(learner)
        learner._running.fitting, learner.fit_phases, learner.num_epochs = True, tuple(chosen), until
        learner._running.resume_from = resume if state is None else None
        # The scope of a resumed fit puts the global generators where they stood in the former process; after the fit
        # they are the script's again.
        with preserved() if state is not None else nullcontext():
            scope = FitScope(learner, chosen, steps_per_epoch, state, undo)
            state, undo = None, nothing  # the scope has them, and frees them once it has come to where that was written
            with _alone_in_process():
                return _run(learner, scope, until, reason)
    finally:
        if learner._running.fitting:  # a fit that was refused leaves them to the next one
            learner._running.safe_points.clear()
        learner._running.fitting = False
        learner._running.stop_requested = learner._running.wish = None
        learner.fit_phases, learner.num_epochs, learner._running.resume_from = (), None, None
        put(learner, "data", saved)


def _checked(learner: RunLearner, phases: Iterable[Phase] | None) -> list[Phase]:
    """Return the phases of a fit after all that can be checked before it.

    Raises:
        PhaseError: Something is no phase, or cannot run this model.
        DataError: A phase has no data.
        OptimizerError: Trainable parameters are in no optimizer.
        MetricError: A callback watches what the fit will not record.
    """
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
    return chosen


def _restore(
    learner: RunLearner, state: dict[str, Any], epochs: int, phases: list[Phase], steps_per_epoch: int | None
) -> Callable[[], None]:
    """Restore a learner and its phases from the state of a checkpoint, for a fit that resumes; return what undoes it.

    Raises:
        CheckpointError: The fit is not the one that was interrupted; nothing is changed.
    """
    from fluxloop.run.resume import check_resumes

    feeds = [feed(learner, phase) for phase in phases]
    check_resumes(learner, state, epochs, phases, feeds, steps_per_epoch)
    known = learner._ledger.phases
    meet_phases(learner, phases)
    try:
        return restore(learner, state, begun=False)
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


def _warn_of_bad_weights(learner: RunLearner) -> None:
    """Warn of weights that are not finite before anything is trained: their losses would not be either."""
    names = [
        (name, parameter)
        for parameter, name in learner.updates.names.items()
        if not is_lazy(parameter) and (parameter.is_floating_point() or parameter.is_complex())
    ]
    if not names:
        return
    # One number for all of them: each item() waits for the device
    fine = [parameter.detach().isfinite().all() for _, parameter in names]
    if not torch.stack([each.to(fine[0].device) for each in fine]).all().item():
        bad = [name for (name, _), good in zip(names, fine, strict=True) if not good]
        warn_user(
            f"weights are not finite before the first step: {', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}; was "
            "the model initialised, and were its weights read from a good file?"
        )


@contextmanager
def _together(learner: RunLearner) -> Iterator[None]:
    """Have a fit end on all processes, where it is cancelled or fails on one of those that train together."""
    group = learner.accelerator.group
    if group is None:
        yield
        return
    with group.watching(), group.agreement.ending(learner):
        yield


def _check_alike(learner: RunLearner, scope: FitScope, until: int) -> None:
    """Raise where the processes are about to run different fits, or have different weights; make their buffers equal.

    Args:
        learner: The learner.
        scope: The fit.
        until: How many cycles are to be complete at its end.

    Raises:
        ProcessError: Names what differs.
    """
    group = learner.accelerator.group
    if group is not None:
        asked = {
            "complete epochs": learner.history.cycles,
            "epochs in all": until,
            "steps_per_epoch": scope.steps_per_epoch,
            "phases": [f"{name_of(phase)}, every={getattr(phase, 'every', 1)}" for phase in scope.phases],
        }
        check_asked_alike(group, asked)
        named = state_of_models(learner.models, learner.loss_fn)
        check_alike(group, [(name, tensor) for name, tensor in named if isinstance(tensor, nn.Parameter)])
        send(group, whole(tensor for _, tensor in named if not isinstance(tensor, nn.Parameter)))


def _warn_of_stopped(reason: str) -> None:
    """Warn of a run that is to be resumed and has stopped for a reason."""
    warn_user(
        f"this run has already stopped: {sentence(reason)} Nothing is trained. To train further: learner.load(file), "
        "then learner.fit(epochs), in a folder and with logs of its own"
    )


def _warn_of_unwritten(folder: Any) -> None:
    """Warn of a run that begins where it was to be resumed, and of which nobody writes checkpoints there."""
    warn_user(
        f"resume={str(folder)!r} was given, but no Checkpointer is among the callbacks: nothing is written there; add "
        f"Checkpointer({str(folder)!r})"
    )


def _run(learner: RunLearner, scope: FitScope, until: int, reason: str | None) -> History:
    """Run a fit whose arguments were checked.

    Args:
        learner: The learner.
        scope: The fit.
        until: How many cycles are to be complete at its end.
        reason: Why the run that is resumed has stopped, if it has.
    """
    history = learner.history
    began, history.stop_reason = history.cycles, reason
    error: BaseException | None = None
    scope.open()
    with heeding_signals(learner) as terminates, watching(learner):
        try:
            with _together(learner):  # an error is told to other processes before FitEnd
                _check_alike(learner, scope, until)
                with scope.noting("fit"):
                    scope.handle(FitBegin(scope.is_resuming))
                if learner._running.resume_from is not None:
                    _warn_of_unwritten(learner._running.resume_from)
                scope.restore("fit" if history.cycles < until else "end")
                history.stop_reason = reason
                scope.pass_safe_point()
                _run_cycles(learner, scope, until)
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
        error = _end(scope, history, error)  # still heeding signals: a SIGTERM leaves time for the last checkpoint
    if error is not None:
        try:
            raise error
        finally:
            del error  # it holds this frame, and would live, with the loader's workers, until garbage is collected
    if _are_terminated(learner, terminates.came):
        _tell_of_end(learner, until)
        raise SystemExit(EXIT_CODE)
    if history.cycles > began and history.stop_reason is None:  # one that ended early may not have come to it
        warn_unseen(learner)
    return history


def _are_terminated(learner: RunLearner, came: bool) -> bool:
    """Return whether SIGTERM came, to this process or another of those that train together: all of them end then.

    It waits for the others, so that the first process has written what is read next.

    Raises:
        ProcessError: Another process has failed; names it.
    """
    group = learner.accelerator.group
    if group is None:
        return came
    with group.watching():
        return bool(group.all_reduce(torch.tensor(float(came), device=group.device), "max").item())


def _tell_of_end(learner: RunLearner, until: int) -> None:
    """Say, where a SIGTERM has ended a run, how far that has come, and from where it goes on."""
    if not learner.accelerator.is_main:
        return
    from fluxloop.callbacks.checkpointer import Checkpointer  # here, so that a learner without one does not load it

    history, kept = learner.history, learner.callbacks.get(Checkpointer)
    line = (
        f"fluxloop: a SIGTERM ended the fit after {history.cycles} of {counted(until, 'epoch')} and "
        f"{counted(history.trained_steps, 'training step')}"
    )
    if isinstance(kept, Checkpointer) and kept.last is not None:
        tell(f"{line}; the same command goes on from there: fit({until}, resume={str(kept.folder)!r})")
    else:
        tell(f"{line}; no Checkpointer was among the callbacks, so that nothing of it is kept")


def _run_cycles(learner: RunLearner, scope: FitScope, until: int) -> None:
    """Run cycles through the phases until so many are complete, those of a resumed run among them."""
    history = learner.history
    unused = UnusedParameters(learner.updates, [phase.name for phase in scope.phases if phase.gradients])
    while history.cycles < until:
        with scope.noting("cycle"):
            scope.handle(CycleBegin(scope.is_resuming))
        scope.restore("cycle")
        if not scope.is_resuming:  # else what is restored in the middle of it changes all parameters
            unused.begin_cycle()
        while scope.index < len(scope.phases):
            phase = scope.phases[scope.index]
            # An epoch under way goes on: it was due in the former process, whose fit may have had another last cycle
            if scope.is_in_epoch or is_due(phase, history.cycles + 1, until):
                run_epoch(learner, phase, scope=scope)
                unused.end_epoch(phase.name)
                scope.ended()
                scope.pass_safe_point()
            else:
                scope.index += 1
        unused.end_cycle(learner.accelerator.is_main)
        scope.index = 0
        history.cycles += 1
        scope.handle(CycleEnd())
        scope.pass_safe_point()


def _end(scope: FitScope, history: History, error: BaseException | None) -> BaseException | None:
    """Fire `FitEnd` and undo what was deferred; return the error that leaves the fit, if any."""
    scope.cut = scope.feed is not None  # from here on no state names a place in the epoch that was cut
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
            scope.pass_last_safe_point()
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
