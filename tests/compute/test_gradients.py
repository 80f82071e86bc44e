from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fluxloop.compute import gradients
from fluxloop.compute.gradients import add_gradients


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 12).reshape(4, 3)).square().mean()


@pytest.fixture(params=["engine", "without private names"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "engine":
        monkeypatch.setattr(gradients, "_engine", None)


@pytest.mark.usefixtures("either_way")
def test_gradients_are_those_of_torch_and_are_added_up() -> None:
    ours, theirs = network(), network()
    for _ in range(2):
        add_gradients(loss_of(ours), None)
        loss_of(theirs).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.usefixtures("either_way")
def test_a_loss_of_one_element_and_half_precision_has_torchs_gradients() -> None:
    for shape, dtype in [((1,), torch.float32), ((1, 1), torch.float64), ((), torch.bfloat16)]:
        ours, theirs = (torch.full(shape, 2.0, dtype=dtype, requires_grad=True) for _ in range(2))
        add_gradients(ours * ours, None)
        (theirs * theirs).backward()
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad.dtype is dtype


@pytest.mark.usefixtures("either_way")
def test_only_the_parameters_asked_for_get_gradients() -> None:
    model = network()
    add_gradients(loss_of(model), list(model[2].parameters()))
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    with pytest.raises(RuntimeError, match="cannot be empty"):
        add_gradients(loss_of(model), [])


@pytest.mark.usefixtures("either_way")
def test_a_graph_is_kept_where_that_is_asked_for() -> None:
    model = network()
    loss = loss_of(model)
    add_gradients(loss, None, retain_graph=True)
    add_gradients(loss, None)
    with pytest.raises(RuntimeError, match="second time"):
        add_gradients(loss, None)


@pytest.mark.usefixtures("either_way")
def test_hooks_of_tensors_and_parameters_run() -> None:
    model, seen = network(), []
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    model[2].bias.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    loss = loss_of(model)
    loss.register_hook(lambda gradient: seen.append(gradient.clone()))
    add_gradients(loss, None)
    reference = network()
    loss_of(reference).backward()
    assert torch.equal(model[0].weight.grad, 2 * reference[0].weight.grad)
    assert torch.equal(seen[0], torch.ones(()))
    assert torch.equal(seen[1], reference[2].bias.grad)


told = pytest.mark.skipif(
    "handle_torch_function" not in inspect.getsource(torch.autograd.backward),
    reason="torch 2.10 tells a mode or a subclass of Tensor.backward alone",
)


@told
def test_a_torch_function_mode_hears_of_the_backward() -> None:
    heard: list[Any] = []

    class Listen(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(function)
            return function(*args, **(kwargs or {}))

    loss = loss_of(network())
    with Listen():
        add_gradients(loss, None)
    assert torch.autograd.backward in heard


@told
def test_a_loss_of_a_subclass_is_asked_first() -> None:
    heard: list[Any] = []

    class Marked(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    model = network()
    add_gradients(loss_of(model).as_subclass(Marked), None)
    assert torch.autograd.backward in heard
    assert model[0].weight.grad is not None


def test_a_backward_that_somebody_put_in_torchs_place_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = torch.autograd.backward, []
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **kw: (calls.append(1), original(*args, **kw)))
    model = network()
    add_gradients(loss_of(model), None)
    assert calls == [1]
    assert model[0].weight.grad is not None


def test_a_backward_inside_a_transform_is_refused_as_by_torch() -> None:
    def inside(xs: Tensor) -> Tensor:
        add_gradients(network()(torch.ones(1, 3)).sum(), None)
        return xs.sum()

    with pytest.raises(RuntimeError, match="functorch transform"):
        torch.func.grad(inside)(torch.ones(2))
