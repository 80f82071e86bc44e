"""Write the metrics of each epoch into a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from attrs import define, field

from fluxloop.callback import Callback, on
from fluxloop.callbacks.metrics import Metrics
from fluxloop.callbacks.recorder import Recorder
from fluxloop.events import CycleEnd, EpochEnd, FitBegin, FitEnd
from fluxloop.guard.given import as_path
from fluxloop.logging.backend import Backend, log_to
from fluxloop.logging.loggables import Loggable
from fluxloop.logging.text_files import csv_line
from fluxloop.phase import Phase, ProbePhase
from fluxloop.signals import INTERRUPTED, TERMINATED


def _as_path(given: Any) -> Path:
    return as_path("CSVLogger", "path", given)


@define
class _Row(Loggable):
    """One row of a table, by column."""

    cells: dict[str, Any]


@define(eq=False, slots=False, repr=False)
class _Table(Backend):
    """A CSV file with the columns that its rows have; a new column is empty in the rows before.

    A row is appended in one piece; for a new column the file is written anew beside the old one and
    takes its place.
    """

    path: Path
    _columns: list[str] = field(factory=list, init=False, repr=False)
    _rows: int = field(default=0, init=False, repr=False)

    def __repr__(self) -> str:
        return f"CSVLogger({str(self.path)!r})"

    def _place(self) -> str:
        return str(self.path.absolute())

    def _found(self) -> str | None:
        return str(self.path) if self.path.exists() and self.path.stat().st_size else None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _position(self) -> dict[str, Any]:
        return {"columns": list(self._columns), "rows": self._rows}

    def _rewind(self, position: Any) -> None:
        position = position or {"columns": [], "rows": 0}
        rows = self._read()[: position["rows"]]
        self._columns, self._rows = list(position["columns"]), len(rows)
        if self.path.exists():
            self._replace(rows)

    def add(self, cells: Mapping[str, Any]) -> None:
        """Append a row."""
        new = [name for name in cells if name not in self._columns]
        if new:
            rows = self._read()
            self._columns += new
            self._replace(rows)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(csv_line([cells.get(name, "") for name in self._columns]))
        self._rows += 1

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        beside = self.path.with_name(f".{self.path.name}.new")
        lines = [csv_line(self._columns)] if self._columns else []
        lines += [csv_line([row.get(name, "") for name in self._columns]) for row in rows]
        beside.write_text("".join(lines), encoding="utf-8", newline="")
        os.replace(beside, self.path)


@log_to.register(_Table, _Row)
def _append(backend: _Table, row: _Row, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.add(row.cells)


@define
class CSVLogger(Callback):
    """Write a CSV file with a row per epoch of a phase: the epoch, the set, and a column per metric.

    The set is the phase's data key, ``training`` or ``validation``; of a second phase on the same data
    it is that phase's name. A row has the metrics of its phase. What probes find on held-out data is in
    the ``validation`` row of the epoch; where there is none, in a row of its own when the cycle ends. A
    metric that comes up later gets a column that is empty before. Each row is in the file when its epoch
    ends. Where the file cannot be written, it warns once and the training goes on. A resumed run cuts the
    file to the rows that its checkpoint knows, and goes on from there.

    Args:
        path: The file; its folder is made.
        time: Whether each row has the time at which it was written, in a column ``time``: UTC, ISO 8601.

    Raises:
        LogExistsError: When a fit begins that is not resumed, and another run's file is there and not empty.

    Reads: cbstate.history, cbstate.metrics
    Runs after: Recorder, Metrics

    Example:
        >>> history = testing.toy_learner(Recorder(), Metrics(), CSVLogger("run/log.csv")).fit(2)
        >>> [row.split(",")[:2] for row in Path("run/log.csv").read_text().splitlines()]
        [['epoch', 'set'], ['1', 'training'], ['1', 'validation'], ['2', 'training'], ['2', 'validation']]
    """

    path: Path = field(converter=_as_path, repr=lambda path: repr(str(path)))
    time: bool = field(default=False, kw_only=True, repr=False)
    _table: _Table = field(init=False, repr=False)
    _probed: int = field(default=0, init=False, repr=False)
    """The epoch of the newest values of probes that are written."""

    reads = ("cbstate.history", "cbstate.metrics")
    run_after = (Recorder, Metrics)
    draws = False
    main_only = True
    _fixed = ("path",)
    _begins_anywhere = True

    def __attrs_post_init__(self) -> None:
        if getattr(self, "_table", None) is None or self._table.path != self.path:  # else another option was assigned
            self._table = _Table(self.path)

    @on(FitBegin)
    def begin(self, event: FitBegin, phase: Phase, learner: Any) -> None:
        """Refuse to write into another run's file, and close it when the fit ends."""
        self._table.begin(event.resumed)
        learner.defer(self._table.close)

    @on(EpochEnd)
    def add_row(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Write what the epoch recorded."""
        counts = learner.cbstate.history[phase]
        values = learner.cbstate.metrics[phase].numbers_at(counts.epoch)
        if counts.label == ProbePhase.data_key:
            values |= self._probes(learner)
        self._write(counts.epoch, counts.label, values)
        if phase.gradients and not learner.fit_phases:
            self._add_probes(learner)

    @on(CycleEnd)
    def add_probes(self, event: CycleEnd, phase: Phase, learner: Any) -> None:
        """Write what probes found in a cycle without a validation after them."""
        self._add_probes(learner)

    @on(FitEnd)
    def add_last_probes(self, event: FitEnd, phase: Phase, learner: Any) -> None:
        """Write what probes found in a cycle that did not end, unless a resumed run will complete it."""
        if event.reason not in (INTERRUPTED, TERMINATED):
            self._add_probes(learner)

    def _probes(self, learner: Any) -> dict[str, float]:
        """Return what probes found and is not yet written."""
        metrics = learner.cbstate.metrics[ProbePhase]
        newest = max((series[-1][0] for series in metrics.epochs.values() if series), default=0)
        if newest <= self._probed:
            return {}
        self._probed = newest
        found: dict[str, float] = metrics.numbers_at(newest)
        return found

    def _add_probes(self, learner: Any) -> None:
        values = self._probes(learner)
        if values:
            self._write(self._probed, ProbePhase.data_key, values)

    def _write(self, epoch: int, label: str, values: dict[str, float]) -> None:
        now = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds")} if self.time else {}
        log_to(self._table, _Row({"epoch": epoch, "set": label, **now, **values}), "row", epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how far the file is written."""
        return {**self._table.state_dict(), "probed": self._probed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self._table.load_state_dict(state)
        self._probed = state.get("probed", 0)  # older checkpoints have none
