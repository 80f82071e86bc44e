"""A step on the side that looks at where gradients go: `Learner.check`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fluxloop.fit import aside, check_phase, feed
from fluxloop.loop import switch_modes
from fluxloop.phase import Phase
from fluxloop.phases.supervised import TrainingPhase
from fluxloop.randomness import preserved

if TYPE_CHECKING:
    from fluxloop.learner import Learner


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
        weights = [copy.deepcopy(module.state_dict()) for module in learner.modules()]
        states = [copy.deepcopy(slot.optimizer.state_dict()) for slot in updates.slots]
        gradients = [(p, p.grad) for p in updates.names]
        windows = [(slot, slot.consumed, slot.window) for slot in updates.slots]
        with preserved(), aside(learner, "check", []):
            put_back = switch_modes(learner.modules(), phase.train_mode)
            try:
                updates.findings = findings
                for parameter, _ in gradients:
                    parameter.grad = None
                given = batch if batch is not None else next(iter(feed(learner, phase, None, learner.data)))
                phase.step(learner, given)
            finally:
                updates.findings = None
                put_back()
                for module, state in zip(learner.modules(), weights, strict=True):
                    module.load_state_dict(state)
                for slot, optimizer_state in zip(updates.slots, states, strict=True):
                    slot.optimizer.load_state_dict(optimizer_state)
                for parameter, gradient in gradients:
                    parameter.grad = gradient
                for slot, consumed, window in windows:
                    slot.consumed, slot.window = consumed, window
    return list(dict.fromkeys(findings))
