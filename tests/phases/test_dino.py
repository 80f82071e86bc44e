from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    EMA,
    Accelerator,
    BatchError,
    CancelStepException,
    CustomCallback,
    DINOPhase,
    Learner,
    LossBegin,
    MultiCrop,
    ObjectiveValidationPhase,
    PhaseError,
    StepEnd,
    TwoViews,
    linear,
    stream_seed,
)
from fluxloop.augment import random_affine
from fluxloop.losses import dino_loss
from fluxloop.testing import assert_resumes_exactly
from toys import image_batches

SEED = 10
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
        self.projector = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, xs: Tensor) -> Tensor:
        return self.projector(self.encoder(xs))


def models(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    student = Network().to(dtype)
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}


def globally(images: Tensor) -> Tensor:
    return random_affine(images, degrees=10, translate=0.1, scale=(1.0, 1.4))


def locally(images: Tensor) -> Tensor:
    return random_affine(images, degrees=10, translate=0.3, scale=(1.6, 2.4), size=5)


crops = MultiCrop(globally, locally, num_local=3)


def papers_loss(
    student: list[Tensor], teacher: list[Tensor], center: Tensor, student_temperature: float, temperature: float
) -> Tensor:
    """Write H(t, s) of the paper's algorithm 1 over all pairs of different crops."""
    terms = []
    for i, t in enumerate(teacher):
        t = torch.exp((t - center) / temperature)
        t = t / t.sum(dim=1, keepdim=True)
        for j, s in enumerate(student):
            if i != j:
                s = torch.exp(s / student_temperature)
                s = s / s.sum(dim=1, keepdim=True)
                terms.append(-(t * torch.log(s)).sum(dim=1).mean())
    return sum(terms) / len(terms)


def train_by_hand(
    models: dict[str, nn.Module],
    make: Any,
    data: list[Tensor],
    loss_of: Callable[..., Tensor] = dino_loss,
    temperature: Callable[[int], float] = lambda step: 0.04,
    center_momentum: float = 0.9,
    student_temperature: float = 0.1,
) -> tuple[list[Tensor], Tensor]:
    student, teacher = models.values()
    optimizer = make(student.parameters())
    center = torch.zeros(6, dtype=data[0].dtype)
    losses = []
    for step, xs in enumerate(data):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        views = [globally(xs), globally(xs), locally(xs), locally(xs), locally(xs)]
        student_out = [student(view) for view in views]
        with torch.no_grad():
            teacher_out = [teacher(view) for view in views[:2]]
        loss = loss_of(student_out, teacher_out, center, student_temperature, temperature(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            batch_center = torch.cat(teacher_out).mean(dim=0)
            center = center * center_momentum + batch_center * (1 - center_momentum)
            for average, live in zip(teacher.parameters(), student.parameters(), strict=True):
                average.copy_(torch.lerp(average, live, 1 - 0.9))
        losses.append(loss.detach())
    return losses, center


def learner_of(models: Any, make: Any, data: list[Any], losses: list[Tensor], *callbacks: Any) -> Learner:
    keep = CustomCallback(lambda learner: losses.append(learner.step.loss.detach()), StepEnd)
    given = [EMA("student", 0.9, into="teacher"), keep, *callbacks]
    options = {"default_callbacks": False, "seed": SEED, "accelerator": Accelerator("cpu")}
    return Learner(models, data=(data,), optimizer=make, callbacks=given, **options)


def train(models: Any, make: Any, data: list[Any], phase: DINOPhase) -> tuple[Learner, list[Tensor]]:
    losses: list[Tensor] = []
    learner = learner_of(models, make, data, losses)
    learner.fit(1, phases=[phase])
    return learner, losses


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_equal_those_of_a_hand_written_loop(optimizer: str) -> None:
    expected, make = models(), OPTIMIZERS[optimizer]
    by_hand, center = train_by_hand(expected, make, image_batches())
    phase = DINOPhase(crops)
    learner, losses = train(models(), make, image_batches(), phase)
    assert len(losses) == 5
    assert all(map(torch.equal, losses, by_hand))
    assert torch.equal(phase.center, center)
    for name, model in expected.items():
        found, wanted = getattr(learner.model, name).state_dict(), model.state_dict()
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
        assert not any(map(torch.equal, model.parameters(), models()[name].parameters()))


def test_five_steps_equal_those_with_the_papers_loss_written_out_and_a_temperature_schedule() -> None:
    expected, schedule = models(torch.float64), linear(4, 0.2, 0.5)
    by_hand, center = train_by_hand(
        expected, OPTIMIZERS["sgd"], image_batches(torch.float64), papers_loss, schedule, 0.8, student_temperature=0.3
    )
    phase = DINOPhase(crops, student_temperature=0.3, teacher_temperature=schedule, center_momentum=0.8)
    learner, losses = train(models(torch.float64), OPTIMIZERS["sgd"], image_batches(torch.float64), phase)
    torch.testing.assert_close(losses, by_hand, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(phase.center, center, rtol=1e-9, atol=1e-12)
    for name, model in expected.items():
        found = getattr(learner.model, name)
        torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-12)


def test_the_schedule_of_the_temperature_is_asked_once_a_step_over_all_epochs_and_not_moved_by_validation() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.04

    learner = learner_of(models(), OPTIMIZERS["sgd"], image_batches()[:3], [])
    phase = DINOPhase(crops, teacher_temperature=schedule)
    learner.fit(1, phases=[phase])
    learner.evaluate(image_batches()[:2], phase=ObjectiveValidationPhase(phase))
    learner.fit(1, phases=[phase])
    assert asked == [0, 1, 2, 3, 3, 3, 4, 5]


def test_it_stores_the_scores_of_all_crops_and_the_teachers_of_the_global_ones() -> None:
    phase = DINOPhase(crops)
    learner, _ = train(models(), OPTIMIZERS["sgd"], image_batches(), phase)
    step = learner.step
    assert [tuple(view.shape) for view in step.views] == [(4, 1, 8, 8)] * 2 + [(4, 1, 5, 5)] * 3
    assert [tuple(scores.shape) for scores in step.student] == [(4, 6)] * 5
    assert [tuple(scores.shape) for scores in step.teacher] == [(4, 6)] * 2
    assert isinstance(step.student, list)
    assert isinstance(step.teacher, list)
    assert tuple(step.features.shape) == (4, 16)
    assert step.loss.shape == ()
    assert phase.center.shape == (6,)
    assert not phase.center.requires_grad
    assert not any(scores.requires_grad for scores in step.teacher)


def test_there_is_no_center_before_the_first_step() -> None:
    assert DINOPhase().center is None
    assert DINOPhase().state_dict() == {"center": None, "steps": 0}


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("labelled", [False, True])
def test_batches_may_hold_the_crops(labelled: bool) -> None:
    torch.manual_seed(0)
    made = [crops(xs) for xs in image_batches()]
    data = [(views, torch.arange(4)) for views in made] if labelled else made
    learner, losses = train(models(), OPTIMIZERS["adam"], data, DINOPhase())
    assert len(losses) == 5
    assert len(learner.step.views) == 5
    assert ("ys" in learner.step) is labelled
    _, same = train(models(), OPTIMIZERS["adam"], [list(views) for views in made], DINOPhase())
    assert all(map(torch.equal, losses, same))


def test_one_global_crop_may_stand_beside_smaller_local_ones() -> None:
    torch.manual_seed(0)
    data = [(globally(xs), locally(xs), locally(xs)) for xs in image_batches()]
    learner, losses = train(models(), OPTIMIZERS["sgd"], data, DINOPhase(num_global=1))
    assert len(losses) == 5
    assert len(learner.step.teacher) == 1
    torch.testing.assert_close(losses[0], dino_loss_of_first_step(data[0]))


def dino_loss_of_first_step(views: tuple[Tensor, ...]) -> Tensor:
    student, teacher = models().values()
    torch.manual_seed(stream_seed(SEED, "training/step", 0))
    outputs = [student(view) for view in views]
    with torch.no_grad():
        return dino_loss(outputs, [teacher(views[0])])


@pytest.mark.parametrize("count", [0, -1])
def test_no_global_crop_is_refused(count: int) -> None:
    with pytest.raises(
        PhaseError, match=rf"DINOPhase\(num_global={count}\) was given; expected a whole number, 1 or more"
    ):
        DINOPhase(num_global=count)


def test_fewer_crops_than_global_ones_are_refused() -> None:
    with pytest.raises(BatchError, match="DINOPhase was given a tuple of length 2 as views"):
        train(models(), OPTIMIZERS["sgd"], image_batches(), DINOPhase(lambda xs: (xs, xs), num_global=3))


def test_a_single_crop_is_refused() -> None:
    words = r"DINOPhase was given a tuple of length 1 as views; expected two or more of each row"
    with pytest.raises(BatchError, match=words):
        train(models(), OPTIMIZERS["sgd"], image_batches(), DINOPhase(lambda xs: (xs,)))


def test_a_batch_with_more_than_labels_behind_the_crops_is_refused() -> None:
    data = [[[xs, xs], torch.arange(4), torch.arange(4)] for xs in image_batches()]
    with pytest.raises(BatchError, match="DINOPhase was given"):
        train(models(), OPTIMIZERS["sgd"], data, DINOPhase())


def test_a_cancelled_step_moves_neither_the_center_nor_the_schedule() -> None:
    def cancel(learner: Any) -> None:
        raise CancelStepException

    phase = DINOPhase(crops)
    learner = learner_of(models(), OPTIMIZERS["sgd"], image_batches(), [], CustomCallback(cancel, LossBegin))
    learner.fit(1, phases=[phase])
    assert phase.state_dict() == {"center": None, "steps": 0}


def test_a_kept_state_goes_on_to_the_same_bits() -> None:
    schedule = linear(5, 0.04, 0.4)
    whole, without_break = DINOPhase(crops, teacher_temperature=schedule), []
    learner_of(models(), OPTIMIZERS["adam"], image_batches(), without_break).fit(1, phases=[whole])
    losses: list[Tensor] = []
    learner = learner_of(models(), OPTIMIZERS["adam"], image_batches(), losses)
    first, second = (DINOPhase(crops, teacher_temperature=schedule) for _ in range(2))
    learner.epoch(first, image_batches()[:2])
    second.load_state_dict(first.state_dict())
    learner.epoch(second, image_batches()[2:])
    assert all(map(torch.equal, losses, without_break))
    assert torch.equal(second.center, whole.center)
    assert second.state_dict()["steps"] == 5


def sines(rows: Tensor) -> Tensor:
    return rows.sin()


def small(batch_size: int, accumulate: int, is_sized: bool = True) -> tuple[Learner, DINOPhase]:
    """Make a learner without batch norm, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    rows = torch.randn(103, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = Unsized(rows.split(batch_size))
    learner = Learner(
        {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)},
        data=(list(batches) if is_sized else batches,),
        optimizer=OPTIMIZERS["sgd"],
        callbacks=[EMA("student", 0.9, into="teacher")],
        accelerator=Accelerator("cpu", accumulate=accumulate),
        default_callbacks=False,
        seed=SEED,
    )
    return learner, DINOPhase(TwoViews(sines), teacher_temperature=linear(12, 0.04, 0.07))


class Unsized:
    """Batches of which nobody knows how many there are."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


@pytest.mark.parametrize("is_sized", [True, False])
def test_several_batches_of_an_update_move_the_center_and_the_schedule_once(is_sized: bool) -> None:
    (large, whole), (parts, phase) = small(28, 1), small(7, 4, is_sized)
    large.fit(3, phases=[whole])
    parts.fit(3, phases=[phase])
    for p, q in zip(large.models["student"].parameters(), parts.models["student"].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert whole.center is not None
    assert phase.center is not None
    torch.testing.assert_close(phase.center, whole.center, rtol=0, atol=1e-12)
    assert phase._steps == whole._steps == 12


def test_a_run_with_a_center_that_waits_for_other_batches_is_resumed_to_the_bit() -> None:
    assert_resumes_exactly(lambda: small(20, 4)[0], epochs=2, phases=lambda: [small(20, 4)[1]])


def test_the_center_is_in_single_precision_in_bf16() -> None:
    accelerator = Accelerator("cpu", precision="bf16")
    learner = Learner(
        models(),
        data=(image_batches(),),
        optimizer=OPTIMIZERS["sgd"],
        callbacks=[EMA("student", 0.9, into="teacher")],
        accelerator=accelerator,
        default_callbacks=False,
    )
    phase = DINOPhase(MultiCrop(globally, globally, 1))
    learner.fit(1, phases=[phase])
    assert phase.center is not None
    assert phase.center.dtype == torch.float32
