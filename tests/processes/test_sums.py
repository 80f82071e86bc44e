"""Tensors of several processes are added up: small ones in pairs, others by torch's collective."""

from __future__ import annotations

import pytest
import torch

from processes.launching import run

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
"""


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_all_processes_get_the_bits_of_one_sum(processes: int) -> None:
    reports = [report["found"] for report in run(SCRIPT, processes).reports]
    assert len(reports[0]) == 24
    for (dtype, length, waits), (first, in_pairs) in reports[0].items():
        parts = [torch.randn(length, generator=torch.Generator().manual_seed(rank)) for rank in range(processes)]
        expected = sum(part.to(first.dtype).double() for part in parts)
        tolerance = {"torch.float32": 1e-5, "torch.float64": 1e-12, "torch.bfloat16": 0.1}[dtype]
        torch.testing.assert_close(first.double(), expected, rtol=tolerance, atol=tolerance)
        assert all(torch.equal(first, found[dtype, length, waits][0]) for found in reports)
        small = length * first.element_size() <= 1 << 16
        assert in_pairs == (processes != 3 and small and waits)
