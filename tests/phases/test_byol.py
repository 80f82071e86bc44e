from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import EMA, Accelerator, BYOLPhase, CustomCallback, Learner, StepEnd, TwoViews, cosine, stream_seed
from fluxloop.losses import negative_cosine
from toys import augment, image_batches

SEED = 9
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=False),
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)
        )
        self.projector = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, xs: Tensor) -> Tensor:
        return self.projector(self.encoder(xs))


def models(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    student = Network().to(dtype)
    predictor = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 8)).to(dtype)
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False), "predictor": predictor}


def papers_loss(p1: Tensor, p2: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
    """Write equation 2 of the paper, for both directions."""
    p1, p2, t1, t2 = (x / x.pow(2).sum(1, keepdim=True).sqrt() for x in (p1, p2, t1, t2))
    return ((p1 - t2) ** 2).sum(1).mean() + ((p2 - t1) ** 2).sum(1).mean()


def loss_by_cosines(p1: Tensor, p2: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
    return 4 + 2 * (negative_cosine(p1, t2) + negative_cosine(p2, t1))


def train_by_hand(
    models: dict[str, nn.Module],
    make: Any,
    data: list[Tensor],
    loss_of: Callable[..., Tensor] = loss_by_cosines,
    decay: Callable[[int], float] = lambda step: 0.9,
) -> list[Tensor]:
    student, teacher, predictor = models.values()
    optimizer = make(chain(student.parameters(), predictor.parameters()))
    losses = []
    for step, xs in enumerate(data):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        view1, view2 = augment(xs), augment(xs)
        z1, z2 = student(view1), student(view2)
        p1, p2 = predictor(z1), predictor(z2)
        with torch.no_grad():
            t1, t2 = teacher(view1), teacher(view2)
        loss = loss_of(p1, p2, t1, t2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, live in zip(teacher.parameters(), student.parameters(), strict=True):
                average.copy_(torch.lerp(average, live, 1 - decay(step)))
        losses.append(loss.detach())
    return losses


def train(models: Any, make: Any, data: list[Any], decay: Any = 0.9) -> tuple[Learner, list[Tensor]]:
    losses: list[Tensor] = []
    keep = CustomCallback(lambda learner: losses.append(learner.step.loss.detach()), StepEnd)
    callbacks = [EMA("student", decay, into="teacher"), keep]
    options = {"default_callbacks": False, "seed": SEED, "accelerator": Accelerator("cpu")}
    learner = Learner(models, data=(data,), optimizer=make, callbacks=callbacks, **options)
    learner.fit(1, phases=[BYOLPhase(TwoViews(augment))])
    return learner, losses


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_equal_those_of_a_hand_written_loop(optimizer: str) -> None:
    expected, make = models(), OPTIMIZERS[optimizer]
    by_hand = train_by_hand(expected, make, image_batches())
    learner, losses = train(models(), make, image_batches())
    assert len(losses) == 5
    assert all(map(torch.equal, losses, by_hand))
    for name, model in expected.items():
        found, wanted = getattr(learner.model, name).state_dict(), model.state_dict()
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
        assert not any(map(torch.equal, model.parameters(), models()[name].parameters()))


def test_five_steps_equal_those_with_the_papers_loss_written_out_and_a_scheduled_momentum() -> None:
    expected, double = models(torch.float64), models(torch.float64)
    momentum = cosine(5, 0.9, 1.0)
    by_hand = train_by_hand(expected, OPTIMIZERS["sgd"], image_batches(torch.float64), papers_loss, momentum)
    learner, losses = train(double, OPTIMIZERS["sgd"], image_batches(torch.float64), momentum)
    torch.testing.assert_close(losses, by_hand, rtol=1e-9, atol=1e-12)
    for name, model in expected.items():
        found = getattr(learner.model, name)
        torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-12)


def test_the_teacher_keeps_batch_statistics_of_its_own() -> None:
    learner, _ = train(models(), OPTIMIZERS["sgd"], image_batches(), decay=1.0)
    initial, teacher = models()["teacher"], learner.model.teacher
    assert all(map(torch.equal, teacher.parameters(), initial.parameters()))
    norm, live = teacher.encoder[1], learner.model.student.encoder[1]
    assert norm.num_batches_tracked.item() == live.num_batches_tracked.item() == 2 * 5
    assert not torch.equal(norm.running_mean, live.running_mean)


def test_no_gradient_goes_to_the_teacher() -> None:
    learner, _ = train(models(), OPTIMIZERS["sgd"], image_batches())
    step = learner.step
    assert not step.t1.requires_grad
    assert not step.t2.requires_grad
    gradients = {name: gradient is None for name, gradient in step.grads.items()}
    assert {name for name, missing in gradients.items() if missing} == {
        name for name in gradients if name.startswith("teacher.")
    }


def test_it_stores_predictions_and_targets() -> None:
    learner, _ = train(models(), OPTIMIZERS["sgd"], image_batches())
    step = learner.step
    shapes = {name: tuple(step[name].shape) for name in ("features", "p1", "p2", "t1", "t2", "loss")}
    assert shapes == {"features": (4, 16), "p1": (4, 8), "p2": (4, 8), "t1": (4, 8), "t2": (4, 8), "loss": ()}
    assert [tuple(view.shape) for view in step.views] == [(4, 1, 8, 8)] * 2


def test_the_student_and_its_teacher_may_be_parts_of_one_module() -> None:
    whole = nn.Module()
    for name, model in models().items():
        whole.add_module(name, model)
    learner, losses = train(whole, OPTIMIZERS["adam"], image_batches())
    expected, named = train(models(), OPTIMIZERS["adam"], image_batches())
    assert all(map(torch.equal, losses, named))
    for name in ("student", "teacher", "predictor"):
        found, wanted = getattr(learner.model, name).state_dict(), getattr(expected.model, name).state_dict()
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
