"""What a step of a GAN, of BYOL, of DINO and of WGAN-GP costs: eager and compiled, against a loop written by hand.

    python benchmarks/research.py            # the table
    python benchmarks/research.py --quick    # GAN and BYOL alone, fewer rounds

All networks are MLPs 64 wide, batches have 64 rows. Both sides train the same: what is clipped, averaged and centred
is so in the hand-written loop too, with torch's default optimizer, and it tracks the losses on the device and drives a
tqdm bar, as the learner's default callbacks do (without the line per epoch). One thread.

Before anything is timed, each side trains 100 steps from the same weights, with the same noise at every step: "trained"
is how far its weights and averages lie from those of the loop, as a share of the way that training moved them.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timing import Table, arguments, interleave
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, softplus
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from workloads import CLOSE, DifferentTrainingError, mlp

from fluxloop import (
    EMA,
    Accelerator,
    BYOLPhase,
    Callback,
    DINOPhase,
    GANPhase,
    GradientClip,
    Learner,
    MetricsPrinter,
    Phase,
    ProgressBar,
)
from fluxloop.losses import dino_loss, gradient_penalty

WIDTH = ROWS = 64
STEPS = 100
DECAY, CENTER, CLIP = 0.99, 0.9, 1.0
ADAM = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999))
ADAMW = partial(torch.optim.AdamW, lr=1e-3)

Models = dict[str, nn.Module]
Batches = Sequence[Any]
Draw = Callable[[int], Tensor]
Loop = Callable[[Models, Batches, Draw, Draw], Callable[[], None]]

COLUMNS = {
    "method": "<28",
    "fluxloop": "<8",
    "plain µs": ">9.1f",
    "fluxloop µs": ">11.1f",
    "ratio": ">6.3f",
    "CPU ratio": ">9.3f",
    "trained": "<9",
}


@dataclass(frozen=True)
class Method:
    """A method of training, twice.

    Args:
        name: As it stands in the table.
        models: Makes the models.
        batch: Makes a batch.
        loop: Makes the hand-written loop over models and batches, which draws noise and shares of rows.
        phase: Makes the learner's phase, which draws them alike.
        callbacks: Makes the learner's callbacks.
        optimizer: A factory.
    """

    name: str
    models: Callable[[], Models]
    batch: Callable[[torch.Generator], Any]
    loop: Loop
    phase: Callable[[Draw, Draw], Phase]
    callbacks: Callable[[], list[Callback]]
    optimizer: Callable[..., torch.optim.Optimizer]

    def batches(self) -> Batches:
        """Make the same batches in every call."""
        generator = torch.Generator().manual_seed(0)
        return [self.batch(generator) for _ in range(STEPS)]


# Loops by hand


@contextmanager
def tracking() -> Iterator[Callable[..., None]]:
    """Give what takes in the losses of a step: means on the device, and a tqdm bar."""
    totals: list[Tensor] = []
    with tqdm(total=STEPS, file=io.StringIO(), leave=False) as bar:

        def track(*losses: Tensor) -> None:
            with torch.no_grad():
                if not totals:
                    totals.extend(torch.zeros((), dtype=torch.float64) for _ in losses)
                for total, loss in zip(totals, losses, strict=True):
                    total += loss.detach()
            bar.update(1)

        yield track
    _ = [(total / STEPS).item() for total in totals]


@torch.no_grad()
def move(average: nn.Module, live: nn.Module) -> None:
    """Take a moving average of weights."""
    torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - DECAY)


def gan(models: Models, batches: Batches, noise: Draw, share: Draw) -> Callable[[], None]:
    """Make a GAN's loop: clipped gradients, an average of the generator."""
    generator, critic, average = models["G"], models["D"], models["average"]
    of_critic, of_generator = ADAM(critic.parameters()), ADAM(generator.parameters())

    def epoch() -> None:
        with tracking() as track:
            for real in batches:
                fake = generator(noise(len(real)))
                loss_d = softplus(-critic(real)).mean() + softplus(critic(fake.detach())).mean()
                of_critic.zero_grad()
                loss_d.backward()
                clip_grad_norm_(critic.parameters(), CLIP)
                of_critic.step()
                loss_g = softplus(-critic(fake)).mean()
                of_generator.zero_grad()
                loss_g.backward()
                clip_grad_norm_(generator.parameters(), CLIP)
                of_generator.step()
                move(average, generator)
                track(loss_d, loss_g)

    return epoch


def wgan_gp(models: Models, batches: Batches, noise: Draw, share: Draw) -> Callable[[], None]:
    """Make WGAN-GP's loop: five updates of the critic for one of the generator."""
    generator, critic = models["G"], models["D"]
    of_critic, of_generator = ADAM(critic.parameters()), ADAM(generator.parameters())

    def epoch() -> None:
        with tracking() as track:
            for index, real in enumerate(batches):
                trains_generator = index % 5 == 4
                with torch.set_grad_enabled(trains_generator):
                    fake = generator(noise(len(real)))
                loss_d = critic(fake.detach()).mean() - critic(real).mean()
                loss_d = loss_d + 10 * gradient_penalty(critic, real, fake, epsilon=share(len(real)))
                of_critic.zero_grad()
                loss_d.backward()
                of_critic.step()
                if trains_generator:
                    loss_g = -critic(fake).mean()
                    of_generator.zero_grad()
                    loss_g.backward()
                    of_generator.step()
                track(loss_d)

    return epoch


def byol(models: Models, batches: Batches, noise: Draw, share: Draw) -> Callable[[], None]:
    """Make BYOL's loop."""
    student, teacher, predictor = models["student"], models["teacher"], models["predictor"]
    optimizer = ADAMW([*student.parameters(), *predictor.parameters()])

    def epoch() -> None:
        with tracking() as track:
            for view1, view2 in batches:
                p1, p2 = predictor(student(view1)), predictor(student(view2))
                with torch.no_grad():
                    t1, t2 = teacher(view1), teacher(view2)
                loss = 4 - 2 * (cosine_similarity(p1, t2).mean() + cosine_similarity(p2, t1).mean())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                move(teacher, student)
                track(loss)

    return epoch


def dino(models: Models, batches: Batches, noise: Draw, share: Draw) -> Callable[[], None]:
    """Make DINO's loop: two global crops and two local ones."""
    student, teacher = models["student"], models["teacher"]
    optimizer = ADAMW(student.parameters())
    center = torch.zeros(WIDTH)

    def epoch() -> None:
        nonlocal center
        with tracking() as track:
            for crops in batches:
                guesses = [student(crop) for crop in crops]
                with torch.no_grad():
                    targets = [teacher(crop) for crop in crops[:2]]
                loss = dino_loss(guesses, targets, center)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                center = center * CENTER + torch.cat(targets).mean(0) * (1 - CENTER)
                move(teacher, student)
                track(loss)

    return epoch


# What is trained


class Penalised(GANPhase):
    """WGAN-GP whose share of real rows is drawn by a function."""

    def __init__(self, noise: Draw, share: Draw) -> None:
        super().__init__("wasserstein", noise=lambda rows, device: noise(rows), gradient_penalty=10, critic_steps=5)
        self.share = share

    def draw_epsilon(self, state: Any) -> Tensor:
        return self.share(len(state.real))


def rows(generator: torch.Generator) -> Tensor:
    """Draw rows."""
    return torch.randn(ROWS, WIDTH, generator=generator)


def adversaries() -> Models:
    """Make a generator and a critic."""
    return {"G": mlp(WIDTH, WIDTH, WIDTH), "D": mlp(WIDTH, WIDTH, 1)}


def teacher_and_student() -> Models:
    """Make a student, and a teacher that is a frozen copy."""
    student = mlp(WIDTH, WIDTH, WIDTH)
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}


METHODS = (
    Method(
        "GAN, EMA, clipped",
        adversaries,
        rows,
        gan,
        lambda noise, share: GANPhase(noise=lambda count, device: noise(count)),
        lambda: [EMA("G", DECAY), GradientClip(CLIP)],
        ADAM,
    ),
    Method(
        "BYOL, EMA into the teacher",
        lambda: {**teacher_and_student(), "predictor": mlp(WIDTH, WIDTH, WIDTH)},
        lambda generator: (rows(generator), rows(generator)),
        byol,
        lambda noise, share: BYOLPhase(),
        lambda: [EMA("student", DECAY, into="teacher")],
        ADAMW,
    ),
    Method(
        "DINO, EMA into the teacher",
        teacher_and_student,
        lambda generator: tuple(rows(generator) for _ in range(4)),
        dino,
        lambda noise, share: DINOPhase(center_momentum=CENTER),
        lambda: [EMA("student", DECAY, into="teacher")],
        ADAMW,
    ),
    Method("WGAN-GP, 5 critic steps", adversaries, rows, wgan_gp, Penalised, list, ADAM),
)


# Sides


@dataclass
class Side:
    """One way to train: calling it trains on all batches once."""

    models: Mapping[str, nn.Module]
    run: Callable[[], object]

    def __call__(self) -> object:
        return self.run()

    def numbers(self) -> Tensor:
        """Copy all weights and averages, one after the other."""
        return torch.cat([p.detach().flatten() for model in self.models.values() for p in model.parameters()])


def by_hand(method: Method, models: Models, noise: Draw, share: Draw) -> Side:
    """Make the hand-written side."""
    models = copy.deepcopy(models)
    if method.loop is gan:
        models["average"] = copy.deepcopy(models["G"]).requires_grad_(False)
    return Side(models, method.loop(models, method.batches(), noise, share))


def by_learner(method: Method, models: Models, noise: Draw, share: Draw, compile: Any) -> Side:
    """Make fluxloop's side."""
    learner = Learner(
        copy.deepcopy(models),
        data=(method.batches(),),
        optimizer=method.optimizer,
        callbacks=[*method.callbacks(), ProgressBar(enabled=True, file=io.StringIO())],
        accelerator=Accelerator("cpu", compile=compile),
        seed=0,
    )
    learner.remove_callback(MetricsPrinter)
    phase = method.phase(noise, share)
    held = {name: learner.weights[name] for name in learner.weights}
    return Side(held, lambda: learner.epoch(phase))


def sides_of(method: Method, noise: Draw, share: Draw) -> dict[str, Side]:
    """Make all sides, with equal weights and batches."""
    models = method.models()
    return {
        "plain": by_hand(method, models, noise, share),
        "eager": by_learner(method, models, noise, share, False),
        "step": by_learner(method, models, noise, share, "step"),
    }


def require_same(method: Method) -> dict[str, str]:
    """Train fresh sides once, with the same noise at every step; return how far each lies from the loop by hand.

    Raises:
        DifferentTrainingError: One of them did not train the same.
    """
    torch.manual_seed(0)
    fixed, shares = torch.randn(ROWS, WIDTH), torch.rand(ROWS)
    sides = sides_of(method, lambda count: fixed, lambda count: shares)
    before = sides["plain"].numbers()
    for side in sides.values():
        side()
    wanted, found = sides.pop("plain").numbers(), {}
    for name, side in sides.items():
        share = ((side.numbers() - wanted).norm() / (wanted - before).norm()).item()
        if not share <= CLOSE:
            raise DifferentTrainingError(f"{method.name}, {name}: the weights lie {share:.2g} of their way apart")
        found[name] = f"{share:.1e}"
    return found


def measure(table: Table, method: Method, rounds: int) -> None:
    """Measure one method: a row for eager steps, and one for compiled ones."""
    torch.compiler.reset()
    trained = require_same(method)
    torch.manual_seed(0)
    got = interleave(
        lambda: sides_of(method, lambda count: torch.randn(count, WIDTH), torch.rand), units=STEPS, rounds=rounds
    )
    for name, mode in (("eager", "eager"), ("step", "compiled")):
        times = got.micro("plain"), got.micro(name)
        table.row(method.name, mode, *times, got.ratio(name, "plain"), got.cpu_ratio(name, "plain"), trained[name])


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    torch.set_num_threads(1)
    table = Table(COLUMNS)
    for method in METHODS[:2] if quick else METHODS:
        measure(table, method, rounds=6 if quick else 20)


if __name__ == "__main__":
    main()
