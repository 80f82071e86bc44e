"""Write checkpoints from which a run goes on to the bit."""

from __future__ import annotations

import copy
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from attrs import define, field

from fluxloop.callback import UnsafeCallback, on
from fluxloop.checkpoint.ending import forget_end, note_end
from fluxloop.checkpoint.folder import LATEST, Folder, Progress, name_of
from fluxloop.checkpoint.gathering import gather, lasting
from fluxloop.checkpoint.manifest import check_writers
from fluxloop.checkpoint.parts import has_sharded
from fluxloop.compute.finite import first_names, not_finite, state_tensors
from fluxloop.errors import CallbackConflictError, CheckpointError, sentence, warn_user
from fluxloop.events import EpochBegin, FitBegin, FitEnd, StepEnd
from fluxloop.guard.given import as_path, is_number
from fluxloop.monitor import Mode, Monitor
from fluxloop.persist.plain import snapshot
from fluxloop.phase import AbstractTrainingPhase, FittingPhase
from fluxloop.processes.asking import NowAndThen
from fluxloop.randomness import Stream
from fluxloop.signals import instead_of

START: Progress = (0, 0, 0)
"""Where a run begins: written too, so that one killed early is known, and removed after the next."""


def _as_path(given: Any) -> Path:
    return as_path("Checkpointer", "folder", given)


@define
class Checkpointer(UnsafeCallback):
    """Write the whole state of the learner to a folder, so that a killed run goes on as if nothing had happened.

    The same script begins a run and goes on with it: ``learner.fit(100, resume="runs/first")`` with
    ``Checkpointer("runs/first")``. Files are complete or not there; nothing is overwritten; a folder
    with other things in it is refused, and so is a new run where the folder holds one that has come further.
    Checkpoints are written between steps, when all handlers of the last one have run.

    One is written when the run begins (and removed with the first after it), and a last one when the
    fit ends, also early, and where Ctrl+C or SIGTERM ends it. At SIGUSR1, which batch systems can
    send before their time limit, one is written between the next two steps and training goes on.

    While a fit runs, the folder is locked: another process that would write to it is refused. Of several processes that
    train together the first one writes, and all go on from its files; they ask each other about once a second whether
    the clock or a signal wants one written. Where parameters are sharded, each process writes a file of its parts
    beside it, and waits until it is there; any number of processes, also one, goes on from these files.

    Where the data or a phase's own `epoch` cannot be resumed in the middle of an epoch, it warns
    once, and checkpoints wait until the epoch ends. It warns once, too, and writes nothing, where numbers of the
    state have become NaN or infinite since the fit began: the newest checkpoint can always be resumed from.

    Args:
        folder: The folder of this run alone.
        every: How many units lie between two checkpoints.
        unit: ``"epoch"`` (of the fit: one cycle), ``"step"`` (of training) or ``"second"``.
        keep_last: How many of the newest stay; None for all.
        keep_best: How many of those with the best metric at the end of an epoch stay as well.
        monitor: The name of that metric.
        mode: ``"min"`` where less of it is better, else ``"max"``; left out, what the metric says of itself. NaN is
            never best.
        background: Whether files are written by a thread, from a copy of the state in host memory.

    Raises:
        CheckpointError: The folder belongs to another run or cannot be written to, a callback writes
            what no checkpoint keeps, or a file cannot be written.
        ValueError: An argument is out of range.

    Attributes:
        last: The newest file, None before the first.

    Reads: (it is given the whole learner)

    Example:
        >>> from fluxloop.testing import toy_learner
        >>> history = toy_learner(Recorder(), Checkpointer("runs/first")).fit(2)
        >>> history = toy_learner(Recorder(), Checkpointer("runs/first")).fit(5, resume="runs/first")
        >>> history[TrainingPhase].epochs
        5
    """

    folder: Path = field(converter=_as_path)
    every: float = field(default=1, kw_only=True)
    unit: Literal["epoch", "step", "second"] = field(default="epoch", kw_only=True)
    keep_last: int | None = field(default=2, kw_only=True)
    keep_best: int = field(default=0, kw_only=True)
    monitor: str = field(default="validation/loss", kw_only=True)
    mode: Mode | None = field(default=None, kw_only=True)
    background: bool = field(default=False, kw_only=True)
    last: Path | None = field(default=None, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)
    """Training steps ended."""
    _written: int = field(default=0, init=False, repr=False)
    """Those of them that had ended at the newest checkpoint."""
    _watched: Monitor = field(init=False, repr=False)
    _scores: dict[str, float] = field(factory=dict, init=False, repr=False)
    """The metric at each checkpoint that may be one of the best, by the name of its file."""
    _scored: int = field(default=0, init=False, repr=False)
    """The epoch of the newest value of the metric that was used."""
    _progress: Progress | None = field(default=None, init=False, repr=False)
    """Where the newest checkpoint stands; None before the first."""
    _reason: str | None = field(default=None, init=False, repr=False)
    """Why the fit had stopped then, as far as that lasts."""
    _since: float = field(default=0.0, init=False, repr=False)
    """The time of it, or of the begin of the fit."""
    _batch: int = field(default=0, init=False, repr=False)
    """The batch at which it stands, in the middle of an epoch."""
    _owing: bool = field(default=False, init=False, repr=False)
    """Whether one is to be written at the next moment, whatever the interval."""
    _waits: bool = field(default=False, init=False, repr=False)
    """Whether it has to wait for the end of the epoch, which cannot be resumed in the middle."""
    _warned_of_place: bool = field(default=False, init=False, repr=False)
    _is_last: bool = field(default=False, init=False, repr=False)
    """Whether the fit has ended, so that the next moment is the last."""
    _is_copy: bool = field(default=False, init=False, repr=False)
    """Whether this belongs to a copy of a learner, and writes nothing."""
    _not_finite_before: set[str] = field(factory=set, init=False, repr=False)
    """Names of tensors that were NaN or infinite when the fit began: those are no reason to warn."""
    _warned_of_numbers: bool = field(default=False, init=False, repr=False)
    _asking: NowAndThen | None = field(default=None, init=False, repr=False)
    """Asks the other processes whether one of them is to write a checkpoint; None where there are none."""
    _is_writer: bool = field(default=False, init=False, repr=False)
    """Whether the running fit has the folder for itself."""
    _stream: Stream | None = field(default=None, init=False, repr=False)
    """Tells how many steps have begun of the phase that trains, which is the same on all processes."""
    _counted: int = field(default=0, init=False, repr=False)
    """How many of them are in `_steps`."""
    _writer: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)
    _writing: Future[None] | None = field(default=None, init=False, repr=False)
    """The file that the thread is writing."""

    draws = False
    _fixed = ("folder", "monitor", "mode")
    _begins_anywhere = True
    in_compiled_step = "after"
    transient = (
        *("last", "_progress", "_batch", "_reason", "_since", "_owing", "_waits", "_warned_of_place", "_is_last"),
        *("_is_copy", "_watched", "_not_finite_before", "_warned_of_numbers", "_writer", "_writing", "_asking"),
        *("_stream", "_counted", "_is_writer"),
    )

    def __attrs_post_init__(self) -> None:
        self._watched = Monitor(self.monitor, self.mode).after(getattr(self, "_watched", None))
        if self.unit not in ("epoch", "step", "second"):
            raise ValueError(f"Checkpointer(unit={self.unit!r}) was given; expected 'epoch', 'step' or 'second'")
        number = is_number(self.every) and self.every > 0 and isfinite(self.every)
        if not number or (self.unit != "second" and not float(self.every).is_integer()):
            raise ValueError(f"Checkpointer(every={self.every!r}) was given; expected 1 or more {self.unit}s")
        for name, least in (("keep_last", 1), ("keep_best", 0)):
            value = getattr(self, name)
            if (not is_number(value, whole=True) or value < least) and not (name == "keep_last" and value is None):
                raise ValueError(
                    f"Checkpointer({name}={value!r}) was given; expected a whole number, {least} or more"
                    f"{', or None for all' if name == 'keep_last' else ''}"
                )

    @property
    def monitors(self) -> list[Monitor]:
        """The metric, where the best are kept."""
        return [self._watched] if self.keep_best and not self._is_copy else []

    def __deepcopy__(self, memo: dict[int, Any]) -> Checkpointer:
        """Copy, for a learner on which something is tried out: the copy writes nothing."""
        copied = copy.copy(self)
        copied._is_copy, copied._scores = True, dict(self._scores)
        copied._writer = copied._writing = None
        return copied

    def init(self, learner: Any) -> None:
        """Claim the folder.

        Raises:
            CallbackConflictError: Another `Checkpointer` writes to it.
        """
        if self._is_copy or not learner.accelerator.is_main:
            return
        for other in learner.callbacks:
            if (
                isinstance(other, Checkpointer)
                and other is not self
                and other.folder.resolve() == self.folder.resolve()
            ):
                raise CallbackConflictError(
                    f"two Checkpointers write to {self.folder}; keep one, or give each a folder of its own"
                )
        Folder(self.folder).claim()

    @on(FitBegin, FittingPhase)
    def start(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Look whether the run may be written here, and wait for moments between steps."""
        if self._is_copy:
            return
        check_writers(learner)
        self._check_resume(learner)
        here, group = self._where(learner, learner.place()), learner.accelerator.group
        there = learner.accelerator.is_main and self._begin(learner, here)
        if (
            group is not None
        ):  # what is kept of data is told by all; and so all do all of this, and the first one writes
            there = group.broadcast(there)
        self._asking = None if group is None else NowAndThen(group)
        self._progress, self._reason = here if there else None, lasting(learner.history.stop_reason)
        self._since, self._is_last, self._owing, self._waits = monotonic(), False, False, False
        self._not_finite_before = set(not_finite(state_tensors(learner)))
        self._warned_of_place = self._warned_of_numbers = False
        learner.at_safe_point(partial(self._look, learner))
        learner.defer(self._leave)
        if hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread():
            heeding = instead_of(signal.SIG_DFL, signal.SIGUSR1, self._ask)
            heeding.__enter__()
            learner.defer(lambda: heeding.__exit__(None, None, None))

    def _begin(self, learner: Any, here: Progress) -> bool:
        """Take the folder for a run that begins somewhere; return whether the checkpoint of that place is there."""
        folder = Folder(self.folder)
        folder.claim()
        learner.defer(folder.lock())
        for progress, path in folder.files():
            if progress[:2] > here[:2] and folder.is_complete(path):
                raise CheckpointError(
                    f"an earlier run has come further than this one, to {path}; go on with it: "
                    f"fit(epochs, resume={str(self.folder)!r}), or give this run a folder of its own"
                )
        forget_end(self.folder)
        self._is_writer = True
        return (self.folder / name_of(here)).exists()

    def _check_resume(self, learner: Any) -> None:
        """Raise for a run that begins anew because it looks for checkpoints where nobody writes any.

        Raises:
            CheckpointError: Says which folder to resume from.
        """
        if learner._running.resume_from is None:
            return
        given = Path(learner._running.resume_from)
        looked_in = (given.parent if given.name == LATEST else given).resolve()
        written = [each.folder for each in learner.callbacks if isinstance(each, Checkpointer)]
        if all(folder.resolve() != looked_in for folder in written):
            there = "has checkpoints of a run" if Folder(self.folder).files() else "is where this run would be kept"
            Folder(self.folder).let_go()
            raise CheckpointError(
                f"resume={str(given)!r} was given, and there is nothing to go on from: the Checkpointer writes to "
                f"{self.folder}, which {there}. Expected the same folder: fit(epochs, resume={str(self.folder)!r})"
            )
        learner._running.resume_from = None  # somebody writes where the next process will look

    def _ask(self, number: int, frame: object) -> None:
        """Have a checkpoint written at the next moment between two steps."""
        self._owing = True

    @on(StepEnd, AbstractTrainingPhase)
    def count_step(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Count a training step."""
        if self._asking is None:
            self._steps += 1

    @on(EpochBegin, AbstractTrainingPhase)
    def begin_epoch(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Note from where the steps of an epoch are counted, where several processes train."""
        self._stream = learner.streams[phase.step_stream]
        self._counted = self._stream.index

    @on(FitEnd, FittingPhase)
    def end(self, event: FitEnd, phase: FittingPhase, learner: Any) -> None:
        """Note that the next moment is the last; and, where the fit ends before its time, why, for people."""
        self._is_last = True
        why = lasting(event.reason) if event.error is None else f"{type(event.error).__name__}: {event.error}"
        if why is not None and self._is_writer:
            note_end(self.folder, why)
        self._is_writer = False

    def _look(self, learner: Any) -> None:
        """Write a checkpoint where one is due."""
        between = isinstance(learner.scope.phase, FittingPhase)
        if self._waits and not between:  # for the end of an epoch that cannot be resumed in the middle
            return
        begins = self._progress is None and between
        due = begins or learner._running.stop_requested or self._is_last or self._is_due(learner, between)
        if due or self._is_asked_for(between):
            self._write(learner, at_once=between or bool(learner._running.stop_requested))

    def _is_asked_for(self, between: bool) -> bool:
        """Return whether a signal or the clock asks for one, of any process: each has its own."""
        asked = self._owing or (self.unit == "second" and monotonic() - self._since >= self.every)
        return asked if self._asking is None else self._asking.any_of(asked, at_once=between)

    def _is_due(self, learner: Any, between: bool) -> bool:
        cycles = learner.history.cycles
        complete = between and learner.scope.index == 0 and cycles > 0
        if complete and self.keep_best:  # the end of an epoch may be one of the best
            return True
        if self.unit == "epoch":
            return complete and cycles % int(self.every) == 0
        if self.unit == "second":
            return False
        if self._asking is not None and self._stream is not None:  # one may be cancelled here, and have ended elsewhere
            self._steps += self._stream.index - self._counted
            self._counted = self._stream.index
        return self._steps // int(self.every) > self._written // int(self.every)

    def _where(self, learner: Any, place: dict[str, Any] | None) -> Progress:
        steps = sum(count for owner, count in learner.streams.positions().items() if owner.endswith("/step"))
        return learner.history.cycles, steps, 0 if place is None else place["index"]

    def _write(self, learner: Any, at_once: bool) -> None:
        """Write a checkpoint; or warn why not, and write it when the epoch ends or the thread is free."""
        busy = self._writing is not None and not self._writing.done()
        if busy and not at_once and self._asking is None:  # of several processes the others would wait for this one
            self._owing = True
            return
        try:
            place = learner.place()
        except CheckpointError as error:
            if not self._warned_of_place:
                self._warned_of_place = True
                warn_user(f"{sentence(error)} Checkpoints are written when an epoch ends")
            self._owing = self._waits = True
            return
        if place is None:  # cut in the middle of an epoch: the last checkpoint is the one to resume from
            return
        progress, reason = self._where(learner, place), lasting(learner.history.stop_reason)
        batch = 0 if place["feed"] is None else place["feed"]["batch"]
        again = progress == self._progress
        if again and batch == self._batch and (not self._is_last or reason == self._reason):
            return
        self._written, self._since, self._owing, self._waits = self._steps, monotonic(), False, False
        if not self._is_sound(learner):
            return
        self._progress, self._batch, self._reason = progress, batch, reason
        self._wait_for_writer()
        complete = place["feed"] is None and place["index"] in (0, len(place["phases"]))
        if self.keep_best and complete and learner.history.cycles:
            self._note_score(name_of(progress), learner)
        state = gather(learner, place)
        group, folder = learner.accelerator.group, Folder(self.folder)
        if learner.accelerator.is_main:
            there = {name_of(progress), *(path.name for _, path in folder.files())}
            self._scores = {name: score for name, score in self._scores.items() if name in there}
        if group is not None and has_sharded(state):
            self.last = folder.add_parts(progress, state, again, group)
            if group.is_main:
                self._remove_old(folder, self.last)
        elif not learner.accelerator.is_main:
            self.last = self.folder / name_of(progress)
        elif self.background:
            self._writer = self._writer or ThreadPoolExecutor(1, "checkpoints")
            self._writing = self._writer.submit(self._put, folder, progress, snapshot(state), again)
        else:
            self._put(folder, progress, state, again)

    def _is_sound(self, learner: Any) -> bool:
        """Return whether weights, buffers and the optimizers' states are finite; warn once if they are not."""
        learner._host_queue.flush()  # StopOnNaNLoss may be waiting for a number of the device: it goes first
        bad = [name for name in not_finite(state_tensors(learner)) if name not in self._not_finite_before]
        if bad and not self._warned_of_numbers:
            self._warned_of_numbers = True
            newest = f"the newest checkpoint stays {self.last}" if self.last else "no checkpoint is written"
            warn_user(
                f"numbers of the state became nan or infinite ({first_names(bad)}) by {learner.where()}; no run can go "
                f"on from such a state: {newest}"
            )
        group = learner.accelerator.group
        return not bad if group is None else not any(group.gather_objects(bool(bad)))

    def _note_score(self, name: str, learner: Any) -> None:
        monitor = self._watched
        metrics = learner.cbstate.metrics
        monitor.require(metrics)
        new = monitor.new(metrics, self._scored)
        if new is not None:
            self._scored, value = new
            if monitor.better(value, None):
                self._scores[name] = value

    def _put(self, folder: Folder, progress: Progress, state: dict[str, Any], again: bool) -> None:
        """Write a file, in the place of one of the same moment; only then remove those that need not stay."""
        self.last = folder.add(progress, state, again)
        self._remove_old(folder, self.last)

    def _remove_old(self, folder: Folder, newest: Path) -> None:
        """Remove the files that need not stay."""
        names = [path.name for _, path in folder.files()]
        if newest.name not in names:
            raise CheckpointError(
                f"{newest} was written, and is gone: was the folder removed or renamed? Leave it where it is while "
                "the run goes on"
            )
        if names[0] == name_of(START) and len(names) > 1:
            folder.remove({names.pop(0)})
        if self.keep_last is None:
            return
        best = sorted(self._scores, key=lambda name: self._scores[name], reverse=self._watched.direction == "max")[
            : self.keep_best
        ]
        folder.remove({name for name in names[: -self.keep_last] if name not in best})

    def _wait_for_writer(self) -> None:
        """Wait for the thread; raise the error that it met."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _leave(self) -> None:
        try:
            self._wait_for_writer()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None
