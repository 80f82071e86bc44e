"""Watch one recorded metric: its newest value, and whether that is better than another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import isnan
from typing import Any, Literal

from attrs import define, field, frozen

from fluxloop.errors import MetricError, did_you_mean
from fluxloop.state import name_of

Mode = Literal["min", "max"]


def _name(metric: Any) -> str:
    """Return a metric's full name as it is recorded.

    Raises:
        MetricError: It does not say of which data.
    """
    if not isinstance(metric, str) or "/" not in metric:
        raise MetricError(
            f"monitor={metric!r} was given; expected the data's key and the metric's name: monitor='validation/loss'"
        )
    key, _, name = metric.partition("/")
    return f"{key}/{name.lower()}"


@frozen
class Expected:
    """A metric that a callback is going to record in the epochs of a phase.

    Args:
        name: Its name; with ``*`` at its end, the beginning of those of several that are not known before.
        mode: Which way is better, ``"min"`` or ``"max"``; None where nobody knows.
        certain: Whether it will be there for sure.
        rare: Whether epochs may pass without a value.
    """

    name: str
    mode: Mode | None = None
    certain: bool = True
    rare: bool = False

    def fits(self, name: str) -> bool:
        """Return whether a metric is the one, or one of those, that is meant."""
        return name.startswith(self.name[:-1]) if self.name.endswith("*") else name == self.name


@define
class Monitor:
    """A recorded metric, and which of two values of it is better.

    Args:
        metric: The phase's name, or its data key where one phase alone records the metric; then the metric's name:
            ``"Noisy/loss"``, ``"validation/loss"``.
        mode: ``"min"`` where less is better, ``"max"`` where more is; None: what the metric says of itself.
        purpose: What it is watched for, for messages.
        compares: Whether its values are compared, so that which way is better has to be known.

    Attributes:
        known: What the metric says of itself, once a learner has it; None where it says nothing.
        among: Names of the phases that may record it in the running fit; None outside of one.
        waits: Whether it is known that it may come in the running fit, however late.

    Raises:
        MetricError: No such name can be recorded.
        ValueError: Another mode.
    """

    metric: str = field(default="validation/loss", converter=_name)
    mode: Mode | None = field(default=None)
    purpose: str = field(default="", eq=False, repr=False)
    compares: bool = field(default=True, eq=False, repr=False)
    known: Mode | None = field(default=None, init=False, eq=False, repr=False)
    among: tuple[str, ...] | None = field(default=None, init=False, eq=False, repr=False)
    waits: bool = field(default=False, init=False, eq=False, repr=False)

    @mode.validator
    def _check_mode(self, attribute: object, mode: str | None) -> None:
        if mode not in ("min", "max", None):
            raise ValueError(f"mode={mode!r} was given; expected 'min' or 'max', or None where the metric knows")

    def after(self, former: Monitor | None) -> Monitor:
        """Return this one, with what another one of the same metric knew of the learner and the running fit."""
        if former is not None and former.metric == self.metric:
            self.known, self.among, self.waits = former.known, former.among, former.waits
        return self

    @property
    def direction(self) -> Mode | None:
        """Which way is better: as it was given, as the metric says, ``"min"`` for a loss; None where nobody knows."""
        return self.mode or self.known or ("min" if "loss" in self.metric.partition("/")[2] else None)

    def require_direction(self, owner: str) -> Mode:
        """Return `direction`; ``"min"`` where it does not matter.

        Args:
            owner: The class of the callback that watches.

        Raises:
            MetricError: Nobody knows it.
        """
        if self.direction is None and self.compares:
            raise MetricError(
                f"{owner} watches {self.metric!r}, and nobody says which way is better; expected mode='max' where more "
                f"is, mode='min' where less is: {owner}(..., mode='max'). A metric of one's own may say so itself: "
                "Metric(f, higher_is_better=True)"
            )
        return self.direction or "min"

    def newest(self, metrics: Mapping[Any, Any]) -> tuple[int, float] | None:
        """Return the newest (epoch from 1, value), or None where the metric has not been recorded.

        Args:
            metrics: ``cbstate.metrics``.

        Raises:
            MetricError: Its values are no numbers.
        """
        for epoch, value in reversed(self._series(metrics)):
            if not isinstance(value, (int, float)):
                raise MetricError(f"the metric {self.metric!r} is no number: {value!r}; monitor one that is")
            return epoch, float(value)
        return None

    def newest_epoch(self, metrics: Mapping[Any, Any]) -> int:
        """Return the epoch of `newest`, or 0 where the metric has not been recorded.

        Args:
            metrics: ``cbstate.metrics``.

        Raises:
            MetricError: Its values are no numbers.
        """
        newest = self.newest(metrics)
        return 0 if newest is None else newest[0]

    def new(self, metrics: Mapping[Any, Any], seen: int) -> tuple[int, float] | None:
        """Return `newest`, or None where it is the one that was seen already.

        Args:
            metrics: ``cbstate.metrics``.
            seen: Its epoch, 0 for none.

        Raises:
            MetricError: Its values are no numbers.
        """
        newest = self.newest(metrics)
        return None if newest is None or newest[0] == seen else newest

    def require(self, metrics: Mapping[Any, Any]) -> None:
        """Raise for a metric that has not been recorded though the phases that might have recorded it have run.

        Raises:
            MetricError: Names those that have been recorded.
        """
        recorded = {name_of(phase): metrics[phase] for phase in metrics}
        waits = self.waits or any(phase not in recorded or not recorded[phase].has_ended for phase in self.among or ())
        if not waits:
            try:
                find_series(metrics, self.metric, self.among)
            except MetricError as error:
                raise MetricError(f"{self.purpose}{error}") from None

    def _series(self, metrics: Mapping[Any, Any]) -> list[tuple[int, Any]]:
        return find_series(metrics, self.metric, self.among, missing_ok=True)

    def better(self, value: float, than: float | None, min_delta: float = 0.0) -> bool:
        """Return whether a value improves on another by more than `min_delta`; NaN never does.

        Args:
            value: The new one.
            than: The best so far; None where there is none.
            min_delta: In the metric's unit, 0 or more.
        """
        if isnan(value):
            return False
        if than is None:
            return True
        direction = self.require_direction("it")
        return value < than - min_delta if direction == "min" else value > than + min_delta


def find_series(
    metrics: Mapping[Any, Any], metric: str, among: tuple[str, ...] | None = None, *, missing_ok: bool = False
) -> list[tuple[int, Any]]:
    """Return the recorded (epoch, value) pairs of a metric.

    Args:
        metrics: ``cbstate.metrics``.
        metric: The phase's name, or its data key where one phase alone records the metric; then the metric's name.
        among: Names of the phases that are meant, where several on the data have recorded it; None for all.
        missing_ok: Whether one that has not been recorded gives an empty list.

    Raises:
        MetricError: It has not been recorded, or by several phases on the data.
    """
    key, _, name = metric.partition("/")
    found: dict[str, list[tuple[int, Any]]] = {
        name_of(phase): recorded.epochs[name] for phase, recorded in _recorded(metrics, name)
    }
    if key in found:
        return found[key]
    on_data = [name_of(phase) for phase, _ in _recorded(metrics, name) if phase.data_key == key]
    if len(on_data) > 1 and among:
        on_data = [phase for phase in on_data if phase in among]
    if len(on_data) == 1:
        return found[on_data[0]]
    if on_data:
        raise MetricError(
            f"{metric!r} is recorded by {len(on_data)} phases on the {key} data; expected the name of one of them: "
            f"{' or '.join(repr(f'{phase}/{name}') for phase in on_data)}"
        )
    if missing_ok:
        return []
    known = sorted(all_series(metrics))
    raise MetricError(f"no metric {metric!r} was recorded; there are {known}{did_you_mean(metric, known)}")


def _recorded(metrics: Mapping[Any, Any], name: str) -> list[tuple[Any, Any]]:
    """List the phases that have recorded a metric, with what they have."""
    return [(phase, recorded) for phase, recorded in metrics.items() if recorded.epochs.get(name)]


def all_series(metrics: Mapping[Any, Any]) -> dict[str, list[tuple[int, Any]]]:
    """Return every recorded series under the shortest name that no other one has.

    Args:
        metrics: ``cbstate.metrics``.
    """
    every = [(phase, name, series) for phase, recorded in metrics.items() for name, series in recorded.epochs.items()]
    plain = Counter(f"{phase.data_key}/{name}" for phase, name, series in every if series)
    found = {}
    for phase, name, series in every:
        if series:
            short = f"{phase.data_key}/{name}"
            found[short if phase.data_key and plain[short] == 1 else f"{name_of(phase)}/{name}"] = series
    return found
