from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import Accelerator, BarlowTwinsPhase, CustomCallback, Learner, StepEnd, TwoViews, stream_seed
from fluxloop.losses import barlow_twins_loss
from toys import augment, image_batches

SEED = 6
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=False),
}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)
    )
    projector = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))
    return {"encoder": encoder, "projector": projector}


def train_by_hand(models: dict[str, nn.Module], make: Any, weight: float) -> list[Tensor]:
    encoder, projector = models.values()
    optimizer = make(chain(encoder.parameters(), projector.parameters()))
    losses = []
    for step, xs in enumerate(image_batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        view1, view2 = augment(xs), augment(xs)
        z1 = projector(encoder(view1))
        z2 = projector(encoder(view2))
        loss = barlow_twins_loss(z1, z2, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize(
    ("phase", "weight"),
    [(BarlowTwinsPhase(TwoViews(augment)), 5e-3), (BarlowTwinsPhase(TwoViews(augment), weight=0.1), 0.1)],
    ids=["paper's weight", "another weight"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_equal_those_of_a_hand_written_loop(optimizer: str, phase: BarlowTwinsPhase, weight: float) -> None:
    expected, make = models(), OPTIMIZERS[optimizer]
    by_hand = train_by_hand(expected, make, weight)
    losses: list[Tensor] = []
    keep = CustomCallback(lambda learner: losses.append(learner.step.loss.detach()), StepEnd)
    options = {"default_callbacks": False, "seed": SEED, "accelerator": Accelerator("cpu")}
    learner = Learner(models(), data=(image_batches(),), optimizer=make, callbacks=[keep], **options)
    learner.fit(1, phases=[phase])
    assert len(losses) == 5
    assert all(map(torch.equal, losses, by_hand))
    for name, model in expected.items():
        found, wanted = getattr(learner.model, name).state_dict(), model.state_dict()
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
        assert not torch.equal(model[0].weight, models()[name][0].weight)
