from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Callback,
    CustomCallback,
    DataError,
    EpochEnd,
    KNNProbe,
    Learner,
    LinearProbe,
    Metrics,
    Recorder,
    SimCLRPhase,
    TensorBatches,
    TwoViews,
    on,
)
from fluxloop.callbacks import features
from fluxloop.testing import assert_same_bits

ROWS = 24


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ys = torch.arange(ROWS) % 3
    return torch.randn(ROWS, 5, generator=generator) + ys[:, None], ys


class Encoder(nn.Sequential):
    """Counts the rows that it is run on in eval mode."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.encoded: list[int] = []

    def forward(self, xs: Tensor) -> Tensor:
        if not self.training:
            self.encoded.append(len(xs))
        return super().forward(xs)


def learner_of(*callbacks: Callback, data: Any = None) -> Learner:
    torch.manual_seed(1)
    models = {"encoder": Encoder(), "projector": nn.Linear(4, 4)}
    return Learner(
        models,
        data=(TensorBatches(*rows(), batch_size=8, shuffle=True), rows(1)) if data is None else data,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        callbacks=[Recorder(), Metrics(), *callbacks],
        default_callbacks=False,
        seed=6,
    )


def train(learner: Learner, epochs: int = 1) -> Learner:
    encoder = learner.model.encoder
    encoder.encoded.clear()
    learner.fit(epochs, phases=[SimCLRPhase(TwoViews(lambda xs: xs + 0.1 * torch.randn_like(xs)))])
    return learner


def test_rows_are_run_once_an_epoch_however_many_ask() -> None:
    ask = [
        KNNProbe("encoder", k=3),
        KNNProbe("encoder", k=5, metric="five"),
        LinearProbe("encoder", 3),
        LinearProbe("encoder", 3, metric="second", optimizer=torch.optim.SGD),
    ]
    learner = train(learner_of(*ask), 2)
    assert learner.model.encoder.encoded == [8, 8, 8, ROWS] * 2  # the bank and the held-out rows, in each epoch
    alone = [train(learner_of(each), 2) for each in (KNNProbe("encoder", k=3), LinearProbe("encoder", 3))]
    for each, name in zip(alone, ("knn_encoder", "linear_encoder"), strict=True):
        assert learner.history[f"validation/{name}"] == each.history[f"validation/{name}"]
        assert_same_bits(learner, each)


def test_rows_that_are_given_are_shared_where_they_are_the_same_tensors() -> None:
    xs, ys = rows(1)
    learner = train(
        learner_of(
            KNNProbe("encoder", bank=(xs, ys), queries=(xs, ys), k=1),
            KNNProbe("encoder", bank=(xs, ys), queries=(xs.clone(), ys), k=3, metric="copied"),
        )
    )
    assert learner.model.encoder.encoded == [ROWS, ROWS]
    assert learner.history["validation/knn_encoder"] == [1.0]


def test_weights_views_and_other_features_are_other_entries() -> None:
    learner = train(
        learner_of(
            EMA("encoder", 0.5),
            KNNProbe("encoder@ema", k=3),
            KNNProbe("encoder", k=3),
            KNNProbe("encoder", k=3, features=lambda module, xs: module[0](xs), metric="first"),
        )
    )
    assert learner.model.encoder.encoded == [8, 8, 8, ROWS]
    assert learner.weights["encoder@ema"].encoded[-4:] == [8, 8, 8, ROWS]
    assert len(learner.history["validation/first"]) == 1


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Rows that draw numbers when they are loaded."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        xs, ys = rows(1)
        return xs[index] + torch.randn(()), ys[index]


@pytest.mark.parametrize("loaded", [False, True])
def test_rows_that_draw_are_the_same_for_who_asks_first_and_who_asks_last(loaded: bool) -> None:
    data: Any = DataLoader(Noisy(), batch_size=8, shuffle=True) if loaded else Noisy()

    def ask() -> list[Callback]:
        given = {"bank": data, "queries": data}
        return [KNNProbe("encoder", k=3, **given), KNNProbe("encoder", k=3, metric="again", **given)]

    both = train(learner_of(*ask()), 2)
    alone = train(learner_of(ask()[1]), 2)
    assert both.history["validation/again"] == both.history["validation/knn_encoder"]
    assert both.history["validation/again"] == alone.history["validation/again"]


def test_features_are_not_those_of_weights_that_have_been_changed_meanwhile() -> None:
    found: list[Tensor] = []

    class Ask(Callback):
        reads = ("model.encoder", "data", "seed")
        draws = False

        @on(EpochEnd, AbstractTrainingPhase)
        def ask(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
            source = learner.data["validation"]
            for change in (False, True, False):
                if change:
                    with torch.no_grad():
                        encoder.weight.add_(1.0)
                found.append(features.encode(learner, "encoder", source, source)[0])

    learner = learner_of(Ask())
    encoder = learner.model.encoder[0]
    train(learner)
    assert found[0] is not found[1]
    assert not torch.equal(found[0], found[1])
    assert found[1] is found[2]


def test_features_that_somebody_has_changed_are_made_anew() -> None:
    def spoiling_head(width: int) -> nn.Module:
        return nn.Sequential(nn.Threshold(1e9, 0.0, inplace=True), nn.Linear(width, 3))

    spoiling = LinearProbe("encoder", 3, head=spoiling_head, metric="a")
    learner = train(learner_of(spoiling, KNNProbe("encoder", k=3), LinearProbe("encoder", 3)))
    plain = train(learner_of(KNNProbe("encoder", k=3), LinearProbe("encoder", 3)))
    for name in ("knn_encoder", "linear_encoder"):
        assert learner.history[f"validation/{name}"] == plain.history[f"validation/{name}"]


def test_nothing_is_kept_when_an_epoch_has_ended() -> None:
    alive: list[Any] = []

    def look(module: nn.Module, xs: Tensor) -> Tensor:
        out: Tensor = module(xs)
        alive.append(weakref.ref(out))
        return out

    learner = learner_of(KNNProbe("encoder", k=3, features=look))
    train(learner)
    assert features._encodings == []
    gc.collect()
    assert alive
    assert not any(each() is not None for each in alive)


def test_nothing_is_kept_after_an_error() -> None:
    def fail(learner: Any) -> None:
        raise RuntimeError("at the end")

    late = CustomCallback(fail, EpochEnd, AbstractTrainingPhase, reads=("cbstate.metrics",), name="late")
    learner = learner_of(KNNProbe("encoder", k=3), late)
    with pytest.raises(RuntimeError, match="at the end"):
        train(learner)
    assert features._encodings == []


def test_labels_are_looked_at_for_each_who_asks() -> None:
    xs, _ = rows(1)
    targets = torch.randn(ROWS, 1)
    probe = LinearProbe(
        "encoder",
        1,
        loss=lambda outputs, ys: (outputs.flatten() - ys).square().mean(),
        metrics={"mse": nn.functional.mse_loss},
        queries=(xs, targets),
        metric="a",
    )
    learner = learner_of(probe, KNNProbe("encoder", bank=rows(), queries=(xs, targets), k=3))
    with pytest.raises(DataError, match="a probe was given labels"):
        train(learner)


def test_a_row_at_hand_is_one_that_lies_in_memory() -> None:
    xs, ys = rows()
    for source in (TensorBatches(xs, ys, batch_size=5, shuffle=True), [(xs, ys)], features.loader((xs, ys))):
        row = features.row_at_hand(source)
        assert torch.equal(row[0], xs[:1])
        assert torch.equal(row[1], ys[:1])
    in_memory = torch.utils.data.TensorDataset(xs, ys)
    assert torch.equal(features.row_at_hand(DataLoader(in_memory, batch_size=4))[0], xs[:1])
    assert features.row_at_hand(DataLoader(Noisy(), batch_size=4)) is None
    assert features.row_at_hand(iter([(xs, ys)])) is None
