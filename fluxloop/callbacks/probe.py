"""Measure a representation while it is trained, on features through which no gradient goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fluxloop.callback import on
from fluxloop.callbacks.metrics import RecordsMetrics
from fluxloop.compute.models import to_device_of
from fluxloop.compute.modes import watching
from fluxloop.compute.precision import in_single
from fluxloop.data.loaders import as_dataloader, holds_rows
from fluxloop.data.passes import untouched
from fluxloop.data.sources import complete
from fluxloop.errors import DataError, describe
from fluxloop.events import EpochBegin, EpochEnd, StepEnd
from fluxloop.guard.given import check_name, number
from fluxloop.metrics.neighbors import knn_predict
from fluxloop.nested import map_tensors
from fluxloop.order.access import weights_path
from fluxloop.phase import AbstractTrainingPhase, Phase, ProbePhase
from fluxloop.processes.gather import average_gradients
from fluxloop.randomness import drawing, stream_seed

Features = Callable[[nn.Module, Any], Tensor]


@define
class MetricSource(RecordsMetrics):
    """Base of callbacks that record metrics of their own at the end of a training epoch.

    A subclass writes ``metric_names`` and ``measure(learner)``, which returns metrics by name; they are recorded
    next to those of `Metrics`, printed with them, and found by everything that monitors one. Where several processes
    train, all measure, and what the first one finds is recorded in all.

    Args:
        every: Measure after every so many training epochs.

    Raises:
        ValueError: `every` is less than 1.

    Reads: cbstate.history
    Writes: cbstate.metrics
    Runs after: Recorder, Metrics

    Example:
        >>> class Sparsity(MetricSource):
        ...     reads = ("cbstate.history", "model")
        ...     metric_names = ("zeros",)
        ...     def measure(self, learner):
        ...         return {"zeros": (learner.model.value == 0).float().mean()}
        >>> testing.toy_learner(Recorder(), Metrics(), Sparsity()).fit(2)["validation/zeros"]
        [0.0, 0.0]
    """

    every: int = field(default=1, kw_only=True, validator=number(least=1, whole=True))

    reads = ("cbstate.history",)
    draws = True
    recorded_as: ClassVar[type[Phase] | None] = ProbePhase

    def measure(self, learner: Any) -> Mapping[str, Any]:
        """Return metrics by name; numbers, or tensors on any device."""
        raise NotImplementedError

    @on(EpochEnd, AbstractTrainingPhase)
    def record(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Measure, and record what was found."""
        counts = learner.cbstate.history[phase]
        if counts.epochs % self.every == 0:
            metrics = learner.cbstate.metrics[self.recorded_as or phase]
            found, group = dict(self.measure(learner)), learner.accelerator.group
            if group is not None:
                found = group.broadcast(map_tensors(lambda tensor: tensor.detach().cpu(), found))
            for name, value in found.items():
                metrics.record(name, counts.epoch, value, type(self).__name__)


def flat(module: nn.Module, xs: Any) -> Tensor:
    """Return the output of a module, flattened to a row of numbers for each input."""
    features = module(xs)
    if not isinstance(features, Tensor):
        raise DataError(
            f"a probe got {describe(features)} from {type(module).__name__}; expected a tensor: say what the features "
            "are, KNNProbe(..., features=lambda module, xs: module(xs)[0])"
        )
    return features.flatten(1)


def extract(module: nn.Module, source: Any, features: Features = flat) -> tuple[Tensor, Tensor]:
    """Run a module over labelled data in eval mode, without gradients and without a trace.

    The module's modes are put back, and so are a loader's own generators.

    Args:
        module: Whose features.
        source: A loader of batches ``(xs, ys)``.
        features: ``(module, xs) -> (N, F)``.

    Returns:
        Features (N, F) and labels (N,), on the module's device.

    Raises:
        DataError: Its batches are no pairs of rows and labels.
    """
    rows, labels = [], []
    with watching(module), untouched(source):
        for batch in complete(source):
            _check_labelled(batch, features)
            xs, ys = to_device_of(module, (batch[0], batch[1]))
            rows.append(features(module, xs))
            labels.append(ys)
    if not rows:
        raise DataError(f"{describe(source)} gave a probe no batch; expected labelled rows, (xs, ys)")
    return torch.cat(rows), torch.cat(labels)


def loader(given: Any) -> Any:
    """Make a loader of rows with batches of 256; a loader stays as it is."""
    return as_dataloader(given, batch_size=256) if holds_rows(given) else as_dataloader(given)


def _check_labelled(batch: Any, features: Features) -> None:
    """Raise `DataError` for a batch that is not rows with their classes."""
    data = "data of its own, KNNProbe('encoder', bank=(xs, ys), queries=(xs, ys))"
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise DataError(
            f"a probe was given {describe(batch)} as a batch; expected labelled rows, (xs, ys): give it {data}"
        )
    xs, ys = batch
    if features is flat and not isinstance(xs, Tensor):
        raise DataError(
            f"a probe was given rows that are {describe(xs)}, such as several views; expected tensors in "
            f"labelled rows, (xs, ys). Give it {data}, or features=..."
        )
    if ys.ndim != 1 or ys.is_floating_point() or ys.is_complex():
        raise DataError(
            f"a probe was given labels {describe(ys)} of {ys.dtype}; expected classes, whole numbers from 0 of "
            f"shape (N,), in labelled rows, (xs, ys). Give it {data}"
        )


@define
class HeldOut(MetricSource):
    """Base of probes, which look at a model's features of held-out rows.

    Args:
        model: Name of the weights: ``"encoder"``, ``"student.encoder"``, ``"encoder@ema"``, or
            ``"model"`` for a single model.
        queries: Labelled rows to classify, anything `as_dataloader` takes; left out, the learner's
            validation data.
        features: ``(module, xs) -> (N, F)``; left out, the module's output, flattened.
        metric: Name of the metric.
    """

    model: str = "model"
    queries: Any = field(default=None, kw_only=True, repr=False)
    features: Features = field(default=flat, kw_only=True, repr=False)
    metric: str = field(default="", kw_only=True)

    prefix: ClassVar[str] = "probe"
    rename_hint = "give one another name: {}(..., metric='...')"
    higher_is_better = True
    _fixed: ClassVar[tuple[str, ...]] = ("model", "metric")

    def __attrs_post_init__(self) -> None:
        check_name(type(self).__name__, "model", self.model)
        self.metric = (self.metric or f"{self.prefix}_{self.model}").lower()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The one metric it records."""
        return (self.metric,)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # the model's
        """The weights, the learner's data, and the epoch."""
        return (weights_path(self.model), "data", "cbstate.history")

    def init(self, learner: Any) -> None:
        """Look for the weights and the data, and publish the metrics' container."""
        super().init(learner)
        learner.weights[self.model]
        if self.queries is not None:
            loader(self.queries)

    def data(self, learner: Any, given: Any, key: str) -> Any:
        """Return a loader of what was given, or of the learner's data.

        Raises:
            DataError: Neither is there.
        """
        if given is not None:
            source = loader(given)
        elif key in learner.data:
            source = learner.data[key]
        else:
            raise DataError(
                f"{type(self).__name__} measures on the {key} data, and the learner has none; give it some: "
                f"{type(self).__name__}({self.model!r}, queries=(xs, ys), ...)"
            )
        if hasattr(source, "__next__"):
            raise DataError(f"{describe(source)} can be iterated once only, and a probe runs over its data every epoch")
        return source

    def sources(self, learner: Any) -> list[Any]:
        """Return the loaders it runs over.

        Raises:
            DataError: One is missing, or can be iterated once only.
        """
        return [self.data(learner, self.queries, "validation")]

    @on(EpochBegin, AbstractTrainingPhase)
    def look_for_data(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Raise for missing data before the first step."""
        self.sources(learner)


@define
class KNNProbe(HeldOut):
    """Classify held-out rows by their nearest neighbours among training rows, every epoch.

    The features of both come from the weights as they are, in eval mode; `knn_predict` says how
    neighbours vote (Wu et al., 2018). Neither weights, modes, data order nor random numbers of
    the training are touched. Recorded as ``history["validation/knn_encoder"]``: the name says
    which weights it saw.

    Args:
        model: Name of the weights: ``"encoder"``, ``"student.encoder"``, ``"encoder@ema"``, or
            ``"model"`` for a single model.
        bank: Labelled training rows, anything `as_dataloader` takes; left out, the learner's
            training data, whose batches are ``(xs, ys)`` then.
        queries: Labelled rows to classify; left out, the learner's validation data.
        k: Number of neighbours.
        temperature: Divides the similarities in their votes; None gives every neighbour the same vote.
        features: ``(module, xs) -> (N, F)``; left out, the module's output, flattened.
        metric: Name of the metric; left out, ``"knn_<model>"``.
        every: Measure after every so many training epochs.

    Raises:
        ModelError: There are no such weights.
        DataError: There is no labelled data.
        ValueError: `k`, `temperature` or `every` is out of range.

    Reads: model, data, cbstate.history (of the models, only the one it measures)
    Writes: cbstate.metrics
    Runs after: Recorder, Metrics

    Example:
        >>> rows, labels = torch.randn(64, 4), torch.arange(64) % 2
        >>> data = ((rows, labels), (rows[:16], labels[:16]))
        >>> learner = Learner(torch.nn.Linear(4, 2), torch.nn.CrossEntropyLoss(), data=data, default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), Metrics(), KNNProbe(k=5)])
        >>> len(learner.fit(2)["validation/knn_model"])
        2
    """

    bank: Any = field(default=None, kw_only=True, repr=False)
    k: int = field(default=20, kw_only=True, validator=number(least=1, whole=True))
    temperature: float | None = field(default=0.07, kw_only=True, validator=number(above=0, none=True))

    prefix = "knn"

    def init(self, learner: Any) -> None:
        """Look for the weights and the data, and publish the metrics' container."""
        super().init(learner)
        if self.bank is not None:
            loader(self.bank)

    def sources(self, learner: Any) -> list[Any]:
        """Return the loaders of the bank and of the rows to classify."""
        return [self.data(learner, self.bank, "training"), *super().sources(learner)]

    def measure(self, learner: Any) -> Mapping[str, Any]:
        """Return the share of held-out rows classified rightly."""
        module = learner.weights[self.model]
        (bank, labels), (queries, answers) = (
            extract(module, source, self.features) for source in self.sources(learner)
        )
        predicted = knn_predict(bank, labels, queries, k=min(self.k, len(bank)), temperature=self.temperature)
        if not (bank.isfinite().all() and queries.isfinite().all()):
            return {self.metric: float("nan")}  # nothing is near to a NaN
        return {self.metric: (predicted == answers).float().mean()}


@define
class LinearProbe(HeldOut):
    """Train a linear classifier on the side, on the features of each training step, detached.

    It has its own weights and optimizer, so it needs no forward of its own while training, and no
    gradient reaches the model. Where several processes train, it learns from the rows of all. After an
    epoch it classifies held-out rows by their features from the named weights, in eval mode. Neither
    weights, modes, data order nor random numbers of the training are touched. Recorded as
    ``history["validation/linear_encoder"]``.

    Args:
        model: Name of the weights whose features the phase stores: ``"encoder"``,
            ``"student.encoder"``, ``"model"`` for a single model, or averaged ones, ``"encoder@ema"``.
        num_classes: Number of classes.
        queries: Labelled rows to classify; left out, the learner's validation data.
        optimizer: A factory that takes parameters.
        entries: The step's entries of features (N, F) and labels (N,).
        features: ``(module, xs) -> (N, F)`` for held-out rows; left out, the module's output, flattened.
        metric: Name of the metric; left out, ``"linear_<model>"``.
        every: Measure after every so many training epochs.

    Raises:
        ModelError: There are no such weights.
        MissingEntryError: The phase stores no features, or its batches have no labels.
        DataError: There is no labelled data.
        ValueError: `num_classes` is less than 2, or `every` less than 1.

    Reads: model, data, step.features, step.ys, seed, cbstate.history (of the models, only the one it measures)
    Writes: cbstate.metrics
    Runs after: Recorder, Metrics

    Example:
        >>> rows, labels = torch.randn(64, 4), torch.arange(64) % 3
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 8)}
        >>> learner = Learner(models, data=((rows, labels), (rows[:16], labels[:16])), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), Metrics(), LinearProbe("encoder", num_classes=3)])
        >>> history = learner.fit(2, phases=[SimCLRPhase(TwoViews(lambda rows: rows + torch.randn_like(rows)))])
        >>> len(history["validation/linear_encoder"])
        2
    """

    num_classes: int = field(default=10, validator=number(least=2, whole=True))
    optimizer: Callable[..., torch.optim.Optimizer] = field(
        default=partial(torch.optim.Adam, lr=1e-2), kw_only=True, repr=False
    )
    entries: tuple[str, str] = field(default=("features", "ys"), kw_only=True)
    _probe: nn.Linear | None = field(default=None, init=False, repr=False)
    _stepper: torch.optim.Optimizer | None = field(default=None, init=False, repr=False)
    """The classifier's optimizer."""
    _loaded: dict[str, Any] = field(factory=dict, init=False, repr=False)
    """A state that was loaded before the first features."""

    prefix = "linear"
    draws = False  # what its beginning and its measuring draw is put back
    _fixed = ("model", "metric", "num_classes", "optimizer", "entries")

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # the model's and the step's
        """The weights, the learner's data, the step's features and labels, and the epoch."""
        steps = (f"step.{entry}" for entry in self.entries)
        return (weights_path(self.model), "data", *steps, "seed", "cbstate.history")

    def init(self, learner: Any) -> None:
        """Look for the weights, publish the metrics' container, and begin anew."""
        super().init(learner)
        self._probe = self._stepper = None  # what was loaded before waits until the first features come

    @on(StepEnd, AbstractTrainingPhase)
    def train(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Train the classifier on this step's features."""
        features, labels = (learner.step[entry] for entry in self.entries)
        features = in_single(features.detach().flatten(1))
        with torch.enable_grad():
            probe, stepper = self._classifier(features, learner.seed)
            loss, group = cross_entropy(probe(features), labels.long()), learner.accelerator.group
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            if group is not None:
                average_gradients(list(probe.parameters()), len(features), group)
        stepper.step()
        stepper.zero_grad()

    def _classifier(self, features: Tensor, seed: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
        """Return the classifier and its optimizer, made for the first features and loaded where a state waits."""
        if self._probe is None or self._stepper is None:
            with drawing(stream_seed(seed, f"LinearProbe/{self.metric}")):
                self._probe = nn.Linear(features.shape[1], self.num_classes).to(features)
            self._stepper = self.optimizer(self._probe.parameters())
            if self._loaded:
                self._probe.load_state_dict(self._loaded["probe"])
                self._stepper.load_state_dict(self._loaded["optimizer"])
                self._loaded = {}
        return self._probe, self._stepper

    def measure(self, learner: Any) -> Mapping[str, Any]:
        """Return the share of held-out rows classified rightly; nothing before the first step."""
        if self._probe is None and not self._loaded:
            return {}
        module = learner.weights[self.model]
        with drawing(stream_seed(learner.seed, f"LinearProbe/{self.metric}/measure")):
            queries, answers = extract(module, self.sources(learner)[0], self.features)
        queries = in_single(queries)
        probe, _ = self._classifier(queries, learner.seed)
        with torch.no_grad():
            return {self.metric: (probe(queries).argmax(1) == answers).float().mean()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the classifier and its optimizer's state."""
        if self._probe is None or self._stepper is None:
            return self._loaded
        return {"probe": self._probe.state_dict(), "optimizer": self._stepper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self._probe = self._stepper = None
        self._loaded = copy.deepcopy(state)
