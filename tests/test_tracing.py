from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fluxloop.compiled
from fluxloop import Accelerator, Callback, CompileError, Learner, TrainingPhase, UpdateBegin, on
from fluxloop.tracing import Traced, lift_constants


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fluxloop.compiled, "lower", lambda graph, inputs, device: graph)


def learner(model: nn.Module, **options: Any) -> Learner[Any]:
    xs, ys = torch.randn(32, 6), torch.randint(3, (32,))
    defaults: dict[str, Any] = {
        "data": ([(xs[:8], ys[:8]), (xs[8:16], ys[8:16]), (xs[16:24], ys[16:24])],),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "default_callbacks": False,
        "accelerator": Accelerator("cpu", compile="step"),
    }
    return Learner(model, functional.cross_entropy, **{**defaults, **options}, seed=0)


class Model(nn.Module):
    """Calls a function on itself and what its layer gives."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.function = function
        self.count, self.seen, self.last = 0, [], None  # type: ignore[var-annotated]  # what is put there is told

    def forward(self, xs: Tensor) -> Tensor:
        return self.function(self, self.layer(xs))


def item(model: Any, out: Tensor) -> Tensor:
    return out * 2 if out.mean().item() > 0 else out


def branch(model: Any, out: Tensor) -> Tensor:
    return out * 2 if out.mean() > 0 else out


def count(model: Any, out: Tensor) -> Tensor:
    model.count += 1
    return out


def keep(model: Any, out: Tensor) -> Tensor:
    model.last = out
    return out


def append(model: Any, out: Tensor) -> Tensor:
    model.seen.append(out.shape)
    return out


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (item, (r"\.item\(\)", "out.mean().item() > 0", "test_tracing.py, line")),
        (branch, ("if tensor", "out.mean() > 0")),
        (count, ("it changes Model.count", "finish(learner, state)")),
        (keep, ("it changes Model.last",)),
        (append, ("it changes Model.seen",)),
        (lambda model, out: out * random.random(), ("draws from Python's or NumPy's random numbers",)),
        (lambda model, out: out * float(numpy.random.rand()), ("draws from Python's or NumPy's random numbers",)),
    ],
    ids=["item", "if", "count", "keep", "append", "python random", "numpy random"],
)
def test_what_no_graph_can_hold_is_an_error_that_says_where_and_what_to_do(function: Any, words: Any) -> None:
    made = learner(Model(function))
    with pytest.raises(CompileError, match="cannot be one graph") as caught:
        made.fit(1)
    for word in words:
        assert word.replace("\\", "") in str(caught.value)
    assert made.model.layer.weight.grad_fn is None
    assert type(made.model.layer.weight) is nn.Parameter  # everything is as it was
    assert not isinstance(made.model.last, torch._subclasses.FakeTensor)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    "register",
    [
        lambda model: model.layer.register_forward_hook(lambda *_: None),
        lambda model: model.register_forward_pre_hook(lambda *_: None),
        lambda model: model.layer.register_full_backward_pre_hook(lambda module, gradients: gradients),
        lambda model: model.layer.weight.register_hook(lambda gradient: gradient * 2),
        lambda model: model.layer.weight.register_post_accumulate_grad_hook(lambda parameter: None),
    ],
    ids=["forward", "before forward", "backward", "gradient", "accumulated"],
)
def test_hooks_are_refused(register: Callable[[Any], Any]) -> None:
    model = Model(lambda model, out: out)
    register(model)
    with pytest.raises(CompileError, match="there are hooks on"):
        learner(model).fit(1)


def test_hooks_of_an_optimizer_are_refused() -> None:
    made = learner(Model(lambda model, out: out))
    made.optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(CompileError, match="the optimizer has step hooks"):
        made.fit(1)


class CountingSGD(torch.optim.SGD):
    """Keeps a number of its own in Python."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["steps"] = self.state[parameter].get("steps", 0) + 1
        return result


def test_an_optimizer_that_counts_in_python_is_refused() -> None:
    with pytest.raises(CompileError, match="CountingSGD counts 'steps' in Python"):
        learner(Model(lambda model, out: out), optimizer=partial(CountingSGD, lr=0.1)).fit(1)


class Asks(TrainingPhase):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        super().body(learner, handle, state)
        _ = learner.history


def test_a_body_that_uses_more_of_the_learner_is_told_what_it_may_use() -> None:
    with pytest.raises(CompileError, match=r"uses learner.history.*finish\(learner, state\)"):
        learner(Model(lambda model, out: out)).fit(1, phases=[Asks()])


class Fails(Callback):
    in_compiled_step = "inside"
    writes = ("step.grads",)

    @on(UpdateBegin)
    def ask(self, event: Any, phase: Any, learner: Any) -> None:
        for gradient in learner.step.grads.values():
            float(gradient.sum())


def test_a_handler_inside_the_graph_that_asks_for_a_number_is_named() -> None:
    with pytest.raises(CompileError, match="cannot be one graph") as caught:
        learner(Model(lambda model, out: out), callbacks=[Fails()]).fit(1)
    assert "raised by Fails at UpdateBegin" in "".join(getattr(caught.value.__cause__, "__notes__", []))


class Doubles(Callback):
    """Doubles the gradients inside the graph."""

    in_compiled_step = "inside"
    writes = ("step.grads",)

    @on(UpdateBegin)
    def double(self, event: Any, phase: Any, learner: Any) -> None:
        for name in learner.step.grads:
            learner.step.grads[name] = learner.step.grads[name] * 2


def test_a_handler_inside_the_graph_reads_and_replaces_gradients() -> None:
    weights = []
    for accelerator in (Accelerator("cpu"), Accelerator("cpu", compile="step")):
        torch.manual_seed(0)
        made = learner(Model(lambda model, out: out), callbacks=[Doubles()], accelerator=accelerator)
        made.fit(2)
        weights.append(made.model.layer.weight.detach())
    torch.testing.assert_close(*weights)


def test_skip_update_belongs_to_a_step_that_is_compiled() -> None:
    made = learner(Model(lambda model, out: out))
    with pytest.raises(CompileError, match="outside of a step that is compiled"):
        made.skip_update(torch.tensor(True))


def test_a_trace_names_its_inputs_and_changes_nothing() -> None:
    made = learner(Model(lambda model, out: out))
    made.fit(1)
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    phase = TrainingPhase()
    with torch.enable_grad():
        made.scope = None
        traced = Traced(made, phase, made.modules(), made.step)
    assert [id(tensor) for tensor in traced.fixed] == [id(parameter) for parameter in made.model.parameters()]
    assert [group["lr"] for group, _ in traced.rates] == [0.1]
    assert set(traced.stored) == {"preds", "loss"}
    assert [type(event).__name__ for event in traced.fired] == [
        *("LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd")
    ]
    for old, new in zip(before, made.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_constants_become_inputs_each_once() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    held = torch.ones(3)
    graph = make_fx(lambda xs: xs * held + held, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.zeros(3))
    constants = lift_constants(graph)
    assert len(constants) == 1
    assert constants[0] is held
    assert torch.equal(graph(torch.full((3,), 2.0), *constants), torch.full((3,), 3.0))
