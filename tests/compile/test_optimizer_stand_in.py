from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from compiled_training import ADAM, RMSPROP, SGD, Model, both, graphs, learner, learner_of, mlp, rows
from torch import nn

from fluxloop import CompileError, FluxloopError, LearningRate, Scheduler, WeightDecay, linear

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


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="new in torch 2.9")
def test_muon_which_asks_for_its_rate_as_a_number_is_refused_in_words() -> None:
    made = learner(optimizer=partial(torch.optim.Muon, lr=0.01), model=matrices)
    with pytest.raises(CompileError, match=r"asks for a number in the middle .*a tensor as alpha= or value="):
        made.fit(1)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("optimizer", "sparse", "words"),
    [
        ("Adafactor", False, "the step of TrainingPhase"),
        ("LBFGS", False, "LBFGS needs a closure"),
        ("SparseAdam", True, "gradients are sparse"),
        ("SGD", True, r"gradients are sparse.*Embedding\(sparse=False\)"),
    ],
)
def test_optimizers_that_no_graph_can_step_are_refused_in_words(optimizer: str, sparse: bool, words: str) -> None:
    if not hasattr(torch.optim, optimizer):
        pytest.skip(f"torch {torch.__version__} has no {optimizer}")
    made = learner(
        model=lambda: nn.Embedding(4, 4, sparse=sparse),
        data=((torch.arange(4), torch.arange(4)),),
        optimizer=partial(getattr(torch.optim, optimizer), lr=0.1),
    )
    with pytest.raises(FluxloopError, match=words):
        made.fit(3)


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
