"""Activations that are computed again in several processes: the bits of processes that keep them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from fluxloop import Accelerator, Learner, TensorBatches, recompute_activations, synchronise_batch_norm
from processes.launching import run

SCRIPT = """
from processes.launching import report
from processes.test_recomputed import STRATEGIES, weights

for strategy in STRATEGIES:
    report(**{strategy: [weights(strategy, patterns) for patterns in ((), ("blocks.*",))]})
"""


STRATEGIES = ("replicate", "synchronised", "shard")


class Net(nn.Module):
    """Blocks with dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2)
        )
        self.head = nn.Linear(6, 1)

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            xs = xs + block(xs)
        out: torch.Tensor = self.head(xs)
        return out


def weights(strategy: str, patterns: tuple[str, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = synchronise_batch_norm(Net()) if strategy == "synchronised" else Net()
    if patterns:
        recompute_activations(model, *patterns)
    batches = TensorBatches(torch.randn(20, 6), torch.randn(20, 1), batch_size=4)
    accelerator = Accelerator("cpu", strategy="shard" if strategy == "shard" else "replicate", accumulate=2)
    learner = Learner(
        model,
        mse_loss,
        data=(batches,),
        optimizer=torch.optim.Adam,
        accelerator=accelerator,
        seed=1,
        default_callbacks=False,
    )
    if strategy == "shard":  # a copy computes again what is its own
        learner = copy.deepcopy(learner)
        model = learner.model
    learner.fit(2)
    full = [(name, getattr(value, "full_tensor", None), value) for name, value in model.state_dict().items()]
    return {name: value if gather is None else gather() for name, gather, value in full}


@pytest.mark.slow
def test_weights_and_statistics_are_those_of_processes_that_keep_their_activations() -> None:
    for found in run(SCRIPT, processes=2).check().reports:
        for strategy in STRATEGIES:
            plain, again = found[strategy]
            assert plain.keys() == again.keys()
            for name, value in plain.items():
                assert torch.equal(again[name], value), (strategy, name)
            assert int(again["blocks.0.1.num_batches_tracked"]) == 6
