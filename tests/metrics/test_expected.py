from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fluxloop import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Metric,
    ObjectivePhase,
    ObjectiveValidationPhase,
    Phase,
    SmoothLoss,
    TrainingPhase,
    ValidationPhase,
    accuracy,
    binary_accuracy,
    mae,
    mse,
    rmse,
    top_k,
)
from fluxloop.metrics.base import Loss
from fluxloop.metrics.expected import direction_of, expected_of, loss_origin
from fluxloop.monitor import Expected


class Calls(ValidationPhase):
    def step(self, learner: Any, batch: Any) -> Any:
        return super().step(learner, batch)


class Replaces(ValidationPhase):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.xs)


class Own(AbstractValidationPhase):
    pass


class Says(Own):
    stores_loss = True


@pytest.mark.parametrize(
    ("phase", "origin"),
    [
        (TrainingPhase(), "built in"),
        (ValidationPhase(name="b"), "built in"),
        (ObjectiveValidationPhase(ObjectivePhase()), "built in"),
        (Calls(), "inherited"),
        (Replaces(), ""),
        (Own(), ""),
        (Says(), "built in"),
    ],
)
def test_whether_a_phase_stores_a_loss_follows_from_its_step(phase: Phase, origin: str) -> None:
    assert loss_origin(phase) == origin


def test_a_loss_is_expected_for_sure_or_perhaps_under_the_names_of_blocks() -> None:
    class Blocks(AbstractTrainingPhase):
        pass

    assert expected_of(Loss(), ValidationPhase()) == [Expected("loss", "min"), Expected("loss_*", "min", False)]
    assert expected_of(Loss(), Blocks())[-1] == Expected("*", None, False)
    assert expected_of(SmoothLoss(), ValidationPhase())[0] == Expected("smoothloss", "min")
    assert expected_of(Loss(TrainingPhase), ValidationPhase()) == []


def test_a_metric_is_expected_where_its_phase_is_and_an_optional_one_now_and_then() -> None:
    metric = Metric(lambda preds: preds.mean(), name="Mine", phase=ValidationPhase, optional=True)
    assert expected_of(metric, TrainingPhase()) == []
    assert expected_of(metric, Calls()) == [Expected("mine", None, False, True)]


def test_a_collection_is_expected_under_its_keys_and_an_object_that_may_give_several_under_any() -> None:
    class Several:
        def update(self, preds: Tensor, ys: Tensor) -> None: ...

        def compute(self) -> dict[str, Tensor]:
            return {}

        def reset(self) -> None: ...

    collection = MetricCollection({"Acc": MulticlassAccuracy(2), "error": MeanSquaredError()})
    expected = {each.name: each.mode for each in expected_of(Metric(collection, name="all"), None)}
    assert expected == {"acc": "max", "error": "min"}
    assert [each.name for each in expected_of(Metric(Several(), name="several"), None)] == ["several", "*"]
    assert [each.name for each in expected_of(Metric(MulticlassAccuracy(2)), None)] == ["multiclassaccuracy"]


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        (accuracy, "max"),
        (partial(binary_accuracy, logits=True), "max"),
        (top_k(2), "max"),
        (mae, "min"),
        (mse, "min"),
        (rmse, "min"),
        (nn.MSELoss(), "min"),
        (nn.functional.l1_loss, "min"),
        (MulticlassAccuracy(2), "max"),
        (torch.mean, None),
        (lambda preds, ys: preds.mean(), None),
    ],
)
def test_a_function_or_object_says_which_way_it_is_better(metric: Any, mode: str | None) -> None:
    assert direction_of(metric) == mode
