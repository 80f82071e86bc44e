"""What the tests of self-supervised phases share: small models, crops, and a training loop written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluxloop import EMA, Accelerator, CustomCallback, Learner, MultiCrop, StepEnd, TwoViews, stream_seed
from fluxloop.augment import random_affine
from toys import augment, image_batches, through_a_file

SEED = 12
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01, fused=False)

two_views = TwoViews(augment)


def globally(images: Tensor) -> Tensor:
    return random_affine(images, degrees=10, translate=0.1, scale=(1.0, 1.4))


def locally(images: Tensor) -> Tensor:
    return random_affine(images, degrees=10, translate=0.3, scale=(1.6, 2.4), size=5)


crops = MultiCrop(globally, locally, num_local=2)


def draw_crops(xs: Tensor) -> list[Tensor]:
    """Draw the crops of a batch as `crops` does."""
    return [globally(xs), globally(xs), locally(xs), locally(xs)]


def parts(*more: str) -> dict[str, nn.Module]:
    """Make an encoder and a projector, with batch norm and dropout, and more parts with six inputs and outputs."""
    torch.manual_seed(1)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)
    )
    projector = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))
    return {"encoder": encoder, "projector": projector, **{name: nn.Linear(6, 6, bias=False) for name in more}}


def student_and_teacher(*more: str) -> dict[str, nn.Module]:
    """Make a student with an encoder and a projector, its teacher, and more parts."""
    made = parts(*more)
    student = nn.ModuleDict({name: made.pop(name) for name in ("encoder", "projector")})
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False), **made}


def embed(network: Any, view: Tensor) -> Tensor:
    """Return the embedding of a view by a network with an encoder and a projector."""
    projector = network["projector"]
    embedding: Tensor = projector(network["encoder"](view))
    return embedding


def train_by_hand(
    models: Mapping[str, nn.Module],
    loss_of: Callable[[Any, Tensor, int], Tensor],
    after: Callable[[], None] = lambda: None,
    make: Any = ADAM,
    data: list[Tensor] | None = None,
) -> list[Tensor]:
    """Train models as everybody does it: one optimizer for all, a teacher that is an average with decay 0.9."""
    optimizer = make([p for model in models.values() for p in model.parameters() if p.requires_grad])
    losses = []
    for step, xs in enumerate(image_batches() if data is None else data):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        loss = loss_of(models, xs, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if "teacher" in models:
            with torch.no_grad():
                for average, live in zip(models["teacher"].parameters(), models["student"].parameters(), strict=True):
                    average.copy_(torch.lerp(average, live, 1 - 0.9))
        after()
        losses.append(loss.detach())
    return losses


def learner_of(
    models: Mapping[str, nn.Module], losses: list[Tensor] | None, *callbacks: Any, make: Any = ADAM, **options: Any
) -> Learner:
    """Make a learner of the same training, which notes its losses where a list is given."""
    given: list[Any] = [EMA("student", 0.9, into="teacher")] if "teacher" in models else []
    if losses is not None:
        given.append(CustomCallback(lambda learner: losses.append(learner.step.loss.detach()), StepEnd))
    options = {
        "data": (image_batches(),),
        "accelerator": Accelerator("cpu"),
        "default_callbacks": False,
        "seed": SEED,
        **options,
    }
    return Learner(models, optimizer=make, callbacks=[*given, *callbacks], **options)


def assert_same_training(
    phase: Any, make_models: Callable[[], Mapping[str, nn.Module]], loss_of: Any, after: Any = lambda: None
) -> Learner:
    """Train by a phase and by hand for five steps, and compare losses and weights bit by bit."""
    expected = make_models()
    by_hand = train_by_hand(expected, loss_of, after)
    losses: list[Tensor] = []
    learner = learner_of(make_models(), losses)
    learner.fit(1, phases=[phase])
    assert len(losses) == 5
    assert all(map(torch.equal, losses, by_hand)), [(a - b).item() for a, b in zip(losses, by_hand, strict=True)]
    for name, model in expected.items():
        found, wanted, first = (m.state_dict() for m in (getattr(learner.model, name), model, make_models()[name]))
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
        assert [key for key in wanted if not torch.equal(first[key], wanted[key])], f"{name} was not trained"
    return learner


def assert_goes_on(make_phase: Callable[[], Any], make_models: Callable[[], Mapping[str, nn.Module]]) -> Any:
    """Keep a phase's state in a file after two of five batches; another one goes on with it to the same bits."""
    whole: list[Tensor] = []
    phase = make_phase()
    learner_of(make_models(), whole).fit(1, phases=[phase])
    losses: list[Tensor] = []
    learner, first, second = learner_of(make_models(), losses), make_phase(), make_phase()
    learner.epoch(first, image_batches()[:2])
    second.load_state_dict(through_a_file(first.state_dict()))
    learner.epoch(second, image_batches()[2:])
    assert all(map(torch.equal, losses, whole))
    assert_same_state(second.state_dict(), phase.state_dict())
    return second


def assert_same_state(found: Any, expected: Any) -> None:
    """Compare two states of a phase, bit by bit."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        assert same, name


class Tokens(nn.Module):
    """A transformer of one layer over patches of 2 x 2 pixels, for images of any size, with a token for hidden ones."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, size, 2, 2)
        self.places = nn.Parameter(0.1 * torch.randn(16, size))
        self.cls, self.hidden = (nn.Parameter(0.1 * torch.randn(size)) for _ in range(2))
        self.first, self.second = (nn.TransformerEncoderLayer(size, 2, 12, batch_first=True) for _ in range(2))

    def layers(self, images: Tensor, mask: Tensor | None) -> list[Tensor]:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        if mask is not None:
            patches = torch.where(mask[:, :, None], self.hidden, patches)
        patches = patches + self.places[: patches.shape[1]]
        tokens = torch.cat([self.cls.expand(len(images), 1, -1), patches], dim=1)
        first = self.first(tokens)
        return [first, self.second(first)]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = self.layers(images, mask)[-1]
        return tokens[:, 0], tokens[:, 1:]


def network_and_teacher(make: Callable[[], nn.Module], **more: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Make a student, its frozen copy, and more models."""
    torch.manual_seed(1)
    student = make()
    teacher = copy.deepcopy(student).requires_grad_(False)
    return {"student": student, "teacher": teacher, **{name: made() for name, made in more.items()}}


def heads(*names: str) -> nn.ModuleDict:
    """Make a transformer with heads of five prototypes."""
    return nn.ModuleDict({"encoder": Tokens(), **{name: nn.Linear(8, 5) for name in names}})
