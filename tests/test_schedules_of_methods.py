"""Schedules that papers ask for, each against its formula in a loop by hand: of averages, and of rates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    EMA,
    Accelerator,
    CombinedLoader,
    CustomCallback,
    CycleGANPhase,
    EpochEnd,
    Learner,
    LearningRate,
    LRScheduler,
    Scheduler,
    TensorBatches,
    TrainingPhase,
    UpdateBegin,
    linear,
    sequence,
)
from fluxloop.testing import assert_resumes_exactly

BATCH, STEPS, EPOCHS = 4, 5, 4
SGD = partial(torch.optim.SGD, lr=0.1)


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def rows() -> tuple[Tensor, Tensor]:
    xs = torch.randn(STEPS * BATCH, 3, generator=torch.Generator().manual_seed(1))
    return xs, xs.sum(1, keepdim=True)


def learner_of(*callbacks: Any) -> Learner:
    return Learner(
        net(),
        nn.functional.mse_loss,
        data=(TensorBatches(rows(), batch_size=BATCH),),
        optimizer=SGD,
        callbacks=callbacks,
        default_callbacks=False,
        accelerator=Accelerator("cpu"),
        seed=0,
    )


def averages_by_hand(decay: Callable[[int], float], epochs: int) -> nn.Linear:
    model = net()
    average, optimizer = copy.deepcopy(model), SGD(model.parameters())
    for step in range(epochs * STEPS):
        begin = step % STEPS * BATCH
        xs, ys = (each[begin : begin + BATCH] for each in rows())
        optimizer.zero_grad()
        nn.functional.mse_loss(model(xs), ys).backward()
        optimizer.step()
        with torch.no_grad():
            for kept, live in zip(average.parameters(), model.parameters(), strict=True):
                kept.copy_(torch.lerp(kept, live, 1 - decay(step)))
    return average


def ramp_up(t: int, decay: float = 0.999) -> float:
    """Begin with a short average: (1 + t) / (10 + t) until it reaches the decay."""
    return min(decay, (1 + t) / (10 + t))


def half_life(t: int, images: int = BATCH, half: float = 40.0, ramp: float = 0.05) -> float:
    """Return StyleGAN2's decay: a half-life in images, and at first a share of the images that were seen."""
    return float(0.5 ** (images / max(min(half, ramp * (t + 1) * images), 1e-8)))


def power(t: int, gamma: float) -> float:
    """Return EDM2's decay, whose profile is a power of time (Karras et al., 2024)."""
    return float((1 - 1 / (t + 1)) ** (gamma + 1))


DECAYS = {
    "ramp-up": ramp_up,
    "half-life": half_life,
    "long profile": partial(power, gamma=6.94),
    "short profile": partial(power, gamma=16.97),
}


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_an_average_with_a_papers_decay_is_that_of_a_loop_by_hand(decay: Callable[[int], float]) -> None:
    learner = learner_of(EMA("model", decay))
    learner.fit(2, phases=[TrainingPhase()])
    for found, expected in zip(learner.weights["model@ema"].parameters(), averages_by_hand(decay, 2).parameters(),
                               strict=True):  # fmt: skip
        assert torch.equal(found, expected)


def test_profiles_of_several_lengths_stand_side_by_side_and_go_on_to_the_bit() -> None:
    def make() -> Learner:
        return learner_of(*(EMA("model", partial(power, gamma=gamma), view=f"by_{gamma}") for gamma in (4, 16)))

    assert_resumes_exactly(make, epochs=2, at=[3, 7])
    learner = make()
    learner.fit(2, phases=[TrainingPhase()])
    for gamma in (4, 16):
        by_hand = averages_by_hand(partial(power, gamma=gamma), 2)
        assert torch.equal(learner.weights[f"model@by_{gamma}"].weight, by_hand.weight)


def profile(gamma: float, steps: int) -> Tensor:
    """Return what each step's weights weigh in the average after so many steps, in float64."""
    shares = torch.zeros(steps, dtype=torch.float64)
    for t in range(steps):
        shares = shares * power(t, gamma)
        shares[t] = 1 - power(t, gamma)
    return shares


def test_an_average_of_another_length_is_made_afterwards_of_those_kept_after_each_epoch() -> None:
    kept: list[tuple[float, Tensor]] = []

    def keep(learner: Any) -> None:
        kept.extend((g, learner.weights[f"model@by_{g}"].weight.detach().double().flatten()) for g in (4, 16))

    averages = [EMA("model", partial(power, gamma=gamma), view=f"by_{gamma}") for gamma in (4, 16)]
    reads = ("model@by_4", "model@by_16")
    learner = learner_of(*averages, CustomCallback(keep, EpochEnd, TrainingPhase, reads=reads))
    epochs = 8
    learner.fit(epochs, phases=[TrainingPhase()])

    steps = epochs * STEPS
    basis = torch.zeros(steps, len(kept), dtype=torch.float64)
    for column, (gamma, _) in enumerate(kept):
        seen = (column // 2 + 1) * STEPS
        basis[:seen, column] = profile(gamma, seen)
    shares = torch.linalg.lstsq(basis, profile(8, steps)[:, None]).solution
    made = torch.stack([average for _, average in kept], dim=1) @ shares
    wanted = averages_by_hand(partial(power, gamma=8), epochs).weight.detach().double().flatten()
    apart = [(average - wanted).abs().max().item() for average in (made.flatten(), kept[-2][1], kept[-1][1])]
    assert apart[0] < min(apart[1:]) / 4


# CycleGAN's rate: as it is for half of the training, then down to 0 in a line


def small_gan() -> dict[str, nn.ModuleDict]:
    torch.manual_seed(1)
    kinds = ("ab", "ba"), ("a", "b")
    generators, critics = (nn.ModuleDict({each: nn.Conv2d(1, 1, 1) for each in names}) for names in kinds)
    return {"generators": generators, "critics": critics}


def cycle_gan(*callbacks: Any) -> Learner:
    images = torch.rand(2, STEPS * BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    kinds = {kind: TensorBatches(each, batch_size=BATCH) for kind, each in zip("ab", images, strict=True)}
    adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999))
    options: dict[str, Any] = {"default_callbacks": False, "accelerator": Accelerator("cpu"), "seed": 0}
    return Learner(small_gan(), data=(CombinedLoader(kinds),), optimizer=adam, callbacks=callbacks, **options)


def of_the_paper(epoch: int, constant: int = 2, falling: int = 2) -> float:
    """Return the authors' factor of the rate, with 2 and 2 epochs in place of 100 and 100."""
    return 1.0 - max(0, epoch + 1 - constant) / float(falling + 1)


WAYS = {
    "torch's": lambda: [
        LRScheduler(partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=of_the_paper), optimizer=name)
        for name in ("generators", "critics")
    ],
    "ours": lambda: [
        Scheduler({LearningRate: sequence((2e-4, 1), linear(3, 2e-4, 0.0))}, unit="epoch"),
    ],
}


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_the_rate_of_cycle_gan_stays_and_then_falls_for_both_optimizers(make: Callable[[], list[Any]]) -> None:
    rates: list[list[float]] = []

    def note(learner: Any) -> None:
        rates.append([each.param_groups[0]["lr"] for each in learner.optimizer])

    learner = cycle_gan(*make(), CustomCallback(note, UpdateBegin, reads=("optimizer",)))
    learner.fit(EPOCHS, phases=[CycleGANPhase(pool_size=4)])
    expected = [2e-4 * of_the_paper(epoch) for epoch in range(EPOCHS)]
    assert len(rates) == EPOCHS * STEPS * 2
    for number, both in enumerate(rates):
        assert both == pytest.approx([expected[number // (2 * STEPS)]] * 2, rel=1e-9)
    assert_resumes_exactly(
        lambda: cycle_gan(*make()), epochs=EPOCHS, phases=lambda: [CycleGANPhase(pool_size=4)], at=[8, 16]
    )
