from __future__ import annotations

import pytest
import torch
from compiled_training import learner, learner_of
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fluxloop import Accelerator, CompileError, TrainingPhase
from fluxloop.compile.fx import SUMS, lift_constants, write_out_factors
from fluxloop.compile.graphs import lower
from fluxloop.compile.tracing import trace

pytestmark = pytest.mark.usefixtures("imported")


def test_a_torch_that_cannot_trace_is_said_when_the_learner_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "_is_compiling_flag")
    with pytest.raises(CompileError, match="cannot be used with torch"):
        learner()


@pytest.mark.usefixtures("uncompiled")
def test_constants_become_inputs_each_once() -> None:
    held = torch.ones(3)
    graph = make_fx(lambda xs: xs * held + held, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.zeros(3))
    constants = lift_constants(graph)
    assert len(constants) == 1
    assert constants[0] is held
    assert torch.equal(graph(torch.full((3,), 2.0), *constants), torch.full((3,), 3.0))


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_the_compilers_decompositions_are_used_for_gradients() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Upsample(scale_factor=1.7), nn.Flatten())
    layer = nn.Linear(6, 6)
    made = learner_of(nn.Sequential(layer, model), loss_fn=lambda preds, ys: preds.square().mean())
    made.fit(1)
    traced = trace(made, TrainingPhase(), made.modules(), [], made.step)
    assert not any("upsample" in str(node.target) for node in traced.graph.graph.nodes)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
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
        made = learner_of(Net(), accelerator=Accelerator("cpu", compile=compile))
        made.fit(2)
        found.append([parameter.detach() for parameter in made.model.parameters()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)
    assert torch.backends.mkldnn.enabled == enabled
    traced = trace(made, TrainingPhase(), made.modules(), [], made.step)
    assert not any("mkldnn" in str(node.target) for node in traced.graph.graph.nodes)


def with_factors(total: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    total.mul_(0.5).add_(a @ b, alpha=0.25)
    return [torch.add(a @ b, total, alpha=-2.0), torch.add(total, a @ b), torch.add(total, 1.0, alpha=3.0)]


def numbers() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, generator=generator), *(torch.randn(*n, generator=generator) for n in ((3, 4), (4, 5)))]


def test_factors_of_sums_are_written_out() -> None:
    graph = make_fx(with_factors, tracing_mode="fake")(*numbers())
    write_out_factors(graph)
    of_tensors = [node for node in graph.graph.nodes if node.target in SUMS and isinstance(node.args[1], Node)]
    assert len(of_tensors) == 3
    assert not any(node.kwargs for node in of_tensors)
    torch.testing.assert_close(graph(*numbers()), with_factors(*numbers()))


@pytest.mark.slow
def test_the_compiler_keeps_factors_of_sums_with_products_of_matrices() -> None:
    graph = make_fx(with_factors, tracing_mode="fake")(*numbers())
    given, wanted = numbers(), numbers()
    found = lower(graph, numbers(), torch.device("cpu"))(*given)
    torch.testing.assert_close(list(found), with_factors(*wanted))
    torch.testing.assert_close(given, wanted)
