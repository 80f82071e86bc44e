"""Random combinations of fluxloop's own features: what was can be again, to the bit, by every way back.

Twenty are tried in each run of the suite. Five hundred, for some minutes::

    FLUXLOOP_COMBINATIONS=500 python -m pytest -n auto tests/test_combinations.py

A failing one is named by its number: it is the same again with ``-k "[17]"``.
"""

from __future__ import annotations

import copy
import os
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    AveragedValidationPhase,
    BYOLPhase,
    Callback,
    Checkpointer,
    CombinedLoader,
    EarlyStopping,
    GANPhase,
    GradientClip,
    KeepBestModel,
    Learner,
    LearningRate,
    LRScheduler,
    Metric,
    Metrics,
    MixUp,
    MoCoPhase,
    Phase,
    Recorder,
    Scheduler,
    StepEnd,
    StochasticWeightAveraging,
    StopOnNaNLoss,
    TensorBatches,
    Traces,
    TrainingPhase,
    TwoViews,
    Unfreeze,
    UnsafeCallback,
    ValidationPhase,
    WeightDecay,
    cosine,
    mae,
    on,
    one_cycle,
    runstep,
)
from fluxloop.events import Event

COUNT = int(os.environ.get("FLUXLOOP_COMBINATIONS", "20"))
ROWS, BATCHES = 24, 4


class KilledError(Exception):
    """Stands for whatever ends a run in the middle."""


class KillsAt(UnsafeCallback):
    """Raises at one event of a run, counted over all events of all phases."""

    draws = False
    transient = ("count", "at")

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.count, self.at = 0, at

    @on(Event)
    def look(self, event: Event, phase: Phase, learner: Any) -> None:
        self.count += 1
        if self.count == self.at:
            raise KilledError


class Pool:
    """A helper with state, called like a function."""

    def __init__(self) -> None:
        self.rows: deque[float] = deque(maxlen=5)
        self.mean: Tensor | None = None
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, loss: Tensor) -> float:
        self.rows.append(loss.item())
        drawn = torch.rand(1, generator=self.generator)
        self.mean = drawn if self.mean is None else self.mean.lerp(drawn, 0.3)
        return sum(self.rows) / len(self.rows) + self.mean.item()


class Keeps(Callback):
    """Keeps things that are None, empty or absent at first."""

    reads = ("step",)
    draws = True

    def __init__(self) -> None:
        super().__init__()
        self.best: float | None = None
        self.helpers: dict[str, list[Pool]] = {"a": [Pool()]}
        self.large: Tensor | None = None

    @on(StepEnd, AbstractTrainingPhase)
    def keep(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        loss = learner.step.loss if "loss" in learner.step else next(iter(learner.step.losses.values()))
        value = self.helpers["a"][0](loss.detach()) + torch.rand(()).item() + numpy.random.normal() + random.random()
        self.best = value if self.best is None else min(self.best, value)
        self.large = torch.full((5000,), value) if self.large is None else self.large + value


class Window(TrainingPhase):
    """Updates once in a number of batches that a count of its own decides."""

    count = 0

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.xs)
        state.loss = learner.loss_fn(state.preds, state.ys)
        learner.backward(state.loss)
        if self.count % 3 == 2:
            learner.update()

    def finish(self, learner: Any, state: Any) -> None:
        self.count += 1


class Scaled(TrainingPhase):
    """Has a helper, and losses that depend on what it keeps."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.scale: float | None = None

    def step(self, learner: Any, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            with learner.optimizing() as block:
                state.preds = learner.model(state.xs)
                block.loss = learner.loss_fn(state.preds, state.ys) * (1 if self.scale is None else self.scale)
            self.scale = 1 + 0.1 * torch.tensor(self.pool(state.loss)).sin().item() + 0.1 * random.random()
        return state


class Rows(Dataset[Any]):
    """Draws as it is read."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        xs, ys = rows()
        return xs[index] + 0.1 * torch.rand(4) + 0.1 * random.random(), ys[index] + 0.1 * numpy.random.normal()


def rows() -> tuple[Tensor, Tensor]:
    xs = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    return xs, xs.sum(1, keepdim=True)


class Counts(nn.Module):
    """A model with attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls, self.seen = 0, None

    def forward(self, xs: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.seen = xs.detach().mean() if self.seen is None else 0.9 * self.seen + xs.detach().mean()
            xs = xs + 0.01 * self.calls * self.seen
        return torch.relu(self.layer(xs))


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 1),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1)
    ),
    "counts": lambda: nn.Sequential(Counts(), nn.Linear(4, 1)),
    "frozen part": lambda: nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.Tanh(), nn.Linear(6, 1)),
}
OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, amsgrad=True, fused=False),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.005, momentum=0.5),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "tensor rate": partial(torch.optim.AdamW, lr=torch.tensor(0.01), fused=False),
}
PHASES: dict[str, Callable[[], list[Phase]]] = {
    "supervised": lambda: [TrainingPhase(), ValidationPhase()],
    "now and then": lambda: [TrainingPhase(), ValidationPhase(every=2)],
    "window": lambda: [Window()],
    "helpers": lambda: [Scaled(), ValidationPhase()],
    "two": lambda: [Window(), TrainingPhase(), ValidationPhase()],
    "two validations": lambda: [TrainingPhase(), ValidationPhase(), ValidationPhase(name="again")],
}
DATA: dict[str, Callable[[], Any]] = {
    "tensors": lambda: TensorBatches(*rows(), batch_size=6, shuffle=True),
    "loader": lambda: DataLoader(TensorDataset(*rows()), batch_size=6, shuffle=True),
    "own generator": lambda: DataLoader(
        Rows(), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(5), drop_last=True
    ),
    "draws": lambda: DataLoader(Rows(), batch_size=6, shuffle=True),
    "list": lambda: list(zip(*(tensor.split(6) for tensor in rows()), strict=True)),
}
ANYWHERE: dict[str, Callable[[], Callback]] = {
    "clip": lambda: GradientClip(0.5),
    "keeps": Keeps,
    "traces": lambda: Traces({"rows": lambda learner: learner.batch_size}, reads=("batch_size",)),
    "nan": StopOnNaNLoss,
}
SUPERVISED: dict[str, Callable[[], Callback]] = {
    **ANYWHERE,
    "ema": lambda: EMA("model", 0.8),
    "swa": lambda: StochasticWeightAveraging(start=1),
    "mixup": MixUp,
    "schedule": lambda: Scheduler({LearningRate: one_cycle(12, 0.05), WeightDecay: cosine(12, 0.1, 0.0)}),
    "unfreeze": lambda: Unfreeze({"0": 1}),
}
MONITORS: dict[str, Callable[[], Callback]] = {
    "best": lambda: KeepBestModel("training/mae"),
    "stopping": lambda: EarlyStopping(1, monitor="training/loss"),
    "plateau": lambda: LRScheduler(
        partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0), monitor="training/loss"
    ),
    "step": lambda: LRScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7), unit="update"),
}


def supervised(choose: random.Random) -> Callable[[], tuple[Learner, list[Phase]]]:
    """Choose a training of one model; what is returned makes it, the same each time."""
    net, optimizer = choose.choice(list(NETS)), choose.choice(list(OPTIMIZERS))
    phases, data = choose.choice(list(PHASES)), choose.choice(list(DATA))
    names = choose.sample(list(SUPERVISED), choose.randint(0, 4))
    alone = phases not in ("two",)  # elsewhere two phases record a metric of one name
    monitors = choose.sample(list(MONITORS), choose.randint(0, 2)) if alone else []
    if "plateau" in monitors or "step" in monitors:
        names = [name for name in names if name != "schedule"]
    if {"plateau", "step"} <= set(monitors):
        monitors.remove("step")
    if net != "batch norm":
        names = [name for name in names if name != "unfreeze"]
    if optimizer == "tensor rate" and "plateau" in monitors:
        monitors.remove("plateau")
    if "mixup" in names and phases in ("helpers", "window", "two"):
        names.remove("mixup")

    def make() -> tuple[Learner, list[Phase]]:
        torch.manual_seed(0)
        callbacks = [SUPERVISED[name]() for name in names] + [MONITORS[name]() for name in monitors]
        learner = Learner(
            NETS[net](),
            mse_loss,
            data=(DATA[data](), TensorBatches(*rows(), batch_size=8)),
            optimizer=OPTIMIZERS[optimizer],
            callbacks=[Recorder(), Metrics(Metric(mae, optional=True)), *callbacks],
            default_callbacks=False,
            accelerator=Accelerator("cpu"),
            seed=7,
        )
        chosen = PHASES[phases]()
        if "ema" in names and phases == "supervised":
            chosen.append(AveragedValidationPhase())
        return learner, chosen

    return make


def several(choose: random.Random) -> Callable[[], tuple[Learner, list[Phase]]]:
    """Choose a training of several models."""
    kind = choose.choice(["gan", "byol", "moco", "combined"])
    optimizer = choose.choice(["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
    names = choose.sample(list(ANYWHERE), choose.randint(0, 3))
    augment = TwoViews(lambda xs: xs + 0.1 * torch.randn_like(xs))
    average = choose.random() < 0.5

    def make() -> tuple[Learner, list[Phase]]:
        torch.manual_seed(0)
        callbacks = [ANYWHERE[name]() for name in names]
        data: Any = TensorBatches(rows()[0], batch_size=6, shuffle=True)
        student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        models: dict[str, nn.Module]
        phases: list[Phase]
        if kind == "gan":
            models = {"G": nn.Linear(3, 4), "D": nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 1))}
            phases = [GANPhase("wasserstein", noise=3, critic_steps=2, gradient_penalty=1)]
            callbacks += [EMA("G", 0.8)] if average else []
        elif kind == "combined":
            models = {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}
            phases = [Paired()]
            data = CombinedLoader(
                {
                    "left": DataLoader(Rows(), batch_size=6, shuffle=True),
                    "right": TensorBatches(rows()[0][:15], batch_size=6, shuffle=True),
                }
            )
        else:
            models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
            if kind == "byol":
                models["predictor"] = nn.Linear(4, 4)
            callbacks.append(EMA("student", cosine(12, 0.5, 1.0), into="teacher"))
            phases = [BYOLPhase(augment) if kind == "byol" else MoCoPhase(augment, queue_size=12)]
        learner = Learner(
            models,
            data=(data,),
            optimizer=OPTIMIZERS[optimizer],
            callbacks=[Recorder(), Metrics(), *callbacks],
            default_callbacks=False,
            accelerator=Accelerator("cpu"),
            seed=7,
        )
        return learner, phases

    return make


class Paired(TrainingPhase):
    """Trains two models on batches of two loaders."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"left": batch["left"][0], "right": batch["right"]}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        for name in ("a", "b"):
            with learner.optimizing(name, loss=f"{name}s") as block:
                block.loss = (learner.model.a(state.left).mean() - learner.model.b(state.right).mean() + 1).square()

    def check(self, learner: Any) -> None: ...


def chosen(number: int) -> Callable[[], tuple[Learner, list[Phase]]]:
    choose = random.Random(number)
    return (supervised if choose.random() < 0.65 else several)(choose)


def fit(learner: Learner, epochs: int, phases: list[Phase], **options: Any) -> None:
    learner.fit(epochs, phases=phases, **options)


def same(first: Any, second: Any, where: str = "state") -> None:
    """Raise where two states differ in a bit; whether an object was replaced or changed makes no difference."""
    first, second = (
        each["to"] if isinstance(each, dict) and each.keys() == {"__kept__", "to"} else each for each in (first, second)
    )
    assert type(first) is type(second), f"{where}: {first!r} and {second!r}"
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first.nan_to_num(7e7), second.nan_to_num(7e7)), f"{where}: {first} and {second}"
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), f"{where}: {sorted(map(str, first.keys() ^ second.keys()))}"
        for key in first:
            same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            same(one, other, f"{where}[{index}]")
    else:
        assert first == second or (first != first and second != second), f"{where}: {first!r} and {second!r}"


def state_of(learner: Learner, phases: list[Phase]) -> dict[str, Any]:
    """Return all that is kept of a learner, and what its phases keep."""
    state = copy.deepcopy(learner.state_dict())
    state["callbacks"] = {
        id: kept for id, kept in state["callbacks"].items() if not id.startswith(("KillsAt", "Checkpointer"))
    }
    state.pop("present", None)  # the callbacks that there were
    for optimizer in state["optimizers"].values():  # torch's Adafactor adds a default when a state is loaded
        optimizer.pop("defaults", None)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.filterwarnings("ignore:gradients of")  # which wait when an epoch of one phase ends
def test_a_state_is_the_same_again_in_the_same_learner_a_new_one_and_a_copy(number: int, tmp_path: Path) -> None:
    make, choose, file = chosen(number), random.Random(-number), tmp_path / "state.pt"
    first, then = choose.randint(0, 2), choose.randint(1, 2)
    learner, phases = make()
    if first:
        fit(learner, first, phases)
    learner.save(file)
    copied = copy.deepcopy((learner, phases))
    fit(learner, then, phases)
    expected = state_of(learner, phases)
    fit(copied[0], then, copied[1])
    same(expected, state_of(*copied), "a copy")
    trained = copy.deepcopy((learner, phases))
    for where, (again, its_phases) in {"the same": (learner, phases), "new": make(), "trained copy": trained}.items():
        again.load(file)
        fit(again, then, its_phases)
        same(expected, state_of(again, its_phases), where)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.filterwarnings("ignore:gradients of")  # which wait when an epoch of one phase ends
def test_a_run_that_is_killed_anywhere_and_tried_again_ends_as_if_nothing_had_happened(
    number: int, tmp_path: Path
) -> None:
    make, choose = chosen(number), random.Random(1000 - number)
    epochs = choose.randint(1, 3)
    whole, phases = make()
    counter = KillsAt(None)
    whole.add_callback(counter)
    fit(whole, epochs, phases)
    expected = state_of(whole, phases)
    every, unit = choose.choice([(1, "epoch"), (1, "step"), (3, "step")])
    for where in ("the same", "new"):
        at = choose.randint(1, counter.count)
        folder = tmp_path / where.replace(" ", "_")
        learner, its_phases = make()
        killer = KillsAt(at)
        learner.add_callback(killer)
        learner.add_callback(Checkpointer(folder, every=every, unit=unit))
        with pytest.raises(KilledError):
            fit(learner, epochs, its_phases, resume=folder)
        if where == "new":
            learner, its_phases = make()
            learner.add_callback(Checkpointer(folder, every=every, unit=unit))
        fit(learner, epochs, its_phases, resume=folder)
        same(expected, state_of(learner, its_phases), f"{where}, killed at event {at} of {counter.count}")
