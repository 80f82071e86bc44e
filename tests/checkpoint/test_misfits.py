from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Callback,
    CheckpointError,
    EarlyStopping,
    Learner,
    LearningRate,
    Metrics,
    Phase,
    Recorder,
    Scheduler,
    StepEnd,
    TrainingPhase,
    ValidationPhase,
    cosine,
    on,
    runstep,
)
from fluxloop.checkpoint.gathering import gather
from fluxloop.randomness import generator_states
from toys import Killed

State = dict[str, Any]
XS = torch.rand(24, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.calls = 0

    def forward(self, xs: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        result: Tensor = self.second(self.norm(self.first(xs)).tanh())
        return result


class Counting(Callback):
    """Keeps a pair that looks closely at what it is given."""

    def __init__(self) -> None:
        self.count = 0

    @on(StepEnd, AbstractTrainingPhase)
    def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.count += 1

    def state_dict(self) -> State:
        return {"count": self.count}

    def load_state_dict(self, state: State) -> None:
        self.count = 0
        if not isinstance(state["count"], int):
            raise TypeError("expected a count")
        self.count = state["count"]


class Waits(TrainingPhase):
    """Updates at every second step, and keeps a pair."""

    def __init__(self) -> None:
        self.n = 0

    def step(self, learner: Any, batch: Any) -> Any:
        self.n += 1
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.preds = learner.model(state.xs)
            state.loss = nn.functional.mse_loss(state.preds, state.ys)
            learner.backward(state.loss)
            if self.n % 2 == 0:
                learner.update()

    def state_dict(self) -> State:
        return {"n": self.n}

    def load_state_dict(self, state: State) -> None:
        self.n = state["n"] + 0


def make(seed: int = 0, **options: Any) -> Learner[Any]:
    torch.manual_seed(seed)
    data = TensorDataset(XS, XS.sum(1, keepdim=True))
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    arguments: Any = {
        "model": Net(),
        "loss_fn": nn.functional.mse_loss,
        "data": (loader, DataLoader(data, batch_size=8)),
        "optimizer": partial(torch.optim.Adam, lr=0.01),
        "callbacks": [
            *(Recorder(), Metrics(), EMA("model", 0.9), Counting(), EarlyStopping(9)),
            Scheduler({LearningRate: cosine(20, 0.1, 0.01)}),
        ],
        "default_callbacks": False,
        **options,
    }
    return Learner(arguments.pop("model"), arguments.pop("loss_fn"), **arguments)


def phases() -> list[Phase]:
    return [Waits(), ValidationPhase()]


def parts(value: Any) -> Iterator[bytes]:
    """Give the bits of plain data."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield repr(key).encode()
            yield from parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from parts(item)
    else:
        yield repr(value).encode()


def digest(learner: Learner[Any]) -> str:
    """Give a number for all that a learner is, and the global generators."""
    state = gather(learner, None)
    state["streams"] = {owner: index for owner, index in state["streams"].items() if index}
    grads = {name: parameter.grad for name, parameter in learner.model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in learner.model.named_parameters()}
    everything = [state, learner.history.rows(), learner.history.stop_reason, grads, flags, generator_states()]
    return blake2b(b"|".join(parts(everything))).hexdigest()


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    """Give the states of a run in the middle of an epoch, and at its end."""
    found: dict[str, State] = {}
    learner, running = make(), phases()

    def look() -> None:
        if vars(running[0])["n"] == 9:  # in the second training epoch, with a gradient that waits
            found["inside"] = copy.deepcopy(learner.state_dict())
            raise Killed

    learner.at_safe_point(look)
    with pytest.raises(Killed):
        learner.fit(3, phases=running)
    learner = make()
    learner.fit(1, phases=phases())
    found["between"] = copy.deepcopy(learner.state_dict())
    assert found["inside"]["place"]["feed"] is not None
    assert found["inside"]["updates"]["gradients"]
    return found


@pytest.fixture(scope="module")
def victim() -> Learner[Any]:
    learner = make(9)
    learner.fit(1, phases=phases())
    return learner


Change = Callable[[State], object]


def put(path: str, value: Any) -> Change:
    """Change what stands at a path, whose parts are separated by slashes."""

    def change(state: State) -> None:
        *way, last = path.split("/")
        here: Any = state
        for name in way:
            here = here[int(name)] if isinstance(here, list) or name not in here else here[name]
        last_key: Any = last if not isinstance(here, list) and (last in here or not last.isdigit()) else int(last)
        here[last_key] = value(here[last_key]) if callable(value) else value

    return change


def drop(path: str) -> Change:
    def change(state: State) -> None:
        *way, last = path.split("/")
        here: Any = state
        for name in way:
            here = here[int(name)] if name not in here else here[name]
        del here[last]

    return change


def rename(path: str, new: str) -> Change:
    def change(state: State) -> None:
        *way, last = path.split("/")
        here: Any = state
        for name in way:
            here = here[name]
        here[new] = here.pop(last)

    return change


nan = float("nan")
MODEL, ADAM, PLACE = "models//state", "optimizers//state", "place"
COUNTS = "cbstate/history/items/test_misfits.Waits/items"
TOP = ("seed", "models", "loss_fn", "views", "optimizers", "updates", "streams", "history", "cbstate", "callbacks")
CHANGES: dict[str, Change] = {
    **{f"no {name}": drop(name) for name in (*TOP, "phases", "data", "place", "fluxloop")},
    **{f"{name} is a list": put(name, [1]) for name in (*TOP, "phases", "data", "place")},
    **{f"{name} is a number": put(name, 7) for name in (*TOP[1:], "phases", "data", "place")},
    "a layout of the future": put("fluxloop", 2),
    "a layout that is a text": put("fluxloop", "1"),
    "a layout that is true": put("fluxloop", True),
    "a negative seed": put("seed", -1),
    "a seed that is not whole": put("seed", 0.5),
    "a seed beyond 32 bits": put("seed", 2**32),
    # models
    "another name of the model": rename("models/", "G"),
    "no weights": drop(MODEL),
    "a weight less": drop(f"{MODEL}/second.bias"),
    "a weight more": put(f"{MODEL}/third.bias", torch.zeros(1)),
    "a renamed weight": rename(f"{MODEL}/second.bias", "second.bais"),
    "a weight of another shape": put(f"{MODEL}/first.weight", torch.zeros(4, 2)),
    "a weight of more dimensions": put(f"{MODEL}/first.weight", torch.zeros(4, 3, 1)),
    "a weight of fewer dimensions": put(f"{MODEL}/first.weight", torch.zeros(12)),
    "a weight of another type": put(f"{MODEL}/first.weight", Tensor.double),
    "a weight of whole numbers": put(f"{MODEL}/first.weight", Tensor.long),
    "a weight that is a number": put(f"{MODEL}/second.bias", 0.5),
    "a weight that is a list": put(f"{MODEL}/second.bias", [0.5]),
    "a weight that is nothing": put(f"{MODEL}/second.bias", None),
    "a count of batches that is a float": put(f"{MODEL}/norm.num_batches_tracked", Tensor.float),
    "weights that are a list": put(MODEL, list),
    "a weight whose name is a number": put(MODEL, lambda state: {**state, 3: torch.zeros(1)}),
    "no metadata": drop("models//metadata"),
    "metadata of no module": put("models//metadata", 3),
    "a buffer that is a number": put("models//buffers/seen", 1.0),
    "a buffer of another type": put("models//buffers/seen", Tensor.long),
    "buffers that are a list": put("models//buffers", []),
    "an unknown parameter is frozen": put("models//frozen", ["third.weight"]),
    "what is frozen is a number": put("models//frozen", 1),
    "what is frozen are numbers": put("models//frozen", [1]),
    "attributes of an unknown part": put("models//attributes/third", {"n": 1}),
    "attributes that are a number": put("models//attributes/", 3),
    "a loss function that is a module": put("loss_fn", lambda _: {"state": {}}),
    "a view of another shape": put("views", {"model@ema": {"first.weight": torch.zeros(1)}}),
    # optimizers
    "another name of the optimizer": rename("optimizers/", "G"),
    "another class of optimizer": put("optimizers//class", "torch.optim.sgd.SGD"),
    "a class of optimizer that is a number": put("optimizers//class", 3),
    "no defaults": drop("optimizers//defaults"),
    "defaults that are a list": put("optimizers//defaults", []),
    "no state of the optimizer": drop(ADAM),
    "no groups": drop(f"{ADAM}/param_groups"),
    "an empty list of groups": put(f"{ADAM}/param_groups", []),
    "groups that are a number": put(f"{ADAM}/param_groups", 2),
    "a group without parameters": drop(f"{ADAM}/param_groups/0/params"),
    "a group without a rate": drop(f"{ADAM}/param_groups/0/lr"),
    "a rate that is a text": put(f"{ADAM}/param_groups/0/lr", "fast"),
    "a rate that is NaN": put(f"{ADAM}/param_groups/0/lr", nan),
    "a rate that is a tensor": put(f"{ADAM}/param_groups/0/lr", torch.ones(2)),
    "one beta": put(f"{ADAM}/param_groups/0/betas", (0.9,)),
    "betas that are texts": put(f"{ADAM}/param_groups/0/betas", ("0.9", "0.99")),
    "parameters numbered in another order": put(f"{ADAM}/param_groups/0/params", [1, 0, 2, 3, 4, 5]),
    "a parameter numbered twice": put(f"{ADAM}/param_groups/0/params", [0, 0, 2, 3, 4, 5]),
    "a parameter numbered by a tensor": put(f"{ADAM}/param_groups/0/params/0", torch.zeros(2, 3)),
    "a parameter less": put(f"{ADAM}/param_groups/0/params", [0, 1, 2, 3, 4]),
    "parameters with names of their own": put("optimizers//names", [["a", "b", "c", "d", "e", "f"]]),
    "one name less": put("optimizers//names", lambda names: [names[0][:-1]]),
    "names twice": put("optimizers//names", lambda names: [[*names[0][:-1], names[0][0]]]),
    "names that are numbers": put("optimizers//names", [[1, 2, 3, 4, 5, 6]]),
    "names that are a text": put("optimizers//names", "first.weight"),
    "states that are a list": put(f"{ADAM}/state", []),
    "a state of a parameter beyond": put(f"{ADAM}/state", lambda state: {**state, 99: state[0]}),
    "a state of a negative parameter": put(f"{ADAM}/state", lambda state: {**state, -1: state[0]}),
    "a state that is a number": put(f"{ADAM}/state", lambda state: {**state, 0: 1}),
    "an average of another shape": put(f"{ADAM}/state/0/exp_avg", torch.zeros(4, 2)),
    "an average of fewer dimensions": put(f"{ADAM}/state/0/exp_avg", torch.zeros(12)),
    "an average of more dimensions": put(f"{ADAM}/state/0/exp_avg_sq", torch.zeros(4, 3, 1)),
    "an average of another type": put(f"{ADAM}/state/0/exp_avg_sq", Tensor.double),
    "an average that is a number": put(f"{ADAM}/state/0/exp_avg", 0.5),
    "no average": drop(f"{ADAM}/state/0/exp_avg"),
    "a count of steps that is NaN": put(f"{ADAM}/state/0/step", torch.tensor(nan)),
    "a negative count of steps": put(f"{ADAM}/state/0/step", torch.tensor(-1.0)),
    "a count of half steps": put(f"{ADAM}/state/0/step", torch.tensor(1.5)),
    "a count of steps of another shape": put(f"{ADAM}/state/0/step", torch.zeros(3)),
    "a count of steps that is a text": put(f"{ADAM}/state/0/step", "3"),
    # updates
    "no slots": drop("updates/slots"),
    "another name of a slot": rename("updates/slots/", "G"),
    "a slot without a flag": drop("updates/slots//waiting"),
    "a slot with a flag that is a number": put("updates/slots//waiting", 1),
    "gradients that are a list": put("updates/gradients", []),
    "a gradient of another name": rename("updates/gradients/first.weight", "weight.first"),
    "a gradient of another shape": put("updates/gradients/first.weight", torch.zeros(3)),
    "a gradient of another type": put("updates/gradients/first.weight", Tensor.double),
    "a gradient that is a number": put("updates/gradients/first.weight", 1.0),
    # streams and history
    "a negative count of a stream": put("streams", lambda given: {**given, "training/step": -1}),
    "a count of a stream that is NaN": put("streams", lambda given: {**given, "training/step": nan}),
    "a count of a stream that is a text": put("streams", lambda given: {**given, "training/step": "1"}),
    "no count of cycles": drop("history/cycles"),
    "a negative count of cycles": put("history/cycles", -1),
    "a count of cycles that is NaN": put("history/cycles", nan),
    "a count of cycles that is true": put("history/cycles", True),
    "a reason that is a number": put("history/stop_reason", 3),
    "a reason that is a list": put("history/stop_reason", ["why"]),
    # what callbacks share
    "counts that are a list": put("cbstate/history", [1]),
    "counts that are a number": put("cbstate/history", 1),
    "counts without items": drop("cbstate/history/items"),
    "counts of a phase that are a text": put(COUNTS, "many"),
    "a negative count of epochs": put(f"{COUNTS}/epochs", -3),
    "a count of steps of a phase that is NaN": put(f"{COUNTS}/steps", nan),
    "a count of steps in an epoch that is a tensor": put(f"{COUNTS}/steps_epoch", torch.zeros(2)),
    "updates that are a number": put(f"{COUNTS}/updates", 3),
    "updates that are a text": put(f"{COUNTS}/updates", {None: "three"}),
    "metrics that are a text": put("cbstate/metrics", "none"),
    "metrics without items": drop("cbstate/metrics/items"),
    "hyperparameters that are a list": put("cbstate/hyperparameters", [1]),
    "a series that is a number": put("cbstate/hyperparameters/learning_rate", 0.1),
    "a series of numbers": put("cbstate/hyperparameters/learning_rate", [0.1, 0.2]),
    # callbacks
    "another class of a callback": put("callbacks/EMA/class", "fluxloop.callbacks.swa.StochasticWeightAveraging"),
    "a callback without a class": drop("callbacks/EMA/class"),
    "a class of a callback that is a number": put("callbacks/EMA/class", 3),
    "a callback without a state": drop("callbacks/EMA/state"),
    "a state of a callback that is a list": put("callbacks/EMA/state", []),
    "a callback that is a text": put("callbacks/EMA", "state"),
    "conditions that are a number": put("callbacks/EMA/around", 1),
    "conditions that are numbers": put("callbacks/EMA/around", [1]),
    "a pair that is a number": put("callbacks/EMA/state/pair", 1),
    "a pair that is empty": put("callbacks/EMA/state/pair", {}),
    "attributes instead of a pair": put("callbacks/EMA/state", {"num_averaged": 3}),
    "a pair where there is none": put("callbacks/Recorder", {"class": "x", "state": {"pair": 1}, "around": []}),
    "a negative count of averages": put("callbacks/EMA/state/pair/num_averaged", -1),
    "a count of averages that is NaN": put("callbacks/EMA/state/pair/num_averaged", nan),
    "an average without a weight": drop("callbacks/EMA/state/pair/average/first.weight"),
    "an averaged weight of another shape": put("callbacks/EMA/state/pair/average/first.weight", torch.zeros(1)),
    "an averaged model that is a number": put("callbacks/EMA/state/pair/average", 1),
    "a schedule that is a number": put("callbacks/Scheduler/state/pair/schedules", 3),
    "another schedule": put("callbacks/Scheduler/state/pair/schedules", {"learning_rate": "linear(1, 2) per step"}),
    "a count of scheduled steps that is a text": put("callbacks/Scheduler/state/pair/steps", "3"),
    "what early stopping has seen is a text": put("callbacks/EarlyStopping/state/pair", "much"),
    "what a user's callback refuses": put("callbacks/Counting/state/pair", {"count": "three"}),
    "what a user's callback cannot read": put("callbacks/Counting/state/pair", {"cuont": 3}),
    # phases
    "states of a phase that are no list": put("phases/test_misfits.Waits", {"pair": {"n": 3}}),
    "a state of a phase that is a number": put("phases/test_misfits.Waits", [3]),
    "what a user's phase refuses": put("phases/test_misfits.Waits", [{"pair": {"n": "x"}}]),
    "attributes instead of a phase's pair": put("phases/test_misfits.Waits", [{"n": 3}]),
    # data and the place in it
    "data that is a number": put("data/training", 3),
    "generators that are a number": put("data/training/own_generators", 1),
    "a generator that is a number": put("data/training/own_generators", [1]),
    "a generator of another size": put("data/training/own_generators", [torch.zeros(3, dtype=torch.uint8)]),
    "a fingerprint that is a text": put("data/training/fingerprint", "rows"),
    "a generator of another type": put("data/training/own_generators", [torch.zeros(5056)]),
}
INSIDE: dict[str, Change] = {
    "a place without phases": drop("place/phases"),
    "phases that are numbers": put("place/phases", [1, 2]),
    "other phases": put("place/phases", ["fluxloop.phases.supervised.TrainingPhase"]),
    "a place without an index": drop("place/index"),
    "a negative index": put("place/index", -1),
    "an index beyond": put("place/index", 2),
    "an index that is NaN": put("place/index", nan),
    "a place without generators": drop("place/script"),
    "generators that are a text": put("place/script", "random"),
    "generators of nothing": put("place/script", {}),
    "a generator of torch's that is too short": put("place/script/torch", torch.zeros(9, dtype=torch.uint8)),
    "a generator of Python's that is a number": put("place/script/python", 3),
    "a generator of NumPy's that is a number": put("place/script/numpy", 3),
    "a feed that is a number": put("place/feed", 3),
    "a feed without a key": drop("place/feed/key"),
    "a feed of other data": put("place/feed/key", "validation"),
    "a feed of data that is not there": put("place/feed/key", "other"),
    "a feed without a batch": drop("place/feed/batch"),
    "a negative batch": put("place/feed/batch", -1),
    "a batch that is NaN": put("place/feed/batch", nan),
    "a batch beyond the last": put("place/feed/batch", 9),
    "another number of batches": put("place/feed/length", 7),
    "a number of batches that is a text": put("place/feed/length", "6"),
    "a feed without generators": drop("place/feed/global_generators"),
    "a feed's generators that are a list": put("place/feed/global_generators", []),
    "a feed's own generator of another size": put("place/feed/own_generators", [torch.zeros(3, dtype=torch.uint8)]),
    "what the data keeps is a number": put("place/feed/walk", 3),
    "no generators of the data's own": drop("place/feed/own_generators"),
    "no private generators": drop("place/feed/private_now"),
    "a fingerprint that is a number": put("place/feed/fingerprint", 3),
    "another number of steps": put("place/steps_per_epoch", 3),
    "a number of steps that is a text": put("place/steps_per_epoch", "all"),
}


def test_there_are_more_than_a_hundred_kinds() -> None:
    assert len({*CHANGES, *INSIDE}) > 150


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(
    name: str, states: dict[str, State], victim: Learner[Any], tmp_path: Path
) -> None:
    state = copy.deepcopy(states["inside" if "gradient" in name else "between"])
    CHANGES[name](state)
    torch.save(state, tmp_path / "state.pt")
    before = digest(victim)
    with pytest.raises(CheckpointError):
        victim.load(tmp_path / "state.pt")
    assert digest(victim) == before
    with pytest.raises(CheckpointError):
        victim.fit(3, phases=phases(), resume=tmp_path / "state.pt")
    assert digest(victim) == before


@pytest.mark.slow(quick=5)
@pytest.mark.parametrize("name", INSIDE)
def test_a_place_that_does_not_fit_is_refused_and_nothing_is_changed(
    name: str, states: dict[str, State], victim: Learner[Any], tmp_path: Path
) -> None:
    state = copy.deepcopy(states["inside"])
    INSIDE[name](state)
    torch.save(state, tmp_path / "state.pt")
    before = digest(victim)
    with pytest.raises(CheckpointError):
        victim.fit(3, phases=phases(), resume=tmp_path / "state.pt")
    assert digest(victim) == before


def test_the_state_itself_fits_and_changes_everything(states: dict[str, State], victim: Learner[Any]) -> None:
    other = copy.deepcopy(victim)
    before = digest(other)
    other.load_state_dict(copy.deepcopy(states["inside"]))
    assert digest(other) != before


def test_a_loader_that_refuses_its_state_in_the_middle_of_an_epoch_leaves_the_learner_as_it_was() -> None:
    class Keeps:
        """Keeps its place, and looks closely at it."""

        def __init__(self, kind: str) -> None:
            self.kind, self.place = kind, 0

        def __iter__(self) -> Iterator[Any]:
            while self.place < 6:
                self.place += 1
                yield XS[4 * self.place - 4 : 4 * self.place], XS[4 * self.place - 4 : 4 * self.place].sum(1, True)
            self.place = 0

        def __len__(self) -> int:
            return 6

        def state_dict(self) -> State:
            return {"kind": self.kind, "place": self.place}

        def load_state_dict(self, state: State) -> None:
            if state["kind"] != self.kind:
                raise ValueError("made otherwise")
            self.place = state["place"]

    found: dict[str, State] = {}
    first = make(data=(Keeps("a"),), callbacks=[Recorder()])

    def look() -> None:
        if first.history[TrainingPhase].steps == 8 and not found:
            found["inside"] = copy.deepcopy(first.state_dict())

    first.at_safe_point(look)
    first.fit(2)
    second = make(9, data=(Keeps("b"),), callbacks=[Recorder()])
    second.fit(1)
    before = digest(second)
    second.state_dict()
    with TemporaryDirectory() as name:
        torch.save(found["inside"], Path(name) / "state.pt")
        with pytest.raises(CheckpointError, match=r"does not take the state it had .*: ValueError: made otherwise"):
            second.fit(2, resume=Path(name) / "state.pt")
    assert digest(second) == before
