"""Tensors of several processes are added up: small ones in pairs, others by torch's collective."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fluxloop import find_lr
from fluxloop.processes.sums import SMALL
from processes.launching import SIZES, run
from processes.trainings import line_search, regression, weights

pytestmark = pytest.mark.slow

SCRIPT = """
import torch
from fluxloop.processes.group import join
from fluxloop.processes.sums import SMALL, Sums, _InPairs
from processes.launching import report

group = join(torch.device("cpu"))
sums, found = Sums(group), {}
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for length in (1, 77, SMALL // 4, SMALL // 4 + 1):
        for waits in (True, False):
            tensor = torch.randn(length, generator=torch.Generator().manual_seed(group.rank)).to(dtype)
            work = sums.begin(tensor, waits=waits)
            work.wait()
            found[str(dtype), length, waits] = (tensor, isinstance(work, _InPairs))
for number in range(300):  # one process is ahead of the other
    tensor = torch.full((50,), float(number))
    sums.begin(tensor).wait()
    assert tensor.eq(number * group.size).all()
report(found=found)
if group.size == 2:
    from fluxloop import find_lr
    from processes.trainings import line_search, regression, weights

    sweep = find_lr(regression("replicate", number=50))
    report(searched=weights(line_search("replicate")), losses=sweep.losses, suggestion=sweep.suggestion)
"""


@pytest.fixture(scope="module", params=[*SIZES, 3])
def reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each process has found."""
    return run(SCRIPT, request.param).reports


def test_all_processes_get_the_bits_of_one_sum(reports: list[dict[str, Any]]) -> None:
    processes = len(reports)
    assert len(reports[0]["found"]) == 24
    for (dtype, length, waits), (first, in_pairs) in reports[0]["found"].items():
        parts = [torch.randn(length, generator=torch.Generator().manual_seed(rank)) for rank in range(processes)]
        expected = sum(part.to(first.dtype).double() for part in parts)
        tolerance = {"torch.float32": 1e-5, "torch.float64": 1e-12, "torch.bfloat16": 0.1}[dtype]
        torch.testing.assert_close(first.double(), expected, rtol=tolerance, atol=tolerance)
        assert all(torch.equal(first, of["found"][dtype, length, waits][0]) for of in reports)
        small = length * first.element_size() <= SMALL
        assert in_pairs == (processes != 3 and small and waits)


def test_what_decides_by_the_loss_decides_alike_on_all_processes(reports: list[dict[str, Any]]) -> None:
    if len(reports) != 2:
        pytest.skip("run by two processes")
    sweep, searched = find_lr(regression(number=50)), weights(line_search())
    for of in reports:
        assert of["losses"] == pytest.approx(sweep.losses, rel=1e-9)
        assert of["suggestion"] == sweep.suggestion
        for path, expected in searched.items():
            torch.testing.assert_close(of["searched"][path], expected, rtol=1e-9, atol=1e-9)
            assert torch.equal(of["searched"][path], reports[0]["searched"][path])
