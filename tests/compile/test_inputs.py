from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from compiled_training import Every, Scale, full, graphs, learner, learner_of, weights
from torch import Tensor, nn

from fluxloop import (
    CompileError,
    Learner,
    LearningRate,
    LRScheduler,
    Scheduler,
    recompute_activations,
    set_hyperparameter,
)

pytestmark = pytest.mark.usefixtures("imported")


@pytest.mark.usefixtures("plain")
def test_sparse_gradients_that_wait_are_refused() -> None:
    class Embeds(Every):
        def loss(self, learner: Any, state: Any) -> Tensor:
            return torch.nn.functional.embedding(state.ys, learner.model.weight, sparse=True).square().mean()

    made = learner(model=lambda: nn.Embedding(4, 2), optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(CompileError, match="sparse gradients wait for an update"):
        made.fit(1, phases=[Embeds()])


@pytest.mark.usefixtures("uncompiled")
def test_parts_that_compute_their_activations_again_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3))
    with pytest.raises(CompileError, match="recompute_activations was called for Sequential"):
        learner_of(recompute_activations(model, "1")).fit(1)


@pytest.mark.usefixtures("uncompiled")
def test_tensors_that_share_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(CompileError, match="share memory"):
        learner_of(model).fit(1)


@pytest.mark.usefixtures("uncompiled")
def test_a_step_of_an_optimizer_that_somebody_replaced_is_refused() -> None:
    made = learner_of(Scale())
    made.optimizer.step = lambda: None  # type: ignore[method-assign]  # what is tested
    with pytest.raises(CompileError, match="was replaced"):
        made.fit(1)


@pytest.mark.usefixtures("plain")
def test_rates_of_numpys_are_inputs_as_pythons_are() -> None:
    def train(number: Any) -> Learner[Any]:
        made = learner(
            data=(full(),),
            optimizer=partial(torch.optim.AdamW, lr=number(0.125), weight_decay=number(0.5)),
            callbacks=[Scheduler({LearningRate: lambda t: number(0.125) / 2**t})],
        )
        made.fit(2)
        return made

    expected, found = train(float), train(np.float32)
    torch.testing.assert_close(weights(found), weights(expected), rtol=0, atol=0)
    assert graphs(found) == graphs(expected) == 1
    assert type(found.optimizer.param_groups[0]["weight_decay"]) is float


@pytest.mark.usefixtures("plain")
def test_rates_of_numpys_that_others_set_make_no_graph_each() -> None:
    def half(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: np.float32(0.5) ** t)

    made = learner(
        data=(full(),),
        optimizer=partial(torch.optim.AdamW, lr=0.125),
        callbacks=[LRScheduler(half, unit="step")],
    )
    made.fit(1)
    set_hyperparameter(made, LearningRate, np.float32(0.25))
    assert type(made.optimizer.param_groups[0]["lr"]) is float
    made.fit(1)
    assert graphs(made) == 1
