from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CancelEpochException,
    CancelStepException,
    CustomCallback,
    EpochBegin,
    Learner,
    Loss,
    LossBegin,
    Metric,
    MetricError,
    Metrics,
    MissingEntryError,
    ProgressBar,
    Recorder,
    SmoothLoss,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    accuracy,
    mae,
    on,
    runepoch,
    runstep,
    top_k,
)
from fluxloop.state import State, StepState
from fluxloop.testing import Coefficient, toy_learner

quick = settings(deadline=None, max_examples=40)
XS = torch.randn(70, 4, generator=torch.Generator().manual_seed(0))
YS = torch.randint(0, 3, (70,), generator=torch.Generator().manual_seed(1))


def classifier(*metrics: Any, batch_size: int = 32, rows: int = 70, lr: float = 0.0, **options: Any) -> Learner:
    """Three classes from four features; 70 rows make a last batch of 6."""
    torch.manual_seed(0)
    batches = TensorBatches(XS[:rows], YS[:rows], batch_size=batch_size)
    return Learner(
        nn.Linear(4, 3),
        nn.functional.cross_entropy,
        **{
            "data": (batches, batches),
            "optimizer": partial(torch.optim.SGD, lr=lr),
            "callbacks": [Recorder(), Metrics(*metrics)],
            "default_callbacks": False,
            "seed": 0,
            **options,
        },
    )


def logits_of(learner: Learner, rows: int = 70) -> Tensor:
    with torch.no_grad():
        return learner.model(XS[:rows])


def values(learner: Learner, phase: Any = TrainingPhase) -> dict[str, list[Any]]:
    return learner.history.metrics[phase]


# Loss


@pytest.mark.slow
@quick
@given(st.integers(1, 70), st.integers(1, 40))
def test_the_loss_of_an_epoch_is_that_of_all_rows_at_once(rows: int, batch_size: int) -> None:
    learner = classifier(rows=rows, batch_size=batch_size)
    learner.fit(1)
    expected = nn.functional.cross_entropy(logits_of(learner, rows).double(), YS[:rows]).item()
    assert values(learner)["loss"] == [pytest.approx(expected, rel=1e-5)]
    assert values(learner, ValidationPhase)["loss"] == [pytest.approx(expected, rel=1e-5)]
    assert learner.evaluate()["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_short_last_batch_counts_for_its_rows_only() -> None:
    learner = classifier()
    learner.fit(1, phases=[ValidationPhase()])
    means = [
        nn.functional.cross_entropy(logits_of(learner)[s], YS[s]).item()
        for s in (slice(0, 32), slice(32, 64), slice(64, 70))
    ]
    weighted = (32 * means[0] + 32 * means[1] + 6 * means[2]) / 70
    assert values(learner, ValidationPhase)["loss"] == [pytest.approx(weighted, rel=1e-6)]
    assert weighted != pytest.approx(sum(means) / 3, rel=1e-4)


def test_the_training_loss_is_that_of_a_hand_written_loop() -> None:
    learner = classifier(lr=0.3)
    learner.fit(3)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    expected = []
    for _ in range(3):
        total = 0.0
        for start in range(0, 70, 32):
            xs, ys = XS[start : start + 32], YS[start : start + 32]
            loss = nn.functional.cross_entropy(model(xs), ys)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(xs)
        expected.append(total / 70)
    assert torch.equal(model.weight, learner.model.weight)
    assert values(learner)["loss"] == pytest.approx(expected, rel=1e-12)


class TwoLosses(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch) as (_, state):
            for name, power in (("G", 1), ("D", 2)):
                with learner.optimizing(name) as block:
                    block.loss = (getattr(learner.model, name)(state.xs) ** power).mean()


class NoLoss(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch):
            pass


def pair_of_models(*metrics: Any) -> Learner:
    batches = list(torch.arange(1.0, 8.0).reshape(7, 1).split(3))
    return Learner(
        {"G": Coefficient(2.0), "D": Coefficient(3.0)},
        data=(batches,),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        callbacks=[Recorder(), Metrics(*metrics)],
        default_callbacks=False,
        seed=0,
    )


def test_losses_by_optimizer_are_recorded_one_by_one() -> None:
    learner = pair_of_models()
    learner.fit(2, phases=[TwoLosses()])
    rows = torch.arange(1.0, 8.0)
    assert values(learner, TwoLosses) == {
        "loss_g": [pytest.approx((2 * rows).mean().item())] * 2,
        "loss_d": [pytest.approx(((3 * rows) ** 2).mean().item())] * 2,
    }
    assert learner.history["training/loss_d"] == values(learner, TwoLosses)["loss_d"]


def test_a_step_without_a_loss_records_none() -> None:
    learner = pair_of_models()
    learner.fit(1, phases=[NoLoss()])
    assert values(learner, NoLoss) == {}
    assert learner.history[NoLoss].steps == 3


def test_an_epoch_without_a_finished_step_has_no_value() -> None:
    def cancel(learner: Any) -> None:
        if cancelling:
            raise CancelStepException

    cancelling = False
    learner = toy_learner(Recorder(), Metrics(mae), CustomCallback(cancel, LossBegin, TrainingPhase))
    learner.fit(1)
    cancelling = True
    learner.fit(1)
    cancelling = False
    learner.fit(1)
    rows = [row for row in learner.history.rows() if row["phase"] == "TrainingPhase"]
    assert [(row["metric"], row["epoch"]) for row in rows] == [("loss", 1), ("loss", 3), ("mae", 1), ("mae", 3)]


def test_a_loss_that_is_no_tensor_is_recorded_too() -> None:
    class Evaluates(ValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                state.loss = float(len(batch[0]))

    learner = classifier()
    learner.fit(1, phases=[Evaluates()])
    assert values(learner, Evaluates)["loss"] == [pytest.approx((32 * 32 + 32 * 32 + 6 * 6) / 70)]


# SmoothLoss


@pytest.mark.slow
@quick
@given(st.integers(1, 30), st.sampled_from([0.0, 0.5, 0.9, 0.98]))
def test_smoothloss_is_a_bias_corrected_moving_average(steps: int, decay: float) -> None:
    losses: list[float] = []
    keep = CustomCallback(lambda learner: losses.append(learner.step.loss.item()), StepEnd, TrainingPhase)
    learner = classifier(lr=0.5, batch_size=2, rows=2 * steps, callbacks=[Recorder(), Metrics(SmoothLoss(decay)), keep])
    learner.fit(1)
    weights = [decay ** (steps - 1 - index) for index in range(steps)]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert values(learner)["smoothloss"] == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("decay", [1.0, -0.1, 2, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(MetricError, match=r"decay=.* was given; expected a weight of the past in \[0, 1\)"):
        SmoothLoss(decay)


# Functions


@pytest.mark.slow
@quick
@given(st.integers(1, 70), st.integers(1, 40))
def test_a_function_is_averaged_over_rows(rows: int, batch_size: int) -> None:
    learner = classifier(accuracy, top_k(2), rows=rows, batch_size=batch_size)
    learner.fit(1)
    preds, ys = logits_of(learner, rows), YS[:rows]
    for phase in (TrainingPhase, ValidationPhase):
        assert values(learner, phase)["accuracy"] == [pytest.approx(accuracy(preds, ys).item(), rel=1e-6)]
        assert values(learner, phase)["top_2"] == [pytest.approx(top_k(2)(preds, ys).item(), rel=1e-6)]


def test_a_function_may_take_any_entries_of_the_step() -> None:
    def distance(z1: Tensor, z2: Tensor, scale: float) -> Tensor:
        return scale * (z1 - z2).abs().mean()

    class Views(AbstractTrainingPhase):
        def step(self, learner: Learner, batch: Tensor) -> None:
            with runstep(learner, self, xs=batch) as (_, state):
                state.z1, state.z2, state.scale = state.xs + 1, 2 * state.xs, 10.0

    learner = pair_of_models(Metric(distance, inputs=("z1", "z2", "scale")))
    learner.fit(1, phases=[Views()])
    expected = 10 * (torch.arange(1.0, 8.0) - 1).abs().mean().item()
    assert values(learner, Views) == {"distance": [pytest.approx(expected)]}


def test_a_function_may_give_a_number_or_any_tensor_with_one_element() -> None:
    learner = classifier(
        Metric(lambda preds, ys: len(preds), name="rows"),
        Metric(lambda preds, ys: preds.new_ones(1, 1), name="one"),
        Metric(lambda preds, ys: (preds > -1e9).all(), name="all"),
        Metric(lambda preds, ys: torch.tensor(len(preds)), name="count"),
    )
    learner.fit(1)
    weighted = (2 * 32 * 32 + 6 * 6) / 70
    found = {name: series[0] for name, series in values(learner).items()}
    assert found["rows"] == found["count"] == pytest.approx(weighted)
    assert (found["one"], found["all"]) == (1.0, 1.0)


def test_a_metric_has_no_graph_and_changes_no_gradient() -> None:
    seen: list[bool] = []

    def looks(preds: Tensor, ys: Tensor) -> Tensor:
        seen.append(preds.requires_grad or torch.is_grad_enabled())
        return preds.mean()

    plain, watched = classifier(lr=0.5), classifier(looks, lr=0.5)
    plain.fit(2)
    watched.fit(2)
    assert seen == [False] * len(seen) != []
    assert torch.equal(plain.model.weight, watched.model.weight)


def test_a_function_that_gives_no_scalar_is_refused_by_name() -> None:
    learner = classifier(Metric(lambda preds, ys: preds.argmax(1), name="guess"))
    with pytest.raises(MetricError, match=r"the metric 'guess' gave a Tensor of shape \(32,\); expected a scalar"):
        learner.fit(1)


# Objects with update, compute and reset


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.integers(3, 70), st.integers(1, 40))
def test_torchmetrics_are_used_as_they_are(rows: int, batch_size: int) -> None:
    balanced, area = MulticlassAccuracy(3, average="macro"), torchmetrics.AUROC(task="multiclass", num_classes=3)
    learner = classifier(balanced, Metric(area, name="AUROC"), rows=rows, batch_size=batch_size)
    learner.fit(1)
    for preds, ys in zip(logits_of(learner, rows).split(batch_size), YS[:rows].split(batch_size), strict=True):
        balanced.update(preds, ys)
        area.update(preds, ys)
    for phase in (TrainingPhase, ValidationPhase):
        assert values(learner, phase)["multiclassaccuracy"] == [pytest.approx(balanced.compute().item())]
        assert values(learner, phase)["auroc"] == [pytest.approx(area.compute().item())]


def test_a_binary_auroc_equals_the_share_of_ordered_pairs() -> None:
    xs = torch.randn(60, 1, generator=torch.Generator().manual_seed(3))
    ys = (xs[:, 0] + torch.randn(60, generator=torch.Generator().manual_seed(4)) > 0).long()
    learner = Learner(
        nn.Sequential(Coefficient(1.0), nn.Flatten(0)),
        lambda preds, ys: preds.mean(),
        callbacks=[Recorder(), Metrics(BinaryAUROC())],
        default_callbacks=False,
    )
    area = learner.evaluate(list(zip(xs.split(7), ys.split(7), strict=True)))["binaryauroc"]
    positive, negative = xs[ys == 1].double(), xs[ys == 0].double()
    wins = (positive > negative.T).double().mean().item()
    assert area == pytest.approx(wins, rel=1e-6)


def test_a_collection_gives_a_value_per_metric() -> None:
    collection = torchmetrics.MetricCollection({"Recall": MulticlassAccuracy(3), "F1": MulticlassF1Score(3)})
    learner = classifier(collection)
    learner.fit(1)
    expected = collection(logits_of(learner), YS)
    assert values(learner)["recall"] == [pytest.approx(expected["Recall"].item())]
    assert values(learner)["f1"] == [pytest.approx(expected["F1"].item())]
    assert learner.evaluate().keys() == {"loss", "recall", "f1"}


def test_an_object_may_take_several_named_inputs() -> None:
    class Embeds(ValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                state.z1, state.z2 = learner.model(state.xs), state.xs[:, :3]

    learner = classifier(Metric(torchmetrics.CosineSimilarity("mean"), name="cosine", inputs=("z1", "z2")))
    learner.fit(1, phases=[Embeds()])
    expected = nn.functional.cosine_similarity(logits_of(learner).double(), XS[:, :3].double()).mean().item()
    assert values(learner, Embeds) == {"cosine": [pytest.approx(expected, rel=1e-5)]}


class Hits:
    """Accuracy as a class of one's own."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.correct, self.total = 0, 0

    def update(self, preds: Tensor, ys: Tensor) -> None:
        self.log.append("update")
        self.correct = self.correct + (preds.argmax(1) == ys).sum()
        self.total += len(ys)

    def compute(self) -> Tensor:
        return self.correct / self.total


def test_a_class_with_update_compute_and_reset_is_a_metric() -> None:
    learner = classifier(Hits(), lr=0.5)
    learner.fit(2)
    expected = accuracy(logits_of(learner), YS).item()
    assert values(learner, ValidationPhase)["hits"][-1] == pytest.approx(expected)
    assert len(values(learner)["hits"]) == 2


def test_each_phase_and_epoch_has_a_copy_of_a_stateful_metric() -> None:
    given = Hits()
    learner = classifier(given, accuracy, lr=0.5)
    learner.fit(2)
    learner.evaluate()
    assert given.log == []
    assert given.total == 0
    for phase in (TrainingPhase, ValidationPhase):
        assert values(learner, phase)["hits"] == pytest.approx(values(learner, phase)["accuracy"])


class ValidatesOften(TrainingPhase):
    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for batch in data:
                self.step(learner, batch)
                learner.epoch(ValidationPhase())


def test_values_are_the_same_when_training_and_validation_interleave() -> None:
    metrics = Hits(), accuracy, SmoothLoss(), MulticlassAccuracy(3)
    plain, interleaved = classifier(*metrics, lr=0.5), classifier(*metrics, lr=0.5)
    plain.fit(2)
    interleaved.fit(2, phases=[ValidatesOften()])
    assert torch.equal(plain.model.weight, interleaved.model.weight)
    assert values(plain, TrainingPhase) == values(interleaved, ValidatesOften)
    assert len(values(interleaved, ValidationPhase)["hits"]) == 6
    for series in values(plain, ValidationPhase):
        assert values(plain, ValidationPhase)[series][-1] == values(interleaved, ValidationPhase)[series][-1]


# Names, inputs and phases


def linear(preds: Tensor, ys: Tensor, factor: float = 1.0) -> Tensor:
    return factor * preds.mean()


class Level:
    def __call__(self, preds: Tensor, ys: Tensor) -> Tensor:
        return preds.mean()


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (Metric(linear), "linear"),
        (Metric(partial(linear, factor=2.0)), "linear"),
        (Metric(linear, name="MeanPrediction"), "meanprediction"),
        (Metric(lambda preds, ys: preds.mean(), name="Mean"), "mean"),
        (Metric(MulticlassAccuracy(3)), "multiclassaccuracy"),
        (Metric(Level()), "level"),
        (Metric(top_k(3)), "top_3"),
        (Loss(), "loss"),
        (SmoothLoss(), "smoothloss"),
    ],
)
def test_a_metric_is_named_after_its_function_or_class_in_lower_case(metric: Any, name: str) -> None:
    assert metric.name == name


@pytest.mark.parametrize("function", [lambda preds, ys: preds.mean(), partial(lambda preds, ys: preds.mean())])
def test_a_lambda_needs_a_name(function: Any) -> None:
    with pytest.raises(MetricError, match=r"a lambda was given as a metric without a name; write Metric\(f, name="):
        Metrics(function)


@pytest.mark.parametrize(
    "metrics",
    [
        (accuracy, accuracy),
        (accuracy, Metric(linear, name="Accuracy")),
        (Metric(linear, name="loss"),),
        (Loss(), Loss()),
        (MulticlassAccuracy(3), MulticlassAccuracy(3, average="micro")),
        (SmoothLoss(), Metric(linear, name="smoothloss")),
    ],
)
def test_two_metrics_of_one_name_are_refused(metrics: tuple[Any, ...]) -> None:
    with pytest.raises(MetricError, match=r"two metrics are called '\w+'; give one another name: Metric\(f, name="):
        Metrics(*metrics)


def test_a_metric_named_as_one_of_a_collection_is_refused_and_not_lost() -> None:
    collection = torchmetrics.MetricCollection({"accuracy": MulticlassAccuracy(3, average="macro")})
    with pytest.raises(MetricError, match="accuracy"):
        classifier(accuracy, collection).fit(1)


@pytest.mark.parametrize("thing", ["accuracy", 3, None, [accuracy], Hits, MulticlassAccuracy])
def test_what_is_no_metric_is_refused(thing: Any) -> None:
    with pytest.raises(MetricError, match=r"was given as a metric; expected a function \(preds, ys\) -> scalar, or an"):
        Metrics(thing)


def test_a_metrics_class_is_told_from_an_instance() -> None:
    with pytest.raises(MetricError, match=r"the class Hits was given as a metric.*: Hits\(\.\.\.\)"):
        Metrics(Hits)


@pytest.mark.parametrize("inputs", ["preds", (1, 2)])
def test_inputs_that_are_no_names_are_refused(inputs: Any) -> None:
    with pytest.raises(MetricError, match="inputs"):
        Metric(linear, inputs=inputs)


@pytest.mark.parametrize("phase", ["training", TrainingPhase(), int])
def test_a_phase_that_is_no_phase_type_is_refused(phase: Any) -> None:
    with pytest.raises(MetricError, match="phase"):
        Metric(linear, phase=phase)


@pytest.mark.parametrize("make", [lambda phase: Metric(mae, phase=phase), lambda phase: SmoothLoss(phase=phase)])
def test_a_metric_of_one_phase_is_computed_there_alone(make: Callable[[Any], Any]) -> None:
    for phase, other in ((TrainingPhase, ValidationPhase), (ValidationPhase, TrainingPhase)):
        metric = make(phase)
        learner = toy_learner(Recorder(), Metrics(metric))
        learner.fit(2)
        assert len(values(learner, phase)[metric.name]) == 2
        assert list(values(learner, other)) == ["loss"]
        shared = learner.cbstate.metrics
        assert metric.name in shared[phase].latest()
        assert metric.name not in shared[other].latest()


def test_the_loss_may_be_left_to_one_phase() -> None:
    learner = toy_learner(Recorder(), Metrics(Loss(phase=ValidationPhase)))
    learner.fit(1)
    assert list(values(learner, ValidationPhase)) == ["loss"]
    assert values(learner, TrainingPhase) == {}


def test_a_metric_of_an_abstract_phase_is_computed_in_its_subclasses() -> None:
    learner = pair_of_models(Metric(lambda xs: xs.mean(), name="level", phase=AbstractTrainingPhase, inputs=("xs",)))
    learner.fit(1, phases=[NoLoss()])
    assert values(learner, NoLoss) == {"level": [pytest.approx(4.0)]}


# Failures


class FailsTo(Hits):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def update(self, preds: Tensor, ys: Tensor) -> None:
        if self.what == "update":
            raise ZeroDivisionError("odd")

    def compute(self) -> Tensor:
        raise ZeroDivisionError("odd")


def fails(preds: Tensor, ys: Tensor) -> Tensor:
    raise ZeroDivisionError("odd")


@pytest.mark.parametrize(
    ("metric", "doing"),
    [
        (Metric(fails), "while updating the metric 'fails'"),
        (Metric(FailsTo("update"), name="hits"), "while updating the metric 'hits'"),
        (Metric(FailsTo("compute"), name="hits"), "while computing the metric 'hits'"),
    ],
)
def test_a_metric_that_fails_is_named_in_a_note(metric: Any, doing: str) -> None:
    learner = classifier(accuracy, metric)
    with pytest.raises(ZeroDivisionError, match="odd") as caught:
        learner.fit(1)
    notes = "\n".join(caught.value.__notes__)
    assert doing in notes
    assert "raised by Metrics at" in notes
    assert "TrainingPhase()" in notes


def test_an_entry_that_the_phase_does_not_store_says_what_it_stores() -> None:
    learner = classifier(Metric(linear, name="views", inputs=("z1", "ys")))
    with pytest.raises(MissingEntryError, match="no entry 'z1'; it has: grads, loss, preds, xs, ys") as caught:
        learner.fit(1)
    notes = "\n".join(caught.value.__notes__)
    assert "the metric 'views' has inputs=('z1', 'ys')" in notes
    assert "Metric(..., phase=...)" in notes


# What it costs

HOST_COPIES = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call that brings numbers to the host."""
    calls: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(self, *args, **kwargs)

        return call

    for name in HOST_COPIES:
        monkeypatch.setattr(Tensor, name, counting(name))
    return calls


def copies_of_a_fit(copies: list[str], num_batches: int, callbacks: list[Callback], **options: Any) -> list[str]:
    learner = toy_learner(callbacks=callbacks, num_batches=num_batches, **options)
    copies.clear()
    learner.fit(1)
    return list(copies)


def test_the_counters_of_host_copies_count(copies: list[str]) -> None:
    one = torch.ones(1)
    assert [one.item(), float(one), int(one), bool(one), one.tolist()] == [1, 1, 1, True, [1]]
    one.cpu().numpy()
    assert set(copies) >= {"item", "__float__", "__int__", "__bool__", "tolist", "cpu", "numpy"}


@pytest.mark.slow
def test_metrics_copy_nothing_to_the_host_per_step(copies: list[str]) -> None:
    def callbacks() -> list[Callback]:
        return [Recorder(), Metrics(mae, SmoothLoss(), Metric(lambda preds, ys: preds.mean(), name="level"))]

    few, many = (copies_of_a_fit(copies, count, callbacks()) for count in (3, 300))
    assert many == few
    assert few.count("item") == 2 * 4 + 1, (
        "one number per metric, phase and epoch, and a look at the weights when the fit begins"
    )


def test_the_default_callbacks_copy_numbers_that_have_to_be_finite_alone_per_step(
    copies: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def callbacks() -> list[Callback]:
        return [Metrics(mae), ProgressBar(enabled=False)]

    few, many = (copies_of_a_fit(copies, count, callbacks(), default_callbacks=True) for count in (3, 103))
    looked_at = 1 + len(list(toy_learner().model.parameters()))
    assert len(many) - len(few) == 100 * looked_at, "StopOnNaNLoss' look at the loss and each gradient, on the CPU"
    assert [copy for copy in many if copy != "item"] == [copy for copy in few if copy != "item"], (
        "some rows of the data are looked at when the fit begins, so that a resumed run knows them again"
    )


def test_the_share_of_hits_is_that_of_all_rows_at_any_time_and_goes_on_from_a_kept_state() -> None:
    generator = torch.Generator().manual_seed(0)
    preds, ys = torch.randn(900, 3, 2, generator=generator), torch.randint(3, (900, 2), generator=generator)
    tracker = Metric(accuracy).start()
    assert tracker.latest() == tracker.compute() == {}
    seen = 0
    for step, size in enumerate([5, 1, 3] * 60):
        part = slice(seen, seen + size)
        tracker.update(State({"preds": preds[part], "ys": ys[part]}), size)
        assert tracker.latest()["accuracy"].item() == accuracy(preds[part], ys[part]).item()
        seen += size
        if step == 100:
            kept = tracker.state_dict()
            tracker = Metric(accuracy).start()
            tracker.load_state_dict(kept)
    hits = (preds[:seen].argmax(1) == ys[:seen]).sum().item()
    assert tracker.compute()["accuracy"].item() == pytest.approx(hits / (2 * seen), rel=1e-14)


def test_metrics_of_graphs_keep_none_and_a_users_function_sees_none() -> None:
    weight = torch.ones((), requires_grad=True)
    ours, theirs = Metric(mae).start(), Metric(lambda p, y: (weight * p - y).mean(), name="own").start()
    state = State({"preds": 2 * weight * torch.ones(3, 1), "ys": torch.zeros(3, 1)})
    for tracker in (ours, theirs):
        tracker.update(state, 3)
        for values in (tracker.latest(), tracker.compute()):
            assert not any(value.requires_grad for value in values.values())


def test_the_last_value_of_a_share_survives_being_kept() -> None:
    step = StepState({"preds": torch.eye(4), "ys": torch.tensor([0, 1, 2, 0])})
    tracker, other = Metric(accuracy).start(), Metric(accuracy).start()
    tracker.update(step, 4)
    other.load_state_dict(tracker.state_dict())
    assert other.latest()["accuracy"] == tracker.latest()["accuracy"] == 0.75
    assert other.compute()["accuracy"] == 0.75


def test_an_epoch_that_is_cancelled_when_it_begins_has_no_value() -> None:
    class ACancel(Callback):
        """In the second epoch, before the others that nothing orders."""

        epochs = 0

        @on(EpochBegin, TrainingPhase)
        def begin(self, event: EpochBegin, phase: Any, learner: Any) -> None:
            self.epochs += 1
            if self.epochs == 2:
                raise CancelEpochException("not this one")

    learner = toy_learner(ACancel(), Recorder(), Metrics())
    history = learner.fit(3, phases=[TrainingPhase()])
    assert history[TrainingPhase].epochs == 3
    assert [row["epoch"] for row in history.rows()] == [1, 3]
    assert history[TrainingPhase].steps == 32
