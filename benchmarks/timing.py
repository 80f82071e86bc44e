"""Measure sides against each other in one process: interleaved rounds, medians, CPU time beside wall time."""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

SKIPPED = "Skipped: "
"""How the output of a script begins that could measure nothing."""

CLOCKS = (time.perf_counter, time.process_time)


@dataclass(frozen=True)
class Lap:
    """Seconds that one block of steps took."""

    wall: float
    cpu: float


class Stopwatch:
    """Measures a lap, for sides whose setting up is not to count."""

    def __init__(self, clocks: Sequence[Callable[[], float]] = CLOCKS) -> None:
        self.clocks = clocks
        self.begun: list[float] | None = None
        self.lap: Lap | None = None

    def start(self) -> None:
        self.begun = [clock() for clock in self.clocks]

    def stop(self) -> Lap:
        ended = [clock() for clock in self.clocks]
        if self.begun is None:
            raise RuntimeError("the clock was stopped before it was started")
        wall, cpu = (end - begin for end, begin in zip(ended, self.begun, strict=True))
        self.lap = Lap(wall, cpu)
        return self.lap


@dataclass(frozen=True)
class Measured:
    """The laps of each side, round by round, and how many units of work each lap did."""

    laps: Mapping[str, Sequence[Lap]]
    units: int

    def micro(self, side: str) -> float:
        """Give the median wall time of one unit in µs."""
        return median(lap.wall for lap in self.laps[side]) / self.units * 1e6

    def ratio(self, side: str, base: str) -> float:
        """Give the median of the rounds' ratios of wall time: below 1, `side` is faster."""
        return median(self._pairs(side, base, lambda a, b: a.wall / b.wall))

    def cpu_ratio(self, side: str, base: str) -> float:
        """Give the same of CPU time, that of all threads."""
        return median(self.cpu_ratios(side, base))

    def cpu_ratios(self, side: str, base: str) -> list[float]:
        """Give the ratio of CPU time of each round."""
        return self._pairs(side, base, lambda a, b: a.cpu / b.cpu)

    def cpu_micro(self, side: str) -> float:
        """Give the median CPU time of one unit in µs."""
        return median(lap.cpu for lap in self.laps[side]) / self.units * 1e6

    def difference(self, side: str, base: str) -> float:
        """Give the median of the rounds' differences of wall time, in µs per unit."""
        return median(self._pairs(side, base, lambda a, b: a.wall - b.wall)) / self.units * 1e6

    def _pairs(self, side: str, base: str, then: Callable[[Lap, Lap], float]) -> list[float]:
        return [then(a, b) for a, b in zip(self.laps[side], self.laps[base], strict=True)]


Sides = Mapping[str, Callable[[], object]]


def interleave(
    make: Callable[[], Sides],
    *,
    units: int,
    rounds: int,
    starts: int = 1,
    warm_up: int = 2,
    check: Callable[[], object] | None = None,
    clocks: Sequence[Callable[[], float]] = CLOCKS,
) -> Measured:
    """Run every side once per round, in alternating order.

    Args:
        make: Makes all sides anew; torch's generator is seeded with the number of the start. A side
            that gives a `Lap` has measured itself.
        units: Of work that a side does per round, such as steps.
        rounds: How many are measured, in all starts together.
        starts: How often the sides are made anew: where the allocator puts the weights changes the
            time of larger models.
        warm_up: Rounds of each start that are not measured.
        check: Called at the end of each start, to raise where the sides did not do the same.
        clocks: Wall and CPU time.
    """
    laps: dict[str, list[Lap]] = {}
    for start in range(starts):
        torch.manual_seed(start)
        sides = make()
        for name in sides:
            laps.setdefault(name, [])
        for index in range(warm_up + math.ceil(rounds / starts)):
            for name in list(sides) if index % 2 else reversed(list(sides)):
                watch = Stopwatch(clocks)
                watch.start()
                own = sides[name]()
                lap = watch.stop()
                if index >= warm_up:
                    laps[name].append(own if isinstance(own, Lap) else lap)
        if check is not None:
            check()
        del sides
        gc.collect()
    return Measured(laps, units)


class Table:
    """A Markdown table, printed row by row as they are measured.

    Args:
        columns: A format by heading: ``{"workload": "<34", "ratio": ">8.2f"}``. A text in a column
            of numbers is printed as it is.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.formats = list(columns.values())
        self._print([f"{name:{form.split('.')[0]}}" for name, form in columns.items()])
        widths = [max(len(name), int(form[1:].split(".")[0])) for name, form in columns.items()]
        self._print(["-" * (w - 1) + (":" if f[0] == ">" else "-") for w, f in zip(widths, self.formats, strict=True)])

    def row(self, *cells: str | float) -> None:
        self._print(
            [
                f"{cell:{form.split('.')[0] if isinstance(cell, str) else form}}"
                for cell, form in zip(cells, self.formats, strict=True)
            ]
        )

    def _print(self, cells: Sequence[str]) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)


def print_added(heading: str, got: Measured, counts: Sequence[int]) -> None:
    """Print what each side adds to the first one.

    Args:
        heading: Of the sides' names.
        got: Their laps.
        counts: How many things each side has beyond the first.
    """
    base = next(iter(got.laps))
    table = Table({heading: "<38", "µs": ">9.2f", "ratio": ">6.3f", "added µs, each": ">14.3f"})
    for side, count in zip(got.laps, counts, strict=True):
        added = got.difference(side, base) / count if side != base else "–"
        table.row(side, got.micro(side), got.ratio(side, base), added)


def arguments(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a script's command line: ``--quick`` alone."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and rows, to see that it runs")
    return parser.parse_args(argv)


def skip(why: str) -> None:
    """Say that nothing can be measured here; `run.py` keeps the results there were."""
    print(f"{SKIPPED}{why}")


def machine() -> str:
    """Name what the figures depend on."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores ({processor}), torch {torch.__version__}, Python {platform.python_version()}"
