"""Parameters that got no gradient are told once, by the first process alone, also where each holds a part of them."""

from __future__ import annotations

import pytest

from processes.launching import run

pytestmark = pytest.mark.slow

SCRIPT = """
import warnings
import torch
from torch import nn
from torch.nn.functional import mse_loss
from fluxloop import Accelerator, Learner, TensorBatches
from processes.launching import report


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, xs):
        return self.used(xs)


def told(strategy, optimizer, uses_all=False):
    torch.manual_seed(0)
    data = (TensorBatches(torch.randn(32, 6), torch.randn(32, 1), batch_size=8),)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)) if uses_all else Half()
    learner = Learner(
        model, mse_loss, data=data, optimizer=optimizer, seed=0, default_callbacks=False,
        accelerator=Accelerator("cpu", strategy=strategy),
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        learner.fit(2)
    return [str(each.message) for each in seen if "got no gradient" in str(each.message)]


report(told={
    (strategy, optimizer.__name__, uses_all): told(strategy, optimizer, uses_all)
    for strategy in ("replicate", "shard")
    for optimizer in (torch.optim.SGD, torch.optim.AdamW)
    for uses_all in (False, True)
})
"""


def test_parameters_without_a_gradient_are_told_once_by_the_first_process_also_where_they_are_sharded() -> None:
    first, second = (each["told"] for each in run(SCRIPT, processes=2).reports)
    assert not any(second.values())
    for (strategy, optimizer, uses_all), found in first.items():
        if uses_all:
            assert found == [], (strategy, optimizer)
        else:
            assert len(found) == 1, (strategy, optimizer)
            assert "left them alone: unused.weight, unused.bias. Use" in found[0]
