"""Errors while batches are loaded: iterations that end before their data does, and workers that die.

A ``StopIteration`` in a data set, in its ``collate_fn`` or in a worker ends the iteration around it, as the end of
the data does: the epoch would be shorter, and nobody would know. A worker that dies shows as whatever its process
was about to send: often a lost connection or a missing file.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from fluxloop.errors import DataError, FluxloopError, describe

WAIT = 2.0
"""How many seconds a worker that has lost its connection has to be seen dead."""


class Endless:
    """A function that ends no iteration: a ``StopIteration`` in it is an error.

    Args:
        function: What is called.
        name: What it is called in messages.
    """

    def __init__(self, function: Callable[[Any], Any], name: str = "collate_fn") -> None:
        self.function = function
        self.name = name

    def __call__(self, rows: Any) -> Any:
        """Call it."""
        try:
            return self.function(rows)
        except StopIteration as error:
            raise DataError(f"{self.name} raised StopIteration, which would end the epoch there; {EXPECTED}") from error


EXPECTED = "expected another error for a row that cannot be given, such as an IndexError"


def begin(loader: DataLoader[Any]) -> Iterator[Any]:
    """Begin an iteration.

    Raises:
        DataError: It ends before it begins.
    """
    try:
        return iter(loader)
    except (StopIteration, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, StopIteration):
            raise
        raise DataError(
            f"{describe(loader)} raised StopIteration as its iteration began, which would end the epoch there; "
            f"{EXPECTED} (in its sampler's or data set's __iter__)"
        ) from error


def watched(batches: Iterator[Any], ended_after: Callable[[int], bool], label: str, given: int = 0) -> Iterator[Any]:
    """Yield a loader's batches; raise where they end before the data does, or a worker dies, and name the batch.

    Args:
        batches: The loader's iteration.
        ended_after: Tells whether the data ends after so many batches.
        label: What is loaded from, for messages.
        given: How many batches were given before.

    Raises:
        DataError: The iteration ended before the data did, or a worker died.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration as error:
            if ended_after(given):
                return
            raise DataError(
                f"StopIteration was raised while batch {given + 1} was loaded from {label}, which would end the epoch "
                f"there; {EXPECTED} (in the data set, collate_fn or worker_init_fn)"
            ) from error
        except (OSError, EOFError, RuntimeError) as error:
            wrong = _say_what(batches, error)
            if wrong is None:
                raise
            raise DataError(f"{wrong[0]} while batch {given + 1} was loaded from {label}{wrong[1]}") from error
        given += 1
        yield batch


def _say_what(batches: Any, error: BaseException) -> tuple[str, str] | None:
    """Say what an error of a loader was, and what to do; None where it says so itself."""
    if isinstance(error.__cause__, StopIteration):  # Python turns it into a RuntimeError where it leaves a generator
        return "StopIteration was raised", f"; {EXPECTED} (in the sampler or the data set)"
    dead = _dead_workers(batches, str(error), isinstance(error, RuntimeError))
    return (" and ".join(dead), ALIVE) if dead else None


ALIVE = (
    "; expected workers that live as long as the epoch. Out of memory (fewer workers or smaller batches need less), "
    "out of shared memory (/dev/shm), or did the data set's code end the process?"
)


def is_workers_death(error: RuntimeError) -> bool:
    """Return whether an error is the one that torch raises, wherever the main thread is, when a worker dies."""
    return str(error).startswith("DataLoader worker (pid") and not isinstance(error, FluxloopError)


def worker_died(error: RuntimeError) -> DataError:
    """Make the error in place of torch's own that a worker has died."""
    return DataError(f"a {str(error).strip().rstrip('.')}{ALIVE}")


def _dead_workers(batches: Any, told: str, by_torch: bool) -> list[str]:
    """Say which workers of a loader died, and of what; nothing where the error is not of their death."""
    workers = getattr(batches, "_workers", ())
    if not workers or "in DataLoader worker process" in told:  # the data set's own error, passed on by a worker
        return []
    if by_torch and "DataLoader worker" not in told and "shared memory" not in told:
        return []
    expected = getattr(batches, "_workers_status", [True] * len(workers))  # False: its data has ended
    for worker in workers:
        worker.join(WAIT / len(workers))
    return [
        f"a DataLoader worker (pid {worker.pid}) died ({_cause(worker.exitcode)})"
        for worker, on in zip(workers, expected, strict=True)
        if worker.exitcode or (worker.exitcode == 0 and (on or str(worker.pid) in told))
    ]


def _cause(code: int) -> str:
    try:
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:  # a signal without a name here
        return f"killed by signal {-code}"
