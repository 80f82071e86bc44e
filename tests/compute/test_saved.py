from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from fluxloop.compute.saved import save_optimizer, save_options


def trained(**options: Any) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters(), **options)
    train(optimizer)
    return optimizer


def train(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def copied(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def test_a_saved_optimizer_is_set_again_to_the_bit() -> None:
    optimizer = trained(lr=0.1)
    before, restore = copied(optimizer), save_optimizer(optimizer)
    averages = [entries["exp_avg"] for entries in optimizer.state.values()]
    optimizer.param_groups[0].update(lr=0.5, added=1)
    train(optimizer)
    restore()
    assert same_bits(optimizer.state_dict(), before)
    now = [entries["exp_avg"] for entries in optimizer.state.values()]
    assert all(each is average for each, average in zip(now, averages, strict=True))


def test_state_that_came_later_is_gone_again() -> None:
    optimizer = torch.optim.Adam(nn.Linear(2, 3).parameters())
    restore = save_optimizer(optimizer)
    train(optimizer)
    restore()
    assert optimizer.state == {}


def test_saved_options_leave_the_state_alone() -> None:
    optimizer = trained(lr=0.1)
    restore = save_options(optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    train(optimizer)
    state = copied(optimizer)["state"]
    restore()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert same_bits(optimizer.state_dict()["state"], state)


def test_a_learning_rate_that_is_a_tensor_stays_the_same_object() -> None:
    rate = torch.tensor(0.1)
    optimizer = trained(lr=rate)
    held = optimizer.param_groups[0]["lr"]
    restore = save_options(optimizer)
    held.fill_(0.5)
    restore()
    assert optimizer.param_groups[0]["lr"] is held
    assert held == torch.tensor(0.1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_scheduler_of_torch_puts_around_step_is_taken_away_again(wrapped: bool) -> None:
    optimizer = trained(lr=0.1)
    if wrapped:
        StepLR(optimizer, 1)
    before = vars(optimizer).get("step")
    restore = save_options(optimizer)
    StepLR(optimizer, 1)
    restore()
    assert vars(optimizer).get("step") is before
    assert ("initial_lr" in optimizer.param_groups[0]) is wrapped
