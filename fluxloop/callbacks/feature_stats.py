"""Notice when a representation collapses."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from fluxloop.callback import on
from fluxloop.callbacks.probe import MetricSource
from fluxloop.events import EpochBegin, StepEnd
from fluxloop.guard.given import named, number
from fluxloop.phase import AbstractTrainingPhase


@define
class FeatureStats(MetricSource):
    """Record how varied the features of an epoch's last rows are.

    ``<entry>_std`` is the standard deviation of each dimension over rows, averaged over
    dimensions; it goes to 0 when all rows become the same. ``<entry>_rank`` is the effective rank,
    the exponential of the entropy of the singular values' shares (Roy and Vetterli, 2007; RankMe,
    Garrido et al., 2023), from 1, where all rows lie on a line, to the smaller of rows and
    dimensions.

    Args:
        entry: The step's entry of features (N, ...), such as ``"features"`` or ``"z1"``.
        rows: How many of the epoch's last rows to look at, of all processes together; more than there are dimensions.
        every: Measure after every so many training epochs.

    Raises:
        MissingEntryError: The phase does not store the entry.
        ValueError: `rows` or `every` is less than 1.

    Attributes:
        std: The standard deviation of each dimension, shape (F,), after the last epoch measured.

    Reads: step.features, cbstate.history (of the step, the entry)
    Writes: cbstate.metrics
    Runs after: Recorder, Metrics
    """

    entry: str = field(default="features", validator=named())
    rows: int = field(default=1024, kw_only=True, validator=number(least=1, whole=True))
    std: Tensor | None = field(default=None, init=False, repr=False)
    _kept: deque[Tensor] = field(factory=deque, init=False, repr=False)  # checkpoints call it so
    _count: int = field(default=0, init=False, repr=False)

    recorded_as = None
    draws = False
    _fixed = ("entry",)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The two metrics it records."""
        return (f"{self.entry}_std".lower(), f"{self.entry}_rank".lower())

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
        """Return the mean standard deviation and the effective rank."""
        if not self._kept:
            return {}
        kept, group = list(self._kept), learner.accelerator.group
        if group is not None:
            kept = _of_all(group.gather_objects([each.cpu() for each in kept]))
        features = torch.cat(kept)[-self.rows :].flatten(1).float().cpu()
        self.std = features.std(0, correction=0)
        return dict(zip(self.metric_names, (self.std.mean(), effective_rank(features)), strict=True))


def _of_all(kept: list[list[Tensor]]) -> list[Tensor]:
    """Return the rows that processes have kept, step by step: the last ones are the same, some may have more."""
    steps = list(zip_longest(*map(reversed, kept)))
    return [rows for step in reversed(steps) for rows in step if rows is not None]


def effective_rank(features: Tensor) -> Tensor:
    """Return the exponential of the entropy of the singular values' shares (Roy and Vetterli, 2007).

    Args:
        features: Shape (N, F).

    Returns:
        A scalar between 1 and min(N, F); 0 for features that are all zero, NaN where one is not finite.
    """
    if not features.isfinite().all():
        return features.new_full((), float("nan"))
    values: Tensor = torch.linalg.svdvals(features)
    if not values.any():
        return values.new_zeros(())
    entropy: Tensor = torch.special.entr(values / values.sum()).sum()
    return entropy.exp()
