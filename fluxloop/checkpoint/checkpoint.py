"""The whole state of a learner as plain data, and how a learner goes on from it.

What is kept follows from what there is: models, optimizers and gradients that wait for an update,
the streams of random numbers, every callback and phase, what callbacks share, and where the fit
stands in its phases and its data. `manifest` lists it.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fluxloop.callback import Callback
from fluxloop.checkpoint.folder import size_of_file
from fluxloop.checkpoint.misfits import FORMAT, weights_differ
from fluxloop.checkpoint.optimizer_state import load_optimizer, optimizer_state
from fluxloop.compute.optimizers import parameter_names, parameters_by_name
from fluxloop.data.changes import changes_of, source_state
from fluxloop.data.fingerprint import fingerprint
from fluxloop.data.passes import data_state, put_data_back
from fluxloop.errors import CheckpointError, annotate, sentence, warn_user
from fluxloop.guard.assign import put
from fluxloop.order.access import dotted
from fluxloop.order.owners import owners_of
from fluxloop.persist.copies import copy_attributes, copy_gradient
from fluxloop.persist.modules import UNINITIALIZED, freeze, is_uninitialized, uninitialize, unsaved_buffers
from fluxloop.persist.owners import Owners, Restoring, of_learners
from fluxloop.persist.plain import (
    WATCHED,
    attributes,
    class_name,
    from_plain,
    is_held,
    is_stateful,
    phase_id,
    size,
    snapshot,
    to_plain,
)
from fluxloop.persist.watched import Watched
from fluxloop.phase import Phase, phase_types
from fluxloop.signals import INTERRUPTED, TERMINATED
from fluxloop.state import StepState, name_of

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner
    from fluxloop.order.graph import Node

State = dict[str, Any]


# Gathering


def gather(learner: RunLearner, place: State | None) -> State:
    """Give the state of a learner; tensors are those it holds, as with ``Module.state_dict()``.

    Args:
        learner: The learner.
        place: Where its fit stands; None where there is none, or none to go on with.

    Raises:
        CheckpointError: Something cannot be kept.
    """
    learner._host_queue.flush()
    lost: list[str] = []
    owners = owners_of(learner)
    parameters = parameter_names(learner.models, learner.loss_fn)
    loss_fn = None
    if isinstance(learner.loss_fn, nn.Module):
        loss_fn = _module_state(learner, learner.loss_fn, owners, lost)
    elif learner._ledger.loss is not None:
        loss_fn = {"attributes": _note_lost(learner._ledger.loss.state(owners), lost)}
    state = {
        "fluxloop": FORMAT,
        "seed": learner.seed,
        "models": {name or "": _module_state(learner, module, owners, lost) for name, module in learner.models.items()},
        "loss_fn": loss_fn,
        "views": {path: learner.weights[path].state_dict() for path in _kept_views(learner)},
        "optimizers": {
            slot.name or "": optimizer_state(slot.optimizer, parameters, slot.label) for slot in learner.updates.slots
        },
        "updates": _updates_state(learner),
        "streams": learner.streams.positions(),
        "history": {"cycles": learner.history.cycles, "stop_reason": lasting(learner.history.stop_reason)},
        "cbstate": _shared_state(learner),
        "callbacks": _callbacks_state(learner, owners, lost),
        "present": {node.id: class_name(type(node.callback.unwrapped)) for node in learner.callbacks.graph.nodes},
        "phases": _phases_state(learner, owners, lost),
        "data": _data_state(learner, place, lost),
        "place": place,
    }
    tell_lost(learner, lost)
    return state


def tell_lost(learner: RunLearner, lost: list[str]) -> None:
    """Warn of what a checkpoint does not keep, once each."""
    new = [path for path in dict.fromkeys(lost) if path not in learner._ledger.told_lost]
    if not new:
        return
    learner._ledger.told_lost.update(new)
    names = tuple(
        dict.fromkeys(re.split(r"[.\[]", path.removeprefix("callbacks.").removeprefix("phases."))[1] for path in new)
    )
    warn_user(
        f"{', '.join(new)} changed in training and cannot be saved in a checkpoint; hold it as numbers, texts and "
        "tensors, or give its class state_dict() and load_state_dict(state). Where a resumed run does not need it, say "
        f"so in the class that has it: transient = {names!r}"
    )


def _attribute(path: str) -> str:
    """Give the name of the attribute at the beginning of a path such as ``"phases.P.pools['a']"``."""
    below = path.removeprefix("callbacks.").removeprefix("phases.")
    return [part for part in re.split(r"[.\[]", below) if part][1]


def _note_lost(found: tuple[Any, list[str]], lost: list[str]) -> Any:
    """Give a state, and note what of it is lost."""
    lost += found[1]
    return found[0]


def lasting(reason: str | None) -> str | None:
    """Give why a fit stopped where that is for good."""
    return None if reason in (INTERRUPTED, TERMINATED) else reason


def _module_state(learner: RunLearner, module: nn.Module, owners: Owners, lost: list[str]) -> State:
    """Give a module's state: what it saves by itself, and what it does not.

    That is: buffers it leaves out, which parameters are frozen, and its parts' other attributes that have changed.
    """
    watched = _note_lost(learner._ledger.modules[module].state(owners), lost)
    return {
        **weights_of(module),
        "buffers": {name: tensor for name, _, _, tensor in unsaved_buffers(module)},
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "attributes": watched,
    }


def weights_of(module: nn.Module) -> State:
    """Give what a module saves by itself, as plain data."""
    state, label = module.state_dict(), type(module).__name__
    return {
        "state": {
            name: UNINITIALIZED
            if is_lazy(value)
            else (value if isinstance(value, Tensor) else to_plain(value, f"{name!r} of {label}"))
            for name, value in state.items()
        },
        "metadata": to_plain(dict(getattr(state, "_metadata", {})), f"the metadata of {label}"),
    }


def put_weights(module: nn.Module, kept: State) -> None:
    """Have a module load what `weights_of` gave."""
    lazy = {name for name, value in kept["state"].items() if is_uninitialized(value)}
    tensors = {name: from_plain(value) for name, value in kept["state"].items() if name not in lazy}
    result = module.load_state_dict(with_metadata(tensors, from_plain(kept["metadata"])), strict=not lazy)
    if lazy:
        uninitialize(module, lazy)
        if set(result.missing_keys) - lazy or result.unexpected_keys:
            raise CheckpointError(f"{type(module).__name__} does not load its state: {result}")


def with_metadata(tensors: dict[str, Any], metadata: dict[str, Any]) -> OrderedDict[str, Any]:
    """Give a module's state as its ``state_dict`` gave it, with the versions of its parts."""
    state = OrderedDict(tensors)
    state._metadata = metadata  # type: ignore[attr-defined]  # where torch keeps it
    return state


def _kept_views(learner: RunLearner) -> list[str]:
    """List the views of weights whose keeper has no state of its own."""
    own = {
        path
        for node in learner.callbacks.graph.nodes
        if callable(getattr(node.callback.unwrapped, "state_dict", None))
        for path in map(dotted, node.access.writes)
    }
    paths = [f"model{'.' * bool(parts)}{'.'.join(parts)}@{view}" for view, parts in learner.weights.views]
    return [path for path in paths if path not in own]


def _updates_state(learner: RunLearner) -> State:
    """Give where the gradients stand, and those that wait for an update."""
    updates = learner.updates
    consumed = {p for slot in updates.slots if slot.consumed for p in slot.parameters}
    return {
        "slots": {
            slot.name or "": {
                "consumed": slot.consumed,
                "waiting": slot.first_step is not None,
                "in_block": slot.in_block,
                "train_mode": slot.mode is not None and slot.mode.is_train,
                "phase": slot.phase,
                "num_batches": slot.num_batches,
            }
            for slot in updates.slots
        },
        "gradients": {
            name: p.grad.detach() for p, name in updates.names.items() if p.grad is not None and p not in consumed
        },
    }


def _shared_state(learner: RunLearner) -> State:
    """Give what callbacks share, as plain data."""
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


def _callbacks_state(learner: RunLearner, owners: Owners, lost: list[str]) -> State:
    """Give the states of callbacks by id."""
    states: State = {}
    for node in learner.callbacks.graph.nodes:
        own, conditions = learner.callbacks.kept(node)
        state = _note_lost(own.state(owners), lost)
        around = [_note_lost(condition.state(owners), lost) for condition in conditions]
        if state or any(around):
            states[node.id] = {"class": class_name(type(node.callback.unwrapped)), "state": state, "around": around}
    return states


def _phases_state(learner: RunLearner, owners: Owners, lost: list[str]) -> State:
    """Give the states of phases by class and name, in the order in which the learner met them."""
    states: State = {}
    for kept in learner._ledger.phases:
        state = _note_lost(kept.state(owners), lost)
        states.setdefault(phase_id(kept.thing), []).append(state)
    for name, waiting in learner._ledger.waiting.items():
        states.setdefault(name, []).extend(waiting)
    return {name: given for name, given in states.items() if any(given)}


def _data_state(learner: RunLearner, place: State | None, lost: list[str]) -> State:
    """Give the states of the data; of the data under way, that with which its epoch began."""
    running = None if place is None or place["feed"] is None else vars(learner.data)[place["feed"]["key"]]
    states: State = {}
    for key, source in vars(learner.data).items():
        states[key] = data_state(source, key in learner._ledger.begun_data and source is not running, key)
        states[key]["fingerprint"] = fingerprint(source)
        lost += changes_of(source)[1]
        if source is running and place is not None:
            states[key] |= {part: place["feed"][part] for part in source_state(source)}
    return states


# Going on


def take(learner: RunLearner, state: State, *, begun: bool) -> Callable[[], None]:
    """Put a learner where the state was gathered, or leave it where it is: see `apply`.

    Returns:
        What puts the learner back where it was before, as far as a checkpoint keeps it.

    Raises:
        CheckpointError: A state cannot be put back.
    """
    before, history = snapshot(gather(learner, None)), learner.history
    begun_data, reason = set(learner._ledger.begun_data), history.stop_reason
    gradients = [(parameter, parameter.grad) for parameter in learner.updates.names]  # used ones are in no checkpoint

    def undo() -> None:
        apply(learner, before, begun=True)
        learner._ledger.begun_data, history.stop_reason = begun_data, reason
        for parameter, gradient in gradients:
            parameter.grad = gradient

    try_to_apply(learner, state, undo, begun=begun)
    _tell_others(learner, state)
    return undo


def _tell_others(learner: RunLearner, state: State) -> None:
    """Warn of states without a callback, and of callbacks without a state, which begin anew."""
    nodes = {node.id: node.callback.unwrapped for node in learner.callbacks.graph.nodes}
    unknown = sorted(state["callbacks"].keys() - nodes)
    missing = nodes.keys() - state["callbacks"].keys() - state.get("present", {}).keys()
    new = sorted(id for id in missing if _misses_something(nodes[id], state, "present" in state))
    told = []
    if unknown:
        told.append(f"the checkpoint has states of {', '.join(unknown)}, which are not among the callbacks now")
    if new:
        told.append(f"the checkpoint has no state of {', '.join(new)}: what they keep begins anew")
    if told:
        warn_user(
            f"{'; '.join(told)}. Callbacks are found by their names: name='...', else the class's"
            f"{', with a number where there are several' if unknown and new else ''}"
        )


def _misses_something(callback: Callback, state: State, told: bool) -> bool:
    """Tell whether a callback that is not in a checkpoint would have kept something there.

    That is: it has the pair, or attributes that it was not made with, or publishes what nobody did.

    Args:
        callback: The callback.
        state: Of the checkpoint.
        told: Whether the checkpoint says which callbacks there were; an older one has only those with a state.
    """
    if callback._begins_anywhere:
        return False
    if is_stateful(callback) or not told:
        return is_stateful(callback)
    made_with = {*inspect.signature(type(callback)).parameters, "name", "adopted"}  # the last two: of every callback
    names = {name for name in attributes(callback) if not name.startswith("__")} - {*callback.transient}
    shared = {path.removeprefix("cbstate.") for path in callback.writes if path not in callback.transient}
    return not {name.lstrip("_") for name in names} <= made_with or any(
        path in shared and path not in state["cbstate"] for path in ("history", "metrics", "hyperparameters")
    )


def try_to_apply(
    learner: RunLearner, state: State, undo: Callable[[], None], *, begun: bool, running: bool = False
) -> None:
    """Put a state in place, or undo it and say why it does not fit.

    Raises:
        CheckpointError: A state cannot be put back; the learner is as `undo` leaves it.
    """
    try:
        apply(learner, state, begun=begun, running=running)
    except BaseException as error:
        try:
            undo()
        except Exception as failure:
            annotate(error, f"fluxloop: putting the learner back as it was failed as well: {failure!r}")
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"the state in the checkpoint cannot be put in place: {type(error).__name__}: "
            f"{sentence(error)} Nothing was changed"
        ) from error


def apply(learner: RunLearner, state: State, *, begun: bool, running: bool = False) -> None:
    """Put a learner where the state was gathered; it has been checked with `check_fits`.

    Phases that have not run yet take their states when they first do.

    Args:
        learner: The learner.
        state: What `gather` gave.
        begun: Whether what begins with the fit has begun: before, what a callback makes then need not be there.
        running: Whether the fit has just begun again: what it made then, and no checkpoint holds, stays.

    Raises:
        CheckpointError: A state cannot be put back.
    """
    learner.history.seed = state["seed"]
    put(learner, "seed", state["seed"])
    learner.streams.go_on(state["seed"], state["streams"])
    types, device = tuple(phase_types()), learner.accelerator.device
    restoring = Restoring(owners_of(learner), begun, running, types, device)
    _load_callbacks(learner, state["callbacks"], restoring)  # first: they may still refuse
    for slot in learner.updates.slots:
        if slot.mode is not None:  # before the weights of that mode are loaded
            slot.mode.set(state["updates"]["slots"][slot.name or ""].get("train_mode", False))
    for name, module in learner.models.items():
        _load_module(learner, module, state["models"][name or ""], restoring)
    if isinstance(learner.loss_fn, nn.Module):
        _load_module(learner, learner.loss_fn, state["loss_fn"], restoring)
    elif learner._ledger.loss is not None:
        learner._ledger.loss.restore((state["loss_fn"] or {"attributes": {}})["attributes"], restoring)
    for path, kept in state["views"].items():
        if path in learner.weights:
            learner.weights[path].load_state_dict(kept)
    by_name = parameters_by_name(learner.models, learner.loss_fn)
    for slot in learner.updates.slots:
        load_optimizer(slot.optimizer, state["optimizers"][slot.name or ""], by_name, slot.label, device)
    _load_updates(learner, state["updates"])
    learner.history.cycles = state["history"]["cycles"]
    learner.history.stop_reason = state["history"]["stop_reason"]
    shared = vars(learner.cbstate)
    gone = [f"cbstate.{name}" for name, kept in state["cbstate"].items() if name not in shared and is_held(kept)]
    if gone and begun:
        warn_user(f"the checkpoint has {', '.join(gone)}, which no callback publishes now")
    for name, kept in state["cbstate"].items():
        where = f"cbstate.{name}"
        if where in gone:
            continue
        shared[name] = from_plain(kept, shared.get(name), phases=types, device=device, where=where)
    learner._ledger.waiting = {name: list(states) for name, states in state["phases"].items()}
    learner._ledger.loaded = True
    for kept_phase in learner._ledger.phases:
        waiting = learner._ledger.waiting.get(phase_id(kept_phase.thing))
        kept_phase.restore(waiting.pop(0) if waiting else {}, restoring)
    for key, kept in state["data"].items():
        if key in learner.data and put_data_back(vars(learner.data)[key], kept):
            learner._ledger.begun_data.add(key)


def _load_module(learner: RunLearner, module: nn.Module, kept: State, restoring: Restoring) -> None:
    learner._ledger.modules[module].restore(kept["attributes"], restoring)
    put_weights(module, kept)
    for name, part, own, tensor in list(unsaved_buffers(module)):
        if name in kept["buffers"]:
            part._buffers[own] = kept["buffers"][name].to(tensor.device, copy=True)
    freeze(module, set(kept["frozen"]))


def _load_updates(learner: RunLearner, kept: State) -> None:
    by_name = parameters_by_name(learner.models, learner.loss_fn)
    gradients = {by_name[name]: gradient for name, gradient in kept["gradients"].items() if name in by_name}
    for parameter in learner.updates.names:
        gradient = gradients.get(parameter)
        parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
    for slot in learner.updates.slots:
        stands = kept["slots"][slot.name or ""]
        slot.consumed, slot.in_block = stands["consumed"], stands["in_block"]
        slot.first_step = StepState() if stands["waiting"] else None
        slot.phase, slot.num_batches = stands.get("phase"), stands.get("num_batches", 0)  # older files lack them
        slot.step = slot.before = None


def _load_callbacks(learner: RunLearner, states: State, restoring: Restoring) -> None:
    nodes = {node.id: node for node in learner.callbacks.graph.nodes}
    for id, node in nodes.items():
        own, conditions = learner.callbacks.kept(node)
        kept = states.get(id, {"state": {}, "around": []})
        try:
            own.restore(kept["state"], restoring)
            for condition, around in zip(conditions, [*kept["around"], *([{}] * len(conditions))], strict=False):
                condition.restore(around, restoring)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{id} does not take its state from the checkpoint: {type(error).__name__}: {error}"
            ) from error


def meet_phases(learner: RunLearner, phases: list[Phase]) -> None:
    """Note phases that are about to run, and have new ones take up the states that wait for them.

    Of two instances of a class with one name the learner forgets the one that runs no more.
    """
    ids = {phase_id(phase) for phase in phases}
    kept = [
        k for k in learner._ledger.phases if phase_id(k.thing) not in ids or any(k.thing is each for each in phases)
    ]
    known = [each.thing for each in kept]
    for phase in phases:
        if not any(phase is each for each in known):
            kept.append(watched(learner, phase))
            waiting = learner._ledger.waiting.get(phase_id(phase))
            if waiting or learner._ledger.loaded:  # where nothing was kept of it, it begins as it was first used
                types, device = tuple(phase_types()), learner.accelerator.device
                kept[-1].restore(
                    waiting.pop(0) if waiting else {}, Restoring(owners_of(learner), phases=types, device=device)
                )
    learner._ledger.phases = kept


def watched(learner: RunLearner, phase: Phase) -> Watched:
    """Give what is known of a phase since it was used first, in whichever learner."""
    known = vars(phase).get(WATCHED)
    if not isinstance(known, Watched) or known.thing is not phase:
        known = vars(phase)[WATCHED] = Watched(phase, f"phases.{name_of(phase)}", owners_of(learner))
    return known


def complete_copy(learner: RunLearner, copied: RunLearner, memo: dict[int, Any]) -> None:
    """Give a copy of a learner what PyTorch leaves out where it copies parameters and optimizers.

    Those are gradients and hooks. The states of phases wait for whichever instances the copy will run.
    """
    consumed = {p for slot in learner.updates.slots if slot.consumed for p in slot.parameters}
    for module, other in zip(learner.modules(), copied.modules(), strict=True):
        of_learners.update(other.modules())
        for parameter, twin in zip(module.parameters(), other.parameters(), strict=True):
            copy_gradient(parameter, twin, memo, parameter not in consumed)
    for slot, twin_slot in zip(learner.updates.slots, copied.updates.slots, strict=True):
        copy_attributes(slot.optimizer, twin_slot.optimizer, memo)
    if isinstance(copied.callbacks, type(learner.callbacks)):  # and not left out
        for node, twin_node in zip(learner.callbacks.graph.nodes, copied.callbacks.graph.nodes, strict=True):
            walk, twin_walk = learner.callbacks.kept(node)[0].walk, copied.callbacks.kept(twin_node)[0].walk
            walk.complete_copy(twin_walk, memo)
    copied._ledger.waiting = snapshot(_phases_state(learner, owners_of(learner), []))
    copied._ledger.phases = []


def load_weights(learner: RunLearner, state: State, name: str, strict: bool) -> list[str]:
    """Take weights from a state; see `Learner.load_weights`."""
    live = dict(learner.models) if name == "model" else {None: learner.weights[name]}
    if "fluxloop" in state:
        models = state["models"]
        own = name.partition(".")[0]
        source = models if name == "model" else {"": models.get(name, models.get("", models.get(own)))}
        kept = {key: value["state"] for key, value in source.items() if value is not None}
        metadata = {key: value["metadata"] for key, value in source.items() if value is not None}
        if name != "model" and name not in models and ("" in models or own != name):  # a part of a model
            part = name if "" in models else name.partition(".")[2]
            inside = re.compile(re.escape(part) + r"(?:\.|$)")
            for of_models in (kept, metadata):
                of_models[""] = {inside.sub("", k, 1): v for k, v in of_models[""].items() if inside.match(k)}
    else:
        kept, metadata = {"": state}, {"": getattr(state, "_metadata", {})}
    given = {key or "": module for key, module in live.items()}
    if set(given) != set(kept):
        raise CheckpointError(
            f"weights of {sorted(given)} were asked for, and the file has those of {sorted(kept)}; name one of the "
            "models: learner.load_weights(path, 'G')"
        )
    wrong = [line for key, module in given.items() for line in weights_differ(module, kept[key], key or "the model")]
    if wrong and strict:
        raise CheckpointError(
            "the weights do not fit:\n  " + "\n  ".join(wrong) + "\nload_weights(..., strict=False) takes those that do"
        )
    _check_any_fits(given, kept)
    left: list[str] = []
    for key, module in given.items():
        mine = module.state_dict()
        fitting = {n: t for n, t in kept[key].items() if n in mine and _takes(mine[n], t)}
        module.load_state_dict(with_metadata(fitting, metadata.get(key, {})), strict=False)
        left += sorted({".".join(filter(None, (key, n))) for n in (mine.keys() | kept[key].keys()) - fitting.keys()})
    return left


def _takes(mine: Any, tensor: Any) -> bool:
    """Tell whether a tensor can take the place of another one: any can that of one that has no shape yet."""
    return isinstance(tensor, Tensor) and (is_lazy(mine) or getattr(mine, "shape", None) == tensor.shape)


def _check_any_fits(given: dict[str, nn.Module], kept: dict[str, Any]) -> None:
    """Raise where not one tensor of a file fits the models by name and shape.

    Raises:
        CheckpointError: Lists the names of both, and says what to type where they differ by what stands in front.
    """
    own = {name: tensor for module in given.values() for name, tensor in module.state_dict().items()}
    theirs = {name: tensor for state in kept.values() for name, tensor in state.items()}
    alike = [n for n, t in theirs.items() if n in own and _takes(own[n], t)]
    if alike or not own:
        return

    def shown(names: Iterable[str]) -> str:
        names = list(names)
        return f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}" or "none"

    raise CheckpointError(
        "no tensor of the file fits by name and shape, so that nothing would be taken\n"
        f"  the model has: {shown(own)}\n  the file has: {shown(theirs)}{_advise_prefix(own, theirs)}"
    )


def _advise_prefix(own: Iterable[str], theirs: Iterable[str]) -> str:
    """Say what to type where names differ by a prefix alone, such as ``"module."``; else nothing."""
    own, theirs = list(own), list(theirs)
    longer = {a[: -len(b)] for a in theirs for b in own if a.endswith(f".{b}")}
    for prefix in sorted(longer):
        if all(f"{prefix}{name}" in theirs for name in own):
            return (
                f"\n  its names begin with {prefix!r}: take that away first:\n"
                f"    torch.save({{n.removeprefix({prefix!r}): t for n, t in torch.load(path).items()}}, new_path)"
            )
    shorter = {a[: -len(b)] for a in own for b in theirs if a.endswith(f".{b}")}
    for prefix in sorted(shorter):
        if any(f"{prefix}{name}" in own for name in theirs):
            return f"\n  they are those of a part: learner.load_weights(path, {prefix.rstrip('.')!r})"
    return ""


# Telling


@frozen
class Entry:
    """A line of the manifest.

    Args:
        path: What it is about: a path into the learner, or ``"callbacks.<id>"``, ``"phases.<class>"``.
        owner: Who writes it.
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
        file_size: Of the file that it is written to, in bytes: sizes of lines are those in memory, roughly.
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
    """List the paths a callback writes that no checkpoint keeps, derives, or was told to leave out."""
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
    lines: list[Entry] = []
    for name, kept in state["models"].items():
        lines.append(Entry(".".join(filter(None, ("model", name))), "learner", "persisted", size(kept)))
    if state["loss_fn"] is not None:
        lines.append(Entry("loss_fn", "learner", "persisted", size(state["loss_fn"])))
    for name, kept in state["optimizers"].items():
        lines.append(Entry(".".join(filter(None, ("optimizer", name))), "learner", "persisted", size(kept)))
    for path, kept in state["views"].items():
        lines.append(Entry(path, ", ".join(learner.callbacks.writers(path)), "persisted", size(kept)))
    for name, value in vars(learner.cbstate).items():
        path = f"cbstate.{name}"
        kind = "persisted" if name in state["cbstate"] else "transient"
        owners = ", ".join(learner.callbacks.writers(path)) or "learner"
        lines.append(Entry(path, owners, kind, size(state["cbstate"].get(name, ())) if value is not None else 0))
    for id, kept in state["callbacks"].items():
        lines.append(Entry(f"callbacks.{id}", id, "persisted", size(kept)))
    for name, kept in state["phases"].items():
        cls, bracket, own = name.partition("[")
        lines.append(Entry(f"phases.{cls.rpartition('.')[2]}{bracket}{own}", name, "persisted", size(kept)))
    for part in ("seed", "streams", "updates", "history"):
        lines.append(Entry(part, "learner", "persisted", size(state[part])))
    lines.append(Entry("data", "learner", "persisted", size(state["data"])))
    lines += [Entry(path, node.id, "not kept") for node in nodes for path in unkept(node, learner)]
    told = {entry.path for entry in lines}
    for node in nodes:
        for path in map(dotted, node.access.writes):
            if path not in told:
                lines.append(Entry(path, node.id, _kind(path, node)))
                told.add(path)
        for path in node.callback.unwrapped.transient:
            where = path if "." in path else f"callbacks.{node.id}.{path}"
            if where not in told and not path.startswith("_"):
                lines.append(Entry(where, node.id, "transient"))
                told.add(where)
    found = Manifest(lines)
    found.file_size = size_of_file(state)
    return found


def _kind(path: str, node: Node) -> str:
    root = path.split(".")[0].partition("@")[0]
    if root == "step" or path in node.callback.unwrapped.transient:
        return "transient"
    held = "@" in path  # in the state of the callback that keeps the view
    return "derived" if root in DERIVED or held else "persisted"
