"""``python -m fluxloop``: what is installed here, and what the runs below a folder have come to."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fluxloop import __version__
from fluxloop.checkpoint.overview import Run, runs_below
from fluxloop.errors import counted
from fluxloop.history import Line, draw_panels

NEEDED = ("attrs", "multipledispatch", "tqdm")
OPTIONAL = ("matplotlib", "mlflow-skinny", "numpy", "pandas", "pillow", "tensorboard", "torchmetrics", "wandb")
PICTURE = Path("fluxloop-runs.png")


def info() -> str:
    """Return versions, devices and threads, as a report of a fault needs them."""
    found = {name: installed(name) for name in (*NEEDED, *OPTIONAL)}
    cuda = [f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(torch.cuda.device_count())]
    lines = {
        "fluxloop": __version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "devices": ", ".join(["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]),
        "threads": str(torch.get_num_threads()),
        "packages": ", ".join(f"{name} {number}" for name, number in found.items() if number),
        "not found": ", ".join(name for name, number in found.items() if not number) or "none",
    }
    return "\n".join(f"{name:10} {text}" for name, text in lines.items())


def installed(name: str) -> str | None:
    """Return the version of a distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(runs: Iterable[Run], folder: Path) -> str:
    """Return a line for each run, under headings, and below it what could not be read."""
    rows = [("run", "checkpoints", "size", "epochs", "steps", "written", "last metrics", "stopped")]
    below: list[str] = []
    for run in runs:
        name = str(run.path.relative_to(folder))
        written = "" if run.written is None else f"{datetime.fromtimestamp(run.written):%Y-%m-%d %H:%M}"
        last = ", ".join(f"{metric} {points[-1][1]:.4g}" for metric, points in sorted(run.series.items()))
        numbers = (str(run.files), in_words(run.size), str(run.epochs), str(run.steps))
        rows.append((name, *numbers, written, last, " ".join((run.reason or "").split())))
        below += [f"{name}: {run.problem}"] if run.problem else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *below])


def in_words(size: float) -> str:
    """Return a number of bytes with its unit.

    >>> in_words(512), in_words(18_623), in_words(2_500_000_000)
    ('512 B', '18.6 kB', '2.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def draw(runs: Sequence[Run], folder: Path, picture: Path) -> None:
    """Write a picture of the metrics of runs: a panel for each metric, a line for each run and phase.

    Raises:
        ImportError: matplotlib is not installed.
        MetricError: No run has recorded a metric.
        ValueError: The picture would lie in the folder of a run, or its kind is none that matplotlib writes.
    """
    inside = next((run.path for run in runs if run.path.resolve() in picture.resolve().parents), None)
    if inside is not None:
        raise ValueError(f"{picture} lies in the folder of a run, where nothing is written; expected another place")
    panels: dict[str, dict[str, Line]] = {}
    for run in runs:
        for name, points in run.series.items():
            phase, _, metric = name.partition("/")
            panels.setdefault(metric, {})[f"{run.path.relative_to(folder)} {phase}"] = Line(points)
    draw_panels("--plot", panels).savefig(picture)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, ``info`` or ``runs``."""
    parser = argparse.ArgumentParser("python -m fluxloop", description="What is installed, and what runs have come to.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, threads and optional packages")
    runs = commands.add_parser("runs", help="a table of the runs below a folder, from their checkpoints")
    runs.add_argument("folder", type=Path, help="where runs lie; nothing is written there")
    where = f"write a picture of the metrics (where no file is named: {PICTURE}, here)"
    runs.add_argument("--plot", type=Path, nargs="?", const=PICTURE, metavar="FILE", help=where)
    given = parser.parse_args(arguments)
    if given.command == "info":
        print(info())
        return
    if not given.folder.is_dir():
        parser.error(f"{given.folder} is no folder; expected one with runs of a Checkpointer below it")
    found = list(runs_below(given.folder))
    print(table(found, given.folder) if found else f"there is no run of a Checkpointer below {given.folder}")
    if given.plot is not None:
        try:
            draw(found, given.folder, given.plot)
        except (ImportError, OSError, ValueError) as error:
            parser.error(str(error))
        print(f"the metrics of {counted(len(found), 'run')} are drawn in {given.plot.resolve()}")


if __name__ == "__main__":
    main()
