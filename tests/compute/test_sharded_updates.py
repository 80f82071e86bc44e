"""Sharded parameters are trained as whole ones are, whatever a step does with models and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from processes.launching import SIZES, run
from processes.scenarios import SCENARIOS
from processes.trainings import TRAININGS, weights

pytestmark = pytest.mark.slow

SCRIPT = """
import os
from fluxloop.nested import local_part
from processes.launching import report
from processes.scenarios import JOINED, SCENARIOS
from processes.trainings import TRAININGS, weights

found, held = {}, {}
for name, training in TRAININGS.items():
    learner = training("shard")
    found[name] = weights(learner)
    parameters = [p for model in learner.modules() for p in model.parameters()]
    held[name] = sum(local_part(p).numel() for p in parameters), sum(p.numel() for p in parameters)
batch_size = JOINED // int(os.environ["WORLD_SIZE"])
for name, scenario in SCENARIOS.items():
    if name != "autograd.grad":
        found[name] = weights(scenario.train(batch_size, strategy="shard"))
try:
    SCENARIOS["autograd.grad"].train(batch_size, strategy="shard")
except RuntimeError as error:
    found["autograd.grad"] = str(error)
report(weights=found, held=held)
"""

OF_GRAPH = "autograd.grad"
"""Asks torch for gradients of parameters that no graph holds, as the whole ones are in it."""


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """The weights that one process ends with."""
    return {
        **{name: weights(training()) for name, training in TRAININGS.items()},
        **{name: weights(scenario.train()) for name, scenario in SCENARIOS.items()},
    }


@pytest.fixture(scope="module", params=SIZES)
def together(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each of several processes ends with."""
    return run(SCRIPT, request.param, timeout=180).reports


@pytest.mark.parametrize("name", [*TRAININGS, *(name for name in SCENARIOS if name != OF_GRAPH)])
def test_processes_train_what_one_trains_on_the_joined_batches(
    name: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for of_process in together:
        found = of_process["weights"][name]
        assert found.keys() == alone[name].keys()
        for path, expected in alone[name].items():
            torch.testing.assert_close(found[path], expected, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(tensor, together[0]["weights"][name][path]) for path, tensor in found.items())


def test_gradients_of_sharded_parameters_by_hand_are_an_error(together: list[dict[str, Any]]) -> None:
    for of_process in together:
        assert "not have been used in the graph" in of_process["weights"][OF_GRAPH]


@pytest.mark.parametrize("name", TRAININGS)
def test_each_process_holds_its_part_of_all_models(name: str, together: list[dict[str, Any]]) -> None:
    parts = [of_process["held"][name] for of_process in together]
    assert sum(part for part, _ in parts) == parts[0][1]
    assert max(part for part, _ in parts) < parts[0][1]
