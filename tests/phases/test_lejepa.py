from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fluxloop import BatchError, LeJEPAPhase, ObjectiveValidationPhase, PhaseError
from fluxloop.losses import draw_directions, lejepa_loss
from self_supervised import SEED, assert_same_training, crops, draw_crops, embed, learner_of, parts
from toys import image_batches


def by_hand(models: Any, xs: Tensor, step: int) -> Tensor:
    z = [embed(models, view) for view in draw_crops(xs)]
    return lejepa_loss(z, draw_directions(6, 16, z[0]), 2, 0.3)


def test_five_steps_equal_those_of_a_hand_written_loop() -> None:
    learner = assert_same_training(LeJEPAPhase(crops, weight=0.3, num_directions=16), parts, by_hand)
    assert [tuple(z.shape) for z in learner.step.z] == [(4, 6)] * 4
    assert learner.step.features.shape == (4, 16)


def test_directions_are_others_in_each_step_and_the_same_in_a_run_with_the_same_seed() -> None:
    class Noting(LeJEPAPhase):
        def draw_directions(self, learner: Any, embeddings: Tensor) -> Tensor:
            drawn.append(super().draw_directions(learner, embeddings))
            return drawn[-1]

    runs = []
    for seed in (SEED, SEED, SEED + 1):
        drawn: list[Tensor] = []
        learner_of(parts(), [], data=(image_batches()[:2],), seed=seed).fit(1, phases=[Noting(crops, num_directions=5)])
        runs.append(drawn)
    assert [tuple(each.shape) for each in runs[0]] == [(6, 5)] * 2
    assert not torch.equal(runs[0][0], runs[0][1])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_a_validation_with_directions_of_its_own_changes_no_weight() -> None:
    weights = []
    for watched in (False, True):
        phase = LeJEPAPhase(crops, num_directions=8)
        phases = [phase, ObjectiveValidationPhase(phase)] if watched else [phase]
        learner = learner_of(parts(), None, data=(image_batches(), image_batches()[:2]))
        learner.fit(2, phases=phases)
        weights.append(list(learner.model.encoder.parameters()))
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("options", [{"num_global": 0}, {"weight": 1.1}, {"num_directions": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PhaseError, match=r"LeJEPAPhase\(.* was given; expected"):
        LeJEPAPhase(**options)


def test_fewer_views_than_global_ones_are_refused() -> None:
    with pytest.raises(BatchError, match="expected 3 global ones and any number of local ones"):
        learner_of(parts(), []).fit(1, phases=[LeJEPAPhase(lambda xs: (xs, xs), num_global=3)])
