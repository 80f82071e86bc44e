"""Optimizers that are stepped one parameter after another, and those that cannot be."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop import Accelerator, Learner, OptimizerError, TensorBatches
from fluxloop.compute.apart import STEPPERS, Apart, require_apart
from fluxloop.testing import assert_same_bits


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


class Own(Optimizer):
    """An optimizer that nobody knows: it moves each parameter by what `move` returns."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.noted: Any = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # as most optimizers write it
        self.begin()
        for group in self.param_groups:
            self.begin_group(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * self.move(parameter, group))

    def begin(self) -> None:
        """Do what is done once in a step."""

    def begin_group(self, group: dict[str, Any]) -> None:
        """Do what is done once in a step for each group."""

    def move(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad


class Lion(Own):
    """Steps each parameter by itself."""

    def move(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
        moved = (0.9 * average + 0.1 * parameter.grad).sign()  # type: ignore[operator]  # there is one
        average.lerp_(parameter.grad, 0.01)
        return moved


class Counts(Own):
    """Counts its steps in its groups, as many libraries do."""

    def begin_group(self, group: dict[str, Any]) -> None:
        group["count"] = group.get("count", 0) + 1

    def move(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().move(parameter, group) / group["count"]


class Modes(Counts):
    """Has a train and an eval mode, and averages whose weights are counted in its groups."""

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    def eval(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = False

    def begin(self) -> None:
        if not self.param_groups[0].get("train_mode"):
            raise RuntimeError("not in train mode")


class GlobalNorm(Own):
    """Clips by the norm of all gradients."""

    def begin(self) -> None:
        every = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.factor = 1 / max(torch.stack([g.norm() for g in every]).norm().item(), 1.0) if every else 1.0

    def move(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().move(parameter, group) * self.factor


class FaintMean(Own):
    """Has a tiny share of the mean of all parameters in each."""

    def begin(self) -> None:
        every = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.share = 1e-9 * sum(g.square().sum() for g in every)

    def move(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().move(parameter, group) + self.share


class Tenth(Own):
    """Does something else in each tenth step, which it counts for itself."""

    def begin(self) -> None:
        self.noted += 1

    def move(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().move(parameter, group) * (0.0 if self.noted % 10 == 0 else 1.0)


class Noisy(Own):
    """Draws."""

    def move(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().move(parameter, group) + torch.randn_like(parameter)


class Shared(Own):
    """Keeps a number of all parameters in its state."""

    def begin(self) -> None:
        self.state["all"] = {"steps": self.state.get("all", {}).get("steps", 0) + 1}  # type: ignore[index]  # no tensor


class Closure(Own):
    """Needs a closure."""

    def begin(self) -> None:
        raise TypeError("this needs a closure")


def train(optimizer: Any, in_backward: bool, epochs: int = 3) -> Learner:
    generator = torch.Generator().manual_seed(1)
    data = TensorBatches(torch.randn(24, 4, generator=generator), torch.randn(24, 2, generator=generator), batch_size=8)
    learner = Learner(
        net(),
        nn.functional.mse_loss,
        data=(data,),
        optimizer=optimizer,
        accelerator=Accelerator("cpu", optimizer_in_backward=in_backward),
        default_callbacks=False,
        seed=0,
    )
    learner.fit(epochs)
    return learner


@pytest.mark.parametrize("optimizer", [Lion, Counts, Modes])
def test_an_unknown_optimizer_that_steps_each_parameter_by_itself_ends_with_the_bits_of_one_step_of_all(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxloop.compute.in_backward.TOGETHER", 1)
    apart, ordinary = train(optimizer, True), train(optimizer, False)
    assert_same_bits(apart, ordinary)
    options = [[{**group, "params": None} for group in each.optimizer.param_groups] for each in (apart, ordinary)]
    assert options[0] == options[1]
    assert options[0][0].get("count", 9) == 9


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (GlobalNorm, "weights differ"),
        (FaintMean, "weights differ"),
        (Tenth, "weights differ"),
        (Noisy, "weights differ"),
        (Shared, "states of all parameters together differ"),
        (Closure, "computes gradients by a closure"),
        (partial(torch.optim.Adam, differentiable=True), "is differentiable=True"),
        (torch.optim.LBFGS, "takes all parameters for one vector"),
    ],
)
def test_an_optimizer_that_steps_parameters_otherwise_alone_is_refused_by_name(optimizer: Any, why: str) -> None:
    made = optimizer(net().parameters())
    before = torch.get_rng_state()
    with pytest.raises(
        OptimizerError, match=f"the optimizer, {type(made).__name__}, .*{why}.*such as torch.optim.AdamW"
    ):
        require_apart(made, "the optimizer")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_attribute_that_counts_steps_is_told_of() -> None:
    class Twice(Own):
        def begin(self) -> None:
            self.noted += 1

    with pytest.raises(OptimizerError, match="values of its attribute 'noted' differ"):
        require_apart(Twice(net().parameters()), "the optimizer")


def test_to_try_an_optimizer_out_changes_neither_it_nor_its_parameters() -> None:
    model = net()
    made = Lion(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    weights, state = [p.detach().clone() for p in model.parameters()], [*map(id, made.state.values())]
    averages = [entries["average"].clone() for entries in made.state.values()]
    require_apart(made, "the optimizer")
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert [*map(id, made.state.values())] == state
    assert all(torch.equal(entries["average"], a) for entries, a in zip(made.state.values(), averages, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)


def test_what_torch_has_beside_lbfgs_is_known() -> None:
    there = {each for each in vars(torch.optim).values() if isinstance(each, type) and issubclass(each, Optimizer)}
    assert there - set(STEPPERS) == {torch.optim.Optimizer, torch.optim.LBFGS}


MATRICES = [each for each in STEPPERS if each.__name__ == "Muon"]
SPARSE = [torch.optim.SparseAdam]


@pytest.mark.parametrize("kind", STEPPERS, ids=lambda kind: kind.__name__)
def test_each_known_optimizer_steps_parameters_apart_as_it_steps_them_together(kind: Any) -> None:
    def run(apart: bool) -> list[Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(4, size)) for size in (3, 5, 2)]
        made = kind(parameters, lr=0.01)
        for number in range(5):
            torch.manual_seed(number)
            gradients = [torch.randn_like(parameter) for parameter in parameters]
            parts = Apart(made)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.to_sparse() if kind in SPARSE else gradient
                if apart:
                    parts.step({0: [parameter]}, lambda each: each.step())
                    parameter.grad = None
            parts.end(lambda each: each.step()) if apart else made.step()
        states = [made.state[p][name] for p in parameters for name in sorted(made.state[p])]
        return [*parameters, *(s for s in states if isinstance(s, Tensor))]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_an_error_in_a_part_of_a_step_leaves_the_groups_as_they_were() -> None:
    made = torch.optim.SGD(net().parameters(), lr=0.1)
    groups = made.param_groups
    parts = Apart(made)

    def fails(optimizer: Optimizer) -> None:
        assert len(optimizer.param_groups[0]["params"]) == 1
        raise KeyError("on the way")

    with pytest.raises(KeyError):
        parts.step({0: groups[0]["params"][:1]}, fails)
    assert made.param_groups is groups
    assert len(groups[0]["params"]) == 6
