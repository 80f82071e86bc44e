"""What every public built-in callback keeps to."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fluxloop
from fluxloop import (
    EMA,
    Callback,
    ConditionalCallback,
    CustomCallback,
    FeatureStats,
    GarbageCollect,
    KNNProbe,
    Learner,
    LinearProbe,
    Metrics,
    MetricSource,
    MetricsPrinter,
    ProgressBar,
    Recorder,
    SampleImages,
    SanityCheck,
    StepBegin,
    StepEnd,
    StopOnNaNLoss,
    TensorBatches,
    Traces,
    TrainingPhase,
    ValidationPhase,
    callbacks,
    throttle,
)
from fluxloop.nested import tensors
from fluxloop.testing import EventRecorder, assert_observer, assert_same_bits, bits, infer_access

Make = Callable[[], Callback]


def loss_of(learner: Any) -> Any:
    return learner.step.loss


MAKE: dict[type[Callback], Make] = {
    ConditionalCallback: lambda: throttle(CustomCallback(loss_of, StepEnd, name="throttled"), StepEnd, freq=2),
    CustomCallback: lambda: CustomCallback(loss_of, StepEnd),
    EMA: lambda: EMA("model", 0.9),
    EventRecorder: EventRecorder,
    FeatureStats: lambda: FeatureStats("preds"),
    GarbageCollect: lambda: GarbageCollect(every=8),
    KNNProbe: lambda: KNNProbe("model", k=3),
    LinearProbe: lambda: LinearProbe("model", 3, entries=("preds", "ys")),
    Metrics: Metrics,
    MetricsPrinter: MetricsPrinter,
    ProgressBar: lambda: ProgressBar(enabled=True, interval=0.0, file=io.StringIO()),
    Recorder: Recorder,
    SampleImages: lambda: SampleImages("model", shape=(1, 1, 3), folder=None),
    SanityCheck: SanityCheck,
    StopOnNaNLoss: StopOnNaNLoss,
    Traces: lambda: Traces({"loss": loss_of}),
}
"""How to make one of each; a new built-in callback has to be added here."""

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
    FeatureStats: (Recorder,),
    KNNProbe: (Recorder,),
    LinearProbe: (Recorder,),
    Metrics: (Recorder,),
    MetricsPrinter: (Recorder, Metrics),
    SampleImages: (Recorder,),
}
"""What others have to publish for it."""

every = pytest.mark.parametrize("cls", MAKE, ids=lambda cls: cls.__name__)


def public() -> set[type[Callback]]:
    given = [*vars(callbacks).values(), *(getattr(fluxloop, name) for name in fluxloop.__all__), EventRecorder]
    bases = (fluxloop.Callback, fluxloop.UnsafeCallback, fluxloop.MetricSource)
    return {thing for thing in given if isinstance(thing, type) and issubclass(thing, Callback) and thing not in bases}


def others(cls: type[Callback]) -> list[Callback]:
    return [other() for other in NEEDED.get(cls, ())]


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
    if cls not in COMPUTED and cls is not Traces:  # what those run is the user's
        assert MAKE[cls]().draws in (True, False)


@every
def test_its_repr_names_it_and_holds_no_address(cls: type[Callback]) -> None:
    callback = MAKE[cls]()
    assert repr(callback).startswith(f"{cls.__name__}(")
    assert " at 0x" not in callback.identity


@every
def test_two_made_alike_show_alike(cls: type[Callback]) -> None:
    assert MAKE[cls]().identity == MAKE[cls]().identity


@every
def test_its_handlers_are_documented(cls: type[Callback]) -> None:
    callback = MAKE[cls]().unwrapped
    for name, method in vars(type(callback)).items():
        if hasattr(method, "__fluxloop_on__"):
            assert method.__doc__, f"{cls.__name__}.{name}"


@every
def test_adding_it_changes_no_weight(cls: type[Callback], capsys: pytest.CaptureFixture[str]) -> None:
    assert_observer(MAKE[cls](), lambda: noisy_learner(*others(cls)))
    assert_observer(MAKE[cls](), lambda: learner_with(*others(cls)))


@every
def test_it_trains_alike_in_any_place_of_the_list(cls: type[Callback], capsys: pytest.CaptureFixture[str]) -> None:
    around: list[Make] = [make for kind, make in MAKE.items() if kind is not cls]
    digests, learners = set(), []
    for place in (0, len(around) // 2, len(around)):
        given = [make() for make in around]
        given.insert(place, MAKE[cls]())
        learner = noisy_learner(*given)
        digests.add(learner.callbacks.digest)
        if place in (0, len(around)):
            learner.fit(1)
            learners.append(learner)
    assert len(digests) == 1
    assert_same_bits(*learners)


@every
def test_it_works_with_the_defaults_in_their_place_or_beside_them(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    learner = learner_with(MAKE[cls](), default_callbacks=True, num_batches=2)
    learner.fit(1)
    names = learner.callbacks.order
    assert len(names) == len(set(names))
    assert {"Recorder", "Metrics", "MetricsPrinter", "ProgressBar", "StopOnNaNLoss"} <= set(names)
    assert learner.history[TrainingPhase].epochs == 1


def seen(learner: Learner, cls: type[Callback]) -> dict[str, Any]:
    """Give what a callback left in a learner, to compare with another's."""
    shared = vars(learner.cbstate)
    found: dict[str, Any] = {"entries": sorted(shared)}
    if "history" in shared:
        found["counts"] = dict(shared["history"])
    if "metrics" in shared:
        found["metrics"] = {phase: metrics.epochs for phase, metrics in shared["metrics"].items()}
    if "traces" in shared:
        found["traces"] = {
            phase: {name: [(step, float(value)) for step, value in series] for name, series in traces.items()}
            for phase, traces in shared["traces"].items()
        }
    return found


@every
def test_it_does_in_a_second_learner_what_it_does_in_a_first(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    callback, companions = MAKE[cls](), others(cls)
    results, told = [], []
    for _ in range(2):
        learner = learner_with(callback, *companions)
        capsys.readouterr()
        learner.fit(2)
        results.append(seen(learner, cls))
        told.append(capsys.readouterr().out)
    assert results[0] == results[1]
    assert told[0] == told[1]


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


@every
def test_what_it_declares_is_enough_and_what_it_touches_is_declared(
    cls: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = MAKE[cls]()
    around = {Recorder: [], Metrics: [Recorder()]}.get(cls, [Recorder(), Metrics()])
    reads, writes = infer_access(callback, learner_with(*around))

    def covered(path: str, by: tuple[str, ...]) -> bool:
        return any(prefix in ("*", path) or path.startswith(f"{prefix}.") for prefix in by)

    assert all(covered(path, (*callback.reads, *callback.writes)) for path in reads)
    assert all(covered(path, tuple(callback.writes)) for path in writes)


@every
def test_it_is_initialised_twice_without_harm(cls: type[Callback], capsys: pytest.CaptureFixture[str]) -> None:
    callback, companions = MAKE[cls](), others(cls)
    once, twice = learner_with(MAKE[cls](), *others(cls)), learner_with(callback, *companions)
    once.fit(1)
    twice.fit(1)
    given = twice.callbacks.given()
    twice.set_callbacks([])
    twice.set_callbacks(given)
    assert seen(twice, cls) == seen(once, cls)


@every
def test_its_state_goes_through_a_file_into_another(cls: type[Callback], capsys: pytest.CaptureFixture[str]) -> None:
    callback = MAKE[cls]().unwrapped
    if not hasattr(callback, "state_dict"):
        assert not hasattr(callback, "load_state_dict")
        return
    learner = learner_with(callback, *others(cls))
    learner.fit(1)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = MAKE[cls]().unwrapped
    learner.replace_callback(fresh)
    fresh.load_state_dict(state)
    first, second = (list(tensors(each.state_dict())) for each in (callback, fresh))
    assert len(first) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
