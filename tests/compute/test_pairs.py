"""An average is moved as by names found anew in each step, whatever happens to the two modules in between."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fluxloop import ModelError
from fluxloop.compute.models import move_towards
from fluxloop.compute.pairs import Pairs


def modules() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    live = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    average = copy.deepcopy(live).requires_grad_(False)
    for parameter in live.parameters():
        parameter.data += torch.randn_like(parameter)
    live(torch.randn(8, 3))
    return average, live


def replace_a_parameter(average: nn.Module, live: nn.Module) -> None:
    live[0].weight = nn.Parameter(torch.full((4, 3), 5.0))


def replace_a_part(average: nn.Module, live: nn.Module) -> None:
    live[2] = nn.Linear(4, 2)


def replace_the_dict_of_parameters(average: nn.Module, live: nn.Module) -> None:
    live[0]._parameters = {name: nn.Parameter(2 * p) for name, p in live[0]._parameters.items() if p is not None}


def add_a_part(average: nn.Module, live: nn.Module) -> None:
    for module in (average, live):
        module.append(nn.Linear(2, 2))


def change_the_type(average: nn.Module, live: nn.Module) -> None:
    live.double()


def change_both_types(average: nn.Module, live: nn.Module) -> None:
    average.double()
    live.bfloat16()


def exchange_storage(average: nn.Module, live: nn.Module) -> None:
    live[0].weight.data = torch.full((4, 3), 7.0)


def replace_a_buffer(average: nn.Module, live: nn.Module) -> None:
    live[1].running_mean = torch.full((4,), 3.0)


CHANGES: list[Callable[[nn.Module, nn.Module], None]] = [
    replace_a_parameter,
    replace_a_part,
    replace_the_dict_of_parameters,
    add_a_part,
    change_the_type,
    change_both_types,
    exchange_storage,
    replace_a_buffer,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("buffers", [0.0, 0.25, 1.0])
def test_what_changes_between_two_steps_is_seen(change: Callable[[nn.Module, nn.Module], None], buffers: float) -> None:
    pairs, (average, live) = Pairs(), modules()
    expected, same_live = copy.deepcopy((average, live))
    for modified in (None, change, None):
        if modified is not None:
            torch.manual_seed(1)
            modified(average, live)
            torch.manual_seed(1)
            modified(expected, same_live)
        pairs.move(average, live, 0.25, buffers, "a test")
        move_towards(expected, same_live, 0.25, buffers, "a test")
    assert average.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
        assert tensor.dtype == expected.state_dict()[name].dtype


def test_buffers_may_be_moved_from_some_step_on() -> None:
    pairs, (average, live) = Pairs(), modules()
    before = average[1].running_mean.clone()
    pairs.move(average, live, 0.5, 0.0, "a test")
    assert torch.equal(average[1].running_mean, before)
    pairs.move(average, live, 0.5, 1.0, "a test")
    assert torch.equal(average[1].running_mean, live[1].running_mean)
    assert average[1].num_batches_tracked == 1


def test_other_modules_are_other_pairs_and_a_copy_knows_none() -> None:
    pairs, first, second = Pairs(), modules(), modules()
    for average, live in (first, second, first):
        pairs.move(average, live, 1.0, 1.0, "a test")
        assert all(map(torch.equal, average.state_dict().values(), live.state_dict().values()))
    copied, (average, live) = copy.deepcopy((pairs, first))
    before = [parameter.clone() for parameter in first[0].parameters()]
    live[0].weight.data.fill_(1.0)
    copied.move(average, live, 0.5, 0.0, "a test")
    assert all(map(torch.equal, before, first[0].parameters()))


def test_a_parameter_that_one_of_the_two_gets_later_is_an_error_that_names_it() -> None:
    pairs, (average, live) = Pairs(), modules()
    pairs.move(average, live, 0.5, 0.0, "EMA")
    live.append(nn.Linear(2, 2))
    before = [parameter.clone() for parameter in average.parameters()]
    for _ in range(2):
        with pytest.raises(ModelError, match=r"EMA cannot average \['3.bias', '3.weight'\]"):
            pairs.move(average, live, 0.5, 0.0, "EMA")
    assert all(map(torch.equal, before, average.parameters()))
