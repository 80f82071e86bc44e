"""The whole state of a learner, gathered as plain data.

What is kept follows from what there is: models, optimizers and gradients that wait for an update,
the streams of random numbers, every callback and phase, what callbacks share, and where the fit
stands in its phases and its data. `manifest` lists it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from fluxloop.checkpoint.folder import FORMAT
from fluxloop.checkpoint.open_windows import take_apart
from fluxloop.checkpoint.optimizer_state import optimizer_state
from fluxloop.checkpoint.weights_file import weights_of
from fluxloop.compute.optimizers import parameter_names
from fluxloop.data.changes import changes_of, source_state
from fluxloop.data.fingerprint import fingerprint
from fluxloop.data.passes import data_state
from fluxloop.errors import CheckpointError, warn_user
from fluxloop.order.access import dotted
from fluxloop.order.owners import owners_of
from fluxloop.persist.modules import unsaved_buffers
from fluxloop.persist.owners import Owners
from fluxloop.persist.plain import class_name, phase_id, to_plain
from fluxloop.persist.walk import Walk
from fluxloop.persist.watched import Watched
from fluxloop.signals import INTERRUPTED, TERMINATED

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

State = dict[str, Any]


class _Gathering:
    """Gathers states of what is watched, and notes what of it is lost.

    Args:
        owners: Tell what somebody else keeps.

    Attributes:
        lost: The paths of what has changed and cannot be kept.
    """

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        self.lost: list[str] = []

    def state_of(self, watched: Watched | Walk) -> State:
        """Return what has changed of a callback, a phase, a loss function or a model's parts."""
        state, lost = watched.state(self._owners)
        self.lost += lost
        return state


def gather(learner: RunLearner, place: State | None) -> State:
    """Return the state of a learner; tensors are those it holds, as with ``Module.state_dict()``.

    Args:
        learner: The learner.
        place: Where its fit stands; None where there is none, or none to go on with.

    Raises:
        CheckpointError: Something cannot be kept.
    """
    learner._host_queue.flush()  # numbers under way to callbacks have to arrive in their states
    gathering = _Gathering(owners_of(learner))
    parameters = parameter_names(learner.models, learner.loss_fn)
    loss_fn = None
    if isinstance(learner.loss_fn, nn.Module):
        loss_fn = _module_state(learner, learner.loss_fn, gathering)
    elif learner._ledger.loss is not None:
        loss_fn = {"attributes": gathering.state_of(learner._ledger.loss)}
    state = {
        "fluxloop": FORMAT,
        "seed": learner.seed,
        "models": {name or "": _module_state(learner, module, gathering) for name, module in learner.models.items()},
        "loss_fn": loss_fn,
        "views": {path: learner.weights[path].state_dict() for path in _kept_views(learner)},
        "optimizers": {
            slot.name or "": optimizer_state(slot.optimizer, parameters, slot.label) for slot in learner.updates.slots
        },
        "updates": _updates_state(learner),
        "streams": learner.streams.positions(),
        "history": {"cycles": learner.history.cycles, "stop_reason": lasting(learner.history.stop_reason)},
        "cbstate": _shared_state(learner),
        "callbacks": _callbacks_state(learner, gathering),
        # Most callbacks keep nothing; this tells them from one that is added later, and begins anew
        "present": {node.id: class_name(type(node.callback.unwrapped)) for node in learner.callbacks.graph.nodes},
        "phases": phases_state(learner, gathering.state_of),
        "data": _data_state(learner, place, gathering),
        "place": place,
    }
    if learner.accelerator.precision != "fp32":
        state["precision"] = learner.accelerator.precision
    tell_lost(learner, gathering.lost)
    return state


def tell_lost(learner: RunLearner, lost: list[str]) -> None:
    """Warn of what a checkpoint does not keep, once each."""
    new = [path for path in dict.fromkeys(lost) if path not in learner._ledger.told_lost]
    if not new:
        return
    learner._ledger.told_lost.update(new)
    names = tuple(dict.fromkeys(map(_attribute, new)))
    warn_user(
        f"{', '.join(new)} changed in training and cannot be saved in a checkpoint; hold it as numbers, texts and "
        "tensors, or give its class state_dict() and load_state_dict(state). Where a resumed run does not need it, say "
        f"so in the class that has it: transient = {names!r}"
    )


def _attribute(path: str) -> str:
    """Return the name of the attribute at the beginning of a path such as ``"phases.P.pools['a']"``."""
    below = path.removeprefix("callbacks.").removeprefix("phases.")
    parts = [part for part in re.split(r"[.\[]", below) if part]
    return parts[min(1, len(parts) - 1)]


def lasting(reason: str | None) -> str | None:
    """Return why a fit stopped; None where it was interrupted, and so may be resumed."""
    return None if reason in (INTERRUPTED, TERMINATED) else reason


def _module_state(learner: RunLearner, module: nn.Module, gathering: _Gathering) -> State:
    """Return a module's state: what its ``state_dict`` holds, and what that leaves out.

    That is: buffers that are not persistent, which parameters are frozen, and other attributes of its parts that have
    changed.
    """
    return {
        **weights_of(module),
        "buffers": {name: tensor for name, _, _, tensor in unsaved_buffers(module)},
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "attributes": gathering.state_of(learner._ledger.modules[module]),
    }


def _kept_views(learner: RunLearner) -> list[str]:
    """List the weights views whose callback has no state of its own."""
    own = {
        path
        for node in learner.callbacks.graph.nodes
        if callable(getattr(node.callback.unwrapped, "state_dict", None))
        for path in map(dotted, node.access.writes)
    }
    paths = [f"model{'.' * bool(parts)}{'.'.join(parts)}@{view}" for view, parts in learner.weights.views]
    return [path for path in paths if path not in own]


def _updates_state(learner: RunLearner) -> State:
    """Return where each optimizer stands in accumulating gradients, and the gradients that wait for an update."""
    updates = learner.updates
    consumed = {p for slot in updates.slots if slot.consumed for p in slot.parameters}
    kept: State = {
        "slots": {
            slot.name or "": {
                "consumed": slot.consumed,
                "waiting": slot.first_step is not None,
                "in_block": slot.in_block,
                "train_mode": slot.mode is not None and slot.mode.is_train,
                "phase": slot.phase,
                "num_batches": slot.num_batches,
                **slot.window_state(),
            }
            for slot in updates.slots
        },
        **updates.scale_state(),
        "gradients": {  # those that an update has used are released when the next step begins
            name: p.grad.detach() for p, name in updates.names.items() if p.grad is not None and p not in consumed
        },
    }
    take_apart(learner, kept)
    return kept


def _shared_state(learner: RunLearner) -> State:
    """Return what callbacks share, as plain data."""
    kept: State = {}
    for name, value in vars(learner.cbstate).items():
        path = f"cbstate.{name}"
        if any(path in node.callback.unwrapped.transient for node in learner.callbacks.graph.nodes):
            continue
        try:
            kept[name] = to_plain(value, path)
        except CheckpointError as error:
            writers = ", ".join(learner.callbacks.writers(path)) or "nobody"
            raise CheckpointError(
                f"{error}\n  It is written by {writers}; where it need not be kept: transient = ({path!r},)"
            ) from None
    return kept


def _callbacks_state(learner: RunLearner, gathering: _Gathering) -> State:
    """Return the states of callbacks by id."""
    states: State = {}
    for node in learner.callbacks.graph.nodes:
        own, conditions = learner.callbacks.kept(node)
        state = gathering.state_of(own)
        around = [gathering.state_of(condition) for condition in conditions]
        if state or any(around):
            states[node.id] = {"class": class_name(type(node.callback.unwrapped)), "state": state, "around": around}
    return states


def phases_state(learner: RunLearner, state_of: Callable[[Watched], State]) -> State:
    """Return the states of phases by class and name, in the order in which the learner met them.

    Args:
        learner: The learner.
        state_of: Returns the state of one phase.
    """
    states: State = {}
    for kept in learner._ledger.phases:
        states.setdefault(phase_id(kept.thing), []).append(state_of(kept))
    for name, waiting in learner._ledger.waiting.items():  # loaded, and their phases have not run since
        states.setdefault(name, []).extend(waiting)
    return {name: given for name, given in states.items() if any(given)}


def _data_state(learner: RunLearner, place: State | None, gathering: _Gathering) -> State:
    """Return the states of the data; of the data under way, the state with which its epoch began."""
    running = None if place is None or place["feed"] is None else vars(learner.data)[place["feed"]["key"]]
    states: State = {}
    for key, source in vars(learner.data).items():
        begun = key in learner._ledger.begun_data and source is not running
        states[key] = data_state(source, begun, key, learner.accelerator.group)
        states[key]["fingerprint"] = fingerprint(source, learner.accelerator.world_size)
        gathering.lost += changes_of(source)[1]
        if source is running and place is not None:  # a resumed run begins the epoch again, and skips what was used
            states[key] |= {part: place["feed"][part] for part in source_state(source)}
    return states
