from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from compiled_training import Model, Scale, learner_of
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fluxloop import Accelerator, CancelStepException, CompileError, TrainingPhase
from fluxloop.compile.tracing import trace

pytestmark = pytest.mark.usefixtures("uncompiled", "all_known")


RNG = numpy.random.default_rng(0)


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
        (collect, ("it changes COLLECTED (reached by name)",)),
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
    made = learner_of(Model(function))
    with pytest.raises(CompileError, match="cannot be one graph") as caught:
        made.fit(1)
    for word in words:
        assert word.replace("\\", "") in str(caught.value)
    assert made.model.layer.weight.grad_fn is None
    assert type(made.model.layer.weight) is nn.Parameter  # everything is as it was
    assert not isinstance(made.model.last, torch._subclasses.FakeTensor)
    assert not any(isinstance(kept, torch._subclasses.FakeTensor) for kept in COLLECTED)


@pytest.mark.slow
def test_a_trace_names_its_inputs_and_changes_nothing() -> None:
    made = learner_of(Model(lambda model, out: out))
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
        (lambda: learner_of(Scale()), Assigning, "assigns .data of a parameter"),
        (lambda: learner_of(Scale()), Cancelling, "raises CancelStepException"),
        (lambda: learner_of(Scale()), Wrapped, "the entry 'batch' holds a SimpleNamespace"),
        (lambda: learner_of(Model(seeded)), TrainingPhase, "sets where they start"),
        (lambda: learner_of(Model(recomputed)), TrainingPhase, "sets where they start"),
        (lambda: learner_of(Model(OwnNumbers())), TrainingPhase, "draws from Python's or NumPy's random numbers"),
        (
            lambda: learner_of(Scale(), optimizer=partial(CountingGroups, lr=0.1)),
            TrainingPhase,
            "changes 'count' in param_groups[0]",
        ),
        (
            lambda: learner_of(Scale(), accelerator=Own("cpu", compile="step")),
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


@pytest.mark.slow
def test_weights_are_changed_one_by_one_after_what_is_computed_from_them() -> None:
    made = learner_of(Model(lambda model, out: out), optimizer=partial(torch.optim.Adam, lr=0.1))
    made.fit(1)
    traced = trace(made, TrainingPhase(), made.modules(), [], made.step)
    targets = [str(node.target) for node in traced.graph.graph.nodes]
    assert not any(target.startswith("aten._foreach") and "_." in target for target in targets)
    assert len([target for target in targets if target.startswith("aten.addcdiv_")]) == 2
