"""Whether the state in a checkpoint fits a learner: everything is compared before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fluxloop.checkpoint.folder import FORMAT
from fluxloop.checkpoint.layout import COUNT, kinds_differ, misplaced
from fluxloop.checkpoint.open_windows import gradients_of
from fluxloop.checkpoint.optimizer_state import optimizer_differs, plain_defaults
from fluxloop.compute.optimizers import parameters_by_name
from fluxloop.data.generators import own_generators
from fluxloop.errors import CheckpointError, describe, did_you_mean
from fluxloop.history import Counts
from fluxloop.persist.modules import is_uninitialized, unsaved_buffers
from fluxloop.persist.plain import class_name, from_plain, is_stateful, phase_id
from fluxloop.persist.watched import Watched, plain_entries
from fluxloop.persist.writing import PAIR
from fluxloop.phase import phase_types
from fluxloop.state import PhaseDict

if TYPE_CHECKING:
    from fluxloop.compute.slots import Slot
    from fluxloop.interfaces import RunLearner

State = dict[str, Any]


def check_fits(learner: RunLearner, state: Any) -> None:
    """Raise for a state that does not fit a learner, before anything is changed.

    Raises:
        CheckpointError: Lists everything that does not fit.
    """
    if not isinstance(state, dict) or "fluxloop" not in state:
        raise CheckpointError(
            f"{describe(state)} was given; expected the state of a learner: learner.state_dict(), or a file that "
            "learner.save or a Checkpointer wrote. For weights alone: learner.load_weights(path)"
        )
    if type(state["fluxloop"]) is not int or state["fluxloop"] != FORMAT:
        raise CheckpointError(
            f"the checkpoint has the layout {state['fluxloop']!r} and this fluxloop reads {FORMAT}; use the version "
            "that wrote it"
        )
    wrong = list(misplaced(state))  # first the layout: what compares takes for granted that every part is there
    if wrong:
        raise CheckpointError(
            "the checkpoint is not as fluxloop writes it:\n  "
            + "\n  ".join(wrong[:20])
            + "\nWas it changed, or made by something else? For weights alone: learner.load_weights(path)"
        )
    wrong = list(_misfits(learner, state))
    if wrong:
        raise CheckpointError("the checkpoint does not fit this learner:\n  " + "\n  ".join(wrong))


def _misfits(learner: RunLearner, state: State) -> Iterator[str]:
    yield from _models_differ(learner, state)
    slots = {slot.name or "": slot for slot in learner.updates.slots}
    by_name = parameters_by_name(learner.models, learner.loss_fn)
    yield from _names_differ("optimizer", slots, state["optimizers"])
    if set(slots) == set(state["optimizers"]):
        # Two parts of a file name the optimizers; one that was edited may have them in one part alone
        yield from _names_differ("optimizer", slots, state["updates"]["slots"])
    for name, kept in state["optimizers"].items():
        if name in slots:
            yield from optimizer_differs(slots[name].optimizer, kept, by_name, slots[name].label)
        if name in slots:
            yield from _window_differs(slots[name], state["updates"]["slots"].get(name, {}))
    for name, gradient in gradients_of(state["updates"]):
        parameter = by_name.get(name)
        if parameter is None or is_lazy(parameter):
            yield f"the gradient of {name!r} waits for an update, and no parameter has that name now"
        elif parameter.shape != gradient.shape or parameter.dtype != gradient.dtype:
            yield (
                f"the gradient of {name!r} that waits for an update has shape {tuple(gradient.shape)} and is of "
                f"{gradient.dtype}, expected {tuple(parameter.shape)} and {parameter.dtype}"
            )
    yield from _callbacks_differ(learner, state)
    yield from _shared_differ(learner, state["cbstate"])
    yield from _data_differ(learner, state)


def _models_differ(learner: RunLearner, state: State) -> Iterator[str]:
    models = {name or "": module for name, module in learner.models.items()}
    yield from _names_differ("model", models, state["models"])
    for name, module in models.items():
        if name in state["models"]:
            yield from _module_differs(module, state["models"][name], f"model {name!r}" if name else "the model")
    kept_loss = state["loss_fn"] if "state" in (state["loss_fn"] or {}) else None
    if isinstance(learner.loss_fn, nn.Module) != (kept_loss is not None):
        yield "the loss function is a module in only one of the two, the learner and the checkpoint"
    elif isinstance(learner.loss_fn, nn.Module):
        yield from _module_differs(learner.loss_fn, kept_loss or {}, "the loss function")
    for path, kept in state["views"].items():
        if path in learner.weights:
            yield from weights_differ(learner.weights[path], kept, f"weights {path!r}", exactly=True)


def _names_differ(kind: str, live: Iterable[str], kept: Iterable[str]) -> Iterator[str]:
    if set(live) != set(kept):
        yield f"the {kind}s are {sorted(live)}, those of the checkpoint {sorted(kept)}"


def _module_differs(module: nn.Module, kept: State, label: str) -> Iterator[str]:
    yield from weights_differ(module, kept["state"], label, exactly=True)
    if not isinstance(kept["metadata"], dict):
        yield f"{label}: its metadata in the checkpoint is {describe(kept['metadata'])}"
    for name, _, _, tensor in unsaved_buffers(module):
        buffer = kept["buffers"].get(name)
        if buffer is not None and not is_lazy(tensor) and buffer.dtype != tensor.dtype:
            yield f"{label}: the buffer {name!r} is of {tensor.dtype}, in the checkpoint of {buffer.dtype}"
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name in kept["frozen"]:
        if name not in known:
            yield f"{label}: {name!r} is frozen in the checkpoint, and there is no such parameter"
    parts = {path for path, _ in module.named_modules(remove_duplicate=False)}
    for path in kept["attributes"]:
        if path not in parts:
            yield f"{label}: the checkpoint has attributes of its part {path!r}, which is not there"


def weights_differ(module: nn.Module, state: dict[str, Any], label: str, exactly: bool = False) -> Iterator[str]:
    """Yield a line for each tensor in which a module and a state differ by name or shape.

    Args:
        module: The module.
        state: What its ``state_dict()`` returned, as `weights_of` keeps it.
        label: What the module is called in messages.
        exactly: Whether types are compared as well; else torch casts.
    """
    live = module.state_dict()
    lazy = {name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)}
    for name in sorted(live.keys() - state.keys()):
        yield f"{label}: the checkpoint lacks {name!r}{did_you_mean(name, state)}"
    for name in sorted(state.keys() - live.keys(), key=str):
        yield f"{label}: {name!r} of the checkpoint is not there{did_you_mean(str(name), live)}"
    for name, tensor in live.items():
        if name not in state or not isinstance(tensor, Tensor):
            continue
        kept = state[name]
        if is_uninitialized(kept):
            if name not in lazy:
                yield (
                    f"{label}: {name!r} had seen no batch in the checkpoint (a lazy module), and has a shape now; make "
                    "the learner anew, or run the model on one batch before the learner is made"
                )
        elif not isinstance(kept, Tensor):
            yield f"{label}: {name!r} is a tensor, in the checkpoint {describe(kept)}"
        elif name not in lazy and tensor.shape != kept.shape:
            yield f"{label}: {name!r} has shape {tuple(tensor.shape)}, in the checkpoint {tuple(kept.shape)}"
        elif exactly and tensor.dtype != kept.dtype:
            yield f"{label}: {name!r} is of {tensor.dtype}, in the checkpoint of {kept.dtype}"


def _callbacks_differ(learner: RunLearner, state: State) -> Iterator[str]:
    for node in learner.callbacks.graph.nodes:
        kept, name = state["callbacks"].get(node.id), class_name(type(node.callback.unwrapped))
        if kept is None:
            continue
        if kept["class"] != name:
            yield f"callback {node.id!r} was a {kept['class']} and is a {name}"
            continue
        own, conditions = learner.callbacks.kept(node)
        yield from _kept_differs(own, kept["state"], f"callback {node.id!r}")
        for condition, around in zip(conditions, kept["around"], strict=False):
            yield from _kept_differs(condition, around, f"a condition of callback {node.id!r}")
    for kept_phase in learner._ledger.phases:
        for each in state["phases"].get(phase_id(kept_phase.thing), ()):
            yield from _kept_differs(kept_phase, each, f"phase {kept_phase.name}")


def _kept_differs(live: Watched, kept: State, label: str) -> Iterator[str]:
    """Yield a line for each part of a callback's or a phase's state that it cannot have written."""
    thing = live.thing
    if kept and is_stateful(thing) != (PAIR in kept):
        has, had = ("has", "had not") if is_stateful(thing) else ("has not", "had")
        yield f"{label} {has} state_dict() and load_state_dict(state), and {had} when the checkpoint was written"
        return
    if type(thing).__module__.partition(".")[0] != "fluxloop":
        return  # what others keep is theirs to say
    try:
        if PAIR in kept:
            now, before = thing.state_dict(), from_plain(kept[PAIR])
            if not isinstance(before, dict):
                yield f"{label} has {describe(before)} as its state in the checkpoint; expected a dict"
        else:
            now, before = vars(thing) if hasattr(thing, "__dict__") else {}, plain_entries(kept)
    except Exception:  # it says so itself when it is restored
        return
    if isinstance(now, dict) and isinstance(before, dict):
        for name in now.keys() & before.keys():
            yield from kinds_differ(now[name], before[name], f"{label}: {name!r}")


def _shared_differ(learner: RunLearner, kept: State) -> Iterator[str]:
    """Yield a line for each value that callbacks share and that cannot be restored; tried on copies."""
    shared = vars(learner.cbstate)
    for name in kept.keys() & shared.keys():
        try:
            trial = copy.deepcopy(shared[name])
        except Exception:  # it cannot be tried
            continue
        try:
            trial = from_plain(kept[name], trial, phases=phase_types(), device=torch.device("cpu"), where=name)
        except Exception as error:
            yield f"cbstate.{name} of the checkpoint cannot be put back: {error!r}"
            continue
        # Restoring takes any kind of value: a count that became a text would fail only where something is added to it
        yield from kinds_differ(shared[name], trial, f"cbstate.{name}")
        if isinstance(shared[name], PhaseDict) and not isinstance(trial, PhaseDict):
            yield f"cbstate.{name} is {describe(trial)} in the checkpoint; expected values by phase"
        for phase, value in trial.items() if isinstance(trial, PhaseDict) else ():
            yield from _record_differs(value, f"cbstate.{name}[{phase.__name__}]")
        if name == "hyperparameters" and isinstance(trial, dict):
            for label, series in trial.items():
                yield from _series_differs(series, f"cbstate.{name}[{label!r}]")


def _record_differs(record: Any, where: str) -> Iterator[str]:
    """Yield a line for each of a phase's counts and epoch values that is none."""
    if isinstance(record, Counts):
        for part in ("epochs", "steps", "steps_epoch"):
            yield from COUNT(getattr(record, part), f"{where}.{part}")
        yield from kinds_differ({}, record.updates, f"{where}.updates")
        for name, count in dict(record.updates).items() if isinstance(record.updates, dict) else ():
            yield from COUNT(count, f"{where}.updates[{name!r}]")
    elif isinstance(epochs := getattr(record, "epochs", None), dict):
        for name, series in epochs.items():
            yield from _series_differs(series, f"{where}.epochs[{name!r}]")


def _series_differs(series: Any, where: str) -> Iterator[str]:
    try:
        fits = all(int(number) >= 0 for number, _ in series) and not isinstance(series, (str, dict))
    except (TypeError, ValueError):
        fits = False
    if not fits:
        yield f"{where} is {describe(series)} in the checkpoint; expected pairs of a number and a value"


def _data_differ(learner: RunLearner, state: State) -> Iterator[str]:
    place = state["place"]
    feed = None if place is None else place["feed"]
    parts = {key: kept for key, kept in state["data"].items() if key in learner.data}
    if feed is not None and feed["key"] in learner.data:
        parts[f"{feed['key']} under way"] = feed
    for label, kept in parts.items():
        source = vars(learner.data)[label.removesuffix(" under way")]
        for generator, moved in zip(own_generators(source), kept.get("own_generators", ()), strict=False):
            try:
                torch.Generator(device=generator.device).set_state(moved)
            except Exception as error:
                yield f"the {label} data: the state of a generator in the checkpoint cannot be put back: {error!r}"


def _window_differs(slot: Slot, kept: State) -> Iterator[str]:
    """Say where gradients of a part of an update's batches wait, and an update is of another number of batches now."""
    window = kept.get("window")
    if kept.get("waiting") and window is not None and not window["complete"]:
        size, now = window["size"], slot.batches_per_update
        if size != now:
            yield (
                f"gradients of {window['count']} of {size} batches wait for an update of {slot.label}, which is of "
                f"{now} now: expected Accelerator(accumulate={size}), or a checkpoint of the end of an epoch"
            )


def check_same_run(learner: RunLearner, state: State) -> None:
    """Raise where resuming would not go on with the same run.

    Raises:
        CheckpointError: The seed or an optimizer's options were given otherwise.
    """
    wrong = []
    if learner._seed_given and learner.seed != state["seed"]:
        wrong.append(f"seed={learner.seed} was given, and the run has seed={state['seed']}")
    former_precision = state.get("precision", "fp32")
    if learner.accelerator.precision != former_precision:
        wrong.append(f"precision={learner.accelerator.precision!r} was given, and the run has {former_precision!r}")
    for slot in learner.updates.slots:
        former = state["optimizers"][slot.name or ""]["defaults"]
        for option, value in plain_defaults(slot.optimizer).items():
            if former.get(option, value) != value:  # an option that the file lacks is no difference
                wrong.append(f"{slot.label} was made with {option}={former[option]!r}, and now with {option}={value!r}")
    if wrong:
        raise CheckpointError(
            "the checkpoint belongs to a run with other settings:\n  "
            + "\n  ".join(wrong)
            + "\nResume with what it was begun with; or begin a new run from its weights: learner.load_weights(path)"
        )
