from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from fluxloop import (
    Accelerator,
    CustomCallback,
    Learner,
    SimCLRPhase,
    StepEnd,
    TensorBatches,
    TwoViews,
    ViewDataset,
    stream_seed,
)
from fluxloop.augment import add_noise
from fluxloop.losses import nt_xent
from toys import augment

SEED = 5
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=False),
}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)
    )
    projector = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 8))
    return {"encoder": encoder, "projector": projector}


def images() -> Tensor:
    return torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def batches() -> TensorBatches:
    return TensorBatches(images(), batch_size=4)


def learner_of(model: Any, data: Iterable[Any], optimizer: Any, losses: list[Tensor]) -> Learner:
    keep = CustomCallback(lambda learner: losses.append(learner.step.loss.detach()), StepEnd)
    cpu = Accelerator("cpu")
    options = {"callbacks": [keep], "default_callbacks": False, "seed": SEED, "accelerator": cpu}
    return Learner(model, data=(data,), optimizer=optimizer, **options)


def assert_same(found: Iterable[nn.Module], expected: Iterable[nn.Module]) -> None:
    for module, other in zip(found, expected, strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), f"{name} differs"


def train_by_hand(
    encoder: nn.Module,
    projector: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    views: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda xs: (augment(xs), augment(xs)),
    temperature: float = 0.5,
) -> list[Tensor]:
    losses = []
    for step, xs in enumerate(batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        view1, view2 = views(xs)
        z1 = projector(encoder(view1))
        z2 = projector(encoder(view2))
        loss = nt_xent(z1, z2, temperature)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_equal_those_of_a_hand_written_loop(optimizer: str) -> None:
    expected, make = models(), OPTIMIZERS[optimizer]
    parameters = chain(*(model.parameters() for model in expected.values()))
    by_hand = train_by_hand(**expected, optimizers=[make(parameters)])
    losses: list[Tensor] = []
    learner = learner_of(models(), batches(), make, losses)
    learner.fit(1, phases=[SimCLRPhase(TwoViews(augment))])
    assert len(losses) == 5
    assert all(map(torch.equal, losses, by_hand))
    assert_same(learner.model, expected.values())
    initial = models()["encoder"]
    assert not any(map(torch.equal, learner.model.encoder.parameters(), initial.parameters()))


def test_each_model_may_have_an_optimizer_of_another_kind() -> None:
    expected = models()
    kinds = {"encoder": OPTIMIZERS["adam"], "projector": OPTIMIZERS["sgd"]}
    by_hand = train_by_hand(**expected, optimizers=[kinds[name](expected[name].parameters()) for name in kinds])
    losses: list[Tensor] = []
    learner = learner_of(models(), batches(), kinds, losses)
    learner.fit(1, phases=[SimCLRPhase(TwoViews(augment))])
    assert all(map(torch.equal, losses, by_hand))
    assert_same(learner.model, expected.values())
    assert learner.optimizer_names == ("encoder", "projector")


def test_the_temperature_is_that_of_the_loss() -> None:
    expected, make = models(), OPTIMIZERS["adam"]
    parameters = chain(*(model.parameters() for model in expected.values()))
    by_hand = train_by_hand(**expected, optimizers=[make(parameters)], temperature=0.1)
    losses: list[Tensor] = []
    learner = learner_of(models(), batches(), make, losses)
    learner.fit(1, phases=[SimCLRPhase(TwoViews(augment), temperature=0.1)])
    assert all(map(torch.equal, losses, by_hand))


def test_a_second_transform_makes_the_second_view() -> None:
    expected, make = models(), OPTIMIZERS["sgd"]
    parameters = chain(*(model.parameters() for model in expected.values()))
    by_hand = train_by_hand(
        **expected, optimizers=[make(parameters)], views=lambda xs: (augment(xs), add_noise(xs, 0.3))
    )
    losses: list[Tensor] = []
    learner = learner_of(models(), batches(), make, losses)
    learner.fit(1, phases=[SimCLRPhase(TwoViews(augment, lambda xs: add_noise(xs, 0.3)))])
    assert all(map(torch.equal, losses, by_hand))
    assert_same(learner.model, expected.values())


def test_steps_over_a_loader_of_random_views_equal_those_of_a_hand_written_loop() -> None:
    views = ViewDataset(TensorDataset(images(), torch.arange(20)), TwoViews(augment))

    def batches() -> Iterator[Any]:
        order = [int(i) for batch in DataLoader(torch.arange(20), batch_size=4, shuffle=True) for i in batch]
        for first in range(0, 20, 4):
            samples = []
            for place in range(first, first + 4):
                torch.manual_seed(stream_seed(SEED, "training/sample/0", place))
                samples.append(views[order[place]])
            yield default_collate(samples)

    expected, make = models(), OPTIMIZERS["adam"]
    optimizer = make(chain(*(model.parameters() for model in expected.values())))
    by_hand, step = [], 0
    torch.manual_seed(stream_seed(SEED, "training/data", 0))
    for step, ((view1, view2), _) in enumerate(batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        z1 = expected["projector"](expected["encoder"](view1))
        z2 = expected["projector"](expected["encoder"](view2))
        loss = nt_xent(z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_hand.append(loss.detach())
    losses: list[Tensor] = []
    loader = DataLoader(views, batch_size=4, shuffle=True)
    learner = learner_of(models(), loader, make, losses)
    learner.fit(1, phases=[SimCLRPhase()])
    assert len(losses) == 5
    assert all(map(torch.equal, losses, by_hand))
    assert_same(learner.model, expected.values())


def test_the_views_of_each_step_and_of_both_sides_are_drawn_anew() -> None:
    views: list[Tensor] = []
    keep = CustomCallback(lambda learner: views.extend(learner.step.views), StepEnd)
    learner = learner_of(models(), [images()[:4]] * 3, OPTIMIZERS["sgd"], [])
    learner.add_callback(keep)
    learner.fit(2, phases=[SimCLRPhase(TwoViews(augment))])
    assert len({view.sum().item() for view in views}) == len(views) == 12
