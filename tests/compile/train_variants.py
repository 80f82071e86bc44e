"""Train variants of one training, eagerly and compiled, and print how far their weights lie apart, as JSON.

A script: `test_kept.py` runs it in processes that share the folder in which torch keeps what it has compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fluxloop import Accelerator, BackwardBegin, BackwardEnd, Learner, LossBegin, TrainingPhase
from fluxloop.compile import graphs

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Doubled(TrainingPhase):
    """Its body has another line than `TrainingPhase` has."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.xs)
        handle(LossBegin())
        state.loss = 2 * learner.loss_fn(state.preds, state.ys)
        handle(BackwardBegin())
        learner.backward(state.loss)
        handle(BackwardEnd())
        learner.update()


def scaled(factor: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a loss that closes over a number, or a tensor."""
    return lambda preds, ys: functional.mse_loss(preds, ys) * factor


VARIANTS: dict[str, dict[str, Any]] = {
    "first": {},
    "another body": {"phase": Doubled},
    "another number closed over": {"loss_fn": scaled(3.0)},
    "another tensor closed over": {"loss_fn": scaled(torch.tensor(3.0))},
    "another shape": {"rows": 6},
    "another option": {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)},
    "another input option": {"optimizer": partial(torch.optim.SGD, lr=0.3, momentum=0.9)},
    "another dtype": {"dtype": torch.float64},
    "another constant in a model": {"power": 3},
}


class Net(nn.Module):
    """A layer, and a power of what it gives."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.layer, self.power = nn.Linear(5, 3), power

    def forward(self, xs: Tensor) -> Tensor:
        return self.layer(xs).sigmoid() ** self.power


def trained(
    compile: Any,
    rows: int = 4,
    dtype: torch.dtype = torch.float32,
    power: int = 2,
    phase: type[TrainingPhase] = TrainingPhase,
    loss_fn: Any = None,
    optimizer: Any = SGD,
) -> Tensor:
    """Train three steps; return the weights."""
    torch.manual_seed(0)
    xs, ys = torch.randn(3, rows, 5, dtype=dtype), torch.randn(3, rows, 3, dtype=dtype)
    learner = Learner(
        Net(power).to(dtype),
        scaled(1.0) if loss_fn is None else loss_fn,
        data=(list(zip(xs, ys, strict=True)),),
        optimizer=optimizer,
        default_callbacks=False,
        accelerator=Accelerator("cpu", compile=compile),
        seed=0,
    )
    learner.fit(1, phases=[phase()])
    return torch.cat([p.detach().flatten().double() for p in learner.model.parameters()])


def main(names: list[str]) -> None:
    by_torch, compiled = graphs.by_torch, []
    graphs.by_torch = lambda *given: compiled.append(given) or by_torch(*given)  # type: ignore[func-returns-value]  # None
    found = {}
    for name in names:
        compiled.clear()
        eager, of_graph = trained(False, **VARIANTS[name]), trained("step", **VARIANTS[name])
        found[name] = {"apart": (eager - of_graph).abs().max().item(), "compiled": len(compiled)}
    found["imported"] = {"compiler": "torch._inductor.compile_fx" in sys.modules}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(VARIANTS))
