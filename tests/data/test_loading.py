from __future__ import annotations

import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from fluxloop import CombinedLoader, DataError, Learner, TrainingPhase, ValidationPhase
from fluxloop.callbacks.features import extract
from fluxloop.callbacks.swa import update_norms
from fluxloop.testing import toy_learner

Row = tuple[Tensor, Tensor]


class Rows(Dataset[Row]):
    """40 rows; one of them does something else."""

    def __init__(self, instead: Callable[[], object] | None = None, at: int = 21) -> None:
        self.instead = instead
        self.at = at

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Row:
        if self.instead is not None and index == self.at:
            self.instead()
        return torch.ones(1), torch.ones(1)


class Classes(Rows):
    def __getitem__(self, index: int) -> Row:
        return super().__getitem__(index)[0], torch.tensor(0)


class Several(Rows):
    def __getitems__(self, indices: list[int]) -> list[Row]:
        return [self[index] for index in indices]


class Stream(IterableDataset[Row]):
    def __init__(self, rows: int = 40) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter([(torch.ones(1), torch.ones(1))] * self.rows)


def stop(*ignored: object) -> None:
    raise StopIteration


class Stops(Sampler[int]):
    def __init__(self, at: int | None = None) -> None:
        self.at = at

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[int]:
        return iter([]) if self.at is None else self.upwards(self.at)

    def upwards(self, at: int) -> Iterator[int]:
        for index in range(40):
            if index == at:
                stop()
            yield index


class StopsAtOnce(Stops):
    def __iter__(self) -> Iterator[int]:
        raise StopIteration


def collate(rows: list[Row]) -> Any:
    if any(len(row) == 3 for row in rows):
        stop()
    return default_collate(rows)


class Marked(Rows):
    """Row 21 has three parts, which `collate` cannot take."""

    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        return (*row, 0) if index == 21 else row


class MarkedStream(Stream):
    def __iter__(self) -> Iterator[Any]:
        return (Marked()[index] for index in range(40))


LOADERS: dict[str, Callable[[int], DataLoader[Any]]] = {
    "a data set": lambda workers: loader(Rows(stop), workers),
    "a data set that gives several rows at once": lambda workers: loader(Several(stop), workers),
    "collate_fn": lambda workers: loader(Marked(), workers, collate_fn=collate),
    "rows that are not batched": lambda workers: loader(Rows(stop, 6), workers, batch_size=None),
    "a sampler": lambda workers: loader(Rows(), workers, sampler=Stops(21)),
    "collate_fn of an iterable data set": lambda workers: loader(MarkedStream(), workers, collate_fn=collate),
}


def steps_of(learner: Learner) -> int:
    return learner.streams["training/step"].index


def failure(run: Callable[[], object]) -> tuple[type, str, type]:
    """Give the kind, the words with the notes, and the cause of an error; its frames, which hold workers, are gone."""
    try:
        run()
    except Exception as error:
        told = "\n".join([str(error), *getattr(error, "__notes__", ())])
        found = type(error), told, type(error.__cause__)
        error.__traceback__ = error.__cause__ = error.__context__ = None
    else:
        raise AssertionError("there was no error")
    gc.collect()
    return found


def loader(data: Any, workers: int, **options: Any) -> DataLoader[Any]:
    options = {
        "batch_size": 4,
        "num_workers": workers,
        "multiprocessing_context": "fork" if workers else None,
        **options,
    }
    return DataLoader(data, **options)


@pytest.mark.slow
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_an_end_that_is_none_is_an_error_that_names_the_batch(make: Callable[[int], DataLoader[Any]]) -> None:
    learner = toy_learner(data=(make(0),))
    kind, told, _ = failure(lambda: learner.fit(1))
    steps = steps_of(learner)
    assert kind is DataError
    assert steps in (5, 6)
    assert "StopIteration" in told
    assert f"batch {steps + 1} " in told or f"step {steps} " in told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a data set", "collate_fn of an iterable data set"])
def test_an_end_that_is_none_in_a_worker_is_an_error(name: str) -> None:
    kind, told, _ = failure(lambda: toy_learner(data=(LOADERS[name](1),)).fit(1))
    assert kind is DataError
    assert "StopIteration" in told
    assert "step 5 " in told


@pytest.mark.slow
def test_the_message_says_how_many_batches_were_expected() -> None:
    kind, told, cause = failure(lambda: toy_learner(data=(loader(Rows(stop), 0),)).fit(1))
    assert (kind, cause) == (DataError, StopIteration)
    assert "while batch 6 was loaded from a DataLoader of 10 batches" in told
    assert "IndexError" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("sampler", {"sampler": StopsAtOnce()}), ("worker", {"worker_init_fn": stop})]
)
def test_an_end_before_the_beginning_is_an_error(name: str, options: dict[str, Any]) -> None:
    kind, told, _ = failure(lambda: toy_learner(data=(loader(Rows(), 1, **options),)).fit(1))
    assert kind is DataError
    assert "StopIteration" in told


pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"  # torch's loaders cannot end workers that are gone
)

WAYS: dict[str, Callable[[Learner, Any], object]] = {
    "validation": lambda learner, bad: learner.epoch(ValidationPhase(), bad),
    "evaluate": lambda learner, bad: learner.evaluate(bad),
    "predict": lambda learner, bad: learner.predict(bad),
    "one of several": lambda learner, bad: learner.epoch(TrainingPhase(), CombinedLoader([bad, [1]], "sequential")),
    "rows of a probe": lambda learner, bad: extract(learner.model, loader(Classes(stop), 0)),
    "statistics of batch norm": lambda learner, bad: update_norms(nn.Sequential(nn.BatchNorm1d(1)), bad),
    "several without a learner": lambda learner, bad: list(CombinedLoader([bad], "min_size")),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_read_data_says_so(way: Callable[[Learner, Any], object]) -> None:
    learner = toy_learner(data=([(torch.ones(1, 1), torch.ones(1, 1))],))
    with pytest.raises(DataError, match=r"batch 6 was loaded|the data set raised StopIteration"):
        way(learner, loader(Rows(stop), 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_generator_and_an_iterable_data_set_end_as_they_always_did(workers: int) -> None:
    learner = toy_learner(data=(loader(Stream(10), workers, drop_last=True),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.fit(1)
    assert steps_of(learner) == 2 * max(workers, 1)  # each worker gives all rows: it does not share them
    steps = steps_of(learner)
    learner.fit(1, data=((batch for batch in [(torch.ones(2, 1), torch.ones(2, 1))] * 3),))
    assert steps_of(learner) == steps + 3


def test_what_a_model_or_a_handler_raises_passes_as_itself() -> None:
    learner = toy_learner(data=([(torch.ones(1, 1), torch.ones(1, 1))],))
    learner.loss_fn = stop
    with pytest.raises(StopIteration):
        learner.fit(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda: os.kill(os.getpid(), 9), r"killed by (SIGKILL|signal: Killed)"),
        (lambda: os._exit(3), "exit code 3"),
        (lambda: sys.exit(0), "exit code 0"),
    ],
    ids=["killed", "exit", "an orderly exit"],
)
def test_a_worker_that_dies_is_named(how: Callable[[], object], said: str) -> None:
    learner = toy_learner(data=(loader(Rows(how), 2),))
    kind, told, cause = failure(lambda: learner.fit(1))
    assert kind is DataError
    assert issubclass(cause, (RuntimeError, OSError, EOFError))
    assert re.search(rf"a DataLoader worker \(pid \d+\).*{said}.*shared memory", told)


def missing() -> None:
    raise FileNotFoundError("row 21 is not there")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_set_passes_as_itself(workers: int) -> None:
    kind, told, _ = failure(lambda: toy_learner(data=(loader(Rows(missing), workers),)).fit(1))
    assert kind is FileNotFoundError
    assert "row 21 is not there" in told
