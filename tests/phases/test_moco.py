from __future__ import annotations

import copy
import io
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    EMA,
    Accelerator,
    CancelStepException,
    CustomCallback,
    Learner,
    LossBegin,
    MoCoPhase,
    ObjectiveValidationPhase,
    PhaseError,
    StepEnd,
    TwoViews,
    stream_seed,
)
from fluxloop.losses import info_nce
from fluxloop.testing import assert_resumes_exactly
from toys import augment

SEED = 11
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
        self.projector = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, xs: Tensor) -> Tensor:
        return self.projector(self.encoder(xs))


def models(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    student = Network().to(dtype)
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.rand(18, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).split(4))


def first_queue(size: int) -> Tensor:
    """Draw the queue that the phase's docstring describes."""
    generator = torch.Generator().manual_seed(stream_seed(SEED, "MoCoPhase/queue"))
    return nn.functional.normalize(torch.randn(size, 6, generator=generator), dim=1)


def train_by_hand(
    models: dict[str, nn.Module], make: Any, queue_size: int, temperature: float
) -> tuple[list[Tensor], Tensor]:
    student, teacher = models.values()
    optimizer = make(student.parameters())
    queue, oldest = first_queue(queue_size), 0
    losses = []
    for step, xs in enumerate(batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        view1, view2 = augment(xs), augment(xs)
        q = nn.functional.normalize(student(view1), dim=1)
        with torch.no_grad():
            k = nn.functional.normalize(teacher(view2), dim=1)
        loss = info_nce(q, k, queue.clone(), temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, live in zip(teacher.parameters(), student.parameters(), strict=True):
                average.copy_(torch.lerp(average, live, 1 - 0.9))
        for key in k[-queue_size:]:
            queue[oldest] = key
            oldest = (oldest + 1) % queue_size
        losses.append(loss.detach())
    return losses, queue


def papers_train_by_hand(
    models: dict[str, nn.Module], make: Any, queue_size: int, temperature: float
) -> tuple[list[Tensor], Tensor]:
    """Write algorithm 1 of the paper, the loss as its equation 1, with a queue that drops what is oldest."""
    f_q, f_k = models.values()
    optimizer = make(f_q.parameters())
    queue = deque(first_queue(queue_size).double(), maxlen=queue_size)
    losses = []
    for step, xs in enumerate(batches(torch.float64)):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        x_q, x_k = augment(xs), augment(xs)
        q, k = f_q(x_q), f_k(x_k).detach()
        q, k = (z / z.pow(2).sum(dim=1, keepdim=True).sqrt() for z in (q, k))
        positive = torch.exp((q * k).sum(dim=1) / temperature)
        negative = torch.exp(q @ torch.stack(list(queue)).T / temperature).sum(dim=1)
        loss = -torch.log(positive / (positive + negative)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, live in zip(f_k.parameters(), f_q.parameters(), strict=True):
                average.copy_(0.9 * average + 0.1 * live)
        queue.extend(k)
        losses.append(loss.detach())
    return losses, torch.stack(list(queue))


def learner_of(models: Any, make: Any, data: list[Any], losses: list[Tensor], *callbacks: Any, **options: Any) -> Any:
    keep = CustomCallback(lambda learner: losses.append(learner.step.loss.detach()), StepEnd)
    given = [EMA("student", 0.9, into="teacher"), keep, *callbacks]
    options = {"default_callbacks": False, "seed": SEED, "accelerator": Accelerator("cpu"), **options}
    return Learner(models, data=(data,), optimizer=make, callbacks=given, **options)


def train(models: Any, make: Any, data: list[Any], phase: MoCoPhase) -> tuple[Learner, list[Tensor]]:
    losses: list[Tensor] = []
    learner = learner_of(models, make, data, losses)
    learner.fit(1, phases=[phase])
    return learner, losses


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("queue_size", [7, 12, 3, 64], ids=lambda size: f"queue of {size}")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_equal_those_of_a_hand_written_loop(optimizer: str, queue_size: int) -> None:
    expected, make = models(), OPTIMIZERS[optimizer]
    by_hand, queue = train_by_hand(expected, make, queue_size, 0.07)
    phase = MoCoPhase(TwoViews(augment), queue_size=queue_size)
    learner, losses = train(models(), make, batches(), phase)
    assert len(losses) == 5
    assert all(map(torch.equal, losses, by_hand))
    assert torch.equal(phase.queue, queue)
    for name, model in expected.items():
        found, wanted = getattr(learner.model, name).state_dict(), model.state_dict()
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
        assert not any(map(torch.equal, model.parameters(), models()[name].parameters()))


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("queue_size", [7, 3, 64], ids=lambda size: f"queue of {size}")
def test_five_steps_equal_those_with_the_papers_loss_and_queue_written_out(queue_size: int) -> None:
    expected = models(torch.float64)
    by_hand, queue = papers_train_by_hand(expected, OPTIMIZERS["sgd"], queue_size, 0.2)
    phase = MoCoPhase(TwoViews(augment), queue_size=queue_size, temperature=0.2)
    learner, losses = train(models(torch.float64), OPTIMIZERS["sgd"], batches(torch.float64), phase)
    torch.testing.assert_close(losses, by_hand, rtol=1e-9, atol=1e-12)
    for name, model in expected.items():
        found = getattr(learner.model, name)
        torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-12)
    assert_same_rows(phase.queue, queue)


def assert_same_rows(found: Tensor, expected: Tensor) -> None:
    """Compare two queues that begin in different places."""
    by_first = [queue[queue[:, 0].argsort()] for queue in (found, expected)]
    torch.testing.assert_close(*by_first, rtol=1e-9, atol=1e-12)


def test_the_queue_begins_with_random_directions_from_the_runs_seed() -> None:
    queues = []
    for seed in (SEED, SEED, SEED + 1):
        phase = MoCoPhase(TwoViews(augment), queue_size=9)
        found: list[Tensor] = []
        keep = CustomCallback(lambda learner, found=found, phase=phase: found.append(phase.queue.clone()), StepEnd)
        learner_of(models(), OPTIMIZERS["sgd"], batches()[:1], [], keep, seed=seed).fit(1, phases=[phase])
        queues.append(found[0])
    torch.testing.assert_close(queues[0].norm(dim=1), torch.ones(9))
    assert torch.equal(queues[0], queues[1])
    assert not torch.equal(queues[0], queues[2])
    assert torch.equal(queues[0][4:], first_queue(9)[4:])


def test_the_queue_holds_the_keys_of_past_batches_and_not_those_of_this_one() -> None:
    phase = MoCoPhase(TwoViews(augment), queue_size=8)
    seen: list[Tensor] = []
    keys: list[Tensor] = []

    def look(learner: Any) -> None:
        seen.append(torch.zeros(0, 6) if phase.queue is None else phase.queue.clone())
        keys.append(learner.step.keys)

    look_before_loss = CustomCallback(look, LossBegin)
    learner_of(models(), OPTIMIZERS["sgd"], batches()[:4], [], look_before_loss).fit(1, phases=[phase])
    assert torch.equal(seen[1][:4], keys[0])
    assert torch.equal(seen[2], torch.cat(keys[:2]))
    assert torch.equal(seen[3], torch.cat([keys[2], keys[1]]))  # the third batch took the place of the first


def test_the_queue_is_there_before_the_first_step_only_as_none() -> None:
    phase = MoCoPhase(queue_size=4)
    assert phase.queue is None
    assert phase.state_dict() == {"queue": None, "oldest": 0}


def test_it_stores_normalised_queries_and_keys() -> None:
    phase = MoCoPhase(TwoViews(augment), queue_size=8)
    learner, _ = train(models(), OPTIMIZERS["sgd"], batches()[:4], phase)
    step = learner.step
    shapes = {name: tuple(step[name].shape) for name in ("features", "queries", "keys", "loss")}
    assert shapes == {"features": (4, 16), "queries": (4, 6), "keys": (4, 6), "loss": ()}
    for name in ("queries", "keys"):
        torch.testing.assert_close(step[name].norm(dim=1), torch.ones(4))
    assert not step.keys.requires_grad
    assert not phase.queue.requires_grad
    assert phase.queue.shape == (8, 6)


@pytest.mark.parametrize("size", [0, -1])
def test_a_queue_without_places_is_refused(size: int) -> None:
    with pytest.raises(
        PhaseError, match=rf"MoCoPhase\(queue_size={size}\) was given; expected a whole number, 1 or more"
    ):
        MoCoPhase(queue_size=size)


def test_a_cancelled_step_puts_no_keys_into_the_queue() -> None:
    phase = MoCoPhase(TwoViews(augment), queue_size=8)
    learner, _ = train(models(), OPTIMIZERS["sgd"], batches()[:2], phase)
    before = copy.deepcopy(phase.state_dict())

    def cancel(learner: Any) -> None:
        raise CancelStepException

    learner.add_callback(CustomCallback(cancel, LossBegin))
    learner.fit(1, phases=[phase])
    assert torch.equal(phase.queue, before["queue"])
    assert phase.state_dict()["oldest"] == before["oldest"]


def test_a_kept_state_goes_on_to_the_same_bits() -> None:
    whole, without_break = MoCoPhase(TwoViews(augment), queue_size=7), []
    learner_of(models(), OPTIMIZERS["adam"], batches(), without_break).fit(1, phases=[whole])
    losses: list[Tensor] = []
    learner = learner_of(models(), OPTIMIZERS["adam"], batches(), losses)
    first, second = (MoCoPhase(TwoViews(augment), queue_size=7) for _ in range(2))
    learner.epoch(first, batches()[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    learner.epoch(second, batches()[2:])
    assert all(map(torch.equal, losses, without_break))
    assert torch.equal(second.queue, whole.queue)
    assert second.state_dict()["oldest"] == whole.state_dict()["oldest"] == 18 % 7


def test_a_kept_queue_of_another_size_is_refused() -> None:
    phase, other = MoCoPhase(TwoViews(augment), queue_size=7), MoCoPhase(queue_size=9)
    train(models(), OPTIMIZERS["sgd"], batches()[:1], phase)
    with pytest.raises(PhaseError, match=r"MoCoPhase\(queue_size=9\) was given a state of 7 rows; expected the same"):
        other.load_state_dict(phase.state_dict())


def test_a_kept_queue_follows_the_models_in_their_precision() -> None:
    phase = MoCoPhase(TwoViews(augment), queue_size=7)
    train(models(), OPTIMIZERS["sgd"], batches(), phase)
    double = MoCoPhase(TwoViews(augment), queue_size=7)
    double.load_state_dict(phase.state_dict())
    train(models(torch.float64), OPTIMIZERS["sgd"], batches(torch.float64)[:1], double)
    assert double.queue.dtype == torch.float64
    assert torch.equal(double.queue[1:4], phase.queue[1:4].double())  # the others gave way to the four keys


def test_a_phase_that_was_given_anothers_state_has_a_queue_of_its_own() -> None:
    first, second = (MoCoPhase(TwoViews(augment), queue_size=7) for _ in range(2))
    learner, _ = train(models(), OPTIMIZERS["sgd"], batches()[:2], first)
    second.load_state_dict(first.state_dict())
    kept = second.queue.clone()
    learner.fit(1, phases=[first])
    assert torch.equal(second.queue, kept)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_validation_before_the_first_step_changes_nothing_that_follows(around: Any) -> None:
    phase, watched = (MoCoPhase(TwoViews(augment), queue_size=7) for _ in range(2))
    _, losses = train(models(), OPTIMIZERS["sgd"], batches(), phase)
    again: list[Tensor] = []
    learner = learner_of(models(), OPTIMIZERS["sgd"], batches(), again)
    with around():
        learner.evaluate(batches(), phase=ObjectiveValidationPhase(watched))
    assert again == []
    learner.fit(1, phases=[watched])
    assert all(map(torch.equal, again, losses))
    assert torch.equal(watched.queue, phase.queue)


def sines(rows: Tensor) -> Tensor:
    return rows.sin()


class Unsized:
    """Batches of which nobody knows how many there are."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def small(batch_size: int, accumulate: int, is_sized: bool = True) -> Learner:
    """Make a learner without batch norm, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    rows = torch.randn(103, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = Unsized(rows.split(batch_size))
    return Learner(
        {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)},
        data=(list(batches) if is_sized else batches,),
        optimizer=OPTIMIZERS["sgd"],
        callbacks=[EMA("student", 0.9, into="teacher")],
        accelerator=Accelerator("cpu", accumulate=accumulate),
        default_callbacks=False,
        seed=SEED,
    )


@pytest.mark.parametrize("is_sized", [True, False])
def test_the_keys_of_several_batches_enter_the_queue_after_their_update(is_sized: bool) -> None:
    large, parts = small(28, 1), small(7, 4, is_sized)
    for each in (large, parts):
        each.fit(3, phases=[MoCoPhase(TwoViews(sines), queue_size=32)])
    for p, q in zip(large.models["student"].parameters(), parts.models["student"].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_run_with_keys_that_wait_for_other_batches_is_resumed_to_the_bit() -> None:
    assert_resumes_exactly(lambda: small(20, 4), epochs=2, phases=lambda: [MoCoPhase(TwoViews(sines), queue_size=32)])
