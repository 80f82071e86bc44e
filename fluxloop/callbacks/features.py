"""Features of labelled rows, computed once at the end of an epoch for all callbacks that ask for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, TensorDataset, default_collate

from fluxloop.compute.models import to_device_of
from fluxloop.compute.modes import watching
from fluxloop.data.loaders import TensorBatches, as_dataloader, holds_rows
from fluxloop.data.passes import untouched
from fluxloop.data.sources import complete
from fluxloop.errors import DataError, describe
from fluxloop.nested import map_tensors
from fluxloop.phase import without_names
from fluxloop.randomness import drawing, stream_seed
from fluxloop.screen.bars import length_of, tracked

Features = Callable[[nn.Module, Any], Tensor]


def flat(module: nn.Module, xs: Any) -> Tensor:
    """Return the output of a module, flattened to a row of numbers for each input."""
    features = module(xs)
    if not isinstance(features, Tensor):
        raise DataError(
            f"a probe got {describe(features)} from {type(module).__name__}; expected a tensor: say what the features "
            "are, KNNProbe(..., features=lambda module, xs: module(xs)[0])"
        )
    return features.flatten(1)


def extract(
    module: nn.Module, source: Any, features: Features = flat, *, classes: bool = True, title: str = "features"
) -> tuple[Tensor, Tensor]:
    """Run a module over labelled data in eval mode, without gradients and without a trace.

    The module's modes are put back, and so are a loader's own generators.

    Args:
        module: Whose features.
        source: A loader of batches ``(xs, ys)``.
        features: ``(module, xs) -> (N, F)``.
        classes: Whether labels have to be classes (N,).
        title: What a bar says, where it takes long.

    Returns:
        Features (N, F) and labels (N,), on the module's device.

    Raises:
        DataError: Its batches are no pairs of rows and labels.
    """
    rows, labels = [], []
    with watching(module), untouched(source):
        for batch in tracked(complete(source), title, length_of(source)):
            check_labelled(batch, features)
            if classes:
                _check_classes(batch[1])
            xs, ys = to_device_of(module, (batch[0], batch[1]))
            rows.append(features(module, xs))
            labels.append(ys)
    if not rows:
        raise DataError(f"{describe(source)} gave a probe no batch; expected labelled rows, (xs, ys)")
    return torch.cat(rows), torch.cat(labels)


def loader(given: Any) -> Any:
    """Make a loader of rows with batches of 256; a loader stays as it is."""
    return as_dataloader(given, batch_size=256) if holds_rows(given) else as_dataloader(given)


def rows_for(advice: str, learner: Any, given: Any, key: str) -> tuple[Any, Any]:
    """Return what rows were given as, or else the learner's data, and a loader of them.

    Args:
        advice: A call that gives rows, for messages.
        learner: A view that reads ``"data"``.
        given: Anything `as_dataloader` takes; None for the learner's data.
        key: Of the learner's data.

    Raises:
        DataError: Neither is there, or it can be iterated once only.
    """
    if given is None and key not in learner.data:
        name = advice.partition("(")[0]
        raise DataError(f"{name} measures on the {key} data, and the learner has none; give it some: {advice}")
    source = learner.data[key] if given is None else loader(given)
    if hasattr(source, "__next__"):
        raise DataError(f"{describe(source)} can be iterated once only, and a probe runs over its data every epoch")
    return source if given is None else given, source


OWN_DATA = "data of its own, queries=(xs, ys), or KNNProbe('encoder', bank=(xs, ys), queries=(xs, ys))"


def check_labelled(batch: Any, features: Features) -> None:
    """Raise `DataError` for a batch that is not rows with their labels, with file names behind them or not."""
    batch = without_names(batch)
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise DataError(
            f"a probe was given {describe(batch)} as a batch; expected labelled rows, (xs, ys): give it {OWN_DATA}"
        )
    if features is flat and not isinstance(batch[0], Tensor):
        raise DataError(
            f"a probe was given rows that are {describe(batch[0])}, such as several views; expected tensors in "
            f"labelled rows, (xs, ys). Give it {OWN_DATA}, or features=..."
        )


def _check_classes(ys: Tensor) -> None:
    """Raise `DataError` for labels that are no classes."""
    if ys.ndim != 1 or ys.is_floating_point() or ys.is_complex():
        raise DataError(
            f"a probe was given labels {describe(ys)} of {ys.dtype}; expected classes, whole numbers from 0 of "
            f"shape (N,), in labelled rows, (xs, ys). Give it {OWN_DATA}"
        )


def row_at_hand(source: Any) -> Any:
    """Return the first row of a source, as a batch of one, where it lies in memory; else None."""
    if isinstance(source, DataLoader):
        dataset: Any = source.dataset
        held = getattr(dataset, "tensors", None) if type(dataset) is TensorDataset else None
        collated = source.collate_fn is default_collate and source.batch_size is not None
        return tuple(tensor[:1] for tensor in held) if held and collated else None
    if isinstance(source, TensorBatches):
        return map_tensors(lambda tensor: tensor[:1], source.data)
    if isinstance(source, list) and source and isinstance(source[0], (tuple, list)):
        return map_tensors(lambda tensor: tensor[:1], tuple(source[0]))
    return None


def features_at_hand(module: nn.Module, row: Any, features: Features) -> Tensor | None:
    """Return the features (1, F) of a row, where the module can be run before a training; else None.

    Raises:
        DataError: They are no tensor, or no row of numbers for each row.
    """
    if not isinstance(row, tuple) or len(row) != 2 or not isinstance(row[1], Tensor):
        return None  # this is said with the data, before the first step
    if any(is_lazy(each) or type(each) not in (Tensor, nn.Parameter) for each in _weights(module)):
        return None  # without values yet, or in parts among processes
    with watching(module):
        try:
            found = features(module, to_device_of(module, row[0]))
        except DataError:
            raise
        except Exception:
            return None  # what is wrong is raised where rows are really run, in its place
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(row[1]):
        raise DataError(
            f"{type(module).__name__} gave {describe(found)} as the features of one row; expected a row of "
            "numbers for each, (N, F): features=lambda module, xs: module(xs).flatten(1)"
        )
    return found


@define(eq=False)
class _Encoding:
    """Features of some rows by some weights, and what they rest on."""

    module: nn.Module
    given: Any
    """What the rows were given as; kept, so that no other object takes its place in memory."""
    features: Features
    seed: int
    found: tuple[Tensor, Tensor]
    rests_on: list[Tensor]
    """The weights, and what was found: none may have changed since."""
    versions: list[int]
    """How often each of these had been changed in place."""

    def answers(self, module: nn.Module, given: Any, features: Features, seed: int) -> bool:
        """Return whether it is what is asked for, of weights that are still the same."""
        if self.module is not module or self.features != features or self.seed != seed:
            return False
        return _is_same(self.given, given) and self._is_unchanged()

    def _is_unchanged(self) -> bool:
        now = [*_weights(self.module), *self.found]
        return _is_same(tuple(self.rests_on), tuple(now)) and [each._version for each in now] == self.versions


_encodings: list[_Encoding] = []
"""Those of the epochs that end right now."""


def encode(
    learner: Any, name: str, given: Any, source: Any, features: Features = flat, *, classes: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the features of labelled rows by named weights, as `extract` does; at the end of an epoch once.

    Whoever asks for the same later, while the callbacks of that event run, gets the same tensors, as long as nobody
    has changed the weights or them meanwhile; they are released when the epoch has been left. What the rows draw when
    they are loaded, they draw from the stream of the weights' name: whoever asks, and whether another one has asked
    before, the numbers are the same.

    Args:
        learner: The view of a callback that reads the weights and ``"seed"``.
        name: Of the weights.
        given: What the rows were given as; two that are the same object, or pairs of the same tensors, are the same.
        source: The loader of these.
        features: ``(module, xs) -> (N, F)``.
        classes: Whether labels have to be classes (N,).

    Raises:
        DataError: Its batches are no pairs of rows and labels.
    """
    module, seed = learner.weights[name], stream_seed(learner.seed, f"features/{name}")
    for encoding in _encodings:
        if encoding.answers(module, given, features, seed):
            if classes:
                _check_classes(encoding.found[1])
            return encoding.found
    with drawing(seed):
        found = extract(module, source, features, classes=classes, title=f"features of {name}")
    rests_on = [*_weights(module), *found]
    versions = [each._version for each in rests_on]
    encoding = _Encoding(module, given, features, seed, found, rests_on, versions)
    learner.defer(partial(_forget, encoding))  # first: what could not be forgotten is not kept
    _encodings.append(encoding)
    return found


def _forget(encoding: _Encoding) -> None:
    _encodings[:] = [each for each in _encodings if each is not encoding]


def _weights(module: nn.Module) -> tuple[Tensor, ...]:
    return (*module.parameters(), *module.buffers())


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two things hold the same rows: one object, or tuples of the same ones."""
    pairs = isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other)
    return one is other or (pairs and all(a is b for a, b in zip(one, other, strict=True)))
