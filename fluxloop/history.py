"""What happened: counts and metrics per phase, and why a fit stopped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import Factory, define, field, frozen

from fluxloop.errors import MetricError, counted, describe
from fluxloop.monitor import all_series, find_series
from fluxloop.state import Container, PhaseDict, SharedState, name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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

ACROSS = 3
"""How many panels stand beside each other."""


@frozen
class Line:
    """A line of a panel.

    Args:
        points: Numbers by epoch.
        spread: How far the band around each reaches, up and down; empty where there is one run alone.
        is_whole: Whether each is of all runs; where one is not, the line is dotted. Empty: all are.
    """

    points: Points
    spread: Sequence[float] = ()
    is_whole: Sequence[bool] = ()


def panel_of(name: str) -> str:
    """Return the panel in which a metric is drawn: losses share one, and so do parts and averages of one metric.

    >>> [panel_of(name) for name in ("loss_d", "loss@ema", "accuracy/0", "accuracy@ema", "top_5")]
    ['loss', 'loss', 'accuracy', 'accuracy', 'top_5']
    """
    stem = name.partition("/")[0].partition("@")[0]
    return "loss" if stem.startswith("loss_") else stem


def draw_panels(who: str, panels: Mapping[str, Mapping[str, Line]]) -> Figure:
    """Draw a panel for each group of metrics, with a line for each metric of each phase or run.

    Args:
        who: Who draws, for messages.
        panels: Lines by the panel's title, then by what the legend calls them.

    Raises:
        ImportError: matplotlib is not installed.
        MetricError: There is none.
    """
    from fluxloop.screen.figures import new_figure

    if not panels:
        raise MetricError("no metric was recorded; fit with the Metrics callback (a default one) first")
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(who, figsize=(5 * across, 3.5 * down))
    places = figure.subplots(down, across, squeeze=False).flat
    for (name, lines), axes in zip(panels.items(), places, strict=False):
        for label, line in lines.items():
            _draw_line(axes, label, line)
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small" if len(lines) > 4 else None)
    for axes in places:  # those that are left over
        axes.remove()
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


def _draw_line(axes: Axes, label: str, line: Line) -> None:
    epochs, values = zip(*line.points, strict=True)
    whole = values
    if not all(line.is_whole):
        whole = tuple(value if is_whole else math.nan for value, is_whole in zip(values, line.is_whole, strict=True))
    (drawn,) = axes.plot(epochs, whole, marker="o", markersize=3, label=label)
    if whole is not values:
        axes.plot(epochs, values, ":", color=drawn.get_color())
    if line.spread:
        low = [value - spread for value, spread in zip(values, line.spread, strict=True)]
        high = [value + spread for value, spread in zip(values, line.spread, strict=True)]
        axes.fill_between(epochs, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)


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

        Losses share a panel, ``loss_d`` and ``loss_g`` of a GAN, and so do the parts of a metric, such as the accuracy
        of each class, and a metric of weights and of their average.

        Returns:
            A matplotlib figure: a picture in a notebook; ``figure.savefig("history.png")`` keeps it.

        Raises:
            ImportError: matplotlib is not installed.
            MetricError: Nothing has been recorded.
        """
        found = _points(self)
        names: dict[str, set[str]] = {}
        for _, name in found:
            names.setdefault(panel_of(name), set()).add(name)
        panels: dict[str, dict[str, Line]] = {}
        for (phase, name), points in found.items():
            title = panel_of(name)
            label = phase if names[title] == {name} else f"{phase} {name}"
            panels.setdefault(name if label == phase else title, {})[label] = Line(points)
        return draw_panels("history.plot()", panels)

    @staticmethod
    def compare(runs: Mapping[str, History | Iterable[History]]) -> Comparison:
        """Compare runs, or groups of runs that differ in their seed alone.

        Args:
            runs: Histories by what they are to be called: one, or a list of those of several seeds.

        Returns:
            Means and standard deviations: ``print`` shows those of the last epoch that most runs of a group have,
            ``rows()`` gives those of each epoch, ``plot()`` draws them.

        Raises:
            MetricError: There is no run, a group has none, or a history was given twice.
            TypeError: Something else than a history was given.

        >>> def trained(seed):
        ...     return testing.toy_learner(Recorder(), Metrics(), seed=seed).fit(2)
        >>> comparison = History.compare({"toy": [trained(seed) for seed in range(3)]})
        >>> comparison.rows()[-1]
        {'run': 'toy', 'phase': 'ValidationPhase', 'metric': 'loss', 'epoch': 2, 'mean': 69.8..., 'std': 0.39..., ...}
        """
        return Comparison(_groups(runs))

    def _repr_html_(self) -> str:
        """Return a page for notebooks: a row for each metric of a phase, with its course."""
        from fluxloop.screen.pages import curve, page, table

        rows = []
        for (phase, name), points in _points(self).items():
            finite = [point for point in points if math.isfinite(point[1])]
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


@frozen(repr=False)
class Comparison:
    """Means and standard deviations over the runs of each group: `History.compare`.

    Args:
        groups: Histories by the name of their group.

    >>> print(History.compare({"toy": [testing.toy_learner(Recorder(), Metrics(), seed=0).fit(2)]}))
    TrainingPhase/loss    toy  ...  1 run, epoch 2
    ValidationPhase/loss  toy  ...  1 run, epoch 2
    """

    groups: Mapping[str, Sequence[History]]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each group, phase, metric and epoch.

        ``std`` is the standard deviation of a sample (of n - 1), NaN for a single value; ``runs`` is how many of the
        group have a value at that epoch. ``pandas.DataFrame(comparison.rows())`` makes a table.
        """
        rows = []
        for group, histories in self.groups.items():
            gathered: dict[tuple[str, str], dict[int, list[float]]] = {}
            for history in histories:
                for key, points in _points(history).items():
                    for epoch, value in points:
                        gathered.setdefault(key, {}).setdefault(epoch, []).append(value)
            for (phase, name), epochs in gathered.items():
                for epoch, values in sorted(epochs.items()):
                    mean, std = mean_and_std(values)
                    row = {"run": group, "phase": phase, "metric": name, "epoch": epoch}
                    rows.append({**row, "mean": mean, "std": std, "runs": len(values)})
        return rows

    def plot(self) -> Figure:
        """Draw one panel per phase and metric, one line per group, with a band of one standard deviation.

        A line is dotted where fewer runs of the group have a value, as after one has stopped early.

        Returns:
            A matplotlib figure: a picture in a notebook; ``figure.savefig("runs.png")`` keeps it.

        Raises:
            ImportError: matplotlib is not installed.
            MetricError: Nothing has been recorded.
        """
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for row in self.rows():
            found.setdefault(f"{row['phase']} {row['metric']}", {}).setdefault(row["run"], []).append(row)
        panels: dict[str, dict[str, Line]] = {}
        for title, lines in found.items():
            for name, rows in lines.items():
                most = max(row["runs"] for row in rows)
                points = [(row["epoch"], row["mean"]) for row in rows]
                spread = [row["std"] for row in rows] if most > 1 else ()
                panels.setdefault(title, {})[name] = Line(points, spread, [row["runs"] == most for row in rows])
        return draw_panels("History.compare(...).plot()", panels)

    def __str__(self) -> str:
        latest: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in self.rows():
            key = row["phase"], row["metric"], row["run"]
            if key not in latest or row["runs"] >= latest[key]["runs"]:
                latest[key] = row
        cells = [
            (
                f"{phase}/{name}",
                run,
                f"{row['mean']:.4g}" + (f" ± {row['std']:.2g}" if row["runs"] > 1 else ""),
                f"{counted(row['runs'], 'run')}, epoch {row['epoch']}",
            )
            for (phase, name, run), row in sorted(latest.items(), key=lambda item: item[0][:2])
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)

    def __repr__(self) -> str:
        return str(self) or "nothing was recorded"


def _points(history: History) -> dict[tuple[str, str], Points]:
    """Return the numbers that a history has recorded, by phase and metric; a part of a vector is a metric."""
    found: dict[tuple[str, str], Points] = {}
    for row in history.rows():
        for name, number in numbers_in(row["metric"], row["value"]).items():
            found.setdefault((row["phase"], name), []).append((row["epoch"], number))
    return found


def _groups(runs: Mapping[str, History | Iterable[History]]) -> dict[str, list[History]]:
    """Return the histories of each group.

    Raises:
        MetricError: There is no group, or one without a history.
        TypeError: Something else than a history.
    """
    expected = 'expected histories by name, such as History.compare({"adam": [first, second], "sgd": third})'
    if not isinstance(runs, Mapping):
        raise TypeError(f"History.compare was given {describe(runs)}; {expected}")
    groups: dict[str, list[History]] = {}
    known: dict[int, str] = {}
    for key, given in runs.items():
        name = str(key)
        if name in groups:
            raise MetricError(f"History.compare was given two groups that are called {name!r}; {expected}")
        groups[name] = [given] if isinstance(given, History) or not isinstance(given, Iterable) else list(given)
        if not groups[name]:
            raise MetricError(f"History.compare was given no run under {name!r}; {expected}")
        for each in groups[name]:
            if not isinstance(each, History):
                raise TypeError(f"History.compare was given {describe(each)} under {name!r}; {expected}")
            if id(each) in known:
                raise MetricError(
                    f"History.compare was given one history twice, under {known[id(each)]!r} and {name!r}: a learner "
                    "has one, to which each fit adds; expected a learner for each run, such as "
                    "[make_learner(seed).fit(10) for seed in range(3)]"
                )
            known[id(each)] = name
    if not groups:
        raise MetricError(f"History.compare was given no run; {expected}")
    return groups


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of numbers and the standard deviation of a sample, which one number has not: NaN.

    >>> mean_and_std([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    # Not squared by **, which raises for numbers that are too large
    return mean, math.sqrt(sum((value - mean) * (value - mean) for value in values) / (len(values) - 1))
