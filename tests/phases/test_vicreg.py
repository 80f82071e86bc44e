from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import Accelerator, BatchError, CustomCallback, Learner, StepEnd, TwoViews, VICRegPhase, stream_seed
from fluxloop.losses import vicreg_loss
from toys import augment, image_batches

SEED = 7
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=False),
}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)
    )
    projector = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))
    return {"encoder": encoder, "projector": projector}


def train_by_hand(models: dict[str, nn.Module], make: Any, weights: tuple[float, float, float]) -> list[Tensor]:
    encoder, projector = models.values()
    optimizer = make(chain(encoder.parameters(), projector.parameters()))
    losses = []
    for step, xs in enumerate(image_batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        view1, view2 = augment(xs), augment(xs)
        z1 = projector(encoder(view1))
        z2 = projector(encoder(view2))
        loss = vicreg_loss(z1, z2, *weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize(
    ("phase", "weights"),
    [
        (VICRegPhase(TwoViews(augment)), (25.0, 25.0, 1.0)),
        (VICRegPhase(TwoViews(augment), invariance=2.0, variance=3.0, covariance=0.5), (2.0, 3.0, 0.5)),
    ],
    ids=["paper's weights", "other weights"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_equal_those_of_a_hand_written_loop(
    optimizer: str, phase: VICRegPhase, weights: tuple[float, float, float]
) -> None:
    expected, make = models(), OPTIMIZERS[optimizer]
    by_hand = train_by_hand(expected, make, weights)
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


def test_a_batch_of_one_row_is_told_to_be_left_out() -> None:
    options = {"default_callbacks": False, "seed": SEED, "accelerator": Accelerator("cpu")}
    learner = Learner(torch.nn.Linear(3, 2), data=([torch.randn(1, 3)],), **options)
    with pytest.raises(BatchError, match=r"VICRegPhase was given a batch of one row, which has no variance.*drop_last"):
        learner.fit(1, phases=[VICRegPhase(lambda xs: (xs, xs))])
