"""What happened: counts and metrics per phase, and why a fit stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import Factory, define

from fluxloop.errors import MetricError, did_you_mean
from fluxloop.state import Container, PhaseDict, SharedState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTERRUPTED, TERMINATED = "interrupted (Ctrl+C)", "terminated (SIGTERM)"
"""Reasons of fits that are to go on another time."""


@define
class Counts(Container):
    """How much of one phase has run; cancelled steps are not counted.

    Args:
        epochs: Epochs ended.
        steps: Steps ended, in all epochs.
        steps_epoch: Steps ended in the last or running epoch.
        updates: Optimizer steps by the optimizer's name (None for a single unnamed one).
    """

    epochs: int = 0
    steps: int = 0
    steps_epoch: int = 0
    updates: dict[str | None, int] = Factory(dict)


class History(Container):
    """The history of a learner: ``learner.history``.

    ``history[TrainingPhase]`` gives the `Counts` of a phase, ``history.metrics[TrainingPhase]``
    its epoch values by metric, ``history["validation/loss"]`` the values of one metric (where
    several phases ran on the same data, of the one that was used first last).

    Attributes:
        seed: The seed that decides the run's random numbers.
        cycles: Passes through the phases of a fit that were completed.
        stop_reason: Why the last fit stopped early, or None.
    """

    def __init__(self, shared: SharedState, seed: int) -> None:
        self._shared = shared
        self.seed = seed
        self.cycles = 0
        self.stop_reason: str | None = None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._series(key)
        counts = vars(self._shared).get("history")
        return counts.peek(key) if counts is not None else Counts()

    @property
    def metrics(self) -> PhaseDict[dict[str, list[Any]]]:
        """Epoch values by phase, then by the metric's name: one value per epoch."""
        found: PhaseDict[dict[str, list[Any]]] = PhaseDict(dict)
        for phase, metrics in vars(self._shared).get("metrics", {}).items():
            found[phase] = {name: [value for _, value in series] for name, series in metrics.epochs.items()}
        return found

    def _series(self, monitor: str) -> list[Any]:
        """Give the epoch values of ``"<data_key>/<metric>"``.

        Raises:
            MetricError: No such metric has been recorded.
        """
        known = {
            f"{phase.data_key or phase.__name__}/{name}": values
            for phase, series in self.metrics.items()
            for name, values in series.items()
        }
        if monitor not in known:
            raise MetricError(
                f"no metric {monitor!r} was recorded; there are {sorted(known)}{did_you_mean(monitor, known)}"
            )
        return known[monitor]

    def rows(self) -> list[dict[str, Any]]:
        """Give every recorded epoch value as a row: phase, metric, epoch (from 1), value."""
        return [
            {"phase": phase.__name__, "metric": name, "epoch": epoch, "value": value}
            for phase, metrics in vars(self._shared).get("metrics", {}).items()
            for name, series in metrics.epochs.items()
            for epoch, value in series
        ]

    def to_frame(self) -> Any:
        """Give `rows` as a pandas DataFrame.

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
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("history.plot() needs matplotlib: pip install 'torch-fluxloop[plot]'") from error
        rows = [row for row in self.rows() if isinstance(row["value"], float)]
        names = list(dict.fromkeys(row["metric"] for row in rows))
        if not names:
            raise MetricError("no metric was recorded; fit with the Metrics callback (a default one) first")
        figure = Figure(figsize=(5 * len(names), 3.5), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for phase in dict.fromkeys(row["phase"] for row in rows if row["metric"] == name):
                points = [(r["epoch"], r["value"]) for r in rows if (r["metric"], r["phase"]) == (name, phase)]
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=phase)
            axes.set(title=name, xlabel="epoch")
            axes.grid(alpha=0.3)
            axes.legend()
        return figure

    def __repr__(self) -> str:
        counts = vars(self._shared).get("history", {})
        parts = [f"{phase.__name__}: {c.epochs} epochs, {c.steps} steps" for phase, c in counts.items()]
        latest = [
            f"{phase.data_key or phase.__name__}/{name}: {values[-1]:.4g}"
            for phase, series in self.metrics.items()
            for name, values in series.items()
            if values and isinstance(values[-1], float)
        ]
        stopped = [f"stopped: {self.stop_reason}"] if self.stop_reason else []
        return f"History({'; '.join([*parts, *latest, *stopped, f'seed {self.seed}'])})"
