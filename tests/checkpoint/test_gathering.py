from __future__ import annotations

import copy
import enum
import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from nets import net
from torch import Tensor, nn

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    EpochBegin,
    FitBegin,
    Learner,
    LearningRate,
    Metric,
    Metrics,
    Phase,
    Recorder,
    Scheduler,
    StepEnd,
    TensorBatches,
    Traces,
    TrainingPhase,
    UnsafeCallback,
    on,
    one_cycle,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.errors import CheckpointError
from fluxloop.testing import assert_resumes_exactly, assert_same_bits

# What is kept of a callback


class Colour(enum.IntEnum):
    RED = 1


class Keeper(Callback):
    """Sets an attribute to a value in its first step."""

    def __init__(self, value: Any = None) -> None:
        self._given = (lambda: value,)
        self.value: Any = None

    transient = ("_given",)

    @on(StepEnd)
    def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.value = self._given[0]()


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize(
    "value",
    [
        True,
        3,
        2.5,
        float("inf"),
        2**200,
        complex(1, 2),
        "text",
        b"bytes",
        (1, (2, [3])),
        {"a": {"b": [1]}, 3: 4, (1, "x"): 5},
        {"__kept__": "mine"},
        {1, 2},
        frozenset({(1, 2)}),
        deque([1, 2], 5),
        OrderedDict(a=1),
        Counter("aab"),
        torch.float16,
        torch.device("cpu"),
        torch.Size([1, 2]),
        np.float64(1.5),
        np.float32(0.1),
        np.int64(3),
        np.bool_(True),
        np.str_("text"),
        Colour.RED,
        {"score": np.float64(2)},
        {np.int64(1): [np.float64(2)]},
    ],
    ids=repr,
)
def test_plain_data_comes_back_through_a_file(value: Any, tmp_path: Path) -> None:
    first = net(Keeper(value))
    first.fit(1)
    first.save(tmp_path / "state.pt")
    second = net(keeper := Keeper())
    second.load(tmp_path / "state.pt")
    assert keeper.value == value
    assert keeper.value is not None


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.array(3, dtype=np.int8),
        np.array([], dtype=np.float32),
        np.array(["a", "bc"]),
        np.array([True]),
    ],
    ids=repr,
)
def test_arrays_come_back_through_a_file(value: Any, tmp_path: Path) -> None:
    first = net(Keeper(value))
    first.fit(1)
    first.save(tmp_path / "state.pt")
    second = net(keeper := Keeper())
    second.load(tmp_path / "state.pt")
    assert keeper.value.dtype == value.dtype
    assert keeper.value.shape == value.shape
    assert (keeper.value == value).all()
    keeper.value[...] = keeper.value  # can be written to


class Ring:
    """An object of a user's, without a state of its own."""

    def __init__(self) -> None:
        self.items: list[float] = []
        self.count = 0


class InPlace(Callback):
    """Keeps things that change in place and are made before training."""

    def __init__(self) -> None:
        self.array = np.zeros(2)
        self.tensor = torch.zeros(2)
        self.data = torch.zeros(2)
        self.numpy_generator = np.random.default_rng(0)
        self.old_numpy_generator = np.random.RandomState(0)
        self.generator = torch.Generator().manual_seed(0)
        self.random = random.Random(0)
        self.counts: dict[str, list[int]] = defaultdict(list)
        self.numbers: list[float] = []

    @on(StepEnd)
    def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.array[0] += 1
        self.tensor += 1
        self.data.data.add_(1)
        self.counts["steps"].append(1)
        self.numbers.append(
            self.numpy_generator.random()
            + self.old_numpy_generator.rand()
            + torch.rand(1, generator=self.generator).item()
            + self.random.random()
        )


def test_what_changes_in_place_is_kept(tmp_path: Path) -> None:
    plain = net(a := InPlace())
    plain.fit(1)
    plain.save(tmp_path / "state.pt")
    again = net(b := InPlace())
    again.load(tmp_path / "state.pt")
    for learner in (plain, again):
        learner.fit(1)
    assert a.numbers == b.numbers
    assert a.array.tolist() == b.array.tolist() == [8, 0]
    assert a.tensor.tolist() == b.tensor.tolist() == a.data.tolist() == b.data.tolist() == [8, 8]
    assert a.counts == b.counts
    assert isinstance(b.counts, defaultdict)


def test_what_changes_in_place_resumes_exactly() -> None:
    assert_resumes_exactly(lambda: net(InPlace()), epochs=2, at=[2, 5, 8])


def test_an_object_of_plain_data_needs_no_state_of_its_own() -> None:
    class Holds(Callback):
        def __init__(self) -> None:
            self.ring = Ring()

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.ring.count += 1
            self.ring.items.append(1.0)

    class Fills(Holds):
        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.ring.items.append(1.0)

    for kind in (Holds, Fills):
        assert_resumes_exactly(lambda kind=kind: net(kind()), epochs=1, at=[2, 5])


def test_a_ring_goes_back_with_the_learner_that_has_trained() -> None:
    class Holds(Callback):
        def __init__(self) -> None:
            self.ring = Ring()

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.ring.count += 1
            self.ring.items.append(1.0)

    holds = Holds()
    learner = net(holds)
    begin = copy.deepcopy(learner.state_dict())
    learner.fit(1)
    steps = holds.ring.count
    after = copy.deepcopy(learner.state_dict())
    learner.load_state_dict(begin)
    assert (holds.ring.count, holds.ring.items) == (0, [])
    learner.load_state_dict(after)
    assert (holds.ring.count, holds.ring.items) == (steps, [1.0] * steps)


def test_a_parameter_that_an_optimizer_holds_stays_the_one_it_holds(tmp_path: Path) -> None:
    class Learns(Callback):
        def __init__(self) -> None:
            self.weight = nn.Parameter(torch.zeros(2))
            self.optimizer = torch.optim.SGD([self.weight], lr=0.1, momentum=0.9)

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            with torch.enable_grad():
                ((self.weight - 1) ** 2).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    assert_resumes_exactly(lambda: net(Learns()), epochs=2, at=[3, 6])


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("when", ["init", "fit", "epoch"])
@pytest.mark.parametrize(
    "take",
    [
        pytest.param(lambda model: list(model.parameters()), id="list"),
        pytest.param(lambda model: tuple(p.data for p in model.parameters()), id="data"),
        pytest.param(lambda model: dict(model.named_parameters()), id="dict"),
        pytest.param(lambda model: next(model.parameters()), id="one"),
    ],
)
def test_a_callback_that_holds_the_models_parameters_still_does(take: Any, when: str) -> None:
    class Shrinks(UnsafeCallback):
        def __init__(self) -> None:
            self.held: Any = None

        def init(self, learner: Any) -> None:
            self.take("init", learner)

        @on(FitBegin)
        def fit(self, event: FitBegin, phase: Phase, learner: Any) -> None:
            self.take("fit", learner)

        @on(EpochBegin, AbstractTrainingPhase)
        def epoch(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
            self.take("epoch", learner)

        def take(self, now: str, learner: Any) -> None:
            if now == when:
                self.held = take(learner.model)

        @on(StepEnd, AbstractTrainingPhase)
        def shrink(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            held = self.held.values() if isinstance(self.held, dict) else self.held
            with torch.no_grad():
                for tensor in [held] if isinstance(held, Tensor) else held:
                    tensor.mul_(0.9)

    assert_resumes_exactly(lambda: net(Shrinks()), epochs=2, at=[2, 8])


def test_loading_writes_into_no_tensor_that_a_callback_only_looked_at() -> None:
    class Looks(Callback):
        reads = ("step.xs",)

        def __init__(self) -> None:
            self.last: Any = None

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.last = learner.step.xs

    xs = torch.arange(8.0)[:, None]
    learner = net(Looks(), data=(TensorBatches(xs, xs, batch_size=4),))
    learner.fit(1)
    state = copy.deepcopy(learner.state_dict())
    learner.epoch(TrainingPhase(), data=[(xs[:4], xs[:4])])
    learner.load_state_dict(state)
    assert torch.equal(xs, torch.arange(8.0)[:, None])


def test_callbacks_that_know_each_other_or_contain_themselves_do_not_hang() -> None:
    @attrs.define
    class Helper:
        owner: Any

    @attrs.define
    class Owner(Callback):
        helper: Any = None
        count: int = 0

        def init(self, learner: Any) -> None:
            self.helper = Helper(self)

        @on(StepEnd, AbstractTrainingPhase)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.count += 1

    class Loop(Callback):
        def __init__(self) -> None:
            self.items: dict[str, Any] = {}
            self.items["self"] = self.items
            self.count = 0

        @on(StepEnd, AbstractTrainingPhase)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.count += 1

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* changed in training and cannot be saved")
        learner = net(Owner(), Loop())
        learner.fit(1)
        again = net(owner := Owner(), loop := Loop())
        again.load_state_dict(learner.state_dict())
    assert owner.count == loop.count == 2


def test_whatever_has_a_state_is_kept_also_inside_a_callback() -> None:
    class Scaler:
        """Stands for a gradient scaler, a scheduler, a metric: an object with the pair."""

        def __init__(self) -> None:
            self.scale = 2.0

        def state_dict(self) -> dict[str, Any]:
            return {"scale": self.scale}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.scale = state["scale"]

    class Scales(Callback):
        def __init__(self) -> None:
            self.scaler = Scaler()
            self.module = nn.Linear(1, 1)
            self.optimizer = torch.optim.Adam(self.module.parameters())

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.scaler.scale *= 1.5
            with torch.enable_grad():
                self.module(torch.ones(1, 1)).sum().backward()
            self.optimizer.step()

    first = net(a := Scales())
    first.fit(2)
    second = net(b := Scales(), seed=99)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert b.scaler.scale == a.scaler.scale == 2.0 * 1.5**8
    assert torch.equal(a.module.weight, b.module.weight)
    assert b.optimizer.state[b.module.weight]["step"] == 8
    b.module(torch.ones(1, 1)).sum().backward()
    b.optimizer.step()
    assert not torch.equal(a.module.weight, b.module.weight)  # it steps the module that is there


def test_numbers_of_numpy_in_an_optimizer_and_a_metric_leave_files_that_can_be_read(tmp_path: Path) -> None:
    class Schedules(Callback):
        writes = ("optimizer",)

        @on(EpochBegin, AbstractTrainingPhase)
        def begin(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
            for group in learner.optimizer.param_groups:
                group["lr"] = np.float64(0.01) * np.cos(np.float64(0.1))

    def learner() -> Learner[Any]:
        metric = Metric(lambda preds, ys: torch.tensor(np.float64(preds.mean().item())), name="mean")
        return net(Recorder(), Metrics(metric), Schedules(), Checkpointer(tmp_path / "run"))

    plain = net(Recorder(), Schedules())
    plain.fit(2)
    for until in (1, 2):
        resumed = learner()
        resumed.fit(until, resume=tmp_path / "run")
    assert_same_bits(plain, resumed)


def test_a_modules_extra_state_that_no_file_can_hold_is_told_when_it_is_written(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def __init__(self, extra: Any) -> None:
            super().__init__(1, 1)
            self.extra = extra

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    learner = net(Checkpointer(tmp_path / "run"), model=Extra(Ring()))
    with pytest.raises(CheckpointError, match=r"_extra_state.*Ring"):
        learner.fit(2)
    plain = net(model=Extra({"a": [1, torch.ones(1)]}))
    plain.save(tmp_path / "state.pt")
    again = net(model=Extra(None))
    again.load(tmp_path / "state.pt")
    assert again.model.extra["a"][0] == 1


@pytest.mark.slow
def test_a_file_of_many_steps_is_little_more_than_the_numbers_that_were_recorded(tmp_path: Path) -> None:
    steps = 2000
    learner = Learner(
        nn.Linear(1, 1),
        nn.functional.mse_loss,
        data=(TensorBatches(torch.rand(steps, 1), torch.rand(steps, 1), batch_size=1),),
        callbacks=[
            Traces({"loss": lambda learner: learner.step.loss}),
            Scheduler({LearningRate: one_cycle(steps, 0.01)}),
            Recorder(),
        ],
        default_callbacks=False,
    )
    learner.save(tmp_path / "before.pt")
    learner.fit(1)
    learner.save(tmp_path / "after.pt")
    before, after = ((tmp_path / name).stat().st_size for name in ("before.pt", "after.pt"))
    assert after - before < 1.2 * steps * (8 + 4 + 8 + 8)  # two numbers of steps, a loss, a rate
