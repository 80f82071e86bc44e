"""Measure a representation while it is trained, on features through which no gradient goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from attrs import define, evolve, field
from attrs.validators import optional
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fluxloop.callback import on
from fluxloop.callbacks import probe_parts as parts
from fluxloop.callbacks.features import (
    Features,
    encode,
    features_at_hand,
    flat,
    loader,
    row_at_hand,
    rows_for,
)
from fluxloop.callbacks.metrics import RecordsMetrics
from fluxloop.compute.modes import watching
from fluxloop.compute.precision import in_single
from fluxloop.compute.reach import loss_error
from fluxloop.errors import DataError, describe
from fluxloop.events import EpochBegin, EpochEnd, StepEnd
from fluxloop.guard.given import called, check_name, number
from fluxloop.metrics.expected import expected_of
from fluxloop.metrics.neighbors import knn_predict
from fluxloop.monitor import Expected
from fluxloop.nested import map_tensors
from fluxloop.order.access import weights_path
from fluxloop.phase import AbstractTrainingPhase, Phase, ProbePhase
from fluxloop.processes.gather import average_gradients
from fluxloop.randomness import drawing, stream_seed


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

    draws = False  # what rows and features draw is put back
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
        """The weights, the learner's data, the seed, and the epoch."""
        return (weights_path(self.model), "data", "seed", "cbstate.history")

    def init(self, learner: Any) -> None:
        """Look for the weights and the data, and publish the metrics' container."""
        super().init(learner)
        learner.weights[self.model]
        if self.queries is not None:
            loader(self.queries)

    def data(self, learner: Any, given: Any, key: str) -> Any:
        """Return a loader of what was given, or of the learner's data; see `rows_for`."""
        return rows_for(f"{type(self).__name__}({self.model!r}, queries=(xs, ys), ...)", learner, given, key)[1]

    def sources(self, learner: Any) -> list[Any]:
        """Return the loaders it runs over.

        Raises:
            DataError: One is missing, or can be iterated once only.
        """
        return [self.data(learner, self.queries, "validation")]

    def encode(self, learner: Any, given: Any, key: str, *, classes: bool = True) -> tuple[Tensor, Tensor]:
        """Return the features and the labels of what was given, or of the learner's data; see `features.encode`."""
        advice = f"{type(self).__name__}({self.model!r}, queries=(xs, ys), ...)"
        return encode(learner, self.model, *rows_for(advice, learner, given, key), self.features, classes=classes)

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

    Reads: model, data, seed, cbstate.history (of the models, only the one it measures)
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
        bank, labels = self.encode(learner, self.bank, "training")
        queries, answers = self.encode(learner, self.queries, "validation")
        predicted = knn_predict(bank, labels, queries, k=min(self.k, len(bank)), temperature=self.temperature)
        if not (bank.isfinite().all() and queries.isfinite().all()):
            return {self.metric: float("nan")}  # nothing is near to a NaN
        return {self.metric: (predicted == answers).float().mean()}


@define
class LinearProbe(HeldOut):
    """Train a classifier on the side, on the features of each training step, detached.

    It has its own weights and optimizer, so it needs no forward of its own while training, and no
    gradient reaches the model. Where several processes train, it learns from the rows of all. After an
    epoch it classifies held-out rows by their features from the named weights, in eval mode. Neither
    weights, modes, data order nor random numbers of the training are touched. Recorded as
    ``history["validation/linear_encoder"]``; with `metrics`, as ``"validation/linear_encoder_<metric>"``.

    The head is one linear map, or a network of your own. Where held-out rows lie in memory, one of them is run when the
    learner is built, so that a head that does not fit the features is said before anything is trained.

    Args:
        model: Name of the weights whose features the phase stores: ``"encoder"``,
            ``"student.encoder"``, ``"model"`` for a single model, or averaged ones, ``"encoder@ema"``.
        num_classes: Number of classes; the numbers that the head gives for each row.
        head: A module from features (N, F) to (N, num_classes), of which a copy is trained, or what makes one of F:
            ``lambda width: nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 10))``. Left out, ``nn.Linear``.
        queries: Labelled rows to classify; left out, the learner's validation data.
        optimizer: A factory that takes parameters (or ``named`` ones, or the ``model``) and makes one optimizer.
        schedule: The learning rate by the head's steps, from 0, such as ``cosine(1000, 0.1, 0.0)``; or schedules by
            hyperparameter, as `Scheduler` takes them: ``{LearningRate: ..., WeightDecay: ...}``. Left out, what the
            optimizer was made with.
        loss: ``(outputs, ys) -> scalar`` to train the head with; left out, the cross entropy of classes.
        metrics: What is measured of the head's outputs and the labels of all held-out rows, by name or in a list:
            functions ``(outputs, ys) -> scalar``, or objects of torchmetrics. Left out, the accuracy.
        entries: The step's entries of features (N, F) and labels (N,).
        features: ``(module, xs) -> (N, F)`` for held-out rows; left out, the module's output, flattened.
        metric: Name of the metric, or what names begin with; left out, ``"linear_<model>"``.
        every: Measure after every so many training epochs.

    Raises:
        ModelError: There are no such weights.
        MissingEntryError: The phase stores no features, or its batches have no labels.
        DataError: There is no labelled data, or features do not fit the head.
        OptimizerError: The head has nothing to train, or `optimizer` makes no optimizer, or several.
        CheckpointError: When a checkpoint is loaded: it is of a run with other schedules, or another head.
        ValueError: `num_classes` is less than 2 (1 with a `loss`), or `every` less than 1.
        TypeError: `head`, `optimizer`, `schedule` or `loss` is of another kind.
        MetricError: One of `metrics` is of another kind, or two have one name.

    Reads: model, data, step.features, step.ys, seed, cbstate.history (of the models, only the one it measures)
    Writes: cbstate.metrics
    Runs after: Recorder, Metrics

    Example:
        >>> rows, labels = torch.randn(64, 4), torch.arange(64) % 3
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 8)}
        >>> learner = Learner(models, data=((rows, labels), (rows[:16], labels[:16])), default_callbacks=False)
        >>> probe = LinearProbe("encoder", num_classes=3)
        >>> def two_layers(width):
        ...     return torch.nn.Sequential(torch.nn.Linear(width, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> deep = LinearProbe("encoder", 3, head=two_layers, schedule=cosine(4, 0.1, 0.0), metric="mlp")
        >>> learner.set_callbacks([Recorder(), Metrics(), probe, deep])
        >>> history = learner.fit(2, phases=[SimCLRPhase(TwoViews(lambda rows: rows + torch.randn_like(rows)))])
        >>> len(history["validation/linear_encoder"]), len(history["validation/mlp"])
        (2, 2)
    """

    num_classes: int = field(default=10, validator=number(least=1, whole=True))
    head: nn.Module | Callable[[int], nn.Module] | None = field(
        default=None, kw_only=True, repr=False, validator=optional(called("a module, or what makes one of a width"))
    )
    optimizer: Callable[..., torch.optim.Optimizer] = field(
        default=partial(torch.optim.Adam, lr=1e-2),
        kw_only=True,
        repr=False,
        validator=called("a factory: torch.optim.SGD"),
    )
    schedule: Any = field(default=None, kw_only=True, repr=False)
    loss: Callable[[Tensor, Tensor], Tensor] | None = field(
        default=None, kw_only=True, repr=False, validator=optional(called("a function (outputs, ys) -> scalar"))
    )
    metrics: Any = field(default=None, kw_only=True, repr=False)
    entries: tuple[str, str] = field(default=("features", "ys"), kw_only=True)
    _probe: nn.Module | None = field(default=None, init=False, repr=False)
    _stepper: torch.optim.Optimizer | None = field(default=None, init=False, repr=False)
    """The classifier's optimizer."""
    _steps: int = field(default=0, init=False, repr=False)
    """How many steps it has made."""
    _width: int | None = field(default=None, init=False, repr=False)
    """How many numbers a held-out row's features have, where that is known before the first step."""
    _loaded: dict[str, Any] = field(factory=dict, init=False, repr=False)
    """A state that was loaded before the first features."""

    prefix = "linear"
    _fixed = ("model", "metric", "num_classes", "head", "optimizer", "schedule", "loss", "metrics", "entries")

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.num_classes < 2 and self.loss is None:
            raise ValueError(
                f"LinearProbe(num_classes={self.num_classes}) was given; expected a whole number, 2 or more, or the "
                "loss of what is no classes: loss=lambda outputs, ys: ..."
            )
        self.schedule = parts.as_schedules(self.schedule)
        self.metrics = parts.as_metrics("LinearProbe", self.metrics)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics it records: one, or those it was given."""
        return tuple(f"{self.metric}_{each.name}" for each in self.metrics) or (self.metric,)

    def records(self, phase: Phase | None) -> Sequence[Expected] | None:
        """Return the metrics that it records, each with its own better way."""
        found = super().records(phase)
        if not self.metrics or not found:
            return found
        said = [each for metric in self.metrics for each in expected_of(metric, None)]
        return [evolve(each, name=each.name if each.name == "*" else f"{self.metric}_{each.name}") for each in said]

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # the model's and the step's
        """The weights, the learner's data, the step's features and labels, and the epoch."""
        steps = (f"step.{entry}" for entry in self.entries)
        return (weights_path(self.model), "data", *steps, "seed", "cbstate.history")

    def init(self, learner: Any) -> None:
        """Look for the weights, publish the metrics' container, begin anew, and look whether the head fits."""
        super().init(learner)
        self._probe = self._stepper = None  # what was loaded before waits until the first features come
        self._steps = 0
        self._width = self._look_at_a_row(learner)

    def _look_at_a_row(self, learner: Any) -> int | None:
        """Return how wide the features of a held-out row are; None where none lies at hand.

        Raises:
            DataError: The head does not take them, or gives something else than it should.
        """
        if self.queries is None and "validation" not in learner.data:
            return None
        row = row_at_hand(learner.data["validation"] if self.queries is None else loader(self.queries))
        module = learner.weights[self.model]
        with drawing(stream_seed(learner.seed, f"LinearProbe/{self.metric}")):
            features = None if row is None else features_at_hand(module, row, self.features)
            if features is None:
                return None
            head = self._make_head(in_single(features))
            with watching(head):
                self._run(head, in_single(features))
        return features.shape[1]

    def _make_head(self, features: Tensor) -> nn.Module:
        width = features.shape[1]
        if self.head is None:
            made: Any = nn.Linear(width, self.num_classes)
        else:
            made = copy.deepcopy(self.head) if isinstance(self.head, nn.Module) else self.head(width)
        if not isinstance(made, nn.Module):
            raise DataError(
                f"LinearProbe({self.model!r}): head gave {describe(made)} for features of {width} numbers; expected a "
                "module: head=lambda width: nn.Linear(width, 10)"
            )
        return made.to(features).train()

    def _run(self, head: nn.Module, features: Tensor) -> Tensor:
        """Return the outputs of the head, the first time that it sees features.

        Raises:
            DataError: It does not take them, or gives something else than a row of `num_classes` numbers for each.
        """
        given = f"LinearProbe({self.model!r}) was given features of {features.shape[1]} numbers for each row"
        advice = f"head=lambda width: nn.Linear(width, {self.num_classes})"
        try:
            outputs = head(features)
        except Exception as error:
            raise DataError(
                f"{given}, which its head does not take ({error}); expected a head of {features.shape[1]} "
                f"inputs: {advice}"
            ) from error
        if not isinstance(outputs, Tensor) or len(outputs) != len(features):
            raise DataError(f"{given}, of which its head made {describe(outputs)}; expected a row for each: {advice}")
        if self.loss is None and outputs.shape[1:] != (self.num_classes,):
            raise DataError(
                f"{given}, of which its head made {describe(outputs)}; expected num_classes={self.num_classes} numbers "
                f"for each: {advice}"
            )
        return outputs

    @on(StepEnd, AbstractTrainingPhase)
    def train(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Train the classifier on this step's features."""
        features, labels = (learner.step[entry] for entry in self.entries)
        features = in_single(features.detach().flatten(1))
        if self._probe is None:
            self._compare(features)
        probe, stepper = self._classifier(features, learner)
        parts.set_by_schedules(self.schedule, stepper, self._steps)
        own = self.head is not None or self.loss is not None  # these may draw, as dropout does
        stream = partial(stream_seed, learner.seed, f"LinearProbe/{self.metric}/step", self._steps)
        with torch.enable_grad(), drawing(stream()) if own else nullcontext():
            outputs, group = probe(features), learner.accelerator.group
            loss = cross_entropy(outputs, labels.long()) if self.loss is None else self.loss(outputs, labels)
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise loss_error(loss, f" of LinearProbe({self.model!r})")
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            if group is not None:
                average_gradients(list(probe.parameters()), len(features), group)
        stepper.step()
        stepper.zero_grad()
        self._steps += 1

    def _compare(self, features: Tensor) -> None:
        """Raise where a step's features are of another width than those of held-out rows."""
        if self._width not in (None, features.shape[1]):
            raise DataError(
                f"LinearProbe({self.model!r}): the step's {self.entries[0]!r} has {features.shape[1]} numbers for each "
                f"row, and {self.model!r} gives {self._width} for a held-out one; expected as many: say what the "
                "features are, features=lambda module, xs: ..., or which entry of the step has them, "
                "entries=('features', 'ys')"
            )

    def _classifier(self, features: Tensor, learner: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the classifier and its optimizer, made for the first features and loaded where a state waits."""
        if self._probe is None or self._stepper is None:
            whose, group = f"LinearProbe({self.model!r})", learner.accelerator.group
            with drawing(stream_seed(learner.seed, f"LinearProbe/{self.metric}")):
                probe = self._make_head(features)
                with watching(probe):
                    self._run(probe, features[:1])  # lazy parts of it get their weights
            if group is not None and self.head is not None:  # which each process may have made with weights of its own
                probe.load_state_dict(group.broadcast(map_tensors(Tensor.cpu, probe.state_dict())))
            stepper = parts.make_optimizer(whose, self.optimizer, probe)
            if self._loaded:
                parts.restore(whose, probe, stepper, self._loaded)
                self._steps = self._loaded.get("steps", 0)
                self._loaded = {}
            self._probe, self._stepper = probe, stepper
        return self._probe, self._stepper

    def measure(self, learner: Any) -> Mapping[str, Any]:
        """Return what is measured of the held-out rows; nothing before the first step."""
        if self._probe is None and not self._loaded:
            return {}
        own = self.loss is not None or bool(self.metrics)
        queries, answers = self.encode(learner, self.queries, "validation", classes=not own)
        probe, _ = self._classifier(in_single(queries), learner)
        with drawing(stream_seed(learner.seed, f"LinearProbe/{self.metric}/measure")), watching(probe):
            outputs = probe(in_single(queries))
            if self.metrics:
                found = parts.measured(self.metrics, outputs, answers)
                return {f"{self.metric}_{name}": value for name, value in found.items()}
            return {self.metric: (outputs.argmax(1) == answers).float().mean()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the classifier, its optimizer's state, and the steps made."""
        if self._probe is None or self._stepper is None:
            return self._loaded
        return {
            "probe": self._probe.state_dict(),
            "optimizer": self._stepper.state_dict(),
            "steps": self._steps,
            "schedules": parts.as_texts(self.schedule),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps.

        Raises:
            CheckpointError: It is of a run with other schedules; nothing is changed.
        """
        parts.check_schedules(f"LinearProbe({self.model!r})", state, parts.as_texts(self.schedule))
        self._probe = self._stepper = None
        self._steps = 0
        self._loaded = copy.deepcopy(state)
