from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from fluxloop import Learner
from fluxloop.callbacks.lr_scheduler import LRScheduler
from fluxloop.callbacks.torch_schedulers import advance, mentioned, says_mode
from fluxloop.errors import CheckpointError
from fluxloop.testing import toy_learner
from toys import through_a_file

sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def learner_of(callback: LRScheduler, optimizer: Any = sgd) -> Learner:
    return toy_learner(callback, num_batches=3, optimizer=optimizer)


def scheduler_of(learner: Learner) -> LRScheduler:
    found = learner.get_callback(LRScheduler)
    assert found is not None
    return found


def chained(optimizer: Optimizer) -> Any:
    return ChainedScheduler([ConstantLR(optimizer, total_iters=3), ExponentialLR(optimizer, gamma=0.9)])


one_cycle = partial(OneCycleLR, max_lr=0.1, total_steps=16)


def fading(step: int, total: int) -> float:
    return max(0.1, 1 - step / total)


def fades(total: int) -> Callable[[int], float]:
    return lambda step: max(0.1, 1 - step / total)


def halve(step: int) -> float:
    return 0.5


def test_the_names_in_a_factory_are_those_of_its_class_or_its_code() -> None:
    assert mentioned(partial(partial(StepLR, step_size=2), gamma=0.5)) == {"StepLR"}
    assert "ReduceLROnPlateau" in mentioned(lambda optimizer: ReduceLROnPlateau(optimizer))
    assert mentioned(7) == {""}


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (ReduceLROnPlateau, False),
        (partial(ReduceLROnPlateau, patience=3), False),
        (partial(ReduceLROnPlateau, mode="max"), True),
        (partial(partial(ReduceLROnPlateau, mode="max"), patience=3), True),
        (lambda optimizer: ReduceLROnPlateau(optimizer, patience=3), False),
        (lambda optimizer: ReduceLROnPlateau(optimizer, mode="max"), True),
        (lambda optimizer: ReduceLROnPlateau(optimizer, **{"mode": "max"}), True),
    ],
)
def test_a_mode_is_seen_in_the_arguments_and_in_the_code(factory: Any, said: bool) -> None:
    assert says_mode(factory) is said


def test_a_scheduler_moves_without_a_warning_and_leaves_the_optimizer_its_own_step() -> None:
    optimizer = sgd(nn.Linear(2, 2).parameters())
    scheduler = StepLR(optimizer, 1)
    vars(optimizer).pop("step")
    advance(scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            partial(StepLR, step_size=2),
            partial(StepLR, step_size=2, gamma=0.5),
            r"StepLR was made with gamma=0.1, now gamma=0.5\.",
        ),
        (partial(CosineAnnealingLR, T_max=5), partial(CosineAnnealingLR, T_max=9), "T_max=5, now T_max=9"),
        (
            partial(MultiStepLR, milestones=[2]),
            partial(MultiStepLR, milestones=[3]),
            "milestones.2=1, now milestones.2=None",
        ),
        (
            one_cycle,
            partial(OneCycleLR, max_lr=0.2, total_steps=16),
            "max_lr=0.1, now .*max_lr=0.2",
        ),
        (
            one_cycle,
            partial(OneCycleLR, max_lr=0.1, total_steps=40),
            "total_steps=16, now total_steps=40",
        ),
        (
            chained,
            lambda o: ChainedScheduler([ConstantLR(o, total_iters=4), ExponentialLR(o, 0.9)]),
            r"\[0\].total_iters=3, now",
        ),
        (partial(StepLR, step_size=2), partial(ExponentialLR, gamma=0.9), "is a StepLR, this one a ExponentialLR"),
        (
            partial(LambdaLR, lr_lambda=partial(fading, total=8)),
            partial(LambdaLR, lr_lambda=partial(fading, total=80)),
            r"made with lr_lambdas\[0\].total=8, now lr_lambdas\[0\].total=80",
        ),
        (
            lambda o: LambdaLR(o, fades(8)),
            lambda o: LambdaLR(o, fades(80)),
            r"made with lr_lambdas\[0\].total=8, now lr_lambdas\[0\].total=80",
        ),
        (
            lambda o: SequentialLR(o, [LambdaLR(o, fades(3)), MultiplicativeLR(o, fades(8))], [2]),
            lambda o: SequentialLR(o, [LambdaLR(o, fades(3)), MultiplicativeLR(o, fades(80))], [2]),
            r"made with _schedulers\[1\].lr_lambdas\[0\].total=8, now _schedulers",
        ),
        (
            partial(LambdaLR, lr_lambda=partial(fading, total=8)),
            partial(LambdaLR, lr_lambda=halve),
            r"lr_lambdas\[0\]='fading', now lr_lambdas\[0\]='halve'",
        ),
    ],
)
def test_going_on_with_other_arguments_is_an_error_that_names_them(old: Any, new: Any, message: str) -> None:
    first, second = learner_of(LRScheduler(old)), learner_of(LRScheduler(new))
    first.fit(2)
    before = copy.deepcopy(scheduler_of(second).state_dict())
    with pytest.raises(CheckpointError, match=message):
        scheduler_of(second).load_state_dict(through_a_file(scheduler_of(first).state_dict()))
    assert scheduler_of(second).state_dict() == before


def test_functions_with_the_same_arguments_go_on_and_an_older_file_says_nothing_of_them() -> None:
    first, second = (learner_of(LRScheduler(partial(LambdaLR, lr_lambda=partial(fading, total=8)))) for _ in range(2))
    first.fit(2)
    state = through_a_file(scheduler_of(first).state_dict())
    scheduler_of(second).load_state_dict(state)
    for kept in state["schedulers"]:
        del kept["functions"]
    scheduler_of(second).load_state_dict(state)


def test_another_learning_rate_of_the_optimizer_is_named_too() -> None:
    factory = partial(StepLR, step_size=2)
    first = learner_of(LRScheduler(factory))
    second = learner_of(LRScheduler(factory), optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9))
    with pytest.raises(CheckpointError, match=r"base_lrs\[0\]=0.01, now base_lrs\[0\]=0.5"):
        scheduler_of(second).load_state_dict(scheduler_of(first).state_dict())


def test_a_scheduler_of_ones_own_keeps_its_numbers_and_leaves_its_functions_to_the_script() -> None:
    class Mine(lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Optimizer, function: Any) -> None:
            self.function, self.calls = function, Counter({"all": 0})
            super().__init__(optimizer)

        def get_lr(self) -> Any:
            self.calls["all"] += 1
            return [self.function(self.last_epoch) for _ in self.base_lrs]

    def factory(optimizer: Optimizer) -> Mine:
        return Mine(optimizer, lambda t: 0.01 / (t + 1))

    first, second = learner_of(LRScheduler(factory)), learner_of(LRScheduler(factory))
    first.fit(2)
    scheduler_of(second).load_state_dict(through_a_file(scheduler_of(first).state_dict()))
    mine = scheduler_of(second).schedulers[None]
    assert (mine.calls, mine.last_epoch, mine.function(1)) == (Counter({"all": 3}), 2, 0.005)


def test_what_no_checkpoint_can_keep_is_an_error_that_names_it() -> None:
    class Holder(StepLR):
        def __init__(self, optimizer: Optimizer) -> None:
            self.module = object()
            super().__init__(optimizer, 1)

    with pytest.raises(CheckpointError, match=r"Holder\['module'\] is a object, which cannot be kept in a checkpoint"):
        learner_of(LRScheduler(Holder))
