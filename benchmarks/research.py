"""What a step of a GAN, of BYOL, of DINO and of WGAN-GP costs: against a loop written by hand, Lightning and Ignite.

    python benchmarks/research.py            # the tables; benchmarks/README.md says how to install the others
    python benchmarks/research.py --quick    # GAN and BYOL alone, one thread, fewer rounds

All networks are MLPs 64 wide, batches have 64 rows. All sides train the same: what is clipped, averaged and centred
is so in each of them, with torch's default optimizer in all but fluxloop, and they track the losses on the device and
drive a bar, as the learner's default callbacks do (without the line per epoch). fluxloop is measured eager and
compiled. A ratio is a side's time by that of the loop by hand.

"MB in steps" is the peak of what tensors allocate while training, beyond weights, averages and states of optimizers, by
torch's profiler, in a fresh process for each side: activations, gradients, and whatever is kept.

Before anything is timed, each side trains 100 steps from the same weights, with the same noise at every step: "trained"
is how far its weights and averages lie from those of the loop, as a share of the way that training moved them.
"""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import research_peers
import torch
from memory import tensor_peak
from peers import Loader
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
    "side": "<18",
    "threads": ">7",
    "µs": ">8.1f",
    "ratio": ">6.3f",
    "CPU ratio": ">9.3f",
    "trained": "<9",
}
HAND, EAGER, COMPILED = "by hand", "fluxloop", "fluxloop, compiled"


@dataclass(frozen=True)
class Method:
    """A method of training, twice.

    Args:
        name: As it stands in the table.
        models: Makes the models.
        batch: Makes a batch.
        loop: Makes the hand-written loop over models and batches, which draws noise and shares of rows.
        step: Makes the step of other frameworks.
        phase: Makes the learner's phase, which draws them alike.
        callbacks: Makes the learner's callbacks.
        optimizer: A factory.
    """

    name: str
    models: Callable[[], Models]
    batch: Callable[[torch.Generator], Any]
    loop: Loop
    step: Callable[[], research_peers.Step]
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
        lambda: research_peers.gan,
        lambda noise, share: GANPhase(noise=lambda count, device: noise(count)),
        lambda: [EMA("G", DECAY), GradientClip(CLIP)],
        ADAM,
    ),
    Method(
        "BYOL, EMA into the teacher",
        lambda: {**teacher_and_student(), "predictor": mlp(WIDTH, WIDTH, WIDTH)},
        lambda generator: (rows(generator), rows(generator)),
        byol,
        lambda: research_peers.byol,
        lambda noise, share: BYOLPhase(),
        lambda: [EMA("student", DECAY, into="teacher")],
        ADAMW,
    ),
    Method(
        "DINO, EMA into the teacher",
        teacher_and_student,
        lambda generator: tuple(rows(generator) for _ in range(4)),
        dino,
        research_peers.DINOStep,
        lambda noise, share: DINOPhase(center_momentum=CENTER),
        lambda: [EMA("student", DECAY, into="teacher")],
        ADAMW,
    ),
    Method(
        "WGAN-GP, 5 critic steps", adversaries, rows, wgan_gp, lambda: research_peers.wgan_gp, Penalised, list, ADAM
    ),
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
    models = with_average(method, models)
    return Side(models, method.loop(models, method.batches(), noise, share))


def with_average(method: Method, models: Models) -> Models:
    """Copy models, with the average of a GAN's generator."""
    models = copy.deepcopy(models)
    if method.loop is gan:
        models["average"] = copy.deepcopy(models["G"]).requires_grad_(False)
    return models


def by_peer(method: Method, models: Models, noise: Draw, share: Draw, frame: research_peers.Frame) -> Side:
    """Make the side of another framework."""
    models = with_average(method, models)
    trained: list[list[nn.Module]] = [[models["D"]], [models["G"]]] if "G" in models else [[models["student"]]]
    if "predictor" in models:
        trained[0].append(models["predictor"])
    optimizers = [method.optimizer([p for model in each for p in model.parameters()]) for each in trained]
    loader, tools = Loader(method.batches()), research_peers.Tools(noise, share, DECAY, CLIP, CENTER)
    fit = frame(models, optimizers, loader, method.step(), tools)
    return Side(models, research_peers.Fit(loader, fit))


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


def sides_of(method: Method, noise: Draw, share: Draw, only: str = "") -> dict[str, Side]:
    """Make all sides, or one, with equal weights and batches."""
    models = method.models()
    makers: dict[str, Callable[[], Side]] = {
        HAND: partial(by_hand, method, models, noise, share),
        EAGER: partial(by_learner, method, models, noise, share, False),
        COMPILED: partial(by_learner, method, models, noise, share, "step"),
        **{name: partial(by_peer, method, models, noise, share, f) for name, f in research_peers.installed().items()},
    }
    return {name: make() for name, make in makers.items() if only in ("", name)}


def drawn(count: int) -> Tensor:
    """Draw noise."""
    return torch.randn(count, WIDTH)


def require_same(method: Method) -> dict[str, str]:
    """Train fresh sides once, with the same noise at every step; return how far each lies from the loop by hand.

    Raises:
        DifferentTrainingError: One of them did not train the same.
    """
    torch.manual_seed(0)
    fixed, shares = torch.randn(ROWS, WIDTH), torch.rand(ROWS)
    sides = sides_of(method, lambda count: fixed, lambda count: shares)
    before = sides[HAND].numbers()
    for side in sides.values():
        side()
    wanted, found = sides.pop(HAND).numbers(), {HAND: "–"}
    for name, side in sides.items():
        share = ((side.numbers() - wanted).norm() / (wanted - before).norm()).item()
        if not share <= CLOSE:
            raise DifferentTrainingError(f"{method.name}, {name}: the weights lie {share:.2g} of their way apart")
        found[name] = f"{share:.1e}" if share else "same bits"
    return found


def measure(table: Table, method: Method, threads: int, rounds: int) -> None:
    """Measure one method: a row for each side."""
    torch.set_num_threads(threads)
    torch.compiler.reset()
    trained = require_same(method)
    torch.manual_seed(0)
    got = interleave(lambda: sides_of(method, drawn, torch.rand), units=STEPS, rounds=rounds)
    for side in got.laps:
        ratios = got.ratio(side, HAND), got.cpu_ratio(side, HAND)
        table.row(method.name, side, str(threads), got.micro(side), *ratios, trained[side])


def peak(method: Method, side: str) -> float:
    """Give the peak of what tensors allocate in the steps of a training, in MB: in this process, a fresh one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trained = sides_of(method, drawn, torch.rand, only=side)[side]
    trained()  # makes the states of optimizers, and the graphs
    for model in trained.models.values():
        model.zero_grad()
    return tensor_peak(trained.run)


def fresh(method: Method, side: str) -> float:
    """Give `peak` of a fresh process."""
    command = [sys.executable, __file__, method.name, side]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise SystemExit(f"{method.name}, {side} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def memory(methods: Sequence[Method]) -> None:
    """Print what tensors allocate in the steps of each side."""
    print()
    table = Table({"method": "<28", "side": "<18", "MB in steps": ">11.3f", "by hand": ">8.3f"})
    for method in methods:
        peaks = {side: fresh(method, side) for side in (HAND, EAGER, COMPILED, *research_peers.installed())}
        for side, of_side in peaks.items():
            table.row(method.name, side, of_side, of_side / peaks[HAND])


def main(argv: Sequence[str] | None = None) -> None:
    given: Any = sys.argv[1:] if argv is None else argv
    if len(given) == 2:
        (method,) = (each for each in METHODS if each.name == given[0])
        print(json.dumps(peak(method, given[1])))
        return
    quick = arguments(__doc__, argv).quick
    methods = METHODS[:2] if quick else METHODS
    table = Table(COLUMNS)
    for threads in (1,) if quick else (1, 2):
        for method in methods:
            measure(table, method, threads, rounds=6 if quick else 20)
    memory(methods)
    for name in research_peers.missing():
        print(f"\n{name} is not installed.")


if __name__ == "__main__":
    main()
