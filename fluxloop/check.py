"""A step on the side that looks at where gradients go: `Learner.check`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fluxloop.errors import DataError
from fluxloop.fit import check_phase, feed
from fluxloop.inference import aside
from fluxloop.loop import switch_modes
from fluxloop.phase import Phase
from fluxloop.phases.supervised import TrainingPhase
from fluxloop.randomness import preserved

if TYPE_CHECKING:
    from fluxloop.learner import Learner


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
    return next(iter(data))


def _held(module: nn.Module) -> Iterator[Tensor]:
    """Give a module's parameters and buffers, also those that are not saved."""
    yield from module.parameters()
    yield from module.buffers()


def check(learner: Learner, batch: Any, phases: Iterable[Phase] | None) -> list[str]:
    """Run one step per phase and collect findings; everything is put back. See `Learner.check`."""
    trained = [phase for phase in learner.phases.values() if phase.gradients]
    chosen = (trained or [TrainingPhase()]) if phases is None else list(phases)
    for phase in chosen:
        check_phase(phase)
        phase.check(learner)
    updates = learner.updates
    findings: list[str] = []
    for phase in chosen:
        weights = [(tensor, tensor.detach().clone()) for module in learner.modules() for tensor in _held(module)]
        states = [copy.deepcopy(slot.optimizer.state_dict()) for slot in updates.slots]
        gradients = [(p, p.grad) for p in updates.names]
        windows = [(slot, slot.consumed, slot.window) for slot in updates.slots]
        with preserved(), aside(learner, "check", []):
            put_back = switch_modes(learner.modules(), phase.train_mode)
            try:
                updates.findings = findings
                for parameter, _ in gradients:
                    parameter.grad = None
                phase.step(learner, _first(learner, phase) if batch is None else batch)
            finally:
                updates.findings = None
                put_back()
                with torch.no_grad():
                    for tensor, value in weights:
                        tensor.copy_(value)
                for slot, optimizer_state in zip(updates.slots, states, strict=True):
                    slot.optimizer.load_state_dict(optimizer_state)
                for parameter, gradient in gradients:
                    parameter.grad = gradient
                for slot, consumed, window in windows:
                    slot.consumed, slot.window = consumed, window
    return list(dict.fromkeys(findings))
