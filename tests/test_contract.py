"""Every public callback against phases it knows nothing of: it works, or it says precisely what it lacks."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import field, frozen
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, softplus

import fluxloop
from fluxloop import (
    EMA,
    Callback,
    CustomCallback,
    DataError,
    FeatureStats,
    GANPhase,
    GarbageCollect,
    KNNProbe,
    Learner,
    LinearProbe,
    Metric,
    Metrics,
    MetricsPrinter,
    MissingEntryError,
    ModelError,
    Phase,
    ProgressBar,
    Recorder,
    SampleImages,
    SanityCheck,
    SanityCheckError,
    SimCLRPhase,
    StepEnd,
    StopOnNaNLoss,
    TensorBatches,
    Traces,
    TrainingPhase,
    TwoViews,
    UpdateEnd,
    accuracy,
    runstep,
    throttle,
)
from fluxloop.nested import map_tensors
from fluxloop.testing import EventRecorder, assert_same_bits

ROWS, BATCH, EPOCHS = 16, 8, 2
STEPS = EPOCHS * ROWS // BATCH

adam = partial(torch.optim.Adam, lr=0.01)


# Phases as users write them


class UserGAN(TrainingPhase):
    """The one that README.md shows."""

    def step(self, learner: Learner, batch: Any) -> None:
        G, D = learner.model  # noqa: N806 - as the paper calls them
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = G(torch.randn(len(state.real), 6, device=state.real.device))
            with learner.optimizing("D") as d:
                d.loss = softplus(-D(state.real)).mean() + softplus(D(state.fake.detach())).mean()
            with learner.optimizing("G") as g:
                g.loss = softplus(-D(state.fake)).mean()


class UserTwoViews(TrainingPhase):
    """Bring two noisy views of each row together; batches may have labels, which it passes over."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            state.z1, state.z2 = (learner.model.encoder(noisy(state.xs)) for _ in range(2))
            with learner.optimizing("encoder") as block:
                block.loss = 1 - cosine_similarity(state.z1, state.z2).mean()


class UserDictionaries(TrainingPhase):
    """Batches are dictionaries, kept whole in the step."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, batch=batch) as (_, state):
            with learner.optimizing() as block:
                block.loss = cross_entropy(learner.model(state.batch["image"]), state.batch["label"])


def noisy(xs: Tensor) -> Tensor:
    """Draw a view, with numbers of torch, NumPy and Python."""
    return xs + 0.1 * torch.randn_like(xs) + 0.1 * (np.random.randn() + random.random())


def xs() -> Tensor:
    return torch.rand(ROWS, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def ys() -> Tensor:
    return torch.arange(ROWS) % 3


def gan() -> dict[str, nn.Module]:
    generator = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Unflatten(1, (1, 2, 2)))
    return {"G": generator, "D": nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 1))}


def encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))


@frozen
class Setting:
    """A phase, and the models and data it runs on.

    Args:
        phase: Makes the phase.
        model: Makes the models.
        data: Makes a batchable source; training and validation alike.
        main: Name of the weights that a researcher would watch.
        takes: What `main` is called with.
        losses: Names of the losses recorded.
        updates: Names of the optimizers.
        entry: An entry of the step that holds rows of numbers.
        labels: The entry of labels, where there is one.
    """

    phase: Callable[[], Phase]
    model: Callable[[], Any]
    data: Callable[[], Any]
    main: str
    losses: tuple[str, ...]
    updates: tuple[str | None, ...]
    entry: str
    labels: str | None = None
    knows: dict[str, tuple[type[Exception], str]] = field(factory=dict)


NO_FEATURES = "no entry 'features'; it has: "
NO_BANK = r"given {}.*; expected labelled rows, \(xs, ys\).*KNNProbe\('.*', bank=\(xs, ys\)"
NO_IMAGES = r"SampleImages\('{}'\) got a Tensor of shape \(8, {}\) .* need SampleImages\(\.\.\., shape=\(1, H, W\)\)"

IMAGES = {"KNNProbe": (DataError, NO_BANK.format(r"a Tensor of shape \(8, 1, 2, 2\)"))}
LACKS_FEATURES = {
    "FeatureStats": (MissingEntryError, NO_FEATURES),
    "LinearProbe": (MissingEntryError, NO_FEATURES),
}

SETTINGS: dict[str, Setting] = {
    "user's GAN": Setting(
        phase=UserGAN,
        model=gan,
        data=lambda: xs(),
        main="G",
        losses=("loss_d", "loss_g"),
        updates=("D", "G"),
        entry="fake",
        knows={
            **IMAGES,
            "FeatureStats": (MissingEntryError, NO_FEATURES + "fake, grads, losses, real"),
            "LinearProbe": (MissingEntryError, NO_FEATURES + "fake, grads, losses, real"),
            "Metrics(accuracy)": (MissingEntryError, "no entry 'preds'; it has: fake"),
        },
    ),
    "GANPhase": Setting(
        phase=lambda: GANPhase("hinge", noise=6),
        model=gan,
        data=lambda: xs(),
        main="G",
        losses=("loss_d", "loss_g"),
        updates=("D", "G"),
        entry="fake",
        knows={
            **IMAGES,
            "FeatureStats": (MissingEntryError, NO_FEATURES + "fake, fake_scores"),
            "LinearProbe": (MissingEntryError, NO_FEATURES + "fake, fake_scores"),
            "Metrics(accuracy)": (MissingEntryError, "no entry 'preds'; it has: fake"),
        },
    ),
    "user's two views": Setting(
        phase=UserTwoViews,
        model=lambda: {"encoder": encoder()},
        data=lambda: (xs(), ys()),
        main="encoder",
        losses=("loss_encoder",),
        updates=("encoder",),
        entry="z1",
        knows={
            "FeatureStats": (MissingEntryError, NO_FEATURES + "grads, losses, xs, z1, z2"),
            "LinearProbe": (MissingEntryError, NO_FEATURES + "grads, losses, xs, z1, z2"),
            "SampleImages": (ModelError, NO_IMAGES.format("encoder", 3)),
            "Metrics(accuracy)": (MissingEntryError, "no entry 'preds'; it has: grads, losses, xs, z1, z2"),
        },
    ),
    "SimCLRPhase": Setting(
        phase=lambda: SimCLRPhase(TwoViews(noisy)),
        model=lambda: {"encoder": encoder(), "projector": nn.Linear(3, 3)},
        data=lambda: (xs(), ys()),
        main="encoder",
        losses=("loss",),
        updates=("encoder", "projector"),
        entry="features",
        labels="ys",
        knows={
            "SampleImages": (ModelError, NO_IMAGES.format("encoder", 3)),
            "Metrics(accuracy)": (MissingEntryError, "no entry 'preds'; it has: features"),
        },
    ),
    "user's dictionaries": Setting(
        phase=UserDictionaries,
        model=encoder,
        data=lambda: {"image": xs(), "label": ys()},
        main="model",
        losses=("loss",),
        updates=(None,),
        entry="batch",
        knows={
            "FeatureStats": (MissingEntryError, NO_FEATURES + "batch, grads, loss"),
            "LinearProbe": (MissingEntryError, NO_FEATURES + "batch, grads, loss"),
            "KNNProbe": (DataError, NO_BANK.format("a dict of length 2")),
            "SampleImages": (ModelError, NO_IMAGES.format("model", 3)),
            "Metrics(accuracy)": (MissingEntryError, "no entry 'preds'; it has: batch"),
        },
    ),
}
"""The settings; `knows` says which callbacks lack something there as they come, and with which words they say so."""

every_setting = pytest.mark.parametrize("place", SETTINGS)


# Callbacks as they come


def looked(learner: Any) -> int:
    return learner.batch_size


MAKE: dict[str, Callable[[Setting], Callback]] = {
    "ConditionalCallback": lambda s: throttle(CustomCallback(looked, StepEnd, name="throttled"), StepEnd, freq=2),
    "CustomCallback": lambda s: CustomCallback(looked, StepEnd),
    "EMA": lambda s: EMA(s.main, 0.9),
    "EventRecorder": lambda s: EventRecorder(),
    "FeatureStats": lambda s: FeatureStats(),
    "GarbageCollect": lambda s: GarbageCollect(every=3),
    "KNNProbe": lambda s: KNNProbe(s.main, k=3),
    "LinearProbe": lambda s: LinearProbe(s.main, 3),
    "Metrics": lambda s: Metrics(),
    "Metrics(accuracy)": lambda s: Metrics(accuracy),
    "MetricsPrinter": lambda s: MetricsPrinter(),
    "ProgressBar": lambda s: ProgressBar(enabled=True, interval=0.0, file=io.StringIO()),
    "Recorder": lambda s: Recorder(),
    "SampleImages": lambda s: SampleImages(s.main),
    "SanityCheck": lambda s: SanityCheck(),
    "StopOnNaNLoss": lambda s: StopOnNaNLoss(),
    "Traces": lambda s: Traces({"rows": looked}),
}

every_callback = pytest.mark.parametrize("name", MAKE)


def public() -> set[str]:
    given = [getattr(fluxloop, name) for name in fluxloop.__all__] + [EventRecorder]
    bases = (fluxloop.Callback, fluxloop.UnsafeCallback, fluxloop.MetricSource)
    return {t.__name__ for t in given if isinstance(t, type) and issubclass(t, Callback) and t not in bases}


def test_every_public_callback_is_held_against_every_phase() -> None:
    assert {name.partition("(")[0] for name in MAKE} == public()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def learner_of(setting: Setting, *callbacks: Callback, default_callbacks: bool = False) -> Learner:
    torch.manual_seed(1)
    source = setting.data()
    columns = source if isinstance(source, (tuple, dict)) else (source,)
    training = TensorBatches(*(columns if isinstance(columns, tuple) else (columns,)), batch_size=BATCH, shuffle=True)
    return Learner(
        setting.model(),
        data={"training": training, "validation": [next(iter(copy.copy(training)))]},
        optimizer=adam,
        callbacks=callbacks,
        default_callbacks=default_callbacks,
        seed=3,
    )


def watched(setting: Setting, callback: Callback, default_callbacks: bool) -> Learner:
    """Make a learner with a callback, and with those it may need beside it."""
    around = [] if default_callbacks else [Recorder(), Metrics()]
    beside = [other for other in around if type(other) is not type(callback)]
    return learner_of(setting, callback, *beside, default_callbacks=default_callbacks)


@pytest.fixture(scope="module")
def plain() -> Callable[[str], Learner]:
    """Give the learner that nobody watches, trained once for each setting."""
    trained: dict[str, Learner] = {}

    def get(place: str) -> Learner:
        if place not in trained:
            setting = SETTINGS[place]
            trained[place] = learner_of(setting)
            trained[place].fit(EPOCHS, phases=[setting.phase()])
        return trained[place]

    return get


Plain = Callable[[str], Learner]


def assert_works(name: str, setting: Setting, learner: Learner, callback: Callback, told: str) -> None:
    """Assert that a callback has done in a training of two epochs what it is there for."""
    phase = next(iter(learner.phases))
    counts = learner.history[phase]
    inner: Any = callback.unwrapped
    if name in ("Recorder", "ConditionalCallback", "CustomCallback", "GarbageCollect", "SanityCheck", "StopOnNaNLoss"):
        assert (counts.epochs, counts.steps) == (EPOCHS, STEPS)
        assert tuple(counts.updates) == setting.updates
        assert learner.history.stop_reason is None
    elif name == "EMA":
        assert inner.num_averaged == STEPS
        live, average = learner.weights[setting.main], learner.weights[f"{setting.main}@ema"]
        assert any(not torch.equal(a, b) for a, b in zip(live.parameters(), average.parameters(), strict=True))
    elif name == "EventRecorder":
        assert inner.events.count("StepEnd") == STEPS
        assert inner.events.count("UpdateEnd") == STEPS * len(setting.updates)
    elif name == "FeatureStats":
        assert len(learner.history[f"training/{inner.entry}_rank"]) == EPOCHS
    elif name in ("KNNProbe", "LinearProbe"):
        found = learner.history[f"validation/{inner.metric}"]
        assert len(found) == EPOCHS
        assert all(0 <= value <= 1 for value in found)
    elif name == "Metrics":
        assert tuple(learner.history.metrics[phase]) == setting.losses
        assert all(len(learner.history[f"training/{loss}"]) == EPOCHS for loss in setting.losses)
    elif name == "MetricsPrinter":
        lines = [line for line in told.splitlines() if line.startswith(phase.__name__)]
        assert len(lines) == EPOCHS
        assert all(f"{loss} " in line for line in lines for loss in setting.losses)
    elif name == "ProgressBar":
        assert phase.__name__ in inner.file.getvalue()
        assert all(f"{loss}=" in inner.file.getvalue() for loss in setting.losses)
    elif name == "SampleImages":
        assert learner.cbstate.images[setting.main].dtype is torch.uint8
        assert len(list(Path("samples").glob(f"{setting.main}-*.png"))) == EPOCHS
    else:
        assert learner.cbstate.traces[phase]["rows"] == [(step + 1, BATCH) for step in range(STEPS)]


@every_setting
@every_callback
@pytest.mark.parametrize("default_callbacks", [False, True], ids=["alone", "with defaults"])
def test_as_it_comes_it_works_and_changes_no_weight_or_says_precisely_what_it_lacks(
    name: str, place: str, default_callbacks: bool, plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = SETTINGS[place]
    callback = MAKE[name](setting)
    learner = watched(setting, callback, default_callbacks)
    if name in setting.knows:
        error, words = setting.knows[name]
        with pytest.raises(error, match=words):
            learner.fit(EPOCHS, phases=[setting.phase()])
        return
    learner.fit(EPOCHS, phases=[setting.phase()])
    assert_same_bits(learner, plain(place))
    assert_works(name, setting, learner, callback, capsys.readouterr().out)


# Given what they lack


def labelled() -> tuple[Tensor, Tensor]:
    return xs(), ys()


GIVEN: dict[str, Callable[[Setting], Callback | None]] = {
    "FeatureStats": lambda s: FeatureStats(s.entry) if s.entry != "batch" else None,
    "KNNProbe": lambda s: KNNProbe(s.main, bank=labelled(), queries=labelled(), k=3, features=flatten(s)),
    "LinearProbe": lambda s: (
        LinearProbe(s.main, 3, entries=(s.entry, s.labels), queries=labelled()) if s.labels is not None else None
    ),
    "Metrics": lambda s: Metrics(Metric(norm, name="norm", inputs=(s.entry,))),
    "SampleImages": lambda s: SampleImages(s.main, shape=(1, 1, 3) if s.main != "G" else None),
}
"""The same callbacks with the arguments that their messages ask for; None where a phase has nothing to give."""


def flatten(setting: Setting) -> Callable[[nn.Module, Tensor], Tensor]:
    """Give what makes features: of a GAN, whose generator takes no images, the images themselves."""
    if setting.main == "G":
        return lambda module, images: images.flatten(1)
    return lambda module, images: module(images)


def norm(entry: Any) -> Tensor:
    rows: Tensor = entry["image"] if isinstance(entry, dict) else entry
    return rows.flatten(1).norm(dim=1).mean()


@every_setting
@pytest.mark.parametrize("name", GIVEN)
def test_given_what_it_lacks_it_works_and_changes_no_weight(
    name: str, place: str, plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = SETTINGS[place]
    callback = GIVEN[name](setting)
    if callback is None:
        assert name in setting.knows  # and it says so
        return
    learner = watched(setting, callback, default_callbacks=True)
    learner.fit(EPOCHS, phases=[setting.phase()])
    assert_same_bits(learner, plain(place))
    if name == "Metrics":
        assert len(learner.history["training/norm"]) == EPOCHS
    else:
        assert_works(name, setting, learner, callback, capsys.readouterr().out)


# All at once


def everybody(setting: Setting) -> list[Callback]:
    """Make one of each, with the arguments it needs there."""
    made: list[Callback] = []
    for name, make in MAKE.items():
        if name in setting.knows or name == "Metrics(accuracy)":
            callback = GIVEN[name](setting) if name in GIVEN else None
        else:
            callback = make(setting)
        if callback is not None:
            made.append(callback)
    return made


@every_setting
def test_all_at_once_they_change_no_weight_in_whatever_order_they_are_listed(
    place: str, plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = SETTINGS[place]
    digests = set()
    for turn in (0, 5):
        callbacks = everybody(setting)
        learner = learner_of(setting, *callbacks[turn:], *callbacks[:turn])
        digests.add(learner.callbacks.digest)
        learner.fit(EPOCHS, phases=[setting.phase()])
        assert_same_bits(learner, plain(place))
    assert len(digests) == 1
    assert len(learner.callbacks) >= len(public()) - 2


@every_setting
def test_the_average_can_be_probed_sampled_and_explained(place: str, plain: Plain) -> None:
    setting = SETTINGS[place]
    name = f"{setting.main}@ema"
    shape = (1, 1, 3) if setting.main != "G" else None
    learner = learner_of(
        setting,
        Recorder(),
        EMA(setting.main, 0.9),
        KNNProbe(name, bank=labelled(), queries=labelled(), k=3, features=flatten(setting)),
        SampleImages(name, shape=shape, folder=None),
    )
    learner.fit(EPOCHS, phases=[setting.phase()])
    assert_same_bits(learner, plain(place))
    assert len(learner.history[f"validation/knn_{name.lower()}"]) == EPOCHS
    assert name in learner.cbstate.images
    path = "model@ema" if setting.main == "model" else f"model.{name}"
    told = learner.callbacks.explain(path)
    assert f"EMA writes '{path}'" in told
    assert f"KNNProbe reads '{path}'" in told


@every_setting
@pytest.mark.parametrize("callbacks", [False, True], ids=["defaults", "all"])
def test_a_loss_that_is_no_number_stops_the_fit_before_it_reaches_the_weights(
    place: str, callbacks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = SETTINGS[place]
    given = [c for c in everybody(setting) if not isinstance(c, SanityCheck)] if callbacks else []
    learner = learner_of(setting, *given, default_callbacks=True)
    learner.data.training = [map_tensors(lambda t: t * float("nan") if t.is_floating_point() else t, setting.data())]
    before = [parameter.detach().clone() for model in learner.modules() for parameter in model.parameters()]
    learner.fit(1, phases=[setting.phase()])
    assert "became nan" in str(learner.history.stop_reason)
    after = [parameter for model in learner.modules() for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# What is written beside a callback, as a hint


def test_a_metric_that_lacks_an_entry_says_how_to_restrict_it() -> None:
    setting = SETTINGS["user's GAN"]
    with pytest.raises(MissingEntryError) as caught:
        learner_of(setting, Recorder(), Metrics(accuracy)).fit(1, phases=[setting.phase()])
    notes = "\n".join(caught.value.__notes__)
    assert "the metric 'accuracy' has inputs=('preds', 'ys'); restrict it with Metric(..., phase=...)" in notes
    assert "raised by Metrics at StepEnd of UserGAN()" in notes


@every_setting
def test_a_hook_on_an_entry_that_a_phase_does_not_store_is_told_what_it_stores(place: str) -> None:
    setting = SETTINGS[place]
    hook = CustomCallback(lambda learner: learner.step.preds, UpdateEnd, reads=("step.preds",))
    with pytest.raises(MissingEntryError, match=f"no entry 'preds'; it has: .*{setting.entry}"):
        learner_of(setting, hook).fit(1, phases=[setting.phase()])


def test_a_check_of_supervised_batches_says_what_a_dictionary_is_not() -> None:
    setting = SETTINGS["user's dictionaries"]
    learner = learner_of(setting, SanityCheck())
    learner.loss_fn = cross_entropy
    with pytest.raises(SanityCheckError, match=r"a batch is a dict of length 2, not a pair \(xs, ys\)"):
        learner.fit(1, phases=[setting.phase()])


@every_setting
def test_a_check_without_validation_data_only_warns(place: str) -> None:
    setting = SETTINGS[place]
    learner = learner_of(setting, SanityCheck())
    del learner.data.validation
    with pytest.warns(UserWarning, match="the learner has no validation data"):
        learner.fit(1, phases=[setting.phase()])
    assert learner.streams.positions()["training/step"] == ROWS // BATCH


@every_setting
@every_callback
def test_it_goes_through_a_bare_step_or_says_what_it_lacks(name: str, place: str) -> None:
    setting = SETTINGS[place]
    learner = watched(setting, MAKE[name](setting), default_callbacks=False)
    lacks = name in ("FeatureStats", "LinearProbe") and name in setting.knows  # the others look when an epoch ends
    batch = next(iter(learner.data.training))
    with pytest.raises(setting.knows[name][0], match=setting.knows[name][1]) if lacks else nullcontext():
        setting.phase().step(learner, batch)
    assert learner.scope is None
    assert "grads" in learner.step


def test_the_entries_of_a_dictionary_spread_over_the_step_are_given_to_a_probe_by_their_names() -> None:
    class Spread(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, **batch) as (_, state):
                state.logits = learner.model(state.image)
                with learner.optimizing() as block:
                    block.loss = cross_entropy(state.logits, state.label)

    setting = SETTINGS["user's dictionaries"]
    probe = LinearProbe("model", 3, entries=("logits", "label"), queries=labelled())
    plain, learner = learner_of(setting), watched(setting, probe, default_callbacks=True)
    for each in (plain, learner):
        each.fit(EPOCHS, phases=[Spread()])
    assert_same_bits(plain, learner)
    assert len(learner.history["validation/linear_model"]) == EPOCHS
