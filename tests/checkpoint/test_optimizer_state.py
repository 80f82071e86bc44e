from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from fluxloop import Callback, Checkpointer, CheckpointError, Learner, Phase, StepEnd, TensorBatches, on, runstep
from fluxloop.checkpoint.gathering import gather
from fluxloop.phase import AbstractTrainingPhase
from fluxloop.testing import toy_learner

XS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
ORDERS = [[0, 1, 2, 3, 4, 5], [2, 3, 0, 1, 4, 5], [5, 4, 3, 2, 1, 0]]


class Net(nn.Module):
    """Three layers, two of them of one shape, made in either order."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        for name in ("second", "first") if turned else ("first", "second"):
            generator = torch.Generator().manual_seed(len(name))
            layer = nn.Linear(4, 4)
            layer.weight.data = torch.randn(4, 4, generator=generator) / 2
            layer.bias.data.zero_()
            setattr(self, name, layer)
        self.head = nn.Linear(4, 1)
        nn.init.constant_(self.head.weight, 0.3)
        nn.init.zeros_(self.head.bias)

    def forward(self, xs: Tensor) -> Tensor:
        result: Tensor = self.head(self.second(self.first(xs).tanh()).tanh())
        return result


def learner(optimizer: Any, model: nn.Module | None = None, **options: Any) -> Learner[Any]:
    return Learner(
        Net() if model is None else model,
        nn.functional.mse_loss,
        data=(TensorBatches(XS, XS.sum(1, keepdim=True), batch_size=6, shuffle=True),),
        optimizer=optimizer,
        default_callbacks=False,
        seed=0,
        **options,
    )


def in_order(optimizer: Callable[..., Any], order: list[int], turned: bool = False) -> Learner[Any]:
    """Make a learner whose optimizer holds the parameters in an order of its own."""
    model = Net(turned)
    names = ["first.weight", "first.bias", "second.weight", "second.bias", "head.weight", "head.bias"]
    by_name = dict(model.named_parameters())
    return learner(optimizer([by_name[names[index]] for index in order]), model)


def weights(trained: Learner[Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sorted(trained.model.state_dict().items())}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def old_file(trained: Learner[Any]) -> dict[str, Any]:
    """Give a state as it was before parameters had names in it."""
    state = trained.state_dict()
    for kept in state["optimizers"].values():
        del kept["names"]
    return state


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.02, amsgrad=True),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.02, fused=True),
    "NAdam": partial(torch.optim.NAdam, lr=0.02),
}
if hasattr(torch.optim, "Adafactor"):  # new in torch 2.5
    OPTIMIZERS["Adafactor"] = torch.optim.Adafactor


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_to_the_parameter_of_its_name_whatever_the_order(name: str, tmp_path: Path) -> None:
    plain = in_order(OPTIMIZERS[name], ORDERS[0])
    plain.fit(2)
    plain.save(tmp_path / "state.pt")
    for order, turned in ((ORDERS[1], False), (ORDERS[2], True)):
        resumed = in_order(OPTIMIZERS[name], order, turned)
        resumed.fit(1)  # a learner that has trained is one too
        resumed.load(tmp_path / "state.pt")
        for parameter_name, parameter in plain.model.named_parameters():
            other = resumed.optimizer.state[resumed.model.get_parameter(parameter_name)]
            for entry, value in plain.optimizer.state[parameter].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[entry])), (parameter_name, entry)
        resumed.fit(1)
        after = weights(resumed)
        again = in_order(OPTIMIZERS[name], ORDERS[0])
        again.load(tmp_path / "state.pt")
        again.fit(1)
        assert_same(after, weights(again))


def test_layers_of_one_shape_that_are_made_in_another_order_keep_their_momentum() -> None:
    factory = OPTIMIZERS["SGD"]
    plain, turned = learner(factory), learner(factory, Net(turned=True))
    plain.fit(2)
    turned.load_state_dict(plain.state_dict())
    plain.fit(1)
    turned.fit(1)
    assert_same(weights(plain), weights(turned))


def groups(model: nn.Module, turned: bool) -> list[dict[str, Any]]:
    layers = {name: list(model.get_submodule(name).parameters()) for name in ("first", "second", "head")}
    fast = {"params": layers["first"] + layers["head"], "lr": 0.1, "momentum": 0.5}
    slow = {"params": layers["second"], "lr": 0.01}
    return [slow, fast] if turned else [fast, slow]


def test_groups_in_another_order_keep_their_options_and_a_schedule_goes_on() -> None:
    def make(turned: bool) -> Learner[Any]:
        model = Net()
        return learner(torch.optim.SGD(groups(model, turned), lr=1.0, momentum=0.9), model)

    plain, other = make(False), make(True)
    plain.fit(1)
    plain.optimizer.param_groups[0]["lr"] = 0.07  # as a schedule may have set it
    other.load_state_dict(plain.state_dict())
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.01, 0.07]
    assert [group["momentum"] for group in other.optimizer.param_groups] == [0.9, 0.5]
    plain.fit(1)
    other.fit(1)
    assert_same(weights(plain), weights(other))


def test_parameters_that_changed_groups_are_refused_by_name() -> None:
    def make(names: tuple[str, ...]) -> Learner[Any]:
        model = Net()
        inside = [p for name in names for p in model.get_submodule(name).parameters()]
        held = set(inside)
        rest = [p for p in model.parameters() if p not in held]
        return learner(torch.optim.SGD([{"params": inside}, {"params": rest, "lr": 0.1}], lr=0.01), model)

    kept = make(("first",)).state_dict()
    with pytest.raises(CheckpointError, match=r"in other groups: in the checkpoint 'second.weight', .* are one group"):
        make(("second",)).load_state_dict(kept)
    with pytest.raises(CheckpointError, match=r"has groups of \[6\] parameters, in the checkpoint of \[2, 4\]"):
        learner(torch.optim.SGD).load_state_dict(kept)
    del kept["optimizers"][""]["names"]
    with pytest.raises(CheckpointError, match=r"has groups of \[4, 2\] parameters, in the checkpoint of \[2, 4\]"):
        make(("first", "head")).load_state_dict(kept)


def test_a_file_that_names_no_parameters_is_read_by_their_places() -> None:
    plain, again = learner(OPTIMIZERS["Adam"]), learner(OPTIMIZERS["Adam"])
    plain.fit(2)
    again.load_state_dict(old_file(plain))
    plain.fit(1)
    again.fit(1)
    assert_same(weights(plain), weights(again))


def test_a_parameter_that_two_layers_share_is_found_by_either_name() -> None:
    def tied(turned: bool) -> nn.Module:
        model = nn.Module()
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 4, generator=generator))
        for name in ("out", "embed") if turned else ("embed", "out"):
            layer = nn.Linear(4, 4, bias=False)
            layer.weight = weight
            setattr(model, name, layer)
        model.head = nn.Linear(4, 1, bias=False)
        nn.init.constant_(model.head.weight, 0.2)
        model.forward = lambda xs: model.head(model.out(model.embed(xs).tanh()))  # type: ignore[method-assign]
        return model

    factory = OPTIMIZERS["SGD"]
    plain, turned = learner(factory, tied(False)), learner(factory, tied(True))
    plain.fit(1)
    turned.load_state_dict(plain.state_dict())
    plain.fit(1)
    turned.fit(1)
    assert torch.equal(plain.model.head.weight, turned.model.head.weight)
    assert torch.equal(plain.model.out.weight, turned.model.out.weight)


def test_gradients_that_wait_go_to_their_parameters_too(tmp_path: Path) -> None:
    class Waits(AbstractTrainingPhase):
        def __init__(self) -> None:
            self.n = 0

        def step(self, learner: Any, batch: Any) -> None:
            self.n += 1
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                state.loss = nn.functional.mse_loss(learner.model(state.xs), state.ys)
                learner.backward(state.loss)
                if self.n % 3 == 0:
                    learner.update()

    plain, other = in_order(OPTIMIZERS["SGD"], ORDERS[0]), in_order(OPTIMIZERS["SGD"], ORDERS[2], turned=True)
    phase = Waits()

    def look() -> None:
        if phase.n == 5 and not (tmp_path / "state.pt").exists():
            plain.save(tmp_path / "state.pt")

    plain.at_safe_point(look)
    plain.fit(3, phases=[phase])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["updates"]["gradients"].keys() == dict(plain.model.named_parameters()).keys()
    other.fit(3, phases=[Waits()], resume=tmp_path / "state.pt")
    assert_same(weights(plain), weights(other))


def test_an_optimizer_whose_state_has_no_names_is_refused_in_another_order() -> None:
    class Wraps(torch.optim.SGD):
        """Keeps something in a form that nobody else knows."""

        def state_dict(self) -> dict[str, Any]:
            return {"inner": super().state_dict(), "count": 3}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict["inner"])

    factory = partial(Wraps, lr=0.05, momentum=0.9)
    plain, again = in_order(factory, ORDERS[0]), in_order(factory, ORDERS[0])
    plain.fit(1)
    again.load_state_dict(plain.state_dict())
    with pytest.raises(CheckpointError, match=r"in another order, and a Wraps keeps a state that does not tell them"):
        in_order(factory, ORDERS[1]).load_state_dict(plain.state_dict())
    plain.fit(1)
    again.fit(1)
    assert_same(weights(plain), weights(again))


# Options


def test_options_that_are_numbers_of_numpy_are_written_as_plain_ones(tmp_path: Path) -> None:
    rates = numpy.logspace(-3, -1, 3)
    options: Any = {"lr": rates[1], "weight_decay": numpy.float64(0.01), "eps": float(numpy.float32(1e-6))}
    factory = partial(torch.optim.AdamW, betas=(numpy.float64(0.8), numpy.float64(0.95)), **options)
    plain, again = learner(factory), learner(factory)
    plain.fit(1)
    plain.save(tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)["optimizers"][""]
    for held in (kept["defaults"], kept["state"]["param_groups"][0]):
        assert {type(held[name]) for name in ("lr", "weight_decay", "eps")} == {float}
        assert [type(beta) for beta in held["betas"]] == [float, float]
    again.fit(2, resume=tmp_path / "state.pt")
    plain.fit(1)
    assert_same(weights(plain), weights(again))
    with pytest.raises(CheckpointError, match=r"was made with lr=0.01, and now with lr=0.1"):
        learner(partial(factory, lr=rates[2])).fit(2, resume=tmp_path / "state.pt")


def test_an_option_of_another_kind_is_told() -> None:
    plain = learner(OPTIMIZERS["SGD"])
    plain.fit(1)
    for option, value, told in (
        ("lr", torch.tensor([0.1, 0.2]), "the option 'lr' of group 0 is a Tensor of shape"),
        ("lr", "fast", "the option 'lr' of group 0 is 'fast'"),
        ("momentum", float("nan"), "the option 'momentum' of group 0 is nan"),
        ("nesterov", [1], "the option 'nesterov' of group 0 is a list of length 1"),
    ):
        state = plain.state_dict()
        state["optimizers"][""]["state"]["param_groups"][0][option] = value
        with pytest.raises(CheckpointError, match=told):
            learner(OPTIMIZERS["SGD"]).load_state_dict(state)


def test_an_option_that_a_newer_torch_added_is_given_its_value_as_torch_does() -> None:
    plain = learner(OPTIMIZERS["Adam"])
    plain.fit(1)
    state = plain.state_dict()
    del state["optimizers"][""]["state"]["param_groups"][0]["fused"]
    learner(OPTIMIZERS["Adam"]).load_state_dict(state)
    del state["optimizers"][""]["state"]["param_groups"][0]["lr"]
    with pytest.raises(CheckpointError, match="the option 'lr' of group 0 is not in the checkpoint"):
        learner(OPTIMIZERS["Adam"]).load_state_dict(state)


# States


class Halves(torch.optim.Optimizer):
    """Keeps one number per row, and a list, as only it knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                rows = p.grad.reshape(len(p), -1).square().mean(1)
                state["rows"] = rows if "rows" not in state else 0.9 * state["rows"] + 0.1 * rows
                state.setdefault("norms", []).append(p.grad.norm())
                p -= group["lr"] * p.grad / (state["rows"].sqrt().reshape(-1, *[1] * (p.ndim - 1)) + 0.1)


def test_a_state_of_any_shape_that_the_optimizer_takes_goes_on() -> None:
    plain = in_order(Halves, ORDERS[0])
    plain.fit(2)
    for resumed in (in_order(Halves, ORDERS[0]), in_order(Halves, ORDERS[1], turned=True)):
        resumed.load_state_dict(plain.state_dict())
        resumed.fit(1)
        again = in_order(Halves, ORDERS[0])
        again.load_state_dict(plain.state_dict())
        again.fit(1)
        assert_same(weights(resumed), weights(again))


@pytest.mark.parametrize(
    ("entry", "value", "told"),
    [
        ("exp_avg", torch.zeros(4), r"'exp_avg' of 'first.weight' has shape \(4,\) in the checkpoint, expected \(4, 4"),
        ("exp_avg", torch.zeros(4, 4, 1), r"has shape \(4, 4, 1\) in the checkpoint, expected \(4, 4\)"),
        ("exp_avg_sq", torch.zeros(4, 4, dtype=torch.int64), "is of torch.int64 in the checkpoint, expected torch.fl"),
        ("exp_avg_sq", torch.zeros(4, 4, dtype=torch.float64), "is of torch.float64 in the checkpoint, expected"),
        ("exp_avg", 0.5, r"'exp_avg' of 'first.weight' is 0.5 in the checkpoint, expected a tensor"),
        ("step", torch.tensor(float("nan")), "'step' of 'first.weight' is nan in the checkpoint, expected a whole nu"),
        ("step", torch.tensor(-3.0), "'step' of 'first.weight' is -3.0 in the checkpoint"),
        ("step", torch.zeros(3), r"'step' of 'first.weight' is a Tensor of shape \(3,\) in the checkpoint"),
        ("step", "many", "'step' of 'first.weight' is 'many' in the checkpoint"),
        ("exp_avg", None, "'exp_avg' of 'first.weight' is None in the checkpoint, expected a tensor"),
    ],
)
def test_a_state_that_adam_would_not_make_is_told_before_anything_is_changed(entry: str, value: Any, told: str) -> None:
    plain, other = learner(OPTIMIZERS["Adam"]), learner(OPTIMIZERS["Adam"])
    plain.fit(1)
    state = plain.state_dict()
    state["optimizers"][""]["state"]["state"][0][entry] = value
    before = weights(other)
    with pytest.raises(CheckpointError, match=told):
        other.load_state_dict(state)
    assert_same(before, weights(other))
    assert not other.optimizer.state


def test_parameters_that_are_numbered_otherwise_are_told() -> None:
    plain = learner(OPTIMIZERS["Adam"])
    plain.fit(1)

    def changed(**parts: Any) -> dict[str, Any]:
        state = plain.state_dict()
        state["optimizers"][""]["state"] |= parts
        return state

    group = plain.state_dict()["optimizers"][""]["state"]["param_groups"][0]
    for state, told in (
        (changed(param_groups=[{**group, "params": [1, 0, 2, 3, 4, 5]}]), r"are numbered \[1, 0, 2, 3, 4, 5\]"),
        (changed(param_groups=[{"lr": 0.1}]), "'param_groups' in the checkpoint is no list of groups"),
        (changed(state={17: {}}), "has a state for parameter 17 of 6"),
        (changed(state=[1]), "'state' in the checkpoint is no dict of states"),
        (changed(more={}), "has the parts"),
    ):
        with pytest.raises(CheckpointError, match=told):
            learner(OPTIMIZERS["Adam"]).load_state_dict(state)


def test_a_group_that_was_added_while_training_is_matched_by_name() -> None:
    def make() -> Learner[Any]:
        model = Net()
        model.head.requires_grad_(False)
        made = learner(OPTIMIZERS["SGD"], model)
        model.head.requires_grad_(True)
        made.optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.2})
        return made

    plain, again = make(), make()
    plain.fit(1)
    again.load_state_dict(plain.state_dict())
    plain.fit(1)
    again.fit(1)
    assert_same(weights(plain), weights(again))


def test_what_is_kept_of_a_learner_names_its_parameters() -> None:
    state = gather(toy_learner(), None)
    assert state["optimizers"][""]["names"] == [["value"]]


# Where it meets other things


def two_optimizers(turned: bool = False) -> Learner[Any]:
    model = Net(turned)
    first = [*model.second.parameters(), *model.first.parameters()] if turned else list(model.first.parameters())
    if not turned:
        first += model.second.parameters()
    optimizers = {
        "body": torch.optim.Adam(first, lr=0.02),
        "head": torch.optim.SGD(model.head.parameters(), lr=0.05, momentum=0.9),
    }
    return learner(dict(reversed(optimizers.items())) if turned else optimizers, model)


def test_several_optimizers_in_another_order_go_on_also_in_a_copy() -> None:
    plain, turned = two_optimizers(), two_optimizers(turned=True)
    plain.fit(2)
    turned.load_state_dict(plain.state_dict())
    copied = copy.deepcopy(turned)
    for each in (plain, turned, copied):
        each.fit(1)
    assert_same(weights(plain), weights(turned))
    assert_same(weights(plain), weights(copied))


def test_a_frozen_part_keeps_its_state_for_when_it_is_thawed() -> None:
    plain, other = in_order(OPTIMIZERS["SGD"], ORDERS[0]), in_order(OPTIMIZERS["SGD"], ORDERS[1], turned=True)
    plain.fit(1)
    plain.model.first.requires_grad_(False)
    plain.fit(1)
    other.load_state_dict(plain.state_dict())
    assert not other.model.first.weight.requires_grad
    for each in (plain, other):
        each.model.first.requires_grad_(True)
        each.fit(1)
    assert_same(weights(plain), weights(other))


def test_a_retry_in_one_process_goes_on_from_the_file_whatever_was_trained_since(tmp_path: Path) -> None:
    class Fails(Callback):
        transient = ("left",)
        left = 6

        @on(StepEnd)
        def fail(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise ValueError("no more")

    plain = in_order(OPTIMIZERS["Adam"], ORDERS[0])
    plain.fit(3)
    callbacks = [Checkpointer(tmp_path), Fails()]
    retried = in_order(OPTIMIZERS["Adam"], ORDERS[0])
    retried.set_callbacks(callbacks)
    with pytest.raises(ValueError, match="no more"):
        retried.fit(3, resume=tmp_path)
    retried.fit(3, resume=tmp_path)
    assert_same(weights(plain), weights(retried))
    again = in_order(OPTIMIZERS["Adam"], ORDERS[2], turned=True)
    again.set_callbacks([Checkpointer(tmp_path), Fails()])
    again.fit(3, resume=tmp_path)  # nothing is left to train
    assert_same(weights(plain), weights(again))
