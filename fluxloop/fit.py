"""What a learner does: fit, run an epoch, evaluate, predict. Thin methods of `Learner` call these."""

from __future__ import annotations

import operator
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fluxloop.callback import Callback, on
from fluxloop.callbacks.metrics import Metrics
from fluxloop.callbacks.progress import ProgressBar
from fluxloop.callbacks.recorder import Recorder
from fluxloop.data import Feed, as_dataloader
from fluxloop.errors import (
    CancelEpochException,
    CancelFittingException,
    CancelSignal,
    DataError,
    PhaseError,
    ReentrantFitError,
    annotate,
    describe,
    did_you_mean,
)
from fluxloop.events import CycleBegin, CycleEnd, FitBegin, FitEnd, StepEnd
from fluxloop.history import History
from fluxloop.loop import Scope
from fluxloop.nested import concatenate, map_tensors
from fluxloop.phase import FittingPhase, Phase
from fluxloop.phases.supervised import PredictionPhase, TrainingPhase, ValidationPhase
from fluxloop.randomness import Streams
from fluxloop.runner import Callbacks
from fluxloop.state import SharedState, State, StepState

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
    sources = learner.data if data is None else name_data(data)
    chosen = list(phases) if phases is not None else _default_phases(sources)
    for phase in chosen:
        check_phase(phase)
        phase.check(learner)
        feed(learner, phase, None, sources).check()

    scope = FitScope(learner)
    history = learner.history
    history.stop_reason = None
    error: BaseException | None = None
    learner.fitting = True
    scope.open()
    with interruptible(learner):
        try:
            scope.handle(FitBegin())
            for _ in range(epochs):
                scope.handle(CycleBegin())
                for phase in chosen:
                    run_epoch(learner, phase, None, sources)
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
    learner.fitting = False
    learner.stop_requested = None
    if error is not None:
        raise error
    return history


def _finish(scope: FitScope, history: History, error: BaseException | None) -> BaseException | None:
    """Fire `FitEnd` and undo what was deferred; give the error that leaves the fit, if any."""
    try:
        scope.handle(FitEnd(history.stop_reason, error))
    except CancelSignal as cancel:
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


def run_epoch(learner: Learner, phase: Phase, data: Any, sources: State | None = None) -> None:
    """Run one epoch of a phase; see `Learner.epoch`."""
    check_phase(phase)
    phase.check(learner)
    batches = feed(learner, phase, data, learner.data if sources is None else sources)
    batches.check()
    outer = learner.num_batches
    learner.num_batches = batches.num_batches
    learner.phases[type(phase)] = phase
    try:
        phase.epoch(learner, batches)
    except CancelEpochException:
        pass  # raised by a handler of EpochBegin, after EpochEnd was fired
    finally:
        learner.num_batches = outer
    if learner.stop_requested:  # by Ctrl+C, in a phase that has no steps to look at it
        learner.stop()


def feed(learner: Learner, phase: Phase, data: Any, sources: State) -> Feed:
    """Find the data of a phase.

    Raises:
        DataError: None was given, and the learner has none under the phase's key.
    """
    key = phase.data_key
    if data is not None:
        source = as_dataloader(data)
    elif key in sources:
        source = vars(sources)[key]
    else:
        known = sorted(vars(sources))
        raise DataError(
            f"{type(phase).__name__} runs on the {key!r} data, and there is {known or 'no data'}"
            f"{did_you_mean(key, known)}; give it to the learner, data={{{key!r}: ...}}, or to this call"
        )
    return Feed(source, key or type(phase).__name__, learner.streams)


def name_data(data: Any) -> State:
    """Name what was given as data: ``(train,)``, ``(train, valid)``, a mapping, or training data alone.

    What holds rows becomes a loader with batches of 32, shuffled for ``"training"``.

    Raises:
        DataError: A tuple of another length, or something that cannot be loaded.
    """
    if isinstance(data, dict):
        named = dict(data)
    elif isinstance(data, tuple):
        if len(data) > 2:
            raise DataError(
                f"data is a tuple of {len(data)}; expected (train,), (train, valid), or a mapping of names to "
                "data. For two tensors per row write data=((xs, ys), (valid_xs, valid_ys))"
            )
        named = dict(zip(("training", "validation"), data, strict=False))
    else:
        named = {"training": data}
    for key, source in named.items():
        if not isinstance(key, str):
            raise DataError(f"data has the key {key!r}; expected a name such as 'training'")
        try:
            named[key] = as_dataloader(source, shuffle=key == "training" and holds_rows(source))
        except DataError as error:
            annotate(error, f"fluxloop: while loading data[{key!r}]")
            raise
    return State(named)


def holds_rows(source: Any) -> bool:
    """Tell whether `source` holds rows in a known order, to be cut into batches and shuffled."""
    from torch.utils.data import Dataset, IterableDataset

    if isinstance(source, Dataset):
        return not isinstance(source, IterableDataset)
    return isinstance(source, (tuple, dict)) or hasattr(source, "__array__")


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


@contextmanager
def aside(learner: Learner, owner: str, callbacks: list[Callback]) -> Iterator[None]:
    """Run something with callbacks, history and random numbers of its own; put the learner's back after.

    So that evaluation and prediction leave no trace: what the training sees is as before.
    """
    kept = learner.callbacks, learner.cbstate, learner.history, learner.streams, learner.step
    try:
        learner.cbstate = SharedState()
        learner.history = History(learner.cbstate, learner.seed)
        learner.streams = Streams(learner.seed, prefix=f"{owner}/")
        learner.step = StepState()
        learner.callbacks = Callbacks(learner)
        learner.callbacks.set(callbacks)
        yield
    finally:
        learner.callbacks, learner.cbstate, learner.history, learner.streams, learner.step = kept


def _bar(learner: Learner) -> list[Callback]:
    """Make a progress bar like the learner's, if it has one."""
    bar = learner.callbacks.get(ProgressBar)
    return [ProgressBar(bar.enabled, bar.interval, bar.file)] if isinstance(bar, ProgressBar) else []


def evaluate(learner: Learner, data: Any, metrics: Iterable[Any] | None, phase: Phase | None) -> dict[str, float]:
    """Compute metrics over one epoch of a validation phase; see `Learner.evaluate`."""
    phase = ValidationPhase() if phase is None else phase
    own = learner.callbacks.get(Metrics)
    chosen = own.metrics if metrics is None and isinstance(own, Metrics) else list(metrics or ())
    with aside(learner, "evaluate", [Recorder(), Metrics(*chosen), *_bar(learner)]):
        run_epoch(learner, phase, data)
        series = learner.history.metrics[phase]
    return {name: values[-1] for name, values in series.items()}


class _Collect(Callback):
    """Collect the predictions of each step on the host."""

    reads = ("step.preds",)
    draws = False

    def __init__(self) -> None:
        self.parts: list[Any] = []

    @on(StepEnd)
    def collect(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.parts.append(map_tensors(lambda tensor: tensor.detach().cpu(), learner.step.preds))


def predict(learner: Learner, data: Any, phase: Phase | None) -> Any:
    """Run a phase over data and join its predictions; see `Learner.predict`."""
    collect = _Collect()
    with aside(learner, "predict", [collect, Recorder(), *_bar(learner)]):
        run_epoch(learner, PredictionPhase() if phase is None else phase, data)
    if not collect.parts:
        raise PhaseError(
            f"{phase!r} made no predictions: no step of it ended; expected a phase whose step runs runstep and "
            "stores state.preds"
        )
    return concatenate(collect.parts)
