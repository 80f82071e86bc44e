"""Everything that a description of what a graph rests on finds is found by a glance."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from attrs import define
from compiled_training import learner, learner_of, rows
from torch import Tensor, nn
from torch.nn import functional

import fluxloop
from fluxloop import Accelerator, Learner, TrainingPhase, runepoch
from fluxloop.compile.conditions import rests_on, states_of
from fluxloop.compile.glance import Glance, NotPlainError

pytestmark = pytest.mark.usefixtures("imported", "uncompiled")


@define
class Slotted:
    """Has no dict."""

    number: float = 1.0


class Weighing:
    """A loss function by way of a method."""

    def __init__(self) -> None:
        self.weight = 1.0

    def loss(self, preds: Tensor, ys: Tensor) -> Tensor:
        return functional.cross_entropy(preds, ys) * self.weight


class Net(nn.Module):
    """Holds much of what a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.norm = nn.Linear(6, 3), nn.LeakyReLU(0.1), nn.BatchNorm1d(3)
        self.config = SimpleNamespace(scale=1.0, inner=SimpleNamespace(deep=1))
        self.sizes, self.table, self.pair = [1, 2], {"a": [1]}, (1, [2])
        self.slotted, self.array, self.names = Slotted(), numpy.zeros(3), {"x"}
        self.function: Any = partial(torch.mul, other=2)
        self.tensor = torch.zeros(2)

    def forward(self, xs: Tensor) -> Tensor:
        out: Tensor = self.norm(self.act(self.layer(xs)))
        return out


class Phase(TrainingPhase):
    """Holds a module, and a phase."""

    def __init__(self) -> None:
        self.head, self.inner = nn.Linear(1, 1), TrainingPhase()
        self.steps = 0

    def finish(self, learner: Any, state: Any) -> None:
        self.steps += 1


def trained(loss_fn: Any = None) -> tuple[Learner[Any], Phase]:
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    made = learner_of(Net(), loss_fn or Weighing().loss, optimizer=momentum, accelerator=Accelerator("cpu"))
    phase = Phase()
    made.fit(1, phases=[phase])
    return made, phase


def replace_weight(made: Any) -> None:
    made.model.layer.weight = nn.Parameter(made.model.layer.weight.detach().clone())


def move_parameter(made: Any) -> None:
    group = made.optimizer.param_groups[0]
    group["params"] = group["params"][::-1]


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "an attribute": lambda made, phase: setattr(made.model.act, "negative_slope", 0.5),
    "a new attribute": lambda made, phase: setattr(made.model, "new", 1),
    "an attribute that goes": lambda made, phase: delattr(made.model, "names"),
    "a mode": lambda made, phase: made.model.norm.eval(),
    "a part": lambda made, phase: setattr(made.model, "act", nn.Tanh()),
    "a new part": lambda made, phase: made.model.add_module("more", nn.Tanh()),
    "a class": lambda made, phase: setattr(made.model.act, "__class__", nn.Identity),
    "an object's number": lambda made, phase: setattr(made.model.config, "scale", 2.0),
    "an inner object's number": lambda made, phase: setattr(made.model.config.inner, "deep", 2),
    "a list": lambda made, phase: made.model.sizes.append(3),
    "an item": lambda made, phase: made.model.sizes.__setitem__(0, 7),
    "a dict's list": lambda made, phase: made.model.table["a"].append(2),
    "a tuple's list": lambda made, phase: made.model.pair[1].append(2),
    "a slot": lambda made, phase: setattr(made.model.slotted, "number", 2.0),
    "an array": lambda made, phase: made.model.array.fill(1),
    "a set": lambda made, phase: made.model.names.add("y"),
    "a partial's argument": lambda made, phase: made.model.function.keywords.update(other=3),
    "a loss function": lambda made, phase: setattr(made, "loss_fn", functional.cross_entropy),
    "a method's object": lambda made, phase: setattr(made.loss_fn.__self__, "weight", 0.5),
    "a parameter": lambda made, phase: replace_weight(made),
    "a parameter's shape": lambda made, phase: setattr(made.model.layer.bias, "data", torch.zeros(1)),
    "a parameter's strides": lambda made, phase: setattr(
        made.model.layer.weight, "data", made.model.layer.weight.data.t().contiguous().t()
    ),
    "a frozen parameter": lambda made, phase: made.model.layer.bias.requires_grad_(False),
    "a type of numbers": lambda made, phase: made.model.double(),
    "a buffer": lambda made, phase: setattr(made.model.norm, "running_mean", torch.ones(3)),
    "a tensor that is no buffer": lambda made, phase: setattr(made.model, "tensor", torch.ones(2)),
    "a hook": lambda made, phase: made.model.act.register_forward_hook(lambda *_: None),
    "a hook of a parameter": lambda made, phase: made.model.layer.bias.register_hook(lambda grad: grad),
    "a hook after accumulation": lambda made, phase: made.model.layer.bias.register_post_accumulate_grad_hook(
        lambda parameter: None
    ),
    "a hook of an optimizer": lambda made, phase: made.optimizer.register_step_pre_hook(lambda *_: None),
    "a scheduler": lambda made, phase: torch.optim.lr_scheduler.StepLR(made.optimizer, 1),
    "a group": lambda made, phase: made.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
    "a group's parameters": lambda made, phase: move_parameter(made),
    "a loaded state": lambda made, phase: made.optimizer.load_state_dict(copy.deepcopy(made.optimizer.state_dict())),
    "a tensor of a state": lambda made, phase: made.optimizer.state[made.model.layer.bias].update(
        momentum_buffer=torch.ones(3)
    ),
    "a state that goes": lambda made, phase: made.optimizer.state.clear(),
    "a module of the phase": lambda made, phase: setattr(phase, "head", nn.Linear(1, 1)),
    "a new module of the phase": lambda made, phase: setattr(phase, "more", nn.Linear(1, 1)),
    "a module of its phase": lambda made, phase: setattr(phase.inner, "head", nn.Linear(1, 1)),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_description_finds_is_found(change: Callable[[Any, Any], object]) -> None:
    made, phase = trained()
    before, states, glance = rests_on(made, phase), states_of(made), Glance(made, phase)
    assert glance.shows_no_change(phase)
    change(made, phase)
    now = states_of(made)
    assert before != rests_on(made, phase) or any(now.get(name) != state for name, state in states.items())
    assert not glance.shows_no_change(phase)


def test_a_hook_on_all_modules_is_found() -> None:
    made, phase = trained()
    glance = Glance(made, phase)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not glance.shows_no_change(phase)
    finally:
        hook.remove()
    assert glance.shows_no_change(phase)


def test_steps_and_what_no_graph_rests_on_are_no_change() -> None:
    made, phase = trained()
    glance = Glance(made, phase)
    for slot in made.updates.slots:
        for group in slot.optimizer.param_groups:
            group["lr"] = 0.01  # an input of the graph
    with torch.no_grad():
        made.model.layer.weight.mul_(2)
    made.fit(1, phases=[phase])  # counts its steps
    assert glance.shows_no_change(phase)
    assert not glance.shows_no_change(Phase())


@pytest.mark.parametrize(
    "change",
    [
        lambda made, phase: setattr(phase, "model_view", "ema"),
        lambda made, phase: made.model.layer.register_forward_hook(lambda *_: None),
        lambda made, phase: setattr(made.model, "lazy", nn.LazyLinear(3)),
        lambda made, phase: made.optimizer.state.update({made.model.layer.bias: 3}),
    ],
    ids=["a view of the weights", "hooks", "lazy parameters", "an odd state"],
)
def test_where_no_glance_is_enough_there_is_none(change: Callable[[Any, Any], object]) -> None:
    made, phase = trained()
    change(made, phase)
    with pytest.raises(NotPlainError):
        Glance(made, phase)


def entered(call: Callable[[], object]) -> int:
    """Count the functions of fluxloop that a call enters."""
    folder, found = str(Path(fluxloop.__file__).parent), []

    def note(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            found.append(frame)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(found)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_compiled_step_in_a_loop_of_ones_own_enters_few_functions(optimizer: Any) -> None:
    made, phase = learner(optimizer=partial(optimizer, lr=0.01), default_callbacks=False), TrainingPhase()
    with runepoch(made, phase):
        counts = [entered(lambda: phase.step(made, rows())) for _ in range(6)]
    assert counts[-1] == counts[-2] <= 40
    described = max(counts[2:4])
    assert described > 100  # where everything was described


def test_a_loss_function_whose_attributes_are_a_dict_of_its_own_is_watched() -> None:
    def loss(preds: Tensor, ys: Tensor) -> Tensor:
        return functional.cross_entropy(preds, ys) * getattr(loss, "weight", 1.0)

    made, phase = trained(loss)
    glance = Glance(made, phase)
    loss.weight = 2.0  # type: ignore[attr-defined]  # that a function may have
    assert not glance.shows_no_change(phase)
