"""Why the last fit of a run ended before its time: a note beside the checkpoints, for people.

A fit whose numbers are not finite, or that fails, ends without a last checkpoint: a run goes on from the one before.
"""

from __future__ import annotations

from pathlib import Path

from fluxloop.errors import warn_user

ENDED = "ended.txt"
"""The note's name in the folder of a run."""


def note_end(folder: Path, why: str) -> None:
    """Note why a fit ended; where that cannot be written, warn."""
    try:
        (folder / ENDED).write_text(f"{why}\n", encoding="utf-8")
    except OSError as error:
        warn_user(f"the note of why this fit ended ({why}) cannot be written to {folder / ENDED}: {error}")


def forget_end(folder: Path) -> None:
    """Remove the note of a fit that ended: another one begins."""
    (folder / ENDED).unlink(missing_ok=True)


def noted_end(folder: Path) -> str | None:
    """Return why the last fit ended, where that was noted."""
    try:
        return (folder / ENDED).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
