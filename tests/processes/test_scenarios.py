"""Whatever a step does with models and losses, several processes train what one trains on the joined batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from processes.launching import run
from processes.scenarios import SCENARIOS, weights
from processes.trainings import TRAININGS
from processes.trainings import weights as training_weights

pytestmark = pytest.mark.slow

SCRIPT = """
import os
from fluxloop.compute import averaging
from fluxloop.compute.buckets import BucketSizes
from processes.launching import report
from processes.scenarios import JOINED, SCENARIOS, weights
from processes.trainings import TRAININGS
from processes.trainings import weights as training_weights


def train():
    found, messages = {}, {}
    for name, scenario in SCENARIOS.items():
        learner = scenario.train(JOINED // int(os.environ["WORLD_SIZE"]), strategy="replicate")
        averager = learner.updates.averager
        found[name] = weights(learner)
        messages[name] = (averager.messages, learner.updates.count, averager.num_buckets)
    return {"weights": found, "messages": messages}


trained = {name: training_weights(training("replicate")) for name, training in TRAININGS.items()}
found = {"trainings": trained, "whole": train()}
averaging.BucketSizes = lambda: BucketSizes(first=100, others=200, whole=0)  # so that each model has several
if os.environ["WORLD_SIZE"] == "2":
    found["divided"] = train()
report(**found)
"""


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Tensor]]:
    """The weights that one process ends with."""
    return {name: weights(scenario.train()) for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module", params=[2, 4])
def together(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each of several processes ends with."""
    return run(SCRIPT, request.param, timeout=180).reports


@pytest.mark.parametrize("name", SCENARIOS)
def test_processes_train_what_one_trains_on_the_joined_batches(
    name: str, alone: dict[str, list[Tensor]], together: list[dict[str, Any]]
) -> None:
    untrained = SCENARIOS[name].models()
    models: list[Any] = [*untrained.values()] if isinstance(untrained, dict) else [untrained]
    before = [parameter for model in models for parameter in model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, alone[name], strict=True))
    for of_process in together:
        for how in of_process.keys() & {"whole", "divided"}:
            of_all = of_process[how]["weights"][name]
            for expected, found in zip(alone[name], of_all, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            assert all(map(torch.equal, of_all, together[0][how]["weights"][name]))


@pytest.mark.parametrize("name", TRAININGS)
def test_whole_trainings_of_processes_end_as_one_process_does(name: str, together: list[dict[str, Any]]) -> None:
    alone = training_weights(TRAININGS[name]())
    for of_process in together:
        found = of_process["trainings"][name]
        assert found.keys() == alone.keys()
        for path, expected in alone.items():
            torch.testing.assert_close(found[path], expected, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(tensor, together[0]["trainings"][name][path]) for path, tensor in found.items())


def test_an_update_sends_as_many_messages_as_there_are_buckets(together: list[dict[str, Any]]) -> None:
    for of_process in together:
        for how in of_process.keys() & {"whole", "divided"}:
            for name in ("learner.backward", "R1", "accumulate"):
                messages, updates, of_plans = of_process[how]["messages"][name]
                assert messages == updates * of_plans
                assert of_plans == {"whole": 1, "divided": 3}[how]
