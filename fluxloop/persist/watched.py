"""What has changed of one object since it was set up: a callback, a phase, a loss function."""

from __future__ import annotations

from typing import Any

from fluxloop.persist.owners import Restoring
from fluxloop.persist.plain import MARK
from fluxloop.persist.reached import Owner
from fluxloop.persist.walk import Walk

State = dict[str, Any]


class Watched:
    """An object that is watched, so that a checkpoint keeps what has changed of it.

    Args:
        thing: The object, set up and not yet used.
        name: What it is called in messages.
        owner: Returns the name of what somebody else keeps.
    """

    def __init__(self, thing: Any, name: str, owner: Owner | None = None) -> None:
        self.thing = thing
        self.name = name
        self.walk = Walk({"": thing}, name, owner)

    def state(self, owner: Owner) -> tuple[State, list[str]]:
        """Return the state as plain data, empty where nothing has changed, and the paths of what is lost.

        Raises:
            CheckpointError: What its pair returns is no plain data.
        """
        states, lost = self.walk.state(owner)
        return states.get("", {}), lost

    def restore(self, state: State, restoring: Restoring) -> None:
        """Restore a state; see `Walk.restore`.

        Raises:
            CheckpointError: It cannot be restored.
        """
        self.walk.restore({"": state}, restoring)


def plain_entries(state: State) -> State:
    """Return those of the attributes in a state that are plain data, by name."""
    entries = {
        name: kept["to"] if isinstance(kept, dict) and kept.get(MARK) == "changed" else kept
        for name, kept in state.items()
        if name != MARK
    }
    return {name: kept for name, kept in entries.items() if not (isinstance(kept, dict) and MARK in kept)}
