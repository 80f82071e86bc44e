"""What looks at a step beside the training sends nothing: one process may do it alone, and it changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from processes.launching import run, run_cases

SCRIPT = """
import sys

import torch
from torch import nn

from fluxloop import (
    Accelerator, Callback, EMA, EpochEnd, GradientClip, Learner, Metrics, Recorder, SimCLRPhase, StepEnd, TensorBatches,
    TrainingPhase, TwoViews, on, synchronise_batch_norm,
)
from processes.launching import report

who, when, how = sys.argv[1:]
torch.manual_seed(0)
xs = torch.randn(48, 4)
ys = xs.sum(1, keepdim=True)


class Two(TrainingPhase):
    def body(self, learner, handle, state):
        first, second = learner.model
        with learner.optimizing("first") as block:
            block.loss = (first(state.xs) - state.ys).square().mean()
        with learner.optimizing("second") as block:
            block.loss = (second(state.xs) - state.ys).square().mean()


class Doubtful(TrainingPhase):
    def entries(self, batch):
        if learner.streams.prefix and learner.accelerator.group is None and rank == 1:
            raise KeyError("a file that this machine lacks")
        return super().entries(batch)


class Looks(Callback):
    reads = ("*",)
    draws = False

    @on(StepEnd, TrainingPhase)
    def look(self, event, phase, view):
        if who == "all" or learner.accelerator.is_main:
            said.append(look())


def net():
    return nn.Sequential(nn.Linear(4, 8), synchronise_batch_norm(nn.BatchNorm1d(8)), nn.Dropout(0.3), nn.Linear(8, 1))


def make():
    torch.manual_seed(1)
    models = {"first": net(), "second": net()} if how == "two" else net()
    kind = SimCLRPhase if how == "simclr" else Doubtful if how == "doubtful" else Two if how == "two" else TrainingPhase
    phase = kind(TwoViews(lambda xs: xs + torch.randn_like(xs))) if how == "simclr" else kind()
    if how == "simclr":
        models = {"encoder": net()[:-1], "projector": nn.Linear(8, 4)}
    data = (TensorBatches(xs, ys, batch_size=4, shuffle=True),)
    optimizer = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)
    callbacks = [Recorder(), Metrics(), GradientClip(1.0)]
    callbacks += [EMA("first" if how == "two" else "encoder" if how == "simclr" else "model", 0.9)]
    callbacks += [Looks()] if when == "inside" else []
    options = {"strategy": "shard"} if how == "shard" else {"accumulate": 2} if how == "windows" else {}
    accelerator = Accelerator("cpu", **options)
    loss_fn = nn.functional.mse_loss
    learner = Learner(
        models, loss_fn, data=data, optimizer=optimizer, callbacks=callbacks, seed=0, accelerator=accelerator,
        default_callbacks=False,
    )
    return learner, phase


def look():
    shown = "" if how == "doubtful" else str(learner.timeline(phase))
    return shown, tuple(str(each) for each in learner.check(phases=[phase]))


learner, phase = make()
rank, said = learner.accelerator.rank, []
if when == "before" and (who == "all" or (who == "main") == (rank == 0)):
    said.append(look())
learner.fit(2, phases=[phase])
if when == "after" and (who == "all" or (who == "main") == (rank == 0)):
    said.append(look())
learner.fit(1, phases=[phase])
weights = {
    name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
    for model in dict(learner.models).values() for name, t in model.state_dict().items()
}
report(said=said, weights=weights, size=learner.accelerator.world_size, group=learner.accelerator.group is not None)
"""

HOW = ("plain", "windows", "two", "simclr", "shard", "doubtful")
LOOKS = [
    ("main", "before", "plain"),
    ("other", "after", "plain"),
    ("main", "inside", "windows"),
    ("all", "before", "two"),
]
LOOKS += [("main", "before", "simclr"), ("all", "before", "shard"), ("all", "before", "doubtful")]
CASES = [*LOOKS, *(("nobody", "never", how) for how in HOW)]


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, ...], list[dict[str, Any]]]:
    found = run_cases(SCRIPT, CASES, timeout=240)
    return dict(zip(CASES, (each.check().reports for each in found), strict=True))


@pytest.mark.parametrize("case", LOOKS, ids="-".join)
def test_a_look_changes_no_bit_of_what_several_processes_train(case: tuple[str, ...], seen: Any) -> None:
    without = seen["nobody", "never", case[2]]
    for one, other in zip(seen[case], without, strict=True):
        assert one["weights"].keys() == other["weights"].keys()
        for name, tensor in one["weights"].items():
            assert torch.equal(tensor, other["weights"][name]), name
        assert one["size"] == 2
        assert one["group"]


@pytest.mark.parametrize("case", LOOKS[:-1], ids="-".join)
def test_those_who_look_see_what_one_process_sees_that_trains_alone(case: tuple[str, ...], seen: Any) -> None:
    looked = {"main": [0], "other": [1], "all": [0, 1]}[case[0]]
    assert [rank for rank, each in enumerate(seen[case]) if each["said"]] == looked
    when = "before" if case[1] == "after" else case[1]
    alone = run(SCRIPT, None, arguments=["all", when, case[2]]).reports[0]["said"][0]
    assert "StepEnd" in alone[0]
    for rank in looked:
        assert {*seen[case][rank]["said"]} == {alone}


def test_a_step_that_fails_on_one_process_is_told_there_and_keeps_nobody_waiting(seen: Any) -> None:
    first, second = (each["said"][0][1] for each in seen["all", "before", "doubtful"])
    assert first == ()
    (problem,) = second
    assert "a file that this machine lacks" in problem
