from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from compiled_training import ADAM, RMSPROP, SGD, Model, both, graphs, learner, learner_of, mlp, rows
from torch import nn

from fluxloop import CompileError, LearningRate, LRScheduler, Scheduler, WeightDecay, linear

pytestmark = pytest.mark.usefixtures("imported")


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        partial(torch.optim.SGD, lr=0.1, maximize=True),
        partial(torch.optim.Adam, lr=1e-3, fused=True),
        partial(torch.optim.AdamW, lr=1e-3, amsgrad=True, foreach=False),
        partial(torch.optim.AdamW, lr=torch.tensor(1e-3), foreach=False),
        partial(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.9),
        partial(torch.optim.Adagrad, lr=0.01, lr_decay=0.1, weight_decay=0.01),
        partial(torch.optim.NAdam, momentum_decay=0.01, decoupled_weight_decay=True, weight_decay=0.1),
        partial(torch.optim.RAdam, weight_decay=0.1),
        *(
            getattr(torch.optim, name)
            for name in (
                *("Adam", "AdamW", "Adagrad", "NAdam", "RAdam", "RMSprop", "Adadelta", "Adamax", "ASGD", "Rprop"),
            )
        ),
    ],
    ids=str,
)
def test_torchs_optimizers_step_inside_the_graph(optimizer: Any) -> None:
    eager, compiled = both(2, optimizer=optimizer, tolerance=1e-5)
    state, other = eager.optimizer.state_dict()["state"], compiled.optimizer.state_dict()["state"]
    assert state.keys() == other.keys()
    for index, entries in state.items():
        for name, value in entries.items():
            torch.testing.assert_close(value, other[index][name], rtol=1e-4, atol=1e-6)


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 4, bias=False))


@pytest.mark.parametrize("optimizer", ["Adafactor", "LBFGS", "Muon", "SparseAdam"])
def test_optimizers_that_no_graph_can_step_are_refused_by_name_when_the_learner_is_made(optimizer: str) -> None:
    if not hasattr(torch.optim, optimizer):
        pytest.skip(f"torch {torch.__version__} has no {optimizer}")
    with pytest.raises(CompileError, match=rf"the optimizer is {optimizer}, which .*such as AdamW.*compile=False"):
        learner(model=matrices, optimizer=partial(getattr(torch.optim, optimizer), lr=0.1))
    learner(False, model=matrices, optimizer=partial(getattr(torch.optim, optimizer), lr=0.1))


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_schedules_of_the_learning_rate_and_of_weight_decay_make_no_new_graphs() -> None:
    _, compiled = both(5, callbacks=lambda: [Scheduler({LearningRate: linear(12, 0.1, 0.01)})])
    assert graphs(compiled) == 2
    for optimizer in (SGD, partial(SGD, maximize=True), ADAM, partial(torch.optim.AdamW, fused=False), RMSPROP):
        decay = linear(15, 0.0, 0.3)
        _, compiled = both(5, callbacks=lambda: [Scheduler({WeightDecay: decay})], optimizer=optimizer)  # noqa: B023
        assert graphs(compiled) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_options_of_a_float64_model_are_not_rounded() -> None:
    data = ((rows()[0].double(), rows()[1]),)
    both(2, data=data, model=lambda: mlp().double(), optimizer=partial(torch.optim.SGD, lr=0.05), tolerance=1e-13)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("optimizer", "within"),
    [
        (partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True), 1e-14),
        (torch.optim.Adam, 1e-14),
        (partial(torch.optim.AdamW, amsgrad=True), 1e-14),
        (partial(torch.optim.Adamax, lr=1e-2), 1e-14),
        (partial(torch.optim.NAdam, lr=1e-2), 1e-8),  # torch counts its momenta in float32
        (partial(torch.optim.RAdam, lr=1e-2), 1e-7),
    ],
    ids=str,
)
def test_a_float64_model_is_stepped_in_float64(optimizer: Any, within: float) -> None:
    data = ((rows()[0].double(), rows()[1]),)
    both(6, data=data, model=lambda: mlp().double(), optimizer=optimizer, tolerance=within)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, maximize=True),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.2),
        torch.optim.Adam,
        partial(torch.optim.AdamW, amsgrad=True, maximize=True, fused=False),
    ],
    ids=str,
)
def test_one_cycle_moves_the_momentum_without_a_new_graph(optimizer: Any) -> None:
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=24)
    full = ((rows()[0][:64], rows()[1][:64]),)
    eager, compiled = both(
        12, data=full, optimizer=optimizer, callbacks=lambda: [LRScheduler(cycle, unit="step")], tolerance=2e-5
    )
    if isinstance(compiled.optimizer, torch.optim.Adam) or type(compiled.optimizer) is torch.optim.SGD:
        assert graphs(compiled) == 1
    assert eager.optimizer.param_groups[0]["lr"] == compiled.optimizer.param_groups[0]["lr"]


class CountingSGD(torch.optim.SGD):
    """Keeps a number of its own in Python."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["steps"] = self.state[parameter].get("steps", 0) + 1
        return result


@pytest.mark.usefixtures("uncompiled")
def test_an_optimizer_that_counts_in_python_is_refused() -> None:
    with pytest.raises(CompileError, match="CountingSGD counts 'steps' in Python"):
        learner_of(Model(lambda model, out: out), optimizer=partial(CountingSGD, lr=0.1)).fit(1)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_without_momentum_sgd_leaves_its_buffers_as_they_are(dampening: float) -> None:
    found = []
    for compile in (False, "step"):
        made = learner(compile, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=dampening))
        for momentum in (0.9, 0.0, 0.5, 0.0, 0.9):
            made.optimizer.param_groups[0]["momentum"] = momentum
            made.fit(1)
        assert compile is False or graphs(made) <= 6  # one with it and one without, for each shape, and the first fit's
        found.append([p.detach() for p in made.model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("plain")
def test_betas_that_change_inside_of_their_list_are_seen() -> None:
    found = []
    for compile in (False, "step"):
        made = learner(compile, optimizer=ADAM)
        betas = made.optimizer.param_groups[0]["betas"] = [0.9, 0.99]
        for beta in (0.9, 0.1, 0.5):
            betas[0] = beta
            made.fit(1)
        found.append([p.detach() for p in made.model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
