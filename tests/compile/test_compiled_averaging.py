"""Compiled steps of several processes: their messages are operations of the graph."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from processes.launching import SIZES, run
from processes.scenarios import SCENARIOS, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(4 not in SIZES, reason="takes a minute to trace: FLUXLOOP_PROCESSES=4 asks for it"),
]

READ_IN_THE_STEP = ("not called in a step", "unfrozen later")
"""Scenarios whose bodies ask the learner for its history, which a graph cannot."""

BY_THE_COMPILER = bool(os.environ.get("FLUXLOOP_COMPILER"))
AS_TRACED = """
import torch
import fluxloop.compile.graphs
fluxloop.compile.graphs.lower = lambda graph, inputs, device: torch.no_grad()(graph)
"""

SCRIPT = f"""
{"" if BY_THE_COMPILER else AS_TRACED}
import warnings
import torch
from attrs import evolve
from fluxloop import AbstractTrainingPhase, Accelerator, Callback, CancelStepException, Learner, StepBegin
from fluxloop import CompileError, SimCLRPhase, StopOnNaNLoss, TensorBatches, on
from fluxloop.compute import averaging
from fluxloop.compute.buckets import BucketSizes
from processes import scenarios
from processes.launching import report
from processes.scenarios import JOINED, SCENARIOS, SGD, Written, fake_once, gan, net, weights

scenarios.ADAM = SGD  # in graphs Adam counts in float32
OPTIONS = dict(strategy="replicate", compile="step")


def train():
    found = {{}}
    for name, scenario in SCENARIOS.items():
        if name not in {READ_IN_THE_STEP}:
            scenario = scenario if scenario.optimizer is scenarios.of_parts else evolve(scenario, optimizer=SGD)
            found[name] = weights(scenario.train(JOINED // 2, **OPTIONS))
    return found


class Bad(Callback):
    # Cancels steps, or spoils their rows, on the second process alone.
    reads = writes = ("step.xs",)

    def __init__(self, cancelled=(), spoiled=()):
        self.cancelled, self.spoiled, self.steps = cancelled, spoiled, 0

    @on(StepBegin, AbstractTrainingPhase)
    def act(self, event, phase, learner):
        self.steps += 1
        if RANK == 1 and self.steps in self.cancelled:
            raise CancelStepException
        if RANK == 1 and self.steps in self.spoiled:
            learner.step.xs = learner.step.xs * float("nan")


def made(rows, models, loss_fn, optimizer, *callbacks, compile="step", columns=2, **how):
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    ys = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return Learner(
        models, loss_fn, data=(TensorBatches(xs, ys, batch_size=8, shuffle=True),), optimizer=optimizer, seed=4,
        default_callbacks=False, callbacks=callbacks, accelerator=Accelerator("cpu", compile=compile, **how),
    )


RANK = Accelerator("cpu").rank
found = {{"whole": train()}}
averaging.BucketSizes = lambda: BucketSizes(first=100, others=200, whole=0)  # so that each model has several
found["divided"] = train()
averaging.BucketSizes = BucketSizes
for compile in (False, "step"):
    for how in ({{}}, {{"accumulate": 3}}):
        learner = made(81, net(), torch.nn.functional.mse_loss, SGD, compile=compile, **how)  # a row is left over
        learner.fit(2)
        found[("ragged", bool(compile), *how.values())] = weights(learner)
    learner = made(96, net(), torch.nn.functional.mse_loss, SGD, Bad(cancelled=(3, 4)), compile=compile)
    learner.fit(1)
    found["cancelled", bool(compile)] = weights(learner)
    learner = made(64, gan(), None, SGD, Bad(cancelled=(3, 4)), compile=compile, columns=3)
    learner.fit(1, phases=[Written(fake_once)])
    found["cancelled GAN", bool(compile)] = weights(learner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner = made(
            96, net(), torch.nn.functional.mse_loss, SGD, Bad(spoiled=(4,)), StopOnNaNLoss(), compile=compile
        )
        learner.fit(1)
    found["not finite", bool(compile)] = weights(learner)
    found["reason", bool(compile)] = learner.history.stop_reason
views = [(xs, xs + 0.1) for xs in torch.randn(3, 8, 3)]
models = {{"encoder": torch.nn.Linear(3, 4), "projector": torch.nn.Linear(4, 2)}}
try:
    Learner(models, data=(views,), optimizer=SGD, seed=4, accelerator=Accelerator("cpu", compile="step")).fit(
        2, phases=[SimCLRPhase()]
    )
except CompileError as error:
    found["refused"] = str(error)
report(found=found)
"""


@pytest.fixture(scope="module")
def together() -> list[Any]:
    """What each of two processes ends with."""
    return [of_process["found"] for of_process in run(SCRIPT, 2, timeout=3000 if BY_THE_COMPILER else 240).reports]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Tensor]]:
    """The weights that one process ends with, whose steps run as they are."""
    from attrs import evolve

    from processes import scenarios

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scenarios, "ADAM", scenarios.SGD)
        return {
            name: weights(
                (each if each.optimizer is scenarios.of_parts else evolve(each, optimizer=scenarios.SGD)).train()
            )
            for name, each in SCENARIOS.items()
            if name not in READ_IN_THE_STEP
        }


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in READ_IN_THE_STEP])
def test_graphs_of_two_processes_train_what_one_trains_without(
    name: str, alone: dict[str, list[Tensor]], together: list[Any]
) -> None:
    for of_process in together:
        for how in ("whole", "divided"):
            assert_equal(of_process[how][name], alone[name])
            assert all(map(torch.equal, of_process[how][name], together[0][how][name]))


@pytest.mark.parametrize(
    "what",
    [("ragged",), ("ragged", 3), ("cancelled",), ("cancelled GAN",), ("not finite",)],
    ids=["ragged", "windows", "cancel", "cancel before two messages", "NaN"],
)
def test_they_do_what_steps_without_a_graph_do(what: tuple[Any, ...], together: list[Any]) -> None:
    name, *how = what
    for of_process in together:
        assert_equal(of_process[(name, True, *how)], of_process[(name, False, *how)])
        assert all(map(torch.equal, of_process[(name, True, *how)], together[0][(name, True, *how)]))


def test_a_loss_that_is_not_finite_on_one_process_stops_all(together: list[Any]) -> None:
    for of_process in together:
        assert "became nan" in of_process["reason", True]
        assert of_process["reason", True] == together[0]["reason", True]


def test_a_phase_that_compares_the_rows_of_all_is_refused(together: list[Any]) -> None:
    for of_process in together:
        assert "uses the rows of all processes" in of_process["refused"]
        assert "gather=False" in of_process["refused"]
