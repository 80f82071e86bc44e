from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fluxloop import Accelerator, NNCLRPhase, PhaseError, stream_seed
from fluxloop.testing import assert_resumes_exactly
from self_supervised import SEED, assert_goes_on, assert_same_training, embed, learner_of, parts, two_views
from toys import augment, image_batches


class ByHand:
    """Write algorithm 1 of the paper, with its queue."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(stream_seed(SEED, "NNCLRPhase/queue"))
        self.queue = normalize(torch.randn(size, 6, generator=generator), dim=1)
        self.oldest = 0

    def nearest(self, z: Tensor) -> Tensor:
        return self.queue[(normalize(z.detach(), dim=1) @ self.queue.T).argmax(1)]

    def loss(self, models: Any, xs: Tensor, step: int) -> Tensor:
        x1, x2 = augment(xs), augment(xs)
        z1, z2 = embed(models, x1), embed(models, x2)
        p1, p2 = models["predictor"](z1), models["predictor"](z2)
        labels = torch.arange(len(xs))
        loss = sum(
            cross_entropy(normalize(nn, dim=1) @ normalize(p, dim=1).T / 0.2, labels)
            for nn, p in ((self.nearest(z1), p2), (self.nearest(z2), p1))
        )
        self.entering = normalize(z1.detach(), dim=1)
        return loss / 2

    def after(self) -> None:
        for row in self.entering:
            self.queue[self.oldest] = row
            self.oldest = (self.oldest + 1) % len(self.queue)


@pytest.mark.parametrize("size", [7, 64])
def test_five_steps_equal_those_of_the_papers_algorithm_in_a_hand_written_loop(size: int) -> None:
    hand, phase = ByHand(size), NNCLRPhase(two_views, queue_size=size, temperature=0.2)
    learner = assert_same_training(phase, lambda: parts("predictor"), hand.loss, hand.after)
    assert torch.equal(phase.queue, hand.queue)
    assert not phase.queue.requires_grad
    assert not learner.step.neighbors1.requires_grad


def test_the_queue_takes_embeddings_of_the_first_view_and_no_predictions() -> None:
    phase = NNCLRPhase(two_views, queue_size=8)
    learner = learner_of(parts("predictor"), [], data=(image_batches()[:1],))
    learner.fit(1, phases=[phase])
    step = learner.step
    torch.testing.assert_close(phase.queue[:4], normalize(step.z1, dim=1).detach())
    assert not torch.allclose(phase.queue[:4], normalize(step.p1, dim=1).detach())


def test_a_kept_queue_goes_on_to_the_same_bits() -> None:
    assert_goes_on(lambda: NNCLRPhase(two_views, queue_size=7), lambda: parts("predictor"))


@pytest.mark.slow
def test_a_run_with_a_queue_and_rows_that_wait_is_resumed_to_the_bit() -> None:
    assert_resumes_exactly(
        lambda: learner_of(parts("predictor"), None, accelerator=Accelerator("cpu", accumulate=2)),
        epochs=2,
        phases=lambda: [NNCLRPhase(two_views, queue_size=6)],
    )


def test_a_queue_without_places_is_refused() -> None:
    with pytest.raises(PhaseError, match=r"NNCLRPhase\(queue_size=0\) was given; expected a whole number, 1 or more"):
        NNCLRPhase(queue_size=0)
