"""A step on the side that looks at where gradients go: `Learner.check`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fluxloop.errors import DataError, PhaseError
from fluxloop.feed import untouched
from fluxloop.fit import check_phase, feed
from fluxloop.inference import aside
from fluxloop.loop import switch_modes
from fluxloop.models import keep_tensors
from fluxloop.phase import Phase, Stateful
from fluxloop.phases.supervised import TrainingPhase
from fluxloop.randomness import preserved
from fluxloop.updates import Updates

if TYPE_CHECKING:
    from fluxloop.learner import Learner


def _kept(optimizer: Optimizer) -> Callable[[], None]:
    """Keep an optimizer's state and options; return what puts them back, bit for bit."""
    state = {
        parameter: {name: (value, copy.deepcopy(value)) for name, value in entries.items()}
        for parameter, entries in optimizer.state.items()
    }
    options = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def put_back() -> None:
        optimizer.state.clear()
        for parameter, entries in state.items():
            for name, (value, copied) in entries.items():
                if isinstance(value, Tensor):
                    with torch.no_grad():
                        value.copy_(copied)
                optimizer.state[parameter][name] = value if isinstance(value, Tensor) else copied
        for group, kept in zip(optimizer.param_groups, options, strict=True):
            group.update(kept)

    return put_back


def _first(learner: Learner, phase: Phase) -> Any:
    """Give the first batch of a phase's data.

    Raises:
        DataError: The data can be iterated once only: its first batch would be lost.
    """
    data = feed(learner, phase)
    if hasattr(data.source, "__next__"):
        raise DataError(
            f"the {phase.data_key!r} data can be iterated once only; give a batch to look at: learner.check(batch)"
        )
    with untouched(data.source):
        return next(iter(data))


def _kept_gradients(updates: Updates) -> Callable[[], None]:
    """Keep the gradients and where they stand, and begin without any; return what puts them back."""
    gradients = [(parameter, parameter.grad) for parameter in updates.names]
    windows = [(slot, slot.consumed, slot.window, slot.in_block) for slot in updates.slots]
    for parameter in updates.names:
        parameter.grad = None

    def put_back() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for slot, consumed, window, in_block in windows:
            slot.consumed, slot.window, slot.in_block = consumed, window, in_block

    return put_back


def check(learner: Learner, batch: Any, phases: Iterable[Phase] | None) -> list[str]:
    """Run one step per phase and collect findings; everything is put back. See `Learner.check`."""
    trained = [phase for phase in learner.phases.values() if phase.gradients]
    chosen = (trained or [TrainingPhase()]) if phases is None else list(phases)
    for phase in chosen:
        check_phase(phase)
        phase.check(learner)
    modules, updates = learner.modules(), learner.updates
    if any(is_lazy(parameter) for module in modules for parameter in module.parameters()):
        raise PhaseError("learner.check cannot look at lazy modules that have seen no batch; run one step first")
    findings: list[str] = []
    for phase in chosen:
        with ExitStack() as undone:
            undone.enter_context(preserved())
            undone.enter_context(aside(learner, "check", []))
            undone.callback(_kept_gradients(updates))
            for slot in updates.slots:
                undone.callback(_kept(slot.optimizer))
            weights = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
            undone.callback(keep_tensors(modules, weights))
            undone.callback(switch_modes(modules, phase.train_mode))
            undone.callback(setattr, updates, "findings", None)
            updates.findings = findings
            if isinstance(phase, Stateful):
                undone.callback(phase.load_state_dict, copy.deepcopy(phase.state_dict()))
            phase.step(learner, _first(learner, phase) if batch is None else batch)
    return list(dict.fromkeys(findings))
