"""torchmetrics as it is: what goes beyond a single metric."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall
from torchmetrics.wrappers import ClasswiseWrapper

from fluxloop import Learner, Metric, MetricError, Metrics, Recorder, TensorBatches, TrainingPhase, ValidationPhase
from fluxloop.testing import assert_same_bits


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3


def learner_of(*metrics: Any) -> Learner:
    torch.manual_seed(1)
    batches = TensorBatches(*rows(), batch_size=8)
    return Learner(
        nn.Linear(3, 3),
        cross_entropy,
        data=(batches, batches),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        callbacks=[Recorder(), Metrics(*metrics)],
        default_callbacks=False,
        seed=4,
    )


def logits(learner: Learner) -> Tensor:
    with torch.no_grad():
        return learner.model(rows()[0])  # type: ignore[no-any-return]  # the model's


def collection(**options: Any) -> torchmetrics.MetricCollection:
    return torchmetrics.MetricCollection([MulticlassPrecision(3), MulticlassRecall(3), MulticlassF1Score(3)], **options)


def test_a_collection_with_a_prefix_records_its_names_in_lower_case_every_epoch() -> None:
    learner = learner_of(collection(prefix="held_", postfix="_macro"))
    for epoch in range(1, 4):
        learner.fit(1)
        expected = collection(prefix="held_", postfix="_macro")(logits(learner), rows()[1])
        for name, value in expected.items():
            series = learner.history[f"validation/{name.lower()}"]
            assert len(series) == epoch
            assert series[-1] == pytest.approx(value.item())
    names = ["held_multiclassf1score_macro", "held_multiclassprecision_macro", "held_multiclassrecall_macro"]
    assert sorted(learner.history.metrics[ValidationPhase]) == sorted(["loss", *names])


def test_two_collections_of_different_prefixes_stand_side_by_side_and_of_one_prefix_are_refused() -> None:
    learner = learner_of(Metric(collection(prefix="a_"), name="a"), Metric(collection(prefix="b_"), name="b"))
    learner.fit(1)
    metrics = learner.history.metrics[ValidationPhase]
    assert len(metrics) == 7
    assert metrics["a_multiclassrecall"] == metrics["b_multiclassrecall"]
    with pytest.raises(MetricError, match="two metrics are called 'a_"):
        learner_of(Metric(collection(prefix="a_"), name="a"), Metric(collection(prefix="a_"), name="b")).fit(1)


def test_a_collection_can_be_of_one_phase_alone() -> None:
    learner = learner_of(Metric(collection(), name="all", phase=ValidationPhase))
    learner.fit(1)
    assert list(learner.history.metrics[TrainingPhase]) == ["loss"]
    assert len(learner.history.metrics[ValidationPhase]) == 4


def test_compute_groups_share_states_without_a_difference() -> None:
    grouped, apart = learner_of(collection()), learner_of(collection(compute_groups=False))
    for learner in (grouped, apart):
        learner.fit(2)
    assert grouped.history.metrics[ValidationPhase] == apart.history.metrics[ValidationPhase]


def test_the_values_of_single_classes_are_metrics_of_their_own() -> None:
    wrapped = ClasswiseWrapper(MulticlassAccuracy(3, average=None), labels=["red", "green", "blue"])
    learner = learner_of(Metric(wrapped, name="classes"))
    learner.fit(1)
    expected = MulticlassAccuracy(3, average=None)(logits(learner), rows()[1])
    for name, value in zip(("red", "green", "blue"), expected, strict=True):
        assert learner.history[f"validation/multiclassaccuracy_{name}"] == [pytest.approx(value.item())]


def test_the_users_collection_stays_empty_and_phases_do_not_mix() -> None:
    given = collection()
    learner = learner_of(given)
    learner.fit(1)
    assert all(metric.update_count == 0 for metric in given.values())
    assert learner.evaluate() == {
        name: pytest.approx(values[-1]) for name, values in learner.history.metrics[ValidationPhase].items()
    }
    assert learner.history["training/multiclassrecall"] != learner.history["validation/multiclassrecall"]


def test_collections_change_no_weight() -> None:
    plain, watched = learner_of(), learner_of(collection())
    plain.fit(2)
    watched.fit(2)
    assert_same_bits(plain, watched)


def test_a_collection_can_be_asked_of_one_evaluation() -> None:
    learner = learner_of()
    learner.fit(1)
    found = learner.evaluate(metrics=[collection()])
    assert found["multiclassf1score"] == pytest.approx(
        collection()(logits(learner), rows()[1])["MulticlassF1Score"].item()
    )
