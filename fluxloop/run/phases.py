"""Which phases a learner can run, and the state that a phase has in each of several learners."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, finalize, ref

import torch

from fluxloop.compute.reach import IN_INFERENCE_MODE
from fluxloop.errors import LossError, PhaseError, describe
from fluxloop.interfaces import Stateful
from fluxloop.loop import check_view
from fluxloop.persist.attributes import attributes
from fluxloop.persist.plain import phase_id
from fluxloop.phase import AbstractValidationPhase, Phase, check_every, check_methods, check_name
from fluxloop.phases.supervised import TrainingPhase, ValidationPhase
from fluxloop.state import State, name_of

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


def default_phases(sources: State) -> list[Phase]:
    """Return the phases of a plain fit: training, and validation where there is data for it."""
    return [TrainingPhase(), ValidationPhase()] if "validation" in sources else [TrainingPhase()]


def check_phase(phase: object) -> None:
    """Raise `PhaseError` for something that is no phase, or a class."""
    if not isinstance(phase, Phase):
        name = phase.__name__ if isinstance(phase, type) else "TrainingPhase"
        raise PhaseError(f"{describe(phase)} was given as a phase; expected an instance: {name}()")
    if phase.data_key != type(phase).data_key:
        raise PhaseError(
            f"{phase!r} has a data_key of its own, {phase.data_key!r}; expected a class: "
            f"class MyPhase({type(phase).__name__}): data_key = {phase.data_key!r}"
        )
    check_name(phase)
    check_methods(type(phase))
    if isinstance(phase, AbstractValidationPhase):
        check_every(phase)


def check_names(learner: RunLearner, phases: Iterable[Phase]) -> None:
    """Raise for phases whose numbers could not be told apart from each other's, or from those of phases that have run.

    Two phases with one name have to be of one class. Those that only watch and have attributes of their own have to be
    one instance too; two without attributes may both stand in a cycle, as one instance given twice may.

    Raises:
        PhaseError: Says which, and where to name them.
    """
    counts = vars(learner.cbstate).get("history")
    seen: dict[str, Phase] = {}
    for phase in phases:
        name = name_of(phase)
        if name in learner.data and name != phase.data_key:
            raise PhaseError(
                f"{phase!r} is called {name!r}, as some data of the learner is, on which it does not run; expected "
                "another name, so that 'validation/loss' is that of the data"
            )
        other = seen.setdefault(name, phase)
        # In this cycle, or else among the phases of which the learner has counts
        former: Any = other if other is not phase else None if counts is None else counts.key(name)
        if former is None:
            continue
        if phase_id(former) != phase_id(phase):
            raise PhaseError(
                f"two phases are called {name!r}: {phase_id(former)} and {phase_id(phase)}; their numbers would be one "
                f"series. Give one a name of its own, in the class or when it is made: name = '{name.lower()}2'"
            )
        if other is not phase and not phase.gradients and (attributes(phase) or attributes(other)):
            raise PhaseError(
                f"a cycle has two phases that are called {name!r}, {other!r} and {phase!r}, whose numbers would be one "
                f"series. Give each a name of its own before the fit, phase.name = '{name.lower()}2', or "
                "give one of them twice where one series is meant"
            )


class _PerLearner:
    """The states of a phase by learner, and the one with which it begins in a new learner."""

    def __init__(self, phase: Stateful) -> None:
        self.first = copy.deepcopy(phase.state_dict())
        self.owner: ReferenceType[RunLearner] | None = None
        self.others: WeakKeyDictionary[RunLearner, Any] = WeakKeyDictionary()


_states: dict[int, _PerLearner] = {}
"""By the phase's id, as long as it lives: a phase may be unhashable."""


def load_own_state(learner: RunLearner, phase: Stateful) -> None:
    """Load into a phase with a state the one that it had when it last ran in this learner.

    In a second learner it begins as it did in the first.
    """
    states = _states.get(id(phase))
    if states is None:
        states = _states[id(phase)] = _PerLearner(phase)
        finalize(phase, _states.pop, id(phase), None)  # the next object may get its id
    elif states.owner is not None and states.owner() is not learner:
        former = states.owner()
        if former is not None:
            states.others[former] = copy.deepcopy(phase.state_dict())
        phase.load_state_dict(copy.deepcopy(states.others.pop(learner, states.first)))
    states.owner = ref(learner)


def check_runs(learner: RunLearner, phase: Phase) -> None:
    """Raise where a learner cannot run a phase, before anything is changed.

    Raises:
        PhaseError: It is no phase, or cannot run this model.
        CompileError: Steps are to be compiled whole, and a callback stands in the way.
        CallbackError: A callback needs gradients that are used in the backward pass.
        LossError: It trains, and torch's inference mode is on.
    """
    check_phase(phase)
    if phase.gradients and torch.is_inference_mode_enabled():
        raise LossError(f"{phase!r} trains, and {IN_INFERENCE_MODE}")
    check_view(learner, phase)
    phase.check(learner)
    if learner._compiled is not None:
        learner._compiled.require([type(phase)])
    if learner.accelerator.optimizer_in_backward:
        learner.callbacks.require_in_backward([type(phase)])
    if isinstance(phase, Stateful):  # after the checks: this changes the phase
        load_own_state(learner, phase)
