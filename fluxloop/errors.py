"""The tree of errors and the tree of cancel signals.

Errors say what was given, what was expected and what to type; they also derive from the
built-in exception a caller would expect, so ``except ValueError`` keeps working::

    FluxloopError
    ├── ModelError (TypeError)             the model is no module, or its names are unusable
    ├── OptimizerError (ValueError)        parameters missing, foreign, shared or in two optimizers
    ├── LossError (ValueError)             no loss, not a scalar, no gradient, or it reaches nothing
    ├── DataError (ValueError)             unknown data key, empty data, data of an unusable kind
    │   └── BatchError                     a batch does not have the shape the phase expects
    ├── PhaseError (TypeError)             not a phase, or a phase used where it cannot be
    ├── MetricError (ValueError)           duplicate or unusable metrics
    ├── SanityCheckError (ValueError)      a check before the first step failed
    ├── CompileError (RuntimeError)        a step cannot be compiled whole, as was asked for
    ├── CheckpointError (ValueError)       a checkpoint cannot be written, read or gone on from
    ├── LogExistsError (FileExistsError)   a new run would write into another run's log
    ├── ProcessError (RuntimeError)        another of the processes that train together has failed
    ├── ReentrantFitError (RuntimeError)   ``fit`` inside ``fit`` of the same learner
    ├── AssignmentError (AttributeError)   an attribute that does not exist, or cannot be replaced, was set
    ├── MissingEntryError (AttributeError) the step (or ``cbstate``) does not store this entry
    ├── StateAccessError                   a callback touched what it did not declare
    └── CallbackError
        ├── CallbackTypeError (TypeError)  a class where an instance belongs, or no callback at all
        ├── HandlerError (TypeError)       ``@on`` with something that is no event or phase
        ├── AmbiguousHandlerError          two handlers fit equally well
        ├── DuplicateCallbackError         the same callback twice, or two without distinct names
        ├── CallbackConflictError          two writers of one path without an order
        ├── CallbackCycleError             the declared orders contradict each other
        └── MissingProducerError           a ``cbstate`` entry that nobody writes is read

Signals end a part of the training on purpose. They are raised in a handler or in a phase::

    CancelSignal
    ├── CancelStepException                ends this step; the next one follows
    ├── CancelEpochException               ends this epoch; ``EpochEnd`` still fires
    └── CancelFittingException(reason)     ends the fit, which returns normally
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parent)
"""Where fluxloop's own files lie: messages point at the line of a user's above them."""


class FluxloopError(Exception):
    """Base of every error that fluxloop raises.

    >>> issubclass(ModelError, FluxloopError), issubclass(ModelError, TypeError)  # except TypeError catches it, too
    (True, True)
    """


class ModelError(FluxloopError, TypeError):
    """The model is no module, or its names cannot be used.

    >>> Learner("resnet18")
    Traceback (most recent call last):
    fluxloop.errors.ModelError: model is 'resnet18'; expected a torch.nn.Module
    """


class OptimizerError(FluxloopError, ValueError):
    """The optimizers do not hold exactly the trainable parameters of the models, once each.

    >>> Learner(torch.nn.Linear(2, 1), optimizer=torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1))
    Traceback (most recent call last):
    fluxloop.errors.OptimizerError: the optimizer holds 2 parameters that belong to no model ...
    """


class LossError(FluxloopError, ValueError):
    """There is no loss, it is no scalar, or no gradient can be computed from it.

    >>> Learner(torch.nn.Linear(2, 1), data=((torch.zeros(4, 2), torch.zeros(4, 1)),)).fit(1)  # and no loss
    Traceback (most recent call last):
    fluxloop.errors.LossError: TrainingPhase needs a loss function, and the learner has none; give one: ...
    """


class DataError(FluxloopError, ValueError):
    """The data of a phase is missing, empty or of a kind that cannot be iterated.

    >>> Learner(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss).fit(1)
    Traceback (most recent call last):
    fluxloop.errors.DataError: TrainingPhase runs on the 'training' data, and there is no data; give it to ...
    """


class BatchError(DataError):
    """A batch does not have the structure that the phase expects.

    >>> TrainingPhase().entries(torch.zeros(4, 1))  # as a fit does with each batch
    Traceback (most recent call last):
    fluxloop.errors.BatchError: TrainingPhase was given a Tensor of shape (4, 1) as a batch; expected a pair ...
    """


class PhaseError(FluxloopError, TypeError):
    """Something that is no phase was given, or a phase was used where it cannot be.

    >>> testing.toy_learner().fit(1, phases=[TrainingPhase])
    Traceback (most recent call last):
    fluxloop.errors.PhaseError: the class TrainingPhase was given as a phase; expected an instance: TrainingPhase()
    """


class MetricError(FluxloopError, ValueError):
    """Two metrics share a name, or something given as a metric is none.

    >>> Metrics(accuracy, accuracy)
    Traceback (most recent call last):
    fluxloop.errors.MetricError: two metrics are called 'accuracy'; give one another name: Metric(f, name='...')
    """


class SanityCheckError(FluxloopError, ValueError):
    """A check of the `SanityCheck` callback failed before the first step.

    >>> try:
    ...     testing.toy_learner(SanityCheck(Check("the rate", lambda learner: 1 / 0))).fit(1)
    ... except SanityCheckError as error:
    ...     print(str(error).splitlines()[1])
      error: the rate: division by zero.
    """


class CompileError(FluxloopError, RuntimeError):
    """A step cannot be compiled as one graph: somebody needs a moment inside it, or it cannot be traced.

    >>> testing.toy_learner(CustomCallback(print, BackwardEnd), accelerator=Accelerator("cpu", compile="step"))
    Traceback (most recent call last):
    fluxloop.errors.CompileError: Accelerator(compile="step") makes one graph of a step of TrainingPhase, and this ...
    """


class CheckpointError(FluxloopError, ValueError):
    """A checkpoint cannot be written, is damaged, or belongs to another training.

    >>> testing.toy_learner().load("missing.pt")
    Traceback (most recent call last):
    fluxloop.errors.CheckpointError: missing.pt was given as a checkpoint; expected a file that learner.save wrote
    """


class LogExistsError(FluxloopError, FileExistsError):
    """A new run would write into another run's log, or two backends would write one.

    >>> size = Path("log.csv").write_text("of another run")
    >>> try:
    ...     testing.toy_learner(Recorder(), Metrics(), CSVLogger("log.csv")).fit(1)
    ... except LogExistsError as error:
    ...     print(str(error).split(";")[0])
    CSVLogger('log.csv') would write into an earlier run's log, log.csv
    """


class ProcessError(FluxloopError, RuntimeError):
    """Another of the processes that train together was killed or stopped, has raised, or does not come.

    Args:
        message: What has happened.
        ranks: The numbers of the processes that have failed, as far as they are known.

    >>> ProcessError("process 1 was killed", ranks=[1]).ranks  # as fit raises it in every other process
    (1,)
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class ReentrantFitError(FluxloopError, RuntimeError):
    """``fit`` was called while the same learner was already fitting.

    >>> try:
    ...     testing.toy_learner(CustomCallback(lambda learner: learner.fit(1), EpochEnd)).fit(1)
    ... except ReentrantFitError as error:
    ...     print(str(error).split(";")[0])
    fit was called while this learner is fitting
    """


class AssignmentError(FluxloopError, AttributeError):
    """An attribute was assigned that does not exist, or that cannot be replaced (now).

    >>> testing.toy_learner().model = torch.nn.Linear(1, 1)
    Traceback (most recent call last):
    fluxloop.errors.AssignmentError: learner.model ...
    """


class MissingEntryError(FluxloopError, AttributeError):
    """An entry of the step or of ``cbstate`` was read that nobody has stored.

    >>> testing.toy_learner().step.preds
    Traceback (most recent call last):
    fluxloop.errors.MissingEntryError: The step has no entry 'preds'; it has: nothing. ...
    """


class StateAccessError(FluxloopError):
    """A callback read or wrote a path that it did not declare.

    Args:
        callback: Id of the callback.
        path: The dotted path it touched.
        mode: ``"read"`` or ``"write"``.
        declared: What it declared, as ``(reads, writes)``.

    ``event`` is filled in where the event is known.

    >>> print(StateAccessError("Look", "step.loss", "read"))  # as a handler of Look gets it
    Look tried to read 'step.loss', but declares no such access.
      declared: reads = (), writes = ()
      to allow it, write in the class: reads = ('step.loss',)
    """

    def __init__(
        self,
        callback: str,
        path: str,
        mode: str,
        declared: tuple[Iterable[str], Iterable[str]] = ((), ()),
    ) -> None:
        super().__init__(callback, path, mode)
        self.callback = callback
        self.path = path
        self.mode = mode
        self.declared = (tuple(declared[0]), tuple(declared[1]))
        self.event: str | None = None
        self.advice: str | None = None
        """What to do instead, where no declaration would allow it."""

    def __str__(self) -> str:
        reads, writes = self.declared
        where = f" at {self.event}" if self.event else ""
        name = "reads" if self.mode == "read" else "writes"
        paths = (*(reads if self.mode == "read" else writes), self.path)
        advice = self.advice or f"to allow it, write in the class: {name} = {paths!r}"
        return (
            f"{self.callback} tried to {self.mode} '{self.path}'{where}, but declares no such access.\n"
            f"  declared: reads = {reads!r}, writes = {writes!r}\n"
            f"  {advice}"
        )


class CallbackError(FluxloopError):
    """Base of the errors found when the callbacks of a learner are put in order.

    >>> issubclass(CallbackCycleError, CallbackError), issubclass(StateAccessError, CallbackError)  # not while training
    (True, False)
    """


class CallbackTypeError(CallbackError, TypeError):
    """A class was given where an instance belongs, or something that is no callback.

    >>> testing.toy_learner(EarlyStopping)
    Traceback (most recent call last):
    fluxloop.errors.CallbackTypeError: callbacks[0] is the class EarlyStopping; expected an instance: EarlyStopping(...)
    """


class HandlerError(CallbackError, TypeError):
    """``@on`` was given something that is no event or phase, or a hook has no ``@on``.

    >>> on("StepEnd")
    Traceback (most recent call last):
    fluxloop.errors.HandlerError: @on was given 'StepEnd' as an event; expected an event type, e.g. @on(StepEnd)...
    """


class AmbiguousHandlerError(CallbackError):
    """Two handlers of one callback fit an event and phase equally well.

    >>> class Both(Callback):
    ...     any_event = on(Event, TrainingPhase)(lambda self, event, phase, learner: None)
    ...     any_phase = on(StepEnd, Phase)(lambda self, event, phase, learner: None)
    >>> testing.toy_learner(Both())
    Traceback (most recent call last):
    fluxloop.errors.AmbiguousHandlerError: Both has two handlers that fit (StepEnd, TrainingPhase) equally well: ...
    """


class DuplicateCallbackError(CallbackError, ValueError):
    """The same callback was given twice, or two that nothing tells apart.

    >>> testing.toy_learner(Recorder(), Recorder())
    Traceback (most recent call last):
    fluxloop.errors.DuplicateCallbackError: two Recorder callbacks cannot be told apart: ...
    """


class CallbackConflictError(CallbackError):
    """Two callbacks write the same path and nothing says which goes first.

    >>> scale, shift = (CustomCallback(print, StepBegin, writes=("step.xs",), name=name) for name in ("scale", "shift"))
    >>> testing.toy_learner(scale, shift)
    Traceback (most recent call last):
    fluxloop.errors.CallbackConflictError: scale writes 'step.xs' and shift writes 'step.xs', and nothing says which ...
    """


class CallbackCycleError(CallbackError):
    """The declared orders of some callbacks contradict each other.

    >>> First, Second = type("First", (Callback,), {}), type("Second", (Callback,), {})
    >>> First.run_after, Second.run_after = (Second,), (First,)
    >>> testing.toy_learner(First(), Second())
    Traceback (most recent call last):
    fluxloop.errors.CallbackCycleError: the callbacks cannot be ordered, because these contradict each other: ...
    """


class MissingProducerError(CallbackError):
    """A callback reads a ``cbstate`` entry that no callback writes.

    >>> testing.toy_learner(EarlyStopping(3))  # without the default callbacks
    Traceback (most recent call last):
    fluxloop.errors.MissingProducerError: EarlyStopping reads 'cbstate.metrics', which no callback writes; ...
    """


class CancelSignal(Exception):  # noqa: N818 - a signal, not an error
    """Base of the signals that end a part of the training on purpose.

    Args:
        reason: Why, in words for people; kept in ``history.stop_reason`` when the fit ends.

    Attributes:
        agreed: Whether all processes that train together have raised it.

    >>> [signal.__name__ for signal in CancelSignal.__subclasses__()], CancelSignal("the disk is full").reason
    (['CancelStepException', 'CancelEpochException', 'CancelFittingException'], 'the disk is full')
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.agreed = False


class CancelStepException(CancelSignal):
    """End the running step. ``StepEnd`` does not fire; the next step follows.

    >>> def skip(learner): raise CancelStepException("such a batch teaches nothing")
    >>> testing.toy_learner(Recorder(), CustomCallback(skip, StepBegin, TrainingPhase)).fit(1)[TrainingPhase].steps
    0
    """


class CancelEpochException(CancelSignal):
    """End the running epoch. ``EpochEnd`` still fires.

    >>> def enough(learner): raise CancelEpochException("one step is enough")
    >>> testing.toy_learner(Recorder(), CustomCallback(enough, StepEnd, TrainingPhase)).fit(3)[TrainingPhase].epochs
    3
    """


class CancelFittingException(CancelSignal):
    """End the fit: ``fit`` returns normally and ``history.stop_reason`` holds the reason.

    Outside ``fit`` (``learner.epoch(...)``, ``evaluate``, ``predict``) it reaches the caller.

    >>> def stop(learner): raise CancelFittingException("it has learned enough")
    >>> testing.toy_learner(CustomCallback(stop, CycleEnd)).fit(100).stop_reason
    'it has learned enough'
    """


def arguments_misfit(function: Any, count: int) -> tuple[str, str] | None:
    """Return a function's arguments and why it cannot be called with so many by position; None where it can.

    One that does not say what it takes, as some that are written in C, is taken to fit.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        plain = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
        return str(inspect.Signature(plain)), str(error)
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for a near miss of one of `known`, else nothing.

    >>> did_you_mean("StepBegn", ["StepBegin", "StepEnd"])
    "; did you mean 'StepBegin'?"
    """
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def sentence(said: object) -> str:
    """Return what an error or a part of a message says as a sentence, for others to follow it.

    >>> sentence("index out of bounds."), sentence("no entry 'pred'; did you mean 'preds'?"), sentence("it is empty")
    ('index out of bounds.', "no entry 'pred'; did you mean 'preds'?", 'it is empty.')
    """
    text = str(said).rstrip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


def counted(count: int, what: str) -> str:
    """Return how many there are of something, in the singular or plural.

    >>> counted(1, "epoch"), counted(2, "epoch")
    ('1 epoch', '2 epochs')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def describe(value: object) -> str:
    """Return what an error message calls a value: its class, and its shape where it has one.

    >>> describe([1, 2])
    'a list of length 2'
    """
    shape = getattr(value, "shape", None)
    name = getattr(type(value), "__stands_for__", type(value)).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if shape is not None:
        return f"a {name} of shape {tuple(shape)}"
    if isinstance(value, (list, tuple, dict, set)):
        try:
            return f"a {name} of length {len(value)}"
        except (TypeError, ValueError):  # its class has a __len__ that gives no such number
            return f"a {name}"
    if value is None or isinstance(value, (str, bytes, int, float, bool)):
        return repr(value)
    return f"a {name}"


_muted = False


def mute_warnings(muted: bool) -> None:
    """Have `warn_user` say nothing, or say it again: of several processes the first speaks for all."""
    global _muted
    _muted = muted


def warn_user(message: str) -> None:
    """Warn, and point to the line outside of this package that led here."""
    if _muted:
        return
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "fluxloop":
        frame, depth = frame.f_back, depth + 1
    try:
        warnings.warn(message, stacklevel=depth)
    except ValueError:  # Python writes it to a stream that somebody has closed
        if not getattr(sys.stderr, "closed", False):
            raise


def annotate(error: BaseException, note: str) -> None:
    """Add a note to an exception on its way out; its type stays what it was.

    Python 3.10 has no ``add_note``: there the note is kept where 3.11 keeps it.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]  # new in 3.11
