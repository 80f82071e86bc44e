"""Find the largest batch that a training step has memory for, by trying."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fluxloop.callbacks.progress import showing_as
from fluxloop.compute.memory import drop_frames, is_out_of_memory
from fluxloop.compute.raw import rows_of
from fluxloop.data.loaders import TensorBatches
from fluxloop.data.passes import untouched
from fluxloop.errors import BatchError, DataError, PhaseError, annotate, describe
from fluxloop.guard.given import check_number
from fluxloop.nested import map_tensors
from fluxloop.phase import Phase
from fluxloop.phases.supervised import TrainingPhase
from fluxloop.run.check import aside, first_batch
from fluxloop.run.epoch import feed
from fluxloop.run.phases import check_runs
from fluxloop.screen.bars import Bar, bar

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


def find_batch_size(
    learner: RunLearner, *, phase: Phase | None = None, start: int | None = None, largest: int | None = None
) -> int:
    """Return how many rows the largest batch has that training steps have memory for, a power of two.

    Batches are made of the first one of the phase's data, whose rows are repeated. Their size is doubled
    until a step fails for lack of memory (or halved until none does). Each size trains for as
    many steps as it takes for the optimizers to have their averages and, with ``accumulate``, for
    gradients to wait while others are computed.

    The learner trains itself, with no second model beside it, and without its callbacks. Then it is as it
    was: weights and optimizers (kept in the host's memory meanwhile), the data's order, random
    numbers. Where rows differ in size, such as texts, the first batch should have long ones. Leave some
    memory free: what others take on the same GPU, and fragments, vary.

    On a CPU nothing is found out: memory that is not there is taken from the disk, or the
    process is killed. There the answer is what the data or `largest` allow.

    Args:
        learner: The learner.
        phase: A training phase. Left out: `TrainingPhase`.
        start: How many rows are tried first; left out, the power of two at or below those of the first batch.
        largest: How many rows are tried at most; left out, as many as the data has.

    Raises:
        ValueError: `start` or `largest` is out of range; or the data does not say how many rows it has, and neither
            does `largest`.
        PhaseError: The phase does not train or cannot be copied; or the learner is running, or in several processes.
        DataError: The data can be iterated once only.
        BatchError: The first batch has no rows that could be repeated.
        torch.OutOfMemoryError: Not even one row fits.

    Example:
        >>> from fluxloop.testing import toy_learner
        >>> find_batch_size(toy_learner(), largest=64)
        64
    """
    phase = TrainingPhase() if phase is None else phase
    _check(learner, phase, start, largest)
    source = feed(learner, phase).source
    if hasattr(source, "__next__"):
        raise DataError(
            f"the {phase.data_key!r} data can be iterated once only, and find_batch_size would use its first batch; "
            "give data that can be iterated again, such as a DataLoader or a list of batches"
        )
    if largest is None:
        largest = _rows_of(source)
    if largest is None:
        raise ValueError(
            f"find_batch_size does not know how many rows the {phase.data_key!r} data has ({describe(source)}); say "
            "how many are to be tried at most: largest=1024"
        )
    with (
        showing_as(learner),
        bar("find_batch_size", unit="size") as shown,
        untouched(source),
        aside(learner, phase, "find_batch_size", on_host=True) as copied,
    ):
        trial = _Trial(learner, copied, first_batch(learner, copied), shown)
        try:
            return trial.search(min(trial.start if start is None else start, largest), largest)
        finally:
            trial.clear()


def _check(learner: RunLearner, phase: Phase, start: int | None, largest: int | None) -> None:
    for name, number in (("start", start), ("largest", largest)):
        if number is not None:
            check_number("find_batch_size", name, number, least=1, whole=True)
    if learner.scope is not None:
        raise PhaseError("find_batch_size was called while the learner is running; call it before the fit")
    if learner.accelerator.group is not None:
        raise PhaseError(
            "find_batch_size was called in one of several processes, of which one may fail while the others wait; "
            "expected a single one, without torchrun: with strategy='replicate' a process takes the memory of one that "
            "trains alone, and once more that of the gradients"
        )
    check_runs(learner, phase)
    if not phase.gradients:
        raise PhaseError(
            f"{phase!r} was given to find_batch_size, and it does not train; expected such as TrainingPhase()"
        )


class _Trial:
    """Tries batches of different sizes.

    Args:
        learner: It trains, and is put back by others.
        phase: A copy of the phase.
        batch: Its rows are repeated.
        shown: Tells which size is tried.
    """

    def __init__(self, learner: RunLearner, phase: Phase, batch: Any, shown: Bar) -> None:
        self.learner, self.phase, self.batch, self.shown = learner, phase, batch, shown
        self.rows = rows_of(batch)
        self.start = 1 << (max(self.rows, 1).bit_length() - 1)
        """The power of two at or below its rows."""
        accumulate = learner.accelerator.accumulate
        window = max(accumulate.values(), default=1) if isinstance(accumulate, Mapping) else accumulate
        self.steps = window + min(window, 2)
        """An update, and a step after it; where an update has several batches, one that adds to gradients that wait."""
        self.until_scaled = 24 * window if learner.accelerator.precision == "fp16" else 0
        """How many more at most, until the scale of losses is one with which an update is made."""
        self.error: BaseException | None = None

    def search(self, size: int, largest: int) -> int:
        """Return the largest size that fits, from one that may."""
        if self.fits(size):
            while 2 * size <= largest and self.fits(2 * size):
                size *= 2
            return size
        while size > 1:
            size //= 2
            if self.fits(size):
                return size
        assert self.error is not None
        annotate(
            self.error, "fluxloop: find_batch_size found no batch that fits: one row takes more memory than there is"
        )
        raise self.error

    def fits(self, size: int) -> bool:
        """Train with batches of a size; return whether there was memory for it."""
        self.clear()
        self.shown.title = f"find_batch_size: {size} rows"
        self.shown.advance()
        try:
            batch = _with_rows(self.batch, self.rows, size)
            before = self.learner.updates.count
            for _ in range(self.steps):
                self.phase.step(self.learner, batch)
            for _ in range(self.until_scaled):
                if self.learner.updates.count > before:
                    break
                self.phase.step(self.learner, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            drop_frames(error)
            self.error = error
            return False
        return True

    def clear(self) -> None:
        """Let go of what the steps before left."""
        self.learner.step.drop_graphs()
        for slot in self.learner.updates.slots:
            slot.end_gradients()
            slot.release()
        gc.collect()
        if self.learner.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def _with_rows(batch: Any, rows: int, size: int) -> Any:
    """Return a batch with as many rows as asked for: those that it has, from the first on, as often as it takes.

    Raises:
        BatchError: It has no tensor of so many rows.
    """
    found = 0

    def repeated(tensor: Tensor) -> Tensor:
        nonlocal found
        if not tensor.ndim or len(tensor) != rows:
            return tensor
        found += 1
        return tensor.index_select(0, torch.arange(size, device=tensor.device) % rows)

    grown = map_tensors(repeated, batch)
    if not found:
        raise BatchError(
            f"find_batch_size was given {describe(batch)} as the first batch, in which no tensor has its {rows} rows "
            "as its first dimension, so that they cannot be repeated; expected a batch of tensors"
        )
    return grown


def _rows_of(source: Any) -> int | None:
    """Return how many rows data has; None where it does not say."""
    if isinstance(source, TensorBatches):
        return source.num_rows
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
        return len(source.dataset) if isinstance(source.dataset, Sized) else None
    if isinstance(source, (list, tuple)):
        return sum(rows_of(batch) for batch in source)
    return None
