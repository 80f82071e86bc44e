"""Defects of luz and mlr3torch that concern the callback library: each cannot happen here."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from fluxloop import (
    EMA,
    Accelerator,
    Callback,
    CancelFittingException,
    Counts,
    CustomCallback,
    EpochEnd,
    FitEnd,
    KNNProbe,
    Learner,
    LinearProbe,
    Metric,
    Metrics,
    MetricsPrinter,
    PredictionPhase,
    ProgressBar,
    Recorder,
    SampleImages,
    SanityCheck,
    StepBegin,
    StepEnd,
    TensorBatches,
    Traces,
    TrainingPhase,
    ValidationPhase,
    accuracy,
    throttle,
    watching,
)
from fluxloop.callbacks.activation_stats import ActivationStats
from fluxloop.callbacks.batch_limit import BatchLimit
from fluxloop.callbacks.gradient_clip import GradientClip
from fluxloop.callbacks.profile import Profile
from fluxloop.callbacks.set_epoch import SetEpoch
from fluxloop.callbacks.swa import StochasticWeightAveraging
from fluxloop.run.summary import summary
from fluxloop.testing import EventRecorder, toy_learner


def rows(number: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randn(number, 3, generator=torch.Generator().manual_seed(0)), torch.arange(number) % 3


def batches() -> TensorBatches:
    return TensorBatches(*rows(), batch_size=8)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def learner_of(*callbacks: Callback, model: Any = None, **options: Any) -> Learner:
    return Learner(
        net() if model is None else model,
        cross_entropy,
        callbacks=callbacks,
        seed=4,
        **{
            "data": (batches(), batches()),
            "optimizer": partial(torch.optim.SGD, lr=0.1),
            "default_callbacks": False,
            **options,
        },
    )


# luz


def test_nothing_switches_to_eval_and_never_back() -> None:
    modes: list[bool] = []

    def look(learner: Any) -> None:
        modes.extend(module.training for module in learner.model.modules())

    learner = learner_of(
        Recorder(),
        Metrics(accuracy),
        SanityCheck(),
        KNNProbe("model", k=3),
        LinearProbe("model", 3, entries=("preds", "ys")),
        SampleImages("model", shape=(1, 1, 3), folder=None),
        EMA("model", 0.9),
        StochasticWeightAveraging(),
        ActivationStats(every=1),
        CustomCallback(look, StepBegin, TrainingPhase, reads=("model",), name="look before"),
        CustomCallback(look, StepEnd, TrainingPhase, reads=("model",), name="look after"),
    )

    def watch(view: Any) -> None:
        learner.evaluate()
        learner.predict(rows()[0])
        learner.epoch(ValidationPhase())
        summary(learner)
        with watching(learner.model):
            learner.model(rows()[0])

    learner.add_callback(CustomCallback(watch, StepEnd, TrainingPhase, name="watches in the middle of an epoch"))
    learner.fit(2)
    assert len(modes) == 2 * 3 * 2 * 6
    assert all(modes)


def test_a_model_given_in_eval_mode_is_trained_in_train_mode_and_given_back_as_it_was() -> None:
    seen: list[bool] = []
    look = CustomCallback(lambda learner: seen.append(learner.model[3].training), StepEnd, TrainingPhase)
    learner = learner_of(look, model=net().eval())
    learner.fit(1)
    assert seen == [True] * 3
    assert not learner.model[3].training


# mlr3torch


class Failing:
    """A metric that fails when it is updated, or when it is computed."""

    def __init__(self, at: str) -> None:
        self.at = at

    def update(self, preds: Tensor, ys: Tensor) -> None:
        if self.at == "update":
            raise KeyError("no such class")

    def compute(self) -> Tensor:
        if self.at == "compute":
            raise ZeroDivisionError("no rows")
        return torch.zeros(())

    def reset(self) -> None: ...


def fails(preds: Tensor, ys: Tensor) -> Tensor:
    raise KeyError("no such class")


@pytest.mark.parametrize(
    ("metric", "kind", "word"),
    [
        (Metric(Failing("update"), name="share"), KeyError, "updating"),
        (Metric(Failing("compute"), name="share"), ZeroDivisionError, "computing"),
        (Metric(fails, name="share"), KeyError, "updating"),
    ],
    ids=["update", "compute", "function"],
)
@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase])
def test_an_error_of_a_metric_is_raised_and_named_and_becomes_no_nan(
    metric: Metric, kind: type[Exception], word: str, phase: Any
) -> None:
    learner = learner_of(Recorder(), Metrics(Metric(metric.fn, name="share", phase=phase)))
    with pytest.raises(kind) as caught:
        learner.fit(1)
    notes = "\n".join(caught.value.__notes__)
    assert f"while {word} the metric 'share'" in notes
    assert "raised by Metrics at" in notes
    assert phase.__name__ in notes
    assert "share" not in learner.history.metrics[phase]
    assert all(row["value"] == row["value"] for row in learner.history.rows())


@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase])
def test_no_predictions_are_kept_over_an_epoch(phase: Any) -> None:
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    def look(learner: Any) -> None:
        seen.extend(weakref.ref(learner.step[name]) for name in ("preds", "loss"))
        alive.append(sum(reference() is not None for reference in seen))

    learner = learner_of(
        Recorder(),
        Metrics(accuracy, torchmetrics.classification.MulticlassF1Score(3), Metric(_level, name="level")),
        ActivationStats(every=1),
        CustomCallback(look, StepEnd, phase, reads=("step",)),
        data=(list(batches()) * 4, list(batches()) * 4),
    )
    learner.fit(2, phases=[phase()])
    assert len(alive) == 24
    assert max(alive) <= 4  # the step's own, and those of the one before


def _level(preds: Tensor, ys: Tensor) -> Tensor:
    return preds.mean()


class Stream(IterableDataset[Any]):
    """Rows that nobody knows the number of."""

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(*rows(20), strict=True))


class Reiterable:
    """Batches that nobody knows the number of."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches())


@pytest.mark.parametrize("kind", ["dataset", "iterable", "generator"])
def test_data_without_a_length_is_trained_on_with_every_callback(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> Any:
        if kind == "dataset":
            return DataLoader(Stream(), batch_size=8)
        return Reiterable() if kind == "iterable" else (batch for batch in batches())

    once = kind == "generator"
    callbacks = [Recorder(), Metrics(accuracy), MetricsPrinter(), ProgressBar(enabled=True), SetEpoch(), Profile()]
    callbacks += [ActivationStats(), EMA("model"), Traces({"rows": lambda learner: len(learner.step.xs)})]
    if not once:  # these run over the data again
        callbacks += [StochasticWeightAveraging(), KNNProbe("model", k=3)]
    learner = learner_of(*callbacks, data=(make(), make()))
    learner.fit(1 if once else 2)
    for phase in (TrainingPhase, ValidationPhase):
        assert learner.history[phase].steps == (3 if once else 6)
    if not once:
        assert len(learner.predict(make())) == (20 if kind == "dataset" else 24)


def test_a_limit_makes_epochs_of_data_without_an_end() -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield from batches()

    learner = learner_of(Recorder(), BatchLimit(4), data=(endless(),))
    learner.fit(3)
    assert learner.history[TrainingPhase] == Counts(epochs=3, steps=12, steps_epoch=4, updates={None: 12})


def test_one_failing_handler_of_the_end_keeps_no_other_from_running() -> None:
    ended: list[str] = []

    def leave(learner: Any) -> None:
        ended.append("failed")
        raise RuntimeError("broken")

    learner = learner_of(
        CustomCallback(leave, FitEnd, name="a", reads=()),
        CustomCallback(lambda _: ended.append("ended"), FitEnd, name="b", reads=()),
    )
    with pytest.raises(RuntimeError, match="broken"):
        learner.fit(1)
    assert ended == ["failed", "ended"]
    assert learner.scope is None
    assert not learner._running.fitting


def test_a_fit_can_be_ended_after_any_step() -> None:
    def stop(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].steps == 2:
            raise CancelFittingException("two steps are enough")

    learner = learner_of(Recorder(), CustomCallback(stop, StepEnd, TrainingPhase))
    assert learner.fit(5).stop_reason == "two steps are enough"
    assert learner.history[TrainingPhase].steps == 2
    assert learner.history[ValidationPhase].steps == 0


def test_without_validation_data_nothing_announces_a_validation(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder, data=(batches(),), default_callbacks=True)
    learner.fit(1)
    assert {phase for _, phase in recorder.trace} == {"FittingPhase", "TrainingPhase"}
    assert "alid" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(("gpu", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_device_is_chosen_as_the_documentation_says(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, mps: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert Accelerator("auto").device.type == chosen
    assert "CUDA, else MPS, else the CPU" in " ".join((Accelerator.__doc__ or "").split())


def test_counts_of_steps_and_epochs_are_documented_whole_numbers() -> None:
    learner = toy_learner(Recorder(), Metrics(), throttle(CustomCallback(lambda _: None, StepEnd), StepEnd, freq=2))
    learner.fit(3)
    counts = learner.history[TrainingPhase]
    assert counts == Counts(epochs=3, steps=48, steps_epoch=16, updates={None: 48})
    numbers = [counts.epochs, counts.steps, counts.steps_epoch, counts.updates[None], learner.history.cycles]
    assert {type(number) for number in numbers} == {int}
    assert {type(row["epoch"]) for row in learner.history.rows()} == {int}
    for name in ("epochs", "steps", "steps_epoch", "updates"):
        assert f"{name}: " in (Counts.__doc__ or "")


def test_the_count_goes_on_over_fits_and_phases_see_their_own() -> None:
    seen: list[int] = []
    look = CustomCallback(
        lambda learner: seen.append(learner.cbstate.history[TrainingPhase].steps),
        EpochEnd,
        TrainingPhase,
        reads=("cbstate.history",),
    )
    learner = learner_of(Recorder(), look)
    learner.fit(2)
    learner.fit(1)
    assert seen == [3, 6, 9]
    learner.predict(rows()[0], phase=PredictionPhase())
    assert learner.history[TrainingPhase].steps == 9


def test_clipping_sees_the_gradients_that_the_optimizer_steps_with_not_scaled_ones() -> None:
    class Scaled(Accelerator):
        """Computes gradients of a scaled loss, and has them unscaled before an update begins."""

        def backward(self, loss: Tensor, parameters: Any, **options: Any) -> None:
            super().backward(loss * 1024, parameters, **options)
            for parameter in parameters:
                parameter.grad /= 1024

    norms: dict[str, list[float]] = {}
    for name, accelerator in (("plain", Accelerator("cpu")), ("scaled", Scaled("cpu"))):
        learner = toy_learner(GradientClip(0.25), Recorder(), accelerator=accelerator)
        learner.fit(1, phases=[TrainingPhase()])
        norms[name] = [*learner.history["training/grad_norm"], learner.model.value.item()]
    assert norms["plain"] == norms["scaled"]
    assert norms["plain"][0] > 0.25


def test_the_printed_history_shows_validation() -> None:
    learner = toy_learner(Recorder(), Metrics())
    history = learner.fit(2)
    assert "ValidationPhase: 2 epochs" in repr(history)
    assert f"validation/loss: {history['validation/loss'][-1]:.4g}" in repr(history)
