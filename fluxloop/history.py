"""What happened: counts and metrics per phase, and why a fit stopped."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from attrs import Factory, define, field

from fluxloop.errors import MetricError, counted
from fluxloop.monitor import all_series, find_series
from fluxloop.state import Container, PhaseDict, SharedState, name_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_PARTS = 20
"""How many numbers of a vector are shown and logged each by itself."""


def numbers_in(name: str, value: Any) -> dict[str, float]:
    """Return the numbers in a recorded value by the names under which they are shown and logged.

    A number is one; a vector of up to 20 numbers, such as the accuracy of each class, is one for
    each part, ``"accuracy/0"``, ``"accuracy/1"``, …. Nothing else has any.

    >>> numbers_in("accuracy", [0.5, 1.0])
    {'accuracy/0': 0.5, 'accuracy/1': 1.0}
    """
    if isinstance(value, (int, float)):
        return {name: value}
    parts = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(parts, (list, tuple)) or not 0 < len(parts) <= MOST_PARTS:
        return {}
    if not all(isinstance(part, (int, float)) for part in parts):
        return {}
    return {f"{name}/{index}": part for index, part in enumerate(parts)}


Points = list[tuple[int, float]]
"""Numbers by the epoch that they belong to."""


def draw_panels(who: str, panels: Mapping[str, Mapping[str, Points]]) -> Figure:
    """Draw a panel for each metric, with a line for each phase or run.

    Args:
        who: Who draws, for messages.
        panels: Lines by the metric's name, then by what the legend calls them.

    Raises:
        ImportError: matplotlib is not installed.
        MetricError: There is none.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"{who} needs matplotlib: pip install 'torch-fluxloop[plot]'") from error
    if not panels:
        raise MetricError("no metric was recorded; fit with the Metrics callback (a default one) first")
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def shown_as(number: float, digits: int) -> str:
    """Return a number as people read it: whole numbers whole, others with so many significant digits."""
    return str(number) if isinstance(number, int) else f"{number:.{digits}g}"


@define
class Counts(Container):
    """How much of one phase has run; cancelled steps are not counted.

    Args:
        epochs: Epochs ended.
        steps: Steps ended, in all epochs.
        steps_epoch: Steps ended in the last or running epoch.
        updates: Optimizer steps by the optimizer's name (None for a single unnamed one).
        epoch: Where the values of its last epoch stand, from 1: the cycle of the fit in which it ran; outside of a fit,
            the phase's own epoch, or that of the training before it.
        label: What logs call it: the data key of the phase that was alone on the data when it first ran, of another one
            its name.

    Example:
        >>> counts = testing.toy_learner(Recorder(), num_batches=4).fit(3)[TrainingPhase]
        >>> counts.epochs, counts.steps, counts.steps_epoch, counts.updates
        (3, 12, 4, {None: 12})
    """

    epochs: int = 0
    steps: int = 0
    steps_epoch: int = 0
    updates: dict[str | None, int] = Factory(dict)
    epoch: int = field(default=0, eq=False, repr=False)
    label: str = field(default="", eq=False, repr=False)


def trained_epochs(counts: Mapping[Any, Counts]) -> int:
    """Return the epoch that training has come to, of whichever training phase.

    Args:
        counts: ``cbstate.history``.
    """
    return max((max(counts[phase].epoch, counts[phase].epochs) for phase in counts if phase.gradients), default=0)


class History(Container):
    """The history of a learner: ``learner.history``.

    ``history[TrainingPhase]`` gives the `Counts` of a phase, ``history.metrics[TrainingPhase]``
    its epoch values by metric. ``history["ValidationPhase/loss"]`` gives the values of one metric by
    the phase's name; ``history["validation/loss"]`` by its data key, where one phase alone records it.

    Attributes:
        seed: The seed that decides the run's random numbers.
        cycles: Passes through the phases of a fit that were completed.
        stop_reason: Why the last fit stopped early, or None.

    Example:
        >>> history = testing.toy_learner(Recorder(), Metrics(mae)).fit(2)
        >>> history.cycles, history.stop_reason, history[TrainingPhase].epochs, len(history["validation/mae"])
        (2, None, 2, 2)
    """

    def __init__(self, shared: SharedState, seed: int) -> None:
        self._shared = shared
        self.seed = seed
        self.cycles = 0
        self.stop_reason: str | None = None

    def __getitem__(self, key: Any) -> Any:
        counts = vars(self._shared).get("history")
        if isinstance(key, str):
            if counts is not None and "/" not in key and counts.key(key) is not None:
                return counts[counts.key(key)]
            return self._series(key)
        return counts.peek(key) if counts is not None else Counts()

    @property
    def trained_steps(self) -> int:
        """Training steps that have ended, of all training phases."""
        counts = vars(self._shared).get("history", {})
        return sum(counts[phase].steps for phase in counts if phase.gradients)

    @property
    def metrics(self) -> PhaseDict[dict[str, list[Any]]]:
        """Epoch values by phase, then by the metric's name: one value per epoch."""
        found: PhaseDict[dict[str, list[Any]]] = PhaseDict(dict)
        for phase, metrics in vars(self._shared).get("metrics", {}).items():
            found[phase] = {name: [value for _, value in series] for name, series in metrics.epochs.items()}
        return found

    def _series(self, monitor: str) -> list[Any]:
        """Return the epoch values of ``"<phase or data key>/<metric>"``.

        Raises:
            MetricError: No such metric has been recorded, or several phases on the same data record it.
        """
        return [value for _, value in find_series(vars(self._shared).get("metrics", {}), monitor)]

    def rows(self) -> list[dict[str, Any]]:
        """Return every recorded epoch value as a row: phase, metric, epoch (from 1), value."""
        return [
            {"phase": name_of(phase), "metric": name, "epoch": epoch, "value": value}
            for phase, metrics in vars(self._shared).get("metrics", {}).items()
            for name, series in metrics.epochs.items()
            for epoch, value in series
        ]

    def to_frame(self) -> Any:
        """Return `rows` as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("history.to_frame() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.rows(), columns=["phase", "metric", "epoch", "value"])

    def plot(self) -> Figure:
        """Draw one panel per metric, one line per phase.

        Returns:
            A matplotlib figure; ``figure.savefig("history.png")`` keeps it.

        Raises:
            ImportError: matplotlib is not installed.
            MetricError: Nothing has been recorded.
        """
        panels: dict[str, dict[str, Points]] = {}
        for row in self.rows():
            for name, number in numbers_in(row["metric"], row["value"]).items():
                panels.setdefault(name, {}).setdefault(row["phase"], []).append((row["epoch"], number))
        return draw_panels("history.plot()", panels)

    def _repr_html_(self) -> str:
        """Return a page for notebooks: a row for each metric of a phase, with its course."""
        from fluxloop.screen.pages import curve, page, table

        found: dict[tuple[str, str], Points] = {}
        for row in self.rows():
            for name, number in numbers_in(row["metric"], row["value"]).items():
                found.setdefault((row["phase"], name), []).append((row["epoch"], number))
        rows = []
        for (phase, name), points in found.items():
            finite = [point for point in points if isfinite(point[1])]
            ends = [by(finite, key=lambda point: point[1]) for by in (min, max)] if finite else []
            told = [f"{shown_as(number, 4)} in {epoch}" for epoch, number in ends] or ["-", "-"]
            rows.append([phase, name, curve(points), shown_as(points[-1][1], 4), *told])
        head = ["phase", "metric", "", "last", "lowest, in epoch", "highest, in epoch"]
        return page("; ".join([*self._counts(), *self._end()]), *([table(head, rows, [3, 4, 5])] if rows else []))

    def __repr__(self) -> str:
        latest = [
            f"{part}: {shown_as(number, 4)}"
            for name, series in all_series(vars(self._shared).get("metrics", {})).items()
            for part, number in numbers_in(name, series[-1][1]).items()
        ]
        return f"History({'; '.join([*self._counts(), *latest, *self._end()])})"

    def _counts(self) -> list[str]:
        counts = vars(self._shared).get("history", {})
        return [
            f"{name_of(phase)}: {counted(c.epochs, 'epoch')}, {counted(c.steps, 'step')}" for phase, c in counts.items()
        ]

    def _end(self) -> list[str]:
        return [*([f"stopped: {self.stop_reason}"] if self.stop_reason else []), f"seed {self.seed}"]
