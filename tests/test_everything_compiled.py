"""Every built-in callback and training phase in compiled steps: it trains as eager steps do, or is refused by name."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fluxloop.compile.graphs
from fluxloop import (
    Accelerator,
    ActivationStats,
    Callback,
    CompileError,
    CutMix,
    Learner,
    LogHistograms,
    MixUp,
    TensorBatches,
    TrainingPhase,
)
from test_every_callback import MAKE, others

OPTIMIZERS = {
    "fused": partial(torch.optim.Adam, lr=1e-2),
    "unfused": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}

REFUSED: dict[type[Callback], str] = {
    ActivationStats: "ActivationStats looks into the step while it runs",
    LogHistograms: "LogHistograms looks into the step while it runs",
}
"""Who is refused when the learner is made, and how the message names it."""

OTHERWISE = {
    CutMix: lambda: CutMix(num_classes=3),
    MixUp: lambda: MixUp(num_classes=3),
}
"""How to make those that need an argument here: without it the number of classes is asked of each batch."""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import what tracing needs, and keep it out of each look through the process's objects."""
    import torch._inductor
    import torch.fx.experimental.proxy_tensor  # noqa: F401 - takes seconds

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def as_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run graphs as they were traced, without a compiler, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))


def batches() -> TensorBatches:
    xs = torch.rand(24, 3, generator=torch.Generator().manual_seed(0))
    return TensorBatches(xs, torch.arange(24) % 3, batch_size=8)


def learner_with(compile: Any, optimizer: Any, *given: Callback) -> Learner[Any]:
    torch.manual_seed(0)
    return Learner(
        nn.Sequential(nn.Linear(3, 3)),
        cross_entropy,
        data=(batches(), batches()),
        optimizer=optimizer,
        callbacks=given,
        default_callbacks=False,
        accelerator=Accelerator("cpu", compile=compile),
        seed=0,
    )


def make(cls: type[Callback]) -> list[Callback]:
    return [OTHERWISE.get(cls, MAKE[cls])(), *others(cls)]


def numbers(of: Learner[Any]) -> dict[str, Tensor]:
    """Give what a run has come to: weights, averages, and the last loss."""
    found = {name: tensor for name, tensor in of.model.state_dict().items()}
    views = [name for name in of.weights if "@" in name]
    found |= {f"{view}.{name}": t for view in views for name, t in of.weights[view].state_dict().items()}
    found["loss"] = of.step.loss
    return found


@pytest.mark.filterwarnings("ignore:weights are not finite before the first step")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("cls", MAKE, ids=lambda cls: cls.__name__)
def test_every_callback_gets_along_with_compiled_steps_or_is_refused_by_name(cls: type[Callback], kind: str) -> None:
    if cls in REFUSED:
        with pytest.raises(CompileError, match=REFUSED[cls]) as caught:
            learner_with("step", OPTIMIZERS[kind], *make(cls))
        assert "leave the callback out" in str(caught.value)
        return
    eager, compiled = (learner_with(compile, OPTIMIZERS[kind], *make(cls)) for compile in (False, "step"))
    for each in (eager, compiled):
        each.fit(2)
    assert compiled._compiled is not None
    assert compiled._compiled._plans[TrainingPhase]._graphs
    expected, found = numbers(eager), numbers(compiled)
    assert expected.keys() == found.keys()
    for name, number in expected.items():
        torch.testing.assert_close(found[name], number, rtol=1e-5, atol=1e-6, msg=name)
