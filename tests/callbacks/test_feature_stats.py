from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CustomCallback,
    DuplicateCallbackError,
    FeatureStats,
    GANPhase,
    KNNProbe,
    Learner,
    MetricError,
    Metrics,
    MissingEntryError,
    Phase,
    Recorder,
    SimCLRPhase,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    TwoViews,
    runstep,
)
from fluxloop.losses import uniformity
from fluxloop.testing import assert_observer, assert_order, assert_same_bits, toy_learner

ROWS, BATCH = 24, 8


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0)), torch.arange(ROWS) % 3


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 4))
    return {"encoder": encoder, "projector": nn.Linear(4, 3)}


def learner_of(*callbacks: Callback, model: Any = None, **options: Any) -> Learner:
    return Learner(
        models() if model is None else model,
        callbacks=[Recorder(), Metrics(), *callbacks],
        seed=0,
        **{
            "data": (TensorBatches(*rows(), batch_size=BATCH, shuffle=True), rows()),
            "optimizer": partial(torch.optim.Adam, lr=0.01),
            "default_callbacks": False,
            **options,
        },
    )


def simclr() -> SimCLRPhase:
    return SimCLRPhase(TwoViews(lambda xs: xs + 0.1 * torch.randn_like(xs)))


def train(learner: Learner, epochs: int = 1) -> Learner:
    learner.fit(epochs, phases=[simclr()])
    return learner


def keeper(kept: list[Tensor], entry: str = "features") -> CustomCallback:
    return CustomCallback(
        lambda learner: kept.append(learner.step[entry].detach().clone()),
        StepEnd,
        AbstractTrainingPhase,
        reads=(f"step.{entry}",),
    )


def rank_in_numpy(features: np.ndarray) -> float:
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return math.exp(-(shares * np.log(shares)).sum())


# Values


@pytest.mark.parametrize("entry", ["features", "z1", "z2"])
def test_the_values_are_those_of_numpy_over_the_rows_of_the_epoch(entry: str) -> None:
    kept: list[Tensor] = []
    stats = FeatureStats(entry)
    learner = learner_of(stats, keeper(kept, entry))
    for _ in range(2):
        kept.clear()
        train(learner)
        features = torch.cat(kept).numpy()
        assert features.shape[0] == ROWS
        assert learner.history[f"training/{entry}_std"][-1] == pytest.approx(features.std(0).mean(), rel=1e-5)
        assert learner.history[f"training/{entry}_rank"][-1] == pytest.approx(rank_in_numpy(features), rel=1e-4)
        np.testing.assert_allclose(stats.std, features.std(0), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 5, 8, 11, 24, 100])
def test_only_the_last_rows_asked_for_are_looked_at(count: int) -> None:
    kept: list[Tensor] = []
    learner = train(learner_of(FeatureStats(rows=count), keeper(kept)))
    features = torch.cat(kept)[-count:].numpy()
    assert learner.history["training/features_std"] == [pytest.approx(features.std(0).mean(), rel=1e-5, abs=1e-7)]
    assert learner.history["training/features_rank"] == [pytest.approx(rank_in_numpy(features), rel=1e-4)]


def test_an_epoch_does_not_see_the_rows_of_the_one_before() -> None:
    class Alternating(TrainingPhase):
        """Gives constant features in its second epoch."""

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                state.features = learner.model.encoder(state.xs)
                if learner.history[Alternating].epochs == 1:
                    state.features = torch.ones(len(state.xs), 4)

    learner = learner_of(FeatureStats(rows=10_000))
    learner.fit(2, phases=[Alternating()])
    first, second = learner.history["training/features_std"]
    assert first > 0.01
    assert second == 0.0


def test_features_with_several_dimensions_are_rows_of_numbers() -> None:
    class Maps(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                state.maps = state.xs[:, None, :4].reshape(-1, 1, 2, 2)

    stats = FeatureStats("maps")
    learner = learner_of(stats)
    learner.fit(1, phases=[Maps()])
    assert stats.std is not None
    np.testing.assert_allclose(stats.std, rows()[0][:, :4].numpy().std(0), rtol=1e-5)


def test_more_functions_of_the_rows_are_recorded_by_their_names() -> None:
    kept: list[Tensor] = []
    learner = learner_of(
        FeatureStats("z1", measures={"uniformity": uniformity, "Largest": torch.amax}), keeper(kept, "z1")
    )
    train(learner)
    expected = uniformity(torch.cat(kept).double()).item()
    assert learner.history["training/z1_uniformity"] == [pytest.approx(expected, rel=1e-6)]
    assert learner.history["training/z1_largest"] == [pytest.approx(torch.cat(kept).max().item())]


# Collapse


class Constant(nn.Module):
    """Gives the same features for every row, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]))

    def forward(self, xs: Tensor) -> Tensor:
        return self.value.expand(len(xs), 4)


class Linear(nn.Module):
    """Gives features on a line."""

    def __init__(self) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0, 0.5]]))

    def forward(self, xs: Tensor) -> Tensor:
        return xs.sum(1, keepdim=True) * self.direction


class Encode(TrainingPhase):
    """Stores features and trains nothing."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            state.features = learner.model(state.xs)


def test_a_complete_collapse_shows_as_no_deviation_and_rank_1() -> None:
    learner = learner_of(FeatureStats(), model=Constant())
    learner.fit(1, phases=[Encode()])
    assert learner.history["training/features_std"] == [pytest.approx(0.0, abs=1e-6)]
    assert learner.history["training/features_rank"] == [pytest.approx(1.0, abs=1e-3)]


def test_a_collapse_onto_a_line_shows_as_rank_1_with_deviation() -> None:
    learner = learner_of(FeatureStats(), model=Linear())
    learner.fit(1, phases=[Encode()])
    assert learner.history["training/features_std"][0] > 1.0
    assert learner.history["training/features_rank"] == [pytest.approx(1.0, abs=1e-3)]


def test_varied_features_show_as_a_high_rank() -> None:
    learner = learner_of(FeatureStats("xs"), model=Linear())
    learner.fit(1, phases=[Encode()])
    assert 4.0 < learner.history["training/xs_rank"][0] <= 5.0


def test_features_that_are_not_finite_are_recorded_as_such_and_end_nothing() -> None:
    class Broken(Encode):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                state.features = state.xs * float("nan")

    learner = learner_of(FeatureStats())
    learner.fit(1, phases=[Broken()])
    assert math.isnan(learner.history["training/features_rank"][0])


# Order, watching, mistakes


def test_it_is_recorded_with_the_metrics_of_the_phase_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    learner = train(learner_of(FeatureStats(), FeatureStats("z1"), default_callbacks=True))
    assert_order(learner, Metrics, FeatureStats)
    assert sorted(learner.history.metrics[SimCLRPhase]) == [
        "features_rank",
        "features_std",
        "loss",
        "z1_rank",
        "z1_std",
    ]
    line = capsys.readouterr().out
    assert "features_std 0." in line
    assert "z1_rank" in line


def test_training_is_the_same_to_the_bit_with_and_without_it() -> None:
    plain = train(learner_of(), 2)
    watched = train(learner_of(FeatureStats(rows=5), FeatureStats("z2"), KNNProbe("encoder")), 2)
    assert_same_bits(plain, watched)

    def supervised() -> Learner:
        learner = learner_of(model=models()["encoder"])
        learner.loss_fn = cross_entropy
        return learner

    assert_observer(FeatureStats("preds"), supervised)


def test_it_measures_after_every_so_many_epochs() -> None:
    learner = train(learner_of(FeatureStats(every=2)), 5)
    found = [(row["epoch"], row["phase"]) for row in learner.history.rows() if row["metric"] == "features_std"]
    assert found == [(2, "SimCLRPhase"), (4, "SimCLRPhase")]


def test_it_keeps_no_graph_and_no_more_rows_than_asked_for() -> None:
    stats = FeatureStats(rows=10)
    train(learner_of(stats))
    assert sum(len(part) for part in stats._kept) <= 10 + BATCH - 1
    assert not any(part.requires_grad for part in stats._kept)


def test_checkpoints_name_its_rows_as_they_always_did() -> None:
    learner = train(learner_of(FeatureStats()))
    assert set(learner.state_dict()["callbacks"]["FeatureStats"]["state"]) == {"_kept", "_count", "std"}


@pytest.mark.parametrize("phase", [TrainingPhase, GANPhase])
def test_a_phase_without_the_entry_is_told_what_the_step_has(phase: type[Phase]) -> None:
    if phase is GANPhase:
        learner = learner_of(FeatureStats(), model={"G": nn.Linear(64, 5), "D": nn.Linear(5, 1)})
    else:
        learner = learner_of(FeatureStats(), model=models()["encoder"])
        learner.loss_fn = cross_entropy
    with pytest.raises(MissingEntryError, match=r"no entry 'features'; it has: .*grads"):
        learner.fit(1, phases=[phase()])


def test_two_of_one_entry_are_refused_with_something_that_can_be_typed() -> None:
    with pytest.raises(DuplicateCallbackError, match="FeatureStats"):
        learner_of(FeatureStats(), FeatureStats())
    with pytest.raises(MetricError, match="both record the metric 'features_std'") as caught:
        learner_of(FeatureStats(rows=10), FeatureStats(rows=100))
    assert "metric=" not in str(caught.value)  # it takes no such argument


@pytest.mark.parametrize("count", [0, -1])
def test_no_rows_at_all_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        FeatureStats(rows=count)


def test_in_a_second_learner_it_begins_anew() -> None:
    stats = FeatureStats()
    first, second = train(learner_of(stats)), train(learner_of(stats))
    assert first.history["training/features_std"] == second.history["training/features_std"]


def test_an_entry_of_several_tensors_is_joined_by_rows() -> None:
    class Views(AbstractTrainingPhase):
        def step(self, learner: Any, batch: Any) -> None:
            with runstep(learner, self, crops=[torch.zeros(3, 2), torch.ones(3, 2)]):
                pass

    stats = FeatureStats("crops")
    toy_learner(stats, Recorder(), num_batches=1).fit(1, phases=[Views()])
    assert stats.std is not None
    assert stats.std.tolist() == [0.5, 0.5]
