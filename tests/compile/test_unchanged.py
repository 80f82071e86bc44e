from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compiled_training import Model, learner_of

from fluxloop import CompileError, Momentum, TrainingPhase, set_hyperparameter

pytestmark = pytest.mark.usefixtures("uncompiled")


def decay_rate(phase: Any, learner: Any) -> None:
    learner.optimizer.param_groups[0]["lr"] *= 0.8


def assign_rate(phase: Any, learner: Any) -> None:
    for group in learner.optimizer.param_groups:
        group["lr"] = group["lr"] * 0.8


def add_decay(phase: Any, learner: Any) -> None:
    learner.optimizer.param_groups[0].update(weight_decay=0.1)


def set_momentum(phase: Any, learner: Any) -> None:
    set_hyperparameter(learner, Momentum, 0.5)


def past_the_learner(phase: Any, learner: Any) -> None:
    phase.held["optimizer"].param_groups[0]["lr"] *= 0.8


class Writing(TrainingPhase):
    """Writes an option of the optimizer in its body."""

    def __init__(self, write: Callable[[Any, Any], None]) -> None:
        self.write = write
        self.held: dict[str, Any] = {}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        if state.step_number > 1:
            self.write(self, learner)
        super().body(learner, handle, state)

    def entries(self, batch: Any) -> dict[str, Any]:
        return {**super().entries(batch), "step_number": self.count_steps()}

    def count_steps(self) -> int:
        self.held["steps"] = self.held.get("steps", 0) + 1
        return int(self.held["steps"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "option"),
    [
        (decay_rate, "'lr'"),
        (assign_rate, "'lr'"),
        (add_decay, "'weight_decay'"),
        (set_momentum, "'momentum'"),
        (past_the_learner, "'lr'"),
    ],
)
def test_a_body_that_writes_an_option_of_an_optimizer_is_refused_and_the_option_stays(write: Any, option: str) -> None:
    made = learner_of(Model(lambda model, out: out), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    phase = Writing(write)
    phase.held["optimizer"] = made.optimizer
    before = [dict(group) for group in made.optimizer.param_groups]
    with pytest.raises(CompileError, match=rf"writes {option} in param_groups\[0\] of the optimizer.*finish\(learner"):
        made.fit(1, phases=[phase])
    assert made.optimizer.param_groups == before
