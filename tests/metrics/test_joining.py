from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric, MaxMetric, MeanMetric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.regression import PearsonCorrCoef, R2Score
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric

from fluxloop.metrics import Loss, Metric, SmoothLoss, accuracy, rmse
from fluxloop.state import LossName, StepState


def _steps(kind: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    found = []
    for rows in (5, 3, 4, 2):
        preds, ys = torch.randn(rows, 3, dtype=torch.float64), torch.randint(3, (rows,))
        if kind == "binary":
            preds, ys = preds[:, 0].sigmoid(), ys % 2
        elif kind == "values":
            preds, ys = preds[:, 0], preds[:, 1]
        elif kind == "one":
            preds = preds[:, 0]
        found.append({"preds": preds, "ys": ys, "loss": preds.square().mean()})
    return found


def _run(metric: Any, steps: list[dict[str, Any]]) -> Any:
    tracker = metric.start()
    tracker.keep_apart()
    for step in steps:
        tracker.update(StepState(step), len(step["preds"]))
    return tracker


def _compare(metric: Any, kind: str, parts: list[list[int]]) -> None:
    """Compare what processes that saw some steps each have joined with what one has computed that saw all."""
    steps = _steps(kind)
    whole = _run(metric, [steps[at] for part in parts for at in part]).compute()
    trackers = [_run(metric, [steps[at] for at in part]) for part in parts]
    told = [tracker.told() for tracker in trackers]
    assert [each is None for each in told] == [not part for part in parts]
    for tracker in trackers:
        tracker_says = tracker.joined([each for each in told if each is not None])
        assert tracker_says.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(
                torch.as_tensor(tracker_says[name]).double(), torch.as_tensor(value).double(), rtol=1e-6, atol=1e-9
            )


class Sum:
    """Add up the first scores; says how it is merged."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.seen = 0

    def update(self, preds: Tensor, ys: Tensor) -> None:
        self.total = self.total + preds.sum()
        self.seen += len(preds)

    def compute(self) -> Tensor:
        return self.total / self.seen

    def reset(self) -> None:
        self.total, self.seen = torch.zeros((), dtype=torch.float64), 0

    def merge_state(self, others: list[Sum]) -> None:
        for other in others:
            self.total, self.seen = self.total + other.total, self.seen + other.seen


METRICS: dict[str, tuple[Callable[[], Any], str]] = {
    "function": (lambda: Metric(accuracy), "classes"),
    "finished": (lambda: Metric(rmse), "values"),
    "loss": (Loss, "classes"),
    "sums": (lambda: Metric(MulticlassAccuracy(3)), "classes"),
    "matrix": (lambda: Metric(MulticlassConfusionMatrix(3)), "classes"),
    "lists": (lambda: Metric(BinaryAUROC()), "binary"),
    "regression": (lambda: Metric(R2Score()), "values"),
    "no reduction": (lambda: Metric(PearsonCorrCoef()), "values"),
    "mean": (lambda: Metric(MeanMetric(), inputs=("loss",)), "classes"),
    "maximum": (lambda: Metric(MaxMetric(), inputs=("loss",)), "classes"),
    "rows": (lambda: Metric(CatMetric(), inputs=("preds",)), "one"),
    "collection": (
        lambda: Metric(
            torchmetrics.MetricCollection(
                [MulticlassAccuracy(3), MulticlassF1Score(3)],
                compute_groups=[["MulticlassAccuracy", "MulticlassF1Score"]],
            )
        ),
        "classes",
    ),
    "collection by itself": (
        lambda: Metric(torchmetrics.MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])),
        "classes",
    ),
    "wrapper": (lambda: Metric(ClasswiseWrapper(MulticlassAccuracy(3, average=None))), "classes"),
    "own": (lambda: Metric(Sum(), name="sum"), "values"),
}


@pytest.mark.parametrize(
    "parts", [[[0, 1], [2, 3]], [[0, 1, 2, 3], []], [[], [0], [1, 2, 3]]], ids=["two", "none", "three"]
)
@pytest.mark.parametrize("which", METRICS)
def test_what_processes_join_is_what_one_computes_that_has_seen_all(which: str, parts: list[list[int]]) -> None:
    make, kind = METRICS[which]
    _compare(make(), kind, parts)


def test_a_value_that_was_computed_meanwhile_is_not_taken_for_that_of_all() -> None:
    steps, metric = _steps("classes"), Metric(MulticlassAccuracy(3))
    first, second = _run(metric, steps[:2]), _run(metric, steps[2:])
    first.compute()  # as a progress bar does, in the first process alone
    joined = first.joined([first.told(), second.told()])
    torch.testing.assert_close(joined, _run(metric, steps).compute())


def test_losses_that_one_process_alone_has_are_joined() -> None:
    metric = Loss()
    one, other = metric.start(), metric.start()
    one.update(StepState({"loss": torch.tensor(1.0)}), 2)
    other.update(StepState({"loss": torch.tensor(4.0), "losses": {LossName("r1"): torch.tensor(3.0)}}), 1)
    joined = one.joined([one.told(), other.told()])
    assert {name: float(value) for name, value in joined.items()} == {"loss": 2.0, "r1": 3.0}
    assert list(joined) == ["loss", "r1"]


def test_steps_that_weigh_nothing_do_not_count_even_where_they_are_nan() -> None:
    one, other = Loss().start(), Loss().start()
    one.update(StepState({"loss": torch.tensor(1.0)}), 2)
    other.update(StepState({"loss": torch.tensor(float("nan"))}), 0)
    assert float(one.joined([one.told(), other.told()])["loss"]) == 1.0
    assert other.joined([other.told()]) == {}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.98])
def test_smoothed_losses_are_those_of_the_joined_batches(decay: float) -> None:
    rows, losses = torch.randint(1, 9, (2, 90)), torch.randn(2, 90, dtype=torch.float64)
    metric = SmoothLoss(decay)
    trackers = [metric.start() for _ in range(2)]
    whole = metric.start()
    for step in range(90):
        count, loss = rows[:, step], losses[:, step]
        parts = [0] if step == 89 else [0, 1]  # one has nothing in the last step
        for part in parts:
            if step == 0:
                trackers[part].keep_apart()
            trackers[part].update(StepState({"loss": loss[part]}), int(count[part]))
        whole.update(StepState({"loss": (loss * count)[parts].sum() / count[parts].sum()}), int(count[parts].sum()))
        if step == 40:
            state = trackers[1].state_dict()
            trackers[1] = metric.start()
            trackers[1].keep_apart()
            trackers[1].load_state_dict(state)
    joined = trackers[0].joined([tracker.told() for tracker in trackers])
    torch.testing.assert_close(joined, whole.compute(), rtol=0, atol=1e-12)


class Bare:
    """Counts rows, and does not say how to join counts."""

    def __init__(self) -> None:
        self.rows = 0

    def update(self, preds: Tensor, ys: Tensor) -> None:
        self.rows += len(preds)

    def compute(self) -> int:
        return self.rows

    def reset(self) -> None:
        self.rows = 0


class BareModule(Bare, nn.Module):
    """The same, which has a metric of torchmetrics as a part: that is not all of it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.rows, self.part = 0, MulticlassAccuracy(3)


@pytest.mark.parametrize("cls", [Bare, BareModule])
def test_an_object_that_does_not_say_how_counts_the_first_processs_rows_and_that_is_said_once(cls: type) -> None:
    metric = Metric(cls(), name=f"rows of {cls.__name__}")
    steps = _steps("classes")
    trackers = [_run(metric, steps[:1]), _run(metric, steps[1:])]
    told = [tracker.told() for tracker in trackers]
    with pytest.warns(
        UserWarning, match=r"(?s)counts the rows of the first process alone: its class, Bare.*merge_state"
    ) as told_of:
        found = [tracker.joined(told) for tracker in trackers]
    assert len(told_of) == 1
    assert found == [{metric.name: 5}] * 2


def test_a_metric_that_is_kept_apart_asks_no_other_process() -> None:
    asked: list[bool] = []
    fn = MinMaxMetric(MulticlassAccuracy(3))
    for part in (fn, fn._base_metric):
        part.distributed_available_fn = lambda: asked.append(True)
    tracker = Metric(fn).start()
    tracker.keep_apart()
    tracker.update(StepState(_steps("classes")[0]), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.compute()
    assert asked == []
