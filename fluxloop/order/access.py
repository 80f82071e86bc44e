"""Declared access: the paths into the learner that a callback reads and writes.

A path is dotted (``"step.loss"``, ``"cbstate.history"``); a prefix covers what is below it, and
``"*"`` covers everything. Writing implies reading.

Weights may have several views: ``"model.G@ema"`` is the averaged copy of ``"model.G"``, another
path that holds another module. Inside, it is ``("model@ema", "G")``, so that ``"model"`` does not
cover it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from attrs import frozen

from fluxloop.errors import CallbackError, StateAccessError, did_you_mean

Path = tuple[str, ...]

EVERYTHING: Path = ()
"""The path ``"*"``."""

ROOTS = (
    "model",
    "params",
    "optimizer",
    "loss_fn",
    "data",
    "step",
    "cbstate",
    "history",
    "accelerator",
    "num_batches",
    "batch_size",
    "seed",
)
"""The attributes of a learner that a path may start with."""

SERVICES = ("check", "defer", "finite", "host", "is_accumulating", "request_stop", "skip_update", "where")
"""What every callback may use."""


def parse(path: str, callback: str) -> Path:
    """Split a dotted path and check its root.

    Raises:
        CallbackError: The path does not start with an attribute of the learner.
    """
    if path == "*":
        return EVERYTHING
    parts = tuple(path.split(".")) if isinstance(path, str) else ()
    if parts and "@" in parts[-1]:  # cut off first, so that the root of "model@ema" is known too
        parts = (*parts[:-1], parts[-1].partition("@")[0])
    if not all(parts) or not parts or parts[0] not in ROOTS:
        raise CallbackError(
            f"{callback} declares the path {path!r}; expected one that starts with "
            f"{', '.join(ROOTS)}{did_you_mean(parts[0] if parts else '', ROOTS)}"
        )
    view = path.rpartition("@")[2] if "@" in path else ""
    if view.isidentifier() and parts[0] == "model" and path.count("@") == 1:
        return (f"model@{view}", *parts[1:])
    if "@" in path:  # elsewhere than once at the end of a path of weights
        raise CallbackError(
            f"{callback} declares the path {path!r}; expected the name of a view after the '@', at the end of a "
            "path of weights: 'model.G@ema'"
        )
    return parts


def weights_path(name: str) -> str:
    """Write the path of weights called by name: those of a model, of a part of one, or a view of either.

    >>> weights_path("G@ema"), weights_path("model"), weights_path("model.G")
    ('model.G@ema', 'model', 'model.G')
    """
    return name if re.split(r"[.@]", name)[0] == "model" else f"model.{name}"


def keeper(name: str, view: str) -> str:
    """Write the callback that keeps a view of weights.

    >>> keeper("G", "ema"), keeper("G", "slow")
    ("EMA('G', 0.999)", "EMA('G', 0.999, view='slow')")
    """
    return f"EMA({name!r}, 0.999{'' if view == 'ema' else f', view={view!r}'})"


def view_of(path: Path) -> str:
    """Return the name of the view of weights in a path; "" for live weights, and for other paths.

    >>> view_of(("model@ema", "G")), view_of(("model", "G"))
    ('ema', '')
    """
    return path[0].partition("@")[2] if path else ""


def dotted(path: Path) -> str:
    """Write a path as users do.

    >>> dotted(("step", "loss"))
    'step.loss'
    """
    root, at, view = path[0].partition("@") if path else ("*", "", "")
    return ".".join((root, *path[1:])) + at + view


def covers(prefix: Path, path: Path) -> bool:
    """Return whether `path` lies at or below `prefix`."""
    return path[: len(prefix)] == prefix


def places(path: Path) -> list[Path]:
    """Return the paths under which the learner has what a path shows: the history is also in ``cbstate``, and so on."""
    if path[:1] == ("history",):
        return [path, ("cbstate", "history"), ("cbstate", "metrics")]
    if path[:1] == ("params",):
        return [("model", *path[1:])]
    # The number of rows follows from the step's entries: who changes one of them goes before who reads it
    return [("step",)] if path == ("batch_size",) else [path]


def overlap(a: Path, b: Path) -> bool:
    """Return whether two paths show the same thing, or one of them a part of the other."""
    return any(covers(p, q) or covers(q, p) for p in places(a) for q in places(b))


@frozen
class Access:
    """What one callback declares.

    Args:
        callback: Id of the callback, for messages.
        reads: Paths it reads.
        writes: Paths it writes, and may read.
    """

    callback: str
    reads: tuple[Path, ...]
    writes: tuple[Path, ...]

    @classmethod
    def declared(cls, callback: str, reads: Iterable[str], writes: Iterable[str]) -> Access:
        """Parse what a callback declares.

        Raises:
            CallbackError: A bare string instead of a tuple, or a path with an unknown root.
        """
        for name, paths in (("reads", reads), ("writes", writes)):
            if isinstance(paths, str):
                raise CallbackError(
                    f"{callback} declares {name} = {paths!r}; expected a tuple of paths: {name} = ({paths!r},)"
                )
        return cls(
            callback,
            tuple(parse(path, callback) for path in reads),
            tuple(parse(path, callback) for path in writes),
        )

    @property
    def reads_everything(self) -> bool:
        """Whether ``"*"`` is among the reads."""
        return EVERYTHING in self.reads

    def allows(self, path: Path, mode: str) -> bool:
        """Return whether `path` may be read or written."""
        allowed = self.writes if mode == "write" else (*self.writes, *self.reads)
        return any(covers(prefix, path) for prefix in allowed)

    def refuse(self, path: Path, mode: str) -> StateAccessError:
        """Make the error for an undeclared access."""
        declared = (map(dotted, self.reads), map(dotted, self.writes))
        error = StateAccessError(self.callback, dotted(path), mode, declared)
        root = path[0].partition("@")[0] if path else "*"
        if root not in ROOTS and path:
            error.advice = (
                f"no callback can declare {root!r}, which is no part of the learner's state"
                f"{did_you_mean(root, (*ROOTS, *SERVICES))}\n"
                "  one that needs the learner itself is an UnsafeCallback: class Mine(UnsafeCallback)"
            )
        return error

    def require(self, path: Path, mode: str) -> None:
        """Raise for an undeclared access.

        Raises:
            StateAccessError: Names the callback, the path and the line to add.
        """
        if not self.allows(path, mode):
            raise self.refuse(path, mode)

    def children(self, path: Path) -> dict[str, Path]:
        """Return the names directly below `path` at or below which something is declared, each with its path."""
        below = [p for p in (*self.reads, *self.writes) if len(p) > len(path) and covers(path, p)]
        return {p[len(path)]: p[: len(path) + 1] for p in below}
