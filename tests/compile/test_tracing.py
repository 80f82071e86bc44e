from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fluxloop.compile.graphs
from fluxloop import (
    Accelerator,
    Attribute,
    Callback,
    CancelStepException,
    CompileError,
    Learner,
    Momentum,
    Scheduler,
    TrainingPhase,
    UpdateBegin,
    linear,
    on,
    set_hyperparameter,
)
from fluxloop.compile.fx import lift_constants
from fluxloop.compile.tracing import trace


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))


def learner(model: nn.Module, loss_fn: Any = functional.cross_entropy, **options: Any) -> Learner[Any]:
    xs, ys = torch.randn(32, 6), torch.randint(3, (32,))
    defaults: dict[str, Any] = {
        "data": ([(xs[:8], ys[:8]), (xs[8:16], ys[8:16]), (xs[16:24], ys[16:24])],),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "default_callbacks": False,
        "accelerator": Accelerator("cpu", compile="step"),
    }
    return Learner(model, loss_fn, **{**defaults, **options}, seed=0)


RNG = numpy.random.default_rng(0)


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


def scaled(model: Any, out: Tensor) -> Tensor:
    with torch.no_grad():
        model.layer.bias.add_(out.mean(0), alpha=-out.mean())
    return out


COLLECTED: list[Any] = []


def collect(model: Any, out: Tensor) -> Tensor:
    COLLECTED.append(out)
    return out


def append(model: Any, out: Tensor) -> Tensor:
    model.seen.append(out.shape)
    return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use of it
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
        (scaled, ("asks for a number in the middle", "alpha=")),
        (collect, ("it changes COLLECTED, a variable",)),
        (lambda model, out: out * RNG.random(), ("draws from Python's or NumPy's random numbers (test_tracing.RNG)",)),
        (lambda model, out: torch.func.jvp(torch.sin, (out,), (out,))[1], ("forward-mode differentiation",)),
    ],
    ids=[
        "item",
        "if",
        "count",
        "keep",
        "append",
        "python random",
        "numpy random",
        "alpha",
        "collect",
        "own random",
        "jvp",
    ],
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
    assert not any(isinstance(kept, torch._subclasses.FakeTensor) for kept in COLLECTED)


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
    with pytest.raises(CompileError, match="there are hooks on the optimizer"):
        made.fit(1)


def decay_rate(phase: Any, learner: Any) -> None:
    learner.optimizer.param_groups[0]["lr"] *= 0.8


def assign_rate(phase: Any, learner: Any) -> None:
    for group in learner.optimizer.param_groups:
        group["lr"] = group["lr"] * 0.8


def add_decay(phase: Any, learner: Any) -> None:
    learner.optimizer.param_groups[0].update(weight_decay=0.1)


def set_momentum(phase: Any, learner: Any) -> None:
    set_hyperparameter(learner, Momentum, 0.5)


def past_the_learner(phase: Any, learner: Any) -> None:
    phase.held["optimizer"].param_groups[0]["lr"] *= 0.8


class Writing(TrainingPhase):
    """Writes an option of the optimizer in its body."""

    def __init__(self, write: Callable[[Any, Any], None]) -> None:
        self.write = write
        self.held: dict[str, Any] = {}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        if state.step_number > 1:
            self.write(self, learner)
        super().body(learner, handle, state)

    def entries(self, batch: Any) -> dict[str, Any]:
        return {**super().entries(batch), "step_number": self.count_steps()}

    def count_steps(self) -> int:
        self.held["steps"] = self.held.get("steps", 0) + 1
        return int(self.held["steps"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "option"),
    [
        (decay_rate, "'lr'"),
        (assign_rate, "'lr'"),
        (add_decay, "'weight_decay'"),
        (set_momentum, "'momentum'"),
        (past_the_learner, "'lr'"),
    ],
)
def test_a_body_that_writes_an_option_of_an_optimizer_is_refused_and_the_option_stays(write: Any, option: str) -> None:
    made = learner(Model(lambda model, out: out), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    phase = Writing(write)
    phase.held["optimizer"] = made.optimizer
    before = [dict(group) for group in made.optimizer.param_groups]
    with pytest.raises(CompileError, match=rf"writes {option} in param_groups\[0\] of the optimizer.*finish\(learner"):
        made.fit(1, phases=[phase])
    assert made.optimizer.param_groups == before


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


@pytest.mark.slow
def test_a_trace_names_its_inputs_and_changes_nothing() -> None:
    made = learner(Model(lambda model, out: out))
    made.fit(1)
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    phase = TrainingPhase()
    with torch.enable_grad():
        made.scope = None
        traced = trace(made, phase, made.modules(), [], made.step)
    assert [id(tensor) for tensor in traced.inputs.fixed] == [id(parameter) for parameter in made.model.parameters()]
    assert [(name, option.item()) for _, name, option in traced.inputs.options] == [("lr", pytest.approx(0.1))]
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


# What is noticed, one by one: trained twice with a change in between, eagerly and compiled, or refused


class Scale(nn.Module):
    """Multiplies by what an object says, and has a part that may be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.config = nn.Linear(6, 3), nn.Tanh(), SimpleNamespace(scale=1.0)

    def forward(self, xs: Tensor) -> Tensor:
        out: Tensor = self.act(self.layer(xs)) * self.config.scale
        return out


class Annealed:
    """A loss function with a number."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, preds: Tensor, ys: Tensor) -> Tensor:
        return functional.cross_entropy(preds, ys) * self.weight


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda made: setattr(made.model, "act", nn.Sigmoid()),
        lambda made: setattr(made.model.config, "scale", 3.0),
        lambda made: setattr(made, "loss_fn", partial(functional.cross_entropy, label_smoothing=0.5)),
        lambda made: setattr(made.loss_fn, "weight", 0.1),
        lambda made: made.model.double() and setattr(made, "loss_fn", lambda p, ys: functional.cross_entropy(p, ys)),
        lambda made: made.optimizer.param_groups[0].update(lr=torch.tensor(0.01)),
        lambda made: made.optimizer.load_state_dict(made.optimizer.state_dict()),
        lambda made: made.optimizer.param_groups[0].update(momentum=0.5),
        lambda made: torch.optim.lr_scheduler.StepLR(made.optimizer, 1),
        lambda made: setattr(made.model.layer.weight, "data", made.model.layer.weight.data.t().contiguous().t()),
    ],
    ids=["part", "config", "loss", "loss's number", "dtype", "rate", "state", "option", "scheduler", "strides"],
)
def test_what_changes_between_fits_is_noticed(change: Any) -> None:
    xs, ys = torch.randn(24, 6), torch.randint(3, (24,))

    class Converted(TrainingPhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"xs": batch[0].to(next(iter(weights)).dtype), "ys": batch[1]}

    found = []
    for compile in (False, "step"):
        torch.manual_seed(0)
        made = learner(Scale(), accelerator=Accelerator("cpu", compile=compile), data=([(xs[:8], ys[:8])] * 3,))
        made.loss_fn = Annealed(1.0)
        weights = list(made.model.parameters())
        made.fit(2, phases=[Converted()])
        change(made)
        made.fit(2, phases=[Converted()])
        found.append([parameter.detach().clone() for parameter in made.model.parameters()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


class Finishing(TrainingPhase):
    """Changes something in finish, after every step."""

    def __init__(self, change: Callable[[Any, Any], object]) -> None:
        self.change = change
        self.options, self.center = {"weight": 1.0}, torch.zeros(3)

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        preds = learner.model(state.xs)
        self.center = 0.5 * self.center + preds.detach().mean(0)
        state.preds = preds - self.center
        state.loss = learner.loss_fn(state.preds, state.ys) * self.options["weight"]
        learner.backward(state.loss)
        learner.update()

    def finish(self, learner: Any, state: Any) -> None:
        self.change(self, learner)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda phase, learner: None,
        lambda phase, learner: phase.options.update(weight=phase.options["weight"] * 0.5),
        lambda phase, learner: setattr(learner.model.config, "scale", learner.model.config.scale * 0.9),
        lambda phase, learner: learner.model.layer.bias.requires_grad_(not learner.model.layer.bias.requires_grad),
        lambda phase, learner: setattr(phase, "center", phase.center + 1),
    ],
    ids=["nothing", "its own", "a model's", "frozen", "a tensor"],
)
@pytest.mark.filterwarnings("ignore:the step of Finishing has been compiled")
def test_what_finish_changes_is_noticed_and_a_tensor_that_the_body_replaces_is_kept(change: Any) -> None:
    found = []
    for compile in (False, "step"):
        torch.manual_seed(0)
        made = learner(Scale(), accelerator=Accelerator("cpu", compile=compile))
        phase = Finishing(change)
        made.fit(3, phases=[phase])
        found.append((*made.model.parameters(), phase.center))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_attribute_that_a_schedule_sets_is_noticed_although_nobody_says_what_it_writes() -> None:
    found = []
    for compile in (False, "step"):
        torch.manual_seed(0)
        model = Scale()
        rate = Scheduler({Attribute(model.config, "scale"): linear(6, 1.0, 0.1)})
        made = learner(model, accelerator=Accelerator("cpu", compile=compile), callbacks=[rate])
        made.fit(2)
        found.append(list(model.parameters()))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


class Assigning(TrainingPhase):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        super().body(learner, handle, state)
        learner.model.layer.weight.data = learner.model.layer.weight.data.clamp(-1, 1)


class Cancelling(TrainingPhase):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        raise CancelStepException


class Wrapped(TrainingPhase):
    def entries(self, batch: Any) -> dict[str, Any]:
        return {"batch": SimpleNamespace(xs=batch[0], ys=batch[1])}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        learner.backward(learner.loss_fn(learner.model(state.batch.xs), state.batch.ys))
        learner.update()


class Own(Accelerator):
    def backward(self, *args: Any, **kwargs: Any) -> None:
        super().backward(*args, **kwargs)


def seeded(model: Any, out: Tensor) -> Tensor:
    torch.manual_seed(1)
    return functional.dropout(out, 0.5)


def recomputed(model: Any, out: Tensor) -> Tensor:
    found: Tensor = checkpoint(lambda out: functional.dropout(out, 0.5), out, use_reentrant=False)
    return found


class OwnNumbers:
    def __init__(self) -> None:
        self.random = random.Random(0)

    def __call__(self, model: Any, out: Tensor) -> Tensor:
        return out * self.random.random()


class CountingGroups(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        return super().step(closure)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "phase", "words"),
    [
        (lambda: learner(Scale()), Assigning, "assigns .data of a parameter"),
        (lambda: learner(Scale()), Cancelling, "raises CancelStepException"),
        (lambda: learner(Scale()), Wrapped, "the entry 'batch' holds a SimpleNamespace"),
        (lambda: learner(Model(seeded)), TrainingPhase, "sets where they start"),
        (lambda: learner(Model(recomputed)), TrainingPhase, "sets where they start"),
        (lambda: learner(Model(OwnNumbers())), TrainingPhase, "draws from Python's or NumPy's random numbers"),
        (
            lambda: learner(Scale(), optimizer=partial(CountingGroups, lr=0.1)),
            TrainingPhase,
            "changes 'count' in param_groups[0]",
        ),
        (
            lambda: learner(Scale(), accelerator=Own("cpu", compile="step")),
            TrainingPhase,
            "Own has a backward or update",
        ),
    ],
    ids=["assigns", "cancels", "wraps", "seeds", "recomputes", "own numbers", "groups", "accelerator"],
)
def test_what_a_graph_would_get_wrong_is_refused(make: Any, phase: Any, words: str) -> None:
    def train() -> None:
        make().fit(1, phases=[phase()])

    with pytest.raises(CompileError) as caught:
        train()
    assert words in f"{caught.value} {caught.value.__cause__}"


def test_tensors_that_share_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(CompileError, match="share memory"):
        learner(model).fit(1)


def test_a_step_of_an_optimizer_that_somebody_replaced_is_refused() -> None:
    made = learner(Scale())
    made.optimizer.step = lambda: None  # type: ignore[method-assign]  # what is tested
    with pytest.raises(CompileError, match="was replaced"):
        made.fit(1)


@pytest.mark.slow
def test_a_copied_learner_compiles_steps_of_its_own() -> None:
    made = learner(Scale())
    made.fit(1)
    copied = copy.deepcopy(made)
    for each in (made, copied):
        each.fit(1)
    for a, b in zip(made.model.parameters(), copied.model.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)


@pytest.mark.slow
def test_the_compilers_decompositions_are_used_for_gradients() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Upsample(scale_factor=1.7), nn.Flatten())
    layer = nn.Linear(6, 6)
    made = learner(nn.Sequential(layer, model), loss_fn=lambda preds, ys: preds.square().mean())
    made.fit(1)
    traced = trace(made, TrainingPhase(), made.modules(), [], made.step)
    assert not any("upsample" in str(node.target) for node in traced.graph.graph.nodes)


@pytest.mark.slow
def test_a_recurrent_layer_is_traced_without_the_layer_of_onednn_and_onednn_stays_on() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 3, batch_first=True)

        def forward(self, xs: Tensor) -> Tensor:
            out: Tensor = self.layer(xs[:, None])[0][:, -1]
            return out

    enabled = torch.backends.mkldnn.enabled
    found = []
    for compile in (False, "step"):
        torch.manual_seed(0)
        made = learner(Net(), accelerator=Accelerator("cpu", compile=compile))
        made.fit(2)
        found.append([parameter.detach() for parameter in made.model.parameters()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)
    assert torch.backends.mkldnn.enabled == enabled
    traced = trace(made, TrainingPhase(), made.modules(), [], made.step)
    assert not any("mkldnn" in str(node.target) for node in traced.graph.graph.nodes)


@pytest.mark.slow
def test_weights_are_changed_one_by_one_after_what_is_computed_from_them() -> None:
    made = learner(Model(lambda model, out: out), optimizer=partial(torch.optim.Adam, lr=0.1))
    made.fit(1)
    traced = trace(made, TrainingPhase(), made.modules(), [], made.step)
    targets = [str(node.target) for node in traced.graph.graph.nodes]
    assert not any(target.startswith("aten._foreach") and "_." in target for target in targets)
    assert len([target for target in targets if target.startswith("aten.addcdiv_")]) == 2
