"""Restoring a learner from its state as plain data, or leaving it as it is.

A state is applied in an order that matters: callbacks first, as they may still refuse; modes before the
weights of that mode; optimizers after the parameters; gradients last.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from fluxloop.callback import Callback
from fluxloop.checkpoint.gathering import gather, phases_state
from fluxloop.checkpoint.open_windows import gradients_here, put_together
from fluxloop.checkpoint.optimizer_state import load_optimizer
from fluxloop.checkpoint.weights_file import restore_weights
from fluxloop.compute.optimizers import parameters_by_name
from fluxloop.data.passes import put_data_back
from fluxloop.errors import CheckpointError, annotate, sentence, warn_user
from fluxloop.guard.assign import put
from fluxloop.nested import sharded_like
from fluxloop.order.owners import owners_of
from fluxloop.persist.attributes import WATCHED, attributes
from fluxloop.persist.copies import copy_attributes, copy_gradient
from fluxloop.persist.modules import freeze, unsaved_buffers
from fluxloop.persist.owners import Restoring, of_learners
from fluxloop.persist.plain import from_plain, is_held, is_stateful, phase_id, snapshot
from fluxloop.persist.watched import Watched
from fluxloop.phase import Phase, phase_types
from fluxloop.state import StepState, name_of

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

State = dict[str, Any]


def restore(learner: RunLearner, state: State, *, begun: bool) -> Callable[[], None]:
    """Restore a learner as it was when a state was gathered, or leave it as it is: see `apply`.

    Returns:
        A function that restores the learner as it was before, as far as a checkpoint keeps it.

    Raises:
        CheckpointError: The state cannot be restored.
    """
    before, history = snapshot(gather(learner, None)), learner.history
    begun_data, reason = set(learner._ledger.begun_data), history.stop_reason
    gradients = [(parameter, parameter.grad) for parameter in learner.updates.names]  # used ones are in no checkpoint

    def undo() -> None:
        apply(learner, before, begun=True)
        learner._ledger.begun_data, history.stop_reason = begun_data, reason
        for parameter, gradient in gradients:
            parameter.grad = gradient

    apply_or_undo(learner, state, undo, begun=begun)
    _warn_of_callbacks(learner, state)
    return undo


def _warn_of_callbacks(learner: RunLearner, state: State) -> None:
    """Warn of states without a callback, and of callbacks without a state, which begin anew."""
    nodes = {node.id: node.callback.unwrapped for node in learner.callbacks.graph.nodes}
    unknown = sorted(state["callbacks"].keys() - nodes)
    missing = nodes.keys() - state["callbacks"].keys() - state.get("present", {}).keys()
    new = sorted(id for id in missing if _misses_something(nodes[id], state, "present" in state))
    warnings = []
    if unknown:
        warnings.append(f"the checkpoint has states of {', '.join(unknown)}, which are not among the callbacks now")
    if new:
        warnings.append(f"the checkpoint has no state of {', '.join(new)}: what they keep begins anew")
    if warnings:
        warn_user(
            f"{'; '.join(warnings)}. Callbacks are found by their names: name='...', else the class's"
            f"{', with a number where there are several' if unknown and new else ''}"
        )


def _misses_something(callback: Callback, state: State, names_all: bool) -> bool:
    """Return whether a callback that is not in a checkpoint would have kept something there.

    It would if it has the pair, or attributes that it was not made with, or if it publishes a value that nobody
    published then.

    Args:
        callback: The callback.
        state: Of the checkpoint.
        names_all: Whether the checkpoint names all callbacks that there were; an older one has only those with a state.
    """
    if callback._begins_anywhere:
        return False
    if is_stateful(callback) or not names_all:
        return is_stateful(callback)
    made_with = {*inspect.signature(type(callback)).parameters, "name", "adopted"}  # the last two: of every callback
    names = {name for name in attributes(callback) if not name.startswith("__")} - {*callback.transient}
    shared = {path.removeprefix("cbstate.") for path in callback.writes if path not in callback.transient}
    return not {name.lstrip("_") for name in names} <= made_with or any(
        path in shared and path not in state["cbstate"] for path in ("history", "metrics", "hyperparameters")
    )


def apply_or_undo(
    learner: RunLearner, state: State, undo: Callable[[], None], *, begun: bool, running: bool = False
) -> None:
    """Apply a state; where it does not fit, undo that and say why.

    Raises:
        CheckpointError: The state cannot be restored; the learner is as `undo` leaves it.
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
    """Restore a learner from a state that has been checked with `check_fits`.

    Phases that have not run yet are restored when they first run.

    Args:
        learner: The learner.
        state: What `gather` returned.
        begun: Whether what begins with the fit has begun; if not, state for objects that callbacks create at
            `FitBegin` is skipped.
        running: Whether the fit has just begun again: what it made then, and no checkpoint holds, stays.

    Raises:
        CheckpointError: The state cannot be restored.
    """
    learner.history.seed = state["seed"]
    put(learner, "seed", state["seed"])
    learner.streams.go_on(state["seed"], state["streams"])
    types, device = tuple(phase_types()), learner.accelerator.device
    restoring = Restoring(owners_of(learner), begun, running, types, device)
    _restore_callbacks(learner, state["callbacks"], restoring)  # first: they may still refuse
    for slot in learner.updates.slots:
        if slot.mode is not None:  # before the weights of that mode are loaded
            slot.mode.set(state["updates"]["slots"][slot.name or ""].get("train_mode", False))
    _restore_models(learner, state, restoring)
    by_name = parameters_by_name(learner.models, learner.loss_fn)
    for slot in learner.updates.slots:
        load_optimizer(slot.optimizer, state["optimizers"][slot.name or ""], by_name, slot.label, device)
    _restore_updates(learner, state["updates"])
    learner.history.cycles = state["history"]["cycles"]
    learner.history.stop_reason = state["history"]["stop_reason"]
    _restore_shared(learner, state["cbstate"], restoring)
    # A list for each name: a run may have had several phases of one class, which are met in the same order again
    learner._ledger.waiting = {name: list(states) for name, states in state["phases"].items()}
    learner._ledger.loaded = True
    for phase in learner._ledger.phases:
        _restore_phase(learner, phase, restoring)
    for key, kept in state["data"].items():
        if key in learner.data and put_data_back(vars(learner.data)[key], kept, learner.accelerator.group):
            learner._ledger.begun_data.add(key)


def _restore_callbacks(learner: RunLearner, states: State, restoring: Restoring) -> None:
    for node in learner.callbacks.graph.nodes:
        own, conditions = learner.callbacks.kept(node)
        kept = states.get(node.id, {"state": {}, "around": []})
        try:
            own.restore(kept["state"], restoring)
            for condition, around in zip(conditions, [*kept["around"], *([{}] * len(conditions))], strict=False):
                condition.restore(around, restoring)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{node.id} does not take its state from the checkpoint: {type(error).__name__}: {error}"
            ) from error


def _restore_models(learner: RunLearner, state: State, restoring: Restoring) -> None:
    """Restore models, the loss function, and weights views whose callback has no state of its own."""
    for name, module in learner.models.items():
        _restore_module(learner, module, state["models"][name or ""], restoring)
    if isinstance(learner.loss_fn, nn.Module):
        _restore_module(learner, learner.loss_fn, state["loss_fn"], restoring)
    elif learner._ledger.loss is not None:
        learner._ledger.loss.restore((state["loss_fn"] or {"attributes": {}})["attributes"], restoring)
    for path, kept in state["views"].items():
        if path in learner.weights:
            learner.weights[path].load_state_dict(kept)


def _restore_module(learner: RunLearner, module: nn.Module, kept: State, restoring: Restoring) -> None:
    learner._ledger.modules[module].restore(kept["attributes"], restoring)
    restore_weights(module, kept)
    for name, part, own, tensor in list(unsaved_buffers(module)):
        if name in kept["buffers"]:
            part._buffers[own] = kept["buffers"][name].to(tensor.device, copy=True)
    freeze(module, set(kept["frozen"]))


def _restore_updates(learner: RunLearner, kept: State) -> None:
    """Restore where each optimizer stands in accumulating gradients, and the gradients."""
    by_name = parameters_by_name(learner.models, learner.loss_fn)
    here = gradients_here(learner, kept)
    gradients = {by_name[name]: gradient for name, gradient in here.items() if name in by_name}
    for parameter in learner.updates.names:
        gradient = gradients.get(parameter)
        parameter.grad = None if gradient is None else sharded_like(gradient.to(parameter.device, copy=True), parameter)
    for slot in learner.updates.slots:
        stands = kept["slots"][slot.name or ""]
        slot.consumed, slot.in_block = stands["consumed"], stands["in_block"]
        # The step that began to accumulate is over, and its entries are in no checkpoint: an empty one stands for it
        slot.first_step = StepState() if stands["waiting"] else None
        slot.phase, slot.num_batches = stands.get("phase"), stands.get("num_batches", 0)  # older files lack them
        slot.step = slot.before = None
        slot.restore_window(stands.get("window"))
    learner.updates.restore_scale(kept.get("scale"))
    put_together(learner, kept)


def _restore_shared(learner: RunLearner, kept: State, restoring: Restoring) -> None:
    """Restore what callbacks share; the state of an object that nobody publishes now is left out."""
    shared = vars(learner.cbstate)
    gone = {name for name, value in kept.items() if name not in shared and is_held(value)}
    if gone and restoring.begun:
        names = ", ".join(f"cbstate.{name}" for name in kept if name in gone)
        warn_user(f"the checkpoint has {names}, which no callback publishes now")
    for name, value in kept.items():
        if name not in gone:
            shared[name] = from_plain(
                value, shared.get(name), phases=restoring.phases, device=restoring.device, where=f"cbstate.{name}"
            )


# Phases


def _restore_phase(learner: RunLearner, phase: Watched, restoring: Restoring) -> None:
    """Restore a phase from the state that waits for it; without one it is as it was when it was first used."""
    waiting = learner._ledger.waiting.get(phase_id(phase.thing))
    phase.restore(waiting.pop(0) if waiting else {}, restoring)


def meet_phases(learner: RunLearner, phases: list[Phase]) -> None:
    """Note phases that are about to run, and restore new ones from the states that wait for them.

    A new instance of a class and name replaces the former instance's entry.
    """
    ledger, ids = learner._ledger, {phase_id(phase) for phase in phases}
    met = [each for each in ledger.phases if phase_id(each.thing) not in ids or _is_one_of(each.thing, phases)]
    known = [each.thing for each in met]
    for phase in phases:
        if not _is_one_of(phase, known):
            met.append(watched(learner, phase))
            if ledger.waiting.get(phase_id(phase)) or ledger.loaded:
                types, device = tuple(phase_types()), learner.accelerator.device
                _restore_phase(learner, met[-1], Restoring(owners_of(learner), phases=types, device=device))
    ledger.phases = met


def _is_one_of(phase: Phase, phases: list[Phase]) -> bool:
    return any(phase is each for each in phases)  # by identity: a phase may define what is equal to it


def watched(learner: RunLearner, phase: Phase) -> Watched:
    """Return what is known of a phase since it was used first, in whichever learner."""
    known = vars(phase).get(WATCHED)
    if not isinstance(known, Watched) or known.thing is not phase:  # a copy of a phase has that of the original
        known = vars(phase)[WATCHED] = Watched(phase, f"phases.{name_of(phase)}", owners_of(learner))
    return known


# A copy of a learner


def complete_copy(learner: RunLearner, copied: RunLearner, memo: dict[int, Any]) -> None:
    """Give a copy of a learner what PyTorch leaves out where it copies parameters and optimizers.

    Those are gradients and hooks. The states of phases wait for whichever instances the copy will run.
    """
    consumed = {p for slot in learner.updates.slots if slot.consumed for p in slot.parameters}
    for module, its_copy in zip(learner.modules(), copied.modules(), strict=True):
        of_learners.update(its_copy.modules())
        for parameter, copied_parameter in zip(module.parameters(), its_copy.parameters(), strict=True):
            copy_gradient(parameter, copied_parameter, memo, parameter not in consumed)
    for slot, copied_slot in zip(learner.updates.slots, copied.updates.slots, strict=True):
        copy_attributes(slot.optimizer, copied_slot.optimizer, memo)
    if isinstance(copied.callbacks, type(learner.callbacks)):  # and not left out
        for node, copied_node in zip(learner.callbacks.graph.nodes, copied.callbacks.graph.nodes, strict=True):
            walk, copied_walk = learner.callbacks.kept(node)[0].walk, copied.callbacks.kept(copied_node)[0].walk
            walk.complete_copy(copied_walk, memo)
    owners = owners_of(learner)
    copied._ledger.waiting = snapshot(phases_state(learner, lambda phase: phase.state(owners)[0]))
    copied._ledger.phases = []
