"""Random trees of helpers on a phase and a callback: a killed run goes on to the bit, or a warning names the path."""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from torch import nn

from fluxloop import Callback, Phase, StepEnd, TrainingPhase, on
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.testing import assert_same_bits, toy_learner

EXAMPLES = int(os.environ.get("FLUXLOOP_HELPERS", "20"))


class Node:
    """A helper of plain attributes, with others below it."""

    pool: list[int]

    def __init__(self, children: list[Any]) -> None:
        self.children = children
        self.n = 0
        self.best: Any = None
        self.items: list[Any] = []
        self.extra: Any = None

    def step(self, draw: random.Random, value: float) -> None:
        self.n += 1
        what = draw.randrange(7)
        if what == 0:
            self.items.append(value)
        elif what == 1:
            self.items = [*self.items[-3:], {"at": self.n, "values": torch.full((2,), value)}]
        elif what == 2:
            self.best = (value, self.items)
        elif what == 3:
            self.late = torch.full((3,), value)
        elif what == 4 and hasattr(self, "late"):
            del self.late
        elif what == 5 and self.children:
            self.extra = self.children[draw.randrange(len(self.children))]
        elif what == 6:
            self.children.reverse()


class Call(Node):
    def __call__(self) -> int:
        return self.n


class Slots:
    __slots__ = ("last", "queue")

    def __init__(self) -> None:
        self.queue: deque[float] = deque(maxlen=4)

    def step(self, draw: random.Random, value: float) -> None:
        self.queue.append(value)
        self.last = value


class Pair:
    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, draw: random.Random, value: float) -> None:
        self.seen = [*self.seen, value]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class More(Pair):
    """Adds a count beside its base's pair."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def step(self, draw: random.Random, value: float) -> None:
        super().step(draw, value)
        self.count += 1


class Metric(nn.Module):
    """Keeps its states as attributes that no ``state_dict`` has, as the metrics of torchmetrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())
        self.values: list[torch.Tensor] = []
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def update(self, value: float) -> None:
        self.total = self.total + value
        self.values.append(torch.tensor(value))
        self.count += 1

    def step(self, draw: random.Random, value: float) -> None:
        self.update(value)


class Trained(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 1)
        with torch.no_grad():
            self.weight.fill_(0.5)
            self.bias.zero_()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def step(self, draw: random.Random, value: float) -> None:
        with torch.enable_grad():
            self(torch.full((1, 2), value)).sum().backward()
        if draw.random() < 0.5:
            self.optimizer.step()
            self.optimizer.zero_grad()


class Draws:
    def __init__(self) -> None:
        self.torchs = [torch.Generator().manual_seed(1)]
        self.pythons = {"a": random.Random(2)}
        self.numpys = numpy.random.default_rng(3)
        self.drawn: list[float] = []

    def step(self, draw: random.Random, value: float) -> None:
        self.drawn.append(torch.rand(1, generator=self.torchs[0]).item())
        self.drawn.append(self.pythons["a"].random() + self.numpys.random())


class Arrays:
    def __init__(self) -> None:
        self.table = numpy.zeros(3)
        self.tensor = torch.zeros(4)
        self.sets: set[int] = set()

    def step(self, draw: random.Random, value: float) -> None:
        self.table[draw.randrange(3)] += value
        self.tensor.data[draw.randrange(4)] += value
        self.sets.add(draw.randrange(9))


class Unkept:
    """Cannot be kept: an iterator knows its place alone."""

    def __init__(self) -> None:
        self.numbers = iter(range(1000))
        self.last = 0

    def step(self, draw: random.Random, value: float) -> None:
        self.last = next(self.numbers)


LEAVES = (Slots, Pair, More, Metric, Trained, Draws, Arrays, Arrays, Unkept)
Spec = Any
WRAPS: dict[str, Callable[[list[Any]], Any]] = {
    "object": Node,
    "callable": Call,
    "list": list,
    "tuple": tuple,
    "dict": lambda children: {f"k{n}": child for n, child in enumerate(children)},
    "deque": deque,
    "partial": lambda children: partial(print, *children, kept=children),
    "method": lambda children: Node(children).step,
    "closure": lambda children: lambda: children[0] if children else None,
}

trees: st.SearchStrategy[Spec] = st.recursive(
    st.sampled_from(range(len(LEAVES))),
    lambda inner: st.tuples(st.sampled_from(sorted(WRAPS)), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=6,
)


def build(spec: Spec, made: list[Any], shared: list[Any]) -> Any:
    """Make a tree; every third helper is one that is there already."""
    if isinstance(spec, int):
        if shared and len(made) % 3 == 2:
            return shared[0]
        leaf = LEAVES[spec]()
        made.append(leaf)
        shared.append(leaf)
        return leaf
    kind, inner = spec
    value = WRAPS[kind]([build(each, made, shared) for each in inner])
    node = getattr(value, "__self__", value)
    if isinstance(node, Node):
        made.append(node)
    return value


def tell(value: Any, known: dict[int, Any]) -> Any:
    """Describe what a tree says, and which of its parts are the same."""
    if isinstance(value, (int, float, str, type(None))):
        return value
    if id(value) in known:
        return "again", known[id(value)][0]
    known[id(value)] = len(known), value  # so that no other takes its place
    if isinstance(value, torch.Tensor):
        grad = None if not value.is_leaf or value.grad is None else value.grad.tolist()
        return "tensor", value.tolist(), grad
    if isinstance(value, numpy.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, (list, tuple, deque)):
        return type(value).__name__, [tell(item, known) for item in value]
    if isinstance(value, dict):
        return [(key, tell(item, known)) for key, item in value.items()]
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, partial):
        return tell([value.args, value.keywords], known)
    if hasattr(value, "__self__") and not isinstance(value.__self__, type(os)):
        return tell(value.__self__, known)
    if isinstance(value, nn.Module):
        own = {n: v for n, v in vars(value).items() if n not in vars(nn.Module()) and n != "optimizer"}
        return [tell(own, known), tell(dict(value.named_parameters()), known), tell(dict(value.named_buffers()), known)]
    if callable(value) and getattr(value, "__closure__", None):
        return [tell(cell.cell_contents, known) for cell in value.__closure__]
    if isinstance(value, Slots):
        return tell([value.queue, getattr(value, "last", None)], known)
    if isinstance(value, Unkept):
        return value.last
    return [(n, tell(v, known)) for n, v in sorted(vars(value).items())] if hasattr(value, "__dict__") else None


class Steps(TrainingPhase):
    def __init__(self, spec: Spec) -> None:
        self.made: list[Any] = []
        self.tree = build(spec, self.made, [])
        self.n = 0

    def finish(self, learner: Any, state: Any) -> None:
        self.n += 1
        for number, helper in enumerate(self.made):
            helper.step(random.Random(self.n * 100 + number), state.loss.item())


class Watches(Callback):
    draws = False
    reads = ("step.loss",)

    def __init__(self, spec: Spec) -> None:
        self.made: list[Any] = []
        self.tree = build(spec, self.made, [])
        self.n = 0

    @on(StepEnd)
    def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.n += 1
        for number, helper in enumerate(self.made):
            helper.step(random.Random(self.n * 100 + number), learner.step.loss.item())


class KilledError(BaseException):
    pass


class Kill(Callback):
    draws = False
    transient = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    @on(StepEnd)
    def count(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KilledError


@pytest.mark.slow
@given(
    spec=trees,
    other=trees,
    kills=st.lists(st.integers(1, 12), min_size=1, max_size=2),
    every=st.integers(1, 3),
    again=st.booleans(),
)
@settings(
    deadline=None,
    max_examples=EXAMPLES,
    phases=[Stage.explicit, Stage.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
def test_a_tree_of_helpers_goes_on_to_the_bit_or_a_warning_names_its_path(
    spec: Spec, other: Spec, kills: list[int], every: int, again: bool
) -> None:
    def run(kill: int, folder: Path | None, former: Any = None) -> tuple[Any, Steps, Watches]:
        if former is None:
            steps, watches = Steps(spec), Watches(other)
            more = [Checkpointer(folder, every=every, unit="step")] if folder is not None else []
            learner = toy_learner(watches, Kill(kill), *more)
        else:
            learner, steps, watches = former
            learner.get_callback(Kill).left = kill
        try:
            learner.fit(2, phases=[steps], resume=folder, steps_per_epoch=4)
        except KilledError:
            return run(kills.pop() if kills else -1, folder, (learner, steps, watches) if again else None)
        return learner, steps, watches

    plain = run(-1, None)
    with TemporaryDirectory() as name, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resumed = run(kills.pop(), Path(name) / "run")
    assert_same_bits(plain[0], resumed[0])
    named = " ".join(str(warning.message) for warning in told)
    for what, now, was in (("phases.Steps.", resumed[1], plain[1]), ("callbacks.Watches.", resumed[2], plain[2])):
        assert now.n == was.n
        if what not in named:
            assert tell([now.made, now.tree], {}) == tell([was.made, was.tree], {})


def test_a_copy_of_a_tree_says_the_same() -> None:
    phase = Steps(("object", [("list", [0, 2]), 4, 5]))
    learner = toy_learner()
    learner.fit(1, phases=[phase], steps_per_epoch=4)
    copied = copy.deepcopy(learner)
    twin = copied.phases[Steps]
    learner.fit(1, phases=[phase], steps_per_epoch=4)
    copied.fit(1, phases=[twin], steps_per_epoch=4)
    assert tell([phase.made, phase.tree], {}) == tell([twin.made, twin.tree], {})
