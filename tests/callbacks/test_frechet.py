from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    EMA,
    Checkpointer,
    DataError,
    FlowMatchingPhase,
    FrechetDistance,
    GANPhase,
    KeepBestModel,
    Learner,
    Metrics,
    MissingProducerError,
    ModelError,
    Recorder,
    TensorBatches,
)
from fluxloop.metrics import frechet_distance, kernel_distance
from fluxloop.testing import assert_resumes_exactly, assert_same_bits

SEED, NOISE, SIZE = 3, 3, 4
INPUTS = torch.randn(20, NOISE, generator=torch.Generator().manual_seed(5))
REAL = torch.randn(30, SIZE, generator=torch.Generator().manual_seed(0))


class Extractor(nn.Module):
    """Features that notice a mode: dropout, which is off where it is only looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(SIZE, 2), nn.Dropout(0.5)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.zeros_(self.layer.bias)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.layer(rows))
        return out


def learner_of(*callbacks: Any, norm: bool = True, **options: Any) -> Learner:
    torch.manual_seed(1)
    models = {
        "G": nn.Sequential(
            nn.Linear(NOISE, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Linear(8, SIZE)
        ),
        "D": nn.Linear(SIZE, 1),
    }
    data = {
        "training": TensorBatches(REAL, batch_size=6, shuffle=True),
        "validation": TensorBatches(REAL, batch_size=7),
    }
    given = {"data": data, "optimizer": partial(torch.optim.Adam, lr=0.05), "seed": SEED, **options}
    own = [Recorder(), Metrics(), EMA("G", 0.5), *callbacks]
    return Learner(models, callbacks=own, default_callbacks=False, **given)


def gan() -> GANPhase:
    return GANPhase(noise=NOISE)


@pytest.mark.parametrize("weights", ["G", "G@ema"])
def test_it_records_the_distance_of_the_named_weights_samples_from_the_validation_rows(weights: str) -> None:
    extractor = Extractor()
    learner = learner_of(FrechetDistance(weights, extractor, inputs=INPUTS, batch_size=8))
    learner.fit(2, phases=[gan()])
    name = f"validation/frechet_{weights.lower()}"
    assert len(learner.history[name]) == 2
    assert learner.model.G.training
    with torch.no_grad():
        fake = learner.weights[weights].eval()(INPUTS)
        expected = frechet_distance(extractor.eval()(fake), extractor(REAL))
    assert learner.history[name][-1] == pytest.approx(expected.item(), rel=1e-5)


def test_watching_changes_no_weight_mode_order_or_random_number() -> None:
    extractor = Extractor()
    shuffled = DataLoader(TensorDataset(REAL), batch_size=7, shuffle=True)
    plain, watched = learner_of(), learner_of(FrechetDistance("G", extractor, inputs=INPUTS, real=shuffled))
    for each in (plain, watched):
        each.fit(2, phases=[gan()])
    assert_same_bits(plain, watched)
    assert extractor.training
    assert extractor.layer.weight.requires_grad


def test_a_killed_run_records_the_same_numbers() -> None:
    shuffled = partial(DataLoader, TensorDataset(REAL), batch_size=7, shuffle=True)

    def make() -> Learner:
        return learner_of(FrechetDistance("G@ema", Extractor(), inputs=INPUTS, real=shuffled()))

    assert_resumes_exactly(make, epochs=3, phases=lambda: [gan()], at=[3, 7])


def test_checkpoints_hold_neither_the_extractor_nor_features(tmp_path: Path) -> None:
    sizes = []
    for number, width in enumerate((2, 300)):
        distance = FrechetDistance("G", nn.Linear(SIZE, width), inputs=INPUTS)
        learner = learner_of(distance, Checkpointer(tmp_path / str(number)))
        learner.fit(1, phases=[gan()])
        sizes.append(sum(file.stat().st_size for file in (tmp_path / str(number)).iterdir()))
    assert sizes[1] - sizes[0] < 2000


def test_the_same_rows_are_sampled_and_compared_each_time() -> None:
    seen: list[Tensor] = []

    def extractor(rows: Tensor) -> Tensor:
        seen.append(rows.clone())
        return rows

    frozen = partial(torch.optim.SGD, lr=0.0)
    sampled = partial(
        FrechetDistance, extractor=extractor, inputs=INPUTS, make=lambda m, z: m(z) + torch.rand(len(z), 1)
    )
    learner = learner_of(sampled("G@ema"), optimizer=frozen, norm=False)
    learner.fit(3, phases=[gan()])
    of_real, fakes = seen[:-3], seen[-3:]
    assert torch.equal(torch.cat(of_real), REAL)  # once
    assert torch.equal(fakes[0], fakes[1])
    assert torch.equal(fakes[0], fakes[2])


def test_another_distance_has_another_name_and_is_monitored() -> None:
    kid = FrechetDistance("G", lambda rows: rows, inputs=INPUTS, compare=kernel_distance, metric="KID", every=2)
    best = KeepBestModel("validation/frechet_g")
    learner = learner_of(kid, FrechetDistance("G", lambda rows: rows, inputs=INPUTS), best)
    learner.fit(4, phases=[gan()])
    assert len(learner.history["validation/kid"]) == 2
    assert best.best == min(learner.history["validation/frechet_g"])


def test_a_phases_sampler_makes_the_rows() -> None:
    class Flow(nn.Linear):
        def forward(self, xs: Tensor, times: Tensor) -> Tensor:
            return super().forward(xs) * times[:, None]

    phase, noise = FlowMatchingPhase(), torch.randn(20, SIZE)
    distance = FrechetDistance("model", lambda rows: rows, inputs=noise, real=REAL, make=partial(phase.sample, steps=3))
    learner = Learner(Flow(SIZE, SIZE), data=(REAL,), callbacks=[distance], seed=0)
    learner.fit(1, phases=[phase])
    expected = frechet_distance(phase.sample(learner.model, noise, steps=3), REAL).item()
    assert learner.history["validation/frechet_model"] == [pytest.approx(expected, rel=1e-5)]


# What cannot be


@pytest.mark.parametrize("inputs", [None, 3, torch.tensor(1.0), (torch.zeros(3), torch.zeros(4)), torch.zeros(0, 3)])
def test_inputs_without_rows_are_an_error(inputs: Any) -> None:
    with pytest.raises(DataError, match="expected the generator's input, or a tuple of several with as many rows"):
        FrechetDistance("G", Extractor(), inputs=inputs)


def test_an_extractor_has_to_be_called() -> None:
    for given in ((), ("inception",)):
        with pytest.raises(TypeError, match="expected what gives features of rows"):
            FrechetDistance("G", *given, inputs=INPUTS)


def test_missing_weights_and_rows_are_errors_before_the_first_step() -> None:
    with pytest.raises(ModelError, match="'H'"):
        learner_of(FrechetDistance("H", Extractor(), inputs=INPUTS))
    with pytest.raises(MissingProducerError, match=r"'model\.G@swa', which no callback writes"):
        learner_of(FrechetDistance("G@swa", Extractor(), inputs=INPUTS))
    learner = learner_of(FrechetDistance("G", Extractor(), inputs=INPUTS), data=(REAL,))
    with pytest.raises(DataError, match="compares samples with the validation data, and the learner has none"):
        learner.fit(1, phases=[gan()])
    assert learner.history[GANPhase].steps == 0


def test_features_that_are_no_tensor_are_an_error() -> None:
    learner = learner_of(FrechetDistance("G", lambda rows: [rows], inputs=INPUTS))
    with pytest.raises(DataError, match=r"got a list of length 1 from its extractor; expected features \(N, F\)"):
        learner.fit(1, phases=[gan()])
