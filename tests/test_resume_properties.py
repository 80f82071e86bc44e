from __future__ import annotations

import gc
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import pytest
import torch
from attrs import define, field
from hypothesis import Phase as Stage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fluxloop
from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    Event,
    Learner,
    Phase,
    Recorder,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    on,
    runstep,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.lr_scheduler import LRScheduler
from fluxloop.callbacks.scheduler import Scheduler
from fluxloop.hyperparameters import LearningRate
from fluxloop.schedules import cosine, one_cycle, step, warmup
from fluxloop.testing import EventRecorder, assert_same_bits
from toys import Killed

EPOCHS = 2


class Augmented(Dataset[Any]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.xs, self.ys = torch.rand(12, 3, generator=generator), torch.arange(12) % 2

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return self.xs[index] + torch.rand(3) + numpy.random.normal() + random.random(), self.ys[index]


def accuracy(preds: Tensor, ys: Tensor) -> Tensor:
    return (preds.argmax(1) == ys).float().mean()


MODELS = {
    "linear": lambda: nn.Linear(3, 2),
    "deep": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.4), nn.Linear(4, 2)),
}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.05),
    "AdamW": partial(torch.optim.AdamW, lr=0.05, amsgrad=True),
}
SCHEDULES = {
    "none": lambda: [],
    "cosine": lambda: [Scheduler({LearningRate: cosine(8, 0.1, 0.01)})],
    "one cycle": lambda: [Scheduler({LearningRate: one_cycle(8, 0.1)})],
    "warm-up, by epoch": lambda: [Scheduler({LearningRate: warmup(1, step(1, 0.1, 0.5))}, unit="epoch")],
    "torch's": lambda: [LRScheduler(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9))],
    "torch's, by epoch": lambda: [LRScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=1), unit="epoch")],
}
LOADERS = {
    "tensors": lambda: TensorBatches(Augmented().xs, Augmented().ys, batch_size=3, shuffle=True),
    "a loader": lambda: DataLoader(Augmented(), batch_size=3, shuffle=True),
    "a loader with a generator": lambda: DataLoader(
        Augmented(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "a loader with a worker": lambda: DataLoader(
        Augmented(), batch_size=3, shuffle=True, num_workers=1, multiprocessing_context="fork"
    ),
}


class Waits(AbstractTrainingPhase):
    """Updates at every third step, and counts by itself."""

    def __init__(self) -> None:
        self.n = 0
        self.total = torch.zeros(1)

    def step(self, learner: Any, batch: Any) -> Any:
        self.n += 1
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.preds = learner.model(state.xs)
            state.loss = nn.functional.cross_entropy(state.preds, state.ys) * (1 + self.total.sum().cos())
            self.total += state.loss.detach() + random.random() + numpy.random.rand()
            learner.backward(state.loss)
            if self.n % 3 == 0:
                learner.update()
            return state


PHASES = {
    "supervised": lambda: [TrainingPhase(), ValidationPhase()],
    "gathers gradients": lambda: [Waits()],
    "both": lambda: [Waits(), TrainingPhase(), ValidationPhase()],
}


@define
class Keeps(Callback):
    """Keeps plain attributes, and draws."""

    n: int = field(default=0, init=False)
    drawn: list[float] = field(factory=list, init=False)
    table: Any = field(factory=lambda: numpy.zeros(2), init=False)

    draws = True

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.n += 1
        self.drawn.append(torch.rand(()).item() + numpy.random.normal() + random.random())
        self.table += self.drawn[-1]


CALLBACKS = {
    "ema": lambda: fluxloop.EMA("model", 0.9),
    "keeps": Keeps,
    "traces": lambda: fluxloop.Traces({"loss": lambda learner: learner.step.loss}, reads=("step.loss",)),
    "throttled": lambda: fluxloop.throttle(Keeps(name="throttled"), StepEnd, freq=2),
    "nan": fluxloop.StopOnNaNLoss,
    "events": EventRecorder,
}


class Kill(Callback):
    """Ends everything at the n-th event."""

    draws = False
    transient = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    @on(Event)
    def count(self, event: Event, phase: Phase, learner: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def pick(table: dict[str, Any]) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(table))


def states(learner: Learner) -> dict[str, Any]:
    """Give what callbacks keep, by id: what depends on the kill and on folders left out."""
    kept: dict[str, Any] = learner.state_dict()["callbacks"]
    return {name: repr(state) for name, state in kept.items() if not name.startswith(("Kill", "Checkpointer"))}


@pytest.mark.slow
@given(
    model=pick(MODELS),
    optimizer=pick(OPTIMIZERS),
    schedule=pick(SCHEDULES),
    loader=st.sampled_from([*(["tensors", "a loader", "a loader with a generator"] * 3), "a loader with a worker"]),
    phases=pick(PHASES),
    callbacks=st.sets(pick(CALLBACKS)),
    kills=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    unit=st.sampled_from(["step", "epoch"]),
    every=st.integers(1, 4),
    background=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:gradients of .* still wait for an update")  # in a cycle with both phases
@settings(deadline=None, max_examples=20, phases=[Stage.explicit, Stage.generate])  # to shrink takes minutes
def test_a_run_killed_at_any_event_and_resumed_is_that_which_was_never_killed(
    model: str,
    optimizer: str,
    schedule: str,
    loader: str,
    phases: str,
    callbacks: set[str],
    kills: list[int],
    unit: Any,
    every: int,
    background: bool,
) -> None:
    def make(*more: Callback) -> Learner:
        torch.manual_seed(1)
        given: Iterable[Callback] = [
            Recorder(),
            fluxloop.Metrics(accuracy),
            *SCHEDULES[schedule](),
            *(CALLBACKS[name]() for name in sorted(callbacks)),
            *more,
        ]
        data = (LOADERS[loader](), TensorBatches(Augmented().xs, Augmented().ys, batch_size=6))
        return Learner(
            MODELS[model](),
            nn.functional.cross_entropy,
            data=data,
            optimizer=OPTIMIZERS[optimizer],
            callbacks=given,
            default_callbacks=False,
            seed=3,
        )

    plain = make()
    plain.fit(EPOCHS, phases=PHASES[phases]())
    with TemporaryDirectory() as name:
        folder = Path(name) / "run"
        learner = plain
        for kill in [*kills, 10**9]:
            checkpointer = Checkpointer(folder, every=every, unit=unit, background=background)
            learner = make(checkpointer, Kill(kill))
            try:
                learner.fit(EPOCHS, phases=PHASES[phases](), resume=folder)
                break
            except Killed:
                if loader == "a loader with a worker":
                    gc.collect()
    assert learner.history.cycles == EPOCHS
    assert_same_bits(plain, learner)
    assert learner.history.rows() == plain.history.rows()
    assert {n: v for n, v in learner.streams.positions().items() if v} == {
        n: v for n, v in plain.streams.positions().items() if v
    }
    assert states(learner) == states(plain)
