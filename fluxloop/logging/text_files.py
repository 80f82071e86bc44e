"""Log to one file of text: CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from attrs import define, field

from fluxloop.guard.assign import fields_of_the_class
from fluxloop.guard.given import as_path
from fluxloop.logging.backend import Backend, log_to
from fluxloop.logging.loggables import (
    Audio,
    Figure,
    File,
    Histogram,
    HyperParameters,
    Image,
    Loggable,
    Scalar,
    Text,
    save,
)

LINES_PER_WRITE = 100
"""How many lines wait before they are written."""


def _as_path(given: Any) -> Path:
    return as_path("CSV or JSONL", "path", given)


@define(eq=False, slots=False)
class TextFile(Backend):
    """Base of backends that append lines to a file, which is open only while it is written.

    Images, figures, sounds and files lie in a folder beside it, ``metrics_files``, and their value
    is the path from the file's folder. A resumed run cuts the file to the length that it had at the checkpoint.

    Args:
        path: The file; its folder is made.

    Raises:
        LogExistsError: When a new run begins and the file is there and not empty.
    """

    path: Path = field(converter=_as_path)
    _waiting: list[str] = field(factory=list, init=False, repr=False)

    def line(self, step: int, group: Sequence[str], name: str, value: Any) -> str:
        """Return the line of one value, with its end."""
        raise NotImplementedError

    @property
    def header(self) -> str:
        """The first line, with its end; "" for none."""
        return ""

    def add(self, step: int, group: Sequence[str], name: str, value: Any) -> None:
        """Add a line."""
        self._waiting.append(self.line(step, group, name, value))
        if len(self._waiting) >= LINES_PER_WRITE:
            self._flush()

    def _place(self) -> str:
        return str(self.path.absolute())

    def _found(self) -> str | None:
        return str(self.path) if self.path.exists() and self.path.stat().st_size else None

    def _open(self) -> None:
        self._waiting = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.header and not (self.path.exists() and self.path.stat().st_size):
            self._waiting.append(self.header)

    def _flush(self) -> None:
        if self._waiting:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write("".join(self._waiting))
            self._waiting = []

    def _position(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _rewind(self, position: Any) -> None:
        if self.path.exists() and self.path.stat().st_size > (position or 0):
            os.truncate(self.path, position or 0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


@fields_of_the_class
@define(eq=False, slots=False, repr=False)
class CSV(TextFile):
    """Log to a CSV file: one row per value, with the columns step, group, name and value.

    Args:
        path: The file; its folder is made. Images and the like lie beside it, in ``NAME_files``.

    Raises:
        LogExistsError: When a new run begins and the file is there and not empty.

    Example:
        >>> from fluxloop.logging import CSV
        >>> logger = LogMetrics(CSV("log.csv"), every=100)
        >>> history = testing.toy_learner(Recorder(), Metrics(), logger).fit(1)
        >>> [line.rpartition(",")[0] for line in Path("log.csv").read_text().splitlines()]  # without the numbers
        ['step,group,name', '1,epoch/training,loss', '1,epoch/validation,loss']
    """

    def line(self, step: int, group: Sequence[str], name: str, value: Any) -> str:
        """Return the row of one value."""
        return csv_line([step, "/".join(group), name, value if isinstance(value, str) else json.dumps(value)])

    @property
    def header(self) -> str:
        """The names of the columns."""
        return csv_line(["step", "group", "name", "value"])


@fields_of_the_class
@define(eq=False, slots=False, repr=False)
class JSONL(TextFile):
    """Log to a file of JSON lines: ``{"step": 1, "group": ["epoch", "validation"], "name": "loss", "value": 0.5}``.

    A number that is not finite is the text ``"nan"``, ``"inf"`` or ``"-inf"``.

    Args:
        path: The file; its folder is made. Images and the like lie beside it, in ``NAME_files``.

    Raises:
        LogExistsError: When a new run begins and the file is there and not empty.

    Example:
        >>> from fluxloop.logging import JSONL
        >>> logger = LogMetrics(JSONL("log.jsonl"), every=100)
        >>> history = testing.toy_learner(Recorder(), Metrics(), logger).fit(1)
        >>> [json.loads(line)["group"] for line in Path("log.jsonl").read_text().splitlines()]
        [['epoch', 'training'], ['epoch', 'validation']]
    """

    def line(self, step: int, group: Sequence[str], name: str, value: Any) -> str:
        """Return the object of one value."""
        return json.dumps({"step": step, "group": list(group), "name": name, "value": value}, allow_nan=False) + "\n"


def csv_line(cells: Sequence[Any]) -> str:
    """Write one row of a CSV file, with its end."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def file_name(name: str) -> str:
    """Return a name with the characters that names of files can have.

    >>> file_name("G@ema: first/second")
    'G@ema_ first_second'
    """
    return re.sub(r"[^\w\-. @+=]", "_", name)


@log_to.register(TextFile, Scalar)
def _number(backend: TextFile, scalar: Scalar, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.add(step, group, name, scalar.value if isfinite(scalar.value) else str(scalar.value))


@log_to.register(TextFile, Text)
def _text(backend: TextFile, text: Text, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.add(step, group, name, text.text)


@log_to.register(TextFile, Histogram)
def _histogram(backend: TextFile, histogram: Histogram, name: str, step: int, group: tuple[str, ...]) -> None:
    counts, edges = histogram.counts()
    backend.add(step, group, name, {"counts": counts, "edges": edges})


@log_to.register(TextFile, HyperParameters)
def _chosen(backend: TextFile, chosen: HyperParameters, name: str, step: int, group: tuple[str, ...]) -> None:
    for each, value in chosen.values.items():
        unusual = isinstance(value, float) and not isfinite(value)
        backend.add(step, (*group, name), each, str(value) if unusual else value)


def _beside(backend: TextFile, thing: Loggable, name: str, step: int, group: tuple[str, ...]) -> None:
    folder = backend.path.with_name(f"{backend.path.stem}_files").joinpath(*map(file_name, group))
    saved = save(thing, folder / f"{file_name(name)}-{step:06d}")
    backend.add(step, group, name, saved.relative_to(backend.path.parent).as_posix())


for _kind in (Image, Figure, Audio, File):
    log_to.register(TextFile, _kind)(_beside)
