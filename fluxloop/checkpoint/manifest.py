"""What a checkpoint keeps, line by line, and callbacks that write what no checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import nn

from fluxloop.checkpoint.folder import size_of_file
from fluxloop.checkpoint.gathering import gather
from fluxloop.errors import CheckpointError
from fluxloop.order.access import dotted
from fluxloop.persist.plain import size

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner
    from fluxloop.order.graph import Node

State = dict[str, Any]


@frozen
class Entry:
    """A line of the manifest.

    Args:
        path: A path into the learner, or ``"callbacks.<id>"``, ``"phases.<class>"``.
        owner: The learner, or the callbacks that write it.
        kind: ``"persisted"``, ``"derived"`` from something persisted, or ``"transient"``: begun anew.
        size: In a checkpoint, in bytes.
    """

    path: str
    owner: str
    kind: str
    size: int = 0


class Manifest(tuple[Entry, ...]):
    """What a checkpoint keeps, line by line; prints as a table.

    Attributes:
        file_size: The size of the file in bytes. The sizes of lines are those in memory, roughly.
    """

    file_size: int = 0

    def __repr__(self) -> str:
        rows = [("path", "owner", "kind", "bytes"), *((e.path, e.owner, e.kind, str(e.size)) for e in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"a file of {self.file_size:,} bytes"])


DERIVED = {"params": "model", "batch_size": "step", "num_batches": "data"}
"""Roots of paths that follow from others."""


def unkept(node: Node, learner: RunLearner) -> list[str]:
    """List the paths a callback writes that no checkpoint keeps or derives, and that it does not declare transient."""
    roots = {"model", "optimizer", "cbstate", "history", "seed", "step", *DERIVED}
    if isinstance(learner.loss_fn, nn.Module):
        roots.add("loss_fn")
    transient = node.callback.unwrapped.transient
    written = [(dotted(path), path[0].partition("@")[0] if path else "*") for path in node.access.writes]
    return [path for path, root in written if root not in roots and path not in transient]


def check_writers(learner: RunLearner) -> None:
    """Raise for a callback that writes what no checkpoint keeps.

    Raises:
        CheckpointError: Names it and the path.
    """
    for node in learner.callbacks.graph.nodes:
        for path in unkept(node, learner):
            raise CheckpointError(
                f"{node.id} writes {path!r}, which no checkpoint keeps, and there is a Checkpointer; where it is made "
                f"anew in each run say so in the class: transient = ({path!r},)"
            )


def manifest(learner: RunLearner) -> Manifest:
    """List what a checkpoint keeps; see `Learner.checkpoint_manifest`."""
    state = gather(learner, None)
    nodes = learner.callbacks.graph.nodes
    lines = list(_persisted(learner, state))
    lines += [Entry(path, node.id, "not kept") for node in nodes for path in unkept(node, learner)]
    listed = {entry.path for entry in lines}
    for node in nodes:
        for entry in _said_by(node):
            if entry.path not in listed:
                lines.append(entry)
                listed.add(entry.path)
    found = Manifest(lines)
    found.file_size = size_of_file(state)  # measured: the archive's own entries count too, and shared memory once
    return found


def _persisted(learner: RunLearner, state: State) -> Iterator[Entry]:
    """Yield the lines of what a state holds, and of what callbacks share that it leaves out."""

    def line(path: str, owner: str, kept: Any) -> Entry:
        return Entry(path.strip("."), owner, "persisted", size(kept))

    yield from (line(f"model.{name}", "learner", kept) for name, kept in state["models"].items())
    if state["loss_fn"] is not None:
        yield line("loss_fn", "learner", state["loss_fn"])
    yield from (line(f"optimizer.{name}", "learner", kept) for name, kept in state["optimizers"].items())
    for path, kept in state["views"].items():
        yield line(path, ", ".join(learner.callbacks.writers(path)), kept)
    for name, value in vars(learner.cbstate).items():
        path = f"cbstate.{name}"
        kind = "persisted" if name in state["cbstate"] else "transient"
        owners = ", ".join(learner.callbacks.writers(path)) or "learner"
        yield Entry(path, owners, kind, size(state["cbstate"].get(name, ())) if value is not None else 0)
    yield from (line(f"callbacks.{id}", id, kept) for id, kept in state["callbacks"].items())
    for name, kept in state["phases"].items():
        cls, bracket, own = name.partition("[")
        yield line(f"phases.{cls.rpartition('.')[2]}{bracket}{own}", name, kept)
    yield from (line(part, "learner", state[part]) for part in ("seed", "streams", "updates", "history", "data"))


def _said_by(node: Node) -> Iterator[Entry]:
    """Yield lines of what a callback says it writes, and of what it says is transient."""
    for path in map(dotted, node.access.writes):
        yield Entry(path, node.id, _kind(path, node))
    for path in node.callback.unwrapped.transient:
        if not path.startswith("_"):
            yield Entry(path if "." in path else f"callbacks.{node.id}.{path}", node.id, "transient")


def _kind(path: str, node: Node) -> str:
    root = path.split(".")[0].partition("@")[0]
    if root == "step" or path in node.callback.unwrapped.transient:
        return "transient"
    held = "@" in path  # in the state of the callback that keeps the weights view
    return "derived" if root in DERIVED or held else "persisted"
