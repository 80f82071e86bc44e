"""Gathered rows have the gradient of one process on the joined batch."""

from typing import Any

import pytest
import torch

from fluxloop import Accelerator
from fluxloop.losses import nt_xent
from processes.launching import SIZES, run

SCRIPT = '''
import copy

import torch

from fluxloop import Accelerator
from fluxloop.losses import barlow_twins_loss, msn_loss, nt_xent, sigreg, vicreg_loss
from fluxloop.processes.gather import all_gather, join_rows
from processes.launching import report

accelerator = Accelerator("cpu")
group = accelerator.group


def pair(z):
    return z[:, :3], z[:, 3:]


def own_rows(z):
    (z1, z2), rows = join_rows(group, *pair(z))
    return nt_xent(z1, z2, own=rows.own if rows.counts[rows.rank] else None)


def all_rows(loss):
    def joined(z):
        (z1, z2), _ = join_rows(group, *pair(z))
        return loss(z1, z2)

    return joined


def deviation(counts, spare, loss, mine):
    """Return how far gradients, weighted by rows and averaged, are from those of one process, and the loss."""
    torch.manual_seed(1)
    xs = torch.randn(sum(counts), 5, dtype=torch.float64)
    alone = torch.nn.Linear(5, 6).double()
    model = copy.deepcopy(alone)
    expected = loss(*pair(alone(xs)))
    expected.backward()
    start = sum(counts[: group.rank])
    group.spare = group.rank in spare
    rows = xs[:3] if group.spare else xs[start : start + counts[group.rank]]
    found = mine(model(rows))
    weight = 0.0 if group.spare else float(len(rows))
    torch.autograd.backward(found, grad_tensors=torch.full_like(found, weight))
    group.spare = False
    largest = max(parameter.grad.abs().max() for parameter in alone.parameters())
    off = [abs(group.all_reduce(found.detach() * weight) / sum(counts) - expected.detach()).item()]
    for parameter, other in zip(model.parameters(), alone.parameters()):
        off.append(((group.all_reduce(parameter.grad) / sum(counts) - other.grad).abs().max() / largest).item())
    return max(off)


directions, prototypes = torch.eye(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


def of_normal(z1, z2, group=None):
    return sigreg(torch.stack([z1, z2]), directions, group=group)


def of_codes(z1, z2, group=None):
    return msn_loss(z1, z2, prototypes, group=group)


group.all_reduce(prototypes)
size = group.size
kinds = {
    "even": ([4] * size, ()),
    "ragged": ([3 + rank for rank in range(size)], ()),
    "one ran out": ([4] * (size - 1) + [0], (size - 1,)),
}
table = {}
for kind, (counts, spare) in kinds.items():
    table[kind, "own rows"] = deviation(counts, spare, nt_xent, own_rows)
    for loss in (nt_xent, vicreg_loss, barlow_twins_loss):
        table[kind, loss.__name__] = deviation(counts, spare, loss, all_rows(loss))
    for loss in (of_normal, of_codes):
        table[kind, loss.__name__] = deviation(counts, spare, loss, lambda z: loss(*pair(z), group=group))

xs = torch.randn(2 + group.rank, 3, dtype=torch.float64, requires_grad=True)
(first,) = torch.autograd.grad((all_gather(xs, group) ** 3).sum(), xs, create_graph=True)
(second,) = torch.autograd.grad((first**2).sum(), xs)
report(first=first.detach() - 3 * size * xs.detach() ** 2, second=second - 36 * size**2 * xs.detach() ** 3)

half = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
accelerator.all_gather(half).sum().backward()
gathered = {
    "labels": accelerator.gather(torch.arange(group.rank + 1)),
    "flags": accelerator.gather(torch.ones(group.rank, dtype=torch.bool)),
    "transposed": accelerator.gather(torch.arange(6).reshape(3, 2).T),
    "graph": accelerator.gather(xs).requires_grad,
}
group.spare = not group.is_main
gathered["spare"] = accelerator.gather(torch.arange(2))
group.spare = False
errors = []
for wrong in (torch.ones(2, 3 + group.rank), torch.ones(2, dtype=torch.float64 if group.is_main else torch.float32)):
    try:
        accelerator.gather(wrong)
    except ValueError as error:
        errors.append(str(error))
accelerator.print("printed", "once", sep="-")
accelerator.wait()
report(table=table, gathered=gathered, errors=errors, half=half.grad)
'''


@pytest.fixture(scope="module", params=SIZES)
def ran(request: pytest.FixtureRequest) -> Any:
    return run(SCRIPT, processes=request.param)


@pytest.mark.slow
def test_gradients_and_losses_are_those_of_one_process_on_the_joined_batch(ran: Any) -> None:
    for report in ran.reports:
        assert len(report["table"]) == 18
        assert max(report["table"].values()) < 1e-13, report["table"]


@pytest.mark.slow
def test_second_derivatives_go_through_gathered_rows(ran: Any) -> None:
    for report in ran.reports:
        assert report["first"].abs().max() < 1e-11
        assert report["second"].abs().max() < 1e-10


@pytest.mark.slow
def test_rows_are_joined_in_the_order_of_processes_whatever_their_number_type_and_layout(ran: Any) -> None:
    size = len(ran.reports)
    for report in ran.reports:
        gathered = report["gathered"]
        assert gathered["labels"].tolist() == [label for rank in range(size) for label in range(rank + 1)]
        assert gathered["flags"].tolist() == [True] * sum(range(size))
        assert torch.equal(gathered["transposed"], torch.arange(6).reshape(3, 2).T.repeat(size, 1))
        assert gathered["graph"] is False
        assert torch.equal(report["half"], torch.full((2, 3), float(size), dtype=torch.bfloat16))


@pytest.mark.slow
def test_rows_of_a_step_that_is_spare_are_left_out(ran: Any) -> None:
    assert all(report["gathered"]["spare"].tolist() == [0, 1] for report in ran.reports)


@pytest.mark.slow
def test_tensors_that_cannot_be_joined_are_refused_in_all_processes(ran: Any) -> None:
    for report in ran.reports:
        shapes, types = report["errors"]
        assert "process 0: a Tensor of shape (2, 3) and torch.float32; process 1: a Tensor of shape (2, 4)" in shapes
        assert "process 0: a Tensor of shape (2,) and torch.float64; process 1: a Tensor of shape (2,)" in types


@pytest.mark.slow
def test_the_first_process_alone_prints(ran: Any) -> None:
    assert ["printed-once" in output for output in ran.outputs] == [True] + [False] * (len(ran.outputs) - 1)


def test_one_process_gathers_its_own_tensor_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator, tensor = Accelerator("cpu"), torch.ones(2, 3)
    assert accelerator.gather(tensor) is tensor
    assert accelerator.all_gather(tensor) is tensor
    accelerator.wait()
    accelerator.print("a", "b", sep="-")
    assert capsys.readouterr().out == "a-b\n"


def test_losses_of_some_rows_average_to_that_of_all() -> None:
    z1, z2 = torch.randn(2, 7, 4, dtype=torch.float64).unbind()
    first, rest = nt_xent(z1, z2, own=slice(0, 3)), nt_xent(z1, z2, own=slice(3, 7))
    torch.testing.assert_close((3 * first + 4 * rest) / 7, nt_xent(z1, z2))
