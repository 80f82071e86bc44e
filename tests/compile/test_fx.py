from __future__ import annotations

import pytest
import torch
from compiled_training import learner, learner_of
from torch import Tensor, nn

from fluxloop import Accelerator, CompileError, TrainingPhase
from fluxloop.compile.fx import lift_constants
from fluxloop.compile.tracing import trace

pytestmark = pytest.mark.usefixtures("imported")


def test_a_torch_that_cannot_trace_is_said_when_the_learner_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "_is_compiling_flag")
    with pytest.raises(CompileError, match="cannot be used with torch"):
        learner()


@pytest.mark.usefixtures("uncompiled")
def test_constants_become_inputs_each_once() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

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
