"""Gradients of several processes: what is sent, what comes back, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from processes.launching import SIZES, run

CASES = '''
import torch
from torch import nn
from fluxloop.compute.averaging import Averager
from fluxloop.compute.buckets import BucketSizes
from fluxloop.processes.group import join
from processes.launching import report

group = join(torch.device("cpu"))
rank, size = group.rank, group.size
TINY = BucketSizes(first=64, others=200, whole=0)
found = {}


def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def own_gradient(parameter, step=0, of=None):
    """What a process computes; so that each can say what the sum is."""
    generator = torch.Generator().manual_seed(100 * step + (rank if of is None else of))
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def total(parameter, step=0):
    return sum(own_gradient(parameter, step, of) for of in range(size))


def backward(parameters, step=0):
    sum((parameter * own_gradient(parameter, step)).sum() for parameter in parameters).backward()


def parameters(*shapes, dtype=torch.float64):
    return tuple(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes)


def close(own, step=0):
    return all(torch.allclose(p.grad, total(p, step), rtol=1e-12, atol=1e-12) for p in own)


# What is sent while the backward pass runs, and what comes back
averager = Averager(group, sizes=TINY)
own = parameters((5, 3), (3,), (), (4, 4), (2,), (30,))
rows = []
for step in range(3):
    for parameter in own:
        parameter.grad = None
    with averager.watching([own]):
        backward(own, step)
        sent_meanwhile = averager._next
    said = averager.finish([float(rank + 1)], [1, 0, float(rank), 0])
    rows.append((close(own, step), sent_meanwhile, averager.messages, said.weights, said.votes))
found["rows"] = rows
found["buckets"] = len(averager._plans[id(own[0])].buckets)

# A gradient that somebody holds is not written to
held = [parameter.grad for parameter in own]
before = [gradient.clone() for gradient in held]
for parameter in own:
    parameter.grad = own_gradient(parameter)
local = [parameter.grad for parameter in own]
averager.reduce([own], [1.0])
found["held"] = all(map(torch.equal, held, before)) and close(own)
found["local"] = all(torch.equal(gradient, own_gradient(gradient)) for gradient in local)

# None on all processes stays None; a gradient of one process reaches all
for name, sizes in {"whole": BucketSizes(), "tiny": TINY}.items():
    averager, own = Averager(group, sizes=sizes), parameters((20,), (3,), (2, 2), (5,))
    results = []
    for step in range(3):
        for parameter in own:
            parameter.grad = None
        with averager.watching([own]):
            backward(own[:1] if rank else [own[0], own[3]], step)
        averager.finish([1.0])
        results.append((own[1].grad, own[2].grad, torch.equal(own[3].grad, own_gradient(own[3], step, 0)),
                        close(own[:1], step)))
    found[f"unused {name}"] = results

# Added by hand, and by a pass before; second derivatives keep their graph out of the sums
averager, own = Averager(group, sizes=TINY), parameters((20,), (3,), (20,))
oks = []
for step in range(3):
    for parameter in own:
        parameter.grad = None
    backward(own[:1], 10)
    own[1].grad = own_gradient(own[1], 7)
    with averager.watching([own]):
        sum((p * own_gradient(p, step)).sum() for p in own).backward(create_graph=True)
    averager.finish([1.0])
    oks.append(torch.allclose(own[0].grad, total(own[0], step) + total(own[0], 10))
               and torch.allclose(own[1].grad, total(own[1], step) + total(own[1], 7))
               and close(own[2:], step) and not any(p.grad.requires_grad for p in own))
found["before"] = oks

# A hook of somebody else, that changes a gradient once it is complete
averager, own = Averager(group, sizes=TINY), parameters((20,), (3,), (20,))
averager.reduce([own], [1.0])
for parameter in own:
    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, 'grad', 2 * p.grad))
for step in range(2):
    for parameter in own:
        parameter.grad = None
    with averager.watching([own]):
        backward(own, step)
    averager.finish([1.0])
found["hooks"] = all(torch.allclose(p.grad, 2 * total(p, 1)) for p in own)

# Types and layouts
averager = Averager(group, sizes=TINY)
own = (*parameters((4, 3, 2, 2), (6,)), *parameters((7,), (3, 3), dtype=torch.complex128),
       *parameters((9,), (300,), dtype=torch.bfloat16), *parameters((2,), dtype=torch.float32))
own[0].data = own[0].data.to(memory_format=torch.channels_last)
conjugated = own_gradient(own[2]).conj()
for step in range(2):
    for parameter in own:
        parameter.grad = own_gradient(parameter, step)
    said = averager.reduce([own], [300.0], [0.0])
found["kinds"] = [
    torch.allclose(p.grad, total(p, 1), rtol=1e-6, atol=0.05 if p.dtype == torch.bfloat16 else 1e-6)
    and p.grad.stride() == p.stride() and p.grad.dtype == p.dtype for p in own
]
own[2].grad = conjugated
averager.reduce([own], [300.0])
found["conjugated"] = torch.allclose(own[2].grad, total(own[2]).conj())

# In half precision counts are exact, by a message of their own
own = parameters((3,), (4,), dtype=torch.bfloat16)
averager = Averager(group)
own[0].grad = torch.ones(3, dtype=torch.bfloat16)
said = averager.reduce([own], [257.0], [0.0, 1.0])
found["half"] = (said.weights, said.votes, averager.messages, own[0].grad.tolist(), own[1].grad)

# Weights and votes as tensors; several optimizers at once; frozen parameters
averager = Averager(group)
first, second, frozen = parameters((3,), (4,)), parameters((5,)), parameters((2,), (2,))
for parameter in frozen:
    parameter.requires_grad_(False)
for parameter in (*first, *second):
    parameter.grad = own_gradient(parameter)
said = averager.reduce([first, second, frozen], [torch.tensor(2.0), torch.tensor([3.0]), 1], torch.tensor([0.0, 1.0]))
found["tensors"] = (said.weights, said.votes, close((*first, *second)), averager.messages, frozen[0].grad)

# Parameters that are unfrozen, frozen, added to a group
averager, own = Averager(group, sizes=TINY), parameters((20,), (3,), (20,))
own[1].requires_grad_(False)
oks, messages = [], []
for step in range(8):
    if step == 2:
        own[1].requires_grad_(True)
    if step == 4:
        own[0].requires_grad_(False)
    if step == 6:
        own = (*own, *parameters((8,)))
    for parameter in own:
        parameter.grad = None
    trained = [parameter for parameter in own if parameter.requires_grad]
    sent = averager.messages
    with averager.watching([own]):
        backward(trained, step)
    averager.finish([1.0])
    oks.append(close(trained, step) and all(p.grad is None for p in own if not p.requires_grad))
    messages.append(averager.messages - sent)
found["unfrozen"], found["messages"] = oks, messages

# A gradient that was there before its parameter was frozen, in one process or in all
for whose in (0, None):
    own[1].requires_grad_(False)
    for parameter in own:
        parameter.grad = own_gradient(parameter) if parameter is not own[1] or whose in (None, rank) else None
    averager.reduce([own], [1.0])
    expected = total(own[1]) if whose is None else own_gradient(own[1], of=0)
    found[f"left {whose}"] = close([own[0], *own[2:]]) and torch.allclose(own[1].grad, expected)

# Disagreement, one process alone or all
names = {}
averager, own = Averager(group, names.get, sizes=TINY), parameters((20,), (3,), (20,))
names.update(zip(own, ("a.weight", "a.bias", "b.weight")))
for step in range(2):
    for parameter in own:
        parameter.grad = own_gradient(parameter)
    averager.reduce([own], [1.0])
own[1].requires_grad_(rank != 1)
if rank == 1:
    own[1].grad = None
for parameter in own:
    parameter.grad = own_gradient(parameter) if parameter.requires_grad else None
grads = [parameter.grad for parameter in own]
found["one froze"] = message(lambda: averager.reduce([own], [1.0]))
found["unchanged"] = all(p.grad is gradient for p, gradient in zip(own, grads))
own[1].requires_grad_(True)
found["agreed again"] = message(lambda: averager.reduce([own], [1.0]))
averager, own = Averager(group), parameters((20,), (3 + rank,))
found["shapes"] = message(lambda: averager.reduce([own], [1.0]))
averager, first, second = Averager(group), parameters((3,)), parameters((3,))
averager.reduce([first], [1.0])
averager.reduce([second], [1.0])
found["optimizers"] = message(lambda: averager.reduce([second if rank else first], [1.0]))

# What cannot be sent
table = nn.Embedding(10, 3, sparse=True)
averager = Averager(group, lambda parameter: "table.weight")
if rank == 0:
    table(torch.tensor([1])).sum().backward()
found["sparse"] = message(lambda: averager.reduce([(table.weight,)], [1.0]))
found["sparse again"] = message(lambda: averager.reduce([(table.weight,)], [1.0]))

own = parameters((20,), (3,), (20,))
averager = Averager(group, sizes=TINY)
averager.reduce([own], [1.0])
inputs = torch.ones(20, dtype=torch.float64, requires_grad=True)


def twice():
    def part(x):
        return x * own[2]
    y = torch.utils.checkpoint.checkpoint(part, inputs, use_reentrant=True)
    y = torch.utils.checkpoint.checkpoint(part, y, use_reentrant=True)
    with averager.watching([own]):
        (y.sum() + own[0].sum() + own[1].sum()).backward()


found["twice"] = message(twice)
found["after"] = message(lambda: averager.reduce([own], [1.0]))

# An error in the middle of a pass
averager = Averager(group, sizes=TINY)
own = parameters((20,), (3,), (20,))
averager.reduce([own], [1.0])


def fail():
    with averager.watching([own]):
        own[0].register_hook(lambda gradient: 1 / 0)
        y = own[0] * 2
        backward([y, *own[1:]])


found["failed"] = message(fail)
sent = averager._next
found["after failing"] = (sent, message(lambda: averager.reduce([own], [1.0])))

report(found=found)
'''


@pytest.fixture(scope="module", params=SIZES)
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What the processes have found."""
    return [report["found"] for report in run(CASES, request.param).reports]


@pytest.mark.slow
def test_gradients_weights_and_votes_are_summed_and_sent_while_the_pass_runs(found: list[dict[str, Any]]) -> None:
    size = len(found)
    weight, ranks = size * (size + 1) / 2, size * (size - 1) / 2
    for of in found:
        buckets = of["buckets"]
        assert buckets == 2
        for number, (close, sent_meanwhile, messages, weights, votes) in enumerate(of["rows"]):
            assert close
            assert sent_meanwhile == (buckets - 1 if number else 0)  # the first time the buckets are agreed upon
            assert messages == (number + 1) * buckets
            assert weights == [weight]
            assert votes == [size, 0, ranks, 0]


@pytest.mark.slow
def test_what_somebody_holds_of_a_gradient_is_not_changed_by_the_sum(found: list[dict[str, Any]]) -> None:
    assert all(of["held"] and of["local"] for of in found)


@pytest.mark.slow
def test_a_gradient_that_no_process_has_stays_none_and_one_of_a_single_process_reaches_all(
    found: list[dict[str, Any]],
) -> None:
    for of in found:
        assert of["unused whole"] == of["unused tiny"] == [(None, None, True, True)] * 3


@pytest.mark.slow
def test_what_was_there_before_the_pass_is_in_the_sum(found: list[dict[str, Any]]) -> None:
    assert all(of["before"] == [True] * 3 for of in found)


@pytest.mark.slow
def test_a_hook_of_somebody_else_has_changed_a_gradient_before_it_is_sent(found: list[dict[str, Any]]) -> None:
    assert all(of["hooks"] for of in found)


@pytest.mark.slow
def test_parameters_of_other_types_and_layouts_get_gradients_of_theirs(found: list[dict[str, Any]]) -> None:
    assert all(all(of["kinds"]) and of["conjugated"] for of in found)


@pytest.mark.slow
def test_counts_are_exact_beside_gradients_of_half_precision(found: list[dict[str, Any]]) -> None:
    size = len(found)
    for of in found:
        assert of["half"] == ([257.0 * size], [0.0, size], 2, [size] * 3, None)


@pytest.mark.slow
def test_several_optimizers_are_sent_at_once_also_one_that_is_frozen(found: list[dict[str, Any]]) -> None:
    size = len(found)
    for of in found:
        assert of["tensors"] == ([2.0 * size, 3.0 * size, size], [0.0, size], True, 3, None)


@pytest.mark.slow
def test_parameters_that_are_unfrozen_frozen_or_added_take_part_from_the_same_step_on(
    found: list[dict[str, Any]],
) -> None:
    for of in found:
        assert of["unfrozen"] == [True] * 8
        assert of["messages"] == [2, 2, 4, 2, 4, 2, 4, 2]  # a second time where the processes have agreed anew


@pytest.mark.slow
def test_a_gradient_from_before_its_parameter_was_frozen_is_in_the_sum(found: list[dict[str, Any]]) -> None:
    assert all(of["left 0"] and of["left None"] for of in found)


@pytest.mark.slow
def test_processes_that_train_different_parameters_are_told_which(found: list[dict[str, Any]]) -> None:
    others = [rank for rank in range(len(found)) if rank != 1]
    for of in found:
        assert of["one froze"].startswith(
            "OptimizerError: the processes train different parameters: 'a.bias' is trained by the processes "
            f"{others} and not by [1]. Expected"
        )
        assert of["unchanged"]
        assert of["agreed again"] is None
        assert (
            "'parameter 1' differs: shape (3,), torch.float64 in process 0, shape (4,), torch.float64 in"
            in (of["shapes"])
        )
    assert any("updates the optimizer of 'parameter 0' and another process one of" in of["optimizers"] for of in found)


@pytest.mark.slow
def test_a_sparse_gradient_of_one_process_is_refused_by_name_on_all(found: list[dict[str, Any]]) -> None:
    for of in found:
        assert of["sparse"] == of["sparse again"]
        assert of["sparse"].startswith("LossError: the gradient of 'table.weight' is sparse")
        assert "nn.Embedding(..., sparse=False)" in of["sparse"]
        assert of["sparse"].endswith("(process 0)")


@pytest.mark.slow
def test_a_gradient_that_changes_after_it_was_sent_is_an_error(found: list[dict[str, Any]]) -> None:
    assert all("use_reentrant=False" in of["twice"] for of in found)


@pytest.mark.slow
def test_after_a_pass_that_failed_half_sent_nothing_is_sent(found: list[dict[str, Any]]) -> None:
    for of in found:
        assert of["failed"].startswith("ZeroDivisionError")
        sent, told = of["after failing"]
        assert sent
        assert "start all processes again, from the last checkpoint" in told
        assert "start all processes again, from the last checkpoint" in of["after"]
