"""Measure how far a generator's samples are from real rows, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from fluxloop.callback import on
from fluxloop.callbacks.features import loader
from fluxloop.callbacks.probe import MetricSource
from fluxloop.compute.models import to_device_of
from fluxloop.compute.modes import watching
from fluxloop.compute.precision import in_single
from fluxloop.data.passes import untouched
from fluxloop.data.sources import complete
from fluxloop.errors import DataError, describe
from fluxloop.events import EpochBegin
from fluxloop.guard.given import called, check_name, number
from fluxloop.metrics.samples import frechet_distance
from fluxloop.nested import map_tensors
from fluxloop.order.access import weights_path
from fluxloop.phase import AbstractTrainingPhase
from fluxloop.randomness import drawing, stream_seed
from fluxloop.screen.bars import length_of, tracked


@define
class FrechetDistance(MetricSource):
    """Record how far a generator's samples are from real rows, by features of both, after each epoch.

    With the features of Inception's last pooling it is FID; with another function of both features it is another
    distance, such as ``compare=kernel_distance`` (KID). The generator gets the same inputs every time, in eval mode,
    and draws the same numbers; the real rows are the same too. Neither weights, modes, data order nor random numbers
    of the training are touched. Recorded as ``history["validation/frechet_g@ema"]``: the name says which weights made
    the samples.

    Args:
        model: Name of the weights: ``"G"``, ``"G@ema"``, or ``"model"`` for a single model.
        extractor: What gives features (N, F), or more dimensions, of rows: a module, which runs where it is, in eval
            mode, or a function. It stays the same: those of the real rows are computed once.
        inputs: The generator's input, all rows of it, or a tuple of several.
        real: Real rows, anything `as_dataloader` takes, alone or first in a pair; left out, the learner's validation
            data. A loader that shuffles is gone through in one order.
        make: ``(module, *inputs) -> rows``, where calling the module does not give them, such as a phase's sampler.
        compare: ``(fake, real) -> number``, of features; left out, `frechet_distance`.
        metric: Name of the metric; left out, ``"frechet_<model>"``.
        batch_size: How many samples are made at once.
        every: Measure after every so many training epochs.

    Raises:
        ModelError: There are no such weights.
        DataError: There are no real rows, or something has no rows.
        ValueError: A number is out of range, or features do not fit.

    Reads: model, data, seed, cbstate.history (of the models, only the one it measures)
    Writes: cbstate.metrics
    Runs after: Recorder, Metrics

    Example:
        >>> models = {"G": torch.nn.Linear(2, 4), "D": torch.nn.Linear(4, 1)}
        >>> noise, real = torch.randn(50, 2), torch.randn(60, 4)
        >>> distance = FrechetDistance("G", lambda rows: rows[:, :2], inputs=noise, real=real)
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), distance])
        >>> history = learner.fit(3, phases=[GANPhase(noise=2)])
        >>> len(history["validation/frechet_g"])
        3
    """

    model: str = "model"
    extractor: Callable[[Any], Tensor] = field(
        default=None, repr=False, validator=called("what gives features of rows: a module, or a function")
    )
    inputs: Any = field(default=None, kw_only=True, repr=False)
    real: Any = field(default=None, kw_only=True, repr=False)
    make: Callable[..., Any] | None = field(default=None, kw_only=True, repr=False)
    compare: Callable[[Tensor, Tensor], Any] = field(
        default=frechet_distance, kw_only=True, repr=False, validator=called("a function (fake, real) -> number")
    )
    metric: str = field(default="", kw_only=True)
    batch_size: int = field(default=256, kw_only=True, validator=number(least=1, whole=True))
    _real_features: Tensor | None = field(default=None, init=False, repr=False)

    rename_hint = "give one another name: {}(..., metric='...')"
    higher_is_better = False
    transient = ("extractor", "inputs", "real", "_real_features")  # they stay the same, and may be large
    draws = False  # what samples draw is put back
    _fixed = ("model", "metric")

    def __attrs_post_init__(self) -> None:
        check_name(type(self).__name__, "model", self.model)
        self.metric = (self.metric or f"frechet_{self.model}").lower()
        self._count()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The one metric it records."""
        return (self.metric,)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # the model's
        """The weights, the learner's data, the seed, and the epoch."""
        return (weights_path(self.model), "data", "seed", "cbstate.history")

    def init(self, learner: Any) -> None:
        """Look for the weights, and publish the metrics' container."""
        super().init(learner)
        learner.weights[self.model]
        self._real_features = None

    def _count(self) -> int:
        """Return the number of samples.

        Raises:
            DataError: The inputs have no rows, or not as many of each.
        """
        given = self.inputs if isinstance(self.inputs, (tuple, list)) else (self.inputs,)
        counts = {len(each) for each in given if isinstance(each, Tensor) and each.ndim}
        if len(counts) != 1 or counts == {0}:
            raise DataError(
                f"{type(self).__name__}(inputs={describe(self.inputs)}) was given; expected the generator's input, or "
                f"a tuple of several with as many rows: {type(self).__name__}({self.model!r}, extractor, "
                "inputs=torch.randn(1000, 64))"
            )
        return counts.pop()

    def _source(self, learner: Any) -> Any:
        if self.real is not None:
            return loader(self.real)
        if "validation" not in learner.data:
            raise DataError(
                f"{type(self).__name__} compares samples with the validation data, and the learner has none; give it "
                f"real rows: {type(self).__name__}({self.model!r}, extractor, inputs=..., real=images)"
            )
        return learner.data["validation"]

    @on(EpochBegin, AbstractTrainingPhase)
    def look_for_data(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Raise for missing data before the first step."""
        self._source(learner)

    def measure(self, learner: Any) -> Mapping[str, Any]:
        """Return the distance."""
        module, name = learner.weights[self.model], f"{type(self).__name__}/{self.metric}"
        if self._real_features is None:
            source = self._source(learner)
            with untouched(source), drawing(stream_seed(learner.seed, f"{name}/real")):
                batches = tracked(complete(source), f"{self.metric}: real rows", length_of(source))
                rows = (batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches)
                self._real_features = torch.cat([self._features(each) for each in rows])
        with drawing(stream_seed(learner.seed, name)):
            samples = tracked(self._samples(module), f"{self.metric}: samples", -(-self._count() // self.batch_size))
            fake = torch.cat([self._features(each) for each in samples])
        return {self.metric: self.compare(fake, self._real_features.to(fake.device))}

    def _samples(self, module: nn.Module) -> Any:
        """Make samples, batch by batch."""
        make = module if self.make is None else partial(self.make, module)
        given = self.inputs if isinstance(self.inputs, (tuple, list)) else (self.inputs,)
        for start in range(0, self._count(), self.batch_size):
            rows = slice(start, start + self.batch_size)
            cut = map_tensors(partial(_rows_of, rows=rows), tuple(given))
            with watching(module):
                yield make(*to_device_of(module, cut))

    def _features(self, rows: Any) -> Tensor:
        """Return the features of rows, a row of numbers for each, in float32 or more.

        Raises:
            DataError: The extractor gives no tensor.
        """
        module = self.extractor if isinstance(self.extractor, nn.Module) else None
        with torch.no_grad() if module is None else watching(module):
            given = rows if module is None or next(module.parameters(), None) is None else to_device_of(module, rows)
            features = self.extractor(given)
        if not isinstance(features, Tensor) or not features.ndim:
            raise DataError(
                f"{type(self).__name__} got {describe(features)} from its extractor; expected features (N, F): "
                "lambda rows: network(rows)[0], for one that gives several"
            )
        return in_single(features.flatten(1))


def _rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Return some rows of a tensor; one without rows as it is."""
    return tensor[rows] if tensor.ndim else tensor
