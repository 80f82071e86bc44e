from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fluxloop import MoCoV3Phase, PhaseError
from self_supervised import assert_same_training, embed, learner_of, parts, student_and_teacher, two_views
from toys import augment


def contrast(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Write the function ctr of the paper's algorithm 1."""
    logits = normalize(q, dim=1) @ normalize(k, dim=1).T / temperature
    return 2 * temperature * cross_entropy(logits, torch.arange(len(q)))


def by_hand(models: Any, xs: Tensor, step: int) -> Tensor:
    student, teacher, predictor = models.values()
    x1, x2 = augment(xs), augment(xs)
    q1, q2 = (predictor(z) for z in [embed(student, x1), embed(student, x2)])
    with torch.no_grad():
        k1, k2 = embed(teacher, x1), embed(teacher, x2)
    return contrast(q1, k2, 0.5) + contrast(q2, k1, 0.5)  # a power of two, so that the factor rounds nothing


def test_five_steps_equal_those_of_the_papers_algorithm_in_a_hand_written_loop() -> None:
    phase = MoCoV3Phase(two_views, temperature=0.5)
    learner = assert_same_training(phase, lambda: student_and_teacher("predictor"), by_hand)
    assert [tuple(learner.step[name].shape) for name in ("q1", "q2", "k1", "k2")] == [(4, 6)] * 4
    assert not learner.step.k1.requires_grad


def test_a_frozen_projection_of_patches_stays_at_its_beginning() -> None:
    models = student_and_teacher("predictor")
    models["student"].encoder[0].requires_grad_(False)  # the paper's trick for transformers
    before = models["student"].encoder[0].weight.clone()
    learner_of(models, []).fit(1, phases=[MoCoV3Phase(two_views)])
    assert torch.equal(models["student"].encoder[0].weight, before)
    assert torch.equal(models["teacher"].encoder[0].weight, before)


def test_a_temperature_of_nothing_and_a_missing_predictor_are_refused() -> None:
    with pytest.raises(PhaseError, match=r"MoCoV3Phase\(temperature=0\) was given; expected a finite number above 0"):
        MoCoV3Phase(temperature=0)
    with pytest.raises(PhaseError, match=r"MoCoV3Phase calls learner\.model\.student, and the models are"):
        learner_of(parts(), []).fit(1, phases=[MoCoV3Phase(two_views)])
