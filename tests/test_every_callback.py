"""What every public built-in callback keeps to."""

from __future__ import annotations

import io
import os
import random
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassF1Score

import fluxloop
from fluxloop import (
    EMA,
    ActivationStats,
    AttentionMaps,
    BatchLimit,
    Callback,
    Checkpointer,
    ConditionalCallback,
    CSVLogger,
    CustomCallback,
    CutMix,
    EarlyStopping,
    EmbeddingMap,
    FeatureStats,
    FrechetDistance,
    GarbageCollect,
    GradientClip,
    KeepBestModel,
    KNNProbe,
    Learner,
    LinearProbe,
    LogHistograms,
    LogHyperParams,
    LogImages,
    LogMetrics,
    LogTraces,
    LogVisualization,
    LRScheduler,
    Metric,
    Metrics,
    MetricSource,
    MetricsPrinter,
    MixUp,
    NeighborImages,
    Profile,
    ProgressBar,
    ReconstructionImages,
    Recorder,
    SampleImages,
    SanityCheck,
    Scheduler,
    SetEpoch,
    StallReport,
    StepBegin,
    StepEnd,
    StochasticWeightAveraging,
    StopOnNaNLoss,
    TensorBatches,
    Timer,
    Traces,
    TrainingPhase,
    Unfreeze,
    UnsafeCallback,
    ValidationPhase,
    accuracy,
    callbacks,
    throttle,
    watching,
)
from fluxloop.callbacks.log import LogCallback
from fluxloop.hyperparameters import WeightDecay
from fluxloop.logging import Memory, Record, Scalar
from fluxloop.schedules import one_cycle
from fluxloop.stopping import NoImprovement
from fluxloop.testing import (
    EventRecorder,
    assert_observer,
    assert_resumes_exactly,
    assert_same_bits,
    bits,
    infer_access,
)
from toys import through_a_file

pytestmark = pytest.mark.filterwarnings("ignore:weights are not finite before the first step")

Make = Callable[[], Callback]


def loss_of(learner: Any) -> Any:
    return learner.step.loss


def picture(step: Any) -> Any:
    return step.preds.detach().reshape(1, 1, -1)


def as_images(rows: Tensor) -> Tensor:
    return rows.detach().reshape(-1, 1, 1, 3)


def evenly(module: nn.Module, rows: Tensor) -> Tensor:
    return torch.full((len(rows), 1, 3, 3), 1 / 3)


numbers = count()


def fresh(name: str) -> str:
    """Give a file or folder that is not there yet."""
    return f"{name}-{next(numbers)}"


MAKE: dict[type[Callback], Make] = {
    ActivationStats: lambda: ActivationStats(every=2),
    AttentionMaps: lambda: AttentionMaps("model", count=2, attention=evenly, show=as_images, folder=None),
    BatchLimit: lambda: BatchLimit(50),
    CSVLogger: lambda: CSVLogger(fresh("metrics.csv")),
    Checkpointer: lambda: Checkpointer(fresh("run")),
    ConditionalCallback: lambda: throttle(CustomCallback(loss_of, StepEnd, name="throttled"), StepEnd, freq=2),
    CustomCallback: lambda: CustomCallback(loss_of, StepEnd),
    CutMix: CutMix,
    EMA: lambda: EMA("model", 0.9),
    EarlyStopping: lambda: EarlyStopping(99, monitor="training/loss"),
    EmbeddingMap: lambda: EmbeddingMap("model", folder=None),
    EventRecorder: EventRecorder,
    FeatureStats: lambda: FeatureStats("preds"),
    FrechetDistance: lambda: FrechetDistance("model", nn.Identity(), inputs=torch.eye(3)),
    GarbageCollect: lambda: GarbageCollect(every=8),
    GradientClip: lambda: GradientClip(1e9),
    KNNProbe: lambda: KNNProbe("model", k=3),
    KeepBestModel: lambda: KeepBestModel("training/loss"),
    LRScheduler: lambda: LRScheduler(partial(StepLR, step_size=100)),
    LinearProbe: lambda: LinearProbe("model", 3, entries=("preds", "ys")),
    LogHistograms: lambda: LogHistograms(Memory(), every=2),
    LogHyperParams: lambda: LogHyperParams(Memory(), params={"width": 4}),
    LogImages: lambda: LogImages(Memory()),
    LogMetrics: lambda: LogMetrics(Memory()),
    LogTraces: lambda: LogTraces(Memory()),
    LogVisualization: lambda: LogVisualization(picture, Memory(), every=2),
    Metrics: Metrics,
    MetricsPrinter: MetricsPrinter,
    MixUp: MixUp,
    NeighborImages: lambda: NeighborImages("model", count=2, k=2, show=as_images, folder=None),
    Profile: Profile,
    ProgressBar: lambda: ProgressBar(enabled=True, interval=0.0, file=io.StringIO()),
    ReconstructionImages: lambda: ReconstructionImages(count=2, show=as_images, folder=None),
    Recorder: Recorder,
    SampleImages: lambda: SampleImages("model", shape=(1, 1, 3), folder=None),
    SanityCheck: SanityCheck,
    Scheduler: lambda: Scheduler({WeightDecay: 0.0}),
    SetEpoch: SetEpoch,
    StallReport: StallReport,
    StochasticWeightAveraging: StochasticWeightAveraging,
    StopOnNaNLoss: StopOnNaNLoss,
    Timer: lambda: Timer(hours=9),
    Traces: lambda: Traces({"loss": loss_of}),
    Unfreeze: lambda: Unfreeze({"*": 0}),
}
"""How to make one of each; a new built-in callback has to be added here."""

ALIKE: dict[type[Callback], Make] = {
    **MAKE,
    CSVLogger: lambda: CSVLogger("metrics.csv"),
    Checkpointer: lambda: Checkpointer("run"),
}
"""How to make one that is like the one before: what writes files is otherwise given others each time."""

COMPUTED = (ConditionalCallback, CustomCallback)
"""Their access is what they are given."""

DOCUMENTED: dict[type[Callback], Make] = {
    **{cls: make for cls, make in MAKE.items() if cls not in COMPUTED},
    FeatureStats: FeatureStats,
    LinearProbe: lambda: LinearProbe("model"),
    MetricSource: MetricSource,
}
"""The instance whose access a docstring tells: of a class whose access depends on its arguments, the one that is made
without any, or with the whole model. A view of weights, "model@ema", is told as "model" with words behind it."""

NEEDED: dict[type[Callback], tuple[type[Callback], ...]] = {
    ActivationStats: (Recorder,),
    AttentionMaps: (Recorder,),
    CSVLogger: (Recorder, Metrics),
    EarlyStopping: (Recorder, Metrics),
    EmbeddingMap: (Recorder,),
    FeatureStats: (Recorder,),
    FrechetDistance: (Recorder,),
    KNNProbe: (Recorder,),
    KeepBestModel: (Recorder, Metrics),
    LinearProbe: (Recorder,),
    LogHistograms: (Recorder,),
    LogHyperParams: (Recorder,),
    LogImages: (Recorder, SampleImages),
    LogMetrics: (Recorder, Metrics),
    LogTraces: (Recorder, Traces),
    LogVisualization: (Recorder,),
    Metrics: (Recorder,),
    MetricsPrinter: (Recorder, Metrics),
    NeighborImages: (Recorder,),
    ReconstructionImages: (Recorder,),
    SampleImages: (Recorder,),
}
"""What others have to publish for it."""

NO_OBSERVERS = {
    CutMix: "it trains on other rows",
    KeepBestModel: "it puts the best weights back when the fit has ended",
    MixUp: "it trains on other rows",
}
"""What changes weights, and why; everything else, as it is made above, only watches."""

CLOCK = ("callbacks.Timer",)
"""What the time decides: no run is like another there."""

every = pytest.mark.parametrize("cls", MAKE, ids=lambda cls: cls.__name__)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def public() -> set[type[Callback]]:
    given = [*vars(callbacks).values(), *(getattr(fluxloop, name) for name in fluxloop.__all__), EventRecorder]
    bases = (fluxloop.Callback, fluxloop.UnsafeCallback, fluxloop.MetricSource, LogCallback)
    return {thing for thing in given if isinstance(thing, type) and issubclass(thing, Callback) and thing not in bases}


def others(cls: type[Callback]) -> list[Callback]:
    return [MAKE[other]() for other in NEEDED.get(cls, ())]


def classes(num_batches: int, shuffle: bool) -> TensorBatches:
    """Make batches of 8 rows of three classes."""
    xs = torch.rand(8 * num_batches, 3, generator=torch.Generator().manual_seed(0))
    return TensorBatches(xs, torch.arange(8 * num_batches) % 3, batch_size=8, shuffle=shuffle)


def learner_with(*given: Callback, num_batches: int = 4, default_callbacks: bool = False) -> Learner:
    """Make a learner of one linear map."""
    model = nn.Linear(3, 3)
    nn.init.eye_(model.weight)
    nn.init.zeros_(model.bias)
    batches = classes(num_batches, shuffle=False)
    return Learner(
        model,
        cross_entropy,
        data=(batches, batches),
        optimizer=torch.optim.SGD,
        callbacks=given,
        default_callbacks=default_callbacks,
        seed=0,
    )


def noisy_learner(*given: Callback) -> Learner:
    """Make a learner with dropout, batch norm, momentum and shuffled data."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    batches = classes(3, shuffle=True)
    return Learner(
        model,
        cross_entropy,
        data=(batches, batches),
        optimizer=torch.optim.Adam,
        callbacks=given,
        default_callbacks=False,
        seed=7,
    )


def test_every_public_callback_is_looked_at_here() -> None:
    assert public() == set(MAKE)


def declared_in(cls: type[Callback]) -> dict[str, set[str]]:
    """Read the lines "Reads:", "Writes:" and "Runs after:" of a class's docstring."""
    found = {}
    for name in ("Reads", "Writes", "Runs after"):
        line = re.search(rf"^\s*{name}: (.*)$", cls.__doc__ or "", re.MULTILINE)
        words = re.sub(r"\(.*?\)", "", line[1]) if line else ""
        found[name] = {word.strip() for word in words.split(",") if word.strip()}
    return found


@pytest.mark.parametrize("cls", DOCUMENTED, ids=lambda cls: cls.__name__)
def test_the_docstring_tells_the_declared_access_and_order(cls: type[Callback]) -> None:
    callback = DOCUMENTED[cls]()
    assert declared_in(cls) == {
        "Reads": {path.partition("@")[0] for path in callback.reads},
        "Writes": {path.partition("@")[0] for path in callback.writes},
        "Runs after": {after.__name__ for after in callback.run_after},
    }


@pytest.mark.parametrize("cls", COMPUTED, ids=lambda cls: cls.__name__)
def test_a_docstring_tells_no_access_where_it_is_what_one_gives(cls: type[Callback]) -> None:
    assert declared_in(cls) == {"Reads": set(), "Writes": set(), "Runs after": set()}


@every
def test_it_says_whether_it_draws_random_numbers(cls: type[Callback]) -> None:
    if cls not in (*COMPUTED, LogVisualization, Traces):  # what those run is the user's
        assert MAKE[cls]().draws in (True, False)


@pytest.mark.slow(quick=26)
@every
def test_its_repr_names_it_and_holds_no_address(cls: type[Callback]) -> None:
    callback = MAKE[cls]()
    assert repr(callback).startswith(f"{cls.__name__}(")
    assert " at 0x" not in callback.identity


@pytest.mark.slow(quick=26)
@every
def test_two_made_alike_show_alike(cls: type[Callback]) -> None:
    assert ALIKE[cls]().identity == ALIKE[cls]().identity


@pytest.mark.slow(quick=28)
@every
def test_its_handlers_are_documented(cls: type[Callback]) -> None:
    callback = MAKE[cls]().unwrapped
    for name, method in vars(type(callback)).items():
        if hasattr(method, "__fluxloop_on__"):
            assert method.__doc__, f"{cls.__name__}.{name}"


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("cls", [cls for cls in MAKE if cls not in NO_OBSERVERS], ids=lambda cls: cls.__name__)
def test_adding_it_changes_no_weight(cls: type[Callback], capsys: pytest.CaptureFixture[str]) -> None:
    assert_observer(MAKE[cls](), lambda: noisy_learner(*others(cls)))
    assert_observer(MAKE[cls](), lambda: learner_with(*others(cls)))


@pytest.mark.slow(quick=2)
@every
def test_it_runs_in_the_same_turn_in_any_place_of_the_list(cls: type[Callback]) -> None:
    around: list[Make] = [make for kind, make in MAKE.items() if kind is not cls]
    digests, orders = set(), set()
    for place in (0, len(around)):
        given = [make() for make in around]
        given.insert(place, MAKE[cls]())
        learner = noisy_learner(*given)
        digests.add(learner.callbacks.digest)
        orders.add(tuple(learner.callbacks.order))
    assert len(digests) == len(orders) == 1  # that it trains alike then is seen below, with all together


@pytest.mark.slow(quick=9)
@every
def test_it_works_with_the_defaults_in_their_place_or_beside_them(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [each for each in others(cls) if not isinstance(each, (Recorder, Metrics))]
    learner = learner_with(MAKE[cls](), *given, default_callbacks=True, num_batches=2)
    learner.fit(1)
    names = learner.callbacks.order
    assert len(names) == len(set(names))
    assert {"Recorder", "Metrics", "MetricsPrinter", "ProgressBar", "StopOnNaNLoss"} <= set(names)
    assert learner.history[TrainingPhase].epochs == 1


def parts(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Lay a state out by path."""
    if isinstance(state, dict):
        for key, item in state.items():
            yield from parts(item, f"{path}.{key}")
    elif isinstance(state, (list, tuple, deque)):
        yield path, type(state)
        for index, item in enumerate(state):
            yield from parts(item, f"{path}.{index}")
    else:
        yield path, state


def alike(first: Any, second: Any) -> bool:
    """Compare two states to the bit."""
    a, b = dict(parts(first)), dict(parts(second))
    return a.keys() == b.keys() and all(
        torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name] for name, value in a.items()
    )


def seen(learner: Learner) -> dict[str, Any]:
    """Give what callbacks left in a learner, as a checkpoint keeps it."""
    found: dict[str, Any] = learner.state_dict()["cbstate"]
    return found


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("cls", [cls for cls in MAKE if cls is not Checkpointer], ids=lambda cls: cls.__name__)
def test_it_does_in_a_second_learner_what_it_does_in_a_first(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    callback, companions = MAKE[cls](), others(cls)
    results, told, learners = [], [], []
    for _ in range(2):
        learners.append(learner_with(callback, *companions))
        capsys.readouterr()
        learners[-1].fit(2)
        results.append(seen(learners[-1]))
        told.append(capsys.readouterr().out)
    assert alike(*results)
    assert told[0] == told[1]
    assert_same_bits(*learners)


def test_a_checkpointer_has_a_second_learner_go_on_and_not_begin_anew() -> None:
    keeper = Checkpointer("run")
    first, second = learner_with(Recorder(), keeper), learner_with(Recorder(), keeper)
    first.fit(2)
    with pytest.raises(fluxloop.CheckpointError, match="an earlier run has come further than this one"):
        second.fit(2)
    first.fit(1)
    second.fit(3, resume="run")
    assert_same_bits(first, second)


def test_a_throttled_callback_begins_anew_in_a_second_learner() -> None:
    calls: list[int] = []
    hook = throttle(CustomCallback(lambda learner: calls.append(1), StepBegin, TrainingPhase), StepBegin, freq=3)
    counts = []
    for _ in range(2):
        calls.clear()
        learner_with(hook, num_batches=4).fit(1, phases=[TrainingPhase()])
        counts.append(len(calls))
    assert counts == [2, 2]  # the first and the fourth of four


def test_a_sanity_check_looks_at_a_second_learner_too() -> None:
    check = SanityCheck()
    learner_with(check).fit(1)
    spoilt = learner_with(check)
    with torch.no_grad():
        spoilt.model.weight.fill_(float("nan"))
    with pytest.raises(fluxloop.SanityCheckError, match="NaN"):
        spoilt.fit(1)


@pytest.mark.slow(quick=4)
@every
def test_it_goes_through_an_epoch_of_no_fit_and_an_evaluation(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    learner = learner_with(MAKE[cls](), *others(cls))
    learner.epoch(TrainingPhase())
    learner.epoch(ValidationPhase())
    before = bits(learner)
    assert learner.evaluate()["loss"] > 0
    assert learner.predict(learner.data.validation).shape == (32, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())


@pytest.mark.slow(quick=8)
@every
def test_what_it_declares_is_enough_and_what_it_touches_is_declared(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = MAKE[cls]()
    if isinstance(callback, UnsafeCallback) and cls is not Profile:
        return  # it is given the learner itself, and what it declares is for the order
    beside = {Recorder, Metrics, *NEEDED.get(cls, ())}
    kinds = {Recorder: set(), Metrics: {Recorder}, GradientClip: {Recorder}}.get(cls, beside)
    reads, writes = infer_access(callback, learner_with(*(MAKE[kind]() for kind in kinds)))

    def covered(path: str, by: tuple[str, ...]) -> bool:
        return any(prefix in ("*", path) or path.startswith(f"{prefix}.") for prefix in by)

    assert all(covered(path, (*callback.reads, *callback.writes)) for path in reads)
    assert all(covered(path, tuple(callback.writes)) for path in writes)


@pytest.mark.slow(quick=3)
@every
def test_it_is_initialised_twice_without_harm(cls: type[Callback], capsys: pytest.CaptureFixture[str]) -> None:
    callback, companions = MAKE[cls](), others(cls)
    once, twice = learner_with(MAKE[cls](), *others(cls)), learner_with(callback, *companions)
    once.fit(1)
    twice.fit(1)
    given = twice.callbacks.given()
    twice.set_callbacks([])
    twice.set_callbacks(given)
    assert alike(seen(twice), seen(once))


@pytest.mark.slow(quick=17)
@every
def test_its_state_goes_through_a_file_into_another(cls: type[Callback], capsys: pytest.CaptureFixture[str]) -> None:
    callback = MAKE[cls]().unwrapped
    if not hasattr(callback, "state_dict"):
        assert not hasattr(callback, "load_state_dict")
        return
    learner = learner_with(callback, *others(cls))
    learner.fit(1)
    state = through_a_file(callback.state_dict())
    fresh = MAKE[cls]().unwrapped
    learner.replace_callback(fresh)
    fresh.load_state_dict(state)
    assert len(state) > 0
    assert alike(fresh.state_dict(), callback.state_dict())


@pytest.mark.slow(quick=4)
@every
def test_what_it_keeps_goes_through_a_file_into_another_learner(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (learner_with(MAKE[cls](), *others(cls)) for _ in range(2))
    first.fit(1)
    second.load_state_dict(through_a_file(first.state_dict()))
    for part in ("callbacks", "cbstate", "views", "optimizers"):
        assert alike(second.state_dict()[part], first.state_dict()[part]), part


# Killed and resumed

IN_FILES: dict[type[Callback], set[str]] = {
    Checkpointer: {"_steps", "_written"},
    CutMix: {"_count"},
    EarlyStopping: {"criterion", "pair"},
    FeatureStats: {"_count", "_kept", "std"},
    GarbageCollect: {"_steps"},
    GradientClip: {"_counts", "_waiting"},
    MixUp: {"_count"},
    SampleImages: {"grid", "pair"},
    SanityCheck: {"_done"},
    Timer: {"elapsed"},
    Traces: {"_steps"},
}
"""The names under which checkpoints hold what these change; "pair" is what `state_dict` returns."""


@pytest.mark.parametrize("cls", IN_FILES, ids=lambda cls: cls.__name__)
def test_its_attributes_have_the_names_under_which_older_checkpoints_hold_them(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    learner = learner_with(BUSY[cls](), *others(cls))
    learner.fit(1)
    assert set(learner.state_dict()["callbacks"][cls.__name__]["state"]) == IN_FILES[cls]


AT = (3, 6, 9, 12)
"""Moments: before a batch in training and in validation, after a phase, and between the epochs."""

DISK: dict[Path, list[Record]] = {}


class Disk(Memory):
    """Keeps records by the place it is given, beyond the process that wrote them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.path = Path(name).absolute()
        self.records = DISK.setdefault(self.path, [])

    def _found(self) -> str | None:
        return str(self.path) if self.records else None

    def _place(self) -> str:
        return str(self.path)


BUSY: dict[type[Callback], Make] = {
    **ALIKE,
    BatchLimit: lambda: BatchLimit(2),
    Checkpointer: lambda: Checkpointer("run", every=2, unit="step"),
    EarlyStopping: lambda: EarlyStopping(NoImprovement(1, min_delta=9.0), monitor="training/loss"),
    GradientClip: lambda: GradientClip(0.1),
    LRScheduler: lambda: LRScheduler(partial(StepLR, step_size=2, gamma=0.1), unit="step"),
    LogHistograms: lambda: LogHistograms(Disk("histograms"), every=2),
    LogHyperParams: lambda: LogHyperParams(Disk("parameters"), params={"width": 4}),
    LogImages: lambda: LogImages(Disk("images")),
    LogMetrics: lambda: LogMetrics(Disk("metrics")),
    LogTraces: lambda: LogTraces(Disk("traces")),
    LogVisualization: lambda: LogVisualization(picture, Disk("pictures"), every=2),
    SampleImages: lambda: SampleImages("model", shape=(1, 1, 3)),
    Scheduler: lambda: Scheduler({WeightDecay: one_cycle(6, 0.1)}),
    StochasticWeightAveraging: lambda: StochasticWeightAveraging(unit="step"),
    Unfreeze: lambda: Unfreeze({"*": 4, "4": 0}, unit="step"),
}
"""How to make one that has more to do in a few steps, and writes to the same place in each process."""


def assert_resumes_and_writes_the_same(make_learner: Callable[[], Learner], at: tuple[int, ...]) -> None:
    """Assert that a resumed run ends the same to the bit, and so does what it has written to files."""
    top, calls, folders = Path.cwd(), count(), []

    def begin() -> Learner:
        number = next(calls)  # two processes that are not killed; then pairs of one that is, and one that goes on
        folders.append(top / str(number if number < 2 else number // 2 + 1))
        folders[-1].mkdir(exist_ok=True)
        os.chdir(folders[-1])
        return make_learner()

    assert_resumes_exactly(begin, at=at, ignore=CLOCK)
    assert len(set(folders)) == 2 + len(at)
    assert all(written(folder) == written(folders[0]) for folder in folders)


def written(folder: Path) -> dict[str, Any]:
    """Give what lies in a folder, without checkpoints."""
    files = [path for path in folder.rglob("*") if path.is_file() and "run" not in path.parts]
    found: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    for path, records in DISK.items():
        if path.parent == folder:
            found[path.name] = [(each.step, each.group, each.name, value_of(each.loggable)) for each in records]
    return found


def value_of(thing: Any) -> Any:
    return thing.value if isinstance(thing, Scalar) else type(thing).__name__


@pytest.mark.slow
@every
def test_a_run_with_it_that_is_killed_and_resumed_ends_the_same_to_the_bit(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    needed = NEEDED.get(cls, ())
    assert_resumes_and_writes_the_same(lambda: noisy_learner(*(BUSY[each]() for each in (cls, *needed))), at=AT[::2])


def shuffled(given: Iterable[Callback], seed: int | None) -> list[Callback]:
    """Give callbacks in another order; None: backwards."""
    listed = list(given)
    if seed is None:
        return listed[::-1]
    random.Random(seed).shuffle(listed)
    return listed


def everybody(table: dict[type[Callback], Make] = MAKE) -> list[Callback]:
    return [make() for make in table.values()]


@pytest.mark.slow
def test_all_together_train_alike_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    first = noisy_learner(*everybody())
    first.fit(2)
    for seed in (None, 1, 2):
        other = noisy_learner(*shuffled(everybody(), seed))
        assert other.callbacks.digest == first.callbacks.digest
        assert other.callbacks.order == first.callbacks.order
        other.fit(2)
        assert_same_bits(first, other)
        a, b = (without_clock(learner.state_dict()) for learner in (first, other))
        assert alike(a, b)


def without_clock(state: dict[str, Any]) -> dict[str, Any]:
    callbacks = {id: kept for id, kept in state["callbacks"].items() if f"callbacks.{id}" not in CLOCK}
    return {**state, "callbacks": callbacks}


@pytest.mark.slow
def test_all_together_a_run_that_is_killed_and_resumed_ends_the_same_to_the_bit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seeds = count()  # each process lists them in another order
    assert_resumes_and_writes_the_same(lambda: noisy_learner(*shuffled(everybody(BUSY), next(seeds))), at=AT)


@pytest.mark.slow(quick=22)
@every
def test_a_checkpoint_keeps_whatever_it_writes(cls: type[Callback]) -> None:
    learner = learner_with(MAKE[cls](), *others(cls), *([] if cls is Checkpointer else [Checkpointer("all")]))
    manifest = learner.checkpoint_manifest()
    assert [entry.path for entry in manifest if entry.kind == "not kept"] == []
    assert {"persisted"} <= {entry.kind for entry in manifest} <= {"persisted", "derived", "transient"}


def test_all_together_nothing_is_told_to_be_lost(capsys: pytest.CaptureFixture[str]) -> None:
    learner = noisy_learner(*everybody())
    learner.fit(1)  # a checkpoint that keeps not everything warns, and a warning is an error here
    assert [entry.path for entry in learner.checkpoint_manifest() if entry.kind == "not kept"] == []


@pytest.mark.slow
def test_all_together_leave_the_model_in_train_mode_in_every_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    modes: list[bool] = []

    def look(learner: Any) -> None:
        modes.extend(module.training for module in learner.model.modules())

    def watch(view: Any) -> None:
        learner.evaluate()
        learner.predict(torch.rand(8, 3))
        learner.epoch(ValidationPhase())
        learner.summary()
        with watching(learner.model):
            learner.model(torch.rand(8, 3))

    learner = noisy_learner(
        *everybody({cls: make for cls, make in MAKE.items() if cls is not Checkpointer}),  # it would keep `modes`, too
        CustomCallback(look, StepBegin, TrainingPhase, reads=("model",), name="look before"),
        CustomCallback(look, StepEnd, TrainingPhase, reads=("model",), name="look after"),
    )
    learner.add_callback(CustomCallback(watch, StepEnd, TrainingPhase, name="watches in the middle of an epoch"))
    learner.fit(2)
    assert len(modes) == 2 * 3 * 2 * len(list(learner.model.modules()))
    assert all(modes)


@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase])
def test_all_that_measure_keep_no_predictions_and_losses_of_steps_gone_by(phase: Any) -> None:
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    def look(learner: Any) -> None:
        seen.extend(weakref.ref(learner.step[name]) for name in ("preds", "loss"))
        alive.append(sum(reference() is not None for reference in seen))

    measures = Metrics(accuracy, MulticlassF1Score(3), Metric(lambda preds, ys: preds.mean(), name="level"))
    looking = CustomCallback(look, StepEnd, phase, reads=("step",))
    learner = learner_with(Recorder(), measures, ActivationStats(every=1), looking, num_batches=12)
    learner.fit(2, phases=[phase()])
    assert len(alive) == 24
    assert max(alive) <= 4  # the step's own, and those of the one before


class Stream(IterableDataset[Any]):
    """Rows whose number nobody knows."""

    def __iter__(self) -> Iterator[Any]:
        rows = classes(3, shuffle=False).data
        return iter(zip(*(tensor[:20] for tensor in rows), strict=True))


class Reiterable:
    """Batches whose number nobody knows."""

    def __iter__(self) -> Iterator[Any]:
        return iter(classes(3, shuffle=False))


@pytest.mark.parametrize("kind", ["dataset", "iterable", "generator"])
def test_together_they_take_data_without_a_length(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> Any:
        if kind == "dataset":
            return DataLoader(Stream(), batch_size=8)
        return Reiterable() if kind == "iterable" else (batch for batch in classes(3, shuffle=False))

    once = kind == "generator"
    given = [Recorder(), Metrics(accuracy), MetricsPrinter(), ProgressBar(enabled=True), SetEpoch(), Profile()]
    given += [ActivationStats(), EMA("model"), Traces({"rows": lambda learner: len(learner.step.xs)})]
    if not once:  # these run over the data again
        given += [StochasticWeightAveraging(), KNNProbe("model", k=3)]
    learner = learner_with(*given)
    learner.fit(1 if once else 2, (make(), make()))
    for phase in (TrainingPhase, ValidationPhase):
        assert learner.history[phase].steps == (3 if once else 6)
    if not once:
        assert len(learner.predict(make())) == (20 if kind == "dataset" else 24)
