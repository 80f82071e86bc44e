"""What the runs below a folder have come to, read from their newest checkpoints; nothing is written there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from fluxloop.checkpoint.ending import noted_end
from fluxloop.checkpoint.folder import MARKER, Folder
from fluxloop.checkpoint.parts import parts_of
from fluxloop.errors import CheckpointError, sentence
from fluxloop.history import Points, numbers_in
from fluxloop.persist.plain import from_plain


@frozen
class Run:
    """A run as its folder of checkpoints tells it.

    Args:
        path: The folder.
        files: How many checkpoints it has.
        size: Of all of them, in bytes.
        written: When the newest was written, in seconds since 1970; None where there is none.
        epochs: Epochs of the fit (cycles) that were complete then.
        steps: Training steps begun by then.
        series: Every recorded number of an epoch, by ``"validation/loss"`` and the like.
        reason: Why it stopped early, or which error ended it; None where it came to its end, was interrupted, or still
            runs.
        problem: Why a newer checkpoint was passed over, or none could be read; None where all is well.
    """

    path: Path
    files: int
    size: int
    written: float | None
    epochs: int
    steps: int
    series: dict[str, Points]
    reason: str | None
    problem: str | None


def runs_below(folder: Path) -> Iterator[Run]:
    """Yield the runs in a folder and in those below it, by the names of their folders."""
    marked = {marker.parent for marker in folder.rglob(MARKER)}
    for path in sorted(marked | {file.parent for file in folder.rglob("epoch-*.pt")}):
        files = [file for _, file in Folder(path).files()]
        if files or path in marked:
            yield _run(path, files)


def _run(path: Path, files: list[Path]) -> Run:
    """Return what the newest of a run's checkpoints that can be read says."""
    state: dict[str, Any] = {}
    written = problem = None
    for file in reversed(files):
        try:
            state, written = peek(file), file.stat().st_mtime
            break
        except (CheckpointError, FileNotFoundError) as error:  # where the run goes on, it may have removed one
            problem = problem or str(error)
    history, steps = state.get("history", {}), state.get("streams", {})
    return Run(
        path,
        len(files),
        sum(_size(part) for file in files for part in (file, *parts_of(path, file.name))),
        written,
        history.get("cycles", 0),
        sum(count for name, count in steps.items() if name.startswith("training/") and name.endswith("/step")),
        series_of(state.get("cbstate", {})),
        noted_end(path) or history.get("stop_reason"),
        problem,
    )


def _size(file: Path) -> int:
    """Return the size of a file in bytes; 0 where a run that goes on has removed it meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def peek(path: Path) -> dict[str, Any]:
    """Read a checkpoint, and leave its weights on the disk until they are asked for; nothing in it is executed.

    Checksums are not compared, as they are where a run goes on from it: that would read all of it.

    Raises:
        CheckpointError: It is incomplete or damaged, or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {path} is incomplete or damaged: {sentence(error)}") from error
    if not isinstance(state, dict) or "fluxloop" not in state:
        raise CheckpointError(f"{path} is no checkpoint of fluxloop's")
    return state


def series_of(shared: dict[str, Any]) -> dict[str, Points]:
    """Return the numbers of each epoch that callbacks recorded, from what a checkpoint keeps of ``cbstate``.

    A phase is called what logs call it: the data key of the one that was alone on the data, of others its name.
    """
    counts = shared.get("history", {}).get("items", {})
    found: dict[str, Points] = {}
    for id, kept in shared.get("metrics", {}).get("items", {}).items():
        own = id.partition("[")[2][:-1] or id.rpartition(".")[2]
        label = counts.get(id, {}).get("items", {}).get("label") or ("validation" if own == "ProbePhase" else own)
        for metric, series in kept["state"]["epochs"].items():
            for epoch, value in from_plain(series, device=torch.device("cpu")):
                for name, number in numbers_in(metric, value).items():
                    found.setdefault(f"{label}/{name}", []).append((epoch, number))
    return found
