from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from fluxloop import Accelerator, ObjectiveValidationPhase, PhaseError, SwAVPhase, Unfreeze
from fluxloop.losses import sinkhorn, swav_loss
from fluxloop.testing import assert_resumes_exactly
from self_supervised import (
    SGD,
    assert_goes_on,
    assert_same_training,
    crops,
    draw_crops,
    embed,
    learner_of,
    parts,
    train_by_hand,
)
from toys import image_batches


def models() -> dict[str, nn.Module]:
    return parts("prototypes")


def assign(scores: Tensor) -> Tensor:
    """Write the authors' sinkhorn function."""
    q = torch.exp(scores / 0.05).T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


class ByHand:
    """Write the authors' loop: prototypes normalised in place, a queue for each global crop that is used once full."""

    def __init__(self, size: int, begin: int) -> None:
        self.queue, self.size, self.begin = torch.zeros(0, 2, 6), size, begin
        self.used: list[bool] = []

    def loss(self, models: Any, xs: Tensor, step: int) -> Tensor:
        views = draw_crops(xs)
        prototypes = models["prototypes"]
        z = [normalize(embed(models, view), dim=1) for view in views]
        with torch.no_grad():
            prototypes.weight.copy_(normalize(prototypes.weight, dim=1))
        scores = [prototypes(each) for each in z]
        self.used.append(step >= self.begin and len(self.queue) == self.size > 0)
        terms = []
        for i in range(2):
            with torch.no_grad():
                every = prototypes(torch.cat([z[i], self.queue[:, i]])) if self.used[-1] else scores[i]
                code = assign(every.detach())[: len(xs)]
            terms += [-(code * log_softmax(scores[v] / 0.1, 1)).sum(1).mean() for v in range(4) if v != i]
        self.entering = torch.stack(z[:2], 1).detach()
        return torch.stack(terms).mean()

    def after(self) -> None:
        self.queue = torch.cat([self.queue, self.entering])[-self.size :] if self.size else self.queue


def nearly_the_same(hand: ByHand, phase: SwAVPhase) -> None:
    """Compare trainings of which the codes differ by rounding: the phase computes them with logarithms."""
    expected = models()
    by_hand = train_by_hand(expected, hand.loss, hand.after, SGD)
    losses: list[Tensor] = []
    learner = learner_of(models(), losses, make=SGD)
    learner.fit(1, phases=[phase])
    torch.testing.assert_close(losses, by_hand, rtol=1e-4, atol=1e-5)
    for name, model in expected.items():
        torch.testing.assert_close(getattr(learner.model, name).state_dict(), model.state_dict(), rtol=1e-3, atol=1e-4)


def test_five_steps_equal_those_of_the_authors_loop_without_a_queue_and_with_one_that_enters_late() -> None:
    for size, begin, used in ((0, 0, [False] * 5), (8, 0, [False] * 2 + [True] * 3), (8, 4, [False] * 4 + [True])):
        hand = ByHand(size, begin)
        nearly_the_same(hand, SwAVPhase(crops, queue_size=size, queue_from=begin))
        assert hand.used == used


def test_five_steps_have_the_bits_of_a_hand_written_loop_with_the_same_codes() -> None:
    def by_hand(models: Any, xs: Tensor, step: int) -> Tensor:
        z = [normalize(embed(models, view), dim=1) for view in draw_crops(xs)]
        with torch.no_grad():
            models["prototypes"].weight.copy_(normalize(models["prototypes"].weight, dim=1))
        scores = [models["prototypes"](each) for each in z]
        return swav_loss(scores, [sinkhorn(models["prototypes"](each.detach())) for each in z[:2]])

    learner = assert_same_training(SwAVPhase(crops), models, by_hand)
    assert [tuple(each.shape) for each in learner.step.scores] == [(4, 6)] * 4
    assert [tuple(each.shape) for each in learner.step.codes] == [(4, 6)] * 2
    assert not learner.step.codes[0].requires_grad


def test_a_validation_leaves_prototypes_and_queue_as_they_are() -> None:
    made, phase = models(), SwAVPhase(crops, queue_size=4)
    before = made["prototypes"].weight.clone()
    learner = learner_of(made, [])
    learner.evaluate(image_batches()[:2], phase=ObjectiveValidationPhase(phase))
    assert torch.equal(made["prototypes"].weight, before)
    assert phase.queue is None
    learner.fit(1, phases=[phase])
    assert phase.queue.shape == (4, 2, 6)


def test_prototypes_may_be_frozen_at_first() -> None:
    made = models()
    seen: list[Tensor] = []

    class Noting(SwAVPhase):
        def finish(self, learner: Any, state: Any) -> None:
            seen.append(normalize(made["prototypes"].weight.detach(), dim=1))

    learner_of(made, [], Unfreeze({"prototypes": 3}, unit="step")).fit(1, phases=[Noting(crops)])
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[2], seen[4])


def test_a_kept_queue_goes_on_to_the_same_bits() -> None:
    phase = assert_goes_on(lambda: SwAVPhase(crops, queue_size=12, queue_from=1), models)
    assert phase.state_dict()["entered"] == 12


@pytest.mark.slow
def test_a_run_with_a_queue_that_is_not_yet_used_is_resumed_to_the_bit() -> None:
    assert_resumes_exactly(
        lambda: learner_of(models(), None, accelerator=Accelerator("cpu", accumulate=2)),
        epochs=2,
        phases=lambda: [SwAVPhase(crops, queue_size=12, queue_from=2)],
    )


@pytest.mark.parametrize("options", [{"queue_size": -1}, {"epsilon": 0}, {"iterations": 0}, {"queue_from": -1}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PhaseError, match=r"SwAVPhase\(.* was given; expected"):
        SwAVPhase(**options)


def test_prototypes_without_a_weight_are_refused() -> None:
    with pytest.raises(PhaseError, match=r"SwAVPhase was given prototypes that are .* expected nn.Linear"):
        learner_of({**models(), "prototypes": nn.Sequential(nn.Linear(6, 6))}, []).fit(1, phases=[SwAVPhase(crops)])
