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
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parent)
"""Where fluxloop's own files lie: messages point at the line of a user's above them."""


class FluxloopError(Exception):
    """Base of every error that fluxloop raises."""


class ModelError(FluxloopError, TypeError):
    """The model is no module, or its names cannot be used."""


class OptimizerError(FluxloopError, ValueError):
    """The optimizers do not hold exactly the trainable parameters of the models, once each."""


class LossError(FluxloopError, ValueError):
    """There is no loss, it is no scalar, or no gradient can be computed from it."""


class DataError(FluxloopError, ValueError):
    """The data of a phase is missing, empty or of a kind that cannot be iterated."""


class BatchError(DataError):
    """A batch does not have the structure that the phase expects."""


class PhaseError(FluxloopError, TypeError):
    """Something that is no phase was given, or a phase was used where it cannot be."""


class MetricError(FluxloopError, ValueError):
    """Two metrics share a name, or something given as a metric is none."""


class SanityCheckError(FluxloopError, ValueError):
    """A check of the `SanityCheck` callback failed before the first step."""


class CompileError(FluxloopError, RuntimeError):
    """A step cannot be compiled as one graph: somebody needs a moment inside it, or it cannot be traced."""


class CheckpointError(FluxloopError, ValueError):
    """A checkpoint cannot be written, is damaged, or belongs to another training."""


class LogExistsError(FluxloopError, FileExistsError):
    """A new run would write into another run's log, or two backends would write one."""


class ProcessError(FluxloopError, RuntimeError):
    """Another of the processes that train together was killed or stopped, has raised, or does not come.

    Args:
        message: What has happened.
        ranks: The numbers of the processes that have failed, as far as they are known.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class ReentrantFitError(FluxloopError, RuntimeError):
    """``fit`` was called while the same learner was already fitting."""


class AssignmentError(FluxloopError, AttributeError):
    """An attribute was assigned that does not exist, or that cannot be replaced (now)."""


class MissingEntryError(FluxloopError, AttributeError):
    """An entry of the step or of ``cbstate`` was read that nobody has stored."""


class StateAccessError(FluxloopError):
    """A callback read or wrote a path that it did not declare.

    Args:
        callback: Id of the callback.
        path: The dotted path it touched.
        mode: ``"read"`` or ``"write"``.
        declared: What it declared, as ``(reads, writes)``.

    ``event`` is filled in where the event is known.
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
    """Base of the errors found when the callbacks of a learner are put in order."""


class CallbackTypeError(CallbackError, TypeError):
    """A class was given where an instance belongs, or something that is no callback."""


class HandlerError(CallbackError, TypeError):
    """``@on`` was given something that is no event or phase, or a hook has no ``@on``."""


class AmbiguousHandlerError(CallbackError):
    """Two handlers of one callback fit an event and phase equally well."""


class DuplicateCallbackError(CallbackError, ValueError):
    """The same callback was given twice, or two that nothing tells apart."""


class CallbackConflictError(CallbackError):
    """Two callbacks write the same path and nothing says which goes first."""


class CallbackCycleError(CallbackError):
    """The declared orders of some callbacks contradict each other."""


class MissingProducerError(CallbackError):
    """A callback reads a ``cbstate`` entry that no callback writes."""


class CancelSignal(Exception):  # noqa: N818 - a signal, not an error
    """Base of the signals that end a part of the training on purpose.

    Args:
        reason: Why, in words for people; kept in ``history.stop_reason`` when the fit ends.

    Attributes:
        agreed: Whether all processes that train together have raised it.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.agreed = False


class CancelStepException(CancelSignal):
    """End the running step. ``StepEnd`` does not fire; the next step follows."""


class CancelEpochException(CancelSignal):
    """End the running epoch. ``EpochEnd`` still fires."""


class CancelFittingException(CancelSignal):
    """End the fit: ``fit`` returns normally and ``history.stop_reason`` holds the reason.

    Outside ``fit`` (``learner.epoch(...)``, ``evaluate``, ``predict``) it reaches the caller.
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


def shown(what: str, show: Callable[[], object]) -> bool:
    """Call what writes for people to see; where its stream is closed or broken, warn, and return False.

    What is shown never ends a training: a closed terminal, or a pipe whose reader has gone.

    Args:
        what: What falls silent, for the warning.
        show: Writes it.
    """
    try:
        show()
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "closed file" not in str(error):
            raise
        warn_user(f"{what} falls silent, because what it writes to is gone ({error}); training goes on")
        return False
    return True


def annotate(error: BaseException, note: str) -> None:
    """Add a note to an exception on its way out; its type stays what it was.

    Python 3.10 has no ``add_note``: there the note is kept where 3.11 keeps it.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]  # new in 3.11
