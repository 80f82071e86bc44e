"""Notice when a representation collapses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from fluxloop.callback import on
from fluxloop.callbacks.probe import MetricSource
from fluxloop.errors import describe
from fluxloop.events import EpochBegin, StepEnd
from fluxloop.guard.given import check_called, check_name, named, number
from fluxloop.metrics.representation import rankme
from fluxloop.phase import AbstractTrainingPhase


def _functions_by_name(instance: Any, attribute: Any, value: Any) -> None:
    """Raise, as a validator of a field, for something that is no mapping of names to functions."""
    if not isinstance(value, Mapping):
        raise TypeError(f"FeatureStats(measures={describe(value)}) was given; expected {{'uniformity': uniformity}}")
    for name, function in value.items():
        check_name("FeatureStats", "a name of measures", name)
        check_called("FeatureStats", f"measures[{name!r}]", function, "a function of features (N, F)")


@define
class FeatureStats(MetricSource):
    """Record how varied the features of an epoch's last rows are.

    ``<entry>_std`` is the standard deviation of each dimension over rows, averaged over
    dimensions; it goes to 0 when all rows become the same. ``<entry>_rank`` is the effective rank,
    `rankme` (RankMe, Garrido et al., 2023), from 1, where all rows lie on a line, to the smaller of rows and
    dimensions.

    Args:
        entry: The step's entry of features (N, ...), such as ``"features"`` or ``"z1"``.
        rows: How many of the epoch's last rows to look at, of all processes together; more than there are dimensions.
        measures: More functions of these rows (N, F) in float64, by what they are called:
            ``{"uniformity": uniformity}`` records ``<entry>_uniformity``.
        every: Measure after every so many training epochs.

    Raises:
        MissingEntryError: The phase does not store the entry.
        ValueError: `rows` or `every` is less than 1, or a name of `measures` is empty.
        TypeError: One of `measures` cannot be called.

    Attributes:
        std: The standard deviation of each dimension, shape (F,), after the last epoch measured.

    Reads: step.features, cbstate.history (of the step, the entry)
    Writes: cbstate.metrics
    Runs after: Recorder, Metrics

    Example:
        >>> learner = testing.toy_learner(Recorder(), Metrics(), FeatureStats("preds"))
        >>> history = learner.fit(2)
        >>> len(history["training/preds_std"]), len(history["training/preds_rank"])
        (2, 2)
    """

    entry: str = field(default="features", validator=named())
    rows: int = field(default=1024, kw_only=True, validator=number(least=1, whole=True))
    measures: Mapping[str, Callable[[Tensor], Any]] = field(factory=dict, kw_only=True, validator=_functions_by_name)
    std: Tensor | None = field(default=None, init=False, repr=False)
    _kept: deque[Tensor] = field(factory=deque, init=False, repr=False)  # checkpoints call it so
    _count: int = field(default=0, init=False, repr=False)

    recorded_as = None
    draws = False
    _fixed = ("entry",)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics it records."""
        return tuple(f"{self.entry}_{name}".lower() for name in ("std", "rank", *self.measures))

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]  # the entry's
        """The entry, and the epoch."""
        return (f"step.{self.entry}", "cbstate.history")

    @on(EpochBegin, AbstractTrainingPhase)
    def start(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Begin an epoch without rows."""
        self._kept.clear()
        self._count = 0

    @on(StepEnd, AbstractTrainingPhase)
    def collect(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Add the step's features, and drop what is older than the rows asked for."""
        features = learner.step[self.entry]
        if isinstance(features, (tuple, list)):  # one tensor per view: the rows of all
            features = torch.cat(list(features))
        features, group = features.detach(), learner.accelerator.group
        if group is not None and group.spare:
            features = features[:0]  # the step has none of this process, and stays in line with those of others
        self._kept.append(features)
        self._count += len(features)
        while self._count - len(self._kept[0]) >= self.rows:
            self._count -= len(self._kept.popleft())

    def measure(self, learner: Any) -> Mapping[str, Any]:
        """Return the mean standard deviation, the effective rank, and what more is measured."""
        if not self._kept:
            return {}
        kept, group = list(self._kept), learner.accelerator.group
        if group is not None:
            kept = _of_all(group.gather_objects([each.cpu() for each in kept]))
        features = torch.cat(kept)[-self.rows :].flatten(1).double().cpu()
        self.std = features.std(0, correction=0).float()
        more = [measure(features) for measure in self.measures.values()]
        return dict(zip(self.metric_names, (self.std.mean(), rankme(features), *more), strict=True))


def _of_all(kept: list[list[Tensor]]) -> list[Tensor]:
    """Return the rows that processes have kept, step by step: the last ones are the same, some may have more."""
    steps = list(zip_longest(*map(reversed, kept)))
    return [rows for step in reversed(steps) for rows in step if rows is not None]
