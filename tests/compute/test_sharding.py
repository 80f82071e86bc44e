"""What is gathered together, how sharded models are copied, and what is refused in words."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxloop import GradientClip
from processes.launching import SIZES, run
from processes.trainings import mlp, regression, weights

pytestmark = pytest.mark.slow

SCRIPT = """
import copy
import torch
import torch.distributed as dist
from torch import nn
from fluxloop import *
from fluxloop.compute.sharding import sharded_model
from fluxloop.nested import local_part, whole
from processes.launching import report
from processes.trainings import learner, mlp, regression, rows, weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([mlp(6, 6), mlp(6, 6)])
        self.head = mlp(6, 1)

    def forward(self, xs):
        for block in self.blocks:
            xs = block(xs)
        return self.head(xs)


def message(make):
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def units(policy, model=Net):
    return sharded_model(regression(policy, model=model().double()).model).units


def copies():
    made = regression("shard")
    made.model.note = "changed since"
    made.fit(1)
    copied = copy.deepcopy(made)
    assert copied.model is not made.model and copied.model.note == "changed since"
    for each in (made, copied):
        each.fit(1)
    return weights(made), weights(copied)


def copy_of_a_part():
    made = regression("shard", model=Net().double())
    part = copy.deepcopy(made.model.blocks[1])
    return part(rows(4)).detach(), made.model.blocks[1](rows(4)).detach()


def two_of_four():
    made = regression(Shard(replicas=2), callbacks=[GradientClip(0.1)])
    made.fit(3)
    return weights(made), sum(local_part(p).numel() for p in made.model.parameters())


def offloaded():
    found = []
    for policy in ("shard", Shard(offload=True)):
        made = regression(policy, callbacks=[GradientClip(0.1), EMA("model", 0.9)], accumulate=2)
        made.fit(1)
        kept = copy.deepcopy(made.state_dict())
        made.fit(1)
        made.load_state_dict(kept)
        made.fit(1)
        found.append(weights(made))
    return found


def state():
    made = regression("shard")
    made.fit(1)
    before = copy.deepcopy(made.state_dict())
    made.fit(1)
    after = weights(made)
    made.load_state_dict(before)
    made.fit(1)
    return after, weights(made)


class Spoil(Callback):
    "Puts a NaN into what one process holds of a gradient."
    reads, writes, steps = (), ("step.grads",), 0

    @on(BackwardEnd)
    def spoil(self, event, phase, learner):
        self.steps += 1
        if self.steps == 3 and dist.get_rank() == 1:
            name, gradient = next(iter(learner.step.grads.items()))
            local_part(gradient).view(-1)[0] = torch.nan


def stops():
    made = regression("shard", callbacks=[Spoil(), StopOnNaNLoss(), Recorder()])
    made.fit(2)
    return made.history.stop_reason, made.updates.count


class SpoilLoss(Callback):
    "Makes the loss of one process infinite, before its gradients are computed."
    reads, writes, steps = (), ("step.preds",), 0

    @on(LossBegin)
    def spoil(self, event, phase, learner):
        self.steps += 1
        if self.steps == 2 and dist.get_rank() == 1:
            learner.step.preds = learner.step.preds * torch.inf


def stops_at_a_loss():
    made = regression("shard", callbacks=[SpoilLoss(), StopOnNaNLoss(), Recorder()])
    made.fit(2)
    return made.history.stop_reason, made.updates.count


def cancelled():
    class Cancel(Net):
        calls = 0

        def forward(self, xs):
            xs = self.blocks[0](xs)
            Cancel.calls += self.training
            if Cancel.calls == 2 and self.training:
                raise CancelStepException
            return self.head(self.blocks[1](xs))

    torch.manual_seed(1)
    made = regression("shard", model=Cancel().double())
    made.fit(2)
    return weights(made)


def beforehand():
    torch.manual_seed(1)
    model = mlp(6, 8, 1)
    made = regression("shard", model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
    made.fit(1)
    return weights(made)


def by_half():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    data = TensorBatches(rows(8).float(), rows(8).sum(1, keepdim=True).float(), batch_size=4)
    accelerator = Accelerator("cpu", strategy="shard", precision="bf16")
    made = Learner(model, nn.MSELoss(), data=(data,), default_callbacks=False, accelerator=accelerator, seed=1)
    seen = []
    for part in model[:2]:
        part.register_forward_pre_hook(lambda part, inputs: seen.append(str(part.weight.dtype)))
    made.fit(1)
    return seen, str(next(model.parameters()).dtype)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.c = nn.Linear(6, 1)
        self.b.weight = self.a.weight

    def forward(self, xs):
        return self.c(self.b(self.a(xs)))


shared = mlp(6, 6)


class Scalar(nn.Linear):
    def __init__(self):
        super().__init__(6, 1)
        self.scale = nn.Parameter(torch.ones(()))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.ones(3))


def called_inside():
    made = regression(Shard("head"), model=Net().double())
    made.model.blocks[0](rows(4))


def used():
    model = mlp(6, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(rows(4)).sum().backward()
    optimizer.step()
    return regression("shard", model=model, optimizer=optimizer)


"""

OF_TWO = """
def joined():
    made = regression("shard")
    made.model.later = mlp(6, 1)
    made.optimizer.add_param_group({"params": [*made.model.later.parameters()]})
    return made


found = dict(
    units={
        "children": units("shard"), "class": units(Shard(nn.Linear)), "names": units(Shard("blocks.*")),
        "size": units(Shard(min_parameters=40)), "tied": units("shard", Tied),
    },
    copies=copies(), copy_of_a_part=copy_of_a_part(), state=state(), stops=stops(), stops_at_a_loss=stops_at_a_loss(),
    cancelled=cancelled(), beforehand=beforehand(), by_half=by_half(), offloaded=offloaded(),
)
found["refused"] = {
    "compile": message(lambda: Accelerator("cpu", strategy="shard", compile="step")),
    "replicas": message(lambda: Accelerator("cpu", strategy=Shard(replicas=3))),
    "shared": message(lambda: learner({"a": shared, "b": nn.Sequential(shared)}, rows(), strategy="shard")),
    "tied": message(lambda: regression(Shard(("a", "b")), model=Tied().double())),
    "scalar": message(lambda: regression("shard", model=Scalar().double())),
    "bare": message(lambda: learner({"a": Bare(), "b": mlp(6, 1)}, rows(), strategy="shard")),
    "lazy": message(lambda: regression("shard", model=nn.LazyLinear(1))),
    "part": message(called_inside),
    "used": message(used),
    "Muon": message(lambda: regression("shard", model=nn.Linear(6, 1, bias=False), optimizer=torch.optim.Muon)),
    "joined": message(lambda: joined().meet_parameters()),
    "LBFGS": message(lambda: regression("shard", optimizer=torch.optim.LBFGS)),
}
report(**found)
"""


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    """What each of two processes found."""
    return run(SCRIPT + OF_TWO, 2, timeout=120).reports


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)


def test_units_are_children_classes_names_or_of_a_size(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["units"] == {
            "children": ("blocks.0", "blocks.1", "head"),
            "class": ("blocks.0.0", "blocks.1.0", "head.0"),
            "names": ("blocks.0", "blocks.0.0", "blocks.1", "blocks.1.0"),
            "size": ("blocks.0.0", "blocks.1.0"),
            "tied": ("c",),
        }


def test_a_copied_learner_trains_to_the_same_bits(two: list[dict[str, Any]]) -> None:
    for found in two:
        made, copied = found["copies"]
        assert all(torch.equal(tensor, copied[name]) for name, tensor in made.items())


def test_a_copied_part_computes_the_same(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert torch.equal(*found["copy_of_a_part"])


def test_a_state_is_gone_on_from_to_the_bit(two: list[dict[str, Any]]) -> None:
    for found in two:
        after, again = found["state"]
        assert all(torch.equal(tensor, again[name]) for name, tensor in after.items())


def test_parameters_in_the_memory_of_the_host_train_to_the_same_bits(two: list[dict[str, Any]]) -> None:
    for found in two:
        kept, offloaded = found["offloaded"]
        assert kept.keys() == offloaded.keys()
        assert all(torch.equal(tensor, offloaded[name]) for name, tensor in kept.items())


def test_a_nan_in_what_one_process_holds_stops_all_in_the_same_step(two: list[dict[str, Any]]) -> None:
    for found in two:
        reason, updates = found["stops"]
        assert "nan or infinite (0.weight) in TrainingPhase(), epoch 1, step 3" in reason
        assert updates == 2


def test_a_loss_that_is_not_finite_on_one_process_stops_all_in_the_same_step(two: list[dict[str, Any]]) -> None:
    for found in two:
        reason, updates = found["stops_at_a_loss"]
        assert "the loss became" in reason
        assert "on process 1 in TrainingPhase(), epoch 1, step 2" in reason
        assert updates == 1


def test_a_step_cancelled_in_the_middle_of_a_forward_pass_leaves_the_next_as_it_would_be(
    two: list[dict[str, Any]],
) -> None:
    first, second = (found["cancelled"] for found in two)
    assert_same(first, second)
    assert all(tensor.isfinite().all() for tensor in first.values())


def test_an_optimizer_made_beforehand_steps_the_sharded_parameters(two: list[dict[str, Any]]) -> None:
    torch.manual_seed(1)
    model = mlp(6, 8, 1)
    alone = regression(model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
    alone.fit(1)
    for found in two:
        assert_same(found["beforehand"], weights(alone))


def test_with_bf16_parameters_are_gathered_in_it_but_for_batch_norm(two: list[dict[str, Any]]) -> None:
    for found in two:
        seen, held = found["by_half"]
        assert seen == ["torch.bfloat16", "torch.float32"]
        assert held == "torch.float32"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("compile", "CompileError: .*expected compile=False"),
        ("replicas", "ValueError: .*2 processes; expected a number that divides it"),
        ("shared", "ModelError: b.0.0.weight is a parameter of a too"),
        ("tied", "ModelError: model.a.weight is held by 'b' too"),
        ("scalar", "ModelError: model.scale has no dimension.*reshape"),
        ("bare", "ModelError: a .Bare. has parameters of its own and no forward"),
        ("lazy", "ModelError: model.weight has seen no batch"),
        ("part", "ModelError: model.blocks.0.0 .Linear. was called by itself.*units=.'blocks.0.0'"),
        ("used", "OptimizerError: Adam has taken steps"),
        ("Muon", "OptimizerError: Muon makes whole matrices orthogonal"),
        ("joined", "ModelError: later.0.weight, later.0.bias joined after the models were sharded"),
        ("LBFGS", "OptimizerError: LBFGS takes all parameters for one vector"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_words(what: str, said: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        assert re.match(said, found["refused"][what]), found["refused"][what]


OF_HISTOGRAMS = """
logs = [Recorder(), LogHistograms(CSV("never.csv"))]
report(histograms=message(lambda: regression("shard", callbacks=logs).fit(1)))
"""


def test_histograms_of_what_the_logging_process_has_a_part_of_are_refused() -> None:
    found = run(SCRIPT + OF_HISTOGRAMS, 2, check=False).reports[0]["histograms"]  # the other process ends for this one
    assert re.match("CallbackTypeError: .*weights and gradients that are sharded", found)


@pytest.mark.skipif(4 not in SIZES, reason="FLUXLOOP_PROCESSES=4 asks for it")
def test_two_copies_over_four_processes_train_what_one_process_trains() -> None:
    alone = regression(callbacks=[GradientClip(0.1)])
    alone.fit(3)
    script = (
        SCRIPT
        + """
made, held = two_of_four()
report(weights=made, held=held, whole=sum(p.numel() for p in made.values()))
"""
    )
    reports = run(script, 4, timeout=120).reports
    for found in reports:
        assert_same(found["weights"], weights(alone))
    assert [sum(found["held"] for found in reports[i : i + 2]) for i in (0, 2)] == [reports[0]["whole"]] * 2
