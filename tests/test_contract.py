"""Every public callback against phases it knows nothing of: it works, or it says precisely what it lacks."""

from __future__ import annotations

import copy
import io
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import field, frozen
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, softplus
from torch.optim.lr_scheduler import LambdaLR, StepLR

import fluxloop
from fluxloop import (
    EMA,
    ActivationStats,
    AttentionMaps,
    BatchLimit,
    Callback,
    Checkpointer,
    CSVLogger,
    CustomCallback,
    CutMix,
    DataError,
    EarlyStopping,
    EmbeddingMap,
    FeatureStats,
    FrechetDistance,
    GANPhase,
    GarbageCollect,
    GradientClip,
    KeepBestModel,
    KNNProbe,
    Learner,
    LearningRate,
    LinearProbe,
    LogHistograms,
    LogHyperParams,
    LogImages,
    LogMetrics,
    LogTraces,
    LogVisualization,
    LRScheduler,
    Metric,
    MetricError,
    Metrics,
    MetricsPrinter,
    MissingEntryError,
    MissingProducerError,
    MixUp,
    ModelError,
    NeighborImages,
    ObjectivePhase,
    OptimizerError,
    Phase,
    Profile,
    ProgressBar,
    ReconstructionImages,
    Recorder,
    SampleImages,
    SanityCheck,
    SanityCheckError,
    Scheduler,
    SetEpoch,
    SimCLRPhase,
    StallReport,
    StepEnd,
    StochasticWeightAveraging,
    StopOnNaNLoss,
    TensorBatches,
    Timer,
    Traces,
    TrainingPhase,
    TwoViews,
    Unfreeze,
    UpdateEnd,
    accuracy,
    runstep,
    throttle,
)
from fluxloop.callbacks.log import LogCallback
from fluxloop.hyperparameters import WeightDecay
from fluxloop.logging import Memory
from fluxloop.nested import map_tensors
from fluxloop.testing import EventRecorder, assert_resumes_exactly, assert_same_bits

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

LABELLED = ("KNNProbe", "EmbeddingMap", "NeighborImages")
IMAGES = {name: (DataError, NO_BANK.format(r"a Tensor of shape \(8, 1, 2, 2\)")) for name in LABELLED}
NO_ATTENTION = {
    "AttentionMaps": (ModelError, r"saw no attention in Sequential; expected .*attention=lambda module, xs")
}
NO_IMAGE = {"ReconstructionImages": (ModelError, r"and (User|GANPhase).* has none; write one: def forward")}
NO_FORWARD = {"StochasticWeightAveraging": (DataError, r"StochasticWeightAveraging\(.*forward=")}


def no_loss(*names: str) -> dict[str, tuple[type[Exception], str]]:
    """Say what is told of a loss that has another name."""
    known = ", ".join(f"'training/{name}'" for name in names)
    said = (MetricError, rf"no metric 'training/loss' was recorded; there are \[{known}\]; did you mean")
    return {"EarlyStopping": said, "KeepBestModel": said}


def no_entry(name: str, *known: str) -> dict[str, tuple[type[Exception], str]]:
    """Say what is told of an entry that mixing takes."""
    said = (MissingEntryError, f"The step has no entry '{name}'; it has: {', '.join(known)}")
    return {"MixUp": said, "CutMix": said}


def no_producers() -> dict[str, tuple[type[Exception], str]]:
    return {
        "LogImages": (
            MissingProducerError,
            r"'cbstate.images', which no callback writes; add AttentionMaps\(\) or EmbeddingMap\(\) .*SampleImages\(\)",
        ),
        "LogTraces": (MissingProducerError, r"'cbstate.traces', which no callback writes; add Traces\(\)"),
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
            **NO_IMAGE,
            "AttentionMaps": (RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),  # a generator takes noise
            **NO_FORWARD,
            **no_loss("loss_d", "loss_g"),
            **no_entry("xs", "real"),
            **no_producers(),
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
            **NO_IMAGE,
            "AttentionMaps": (RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),  # a generator takes noise
            **NO_FORWARD,
            **no_loss("loss_d", "loss_g"),
            **no_entry("xs", "real"),
            **no_producers(),
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
            **NO_ATTENTION,
            **NO_IMAGE,
            **no_loss("loss_encoder"),
            **no_entry("ys", "xs"),
            **no_producers(),
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
            **NO_ATTENTION,
            "ReconstructionImages": (
                ModelError,
                "knows no images of SimCLRPhase, whose forward stored",
            ),
            "CutMix": (DataError, r"number of classes from preds .* say it: CutMix\(1.0, num_classes=10\)"),
            "MixUp": (DataError, r"number of classes from preds .* say it: MixUp\(0.4, num_classes=10\)"),
            **no_producers(),
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
            **NO_FORWARD,
            **NO_IMAGE,
            **{name: (DataError, NO_BANK.format("a dict of length 2")) for name in LABELLED},
            "AttentionMaps": (ModelError, "got a dict of length 2 to show; expected images of shape"),
            **no_entry("xs", "batch"),
            **no_producers(),
            "FeatureStats": (MissingEntryError, NO_FEATURES + "batch, grads, loss"),
            "LinearProbe": (MissingEntryError, NO_FEATURES + "batch, grads, loss"),
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


def picture(step: Any) -> Any:
    return torch.zeros(1, 2, len(list(step)))


rows_of_3 = torch.rand(9, 3, generator=torch.Generator().manual_seed(4))
"""What an encoder's outputs are compared with."""

MAKE: dict[str, Callable[[Setting], Callback]] = {
    "ActivationStats": lambda s: ActivationStats(every=2),
    "AttentionMaps": lambda s: AttentionMaps(s.main),
    "BatchLimit": lambda s: BatchLimit(50),
    "CSVLogger": lambda s: CSVLogger("metrics.csv"),
    "Checkpointer": lambda s: Checkpointer("run"),
    "ConditionalCallback": lambda s: throttle(CustomCallback(looked, StepEnd, name="throttled"), StepEnd, freq=2),
    "CustomCallback": lambda s: CustomCallback(looked, StepEnd),
    "CutMix": lambda s: CutMix(),
    "EMA": lambda s: EMA(s.main, 0.9),
    "EarlyStopping": lambda s: EarlyStopping(99, monitor="training/loss"),
    "EmbeddingMap": lambda s: EmbeddingMap(s.main),
    "EventRecorder": lambda s: EventRecorder(),
    "FeatureStats": lambda s: FeatureStats(),
    "FrechetDistance": lambda s: FrechetDistance(
        s.main,
        nn.Flatten(),
        inputs=torch.ones(4, 6) if s.main == "G" else xs(),
        real=xs() if s.main == "G" else rows_of_3,
    ),
    "GarbageCollect": lambda s: GarbageCollect(every=3),
    "GradientClip": lambda s: GradientClip(1e9),
    "KNNProbe": lambda s: KNNProbe(s.main, k=3),
    "KeepBestModel": lambda s: KeepBestModel("training/loss"),
    "LRScheduler": lambda s: LRScheduler(partial(StepLR, step_size=100)),
    "LinearProbe": lambda s: LinearProbe(s.main, 3),
    "LogHistograms": lambda s: LogHistograms(Memory(), every=2),
    "LogHyperParams": lambda s: LogHyperParams(Memory(), params={"width": 4}),
    "LogImages": lambda s: LogImages(Memory()),
    "LogMetrics": lambda s: LogMetrics(Memory()),
    "LogTraces": lambda s: LogTraces(Memory()),
    "LogVisualization": lambda s: LogVisualization(picture, Memory(), every=2),
    "Metrics": lambda s: Metrics(),
    "Metrics(accuracy)": lambda s: Metrics(accuracy),
    "MetricsPrinter": lambda s: MetricsPrinter(),
    "MixUp": lambda s: MixUp(),
    "NeighborImages": lambda s: NeighborImages(s.main),
    "Profile": lambda s: Profile(),
    "ProgressBar": lambda s: ProgressBar(enabled=True, interval=0.0, file=io.StringIO()),
    "ReconstructionImages": lambda s: ReconstructionImages(),
    "Recorder": lambda s: Recorder(),
    "SampleImages": lambda s: SampleImages(s.main),
    "SanityCheck": lambda s: SanityCheck(),
    "Scheduler": lambda s: Scheduler({WeightDecay: 0.0}),
    "SetEpoch": lambda s: SetEpoch(),
    "StallReport": lambda s: StallReport(),
    "StochasticWeightAveraging": lambda s: StochasticWeightAveraging(s.main),
    "StopOnNaNLoss": lambda s: StopOnNaNLoss(),
    "Timer": lambda s: Timer(hours=9),
    "Traces": lambda s: Traces({"rows": looked}),
    "Unfreeze": lambda s: Unfreeze({"*": 0}),
}

every_callback = pytest.mark.parametrize("name", MAKE)


def public() -> set[str]:
    given = [getattr(fluxloop, name) for name in fluxloop.__all__] + [EventRecorder]
    bases = (fluxloop.Callback, fluxloop.UnsafeCallback, fluxloop.MetricSource, LogCallback)
    return {t.__name__ for t in given if isinstance(t, type) and issubclass(t, Callback) and t not in bases}


def test_every_public_callback_is_held_against_every_phase() -> None:
    assert {name.partition("(")[0] for name in MAKE} == public()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


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


def watched(setting: Setting, callback: Callback, default_callbacks: bool, *more: Callback) -> Learner:
    """Make a learner with a callback, and with those it may need beside it."""
    around = [] if default_callbacks else [Recorder(), Metrics()]
    beside = [other for other in around if type(other) is not type(callback)]
    return learner_of(setting, callback, *beside, *more, default_callbacks=default_callbacks)


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

NO_OBSERVERS = ("KeepBestModel",)
"""What changes weights: it puts the best ones back."""

MIXING = ("CutMix", "MixUp")
"""What has no place in any of these phases, and says so."""


Works = Callable[[Setting, Learner, Any, type[Phase]], None]


def ran_to_the_end(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    assert (learner.history[phase].epochs, learner.history[phase].steps) == (EPOCHS, STEPS)
    assert learner.history.stop_reason is None


def activations(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    found = learner.cbstate.activations
    assert {name.partition(".")[0] for name in found} >= {update for update in setting.updates if update}
    assert {step for series in found.values() for step, *_ in series} == {1, 3}


def wrote_rows(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    header, *rows = Path("metrics.csv").read_text().splitlines()
    assert {"epoch", "set", *setting.losses} <= set(header.split(","))
    assert [row.split(",")[:2] for row in rows] == [[str(epoch + 1), "training"] for epoch in range(EPOCHS)]


def wrote_a_checkpoint(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    other = learner_of(setting)
    assert other.load_weights(inner.last) == []
    for mine, kept in zip(learner.modules(), other.modules(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), kept.parameters(), strict=True))


def kept_the_best(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    values = learner.history[inner.monitor]
    assert (inner.best, inner.epoch) == (min(values), 1 + list(values).index(min(values)))


def noted_norms(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    names = ["grad_norm" if update is None else f"grad_norm_{update.lower()}" for update in setting.updates]
    assert all(len(learner.history[f"training/{name}"]) == EPOCHS for name in names)


def scheduled(label: str, times: int) -> Works:
    def look(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
        each = [label if update is None else f"{label}/{update}" for update in setting.updates]
        found = learner.cbstate.hyperparameters
        assert set(found) == ({label} if isinstance(inner, Scheduler) else set(each))
        assert all(len(series) == times for series in found.values())

    return look


def logged(*names: str, times: int) -> Works:
    def look(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
        memory = inner.backends[0]
        wanted = [name.format(loss=loss) for name in names for loss in setting.losses]
        assert set(wanted) <= set(memory.names)
        assert {len(memory.series(name)) for name in wanted} == {times}

    return look


def logged_parameters(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    assert inner.backends[0].names == ["hyperparameters"]


def logged_things(group: str, times: int) -> Works:
    def look(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
        assert len([record for record in inner.backends[0].records if group in record.group]) >= times

    return look


def logged_histograms(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    models = learner.models.items()
    names = [".".join(filter(None, (model, name))) for model, part in models for name, _ in part.named_parameters()]
    found = inner.backends[0].names
    assert {f"step/weights/{name}" for name in names} <= set(found)
    assert {f"step/gradients/{name}" for name in names} & set(found)
    assert any(name.startswith("step/activations/") for name in found)


def averaged(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    assert inner.num_averaged == EPOCHS
    live, average = learner.weights[setting.main], learner.weights[f"{setting.main}@swa"]
    assert any(not torch.equal(a, b) for a, b in zip(live.parameters(), average.parameters(), strict=True))


def measured(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    assert len(inner.seconds["fit"]) == 1
    assert len(inner.seconds[phase.__name__]) == EPOCHS


def unfrozen(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    assert all(parameter.requires_grad for model in learner.modules() for parameter in model.parameters())


def compared(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    found = learner.history[f"validation/{inner.metric}"]
    assert len(found) == EPOCHS
    assert all(value > 0 for value in found)


def drew(setting: Setting, learner: Learner, inner: Any, phase: type[Phase]) -> None:
    assert learner.cbstate.images[inner.label].dtype is torch.uint8
    assert len(list(Path("pictures").glob(f"{inner.label}-*.png"))) == EPOCHS


WORKS: dict[str, Works] = {
    "ActivationStats": activations,
    "AttentionMaps": drew,
    "BatchLimit": ran_to_the_end,
    "CSVLogger": wrote_rows,
    "Checkpointer": wrote_a_checkpoint,
    "EarlyStopping": ran_to_the_end,
    "EmbeddingMap": drew,
    "FrechetDistance": compared,
    "GradientClip": noted_norms,
    "KeepBestModel": kept_the_best,
    "LRScheduler": scheduled("learning_rate", EPOCHS),
    "LogHistograms": logged_histograms,
    "LogHyperParams": logged_parameters,
    "LogImages": logged_things("images", 1),
    "LogMetrics": logged("epoch/training/{loss}", times=EPOCHS),
    "LogTraces": logged("step/traces/rows", times=STEPS),
    "LogVisualization": logged_things("visualization", STEPS // 2),
    "NeighborImages": drew,
    "Profile": measured,
    "ReconstructionImages": drew,
    "Scheduler": scheduled("weight_decay", STEPS),
    "SetEpoch": ran_to_the_end,
    "StallReport": ran_to_the_end,
    "StochasticWeightAveraging": averaged,
    "Timer": ran_to_the_end,
    "Unfreeze": unfrozen,
}
"""What shows that a callback has done what it is there for."""


COUNTED = ("Recorder", "ConditionalCallback", "CustomCallback", "GarbageCollect", "SanityCheck", "StopOnNaNLoss")


def assert_works(name: str, setting: Setting, learner: Learner, callback: Callback, told: str) -> None:
    """Assert that a callback has done in a training of two epochs what it is there for."""
    phase = next(iter(learner.phases))
    counts = learner.history[phase]
    inner: Any = callback.unwrapped
    if name in WORKS:
        WORKS[name](setting, learner, inner, phase)
    elif name in COUNTED:
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
    elif name == "Traces":
        assert learner.cbstate.traces[phase]["rows"] == [(step + 1, BATCH) for step in range(STEPS)]
    else:
        raise AssertionError(
            f"what does {name} do? Say so in WORKS, or list it in COUNTED if nothing of it can be seen"
        )


@pytest.mark.slow(quick=4)
@every_setting
@every_callback
@pytest.mark.parametrize("default_callbacks", [False, True], ids=["alone", "with defaults"])
def test_as_it_comes_it_works_and_changes_no_weight_or_says_precisely_what_it_lacks(
    name: str, place: str, default_callbacks: bool, plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = SETTINGS[place]
    callback = MAKE[name](setting)
    if name in setting.knows:
        error, words = setting.knows[name]
        with pytest.raises(error, match=words):
            watched(setting, callback, default_callbacks).fit(EPOCHS, phases=[setting.phase()])
        return
    learner = watched(setting, callback, default_callbacks)
    learner.fit(EPOCHS, phases=[setting.phase()])
    if name not in NO_OBSERVERS:
        assert_same_bits(learner, plain(place))
    assert_works(name, setting, learner, callback, capsys.readouterr().out)


# Given what they lack


def labelled() -> tuple[Tensor, Tensor]:
    return xs(), ys()


def evenly(module: nn.Module, images: Tensor) -> Tensor:
    return torch.full((len(images), 1, 4, 4), 0.25)


GIVEN: dict[str, Callable[[Setting], Callback | None]] = {
    "AttentionMaps": lambda s: AttentionMaps(s.main, queries=xs(), attention=evenly),
    "EarlyStopping": lambda s: EarlyStopping(99, monitor=f"training/{s.losses[-1]}"),
    "EmbeddingMap": lambda s: EmbeddingMap(s.main, queries=labelled(), features=flatten(s)),
    "FeatureStats": lambda s: FeatureStats(s.entry) if s.entry != "batch" else None,
    "KNNProbe": lambda s: KNNProbe(s.main, bank=labelled(), queries=labelled(), k=3, features=flatten(s)),
    "KeepBestModel": lambda s: KeepBestModel(f"training/{s.losses[-1]}"),
    "LinearProbe": lambda s: (
        LinearProbe(s.main, 3, entries=(s.entry, s.labels), queries=labelled()) if s.labels is not None else None
    ),
    "LogImages": lambda s: LogImages(Memory()),
    "LogTraces": lambda s: LogTraces(Memory()),
    "Metrics": lambda s: Metrics(Metric(norm, name="norm", inputs=(s.entry,))),
    "NeighborImages": lambda s: NeighborImages(s.main, queries=labelled(), features=flatten(s)),
    "ReconstructionImages": lambda s: (
        ReconstructionImages(images=lambda phase, state: {"image": state.xs})
        if isinstance(s.phase(), ObjectivePhase)
        else None
    ),
    "SampleImages": lambda s: SampleImages(s.main, shape=(1, 1, 3) if s.main != "G" else None),
    "StochasticWeightAveraging": lambda s: StochasticWeightAveraging(s.main, forward=forward_of(s)),
}
"""The same callbacks with the arguments that their messages ask for; None where a phase has nothing to give."""


BESIDE: dict[str, str] = {"LogImages": "SampleImages", "LogTraces": "Traces"}
"""Who has to be there for whom."""


def forward_of(setting: Setting) -> Callable[[nn.Module, Any], object]:
    """Give what runs the average on a batch."""
    if setting.main == "G":
        return lambda module, batch: module(torch.randn(len(batch), 6))
    return lambda module, batch: module(batch["image"] if isinstance(batch, dict) else batch[0])


def flatten(setting: Setting) -> Callable[[nn.Module, Tensor], Tensor]:
    """Give what makes features: of a GAN, whose generator takes no images, the images themselves."""
    if setting.main == "G":
        return lambda module, images: images.flatten(1)
    return lambda module, images: module(images)


def norm(entry: Any) -> Tensor:
    rows: Tensor = entry["image"] if isinstance(entry, dict) else entry
    return rows.flatten(1).norm(dim=1).mean()


@pytest.mark.slow(quick=5)
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
    beside = [given(BESIDE[name], setting)] if name in BESIDE else []
    learner = watched(setting, callback, True, *beside)
    learner.fit(EPOCHS, phases=[setting.phase()])
    if name not in NO_OBSERVERS:
        assert_same_bits(learner, plain(place))
    if name == "Metrics":
        assert len(learner.history["training/norm"]) == EPOCHS
    else:
        assert_works(name, setting, learner, callback, capsys.readouterr().out)


# All at once


def given(name: str, setting: Setting) -> Callback | None:
    """Make a callback with the arguments it needs there; None where it has no place."""
    if name in setting.knows or name == "Metrics(accuracy)":
        return GIVEN[name](setting) if name in GIVEN else None
    return MAKE[name](setting)


def everybody(setting: Setting, leave_out: tuple[str, ...] = NO_OBSERVERS) -> list[Callback]:
    """Make one of each."""
    made = [given(name, setting) for name in MAKE if name not in leave_out]
    return [callback for callback in made if callback is not None]


@pytest.mark.slow
@every_setting
def test_all_at_once_they_change_no_weight_in_whatever_order_they_are_listed(
    place: str, plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = SETTINGS[place]
    digests = set()
    for turn in (0, 5):
        own_folder(turn)
        callbacks = everybody(setting)
        learner = learner_of(setting, *callbacks[turn:], *callbacks[:turn])
        digests.add(learner.callbacks.digest)
        learner.fit(EPOCHS, phases=[setting.phase()])
        assert_same_bits(learner, plain(place))
    assert len(digests) == 1
    assert len(learner.callbacks) >= len(public()) - len((*MIXING, *NO_OBSERVERS)) - 3


def own_folder(number: int) -> None:
    """Go to a folder of one's own, beside the one before."""
    folder = Path.cwd().parent / f"process-{number}"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)


BUSY: dict[str, Callable[[Setting], Callback]] = {
    "BatchLimit": lambda s: BatchLimit(1),
    "GradientClip": lambda s: GradientClip(0.05),
    "LRScheduler": lambda s: LRScheduler(partial(StepLR, step_size=2, gamma=0.1), unit="step"),
    "Scheduler": lambda s: Scheduler({WeightDecay: lambda step: 0.1 * step}),
    "StochasticWeightAveraging": lambda s: StochasticWeightAveraging(s.main, unit="step", forward=forward_of(s)),
    "Unfreeze": lambda s: Unfreeze({"*.bias": 1}, unit="step"),
}
"""How to make one that has more to do in a few steps."""

OF_A_PROCESS = ("LogHistograms", "LogHyperParams", "LogImages", "LogMetrics", "LogTraces", "LogVisualization", "Timer")
"""What is not the same again: how much is in a list in memory, and the time."""


@pytest.mark.slow
@every_setting
@pytest.mark.parametrize("limit", [False, True], ids=["whole epochs", "ended early"])
def test_all_at_once_a_run_that_is_killed_and_resumed_ends_the_same_to_the_bit(
    place: str, limit: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    setting, numbers = SETTINGS[place], count()

    def begin() -> Learner:
        number = next(numbers)  # two that are not killed; then pairs of one that is, and one that goes on
        own_folder(number if number < 2 else number // 2 + 1)
        callbacks = everybody(setting, (*BUSY, *NO_OBSERVERS[:limit]))
        callbacks += [make(setting) for name, make in BUSY.items() if limit or name != "BatchLimit"]
        return learner_of(setting, *callbacks[number:], *callbacks[:number])

    assert_resumes_exactly(
        begin,
        epochs=EPOCHS,
        phases=lambda: [setting.phase()],
        at=(5 if limit else 3,),
        ignore=[f"callbacks.{name}" for name in OF_A_PROCESS],
    )


# One optimizer of several, one model of several

SEVERAL = ("user's GAN", "GANPhase", "SimCLRPhase")


def moved(before: nn.Module, after: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("place", SEVERAL)
def test_what_is_said_of_one_optimizer_leaves_the_others_as_they_train(place: str) -> None:
    setting = SETTINGS[place]
    one, other = setting.updates
    still: list[Callback] = [
        Scheduler({LearningRate(one): 0.0}),
        GradientClip(0.0, optimizer=one),
        LRScheduler(lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.0), optimizer=one),
    ]
    for callback in still:
        learner = watched(setting, callback, default_callbacks=False)
        before = copy.deepcopy(learner.models)
        learner.fit(1, phases=[setting.phase()])
        assert not moved(before[one], learner.models[one]), callback
        assert moved(before[other], learner.models[other]), callback


@pytest.mark.parametrize("place", SEVERAL)
def test_an_optimizer_that_is_not_there_is_told_with_those_that_are(place: str) -> None:
    setting = SETTINGS[place]
    names = "|".join(str(update) for update in setting.updates)
    nobody: list[Callback] = [
        Scheduler({LearningRate("nobody"): 0.0}),
        GradientClip(1.0, optimizer="nobody"),
        LRScheduler(partial(StepLR, step_size=1), optimizer="nobody"),
    ]
    for callback in nobody:
        with pytest.raises(OptimizerError, match=f"nobody.*({names})"):
            watched(setting, callback, default_callbacks=False)
    wrong: list[Callback] = [StochasticWeightAveraging("nobody"), Unfreeze({"nobody.*": 1}), EMA("nobody")]
    for callback in wrong:
        with pytest.raises(ModelError, match="nobody"):
            watched(setting, callback, default_callbacks=False)


@every_setting
def test_what_is_unfrozen_in_the_second_epoch_does_not_move_in_the_first(place: str) -> None:
    setting = SETTINGS[place]
    pattern = {"model": "1"}.get(setting.main, f"{setting.main}.{0 if setting.main == 'G' else 1}")
    learner = watched(setting, Unfreeze({pattern: 1}), default_callbacks=False)
    part = learner.weights[setting.main][0 if setting.main == "G" else 1]
    before, whole = copy.deepcopy(part), copy.deepcopy(learner.weights[setting.main])
    learner.fit(1, phases=[setting.phase()])
    assert not moved(before, part)
    assert moved(whole, learner.weights[setting.main])
    learner.fit(1, phases=[setting.phase()])
    assert moved(before, part)


@pytest.mark.parametrize("place", ["user's GAN", "GANPhase"])
def test_a_model_that_waits_frozen_as_a_whole_has_the_other_trained_alone(place: str) -> None:
    setting = SETTINGS[place]
    learner = watched(setting, Unfreeze({"G": 1}), default_callbacks=False)
    generator, critic = copy.deepcopy(learner.weights["G"]), copy.deepcopy(learner.weights["D"])
    with pytest.warns(UserWarning, match="all parameters of optimizer 'G' are frozen"):
        learner.fit(1, phases=[setting.phase()])
    assert not moved(generator, learner.weights["G"])
    assert moved(critic, learner.weights["D"])
    learner.fit(1, phases=[setting.phase()])
    assert moved(generator, learner.weights["G"])


@pytest.mark.slow(quick=3)
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


@pytest.mark.slow(quick=1)
@pytest.mark.filterwarnings("ignore:the fit stops")
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


@pytest.mark.slow(quick=12)
@every_setting
@every_callback
def test_it_goes_through_a_bare_step_or_says_what_it_lacks(name: str, place: str) -> None:
    setting = SETTINGS[place]
    beside = [given(BESIDE[name], setting)] if name in BESIDE else []
    learner = watched(setting, MAKE[name](setting), False, *beside)
    early = ("CutMix", "FeatureStats", "LinearProbe", "MixUp")  # the others look when an epoch ends
    lacks = name in early and name in setting.knows
    batch = next(iter(learner.data.training))
    with pytest.raises(setting.knows[name][0], match=setting.knows[name][1]) if lacks else nullcontext():
        setting.phase().step(learner, batch)
    assert learner.scope is None
    assert ("grads" in learner.step) is (name not in MIXING)  # those say it before the step begins


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
