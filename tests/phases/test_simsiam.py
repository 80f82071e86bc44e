from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import Accelerator, CustomCallback, Learner, PhaseError, SimSiamPhase, StepEnd, TwoViews, stream_seed
from fluxloop.losses import negative_cosine
from toys import augment, image_batches

SEED = 8
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=False),
}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)
    )
    projector = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))
    predictor = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 8))
    return {"encoder": encoder, "projector": projector, "predictor": predictor}


def papers_distance(p: Tensor, z: Tensor) -> Tensor:
    """Write D(p, z) of the paper's algorithm 1."""
    z = z.detach()  # stop gradient
    p = p / p.pow(2).sum(1, keepdim=True).sqrt()
    z = z / z.pow(2).sum(1, keepdim=True).sqrt()
    return -(p * z).sum(1).mean()


def train_by_hand(
    models: dict[str, nn.Module], make: Any, data: list[Tensor], distance: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    encoder, projector, predictor = models.values()
    optimizer = make(chain.from_iterable(model.parameters() for model in models.values()))
    losses = []
    for step, xs in enumerate(data):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        view1, view2 = augment(xs), augment(xs)
        z1, z2 = projector(encoder(view1)), projector(encoder(view2))
        p1, p2 = predictor(z1), predictor(z2)
        loss = (distance(p1, z2) + distance(p2, z1)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def train(models: Any, make: Any, data: list[Any]) -> tuple[Learner, list[Tensor]]:
    losses: list[Tensor] = []
    keep = CustomCallback(lambda learner: losses.append(learner.step.loss.detach()), StepEnd)
    options = {"default_callbacks": False, "seed": SEED, "accelerator": Accelerator("cpu")}
    learner = Learner(models, data=(data,), optimizer=make, callbacks=[keep], **options)
    learner.fit(1, phases=[SimSiamPhase(TwoViews(augment))])
    return learner, losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_equal_those_of_a_hand_written_loop(optimizer: str) -> None:
    expected, make = models(), OPTIMIZERS[optimizer]
    by_hand = train_by_hand(expected, make, image_batches(), negative_cosine)
    learner, losses = train(models(), make, image_batches())
    assert len(losses) == 5
    assert all(map(torch.equal, losses, by_hand))
    for name, model in expected.items():
        found, wanted = getattr(learner.model, name).state_dict(), model.state_dict()
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
        weights = [
            (now, then)
            for now, then in zip(model.parameters(), models()[name].parameters(), strict=True)
            if now.dim() > 1
        ]
        assert not any(torch.equal(now, then) for now, then in weights)  # a bias before batch norm may stay as it is


def test_five_steps_equal_those_with_the_papers_loss_written_out() -> None:
    expected = {name: model.double() for name, model in models().items()}
    by_hand = train_by_hand(expected, OPTIMIZERS["sgd"], image_batches(torch.float64), papers_distance)
    double = {name: model.double() for name, model in models().items()}
    learner, losses = train(double, OPTIMIZERS["sgd"], image_batches(torch.float64))
    torch.testing.assert_close(losses, by_hand, rtol=1e-9, atol=1e-12)
    for name, model in expected.items():
        found = getattr(learner.model, name)
        torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-12)


def test_it_stores_predictions_besides_the_embeddings() -> None:
    learner, _ = train(models(), OPTIMIZERS["sgd"], image_batches())
    step = learner.step
    shapes = {name: tuple(step[name].shape) for name in ("features", "z1", "z2", "p1", "p2", "loss")}
    assert shapes == {"features": (4, 16), "z1": (4, 8), "z2": (4, 8), "p1": (4, 8), "p2": (4, 8), "loss": ()}


def test_the_predictor_alone_may_stand_behind_an_encoder() -> None:
    given = models()
    whole = nn.Sequential(given["encoder"], given["projector"])
    learner, losses = train({"encoder": whole, "predictor": given["predictor"]}, OPTIMIZERS["adam"], image_batches())
    expected, with_projector = train(models(), OPTIMIZERS["adam"], image_batches())
    assert all(map(torch.equal, losses, with_projector))
    assert all(map(torch.equal, learner.model.predictor.parameters(), expected.model.predictor.parameters()))
    assert torch.equal(learner.step.features, learner.step.z1)


def test_a_learner_without_predictor_is_told_so() -> None:
    given = models()
    del given["predictor"]
    words = (
        r"SimSiamPhase calls learner.model.predictor, and the models are \['encoder', 'projector'\]; expected encoder, "
        r"predictor: Learner\(\{'encoder': ..., 'predictor': ...\}\), or one module with these attributes"
    )
    with pytest.raises(PhaseError, match=words):
        train(given, OPTIMIZERS["sgd"], image_batches())
