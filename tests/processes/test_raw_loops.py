"""Loops of a user's own in several processes: what one process trains on the joined batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import Accelerator
from processes.launching import run

SCRIPT = """
import torch
from fluxloop import Accelerator
from processes.launching import report
from processes.test_raw_loops import supervised, gan

size = 4
accelerator = Accelerator("cpu")
report(
    plain=supervised(accelerator, size, torch.manual_seed(accelerator.rank)),
    windows=supervised(Accelerator("cpu", accumulate=2), size),
    gan=gan(accelerator, size),
    single=accelerator.is_main,
)
accelerator.wait()
accelerator.print("printed once")
"""


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(27, width, dtype=torch.float64, generator=generator) for width in (3, 1))  # type: ignore[return-value]  # of two


def supervised(accelerator: Accelerator, batch_size: int, _: Any = None) -> list[Any]:
    """Train and validate as luz's vignette does; 27 rows make no full last batch."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.0), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if accelerator.is_main:  # weights that differ: all begin with the first one's
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    loaders = [DataLoader(TensorDataset(*data()), batch_size=batch_size) for _ in range(2)]
    model, optimizer, (train, valid) = accelerator.prepare(model, optimizer, loaders)
    for _ in range(2):
        model.train()
        for xs, ys in train:
            optimizer.zero_grad()
            accelerator.backward(mse_loss(model(xs), ys))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    model.eval()
    with torch.no_grad():
        errors = torch.cat([accelerator.gather((model(xs) - ys).square()) for xs, ys in valid])
    return [*(parameter.detach() for parameter in model.parameters()), errors]


def gan(accelerator: Accelerator, batch_size: int) -> list[Tensor]:
    torch.manual_seed(0)
    gen, dis = nn.Linear(3, 3).double(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    of_gen, of_dis = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (gen, dis))
    loader = DataLoader(data()[0], batch_size=batch_size)
    gen, dis, of_gen, of_dis, loader = accelerator.prepare(gen, dis, of_gen, of_dis, loader)
    for real in loader:
        fake = gen(real)
        for _ in range(2):
            of_dis.zero_grad()
            accelerator.backward(softplus(-dis(real)).mean() + softplus(dis(fake.detach())).mean())
            of_dis.step()
        of_gen.zero_grad()
        accelerator.backward(softplus(-dis(fake)).mean())
        of_gen.step()
    return [parameter.detach() for each in (gen, dis) for parameter in each.parameters()]


@pytest.mark.slow
def test_two_processes_train_and_measure_what_one_does_on_the_joined_batches() -> None:
    done = run(SCRIPT, processes=2).check()
    expected = {
        "plain": supervised(Accelerator("cpu"), 8),
        "windows": supervised(Accelerator("cpu"), 16),
        "gan": gan(Accelerator("cpu"), 8),
    }
    for name, tensors in expected.items():
        for found in done.reports:
            for one, other in zip(found[name], tensors, strict=True):
                torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-9, atol=1e-9)
        assert all(map(torch.equal, done.reports[0][name], done.reports[1][name]))
    assert [report["single"] for report in done.reports] == [True, False]
    assert sum(output.count("printed once") for output in done.outputs) == 1
